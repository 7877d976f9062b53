"""List what a config.json may leave out, where it is not the same in all families: the defaults of transformers.

Files that transformers writes have all entries; others, written by hand or by a model's authors, have what differs
from these.
"""

from typing import Any

from engine.config_file import merged


def rope(theta: float) -> dict[str, Any]:
    return {"rope_theta": theta}


# By model_type. An entry whose absence is told in an error, such as one of the sizes of experts, is not here.
DEFAULTS: dict[str, dict[str, Any]] = {
    "arcee": {"rms_norm_eps": 1e-5},
    "ernie4_5": {
        "head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_parameters": rope(5e5),
    },
    "ernie4_5_moe": {"rms_norm_eps": 1e-5, "rope_parameters": rope(5e5)},
    "exaone4": {"num_key_value_heads": 32, "rms_norm_eps": 1e-5},
    "gemma": {"head_dim": 256, "num_key_value_heads": 16},
    "glm": {"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-7},
    "glm4": {"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-7},
    "glm4_moe": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5},
    "glm4_moe_lite": {"rms_norm_eps": 1e-5},
    "glm_moe_dsa": {"rms_norm_eps": 1e-5},
    "gpt_oss": {
        "head_dim": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_parameters": rope(1.5e5),
        "sliding_window": 128,
    },
    "helium": {
        "head_dim": 128, "num_key_value_heads": 20, "rms_norm_eps": 1e-8, "rope_parameters": rope(1e5),
    },
    "hunyuan_v1_dense": {"rms_norm_eps": 1e-5},
    "hunyuan_v1_moe": {"rms_norm_eps": 1e-5},
    "llama4_text": {"head_dim": 128, "num_key_value_heads": 8, "rope_parameters": rope(5e5)},
    "minicpm3": {"dim_model_base": 256, "rms_norm_eps": 1e-5, "scale_depth": 1.4, "scale_emb": 12},
    "minimax_m2": {"head_dim": 128, "num_key_value_heads": 8, "rope_parameters": rope(5e6)},
    "ministral": {"num_key_value_heads": 8},
    "ministral3": {
        "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_parameters": rope(1e6),
    },
    "mistral": {"num_key_value_heads": 8},
    "mixtral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_parameters": rope(1e6)},
    "olmo2": {"rms_norm_eps": 1e-5},
    "olmo3": {"rms_norm_eps": 1e-5, "rope_parameters": rope(5e5)},
    "olmoe": {"rms_norm_eps": 1e-5},
    "phi3": {"rms_norm_eps": 1e-5},
    "phimoe": {"num_key_value_heads": 8, "rope_parameters": rope(1e6)},
    "qwen2_moe": {"num_key_value_heads": 16},
    "seed_oss": {"head_dim": 128, "num_key_value_heads": 8},
    "smollm3": {"rope_parameters": rope(2e6)},
    "stablelm": {"num_key_value_heads": 32},
    "starcoder2": {"num_key_value_heads": 2},
    "youtu": {"tie_word_embeddings": True},
}  # fmt: skip


def with_defaults(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a config.json with what it leaves out: what is null in it is said to be absent."""
    model_type = entries.get("model_type")
    return merged(DEFAULTS.get(model_type, {}), entries) if isinstance(model_type, str) else entries
