"""Which family runs which architecture, and how a model folder becomes a model."""

import dataclasses
import difflib
import importlib
from collections.abc import Sequence
from pathlib import Path

from engine.config import EngineConfig
from engine.config_file import checked, read_raw
from engine.errors import ModelError
from engine.layers.layer import LayerConfig
from engine.model_config import ModelConfig, complete
from engine.models.base import CausalLM
from engine.quantization.methods import quantization_of

# config.json's architecture -> module of this package : class. Imported when asked for.
REGISTRY = {
    "ApertusForCausalLM": "apertus:Apertus",
    "AquilaForCausalLM": "llama:Llama",
    "ArceeForCausalLM": "llama:Arcee",
    "BaiChuanForCausalLM": "baichuan:Baichuan",
    "BaichuanForCausalLM": "baichuan:Baichuan",
    "ChatGLMForCausalLM": "chatglm:ChatGLM",
    "Cohere2ForCausalLM": "cohere:Cohere2",
    "CohereForCausalLM": "cohere:Cohere",
    "Ernie4_5ForCausalLM": "ernie:Ernie45",
    "Exaone4ForCausalLM": "exaone4:Exaone4",
    "ExaoneForCausalLM": "exaone3:Exaone3",
    "GPT2ForCausalLM": "gpt2:GPT2",
    "GPTNeoXForCausalLM": "gpt_neox:GPTNeoX",
    "Gemma2ForCausalLM": "gemma:Gemma2",
    "Gemma3ForCausalLM": "gemma:Gemma3",
    "Gemma3ForConditionalGeneration": "gemma:Gemma3",
    "Gemma4ForCausalLM": "gemma4:Gemma4",
    "Gemma4ForConditionalGeneration": "gemma4:Gemma4",
    "GemmaForCausalLM": "gemma:Gemma",
    "Glm4ForCausalLM": "glm:Glm4",
    "GlmForCausalLM": "glm:Glm",
    "GraniteForCausalLM": "granite:Granite",
    "HeliumForCausalLM": "ernie:Helium",
    "HunYuanDenseV1ForCausalLM": "hunyuan:HunYuan",
    "InternLM2ForCausalLM": "internlm:InternLM2",
    "InternLM3ForCausalLM": "internlm:InternLM3",
    "InternLMForCausalLM": "internlm:InternLM",
    "LlamaForCausalLM": "llama:Llama",
    "MiMoForCausalLM": "llama:MiMo",
    "MiniCPMForCausalLM": "minicpm:MiniCPM",
    "Ministral3ForCausalLM": "llama:Mistral",
    "MinistralForCausalLM": "llama:Mistral",
    "Mistral3ForConditionalGeneration": "llama:Mistral",
    "MistralForCausalLM": "llama:Mistral",
    "NemotronForCausalLM": "nemotron:Nemotron",
    "OPTForCausalLM": "opt:OPT",
    "Olmo2ForCausalLM": "olmo2:Olmo2",
    "Olmo3ForCausalLM": "olmo2:Olmo3",
    "OlmoForCausalLM": "olmo:Olmo",
    "OrionForCausalLM": "stablelm:Orion",
    "Phi3ForCausalLM": "phi3:Phi3",
    "PhiForCausalLM": "phi:Phi",
    "QWenForCausalLM": "qwen1:Qwen1",
    "Qwen2ForCausalLM": "llama:Qwen2",
    "Qwen3ForCausalLM": "llama:Qwen3",
    "SeedOssForCausalLM": "llama:SeedOss",
    "SkyworkForCausalLM": "llama:Llama",
    "SmolLM3ForCausalLM": "smollm3:SmolLM3",
    "StableLmForCausalLM": "stablelm:StableLM",
    "Starcoder2ForCausalLM": "starcoder2:Starcoder2",
    "XverseForCausalLM": "llama:Llama",
    "YiForCausalLM": "llama:Yi",
}
# Other names of the same, among them those that do not end as a model's with a head for tokens does.
ALIASES = {
    "ChatGLMForConditionalGeneration": "ChatGLMForCausalLM",
    "ChatGLMModel": "ChatGLMForCausalLM",
    "GPT2LMHeadModel": "GPT2ForCausalLM",
    "LLaMAForCausalLM": "LlamaForCausalLM",
    "QWenLMHeadModel": "QWenForCausalLM",
    "StableLMEpochForCausalLM": "StableLmForCausalLM",
}
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
    family = _family_of(named)
    if named and family is None:  # another family's entries are not ours to judge
        raise _unsupported(named)
    raw = checked(entries | {"architectures": named}, file)
    try:
        model = (family or CausalLM).read_config(raw)
    except KeyError as error:
        raise ModelError(f"{file} has no {error.args[0]!r}") from None
    return complete(model, raw, folder, config)


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
        if architecture in REGISTRY:
            return _class_of(architecture)(config, layers)
        for suffix, head in HEADS.items():
            family = architecture.removesuffix(suffix) + CAUSAL
            if architecture.endswith(suffix) and family in REGISTRY:
                decoder = _class_of(family)(dataclasses.replace(config, tie_word_embeddings=True), layers)
                pooled = importlib.import_module("engine.models.pooled")
                model: CausalLM = getattr(pooled, head)(decoder, config, layers)
                return model
    raise _unsupported(config.architectures)


def is_supported(architecture: str) -> bool:
    """Return whether a family runs `architecture`, as it stands in config.json."""
    return ALIASES.get(architecture, architecture) in REGISTRY


def _unsupported(architectures: Sequence[str]) -> ModelError:
    """Return the error that names `architectures`, and the supported one whose name is nearest, if any is near."""
    families = {_stem(supported): supported for supported in REGISTRY}
    close = [name for given in architectures for name in difflib.get_close_matches(_stem(given), families, 1, 0.5)]
    nearest = f" The nearest is {families[close[0]]}." if close else ""
    return ModelError(
        f"architecture not supported: {', '.join(architectures) or 'none named in config.json'}.{nearest} "
        f"Supported: {', '.join(sorted({*REGISTRY, *ALIASES}))}. .github/CONTRIBUTING.md says how to add a family"
    )


def _stem(architecture: str) -> str:
    """Return what names the family: `Qwen3Moe` of `Qwen3MoeForCausalLM`."""
    return architecture.partition("For")[0].removesuffix(BARE)


def _family_of(architectures: Sequence[str]) -> type[CausalLM] | None:
    """Return the class that runs the first known one of `architectures`, None if none is known."""
    for architecture in architectures:
        if architecture in REGISTRY:
            return _class_of(architecture)
        for suffix in HEADS:
            family = architecture.removesuffix(suffix) + CAUSAL
            if architecture.endswith(suffix) and family in REGISTRY:
                return _class_of(family)
    return None


def _class_of(architecture: str) -> type[CausalLM]:
    module, name = REGISTRY[architecture].split(":")
    family: type[CausalLM] = getattr(importlib.import_module(f"engine.models.{module}"), name)
    return family
