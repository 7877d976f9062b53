"""Programs of the front-end language: what sharing prefixes is worth.

    python -m bench.lang --model-path demo
    python -m bench.lang --url http://localhost:30000 --naive-url http://localhost:30001

Each program runs twice: through the language on a server with its radix cache, and naively, every prompt sent whole to
a server started with --disable-radix-cache. Without URLs, both servers are started here, one after the other; every
flag of the server can be given. `--frontend sglang` runs the first with SGLang's own front end, where it is installed.

The ratio is that of the work: a naive server reads each prompt anew, and both write the same answers. So it is large
where prompts are long and answers short, and near 1 where answers are long. The chats come in both manners, with the
sizes of SGLang's own multi-turn benchmark: turns of 256 to 512 words, answers of 4 to 8 tokens or of 256 to 512. All
users share a handbook of 1,024 words as the system message; without one, four equal turns could save no more than 2.5
times. `--scale 0.1` takes a tenth of those lengths (not of the short answers), for a CPU.
"""

import argparse
import importlib
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

import server.lang as ours
from server.command_line import parse_args
from server.lang.backends.base import JSON, BackendError

NUM_QUESTIONS, NUM_SHOTS = 64, 20
BRANCHES, DEPTH, NUM_TREES = 4, 3, 4
NUM_USERS, NUM_TURNS = 16, 4
HANDBOOK_WORDS, TURN_WORDS = 1024, (256, 512)
SHORT_ANSWERS, LONG_ANSWERS = (4, 8), (256, 512)  # tokens
NUM_CHARACTERS = 16
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father"
)
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


@dataclass(frozen=True)
class Workload:
    name: str
    num_gens: int
    run: Callable[[Any], Sequence[Any]]  # from a backend to the states


def make_chats(rng: random.Random, words: Callable[[float], str], fewest: float, most: float) -> list[JSON]:
    """Draw the messages of every user, and how long their answers are: between `fewest` and `most` tokens."""
    return [
        {
            "messages": [words(rng.randint(*TURN_WORDS)) for _ in range(NUM_TURNS)],
            "answer_lens": [max(round(rng.uniform(fewest, most)), 1) for _ in range(NUM_TURNS)],
        }
        for _ in range(NUM_USERS)
    ]


def make_workloads(lang: Any, scale: float) -> list[Workload]:
    """Write programs in `lang`, our module or SGLang's, and what they are run on. The same at each call."""
    rng = random.Random(0)

    def words(count: float) -> str:
        return " ".join(rng.choices(WORDS.split(), k=max(round(count * scale), 1)))

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
    def chat(s: Any, messages: list[str], answer_lens: list[int]) -> None:
        s += lang.system("You know this handbook by heart: " + handbook)
        for turn in range(NUM_TURNS):
            s += lang.user(messages[turn])
            s += lang.assistant(lang.gen(f"answer_{turn}", max_tokens=answer_lens[turn], ignore_eos=True))

    @lang.function
    def character(s: Any, name: str) -> None:
        s += "Fill in, as JSON, what is known about a character of a novel: name, age and house.\n"
        s += f"The character is {name}.\n"
        s += lang.gen("facts", max_tokens=96, json_schema=SCHEMA)

    handbook = words(HANDBOOK_WORDS)

    def workload(name: str, program: Any, batch: list[JSON], gens_each: int = 1) -> Workload:
        def run(backend: Any) -> Sequence[Any]:
            return program.run_batch(batch, backend=backend, temperature=0.0)

        return Workload(name, len(batch) * gens_each, run)

    questions = [f"A baker makes {i + 7} loaves and sells {i}. How many are left?" for i in range(NUM_QUESTIONS)]
    turns = f"{NUM_USERS} users, {NUM_TURNS} turns"
    return [
        workload(
            f"few-shot: {NUM_QUESTIONS} questions, {len(shots):,} characters shared",
            few_shot,
            [{"question": question} for question in questions],
        ),
        workload(
            f"tree of thought: {NUM_TREES} trees, branching {BRANCHES}, depth {DEPTH}",
            tree_of_thought,
            [{"problem": f"{i} + {2 * i} = ?"} for i in range(NUM_TREES)],
            sum(BRANCHES**level for level in range(1, DEPTH + 1)),
        ),
        workload(f"chat, short answers: {turns}", chat, make_chats(rng, words, *SHORT_ANSWERS), NUM_TURNS),
        workload(
            f"chat, long answers: {turns}",
            chat,
            make_chats(rng, words, *[scale * length for length in LONG_ANSWERS]),
            NUM_TURNS,
        ),
        workload(
            f"JSON by schema: {NUM_CHARACTERS} characters",
            character,
            [{"name": f"Person {i}"} for i in range(NUM_CHARACTERS)],
        ),
    ]


class NaiveEndpoint(ours.RuntimeEndpoint):
    """Says nothing beforehand of what prompts have in common."""

    caches_prefixes = False


@dataclass
class Result:
    requests_per_s: float
    hit_rate: float
    """Of prompt tokens, by the server's own count."""
    seconds: float


def measure(workload: Workload, backend: Any, server: ours.RuntimeEndpoint, num_repeats: int) -> Result:
    """Return the median of runs, each from an empty cache. `BackendError` if a program failed."""
    seconds = []
    num_prompt, num_hit = prompt_and_hit_tokens(server)
    for _ in range(num_repeats):
        server.flush_cache()
        started = time.perf_counter()
        states = workload.run(backend)
        errors = [error for state in states if (error := state.error()) is not None]
        seconds.append(time.perf_counter() - started)
        if errors:
            raise errors[0]
    all_prompt, all_hit = prompt_and_hit_tokens(server)
    median = statistics.median(seconds)
    return Result(workload.num_gens / median, (all_hit - num_hit) / (all_prompt - num_prompt), median)


def prompt_and_hit_tokens(server: ours.RuntimeEndpoint) -> tuple[int, int]:
    """Tokens of all prompts so far, and how many of them were cached."""
    schedulers = [state["scheduler"] for state in server.get_server_info()["internal_states"]]  # of each replica
    return sum(one["num_prompt_tokens"] for one in schedulers), sum(one["num_hit_tokens"] for one in schedulers)


def measure_all(
    workloads: list[Workload], backend: Any, server: ours.RuntimeEndpoint, num_repeats: int, console: Console
) -> dict[str, Result | str]:
    results: dict[str, Result | str] = {}
    for workload in workloads:
        try:
            results[workload.name] = measure(workload, backend, server, num_repeats)
        except BackendError as error:  # a server without grammars
            results[workload.name] = str(error)[:40]
        console.print(f"{workload.name}: {results[workload.name]}", style="dim", highlight=False)
    return results


@contextmanager
def server_at(
    url: str | None, options: JSON, endpoint: type[ours.RuntimeEndpoint] = ours.RuntimeEndpoint
) -> Iterator[ours.RuntimeEndpoint]:
    """Yield an endpoint of the server at `url`, or of one started with `options`."""
    if url is not None:
        yield endpoint(url)
        return
    with ours.Runtime(**options) as runtime:
        yield endpoint(runtime.url)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server, instead of one started here")
    parser.add_argument("--naive-url", help="a running server without a radix cache")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of the names of the programs to run")
    parser.add_argument("--frontend", choices=("ours", "sglang"), default="ours")
    parser.add_argument("--scale", type=float, default=1.0, help="of the chats' messages and long answers")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the median is taken")
    args, rest = parser.parse_known_args()
    given = {name: value for name, value in vars(parse_args(rest)).items() if value != getattr(parse_args([]), name)}
    options = {"launch_timeout": 600.0, **given}
    console = Console()

    def chosen(lang: Any) -> list[Workload]:
        return [one for one in make_workloads(lang, args.scale) if one.name.startswith(tuple(args.only))]

    with server_at(args.url, options) as server:
        if args.frontend == "sglang":
            sglang = importlib.import_module("sglang")
            endpoint = sglang.RuntimeEndpoint(server.base_url)
            shared = measure_all(chosen(sglang), endpoint, server, args.repeats, console)
        else:
            shared = measure_all(chosen(ours), server, server, args.repeats, console)
    with server_at(args.naive_url, {**options, "disable_radix_cache": True}, NaiveEndpoint) as server:
        naive = measure_all(chosen(ours), server, server, args.repeats, console)
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
