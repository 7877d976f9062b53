"""Plan how many tokens of KV fit: measured, not guessed.

On a GPU the largest step that the configuration allows is run once, before there is a pool. The pool gets the memory
which that step leaves free, less a margin for unforeseen needs.
"""

from dataclasses import dataclass

import torch

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.layers.communicator import Communicator
from engine.step.host_memory import available_host_memory
from engine.step.window_memory import KVSplit

GIB = 1 << 30
CUDA_MARGIN_BYTES = 5 * GIB // 4  # library workspaces, graphs' own records, fragmentation
CPU_MEMORY_SHARE = 0.25  # share of the available memory: a laptop has other things to do
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
CPU_CONTEXTS = 8  # most sequences of full length that the pool holds: more would only hold stale prefixes


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Hold bytes of device memory by use, and the tokens that fit."""

    total: int
    weights: int
    largest_step: int
    """Activations, logits and workspaces of the largest step."""
    graphs: int
    """Activations and logits of the largest step that is a CUDA graph: graphs have memory of their own."""
    tables: int
    """Slot table and sampling state of all rows."""
    kv: int
    margin: int
    max_total_num_tokens: int
    windows: int = 0
    """The part of kv that is the pool of layers which see a window."""
    num_window_tokens: int = 0
    pictures: int = 0
    """Features of pictures, and activations of the tower that makes them."""

    def rows(self) -> list[tuple[str, str]]:
        """Return (use, amount) rows for a table, empty uses left out."""
        parts = [
            ("weights", self.weights), ("largest step", self.largest_step), ("CUDA graphs", self.graphs),
            ("request tables", self.tables), ("pictures", self.pictures), ("KV cache", self.kv - self.windows),
            (f"KV cache of layers with a window ({self.num_window_tokens:,} tokens)", self.windows),
            ("left free", self.margin), ("device total", self.total),
        ]  # fmt: skip
        return [(name, f"{num_bytes / GIB:.2f} GiB") for name, num_bytes in parts if num_bytes]


def describe_lack_of_memory(error: BaseException) -> str:
    """Return what to do about an error of an allocation while the model was loaded."""
    reason = str(error).partition("\n")[0].rstrip(".")
    return (
        f"the model does not fit in the device's memory: {reason}. End other processes on it, or try --quantization "
        "fp8 or int4, --tp-size 2, a smaller --context-length or --chunked-prefill-size"
    )


def plan_memory(
    config: EngineConfig,
    context_length: int,
    split: KVSplit,
    device: torch.device,
    *,
    weights: int,
    tables: int,
    largest_step: int,
    graphs: int,
    pictures: int = 0,
    comm: Communicator,
) -> MemoryBudget:
    """Divide the device's memory. All ranks get the tokens that fit on the rank with the least room.

    split: what this rank's layers keep of a token. weights, tables, largest_step, graphs, pictures: bytes, see
    `MemoryBudget`. Raises `ModelError` with the numbers if not even one page of KV fits.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        room = free - largest_step - graphs - pictures - CUDA_MARGIN_BYTES
        if config.mem_fraction_static is not None:
            room = int(total * config.mem_fraction_static) - (total - free)
    else:
        total = available_host_memory()
        share = CPU_MEMORY_SHARE / (config.tp_size * config.dp_size)
        room = min(int(total * share), CPU_CONTEXTS * context_length * split.token_bytes)
    num_tokens = comm.minimum(split.num_tokens(room, (config.max_running_requests or 1) * context_length))
    if config.max_total_tokens is not None:
        num_tokens = min(num_tokens, config.max_total_tokens) if device.type == "cuda" else config.max_total_tokens
    num_tokens -= num_tokens % config.page_size
    if num_tokens < max(config.page_size, 2):
        raise ModelError(
            f"no memory is left for the KV cache: {room / GIB:.2f} GiB after {weights / GIB:.2f} GiB of weights and "
            f"{largest_step / GIB:.2f} GiB for the largest step; a token takes {split.token_bytes} bytes"
        )
    kv, num_window_tokens = split.num_bytes(num_tokens), split.num_window_tokens(num_tokens)
    if device.type == "cpu" and kv > total:
        needs = f"takes {kv / GIB:.1f} GiB of KV cache, and {total / GIB:.1f} GiB of memory are left"
        raise ModelError(f"--max-total-tokens {num_tokens} {needs}")
    margin = max(room + CUDA_MARGIN_BYTES - kv, 0) if device.type == "cuda" else 0
    windows = num_window_tokens * split.window_bytes
    return MemoryBudget(
        total, weights, largest_step, graphs, tables, kv, margin, num_tokens, windows, num_window_tokens, pictures
    )
