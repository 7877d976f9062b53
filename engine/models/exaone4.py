"""EXAONE 4: a Llama with norms behind the branches.

norms           of what each branch adds to the residual stream, none before it; of each query and key head
windows         the 32B: in three of four layers; the others rotate nothing
"""

from typing import Any

from engine.layers.block import PostNorm
from engine.model_config import ModelConfig, QKNorm, head_dim_of, local_and_global, read_decoder
from engine.models.base import CausalLM
from engine.rope_config import parse_rope


class Exaone4(CausalLM):
    block = PostNorm

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        rope = parse_rope(raw, head_dim_of(raw))
        global_rope = rope.without_rotation if raw.get("sliding_window") else rope
        layers = local_and_global(raw, 4, rope, global_rope)
        return read_decoder(raw, qkv_bias=False, o_bias=False, qk_norm=QKNorm.HEADS, **layers)
