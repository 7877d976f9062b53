"""Checkpoints of NVIDIA's ModelOpt: FP8 and NVFP4."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from engine.errors import ModelError
from engine.quantization.floats import stored_fp8, stored_mxfp8, stored_nvfp4
from engine.quantization.modules import Modules
from engine.quantization.packed import ByModule, Stored, objects

ALGORITHMS: dict[str, Callable[[], Stored]] = {
    "FP8": lambda: stored_fp8(has_input_scale=True),
    "FP8_PER_CHANNEL_PER_TOKEN": stored_fp8,
    "FP8_PB_WO": lambda: stored_fp8(block=(128, 128), rounds_inputs=False),
    "MXFP8": stored_mxfp8,
    "NVFP4": lambda: stored_nvfp4("weight", "weight_scale_2", divides=False),
}
MIXED = "MIXED_PRECISION"


class ModelOpt(ByModule):
    """One algorithm for all modules, or `quantized_layers`, which names one for each."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Read config.json's `quantization_config`, or `quantization` of hf_quant_config.json.

        `ModelError` for an algorithm that is not supported.
        """
        super().__init__()
        excluded = raw.get("exclude_modules") or raw.get("ignore")
        self.excluded = Modules(excluded, "exclude_modules")
        algorithm = str(raw.get("quant_algo")).upper()
        self.everywhere = None if algorithm == MIXED else _stored(algorithm)
        layers = objects(raw, "quantized_layers") if algorithm == MIXED else {}
        self.layers = {name: _stored(str(layer.get("quant_algo")).upper()) for name, layer in layers.items()}

    def find(self, names: Collection[str]) -> Stored | None:
        if names in self.excluded:
            return None
        return next((self.layers[name] for name in names if name in self.layers), self.everywhere)


def _stored(algorithm: str) -> Stored:
    if algorithm not in ALGORITHMS:
        raise ModelError(f"ModelOpt's {algorithm} is not supported, only {', '.join(ALGORITHMS)}")
    return ALGORITHMS[algorithm]()
