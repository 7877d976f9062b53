"""The pages' routes: / to chat, for browsers, and /docs, what the API takes."""

from aiohttp import hdrs, web

from server.config import ServerConfig
from server.pages.page import Page


class Pages:
    def __init__(self, config: ServerConfig) -> None:
        self._is_enabled = not config.disable_web_ui
        self._chat, self._documents = Page("chat.html"), Page("docs.html")

    def routes(self) -> list[web.RouteDef]:
        documents = [web.get("/docs", self.documents)] if self._is_enabled else []
        return [web.get("/", self.root), *documents]

    async def root(self, request: web.Request) -> web.Response:
        """Return the chat to who takes HTML; else a line: Ollama's command line and others first ask (HEAD) for it."""
        if self._is_enabled and "text/html" in request.headers.get(hdrs.ACCEPT, ""):
            return self._chat.response(request, vary=hdrs.ACCEPT)
        return web.Response(text="radixloop is running\n", headers={hdrs.VARY: hdrs.ACCEPT})

    async def documents(self, request: web.Request) -> web.Response:
        return self._documents.response(request)
