"""The kernel of `kernels.routing`."""

import torch
import triton
import triton.language as tl

from kernels.launch import fast_launch, next_power_of_2
from kernels.routing_rule import Routing
from kernels.triton_elementwise import launch_options


def route_triton(
    logits: torch.Tensor, routing: Routing, correction: torch.Tensor | None = None, held: range | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `kernels.routing.route` does, by one kernel."""
    num_tokens, num_experts = logits.shape
    ids = torch.empty(num_tokens, routing.top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_tokens, routing.top_k, device=logits.device)
    group_size = num_experts // routing.num_groups
    _route_kernel[(num_tokens,)](
        logits, correction, ids, weights, logits.stride(0), routing.factor, held.start if held else 0,
        NUM_HELD=len(held) if held else 0, TOP_K=routing.top_k, IS_SIGMOID=routing.is_sigmoid,
        RENORMALIZE=routing.renormalize and not routing.margin, MARGIN=routing.margin, SOFTCAP=routing.softcap,
        GROUP=group_size, NUM_GROUPS=routing.num_groups, TOPK_GROUPS=routing.topk_groups,
        GROUP_SCORE=routing.group_score, BLOCK_GROUP=next_power_of_2(group_size),
        BLOCK_GROUPS=next_power_of_2(routing.num_groups), BLOCK_TOP=next_power_of_2(routing.top_k),
        **launch_options(logits.device, num_warps=1),
    )  # fmt: skip
    return ids, weights


@fast_launch
@triton.jit
def _route_kernel(
    logits, correction, ids, weights, stride, factor, first_held,
    NUM_HELD: tl.constexpr, TOP_K: tl.constexpr, IS_SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr,
    MARGIN: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr, GROUP_SCORE: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_TOP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    cell = tl.arange(0, BLOCK_GROUPS * BLOCK_GROUP)  # groups one after another, each filled up to a power of two
    group, member = cell // BLOCK_GROUP, cell % BLOCK_GROUP
    expert = group * GROUP + member
    is_expert = (group < NUM_GROUPS) & (member < GROUP)
    values = tl.load(logits + token * stride + expert, mask=is_expert, other=float("-inf")).to(tl.float32)
    if SOFTCAP > 0:
        capped = SOFTCAP * (2 * tl.sigmoid(values * (2 / SOFTCAP)) - 1)  # tanh
        values = tl.where(is_expert, capped, float("-inf"))
    if MARGIN > 0:
        scores = values
    elif IS_SIGMOID:
        scores = tl.sigmoid(values)
    else:
        scores = tl.exp(values - tl.max(values, axis=0))
        scores = scores / tl.sum(scores, axis=0)
    choice = scores
    if correction is not None:
        choice += tl.load(correction + expert, mask=is_expert, other=0.0)
    if NUM_GROUPS > 1:
        lowest = 0.0 if correction is None else float("-inf")
        choice = of_best_groups(
            tl.where(is_expert, choice, float("-inf")), lowest, TOPK_GROUPS, GROUP_SCORE, BLOCK_GROUP, BLOCK_GROUPS
        )
    choice = tl.where(is_expert, choice, float("-inf"))
    place = tl.arange(0, BLOCK_TOP)
    chosen = tl.zeros([BLOCK_TOP], tl.int64)
    counts = tl.zeros([BLOCK_TOP], tl.float32)
    for i in tl.static_range(TOP_K):
        best = tl.argmax(choice, axis=0)
        score = tl.sum(tl.where(cell == best, scores, 0.0), axis=0)
        if MARGIN > 0:
            finite = tl.where(is_expert, values, score)
            is_near = (score - finite) / tl.maximum(tl.abs(finite), score) <= MARGIN
            score = 1.0 / tl.sum(tl.where(is_near & is_expert, tl.exp(choice - score), 0.0), axis=0)
        # Of numbers that are none, as rows of padding may have, the best may be a cell without an expert.
        best_expert = tl.minimum(best // BLOCK_GROUP * GROUP + best % BLOCK_GROUP, NUM_GROUPS * GROUP - 1)
        chosen = tl.where(place == i, best_expert.to(tl.int64), chosen)
        counts = tl.where(place == i, score, counts)
        choice = tl.where(cell == best, float("-inf"), choice)
    if RENORMALIZE:
        total = tl.sum(counts, axis=0)
        if IS_SIGMOID:
            total += 1e-20
        counts = counts / total
    if NUM_HELD > 0:
        chosen -= first_held
        is_held = (chosen >= 0) & (chosen < NUM_HELD)
        chosen = tl.where(is_held, chosen, NUM_HELD)
        counts = tl.where(is_held, counts, 0.0)
    tl.store(ids + token * TOP_K + place, chosen, mask=place < TOP_K)
    tl.store(weights + token * TOP_K + place, counts * factor, mask=place < TOP_K)


@triton.jit
def of_best_groups(
    choice, lowest,
    TOPK_GROUPS: tl.constexpr, GROUP_SCORE: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """Return scores [BLOCK_GROUPS * BLOCK_GROUP] with `lowest` in place of those outside of the best groups."""
    of_groups = tl.reshape(choice, [BLOCK_GROUPS, BLOCK_GROUP])
    member = tl.arange(0, BLOCK_GROUP)
    left, totals = of_groups, tl.zeros([BLOCK_GROUPS], tl.float32)
    for _ in tl.static_range(GROUP_SCORE):
        best = tl.argmax(left, axis=1)
        totals += tl.max(left, axis=1)
        left = tl.where(member[None, :] == best[:, None], float("-inf"), left)
    group = tl.arange(0, BLOCK_GROUPS)
    kept = tl.zeros([BLOCK_GROUPS], tl.int32)
    for _ in tl.static_range(TOPK_GROUPS):
        is_best = group == tl.argmax(totals, axis=0)
        kept = tl.where(is_best, 1, kept)
        totals = tl.where(is_best, float("-inf"), totals)
    return tl.reshape(tl.where(kept[:, None] > 0, of_groups, lowest), [BLOCK_GROUPS * BLOCK_GROUP])
