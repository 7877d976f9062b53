"""The log's lines about requests, and SGLang's /configure_logging, which switches them while the server runs."""

import logging
import time
from typing import Annotated, Any

from aiohttp import web
from msgspec import Meta

from engine.declared import Object
from engine.engine import TokenizerFacade
from engine.state import RequestState
from server.config import ServerConfig
from server.http.live import LiveRequests
from server.reading.protocol import json_response, read_body

logger = logging.getLogger(__name__)

MAX_LOGGED_CHARS = 2048
# SGLang's. What they switch on is chosen at the start here: --crash-dump-folder.
UNSUPPORTED = ("dump_requests_folder", "dump_requests_threshold", "crash_dump_folder", "log_requests_format")


class LoggingRequest(Object, unsupported=UNSUPPORTED):
    log_requests: bool | None = None
    log_requests_level: Annotated[int, Meta(ge=0, le=3)] | None = None


class LoggingApi:
    def __init__(self, tokenizer: TokenizerFacade, config: ServerConfig, live: LiveRequests) -> None:
        self._live = live
        self._log = RequestLog(tokenizer, config.log_requests_level)
        self._set_on(config.log_requests)

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/configure_logging", self.configure)]

    async def configure(self, http_request: web.Request) -> web.Response:
        """Change what is given, and return what holds now."""
        body = await read_body(http_request, LoggingRequest)
        is_on = self._is_on if body.log_requests is None else body.log_requests
        level = self._log.level if body.log_requests_level is None else body.log_requests_level
        self._log.level = level
        self._set_on(is_on)
        return json_response({"log_requests": is_on, "log_requests_level": level})

    @property
    def _is_on(self) -> bool:
        return self._log in self._live.observers

    def _set_on(self, is_on: bool) -> None:
        if is_on and not self._is_on:
            self._live.observers.append(self._log)
        elif not is_on and self._is_on:
            self._live.observers.remove(self._log)


def escaped(text: str) -> str:
    """Return a client's text for a line of the log: without line ends and other control characters."""
    return text if text.isprintable() else ascii(text)[1:-1]


class RequestLog:
    """Writes a line for each request that ended. `level` 0 to 3: how much it reports, see --log-requests-level."""

    def __init__(self, tokenizer: TokenizerFacade, level: int) -> None:
        self.tokenizer, self.level = tokenizer, level

    def __call__(self, state: RequestState) -> None:
        reason = state.finish_reason
        facts: dict[str, Any] = {
            "prompt_tokens": state.prompt_len,
            "completion_tokens": len(state.output_ids),
            "cached_tokens": state.num_cached_tokens,
            "finish_reason": reason.type if reason else None,
            "seconds": round((state.times.finished or time.perf_counter()) - state.times.arrived, 4),
        }
        if self.level >= 1:
            facts["sampling_params"] = state.resolved_params()
        if self.level >= 2:
            limit = MAX_LOGGED_CHARS if self.level == 2 else None
            decode = self.tokenizer.decode
            facts["prompt"] = decode(state.request.input_ids, skip_special_tokens=False)[:limit]
            facts["answer"] = decode(state.output_ids, skip_special_tokens=False)[:limit]
        logger.info(
            "request %s: %s", escaped(state.rid), ", ".join(f"{name}={value!r}" for name, value in facts.items())
        )
