"""GLM-4-9B and the GLM-4-0414 models: Llamas whose heads are half rotated, in pairs side by side.

rotation        the first half of a head; its rows are reordered when loaded
MLP             gate and up in one `gate_up_proj` on disk
biases          on q, k and v
norms           0414: behind attention and MLP as well; Gemma's names for them are given to the block
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from engine.layers.block import Sandwich
from engine.model_config import ModelConfig, read_decoder
from engine.models.base import CausalLM
from engine.models.names import COMMON_NAMES, Interleave, Rename, Rule, fused_names
from engine.models.spelling import with_rope


class Glm(CausalLM):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        has_bias = raw.get("attention_bias", True)
        raw = with_rope(raw, partial_rotary_factor=raw.get("partial_rotary_factor", 0.5))
        return read_decoder(raw, qkv_bias=has_bias, o_bias=False)

    @property
    def names(self) -> Sequence[Rule]:
        attention = self.config.attention[0]
        return (
            *fused_names(attention.num_heads, attention.num_kv_heads),
            Interleave(r"\.[qk]_proj\.", attention.head_dim, attention.rope.rotary_dim),
            *super().names,
        )


class Glm4(Glm):
    block = Sandwich
    checkpoint: ClassVar[Sequence[Rule]] = (
        Rename(r"\.post_attention_layernorm\.", ".pre_feedforward_layernorm."),
        Rename(r"\.post_self_attn_layernorm\.", ".post_attention_layernorm."),
        Rename(r"\.post_mlp_layernorm\.", ".post_feedforward_layernorm."),
        *COMMON_NAMES,
    )
