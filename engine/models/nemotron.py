"""Nemotron-4 and Minitron: a Llama with layer norms, squared ReLU without a gate, and half of each head rotated.

norms           layer norms with bias, scaled by 1 + weight
MLP             `up_proj`, ReLU squared, `down_proj`
rotation        of the first half of a head
"""

from typing import Any

from engine.layers.block import PreNorm
from engine.layers.mlp import PlainMLP
from engine.layers.norm import OffsetLayerNorm
from engine.model_config import ModelConfig, read_decoder
from engine.models.base import CausalLM
from engine.models.spelling import with_rope


class NemotronBlock(PreNorm):
    norm_class, mlp_class = OffsetLayerNorm, PlainMLP


class Nemotron(CausalLM):
    block = NemotronBlock

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return read_decoder(
            with_rope(raw, partial_rotary_factor=0.5),
            hidden_act=raw.get("hidden_act", "relu2"),
            norm_eps=raw.get("norm_eps", 1e-5),
        )
