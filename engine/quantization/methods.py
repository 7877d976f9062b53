"""The method of a model's quantization, by its name in config.json or on the command line."""

from collections.abc import Mapping
from typing import Any

from engine.errors import ModelError
from engine.quantization import Quantization, Reader
from engine.quantization.auto_round import AutoRound
from engine.quantization.awq import AWQ
from engine.quantization.bitsandbytes import BitsAndBytes
from engine.quantization.compressed_tensors import CompressedTensors
from engine.quantization.fp8 import FBGEMM, FP8
from engine.quantization.gemma import Gemma
from engine.quantization.gguf import GGUF
from engine.quantization.gptq import GPTQ
from engine.quantization.int8 import BlockwiseInt8, W8A8Int8
from engine.quantization.modelopt import ModelOpt
from engine.quantization.mxfp4 import MXFP4
from engine.quantization.online import FORMATS, Online
from engine.quantization.quark import Quark
from engine.quantization.torchao import TorchAO

METHODS: dict[str, Reader] = {
    "auto-round": AutoRound,
    "awq": AWQ,
    "bitsandbytes": BitsAndBytes,
    "blockwise_int8": BlockwiseInt8,
    "compressed-tensors": CompressedTensors,
    "fbgemm_fp8": FBGEMM,
    "fp8": FP8,
    "gemma": Gemma,
    "gguf": GGUF,
    "gptq": GPTQ,
    "modelopt": ModelOpt,
    "mxfp4": MXFP4,
    "quark": Quark,
    "torchao": TorchAO,
    "w8a8_int8": W8A8Int8,
}
"""`quant_method` of a checkpoint -> what reads its `quantization_config`."""

NONE = (None, "", "none", "null")
MLX = "mlx (group_size and bits without a quant_method)"
# Other names of a method in config.json.
SAME_METHOD = {
    "auto_round": "auto-round",
    "compressed_tensors": "compressed-tensors",
    "intel/auto-round": "auto-round",
    "marlin": "gptq",
    "modelopt_fp4": "modelopt",
    "modelopt_fp8": "modelopt",
    "modelopt_mixed": "modelopt",
    "w8a8_fp8": "fbgemm_fp8",
}
# `--quantization`, named after a kernel, a library or one kind of a method -> the methods of files that have it.
KINDS: dict[str, tuple[str, ...]] = {
    "auto_round": ("auto-round",),
    "awq_marlin": ("awq", "auto-round"),
    "compressed_tensors": ("compressed-tensors",),
    "gptq_marlin": ("gptq", "auto-round"),
    "marlin": ("gptq",),
    "modelopt_fp4": ("modelopt",),
    "modelopt_fp8": ("modelopt",),
    "moe_wna16": ("awq", "gptq"),
    "mxfp4": ("compressed-tensors", "quark"),
    "w8a8_fp8": ("compressed-tensors", "fbgemm_fp8", "fp8"),
    "w8a8_int8": ("compressed-tensors",),
}
# The same -> a format of `FORMATS`.
ROUNDINGS = {
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
    wanted = None if flag in NONE else flag
    if wanted is not None and not {*METHODS, *KINDS, *FORMATS, *ROUNDINGS} & {wanted}:
        raise ModelError(
            f"--quantization {flag} is not known. A checkpoint that is not quantized is rounded while it is loaded to "
            f"{', '.join(sorted({*FORMATS, *ROUNDINGS}))}; of a quantized one the flag may name the method: "
            f"{', '.join(sorted({*METHODS, *KINDS}))}"
        )
    if raw:
        return _of_file(raw, wanted)
    if wanted in (None, "gguf"):  # of a GGUF file that has no weights of few bits
        return Quantization()
    if (rounding := ROUNDINGS.get(wanted, wanted)) not in FORMATS:
        raise ModelError(
            f"--quantization {flag}: the checkpoint is not quantized; what can be done to it while it is loaded: "
            f"{', '.join(sorted(FORMATS))}"
        )
    return Online(FORMATS[rounding])


def _of_file(raw: Mapping[str, Any], wanted: str | None) -> Quantization:
    raw = _flat(raw)
    named = str(raw.get("quant_method") or _unnamed(raw)).lower()
    method = SAME_METHOD.get(named, named)
    if method not in METHODS:
        raise ModelError(
            f"quantization method not supported: {named or 'none named'}. Supported: {', '.join(METHODS)}. The model "
            f"that was quantized can be rounded while it is loaded: --quantization {', '.join(FORMATS)}"
        )
    if wanted is not None and method not in (wanted, *KINDS.get(wanted, ())):
        raise ModelError(f"--quantization {wanted}, but the checkpoint says quant_method {named!r}")
    return METHODS[method](raw)


def _flat(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration with what some libraries nest in it: ModelOpt, and an older compressed-tensors."""
    for name in ("quantization", "quantization_config"):
        if isinstance(inner := raw.get(name), dict):
            return {"quant_method": "modelopt" if name == "quantization" else "compressed-tensors"} | {**raw, **inner}
    return raw


def _unnamed(raw: Mapping[str, Any]) -> str:
    """Return the method of a configuration that names none, by the entries that it has."""
    if "quant_algo" in raw:
        return "modelopt"
    if raw.get("load_in_4bit") or raw.get("load_in_8bit"):  # as transformers wrote it in 2023
        return "bitsandbytes"
    return MLX if {"group_size", "bits"} <= {*raw} else ""
