"""Granite 3: a Llama whose embedding, scores, branches and logits are multiplied by numbers of its config.json."""

from typing import Any

from engine.layers.block import ScaledPreNorm
from engine.model_config import ModelConfig, read_decoder
from engine.models.base import CausalLM


class Granite(CausalLM):
    block = ScaledPreNorm

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return read_decoder(
            raw,
            embed_scale=raw.get("embedding_multiplier", 1.0),
            scale=raw.get("attention_multiplier", 1.0),
            residual_scale=raw.get("residual_multiplier", 1.0),
            logit_scale=1 / raw.get("logits_scaling", 1.0),
        )
