"""Provide backends to run programs against: a server over HTTP on a port of its own, and the engine behind it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

import server.lang as sgl
from server.app import build_app
from server.config import ServerConfig
from server.lang.backends.in_process import EngineBackend
from server.lang.loop import LoopThread
from tests.fake_engine import FakeEngine


@contextmanager
def listening(loop: LoopThread, app: web.Application) -> Iterator[str]:
    """Yield the URL at which `app` is served by `loop`."""
    runner = web.AppRunner(app, handler_cancellation=True)

    async def start() -> str:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    url = loop.run(start())
    try:
        yield url
    finally:
        loop.run(runner.cleanup())


def tiny_engine(model: Path | str, **options: Any) -> sgl.Engine:
    settings = {"device": "cpu", "dtype": "float32", "max_total_tokens": 8192, "max_running_requests": 64, **options}
    return sgl.Engine(model_path=str(model), **settings)


@contextmanager
def serving_engine(engine: sgl.Engine, **options: Any) -> Iterator[str]:
    """Yield the URL of a server around the engine of this process."""
    config = ServerConfig(model_path=engine.endpoint.model_path, **options)
    with listening(engine.endpoint.loop, build_app(engine.endpoint.engine, config)) as url:
        yield url


@contextmanager
def fake_backend(engine: FakeEngine) -> Iterator[EngineBackend]:
    """Yield a backend without a model, whose `engine.requests` can be looked at."""
    backend = EngineBackend("fake-model")
    backend.attach(engine, None)
    try:
        yield backend
    finally:
        backend.shutdown()
