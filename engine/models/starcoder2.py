"""StarCoder2: a Llama with layer norms, biases everywhere, and an MLP without a gate.

norms           layer norms with bias
biases          in attention and MLP
MLP             `c_fc`, GELU (tanh approximation), `c_proj`
windows         a sliding window in all layers, in the models that have one
"""

from typing import Any

from engine.layers.block import PreNorm
from engine.layers.mlp import PlainMLP
from engine.layers.norm import LayerNorm
from engine.model_config import ModelConfig, parse_windows, read_decoder
from engine.models.base import CausalLM
from engine.models.names import COMMON_NAMES, Rename


class Starcoder2Block(PreNorm):
    norm_class, mlp_class = LayerNorm, PlainMLP


class Starcoder2(CausalLM):
    block = Starcoder2Block
    checkpoint = (*COMMON_NAMES, Rename(r"\.c_fc\.", ".up_proj."), Rename(r"\.c_proj\.", ".down_proj."))

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        has_bias = raw.get("use_bias", True)
        return read_decoder(
            raw,
            windows=parse_windows(raw),
            hidden_act=raw.get("hidden_act", "gelu_pytorch_tanh"),
            norm_eps=raw.get("norm_epsilon", 1e-5),
            qkv_bias=has_bias,
            o_bias=has_bias,
            mlp_bias=has_bias,
            tie_word_embeddings=raw.get("tie_word_embeddings", True),
        )
