"""Measure everything that two, four or eight GPUs of one host are for, the most telling first, with one command.

    python -m bench.many_gpus
    python -m bench.many_gpus --list
    python -m bench.many_gpus --only "equal answers, 4 ranks" "sums, 8 ranks" --limit-s 300
    python -m bench.many_gpus --device cpu --gpus 4 --parts equality fault     tries the script itself

equality: greedy answers of a small random float32 model on several ranks are those of one, token for token.
fault:    a rank is killed under load: every answer ends with an error, and the engine names the rank.
sums:     sums over ranks by size, ours beside NCCL's (`bench.parallel`).
speed:    servers on dummy weights of real shapes: start-up, memory, workloads by the neutral client (`bench.gpu`).

What needs more GPUs than there are is named and left out. What --limit-s, ten minutes, leaves no time for is named at
the end with the command that goes on with it. Figures of servers are appended to --output-file as JSON lines.
"""

import argparse
import asyncio
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.compare import wide_console
from bench.gpu import machine, run_bounded, save_random
from engine.config import EngineConfig
from engine.engine import Engine
from engine.new_engine import new_engine
from engine.request import Request, SamplingParams
from engine.state import RequestState

PARTS = ("equality", "fault", "sums", "speed")
WORKLOADS = ("decode1", "ttft1", "decode256", "stream256", "offline", "prefix")
LEAST_S = 20.0  # with less time left nothing is begun
START_LIMIT_S = 240.0  # of one server's start and workloads
CHECK_LIMIT_S = 120.0
NUM_PROMPTS, PROMPT_LEN, ANSWER_LEN = 8, 40, 32
ENDLESS = 1800  # tokens: an answer that is still under way when a rank is killed
VOCAB_SIZE = 1024
SMALL = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 2048, "initializer_range": 0.1,
    "tie_word_embeddings": False,
}  # fmt: skip


class Server(NamedTuple):
    """A model's shape, and over how many GPUs its server spreads it."""

    model: str
    tp: int = 1
    dp: int = 1
    ep: int = 1
    quantization: str = ""

    @property
    def num_gpus(self) -> int:
        return self.tp * self.dp

    @property
    def flags(self) -> str:
        given = {"tp": self.tp, "dp": self.dp, "ep-size": self.ep}
        words = [f"--{name} {count}" for name, count in given.items() if count > 1]
        return " ".join(words + ([f"--quantization {self.quantization}"] if self.quantization else []))


# Of as many GPUs as there are first, then of fewer, which tell what each further one gains.
SERVERS = (
    Server("deepseek-v3", tp=8, ep=8),
    Server("llama3-70b", tp=8),
    Server("llama3-8b", tp=8),
    Server("llama3-70b", tp=4),
    Server("llama3-8b", tp=4),
    Server("llama3-8b", dp=4),
    Server("llama3-8b", tp=2, dp=2),
    Server("qwen3-30b-a3b", tp=4, ep=4),
    Server("qwen3-30b-a3b", tp=4),
    Server("llama3-70b", tp=4, quantization="fp8"),
    Server("llama3-70b", tp=8, quantization="fp8"),
    Server("llama3-8b", tp=2),
    Server("llama3-70b", tp=2, quantization="fp8"),
    Server("llama3-70b", tp=2),
)


class Measurement(NamedTuple):
    """A command that measures something, and what it needs."""

    name: str
    part: str
    num_gpus: int
    command: list[str]
    limit_s: float


def measurements(args: argparse.Namespace) -> Iterator[Measurement]:
    """Yield all that there is to measure, in the order in which it is."""
    python = [sys.executable, "-m"]
    common = ["--device", args.device, "--cache-dir", str(args.cache_dir)]
    checks = [("equality", f"equal answers, {size} ranks", size, 1) for size in (8, 4, 2)]
    checks += [("equality", "equal answers, 2 replicas of 2 ranks", 2, 2)]
    checks += [("fault", f"a killed rank, {size} ranks", size, 1) for size in (8, 4, 2)]
    for part, name, tp, dp in checks:
        command = [*python, "bench.many_gpus", "--do", part, "--tp", str(tp), "--dp", str(dp), *common]
        yield Measurement(name, part, tp * dp, command, CHECK_LIMIT_S)
    for size in (8, 4, 2):
        command = [*python, "bench.parallel", "--tp", str(size), "--only", "sums", "--device", args.device]
        yield Measurement(f"sums, {size} ranks", "sums", size, command, CHECK_LIMIT_S)
    for server in SERVERS:
        command = [*python, "bench.gpu", "--only", "speed", "--models", server.model, *common, "--starts", "1"]
        command += ["--server-args", server.flags, "--workloads", *args.workloads, "--scale", str(args.scale)]
        command += ["--demo", args.demo, "--output-file", str(args.output_file)]
        yield Measurement(f"{server.model} {server.flags}", "speed", server.num_gpus, command, START_LIMIT_S)


def choose(args: argparse.Namespace, num_gpus: int) -> tuple[list[Measurement], list[Measurement]]:
    """Return what can be measured here of what was asked for, and what needs more GPUs."""
    wanted = [one for one in measurements(args) if one.part in args.parts and (not args.only or one.name in args.only)]
    return [one for one in wanted if one.num_gpus <= num_gpus], [one for one in wanted if one.num_gpus > num_gpus]


def run_all(
    chosen: Sequence[Measurement],
    limit_s: float,
    console: Console,
    *,
    run: Callable[[list[str], float], int | None] = run_bounded,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[dict[str, str], list[str]]:
    """Run measurements until the time is over; return what became of each, and the names of those not begun."""
    end = clock() + limit_s
    outcomes: dict[str, str] = {}
    for i, one in enumerate(chosen):
        left_s = end - clock()
        if left_s < LEAST_S:
            return outcomes, [other.name for other in chosen[i:]]
        console.rule(one.name, style="dim")
        began = clock()
        code = run(one.command, min(one.limit_s, left_s))
        word = "ended" if code == 0 else "TIMED OUT" if code is None else f"FAILED ({code})"
        outcomes[one.name] = f"{word} after {clock() - began:.0f} s"
    return outcomes, []


# ---- what runs in processes of its own ----


def small_model(args: argparse.Namespace) -> Path:
    """Return the folder of a small random model whose heads eight ranks can share."""
    folder: Path = args.cache_dir / "many-gpus"
    if not (folder / "model.safetensors").is_file():
        from transformers import LlamaConfig

        save_random(folder, LlamaConfig(**SMALL), "cpu", torch.float32)
    return folder


def config_of(args: argparse.Namespace, **options: Any) -> EngineConfig:
    return EngineConfig(
        model_path=str(small_model(args)), dtype="float32", device=args.device, skip_tokenizer_init=True,
        max_total_tokens=32768, chunked_prefill_size=128, random_seed=0, **options,
    )  # fmt: skip


async def ask(engine: Engine, rid: str, prompt: list[int], num_tokens: int) -> tuple[list[int], RequestState]:
    params = SamplingParams(max_new_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    state = RequestState(Request(rid, prompt, params))
    return [token async for delta in engine.generate(state) for token in delta.token_ids], state


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(PROMPT_LEN)] for _ in range(NUM_PROMPTS)]


async def answers_of(config: EngineConfig) -> list[list[int]]:
    async with new_engine(config) as engine:
        found = await asyncio.gather(*(ask(engine, f"{i}", prompt, ANSWER_LEN) for i, prompt in enumerate(prompts())))
        return [tokens for tokens, _ in found]


def check_equality(args: argparse.Namespace, console: Console) -> bool:
    """Print how many answers of several ranks, and replicas, are those of one; return whether all are."""
    one = asyncio.run(answers_of(config_of(args)))
    several = asyncio.run(answers_of(config_of(args, tp_size=args.tp, dp_size=args.dp)))
    num_equal = sum(a == b for a, b in zip(one, several, strict=True))
    console.print(f"{num_equal} of {len(one)} greedy answers of {args.dp} x {args.tp} ranks are those of one")
    return num_equal == len(one)


def other_ranks(parent: int) -> list[int]:
    """Return the processes of this one's children that are ranks, by Linux's names of them."""
    pids = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        for pid in (task / "children").read_text().split():
            name = Path(f"/proc/{pid}/comm").read_text()
            pids += [int(pid)] if name.startswith("rank") else []
    return sorted(pids)


async def kill_a_rank(config: EngineConfig) -> tuple[str, float, list[int | None]]:
    """Kill a rank while answers are made; return what the engine says, after how long, and the answers' status."""
    async with new_engine(config) as engine:
        asked = [asyncio.create_task(ask(engine, f"{i}", prompt, ENDLESS)) for i, prompt in enumerate(prompts())]
        while engine.stats().scheduler.num_running < len(asked):  # noqa: ASYNC110 - a look at numbers
            await asyncio.sleep(0.01)
        start = time.perf_counter()
        os.kill(other_ranks(os.getpid())[-1], signal.SIGKILL)
        message = await engine.failed()
        states = [state for _, state in await asyncio.gather(*asked)]
        reasons = [state.finish_reason for state in states]
        return (
            message,
            time.perf_counter() - start,
            [None if reason is None else reason.status_code for reason in reasons],
        )


def check_fault(args: argparse.Namespace, console: Console) -> bool:
    message, took_s, codes = asyncio.run(kill_a_rank(config_of(args, tp_size=args.tp)))
    console.print(f"{took_s:.2f} s after a rank of {args.tp} was killed: {message!r}; answers ended with {codes}")
    return "SIGKILL" in message and set(codes) == {500}


CHECKS = {"equality": check_equality, "fault": check_fault}


def argument_parser() -> argparse.ArgumentParser:
    cache = Path.home() / ".cache" / "radixloop" / "bench"
    parser = argparse.ArgumentParser(
        prog="python -m bench.many_gpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--only", nargs="+", default=[], metavar="NAME", help="measurements of --list")
    add("--list", action="store_true", help="print what would be measured, and what would not")
    add("--limit-s", type=float, default=600.0, help="of everything")
    add("--gpus", type=int, help="as if there were so many")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--workloads", nargs="+", default=list(WORKLOADS), help="of servers, see bench.compare")
    add("--scale", type=float, default=1.0, help="number of requests, as a share of the real workload's")
    add("--demo", default="demo", help="whose tokenizer the servers' models have, see bench.gpu")
    add("--cache-dir", type=Path, default=cache, help="for models and logs")
    add("--output-file", type=Path, default=cache / "many-gpus.jsonl")
    add("--tp", type=int, default=2, help=argparse.SUPPRESS)
    add("--dp", type=int, default=1, help=argparse.SUPPRESS)
    add("--do", choices=CHECKS, help=argparse.SUPPRESS)  # what the script starts itself with
    return parser


def main() -> int:
    args = argument_parser().parse_args()
    args.cache_dir, args.output_file = args.cache_dir.expanduser().resolve(), args.output_file.expanduser().resolve()
    args.cache_dir.mkdir(parents=True, exist_ok=True)
    console = wide_console()
    if args.do:
        return 0 if CHECKS[args.do](args, console) else 1
    num_gpus = torch.cuda.device_count() if args.gpus is None else args.gpus
    chosen, beyond = choose(args, num_gpus)
    for one in beyond:
        console.print(f"left out, needs {one.num_gpus} GPUs and {num_gpus} are here: {one.name}", style="yellow")
    if not chosen:
        console.print("nothing is left to measure; for one GPU there is bench.gpu", style="bold red")
        return 2
    if args.list:
        console.print("\n".join(one.name for one in chosen), markup=False)
        return 0
    console.print(machine())
    outcomes, not_begun = run_all(chosen, args.limit_s, console)
    table = Table("measurement", "", box=box.SIMPLE)
    for name, outcome in outcomes.items():
        table.add_row(name, outcome)
    console.print(table)
    if not_begun:
        again = shlex.join(["python", "-m", "bench.many_gpus", "--only", *not_begun])
        console.print(f"no time was left for {len(not_begun)}; to go on: {again}", markup=False, soft_wrap=True)
    return 0 if all(outcome.startswith("ended") for outcome in outcomes.values()) and not not_begun else 1


if __name__ == "__main__":
    sys.exit(main())
