"""SGLang's /configure_logging: the lines about requests, switched on and off while the server runs."""

from typing import Annotated

from aiohttp import web
from msgspec import Meta

from engine.declared import Object
from engine.engine import TokenizerFacade
from server.config import ServerConfig
from server.http.live import LiveRequests, RequestLog
from server.reading.protocol import json_response, read_body

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
