"""SGLang's /v1/loads and vLLM's /load: how busy each replica is, for load balancers."""

from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from engine.engine import Engine, EngineStats
from engine.errors import InvalidRequest
from server.reading.protocol import JSON, json_response
from server.watch.monitor import Monitor

RATE_SPAN_S = 5.0
# SGLang's names of parts of its answer. Only the core is known here: an answer lacks what it has nothing to say of.
SECTIONS = ("all", "core", "memory", "spec", "lora", "disagg", "queues")


class Loads:
    def __init__(self, engine: Engine, monitor: Monitor) -> None:
        self.engine, self.monitor = engine, monitor

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v1/loads", self.loads), web.get("/load", self.load)]

    async def load(self, _: web.Request) -> web.Response:
        """Report the number of requests that run or wait."""
        scheduler = self.engine.stats().scheduler
        return json_response({"server_load": scheduler.num_running + scheduler.num_waiting})

    async def loads(self, http_request: web.Request) -> web.Response:
        """Report the load of each replica, or of the one that `?dp_rank=` names, and their sums and means."""
        query = http_request.query
        for section in query.get("include", "all").split(","):
            if section.strip() not in SECTIONS:
                raise InvalidRequest(
                    f"include must name some of {', '.join(SECTIONS)}, got {section[:20]!r}", "include"
                )
        if query.get("format", "json") != "json":
            raise InvalidRequest("format must be json; Prometheus' is served at /metrics (--enable-metrics)", "format")
        replicas = self.engine.replica_stats()
        rank = query.get("dp_rank", "")
        ranks = [i for i in range(len(replicas)) if rank in ("", str(i))]
        if not ranks:
            raise InvalidRequest(f"dp_rank must be from 0 to {len(replicas) - 1}, got {rank[:20]!r}", "dp_rank")
        limit, throughputs = self.engine.max_running_requests // len(replicas), self.monitor.throughputs(RATE_SPAN_S)
        loads = [{"dp_rank": i, **_load(replicas[i], limit, throughputs[i])} for i in ranks]
        return json_response(
            {
                "timestamp": datetime.now(UTC).isoformat(),
                "dp_rank_count": len(replicas),
                "loads": loads,
                "aggregate": _aggregate(loads),
            }
        )


def _load(stats: EngineStats, max_running: int, throughput: float) -> JSON:
    """Return a replica's load. num_total_tokens: in KV slots and in the prompts that wait."""
    scheduler = stats.scheduler
    return {
        "num_running_reqs": scheduler.num_running,
        "num_waiting_reqs": scheduler.num_waiting,
        "num_total_reqs": scheduler.num_running + scheduler.num_waiting,
        "num_used_tokens": scheduler.num_held_tokens,
        "num_total_tokens": scheduler.num_held_tokens + scheduler.num_waiting_tokens,
        "max_total_num_tokens": scheduler.num_total_tokens,
        "token_usage": scheduler.usage,
        "gen_throughput": throughput,
        "cache_hit_rate": scheduler.num_hit_tokens / max(scheduler.num_prompt_tokens, 1),
        "utilization": scheduler.num_running / max_running,
        "max_running_requests": max_running,
    }


def _aggregate(loads: list[JSON]) -> JSON:
    """Return the sums of counts and the means of shares, as SGLang names them."""

    def total(name: str) -> Any:
        return sum(load[name] for load in loads)

    return {
        "total_running_reqs": total("num_running_reqs"),
        "total_waiting_reqs": total("num_waiting_reqs"),
        "total_reqs": total("num_total_reqs"),
        "total_used_tokens": total("num_used_tokens"),
        "total_tokens": total("num_total_tokens"),
        "avg_token_usage": total("token_usage") / len(loads),
        "avg_throughput": total("gen_throughput") / len(loads),
        "avg_utilization": total("utilization") / len(loads),
    }
