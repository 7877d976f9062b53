"""Two kernels at once: attention of single tokens, which reads memory, beside gate's and up's product, which computes.

In a step of prompts and decodes each of the two leaves half of the device idle, and they cannot share it for the same
tokens: a layer's product needs its attention. So the last tokens of a step, all of prompts, go ahead: while they are
multiplied on most multiprocessors, the decodes' attention runs on the others. The products of the decodes and of the
first prompt tokens follow. To run what computes beside what reads is the idea of NanoFlow (Zhu et al. 2024), which
splits a batch in two to that end; here one product of a part is enough, and nothing else of a layer is split but what
leads there.
"""

import functools
from typing import Any, NamedTuple

import torch

from kernels.attention import decodes_torch
from kernels.attention_batch import AttentionBatch
from kernels.dense import DenseWeight
from kernels.gated_gemm import can_gated_gemm, gated_gemm
from kernels.launch import num_sms
from kernels.weights import Weight

MEASURED_SMS = 132  # of the devices (H100, H200) that the next figures hold for
# Multiprocessors for the attention -> operations of the product on all others while the attention reads a byte.
FLOPS_PER_BYTE = {32: 400, 48: 245}
MULTIPLE = 256  # of tokens: pairs of `gated_gemm`'s tiles
MIN_DECODES = 32  # the attention kernels for fewer of them are made for latency, and fill few multiprocessors badly
MIN_BYTES = 256 << 20  # less to read, and the additional kernels take what is gained
ENOUGH = 0.8  # so much of the attention beside the product is nearly as good as all of it
# Of a step that may be split: whole tiles. More of them would leave more decodes to steps without prompts.
STEP_TOKENS = 2560


class CorunCosts(NamedTuple):
    """Hold what decides how many tokens take as long as the attention, in each layer."""

    context_bytes: int  # of keys and values that attention reads of a token
    token_flops: int  # of gate and up


class Corun(NamedTuple):
    """Say how the layers of a step are split."""

    num_tokens: int  # the last ones of the step, which are multiplied beside the attention of single tokens
    num_free_sms: int  # multiprocessors for that attention


def can_corun(weight: Weight, act: str) -> bool:
    """Return whether `gated_beside_decodes` can run two kernels at once, with gate's and up's `weight`."""
    if not isinstance(weight, DenseWeight) or not weight.data.is_cuda:
        return False
    return num_sms(weight.data.device) == MEASURED_SMS and can_gated_gemm(weight.data[:1], weight.data, act)


def choose_corun(costs: CorunCosts, num_tokens: int, num_decodes: int, num_context_tokens: int) -> Corun | None:
    """Return how a step is split, or None if that is not worth it, or if there are too few prompt tokens.

    The step has `num_tokens`, `num_decodes` of them single ones that see `num_context_tokens` in all.
    """
    num_bytes = num_context_tokens * costs.context_bytes
    room = (num_tokens - num_decodes) // MULTIPLE
    if num_decodes < MIN_DECODES or num_bytes < MIN_BYTES:
        return None
    for num_free_sms, flops_per_byte in FLOPS_PER_BYTE.items():
        wanted = num_bytes * flops_per_byte / (costs.token_flops * MULTIPLE)
        if ENOUGH * wanted <= room:
            return Corun(MULTIPLE * max(min(round(wanted), room), 1), num_free_sms)
    return None


def gated_beside_decodes(
    x: torch.Tensor,
    weight: Weight,
    act: str,
    gated: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    attended: torch.Tensor,
    *,
    num_free_sms: int,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> None:
    """Write the product of x [M, K] and gate's and up's `weight`, with `act`, into `gated` [M, N].

    Meanwhile, on `num_free_sms` multiprocessors, the attention of the batch's single tokens is written into their part
    of `attended` [T, H, D].

    q and the caches are those of `kernels.attention.attention`. On a GPU `can_corun` must hold.
    """
    if not x.is_cuda:
        weight.product(x, act=act, out=gated)
        decodes_torch(q, k_cache, v_cache, batch, attended, scale=scale, softcap=softcap, sinks=sinks, slopes=slopes)
        return
    assert isinstance(weight, DenseWeight)
    multiply = functools.partial(gated_gemm, x, weight.data, act, out=gated, num_free_sms=num_free_sms)
    if not batch.num_decodes:
        multiply()
        return
    from kernels.triton_decode import decode  # here: a machine without a GPU need not have triton

    settings: dict[str, Any] = {"num_free_sms": num_free_sms, "launch_beside": multiply}
    decode(q, k_cache, v_cache, batch, attended, scale=scale, softcap=softcap, sinks=sinks, slopes=slopes, **settings)
