"""Compare this server on a CPU with transformers' `generate`: same weights, dtype, threads and prompts, in one run.

    python -m bench.cpu --model-path demo --threads 2

Starts `python -m server` itself and talks to it over HTTP; transformers runs in a process of its own. They take turns,
round by round, so that what else the machine does falls on both; figures are medians over the rounds. Every prompt is
new, so that no cached prefix helps, but in the one comparison that is about prefixes. Where the package `xllamacpp` is
installed, llama.cpp's figures (on the .gguf file, whose weights stay packed) stand beside them.
"""

import argparse
import asyncio
import contextlib
import functools
import importlib.util
import math
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import uvloop
from rich import box
from rich.console import Console
from rich.table import Table

from bench.result import Result
from bench.serve import Client, run_load
from bench.work import Work

ROOT = Path(__file__).parent.parent
TOKEN_IDS = range(100, 30_000)  # of the demo model, and of any other likely one


@dataclass
class Figures:
    """One contestant's figures; lists have a value a round."""

    ready_s: float = math.nan
    single: list[float] = field(default_factory=list)  # output tokens/s of one stream
    batch: list[float] = field(default_factory=list)  # output tokens/s of all concurrent streams
    first_ttft_ms: list[float] = field(default_factory=list)  # a prompt whose prefix is new
    second_ttft_ms: list[float] = field(default_factory=list)  # another prompt with that prefix
    idle_cpu_percent: float = math.nan


class Prompts:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def tokens(self, length: int) -> list[int]:
        return self.rng.choices(TOKEN_IDS, k=length)

    def batch(self, size: int, length: int) -> list[list[int]]:
        return [self.tokens(length) for _ in range(size)]


# --- servers ----------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def our_server(args: argparse.Namespace, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m server` as a child process; on leaving it is told to stop, and must do so in good order."""
    command = [sys.executable, "-m", "server", "--model-path", args.model_path, "--device", "cpu"]
    command += ["--dtype", args.dtype, "--port", str(port), *args.server_args.split()]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                code = process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            if code:
                log.seek(0)
                print(log.read().decode(errors="replace")[-4000:], f"\nthe server exited with {code}", file=sys.stderr)


async def wait_until_healthy(base_url: str, is_alive: Callable[[], bool], timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{base_url}/health") as response:
                    if response.status == 200:
                        return
            if not is_alive():
                raise SystemExit(f"the server at {base_url} ended before it was ready")
            await asyncio.sleep(0.05)
    raise SystemExit(f"the server at {base_url} is not ready after {timeout_s:.0f} s")


def serve_llama_cpp(model_path: str, threads: int, num_slots: int, context_len: int, pipe: Connection) -> None:
    """Child process: llama.cpp's own HTTP server; sends its address, runs until the pipe says so."""
    import xllamacpp

    from engine.checkpoint.folder import cache_dir, demo_file
    from engine.config import EngineConfig

    params = xllamacpp.CommonParams()
    params.model.path = str(demo_file(cache_dir(EngineConfig())) if model_path == "demo" else model_path)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_parallel = num_slots
    params.n_ctx = num_slots * context_len
    params.port = 0
    params.verbosity = 0
    server = xllamacpp.Server(params)
    pipe.send(server.listening_address)
    pipe.recv()
    os._exit(0)  # its worker threads do not end by themselves


@contextlib.contextmanager
def llama_cpp_server(args: argparse.Namespace) -> Iterator[str]:
    """Yield the base URL of a llama.cpp server, which ends with the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context_len = args.input_len + args.prefix_len + args.output_len + 64
    process = context.Process(
        target=serve_llama_cpp,
        args=(args.model_path, args.threads, args.concurrency, context_len, theirs),
        daemon=True,
    )
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        process.join()


# --- transformers -----------------------------------------------------------------------------------------------------


@functools.cache
def load_transformers(model_path: str, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from engine.checkpoint.folder import resolve_model
    from engine.config import EngineConfig

    folder = resolve_model(EngineConfig(model_path=model_path, dtype=dtype, quantization="none"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def transformers_tokens_per_s(model_path: str, dtype: str, prompts: list[list[int]], output_len: int) -> float:
    """Return the output tokens a second of one greedy `generate` of all `prompts`; runs in the worker process."""
    import torch

    model = load_transformers(model_path, dtype)
    input_ids = torch.tensor(prompts)
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=output_len,
            min_new_tokens=output_len,
            do_sample=False,
            pad_token_id=0,
        )
    seconds = time.perf_counter() - started
    assert output.shape == (len(prompts), len(prompts[0]) + output_len)
    return len(prompts) * output_len / seconds


# --- measuring --------------------------------------------------------------------------------------------------------


def require_success(results: list[Result]) -> list[Result]:
    if failed := next((result.error for result in results if result.error), ""):
        raise SystemExit(f"a request failed: {failed}")
    return results


async def http_tokens_per_s(client: Client, prompts: list[list[int]], output_len: int) -> float:
    """Output tokens a second of concurrent requests, from the first one sent to the last answer's end."""
    results, duration_s = await run_load(client, [Work(prompt, output_len) for prompt in prompts])
    if any(result.output_len != output_len for result in require_success(results)):
        raise SystemExit(f"an answer does not have the asked {output_len} tokens")
    return len(prompts) * output_len / duration_s


async def measure_ttft(client: Client, prompts: Prompts, prefix_len: int, figures: Figures) -> None:
    """Send two requests, one after the other, that share a new prefix of `prefix_len` tokens."""
    prefix = prompts.tokens(prefix_len)
    results = require_success([await client.send(Work(prefix + prompts.tokens(8), 2)) for _ in range(2)])
    figures.first_ttft_ms.append(results[0].ttft_s * 1e3)
    figures.second_ttft_ms.append(results[1].ttft_s * 1e3)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its children, from /proc (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return own + sum(cpu_seconds(int(child)) for task in tasks for child in task.read_text().split())


async def measure_idle(pid: int, seconds: float) -> float:
    """Percent of a core that the process uses while nobody asks it anything."""
    await asyncio.sleep(1.0)  # connections close, the last log line is written
    before, started = cpu_seconds(pid), time.perf_counter()
    await asyncio.sleep(seconds)
    return 100 * (cpu_seconds(pid) - before) / (time.perf_counter() - started)


async def measure_server(client: Client, prompts: Prompts, args: argparse.Namespace, figures: Figures) -> None:
    """Take one round over HTTP."""
    figures.single.append(await http_tokens_per_s(client, prompts.batch(1, args.input_len), args.output_len))
    batch = prompts.batch(args.concurrency, args.input_len)
    figures.batch.append(await http_tokens_per_s(client, batch, args.output_len))
    await measure_ttft(client, prompts, args.prefix_len, figures)


async def run(args: argparse.Namespace, console: Console) -> dict[str, Figures]:
    all_figures = {"radixloop": Figures(), "transformers": Figures()}
    ours, theirs = all_figures.values()
    prompts = Prompts(args.seed)
    base_url = f"http://127.0.0.1:{free_port()}"
    has_gguf = args.model_path == "demo" or args.model_path.endswith(".gguf")
    async with contextlib.AsyncExitStack() as stack:
        started = time.perf_counter()
        server = stack.enter_context(our_server(args, int(base_url.rpartition(":")[2])))
        await wait_until_healthy(base_url, lambda: server.poll() is None)
        ours.ready_s = time.perf_counter() - started
        clients = {"radixloop": await stack.enter_async_context(Client(base_url))}
        if has_gguf and importlib.util.find_spec("xllamacpp"):
            all_figures["llama.cpp"] = Figures()
            url = stack.enter_context(llama_cpp_server(args))
            clients["llama.cpp"] = await stack.enter_async_context(Client(url, extra_body={"cache_prompt": True}))
        for client in clients.values():
            await client.find_model()
            await measure_server(client, prompts, args, Figures())  # warm-up

        worker = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))

        async def generate(batch: list[list[int]], output_len: int) -> float:
            job = worker.submit(transformers_tokens_per_s, args.model_path, args.dtype, batch, output_len)
            return await asyncio.wrap_future(job)

        await generate(prompts.batch(args.concurrency, args.input_len), 4)
        for number in range(args.rounds):
            console.print(f"round {number + 1} of {args.rounds}", style="dim")
            for name, client in clients.items():
                await measure_server(client, prompts, args, all_figures[name])
            theirs.single.append(await generate(prompts.batch(1, args.input_len), args.output_len))
            theirs.batch.append(await generate(prompts.batch(args.concurrency, args.input_len), args.output_len))
        ours.idle_cpu_percent = await measure_idle(server.pid, args.idle_s)
    return all_figures


def report(all_figures: dict[str, Figures], args: argparse.Namespace) -> Table:
    ours, theirs, *others = all_figures.values()
    table = Table(box=box.SIMPLE)
    for column in ("", *all_figures, "ratio", "aim"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)

    def row(name: str, values: Callable[[Figures], list[float]], ratio: str, aim: str) -> None:
        medians = [statistics.median(v) if (v := values(figures)) else math.nan for figures in all_figures.values()]
        table.add_row(name, *("" if math.isnan(median) else f"{median:,.1f}" for median in medians), ratio, aim)

    def times(a: list[float], b: list[float]) -> str:
        return f"{statistics.median(a) / statistics.median(b):.2f}"

    row("1 stream, tokens/s", lambda f: f.single, times(ours.single, theirs.single), "≥ 1.25")
    row(f"{args.concurrency} streams, tokens/s", lambda f: f.batch, times(ours.batch, theirs.batch), "≥ 1.25")
    row("TTFT new prefix, ms", lambda f: f.first_ttft_ms, "", "")
    shorter = times(ours.first_ttft_ms, ours.second_ttft_ms)
    row("TTFT seen prefix, ms", lambda f: f.second_ttft_ms, shorter, "≥ 5")
    table.add_row("idle, % of a core", f"{ours.idle_cpu_percent:.2f}", *[""] * (len(others) + 2), "< 1")
    table.add_row("start to healthy, s", f"{ours.ready_s:.1f}", *[""] * (len(others) + 3))
    return table


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model-path", default="demo")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each contestant; default: all cores")
    add("--input-len", type=int, default=64)
    add("--output-len", type=int, default=64)
    add("--concurrency", type=int, default=8)
    add("--prefix-len", type=int, default=512)
    add("--rounds", type=int, default=3)
    add("--idle-s", type=float, default=10.0, help="seconds to watch the idle server")
    add("--server-args", default="", help="more flags for the server, in one string")
    add("--seed", type=int, default=int(time.time()), help="of the prompts")
    add("--output-file", help="append one JSON line: arguments and all figures")
    return parser


def main() -> None:
    args = argument_parser().parse_args()
    # OpenMP reads it in every child before its torch is imported. How its threads wait is each contestant's own choice:
    # llama.cpp takes half as long again for a token where they may not spin.
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    console = Console()
    all_figures = uvloop.run(run(args, console))
    console.print(
        f"{args.model_path}, {args.dtype}, {args.threads} threads; {args.input_len} tokens in, {args.output_len} out; "
        f"shared prefix of {args.prefix_len}; medians of {args.rounds} rounds",
        report(all_figures, args),
        highlight=False,
    )
    if args.output_file:
        line = {**vars(args), **{name: asdict(figures) for name, figures in all_figures.items()}}
        with open(args.output_file, "ab") as file:
            file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))


if __name__ == "__main__":
    main()
