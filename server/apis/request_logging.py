"""SGLang's /configure_logging: the lines about requests, switched on and off while the server runs."""

from aiohttp import web

from engine.engine import TokenizerFacade
from server.config import ServerConfig
from server.http.live import LiveRequests, RequestLog
from server.reading.protocol import json_response, read_json, refuse

# SGLang's. What they switch on is chosen at the start here: --crash-dump-folder.
UNSUPPORTED = ("dump_requests_folder", "dump_requests_threshold", "crash_dump_folder", "log_requests_format")


class LoggingApi:
    def __init__(self, tokenizer: TokenizerFacade, config: ServerConfig, live: LiveRequests) -> None:
        self._live = live
        self._log = RequestLog(tokenizer, config.log_requests_level)
        self._set_on(config.log_requests)

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/configure_logging", self.configure)]

    async def configure(self, http_request: web.Request) -> web.Response:
        """Change what is given, and return what holds now."""
        body = await read_json(http_request)
        refuse(body, UNSUPPORTED)
        is_on, level = body.flag("log_requests", self._is_on), body.integer("log_requests_level", self._log.level, 0, 3)
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
