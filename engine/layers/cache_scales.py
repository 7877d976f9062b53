"""Numbers by which a checkpoint has keys and values divided before they are rounded to an FP8 cache."""

import math
from dataclasses import dataclass

import torch

from kernels.weights import ShapeError

Norms = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class CacheScales:
    """A layer's numbers: scores are multiplied by `k`, and what attention finds by `v`."""

    k: float
    v: float
    factors: torch.Tensor  # [2 Hkv D], of keys and values as the product makes them
    norms: Norms  # weights of the norms of heads; those of keys and values are divided here, for a norm undoes a factor

    @staticmethod
    def of(k_scale: torch.Tensor, v_scale: torch.Tensor, size: int, norms: Norms, dtype: torch.dtype) -> "CacheScales":
        """Return the numbers of a layer whose keys have `size` elements. `ShapeError` if one cannot be divided by.

        k_scale, v_scale: [1]. norms: of query, key and value heads, None where there are none.
        """
        k, v = k_scale.item(), v_scale.item()
        for name, scale in (("k_scale", k), ("v_scale", v)):
            if not 0 < scale < math.inf:
                raise ShapeError(f"has a {name} of {scale}, by which nothing can be divided")
        q_norm, k_norm, v_norm = norms
        factors = torch.ones(2, size, dtype=dtype, device=k_scale.device)
        if k_norm is None:
            factors[0] = 1 / k
        if v_norm is None:
            factors[1] = 1 / v
        return CacheScales(k, v, factors.flatten(), (q_norm, _divided(k_norm, k), _divided(v_norm, v)))

    def shrink_(self, qkv: torch.Tensor) -> None:
        """Divide the keys and values of qkv [T, (H + 2 Hkv) D] that no norm follows, in place."""
        qkv[:, -len(self.factors) :].mul_(self.factors)


def _divided(weight: torch.Tensor | None, scale: float) -> torch.Tensor | None:
    return None if weight is None else (weight.float() / scale).to(weight.dtype)
