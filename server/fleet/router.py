"""A router for several servers: `python -m server.router --worker-urls http://host1:30000 http://host2:30000`.

Requests and answers pass through as they are, a streamed answer piece by piece at the client's pace. A client that
leaves takes its request along. Whatever a worker refuses for want of health or room (a lost connection, 429, 5xx) goes
to another one, as long as nothing of the answer has been passed on.

What one worker alone knows is found again: files, batches and sessions are kept by the first worker, and what a worker
does not have (404: a response it has not stored, a model it does not serve) is looked for at the others. A request goes
to one worker as a whole, a batch of prompts too. The dashboard shows any worker, or the sum of them.
"""

import asyncio
import hmac
import logging
import os
import resource
import signal
import sys
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

import aiohttp
import uvloop
from aiohttp import hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from engine.config import DEBUG, option
from engine.declared import Object
from engine.errors import EngineError, InvalidRequest
from engine.replicas.balance import METHODS, PROMPT_METHODS
from server.app import answer_errors
from server.command_line import make_parser, read_options
from server.config import HTTP, LOG_LEVELS
from server.fleet.prompts import prompt_of
from server.fleet.workers import Worker, Workers
from server.foreign_tables import ROUTER_FLAGS
from server.http.bodies import BODY_BUDGET, BodyBudget, next_of_body
from server.http.connections import Connections
from server.http.intake import BACKLOG, GATE, LONG_WORK, Gate, LongWork
from server.http.keys import ADMIN_PATHS
from server.http.malformed import shorten_malformed
from server.http.origins import Origins, guard_origins, host_of, is_loopback, split
from server.reading.error_shapes import error_shape
from server.reading.protocol import body_too_long, json_response, read_body

logger = logging.getLogger(__name__)

WORKERS = "workers"
# Routes that act on a server as such: every worker gets them.
BROADCAST_PATHS = ADMIN_PATHS - {"/dashboard/data", "/get_weights_by_name"}
FIRST_WORKERS_PATHS = ("/v1/files", "/v1/batches", "/open_session", "/close_session", "/dashboard")
WORKER_HEADER = "X-Radixloop-Worker"  # whose figures a dashboard shows
WORKERS_HEADER = "X-Radixloop-Workers"  # whose it could show
GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
SESSION_FIELD, PREVIOUS_FIELD = b'"session_params"', b'"previous_response_id"'
RETRIED = frozenset({429, 500, 502, 503, 504})
# Headers of one connection, not of the message (RFC 9110, 7.6.1), and those that the client library writes itself.
HOP_BY_HOP = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade", "expect", "host",
    }
)  # fmt: skip
# What a browser says of the page that sends a request: judged here, and not by workers, which have other addresses.
OF_PAGES = frozenset({"origin", "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest", "sec-fetch-user"})


class NewWorker(Object):
    url: str


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Options of `python -m server.router`."""

    worker_urls: list[str] = option([], WORKERS, "servers to start with, such as http://host1:30000")
    policy: str = option(
        "cache_aware", WORKERS, "who gets a request: the worker that knows its prompt, in turn, or the least busy",
        choices=METHODS,
    )  # fmt: skip
    max_retries: int = option(
        3, WORKERS, "other workers to ask after one failed or refused", aliases=("--retry-max-retries",)
    )
    connect_timeout: float = option(5.0, WORKERS, "seconds a worker may take to accept a connection")
    health_check_interval: float = option(
        5.0, WORKERS, "seconds between looks at /health of the workers", aliases=("--health-check-interval-secs",)
    )
    health_check_timeout: float = option(
        5.0, WORKERS, "seconds a worker may take to answer them", aliases=("--health-check-timeout-secs",)
    )

    host: str = option("127.0.0.1", HTTP, "address to listen on; 0.0.0.0: every network interface")
    port: int = option(30000, HTTP, "port to listen on")
    api_key: str | None = option(
        None, HTTP, "key of the routes that list and change workers; clients' keys are the workers' to check"
    )
    allowed_origins: list[str] | None = option(
        None, HTTP, "web pages that may call the workers, such as https://chat.example; default: their own; *: all"
    )
    allowed_hosts: list[str] | None = option(
        None,
        HTTP,
        "names the router may be called by, beside localhost and addresses; default: any; on loopback: none",
    )
    max_body_bytes: int = option(32 << 20, HTTP, "longest request body, files aside; beyond it: 413")
    drain_timeout: float = option(60.0, HTTP, "seconds that running answers may take to end after SIGTERM or Ctrl-C")

    log_level: str = option("info", DEBUG, "of the router's log", choices=LOG_LEVELS)


class NoWorkerAnswers(EngineError):
    status_code = 503


class Router:
    def __init__(self, config: RouterConfig) -> None:
        self.config, self.workers = config, Workers(config.policy)
        for url in config.worker_urls:
            self.workers.add(url)
        self._has_failed = asyncio.Event()

    def build_app(self) -> web.Application:
        """Run it with aiohttp's `handler_cancellation`: a disconnect then ends the request at its worker."""
        config = self.config
        origins = Origins(config.host, config.allowed_origins, config.allowed_hosts)
        app = web.Application(
            middlewares=[answer_errors, guard_origins(origins)], client_max_size=config.max_body_bytes
        )
        app.on_response_prepare.append(origins.add_cors)
        app[GATE], app[LONG_WORK] = Gate(), LongWork()
        app[BODY_BUDGET] = BodyBudget(self.config.max_body_bytes * 8)
        app.cleanup_ctx.append(self._running)
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/dashboard/data", self.dashboard_data),
                web.get("/workers", self.list_workers),
                web.post("/workers", self.add_worker),
                web.delete("/workers", self.remove_worker),
                # SGLang's router's
                web.get("/list_workers", self.list_workers),
                web.post("/add_worker", self.add_worker_by_query),
                web.post("/remove_worker", self.remove_worker),
                *(web.route("*", path, self.broadcast) for path in sorted(BROADCAST_PATHS)),
                web.route("*", "/{path:.*}", self.forward),
            ]
        )
        return app

    async def _running(self, _: web.Application) -> AsyncIterator[None]:
        async with transparent_session(self.config.connect_timeout) as self._session:
            await self._check_all()
            checking = asyncio.create_task(self._check_forever())
            yield
            checking.cancel()
            with suppress(asyncio.CancelledError):
                await checking

    # ---- health ----

    async def _check_forever(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.config.health_check_interval):
                    await self._has_failed.wait()
            self._has_failed.clear()
            await self._check_all()

    async def _check_all(self) -> None:
        await asyncio.gather(*map(self._check, self.workers))

    async def _check(self, worker: Worker) -> None:
        limit = aiohttp.ClientTimeout(total=self.config.health_check_timeout)
        failure, is_hanging = "", False
        try:
            async with self._session.get(worker.url + "/health", timeout=limit) as answer:
                if answer.status != 200:
                    failure = f"/health answers {answer.status}"
                    is_hanging = b'"stuck"' in await answer.read()
        except TimeoutError:
            failure, is_hanging = f"/health has not answered for {self.config.health_check_timeout:g} s", True
        except aiohttp.ClientError as error:
            failure, is_hanging = describe(error), True
        self.workers.judge(worker, failure, is_hanging=is_hanging)

    # ---- what workers answer ----

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Return the answer of the worker that the policy picks, or of another one."""
        # A file is not kept here: it is sent on while it arrives, and once only.
        is_upload = request.content_type.startswith("multipart/")
        body = b"" if is_upload else await self._body_of(request)
        text = await plain(body, request.headers.get(hdrs.CONTENT_ENCODING, ""), self.config.max_body_bytes)
        prompt = prompt_of(text) if self.workers.policy in PROMPT_METHODS else b""
        at_first = request.path.startswith(FIRST_WORKERS_PATHS) or SESSION_FIELD in text
        # A body that names something which a worker does not have is wrong to it, not 404.
        unknown = {404, 400} if PREVIOUS_FIELD in text else {404}
        tried: dict[Worker, str] = {}  # what came of it
        num_failed, max_failed = 0, 0 if is_upload else self.config.max_retries
        while num_failed <= max_failed and (candidates := self.workers.in_rotation(without=tried)):
            async with AsyncExitStack() as stack:
                worker = stack.enter_context(self.workers.serving(prompt, candidates[:1] if at_first else candidates))
                try:
                    async with worker.unless_it_hangs():
                        sent = self._send(worker, request, request.content if is_upload else body)
                        answer = await stack.enter_async_context(sent)
                        head = await answer.content.readany()
                except (aiohttp.ClientError, TimeoutError) as error:
                    num_failed += 1
                    tried[worker] = worker.failure or describe(error)
                    self._has_failed.set()  # its health shows whether it was this connection only
                    continue
                num_failed += answer.status in RETRIED
                tried[worker] = f"answered {answer.status}"
                is_final = is_upload or num_failed > max_failed or answer.status not in RETRIED | unknown
                if is_final or not self.workers.in_rotation(without=tried):
                    return await pass_on(request, answer, head)
        raise NoWorkerAnswers(self._why_none(tried))

    def _send(
        self, worker: Worker, request: web.Request, body: bytes | aiohttp.StreamReader
    ) -> "aiohttp.client._RequestContextManager":
        headers = end_to_end(request.headers, OF_PAGES)
        if request.method == hdrs.METH_HEAD:
            body = b""  # it means nothing, and a worker that cannot read it answers with one
            headers.popall(hdrs.CONTENT_ENCODING, None)
        if isinstance(body, bytes):
            headers.popall(hdrs.CONTENT_LENGTH, None)
        return self._session.request(
            request.method,
            URL(worker.url + request.rel_url.raw_path_qs, encoded=True),
            headers=headers,
            data=body or None,
            allow_redirects=False,
        )

    def _why_none(self, tried: dict[Worker, str]) -> str:
        if not list(self.workers):
            return "the router has no workers: POST /workers with a url adds one"
        reasons = [f"{worker.url}: {tried.get(worker) or worker.failure or 'not tried'}" for worker in self.workers]
        return "no worker can answer now; " + ", ".join(reasons)

    async def _body_of(self, request: web.Request) -> bytes:
        limit = self.config.max_body_bytes
        if (request.content_length or 0) > limit:
            raise body_too_long(limit)
        body = bytearray()
        while piece := await next_of_body(request.content.readany()):
            body += piece
            if len(body) > limit:
                raise body_too_long(limit)
        return bytes(body)

    async def broadcast(self, request: web.Request) -> web.Response:
        """Ask all workers; return the first one's answer if all succeed, or else an error that says which failed."""
        body = await self._body_of(request)
        workers = list(self.workers)
        if not workers:
            raise NoWorkerAnswers(self._why_none({}))
        answers = await asyncio.gather(*(self._whole_answer(worker, request, body) for worker in workers))
        failed = {worker.url: one for worker, one in zip(workers, answers, strict=True) if one[0] >= 400}
        if failed:
            details = ", ".join(f"{url}: {body[:500].decode(errors='replace')}" for url, (_, _, body) in failed.items())
            message = f"{len(failed)} of {len(workers)} workers failed: {details}"
            status = max(status for status, _, _ in failed.values())
            return json_response(error_shape(request.path)(status, message, None, None), status)
        status, headers, content = answers[0]
        return web.Response(body=content, status=status, headers=headers)

    async def _whole_answer(
        self, worker: Worker, request: web.Request, body: bytes
    ) -> tuple[int, "CIMultiDict[str]", bytes]:
        """Return a worker's status, headers and body; status 502 and the reason if there is no answer."""
        try:
            async with worker.unless_it_hangs(), self._send(worker, request, body) as answer:
                return answer.status, end_to_end(answer.headers), await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            return 502, CIMultiDict(), (worker.failure or describe(error)).encode()

    async def dashboard_data(self, request: web.Request) -> web.Response:
        """Return the figures of the worker that `?worker=` names, or of the first. Headers say which there are."""
        url = request.query.get("worker")
        known = list(self.workers) if url else self.workers.in_rotation()
        worker = next((worker for worker in known if url in (None, "", worker.url)), None)
        if worker is None and url:
            raise InvalidRequest(f"no worker is {url[:200]!r}", "worker")
        if worker is None:
            raise NoWorkerAnswers(self._why_none({}))
        status, headers, content = await self._whole_answer(worker, request, b"")
        if status == 200:
            headers[WORKER_HEADER] = worker.url
            headers[WORKERS_HEADER] = " ".join(one.url for one in self.workers)
        return web.Response(body=content, status=status, headers=headers)

    # ---- what the router answers ----

    async def health(self, _: web.Request) -> web.Response:
        """Report health: 503 if no worker could answer."""
        num_workers, num_healthy = len(list(self.workers)), len(self.workers.in_rotation())
        status = "ok" if num_healthy else "no worker is healthy"
        values = {"status": status, "num_workers": num_workers, "num_healthy": num_healthy}
        return json_response(values, 200 if num_healthy else 503)

    async def list_workers(self, request: web.Request) -> web.Response:
        self._check_key(request)
        workers = [
            {
                "url": worker.url,
                "is_healthy": not worker.failure,
                "failure": worker.failure or None,
                "load": worker.load,
                "num_requests": worker.num_requests,
            }
            for worker in self.workers
        ]
        return json_response({"workers": workers, "urls": [worker.url for worker in self.workers]})

    async def add_worker(self, request: web.Request) -> web.Response:
        """Add a worker. It joins the rotation when it is healthy, now or later."""
        self._check_change(request)
        if not request.content_type.endswith(("/json", "+json")):
            raise InvalidRequest(f"Content-Type must be application/json, got {request.content_type}", "Content-Type")
        return await self._add((await read_body(request, NewWorker)).url)

    async def add_worker_by_query(self, request: web.Request) -> web.Response:
        self._check_change(request)
        return await self._add(request.query.get("url", ""))

    async def _add(self, url: str) -> web.Response:
        worker = self.workers.add(url)
        await self._check(worker)
        return json_response({"url": worker.url, "is_healthy": not worker.failure}, 201)

    async def remove_worker(self, request: web.Request) -> web.Response:
        self._check_change(request)
        url = request.query.get("url", "")
        self.workers.remove(url)
        return json_response({"url": url})

    def _check_change(self, request: web.Request) -> None:
        """Refuse to change workers, to whom clients' prompts go, for another host without a key."""
        self._check_key(request)
        if not self.config.api_key and not is_from_this_host(request):
            raise web.HTTPForbidden(text="without --api-key the workers can be changed from the router's own host only")

    def _check_key(self, request: web.Request) -> None:
        given, wanted = request.headers.get(hdrs.AUTHORIZATION, ""), f"Bearer {self.config.api_key}"
        if self.config.api_key and not hmac.compare_digest(given.encode(errors="surrogateescape"), wanted.encode()):
            raise web.HTTPUnauthorized(
                text="the router's --api-key is required: send the header `Authorization: Bearer KEY`",
                headers={"WWW-Authenticate": "Bearer"},
            )


def is_from_this_host(request: web.Request) -> bool:
    """Return whether the client is a process of this host: no proxy's, and no web page's that names us otherwise."""
    if any(name in request.headers for name in (hdrs.FORWARDED, hdrs.X_FORWARDED_FOR)):
        return False
    return is_loopback(request.remote or "") and is_loopback(host_of(split(f"//{request.host}")))


def transparent_session(connect_timeout: float) -> aiohttp.ClientSession:
    """Open a session that adds nothing to requests, removes nothing from answers, and has no time limit."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(sock_connect=connect_timeout),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=(hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.USER_AGENT, hdrs.CONTENT_TYPE),
    )


async def plain(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """Return at most `max_bytes` of what a client has compressed, to look at. Empty if that cannot be read here."""
    if not encoding or encoding.lower() == "identity":
        return body
    if encoding.lower() not in ("gzip", "x-gzip", "deflate"):
        return b""
    try:
        return await asyncio.to_thread(zlib.decompressobj(GZIP_OR_ZLIB).decompress, body, max_bytes)
    except zlib.error:
        return b""  # its worker says what is wrong with it


def end_to_end(
    headers: "CIMultiDict[str] | CIMultiDictProxy[str]", others: frozenset[str] = frozenset()
) -> "CIMultiDict[str]":
    """Return the headers that are not for the next hop only, without `others`."""
    left_out = {name.strip().lower() for name in headers.get(hdrs.CONNECTION, "").split(",")} | HOP_BY_HOP | others
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in left_out)


async def pass_on(request: web.Request, answer: aiohttp.ClientResponse, head: bytes) -> web.StreamResponse:
    """Pass on `answer`, whose body starts with `head`, as it comes, read no faster than the client reads."""
    response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=end_to_end(answer.headers))
    await response.prepare(request)
    try:
        while head:
            await response.write(head)
            head = await answer.content.readany()
    except aiohttp.ClientPayloadError as error:
        # Part of it has gone out: all that can be said is that it ends too early.
        raise ConnectionResetError(f"the worker failed in the middle of an answer: {error}") from error
    await response.write_eof()
    return response


def describe(error: Exception) -> str:
    return str(error) or type(error).__name__


async def serve(app: web.Application, config: RouterConfig) -> None:
    """Route until SIGINT or SIGTERM, then let running answers end. `OSError` if the port cannot be had."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():  # the second one
            os._exit(1)
        stop.set()

    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=config.drain_timeout)
    await runner.setup()
    assert runner.server is not None
    try:
        # Bodies are passed on as they came.
        async with Connections(runner.server, access_log=None, auto_decompress=False) as connections:
            listener = await loop.create_server(connections, config.host, config.port, backlog=BACKLOG)
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, on_signal)
            host = f"[{config.host}]" if ":" in config.host else config.host
            print(f"routing on http://{host}:{listener.sockets[0].getsockname()[1]}", flush=True)
            await stop.wait()
            listener.close()
    finally:
        await runner.cleanup()


def main(argv: Sequence[str] | None = None) -> int:
    """Route until SIGINT or SIGTERM. Returns the exit status."""
    usage = "--worker-urls URL [URL ...] [options]"
    parser = make_parser(
        RouterConfig, "python -m server.router", usage, "One address for several servers.", ROUTER_FLAGS
    )
    config = RouterConfig(**read_options(parser, sys.argv[1:] if argv is None else argv))
    if config.max_retries < 0:
        parser.error(f"--max-retries must be at least 0, got {config.max_retries}")
    for name in ("connect_timeout", "health_check_interval", "health_check_timeout"):
        if not getattr(config, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(config, name)}")
    logging.basicConfig(
        level=config.log_level.upper(), format="[%(asctime)s] %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    shorten_malformed()
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # a request takes two connections
    try:
        uvloop.run(serve(Router(config).build_app(), config))
    except (InvalidRequest, OSError) as error:
        parser.error(str(error))
    return 0
