"""MiniCPM 1, 2 and 4: a Llama whose streams are scaled so that sizes of models share their settings.

embedding       times `scale_emb`
branches        times `scale_depth` / √layers
hidden states   divided by hidden size / `dim_model_base` before the head: so are the logits here

MiniCPM 4.1's sparse attention over long contexts (`sparse_config`) leaves most keys out to save time; here all count.
"""

from typing import Any

from engine.errors import ModelError
from engine.layers.block import ScaledPreNorm
from engine.model_config import ModelConfig, read_decoder
from engine.models.base import CausalLM


class MiniCPM(CausalLM):
    block = ScaledPreNorm

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        if raw.get("num_experts"):
            raise ModelError("MiniCPM-MoE is not supported: of MiniCPM only the dense models are")
        return read_decoder(
            raw,
            embed_scale=raw.get("scale_emb", 1.0),
            residual_scale=raw.get("scale_depth", 1.0) / raw["num_hidden_layers"] ** 0.5,
            logit_scale=raw.get("dim_model_base", 1) / raw["hidden_size"],
            tie_word_embeddings=raw.get("tie_word_embeddings", True),
        )
