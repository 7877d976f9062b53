"""Checkpoints of torchao, as it writes safetensors: integers a byte each, two of 4 bits a byte, and FP8."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from engine.errors import ModelError, shown
from engine.quantization import CHECKED, Scheme, With
from engine.quantization.bits import check_floats, pack_signed, turned, turned_scales, unsigned_zeros
from engine.quantization.floats import row_scales, stored_fp8
from engine.quantization.modules import Modules
from engine.quantization.packed import ByModule, Stored, entry, is_head, objects
from kernels.quantized import INT4_ZERO, Format
from kernels.weights import ShapeError

CODES, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
BLOCK = (128, 128)
DEFAULT = "_default"  # in a list of modules: of all that it does not name


class TorchAO(ByModule):
    """One configuration for all modules, or one for each name or pattern of names."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Read config.json's `quantization_config`. `ModelError` for what is not supported."""
        super().__init__()
        kinds = raw.get("quant_type")
        if not isinstance(kinds, dict):
            raise ModelError(
                f"torchao's quant_type {shown(kinds)} is of a release that wrote pickled tensors, which are not read: "
                "write the checkpoint again with a later one"
            )
        kind, settings = _named(kinds.get("default"), "quant_type, default")
        modules = {DEFAULT: kinds["default"]}
        if kind in ("FqnToConfig", "ModuleFqnToConfig"):
            modules = {**objects(settings, "module_fqn_to_config"), **objects(settings, "fqn_to_config")}
        self.excluded = Modules(raw.get("modules_to_not_convert"), "modules_to_not_convert")
        self.has_ends = entry(raw, "include_input_output_embeddings", bool, False)
        stored = {name: read_stored(config) if config else None for name, config in modules.items()}
        self.everywhere = stored.pop(DEFAULT, None)
        self.named = [(Modules(name.removesuffix(".weight"), "fqn_to_config"), one) for name, one in stored.items()]

    def find(self, names: Collection[str]) -> Stored | None:
        for modules, stored in self.named:
            if names in modules:
                return stored
        is_kept = names in self.excluded or (is_head(names) and not self.has_ends)
        return None if is_kept else self.everywhere

    def scheme_of_embedding(self, module: str) -> Scheme:
        is_named = any({module} in modules for modules, _ in self.named)
        return self.scheme_of(module) if is_named or self.has_ends else super().scheme_of_embedding(module)


def _named(value: Any, what: str) -> tuple[str, Mapping[str, Any]]:
    """Return the class and the settings of an object as torchao writes it."""
    if not isinstance(value, dict) or not isinstance(value.get("_type"), str):
        raise ModelError(f"quantization_config: {what} must be an object with _type and _data, got {shown(value)}")
    return value["_type"], entry(value, "_data", dict, {})


def read_stored(config: Any) -> Stored:
    """Return how a module is stored. `ModelError` for what is not supported."""
    kind, settings = _named(config, "quant_type")
    if kind not in KINDS:
        raise ModelError(f"torchao's {kind} is not supported, only {', '.join(KINDS)}")
    return KINDS[kind](settings)


def _granularity(settings: Mapping[str, Any], *names: str) -> tuple[str, int]:
    """Return what shares a scale of a weight, and of how many inputs a group is, 0 if not of a group."""
    value = next((settings[name] for name in names if settings.get(name) is not None), {"_type": "PerRow"})
    of_inputs_and_weights = value if isinstance(value, list) and value else [value]
    kind, found = _named(of_inputs_and_weights[-1], names[0])
    return kind, entry(found, "group_size", int, 0)


def _named_value(settings: Mapping[str, Any], *names: str) -> str:
    """Return an entry of a dtype or of an enumeration, "" if there is none."""
    value = next((settings[name] for name in names if settings.get(name) is not None), None)
    return str(value.get("_data")) if isinstance(value, dict) else ""


def _integers(settings: Mapping[str, Any], *, inputs: str | None = None) -> Stored:
    """Return how integers are stored that have a byte each; of those that need no more, half of one is kept."""
    dtype = _named_value(settings, "weight_dtype") or "int8"
    bits = int(dtype[3:]) if dtype[:3] == "int" and dtype[3:].isdecimal() else 0
    kind, group_size = _granularity(settings, "granularity", "weight_granularity")
    if not 1 <= bits <= 8 or kind == "PerBlock":
        raise ModelError(f"torchao's weights of dtype {dtype!r}, {kind}, are not supported, only int1 to int8 by row, "
                         "group or tensor")  # fmt: skip
    is_int4, has_zero = bits <= 4, _named_value(settings, "mapping_type", "weight_mapping_type") == "ASYMMETRIC"
    form = Format(
        "int4" if is_int4 else "int8",
        group_size,
        has_zero=has_zero,
        scale_dtype=torch.float16 if group_size else torch.float32,
        inputs=inputs,
    )

    def codes(values: torch.Tensor) -> torch.Tensor:
        return pack_signed(values) if is_int4 else values

    def zeros(values: torch.Tensor) -> torch.Tensor:
        return unsigned_zeros(values) if is_int4 else values.half()

    of_zero = ("zero", zeros) if has_zero else (CHECKED, _all_zero)
    return Stored(form, {CODES: ("codes", codes), SCALE: ("scale", row_scales), ZERO: of_zero})


def _all_zero(zeros: torch.Tensor) -> torch.Tensor:
    if zeros.any():
        raise ShapeError("is not zero, which a symmetric mapping says it is")
    return zeros


def _rounded_integers(settings: Mapping[str, Any]) -> Stored:
    return _integers(settings, inputs="int8")


def _pairs(settings: Mapping[str, Any]) -> Stored:
    """Return how 4-bit integers are stored, two a byte, with scales and numbers that are added, [groups, outputs]."""
    layout = _named_value(settings, "int4_packing_format") or str(settings.get("int4_packing_format", "plain"))
    if layout.lower() != "plain":
        raise ModelError(f"torchao's int4_packing_format {layout!r} is a device's own and is not supported, only plain")

    def codes(pairs: torch.Tensor) -> torch.Tensor:
        if pairs.dtype not in (torch.int8, torch.uint8):
            raise ShapeError(f"is of {pairs.dtype}, the format's pairs are bytes")
        return pairs.view(torch.uint8) ^ 0x88  # of numbers from -8 on

    def minimum(added: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        check_floats(added)
        if added.shape != scale.shape:
            raise ShapeError(f"has shape {list(added.shape)}, and the scales beside it {list(scale.shape)}")
        return turned(INT4_ZERO * scale.to(added.device).float() - added.float())

    form = Format("int4", entry(settings, "group_size", int, 128), has_minimum=True)
    scale = ("scale", turned_scales)
    return Stored(form, {CODES: ("codes", codes), SCALE: scale, ZERO: ("minimum", With((SCALE,), minimum))})


def _fp8(settings: Mapping[str, Any], *, rounds_inputs: bool = False) -> Stored:
    kind, _ = _granularity(settings, "granularity")
    if (dtype := _named_value(settings, "weight_dtype") or "float8_e4m3fn") != "float8_e4m3fn":
        raise ModelError(f"torchao's weights of dtype {dtype!r} are not supported, only float8_e4m3fn")
    block = BLOCK if kind == "PerBlock" else None
    return stored_fp8(weight=CODES, scales=(SCALE,), block=block, rounds_inputs=rounds_inputs)


def _rounded_fp8(settings: Mapping[str, Any]) -> Stored:
    return _fp8(settings, rounds_inputs=True)


KINDS: dict[str, Callable[[Mapping[str, Any]], Stored]] = {
    "Int4WeightOnlyConfig": _pairs,
    "Int8WeightOnlyConfig": _integers,
    "Int8DynamicActivationInt8WeightConfig": _rounded_integers,
    "IntxWeightOnlyConfig": _integers,
    # Which rounds inputs with zeros of their own: here they are not rounded, which is more exact.
    "Int8DynamicActivationIntxWeightConfig": _integers,
    "Float8WeightOnlyConfig": _fp8,
    "Float8DynamicActivationFloat8WeightConfig": _rounded_fp8,
}
