"""Apertus: a Llama with norms of query and key heads, and the activation xIELU without a gate.

q, k            an RMS norm of each head before the rotation
MLP             `up_proj`, xIELU with parameters of each layer's own, `down_proj`
norms           called `attention_layernorm` and `feedforward_layernorm`
"""

from typing import Any, ClassVar

import torch

from engine.errors import ModelError
from engine.layers.block import PreNorm
from engine.layers.layer import Layer, meta_weight
from engine.layers.mlp import PlainMLP
from engine.model_config import ModelConfig, QKNorm, read_decoder
from engine.models.base import CausalLM
from engine.models.names import COMMON_NAMES, Rename
from engine.models.spelling import with_rope
from kernels.elementwise import xielu
from kernels.weights import match_shard

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 12e6, "factor": 8.0, "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip


class XIELU(Layer):
    """The activation and its four numbers, each a tensor of the checkpoint."""

    weight_names: ClassVar = ("weight",)
    part_names = ("alpha_p", "alpha_n", "beta", "eps")

    def __init__(self) -> None:
        self.weight = meta_weight(len(self.part_names), dtype=torch.float32)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return xielu(x, self.weight)

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        return match_shard(self.weight_part(name, part), loaded.reshape(-1))

    def weight_part(self, name: str, part: int) -> torch.Tensor:  # noqa: ARG002 - there is one weight
        return self.weight[part : part + 1]

    def fill_dummy(self, generator: torch.Generator) -> None:  # noqa: ARG002 - nothing is random here
        self.weight.copy_(torch.tensor([0.2, -1.05, 0.5, -1e-6]))  # about what transformers starts with


class ApertusMLP(PlainMLP):
    def make_activation(self, config: ModelConfig) -> XIELU:
        if config.hidden_act != "xielu":
            raise ModelError(f"hidden_act {config.hidden_act!r} is not supported for Apertus, only xielu")
        return XIELU()


class ApertusBlock(PreNorm):
    mlp_class = ApertusMLP


class Apertus(CausalLM):
    block = ApertusBlock
    checkpoint = (
        *COMMON_NAMES,
        Rename(r"\.attention_layernorm\.", ".input_layernorm."),
        Rename(r"\.feedforward_layernorm\.", ".post_attention_layernorm."),
        Rename(r"\.act_fn\.(alpha_p|alpha_n|beta|eps)$", r".\1.weight"),
    )

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return read_decoder(
            raw if raw.get("rope_parameters") else with_rope(raw, **LLAMA3),
            hidden_act=raw.get("hidden_act", "xielu"),
            mlp_bias=False,
            norm_eps=raw.get("rms_norm_eps", 1e-5),
            qk_norm=QKNorm.HEADS,
        )
