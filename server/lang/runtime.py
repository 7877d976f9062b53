"""Servers and engines that a program starts for itself."""

import asyncio
import dataclasses
import json
import socket
import subprocess
import sys
import time
import urllib.request
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from .backends.base import JSON
from .backends.native import NativeBackend
from .backends.runtime_endpoint import RuntimeEndpoint

FIRST_PORT, LAST_PORT = 30000, 40000
POLL_S = 0.2
SHUTDOWN_S = 30.0


class Session:
    """Something that generates, started by this program and ended with it. SGLang's `Engine` in its methods.

    `endpoint` is the backend for programs; `set_default_backend` and `backend=` take the session itself as well.
    """

    endpoint: NativeBackend

    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: JSON | list[JSON] | None = None,
        *,
        input_ids: list[int] | list[list[int]] | None = None,
        stream: bool = False,
        **options: Any,
    ) -> Any:
        """Return /generate's answer, or a list for a list of prompts; with `stream`, an iterator of its events.

        `options`: other fields of /generate (`return_logprob`, `logprob_start_len`, ...).
        """
        body = _generate_body(prompt, sampling_params, input_ids, options)
        if stream:
            return self._events(body)
        return self.endpoint.loop.run(self.endpoint.post(body))

    def _events(self, body: JSON) -> Iterator[JSON]:
        yield from self.endpoint.loop.iterate(self.endpoint.post_stream(body))

    async def async_generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: JSON | list[JSON] | None = None,
        *,
        input_ids: list[int] | list[list[int]] | None = None,
        stream: bool = False,
        **options: Any,
    ) -> Any:
        """Generate for asynchronous callers; with `stream`, return an asynchronous iterator."""
        body = _generate_body(prompt, sampling_params, input_ids, options)
        if stream:
            return self.endpoint.loop.aiterate(self.endpoint.post_stream(body))
        return await asyncio.wrap_future(self.endpoint.loop.submit(self.endpoint.post(body)))

    def cache_prefix(self, prefix: str) -> None:
        self.endpoint.cache_prefix(prefix)

    def flush_cache(self) -> bool:
        return self.endpoint.flush_cache()

    def get_server_info(self) -> JSON:
        return self.endpoint.get_server_info()

    def shutdown(self) -> None:
        """Abort what runs and free everything. May be called twice."""
        self.endpoint.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def _generate_body(prompt: Any, sampling_params: Any, input_ids: Any, options: JSON) -> JSON:
    given = {"text": prompt, "sampling_params": sampling_params, "input_ids": input_ids, **options}
    return {name: value for name, value in given.items() if value is not None}


@contextmanager
def needing_the_engine() -> Iterator[None]:
    """Say what to do where the engine cannot be imported."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        own = sys.modules.get(package)
        if package in ("server", "engine", "cache", "kernels") and own is not None:
            place = ", ".join(getattr(own, "__path__", [str(own.__file__)]))
            raise ImportError(f"the engine's package {package} is hidden by this program's own, {place}") from error
        raise ImportError(f"{error}: an engine in this process needs pip install 'radixloop[server]'") from error


class Engine(Session):
    """The engine in this process, without HTTP: `Engine(model_path="demo")`, with the options of `python -m server`.

    Returns when the model is loaded; `ModelError` if it cannot be.
    """

    def __init__(self, model_path: str = "demo", chat_template_name: str | None = None, **options: Any) -> None:
        with needing_the_engine():  # imports torch: not for programs of a remote server
            from engine.config import EngineConfig
            from engine.new_engine import new_engine

            from .backends.in_process import EngineBackend
        options.pop("log_level", None)  # a server's
        self.endpoint: EngineBackend = EngineBackend(model_path)
        engine = new_engine(EngineConfig(model_path=model_path, **options))
        loop = self.endpoint.loop

        async def stop() -> None:
            # At the end of the process no thread can be started, and nothing need be freed.
            with suppress(RuntimeError):
                await engine.stop()

        loop.on_close.append(stop)
        try:
            loop.run(engine.start())
        except BaseException:
            self.shutdown()
            raise
        self.endpoint.attach(engine, chat_template_name)

    def get_tokenizer(self) -> Any:
        return self.endpoint.engine.tokenizer


class Runtime(Session):
    """A server in a process of its own: `Runtime(model_path="demo")`, with the options of `python -m server`.

    Listens on the first free port from `port` on. Returns when the server is healthy; `RuntimeError` if it ends before
    that, or takes longer than `launch_timeout` seconds.
    """

    def __init__(
        self,
        model_path: str = "demo",
        *,
        port: int = FIRST_PORT,
        log_level: str = "error",
        launch_timeout: float = 300.0,
        chat_template_name: str | None = None,
        **options: Any,
    ) -> None:
        port = _free_port(port)
        self.options = {"model_path": model_path, **options}
        flags = {"model_path": model_path, "port": port, "log_level": log_level, "access_log": "none", **options}
        # The packages are found beside this one, wherever the program runs.
        command = [sys.executable, "-c", START, str(Path(__file__).parents[2]), *_arguments(flags)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self._end = weakref.finalize(self, _end_process, self.process)
        self.url = f"http://127.0.0.1:{port}"
        try:
            api_key = options.get("api_key")
            self._wait_until_ready(time.monotonic() + launch_timeout, api_key)
            self.endpoint: RuntimeEndpoint = RuntimeEndpoint(self.url, api_key, chat_template_name=chat_template_name)
        except BaseException:
            self._end()
            raise

    def _wait_until_ready(self, deadline: float, api_key: str | None) -> None:
        request = urllib.request.Request(f"{self.url}/get_server_info")
        if api_key:
            request.add_header("Authorization", f"Bearer {api_key}")
        while time.monotonic() < deadline:
            if (status := self.process.poll()) is not None:
                raise RuntimeError(f"the server ended with status {status} before it was ready")
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    if json.load(answer)["pid"] == self.process.pid:  # and not another's that was faster at this port
                        return
            except OSError:  # not listening yet
                pass
            time.sleep(POLL_S)
        raise RuntimeError("the server was not ready in time")

    def get_tokenizer(self) -> Any:
        """Return the model's tokenizer, loaded into this process."""
        with needing_the_engine():
            from engine.checkpoint.folder import resolve_model, resolve_tokenizer
            from engine.config import EngineConfig
            from engine.text.tokenizer import Tokenizer

        known = {field.name for field in dataclasses.fields(EngineConfig)}
        config = EngineConfig(**{name: value for name, value in self.options.items() if name in known})
        return Tokenizer.load(resolve_tokenizer(config, resolve_model(config)), config.trust_remote_code)

    def encode(self, prompt: str | list[str]) -> Any:
        """Return embeddings, as /encode answers."""
        return self.endpoint.loop.run(self.endpoint.call("POST", "/encode", {"text": prompt}))

    def start_profile(self) -> None:
        self.endpoint.start_profile()

    def stop_profile(self) -> None:
        self.endpoint.stop_profile()

    def shutdown(self) -> None:
        super().shutdown()
        self._end()


START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from server.__main__ import main; sys.exit(main())"


def _free_port(first: int) -> int:
    for port in range(first, LAST_PORT):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no port between {first} and {LAST_PORT} is free")


def _arguments(options: JSON) -> Iterator[str]:
    """Return options as a command line's flags."""
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, (list, tuple)):
            yield from (flag, *map(str, value))
        elif value is True:
            yield flag
        elif value is not None and value is not False:
            yield from (flag, str(value))


def _end_process(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(SHUTDOWN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
