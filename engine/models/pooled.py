"""Models that turn a prompt into scores or a vector: the decoder of any family, with another head or none."""

import torch

from cache.pool import KVPool
from engine.layers.layer import Layer, LayerConfig, meta_weight
from engine.model_config import ModelConfig
from engine.models import CausalLM
from engine.step.batch import ForwardBatch
from kernels.gemm import linear


class ClassificationHead(Layer):
    """Every rank holds all of it."""

    weight_names = ("weight",)

    def __init__(self, hidden_size: int, num_labels: int, layers: LayerConfig) -> None:
        self.weight = meta_weight(num_labels, hidden_size, dtype=layers.dtype)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden.to(self.weight.dtype), self.weight)  # [N, num_labels]


class PooledModel(CausalLM):
    """A decoder alone (LlamaModel, ...). Its checkpoint may name the weights with or without `model.` before them."""

    def __init__(self, decoder: CausalLM, config: ModelConfig, layers: LayerConfig) -> None:
        """decoder: a generating model with tied embeddings, so that it has no head of its own."""
        self.packed_modules_mapping = decoder.packed_modules_mapping  # type: ignore[misc]  # its own: the decoder's
        self.model, self.lm_head = decoder.model, decoder.lm_head
        self.compute_logits = decoder.compute_logits  # type: ignore[method-assign]
        self._forward = decoder.__call__
        for name, value in vars(decoder.model).items():
            if isinstance(value, (Layer, list)):
                setattr(self, name, value)

    def __call__(self, batch: ForwardBatch, kv: KVPool) -> torch.Tensor:
        return self._forward(batch, kv)

    def pack(self) -> None:
        """No logits are wanted, so nothing."""


class SequenceClassifier(PooledModel):
    """...ForSequenceClassification: a linear head on the last token's state."""

    def __init__(self, decoder: CausalLM, config: ModelConfig, layers: LayerConfig) -> None:
        super().__init__(decoder, config, layers)
        self.score = ClassificationHead(config.hidden_size, config.num_labels, layers)

    def pool(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.score(hidden).float()
