"""The access log as JSON: one object a line, with what the request cost."""

import datetime
import time
from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web
from aiohttp.abc import AbstractAccessLogger

from engine.request import Request
from server.http.live import REQUESTS
from server.http.owners import CLIENT


class JsonAccessLogger(AbstractAccessLogger):
    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        client = request.get(CLIENT)
        line: dict[str, Any] = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "remote": request.remote,
            "client": client and client.name,
            "method": request.method,
            "path": request.path,
            "status": response.status,
            "bytes": response.body_length,
            "seconds": round(time, 6),
        }
        if requests := request.get(REQUESTS):
            line |= cost_of(requests)
        self.logger.info(orjson.dumps(line).decode())


def cost_of(requests: Sequence[Request]) -> dict[str, Any]:
    """Sum the costs of all requests that one HTTP request made; the times are the slowest one's, in seconds."""
    now = time.perf_counter()

    def slowest(begin: str, end: str) -> float | None:
        spans = [
            (getattr(request.times, end) or now) - getattr(request.times, begin)
            for request in requests
            if getattr(request.times, begin)
        ]
        return round(max(spans), 6) if spans else None

    return {
        "rid": requests[0].rid,
        "num_requests": len(requests),
        "prompt_tokens": sum(request.prompt_len for request in requests),
        "cached_tokens": sum(request.num_cached_tokens for request in requests),
        "completion_tokens": sum(len(request.output_ids) for request in requests),
        "finish_reasons": sorted({request.finish_reason.type for request in requests if request.finish_reason}),
        "queue_s": slowest("arrived", "scheduled"),
        "first_token_s": slowest("arrived", "first_token"),
    }
