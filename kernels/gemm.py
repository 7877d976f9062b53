"""Products with a weight matrix, with what comes before (RMS norm) and after (activation, residual) fused in.

A few tokens on a GPU take `triton_gemm`, more of them cuBLAS, or `gated_gemm` for gate and up; a CPU takes torch, or
oneDNN if the weight is packed.
"""

import torch
import torch.nn.functional as F

from kernels.elementwise import act_and_mul, rms_norm
from kernels.gated_gemm import can_gated_gemm, gated_gemm

GEMV_MAX_TOKENS = 4
GEMV_SMALL_WEIGHT = 8 << 20  # elements; of larger weights only one token's product is faster than cuBLAS's


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Weight [N, K] laid out as its device multiplies fastest: itself, or a copy that only this file can read."""
    if weight.is_cpu and torch.backends.mkldnn.is_available():
        from kernels.onednn_gemm import can_pack, pack_onednn

        if can_pack(weight):
            return pack_onednn(weight)
    return weight


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias; x [T, K], weight [N, K] -> [T, N]."""
    if _is_gemv(x, weight):
        from kernels.triton_gemm import gemv  # here: a machine without a GPU need not have triton

        return gemv(x, weight, bias)
    if weight.is_mkldnn:
        from kernels.onednn_gemm import linear_onednn

        return linear_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def norm_linear(
    h: torch.Tensor, norm_weight: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """linear(rms_norm(h)); h [T, K], norm_weight [K], weight [N, K] -> [T, N]."""
    if _is_gemv(h, weight):
        from kernels.triton_gemm import gemv

        return gemv(h, weight, bias, norm_weight=norm_weight, eps=eps)
    return linear(rms_norm(h, norm_weight, eps), weight, bias)


def norm_linear_act(
    h: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    act: str = "silu",
) -> torch.Tensor:
    """act(gate) * up of [gate, up] = norm_linear(h); h [T, K], weight [2N, K] -> [T, N]."""
    if _is_gemv(h, weight):
        from kernels.triton_gemm import gemv

        return gemv(h, weight, bias, norm_weight=norm_weight, eps=eps, act=act)
    return linear_act(rms_norm(h, norm_weight, eps), weight, bias, act)


def linear_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    act: str = "silu",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(gate) * up of [gate, up] = linear(x), into `out` if given; x [T, K], weight [2N, K] -> [T, N]."""
    if bias is None and can_gated_gemm(x, weight, act):
        return gated_gemm(x, weight, act, out=out)
    gated = act_and_mul(linear(x, weight, bias), act)
    return gated if out is None else out.copy_(gated)


def linear_add(
    x: torch.Tensor, weight: torch.Tensor, h: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """h + x @ weight.T + bias, which may be written into h; x [T, K], weight [N, K], h [T, N]."""
    if _is_gemv(x, weight) and h.is_contiguous():
        from kernels.triton_gemm import gemv

        return gemv(x, weight, bias, residual=h)
    if x.is_cuda and bias is None:
        return h.addmm_(x, weight.t())
    if weight.is_mkldnn:
        from kernels.onednn_gemm import linear_add_onednn

        return linear_add_onednn(x, weight, h, bias)
    return h.add_(F.linear(x, weight, bias))


def _is_gemv(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if not x.is_cuda or not (x.shape[0] == 1 or weight.numel() <= GEMV_SMALL_WEIGHT):
        return False
    return 0 < x.shape[0] <= GEMV_MAX_TOKENS and x.is_contiguous() and weight.is_contiguous()
