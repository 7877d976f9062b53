"""Products of FP8 codes of many tokens by cuBLAS and CUTLASS, as torch brings them."""

import torch

from kernels.card import card_of
from kernels.launch import cdiv, num_sms
from kernels.quantized_format import FP8

ALIGNMENT = 16  # of rows and columns
# Our own product adds a residual while it writes, which is faster where its tiles, of tokens and rows, fill more than
# half of the multiprocessors.
TILE, MOST_FILLED = (128, 256), 0.5


def can_scaled_mm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    out_dtype: torch.dtype,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> bool:
    """Return whether `scaled_mm` takes codes x [T, K] and weight [N, K], and is faster than `gemm_8bit`."""
    num_tokens, n = len(x), len(weight)
    if residual is not None and cdiv(num_tokens, TILE[0]) * cdiv(n, TILE[1]) > MOST_FILLED * num_sms(x.device):
        return False
    return (
        takes_codes(weight, out_dtype)
        and x.dtype == FP8
        and len(scale) == 1
        and (bias is None or bias.dtype == out_dtype)
    )


def takes_codes(weight: torch.Tensor, out_dtype: torch.dtype) -> bool:
    """Return whether `scaled_mm` multiplies by codes [N, K], for results of `out_dtype`."""
    n, k = weight.shape
    is_aligned = n % ALIGNMENT == k % ALIGNMENT == 0
    return weight.dtype == FP8 and out_dtype == torch.bfloat16 and is_aligned and card_of(weight.device).is_hopper


def scaled_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return residual + x W^T + bias, bfloat16 [T, N], of codes x [T, K] and weight [N, K]: see `gemm_8bit`."""
    result = torch._scaled_mm(
        x, weight.t(), scale_a=x_scale, scale_b=scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return result if residual is None else residual.add_(result)
