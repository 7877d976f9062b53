"""Count the greedy answers that change when other requests run beside them.

    python -m bench.company --model-path demo --answers 128 --output-len 48

Takes every flag of the engine besides its own. Each prompt is answered alone first, then all at once, twice: products
and attention over other shapes round differently, and a token whose logit is nearly the largest may win. The gap is
the difference of log-probabilities of the two tokens where an answer departs, given alone.
"""

import argparse
import asyncio
import itertools
import statistics
import time

from rich import box
from rich.table import Table

from bench.compare import wide_console
from engine.config import EngineConfig
from engine.local import LocalEngine
from engine.request import Request, SamplingParams
from engine.state import RequestState
from server.command_line import parse_args

TOPICS = (
    "the tides", "bread", "a bicycle", "the Roman roads", "photosynthesis", "chess", "the violin", "rain", "glass",
    "a lighthouse", "bees", "the printing press", "salt", "mountains", "a good night's sleep", "coffee", "the moon",
    "paper", "a library", "the steam engine", "gardens", "maps", "winter", "a compass", "rivers", "honesty", "clocks",
    "the alphabet", "volcanoes", "a small town", "trains", "the ocean floor",
)  # fmt: skip
FORMS = (
    "Question: What should a child know about {}?\nAnswer:",
    "Write three sentences about {}.\n\n",
    "Here is a short list of facts about {}:\n1.",
    "Dear reader, today I want to tell you a story about {}. It begins",
)


async def answers_of(engine: LocalEngine, prompts: list[list[int]], output_len: int) -> list[list[int]]:
    """Return the greedy answers of all prompts, which run together."""

    async def answer(ids: list[int]) -> list[int]:
        params = SamplingParams(max_new_tokens=output_len, temperature=0.0, ignore_eos=True)
        state = RequestState(Request(f"company-{next(serial)}", ids, params, stream=False))
        return [token async for delta in engine.generate(state) for token in delta.token_ids]

    return list(await asyncio.gather(*(answer(ids) for ids in prompts)))


async def gap_after(engine: LocalEngine, ids: list[int], tokens: list[int]) -> float:
    """Return the difference of the log-probabilities of two tokens after `ids`, computed alone."""
    params = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
    request = Request(
        f"company-{next(serial)}", ids, params, stream=False, return_logprob=True, token_ids_logprob=tokens
    )
    async for delta in engine.generate(RequestState(request)):
        if delta.logprobs is not None and (values := delta.logprobs.token_ids[-1]):
            first, second = (logprob for logprob, _ in values)
            return abs((first or 0.0) - (second or 0.0))
    raise RuntimeError("no log-probabilities came")


serial = itertools.count()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=len(TOPICS) * len(FORMS))
    parser.add_argument("--output-len", type=int, default=48)
    args, engine_flags = parser.parse_known_args()
    config: EngineConfig = parse_args(engine_flags)
    engine = LocalEngine(config.replace(disable_radix_cache=True))  # an answer from the cache would say nothing
    console = wide_console()
    await engine.start(console.print)
    texts = [form.format(topic) for form in FORMS for topic in TOPICS][: args.answers]
    prompts = [engine.tokenizer.encode(text) for text in texts]
    start = time.perf_counter()
    alone = [(await answers_of(engine, [ids], args.output_len))[0] for ids in prompts]
    alone_s = time.perf_counter() - start
    table = Table(box=box.SIMPLE)
    for column in ("run", "seconds", "answers that differ", "gap, median", "gap, largest"):
        table.add_column(column, justify="right")
    table.add_row("alone", f"{alone_s:.1f}", "", "", "")
    for run in range(2):
        start = time.perf_counter()
        beside = await answers_of(engine, prompts, args.output_len)
        beside_s = time.perf_counter() - start
        gaps = []
        for ids, one, other in zip(prompts, alone, beside, strict=True):
            if one != other:
                at = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
                gaps.append(await gap_after(engine, ids + one[:at], [one[at], other[at]]))
        shown = (f"{statistics.median(gaps):.4f}", f"{max(gaps):.4f}") if gaps else ("", "")
        table.add_row(
            f"all at once, {run + 1}", f"{beside_s:.1f}",
            f"{len(gaps)} of {len(prompts)} ({len(gaps) / len(prompts):.1%})", *shown,
        )  # fmt: skip
    console.print(table)
    await engine.stop()


if __name__ == "__main__":
    asyncio.run(main())
