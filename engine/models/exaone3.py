"""EXAONE 3 and 3.5: Llamas with GPT-2's names."""

from collections.abc import Sequence
from typing import Any, ClassVar

from engine.model_config import ModelConfig, read_decoder
from engine.models.base import CausalLM
from engine.models.names import COMMON_NAMES, Rename, Rule
from engine.models.spelling import respelled


class Exaone3(CausalLM):
    checkpoint: ClassVar[Sequence[Rule]] = (
        Rename(r"^(transformer\.)?h\.", "model.layers."),
        Rename(r"^(transformer\.)?wte\.", "model.embed_tokens."),
        Rename(r"^(transformer\.)?ln_f\.", "model.norm."),
        Rename(r"\.ln_1\.", ".input_layernorm."),
        Rename(r"\.ln_2\.", ".post_attention_layernorm."),
        Rename(r"\.attn\.attention\.out_proj\.", ".self_attn.o_proj."),
        Rename(r"\.attn\.attention\.", ".self_attn."),
        Rename(r"\.mlp\.c_fc_0\.", ".mlp.gate_proj."),
        Rename(r"\.mlp\.c_fc_1\.", ".mlp.up_proj."),
        Rename(r"\.mlp\.c_proj\.", ".mlp.down_proj."),
        *COMMON_NAMES,
    )

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return read_decoder(
            respelled(raw, num_hidden_layers="num_layers"),
            hidden_act=raw.get("activation_function", "silu"),
            norm_eps=raw.get("layer_norm_epsilon", 1e-5),
        )
