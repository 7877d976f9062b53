"""OPT and Galactica: layer norms, learned positions, an MLP without a gate.

positions       a learned vector each, added to the token's, the first in row 2; nothing is rotated
norms           layer norms with bias, or bare ones (Galactica); OPT-350M has them behind each sum, and no final one
biases          in attention and MLP, unless not `enable_bias`
MLP             `fc1`, ReLU or GELU, `fc2`
embedding       OPT-350M projects token vectors from `word_embed_proj_dim`, and back before the head
"""

from collections.abc import Sequence
from typing import Any

import torch

from engine.errors import ModelError
from engine.layers.block import Block, PostLN, PreNorm
from engine.layers.forward_batch import ForwardBatch
from engine.layers.layer import LayerConfig
from engine.layers.linear import Linear
from engine.layers.mlp import PlainMLP
from engine.layers.norm import BareLayerNorm, LayerNorm
from engine.model_config import ModelConfig, head_dim_of, read_decoder
from engine.models.base import CausalLM
from engine.models.names import COMMON_NAMES, Rename, Rule
from engine.models.positions import PositionedDecoder
from engine.models.spelling import respelled
from engine.rope_config import parse_rope
from kernels.weights import Part


class OPTBlock(PreNorm):
    norm_class, mlp_class = LayerNorm, PlainMLP


class GalacticaBlock(PreNorm):
    norm_class, mlp_class = BareLayerNorm, PlainMLP


class OPT350MBlock(PostLN):
    norm_class, mlp_class = LayerNorm, PlainMLP


BLOCKS: dict[str, type[Block]] = {"before": OPTBlock, "bare": GalacticaBlock, "after": OPT350MBlock}


class OPTDecoder(PositionedDecoder):
    position_offset = 2

    def __init__(self, config: ModelConfig, block_class: type[Block], layers: LayerConfig) -> None:
        super().__init__(config, block_class, layers)
        hidden, token = config.hidden_size, config.embed_size
        self.project_in = Linear((), [Part(hidden)], token, layers.within("project_in")) if token else None
        self.project_out = Linear((), [Part(token)], hidden, layers.within("project_out")) if token else None

    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        tokens = self.embed_tokens(batch.input_ids)
        if self.project_in is not None:
            tokens = self.project_in(tokens)
        return tokens + self.embed_positions(batch.positions)


class OPT(CausalLM):
    decoder = OPTDecoder
    model: OPTDecoder

    @classmethod
    def block_of(cls, config: ModelConfig) -> type[Block]:
        return BLOCKS[config.block_kind]

    @property
    def names(self) -> Sequence[Rule]:
        behind_attention, behind_mlp = self.block_of(self.config).norm_names
        return (
            *COMMON_NAMES,
            Rename(r"^(model\.)?decoder\.", "model."),
            Rename(r"\.self_attn_layer_norm\.", f".{behind_attention}."),
            Rename(r"(layers\.\d+)\.final_layer_norm\.", rf"\1.{behind_mlp}."),
            Rename(r"^model\.final_layer_norm\.", "model.norm."),
            Rename(r"\.out_proj\.", ".o_proj."),
            Rename(r"\.fc1\.", ".mlp.up_proj."),
            Rename(r"\.fc2\.", ".mlp.down_proj."),
            *super().names,
        )

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.model.project_out is not None:
            hidden = self.model.project_out(hidden)
        return super().compute_logits(hidden)

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        is_before, is_affine = raw.get("do_layer_norm_before", True), raw.get("layer_norm_elementwise_affine", True)
        if raw.get("_remove_final_layer_norm") or not (is_before or is_affine):
            raise ModelError("an OPT without its final norm, or with bare norms behind its sums, is not supported")
        token_size = raw.get("word_embed_proj_dim", raw["hidden_size"])
        has_bias = raw.get("enable_bias", True)
        raw = respelled(raw, intermediate_size="ffn_dim")
        return read_decoder(
            raw,
            rope=parse_rope(raw, head_dim_of(raw)).without_rotation,
            num_kv_heads=raw["num_attention_heads"],
            embed_size=0 if token_size == raw["hidden_size"] else token_size,
            hidden_act=raw.get("activation_function", "relu"),
            norm_eps=1e-5,
            qkv_bias=has_bias,
            o_bias=has_bias,
            mlp_bias=has_bias,
            block_kind="after" if not is_before else "before" if is_affine else "bare",
            tie_word_embeddings=raw.get("tie_word_embeddings", True),
        )
