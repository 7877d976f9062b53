"""EXAONE 4: a Llama with norms behind the branches.

norms           of what each branch adds to the residual stream, none before it; of each query and key head
windows         the 32B: in three of four layers; the others rotate nothing
"""

from typing import Any

from engine.layers.block import PostNorm
from engine.model_config import (
    ModelConfig,
    QKNorm,
    every_nth_global,
    head_dim_of,
    layer_windows,
    local_layers,
    read_decoder,
)  # fmt: skip
from engine.models.base import CausalLM
from engine.rope_config import parse_rope


class Exaone4(CausalLM):
    block = PostNorm

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        rope = parse_rope(raw, head_dim_of(raw))
        is_local = local_layers(raw, every_nth_global(4, raw["num_hidden_layers"]))
        has_windows = bool(raw.get("sliding_window"))
        return read_decoder(
            raw,
            qkv_bias=False,
            o_bias=False,
            qk_norm=QKNorm.HEADS,
            windows=layer_windows(raw, is_local),
            ropes=[rope if local or not has_windows else rope.without_rotation for local in is_local],
        )
