"""Test that a GGUF file of every family becomes the checkpoint it was made of.

The files are written here as llama.cpp writes them, with the names of the `gguf` package, from tiny random checkpoints.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint.gguf_architectures import ARCHITECTURES, FILES
from engine.checkpoint.gguf_convert import convert
from engine.checkpoint.weights import pack_weights
from engine.models.registry import is_supported
from tests.test_models import TinyEngine

VOCAB_SIZE = 96
IDS = np.random.default_rng(0).integers(3, VOCAB_SIZE, 24)
Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, Any], Tensors]


def interleaved(tensors: Tensors, config: Any) -> Tensors:
    """Put the rotary pairs of queries and keys side by side, as Meta's own checkpoints have them."""

    def reordered(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
        return weight.view(num_heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return {
        name: reordered(tensor, heads[match[1]]) if (match := re.search(r"([qk]_proj)\.", name)) else tensor
        for name, tensor in tensors.items()
    }


def offset_norms(tensors: Tensors, config: Any) -> Tensors:
    return {name: tensor + 1 if name.endswith("norm.weight") else tensor for name, tensor in tensors.items()}


def fused_qkv(tensors: Tensors, config: Any) -> Tensors:
    result: Tensors = {}
    for name, tensor in tensors.items():
        if "q_proj" in name:
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            result[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif not re.search(r"[kv]_proj", name):
            result[name] = tensor
    return result


def stacked_head_norms(tensors: Tensors, config: Any) -> Tensors:
    result: Tensors = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*)\.norms\.(\d+)\.weight", name)
        if match is None:
            result[name] = tensor
        else:
            stacked = result.get(f"{match[1]}.weight", torch.empty(0, *tensor.shape))
            result[f"{match[1]}.weight"] = torch.cat((stacked, tensor[None]))
    return result


def transposed(tensors: Tensors, config: Any) -> Tensors:
    return {name: tensor.t() if re.search(r"\.c_\w+\.weight", name) else tensor for name, tensor in tensors.items()}


def qkv_by_part(tensors: Tensors, config: Any) -> Tensors:
    """Put all queries before all keys, which GPT-NeoX has head by head."""
    heads = config.num_attention_heads
    return {
        name: tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2) if "query_key_value" in name else tensor
        for name, tensor in tensors.items()
    }


def without_prefix(tensors: Tensors, config: Any) -> Tensors:
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def qkv_by_kind(tensors: Tensors, config: Any) -> Tensors:
    """Put all queries before all keys, which Falcon has key by key."""
    heads, kv_heads = config.num_attention_heads, config.num_kv_heads
    return {
        name: torch.cat(
            [
                part.flatten(0, 1)
                for part in tensor.unflatten(0, (kv_heads, heads // kv_heads + 2, -1))
                .flatten(1, 2)
                .split([16 * heads // kv_heads, 16, 16], dim=1)
            ]
        )
        if "query_key_value" in name
        else tensor
        for name, tensor in tensors.items()
    }


def in_halves(tensors: Tensors, config: Any) -> Tensors:
    """Take what makes keys and values of latents apart, and turn the half of the keys."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if "kv_b_proj" not in name:
            result[name] = tensor
            continue
        of_heads = tensor.unflatten(0, (config.num_attention_heads, -1))
        result[name.replace("kv_b_proj", "k_b_proj")] = of_heads[:, : config.qk_nope_head_dim].transpose(1, 2)
        result[name.replace("kv_b_proj", "v_b_proj")] = of_heads[:, config.qk_nope_head_dim :]
    return result


def named_scalars(tensors: Tensors, config: Any) -> Tensors:
    return {f"{name}.weight" if name.endswith("layer_scalar") else name: tensor for name, tensor in tensors.items()}


def without_numbers(tensors: Tensors, config: Any) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if ".act_fn." not in name}


@dataclass(frozen=True)
class Case:
    """Describe a file and the checkpoint that it is made of."""

    arch: str  # the file's
    config_class: str
    options: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)  # after "ARCH."; None: not written
    changes: tuple[Change, ...] = ()
    factors: dict[str, list[float]] = field(default_factory=dict)
    layers: int = 2
    numbers: dict[str, str] = field(default_factory=dict)  # list in the file -> end of the tensors' names


LOCAL, FULL = "sliding_attention", "full_attention"
GEMMA_4 = {
    "sliding_window": 8,
    "layer_types": [LOCAL, LOCAL, FULL, LOCAL, FULL],
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
    "rope_parameters": {
        LOCAL: {"rope_type": "default", "rope_theta": 1e4},
        FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    },
}
GEMMA_4_KEYS = {
    "attention.sliding_window": 8,
    "attention.sliding_window_pattern": [True, True, False, True, False],
    "attention.key_length": 32,
    "attention.key_length_swa": 16,
    "attention.shared_kv_layers": 0,
    "embedding_length_per_layer_input": 0,
    "rope.freq_base": 1e6,
    "rope.freq_base_swa": 1e4,
    "rope.dimension_count": 32,
    "rope.dimension_count_swa": 16,
    "final_logit_softcapping": 3.0,
}
SQRT = 16**-0.5
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
}
WINDOW = {"attention.sliding_window": 8}
RMS, LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
LAYER_NORM = {LAYER: 1e-5, RMS: None}
MINICPM = {"embedding_scale": 12.0, "residual_scale": 1.4 / 2**0.5, "logit_scale": 4.0}
GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0}
GRANITE_KEYS = {"embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0, "attention.scale": 0.1}

# Of latents, as files of 2024 and as later ones.
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 24,
    "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
LATENT_KEYS: dict[str, Any] = {
    "attention.kv_lora_rank": 32, "attention.key_length": 24, "attention.value_length": 24, "rope.dimension_count": 8,
}  # fmt: skip
HALVES_KEYS = LATENT_KEYS | {
    "attention.head_count_kv": 1, "attention.key_length": 40, "attention.value_length": 32,
    "attention.key_length_mla": 24, "attention.value_length_mla": 24,
}  # fmt: skip
NO_LENGTHS = {"attention.key_length": None, "attention.head_count_kv": None}
FOUR_TIMES = {"feed_forward_length": 256, "rope.freq_base": None}

CASES = {
    "llama": Case("llama", "LlamaConfig", changes=(interleaved,)),
    "llama with biases, tied": Case(
        "llama",
        "LlamaConfig",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        changes=(interleaved,),
    ),
    "llama with qkv in one": Case("llama", "LlamaConfig", changes=(interleaved, fused_qkv)),
    "llama with YaRN": Case("llama", "LlamaConfig", {"rope_parameters": YARN}, YARN_KEYS, (interleaved,)),
    "qwen2": Case("qwen2", "Qwen2Config"),
    "qwen3": Case("qwen3", "Qwen3Config", {"head_dim": 32}),
    "gemma": Case("gemma", "GemmaConfig", {"tie_word_embeddings": True}, changes=(offset_norms,)),
    "gemma2": Case(
        "gemma2",
        "Gemma2Config",
        {"query_pre_attn_scalar": 16, "sliding_window": 8, "tie_word_embeddings": True},
        WINDOW | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        (offset_norms,),
    ),
    "gemma3": Case(
        "gemma3",
        "Gemma3TextConfig",
        {
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "rope_parameters": {
                LOCAL: {"rope_type": "default", "rope_theta": 1e4},
                FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
        WINDOW | {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        (offset_norms,),
        layers=7,
    ),
    "gemma4": Case(
        "gemma4",
        "Gemma4TextConfig",
        GEMMA_4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
        GEMMA_4_KEYS | {"attention.head_count_kv": [2, 2, 1, 2, 1]},
        (named_scalars,),
        layers=5,
    ),
    "gemma4 that is an E2B": Case(
        "gemma4",
        "Gemma4TextConfig",
        GEMMA_4
        | {
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": VOCAB_SIZE,
        },
        GEMMA_4_KEYS
        | {
            "attention.shared_kv_layers": 2,
            "feed_forward_length": [96, 96, 96, 192, 192],
            "embedding_length_per_layer_input": 32,
        },
        (named_scalars,),
        {"rope_freqs": [1.0] * 4 + [1e30] * 12},
        layers=5,
    ),
    "phi2": Case(
        "phi2",
        "PhiConfig",
        {"num_key_value_heads": 4, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        LAYER_NORM | {"rope.dimension_count": 8},
        (fused_qkv,),
    ),
    "phi3": Case("phi3", "Phi3Config", {"original_max_position_embeddings": 64}, {"attention.sliding_window": 0}),
    "phi3, long": Case(
        "phi3",
        "Phi3Config",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "attention_factor": 1.25,
                "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5],
                "long_factor": [1.0, 2.5, 4.0, 5.5, 7.0, 8.5],
            },
        },
        {
            "rope.dimension_count": 12,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.attn_factor": 1.25,
        },
        factors={
            "rope_factors_short": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5],
            "rope_factors_long": [1.0, 2.5, 4.0, 5.5, 7.0, 8.5],
        },
    ),
    "glm4": Case("glm4", "Glm4Config", {"attention_bias": True}, {"rope.dimension_count": 8}),
    "chatglm": Case("chatglm", "GlmConfig", {"attention_bias": True}, {"rope.dimension_count": 8}, (fused_qkv,)),
    "command-r": Case(
        "command-r",
        "CohereConfig",
        {"logit_scale": 0.25, "use_qk_norm": True, "tie_word_embeddings": True},
        LAYER_NORM | {"logit_scale": 0.25, "rope.scaling.type": "none"},
    ),
    "cohere2": Case(
        "cohere2",
        "Cohere2Config",
        {"logit_scale": 0.25, "sliding_window": 8, "tie_word_embeddings": True},
        LAYER_NORM | WINDOW | {"logit_scale": 0.25, "rope.dimension_count": 16, "rope.scaling.type": "none"},
        layers=4,
    ),
    "olmo": Case(
        "olmo", "OlmoConfig", {"clip_qkv": 0.5}, LAYER_NORM | {"attention.clamp_kqv": 0.5}, changes=(interleaved,)
    ),
    "olmo2": Case("olmo2", "Olmo2Config"),
    "olmo2 that is an OLMo 3": Case(
        "olmo2",
        "Olmo3Config",
        {
            "sliding_window": 8,
            "layer_types": [LOCAL, LOCAL, LOCAL, FULL],
            "rope_parameters": {LOCAL: {"rope_type": "default", "rope_theta": 1e4}, FULL: YARN},
        },
        WINDOW | YARN_KEYS | {"attention.sliding_window_pattern": [True, True, True, False]},
        layers=4,
    ),
    "granite": Case(
        "granite", "GraniteConfig", GRANITE | {"attention_multiplier": 0.1}, GRANITE_KEYS, changes=(interleaved,)
    ),
    "minicpm": Case(
        "minicpm",
        "GraniteConfig",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 1.4 / 2**0.5,
            "logits_scaling": 4.0,
            "attention_multiplier": SQRT,
        },
        MINICPM,
        (interleaved,),
    ),
    "minicpm of an old file": Case(
        "minicpm",
        "GraniteConfig",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 1.4 / 2**0.5,
            "logits_scaling": 0.25,
            "attention_multiplier": SQRT,
        },
        changes=(interleaved,),
    ),
    "smollm3": Case("smollm3", "SmolLM3Config", {"pad_token_id": 1}, changes=(interleaved,), layers=5),
    "exaone": Case("exaone", "LlamaConfig"),
    "exaone4": Case(
        "exaone4",
        "Exaone4Config",
        {"sliding_window": 8, "layer_types": [LOCAL, LOCAL, LOCAL, FULL], "sliding_window_pattern": "LLLG"},
        WINDOW | {"attention.sliding_window_pattern": [True, True, True, False]},
        layers=4,
    ),
    "exaone4 without windows": Case("exaone4", "Exaone4Config", {"sliding_window": None, "layer_types": [FULL, FULL]}),
    "stablelm": Case(
        "stablelm",
        "StableLmConfig",
        {"use_qkv_bias": True},
        LAYER_NORM | {"rope.dimension_count": 4, "use_parallel_residual": False},
    ),
    "stablelm with norms of heads": Case(
        "stablelm",
        "StableLmConfig",
        {"qk_layernorm": True, "use_parallel_residual": True},
        LAYER_NORM | {"rope.dimension_count": 4, "use_parallel_residual": True},
        (stacked_head_norms,),
    ),
    "orion": Case(
        "orion",
        "StableLmConfig",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
        LAYER_NORM,
    ),
    "gptneox": Case(
        "gptneox",
        "GPTNeoXConfig",
        {"num_key_value_heads": None, "head_dim": None},
        LAYER_NORM
        | {
            "rope.dimension_count": 4,
            "rope.freq_base": None,
            "attention.head_count_kv": None,
            "attention.key_length": None,
            "use_parallel_residual": True,
        },
        (qkv_by_part,),
    ),
    "apertus": Case(
        "apertus",
        "ApertusConfig",
        {},
        {name: None for name in ("attention.key_length",)},
        (without_numbers,),
        numbers={f"xielu.{name}": f"act_fn.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")},
    ),
    "nemotron": Case(
        "nemotron", "NemotronConfig", {}, LAYER_NORM | {"rope.dimension_count": 8}, changes=(offset_norms,)
    ),
    "starcoder2": Case("starcoder2", "Starcoder2Config", {"tie_word_embeddings": True}, LAYER_NORM),
    "internlm2": Case("internlm2", "LlamaConfig", changes=(interleaved,)),
    "xverse": Case("xverse", "LlamaConfig", changes=(interleaved,)),
    "baichuan": Case("baichuan", "LlamaConfig", {"num_key_value_heads": 4}, changes=(interleaved,)),
    "qwen2vl": Case("qwen2vl", "Qwen2Config", metadata={"rope.dimension_sections": [2, 3, 3, 0]}),
    "qwen3vl": Case("qwen3vl", "Qwen3Config", {"head_dim": 32}, {"n_deepstack_layers": 3}),
    "bloom": Case(
        "bloom",
        "BloomConfig",
        {"n_layer": 2, "n_head": 4, "head_dim": None, "tie_word_embeddings": True, "num_key_value_heads": None},
        LAYER_NORM | NO_LENGTHS | FOUR_TIMES,
        (qkv_by_part, without_prefix),
    ),
    "falcon": Case(
        "falcon",
        "FalconConfig",
        {"head_dim": None, "num_kv_heads": 1, "num_ln_in_parallel_attn": 1, "new_decoder_architecture": True},
        LAYER_NORM | FOUR_TIMES | {"attention.key_length": None, "attention.head_count_kv": 1},
        (qkv_by_kind,),
    ),
    "falcon with two norms": Case(
        "falcon",
        "FalconConfig",
        {"head_dim": None, "num_kv_heads": 2, "new_decoder_architecture": True},
        LAYER_NORM | FOUR_TIMES | {"attention.key_length": None, "attention.head_count_kv": 2},
        (qkv_by_kind,),
    ),
    "mpt": Case(
        "mpt",
        "MptConfig",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "head_dim": None,
            "num_key_value_heads": None,
            "hidden_size": None,
            "num_attention_heads": None,
            "num_hidden_layers": None,
            "tie_word_embeddings": True,
            "attn_config": {"clip_qkv": 0.5, "alibi_bias_max": 8},
        },
        LAYER_NORM | NO_LENGTHS | FOUR_TIMES | {"attention.clamp_kqv": 0.5, "attention.max_alibi_bias": 8.0},
    ),
    "youtu": Case(
        "deepseek2",
        "YoutuConfig",
        LATENT | {"q_lora_rank": 64, "rope_interleave": True},
        HALVES_KEYS | {"attention.q_lora_rank": 64},
        (in_halves,),
    ),
    "minicpm3": Case(
        "minicpm3",
        "MiniCPM3Config",
        LATENT | {"q_lora_rank": 64, "v_head_dim": 16, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
        LATENT_KEYS | {"attention.q_lora_rank": 64, "attention.value_length": None},
    ),
    "qwen": Case(
        "qwen",
        "Qwen2Config",
        {"num_key_value_heads": 4},
        {"feed_forward_length": 192},
        (fused_qkv,),
    ),
    "mistral3": Case(
        "mistral3",
        "Ministral3Config",
        {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
        YARN_KEYS | {"rope.scaling.yarn_log_multiplier": 1.0, "attention.temperature_scale": 0.1},
        (interleaved,),
    ),
    "mistral3 that is a Mistral Small": Case(
        "mistral3", "MistralConfig", {"sliding_window": None}, changes=(interleaved,)
    ),
    "seed_oss": Case("seed_oss", "SeedOssConfig", {"attention_bias": True}),
    "hunyuan-dense": Case(
        "hunyuan-dense", "HunYuanDenseV1Config", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    ),
    "ernie4_5": Case("ernie4_5", "Ernie4_5Config", {"tie_word_embeddings": True}),
    "arcee": Case("arcee", "ArceeConfig", changes=(interleaved,)),
    "gpt2": Case(
        "gpt2",
        "GPT2Config",
        {"n_positions": 64, "tie_word_embeddings": True, "num_key_value_heads": None, "head_dim": None},
        LAYER_NORM | {"feed_forward_length": 256, "attention.head_count_kv": None},
        (transposed,),
    ),
}
# Entries of config.json that change nothing that is computed, or that a family has and does not use.
UNUSED = {
    "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "bos_token_id", "dtype", "embd_pdrop",
    "embedding_dropout", "eos_token_id", "hidden_dropout", "initializer_range", "pad_token_id", "resid_pdrop",
    "residual_dropout", "transformers_version", "use_cache", "pretraining_tp", "sliding_window_pattern",
    "_sliding_window_pattern", "head_dim", "n_inner", "layer_types", "max_window_layers", "no_rope_layer_interval",
    "embedding_initializer_range",
}  # fmt: skip


def make_checkpoint(case: Case, folder: Path) -> Any:
    """Write a random checkpoint with norms and biases that are not those of a fresh model; return its model."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": case.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    options = {name: value for name, value in (sizes | case.options).items() if value is not None}
    options |= {name: None for name in ("sliding_window", "q_lora_rank") if case.options.get(name, 0) is None}
    partial = case.metadata.get("rope.dimension_count")
    if partial not in (None, 16) and "rope_parameters" not in case.options:
        options["rope_parameters"] = sizes["rope_parameters"] | {"partial_rotary_factor": partial / 16}
    config = getattr(transformers, case.config_class)(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 or "norm" in name or name.endswith("bias"):
                    parameter.uniform_(0.5, 1.5)
            for name, buffer in model.named_buffers():
                if name.endswith("correction_bias"):
                    buffer.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


def write_file(case: Case, config: Any, tensors: Tensors, path: Path) -> None:
    """Write the file as llama.cpp's converter does."""
    entries = config.to_dict()
    theta = (entries.get("rope_parameters") or {}).get("rope_theta", 1e4)
    metadata: dict[str, Any] = {
        "context_length": 64,
        "embedding_length": 64,
        "block_count": case.layers,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": entries.get("num_key_value_heads", 4),
        "attention.key_length": entries.get("head_dim"),
        RMS: 1e-5,
        "rope.freq_base": theta,
    }
    writer = gguf.GGUFWriter(path, case.arch)
    for key, value in (metadata | case.metadata).items():
        if value is not None:
            add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
            add.get(type(value), writer.add_float32)(f"{case.arch}.{key}", value)
    for key, end in case.numbers.items():
        writer.add_array(key, [float(tensor) for name, tensor in tensors.items() if name.endswith(end)])
    writer.add_token_list([f"token {i}" for i in range(entries["vocab_size"])])
    number = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[case.arch]
    names = gguf.get_tensor_name_map(number, case.metadata.get("block_count", case.layers))
    for change in case.changes:
        tensors = change(tensors, config)
    for name, tensor in tensors.items():
        # The package has no name for what llama.cpp takes of every family.
        fused = re.sub(r".*\.(\d+)\.self_attn\.qkv_proj", r"blk.\1.attn_qkv", name)
        known = names.get_name(name, try_suffixes=(".weight", ".bias")) or fused
        assert known.startswith("blk.") or known != name, name
        writer.add_tensor(known, tensor.contiguous().numpy())
    for stem, factors in case.factors.items():
        writer.add_tensor(f"{stem}.weight", np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def alike(value: Any) -> Any:
    """Return `value` with numbers that may have been float32 rounded."""
    if isinstance(value, dict):
        return {key: alike(one) for key, one in value.items()}
    if isinstance(value, list):
        return [alike(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, int | float) and not isinstance(value, bool) else value


def described(config: Any) -> dict[str, Any]:
    """Return what a configuration says that its family reads."""
    known = type(config)().to_dict().keys() - UNUSED
    return {name: alike(value) for name, value in config.to_dict().items() if name in known}


@torch.inference_mode()
def logits_of(model: Any) -> torch.Tensor:
    return model(torch.from_numpy(IDS)[None], use_cache=False).logits[0]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    import transformers

    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


def assert_becomes_its_checkpoint(case: Case, tmp_path: Path) -> None:
    """Write a file and convert it: weights, configuration and logits are those of the checkpoint it was made of."""
    from transformers import AutoModelForCausalLM

    model = make_checkpoint(case, tmp_path / "original")
    tensors = load_file(tmp_path / "original" / "model.safetensors")
    write_file(case, model.config, tensors, tmp_path / "model.gguf")
    (tmp_path / "converted").mkdir()
    convert(tmp_path / "model.gguf", tmp_path / "converted", torch.float32, lambda n: None, needs_tokenizer=False)
    converted = load_file(tmp_path / "converted" / "model.safetensors")
    assert converted.keys() == tensors.keys()
    for weight, tensor in tensors.items():
        torch.testing.assert_close(converted[weight], tensor, rtol=0, atol=1e-6 if "norm" in weight else 0)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32).eval()
    assert type(again) is type(model)
    assert described(again.config) == described(model.config)
    wanted = logits_of(model)
    torch.testing.assert_close(logits_of(again), wanted, rtol=0, atol=1e-4)
    if is_supported(type(model).__name__):
        engine = TinyEngine(tmp_path / "converted")
        pack_weights(engine.model)
        torch.testing.assert_close(engine.forward({0: IDS.tolist()}), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_a_file_becomes_the_checkpoint_it_was_made_of(name: str, tmp_path: Path) -> None:
    assert_becomes_its_checkpoint(CASES[name], tmp_path)


def test_every_architecture_of_the_table_has_a_case() -> None:
    assert {case.arch for case in CASES.values()} - {"deepseek2", "gemma4"} == {
        name for name in FILES if not ARCHITECTURES[name].has_experts
    }


def test_llama_3_s_scaling_survives_as_factors(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = LLAMA_3 | {"original_max_position_embeddings": 16}
    case = Case("llama", "LlamaConfig", {"rope_parameters": rope}, changes=(interleaved,))
    model = make_checkpoint(case, tmp_path / "original")
    inv_freq, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    factors = (1e4 ** -(torch.arange(8) / 8) / inv_freq).tolist()
    case = Case("llama", "LlamaConfig", {}, changes=(interleaved,), factors={"rope_freqs": factors})
    write_file(case, model.config, load_file(tmp_path / "original" / "model.safetensors"), tmp_path / "model.gguf")
    (tmp_path / "converted").mkdir()
    convert(tmp_path / "model.gguf", tmp_path / "converted", torch.float32, lambda n: None, needs_tokenizer=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=0, atol=1e-4)
