"""The chat page at /: for browsers. Whatever else asks there is told that a server runs."""

from aiohttp import hdrs, web

from server.config import ServerConfig
from server.pages.page import Page


class ChatPage:
    def __init__(self, config: ServerConfig) -> None:
        self._page = None if config.disable_web_ui else Page("chat.html")

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/", self.root)]

    async def root(self, request: web.Request) -> web.Response:
        """Return the page to who takes HTML; else a line: Ollama's command line and others first ask (HEAD) for it."""
        if self._page is not None and "text/html" in request.headers.get(hdrs.ACCEPT, ""):
            return self._page.response(request, vary=hdrs.ACCEPT)
        return web.Response(text="radixloop is running\n", headers={hdrs.VARY: hdrs.ACCEPT})
