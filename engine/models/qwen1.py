"""Qwen 1: a Llama with GPT-2's names, biases on q, k and v, and an MLP half as wide as `intermediate_size` says.

Beyond `seq_length`, if --context-length asks for that: the rotary embedding is stretched (`use_dynamic_ntk`), by the
context length where the authors' code takes each prompt's, and queries are multiplied by the logarithm to that base of
how many tokens they see (`use_logn_attn`).
"""

from collections.abc import Sequence
from typing import Any

from engine.layers.rotary import LOG_LENGTH
from engine.model_config import ModelConfig, read_decoder
from engine.models.base import CausalLM
from engine.models.names import Rename, Rule, Split
from engine.models.spelling import with_rope


class Qwen1(CausalLM):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        common = with_rope(
            raw | {"head_dim": raw.get("kv_channels")} | {"max_position_embeddings": raw["seq_length"]},
            rope_type="stepped_ntk" if raw.get("use_dynamic_ntk") else "default",
            rope_theta=raw.get("rotary_emb_base", 10000.0),
            partial_rotary_factor=raw.get("rotary_pct", 1.0),
            **({LOG_LENGTH: raw["seq_length"]} if raw.get("use_logn_attn") else {}),
        )
        return read_decoder(
            common,
            qkv_bias=True,
            o_bias=not raw.get("no_bias", True),
            mlp_bias=not raw.get("no_bias", True),
            norm_eps=raw.get("layer_norm_epsilon", 1e-6),
            intermediate_size=raw["intermediate_size"] // 2,
        )

    @property
    def names(self) -> Sequence[Rule]:
        return (
            Rename(r"^(transformer\.)?h\.", "model.layers."),
            Rename(r"^(transformer\.)?wte\.", "model.embed_tokens."),
            Rename(r"^(transformer\.)?ln_f\.", "model.norm."),
            Rename(r"\.ln_1\.", ".input_layernorm."),
            Rename(r"\.ln_2\.", ".post_attention_layernorm."),
            Split("attn.c_attn", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (1, 1, 1)),
            Rename(r"\.attn\.c_proj\.", ".self_attn.o_proj."),
            Rename(r"\.mlp\.w2\.", ".mlp.gate_proj."),
            Rename(r"\.mlp\.w1\.", ".mlp.up_proj."),
            Rename(r"\.mlp\.c_proj\.", ".mlp.down_proj."),
            *super().names,
        )
