"""The access log as JSON: one object a line, with what the request cost."""

import datetime
import time
from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web
from aiohttp.abc import AbstractAccessLogger

from engine.state import RequestState
from server.http.live import STATES
from server.http.owners import CLIENT
from server.http.request_ids import HEADER


class JsonAccessLogger(AbstractAccessLogger):
    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        client = request.get(CLIENT)
        line: dict[str, Any] = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "remote": request.remote,
            "client": client and client.name,
            "method": request.method,
            "path": request.path,
            "request_id": response.headers.get(HEADER),
            "status": response.status,
            "bytes": response.body_length,
            "seconds": round(time, 6),
        }
        if states := request.get(STATES):
            line |= cost_of(states)
        self.logger.info(orjson.dumps(line).decode())


def cost_of(states: Sequence[RequestState]) -> dict[str, Any]:
    """Sum the costs of all requests that one HTTP request made; the times are the slowest one's, in seconds."""
    now = time.perf_counter()

    def slowest(begin: str, end: str) -> float | None:
        spans = [
            (getattr(state.times, end) or now) - getattr(state.times, begin)
            for state in states
            if getattr(state.times, begin)
        ]
        return round(max(spans), 6) if spans else None

    return {
        "rid": states[0].rid,
        "num_requests": len(states),
        "prompt_tokens": sum(state.prompt_len for state in states),
        "cached_tokens": sum(state.num_cached_tokens for state in states),
        "completion_tokens": sum(len(state.output_ids) for state in states),
        "finish_reasons": sorted({state.finish_reason.type for state in states if state.finish_reason}),
        "queue_s": slowest("arrived", "scheduled"),
        "first_token_s": slowest("arrived", "first_token"),
    }
