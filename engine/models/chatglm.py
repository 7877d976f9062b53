"""ChatGLM 2 and 3, GLM-4-9B as first published: Llamas under Megatron's names, whose heads are half rotated.

rotation        the first half of a head, in pairs side by side (`original_rope`), theta 10000 `rope_ratio`
q, k, v         in one `query_key_value`, with biases; few KV heads (`multi_query_group_num`)
MLP             gate and up in one `dense_h_to_4h`
"""

from collections.abc import Sequence
from typing import Any

from engine.errors import ModelError
from engine.model_config import ModelConfig, read_decoder
from engine.models.base import CausalLM
from engine.models.names import Ignore, Interleave, Rename, Rule, Split
from engine.models.spelling import respelled, with_rope

# What all published models have.
ONLY = {"rmsnorm": True, "post_layer_norm": True, "apply_residual_connection_post_layernorm": False}


class ChatGLM(CausalLM):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        if raw.get("position_encoding_2d"):
            raise ModelError("ChatGLM-6B, the first of its name, is not supported; ChatGLM 2 and 3 and GLM-4 are")
        for name, only in ONLY.items():
            if raw.get(name, only) != only:
                raise ModelError(f"config.json: {name} {raw[name]} is not supported for ChatGLM, only {only}")
        common = with_rope(
            respelled(
                raw,
                num_hidden_layers="num_layers",
                intermediate_size="ffn_hidden_size",
                head_dim="kv_channels",
                max_position_embeddings="seq_length",
            ),
            rope_theta=10000.0 * raw.get("rope_ratio", 1.0),
            partial_rotary_factor=0.5,
        )
        if raw.get("multi_query_attention", False):
            common = respelled(common, num_key_value_heads="multi_query_group_num")
        has_bias = raw.get("add_bias_linear", False)
        return read_decoder(
            common,
            vocab_size=raw["padded_vocab_size"],
            norm_eps=raw.get("layernorm_epsilon", 1e-5),
            qkv_bias=has_bias or raw.get("add_qkv_bias", False),
            o_bias=has_bias,
            mlp_bias=has_bias,
        )

    @property
    def names(self) -> Sequence[Rule]:
        attention = self.config.attention[0]
        heads, kv_heads = attention.num_heads, attention.num_kv_heads
        pairs = Interleave(r"\.[qk]_proj\.", attention.head_dim, attention.rope.rotary_dim)
        return (
            Ignore(r"\.rotary_pos_emb\."),
            Rename(r"^transformer\.encoder\.final_layernorm\.", "model.norm."),
            Rename(r"^transformer\.encoder\.", "model."),
            Rename(r"^transformer\.embedding\.word_embeddings\.", "model.embed_tokens."),
            Rename(r"^transformer\.output_layer\.", "lm_head."),
            Rename(r"\.self_attention\.dense\.", ".self_attn.o_proj."),
            Rename(r"\.self_attention\.", ".self_attn."),
            Split("query_key_value", ("q_proj", "k_proj", "v_proj"), (heads, kv_heads, kv_heads)),
            *((pairs,) if self.config.raw.get("original_rope", True) else ()),
            Split("dense_h_to_4h", ("gate_proj", "up_proj"), (1, 1)),
            Rename(r"\.dense_4h_to_h\.", ".down_proj."),
            *super().names,
        )
