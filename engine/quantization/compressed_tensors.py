"""Checkpoints of compressed-tensors, as llm-compressor writes them: groups of modules, each in a format of its own."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.errors import ModelError
from engine.quantization import With
from engine.quantization.bits import codes_of, pack_signed, turned, unsigned_zeros, zeros_of
from engine.quantization.floats import (
    MX_GROUP,
    NOT_OF_WEIGHTS,
    row_scales,
    stored_fp8,
    stored_mxfp4,
    stored_mxfp8,
    stored_nvfp4,
)
from engine.quantization.fp8 import checked_block
from engine.quantization.modules import Modules
from engine.quantization.packed import ByModule, Stored, entry, objects
from kernels.quantized import Format
from kernels.weights import ShapeError

CLASSES = ("Linear",)  # of modules, that a group may name in place of these
PACKED, PLAIN = "pack-quantized", "int-quantized"
# Of integers. The others are of a whole file, some of whose modules have a byte for each.
LAYOUTS = (PACKED, PLAIN, "naive-quantized", "float-quantized", "mixed-precision", "dense", "")


@dataclass(frozen=True)
class Group:
    """Modules that are stored alike."""

    modules: Modules
    is_of_class: bool  # all that no other group names
    stored: Stored | None


class CompressedTensors(ByModule):
    """Weights of 2 to 8 bits; 8-bit and 4-bit floats; int8 and fp8 inputs."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Read config.json's `quantization_config`. `ModelError` for what is not supported."""
        super().__init__()
        if raw.get("transform_config"):
            raise ModelError("compressed-tensors' transforms (transform_config: QuIP, SpinQuant) are not supported; "
                             "the same recipe without them is")  # fmt: skip
        sparsity = str(entry(raw, "sparsity_config", dict, {}).get("format") or "dense")
        if sparsity != "dense":
            raise ModelError(f"compressed-tensors' sparse weights ({sparsity}) are not supported; save them dense")
        self.ignored = Modules(raw.get("ignore"), "ignore")
        self.groups = [
            _read_group(name, group, str(raw.get("format") or ""))
            for name, group in objects(raw, "config_groups").items()
        ]

    def find(self, names: Collection[str]) -> Stored | None:
        if names in self.ignored:
            return None
        for group in self.groups:
            if names in group.modules:
                return group.stored
        return next((group.stored for group in self.groups if group.is_of_class), None)


def _read_group(name: str, raw: Mapping[str, Any], format_of_all: str) -> Group:
    targets = entry(raw, "targets", list, [])
    modules = Modules([target for target in targets if target not in CLASSES], f"{name}.targets")
    weights, inputs = entry(raw, "weights", dict, {}), entry(raw, "input_activations", dict, {})
    stored = _stored(weights, inputs, str(raw.get("format") or format_of_all)) if weights else None
    return Group(modules, any(target in CLASSES for target in targets), stored)


def _stored(weights: Mapping[str, Any], inputs: Mapping[str, Any], layout: str) -> Stored:
    """Return how weights are stored. `ModelError` for what is not supported."""
    bits, kind = entry(weights, "num_bits", int, 8), entry(weights, "type", str, "int")
    group_size = max(entry(weights, "group_size", int, 0), 0)
    if kind == "float" and bits == 4:
        if group_size == MX_GROUP:
            return stored_mxfp4("weight_packed")
        return stored_nvfp4("weight_packed", "weight_global_scale", divides=True)
    if kind == "float" and bits == 8:
        if group_size == MX_GROUP:
            return stored_mxfp8()
        if group_size:
            raise ModelError(f"fp8 weights in groups of {group_size} inputs are not supported; blocks of 128 x 128 are")
        block = checked_block(weights.get("block_structure"), "block_structure")
        rounds = _rounding(inputs, "float") is not None
        return stored_fp8(block=block, rounds_inputs=rounds, has_input_scale=inputs.get("dynamic") is False)
    if layout not in LAYOUTS and kind == "int":
        raise ModelError(f"compressed-tensors' format {layout!r} of integers is not supported, only "
                         f"{PACKED} and {PLAIN}: save them so")  # fmt: skip
    if kind == "int" and 2 <= bits <= 8:
        return (_packed if layout == PACKED else _plain)(bits, group_size, weights, inputs)
    raise ModelError(f"compressed-tensors' weights of {bits} bits, type {kind}, are not supported, only int of 2 to 8 "
                     "bits and float of 4 or 8")  # fmt: skip


def _rounding(inputs: Mapping[str, Any], kind: str) -> str | None:
    """Return what products round inputs to: what the weights are, int8 or fp8, or nothing, which is more exact."""
    is_alike = inputs.get("num_bits") == 8 and inputs.get("type") == kind and entry(inputs, "symmetric", bool, True)
    if not is_alike:
        return None
    return "fp8" if kind == "float" else "int8"


def _packed(bits: int, group_size: int, weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> Stored:
    """Return how values are stored that were packed into words along the inputs; zeros along the outputs."""
    has_zero, has_order = not entry(weights, "symmetric", bool, True), weights.get("actorder") in ("group", True)

    def codes(words: torch.Tensor, shape: torch.Tensor | None) -> torch.Tensor:
        found = codes_of(words, bits, has_zero=has_zero)
        return found if shape is None else found[:, : size_of(shape)[1] // (2 if bits <= 4 else 1)]

    def zeros(words: torch.Tensor, shape: torch.Tensor | None) -> torch.Tensor:
        found = zeros_of(turned(words), bits).t()
        return found if shape is None else found[: size_of(shape)[0]]

    form = Format(
        "int4" if bits <= 4 else "int8",
        group_size,
        has_zero=has_zero,
        scale_dtype=torch.float16 if group_size else torch.float32,
        inputs=_rounding(inputs, "int") if bits == 8 else None,
        has_order=has_order,
    )
    return Stored(
        form,
        {
            "weight_packed": ("codes", With(("weight_shape",), codes, optional=True)),
            "weight_scale": ("scale", row_scales),
            "weight_zero_point": ("zero", With(("weight_shape",), zeros, optional=True)) if has_zero else None,
            "weight_g_idx": ("order",) if has_order else None,
            "weight_shape": None,
            **NOT_OF_WEIGHTS,
        },
    )


def size_of(shape: torch.Tensor) -> tuple[int, int]:
    """Return the rows and columns that a `weight_shape` says."""
    if shape.shape != (2,) or shape.is_floating_point():
        raise ShapeError(f"needs a weight_shape of two whole numbers, and that is of {shape.dtype} {list(shape.shape)}")
    rows, columns = shape.tolist()
    return rows, columns


def _plain(bits: int, group_size: int, weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> Stored:
    """Return how values are stored that have a byte each; of those that need no more, half of one is kept."""
    has_zero, rounding = not entry(weights, "symmetric", bool, True), _rounding(inputs, "int") if bits == 8 else None
    has_input_scale = rounding is not None and inputs.get("dynamic") is False
    form = Format(
        "int8" if bits > 4 else "int4",
        group_size,
        has_zero=has_zero,
        scale_dtype=torch.float16 if group_size else torch.float32,
        inputs=rounding,
        has_input_scale=has_input_scale,
    )

    def codes(values: torch.Tensor) -> torch.Tensor:
        return pack_signed(values) if bits <= 4 and values.dtype == torch.int8 else values

    def zeros(values: torch.Tensor) -> torch.Tensor:
        return values.half() if bits > 4 else unsigned_zeros(values)

    return Stored(
        form,
        {
            "weight": ("weight", codes),
            "weight_scale": ("scale", row_scales),
            "weight_zero_point": ("zero", zeros) if has_zero else None,
            **NOT_OF_WEIGHTS,
            "input_scale": ("input_scale",) if has_input_scale else None,
        },
    )
