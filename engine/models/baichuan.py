"""Baichuan 7B and 13B, 1 and 2: a Llama whose q, k and v are in one `W_pack`.

Baichuan 2      each row of the head has length 1; known by a vocabulary other than Baichuan 1's
13B             nothing is rotated, scores fall with distance (ALiBi); known by having no `max_position_embeddings`
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from engine.model_config import ModelConfig, alibi_slopes, head_dim_of, read_decoder
from engine.models.base import CausalLM
from engine.models.names import Piece, Rule, Split
from engine.models.spelling import respelled
from engine.rope_config import parse_rope

BAICHUAN_1_VOCAB_SIZE = 64000


class Baichuan(CausalLM):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        if "max_position_embeddings" in raw:
            return read_decoder(raw)
        raw = respelled(raw, max_position_embeddings="model_max_length")
        return read_decoder(
            raw,
            rope=parse_rope(raw, head_dim_of(raw)).without_rotation,
            slopes=alibi_slopes(raw["num_attention_heads"]),
        )

    @property
    def names(self) -> Sequence[Rule]:
        rules = (Split("W_pack", ("q_proj", "k_proj", "v_proj"), (1, 1, 1)), *super().names)
        return rules if self.config.vocab_size == BAICHUAN_1_VOCAB_SIZE else (*rules, normalize_head)


def normalize_head(piece: Piece) -> Iterable[Piece]:
    """Divide each row of the head by its length."""
    if piece.name == "lm_head.weight":
        piece = Piece(piece.name, (*piece.transforms, normalize_rows), piece.index)
    yield piece


def normalize_rows(loaded: torch.Tensor) -> torch.Tensor:
    return F.normalize(loaded.float()).to(loaded.dtype)
