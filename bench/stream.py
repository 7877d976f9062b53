"""What the host adds to each token: the whole server around a model that answers at once, beside a bare loop.

    python -m bench.stream --streams 1 64 256 1024
    python -m bench.stream --streams 256 1024 --step-ms 1.5

`engine` is this server with everything but the forward: HTTP, scheduler, rows, staging, detokenizer, SSE. `bare` is an
aiohttp application that has the same bytes ready and writes them, an event a token and connection. Each runs in a
process of its own; the client, here, counts bytes and parses nothing. CPU time is the server process's. Where the
device is never what it waits for, `engine` merges tokens into fewer events: the bytes of a token show how many. "Lag"
is how late the event loop is for what comes in between, looked at every 5 ms, and "thread" how late another thread of
the server's, such as one that reads a long prompt.

With --step-ms the model takes its time, as a GPU does: while the host goes on, so much a step and what reading the
context's keys and values takes. Then the question is whether the device is ever idle (its share of the time between
the first step and the last), and how long after the first request of the burst the first tokens come.
"""

import argparse
import asyncio
import multiprocessing
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import orjson
import uvloop
from aiohttp import web
from rich.console import Console
from rich.table import Table

from engine.config import EngineConfig
from engine.local import LocalEngine
from engine.schedule.plan import Plan
from engine.step.fields import StepShape
from engine.step.model_runner import MAX_IDLE_S, ModelRunner, Step
from server.app import build_app
from server.config import ServerConfig
from server.http.sse import HEADERS
from server.watch.monitor import percentile

ANSWER = (
    "The quick brown fox jumps over the lazy dog, and then it thinks about what it has done. "
    'Is "quick" the right word? Perhaps; a fox that is early need not be quick.\n'
)
PROMPT_LEN = 8
END_OF_RESPONSE = b"\r\n0\r\n\r\n"
CONTEXT_TOKEN_S = 4.4e-8  # to read the keys and values of a token: Qwen3-0.6B's 115 kB on an H100
LAG_TICK_S = 0.005


class InstantRunner(ModelRunner):
    """Every step is done when it is launched; request after request says the same text."""

    def __init__(self, runner: ModelRunner, token_ids: list[int]) -> None:
        super().__init__(runner.model, runner.kv, runner.sampler, runner.stager, runner.comm)
        self.tokens = np.array(token_ids, np.int32)

    def launch(self, plan: Plan) -> Step:
        shape = StepShape.of(plan)
        step = Step(
            plan=plan,
            work=self.sampler.plan_work(plan),
            prompt_work=[],
            staged=self.stager.write(plan, shape),
            shape=shape,
            is_graph=False,
            launched_at=time.perf_counter(),
        )
        positions = plan.seq_lens[plan.samples] - PROMPT_LEN
        step.tokens = _Array(self.tokens[positions % len(self.tokens)])  # type: ignore[assignment]
        step.done = Future()
        step.done.set_result(None)
        return step


class TimedRunner(InstantRunner):
    """A device that computes one step after another while the host goes on."""

    def __init__(self, runner: ModelRunner, token_ids: list[int], step_s: float) -> None:
        super().__init__(runner, token_ids)
        self.step_s = step_s
        self._free_at = 0.0
        self._times: dict[Step, tuple[float, float]] = {}

    def launch(self, plan: Plan) -> Step:
        step = super().launch(plan)
        start = max(time.perf_counter(), self._free_at)
        step_s = self.step_s + CONTEXT_TOKEN_S * int(plan.seq_lens.sum())
        idle_s = start - self._free_at
        self._times[step] = step_s, idle_s if idle_s < MAX_IDLE_S else 0.0
        self._free_at = start + step_s
        step.events = [_Moment(self._free_at)]  # type: ignore[list-item]
        step.done = None
        return step

    def times(self, step: Step) -> tuple[float, float]:
        return self._times.pop(step)


class _Moment:
    """Stands in for a CUDA event: at that time of time.perf_counter() it has come."""

    def __init__(self, moment: float) -> None:
        self._moment = moment

    def query(self) -> bool:
        return time.perf_counter() >= self._moment

    def synchronize(self) -> None:
        time.sleep(max(self._moment - time.perf_counter(), 0.0))


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


@dataclass(frozen=True, slots=True)
class ServerFigures:
    """Record how a server did since it was asked last."""

    cpu_s: float
    idle_s: float  # of the device
    lags_s: list[float]  # how late the event loop was
    thread_lags_s: list[float]  # likewise another thread


@dataclass(frozen=True, slots=True)
class Figures:
    """Record how one run went."""

    seconds: float  # from the first request to the last byte
    num_bytes: int
    first_s: list[float]  # of each stream, from the first request to its first event
    server: ServerFigures


def serve_engine(pipe: Connection, max_streams: int, max_tokens: int, step_s: float) -> None:
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(_serve_engine(pipe, max_streams, max_tokens, step_s))


async def _serve_engine(pipe: Connection, max_streams: int, max_tokens: int, step_s: float) -> None:
    config = ServerConfig(
        model_path="demo", load_format="dummy", json_model_override_args='{"num_hidden_layers": 1}', device="cpu",
        max_running_requests=max_streams, max_total_tokens=max_streams * (max_tokens + PROMPT_LEN + 1),
        chunked_prefill_size=8192, access_log="none",
    )  # fmt: skip
    engine = LocalEngine(EngineConfig(**{name: getattr(config, name) for name in EngineConfig.__dataclass_fields__}))
    await engine.start(lambda step: None)
    runner, token_ids = engine.parts.runner, engine.tokenizer.encode(ANSWER)
    engine.started.loop.runner = TimedRunner(runner, token_ids, step_s) if step_s else InstantRunner(runner, token_ids)
    stats = engine.started.loop.stats
    await _serve(build_app(engine, config), pipe, lambda: stats.device_idle_s)
    await engine.stop()


def serve_bare(pipe: Connection, events: list[bytes]) -> None:
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(_serve(BareLoop(events).app, pipe, lambda: 0.0))


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


async def _serve(app: web.Application, pipe: Connection, device_idle_s: Callable[[], float]) -> None:
    """Until the parent hangs up; every message from it is answered with `ServerFigures`."""
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
    await site.start()
    pipe.send(runner.addresses[0][1])
    loop, hung_up = asyncio.get_running_loop(), asyncio.Event()
    last_cpu_s = last_idle_s = 0.0
    lags_s: list[float] = []
    thread_lags_s: list[float] = []
    threading.Thread(target=_watch_own_lag, args=(thread_lags_s,), daemon=True).start()

    def answer() -> None:
        nonlocal last_cpu_s, last_idle_s
        try:
            pipe.recv()
        except EOFError:
            loop.remove_reader(pipe.fileno())
            hung_up.set()
            return
        cpu_s, idle_s = time.process_time(), device_idle_s()
        pipe.send(ServerFigures(cpu_s - last_cpu_s, idle_s - last_idle_s, lags_s[:], thread_lags_s[:]))
        last_cpu_s, last_idle_s = cpu_s, idle_s
        lags_s.clear()
        thread_lags_s.clear()

    loop.add_reader(pipe.fileno(), answer)
    while not hung_up.is_set():
        due = time.perf_counter() + LAG_TICK_S
        await asyncio.sleep(LAG_TICK_S)
        lags_s.append(max(time.perf_counter() - due, 0.0))
    await runner.cleanup()


def _watch_own_lag(lags_s: list[float]) -> None:
    """How late this thread gets the interpreter that it wants every few milliseconds."""
    while True:
        due = time.perf_counter() + LAG_TICK_S
        time.sleep(LAG_TICK_S)
        lags_s.append(max(time.perf_counter() - due, 0.0))


class Contestant:
    """A server in a process of its own."""

    def __init__(self, serve: object, *args: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=serve, args=(child, *args), daemon=True)  # type: ignore[arg-type]
        self.process.start()
        child.close()
        self.port: int = self.pipe.recv()

    def figures(self) -> ServerFigures:
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


def run(contestant: Contestant, load: Load) -> Figures:
    request = request_of(load)
    connections = [socket.create_connection(("127.0.0.1", contestant.port)) for _ in range(load.num_streams)]
    selector = selectors.DefaultSelector()
    tails = {}
    for connection in connections:
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, connection)
        tails[connection] = b""
    contestant.figures()
    start, num_bytes, buffer = time.perf_counter(), 0, bytearray(1 << 16)
    first_s: dict[socket.socket, float] = {}
    for connection in connections:
        connection.sendall(request)
    while tails:
        for key, _ in selector.select(60):
            connection = key.data
            data = bytes(buffer[: connection.recv_into(buffer)])
            num_bytes += len(data)
            if connection not in first_s and b"data: " in data:
                first_s[connection] = time.perf_counter() - start
            tail = (tails[connection] + data)[-len(END_OF_RESPONSE) :]
            if not data:
                raise ConnectionError(f"a stream broke off after {tail!r}")
            if tail == END_OF_RESPONSE:
                del tails[connection]
                selector.unregister(connection)
                connection.close()
            else:
                tails[connection] = tail
    return Figures(time.perf_counter() - start, num_bytes, list(first_s.values()), contestant.figures())


def events_of(contestant: Contestant, num_tokens: int) -> list[bytes]:
    """Return what one stream of `num_tokens` says, an event a token."""
    with socket.create_connection(("127.0.0.1", contestant.port)) as connection:
        connection.sendall(request_of(Load(1, num_tokens)))
        data = b""
        while not data.endswith(END_OF_RESPONSE):
            data += connection.recv(1 << 16)
    events = [part[part.index(b"data: ") :] + b"\n\n" for part in data.split(b"\n\n") if b"data: {" in part]
    typical = events[1]
    return (events + [typical] * num_tokens)[:num_tokens]


def _line(load: Load, figures: Figures) -> dict[str, float]:
    """Return a row of figures. A token is one of all streams'.

    `idle`: the device's share of the time from the first token to the last.
    """
    lags_s, first_s = sorted(figures.server.lags_s), figures.first_s
    thread_lags_s = sorted(figures.server.thread_lags_s)
    return {
        "tokens_per_s": load.total / figures.seconds,
        "cpu_us": figures.server.cpu_s / load.total * 1e6,
        "bytes": figures.num_bytes / load.total,
        "lag_p50_ms": 1e3 * (percentile(lags_s, 0.5) or 0.0),
        "lag_p99_ms": 1e3 * (percentile(lags_s, 0.99) or 0.0),
        "thread_p50_ms": 1e3 * (percentile(thread_lags_s, 0.5) or 0.0),
        "thread_p99_ms": 1e3 * (percentile(thread_lags_s, 0.99) or 0.0),
        "first_p50_ms": 1e3 * (percentile(first_s, 0.5) or 0.0),
        "first_p99_ms": 1e3 * (percentile(first_s, 0.99) or 0.0),
        "idle": figures.server.idle_s / (figures.seconds - min(first_s)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--tokens", type=int, default=200_000, help="of all streams of a run together, about")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--step-ms", type=float, default=0.0, help="of the device, beside reading the context; 0: none")
    parser.add_argument("--json", type=Path, help="append the figures to this file")
    args = parser.parse_args()
    loads = [Load(n, max(min(args.tokens // n, 4000), 16)) for n in args.streams]
    longest = max(load.num_tokens for load in loads)
    console = Console(width=160)

    engine = Contestant(serve_engine, max(args.streams), longest, args.step_ms / 1e3)
    bare = Contestant(serve_bare, events_of(engine, longest))
    table = Table(title="host path of streamed tokens")
    columns = ("streams", "tokens each", "engine tok/s", "bare tok/s", "ratio")
    for name in (
        *columns, *(f"{who} {what}/tok" for what in ("CPU µs", "bytes") for who in ("engine", "bare")),
        *(f"{what} ms, p50 / p99" for what in ("lag", "thread", "first")), "device idle",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    try:
        for load in loads:
            best: dict[str, Figures] = {}
            for _ in range(args.rounds):  # in turns, so that what else the machine does falls on both
                for name, contestant in (("engine", engine), ("bare", bare)):
                    figures = run(contestant, load)
                    if name not in best or figures.seconds < best[name].seconds:
                        best[name] = figures
            lines = {name: _line(load, figures) for name, figures in best.items()}
            ours, theirs = lines["engine"], lines["bare"]
            table.add_row(
                str(load.num_streams), str(load.num_tokens), f"{ours['tokens_per_s']:,.0f}",
                f"{theirs['tokens_per_s']:,.0f}", f"{ours['tokens_per_s'] / theirs['tokens_per_s']:.2f}",
                f"{ours['cpu_us']:.1f}", f"{theirs['cpu_us']:.1f}", f"{ours['bytes']:.0f}", f"{theirs['bytes']:.0f}",
                f"{ours['lag_p50_ms']:.1f} / {ours['lag_p99_ms']:.1f}",
                f"{ours['thread_p50_ms']:.1f} / {ours['thread_p99_ms']:.1f}",
                f"{ours['first_p50_ms']:.0f} / {ours['first_p99_ms']:.0f}",
                f"{ours['idle']:.1%}" if args.step_ms else "",
            )  # fmt: skip
            if args.json:
                with args.json.open("ab") as file:
                    file.write(orjson.dumps({"streams": load.num_streams, **lines}) + b"\n")
    finally:
        engine.close()
        bare.close()
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
