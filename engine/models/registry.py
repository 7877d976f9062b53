"""Which family runs which architecture, and how a model folder becomes a model."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.layers.layer import LayerConfig
from engine.model_config import ModelConfig, complete, read_raw
from engine.models.base import CausalLM
from engine.quantization import Quantization

# config.json's architecture -> module of this package : class. Imported when asked for.
REGISTRY = {
    "Gemma2ForCausalLM": "gemma:Gemma2",
    "LlamaForCausalLM": "llama:Llama",
    "MistralForCausalLM": "llama:Mistral",
    "Qwen2ForCausalLM": "llama:Qwen2",
    "Qwen3ForCausalLM": "llama:Qwen3",
}
CAUSAL, CLASSIFIER, BARE = "ForCausalLM", "ForSequenceClassification", "Model"
HEADS = {CLASSIFIER: "SequenceClassifier", BARE: "PooledModel"}  # in engine.models.pooled


def load_config(folder: str | Path, config: EngineConfig | None = None) -> ModelConfig:
    """Read `folder`/config.json, overridden by `config`, by the family that its architecture names.

    `ModelError` if it is missing, broken or incomplete.
    """
    config = config or EngineConfig()
    folder = Path(folder)
    raw = read_raw(folder, config)
    family = _family_of(raw)
    try:
        model = (CausalLM if family is None else family).read_config(raw)
    except KeyError as error:
        raise ModelError(f"{folder / 'config.json'} has no {error.args[0]!r}") from None
    return complete(model, raw, folder, config)


def build_model(config: ModelConfig, layers: LayerConfig) -> CausalLM:
    """Return the model with its weights still on the meta device. `ModelError` if no family runs its architecture."""
    layers = dataclasses.replace(layers, quantization=Quantization(config.raw.get("quantization_config")))
    for architecture in config.architectures:
        if architecture in REGISTRY:
            return _class_of(architecture)(config, layers)
        for suffix, head in HEADS.items():
            family = architecture.removesuffix(suffix) + CAUSAL
            if architecture.endswith(suffix) and family in REGISTRY:
                decoder = _class_of(family)(dataclasses.replace(config, tie_word_embeddings=True), layers)
                pooled = importlib.import_module("engine.models.pooled")
                model: CausalLM = getattr(pooled, head)(decoder, config, layers)
                return model
    named = ", ".join(config.architectures) or "none named in config.json"
    raise ModelError(f"architecture not supported: {named}. Supported: {', '.join(sorted(REGISTRY))}")


def _family_of(raw: dict[str, Any]) -> type[CausalLM] | None:
    """Return the class that runs the first known architecture of a config.json, None if it names none."""
    for architecture in raw.get("architectures") or ():
        for suffix in (CAUSAL, *HEADS):
            family = architecture.removesuffix(suffix) + CAUSAL
            if architecture.endswith(suffix) and family in REGISTRY:
                return _class_of(family)
    return None


def _class_of(architecture: str) -> type[CausalLM]:
    module, name = REGISTRY[architecture].split(":")
    family: type[CausalLM] = getattr(importlib.import_module(f"engine.models.{module}"), name)
    return family
