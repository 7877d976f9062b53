"""What models with sliding windows hold of a context, with a pool of its own for their windows and without.

    python -m bench.windows [--context 32768]

Arithmetic from the caches' own layouts, in bfloat16: of a running request whose prompt has so many tokens, and then of
the whole pools that a budget of memory gives, each with its default sizes.
"""

import argparse
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from cache.layout import KV, LayerCache, bytes_per_token
from engine.config import EngineConfig
from engine.schedule.window_holdings import row_len
from engine.sizes import CUDA_CHUNK, CUDA_ROWS
from engine.step.memory import GIB
from engine.step.window_memory import KVSplit

ROOM_BYTES = 60 * GIB
MAX_LEN = 131072


def layout(num_layers: int, full_every: int, kv: KV, window: int) -> list[LayerCache]:
    """Return the entries of a model of which each `full_every`-th layer sees all."""
    return [kv if (i + 1) % full_every == 0 else replace(kv, window=window) for i in range(num_layers)]


MODELS = {
    "Gemma 3 27B": layout(62, 6, KV(16, 128), 1024),
    "gpt-oss-20b": layout(24, 2, KV(8, 64), 128),
    "gpt-oss-120b": layout(36, 2, KV(8, 64), 128),
}


def split_of(entries: list[LayerCache]) -> KVSplit:
    """Return how a GPU's server with default sizes splits its memory between the pools."""
    config = EngineConfig(max_running_requests=CUDA_ROWS, chunked_prefill_size=CUDA_CHUNK)
    return KVSplit.of(config, MAX_LEN, entries, torch.bfloat16, has_window_slots=True)


def context_bytes(entries: list[LayerCache], num_tokens: int) -> tuple[int, int]:
    """Return the bytes that a request of so many tokens holds: (all layers alike, with a pool for windows)."""
    split = split_of(entries)
    window = max(entry.window or 0 for entry in entries if isinstance(entry, KV))
    num_window_tokens = min(row_len(window, page_size=1), num_tokens)
    whole = num_tokens * bytes_per_token(entries, torch.bfloat16)
    return whole, num_tokens * split.full_bytes + num_window_tokens * split.window_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32768)
    args = parser.parse_args()
    gib = ROOM_BYTES // GIB
    table = Table("model", f"GiB of {args.context:,} tokens", "with a pool for windows", f"tokens in {gib} GiB", "with")
    for name, entries in MODELS.items():
        split = split_of(entries)
        whole, with_windows = context_bytes(entries, args.context)
        num_tokens = split.num_tokens(ROOM_BYTES, CUDA_ROWS * MAX_LEN)
        table.add_row(
            name, f"{whole / GIB:.2f}", f"{with_windows / GIB:.2f}", f"{ROOM_BYTES // split.token_bytes:,}",
            f"{num_tokens:,}, and {split.num_window_tokens(num_tokens):,} in layers with a window",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
