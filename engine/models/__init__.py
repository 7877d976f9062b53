"""Model families, and which class runs which architecture."""

import importlib
from typing import ClassVar

import torch

from cache.pool import KVPool
from engine.batch import ForwardBatch
from engine.errors import ModelError
from engine.layers.embedding import VocabParallelEmbedding
from engine.layers.layer import Layer, LayerConfig
from engine.model_config import ModelConfig

# config.json's architecture -> module of this package : class. Imported when asked for.
REGISTRY = {
    "LlamaForCausalLM": "llama:LlamaForCausalLM",
    "MistralForCausalLM": "llama:LlamaForCausalLM",
    "Qwen2ForCausalLM": "llama:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "llama:Qwen3ForCausalLM",
}


class CausalLM(Layer):
    """What a model file defines. Attributes are named as in the checkpoint, but for the packed layers."""

    # layer here -> the checkpoint's layers that are its parts, in order
    packed_modules_mapping: ClassVar[dict[str, tuple[str, ...]]] = {}
    lm_head: VocabParallelEmbedding

    def __init__(self, config: ModelConfig, layers: LayerConfig) -> None:
        raise NotImplementedError

    def __call__(self, batch: ForwardBatch, kv: KVPool) -> torch.Tensor:
        """Last hidden states [T, hidden], final norm applied. Writes the tokens' keys and values into `kv`."""
        raise NotImplementedError

    def pack(self) -> None:
        self.lm_head.pack_for_logits()

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, hidden] -> [S, vocabulary] in the model's dtype."""
        raise NotImplementedError


def build_model(config: ModelConfig, layers: LayerConfig) -> CausalLM:
    """The model with its weights still on the meta device. `ModelError` if no class runs its architecture."""
    if quantization := config.raw.get("quantization_config"):
        raise ModelError(f"quantization method not supported: {quantization.get('quant_method')}")
    for architecture in config.architectures:
        if architecture in REGISTRY:
            module, name = REGISTRY[architecture].split(":")
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)(config, layers)
    named = ", ".join(config.architectures) or "none named in config.json"
    raise ModelError(f"architecture not supported: {named}. Supported: {', '.join(sorted(REGISTRY))}")
