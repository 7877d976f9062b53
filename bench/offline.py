"""Measure the engine without a server: prefill and decode latency, and what the host spends on a step.

    python -m bench.offline --model-path demo --batch 1 64 256 --input-len 128 --output-len 64

Takes every flag of the engine besides its own. Each batch runs twice, the first time to warm up; prompts are random,
so the second run's are not in the cache. Host times are microseconds a decode step: what it takes to decide, launch and
resolve one, and in parts; to deliver its tokens, which is done while the device computes. "Idle" is how long the device
had to wait for a step (a GPU only: a CPU that computes does not wait for itself).
"""

import argparse
import asyncio
import random
import time

from rich import box
from rich.table import Table

from bench.compare import wide_console
from engine.config import EngineConfig
from engine.local import LocalEngine
from engine.request import Request, SamplingParams
from engine.state import Delta, RequestState
from server.command_line import parse_args

PARTS = ("schedule", "launch", "resolve")
TIMES = (*PARTS, "deliver", "device_idle")  # of LoopStats


async def run_batch(engine: LocalEngine, batch: int, input_len: int, output_len: int) -> dict[str, float]:
    """Seconds to everyone's first token, ms a decode step, tokens/s, and µs a decode step: host by part, device idle.

    Decode steps are those after everyone's first token and before anyone's last: nobody comes or goes.
    """
    rng = random.Random()
    vocab_size = engine.model_config.vocab_size
    done = asyncio.Event()
    num_waiting, num_running = batch, batch
    marks: list[tuple[float, int, list[float]]] = []

    def mark() -> None:
        stats = engine.stats().loop
        marks.append((time.perf_counter(), stats.num_steps, [getattr(stats, f"{name}_s") for name in TIMES]))

    def sink(delta: Delta) -> None:
        nonlocal num_waiting, num_running
        state = delta.state
        if delta.finish_reason is not None:
            if delta.finish_reason.type == "abort":
                raise SystemExit(delta.finish_reason.message)
            if num_running == batch:
                mark()
            num_running -= 1
            if not num_running:
                done.set()
        elif state.rid not in started:
            started.add(state.rid)
            num_waiting -= 1
            if not num_waiting:
                mark()

    started: set[str] = set()
    states = [
        RequestState(
            Request(
                rid=f"bench-{rng.random()}",
                input_ids=[rng.randrange(vocab_size) for _ in range(input_len)],
                sampling_params=SamplingParams(max_new_tokens=output_len, temperature=0.0, ignore_eos=True),
                stream=True,
            ),
            sink,
        )
        for _ in range(batch)
    ]
    start = time.perf_counter()
    for state in states:
        engine.submit(state)
    await done.wait()
    end = time.perf_counter()
    (first, first_steps, before), (last, last_steps, after) = marks[0], marks[-1]
    num_steps = max(last_steps - first_steps, 1)
    times = {f"{name}_us": 1e6 * (b - a) / num_steps for name, a, b in zip(TIMES, before, after, strict=True)}
    return {
        "ttft_s": first - start,
        "step_ms": 1e3 * (last - first) / num_steps,
        "tokens_per_s": batch * output_len / (end - start),
    } | times


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    args, engine_flags = parser.parse_known_args()
    config: EngineConfig = parse_args(engine_flags)
    if config.max_running_requests is None:
        config = config.replace(max_running_requests=max(args.batch))
    engine = LocalEngine(config)
    console = wide_console()
    await engine.start(console.print)
    num_tokens = max(args.batch) * (args.input_len + args.output_len)
    if max(args.batch) > engine.max_running_requests or num_tokens > engine.max_total_num_tokens:
        raise SystemExit(
            f"a batch of {max(args.batch)} does not run at once: it has {num_tokens} tokens, the KV pool "
            f"{engine.max_total_num_tokens}; --max-running-requests is {engine.max_running_requests}"
        )
    table = Table(box=box.SIMPLE)
    for column in ("batch", "TTFT ms", "ms/step", "tokens/s", "host µs", *PARTS, "deliver", "device idle µs"):
        table.add_column(column, justify="right")
    host_us: dict[int, float] = {}
    for batch in args.batch:
        for is_counted in (False, True):
            figures = await run_batch(engine, batch, args.input_len, args.output_len)
            if is_counted:
                parts = [figures[f"{part}_us"] for part in PARTS]
                host_us[batch] = sum(parts)
                table.add_row(
                    str(batch), f"{1e3 * figures['ttft_s']:.1f}", f"{figures['step_ms']:.3f}",
                    f"{figures['tokens_per_s']:,.0f}", f"{host_us[batch]:.0f}", *(f"{us:.0f}" for us in parts),
                    f"{figures['deliver_us']:.0f}", f"{figures['device_idle_us']:.1f}",
                )  # fmt: skip
    console.print(table)
    least, most = min(host_us), max(host_us)
    console.print(f"host: batch {most} takes {host_us[most] / host_us[least]:.1f} times as long as batch {least}")
    await engine.stop()


if __name__ == "__main__":
    asyncio.run(main())
