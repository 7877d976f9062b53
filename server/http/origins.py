"""Which web pages may call the server, and under which names: a browser sends a request wherever a page says.

A page of another site may not do anything here (it could not read the answer, but the deed would be done), unless
`--allowed-origins` has it; then it is told so by CORS headers. A server on loopback answers to names of this machine
only: the page of a name that was made to point here (DNS rebinding) would be one of ours.
"""

import ipaddress
from collections.abc import Sequence
from urllib.parse import SplitResult, urlsplit

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from server.config import ServerConfig

ACTING_GETS = frozenset({"/flush_cache", "/start_profile", "/stop_profile", "/health_generate"})
PRIVATE_SUFFIXES = (".localhost", ".internal")  # nobody can register names below these
EXPOSED_HEADERS = "*"
MAX_AGE_S = 600  # of what a browser remembers of a preflight


class Origins:
    def __init__(self, host: str, allowed_origins: Sequence[str] | None, allowed_hosts: Sequence[str] | None) -> None:
        """`host`: the address that the server listens on."""
        self._host = host.lower()
        self._allowed = frozenset(origin.lower().rstrip("/") for origin in allowed_origins or ())
        self._allowed_hosts = frozenset(name.lower() for name in allowed_hosts or ())
        self._checks_host = bool(self._allowed_hosts) or is_loopback(host)

    def has_host(self, request: web.Request) -> bool:
        """Return whether the request names a host that this server is."""
        given = request.headers.get(hdrs.HOST)
        if given is None or not self._checks_host or "*" in self._allowed_hosts:
            return True
        name = host_of(split(f"//{given}"))
        return (
            name in self._allowed_hosts
            or name == self._host
            or is_address(name)  # a name that points here is what rebinding needs
            or "." not in name
            or name.endswith(PRIVATE_SUFFIXES)
        )

    def is_foreign(self, request: web.Request) -> bool:
        """Return whether a page of another origin has sent the request, one that is not allowed to."""
        origin, site = request.headers.get(hdrs.ORIGIN), request.headers.get("Sec-Fetch-Site")
        if site in ("same-origin", "none"):
            return False
        if origin is None:
            return site is not None
        return not (self.allows(origin) or is_own(origin, request.headers.get(hdrs.HOST, "")))

    def allows(self, origin: str) -> bool:
        return "*" in self._allowed or origin.lower() in self._allowed

    def cors_headers(self, request: web.Request) -> dict[str, str]:
        """Return the headers that let a page of another, allowed origin read the answer."""
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None or not (self.allows(origin) or is_own(origin, request.headers.get(hdrs.HOST, ""))):
            return {}
        return {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": EXPOSED_HEADERS}

    def preflight(self, request: web.Request) -> web.Response:
        """Answer a browser that asks whether a page may send a request. Without CORS headers, it may not."""
        response = web.Response(status=204, headers=self.cors_headers(request))
        if response.headers:
            asked = request.headers
            response.headers["Access-Control-Allow-Methods"] = "GET, POST, PUT, DELETE"
            response.headers["Access-Control-Allow-Headers"] = asked.get("Access-Control-Request-Headers", "*")
            response.headers["Access-Control-Max-Age"] = str(MAX_AGE_S)
            if asked.get("Access-Control-Request-Private-Network") == "true":
                response.headers["Access-Control-Allow-Private-Network"] = "true"
        response.headers[hdrs.VARY] = "Origin, Access-Control-Request-Headers"
        return response

    async def add_cors(self, request: web.Request, response: web.StreamResponse) -> None:
        """Add the headers to an answer before it is sent: a signal of the application's."""
        if hdrs.ORIGIN in request.headers and request.method != hdrs.METH_OPTIONS:
            response.headers.update(self.cors_headers(request))
            response.headers[hdrs.VARY] = "Origin"


def origins_of(config: ServerConfig) -> Origins:
    return Origins(config.host, config.allowed_origins, config.allowed_hosts)


def guard_origins(origins: Origins) -> Middleware:
    """Refuse, on every route that does something, what pages of other sites send, and foreign names of this host."""

    @web.middleware
    async def check_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not origins.has_host(request):
            raise web.HTTPForbidden(
                text=f"this server is not {request.headers[hdrs.HOST][:100]!r}: --allowed-hosts lists its names"
            )
        if request.method == hdrs.METH_OPTIONS:
            return origins.preflight(request)
        is_read = request.method in (hdrs.METH_GET, hdrs.METH_HEAD) and request.path not in ACTING_GETS
        if not is_read and origins.is_foreign(request):
            raise web.HTTPForbidden(text="pages of other sites may not do this, unless --allowed-origins has them")
        return await handler(request)

    return check_origin


def is_own(origin: str, host: str) -> bool:
    """Return whether `origin` is that of our own pages. `host`: as the request names it; loopback has several names."""
    theirs, ours = split(origin), split(f"//{host}")
    if theirs.netloc.lower() == host.lower():  # whatever the scheme: a proxy may have ended TLS
        return bool(host)
    return _port(theirs) == _port(ours) and is_loopback(host_of(theirs)) and is_loopback(host_of(ours))


def is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    return is_address(name) and ipaddress.ip_address(name).is_loopback


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def split(url: str) -> SplitResult:
    """Split a URL; one that is none has no parts."""
    try:
        return urlsplit(url)
    except ValueError:
        return SplitResult("", "", "", "", "")


def host_of(url: SplitResult) -> str:
    """Return the URL's host in lower case, without brackets and a last dot."""
    return (url.hostname or "").rstrip(".")


def _port(url: SplitResult) -> int | None:
    try:
        return url.port
    except ValueError:
        return None
