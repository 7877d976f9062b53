"""Grok 1 and 2 (xAI): Gemma 2's order of norms, soft caps, and experts.

norms           before and after attention and experts
scores          soft-capped, and so are the router's logits and, in Grok 2, the model's
embedding       times a number, and so are the logits
experts         the best two of a softmax over eight, not renormalized; GELU, tanh approximation
Grok 2          an MLP beside the experts: half of the sum of both, times √2
                From `attn_temperature_len` tokens on scores are sharpened behind the cap: contexts end there
"""

import math
from typing import Any

from engine.errors import ModelError
from engine.layers.block import Sandwich
from engine.model_config import ExpertsConfig, ModelConfig, read_decoder
from engine.models.base import CausalLM
from engine.models.moe import EXPERTS, everywhere
from engine.models.names import Rename
from engine.models.spelling import respelled
from kernels.routing import Routing

CAP = 30.0  # of scores and of the router's logits, where a file does not say


class Grok(CausalLM):
    block = Sandwich
    checkpoint = (
        Rename(r"\.pre_attn_norm\.", ".input_layernorm."),
        Rename(r"\.post_attn_norm\.", ".post_attention_layernorm."),
        Rename(r"\.pre_moe_norm\.", ".pre_feedforward_layernorm."),
        Rename(r"\.post_moe_norm\.", ".post_feedforward_layernorm."),
        Rename(r"\.attn\.", ".self_attn."),
        Rename(r"\.mlp\.", ".mlp.shared_experts."),
        Rename(r"\.(block_sparse_moe|moe_block)\.", ".mlp."),
        Rename(r"(experts\.\d+)\.(w1|linear)\.", r"\1.gate_proj."),
        Rename(r"(experts\.\d+)\.(w3|linear_v)\.", r"\1.up_proj."),
        Rename(r"(experts\.\d+)\.(w2|linear_1)\.", r"\1.down_proj."),
        *EXPERTS,
    )

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        if raw.get("rope_type"):
            raise ModelError(f"config.json: rope_type {raw['rope_type']} is not supported for Grok")
        if "num_local_experts" not in raw:
            raw = respelled(raw, num_local_experts="num_experts")
        has_mlp, longest = raw.get("residual_moe", False), raw.get("attn_temperature_len") or -1
        if longest > 0:
            raw = raw | {"max_position_embeddings": min(longest, raw["max_position_embeddings"])}
        share = math.sqrt(0.5) if has_mlp else 1.0
        routing = Routing(
            raw["num_local_experts"], raw["num_experts_per_tok"], renormalize=False, factor=share,
            softcap=raw.get("router_logit_softcapping", CAP),
        )  # fmt: skip
        experts = ExpertsConfig(
            routing,
            raw.get("moe_intermediate_size") or raw["intermediate_size"],
            shared_size=raw["intermediate_size"] if has_mlp else 0,
            shared_scale=share,
        )
        return read_decoder(
            raw,
            softcap=raw.get("attn_logit_softcapping", raw.get("max_attn_value", CAP)),
            logit_softcap=raw.get("final_logit_softcapping") or 0.0,
            embed_scale=raw.get("embedding_multiplier_scale", 1.0),
            logit_scale=raw.get("output_multiplier_scale", 1.0),
            norm_eps=raw.get("rms_norm_eps", 1e-5),
            hidden_act="gelu_pytorch_tanh",
            experts=everywhere(raw, experts),
        )
