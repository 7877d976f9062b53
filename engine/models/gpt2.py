"""GPT-2: layer norms, learned positions, an MLP without a gate.

positions       a learned vector each, added to the token's; nothing is rotated
norms           layer norms with bias
biases          in attention and MLP
MLP             `c_fc`, GELU (tanh approximation), `c_proj`
checkpoint      matrices are stored [inputs, outputs]; `c_attn` holds q, k and v; with or without `transformer.`
"""

from typing import Any

from engine.errors import ModelError
from engine.layers.block import PreNorm
from engine.layers.mlp import PlainMLP
from engine.layers.norm import LayerNorm
from engine.model_config import ModelConfig, head_dim_of, read_decoder
from engine.models.base import CausalLM
from engine.models.names import COMMON_NAMES, Rename, Split, Transpose
from engine.models.positions import PositionedDecoder
from engine.models.spelling import respelled
from engine.rope_config import parse_rope


class GPT2Block(PreNorm):
    norm_class, mlp_class = LayerNorm, PlainMLP


class GPT2(CausalLM):
    decoder = PositionedDecoder
    block = GPT2Block
    checkpoint = (
        Transpose(r"\.(c_attn|c_proj|c_fc)\.weight$"),
        Split("c_attn", ("q_proj", "k_proj", "v_proj"), (1, 1, 1)),
        Rename(r"^(transformer\.)?h\.", "model.layers."),
        Rename(r"^(transformer\.)?wte\.", "model.embed_tokens."),
        Rename(r"^(transformer\.)?wpe\.", "model.embed_positions."),
        Rename(r"^(transformer\.)?ln_f\.", "model.norm."),
        Rename(r"\.ln_1\.", ".input_layernorm."),
        Rename(r"\.ln_2\.", ".post_attention_layernorm."),
        Rename(r"\.attn\.c_proj\.", ".attn.o_proj."),
        Rename(r"\.mlp\.c_fc\.", ".mlp.up_proj."),
        Rename(r"\.mlp\.c_proj\.", ".mlp.down_proj."),
        *COMMON_NAMES,
        Rename(r"\.attn\.", ".self_attn."),
    )

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        for name in ("add_cross_attention", "scale_attn_by_inverse_layer_idx"):
            if raw.get(name):
                raise ModelError(f"{name} is not supported for GPT-2")
        raw = respelled(
            raw,
            hidden_size="n_embd",
            num_hidden_layers="n_layer",
            num_attention_heads="n_head",
            max_position_embeddings="n_positions",
        )
        head_dim = head_dim_of(raw)
        return read_decoder(
            raw | {"intermediate_size": raw.get("n_inner") or 4 * raw["hidden_size"]},
            rope=parse_rope(raw, head_dim).without_rotation,
            num_kv_heads=raw["num_attention_heads"],
            scale=head_dim**-0.5 if raw.get("scale_attn_weights", True) else 1.0,
            hidden_act=raw.get("activation_function", "gelu_new"),
            norm_eps=raw.get("layer_norm_epsilon", 1e-5),
            qkv_bias=True,
            o_bias=True,
            mlp_bias=True,
            tie_word_embeddings=raw.get("tie_word_embeddings", True),
        )
