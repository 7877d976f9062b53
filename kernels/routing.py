"""Which experts a token goes to, and what each of them counts."""

from dataclasses import dataclass

import torch

TINY = 1e-20  # added to sums of sigmoids, as the models that have them do


@dataclass(frozen=True)
class Routing:
    """The rule that chooses experts from a router's logits."""

    num_experts: int
    top_k: int
    is_sigmoid: bool = False  # scores are sigmoids of their logits, else a softmax over all experts
    renormalize: bool = True  # weights are the chosen scores' shares of their sum
    factor: float = 1.0  # of all weights
    num_groups: int = 1  # consecutive experts form groups, and only those of the best groups are chosen
    topk_groups: int = 1
    group_score: int = 1  # a group counts as much as so many of its best experts together


def route_torch(
    logits: torch.Tensor, routing: Routing, correction: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = logits.float()
    scores = wide.sigmoid() if routing.is_sigmoid else wide.softmax(dim=-1)
    choice = scores if correction is None else scores + correction
    if routing.num_groups > 1:
        grouped = choice.unflatten(1, (routing.num_groups, -1))
        of_groups = grouped.topk(routing.group_score, dim=2).values.sum(dim=2)
        best = of_groups.topk(routing.topk_groups, dim=1).indices
        is_kept = torch.zeros_like(of_groups, dtype=torch.bool).scatter_(1, best, True)
        lowest = 0.0 if correction is None else -torch.inf
        choice = grouped.masked_fill(~is_kept[:, :, None], lowest).flatten(1)
    ids = choice.topk(routing.top_k, dim=1).indices
    weights = scores.gather(1, ids)
    if routing.renormalize:
        weights = weights / (weights.sum(dim=1, keepdim=True) + (TINY if routing.is_sigmoid else 0.0))
    return ids, weights * routing.factor if routing.factor != 1.0 else weights


def route(
    logits: torch.Tensor, routing: Routing, correction: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts of each token and their weights: int64 and float32 [T, top_k], the best first.

    logits: [T, E]. correction: float32 [E], added to scores when experts are chosen, not to weights (DeepSeek-AI 2024,
    DeepSeek-V3).
    """
    if logits.is_cuda and routing.num_groups == 1:
        from kernels.triton_experts import route_triton  # here: a machine without a GPU need not have triton

        return route_triton(
            logits,
            correction,
            top_k=routing.top_k,
            is_sigmoid=routing.is_sigmoid,
            renormalize=routing.renormalize,
            factor=routing.factor,
        )
    return route_torch(logits, routing, correction)
