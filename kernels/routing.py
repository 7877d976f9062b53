"""Which experts a token goes to, and what each of them counts."""

import torch

from kernels.routing_rule import Routing

__all__ = ("Routing", "route", "route_torch")

TINY = 1e-20  # added to sums of sigmoids, as the models that have them do


def route_torch(
    logits: torch.Tensor, routing: Routing, correction: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = logits.float()
    if routing.softcap:
        wide = torch.tanh(wide / routing.softcap) * routing.softcap
    if routing.margin:
        return sparse_mixture_torch(wide, routing)
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


def sparse_mixture_torch(logits: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts one by one, each weighted by its softmax over those left that are near it (Liu et al. 2023).

    Near is a logit l where (best - l) / max(|l|, best) is at most `margin`.
    """
    left, ids, weights = logits, [], []
    for _ in range(routing.top_k):
        best, chosen = left.max(dim=1, keepdim=True)
        is_near = (best - logits) / torch.maximum(logits.abs(), best) <= routing.margin
        ids.append(chosen)
        weights.append(left.masked_fill(~is_near, -torch.inf).softmax(dim=1).gather(1, chosen))
        left = left.scatter(1, chosen, -torch.inf)
    return torch.cat(ids, dim=1), torch.cat(weights, dim=1)


def held_torch(ids: torch.Tensor, weights: torch.Tensor, held: range) -> tuple[torch.Tensor, torch.Tensor]:
    is_held = (ids >= held.start) & (ids < held.stop)
    return torch.where(is_held, ids - held.start, len(held)), torch.where(is_held, weights, 0.0)


def route(
    logits: torch.Tensor, routing: Routing, correction: torch.Tensor | None = None, held: range | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts of each token and their weights: int64 and float32 [T, top_k], the best first.

    logits: [T, E]. correction: float32 [E], added to scores when experts are chosen, not to weights (DeepSeek-AI 2024,
    DeepSeek-V3). held: the experts of this rank, None if it has all; ids then count from its first one, and experts of
    other ranks have the id behind the last one and the weight 0.
    """
    if logits.is_cuda:
        from kernels.triton_routing import route_triton  # here: a machine without a GPU need not have triton

        return route_triton(logits, routing, correction, held)
    ids, weights = route_torch(logits, routing, correction)
    return (ids, weights) if held is None else held_torch(ids, weights, held)
