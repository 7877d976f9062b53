"""SmolLM3: a Llama in which every fourth layer rotates nothing (`no_rope_layers`: 1 rotates)."""

from typing import Any

from engine.model_config import ModelConfig, head_dim_of, layer_windows, read_decoder, rotated_layers
from engine.models.base import CausalLM
from engine.rope_config import parse_rope


class SmolLM3(CausalLM):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        rope, rotates = parse_rope(raw, head_dim_of(raw)), rotated_layers(raw)
        is_local = [raw.get("use_sliding_window", False) and not is_rotated for is_rotated in rotates]
        return read_decoder(
            raw,
            windows=layer_windows(raw, is_local),
            ropes=[rope if is_rotated else rope.without_rotation for is_rotated in rotates],
            tie_word_embeddings=raw.get("tie_word_embeddings", True),
        )
