"""Weights of few bits on a GPU.

Few tokens take `quantized_few`; on Hopper several take `quantized_some` where their inputs are not rounded to 8 bits,
and more take `quantized_many`: all of them decode in registers. Still more take a product of 8 bits where inputs are
rounded to them (`scaled_mm`, `triton_quantized_gemm`), else cuBLAS with a panel of rows at a time dequantized, which
stays in the L2 cache.
"""

import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from kernels.card import OLDEST_INT8, card_of
from kernels.elementwise import act_and_mul
from kernels.quantized_few import MAX_TOKENS, can_multiply_few, fits_few, multiply_few, prepare_few
from kernels.quantized_format import TABLES, Coded, ordered, unordered
from kernels.quantized_kernel import WHOLE_ROW, Kind
from kernels.quantized_layout import CHUNK, TILE, tile_codes, tile_parameters
from kernels.quantized_many import fits_many, has_blocks, multiply_many, prepare_many
from kernels.quantized_rows import fits_rows, write_rows
from kernels.quantized_some import MOST_TOKENS as SOME_TOKENS
from kernels.quantized_some import fits_some, multiply_some, prepare_some
from kernels.scaled_mm import can_scaled_mm, scaled_mm, takes_codes
from kernels.triton_quantized import dequantize_tiles, has_e4m3, look_up, round_inputs
from kernels.triton_quantized_gemm import gemm_8bit
from kernels.tuning import WeightShape
from kernels.weights import Norm, Weight

# Where another kernel takes over, by the time of a layer of Llama-3-8B on an H200. `quantized_few` is the fastest up to
# FEW_TOKENS; up to FEW_DECODED_TOKENS beside `quantized_many`, which of 8 bits by 8 takes all but single tokens, as
# `quantized_some` does of codes in tiles.
FEW_TOKENS = 16
FEW_DECODED_TOKENS = 12
DECODED_TOKENS = 1024  # up to so many `quantized_many` is faster than dequantizing
DIRECT_TOKENS = 256  # up to so many it is faster than a product of 8 bits,
PLAIN_TOKENS = 128  # than `scaled_mm` that adds no residual
ANY_NUMBER = 1 << 30
PANEL_BYTES = 32 << 20  # of dequantized rows


class CudaQuantizedWeight(Weight):
    """A matrix [n, k] as codes: in tiles, or row by row where 8-bit products need them so.

    codes, parameters: see `quantized_layout`; parameters is None if a row has one scale. scale: float32, [G, n] where
    codes lie row by row, [n, 1] of tiles without parameters. order: int64 [k] or None. input_scale: [1] or None.
    """

    has_lookup = True

    def __init__(self, plain: Coded) -> None:
        """Take over the numbers of `plain`, which is empty afterwards."""
        super().__init__(plain.parts, plain.k, plain.input_shard)
        form, fields = plain.form, plain.fields
        plain.fields = {}
        self.form, self.dtype, self._num_inputs = form, plain.dtype, plain.num_inputs
        self.order, self.input_scale = fields.get("order"), fields.get("input_scale")
        offset, scale = fields.get("zero", fields.get("minimum")), fields["scale"]
        self._offset_name = (
            "zero" if form.has_zero else "minimum" if form.has_minimum else "eight" if form.offset else None
        )
        is_tiled = _is_tiled(plain)
        group_size = form.group_size_of(self.k)
        if group_size == self.k:
            group_size = 0 if offset is None else WHOLE_ROW
        parameter_dtype = _parameter_dtype(scale, offset, group_size)
        self.kind = Kind(form, self.dtype, is_tiled, group_size, parameter_dtype)
        self.parameters = tile_parameters(scale, offset, parameter_dtype) if group_size else None
        if is_tiled:
            self.scale = None if group_size else scale.float()
        else:
            self.scale = scale.float().t().contiguous()
        codes = fields["codes"]
        self.codes = tile_codes(form, codes, self.k) if is_tiled else codes
        self._is_prepared = False

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
        if self.order is not None:
            x, norm = ordered(x if norm is None else norm(x), self.order), None
        x = x.contiguous()
        if residual is not None and not (may_overwrite and residual.is_contiguous()):
            residual = residual.clone(memory_format=torch.contiguous_format)
        if kernel := self._kernel(x, act, has_residual=residual is not None):
            is_fresh = out is None or not out.is_contiguous()
            result = kernel(x, norm, bias, act=act, residual=residual, out=None if is_fresh else out)
            return result if out is None or not is_fresh else out.copy_(result)
        if act is not None:
            result = act_and_mul(self._many(x, norm, bias), act)
            if residual is not None:
                return residual.add_(result)
        else:
            result = self._many(x, norm, bias, residual)
        return result if out is None else out.copy_(result)

    def logits(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        x = (x if self.order is None else ordered(x, self.order)).contiguous()
        if kernel := self._kernel(x, None, is_float=True):
            return kernel(x, None, bias, out_dtype=torch.float32)
        return self._many(x, None, bias, out_dtype=torch.float32)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        if self.kind.is_tiled:
            rows = look_up(ids, self.codes, self.parameters, self.scale, self.dtype, **self._how())
        else:
            assert self.scale is not None
            values = self.codes.view(torch.uint8)[ids].view(self.codes.dtype).float()
            scale = self.scale.t()[ids].repeat_interleave(self.k // len(self.scale), dim=1)
            rows = (values * scale).to(self.dtype)
        return rows if self.order is None else unordered(rows, self.order, self._num_inputs)

    def rows_of(self, part: int) -> torch.Tensor:
        rows = self.row_slice(part)
        return self.lookup(torch.arange(rows.start, rows.stop, device=self.codes.device))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("codes", "parameters", "scale", "order", "input_scale"):
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor

    @property
    def storage(self) -> tuple[Hashable, ...]:
        return *super().storage, self.kind

    def tuning_shape(self, **fused: Any) -> WeightShape:
        return WeightShape(self.n, self.k, **fused, max_tokens=1, kind=self.kind)

    def transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name, tensor in list(self.tensors()):
            setattr(self, name, function(tensor))

    def place(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("a packed weight is replaced by another one, not filled again")

    def _kernel(
        self, x: torch.Tensor, act: str | None, *, has_residual: bool = False, is_float: bool = False
    ) -> Callable[..., torch.Tensor] | None:
        """Return the fastest of our kernels for tokens x with their fusions, or None if it is another way's turn.

        is_float: the result is float32.
        """
        num_tokens = len(x)
        if not num_tokens or x.dtype != self.dtype or x.dtype.itemsize != 2:
            return None
        if fits_some(self.kind, self.n, act, num_tokens, x.device):
            return self.some
        many = self.many if fits_many(self.kind, self.n, act, x.device) else None
        is_plain = not has_residual and not is_float
        most_few, most_many = self._limits(x.device, has_many=many is not None, is_plain=is_plain)
        may_be_few = num_tokens <= most_few and (act is None or self.n % (2 * TILE) == 0)
        if may_be_few and can_multiply_few(x.device) and fits_few(self.kind, self.n, num_tokens, self.k, x.device):
            return self.few
        return many if num_tokens <= most_many else None

    def _limits(self, device: torch.device, *, has_many: bool, is_plain: bool) -> tuple[int, int]:
        """Return up to how many tokens `quantized_few` is the fastest, and `quantized_many`.

        is_plain: the result is 16 bits wide, and no residual is added.
        """
        has_gemm = self.form.inputs is not None and not self.kind.is_tiled and _has_units(self.form.code, device)
        if has_many:
            most_few = FEW_DECODED_TOKENS if self.kind.is_tiled else 1
            if has_blocks(self.kind):
                return most_few, ANY_NUMBER
            if has_gemm:
                has_library = is_plain and takes_codes(self.codes, self.dtype)
                return most_few, PLAIN_TOKENS if has_library else DIRECT_TOKENS
            return most_few, DECODED_TOKENS
        if has_gemm:
            return FEW_TOKENS if not self.form.input_group else 2 * FEW_TOKENS, 0
        return MAX_TOKENS, 0

    def few(
        self, x: torch.Tensor, norm: Norm | None, bias: torch.Tensor | None, *, act: str | None = None, **options: Any
    ) -> torch.Tensor:
        self._prepare(act, x.device)
        x_scale = self.input_scale
        if len(x) == 1 and norm is not None and norm.is_rms:
            options |= {"norm_weight": norm.weight, "eps": norm.eps}
        elif len(x) > 1 and self.form.inputs is not None:
            x, x_scale = self._rounded(x, norm, self.kind.input_dtype)
        elif norm is not None:
            x = norm(x)
        options |= {"x_scale": x_scale, "bias": bias, "act": act}
        return multiply_few(self.kind, x, self.codes, self.parameters, self.scale, self.n, **options)

    def some(
        self, x: torch.Tensor, norm: Norm | None, bias: torch.Tensor | None, *, act: str | None = None, **options: Any
    ) -> torch.Tensor:
        self._prepare(act, x.device)
        if self.form.inputs is not None:
            x, options["x_scale"] = self._rounded(x, norm, self.kind.input_dtype)
        elif norm is not None:
            x = norm(x)
        options |= {"bias": bias, "act": act}
        return multiply_some(self.kind, x, self.codes, self.parameters, self.scale, self.n, **options)

    def many(
        self, x: torch.Tensor, norm: Norm | None, bias: torch.Tensor | None, *, act: str | None = None, **options: Any
    ) -> torch.Tensor:
        self._prepare(act, x.device)
        if self.form.inputs is not None:
            dtype = self.kind.input_dtype if self.kind.is_tiled else self.codes.dtype
            x, options["x_scale"] = self._rounded(x, norm, dtype, is_by_group=has_blocks(self.kind))
        elif norm is not None:
            x = norm(x)
        options |= {"bias": bias, "act": act}
        return multiply_many(self.kind, x, self.codes, self.parameters, self.scale, self.n, **options)

    def _prepare(self, act: str | None, device: torch.device) -> None:
        """Compile what products may take, at the first one."""
        if self._is_prepared:
            return
        most_few, least_many = MAX_TOKENS, 1
        if fits_some(self.kind, self.n, act, SOME_TOKENS[-1], device):
            prepare_some(self.kind, self.n, self.k, act is not None, device)
            most_few, least_many = 1, SOME_TOKENS[-1] + 1
        prepare_few(self.kind, self.n, self.k, device, most_few)
        if fits_many(self.kind, self.n, None, device):
            prepare_many(self.kind, self.n, self.k, device, least_many)
        self._is_prepared = True

    def _many(
        self,
        x: torch.Tensor,
        norm: Norm | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return residual + norm(x) W^T + bias; it is `residual`, overwritten, if that is given."""
        if self.form.inputs is None:
            return self._sums(x if norm is None else norm(x), bias, residual, out_dtype or x.dtype)
        dtype = x.dtype if out_dtype is None else out_dtype
        if not self.kind.is_tiled and _has_units(self.form.code, x.device):
            assert self.scale is not None
            codes, x_scale = self._rounded(x, norm, self.codes.dtype)
            if can_scaled_mm(codes, self.codes, self.scale, dtype, bias=bias, residual=residual):
                return scaled_mm(codes, x_scale, self.codes, self.scale, bias=bias, residual=residual)
            return gemm_8bit(codes, x_scale, self.codes, self.scale, dtype, bias=bias, residual=residual)
        wide, x_scale = self._rounded(x, norm, torch.float32)
        values = (wide.unflatten(1, (x_scale.shape[1], -1)) * x_scale[:, :, None]).flatten(1).to(x.dtype)
        return self._sums(values, bias, residual, dtype)

    def _rounded(
        self, x: torch.Tensor, norm: Norm | None, dtype: torch.dtype, **fused: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (norm(x) rounded to the inputs' bits, as numbers of `dtype`, and its scales [T, groups])."""
        form = self.form
        if norm is not None and norm.is_rms:
            fused |= {"norm_weight": norm.weight, "eps": norm.eps}
        elif norm is not None:
            x = norm(x)
        assert form.inputs is not None
        return round_inputs(x, dtype, to=form.inputs, group=form.input_group, known_scale=self.input_scale, **fused)

    def _sums(
        self, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """Return residual + x W^T + bias, a panel of W at a time dequantized to x's dtype."""
        if residual is None:
            result = torch.empty(len(x), self.n, dtype=out_dtype, device=x.device)
        else:
            result = residual
        size = max(1, PANEL_BYTES // (TILE * self.k * x.element_size())) * TILE
        panel = torch.empty(min(size, self.n), self.k, dtype=x.dtype, device=x.device)
        for start in range(0, self.n, size):
            columns = result[:, start : start + size]
            weight = self._dequantized(start, panel[: columns.shape[1]])
            if residual is not None:
                torch.addmm(columns, x, weight.t(), out=columns)
            elif out_dtype != x.dtype:
                columns.copy_(torch.mm(x, weight.t(), out_dtype=out_dtype))
            else:
                torch.mm(x, weight.t(), out=columns)
        return result if bias is None else result.add_(bias)

    def _dequantized(self, start: int, panel: torch.Tensor) -> torch.Tensor:
        """Write rows from `start` on to `panel` [rows, k], inputs in the order of the codes, and return it."""
        if fits_rows(self.kind, panel.device) and panel.dtype == self.dtype:
            return write_rows(self.kind, self.codes, self.parameters, self.scale, self.n, panel, start // TILE)
        if self.kind.is_tiled:
            return dequantize_tiles(self.codes, self.parameters, self.scale, panel, start // TILE, **self._how())
        assert self.scale is not None
        rows = slice(start, start + len(panel))
        values = self.codes[rows].float().unflatten(1, (len(self.scale), -1))
        return panel.copy_((values * self.scale.t()[rows, :, None]).flatten(1))

    def _how(self) -> dict[str, Any]:
        table = None if self.form.table is None else _table(self.form.table, self.codes.device)
        return {"group_size": self.kind.group_size, "offset": self._offset_name, "table": table}


def can_tile(plain: Coded) -> bool:
    """Return whether the kernels here take a weight."""
    form, k = plain.form, plain.k
    group = form.group_size_of(k)
    fits_groups = group == k or group % CHUNK == 0 or (_is_tiled(plain) and group in (16, 32))
    if k % CHUNK or not fits_groups:
        return False
    if form.inputs is None:
        return True
    has_offset = form.has_zero or form.has_minimum
    if form.input_group and not (form.input_group == group == 128 and not _is_tiled(plain)):
        return False
    return plain.n % TILE == 0 and not has_offset and k % group == 0


def _is_tiled(plain: Coded) -> bool:
    """Return whether codes go into tiles: not those that are multiplied by 8-bit inputs as they are."""
    return plain.form.code == "int4" or plain.form.inputs is None


def _parameter_dtype(scale: torch.Tensor, offset: torch.Tensor | None, group_size: int) -> torch.dtype:
    """Return the dtype of scales and offsets in tiles, which are read as often as the codes."""
    dtype = scale.dtype
    if offset is not None and offset.dtype != torch.uint8:
        dtype = torch.promote_types(dtype, offset.dtype)
    if dtype == torch.float32 and group_size < 128 and float(scale.abs().max()) < torch.finfo(torch.float16).max:
        return torch.float16  # a twentieth of a code's rounding at most
    return dtype


def _has_units(code: str, device: torch.device) -> bool:
    """Return whether Triton multiplies the codes on the device's tensor cores; int8 on Turing's it does not."""
    return has_e4m3(device) if code == "fp8" else card_of(device).capability >= OLDEST_INT8


@functools.cache
def _table(name: str, device: torch.device) -> torch.Tensor:
    return torch.tensor(TABLES[name], dtype=torch.float32, device=device)
