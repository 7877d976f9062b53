"""A fleet of servers under Ray Serve, which starts and ends them as the load asks for. Needs the extra `ray`.

    python -m server.ray_serve --model-path MODEL --num-gpus 1 --max-replicas 8
    serve run server.ray_serve:build model_path=MODEL num_gpus=1 max_replicas=8

A replica runs the whole server, on a port of its own host that only Serve's proxy is told of. Serve sends a request to
any of them: routes that need a certain one, or all, are refused here, and are what server/fleet/router.py is for.
"""

import dataclasses
import logging
import sys
from argparse import ArgumentParser
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from yarl import URL

from engine.config import option
from server.__main__ import warm_up
from server.app import build_app
from server.command_line import make_parser, read_options, to_arguments
from server.config import ServerConfig
from server.fleet.router import BROADCAST_PATHS, FIRST_WORKERS_PATHS, end_to_end, transparent_session
from server.foreign_tables import SERVER_FLAGS
from server.http.connections import MAX_LINE_BYTES
from server.reading.error_shapes import error_shape

logger = logging.getLogger(__name__)

FLEET = "Ray Serve"
CONNECT_TIMEOUT_S = 5.0
REFUSED_PATHS = (*BROADCAST_PATHS, *FIRST_WORKERS_PATHS, "/v1/responses/")


@dataclass(frozen=True, kw_only=True)
class FleetConfig(ServerConfig):
    """Options of `python -m server.ray_serve`."""

    min_replicas: int = option(1, FLEET, "servers when there is nothing to do")
    max_replicas: int = option(1, FLEET, "servers at most")
    target_ongoing_requests: float = option(64.0, FLEET, "requests a server that Serve adds and removes servers for")
    max_ongoing_requests: int = option(256, FLEET, "requests that a server gets at once; more wait in Serve's proxy")
    num_gpus: float = option(0.0, FLEET, "GPUs of a server")
    num_cpus: float = option(1.0, FLEET, "CPU cores of a server")


class Replica:
    """A server, and the way to it from Serve's proxy."""

    async def __init__(self, config: FleetConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        from engine.new_engine import new_engine  # imports torch, which who deploys does not need

        self._stack = AsyncExitStack()
        folder = self._stack.enter_context(TemporaryDirectory())
        config = dataclasses.replace(config, file_storage_path=folder)  # replicas may share a host
        self._engine = new_engine(config)
        self._stack.push_async_callback(self._engine.stop)
        await self._engine.start(logger.info)
        if not config.skip_server_warmup:
            await warm_up(self._engine)
        runner = web.AppRunner(
            build_app(self._engine, config),
            handler_cancellation=True,
            shutdown_timeout=config.drain_timeout,
            access_log=None,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
        )
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self._url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._session = await self._stack.enter_async_context(transparent_session(CONNECT_TIMEOUT_S))
        self._engine.warm_up_grammars()

    async def __call__(self, request: Request) -> Response:
        path = request.url.path
        if path.startswith(REFUSED_PATHS):
            message = f"{path} concerns one server or all of them, and this is a fleet of servers that share nothing"
            return JSONResponse(error_shape(path)(501, message, None, None), 501)
        target = request.scope["raw_path"] + b"?" + request.scope["query_string"]
        answer = await self._session.request(
            request.method,
            URL(self._url + target.decode("ascii"), encoded=True),
            headers=end_to_end(CIMultiDict(request.headers.items())),
            data=await request.body() or None,
            allow_redirects=False,
        )
        return StreamingResponse(pieces(answer), answer.status, dict(end_to_end(answer.headers)))

    async def check_health(self) -> None:
        """Raise if Serve should replace this process."""
        health = self._engine.health()
        if health.status not in ("ok", "stopping"):
            raise RuntimeError(f"the engine is {health.status}")

    async def __del__(self) -> None:
        """Serve awaits it when the requests of a replica that is to go have ended."""
        await self._stack.aclose()


async def pieces(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield the body of `answer` as it comes. Closing it early (the client has gone) closes the server's request."""
    async with answer:
        async for piece in answer.content.iter_any():
            yield piece


def build(args: Mapping[str, Any]) -> serve.Application:
    """Build the application, for `serve run` and Serve's YAML files. `args`: options by name, as in `--config`."""
    parser = _new_parser()
    return application(FleetConfig(**read_options(parser, to_arguments(parser, args, "args"))))


def application(config: FleetConfig) -> serve.Application:
    deployment = serve.deployment(
        Replica,
        ray_actor_options={
            "num_cpus": config.num_cpus,
            "num_gpus": config.num_gpus,
            # OpenMP's threads must not spin while they wait, or they starve the event loop.
            "runtime_env": {"env_vars": {"OMP_WAIT_POLICY": "passive"}},
        },
        max_ongoing_requests=config.max_ongoing_requests,
        graceful_shutdown_timeout_s=config.drain_timeout,
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
        },
    )
    return deployment.bind(config)


def _new_parser() -> ArgumentParser:
    usage = "[--model-path MODEL] [options]"
    return make_parser(
        FleetConfig, "python -m server.ray_serve", usage, "Several servers under Ray Serve.", SERVER_FLAGS
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Deploy to the Ray cluster of this host, or to one started here, and serve until Ctrl-C."""
    config = FleetConfig(**read_options(_new_parser(), sys.argv[1:] if argv is None else argv))
    serve.start(http_options={"host": config.host, "port": config.port})
    serve.run(application(config), blocking=True)
    return 0
