"""BLOOM: layer norms, scores that fall with distance, an MLP without a gate.

positions       nothing is rotated: scores fall with distance (ALiBi)
norms           layer norms with bias, one of them behind the embedding
biases          in attention and MLP
MLP             `dense_h_to_4h`, GELU (tanh approximation), `dense_4h_to_h`
checkpoint      `query_key_value` holds a head's query, key and value, then the next head's; with or without
                `transformer.`
"""

from collections.abc import Sequence
from typing import Any

import torch

from engine.errors import ModelError
from engine.layers.block import Block, PreNorm
from engine.layers.forward_batch import ForwardBatch
from engine.layers.layer import LayerConfig
from engine.layers.mlp import PlainMLP
from engine.layers.norm import LayerNorm
from engine.model_config import ModelConfig, alibi_slopes, head_dim_of, read_decoder
from engine.models.base import CausalLM, Decoder
from engine.models.names import COMMON_NAMES, MEGATRON_NAMES, Rename, Rule, Split
from engine.models.spelling import respelled
from engine.rope_config import parse_rope

TRAINED_LENGTH = 2048  # of all published ones, whose files may not say so


class BloomBlock(PreNorm):
    norm_class, mlp_class = LayerNorm, PlainMLP


class BloomDecoder(Decoder):
    def __init__(self, config: ModelConfig, block_class: type[Block], layers: LayerConfig) -> None:
        super().__init__(config, block_class, layers)
        self.embed_norm = LayerNorm(config.hidden_size, config.norm_eps, layers)

    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        return self.embed_norm(super().embed(batch))


class Bloom(CausalLM):
    decoder = BloomDecoder
    block = BloomBlock
    checkpoint = (
        *COMMON_NAMES,
        Rename(r"^(transformer\.)?h\.", "model.layers."),
        Rename(r"^(transformer\.)?word_embeddings\.", "model.embed_tokens."),
        Rename(r"^(transformer\.)?word_embeddings_layernorm\.", "model.embed_norm."),
        Rename(r"^(transformer\.)?ln_f\.", "model.norm."),
        *MEGATRON_NAMES,
    )

    @property
    def names(self) -> Sequence[Rule]:
        num_heads = self.config.attention[0].num_heads
        return (*super().names, Split("query_key_value", ("q_proj", "k_proj", "v_proj"), (1, 1, 1), num_heads))

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        if raw.get("apply_residual_connection_post_layernorm"):
            raise ModelError("apply_residual_connection_post_layernorm is not supported for BLOOM")
        if "n_embed" in raw:
            raw = respelled(raw, hidden_size="n_embed")
        raw = {"seq_length": TRAINED_LENGTH, "tie_word_embeddings": True} | raw
        raw = respelled(
            raw, num_hidden_layers="n_layer", num_attention_heads="n_head", max_position_embeddings="seq_length"
        )
        return read_decoder(
            raw | {"intermediate_size": 4 * raw["hidden_size"]},
            rope=parse_rope(raw, head_dim_of(raw)).without_rotation,
            slopes=alibi_slopes(raw["num_attention_heads"]),
            num_kv_heads=raw["num_attention_heads"],
            hidden_act="gelu_new",
            norm_eps=raw.get("layer_norm_epsilon", 1e-5),
            qkv_bias=True,
            o_bias=True,
            mlp_bias=True,
        )
