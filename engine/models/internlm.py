"""InternLM: Llamas with names and biases of their own. None has a class in transformers.

InternLM        `bias` on q, k, v and o
InternLM 2, 2.5 `bias` likewise; q, k and v in one `wqkv`, KV head by KV head: its queries, its key, its value
InternLM 3      `qkv_bias` on q, k and v, `bias` on o and in the MLP
"""

from collections.abc import Sequence
from typing import Any

from engine.model_config import ModelConfig, read_decoder
from engine.models.base import CausalLM
from engine.models.names import Rename, Rule, Split
from engine.models.spelling import with_rope


class InternLM(CausalLM):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        rotary = raw.get("rotary") or {}
        rope_type = "dynamic" if rotary.get("type") == "dynamic" else "default"
        raw = with_rope(
            raw,
            rope_type=rope_type,
            rope_theta=rotary.get("base", 10000),
            factor=rotary.get("scaling_factor", 1.0),
        )
        has_bias = raw.get("bias", True)
        return read_decoder(raw, qkv_bias=has_bias, o_bias=has_bias)


class InternLM2(CausalLM):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        has_bias = raw.get("bias", True)
        return read_decoder(raw, qkv_bias=has_bias, o_bias=has_bias)

    @property
    def names(self) -> Sequence[Rule]:
        attention = self.config.attention[0]
        queries = attention.num_heads // attention.num_kv_heads
        return (
            Split("attention.wqkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (queries, 1, 1),
                  num_groups=attention.num_kv_heads),
            Rename(r"\.attention\.wo\.", ".self_attn.o_proj."),
            Rename(r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
            Rename(r"\.feed_forward\.w3\.", ".mlp.up_proj."),
            Rename(r"\.feed_forward\.w2\.", ".mlp.down_proj."),
            Rename(r"\.attention_norm\.", ".input_layernorm."),
            Rename(r"\.ffn_norm\.", ".post_attention_layernorm."),
            Rename(r"\btok_embeddings\.", "embed_tokens."),
            Rename(r"^output\.", "lm_head."),
            *super().names,
        )  # fmt: skip


class InternLM3(CausalLM):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        has_bias = raw.get("bias", False)
        return read_decoder(raw, qkv_bias=raw.get("qkv_bias", False), o_bias=has_bias, mlp_bias=has_bias)
