"""Phi-1, Phi-1.5 and Phi-2: attention and MLP side by side, layer norms, biases everywhere.

block           parallel, with one layer norm; `final_layernorm` behind the last
biases          in attention, MLP and the head
MLP             `fc1`, GELU (tanh approximation), `fc2`
rotation        of the first part of a head
"""

from typing import Any

from engine.errors import ModelError
from engine.layers.block import Parallel
from engine.layers.mlp import PlainMLP
from engine.layers.norm import LayerNorm
from engine.model_config import ModelConfig, read_decoder
from engine.models.base import CausalLM
from engine.models.names import COMMON_NAMES, Rename
from engine.models.spelling import with_rope


class PhiBlock(Parallel):
    norm_class, mlp_class = LayerNorm, PlainMLP


class Phi(CausalLM):
    block = PhiBlock
    checkpoint = (
        *COMMON_NAMES,
        Rename(r"\.self_attn\.dense\.", ".self_attn.o_proj."),
        Rename(r"\.fc1\.", ".up_proj."),
        Rename(r"\.fc2\.", ".down_proj."),
        Rename(r"\bfinal_layernorm\.", "norm."),
    )

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        if raw.get("qk_layernorm"):
            raise ModelError("qk_layernorm is not supported for Phi: no released model has it")
        return read_decoder(
            with_rope(raw, partial_rotary_factor=0.5),
            hidden_act=raw.get("hidden_act", "gelu_new"),
            norm_eps=raw.get("layer_norm_eps", 1e-5),
            qkv_bias=True,
            o_bias=True,
            mlp_bias=True,
            lm_head_bias=True,
        )
