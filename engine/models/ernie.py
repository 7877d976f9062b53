"""ERNIE 4.5, dense, and Helium: Llamas that rotate pairs side by side; their rows are reordered when loaded.

biases          ERNIE: on all products or on none (`use_bias`)
norms           Helium: rounded after the weight
"""

from collections.abc import Sequence
from typing import Any

from engine.layers.block import PreNorm
from engine.layers.norm import Float32RMSNorm
from engine.model_config import ModelConfig, read_decoder
from engine.models.base import CausalLM
from engine.models.names import Interleave, Rule


class Ernie45(CausalLM):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        has_bias = raw.get("use_bias", False)
        is_tied = raw.get("tie_word_embeddings", True)
        return read_decoder(raw, qkv_bias=has_bias, o_bias=has_bias, mlp_bias=has_bias, tie_word_embeddings=is_tied)

    @property
    def names(self) -> Sequence[Rule]:
        attention = self.config.attention[0]
        return (Interleave(r"\.[qk]_proj\.", attention.head_dim, attention.rope.rotary_dim), *super().names)


class HeliumBlock(PreNorm):
    norm_class = Float32RMSNorm


class Helium(Ernie45):
    block = HeliumBlock

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return read_decoder(raw, o_bias=False)
