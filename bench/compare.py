"""The workloads that SGLang and vLLM were measured with, sent to any OpenAI-compatible server, beside their figures.

    python -m bench.compare --port 30000 --workloads decode1 offline stream256

Prompts are token ids over /v1/completions, greedy but for `sample256`, with `ignore_eos`, drawn from `--seed`: every
server gets the same work. Workloads of the same shape get the same prompts, so that after `decode256` those of
`stream256` are cached, as they were when the peers were measured; a second run on a running server wants another seed.
What sampling costs: `greedy256` twice, then it with each `--extra-request-body`, whose prompts are cached as well.

The peers' figures stand beside ours where the model is one of those they were measured with (`--peers`): dummy weights
in bf16 on one NVIDIA H100 80GB. On another GPU only the ratios of figures taken there mean anything.
"""

import argparse
import math
import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any

import aiohttp
import orjson
import uvloop
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.result import Result
from bench.serve import Client, Metrics, run_load
from bench.work import Work

TOKEN_IDS = range(100, 40_000)  # ordinary ones in any likely vocabulary
CLIENT_START_S = 60.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of one kind. Lengths are tokens, (shortest, longest), each as likely."""

    num_requests: int
    input_len: tuple[int, int]  # after the shared prefix, if any
    output_len: tuple[int, int]
    figures: tuple[str, ...]
    stream: bool = False
    num_prefixes: int = 0  # each request starts with one of them, at random
    prefix_len: int = 0
    max_concurrency: int | None = None
    request_rate: float = math.inf  # requests/s, Poisson; inf: all at once
    is_spread: bool = False  # over several client processes: one cannot read that many streams
    fields: dict[str, Any] = field(default_factory=dict)  # more of each request

    def scaled(self, requests: float, lengths: float) -> "Workload":
        """Return the same with fewer requests, at least one, and fewer tokens, at least two."""

        def tokens(length: int) -> int:
            return max(2, int(length * lengths))

        return replace(
            self,
            num_requests=max(1, int(self.num_requests * requests)),
            input_len=(tokens(self.input_len[0]), tokens(self.input_len[1])),
            output_len=(tokens(self.output_len[0]), tokens(self.output_len[1])),
            prefix_len=int(self.prefix_len * lengths),
        )

    def draw(self, seed: int) -> list[Work]:
        rng = random.Random(f"{seed} {self.input_len} {self.output_len}")
        prefixes = [rng.choices(TOKEN_IDS, k=self.prefix_len) for _ in range(self.num_prefixes)] or [[]]
        return [
            Work(rng.choice(prefixes) + rng.choices(TOKEN_IDS, k=rng.randint(*self.input_len)), output_len)
            for output_len in (rng.randint(*self.output_len) for _ in range(self.num_requests))
        ]


TTFT, TTFT_P99, TPOT = "TTFT p50, ms", "TTFT p99, ms", "ms per output token"
REQUESTS, TOKENS, SECONDS = "requests/s", "output tokens/s", "seconds in all"
FIGURES: dict[str, Callable[[Metrics], float]] = {
    TTFT: lambda metrics: metrics.ttft["median_ms"],
    TTFT_P99: lambda metrics: metrics.ttft["p99_ms"],
    TPOT: lambda metrics: metrics.tpot["median_ms"],
    REQUESTS: lambda metrics: metrics.request_throughput,
    TOKENS: lambda metrics: metrics.output_throughput,
    SECONDS: lambda metrics: metrics.duration_s,
}
LATENCIES = frozenset({TTFT, TTFT_P99, TPOT, SECONDS})  # the less the better
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "top_k": 50}

WORKLOADS = {
    "decode1": Workload(3, (128, 128), (256, 256), (TPOT, TTFT, TOKENS), stream=True, max_concurrency=1),
    "ttft1": Workload(20, (2048, 2048), (2, 2), (TTFT,), stream=True, max_concurrency=1),
    "offline": Workload(512, (512, 1535), (96, 159), (REQUESTS, TOKENS)),
    "prefix": Workload(512, (128, 128), (64, 64), (REQUESTS,), num_prefixes=8, prefix_len=4096),
    "online": Workload(256, (256, 767), (128, 128), (TTFT, TTFT_P99, TPOT), stream=True, request_rate=16.0),
    "decode256": Workload(256, (64, 64), (384, 384), (TOKENS,)),
    "stream256": Workload(256, (64, 64), (384, 384), (TOKENS, TTFT, TPOT), stream=True, is_spread=True),
    "stream64": Workload(64, (64, 64), (384, 384), (TOKENS, TTFT, TPOT), stream=True, is_spread=True),
    "stream1024": Workload(1024, (64, 64), (384, 384), (TOKENS, TTFT, TPOT), stream=True, is_spread=True),
    "decode16": Workload(16, (1000, 1000), (256, 256), (TPOT, TOKENS), stream=True),
    "sample256": Workload(256, (96, 96), (320, 320), (TOKENS, TTFT, TPOT), stream=True, is_spread=True, fields=SAMPLED),
    "greedy256": Workload(256, (96, 96), (320, 320), (TOKENS, TTFT, TPOT), stream=True, is_spread=True),
    "logprobs64": Workload(64, (200, 200), (128, 128), (TOKENS,), fields={"logprobs": 5}),
    "long8": Workload(8, (24_000, 24_000), (64, 64), (SECONDS, TTFT), stream=True),
    "ttft100k": Workload(1, (100_000, 100_000), (2, 2), (TTFT,), stream=True),
    "decode1_32k": Workload(1, (32_000, 32_000), (256, 256), (TPOT, TTFT), stream=True),
    "decode16_4k": Workload(16, (4_000, 4_000), (256, 256), (TPOT, TOKENS), stream=True),
    "record256": Workload(256, (1024, 1024), (1024, 1024), (SECONDS, TOKENS), stream=True, is_spread=True),
}
WARM_UP = Workload(32, (600, 600), (16, 16), ())


@dataclass(frozen=True, slots=True)
class Reference:
    """The peers' figure, NaN where there is none, and our aim: a figure, or a share of what `aim_of` gave."""

    sglang: float = math.nan
    vllm: float = math.nan
    aim: float = math.nan
    aim_of: str = ""


# This project's own measurements of SGLang 0.5.15 (its defaults: FlashAttention-3, CUDA graphs) and vLLM 0.24.0 (its
# defaults: torch.compile, CUDA graphs) on an NVIDIA H100 80GB HBM3, 2026-11-21, client on the same host, one run each:
# differences under 5% are noise.
REFERENCES: dict[str, dict[tuple[str, str], Reference]] = {
    "llama3-8b": {
        ("decode1", TPOT): Reference(6.33, 6.43, 5.6),
        ("decode1", TTFT): Reference(16.9, 23.2, 10),
        ("ttft1", TTFT): Reference(56, aim=50),
        ("offline", REQUESTS): Reference(27.7, 26.9, 31),
        ("prefix", REQUESTS): Reference(61, 58, 110),
        ("online", TTFT): Reference(31, 46, 22),
        ("online", TTFT_P99): Reference(50, 102, 40),
        ("online", TPOT): Reference(9.0, 8.9, 8.0),
        ("decode256", TOKENS): Reference(17_950, aim=21_500),
        ("stream256", TOKENS): Reference(13_480, aim=0.95, aim_of="decode256"),
        ("stream1024", TOKENS): Reference(aim=1.0, aim_of="stream256"),
    },
    "qwen3-0.6b": {
        ("decode1", TOKENS): Reference(514, 349, 850),
        ("offline", REQUESTS): Reference(93.8, 94.3, 150),
        ("prefix", REQUESTS): Reference(110.7, 90.4, 300),
        ("decode256", TOKENS): Reference(37_480, 27_080, 55_000),
        ("stream256", TOKENS): Reference(9_710, aim=50_000),
        ("stream1024", TOKENS): Reference(aim=1.0, aim_of="stream256"),
    },
}


# --- sending ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    base_url: str
    model: str
    api_key: str | None
    timeout_s: float

    def client(self, stream: bool, fields: dict[str, Any] | None = None) -> Client:
        return Client(
            self.base_url, self.model, stream=stream, api_key=self.api_key, extra_body=fields, timeout_s=self.timeout_s
        )


async def send_all(target: Target, workload: Workload, work: Sequence[Work], seed: int) -> tuple[list[Result], float]:
    async with target.client(workload.stream, workload.fields) as client:
        return await run_load(
            client,
            work,
            request_rate=workload.request_rate,
            max_concurrency=workload.max_concurrency,
            rng=random.Random(seed),
        )


def send_share(target: Target, workload: Workload, work: Sequence[Work], barrier: Barrier, pipe: Connection) -> None:
    """Send a client process's share when all are ready; report the results and when it began and ended."""
    barrier.wait(CLIENT_START_S)
    started = time.monotonic()
    results, _ = uvloop.run(send_all(target, workload, work, seed=0))
    pipe.send((results, started, time.monotonic()))


def send_spread(
    target: Target, workload: Workload, work: Sequence[Work], num_clients: int
) -> tuple[list[Result], float]:
    """Do what `send_all` does, from several processes. Results come in the order of `work`."""
    context = multiprocessing.get_context("spawn")
    num_clients = min(num_clients, len(work))
    barrier = context.Barrier(num_clients)
    clients = []
    for i in range(num_clients):
        ours, theirs = context.Pipe(duplex=False)
        share = work[i::num_clients]
        process = context.Process(target=send_share, args=(target, workload, share, barrier, theirs), daemon=True)
        process.start()
        theirs.close()  # a client that dies is then an EOFError here
        clients.append((process, ours))
    results = [Result(error="not sent")] * len(work)
    starts, ends = [], []
    for i, (process, pipe) in enumerate(clients):
        results[i::num_clients], started, ended = pipe.recv()
        starts.append(started)
        ends.append(ended)
        process.join()
    return results, max(ends) - min(starts)


def measure(target: Target, workload: Workload, seed: int, num_clients: int) -> Metrics:
    work = workload.draw(seed)
    if workload.is_spread:
        results, duration_s = send_spread(target, workload, work, num_clients)
    else:
        results, duration_s = uvloop.run(send_all(target, workload, work, seed))
    for item, result in zip(work, results, strict=True):
        if not result.error and result.output_len != item.output_len:
            result.error = f"an answer of {result.output_len} tokens instead of {item.output_len}"
    return Metrics.of(results, duration_s)


# --- reporting --------------------------------------------------------------------------------------------------------


def wide_console() -> Console:
    """Return a console whose tables are not squeezed when the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def number(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def aim_of(reference: Reference, figure: str, measured: dict[str, Metrics]) -> float:
    """Return the aim as a figure; NaN if there is none, or if what it is a share of was not measured."""
    if not reference.aim_of:
        return reference.aim
    other = measured.get(reference.aim_of)
    return math.nan if other is None else reference.aim * FIGURES[figure](other)


def figures_table(measured: dict[str, Metrics], references: dict[tuple[str, str], Reference], label: str) -> Table:
    """Ours beside the peers'. "x SGLang": how many times as fast as SGLang, for latencies, too."""
    table = Table(box=box.SIMPLE)
    table.add_column("workload")
    table.add_column("figure")
    columns = (label, "SGLang", "vLLM", "x SGLang", "aim", "reached") if references else (label,)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, metrics in measured.items():
        for i, figure in enumerate(WORKLOADS[name].figures):
            ours = FIGURES[figure](metrics)
            cells = [name if i == 0 else "", figure, f"[bold]{number(ours)}[/]"]
            if references:
                reference = references.get((name, figure), Reference())
                aim = aim_of(reference, figure, measured)
                is_latency = figure in LATENCIES
                times = reference.sglang / ours if is_latency else ours / reference.sglang
                reached = "" if math.isnan(aim) else "yes" if (ours <= aim if is_latency else ours >= aim) else "NO"
                sign = "≤ " if is_latency else "≥ "
                cells += [
                    number(reference.sglang),
                    number(reference.vllm),
                    "" if math.isnan(times) else f"{times:.2f}",
                    "" if math.isnan(aim) else sign + number(aim),
                    f"[{'red' if reached == 'NO' else 'green'}]{reached}[/]" if reached else "",
                ]
            table.add_row(*cells)
    return table


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base-url", help="http://HOST:PORT of the server, instead of --host and --port")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=30000)
    add("--model", help="default: the first one the server lists")
    add("--api-key")
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME", help=", ".join(WORKLOADS))
    add("--extra-request-body", type=orjson.loads, default={}, metavar="JSON", help='of each request: {"min_p": 0.1}')
    add("--peers", choices=REFERENCES, help="whose figures to show; default: by the model's name")
    add("--label", default="radixloop", help="name of the measured server in the table and the file")
    add("--scale", type=float, default=1.0, help="number of requests, as a share of the real workload's")
    add("--length-scale", type=float, default=1.0, help="tokens of prompts and answers, likewise")
    add("--num-clients", type=int, default=8, help="client processes of the stream workloads")
    add("--timeout-s", type=float, default=600.0, help="of a request")
    add("--seed", type=int, default=1)
    add("--output-file", help="append a JSON line for each workload")
    return parser


async def find_model(target: Target) -> str:
    async with target.client(stream=False) as client:
        return await client.find_model()


def run(args: argparse.Namespace, console: Console) -> int:
    target = Target(args.base_url or f"http://{args.host}:{args.port}", args.model or "", args.api_key, args.timeout_s)
    try:
        target = replace(target, model=args.model or uvloop.run(find_model(target)))
    except aiohttp.ClientError as error:
        console.print(f"[red]{target.base_url} does not answer:[/] {escape(str(error))}")
        return 1
    warm_up = measure(target, WARM_UP.scaled(args.scale, args.length_scale), args.seed, args.num_clients)
    if warm_up.failed:
        console.print(f"[red]the warm-up failed:[/] {escape(warm_up.first_error)}")
        return 1
    measured: dict[str, Metrics] = {}
    for name in args.workloads:
        workload = WORKLOADS[name].scaled(args.scale, args.length_scale)
        workload = replace(workload, fields=workload.fields | args.extra_request_body)
        metrics = measured[name] = measure(target, workload, args.seed, args.num_clients)
        console.print(f"{name}: {metrics.completed} answers in {metrics.duration_s:.1f} s", style="dim")
        if args.output_file:
            line: dict[str, Any] = {
                "label": args.label, "model": target.model, "base_url": target.base_url, "workload": name,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "seed": args.seed, "scale": args.scale, "length_scale": args.length_scale,
            } | asdict(metrics)  # fmt: skip
            with open(args.output_file, "ab") as file:
                file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
    is_real = args.scale == args.length_scale == 1.0
    peers = args.peers or target.model.rstrip("/").rpartition("/")[2]
    references = REFERENCES.get(peers, {}) if is_real else {}
    console.print(f"{target.model} at {target.base_url}" + ("" if is_real else ", scaled down: compare with nothing"))
    if references:
        console.print("SGLang 0.5.15 and vLLM 0.24.0: measured on one NVIDIA H100 80GB, 2026-11-21", style="dim")
    console.print(figures_table(measured, references, args.label))
    for name, metrics in measured.items():
        if metrics.failed:
            num_requests = metrics.failed + metrics.completed
            console.print(f"[red]{name}: {metrics.failed} of {num_requests} failed:[/] {escape(metrics.first_error)}")
    return 1 if any(metrics.failed for metrics in measured.values()) else 0


def main() -> None:
    sys.exit(run(argument_parser().parse_args(), wide_console()))


if __name__ == "__main__":
    main()
