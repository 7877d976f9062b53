"""MiniCPM 1 to 4: a Llama whose streams are scaled so that sizes of models share their settings.

embedding       times `scale_emb`
branches        times `scale_depth` / √layers
hidden states   divided by hidden size / `dim_model_base` before the head: so are the logits here
attention       of latents in MiniCPM 3

MiniCPM 4.1's sparse attention over long contexts (`sparse_config`) leaves most keys out to save time; here all count.
"""

from typing import Any

from engine.errors import ModelError
from engine.layers.block import ScaledPreNorm
from engine.layers.mla import LatentAttention
from engine.model_config import ModelConfig, read_decoder
from engine.models.base import CausalLM
from engine.models.deepseek import read_latent


class MiniCPM(CausalLM):
    block = ScaledPreNorm

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        if raw.get("num_experts"):
            raise ModelError("MiniCPM-MoE is not supported: of MiniCPM only the dense models are")
        return read_decoder(raw, **scales(raw))


class ScaledLatentBlock(ScaledPreNorm):
    attention_class = LatentAttention


class MiniCPM3(CausalLM):
    block = ScaledLatentBlock

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        raw = {"v_head_dim": raw["hidden_size"] // raw["num_attention_heads"]} | raw
        return read_latent(raw, **scales(raw))


def scales(raw: dict[str, Any]) -> dict[str, Any]:
    """Return what all of these models differ from Llama in."""
    return {
        "embed_scale": raw.get("scale_emb", 1.0),
        "residual_scale": raw.get("scale_depth", 1.0) / raw["num_hidden_layers"] ** 0.5,
        "logit_scale": raw.get("dim_model_base", 1) / raw["hidden_size"],
        "tie_word_embeddings": raw.get("tie_word_embeddings", True),
    }
