"""gpt-oss (OpenAI 2025): Llama with a mixture of experts.

attention       biases; heads have sinks, scores that take their share of the softmax; every other layer has a window
experts         the best four of a router with a bias, renormalized; both of an expert's products have biases
activation      gate * sigmoid(1.702 gate) * (up + 1), gate and up clamped
on disk         experts stacked, gate and up alternating: [E, inputs, outputs] in bf16, or rows of MXFP4 blocks; in
                other formats rows of each expert, under names of its own or Unsloth's
norms           products with the weight are made in float32 and rounded last
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from engine.errors import ModelError
from engine.layers.block import PreNorm
from engine.layers.norm import Float32RMSNorm
from engine.model_config import ExpertsConfig, ModelConfig, layer_windows, read_decoder
from engine.models.base import CausalLM
from engine.models.moe import BESIDE_STACKS, EXPERTS, stacked_experts
from engine.models.names import Rename, Rule, Split, Unstack
from kernels.elementwise import CLAMPED_SWIGLU, SWIGLU_ALPHA, SWIGLU_LIMIT
from kernels.routing import Routing


class GptOssBlock(PreNorm):
    norm_class = Float32RMSNorm


class GptOss(CausalLM):
    block = GptOssBlock
    checkpoint: ClassVar = (
        Rename(r"\.mlp\.router\.(linear\.)?", ".mlp.gate."),  # Unsloth's are linear layers
        *EXPERTS,  # of a converted GGUF file: one by one
    )

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        for name, value in {"swiglu_alpha": SWIGLU_ALPHA, "swiglu_limit": SWIGLU_LIMIT}.items():
            if raw.get(name, value) != value:
                raise ModelError(f"config.json: {name} must be {value}, got {raw[name]}")
        num_layers = raw["num_hidden_layers"]
        experts = ExpertsConfig(
            Routing(raw["num_local_experts"], raw.get("num_experts_per_tok") or raw["experts_per_token"]),
            raw["intermediate_size"],
            router_bias=True,
            has_bias=True,
            act=CLAMPED_SWIGLU,
        )
        has_bias = raw.get("attention_bias", True)
        return read_decoder(
            raw,
            windows=layer_windows(raw, [i % 2 == 0 for i in range(num_layers)]),
            qkv_bias=has_bias,
            o_bias=has_bias,
            has_sinks=True,
            experts=(experts,) * num_layers,
        )

    @property
    def stacks(self) -> Sequence[Rule]:
        num_experts = self.config.raw["num_local_experts"]
        return (
            *stacked_experts(num_experts),
            Unstack(r"(\.experts\.\w+_proj)_(blocks|scales|bias)$", r"\1.\2", num_experts),
        )

    @property
    def names(self) -> Sequence[Rule]:
        alternating = Split("gate_up_proj", ("gate_proj", "up_proj"), (1, 1), self.config.intermediate_size)
        unsloths = Rename(r"(\.experts)\.(gate_up|down)_projs\.(\d+)\.", r"\1.\3.\2_proj.")
        return (BESIDE_STACKS, unsloths, alternating, *super().names)
