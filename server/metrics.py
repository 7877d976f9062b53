"""Prometheus metrics under SGLang's names."""

from collections.abc import Iterable

from aiohttp import web
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.request import Request
from server.protocol import Engine

FIRST_TOKEN_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
LATENCY_BUCKETS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320)
TOKEN_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """What /metrics tells: the engine's own counters, read when asked, and the times of requests that ended."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine, model_name))

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(f"sglang:{name}", help, ["model_name"], registry=self.registry, buckets=buckets)
            return family.labels(model_name)

        self._first_token = histogram(
            "time_to_first_token_seconds", "from a request's arrival to its first token", FIRST_TOKEN_BUCKETS_S
        )
        self._latency = histogram(
            "e2e_request_latency_seconds", "from a request's arrival to its end", LATENCY_BUCKETS_S
        )
        self._queue = histogram(
            "queue_time_seconds", "from a request's arrival to its first step", FIRST_TOKEN_BUCKETS_S
        )
        self._token = histogram(
            "inter_token_latency_seconds", "between two tokens of an answer, its mean", TOKEN_BUCKETS_S
        )

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/metrics", self.metrics)]

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def observe(self, request: Request) -> None:
        times, num_tokens = request.times, len(request.output_ids)
        if times.scheduled:
            self._queue.observe(times.scheduled - times.arrived)
        if not (times.finished and num_tokens):
            return
        self._first_token.observe(times.first_token - times.arrived)
        self._latency.observe(times.finished - times.arrived)
        if num_tokens > 1:
            self._token.observe((times.finished - times.first_token) / (num_tokens - 1))


class EngineCollector(Collector):
    def __init__(self, engine: Engine, model_name: str) -> None:
        self.engine, self.model_name = engine, model_name

    def collect(self) -> Iterable[Metric]:
        stats = self.engine.stats()
        scheduler, loop = stats.scheduler, stats.loop
        num_hit, num_prompt = scheduler.num_hit_tokens, scheduler.num_prompt_tokens
        gauges = {
            "num_running_reqs": ("requests that run", scheduler.num_running),
            "num_queue_reqs": ("requests that wait", scheduler.num_waiting),
            "num_used_tokens": ("KV slots held by running requests", scheduler.num_held_tokens),
            "token_usage": ("their share of the pool", scheduler.num_held_tokens / scheduler.num_total_tokens),
            "max_total_num_tokens": ("KV slots of the pool", scheduler.num_total_tokens),
            "cache_hit_rate": (
                "share of prompt tokens found in the cache",
                num_hit / num_prompt if num_prompt else 0.0,
            ),
        }
        counters = {
            "prompt_tokens": ("prompt tokens admitted", num_prompt),
            "cached_tokens": ("prompt tokens found in the cache", num_hit),
            "generation_tokens": ("tokens generated", loop.num_generated_tokens),
            "num_requests": ("requests accepted", stats.num_requests),
            "num_aborted_requests": ("requests aborted", stats.num_aborted),
            "num_retracted_requests": (
                "times a request gave its slots back and waited again",
                scheduler.num_retractions,
            ),
        }
        families: tuple[tuple[type[GaugeMetricFamily | CounterMetricFamily], dict[str, tuple[str, float]]], ...] = (
            (GaugeMetricFamily, gauges),
            (CounterMetricFamily, counters),
        )
        for family, values in families:
            for name, (help, value) in values.items():
                metric = family(f"sglang:{name}", help, labels=["model_name"])
                metric.add_metric([self.model_name], value)
                yield metric
