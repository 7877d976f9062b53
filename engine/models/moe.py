"""Families that are another one with a mixture of experts in the place of its MLP.

Mixtral             Mistral; the best two of eight experts, renormalized
Qwen2-MoE           Qwen2; a shared expert behind a sigmoid of its own
Qwen3-MoE           Qwen3; no shared expert
OLMoE               norms of all query and all key heads together
GLM-4.5 to 4.7      GLM's attention without interleaving; sigmoid scores, a correction of the choice, a shared expert
ERNIE 4.5           Llama; a correction of the choice, shared experts
Hunyuan             as the dense ones; a shared expert
MiniMax-M2          norms of all heads together, sigmoid scores with a correction of the choice
"""

from collections.abc import Sequence
from typing import Any

from engine.model_config import ExpertsConfig, ModelConfig, QKNorm, read_decoder
from engine.models.base import CausalLM
from engine.models.names import COMMON_NAMES, Rename, Rule, Stack
from kernels.routing import Routing

EXPERTS: Sequence[Rule] = (Stack(r"\.experts\.(\d+)\.", ".experts."), *COMMON_NAMES)


class Mixtral(CausalLM):
    checkpoint = (
        Rename(r"\.block_sparse_moe\.", ".mlp."),
        Rename(r"(experts\.\d+)\.w1\.", r"\1.gate_proj."),
        Rename(r"(experts\.\d+)\.w3\.", r"\1.up_proj."),
        Rename(r"(experts\.\d+)\.w2\.", r"\1.down_proj."),
        *EXPERTS,
    )

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        routing = Routing(raw["num_local_experts"], raw["num_experts_per_tok"])
        return read_decoder(raw, experts=everywhere(raw, ExpertsConfig(routing, raw["intermediate_size"])))


class Qwen2Moe(CausalLM):
    checkpoint = (Rename(r"\.shared_expert\.", ".shared_experts."), *EXPERTS)

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        routing = read_routing(raw)
        experts = ExpertsConfig(
            routing, raw["moe_intermediate_size"], raw["shared_expert_intermediate_size"], has_shared_gate=True
        )
        return read_decoder(raw, qkv_bias=raw.get("qkv_bias", True), o_bias=False, experts=every_few(raw, experts))


class Qwen3Moe(CausalLM):
    checkpoint = EXPERTS

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        routing = read_routing(raw)
        experts = ExpertsConfig(routing, raw["moe_intermediate_size"])
        return read_decoder(raw, qk_norm=QKNorm.HEADS, experts=every_few(raw, experts))


class Olmoe(CausalLM):
    checkpoint = EXPERTS

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        routing = read_routing(raw)
        experts = everywhere(raw, ExpertsConfig(routing, raw["intermediate_size"]))
        return read_decoder(raw, qk_norm=QKNorm.ALL_HEADS, clip_qkv=raw.get("clip_qkv") or 0.0, experts=experts)


class MiniMaxM2(CausalLM):
    checkpoint = (
        Rename(r"\.block_sparse_moe\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),
        *Mixtral.checkpoint,
    )

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        routing = Routing(raw["num_local_experts"], raw["num_experts_per_tok"], is_sigmoid=True)
        experts = ExpertsConfig(routing, raw["intermediate_size"], has_correction=True)
        qk_norm = QKNorm.ALL_HEADS if raw.get("use_qk_norm", True) else QKNorm.NONE
        return read_decoder(raw, qk_norm=qk_norm, experts=everywhere(raw, experts))


def read_routing(raw: dict[str, Any]) -> Routing:
    """Return Qwen's spelling of how experts are chosen. transformers 5 writes `num_local_experts` for some."""
    num_experts = raw["num_experts"] if "num_experts" in raw else raw["num_local_experts"]
    return Routing(num_experts, raw["num_experts_per_tok"], renormalize=raw.get("norm_topk_prob", False))


def everywhere(raw: dict[str, Any], experts: ExpertsConfig) -> tuple[ExpertsConfig, ...]:
    """Return the same experts for all layers."""
    return tuple([experts] * raw["num_hidden_layers"])


def every_few(raw: dict[str, Any], experts: ExpertsConfig) -> tuple[ExpertsConfig | None, ...]:
    """Return the experts of Qwen's layers: of each `decoder_sparse_step`-th but those of `mlp_only_layers`."""
    step, plain = raw.get("decoder_sparse_step") or 1, raw.get("mlp_only_layers") or ()
    return tuple(experts if i not in plain and (i + 1) % step == 0 else None for i in range(raw["num_hidden_layers"]))
