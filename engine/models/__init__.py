"""Model families, and which class runs which architecture."""

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from cache.pool import KVPool
from engine.errors import ModelError
from engine.layers.embedding import VocabParallelEmbedding
from engine.layers.layer import Layer, LayerConfig
from engine.model_config import ModelConfig
from engine.step.batch import ForwardBatch
from kernels.corun import CorunCosts

# config.json's architecture -> module of this package : class. Imported when asked for.
REGISTRY = {
    "LlamaForCausalLM": "llama:LlamaForCausalLM",
    "MistralForCausalLM": "llama:LlamaForCausalLM",
    "Qwen2ForCausalLM": "llama:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "llama:Qwen3ForCausalLM",
}


CAUSAL, CLASSIFIER, BARE = "ForCausalLM", "ForSequenceClassification", "Model"


class Decoder(Layer):
    """Embedding, blocks and final norm."""

    layers: list[Any]  # the blocks

    def corun_costs(self, kv: KVPool) -> CorunCosts | None:
        """By which `kernels.corun` splits steps; None: the blocks do not take a step that is split."""
        return None

    def one_layer_of_each_kind(self) -> list[Any]:
        """Blocks that have all the kernels any block has."""
        return self.layers[:1]

    @contextlib.contextmanager
    def few_layers(self) -> Iterator[None]:
        """Do without most blocks meanwhile: for finding out what kernels there are, which results do not matter to."""
        layers, self.layers = self.layers, self.one_layer_of_each_kind()
        try:
            yield
        finally:
            self.layers = layers


class CausalLM(Layer):
    """What a model file defines. Attributes are named as in the checkpoint, but for the packed layers."""

    # layer here -> the checkpoint's layers that are its parts, in order
    packed_modules_mapping: ClassVar[dict[str, tuple[str, ...]]] = {}
    model: Decoder
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

    def pool(self, hidden: torch.Tensor) -> torch.Tensor:
        """What prompts are given that want a vector: float32 [N, size] of their pooled states, float32 [N, hidden]."""
        return hidden


def build_model(config: ModelConfig, layers: LayerConfig) -> CausalLM:
    """The model with its weights still on the meta device. `ModelError` if no class runs its architecture."""
    if quantization := config.raw.get("quantization_config"):
        raise ModelError(f"quantization method not supported: {quantization.get('quant_method')}")
    for architecture in config.architectures:
        if architecture in REGISTRY:
            return _model_class(architecture)(config, layers)
        for suffix, name in ((CLASSIFIER, "SequenceClassifier"), (BARE, "PooledModel")):
            family = architecture.removesuffix(suffix) + CAUSAL
            if architecture.endswith(suffix) and family in REGISTRY:
                decoder = _model_class(family)(dataclasses.replace(config, tie_word_embeddings=True), layers)
                return getattr(importlib.import_module(f"{__name__}.pooled"), name)(decoder, config, layers)
    named = ", ".join(config.architectures) or "none named in config.json"
    raise ModelError(f"architecture not supported: {named}. Supported: {', '.join(sorted(REGISTRY))}")


def _model_class(architecture: str) -> type[CausalLM]:
    module, name = REGISTRY[architecture].split(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
