"""Checkpoints of AMD's Quark: FP8, int8 and MXFP4."""

from collections.abc import Collection, Mapping
from typing import Any

from engine.errors import ModelError
from engine.quantization.floats import MX_GROUP, NOT_OF_WEIGHTS, row_scales, stored_fp8, stored_mxfp4
from engine.quantization.modules import Modules
from engine.quantization.packed import ByModule, Stored, entry, objects
from kernels.quantized import Format

FP8, INT8, FP4 = ("fp8_e4m3", "fp8"), ("int8",), ("fp4",)
ROWS = ("per_tensor", "per_channel")


class Quark(ByModule):
    """`global_quant_config`, and `layer_quant_config` with others for modules that a name or a pattern means."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Read config.json's `quantization_config`. `ModelError` for what is not supported."""
        super().__init__()
        self.excluded = Modules(raw.get("exclude"), "exclude")
        self.everywhere = _stored(entry(raw, "global_quant_config", dict, {}))
        self.layers = [
            (Modules(name, "layer_quant_config"), _stored(layer))
            for name, layer in objects(raw, "layer_quant_config").items()
        ]

    def find(self, names: Collection[str]) -> Stored | None:
        if names in self.excluded:
            return None
        return next((stored for modules, stored in self.layers if names in modules), self.everywhere)


def _stored(raw: Mapping[str, Any]) -> Stored | None:
    """Return how weights are stored, None if they are not quantized. `ModelError` for what is not supported."""
    weights, inputs = entry(raw, "weight", dict, {}), entry(raw, "input_tensors", dict, {})
    if not weights:
        return None
    kind, scheme = str(weights.get("dtype")), str(weights.get("qscheme"))
    is_static = bool(inputs) and not inputs.get("is_dynamic")
    if kind in FP8 and scheme in ROWS:
        return stored_fp8(rounds_inputs=inputs.get("dtype") in FP8, has_input_scale=is_static)
    if kind in INT8 and scheme in ROWS and weights.get("symmetric", True):
        rounding = "int8" if inputs.get("dtype") in INT8 and inputs.get("symmetric", True) else None
        form = Format("int8", inputs=rounding, has_input_scale=rounding is not None and is_static)
        return Stored(
            form,
            {
                "weight": ("weight",),
                "weight_scale": ("scale", row_scales),
                "weight_zero_point": None,
                **NOT_OF_WEIGHTS,
                "input_scale": ("input_scale",) if form.has_input_scale else None,
            },
        )
    if kind in FP4 and scheme == "per_group" and weights.get("group_size") == MX_GROUP:
        return stored_mxfp4("weight")
    raise ModelError(f"Quark's {kind} {scheme} is not supported, only fp8_e4m3 and int8 per_tensor or per_channel, "
                     f"and fp4 per_group of {MX_GROUP}")  # fmt: skip
