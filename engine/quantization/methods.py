"""The method of a model's quantization, by its name in config.json or on the command line."""

from collections.abc import Mapping
from typing import Any

from engine.errors import ModelError
from engine.quantization import Quantization, Reader
from engine.quantization.awq import AWQ
from engine.quantization.online import FORMATS, Online

METHODS: dict[str, Reader] = {"awq": AWQ}
"""`quant_method` of a checkpoint -> what reads its `quantization_config`."""

NONE = (None, "", "none", "null")
# Flags that are named after a kernel, a library or one kind of a method -> the method, or the format of `FORMATS`.
ALIASES = {
    "awq_marlin": "awq",
    "gptq_marlin": "gptq",
    "marlin": "gptq",
    "w8a8_fp8": "fp8",
    "int8wo": "int8",
    "int8dq": "w8a8_int8",
    "int4wo": "int4",
    "int4wo-128": "int4",
    "fp8dq": "fp8",
    "fp8dq-per_row": "fp8",
    "fp8dq-per_tensor": "fp8",
}


def quantization_of(raw: Mapping[str, Any] | None, flag: str | None) -> Quantization:
    """Return how a model's weights are stored. `ModelError` if that is not supported, or contradicts the flag.

    raw: config.json's `quantization_config`. flag: `--quantization`.
    """
    wanted = None if flag in NONE else ALIASES.get(flag, flag)
    if not raw:
        if wanted in (None, "gguf"):  # of a GGUF file that was dequantized
            return Quantization()
        if wanted not in FORMATS:
            raise ModelError(
                f"--quantization {flag}: the checkpoint is not quantized; what can be done to it while it is loaded: "
                f"{', '.join(sorted(FORMATS))}"
            )
        return Online(FORMATS[wanted])
    method = str(raw.get("quant_method", "")).lower()
    if method not in METHODS:
        raise ModelError(
            f"quantization method not supported: {method or 'none named'}. Supported: {', '.join(METHODS)}"
        )
    if wanted not in (None, method):
        raise ModelError(f"--quantization {flag}, but the checkpoint says quant_method {method!r}")
    return METHODS[method](raw)
