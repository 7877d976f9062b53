"""Fetch files over http(s): from hosts that are allowed, at public addresses, wherever redirects lead."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from engine.media import Kind
from server.media.addresses import is_public
from server.media.broken import BrokenMedia
from server.media.limits import MAX_FILE_BYTES

FETCH_S = 5.0  # for one file
MAX_FETCHES = 16  # at once
PORTS = {"http": 80, "https": 443}
PIECE = 1 << 16  # bytes
MAX_URL_CHARS = 8192
MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
# What servers of files call those whose kind nobody told them. What a file is, it says itself.
UNKNOWN_TYPES = ("application/octet-stream", "binary/octet-stream")
HEADERS = {"Accept-Encoding": "identity", "User-Agent": "radixloop"}

Lookup = Callable[[str, int], Awaitable[list[str]]]  # host, port -> addresses; `OSError` if there are none


class Pinned(AbstractResolver):
    """Resolves to addresses that were looked at, whatever a name server says by now."""

    def __init__(self, addresses: Collection[str]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        kinds = {address: socket.AF_INET6 if ":" in address else socket.AF_INET for address in self._addresses}
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=kind,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address, kind in kinds.items()
            if family in (socket.AF_UNSPEC, kind)
        ]

    async def close(self) -> None:
        pass


class Fetcher:
    """Fetches files of at most `MAX_FILE_BYTES` from `domains`; "*" among them stands for every host."""

    def __init__(
        self,
        domains: Collection[str],
        lookup: Lookup | None = None,
        is_allowed: Callable[[str], bool] = is_public,
        ports: Collection[int] = tuple(PORTS.values()),
    ) -> None:
        """Make a fetcher. lookup, is_allowed, ports: how names are resolved, and what may be connected to."""
        self._domains, self._is_allowed, self._ports = domains, is_allowed, ports
        # Threads of its own: names that take long to resolve hold up nobody else's work.
        self._threads = ThreadPoolExecutor(4, "media-names")
        self._lookup = lookup or self._resolve
        self._slots = asyncio.Semaphore(MAX_FETCHES)

    async def fetch(self, text: str, kind: Kind, take: Callable[[int], None]) -> bytes:
        """Return the file at a URL. `BrokenMedia` says why not. take: is told of the bytes as they come."""
        url = self._checked(text)
        async with self._slots:
            try:
                async with asyncio.timeout(FETCH_S):
                    return await self._follow(url, kind, take)
            except TimeoutError:
                raise BrokenMedia(f"did not come from {url.host} within {FETCH_S:.0f} s") from None
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise BrokenMedia(f"could not be fetched from {url.host}: {type(error).__name__}") from None

    async def _follow(self, url: URL, kind: Kind, take: Callable[[int], None]) -> bytes:
        """Return the file at a URL, or where that leads to. Each step is looked at as if a client had asked for it."""
        found = await self._get(url, await self._addresses(url), kind, take)
        for _ in range(MAX_REDIRECTS):
            if isinstance(found, bytes):
                return found
            try:
                url = self._checked(str(found))
                addresses = await self._addresses(url)
            except BrokenMedia as error:
                raise BrokenMedia(f"is redirected to what {error}") from None
            found = await self._get(url, addresses, kind, take)
        if isinstance(found, bytes):
            return found
        raise BrokenMedia(f"is redirected more than {MAX_REDIRECTS} times")

    def _checked(self, text: str) -> URL:
        """Return the URL, read by the same parser that connects to it."""
        if not self._domains:
            raise BrokenMedia(
                "is a URL, and this server fetches none (--allowed-media-domains names no host): send a data URI"
            )
        try:
            url = URL(text) if len(text) <= MAX_URL_CHARS else URL()
            host, port = (url.host or "").lower().rstrip("."), url.port
        except ValueError:
            host, port = "", None
        if not host or url.scheme not in PORTS or url.user is not None or url.password is not None:
            raise BrokenMedia("is no URL of the form https://host/path")
        if port not in self._ports:
            raise BrokenMedia(f"is a URL with port {port}; only {' and '.join(map(str, self._ports))} are allowed")
        if "*" not in self._domains and host not in self._domains:
            raise BrokenMedia(f"is a URL of {host[:100]!r}, which is not among --allowed-media-domains")
        return url

    async def _addresses(self, url: URL) -> list[str]:
        """Return the addresses of the URL's host. One that is not public spoils all: a name server may be hostile."""
        assert url.host is not None and url.port is not None
        addresses = await self._lookup(url.host, url.port)
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise BrokenMedia(f"is a URL of {url.host[:100]!r}, which has no public address")
        return addresses

    async def _resolve(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return list(dict.fromkeys(str(address[0]) for *_, address in found))

    async def _get(self, url: URL, addresses: list[str], kind: Kind, take: Callable[[int], None]) -> bytes | URL:
        """Return the file that is at a URL, or the URL that it is redirected to."""
        connector = aiohttp.TCPConnector(resolver=Pinned(addresses), use_dns_cache=False, force_close=True)
        async with (
            aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
                auto_decompress=False,
                headers=HEADERS,
            ) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            if response.status in REDIRECTS and (location := response.headers.get("Location")):
                return url.join(URL(location))
            if response.status != 200:
                raise BrokenMedia(f"could not be fetched: {url.host} answered {response.status}")
            if not response.content_type.startswith((f"{kind}/", *UNKNOWN_TYPES)):
                raise BrokenMedia(f"is {response.content_type[:64]!r} by its Content-Type, and no {kind}")
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise BrokenMedia("came with a Content-Encoding, which was not asked for")
            return await _body(response, MAX_FILE_BYTES[kind], take)


async def _body(response: aiohttp.ClientResponse, limit: int, take: Callable[[int], None]) -> bytes:
    pieces, num_bytes = [], 0
    if (response.content_length or 0) > limit:
        raise BrokenMedia(f"has {response.content_length} bytes, the limit is {limit}")
    async for piece in response.content.iter_chunked(PIECE):
        num_bytes += len(piece)
        if num_bytes > limit:
            raise BrokenMedia(f"has more than {limit} bytes, the limit")
        take(2 * len(piece))  # in pieces, and as a whole
        pieces.append(piece)
    return b"".join(pieces)
