"""Phi-3, 3.5 and 4, the mini and medium ones: Llamas with fused tensors on disk.

q, k, v         in one `qkv_proj`; gate and up in one `gate_up_proj`
rotation        of three quarters of a head (Phi-4-mini), by LongRoPE, which older files call su or yarn
windows         in all layers, if any
"""

from collections.abc import Sequence
from typing import Any

from engine.model_config import ModelConfig, parse_windows, read_decoder
from engine.models.base import CausalLM
from engine.models.names import Rule, fused_names


class Phi3(CausalLM):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        parameters = raw.get("rope_parameters") or {}
        if parameters.get("rope_type") in ("su", "yarn"):
            raw = raw | {"rope_parameters": parameters | {"rope_type": "longrope"}}
        return read_decoder(raw, windows=parse_windows(raw), qkv_bias=False, o_bias=False)

    @property
    def names(self) -> Sequence[Rule]:
        attention = self.config.attention[0]
        return (*fused_names(attention.num_heads, attention.num_kv_heads), *super().names)
