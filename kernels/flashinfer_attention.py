"""Attention by FlashInfer (0.6): FlashAttention-3 for prompts on Hopper, its FlashAttention-2 elsewhere.

Its kernels follow a plan made on the host from the lengths, once per step. Single tokens go to the Triton kernel,
which needs none and so can be replayed from a CUDA graph.
FlashInfer compiles its kernels at first use (30 to 90 seconds each) and keeps them in its cache folder.
"""

import functools
import shutil
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch

from kernels.attention_batch import AttentionBatch
from kernels.card import card_of
from kernels.triton_attention import attention_triton
from kernels.triton_decode import decode

WORKSPACE_BYTES = 128 << 20
# A plan is copied from its wrapper's pinned buffer when the GPU gets there, so steps still in flight need their own.
NUM_PLANS_IN_FLIGHT = 4
HEAD_DIMS = (64, 128, 256)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def is_available() -> tuple[bool, str]:
    """Return (whether FlashInfer can run here, the reason or how it serves)."""
    if not torch.cuda.is_available():
        return False, "flashinfer needs a CUDA device"
    try:
        import flashinfer
        from flashinfer.jit.cpp_ext import get_cuda_path
    except ImportError as error:
        return False, f"flashinfer cannot be imported: {error}"
    if not flashinfer.__version__.startswith("0.6."):
        return False, f"flashinfer is {flashinfer.__version__}, and this is written for 0.6"
    try:
        get_cuda_path()
    except RuntimeError:
        return False, "flashinfer finds no nvcc to compile its kernels with"
    if shutil.which("ninja") is None:
        return False, "flashinfer finds no ninja to compile its kernels with"
    return True, f"flashinfer {flashinfer.__version__} for prompts, triton for single tokens"


def attention_flashinfer(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int = -1,
    is_chunked: bool = False,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    has_decodes: bool = True,
) -> torch.Tensor:
    """Run `kernels.attention.attention` with FlashInfer; what it has no kernel for goes to Triton.

    That is chunks, sinks, and slopes that are not those of its own formula, such as the slopes of one rank's heads.
    """
    is_known = q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] in HEAD_DIMS
    is_known = is_known and sinks is None and slopes is None and not is_chunked
    if not is_known or batch.num_decodes == len(batch.rows):
        options: dict[str, Any] = {
            "window": window, "is_chunked": is_chunked, "softcap": softcap, "sinks": sinks, "slopes": slopes,
            "has_decodes": has_decodes,
        }  # fmt: skip
        return attention_triton(q, k_cache, v_cache, batch, scale=scale, **options)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if batch.num_decodes and has_decodes:
        decode(q, k_cache, v_cache, batch, out, scale=scale, window=window, softcap=softcap)
    shape = PlanShape(q.shape[1], k_cache.shape[1], q.shape[2], q.dtype, k_cache.dtype, scale, window, softcap)
    wrapper = _prefill_plans(q.device).wrapper_for(batch, shape)
    first = batch.num_decodes
    stop = first + int(batch.q_lens_host[first:].sum())  # what comes then is padding, of which FlashInfer knows nothing
    wrapper.run(q[first:stop].contiguous(), (k_cache[:, None], v_cache[:, None]), out=out[first:stop])
    return out


class PlanShape(NamedTuple):
    """The parameters of a plan beside the batch."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    scale: float
    window: int
    softcap: float

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments that both of FlashInfer's wrappers plan with."""
        return {
            "num_qo_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "page_size": 1,
            "sm_scale": self.scale,
            "window_left": self.window - 1 if self.window >= 0 else -1,
            "logits_soft_cap": self.softcap,
            "q_data_type": self.dtype,
            "kv_data_type": self.kv_dtype,
        }


@functools.cache
def _prefill_plans(device: torch.device) -> "PrefillPlans":
    return PrefillPlans(device)


class _StepPlans:
    """Hold what is planned for a batch: its slots, and by shape the wrappers that hold its plans."""

    def __init__(self, batch: AttentionBatch, window: int) -> None:
        self.batch, self.window = batch, window
        self.indptr, self.slots = kv_indices(batch, batch.num_decodes, window)
        self.wrappers: dict[PlanShape, Any] = {}


class PrefillPlans:
    """The prompt wrappers of a device. Layers of one shape share a plan; a step has one for each shape.

    Batches are compared by identity: each step must bring an object of its own, and another one for layers whose slots
    are mapped.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._rings: dict[PlanShape, list[Any]] = {}
        self._last_used: dict[PlanShape, int] = {}  # places in the rings
        self._steps: deque[_StepPlans] = deque(maxlen=2)  # the newest step's: of layers with a map and without

    def wrapper_for(self, batch: AttentionBatch, shape: PlanShape) -> Any:
        """Return a wrapper that is planned for the batch's requests after the first num_decodes."""
        window = -1 if batch.slot_map is None else shape.window
        step = next((step for step in self._steps if step.batch is batch and step.window == window), None)
        if step is None:
            step = _StepPlans(batch, window)
            self._steps.append(step)
        if shape not in step.wrappers:
            wrapper = step.wrappers[shape] = self._next_wrapper(shape)
            q_indptr = np.zeros(len(step.indptr), np.int32)
            np.cumsum(batch.q_lens_host[batch.num_decodes :], out=q_indptr[1:])
            wrapper.plan(
                torch.from_numpy(q_indptr),
                step.indptr,
                step.slots,
                torch.ones(len(q_indptr) - 1, dtype=torch.int32),
                head_dim_qk=shape.head_dim,
                causal=True,
                **shape.arguments(),
            )
        return step.wrappers[shape]

    def _next_wrapper(self, shape: PlanShape) -> Any:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        # Its FlashAttention-3 reads no float8 cache for 16-bit queries.
        backend = "fa3" if card_of(self.device).is_hopper and shape.kv_dtype not in FLOAT8 else "fa2"
        ring = self._rings.setdefault(shape, [])
        place = self._last_used[shape] = (self._last_used.get(shape, -1) + 1) % NUM_PLANS_IN_FLIGHT
        if place == len(ring):
            ring.append(BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend=backend))
        return ring[place]


def kv_indices(batch: AttentionBatch, first: int, window: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (starts int32 [N + 1] on the host, slots int32 on the device) of the requests from `first` on.

    window: where slots are mapped, of all layers. What stands before it may be another request's, and padding leaves
    anything in slot 0: the last token's slot is read there, whose numbers are finite.
    """
    lens = batch.seq_lens_host[first:]
    indptr_host = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(lens, out=indptr_host[1:])
    indptr = torch.from_numpy(indptr_host)
    device, total = batch.slot_table.device, int(indptr_host[-1])
    starts = indptr.to(device, non_blocking=True)[:-1]
    index = torch.arange(len(lens), device=device)
    request = torch.repeat_interleave(index, batch.seq_lens[first:], output_size=total)
    token = torch.arange(total, device=device, dtype=torch.int32) - starts[request]
    slots = batch.slot_table[batch.rows[first:][request], token]
    if batch.slot_map is not None:
        q_lens = torch.diff(batch.cu_q_lens)[first:]
        is_seen = token > (batch.seq_lens[first:] - q_lens - window)[request]
        last = batch.slot_table[batch.rows[first:], batch.seq_lens[first:] - 1]
        slots = torch.where(is_seen, batch.slot_map[slots], batch.slot_map[last][request])
    return indptr, slots
