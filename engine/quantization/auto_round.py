"""Checkpoints of auto-round (Cheng et al. 2023): integers packed as GPTQ's or AWQ's, and 8-bit and 4-bit floats."""

from collections.abc import Collection, Mapping
from typing import Any

from engine.errors import ModelError
from engine.quantization.awq import stored_awq
from engine.quantization.floats import stored_fp8, stored_mxfp4, stored_mxfp8, stored_nvfp4
from engine.quantization.fp8 import SCALES, checked_block
from engine.quantization.gptq import Options, stored_gptq
from engine.quantization.modules import own_names, regular_expression
from engine.quantization.packed import ByModule, Stored, entry, is_head, objects

PLAIN_BITS = 16  # as many or more: the module is not quantized
OWN_PACKING = "auto_round"  # that of GPTQ's second version, as is that which is named after GPTQModel


class AutoRound(ByModule):
    """Integers of `packing_format` auto_round, auto_round:auto_gptq or auto_round:auto_awq; FP8, MXFP and NVFP4."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Read config.json's `quantization_config`. `ModelError` for what is not supported."""
        super().__init__()
        self.raw = raw
        self.extra = [
            (name, regular_expression(name, "extra_config"), overrides)
            for name, overrides in objects(raw, "extra_config").items()
        ]
        self.find({"model.layers.0.mlp.up_proj"})  # what is not supported is said at once

    def find(self, names: Collection[str]) -> Stored | None:
        extra = next(
            (
                overrides
                for name, pattern, overrides in self.extra
                if name in names or any(pattern.fullmatch(spelling) for spelling in own_names(names))
            ),
            None,
        )
        raw = {**self.raw, **(extra or {})}
        if extra is None and is_head(names):
            return None
        if isinstance(bits := raw.get("bits"), int) and bits >= PLAIN_BITS:
            return None
        return stored_integers(raw) if entry(raw, "data_type", str, "int") == "int" else stored_floats(raw)


def stored_integers(raw: Mapping[str, Any]) -> Stored:
    """Return how integers are stored. raw: the settings of a module. `ModelError` for what is not supported."""
    packing = str(raw.get("packing_format") or raw.get("backend") or "auto_round:auto_gptq").lower()
    if packing != OWN_PACKING and "gptq" not in packing and "awq" not in packing:
        raise ModelError(f"auto-round's packing_format {packing!r} of integers is not supported, only auto_round, "
                         "auto_gptq and auto_awq")  # fmt: skip
    zero_offset = 0 if packing == OWN_PACKING or "gptqmodel" in packing else 1
    options = Options(zero_offset=zero_offset).overridden(
        {name: raw.get(name) for name in ("bits", "group_size", "sym")}
    )
    if "awq" not in packing:
        return stored_gptq(options)
    if options.bits != 4:
        raise ModelError(f"auto-round packed as AWQ's has 4 bits, not {options.bits}")
    return stored_awq(options.group_size)


def stored_floats(raw: Mapping[str, Any]) -> Stored:
    """Return how floats are stored, as compressed-tensors or DeepSeek do. See `stored_integers`."""
    kind, bits = str(raw.get("data_type")), raw.get("bits")
    if kind.startswith("mx_fp") and bits == 4:
        return stored_mxfp4("weight_packed")
    if kind.startswith("mx_fp") and bits == 8:
        return stored_mxfp8()
    if kind.startswith("nv_fp") and bits == 4:
        return stored_nvfp4("weight_packed", "weight_global_scale", divides=True)
    if not kind.startswith("fp") or bits != 8:
        raise ModelError(f"auto-round's data_type {kind!r} of {bits} bits is not supported, only int of 2, 3, 4 and 8, "
                         "fp of 8, mx_fp of 4 and 8, and nv_fp of 4")  # fmt: skip
    rounds_inputs = raw.get("act_bits") == 8
    return stored_fp8(
        scales=SCALES,
        block=checked_block(raw.get("weight_block_size"), "weight_block_size"),
        rounds_inputs=rounds_inputs,
        has_input_scale=rounds_inputs and raw.get("act_dynamic") is False,
    )
