"""Weights of plain floating-point numbers.

On a GPU one token takes `triton_gemm`, a few take `few_gemm` or `triton_skinny`, more cuBLAS, or `gated_gemm` for gate
and up; a CPU takes torch, oneDNN where the weight can lie in its blocked layout, or, where it has no units for 16 bits,
the compiled products of `products_cpu` or `widened`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kernels.elementwise import act_and_mul, embed
from kernels.few_gemm import can_few_gemm, few_gemm
from kernels.few_gemm import most_columns as most_columns_of_few
from kernels.gated_gemm import can_gated_gemm, gated_gemm, most_columns
from kernels.launch import num_sms
from kernels.products_cpu import kernels_ahead, pack_numbers
from kernels.ties import settle_ties
from kernels.tuning import WeightShape
from kernels.weights import WHOLE, Norm, PackedWeight, Part, Shard, Weight, match_shard
from kernels.widened import WidenedWeight, can_widen

SMALL_WEIGHT = 8 << 20  # elements
LARGE_GATED = 64 << 20  # elements of gate and up, from which `gated_gemm` is faster than `few_gemm` with equal tiles
GEMV_MAX_TOKENS = 3  # of small weights; of larger ones only one
SKINNY_MAX_TOKENS = 32
ROUTER_WEIGHT, ROUTER_MAX_TOKENS = 1 << 18, 256  # elements of the weight whose logits are `triton_skinny`'s up to here
# Of inputs: oneDNN sums more of one row in another order than of several. A second row costs a few microseconds, and
# keeps greedy answers the same whatever runs beside them.
ONEDNN_ONE_CHAIN = 1024


class DenseWeight(Weight):
    """A matrix [n, k] as one contiguous tensor."""

    has_lookup = True

    def __init__(
        self, parts: Sequence[Part], k: int, dtype: torch.dtype, input_shard: Shard = WHOLE, data: Any = None
    ) -> None:
        super().__init__(parts, k, input_shard)
        self.data: torch.Tensor = torch.empty(self.n, k, dtype=dtype, device="meta") if data is None else data

    @classmethod
    def of(cls, data: torch.Tensor) -> "DenseWeight":
        """Wrap a matrix [n, k] that exists already."""
        return cls([Part(data.shape[0])], data.shape[1], data.dtype, data=data)

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
        weight = self.data
        if norm is not None:
            if norm.is_rms and residual is None and out is None and _is_gemv(x, weight):
                from kernels.triton_gemm import gemv  # here: a machine without a GPU need not have triton

                return gemv(x, weight, bias, norm_weight=norm.weight, eps=norm.eps, act=act)
            x = norm(x)
        if act is not None:
            result = _gated(x, weight, bias, act, out)
            return result if residual is None else residual + result
        kernel = _kernel_for_few(x, weight, residual=residual)
        if residual is not None:
            return _added(x, weight, bias, residual, may_overwrite, kernel)
        result = kernel(x, weight, bias) if kernel else F.linear(x, weight, bias)
        return result if out is None else out.copy_(result)

    def logits(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.dtype == torch.float32:
            return self.product(x, bias=bias)
        if x.is_cpu:
            return settle_ties(self.product(x, bias=bias).float(), x, self.data, bias)
        max_tokens = ROUTER_MAX_TOKENS if self.data.numel() <= ROUTER_WEIGHT else None
        if kernel := _kernel_for_few(x, self.data, max_tokens=max_tokens):
            return kernel(x, self.data, bias, out_dtype=torch.float32)
        sums = torch.mm(x, self.data.t(), out_dtype=torch.float32)
        return sums if bias is None else sums.add_(bias)

    def normed_logits(
        self, x: torch.Tensor, norm: Norm, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not (norm.is_rms and x.dtype.itemsize == 2 and _is_gemv(x, self.data)):
            return super().normed_logits(x, norm, bias)
        from kernels.triton_gemm import gemv  # here: a machine without a GPU need not have triton

        normed = torch.empty_like(x)
        fused: dict[str, Any] = {"norm_weight": norm.weight, "eps": norm.eps, "normed": normed}
        return normed, gemv(x, self.data, bias, out_dtype=torch.float32, **fused)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return embed(ids, self.data)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "weight", self.data

    def transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.data = function(self.data)

    def place(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG002
        rows, columns = self.parts[part].shard, self.input_shard
        if columns != WHOLE:  # of one rank, too: inputs may go on beyond the last, where other formats need it
            return match_shard(self.rows_of(part), loaded, 1, columns)
        return match_shard(self.rows_of(part), loaded, 0, rows)

    def rows_of(self, part: int) -> torch.Tensor:
        return self.data[self.row_slice(part)]

    def tuning_shape(self, **fused: Any) -> WeightShape:
        act, is_large = fused.get("act"), self.data.numel() > SMALL_WEIGHT
        has_other = can_few_gemm(self.data[:2], self.data, act)
        has_other |= act is not None and is_large and can_gated_gemm(self.data[:1], self.data, act)
        return WeightShape(self.n, self.k, max_tokens=1 if has_other else SKINNY_MAX_TOKENS, **fused)

    def materialize(self, device: torch.device) -> None:
        super().materialize(device)
        if device.type == "cpu" and not has_onednn_units(self.data.dtype) and can_widen(self.data.dtype):
            kernels_ahead()

    def pack(self, *, for_logits: bool = False) -> Weight:
        """Return a weight of oneDNN on a CPU that multiplies this one's dtype, a widened one on others, else itself."""
        if not self.data.is_cpu or not torch.backends.mkldnn.is_available():
            return self
        dtype = self.data.dtype
        if has_onednn_units(dtype):
            return OneDNNWeight(self, keeps_rows=for_logits)
        if not can_widen(dtype):
            return self
        return pack_numbers(self, self.data) or WidenedWeight(self, self.data)


class OneDNNWeight(PackedWeight):
    """A matrix on a CPU in oneDNN's blocked layout.

    Given a plain weight, oneDNN lays it out anew in every call. For the few tokens of a decode step that costs half as
    much again as the product itself (576 x 3072, bf16, AMX: 900 µs instead of 640).
    """

    _linear = staticmethod(torch.ops.mkldnn._linear_pointwise.default)
    _linear_add = staticmethod(torch.ops.mkldnn._linear_pointwise.binary)

    def __init__(self, dense: DenseWeight, *, keeps_rows: bool = False) -> None:
        """keeps_rows: `logits` will read few of `dense`'s rows, which a tied embedding has anyway."""
        super().__init__(dense, torch.ops.mkldnn._reorder_linear_weight.default(dense.data))
        self._rows = dense.data if keeps_rows else None

    def product(
        self,
        x: torch.Tensor,
        *,
        norm: Norm | None = None,
        bias: torch.Tensor | None = None,
        act: str | None = None,
        residual: torch.Tensor | None = None,
        may_overwrite: bool = False,  # noqa: ARG002 - a sum is made in fp32 before the one rounding: a new tensor
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if norm is not None:
            x = norm(x)
        if len(x) == 1 and self.k > ONEDNN_ONE_CHAIN:
            both = self.product(
                x.repeat(2, 1), bias=bias, act=act, residual=None if residual is None else residual.repeat(2, 1)
            )
            return both[:1] if out is None else out.copy_(both[:1])
        if residual is not None and act is None:
            return self._linear_add(x, residual, self.data, bias, "add")
        result = self._linear(x, self.data, bias, "none", [], "")
        if act is not None:
            result = act_and_mul(result, act)
        if residual is not None:
            result = residual + result
        return result if out is None else out.copy_(result)

    def logits(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.product(x, bias=bias).float()
        return logits if self._rows is None else settle_ties(logits, x, self._rows, bias)

    def rows_of(self, part: int) -> torch.Tensor:
        return self.data.to_dense()[self.row_slice(part)]


def has_onednn_units(dtype: torch.dtype) -> bool:
    """Return whether products of `dtype` go through oneDNN here; those of float32 never do."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _gated(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, act: str, out: torch.Tensor | None
) -> torch.Tensor:
    """Return act(gate) * up of [gate, up] = x W^T + bias, in `out` if given."""
    kernel = _kernel_for_few(x, weight, act)
    if kernel is few_gemm and not _gated_gemm_is_faster(x, weight, bias, act):
        return few_gemm(x, weight, bias, act=act, out=out)
    fused = kernel if out is None else None
    # For several tokens of a large weight `gated_gemm` is as near to the limit.
    is_few = fused is not None and (len(x) == 1 or weight.numel() <= SMALL_WEIGHT)
    if bias is None and not is_few and can_gated_gemm(x, weight, act):
        return gated_gemm(x, weight, act, out=out)
    if fused is not None:
        return fused(x, weight, bias, act=act)
    gated = act_and_mul(kernel(x, weight, bias) if kernel else F.linear(x, weight, bias), act)
    return gated if out is None else out.copy_(gated)


def _gated_gemm_is_faster(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, act: str) -> bool:
    """Return whether `gated_gemm` is faster than `few_gemm`, which takes these: no tile of it is larger."""
    if bias is not None or weight.numel() < LARGE_GATED or not can_gated_gemm(x, weight, act):
        return False
    n, sms = weight.shape[0] // 2, num_sms(x.device)
    columns = most_columns(1, n, sms)
    return columns is not None and columns <= most_columns_of_few(n, weight.shape[1], sms)


def _added(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    may_overwrite: bool,
    kernel: Callable[..., torch.Tensor] | None,
) -> torch.Tensor:
    """Return residual + x W^T + bias; it is `residual` itself if that may be overwritten."""
    if kernel is not None and residual.is_contiguous():
        return kernel(x, weight, bias, residual=residual if may_overwrite else residual.clone())
    if x.is_cuda and bias is None:
        if may_overwrite:
            return residual.addmm_(x, weight.t())
        return torch.addmm(residual, x, weight.t())
    product = kernel(x, weight, bias) if kernel else F.linear(x, weight, bias)
    return residual.add_(product) if may_overwrite else product.add_(residual)


def _is_gemv(x: torch.Tensor, weight: torch.Tensor) -> bool:
    max_tokens = GEMV_MAX_TOKENS if weight.numel() <= SMALL_WEIGHT else 1
    return x.is_cuda and 0 < x.shape[0] <= max_tokens and x.is_contiguous() and weight.is_contiguous()


def _kernel_for_few(
    x: torch.Tensor,
    weight: torch.Tensor,
    act: str | None = None,
    residual: torch.Tensor | None = None,
    max_tokens: int | None = None,
) -> Callable[..., torch.Tensor] | None:
    """Return `gemv`, `few_gemm` or `skinny_gemm`, if x [T, K] has so few tokens that it is the fastest."""
    if not x.is_cuda:
        return None
    if _is_gemv(x, weight):
        from kernels.triton_gemm import gemv  # here: a machine without a GPU need not have triton

        return gemv
    if can_few_gemm(x, weight, act, residual):
        return few_gemm
    if not 0 < x.shape[0] <= (SKINNY_MAX_TOKENS if max_tokens is None else max_tokens):
        return None
    from kernels.triton_skinny import fits_skinny, skinny_gemm

    fits = fits_skinny(x.shape[1], is_small=weight.numel() <= ROUTER_WEIGHT)
    can_run = x.dtype.itemsize == 2 and fits and x.is_contiguous() and weight.is_contiguous()
    return skinny_gemm if can_run else None
