"""Find the family that runs an architecture, and make a model of a folder."""

import dataclasses
import difflib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.config_file import checked, read_raw
from engine.errors import ModelError
from engine.layers.layer import LayerConfig
from engine.model_config import ModelConfig, complete
from engine.models.architectures import (
    ALIASES,
    ARCHITECTURES,
    IMAGE_ENTRIES,
    LANGUAGE_MODELS,
    REFUSED,
    TEXT_DEFAULTS,
)
from engine.models.base import CausalLM
from engine.models.defaults import with_defaults
from engine.quantization.methods import quantization_of

CAUSAL, CLASSIFIER, BARE = "ForCausalLM", "ForSequenceClassification", "Model"
HEADS = {CLASSIFIER: "SequenceClassifier", BARE: "PooledModel"}  # in engine.models.pooled


def load_config(folder: str | Path, config: EngineConfig | None = None) -> ModelConfig:
    """Read `folder`/config.json, overridden by `config`, by the family that its architecture names.

    `ModelError` if it is missing, broken or incomplete; first of all, if no family runs its architecture.
    """
    config = config or EngineConfig()
    folder = Path(folder)
    file, entries = folder / "config.json", read_raw(folder, config)
    named = checked({"architectures": entries.get("architectures")}, file).get("architectures") or ()
    named = [ALIASES.get(name, name) for name in named]
    family = _family_of(named, entries.get("model_type"))
    if named and family is None:  # another family's entries are not ours to judge
        raise _unsupported(named, entries)
    raw = checked(with_defaults(entries) | {"architectures": named}, file)
    vision = next((ARCHITECTURES[name].vision for name in named if name in ARCHITECTURES), "")
    if vision:
        raw = TEXT_DEFAULTS.get(raw.get("model_type", ""), {}) | raw
    try:
        model = (family or CausalLM).read_config(raw)
    except KeyError as error:
        raise ModelError(f"{file} has no {error.args[0]!r}") from None
    return complete(dataclasses.replace(model, vision=vision), raw, folder, config)


def build_model(config: ModelConfig, layers: LayerConfig, quantization: str | None = None) -> CausalLM:
    """Return the model with its weights still on the meta device. `ModelError` if no family runs its architecture.

    quantization: `--quantization`.
    """
    method = quantization_of(config.raw.get("quantization_config"), quantization)
    model = _build(config, dataclasses.replace(layers, quantization=method))
    model.quantization = method
    return model


def _build(config: ModelConfig, layers: LayerConfig) -> CausalLM:
    for architecture in config.architectures:
        if architecture in ARCHITECTURES:
            return _class_of(architecture, config.model_type)(config, layers)
        for suffix, head in HEADS.items():
            family = _causal(architecture, suffix)
            if family in ARCHITECTURES:
                decoder = _class_of(family, config.model_type)(
                    dataclasses.replace(config, tie_word_embeddings=True), layers
                )
                pooled = importlib.import_module("engine.models.pooled")
                model: CausalLM = getattr(pooled, head)(decoder, config, layers)
                return model
    raise _unsupported(config.architectures, config.raw)


def is_supported(architecture: str) -> bool:
    """Return whether a family runs `architecture`, as it stands in config.json."""
    return ALIASES.get(architecture, architecture) in ARCHITECTURES


def _unsupported(architectures: Sequence[str], entries: Mapping[str, Any]) -> ModelError:
    """Return the error that names `architectures`, and what would do: where it is known, or the supported one nearest.

    That is one whose name is near; of a model that reads images, the nearest that does, whatever its name.
    """
    message = f"architecture not supported: {', '.join(architectures) or 'none named in config.json'}"
    if reason := next((REFUSED[name] for name in architectures if name in REFUSED), None):
        return ModelError(f"{message}: {reason}. `radixloop models` lists those that are")
    sees = any(entries.get(name) for name in IMAGE_ENTRIES)
    families = {_stem(name): name for name, served in ARCHITECTURES.items() if served.vision or not sees}
    cutoff = 0.0 if sees else 0.5
    close = [name for given in architectures for name in difflib.get_close_matches(_stem(given), families, 1, cutoff)]
    which = "nearest that reads images" if sees else "nearest"
    nearest = f" The {which} is {families[close[0]]}." if close else ""
    return ModelError(
        f"{message}.{nearest} `radixloop models` lists those that are, .github/CONTRIBUTING.md says how to add one"
    )


def _stem(architecture: str) -> str:
    """Return what names the family: `Qwen3Moe` of `Qwen3MoeForCausalLM`."""
    return architecture.partition("For")[0].removesuffix(BARE)


def _causal(architecture: str, suffix: str) -> str:
    """Return the architecture that has a head for tokens where `suffix` names another; "" if it names none."""
    name = architecture.removesuffix(suffix) + CAUSAL
    return ALIASES.get(name, name) if architecture.endswith(suffix) else ""


def _family_of(architectures: Sequence[str], model_type: str | None) -> type[CausalLM] | None:
    """Return the class that runs the first known one of `architectures`, None if none is known."""
    for architecture in architectures:
        if architecture in ARCHITECTURES:
            return _class_of(architecture, model_type)
        for suffix in HEADS:
            family = _causal(architecture, suffix)
            if family in ARCHITECTURES:
                return _class_of(family, model_type)
    return None


def _class_of(architecture: str, model_type: str | None) -> type[CausalLM]:
    """Return the class that runs `architecture`. model_type: of the language model."""
    found = ARCHITECTURES[architecture].family or LANGUAGE_MODELS.get(model_type or "")
    if found is None:
        raise ModelError(
            f"{architecture} with a language model of type {model_type!r} is not supported, only with "
            f"{', '.join(LANGUAGE_MODELS)}"
        )
    module, name = found.split(":")
    family: type[CausalLM] = getattr(importlib.import_module(f"engine.models.{module}"), name)
    return family
