"""The engine without a server: prefill and decode latency, and what the host spends on a step.

    python -m bench.offline --model-path demo --batch 1 8 --input-len 128 --output-len 64

Takes every flag of the engine besides its own. Each batch runs twice, the first time to warm up; prompts are random,
so the second run's are not in the cache.
"""

import argparse
import asyncio
import random
import time

from rich.console import Console
from rich.table import Table

from engine.engine import Engine
from engine.request import Delta, Request, SamplingParams
from server.config import parse_args


async def run_batch(engine: Engine, batch: int, input_len: int, output_len: int, stream: bool) -> dict[str, float]:
    """Seconds to the first token of all, ms a decode step, tokens/s, and host µs a step by part."""
    rng = random.Random()
    vocab_size = engine.model_config.vocab_size
    done = asyncio.Event()
    left = batch

    def sink(delta: Delta) -> None:
        nonlocal left
        if delta.finish_reason is not None:
            if delta.finish_reason.type == "abort":
                raise SystemExit(delta.finish_reason.message)
            left -= 1
            if not left:
                done.set()

    requests = [
        Request(
            rid=f"bench-{rng.random()}",
            input_ids=[rng.randrange(vocab_size) for _ in range(input_len)],
            sampling_params=SamplingParams(max_new_tokens=output_len, temperature=0.0, ignore_eos=True),
            sink=sink,
            stream=stream,
        )
        for _ in range(batch)
    ]
    stats = engine.stats().loop
    before = (stats.num_steps, stats.schedule_s, stats.launch_s, stats.resolve_s, stats.deliver_s)
    start = time.perf_counter()
    for request in requests:
        engine.submit(request)
    await done.wait()
    end = time.perf_counter()
    after = (stats.num_steps, stats.schedule_s, stats.launch_s, stats.resolve_s, stats.deliver_s)
    num_steps, *host_s = (b - a for a, b in zip(before, after, strict=True))
    ttft = max(request.times.first_token for request in requests) - start if stream else float("nan")
    result = {
        "ttft_s": ttft,
        "step_ms": 1e3 * (end - start - (ttft if stream else 0.0)) / max(output_len - 1, 1),
        "tokens_per_s": batch * output_len / (end - start),
    }
    parts = ("schedule", "launch", "resolve", "deliver")
    return result | {f"{part}_us": 1e6 * s / num_steps for part, s in zip(parts, host_s, strict=True)}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--no-stream", action="store_true", help="nobody reads tokens before the end")
    args, engine_flags = parser.parse_known_args()
    engine = Engine(parse_args(engine_flags))
    console = Console()
    await engine.start(console.print)
    table = Table("batch", "TTFT ms", "ms/step", "tokens/s", "host µs/step", "schedule", "launch", "resolve", "deliver")
    for batch in args.batch:
        for is_counted in (False, True):
            figures = await run_batch(engine, batch, args.input_len, args.output_len, not args.no_stream)
            if is_counted:
                host = [figures[f"{part}_us"] for part in ("schedule", "launch", "resolve", "deliver")]
                table.add_row(
                    str(batch), f"{1e3 * figures['ttft_s']:.1f}", f"{figures['step_ms']:.3f}",
                    f"{figures['tokens_per_s']:.0f}", f"{sum(host):.0f}", *(f"{us:.0f}" for us in host),
                )  # fmt: skip
    console.print(table)
    await engine.stop()


if __name__ == "__main__":
    asyncio.run(main())
