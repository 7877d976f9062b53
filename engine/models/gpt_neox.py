"""GPT-NeoX and Pythia: attention and MLP side by side, each with a layer norm of its own.

block           parallel with two norms, or Llama's where not `use_parallel_residual`
norms           layer norms with bias
biases          in attention and MLP
MLP             `dense_h_to_4h`, GELU, `dense_4h_to_h`
rotation        of the first quarter of a head, by default: `rotary_pct`, `rotary_emb_base`
checkpoint      `query_key_value` holds a head's query, key and value, then the next head's
"""

from collections.abc import Sequence
from typing import Any

from engine.layers.block import Block, ParallelTwoNorms, PreNorm
from engine.layers.mlp import PlainMLP
from engine.layers.norm import LayerNorm
from engine.model_config import ModelConfig, read_decoder
from engine.models.base import CausalLM
from engine.models.names import COMMON_NAMES, Ignore, Rename, Rule, Split
from engine.models.spelling import with_rope


class GPTNeoXBlock(ParallelTwoNorms):
    norm_class, mlp_class = LayerNorm, PlainMLP


class GPTNeoXSerialBlock(PreNorm):
    norm_class, mlp_class = LayerNorm, PlainMLP


class GPTNeoX(CausalLM):
    checkpoint = (
        *COMMON_NAMES,
        Ignore(r"\.attention\.(bias|masked_bias)$"),
        Rename(r"^gpt_neox\.", "model."),
        Rename(r"^embed_out\.", "lm_head."),
        Rename(r"\bembed_in\.", "embed_tokens."),
        Rename(r"\bfinal_layer_norm\.", "norm."),
        Rename(r"\.attention\.", ".self_attn."),
        Rename(r"\.self_attn\.dense\.", ".self_attn.o_proj."),
        Rename(r"\.dense_h_to_4h\.", ".up_proj."),
        Rename(r"\.dense_4h_to_h\.", ".down_proj."),
    )

    @classmethod
    def block_of(cls, config: ModelConfig) -> type[Block]:
        return GPTNeoXBlock if config.block_kind == "parallel" else GPTNeoXSerialBlock

    @property
    def names(self) -> Sequence[Rule]:
        num_heads = self.config.attention[0].num_heads
        return (*super().names, Split("query_key_value", ("q_proj", "k_proj", "v_proj"), (1, 1, 1), num_heads))

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        rope = {"rope_theta": raw.get("rotary_emb_base", 10000.0), "partial_rotary_factor": raw.get("rotary_pct", 0.25)}
        return read_decoder(
            with_rope(raw, **rope),
            num_kv_heads=raw["num_attention_heads"],
            hidden_act=raw.get("hidden_act", "gelu"),
            norm_eps=raw.get("layer_norm_eps", 1e-5),
            qkv_bias=raw.get("attention_bias", True),
            o_bias=raw.get("attention_bias", True),
            mlp_bias=True,
            block_kind="parallel" if raw.get("use_parallel_residual", True) else "serial",
        )
