"""What the cache costs the event loop: the median µs of each operation on this machine's CPU.

python -m bench.cache [--prompt-len 4096] [--num-prompts 1000] [--batch-size 256]
"""

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from cache.allocator import PageAllocator
from cache.radix import RadixCache

PAGE_SIZES = (1, 16)
VOCAB_SIZE = 150_000
TURN_LEN = 256  # tokens a node of the conversation


def median_us(call: Callable[[Any], object], inputs: Iterable[Any]) -> float:
    """Median µs of call(x) over `inputs`, one call each: for calls that use up what they are called on."""
    times_ns = []
    for x in inputs:
        start = time.perf_counter_ns()
        call(x)
        times_ns.append(time.perf_counter_ns() - start)
    return float(np.median(times_ns)) / 1e3


def distinct_prompts(num_prompts: int, prompt_len: int) -> np.ndarray:
    """int32 [num_prompts, prompt_len] random tokens; no two prompts begin with the same one."""
    prompts = np.random.default_rng(0).integers(VOCAB_SIZE, size=(num_prompts, prompt_len), dtype=np.int32)
    prompts[:, 0] = np.arange(num_prompts)
    return prompts


def radix_times(page_size: int, prompt_len: int, num_prompts: int) -> dict[str, float]:
    """Time one cache as it fills up with prompts, is used, and is emptied."""
    prompts = distinct_prompts(2 * num_prompts, prompt_len)
    cached, others = prompts[:num_prompts], prompts[num_prompts:]
    slots = np.arange(prompt_len, dtype=np.int32)
    cache = RadixCache(page_size)
    times = {
        f"insert {prompt_len} new tokens": median_us(lambda prompt: cache.insert(prompt, slots), cached),
        f"insert {prompt_len} tokens that are there": median_us(lambda prompt: cache.insert(prompt, slots), cached),
        f"match {prompt_len} tokens in 1 node": median_us(cache.match, cached),
        f"match_len {prompt_len} tokens in 1 node": median_us(cache.match_len, cached),
        "match that finds nothing": median_us(cache.match, others),
        f"match that splits a node of {prompt_len}": median_us(cache.match, cached[:, : prompt_len // 2]),
        f"evict 1 leaf of {cache.stats().num_nodes // 2}": median_us(cache.evict, [1] * num_prompts),
    }
    chat, conversation = RadixCache(page_size), others[0]
    for end in range(TURN_LEN, prompt_len + 1, TURN_LEN):
        chat.insert(conversation[:end], slots)
    last_turn, num_turns = chat.match(conversation).node, chat.stats().num_nodes
    times[f"match {last_turn.depth_tokens} tokens in {num_turns} nodes"] = median_us(chat.match, [conversation] * 1000)
    times[f"lock {num_turns} nodes"] = median_us(chat.lock, [last_turn] * 1000)
    times[f"unlock {num_turns} nodes"] = median_us(chat.unlock, [last_turn] * 1000)
    return times


def allocator_times(page_size: int, prompt_len: int, batch_size: int) -> dict[str, float]:
    """Time prompts that come and go, and of a decode batch that grows by a token a step."""
    allocator = PageAllocator(num_pages=1 + 1000 * prompt_len // page_size, page_size=page_size)
    num_pages = prompt_len // page_size
    held: list[np.ndarray] = []

    def allocate(num_pages: int) -> None:
        slots = allocator.allocate(num_pages)
        assert slots is not None
        held.append(slots)

    times = {f"allocate {prompt_len} slots": median_us(allocate, [num_pages] * 500)}
    times[f"free {prompt_len} slots"] = median_us(allocator.free, held)

    num_tokens = np.random.default_rng(0).integers(1, page_size + 1, size=batch_size, dtype=np.int32)
    last_slots = np.arange(batch_size, dtype=np.int32) * page_size + num_tokens

    def extend_each(_step: int) -> None:
        nonlocal num_tokens, last_slots
        slots = allocator.extend_each(num_tokens, last_slots)
        assert slots is not None
        last_slots, num_tokens = slots, num_tokens + np.int32(1)

    times[f"extend_each, {batch_size} sequences"] = median_us(extend_each, range(1000))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-len", type=int, default=4096, help="tokens")
    parser.add_argument("--num-prompts", type=int, default=1000, help="prompts in the tree")
    parser.add_argument("--batch-size", type=int, default=256, help="sequences that decode")
    args = parser.parse_args()
    columns = [
        radix_times(page_size, args.prompt_len, args.num_prompts)
        | allocator_times(page_size, args.prompt_len, args.batch_size)
        for page_size in PAGE_SIZES
    ]
    table = Table(title=f"cache: median µs a call, {args.num_prompts} prompts of {args.prompt_len} tokens")
    table.add_column("operation")
    for page_size in PAGE_SIZES:
        table.add_column(f"page_size {page_size}", justify="right")
    for operation in columns[0]:
        table.add_row(operation, *(f"{times[operation]:.2f}" for times in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
