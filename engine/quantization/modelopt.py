"""Checkpoints of NVIDIA's ModelOpt: FP8 and NVFP4."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from engine.errors import ModelError
from engine.quantization.floats import NVFP4_GROUP, stored_fp8, stored_mxfp4, stored_mxfp8, stored_nvfp4
from engine.quantization.fp8 import SCALES
from engine.quantization.modules import Modules
from engine.quantization.packed import ByModule, Stored, entry, objects

BLOCK = (128, 128)
# What inputs are rounded to differs: here those of 4-bit weights are not rounded, which is more exact.
ALGORITHMS: dict[str, Callable[[int], Stored]] = {
    "FP8": lambda _: stored_fp8(has_input_scale=True),
    "FP8_PER_CHANNEL_PER_TOKEN": lambda _: stored_fp8(),
    "FP8_PB_WO": lambda _: stored_fp8(scales=SCALES, block=BLOCK, rounds_inputs=False),
    "FP8_BLOCK_SCALES": lambda _: stored_fp8(scales=SCALES, block=BLOCK),
    "MXFP8": lambda _: stored_mxfp8(),
    "MXFP4": lambda _: stored_mxfp4("weight"),
    "W4A8_MXFP4_FP8": lambda _: stored_mxfp4("weight"),
    **dict.fromkeys(
        ("NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8"),
        lambda group_size: stored_nvfp4("weight", "weight_scale_2", divides=False, group_size=group_size),
    ),
}
"""Algorithm -> how it stores a module, given the inputs that share a scale of NVFP4."""
GROUPS = {"W4A8_NVFP4_FP8": 32}  # unless the configuration says how many
MIXED, NOTHING = "MIXED_PRECISION", ("", "NONE", "UNQUANTIZED")


class ModelOpt(ByModule):
    """One algorithm for all modules, or `quantized_layers`, which names one for each or for all within one."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Read config.json's `quantization_config`, or `quantization` of hf_quant_config.json.

        `ModelError` for an algorithm that is not supported.
        """
        super().__init__()
        excluded = raw.get("exclude_modules") or raw.get("ignore")
        self.excluded = Modules(excluded, "exclude_modules")
        is_mixed = str(raw.get("quant_algo")).upper() == MIXED
        self.everywhere = None if is_mixed else _stored(raw)
        layers = objects(raw, "quantized_layers") if is_mixed else {}
        self.layers = {name: _stored(layer) for name, layer in layers.items()}

    def find(self, names: Collection[str]) -> Stored | None:
        if names in self.excluded:
            return None
        for name in names:
            while name:
                if name in self.layers:
                    return self.layers[name]
                name = name.rpartition(".")[0]
        return self.everywhere


def _stored(raw: Mapping[str, Any]) -> Stored | None:
    """Return how modules are stored, None if as plain numbers. `ModelError` for what is not supported."""
    algorithm = str(raw.get("quant_algo") or "").upper()
    if algorithm in NOTHING:
        return None
    if algorithm not in ALGORITHMS:
        raise ModelError(f"ModelOpt's {algorithm} is not supported, only {', '.join(ALGORITHMS)}")
    return ALGORITHMS[algorithm](entry(raw, "group_size", int, GROUPS.get(algorithm, NVFP4_GROUP)))
