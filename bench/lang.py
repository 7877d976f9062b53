"""Programs of the front-end language: what telling the server about prefixes is worth, and what a state costs.

    python -m bench.lang --model-path demo
    python -m bench.lang --url http://localhost:30000 --naive-url http://localhost:30001

Each program runs twice: through the language on a server with its radix cache, and naively, every prompt sent whole to
a server started with --disable-radix-cache. Without URLs, both servers are started here, one after the other; every
flag of the server can be given. `--frontend sglang` runs the first with SGLang's own front end, where it is installed.
"""

import argparse
import asyncio
import importlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

import server.lang as ours
from server.config import parse_args
from server.lang.backends.base import JSON, BackendError, BaseBackend, Prompt
from server.lang.expressions import GenParams
from server.lang.templates import get_chat_template

NUM_QUESTIONS, NUM_SHOTS = 64, 20
BRANCHES, DEPTH, NUM_TREES = 4, 3, 4
NUM_USERS, NUM_TURNS = 16, 4
NUM_CHARACTERS = 16
NUM_STATES, ANSWER_S = 10_000, 5.0
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 1, "maximum": 99},
            "house": {"enum": ["north", "south"]},
        },
        "required": ["name", "age", "house"],
        "additionalProperties": False,
    }
)
Program = Callable[[Any], Sequence[Any]]  # from a backend to the states


def make_programs(lang: Any) -> dict[str, Program]:
    """The workloads, written in `lang`: our module or SGLang's."""
    shots = "".join(
        f"Question: A farmer has {i + 3} sheep and buys {2 * i} more. How many sheep has the farmer now?\n"
        f"Answer: {i + 3} + {2 * i} = {3 * i + 3}. The answer is {3 * i + 3}.\n\n"
        for i in range(NUM_SHOTS)
    )

    @lang.function
    def few_shot(s: Any, question: str) -> None:
        s += shots + "Question: " + question + "\nAnswer:" + lang.gen("answer", max_tokens=16, ignore_eos=True)

    @lang.function
    def tree_of_thought(s: Any, problem: str) -> None:
        s += f"Solve step by step, weighing four ways at each step.\nProblem: {problem}\n" + shots[:1000]

        def grow(state: Any, depth: int) -> None:
            if depth == DEPTH:
                return
            forks = state.fork(BRANCHES)
            forks += lambda i: f"\nStep {depth + 1}, way {i + 1}:" + lang.gen("step", max_tokens=16, ignore_eos=True)
            for fork in forks:
                grow(fork, depth + 1)
            forks.join()

        grow(s, 0)

    @lang.function
    def chat(s: Any, user: int) -> None:
        s += lang.system("You are a patient guide to a museum of machines. " * 8)
        for turn in range(NUM_TURNS):
            s += lang.user(f"I am visitor {user}. What should I see in room {turn + 1}, and why?")
            s += lang.assistant(lang.gen(f"answer_{turn}", max_tokens=24, ignore_eos=True))

    @lang.function
    def character(s: Any, name: str) -> None:
        s += "Fill in, as JSON, what is known about a character of a novel: name, age and house.\n"
        s += f"The character is {name}.\n"
        s += lang.gen("facts", max_tokens=96, json_schema=SCHEMA)

    def batch(program: Any, name: str, values: Sequence[Any]) -> Program:
        items = [{name: value} for value in values]
        return lambda backend: program.run_batch(items, backend=backend, temperature=0.0)

    questions = [f"A baker makes {i + 7} loaves and sells {i}. How many are left?" for i in range(NUM_QUESTIONS)]
    return {
        f"few-shot: {NUM_QUESTIONS} questions, {len(shots):,} characters shared": batch(
            few_shot, "question", questions
        ),
        f"tree of thought: {NUM_TREES} trees, branching {BRANCHES}, depth {DEPTH}": batch(
            tree_of_thought, "problem", [f"{i} + {2 * i} = ?" for i in range(NUM_TREES)]
        ),
        f"chat: {NUM_USERS} users, {NUM_TURNS} turns": batch(chat, "user", range(NUM_USERS)),
        f"JSON by schema: {NUM_CHARACTERS} characters": batch(
            character, "name", [f"Person {i}" for i in range(NUM_CHARACTERS)]
        ),
    }


class CountingEndpoint(ours.RuntimeEndpoint):
    """Counts what answers cost."""

    num_requests = num_prompt_tokens = num_cached_tokens = 0

    async def generate(self, prompt: Prompt, params: GenParams) -> tuple[list[str], list[JSON]]:
        texts, metas = await super().generate(prompt, params)
        self.num_requests += 1
        self.num_prompt_tokens += sum(meta["prompt_tokens"] for meta in metas)
        self.num_cached_tokens += sum(meta["cached_tokens"] for meta in metas)
        return texts, metas


class NaiveEndpoint(CountingEndpoint):
    """Sends each prompt whole and says nothing beforehand."""

    caches_prefixes = False


@dataclass
class Result:
    requests_per_s: float
    hit_rate: float
    seconds: float


def measure(program: Program, backend: Any) -> Result:
    """From an empty cache. `BackendError` if a program failed."""
    backend.flush_cache()
    if isinstance(backend, CountingEndpoint):
        backend.num_requests = backend.num_prompt_tokens = backend.num_cached_tokens = 0
    started = time.perf_counter()
    states = program(backend)
    errors = [error for state in states if (error := state.error()) is not None]
    seconds = time.perf_counter() - started
    if errors:
        raise errors[0]
    count = backend.num_requests if isinstance(backend, CountingEndpoint) else 0
    hit_rate = backend.num_cached_tokens / backend.num_prompt_tokens if count else 0.0
    return Result(count / seconds, hit_rate, seconds)


def measure_all(programs: dict[str, Program], backend: Any, console: Console) -> dict[str, Result | str]:
    results: dict[str, Result | str] = {}
    for name, program in programs.items():
        try:
            results[name] = measure(program, backend)
        except BackendError as error:  # a server without grammars
            results[name] = str(error)[:40]
        console.print(f"{name}: {results[name]}", style="dim", highlight=False)
    return results


@contextmanager
def server_at(url: str | None, options: JSON, endpoint: type[CountingEndpoint]) -> Iterator[CountingEndpoint]:
    """An endpoint of the server at `url`, or of one started with `options`."""
    if url is not None:
        yield endpoint(url)
        return
    with ours.Runtime(**options) as runtime:
        yield endpoint(runtime.url)


class Parrot(BaseBackend):
    """Answers after `ANSWER_S` seconds, so that all states wait at once."""

    chat_template = get_chat_template("default")
    most_threads = num_waiting = most_waiting = 0

    def get_model_name(self) -> str:
        return "parrot"

    async def generate(self, prompt: Prompt, params: GenParams) -> tuple[list[str], list[JSON]]:
        self.num_waiting += 1
        self.most_waiting = max(self.most_waiting, self.num_waiting)
        self.most_threads = max(self.most_threads, threading.active_count())
        await asyncio.sleep(ANSWER_S)
        self.num_waiting -= 1
        return ["yes"], [{}]

    async def generate_stream(self, prompt: Prompt, params: GenParams) -> AsyncIterator[tuple[str, JSON]]:
        yield "yes", {}


@ours.function
def ask(s: Any, i: int) -> None:
    s += ours.user(f"Is {i} a number?") + ours.assistant(ours.gen("answer"))


@ours.function
async def ask_twice(s: Any, i: int) -> None:
    s += ours.user(f"Is {i} a number?") + ours.assistant(ours.gen("answer"))
    s += ours.user(f"You said {await s.get('answer')}. Sure?") + ours.assistant(ours.gen("second"))


def many_states(console: Console) -> None:
    table = Table(title=f"{NUM_STATES:,} states at once", title_justify="left")
    for column in ("body", "states waiting", "threads", "s", "of them answers", "µs a state"):
        table.add_column(column, justify="left" if column == "body" else "right")
    for name, program, num_answers in (("plain, lazy", ask, 1), ("async, reads midway", ask_twice, 2)):
        backend = Parrot()
        started = time.perf_counter()
        program.run_batch([{"i": i} for i in range(NUM_STATES)], backend=backend)
        seconds = time.perf_counter() - started
        own = seconds - num_answers * ANSWER_S
        table.add_row(
            name, f"{backend.most_waiting:,}", str(backend.most_threads), f"{seconds:.2f}",
            f"{num_answers * ANSWER_S:.0f}", f"{own / NUM_STATES * 1e6:.0f}",
        )  # fmt: skip
        backend.shutdown()
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server, instead of one started here")
    parser.add_argument("--naive-url", help="a running server without a radix cache")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of the names of the programs to run")
    parser.add_argument("--frontend", choices=("ours", "sglang"), default="ours")
    args, rest = parser.parse_known_args()
    given = {name: value for name, value in vars(parse_args(rest)).items() if value != getattr(parse_args([]), name)}
    options = {"launch_timeout": 600.0, **given}
    console = Console()
    many_states(console)

    def chosen(lang: Any) -> dict[str, Program]:
        return {name: one for name, one in make_programs(lang).items() if name.startswith(tuple(args.only))}

    with server_at(args.url, options, CountingEndpoint) as backend:
        if args.frontend == "sglang":
            sglang = importlib.import_module("sglang")
            shared = measure_all(chosen(sglang), sglang.RuntimeEndpoint(backend.base_url), console)
        else:
            shared = measure_all(chosen(ours), backend, console)
    with server_at(args.naive_url, {**options, "disable_radix_cache": True}, NaiveEndpoint) as backend:
        naive = measure_all(chosen(ours), backend, console)
    table = Table(title=f"programs, front end: {args.frontend}", title_justify="left")
    for column in ("program", "requests/s", "hit rate", "naively: requests/s", "ratio of times"):
        table.add_column(column, justify="left" if column == "program" else "right")
    for name, one in shared.items():
        other = naive[name]
        if isinstance(one, str) or isinstance(other, str):
            table.add_row(name, str(one), "", str(other), "")
        else:
            table.add_row(
                name, f"{one.requests_per_s:.1f}", f"{one.hit_rate:.0%}", f"{other.requests_per_s:.1f}",
                f"{other.seconds / one.seconds:.2f}",
            )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
