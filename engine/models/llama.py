"""Llama and the families that are Llama but for one thing.

Llama 1 to 3.3, SmolLM2, ...    every rope scaling; attention_bias and mlp_bias in some derived models; Aquila,
                                DeepSeek LLM, Skywork and XVERSE are such
Yi                              the norms of its first release are called ln1 and ln2
Mistral, Ministral              a sliding window in all layers; queries that grow with their positions (Ministral 3)
Qwen2, Qwen2.5                  biases on q, k and v; a sliding window in the upper layers, if any
MiMo                            Qwen2; its layers for several tokens at once are left out
Seed-OSS                        biases on q, k and v, and another entry for that of o
Arcee                           squared ReLU, no gate
Qwen3                           an RMS norm of each query and key head before the rotation
"""

from typing import Any

from engine.layers.block import PreNorm
from engine.layers.mlp import PlainMLP
from engine.model_config import ModelConfig, QKNorm, parse_windows, read_decoder, upper_windows
from engine.models.base import CausalLM
from engine.models.names import COMMON_NAMES, Ignore, Rename


class Llama(CausalLM):
    """The frame itself: `engine.layers.block.PreNorm`, rotary embedding, RMS norms, a gated MLP."""


class Yi(Llama):
    checkpoint = (
        Rename(r"\.ln1\.", ".input_layernorm."),
        Rename(r"\.ln2\.", ".post_attention_layernorm."),
        *COMMON_NAMES,
    )


class Mistral(Llama):
    """A Llama whose layers all have config.json's `sliding_window`, if it is not null."""

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return read_decoder(raw, windows=parse_windows(raw))


class Qwen2(CausalLM):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return read_decoder(raw, windows=upper_windows(raw), qkv_bias=True, o_bias=False)


class MiMo(Qwen2):
    checkpoint = (Ignore(r"^model\.mtp_layers\."), *COMMON_NAMES)


class Qwen3(CausalLM):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return read_decoder(raw, windows=upper_windows(raw), qk_norm=QKNorm.HEADS)


class SeedOss(CausalLM):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return read_decoder(raw, qkv_bias=raw.get("attention_bias", True), o_bias=raw.get("attention_out_bias", False))


class UngatedBlock(PreNorm):
    mlp_class = PlainMLP


class Arcee(CausalLM):
    block = UngatedBlock

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return read_decoder(raw, hidden_act=raw.get("hidden_act", "relu2"))
