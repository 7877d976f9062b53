"""Phi-3.5-MoE: Mixtral with layer norms, biases, and another way of weighting experts.

norms           layer norms with bias
biases          of attention and of the head
experts         the best two, each weighted by its softmax over the experts whose logits are near it (SparseMixer)
rotation        LongRoPE, with factors on cosines and sines of its own
"""

from typing import Any

from engine.layers.block import PreNorm
from engine.layers.norm import LayerNorm
from engine.model_config import ExpertsConfig, ModelConfig, parse_windows, read_decoder
from engine.models.base import CausalLM
from engine.models.moe import Mixtral, everywhere
from engine.models.names import Rename
from kernels.routing import Routing


class PhiMoeBlock(PreNorm):
    norm_class = LayerNorm


class PhiMoe(CausalLM):
    block = PhiMoeBlock
    checkpoint = (Rename(r"\.mlp\.router\.", ".mlp.gate."), *Mixtral.checkpoint)

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        margin = 2 * raw.get("router_jitter_noise", 0.01)
        routing = Routing(raw["num_local_experts"], raw["num_experts_per_tok"], margin=margin)
        experts = ExpertsConfig(routing, raw["intermediate_size"])
        return read_decoder(
            raw,
            windows=parse_windows(raw),
            norm_eps=raw.get("rms_norm_eps", 1e-5),
            lm_head_bias=raw.get("lm_head_bias", False),
            experts=everywhere(raw, experts),
        )
