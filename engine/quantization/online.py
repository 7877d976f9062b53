"""Weights that are quantized while they are loaded (`--quantization`), tensor by tensor."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.quantization import DENSE, Quantization, Scheme
from kernels.quantize import OnlineWeight
from kernels.quantized import Format
from kernels.weights import Part, Shard


def _int4(group_size: int) -> Format:
    return Format("int4", group_size, has_zero=True, scale_dtype=torch.float16)


FORMATS = {
    "fp8": Format("fp8", inputs="fp8"),
    "fp8wo": Format("fp8"),
    "int8": Format("int8", 128, scale_dtype=torch.float16),
    "w8a8_int8": Format("int8", inputs="int8"),
    "int4": _int4(128),
    "int4wo-32": _int4(32),
    "int4wo-64": _int4(64),
    "int4wo-256": _int4(256),
}
# What ends a model stays as it is, and so does what latent attention takes apart, which is kept as plain numbers.
KEPT = ("lm_head", "score", "kv_b_proj")


@dataclass(frozen=True)
class Quantized:
    """A format that numbers are rounded to."""

    form: Format

    def weight(self, parts: Sequence[Part], k: int, input_shard: Shard, dtype: torch.dtype) -> OnlineWeight:
        return OnlineWeight(parts, k, dtype, self.form, input_shard)

    def input_unit(self, num_inputs: int) -> int:
        return self.form.input_unit(num_inputs)


class Online(Quantization):
    """All products within blocks in one format."""

    def __init__(self, form: Format) -> None:
        self.scheme = Quantized(form)

    def scheme_of(self, module: str) -> Scheme:
        return DENSE if module.rpartition(".")[2] in KEPT else self.scheme
