"""What the front-end language costs its own process: microseconds for a gen, and thousands of states waiting at once.

    python -m bench.lang_client
    python -m bench.lang_client --frontend sglang --states 1000

The answers come at once: from a backend without a server, and over HTTP from a process that sends every client the
same bytes. So what is left is the interpreter and its HTTP client. `--frontend sglang` runs the same programs with
SGLang's own front end, where it is installed.
"""

import argparse
import asyncio
import importlib
import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

import server.lang as ours
from server.lang.backends.base import JSON, BaseBackend, Prompt
from server.lang.expressions import GenParams
from server.lang.templates import get_chat_template

TEMPLATE = "chatml"
TURNS = 4
META = {"id": "0", "prompt_tokens": 40, "completion_tokens": 4, "cached_tokens": 30, "finish_reason": {"type": "stop"}}
ANSWER = json.dumps({"text": "yes", "output_ids": [1, 2, 3, 4], "meta_info": META, "model_path": "parrot"}).encode()
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(ANSWER), ANSWER)
PAGE_BYTES = 4096
SAMPLE_EVERY = 100  # states between two looks at the process's memory


class Watch:
    """How many states wait, on how many threads, in how much memory: the largest of each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_waiting = self.most_waiting = self.most_threads = self.most_bytes = 0
        self._bytes_before = resident_bytes()

    def enter(self) -> None:
        with self._lock:
            self.num_waiting += 1
            self.most_waiting = max(self.most_waiting, self.num_waiting)
            self.most_threads = max(self.most_threads, threading.active_count())
            if self.num_waiting % SAMPLE_EVERY == 0:
                self.most_bytes = max(self.most_bytes, resident_bytes() - self._bytes_before)

    def leave(self) -> None:
        with self._lock:
            self.num_waiting -= 1


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


class Parrot(BaseBackend):
    """Answers after `answer_s` seconds."""

    chat_template = get_chat_template(TEMPLATE)

    def __init__(self, answer_s: float) -> None:
        super().__init__()
        self.answer_s, self.watch = answer_s, Watch()

    def get_model_name(self) -> str:
        return "parrot"

    async def generate(self, prompt: Prompt, params: GenParams) -> tuple[list[str], list[JSON]]:
        if self.answer_s:
            self.watch.enter()
            await asyncio.sleep(self.answer_s)
            self.watch.leave()
        return ["yes"], [META]

    async def generate_stream(self, prompt: Prompt, params: GenParams) -> AsyncIterator[tuple[str, JSON]]:
        yield "yes", META


def sglang_parrot(answer_s: float) -> Any:
    """Do the same with SGLang's front end."""
    base: Any = importlib.import_module("sglang.lang.backend.base_backend").BaseBackend

    class SglangParrot(base):  # type: ignore[misc] # of a package that need not be there
        def __init__(self) -> None:
            super().__init__()
            self.watch = Watch()
            self.chat_template = importlib.import_module("sglang.lang.chat_template").get_chat_template(TEMPLATE)

        def generate(self, s: Any, sampling_params: Any) -> tuple[str, JSON]:
            if answer_s:
                self.watch.enter()
                time.sleep(answer_s)
                self.watch.leave()
            return "yes", META

    return SglangParrot()


class InstantAnswers(asyncio.Protocol):
    """`RESPONSE` to every request."""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.received = transport, b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        while b"\r\n\r\n" in self.received:
            head, _, rest = self.received.partition(b"\r\n\r\n")
            _, _, length = head.lower().partition(b"content-length:")
            body_len = int(length.split(b"\r\n")[0] or 0)
            if len(rest) < body_len:
                return
            self.received = rest[body_len:]
            self.transport.write(RESPONSE)
            if b"connection: close" in head.lower():
                return self.transport.close()


def serve_instantly(port: Connection) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(InstantAnswers, "127.0.0.1", 0, backlog=1024)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(main())


@contextmanager
def instant_server() -> Iterator[str]:
    """Yield the URL of a process that answers at once."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=serve_instantly, args=(sender,), daemon=True)
    process.start()
    yield f"http://127.0.0.1:{receiver.recv()}"
    process.terminate()
    process.join()


def calls(lang: Any, parrot: Callable[[float], Any], num_states: int, repeats: int) -> Table:
    """Return a table of microseconds for a gen."""

    @lang.function
    def question(s: Any, i: int) -> None:
        s += f"Is {i} a number?\nAnswer: " + lang.gen("answer", max_tokens=4, stop="\n")

    @lang.function
    def chat(s: Any, i: int) -> None:
        for turn in range(TURNS):
            s += lang.user(f"Is {i} a number, and {turn}?")
            s += lang.assistant(lang.gen(f"answer_{turn}", max_tokens=4))

    batch = [{"i": i} for i in range(num_states)]
    cases: dict[str, tuple[Callable[[Any], Any], int]] = {
        "one after another": (lambda backend: [question.run(i=i, backend=backend) for i in range(num_states)], 1),
        f"{num_states:,} at once": (lambda backend: question.run_batch(batch, backend=backend), 1),
        f"{num_states:,} chats of {TURNS} turns": (lambda backend: chat.run_batch(batch, backend=backend), TURNS),
    }
    table = Table(title="a gen that is answered at once", title_justify="left")
    for column in ("server", "programs", "µs a gen", "µs of the client's CPU time"):
        table.add_column(column, justify="left" if column in ("server", "programs") else "right")
    with instant_server() as url:
        backends = {"none": parrot(0.0), "HTTP": lang.RuntimeEndpoint(url, chat_template_name=TEMPLATE)}
        for where, backend in backends.items():
            for name, (run, num_gens) in cases.items():
                run(backend)
                walls, cpus = [], []
                for _ in range(repeats):
                    wall, cpu = time.perf_counter(), time.process_time()
                    run(backend)
                    walls.append((time.perf_counter() - wall) / num_states / num_gens * 1e6)
                    cpus.append((time.process_time() - cpu) / num_states / num_gens * 1e6)
                table.add_row(where, name, f"{statistics.median(walls):.0f}", f"{statistics.median(cpus):.0f}")
            backend.shutdown()
    return table


@ours.function
async def ask_twice(s: Any, i: int) -> None:
    s += ours.user(f"Is {i} a number?") + ours.assistant(ours.gen("answer"))
    s += ours.user(f"You said {await s.get('answer')}. Sure?") + ours.assistant(ours.gen("second"))


def states(lang: Any, parrot: Callable[[float], Any], num_states: int, answer_s: float) -> Table:
    """Return a table of what `num_states` cost that wait for their answers."""

    @lang.function
    def ask(s: Any, i: int) -> None:
        s += lang.user(f"Is {i} a number?") + lang.assistant(lang.gen("answer"))

    programs = {"plain": (ask, 1)}
    if lang is ours:
        programs["async, reads midway"] = (ask_twice, 2)
    table = Table(title=f"{num_states:,} states, each answer {answer_s:.0f} s later", title_justify="left")
    for column in ("body", "waiting at once", "threads", "MiB", "s", "CPU s", "of them answers"):
        table.add_column(column, justify="left" if column == "body" else "right")
    for name, (program, num_answers) in programs.items():
        backend = parrot(answer_s)
        # Ours need no thread to wait; SGLang's have a thread in the pool each, and one of their own.
        options = {} if lang is ours else {"num_threads": num_states}
        wall, cpu = time.perf_counter(), time.process_time()
        program.run_batch([{"i": i} for i in range(num_states)], backend=backend, **options)
        wall, cpu, watch = time.perf_counter() - wall, time.process_time() - cpu, backend.watch
        table.add_row(
            name, f"{watch.most_waiting:,}", f"{watch.most_threads:,}", f"{watch.most_bytes / 2**20:.0f}",
            f"{wall:.2f}", f"{cpu:.2f}", f"{num_answers * answer_s:.0f}",
        )  # fmt: skip
        backend.shutdown()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frontend", choices=("ours", "sglang"), default="ours")
    parser.add_argument("--states", type=int, default=10_000, help="that wait at once")
    parser.add_argument("--answer-s", type=float, default=5.0, help="seconds that they wait")
    parser.add_argument("--calls", type=int, default=1000, help="states that are answered at once")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median is taken")
    args = parser.parse_args()
    lang: Any = ours if args.frontend == "ours" else importlib.import_module("sglang")
    parrot: Callable[[float], Any] = Parrot if args.frontend == "ours" else sglang_parrot
    console = Console()
    console.print(states(lang, parrot, args.states, args.answer_s))
    console.print(calls(lang, parrot, args.calls, args.repeats))


if __name__ == "__main__":
    main()
