"""Gemma 1 to 3: Llamas with other norms, scales, windows and activation.

norms           scaled by 1 + weight in float32; 2 and 3: before and after attention and MLP; 3: of query and key heads
embedding       times √hidden, in the model's dtype; tied to the head
scores          2 and 3: scaled by query_pre_attn_scalar^-½; 2: soft-capped, and so are the logits
windows         2: every other layer, from the first on; 3: five of six, and these rotate by a base of their own
MLP             GELU, tanh approximation
"""

from typing import Any

from engine.errors import ModelError
from engine.layers.block import PreNorm, Sandwich
from engine.layers.norm import OffsetRMSNorm
from engine.model_config import (
    ModelConfig,
    QKNorm,
    every_nth_global,
    head_dim_of,
    layer_windows,
    local_and_global,
    read_decoder,
)  # fmt: skip
from engine.models.base import CausalLM
from engine.rope_config import parse_local_rope, parse_rope

# What the files of the larger Gemma 3 leave out.
GEMMA_3 = {
    "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 131072, "query_pre_attn_scalar": 256, "sliding_window": 4096,
}  # fmt: skip


def read_gemma(raw: dict[str, Any], **differs: Any) -> ModelConfig:
    """Read what Gemma's generations have in common."""
    if raw.get("use_bidirectional_attention") in (True, "all"):
        raise ModelError("config.json: use_bidirectional_attention is not supported: tokens see what is before them")
    return read_decoder(
        raw,
        hidden_act=raw.get("hidden_activation", "gelu_pytorch_tanh"),
        embed_scale=raw["hidden_size"] ** 0.5,
        tie_word_embeddings=raw.get("tie_word_embeddings", True),
        **differs,
    )


class GemmaBlock(PreNorm):
    norm_class = OffsetRMSNorm


class Gemma(CausalLM):
    block = GemmaBlock

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return read_gemma(raw)


class Gemma2Block(Sandwich):
    norm_class = OffsetRMSNorm


class Gemma2(CausalLM):
    block = Gemma2Block

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return read_gemma(
            raw,
            scale=raw["query_pre_attn_scalar"] ** -0.5,
            softcap=raw.get("attn_logit_softcapping", 0.0),
            logit_softcap=raw.get("final_logit_softcapping", 0.0),
            windows=layer_windows(raw, every_nth_global(2, raw["num_hidden_layers"])),
        )


class Gemma3(CausalLM):
    block = Gemma2Block

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        raw = GEMMA_3 | raw
        head_dim = head_dim_of(raw)
        rope = parse_rope(raw, head_dim, "full_attention", rope_theta=1e6)
        local_rope = parse_local_rope(raw, head_dim, raw.get("rope_local_base_freq", 10000.0))
        return read_gemma(
            raw,
            scale=raw["query_pre_attn_scalar"] ** -0.5,
            softcap=raw.get("attn_logit_softcapping", 0.0),
            logit_softcap=raw.get("final_logit_softcapping", 0.0),
            qk_norm=QKNorm.HEADS,
            **local_and_global(raw, 6, local_rope, rope),
        )
