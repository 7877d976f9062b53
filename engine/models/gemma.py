"""Gemma 2: a Llama with other norms, scales, windows and activation.

norms           before and after attention and MLP, scaled by 1 + weight in float32
embedding       times √hidden, in the model's dtype; tied to the head
scores          scaled by query_pre_attn_scalar^-½, and soft-capped; so are the logits
windows         every other layer, from the first on
MLP             GELU, tanh approximation
"""

from typing import Any

from engine.layers.block import Sandwich
from engine.layers.norm import OffsetRMSNorm
from engine.model_config import ModelConfig, layer_windows, read_decoder
from engine.models.base import CausalLM


class Gemma2Block(Sandwich):
    norm_class = OffsetRMSNorm


class Gemma2(CausalLM):
    block = Gemma2Block

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        is_local = [i % 2 == 0 for i in range(raw["num_hidden_layers"])]
        return read_decoder(
            raw,
            hidden_act=raw.get("hidden_activation", "gelu_pytorch_tanh"),
            embed_scale=raw["hidden_size"] ** 0.5,
            scale=raw["query_pre_attn_scalar"] ** -0.5,
            softcap=raw.get("attn_logit_softcapping", 0.0),
            logit_softcap=raw.get("final_logit_softcapping", 0.0),
            windows=layer_windows(raw, is_local),
            tie_word_embeddings=raw.get("tie_word_embeddings", True),
        )
