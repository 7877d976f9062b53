"""MPT: layer norms without bias, scores that fall with distance, an MLP without a gate.

positions       nothing is rotated: scores fall with distance (ALiBi), by `alibi_bias_max`
norms           layer norms with a weight alone
attention       queries, keys and values may be clamped
MLP             `up_proj`, GELU, `down_proj`
checkpoint      `Wqkv` holds q, k and v
"""

from typing import Any

from engine.errors import ModelError
from engine.layers.block import PreNorm
from engine.layers.mlp import PlainMLP
from engine.layers.norm import BiaslessLayerNorm
from engine.model_config import ModelConfig, alibi_slopes, head_dim_of, read_decoder
from engine.models.base import CausalLM
from engine.models.names import COMMON_NAMES, Rename, Split
from engine.models.spelling import respelled
from engine.rope_config import parse_rope

# What the published models have, of what else there could be.
ATTENTION = {"alibi": True, "attn_type": "multihead_attention", "prefix_lm": False, "qk_ln": False}


class MptBlock(PreNorm):
    norm_class, mlp_class = BiaslessLayerNorm, PlainMLP


class Mpt(CausalLM):
    block = MptBlock
    checkpoint = (
        *COMMON_NAMES,
        Split("Wqkv", ("q_proj", "k_proj", "v_proj"), (1, 1, 1)),
        Rename(r"^(transformer\.)?blocks\.", "model.layers."),
        Rename(r"^(transformer\.)?wte\.", "model.embed_tokens."),
        Rename(r"^(transformer\.)?norm_f\.", "model.norm."),
        Rename(r"\.norm_1\.", ".input_layernorm."),
        Rename(r"\.norm_2\.", ".post_attention_layernorm."),
        Rename(r"\.attn\.out_proj\.", ".attn.o_proj."),
        Rename(r"\.attn\.", ".self_attn."),
        Rename(r"\.ffn\.", ".mlp."),
    )

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        attention = raw.get("attn_config") or {}
        for name, usual in ATTENTION.items():
            if attention.get(name, usual) != usual:
                raise ModelError(f"attn_config: {name} {attention[name]!r} is not supported for MPT, only {usual!r}")
        if not raw.get("no_bias", True) or raw.get("logit_scale"):
            raise ModelError("biases and logit_scale are not supported for MPT: no published model has them")
        raw = respelled(
            raw,
            hidden_size="d_model",
            num_attention_heads="n_heads",
            num_hidden_layers="n_layers",
            max_position_embeddings="max_seq_len",
        )
        num_heads, head_dim = raw["num_attention_heads"], head_dim_of(raw)
        return read_decoder(
            raw | {"intermediate_size": int(raw.get("expansion_ratio", 4) * raw["hidden_size"])},
            rope=parse_rope(raw, head_dim).without_rotation,
            slopes=alibi_slopes(num_heads, attention.get("alibi_bias_max", 8)),
            num_kv_heads=num_heads,
            scale=attention.get("softmax_scale") or head_dim**-0.5,
            clip_qkv=attention.get("clip_qkv") or 0.0,
            hidden_act="gelu",
            norm_eps=raw.get("layer_norm_epsilon", 1e-5),
            tie_word_embeddings=raw.get("tie_word_embeddings", True),
        )
