"""Attention of prompts in CUDA for Hopper, for what `can_prefill` says; `triton_prefill` is for all the rest.

`hopper_prefill.cu` is compiled by NVRTC, which comes with torch, and kept on disk.
"""

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch

from kernels.attention_batch import AttentionBatch
from kernels.card import card_of
from kernels.hopper import ARCHITECTURE, is_available, kind_of, tensor_map
from kernels.hopper import source as hopper_source
from kernels.launch import address, arrival_counters, cdiv, compile_ahead, only_compiles
from kernels.nvrtc import compile_source
from kernels.quantized_kernel import Kernel

LOG2_E = 1.4426950408889634
ROWS = 64  # queries x heads of a KV head that a warpgroup multiplies
STAGES = 2
KEYS = {64: 128, 128: 128, 256: 64}  # head size -> keys of a tile
WARPGROUPS = {64: 3, 128: 2, 256: 2}  # head size -> those that multiply, as many as there are registers for
QUERY_BUFFERS = {64: 2, 128: 2, 256: 1}  # head size -> how many works' queries there is room for
SHARED_DIM = 64  # of keys' last elements, where they are the same for all heads
SHARED_SIZES = {192: (128, 128), 256: (256, 64)}  # size of such keys -> that of values, keys of a tile
STAGING_BYTES = 16 * 144
RUN_SLOTS = 32  # that are copied together where they follow each other
MAX_REQUESTS = 256  # which a block lists in its shared memory
MAX_SHARED_REQUESTS = 32  # where keys are shared, whose tiles leave less room
REQUEST_BYTES = 20
CLAIM_BYTES = 32 + 2 * 56 + 20  # barriers, works, sizes
MAX_PARTS = 16
LEAST_WINDOW = {64: 256, 128: 128, 256: 512}  # head size -> from where it is faster than `triton_prefill`


@dataclass(frozen=True)
class Variant:
    """Say what a kernel is compiled for."""

    head_dim: int  # of queries and keys
    dtype: torch.dtype
    window: int = 0  # 0: none, 1: the last tokens, 2: chunks
    has_softcap: bool = False
    sink_dtype: torch.dtype | None = None
    has_shared: bool = False  # whether keys' last elements are the same for all heads

    @property
    def value_dim(self) -> int:
        return SHARED_SIZES[self.head_dim][0] if self.has_shared else self.head_dim

    @property
    def keys(self) -> int:
        """Return the keys of a tile."""
        return SHARED_SIZES[self.head_dim][1] if self.has_shared else KEYS[self.head_dim]

    @property
    def warpgroups(self) -> int:
        return 2 if self.has_shared else WARPGROUPS[self.head_dim]

    @property
    def query_buffers(self) -> int:
        return 1 if self.has_shared else QUERY_BUFFERS[self.head_dim]

    @property
    def max_requests(self) -> int:
        return MAX_SHARED_REQUESTS if self.has_shared else MAX_REQUESTS

    @property
    def shared_bytes(self) -> int:
        """Return the shared memory of a block."""
        queries = self.query_buffers * self.block_rows * self.head_dim
        tiles = STAGES * self.keys * (self.head_dim + self.value_dim)
        staging = self.block_rows // 16 * STAGING_BYTES
        return 2 * (queries + tiles) + staging + 32 * STAGES + CLAIM_BYTES + REQUEST_BYTES * self.max_requests

    @property
    def block_rows(self) -> int:
        return self.warpgroups * ROWS

    @property
    def num_threads(self) -> int:
        return 128 * (1 + self.warpgroups)


class Args(ctypes.Structure):
    """The kernel's arguments; `hopper_prefill.cu` has the same struct."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "q", "k", "v", "out", "seq_lens", "cu_q_lens", "rows", "slot_table", "slot_map", "sinks",
            "partial", "counters",
        )),
        *((name, ctypes.c_int) for name in (
            "num_requests", "q_stride", "q_head_stride", "k_stride", "k_head_stride", "v_stride", "v_head_stride",
            "out_stride", "table_stride", "group", "num_kv_heads", "window",
            "most_parts",
        )),
        ("group_inverse", ctypes.c_uint),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )  # fmt: skip


def can_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    *,
    window: int = -1,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> bool:
    """Return whether `prefill` takes these and is the faster one: a Hopper GPU, 16-bit floats, a head size of `KEYS`.

    Tokens see what is before them, and of much: a window of few keys is over before the pipeline is full.
    """
    return (
        is_available(q.device)
        and q.shape[2] in KEYS
        and q.dtype == k_cache.dtype == v_cache.dtype in (torch.bfloat16, torch.float16)
        and v_cache.shape == k_cache.shape
        and len(batch.rows) - batch.num_decodes <= MAX_REQUESTS
        and not 0 <= window < LEAST_WINDOW[q.shape[2]]
        and batch.seen_until is None
        and slopes is None
        and (sinks is None or sinks.dtype in (torch.float32, q.dtype))
        and all(_is_aligned(x) for x in (q, k_cache, v_cache))
    )


def can_prefill_shared(q: torch.Tensor, value_dim: int, shared_dim: int) -> bool:
    """Return whether `prefill` takes q [T, H, D] with keys that share their last elements, and values of `value_dim`.

    It does so for at most `MAX_SHARED_REQUESTS` prompts, whose keys, shared ones and values must be q's dtype and have
    rows that begin at 16 bytes.
    """
    return (
        is_available(q.device)
        and SHARED_SIZES.get(q.shape[2], (0, 0))[0] == value_dim
        and shared_dim == SHARED_DIM
        and q.dtype in (torch.bfloat16, torch.float16)
        and _is_aligned(q)
    )


def _is_aligned(x: torch.Tensor) -> bool:
    """Return whether rows can be copied 16 bytes at a time."""
    return x.stride(2) == 1 and x.stride(0) % 8 == x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0


def prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    out: torch.Tensor,
    *,
    scale: float,
    window: int = -1,
    is_chunked: bool = False,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    shared_keys: torch.Tensor | None = None,
    most_parts: int = MAX_PARTS,
) -> None:
    """Write the attention of the tokens after the first num_decodes, any number of each request, into `out`.

    shared_keys [num_slots, P]: as if they stood behind each head's in k_cache. All slots of a request then follow each
    other, from its `rows` on. most_parts: into how many parts contexts are cut at most where blocks would else have
    nothing to do; the last block to have attended to a part merges them.
    """
    variant = Variant(
        q.shape[2],
        q.dtype,
        0 if window < 0 else 1 + is_chunked,
        softcap > 0,
        None if sinks is None else sinks.dtype,
        shared_keys is not None,
    )
    num_kv_heads = k_cache.shape[1]
    group = q.shape[1] // num_kv_heads
    first = batch.num_decodes
    num_requests = len(batch.rows) - first
    most_works = ((q.shape[0] - first) * group // variant.block_rows + num_requests) * num_kv_heads
    num_blocks = min(card_of(q.device).num_sms, most_works * most_parts)
    partial = None
    if most_parts > 1:
        num_sums = 2 * num_blocks * 2 * variant.block_rows * (variant.value_dim // 2 + 4)
        partial = torch.empty(num_sums, dtype=torch.float32, device=q.device)
    counters = arrival_counters(q.device, 2 + variant.warpgroups * num_blocks)
    if only_compiles():
        compile_ahead(_kernel, variant, q.device)
        return
    table = batch.slot_table
    args = Args(
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr(),
        batch.seq_lens[first:].data_ptr(), batch.cu_q_lens[first:].data_ptr(), batch.rows[first:].data_ptr(),
        table.data_ptr(), address(batch.slot_map), address(sinks), address(partial), counters.data_ptr(),
        num_requests, q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), v_cache.stride(0),
        v_cache.stride(1), out.stride(0), table.stride(0), group, num_kv_heads, max(window, 0),
        most_parts, cdiv(2**32, group) % 2**32, scale * LOG2_E, softcap * LOG2_E,
    )  # fmt: skip
    shared = k_cache if shared_keys is None else shared_keys[:, None]  # read by no kernel without them
    maps = [_tensor_map(*_layout(cache), variant.dtype) for cache in (k_cache, v_cache, shared)]
    _kernel(variant, q.device).launch(num_blocks, 1, variant.shared_bytes, (args, *maps), q.device)


@functools.cache
def _kernel(variant: Variant, device: torch.device) -> Kernel:
    with torch.cuda.device(device):
        cubin = compile_source("hopper_prefill", source(variant), ARCHITECTURE)
        return Kernel("hopper_prefill", cubin, variant.num_threads, device)


def source(variant: Variant) -> str:
    """Return the source of a variant's kernel, for NVRTC."""
    is_half = variant.dtype == torch.float16
    short, keys = "f16" if is_half else "bf16", variant.keys
    num_scores, num_sums = keys // 2, variant.value_dim // 2  # registers of a thread
    defines = {
        "KEY_DIM": variant.head_dim,
        "VALUE_DIM": variant.value_dim,
        "SHARED_DIM": SHARED_DIM if variant.has_shared else 0,
        "KEYS": keys,
        "WARPGROUPS": variant.warpgroups,
        "QUERY_BUFFERS": variant.query_buffers,
        "STAGES": STAGES,
        "MAX_REQUESTS": variant.max_requests,
        "IS_HALF": int(is_half),
        "WINDOW": variant.window,
        "HAS_SOFTCAP": int(variant.has_softcap),
        "HAS_SINKS": int(variant.sink_dtype is not None),
        "IS_SINK_FLOAT": int(variant.sink_dtype == torch.float32),
        "QK_TYPE": f'"m64n{keys}k16.f32.{short}.{short}"',
        "QK_D": _operands(0, num_scores),
        "QK_OPERANDS": f'"%{num_scores}, %{num_scores + 1}"',
        "QK_ADD": f'"{num_scores + 2}"',
        "QK_SUMS": ", ".join(f'"+f"(s[{i}])' for i in range(num_scores)),
        "PV_TYPE": f'"m64n{variant.value_dim}k16.f32.{short}.{short}"',
        "PV_D": _operands(0, num_sums),
        "PV_OPERANDS": '"{" ' + _operands(num_sums, num_sums + 4) + f' "}}, %{num_sums + 4}"',
        "PV_ADD": f'"{num_sums + 5}"',
        "PV_SUMS": ", ".join(f'"+f"(o[{i}])' for i in range(num_sums)),
    }
    return hopper_source("hopper_prefill.cu", defines)


def _operands(first: int, last: int) -> str:
    return '"' + ", ".join(f"%{i}" for i in range(first, last)) + '"'


def _layout(cache: torch.Tensor) -> tuple[int, int, int, int, int, int]:
    return cache.data_ptr(), *cache.shape, cache.stride(0), cache.stride(1)


@functools.lru_cache(4096)
def _tensor_map(
    pointer: int,
    num_slots: int,
    num_heads: int,
    head_dim: int,
    stride: int,
    head_stride: int,
    dtype: torch.dtype,
) -> Any:
    """Describe a cache [num_slots, Hkv, D] to the tensor memory accelerator: boxes [RUN_SLOTS, 64] of one head."""
    sizes, strides = (head_dim, num_heads, num_slots), (2 * head_stride, 2 * stride)
    return tensor_map(kind_of(dtype), pointer, sizes, strides, (64, 1, RUN_SLOTS))
