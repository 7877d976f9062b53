"""What the host adds to each token: the whole server around a model that answers at once, beside a bare loop.

    python -m bench.stream --streams 1 64 256 1024

`engine` is this server with everything but the forward: HTTP, scheduler, rows, staging, detokenizer, SSE. `bare` is an
aiohttp application that has the same bytes ready and writes them, an event a token and connection. Each runs in a
process of its own; the client, here, counts bytes and parses nothing. CPU time is the server process's. Where the
device is never what it waits for, `engine` merges tokens into fewer events: the bytes of a token show how many.
"""

import argparse
import asyncio
import multiprocessing
import selectors
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import orjson
import uvloop
from aiohttp import web
from rich.console import Console
from rich.table import Table

from engine.batch import Shape
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model_runner import ModelRunner, Step
from engine.plan import Plan
from server.app import build_app
from server.config import ServerConfig
from server.sse import HEADERS

ANSWER = (
    "The quick brown fox jumps over the lazy dog, and then it thinks about what it has done. "
    'Is "quick" the right word? Perhaps; a fox that is early need not be quick.\n'
)
PROMPT_LEN = 8
END_OF_RESPONSE = b"\r\n0\r\n\r\n"


class InstantRunner(ModelRunner):
    """Every step is done when it is launched; request after request says the same text."""

    def __init__(self, runner: ModelRunner, token_ids: list[int]) -> None:
        super().__init__(runner.model, runner.kv, runner.sampler, runner.stager, runner.comm)
        self.tokens = np.array(token_ids, np.int32)

    def launch(self, plan: Plan) -> Step:
        step = Step(
            plan=plan,
            work=self.sampler.plan_work(plan),
            prompt_work=[],
            staged=self.stager.write(plan, Shape.of(plan)),
            graph_shape=None,
            launched_at=time.perf_counter(),
        )
        positions = plan.seq_lens[plan.samples] - PROMPT_LEN
        step.tokens = _Array(self.tokens[positions % len(self.tokens)])  # type: ignore[assignment]
        step.done.set_result(None)
        return step


class _Array(np.ndarray):
    """An array that is asked for itself, as a tensor is."""

    def __new__(cls, values: np.ndarray) -> "_Array":
        return values.view(cls)

    def numpy(self) -> np.ndarray:
        return self.view(np.ndarray)


@dataclass(frozen=True, slots=True)
class Load:
    num_streams: int
    num_tokens: int  # of each stream

    @property
    def total(self) -> int:
        return self.num_streams * self.num_tokens


def serve_engine(pipe: Connection, max_streams: int, max_tokens: int) -> None:
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(_serve_engine(pipe, max_streams, max_tokens))


async def _serve_engine(pipe: Connection, max_streams: int, max_tokens: int) -> None:
    config = ServerConfig(
        model_path="demo", load_format="dummy", json_model_override_args='{"num_hidden_layers": 1}', device="cpu",
        max_running_requests=max_streams, max_total_tokens=max_streams * (max_tokens + PROMPT_LEN + 1),
        chunked_prefill_size=8192, access_log="none",
    )  # fmt: skip
    engine = Engine(EngineConfig(**{name: getattr(config, name) for name in EngineConfig.__dataclass_fields__}))
    await engine.start(lambda step: None)
    assert engine._loop is not None
    engine._loop.runner = InstantRunner(engine.parts.runner, engine.tokenizer.encode(ANSWER))
    await _serve(build_app(engine, config), pipe)
    await engine.stop()


def serve_bare(pipe: Connection, events: list[bytes]) -> None:
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(_serve(BareLoop(events).app, pipe))


class BareLoop:
    """Waits for as many streams as the body says, then writes one event a turn to each of them."""

    def __init__(self, events: list[bytes]) -> None:
        self.events = events
        self.waiting: list[web.StreamResponse] = []
        self.done = asyncio.Event()
        self.app = web.Application()
        self.app.add_routes([web.post("/v1/completions", self.stream)])

    async def stream(self, request: web.Request) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        response = web.StreamResponse(headers=HEADERS)
        await response.prepare(request)
        self.waiting.append(response)
        if len(self.waiting) == body["num_streams"]:
            responses, self.waiting, done, self.done = self.waiting, [], self.done, asyncio.Event()
            first, *rest = self.events[: body["max_tokens"]]
            for event in (first, *rest, b"data: [DONE]\n\n"):
                for one in responses:
                    await one.write(event)
                await asyncio.sleep(0)
            done.set()
        else:
            await self.done.wait()
        await response.write_eof()
        return response


async def _serve(app: web.Application, pipe: Connection) -> None:
    """Until the parent hangs up; every message from it is answered with the CPU seconds so far."""
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
    await site.start()
    pipe.send(runner.addresses[0][1])
    loop, hung_up = asyncio.get_running_loop(), asyncio.Event()

    def answer() -> None:
        try:
            pipe.recv()
            pipe.send(time.process_time())
        except EOFError:
            loop.remove_reader(pipe.fileno())
            hung_up.set()

    loop.add_reader(pipe.fileno(), answer)
    await hung_up.wait()
    await runner.cleanup()


class Contestant:
    """A server in a process of its own."""

    def __init__(self, serve: object, *args: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=serve, args=(child, *args), daemon=True)  # type: ignore[arg-type]
        self.process.start()
        child.close()
        self.port: int = self.pipe.recv()

    def cpu_s(self) -> float:
        self.pipe.send(None)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.close()
        self.process.join(10)
        self.process.terminate()


def request_of(load: Load) -> bytes:
    body = orjson.dumps(
        {
            "prompt": [100 + i for i in range(PROMPT_LEN)],
            "max_tokens": load.num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "num_streams": load.num_streams,
        }
    )
    head = "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(body)}\r\n\r\n".encode() + body


def run(contestant: Contestant, load: Load) -> tuple[float, float, int]:
    """(seconds from the first request to the last byte, CPU seconds of the server, bytes)."""
    request = request_of(load)
    connections = [socket.create_connection(("127.0.0.1", contestant.port)) for _ in range(load.num_streams)]
    selector = selectors.DefaultSelector()
    tails = {}
    for connection in connections:
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, connection)
        tails[connection] = b""
    cpu_s, start, num_bytes = contestant.cpu_s(), time.perf_counter(), 0
    for connection in connections:
        connection.sendall(request)
    while tails:
        for key, _ in selector.select(60):
            connection = key.data
            data = connection.recv(1 << 18)
            num_bytes += len(data)
            tail = (tails[connection] + data)[-len(END_OF_RESPONSE) :]
            if not data:
                raise ConnectionError(f"a stream broke off after {tail!r}")
            if tail == END_OF_RESPONSE:
                del tails[connection]
                selector.unregister(connection)
                connection.close()
            else:
                tails[connection] = tail
    seconds = time.perf_counter() - start
    return seconds, contestant.cpu_s() - cpu_s, num_bytes


def events_of(contestant: Contestant, num_tokens: int) -> list[bytes]:
    """What one stream of `num_tokens` says, an event a token."""
    with socket.create_connection(("127.0.0.1", contestant.port)) as connection:
        connection.sendall(request_of(Load(1, num_tokens)))
        data = b""
        while not data.endswith(END_OF_RESPONSE):
            data += connection.recv(1 << 16)
    events = [part[part.index(b"data: ") :] + b"\n\n" for part in data.split(b"\n\n") if b"data: {" in part]
    typical = events[1]
    return (events + [typical] * num_tokens)[:num_tokens]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--tokens", type=int, default=200_000, help="of all streams of a run together, about")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--json", type=Path, help="append the figures to this file")
    args = parser.parse_args()
    loads = [Load(n, max(min(args.tokens // n, 4000), 16)) for n in args.streams]
    longest = max(load.num_tokens for load in loads)
    console = Console(width=128)

    engine = Contestant(serve_engine, max(args.streams), longest)
    bare = Contestant(serve_bare, events_of(engine, longest))
    table = Table(title="host path of streamed tokens, a model that answers at once")
    columns = ("streams", "tokens each", "engine tok/s", "bare tok/s", "ratio")
    for name in (*columns, *(f"{who} {what}/tok" for what in ("CPU µs", "bytes") for who in ("engine", "bare"))):
        table.add_column(name, justify="right")
    try:
        for load in loads:
            best: dict[str, tuple[float, float, int]] = {}
            for _ in range(args.rounds):  # in turns, so that what else the machine does falls on both
                for name, contestant in (("engine", engine), ("bare", bare)):
                    figures = run(contestant, load)
                    best[name] = min(best.get(name, figures), figures)
            (engine_s, engine_cpu_s, engine_bytes), (bare_s, bare_cpu_s, bare_bytes) = best["engine"], best["bare"]
            table.add_row(
                str(load.num_streams), str(load.num_tokens), f"{load.total / engine_s:,.0f}",
                f"{load.total / bare_s:,.0f}", f"{bare_s / engine_s:.2f}", f"{engine_cpu_s / load.total * 1e6:.1f}",
                f"{bare_cpu_s / load.total * 1e6:.1f}", f"{engine_bytes / load.total:.0f}",
                f"{bare_bytes / load.total:.0f}",
            )  # fmt: skip
            if args.json:
                line = {
                    "streams": load.num_streams, "engine_tokens_per_s": load.total / engine_s,
                    "bare_tokens_per_s": load.total / bare_s, "engine_cpu_us": engine_cpu_s / load.total * 1e6,
                    "bare_cpu_us": bare_cpu_s / load.total * 1e6,
                }  # fmt: skip
                with args.json.open("ab") as file:
                    file.write(orjson.dumps(line) + b"\n")
    finally:
        engine.close()
        bare.close()
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
