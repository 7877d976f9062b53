"""OLMo 2 and 3: Llamas with norms behind the branches.

norms           of what each branch adds to the residual stream, none before it; rounded after the weight
q, k            an RMS norm over all heads together
windows         OLMo 3: in three of four layers, whose positions are not stretched
"""

from typing import Any

from engine.layers.block import PostNorm
from engine.layers.norm import Float32RMSNorm
from engine.model_config import ModelConfig, QKNorm, head_dim_of, local_and_global, read_decoder
from engine.models.base import CausalLM
from engine.rope_config import parse_local_rope, parse_rope


class Olmo2Block(PostNorm):
    norm_class = Float32RMSNorm


class Olmo2(CausalLM):
    block = Olmo2Block

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return read_decoder(raw, qk_norm=QKNorm.ALL_HEADS)


class Olmo3(CausalLM):
    block = Olmo2Block

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        head_dim = head_dim_of(raw)
        rope, local_rope = parse_rope(raw, head_dim, "full_attention"), parse_local_rope(raw, head_dim)
        return read_decoder(raw, qk_norm=QKNorm.ALL_HEADS, **local_and_global(raw, 4, local_rope, rope))
