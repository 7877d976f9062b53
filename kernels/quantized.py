"""Weights of few bits: codes, scales of groups of inputs, and what is subtracted before and after scaling.

One layout serves every format of integers, of 4-bit tables and of 8-bit floats:

    W[n, k] = (value(codes[n, k]) - zero[n, g]) * scale[n, g] - minimum[n, g],  g = k // group_size

`QuantizedWeight` is that definition, on any device and a panel of rows at a time. Devices have kernels of their own,
into whose layout `pack` takes it.
"""

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from kernels.quantized_format import (
    FP8,
    FP8_MAX,
    INT4_ZERO,
    PANEL_ELEMENTS,
    TABLES,
    Format,
    ordered,
    pack_int4,
    unordered,
    unpack_codes,
)
from kernels.weights import WHOLE, Norm, Part, ShapeError, Shard, Weight, finished, match_shards

__all__ = ("FP8", "FP8_MAX", "INT4_ZERO", "TABLES", "Format", "QuantizedWeight", "dequantize", "pack_int4",
           "quantize_inputs", "rounded_inputs", "unpack_codes")  # fmt: skip


CHECKED_ELEMENTS = 1 << 24  # at a time
REGROUPED = 32  # inputs of the groups in which a rank has its parts of a checkpoint's, in an order of their own


class QuantizedWeight(Weight):
    """A matrix [n, k] as codes.

    codes: [n, k / codes_per_byte]. scale, and zero and minimum or None: [n, G]. order: int64 [k] or None, the input
    that stands at each place of the codes; a checkpoint's has the group of each input, until it is settled.
    input_scale: float32 [1] or None.

    A rank that has a slice of inputs in an order of their own has parts of all groups: then scale is [n, all G] until
    it is settled, when each part is filled up to whole groups of 32, and k has grown (`num_inputs` has not).
    """

    has_lookup = True
    has_files_groups = True  # scales are a file's, of groups of all inputs; not made of this rank's

    def __init__(
        self,
        parts: Sequence[Part],
        k: int,
        dtype: torch.dtype,
        form: Format,
        input_shard: Shard = WHOLE,
        names: Mapping[str, str] | None = None,
    ) -> None:
        """dtype: of products. names: what a checkpoint calls codes, scale, zero, ..., where it is not that.

        `ShapeError` if a group would be cut, by ranks or otherwise.
        """
        super().__init__(parts, k, input_shard)
        self.dtype, self.form, self.num_inputs = dtype, form, k
        num_inputs = k * input_shard.count
        group_size = form.group_size_of(num_inputs)
        self._has_all_groups = form.has_order and input_shard.count > 1
        is_cut = k % group_size and input_shard.count > 1 and group_size < num_inputs and not form.has_order
        if k % form.codes_per_byte or (is_cut and self.has_files_groups):
            raise ShapeError(f"has {k} inputs on each of {input_shard.count} ranks, no multiple of its groups of "
                             f"{max(group_size, form.codes_per_byte)}")  # fmt: skip
        num_groups = -(-num_inputs // group_size) if self._has_all_groups else -(-k // form.group_size_of(k))
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((self.n, k // form.codes_per_byte), form.code_dtype),
            "scale": ((self.n, num_groups), form.scale_dtype),
        }
        if form.has_zero:
            shapes["zero"] = (self.n, num_groups), torch.uint8 if form.code == "int4" else torch.float16
        if form.has_minimum:
            shapes["minimum"] = (self.n, num_groups), form.scale_dtype
        if form.has_order:
            shapes["order"] = (len(self.parts), k), torch.int64
        if form.has_input_scale:
            shapes["input_scale"] = (len(self.parts),), torch.float32
        self.fields = {
            field: torch.empty(shape, dtype=field_dtype, device="meta")
            for field, (shape, field_dtype) in shapes.items()
        }
        self._names = {field: field for field in shapes} | dict(names or {})

    @property
    def codes(self) -> torch.Tensor:
        return self.fields["codes"]

    @property
    def scale(self) -> torch.Tensor:
        return self.fields["scale"]

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
        result = self._sums(x, bias).to(x.dtype)
        return finished(result, act, residual, may_overwrite, out)

    def logits(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._sums(x, bias)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        rows = {field: tensor[ids] for field, tensor in self.fields.items()}
        return dequantize(self.form, rows).to(self.dtype)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for field, tensor in self.fields.items():
            yield self._names[field], tensor

    @property
    def storage(self) -> tuple[Hashable, ...]:
        return *super().storage, self.form

    def transform(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.fields = {field: function(tensor) for field, tensor in self.fields.items()}

    def place(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        field = next(field for field in self.fields if self._names[field] == name)
        tensor = self.fields[field]
        is_alike = tensor.is_floating_point() == loaded.is_floating_point()
        if not (loaded.dtype == tensor.dtype if field == "codes" else is_alike):
            raise ShapeError(f"is of {loaded.dtype}, the format's {field} are of {tensor.dtype}")
        if field == "input_scale":
            return match_shards(tensor[part : part + 1], loaded.reshape(-1), (WHOLE,))
        if field == "order":
            return match_shards(tensor[part], loaded, (self.input_shard,))
        shard, columns = self.parts[part].shard, self.input_shard
        target = tensor[self.row_slice(part)]
        if field != "codes":
            num_inputs = self.k * columns.count
            if self.form.group_size_of(num_inputs) == num_inputs:  # all of a row, on whatever ranks
                columns = WHOLE
                if loaded.numel() == max(loaded.shape, default=1):  # one for each row, in whatever dimension
                    loaded = loaded.reshape(-1, 1)
                if loaded.numel() == 1:
                    return target, loaded.expand_as(target)
            elif self._has_all_groups:
                columns = WHOLE
        return match_shards(target, loaded, (shard, columns))

    def rows_of(self, part: int) -> torch.Tensor:
        return self.dequantized(self.row_slice(part)).to(self.dtype)

    def sliced(self, rows: slice, parts: Sequence[Part]) -> "QuantizedWeight":
        """Return some of the rows, which are those of `parts`, as a weight of the same memory."""
        weight = QuantizedWeight(parts, self.k, self.dtype, self.form, self.input_shard, self._names)
        weight.fields = {
            field: self.fields[field][rows] if field in self._matrices() else self.fields[field]
            for field in self.fields
        }
        weight.num_inputs, weight._has_all_groups = self.num_inputs, self._has_all_groups
        return weight

    def dequantized(self, rows: slice = slice(None)) -> torch.Tensor:
        """Return rows as float32 [rows, k], inputs in the order of the model's."""
        values = dequantize(self.form, {field: self.fields[field][rows] for field in self._matrices()})
        if (order := self.fields.get("order")) is None or order.dim() > 1:
            return values
        return unordered(values, order, self.num_inputs)

    def decoded(self) -> torch.Tensor:
        """Return all rows in the dtype of products."""
        size = max(1, PANEL_ELEMENTS // self.k)
        panels = [self.dequantized(slice(i, i + size)).to(self.dtype) for i in range(0, self.n, size)]
        return torch.cat(panels)

    @property
    def meanings(self) -> torch.Tensor:
        """Numbers that 4-bit codes stand for before zeros and scales, float32 [16]."""
        return torch.tensor(TABLES[self.form.table] if self.form.table else range(16), dtype=torch.float32)

    def changed_inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return what meets the codes, in their order and rounded as the format says."""
        if (order := self.fields.get("order")) is not None:
            x = ordered(x, order)
        return x if self.form.inputs is None else rounded_inputs(x, self.form, self.fields.get("input_scale"))

    def fill_random(self, generator: torch.Generator) -> None:
        for field, tensor in self.fields.items():
            if field == "codes" and self.form.code == "fp8":
                for rows in tensor.split(max(1, PANEL_ELEMENTS // self.k)):
                    rows.copy_(torch.randn(rows.shape, generator=generator, device=rows.device))
            elif field == "codes":
                tensor.view(torch.uint8).random_(0, 256, generator=generator)
            elif field == "order":
                tensor.copy_(torch.arange(self.k, device=tensor.device) // self.form.group_size_of(self.k))
            else:
                tensor.fill_({"zero": self.form.offset or INT4_ZERO, "minimum": 0.0, "input_scale": 0.05}.get(field, 0))
        spread = {"int4": 4.6, "int8": 74.0, "fp8": 1.0}[self.form.code]
        if self.form.table is not None:
            spread = float(torch.tensor(TABLES[self.form.table], dtype=torch.float32).std())
        self.scale.fill_(0.02 / spread)

    def materialize(self, device: torch.device) -> None:
        super().materialize(device)
        if device.type == "cpu":
            from kernels.products_cpu import kernels_ahead

            kernels_ahead()

    def pack(self, *, for_logits: bool = False) -> Weight:
        """Return the weight in the layout of its device's kernels. `ShapeError` if its parts contradict each other."""
        self.settle()
        if self.codes.is_cpu:
            from kernels.quantized_cpu import pack_for_cpu

            return pack_for_cpu(self, for_logits=for_logits) or self
        if self.codes.is_cuda:
            from kernels.quantized_cuda import CudaQuantizedWeight, can_tile  # here: not every machine has triton

            if can_tile(self):
                return CudaQuantizedWeight(self)
        return self

    def settle(self) -> None:
        """Order codes by their groups, and take one input scale for all parts. `ShapeError` if numbers are none."""
        self._check_finite()
        if (order := self.fields.get("order")) is not None and order.dim() > 1:
            if not bool((order == order[0]).all()):
                raise ShapeError("has parts with different g_idx, which cannot be multiplied as one")
            if self._has_all_groups:
                self._regroup(order[0])
            else:
                self._sort(order[0])
        if (input_scale := self.fields.get("input_scale")) is not None:
            self.fields["input_scale"] = input_scale.max().reshape(1)

    def _check_finite(self) -> None:
        """Raise `ShapeError` if a scale or a code of FP8 is infinite or NaN: a broken file, whose answers are noise."""
        of_scales = [self.fields[name] for name in ("scale", "minimum", "input_scale") if name in self.fields]
        if not all(bool(tensor.isfinite().all()) for tensor in of_scales):
            raise ShapeError("has scales that are infinite or NaN")
        if self.form.code == "fp8":
            chunks = self.codes.view(torch.uint8).split(max(1, CHECKED_ELEMENTS // self.k))
            if bool(torch.stack([((chunk & 127) == 127).any() for chunk in chunks]).any()):
                raise ShapeError("has codes that are NaN")

    def _sort(self, groups: torch.Tensor) -> None:
        """Order codes by the group of each input."""
        places = torch.argsort(groups, stable=True)
        in_order = torch.arange(self.k, device=groups.device) // self.form.group_size_of(self.k)
        if not torch.equal(groups[places], in_order):
            raise ShapeError(f"has a g_idx whose groups are not all of {self.form.group_size_of(self.k)} inputs")
        values = unpack_codes(self.form, self.codes)[:, places]
        self.fields["codes"] = pack_int4(values) if self.form.code == "int4" else values
        self.fields["order"] = places

    def _regroup(self, groups: torch.Tensor) -> None:
        """Order codes by the group of each input; fill each up to whole groups of 32 by codes that meet zeros."""
        num_groups = self.scale.shape[1]
        if int(groups.min()) < 0 or int(groups.max()) >= num_groups:
            raise ShapeError(f"has a g_idx up to {int(groups.max())}, and scales of {num_groups} groups")
        counts = torch.bincount(groups, minlength=num_groups)
        units = -(-counts // REGROUPED)
        units[-1] += units.sum() % 2  # kernels take 64 inputs at once
        places = torch.argsort(groups, stable=True)
        moved = (REGROUPED * (units.cumsum(0) - units) - (counts.cumsum(0) - counts))[groups[places]]
        filled = places.new_full((REGROUPED * int(units.sum()),), self.num_inputs)
        filled[moved + torch.arange(len(places), device=places.device)] = places
        values = F.pad(unpack_codes(self.form, self.codes).view(torch.uint8), (0, 1))[:, filled]
        is_int4 = self.form.code == "int4"
        self.fields["codes"] = pack_int4(values) if is_int4 else values.view(self.codes.dtype)
        for field in ("scale", "zero", "minimum"):
            if field in self.fields:
                self.fields[field] = self.fields[field].repeat_interleave(units, dim=1)
        self.fields["order"], self.k = filled, len(filled)
        self.form, self._has_all_groups = replace(self.form, group_size=REGROUPED), False

    def _matrices(self) -> list[str]:
        return [field for field in self.fields if field not in ("order", "input_scale")]

    def _sums(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return x W^T + bias in float32, [T, k] -> [T, n]."""
        x = self.changed_inputs(x)
        wide, result = x.float(), x.new_empty(len(x), self.n, dtype=torch.float32)
        size = max(1, PANEL_ELEMENTS // self.k)
        for start in range(0, self.n, size):
            rows = slice(start, start + size)
            panel = dequantize(self.form, {field: self.fields[field][rows] for field in self._matrices()})
            result[:, rows] = wide @ panel.t()
        return result if bias is None else result.add_(bias)


@functools.cache
def _table(name: str, device: torch.device) -> torch.Tensor:
    """Return one of `TABLES`, on `device`. Once: nothing can be copied there while a CUDA graph is captured."""
    return torch.tensor(TABLES[name], dtype=torch.float32, device=device)


def dequantize(form: Format, fields: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return what codes [rows, ...] stand for: float32 [rows, k], inputs in the order of the codes."""
    codes = unpack_codes(form, fields["codes"])
    if form.table is not None:
        values = _table(form.table, codes.device)[codes.long()]
    else:
        values = codes.float()
    num_rows, k = values.shape
    group_size = form.group_size_of(k)
    is_cut = k % group_size != 0
    if is_cut:
        values = F.pad(values, (0, -k % group_size))
    values = values.view(num_rows, -1, group_size)
    if form.has_zero:
        values = values - fields["zero"][:, :, None].float()
    elif form.offset:
        values = values - form.offset
    values = values * fields["scale"][:, :, None].float()
    if form.has_minimum:
        values -= fields["minimum"][:, :, None].float()
    values = values.view(num_rows, -1)
    return values[:, :k] if is_cut else values


def quantize_inputs(x: torch.Tensor, form: Format, input_scale: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    """Return (codes [T, k], float32 scales [T, groups]) of a step's inputs x [T, k]; with a known scale, that one."""
    limit = FP8_MAX if form.inputs == "fp8" else 127.0
    k = x.shape[1]
    group = form.input_group or k
    wide = F.pad(x.float(), (0, -k % group)).unflatten(1, (-1, group))
    if input_scale is None:
        scale = wide.abs().amax(dim=2, keepdim=True).clamp_(min=1e-10) / limit
    else:
        scale = input_scale.reshape(1, 1, 1).expand(*wide.shape[:2], 1)
    scaled = (wide / scale).clamp_(-limit, limit)
    codes = scaled.to(FP8) if form.inputs == "fp8" else scaled.round_().to(torch.int8)
    return codes.flatten(1)[:, :k], scale[:, :, 0]


def rounded_inputs(x: torch.Tensor, form: Format, input_scale: torch.Tensor | None) -> torch.Tensor:
    """Return x [T, k] rounded as `quantize_inputs` does, as float32."""
    codes, scale = quantize_inputs(x, form, input_scale)
    of_inputs = scale.repeat_interleave(form.input_group or x.shape[1], 1)[:, : x.shape[1]]
    return codes.float() * of_inputs
