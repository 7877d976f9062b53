"""Read config.json and its like: overrides, one spelling of rotary settings, and a check of what each entry must be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.errors import ModelError, shown
from engine.rope_config import ROPE_OBJECTS, with_rope_parameters

Check = Callable[[Any], bool]


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def is_list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


# What entries must be that are there: a model made of anything else fails far from here, or not before its first step.
KINDS: tuple[tuple[str, Check, tuple[str, ...]], ...] = (
    ("a positive integer", lambda value: type(value) is int and value > 0, (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings",
        "model_max_length", "n_embd", "n_layer", "n_head", "n_inner", "n_positions", "ffn_dim", "word_embed_proj_dim",
        "ffn_hidden_size", "kv_channels", "multi_query_group_num", "num_layers", "padded_vocab_size", "seq_length",
        "no_rope_layer_interval", "global_head_dim", "num_global_key_value_heads", "vocab_size_per_layer_input",
        "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    )),
    ("a positive number", lambda value: is_number(value) and value > 0, (
        "rms_norm_eps", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor",
        "layer_norm_epsilon", "layernorm_epsilon", "rope_ratio", "rotary_emb_base", "rotary_pct",
        "dim_model_base", "scale_depth", "scale_emb",
        "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling", "alpha",
        "rope_local_base_freq", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
        "layer_norm_eps", "norm_eps", "norm_epsilon", "logit_scale", "clip_qkv",
    )),
    ("a number", is_number, (
        "llama_4_scaling_beta", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "moe_norm_min",
        "routed_scaling_factor", "router_jitter_noise", "router_logit_softcapping", "attn_scale", "floor_scale",
        "temperature", "top_p", "min_p", "repetition_penalty",
    )),
    ("an integer", lambda value: type(value) is int, (
        "sliding_window", "max_window_layers", "num_kv_shared_layers", "hidden_size_per_layer_input", "top_k",
        "first_k_dense_replace", "num_nextn_predict_layers", "num_mtp_modules", "top_k_experts",
        "n_routed_experts", "num_local_experts",
        "moe_num_experts", "num_experts_per_tok", "experts_per_token", "moe_k", "n_group", "topk_group",
        "n_shared_experts", "moe_num_shared_experts", "shared_expert_intermediate_size", "shared_intermediate_size",
        "decoder_sparse_step", "moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index",
        "interleave_moe_layer_step", "intermediate_size_mlp",
    )),
    ("true or false", lambda value: isinstance(value, bool), (
        "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_bias", "attention_out_bias",
        "bias", "no_bias", "qkv_bias", "add_bias_linear", "add_qkv_bias", "multi_query_attention", "original_rope",
        "use_dynamic_ntk", "use_logn_attn",
        "use_qkv_bias", "use_parallel_residual", "qk_layernorm", "use_qk_norm", "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx", "add_cross_attention", "do_layer_norm_before", "enable_bias",
        "layer_norm_elementwise_affine", "attention_k_eq_v", "use_double_wide_mlp", "enable_moe_block",
        "rope_interleave", "norm_topk_prob",
    )),
    ("a string", lambda value: isinstance(value, str), (
        "hidden_act", "hidden_activation", "activation_function", "model_type", "whole_model_type", "dtype",
        "torch_dtype",
    )),
    ("an object", lambda value: isinstance(value, dict), (
        "rope_parameters", "rope_scaling", "quantization_config", "id2label", "per_layer_config",
    )),
    ("a list of strings", is_list_of(lambda value: isinstance(value, str)), (
        "architectures", "layer_types", "mlp_layer_types",
    )),
    ("a list of numbers", is_list_of(is_number), (
        "short_factor", "long_factor", "no_rope_layers", "mlp_only_layers", "moe_layers",
    )),
    ("an integer, or a list of them", lambda value: is_list_of(lambda one: type(one) is int)(
        value if isinstance(value, list) else [value]
    ), ("moe_layer_freq", "num_experts", "moe_topk", "num_shared_expert", "moe_intermediate_size")),
    ("a number, or letters", lambda value: type(value) in (int, str), ("sliding_window_pattern",)),
    ("a token's id, or a list of them", lambda value: is_list_of(lambda one: type(one) is int)(
        value if isinstance(value, list) else [value]
    ), ("eos_token_id",)),
)  # fmt: skip


# Entries of a model that also reads images that stand beside `text_config`, or count where they stand in both.
OUTER = ("architectures", "tie_word_embeddings", "quantization_config")

# Files beside config.json that describe a checkpoint's quantization -> the method, where they name none.
QUANTIZATION_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}


def read_raw(folder: Path, config: EngineConfig) -> dict[str, Any]:
    """Return `folder`/config.json with the overrides of `config`, rotary settings in one spelling, nothing checked."""
    if (folder / "params.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has Mistral's own params.json alone: the config.json and the weights that go with "
                         "it, which most repositories have as well, are needed")  # fmt: skip
    entries = _in_one_spelling(read_json(folder / "config.json", required=True))
    if not entries.get("quantization_config"):
        entries["quantization_config"] = entries.get("compression_config") or _quantization_beside(folder)
    return merged(entries, _in_one_spelling(parse_overrides(config.json_model_override_args)))


def _quantization_beside(folder: Path) -> dict[str, Any] | None:
    """Return what a file of its own says of a checkpoint's quantization, as older libraries and ModelOpt write it."""
    for name, method in QUANTIZATION_FILES.items():
        if content := read_json(folder / name):
            inner = content.get("quantization")
            return {"quant_method": method} | (inner if isinstance(inner, dict) else content)
    return None


def _in_one_spelling(entries: dict[str, Any]) -> dict[str, Any]:
    """Return `entries` flat, with all rotary settings in `rope_parameters`.

    A model that also reads images keeps the entries of its language model in `text_config`, but for `OUTER` ones; its
    own `model_type` becomes `whole_model_type`.
    """
    text = entries.get("text_config")
    if isinstance(text, dict):
        outer = {name: value for name, value in entries.items() if name != "text_config"}
        kept = {name for name in OUTER if outer.get(name) is not None}
        outer["whole_model_type"] = outer.get("model_type", "")
        entries = outer | {name: value for name, value in text.items() if name not in kept and value is not None}
    return with_rope_parameters(entries)


def merged(entries: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return `entries` with those of `overrides` in their place; objects are merged entry by entry."""
    result = entries | overrides
    for name, value in overrides.items():
        if isinstance(value, dict) and isinstance(before := entries.get(name), dict):
            result[name] = merged(before, value)
    return result


def read_json(path: Path, required: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file; {} if the file is missing and not required."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not required:
            return {}
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object")
    return content


def checked(entries: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return those of `entries` that are not null. `ModelError` naming the first that is not what it must be.

    Where anything but true or false must be, false is null as well: some files have it for what a model is without.
    """
    present = {name: value for name, value in entries.items() if value is not None}
    for wanted, is_right, names in KINDS:
        for name in names:
            if name not in present or is_right(present[name]):
                continue
            if present[name] is False:
                del present[name]
            else:
                raise ModelError(f"{file}: {name} must be {wanted}, got {shown(present[name])}")
    for name in ROPE_OBJECTS:
        if name in present:
            present[name] = _checked_rope(present[name], file)
    return present


def _checked_rope(parameters: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return rotary settings that are not null, those of each type of layer too."""
    return {
        name: checked(value, file) if isinstance(value, dict) else value
        for name, value in checked(parameters, file).items()
    }


def parse_overrides(text: str) -> dict[str, Any]:
    try:
        overrides = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"--json-model-override-args is not JSON: {error}") from None
    if not isinstance(overrides, dict):
        raise ModelError(f"--json-model-override-args must be a JSON object, got {text}")
    return overrides
