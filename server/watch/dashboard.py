"""The live page at /dashboard, and the JSON it draws."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from aiohttp import web

from engine.engine import Engine, EngineStats
from engine.errors import InvalidRequest
from engine.state import RequestState
from engine.views import BranchView, RequestView
from server.config import ServerConfig
from server.http.live import LiveRequests
from server.pages.page import Page
from server.reading.protocol import JSON, json_response
from server.watch.monitor import SHORT_SPAN_S, STEPS_S, Monitor, percentile
from server.watch.processes import ProcessWatch

NUM_PREFIXES, NUM_BRANCHES, NUM_REQUESTS = 12, 48, 64
NUM_HEAD_TOKENS = NUM_TAIL_TOKENS = 24
TREE_INTERVAL_S = 5.0
RATE_SPAN_S, HIT_SPAN_S = 5.0, 60.0
BUSY_CPUS = 0.5  # CPU cores that a process uses at least while it computes a step


class Dashboard:
    def __init__(self, engine: Engine, monitor: Monitor, config: ServerConfig, live: LiveRequests) -> None:
        self.engine, self.monitor, self.config, self.live = engine, monitor, config, live
        self._page = Page("dashboard.html")
        self._processes = ProcessWatch()
        self._prefixes: list[JSON] = []  # as they were at _tree_at, as _branches: looking for them takes milliseconds
        self._branches: list[JSON] = []
        self._tree_at = -TREE_INTERVAL_S
        self._ends: dict[str, tuple[str, str]] = {}  # of the prompts that are shown, by rid

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/dashboard", self.page), web.get("/dashboard/data", self.data)]

    async def page(self, request: web.Request) -> web.Response:
        return self._page.response(request)

    async def data(self, request: web.Request) -> web.Response:
        """Report what there is to see. `?span=`: seconds of the curves, one of those in STEPS_S."""
        span = request.query.get("span", str(SHORT_SPAN_S))
        if span not in map(str, STEPS_S):
            raise InvalidRequest(f"span must be one of {', '.join(map(str, STEPS_S))}, got {span[:20]!r}", "span")
        self._look_at_tree()
        return json_response(
            {
                "model": self.config.model_name,
                "context_length": self.engine.context_length,
                "uptime_s": time.perf_counter() - self.monitor.started_at,
                "now": self._now(),
                "latency": self._latency(),
                "series": self._series(int(span)),
                "requests": self._requests(),
                "prefixes": self._prefixes,
                "branches": self._branches,
                "replicas": [_replica(stats) for stats in self.engine.replica_stats()],
                "ranks": self.config.tp_size,
                "processes": self._processes.report(),
            }
        )

    def _now(self) -> JSON:
        stats, health = self.engine.stats(), self.engine.health()
        scheduler = stats.scheduler
        rates, recent = self.monitor.rates(RATE_SPAN_S), self.monitor.rates(HIT_SPAN_S)
        return {
            # A step that takes long on a CPU is at work; one that hangs uses no CPU, and nor does a hung GPU's.
            "status": "busy" if health.status == "stuck" and rates.cpus >= BUSY_CPUS else health.status,
            "num_running": scheduler.num_running,
            "num_waiting": scheduler.num_waiting,
            "num_waiting_tokens": scheduler.num_waiting_tokens,
            "oldest_queued_s": health.oldest_queued_s,
            "generated_per_s": rates.generated,
            "prompt_per_s": rates.prompt,
            "steps_per_s": rates.steps,
            "host_us_per_step": rates.host_us_per_step,
            "device_idle": rates.device_idle,
            "hit_rate": recent.hit_rate,
            "hit_rate_total": scheduler.num_hit_tokens / max(scheduler.num_prompt_tokens, 1),
            "kv": {
                "held": scheduler.num_held_tokens,
                "cached": scheduler.num_cached_tokens,
                "total": scheduler.num_total_tokens,
            },
            "num_requests": stats.num_requests,
            "num_aborted": stats.num_aborted,
            "num_refused": stats.num_refused,
            "num_retractions": scheduler.num_retractions,
            "num_failed_steps": stats.loop.num_failed_steps,
            "num_generated_tokens": stats.loop.num_generated_tokens,
            "num_violations": health.num_violations,
            "canary": dataclasses.asdict(stats.canary),
        }

    def _latency(self) -> JSON:
        """Return percentiles in seconds, of the last requests that ended and of the event loop's lag."""
        ended = list(self.monitor.ended)
        return {
            "num_requests": len(ended),
            "queue": _percentiles([one.queue_s for one in ended]),
            "first_token": _percentiles([one.first_token_s for one in ended]),
            "token": _percentiles([one.token_s for one in ended if one.token_s is not None]),
            "total": _percentiles([one.total_s for one in ended]),
            "loop_lag": _percentiles(self.monitor.lags),
        }

    def _series(self, span_s: int) -> JSON:
        """Return some 300 values of each curve, oldest first; `age_s` counts from now."""
        series, now = self.monitor.series(span_s), time.perf_counter()
        return {
            "span_s": span_s,
            "age_s": [round(now - sample.at, 1) for sample, _ in series],
            "generated_per_s": [round(rates.generated, 1) for _, rates in series],
            "prompt_per_s": [round(rates.prompt, 1) for _, rates in series],
            "hit_rate": [round(rates.hit_rate, 3) for _, rates in series],
            "num_running": [round(sample.num_running, 1) for sample, _ in series],
            "num_waiting": [round(sample.num_waiting, 1) for sample, _ in series],
            "held": [round(sample.num_held_tokens) for sample, _ in series],
            "cached": [round(sample.num_cached_tokens) for sample, _ in series],
        }

    def _requests(self) -> list[JSON]:
        """Return the requests that came first and have not ended."""
        now, shown = time.perf_counter(), {}
        requests = []
        for view in self.engine.oldest_requests(NUM_REQUESTS):
            if (state := self.live.state_of(view.rid)) is None:
                continue  # the server's own, or it is ending
            shown[view.rid] = ends = self._ends.get(view.rid) or self._text_ends(state.request.input_ids)
            requests.append(_request(view, state, ends, now))
        self._ends = shown
        return requests

    def _look_at_tree(self) -> None:
        now = time.perf_counter()
        if now - self._tree_at >= TREE_INTERVAL_S:
            self._tree_at = now
            self._prefixes = self._top_prefixes()
            self._branches = [self._branch(branch) for branch in self.engine.top_branches(NUM_BRANCHES)]

    def _top_prefixes(self) -> list[JSON]:
        """Return the cached prefixes that saved most tokens; of long ones the first and the last of their text."""
        prefixes = sorted(self.engine.top_prefixes(4 * NUM_PREFIXES), key=lambda one: -one.hits * one.num_tokens)
        shown = []
        for prefix in prefixes[:NUM_PREFIXES]:
            head, tail = self._text_ends(prefix.token_ids)
            counts = {"num_tokens": prefix.num_tokens, "hits": prefix.hits, "num_users": prefix.lock_ref}
            shown.append({"head": head, "tail": tail, **counts})
        return shown

    def _branch(self, branch: BranchView) -> JSON:
        return {
            "replica": branch.replica,
            "parent": branch.parent,
            "start": branch.start,
            "num_tokens": branch.num_tokens,
            "head": self._text(branch.head),
            "num_users": branch.num_users,
            "hits": branch.hits,
            "num_hidden": branch.num_hidden,
            "rids": branch.rids,
        }

    def _text_ends(self, token_ids: Sequence[int] | np.ndarray) -> tuple[str, str]:
        """Return the first and the last of a text; all of a short one, and nothing."""
        if len(token_ids) <= NUM_HEAD_TOKENS + NUM_TAIL_TOKENS:
            return self._text(token_ids), ""
        return self._text(token_ids[:NUM_HEAD_TOKENS]), self._text(token_ids[-NUM_TAIL_TOKENS:])

    def _text(self, token_ids: Sequence[int] | np.ndarray) -> str:
        return self.engine.tokenizer.decode([*map(int, token_ids)], skip_special_tokens=False)


def _request(view: RequestView, state: RequestState, ends: tuple[str, str], now: float) -> JSON:
    return {
        "rid": view.rid,
        "client": state.request.client,
        "head": ends[0],
        "tail": ends[1],
        "is_running": view.is_running,
        "age_s": now - state.times.arrived,
        "num_prompt_tokens": state.prompt_len,
        "num_cached_tokens": view.num_cached_tokens,
        "num_output_tokens": view.num_output_tokens,
        "max_new_tokens": state.max_new_tokens,
    }


def _replica(stats: EngineStats) -> JSON:
    scheduler = stats.scheduler
    return {
        "num_running": scheduler.num_running,
        "num_waiting": scheduler.num_waiting,
        "held": scheduler.num_held_tokens,
        "cached": scheduler.num_cached_tokens,
        "total": scheduler.num_total_tokens,
        "num_generated_tokens": stats.loop.num_generated_tokens,
        "hit_rate_total": scheduler.num_hit_tokens / max(scheduler.num_prompt_tokens, 1),
        "num_retractions": scheduler.num_retractions,
        "canary_drift": stats.canary.drift,
    }


def _percentiles(values: Sequence[float] | Any) -> JSON:
    ordered = sorted(values)
    return {"p50": percentile(ordered, 0.5), "p90": percentile(ordered, 0.9), "p99": percentile(ordered, 0.99)}
