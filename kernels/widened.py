"""Weights of 16 bits on a CPU without units for them or a C++ compiler: kept as they are, multiplied in float32.

torch's own product of 16 bits widens each number anew for every token, without units some four times as slow as one of
float32. Here a panel of rows is widened once and multiplied in float32, which takes as long as if the weights were kept
in float32, in twice the memory. A few tokens are as fast as the weights are read: half as many bytes, by torch's own
product.
"""

import torch
import torch.nn.functional as F

from kernels.ties import settle_ties
from kernels.weights import Norm, PackedWeight, finished

PANEL_BYTES = 1 << 22  # of float32; for half as much, products of 512 tokens take up to a seventh longer
FEW_TOKENS = 3  # whose product is torch's own: more are not limited by reading the weights


class WidenedWeight(PackedWeight):
    """A matrix [n, k] of 16 bits on a CPU."""

    def product(
        self,
        x: torch.Tensor,
        *,
        norm: Norm | None = None,
        bias: torch.Tensor | None = None,
        act: str | None = None,
        residual: torch.Tensor | None = None,
        may_overwrite: bool = False,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if norm is not None:
            x = norm(x)
        result = F.linear(x, self.data, bias) if len(x) <= FEW_TOKENS else widened_linear(x, self.data, bias)
        return finished(result, act, residual, may_overwrite, out)

    def logits(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if len(x) > FEW_TOKENS:
            return _widened_sums(x, self.data, bias)
        return settle_ties(self.product(x, bias=bias).float(), x, self.data, bias)

    def rows_of(self, part: int) -> torch.Tensor:
        return self.data[self.row_slice(part)]


def can_widen(dtype: torch.dtype) -> bool:
    """Return whether weights of `dtype` are faster so, if the CPU has no units for it: measured with AVX2 alone."""
    return dtype.itemsize == 2 and torch.backends.cpu.get_cpu_capability().startswith("AVX")


def widened_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + bias in x's dtype, summed in float32 and rounded once: x [T, K], weight [N, K] -> [T, N]."""
    return _widened_sums(x, weight, bias).to(x.dtype)


def _widened_sums(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    (num_tokens, k), n = x.shape, len(weight)
    wide, result = x.float(), torch.empty(num_tokens, n)
    size = max(PANEL_BYTES // (4 * k), 1)
    panel = torch.empty(min(size, n), k)
    for start in range(0, n, size):
        rows = panel[: n - start]
        rows.copy_(weight[start : start + size])
        result[:, start : start + size] = wide @ rows.t()
    if bias is not None:
        result += bias
    return result
