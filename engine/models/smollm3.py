"""SmolLM3: a Llama in which every fourth layer rotates nothing (`no_rope_layers`: 1 rotates)."""

from typing import Any

from engine.errors import ModelError
from engine.model_config import ModelConfig, head_dim_of, layer_windows, read_decoder
from engine.models.base import CausalLM
from engine.rope_config import parse_rope


class SmolLM3(CausalLM):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        num_layers, interval = raw["num_hidden_layers"], raw.get("no_rope_layer_interval", 4)
        rotates = raw.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(num_layers)]
        if len(rotates) < num_layers:
            raise ModelError(f"no_rope_layers names {len(rotates)} layers, num_hidden_layers is {num_layers}")
        rope = parse_rope(raw, head_dim_of(raw))
        is_local = [raw.get("use_sliding_window", False) and not rotates[i] for i in range(num_layers)]
        return read_decoder(
            raw,
            windows=layer_windows(raw, is_local),
            ropes=[rope if rotates[i] else rope.without_rotation for i in range(num_layers)],
            tie_word_embeddings=raw.get("tie_word_embeddings", True),
        )
