"""Load a server over HTTP and report how fast it answers: any with OpenAI's API, SGLang's own or Ollama's.

    python -m bench.serve --port 30000 --dataset-name random --num-prompts 256 \\
        --random-input 1024 --random-output 128 --request-rate 16

Open loop: requests start at Poisson times of `--request-rate` (default: all at once), however slow the answers;
`--max-concurrency` makes those wait that are too many. Prompts are token ids drawn from a seed, so that every server
gets the same work; `--api chat` and Ollama, which take no ids, get words, roughly one a token; or they come from a file
(`--dataset-name sharegpt` or `custom`). Answers are greedy and have exactly the asked length (`ignore_eos`; Ollama has
no such field) unless `--disable-ignore-eos`.

Measured by the client, from the moment it sends a request:
TTFT (time to first token), E2E (to the last), TPOT (time per output token: (E2E - TTFT) / (tokens - 1), one value a
request), ITL (inter-token latency: between two pieces of an answer, which may hold several tokens).
"""

import argparse
import asyncio
import importlib.util
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import aiohttp
import numpy as np
import orjson
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.load_plot import draw
from bench.result import Result
from bench.wire import BACKENDS, WIRES
from bench.work import Prompts, Work, custom_work, drawn, random_work, shared_prefix_work, sharegpt_work, token_counter

PERCENTILES = (99.0,)


class Client:
    """Sends prompts to one server. Use as `async with`; an answer that breaks off is an error, never a success."""

    def __init__(
        self,
        base_url: str,
        model: str = "",
        *,
        api: str = "completions",
        stream: bool = True,
        ignore_eos: bool = True,
        api_key: str | None = None,
        extra_body: dict[str, Any] | None = None,
        timeout_s: float = 3600.0,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.wire = WIRES[api]()
        self.stream, self.ignore_eos = stream, ignore_eos
        self.extra_body = extra_body or {}
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        self.session = aiohttp.ClientSession(
            # A connection a request, as from separate users: a kept one may just be closing at the server's end.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=self.timeout_s),
            headers=self.headers,
            read_bufsize=1 << 20,
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.session.close()

    async def find_model(self) -> str:
        """Id of the first model the server offers; becomes `self.model`."""
        async with self.session.get(self.base_url + self.wire.models_path, raise_for_status=True) as response:
            self.model = self.wire.model_of(orjson.loads(await response.read()))
        return self.model

    async def post(self, path: str) -> None:
        """Ask the server for something without a body: /flush_cache, /start_profile, /stop_profile."""
        async with self.session.post(self.base_url + path, raise_for_status=True):
            pass

    async def send(self, work: Work) -> Result:
        result = Result()
        body = self.wire.body(self.model, work, stream=self.stream, ignore_eos=self.ignore_eos) | self.extra_body
        data = orjson.dumps(body)
        started = time.perf_counter()
        try:
            async with self.session.post(
                self.base_url + self.wire.path, data=data, headers={"Content-Type": "application/json"}
            ) as response:
                if response.status != 200:
                    result.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                elif self.stream:
                    await self.read_stream(response, result, started)
                else:
                    result.prompt_len, result.output_len = self.wire.usage(orjson.loads(await response.read()))
                    result.ttft_s = result.e2e_s = time.perf_counter() - started
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            result.error = repr(error)[:200]
        return result

    async def read_stream(self, response: aiohttp.ClientResponse, result: Result, started: float) -> None:
        last = 0.0
        num_pieces = 0
        async for line in response.content:
            event = self.wire.line(line)
            if event is None:
                continue
            if event.error:
                result.error = event.error
                return
            if event.usage:
                result.prompt_len, result.output_len = event.usage
            now = time.perf_counter()
            if event.has_token or event.usage:
                result.e2e_s = now - started
            if event.has_token:
                if num_pieces:
                    result.itl_s.append(now - last)
                else:
                    result.ttft_s = now - started
                num_pieces += 1
                last = now
            if event.is_last:
                break
        else:
            result.error = f"the stream ended without {'[DONE]' if self.wire.ends_with_done else 'done'}"
            return
        if not num_pieces:
            result.error = "the stream held no token"
            return
        result.output_len = result.output_len or num_pieces


async def run_load(
    client: Client,
    work: Sequence[Work],
    *,
    request_rate: float = math.inf,
    max_concurrency: int | None = None,
    rng: random.Random | None = None,
    progress: Progress | None = None,
) -> tuple[list[Result], float]:
    """Send all of `work`; return a result for each, in its order, and the seconds from first send to last answer."""
    rng = rng or random.Random(0)
    free = asyncio.Semaphore(max_concurrency or len(work))
    bar = progress.add_task("requests", total=len(work), tokens_s=0.0) if progress else None
    num_tokens = 0
    started = time.perf_counter()

    async def send(item: Work) -> Result:
        nonlocal num_tokens
        async with free:
            sent_s = time.perf_counter() - started
            result = await client.send(item)
        result.sent_s = sent_s
        num_tokens += result.output_len
        if progress and bar is not None:
            progress.update(bar, advance=1, tokens_s=num_tokens / (time.perf_counter() - started))
        return result

    async with asyncio.TaskGroup() as tasks:
        sent = []
        due = started
        for item in work:
            sent.append(tasks.create_task(send(item)))
            if math.isfinite(request_rate):
                due += rng.expovariate(request_rate)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
    return [task.result() for task in sent], time.perf_counter() - started


def summary_ms(values_s: Sequence[float], percentiles: Sequence[float] = PERCENTILES) -> dict[str, float]:
    """Mean, median and percentiles in milliseconds of the values that are numbers."""
    values = np.asarray(values_s, dtype=np.float64) * 1e3
    values = values[~np.isnan(values)]
    if not values.size:
        values = np.array([math.nan])
    summary = {"mean_ms": float(values.mean()), "median_ms": float(np.median(values))}
    return summary | {f"p{share:g}_ms": float(np.percentile(values, share)) for share in percentiles}


@dataclass(frozen=True, slots=True)
class Metrics:
    """Figures of one run. Tokens are those the server counted; latencies are `summary_ms`."""

    completed: int
    failed: int
    duration_s: float
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    input_throughput: float
    output_throughput: float
    total_throughput: float
    concurrency: float  # requests in flight, averaged over the run
    ttft: dict[str, float]
    tpot: dict[str, float]
    itl: dict[str, float]
    e2e: dict[str, float]
    first_error: str

    @classmethod
    def of(cls, results: Sequence[Result], duration_s: float, percentiles: Sequence[float] = PERCENTILES) -> "Metrics":
        good = [result for result in results if not result.error]
        num_input = sum(result.prompt_len for result in good)
        num_output = sum(result.output_len for result in good)
        return cls(
            completed=len(good),
            failed=len(results) - len(good),
            duration_s=duration_s,
            total_input_tokens=num_input,
            total_output_tokens=num_output,
            request_throughput=len(good) / duration_s,
            input_throughput=num_input / duration_s,
            output_throughput=num_output / duration_s,
            total_throughput=(num_input + num_output) / duration_s,
            concurrency=sum(result.e2e_s for result in good) / duration_s,
            ttft=summary_ms([result.ttft_s for result in good], percentiles),
            tpot=summary_ms([result.tpot_s for result in good], percentiles),
            itl=summary_ms([gap for result in good for gap in result.itl_s], percentiles),
            e2e=summary_ms([result.e2e_s for result in good], percentiles),
            first_error=next((result.error for result in results if result.error), ""),
        )

    def print(self, console: Console, title: str) -> None:
        run = Table()
        run.add_column("run")
        run.add_column("", justify="right")
        for name, value in (
            ("completed requests", f"{self.completed:,}"),
            ("failed requests", f"{self.failed:,}"),
            ("duration, s", f"{self.duration_s:.2f}"),
            ("input tokens", f"{self.total_input_tokens:,}"),
            ("output tokens", f"{self.total_output_tokens:,}"),
            ("requests/s", f"{self.request_throughput:.2f}"),
            ("input tokens/s", f"{self.input_throughput:,.1f}"),
            ("output tokens/s", f"{self.output_throughput:,.1f}"),
            ("total tokens/s", f"{self.total_throughput:,.1f}"),
            ("requests in flight, mean", f"{self.concurrency:.2f}"),
        ):
            run.add_row(name, value)
        latency = Table()
        latency.add_column("latency, ms")
        for name in self.ttft:
            latency.add_column(name.removesuffix("_ms"), justify="right")
        for name, value_ms in (("TTFT", self.ttft), ("TPOT", self.tpot), ("ITL", self.itl), ("E2E", self.e2e)):
            latency.add_row(name, *(f"{number:,.2f}" for number in value_ms.values()))
        console.print(title, run, latency, highlight=False)
        if self.first_error:
            console.print(f"[red]first error:[/red] {self.first_error}", highlight=False)


DATASETS = {"random-ids": "random", "generated-shared-prefix": "shared-prefix"}
DATASET_NAMES = ("random", "shared-prefix", "sharegpt", "custom")


def api_of(backend: str) -> str:
    """Return the API that another bench's backend stands for."""
    if backend not in BACKENDS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return BACKENDS[backend]


def dataset_of(name: str) -> str:
    return DATASETS.get(name, name)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base-url", help="http://HOST:PORT of the server, instead of --host and --port")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=30000)
    add("--api", choices=tuple(WIRES), default="completions", help="OpenAI's two, SGLang's generate, or Ollama's")
    # As SGLang's and vLLM's benches name it.
    add(
        "--backend", "--endpoint-type", "--endpoint", dest="api", type=api_of, default=argparse.SUPPRESS,
        help=f"the same, by the names of other benches: {', '.join(BACKENDS)}",
    )  # fmt: skip
    add("--tokenizer", help="folder or hub id; sharegpt: counts the file's texts, else by their characters")
    add("--model", help="default: the first one the server lists")
    add("--api-key")
    add("--dataset-name", "--dataset", type=dataset_of, choices=DATASET_NAMES, default="random")
    add("--dataset-path", help="sharegpt: its JSON file; custom: JSON lines with prompt or messages, and output_tokens")
    add("--sharegpt-output-len", "--custom-output-len", type=int, help="of every answer, in place of the file's own")
    add("--num-prompts", type=int, default=256)
    add(
        "--random-input-len",
        "--random-input",
        "--gsp-question-len",
        type=int,
        default=1024,
        help="tokens of a prompt, of a question",
    )
    add("--random-output-len", "--random-output", "--gsp-output-len", type=int, default=128, help="tokens of an answer")
    add("--random-range-ratio", type=float, default=0.0, help="random lengths: from ratio * length to length")
    add("--num-groups", "--gsp-num-groups", type=int, default=8, help="shared-prefix: how many prefixes")
    add("--prefix-len", "--gsp-system-prompt-len", type=int, default=2048, help="shared-prefix: tokens of a prefix")
    add("--vocab-size", type=int, default=32000, help="token ids are drawn below this")
    add("--request-rate", type=float, default=math.inf, help="requests/s, Poisson; default: all at once")
    add("--max-concurrency", type=int, help="requests in flight at most")
    add("--warmup-requests", type=int, default=1)
    add("--flush-cache", action="store_true", help="POST /flush_cache after the warm-up")
    add("--disable-stream", action="store_true", help="whole answers: TTFT is then E2E")
    add("--disable-ignore-eos", action="store_true", help="let the model end its answers")
    add("--extra-request-body", type=json.loads, default={}, help="JSON object added to every request")
    add("--profile", action="store_true", help="have the server record a trace of the run (/start_profile)")
    add(
        "--percentiles", "--metric-percentiles", type=percentiles_of, default=PERCENTILES, metavar="P[,P...]",
        help="of the latencies (default: 99)",
    )  # fmt: skip
    add("--plot", metavar="FILE", help="draw the run into FILE.svg, .png or .pdf (pip install matplotlib)")
    add("--seed", type=int, default=1)
    add("--output-file", help="append one JSON line: arguments and figures")
    add("--output-details", action="store_true", help="put every request's times into that line, too")
    add("--disable-progress", "--disable-tqdm", action="store_true")
    return parser


def percentiles_of(text: str) -> tuple[float, ...]:
    shares = tuple(float(part) for part in text.split(","))
    if not all(0 < share < 100 for share in shares):
        raise argparse.ArgumentTypeError(f"must be between 0 and 100, got {text}")
    return shares


def make_work(args: argparse.Namespace, rng: random.Random) -> list[Work]:
    """Return the requests. `OSError` or `ValueError` if they are in a file that is none."""
    prompts = Prompts(rng, args.vocab_size, as_text=not WIRES[args.api].takes_ids)
    if args.dataset_name == "shared-prefix":
        return shared_prefix_work(
            prompts, args.num_prompts, args.num_groups, args.prefix_len, args.random_input_len, args.random_output_len
        )
    if args.dataset_name == "sharegpt":
        count = token_counter(args.tokenizer)
        return sharegpt_work(Path(args.dataset_path), rng, args.num_prompts, args.sharegpt_output_len, count)
    if args.dataset_name == "custom":
        with open(args.dataset_path) as lines:
            work = list(custom_work(lines, args.sharegpt_output_len or args.random_output_len))
        return drawn(work, rng, args.num_prompts)
    return random_work(
        prompts, args.num_prompts, args.random_input_len, args.random_output_len, args.random_range_ratio
    )


async def run(args: argparse.Namespace, console: Console) -> int:
    rng = random.Random(args.seed)
    try:
        work = make_work(args, rng)
    except (OSError, ValueError) as error:
        console.print(f"[red]{args.dataset_path}:[/red] {error}", highlight=False)
        return 2
    if not work:
        console.print(f"[red]{args.dataset_path}[/red] holds no request of a usual length", highlight=False)
        return 2
    as_text = not WIRES[args.api].takes_ids
    warmup = random_work(Prompts(rng, args.vocab_size, as_text), args.warmup_requests, 32, 8, 1.0)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[tokens_s]:,.0f} tokens/s"),
    )
    async with Client(
        args.base_url or f"http://{args.host}:{args.port}",
        args.model or "",
        api=args.api,
        stream=not args.disable_stream,
        ignore_eos=not args.disable_ignore_eos,
        api_key=args.api_key,
        extra_body=args.extra_request_body,
    ) as client:
        try:
            model = args.model or await client.find_model()
            warmup_results, _ = await run_load(client, warmup)
            if failed := next((result.error for result in warmup_results if result.error), ""):
                console.print(f"[red]the warm-up failed:[/red] {failed}", highlight=False)
                return 1
            if args.flush_cache:
                await client.post("/flush_cache")
            if args.profile:
                await client.post("/start_profile")
        except aiohttp.ClientError as error:
            console.print(f"[red]{client.base_url} does not answer:[/red] {error}", highlight=False)
            return 1
        with Progress(*columns, console=console, disable=args.disable_progress) as progress:
            results, duration_s = await run_load(
                client,
                work,
                request_rate=args.request_rate,
                max_concurrency=args.max_concurrency,
                rng=rng,
                progress=progress,
            )
        if args.profile:
            await client.post("/stop_profile")
    metrics = Metrics.of(results, duration_s, args.percentiles)
    title = f"{model} at {client.base_url}, {args.dataset_name}, {len(work)} prompts"
    metrics.print(console, title)
    if args.plot:
        draw(results, duration_s, title, Path(args.plot))
    num_short = sum(result.output_len < item.output_len for item, result in zip(work, results, strict=True))
    if num_short and not args.disable_ignore_eos:
        console.print(f"[yellow]{num_short} answers are shorter than asked[/yellow]")
    if args.output_file:
        line: dict[str, Any] = {**vars(args), "model": model, **asdict(metrics)}
        line["request_rate"] = str(args.request_rate)
        del line["api_key"]
        if args.output_details:
            line["requests"] = [asdict(result) for result in results]
        with open(args.output_file, "ab") as file:  # noqa: ASYNC230 (the run is over)
            file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
    return 1 if metrics.failed else 0


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    if not args.request_rate > 0:
        parser.error(f"--request-rate must be above 0, got {args.request_rate}")
    for name in ("num_prompts", "random_input_len", "random_output_len", "num_groups", "max_concurrency"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.dataset_name in ("sharegpt", "custom") and not args.dataset_path:
        parser.error(f"--dataset-name {args.dataset_name} needs --dataset-path FILE")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'radixloop[plot]'")
    sys.exit(uvloop.run(run(args, Console())))


if __name__ == "__main__":
    main()
