"""HunYuan dense, V1: a Llama with an RMS norm of each query and key head after the rotation.

rotation        its base may be raised by a fixed alpha, under the name of dynamic NTK
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from engine.model_config import ModelConfig, QKNorm, head_dim_of, read_decoder
from engine.models.base import CausalLM
from engine.models.names import COMMON_NAMES, Rename, Rule
from engine.rope_config import parse_rope


class HunYuan(CausalLM):
    checkpoint: ClassVar[Sequence[Rule]] = (
        Rename(r"\.query_layernorm\.", ".q_norm."),
        Rename(r"\.key_layernorm\.", ".k_norm."),
        *COMMON_NAMES,
    )

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        rope = parse_rope(raw, head_dim_of(raw)).without_sharpening
        return read_decoder(raw, rope=rope, qk_norm=QKNorm.ROTATED_HEADS)
