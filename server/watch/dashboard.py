"""The live page at /dashboard, one static file, and the JSON it draws."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web

from cache.radix import Prefix
from engine.engine import Engine
from server.config import ServerConfig
from server.reading.protocol import JSON, json_response
from server.watch.monitor import Monitor, percentile

PAGE = Path(__file__).with_name("dashboard.html")
NUM_PREFIXES = 12
NUM_HEAD_TOKENS = NUM_TAIL_TOKENS = 24
PREFIX_INTERVAL_S = 5.0
RATE_SPAN_S, HIT_SPAN_S = 5.0, 60.0
BUSY_CPUS = 0.5  # CPU cores that a process uses at least while it computes a step
# The page is whole: whatever it would load from elsewhere is refused by the browser.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


class Dashboard:
    def __init__(self, engine: Engine, monitor: Monitor, config: ServerConfig) -> None:
        self.engine, self.monitor, self.config = engine, monitor, config
        self._page = PAGE.read_bytes()
        self._prefixes: list[JSON] = []  # as they were at _prefixes_at: looking for them takes milliseconds
        self._prefixes_at = -PREFIX_INTERVAL_S

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/dashboard", self.page), web.get("/dashboard/data", self.data)]

    async def page(self, _: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
        return web.Response(body=self._page, content_type="text/html", charset="utf-8", headers=headers)

    async def data(self, _: web.Request) -> web.Response:
        return json_response(
            {
                "model": self.config.model_name,
                "context_length": self.engine.context_length,
                "uptime_s": time.perf_counter() - self.monitor.started_at,
                "now": self._now(),
                "latency": self._latency(),
                "series": self._series(),
                "prefixes": self._recent_prefixes(),
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

    def _series(self) -> JSON:
        """Return a value a second for the last minutes, oldest first; `age_s` counts from now."""
        series, now = self.monitor.series(), time.perf_counter()
        return {
            "age_s": [round(now - sample.at, 1) for sample, _ in series],
            "generated_per_s": [round(rates.generated, 1) for _, rates in series],
            "prompt_per_s": [round(rates.prompt, 1) for _, rates in series],
            "num_running": [sample.num_running for sample, _ in series],
            "num_waiting": [sample.num_waiting for sample, _ in series],
            "held": [sample.num_held_tokens for sample, _ in series],
            "cached": [sample.num_cached_tokens for sample, _ in series],
        }

    def _recent_prefixes(self) -> list[JSON]:
        now = time.perf_counter()
        if now - self._prefixes_at >= PREFIX_INTERVAL_S:
            self._prefixes, self._prefixes_at = self._top_prefixes(), now
        return self._prefixes

    def _top_prefixes(self) -> list[JSON]:
        """Return the cached prefixes that saved most tokens; of long ones the first and the last of their text."""
        prefixes = sorted(self.engine.top_prefixes(4 * NUM_PREFIXES), key=lambda one: -one.hits * one.num_tokens)
        return [
            {
                "head": self._text(prefix.token_ids[: NUM_HEAD_TOKENS if _is_cut(prefix) else None]),
                "tail": self._text(prefix.token_ids[-NUM_TAIL_TOKENS:]) if _is_cut(prefix) else "",
                "num_tokens": prefix.num_tokens,
                "hits": prefix.hits,
                "num_users": prefix.lock_ref,
            }
            for prefix in prefixes[:NUM_PREFIXES]
        ]

    def _text(self, token_ids: np.ndarray) -> str:
        return self.engine.tokenizer.decode(token_ids.tolist(), skip_special_tokens=False)


def _is_cut(prefix: Prefix) -> bool:
    return prefix.num_tokens > NUM_HEAD_TOKENS + NUM_TAIL_TOKENS


def _percentiles(values: Sequence[float] | Any) -> JSON:
    ordered = sorted(values)
    return {"p50": percentile(ordered, 0.5), "p90": percentile(ordered, 0.9), "p99": percentile(ordered, 0.99)}
