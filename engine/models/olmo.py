"""OLMo 1: a Llama whose layer norms have neither weight nor bias.

norms           bare layer norms
q, k, v         clamped to at most `clip_qkv`, in the models that have it
"""

from typing import Any

from engine.layers.block import PreNorm
from engine.layers.norm import BareLayerNorm
from engine.model_config import ModelConfig, read_decoder
from engine.models.base import CausalLM


class OlmoBlock(PreNorm):
    norm_class = BareLayerNorm


class Olmo(CausalLM):
    block = OlmoBlock

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return read_decoder(raw, norm_eps=1e-5, clip_qkv=raw.get("clip_qkv", 0.0))
