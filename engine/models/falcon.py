"""Falcon: layer norms, one key for many queries, an MLP without a gate.

block           parallel with one layer norm (7B, 11B) or two (40B, 180B), or Llama's where not `parallel_attn` (RW)
positions       rotated, or scores that fall with distance (RW: ALiBi, as steep as scores are scaled)
attention       a key and a value for all heads (7B) or for a group of them, or for each (RW)
biases          in attention and MLP, if `bias` (RW)
MLP             `dense_h_to_4h`, GELU, `dense_4h_to_h`
checkpoint      `query_key_value` holds the queries of a key's heads, that key and its value, then the next ones
"""

from collections.abc import Sequence
from typing import Any

from engine.layers.block import Block, Parallel, ParallelTwoNorms, PreNorm
from engine.layers.mlp import PlainMLP
from engine.layers.norm import LayerNorm
from engine.model_config import ModelConfig, alibi_slopes, head_dim_of, read_decoder
from engine.models.base import CausalLM
from engine.models.names import COMMON_NAMES, MEGATRON_NAMES, Rename, Rule, Split
from engine.rope_config import parse_rope

TRAINED_LENGTH = 2048  # of those whose files do not say so


class FalconBlock(Parallel):
    norm_class, mlp_class = LayerNorm, PlainMLP


class FalconTwoNormsBlock(ParallelTwoNorms):
    norm_class, mlp_class = LayerNorm, PlainMLP


class FalconSerialBlock(PreNorm):
    norm_class, mlp_class = LayerNorm, PlainMLP


BLOCKS: dict[str, type[Block]] = {
    "one norm": FalconBlock,
    "two norms": FalconTwoNormsBlock,
    "serial": FalconSerialBlock,
}


class Falcon(CausalLM):
    checkpoint = (
        Rename(r"\.ln_attn\.", ".input_layernorm."),
        *COMMON_NAMES,
        Rename(r"^(transformer\.)?h\.", "model.layers."),
        Rename(r"^(transformer\.)?word_embeddings\.", "model.embed_tokens."),
        Rename(r"^(transformer\.)?ln_f\.", "model.norm."),
        Rename(r"\.ln_mlp\.", ".post_attention_layernorm."),
        *MEGATRON_NAMES,
    )

    @classmethod
    def block_of(cls, config: ModelConfig) -> type[Block]:
        return BLOCKS[config.block_kind]

    @property
    def names(self) -> Sequence[Rule]:
        attention = self.config.attention[0]
        num_groups = attention.num_kv_heads
        sizes = (attention.num_heads // num_groups, 1, 1)
        return (*super().names, Split("query_key_value", ("q_proj", "k_proj", "v_proj"), sizes, num_groups))

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        num_heads, is_new = raw["num_attention_heads"], raw.get("new_decoder_architecture", False)
        raw = {"max_position_embeddings": TRAINED_LENGTH} | raw
        has_bias, has_alibi, head_dim = raw.get("bias", False), raw.get("alibi", False), head_dim_of(raw)
        rope, scale = parse_rope(raw, head_dim), head_dim**-0.5
        num_norms = raw.get("num_ln_in_parallel_attn") or (2 if is_new else 1)
        parallel = "two norms" if is_new and num_norms == 2 else "one norm"
        is_parallel = is_new or raw.get("parallel_attn", True)
        if is_new:
            num_kv_heads = raw.get("num_kv_heads") or num_heads
        else:
            num_kv_heads = 1 if raw.get("multi_query", True) else num_heads
        return read_decoder(
            raw | {"intermediate_size": raw.get("ffn_hidden_size") or 4 * raw["hidden_size"]},
            rope=rope.without_rotation if has_alibi else rope,
            slopes=tuple(scale * slope for slope in alibi_slopes(num_heads)) if has_alibi else (),
            num_kv_heads=num_kv_heads,
            hidden_act=raw.get("activation") or "gelu",
            norm_eps=raw.get("layer_norm_epsilon", 1e-5),
            qkv_bias=has_bias,
            o_bias=has_bias,
            mlp_bias=has_bias,
            block_kind=parallel if is_parallel else "serial",
            tie_word_embeddings=raw.get("tie_word_embeddings", True),
        )
