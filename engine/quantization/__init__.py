"""How a layer's weights are stored: what a checkpoint or a flag says of them, as a `Scheme`."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from engine.errors import ModelError
from engine.quantization.dense import DENSE
from kernels.weights import Part, Shard, Weight


class Scheme(Protocol):
    """A format of weights."""

    def weight(self, parts: Sequence[Part], k: int, input_shard: Shard, dtype: torch.dtype) -> Weight:
        """Return an empty weight of the format: rows in `parts`, `k` inputs, products in `dtype`."""


class Quantization:
    """Which scheme each layer of a model has."""

    def __init__(self, raw: dict[str, Any] | None = None) -> None:
        """raw: config.json's `quantization_config`. `ModelError` if its method is not supported."""
        if raw:
            raise ModelError(f"quantization method not supported: {raw.get('quant_method')}")

    def scheme_of(self, path: str) -> Scheme:  # noqa: ARG002 - all layers are dense so far
        """Return the scheme of the layer at `path`, such as model.layers.0.mlp.down_proj."""
        return DENSE
