"""Find the largest logit on a CPU, whose products of 16 bits round what they return."""

import torch


def settle_ties(
    logits: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum those of a row's logits anew that tie as its largest, in place; return `logits`.

    logits: float32 [T, n] of x W^T + bias, rounded to x's dtype, for want of a product on a CPU that does not round;
    x [T, k], weight [n, k]. Rounding keeps the order, so the largest of the unrounded sums is among the ties, and the
    new values are no further from them than a rounding: above all others.
    """
    largest, second = logits.topk(min(2, logits.shape[1]), dim=1).values.unbind(dim=1)
    tied = (largest == second).nonzero()[:, 0]
    if len(tied):
        rows, ids = (logits[tied] == largest[tied, None]).nonzero(as_tuple=True)
        rows = tied[rows]
        sums = (x[rows].float() * weight[ids].float()).sum(dim=1)
        logits[rows, ids] = sums if bias is None else sums + bias[ids]
    return logits
