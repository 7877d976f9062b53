"""Checkpoints of Gemma whose training knew of rounding, as Google writes them: 2, 4 or 8 bits with a scale a row."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from engine.errors import ModelError
from engine.quantization import Scheme
from engine.quantization.floats import row_scales
from engine.quantization.modules import Modules, own_names, regular_expression
from engine.quantization.packed import ByModule, Stored, entry, objects
from kernels.quantized import INT4_ZERO, Format, pack_int4
from kernels.weights import ShapeError

# Of inputs and outputs, which are not rounded here: that is more exact.
NOT_OF_WEIGHTS = dict.fromkeys(("input_activation_scale", "output_activation_scale"))


def stored_gemma(bits: int) -> Stored:
    """Return how a product or an embedding is stored. `ModelError` for a number of bits that there is not."""
    if bits not in (2, 4, 8):
        raise ModelError(f"Gemma's weights of {bits} bits are not supported, only of 2, 4 and 8")

    def codes(values: torch.Tensor) -> torch.Tensor:
        if bits == 8 or values.dtype not in (torch.int8, torch.uint8) or values.dim() != 2:
            return values
        stored = values.view(torch.uint8)
        if bits == 4:
            return stored
        quarters = torch.stack([stored >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)
        return pack_int4(quarters + (INT4_ZERO - 2))

    def scales(scale: torch.Tensor) -> torch.Tensor:
        if scale.dim() > 1 and scale.shape[-1] != 1:
            raise ShapeError(f"has {scale.shape[-1]} scales a row, only one is supported")
        return row_scales(scale)

    return Stored(
        Format("int8" if bits == 8 else "int4"),
        {
            "weight": ("weight", codes),
            "weight_scale": ("scale", scales),
            "embedding_quantized": ("weight", codes),
            "embedding_scale": ("scale", scales),
            **NOT_OF_WEIGHTS,
        },
    )


class Gemma(ByModule):
    """A number of bits for all modules, and others for those that a pattern finds."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Read config.json's `quantization_config`. `ModelError` for what is not supported."""
        super().__init__()
        num_bits = entry(raw, "num_bits", int, 4)
        self.everywhere = stored_gemma(num_bits)
        self.excluded = Modules(raw.get("modules_to_not_convert"), "modules_to_not_convert")
        self.has_embeddings = entry(raw, "quantize_embeddings", bool, False)
        self.patterns = [
            (regular_expression(pattern, "module_quant_configs"), stored_gemma(entry(own, "num_bits", int, num_bits)))
            for pattern, own in objects(raw, "module_quant_configs").items()
        ]

    def find(self, names: Collection[str]) -> Stored | None:
        if names in self.excluded:
            return None
        own = own_names(names)
        found = (stored for pattern, stored in self.patterns if any(pattern.search(name) for name in own))
        return next(found, self.everywhere)

    def scheme_of_embedding(self, module: str) -> Scheme:
        return self.scheme_of(module) if self.has_embeddings else super().scheme_of_embedding(module)
