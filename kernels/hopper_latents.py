"""Latent attention of single tokens in CUDA for Hopper, for what `can_decode` says; else there is `triton_decode`.

`hopper_latents.cu` is compiled by NVRTC, which comes with torch, and kept on disk.
"""

import ctypes
import functools
from dataclasses import dataclass

import torch

from kernels.attention_batch import AttentionBatch
from kernels.card import card_of
from kernels.hopper import ARCHITECTURE, is_available
from kernels.hopper import source as hopper_source
from kernels.launch import address, arrival_counters, cdiv, compile_ahead, next_power_of_2, only_compiles
from kernels.nvrtc import compile_source
from kernels.quantized_kernel import Kernel
from kernels.triton_decode import merge_parts
from kernels.triton_softmax import LOG2_E, Rotated

RANK, ROPE = 512, 64
TILE, STAGES = 64, 2
MULTIPLIERS = 128  # threads
MAX_GROUP = 32  # heads: more results than a thread has registers for
MAX_REQUESTS = 1024  # which a block lists in its shared memory
ANY_NUMBER = 1 << 30  # of tokens
MOST_MERGED_LATER = 16  # requests: of more, blocks leave few parts each, and merge these themselves


@dataclass(frozen=True)
class Variant:
    """Say what a kernel is compiled for."""

    group: int  # heads
    dtype: torch.dtype
    is_bytes: bool  # of the cache
    is_merged_later: bool

    @property
    def columns(self) -> int:
        """Return the columns of a product."""
        return cdiv(self.group, 8) * 8

    @property
    def loaders(self) -> int:
        """Return the threads that load tiles into a stage: bytes pass their registers."""
        return 128 if self.is_bytes else 64

    @property
    def num_threads(self) -> int:
        return MULTIPLIERS + STAGES * self.loaders

    @property
    def shared_bytes(self) -> int:
        """Return the shared memory of a block."""
        halves = STAGES * TILE * (RANK + ROPE) + 2 * self.columns * (RANK + ROPE) + self.columns * TILE
        return 2 * halves + 16 * STAGES + 4 * (4 * self.columns + self.num_threads // 32 + MAX_REQUESTS)


class Args(ctypes.Structure):
    """The kernel's arguments; `hopper_latents.cu` has the same struct."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "q", "q_rope", "cache", "out", "seq_lens", "rows", "slot_table", "slot_map", "partial", "partial_lse",
            "arrivals",
        )),
        *((name, ctypes.c_int) for name in (
            "num_requests", "q_stride", "q_head_stride", "rope_stride", "rope_head_stride", "out_stride",
            "table_stride", "cache_stride", "num_fresh",
        )),
        ("scale", ctypes.c_float),
    )  # fmt: skip


def can_decode(q: torch.Tensor, rotated: Rotated, cache: torch.Tensor, batch: AttentionBatch) -> bool:
    """Return whether `decode` takes the single tokens of these: a Hopper GPU, DeepSeek's sizes, few heads."""
    return (
        is_available(q.device)
        and (q.shape[2], rotated.k.shape[1]) == (RANK, ROPE)
        and q.shape[1] <= MAX_GROUP
        and q.dtype in (torch.bfloat16, torch.float16)
        and cache.dtype in (q.dtype, torch.float8_e4m3fn)
        and batch.num_decodes <= MAX_REQUESTS
        and batch.shared is None
        and cache.stride(2) == 1
        and cache.stride(0) * cache.itemsize % 16 == cache.data_ptr() % 16 == 0
        and all(
            x.stride(2) == 1 and x.stride(0) % 8 == x.stride(1) % 8 == x.data_ptr() % 16 == 0 for x in (q, rotated.q)
        )
    )


def decode(
    q: torch.Tensor, rotated: Rotated, cache: torch.Tensor, batch: AttentionBatch, out: torch.Tensor, *, scale: float
) -> None:
    """Write what the first num_decodes tokens find into `out` [T, H, RANK], as `triton_decode.decode` does.

    cache [num_slots, 1, RANK + ROPE]: latents and, behind them, `rotated.k`.
    """
    num_requests, group = batch.num_decodes, q.shape[1]
    variant = Variant(group, q.dtype, cache.itemsize == 1, num_requests <= MOST_MERGED_LATER)
    num_blocks = card_of(q.device).num_sms
    partial = torch.empty(2 * num_blocks, next_power_of_2(group), RANK, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(2 * num_blocks, next_power_of_2(group), dtype=torch.float32, device=q.device)
    arrivals = arrival_counters(q.device, num_requests)
    if only_compiles():
        compile_ahead(_kernel, variant, q.device)
    else:
        args = Args(
            q.data_ptr(), rotated.q.data_ptr(), cache.data_ptr(), out.data_ptr(), batch.seq_lens.data_ptr(),
            batch.rows.data_ptr(), batch.slot_table.data_ptr(), address(batch.slot_map), partial.data_ptr(),
            partial_lse.data_ptr(), arrivals.data_ptr(), num_requests, q.stride(0), q.stride(1), rotated.q.stride(0),
            rotated.q.stride(1), out.stride(0), batch.slot_table.stride(0), cache.stride(0) * cache.itemsize,
            num_fresh(batch), scale * LOG2_E,
        )  # fmt: skip
        _kernel(variant, q.device).launch(num_blocks, 1, variant.shared_bytes, (args,), q.device)
    if variant.is_merged_later:
        merge_parts(partial, partial_lse, batch, out, num_programs=num_blocks, block_n=TILE)


def num_fresh(batch: AttentionBatch) -> int:
    """Return how many of the last tokens that a single one sees the same step may write.

    A request may read what another one of its step writes: of single tokens those that follow each other, of prompts
    any number.
    """
    return batch.num_decodes if batch.num_decodes == len(batch.rows) else ANY_NUMBER


@functools.cache
def _kernel(variant: Variant, device: torch.device) -> Kernel:
    with torch.cuda.device(device):
        cubin = compile_source("hopper_latents", source(variant), ARCHITECTURE)
        return Kernel("hopper_latents", cubin, variant.num_threads, device)


def source(variant: Variant) -> str:
    """Return the source of a variant's kernel, for NVRTC."""
    is_half, num = variant.dtype == torch.float16, variant.columns // 2  # registers of a thread
    short = "f16" if is_half or variant.is_bytes else "bf16"
    defines = {
        "GROUP": variant.group,
        "COLUMNS": variant.columns,
        "PARTIAL_ROWS": next_power_of_2(variant.group),
        "LOADERS": variant.loaders,
        "IS_BYTES": int(variant.is_bytes),
        "IS_HALF": int(is_half),
        "IS_MERGED_LATER": int(variant.is_merged_later),
        "TYPE": f'"m64n{variant.columns}k16.f32.{short}.{short}"',
        "D": '"' + ", ".join(f"%{i}" for i in range(num)) + '"',
        "OPERANDS": f'"%{num}, %{num + 1}"',
        "ADD": f'"{num + 2}"',
        "SUMS": ", ".join(f'"+f"(d[{i}])' for i in range(num)),
    }
    return hopper_source("hopper_latents.cu", defines)
