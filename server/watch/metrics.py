"""Prometheus metrics: SGLang's under their names, and under `radixloop:` those that SGLang has no name for.

Counters and gauges are read from the engine's own when /metrics is asked; a request is counted into the histograms
when it ends. So metrics cost a token nothing.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from aiohttp import web
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from engine.engine import Engine
from engine.media import EncoderStats
from engine.state import RequestState
from server.watch.monitor import Monitor, percentile

if TYPE_CHECKING:
    from engine.schedule.scheduler import SchedulerStats  # which imports torch: the router has none of it

FIRST_TOKEN_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
LATENCY_BUCKETS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640)
TOKEN_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
LAG_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
TOKEN_COUNT_BUCKETS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
RATE_SPAN_S = 10.0


class Metrics:
    """The metrics of /metrics."""

    def __init__(
        self, engine: Engine, monitor: Monitor, model_name: str, left_out: Mapping[str, int], page_size: int = 1
    ) -> None:
        """left_out: number of parts by kind that requests were answered without, kept up to date by their readers."""
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine, monitor, model_name, left_out, page_size))
        ProcessCollector(registry=self.registry)  # memory, CPU seconds and open files, under Prometheus' own names

        def histogram(name: str, help: str, buckets: tuple[float, ...], **labels: str) -> Histogram:
            names = ["model_name", *labels]
            family = families.get(name)
            if family is None:
                family = Histogram(f"sglang:{name}", help, names, registry=self.registry, buckets=buckets)
                families[name] = family
            return family.labels(model_name, *labels.values())

        families: dict[str, Histogram] = {}
        self._first_token = histogram(
            "time_to_first_token_seconds", "from a request's arrival to its first token", FIRST_TOKEN_BUCKETS_S
        )
        self._latency = histogram(
            "e2e_request_latency_seconds", "from a request's arrival to its end", LATENCY_BUCKETS_S
        )
        self._queue = histogram(
            "queue_time_seconds", "from a request's arrival to its first step", FIRST_TOKEN_BUCKETS_S
        )
        self._prefill, self._decode = (
            histogram("per_stage_req_latency_seconds", "a stage of a request", LATENCY_BUCKETS_S, stage=stage)
            for stage in ("prefill", "decode")
        )
        self._token = [
            histogram(name, "between two tokens of an answer, its mean", TOKEN_BUCKETS_S)
            for name in ("inter_token_latency_seconds", "time_per_output_token_seconds")  # SGLang's new and old name
        ]
        self._prompt_len = histogram("prompt_tokens_histogram", "prompt tokens of a request", TOKEN_COUNT_BUCKETS)
        self._answer_len = histogram("generation_tokens_histogram", "tokens of an answer", TOKEN_COUNT_BUCKETS)
        lag = histogram("event_loop_lag_seconds", "how late the event loop is for what is due", LAG_BUCKETS_S)
        monitor.lag_observers.append(lag.observe)

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/metrics", self.metrics)]

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def observe(self, state: RequestState) -> None:
        """Record a request that has ended."""
        times, num_tokens = state.times, len(state.output_ids)
        if not times.scheduled:
            return
        self._queue.observe(times.scheduled - times.arrived)
        if not (times.finished and num_tokens):
            return
        self._first_token.observe(times.first_token - times.arrived)
        self._latency.observe(times.finished - times.arrived)
        self._prefill.observe(times.first_token - times.scheduled)
        self._decode.observe(times.finished - times.first_token)
        self._prompt_len.observe(state.prompt_len)
        self._answer_len.observe(num_tokens)
        if num_tokens > 1:
            for histogram in self._token:
                histogram.observe((times.finished - times.first_token) / (num_tokens - 1))


SchedulerGauge = tuple[str, str, Callable[["SchedulerStats"], float]]  # (name, help, its value)
GAUGES: Sequence[SchedulerGauge] = (
    ("sglang:num_running_reqs", "requests that run", lambda s: s.num_running),
    ("sglang:num_queue_reqs", "requests that wait", lambda s: s.num_waiting),
    ("sglang:num_used_tokens", "KV slots held by running requests", lambda s: s.num_held_tokens),
    ("sglang:token_usage", "their share of the pool, the fuller one of two", lambda s: s.usage),
    ("sglang:max_total_num_tokens", "KV slots of the pool", lambda s: s.num_total_tokens),
    ("sglang:kv_used_tokens", "KV slots that requests hold", lambda s: s.num_held_tokens),
    ("sglang:kv_evictable_tokens", "KV slots of prefixes that nothing runs on", lambda s: s.num_cached_tokens),
    ("sglang:kv_available_tokens", "free KV slots", lambda s: s.num_free_tokens),
    (
        "sglang:cache_hit_rate", "share of prompt tokens found in the cache",
        lambda s: s.num_hit_tokens / max(s.num_prompt_tokens, 1),
    ),
    ("sglang:new_token_ratio", "share of the asked answers that is reserved", lambda s: s.new_token_ratio),
    ("radixloop:num_cached_tokens", "KV slots of prefixes that nothing runs on", lambda s: s.num_cached_tokens),
    ("radixloop:num_queued_tokens", "prompt tokens of requests that wait", lambda s: s.num_waiting_tokens),
    ("radixloop:num_cached_prefixes", "nodes of the prefix tree", lambda s: s.cache.num_nodes),
)  # fmt: skip
# Of the smaller pool of layers that see a window, which models without such layers lack.
WINDOW_GAUGES: Sequence[SchedulerGauge] = (
    ("sglang:full_token_usage", "share of the other pool", lambda s: s.num_held_tokens / s.num_total_tokens),
    (
        "sglang:swa_token_usage", "share of the pool of layers that see a window, held by running requests",
        lambda s: s.num_held_window_tokens / s.num_total_window_tokens,
    ),
    ("sglang:swa_used_tokens", "slots held there", lambda s: s.num_held_window_tokens),
    (
        "sglang:swa_evictable_tokens", "slots there of prefixes that nothing runs on",
        lambda s: s.num_cached_window_tokens,
    ),
    ("sglang:swa_available_tokens", "free slots there", lambda s: s.num_free_window_tokens),
    ("radixloop:num_window_tokens", "slots there", lambda s: s.num_total_window_tokens),
)  # fmt: skip


class EngineCollector(Collector):
    """Reads the engine when Prometheus asks."""

    def __init__(
        self, engine: Engine, monitor: Monitor, model_name: str, left_out: Mapping[str, int], page_size: int
    ) -> None:
        self.engine, self.monitor, self.model_name, self.left_out = engine, monitor, model_name, left_out
        self.page_size = page_size

    def collect(self) -> Iterable[Metric]:
        stats = self.engine.stats()
        scheduler, loop = stats.scheduler, stats.loop
        health, rates = self.engine.health(), self.monitor.rates(RATE_SPAN_S)

        yield from self._by_replica(GAUGES)
        if scheduler.num_total_window_tokens:
            yield from self._by_replica(WINDOW_GAUGES)
        yield self._gauge("sglang:gen_throughput", "tokens generated a second, lately", rates.generated)
        yield self._counter("sglang:prompt_tokens", "prompt tokens admitted", scheduler.num_prompt_tokens)
        yield self._counter("sglang:cached_tokens", "prompt tokens found in the cache", scheduler.num_hit_tokens)
        yield self._counter("sglang:generation_tokens", "tokens generated", loop.num_generated_tokens)
        yield self._counter(
            "sglang:realtime_tokens", "tokens so far",
            {
                "prefill_compute": scheduler.num_prompt_tokens - scheduler.num_hit_tokens,
                "prefill_cache": scheduler.num_hit_tokens,
                "decode": loop.num_generated_tokens,
            },
            "mode",
        )  # fmt: skip
        yield self._counter("sglang:num_requests", "requests accepted", stats.num_requests)
        yield self._counter("sglang:num_aborted_requests", "requests aborted", stats.num_aborted)
        grammars = stats.grammars
        yield self._counter(
            "sglang:num_so_requests", "requests with a grammar, refused grammars included",
            grammars.num_compiled + grammars.num_cache_hits,
        )  # fmt: skip
        compile_time = SummaryMetricFamily(
            "sglang:grammar_compilation_time_seconds", "of a grammar that was not remembered", labels=["model_name"]
        )
        compile_time.add_metric([self.model_name], grammars.num_compiled, grammars.compile_s)
        yield compile_time
        yield self._counter("sglang:num_grammar_cache_hit", "grammars that were remembered", grammars.num_cache_hits)
        yield self._counter(
            "sglang:num_retracted_requests",
            "times a request gave its slots back and waited again",
            scheduler.num_retractions,
        )

        if self.engine.media_kinds:
            yield from self._pictures(stats.encoder)
        yield from self._of_gateways(scheduler)
        yield self._gauge(
            "radixloop:oldest_queued_seconds", "wait of the request that waits longest", health.oldest_queued_s
        )
        yield self._gauge("radixloop:last_step_age_seconds", "since a step came back", health.last_step_age_s)
        yield self._gauge(
            "radixloop:drain_tokens_per_second",
            "tokens of requests that end, by working second",
            stats.drain_tokens_per_s,
        )
        yield self._gauge("radixloop:host_us_per_step", "host microseconds a step, lately", rates.host_us_per_step)
        yield self._gauge(
            "radixloop:event_loop_lag_seconds", "over the last minute",
            {share: percentile(self.monitor.lags, float(share)) or 0.0 for share in ("0.5", "0.99", "1")}, "quantile",
        )  # fmt: skip
        yield self._gauge("radixloop:event_loop_tasks", "asyncio tasks", len(asyncio.all_tasks()))
        yield self._counter("radixloop:num_refused_requests", "requests refused for a full queue", stats.num_refused)
        yield self._counter(
            "radixloop:left_out", "parts of requests that their answers do without", dict(self.left_out), "kind"
        )
        yield self._counter("radixloop:steps", "steps resolved", loop.num_steps)
        yield self._counter("radixloop:failed_steps", "steps that raised", loop.num_failed_steps)
        yield self._counter(
            "radixloop:bookkeeping_violations", "mistakes in the account of KV slots, found while idle",
            loop.num_violations,
        )  # fmt: skip
        yield self._counter(
            "radixloop:canary_alarms", "times that a known text's log-probabilities were not what they were first",
            stats.canary.num_alarms,
        )  # fmt: skip
        yield self._gauge("radixloop:canary_drift", "their mean distance from the first", stats.canary.drift)
        yield self._counter("radixloop:evicted_tokens", "cached tokens given up", scheduler.cache.num_evicted)
        yield self._counter("radixloop:device_idle_seconds", "between two steps on the device", loop.device_idle_s)
        yield self._counter(
            "radixloop:host_seconds",
            "host time of steps",
            {
                "schedule": loop.schedule_s,
                "launch": loop.launch_s,
                "resolve": loop.resolve_s,
                "deliver": loop.deliver_s,
            },
            "stage",
        )

    def _of_gateways(self, scheduler: "SchedulerStats") -> Iterable[Metric]:
        """Yield what Kubernetes' gateways for inference and llm-d choose servers by, under the names they ask for."""
        yield self._gauge("vllm:num_requests_waiting", "requests that wait", scheduler.num_waiting)
        yield self._gauge("vllm:num_requests_running", "requests that run", scheduler.num_running)
        yield self._gauge("vllm:kv_cache_usage_perc", "share of the KV pool that they hold", scheduler.usage)
        size = GaugeMetricFamily("vllm:cache_config_info", "the KV pool", labels=["block_size", "num_gpu_blocks"])
        size.add_metric([str(self.page_size), str(scheduler.num_total_tokens // self.page_size)], 1.0)
        yield size

    def _pictures(self, encoder: EncoderStats) -> Iterable[Metric]:
        """Yield what there is of pictures and videos, for a model that reads some."""
        yield self._counter(
            "radixloop:pictures", "pictures and videos that requests needed features of",
            {"seen": encoder.num_encoded, "found": encoder.num_hits, "failed": encoder.num_failed}, "result",
        )  # fmt: skip
        yield self._counter("radixloop:tower_seconds", "in which the tower had pictures to see", encoder.encode_s)
        yield self._gauge("radixloop:feature_bytes", "of pictures' features, held or kept", encoder.feature_bytes)

    def _by_replica(self, gauges: Sequence[SchedulerGauge]) -> Iterable[Metric]:
        """Yield gauges of a scheduler; of several engines one value each, which SGLang labels with its dp_rank."""
        schedulers = [stats.scheduler for stats in self.engine.replica_stats()]
        for name, help, value_of in gauges:
            values = [value_of(scheduler) for scheduler in schedulers]
            if len(values) == 1:
                yield self._gauge(name, help, values[0])
            else:
                yield self._gauge(name, help, {str(i): value for i, value in enumerate(values)}, "dp_rank")

    def _gauge(self, name: str, help: str, values: float | dict[str, float], label: str = "") -> Metric:
        return self._filled(GaugeMetricFamily, name, help, values, label)

    def _counter(self, name: str, help: str, values: float | dict[str, float], label: str = "") -> Metric:
        return self._filled(CounterMetricFamily, name, help, values, label)

    def _filled(
        self,
        family: type[GaugeMetricFamily | CounterMetricFamily],
        name: str,
        help: str,
        values: float | dict[str, float],
        label: str,
    ) -> Metric:
        """Fill in one value, or one for each value of `label`."""
        if not isinstance(values, dict):
            metric = family(name, help, labels=["model_name"])
            metric.add_metric([self.model_name], values)
            return metric
        metric = family(name, help, labels=["model_name", label])
        for key, value in values.items():
            metric.add_metric([self.model_name, key], value)
        return metric
