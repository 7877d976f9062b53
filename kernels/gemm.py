"""Products with a weight matrix, with what comes before (RMS norm) and after (activation, residual) fused in.

On a GPU one token takes `triton_gemm`, a few take `triton_skinny`, more cuBLAS, or `gated_gemm` for gate and up; a CPU
takes torch, or oneDNN if the weight is packed.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels.elementwise import act_and_mul, rms_norm
from kernels.gated_gemm import can_gated_gemm, gated_gemm

SMALL_WEIGHT = 8 << 20  # elements
GEMV_MAX_TOKENS = 3  # of small weights; of larger ones only one
SKINNY_MAX_TOKENS = 32


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Weight [N, K] laid out as its device multiplies fastest: itself, or a copy that only this file can read."""
    if weight.is_cpu and torch.backends.mkldnn.is_available():
        from kernels.onednn_gemm import can_pack, pack_onednn

        if can_pack(weight):
            return pack_onednn(weight)
    return weight


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias; x [T, K], weight [N, K] -> [T, N]."""
    if kernel := _kernel_for_few(x, weight):
        return kernel(x, weight, bias)
    if weight.is_mkldnn:
        from kernels.onednn_gemm import linear_onednn

        return linear_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def norm_linear(
    h: torch.Tensor, norm_weight: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """linear(rms_norm(h)); h [T, K], norm_weight [K], weight [N, K] -> [T, N]."""
    if _is_gemv(h, weight):
        from kernels.triton_gemm import gemv  # here: a machine without a GPU need not have triton

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
    kernel = _kernel_for_few(x, weight) if out is None else None
    is_few = kernel is not None and weight.numel() <= SMALL_WEIGHT  # of large ones `gated_gemm` is as near to the limit
    if bias is None and not is_few and can_gated_gemm(x, weight, act):
        return gated_gemm(x, weight, act, out=out)
    if kernel is not None:
        return kernel(x, weight, bias, act=act)
    gated = act_and_mul(linear(x, weight, bias), act)
    return gated if out is None else out.copy_(gated)


def linear_add(
    x: torch.Tensor, weight: torch.Tensor, h: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """h + x @ weight.T + bias, which may be written into h; x [T, K], weight [N, K], h [T, N]."""
    if h.is_contiguous() and (kernel := _kernel_for_few(x, weight)):
        return kernel(x, weight, bias, residual=h)
    if x.is_cuda and bias is None:
        return h.addmm_(x, weight.t())
    if weight.is_mkldnn:
        from kernels.onednn_gemm import linear_add_onednn

        return linear_add_onednn(x, weight, h, bias)
    return h.add_(F.linear(x, weight, bias))


def _is_gemv(x: torch.Tensor, weight: torch.Tensor) -> bool:
    max_tokens = GEMV_MAX_TOKENS if weight.numel() <= SMALL_WEIGHT else 1
    return x.is_cuda and 0 < x.shape[0] <= max_tokens and x.is_contiguous() and weight.is_contiguous()


def _kernel_for_few(x: torch.Tensor, weight: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """`gemv` or `skinny_gemm`, if x [T, K] has so few tokens that it is the fastest."""
    if _is_gemv(x, weight):
        from kernels.triton_gemm import gemv

        return gemv
    if not x.is_cuda or not 0 < x.shape[0] <= SKINNY_MAX_TOKENS:
        return None
    from kernels.triton_skinny import fits_skinny, skinny_gemm

    can_run = x.dtype.itemsize == 2 and fits_skinny(x.shape[1]) and x.is_contiguous() and weight.is_contiguous()
    return skinny_gemm if can_run else None
