"""Families that are another one with a mixture of experts in the place of its MLP.

Mixtral             Mistral; the best two of eight experts, renormalized
Qwen2-MoE           Qwen2; a shared expert behind a sigmoid of its own
Qwen3-MoE           Qwen3; no shared expert
OLMoE               norms of all query and all key heads together
GLM-4.5 to 4.7      GLM's attention without interleaving; sigmoid scores, a correction of the choice, a shared expert
ERNIE 4.5           Llama; a correction of the choice, shared experts
Hunyuan             as the dense ones; a shared expert
Granite             as the dense ones; shared ones in some; stacked on disk
MiniMax-M2          norms of all heads together, sigmoid scores with a correction of the choice
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.errors import ModelError
from engine.model_config import ExpertsConfig, ModelConfig, QKNorm, parse_windows, read_decoder, upper_windows
from engine.models.base import CausalLM
from engine.models.ernie import Ernie45
from engine.models.granite import Granite
from engine.models.hunyuan import HunYuan
from engine.models.names import (
    COMMON_NAMES,
    Beside,
    Ignore,
    Rename,
    Rule,
    Split,
    Stack,
    Transpose,
    Unstack,
    ignored_behind,
    stacked_names,
)  # fmt: skip
from engine.models.spelling import with_rope
from kernels.routing import Routing

NO_SUM = 1e-6  # of a token's weights before they are renormalized: below any that experts' scores have
EXPERTS: Sequence[Rule] = (Stack(r"\.experts\.(\d+)\.", ".experts."), *COMMON_NAMES)


def unstacked_experts(num_experts: int) -> tuple[Rule, ...]:
    """Return the rules for experts that one tensor holds, as `stacks` has them: before a format's own.

    They are taken apart first, so that a format's tensors are converted one expert at a time. Scales have names of
    their own beside the stack.
    """
    return (
        Unstack(r"(\.experts\.\w+_proj)$", r"\1.weight", num_experts),
        Unstack(r"(\.experts\.\w+_proj)_scale_inv$", r"\1.weight_scale_inv", num_experts),
        Unstack(r"(\.experts\.\w+_proj)_((?:weight|input|activation)_scale\w*)$", r"\1.\2", num_experts),
    )


def stacked_experts(num_experts: int) -> tuple[Rule, ...]:
    """Return `unstacked_experts` of experts that are [inputs, outputs], codes and scales as well."""
    return *unstacked_experts(num_experts), Transpose(r"\.experts\.\w+_proj\.weight(_scale(_inv)?)?$")


def name_of_stack(name: str) -> str:
    """Return what a file calls the stack of what a format calls `name`."""
    return re.sub(r"(\.experts\.\w+_proj)\.(?:weight$|(?=\w*scale))", lambda found: found[1] + "_", name).rstrip("_")


# Behind a format's own rules: where it finds what it needs beside others.
BESIDE_STACKS = Beside(name_of_stack, lambda _, one: one.t())


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
        experts = everywhere(raw, ExpertsConfig(routing, raw["intermediate_size"]))
        return read_decoder(raw, windows=parse_windows(raw), experts=experts)


class Qwen2Moe(CausalLM):
    checkpoint = (Rename(r"\.shared_expert\.", ".shared_experts."), *EXPERTS)

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        routing = read_routing(raw)
        experts = ExpertsConfig(
            routing, raw["moe_intermediate_size"], raw["shared_expert_intermediate_size"], has_shared_gate=True
        )
        return read_decoder(
            raw,
            windows=upper_windows(raw),
            qkv_bias=raw.get("qkv_bias", True),
            o_bias=False,
            experts=every_few(raw, experts),
        )


class Qwen3Moe(CausalLM):
    checkpoint = EXPERTS

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        routing = read_routing(raw)
        experts = ExpertsConfig(routing, raw["moe_intermediate_size"])
        windows = parse_windows(raw, default=False)
        return read_decoder(raw, windows=windows, qk_norm=QKNorm.HEADS, experts=every_few(raw, experts))


class Olmoe(CausalLM):
    checkpoint = EXPERTS

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        routing = read_routing(raw)
        experts = everywhere(raw, ExpertsConfig(routing, raw["intermediate_size"]))
        return read_decoder(raw, qk_norm=QKNorm.ALL_HEADS, clip_qkv=raw.get("clip_qkv") or 0.0, experts=experts)


class MiniMaxM2(CausalLM):
    checkpoint = (
        Rename(r"\.(block_sparse_moe|mlp)\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),
        *Mixtral.checkpoint,
    )

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        routing = Routing(raw["num_local_experts"], raw["num_experts_per_tok"], is_sigmoid=True)
        experts = ExpertsConfig(routing, raw["intermediate_size"], has_correction=True)
        qk_norm = QKNorm.ALL_HEADS if raw.get("use_qk_norm", True) else QKNorm.NONE
        if rotary_dim := raw.get("rotary_dim"):
            raw = with_rope(raw, partial_rotary_factor=rotary_dim / raw["head_dim"])
        return read_decoder(raw, qk_norm=qk_norm, experts=everywhere(raw, experts))

    @property
    def names(self) -> Sequence[Rule]:
        return (*super().names, ignored_behind(self.config.raw))


class Glm4Moe(CausalLM):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        size = raw["moe_intermediate_size"]
        experts = ExpertsConfig(sigmoid_routing(raw), size, size * raw.get("n_shared_experts", 1), has_correction=True)
        qk_norm = QKNorm.HEADS if raw.get("use_qk_norm", False) else QKNorm.NONE
        raw = with_rope(raw, partial_rotary_factor=raw.get("partial_rotary_factor", 0.5))
        has_bias, first = raw.get("attention_bias", False), raw.get("first_k_dense_replace", 1)
        return read_decoder(
            raw, qk_norm=qk_norm, qkv_bias=has_bias, o_bias=False, experts=from_layer(raw, first, experts)
        )

    @property
    def names(self) -> Sequence[Rule]:
        return (*super().names, ignored_behind(self.config.raw), EXPERTS[0])


class Ernie45Moe(Ernie45):
    checkpoint = (Rename(r"(\.gate)?\.moe_statics\.", ".gate."), *EXPERTS)

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        if (step := raw.get("moe_layer_interval", 1)) < 1:
            raise ModelError(f"config.json: moe_layer_interval must be positive, got {step}")
        if raw.get("moe_norm_min", 0.0) > NO_SUM:
            raise ModelError(f"config.json: moe_norm_min must be at most {NO_SUM:g}, got {raw['moe_norm_min']}")
        size, num_layers = raw["moe_intermediate_size"], raw["num_hidden_layers"]
        experts = ExpertsConfig(
            Routing(raw["moe_num_experts"], raw["moe_k"]), size, size * raw.get("moe_num_shared_experts", 0),
            has_correction=True,
        )  # fmt: skip
        first, last = raw.get("moe_layer_start_index", 1), raw.get("moe_layer_end_index", -1)
        last = num_layers - 1 if last == -1 else last
        layers = tuple(experts if first <= i <= last and (i + 1) % step == 0 else None for i in range(num_layers))
        dense = Ernie45.read_config(raw)
        has_bias = raw.get("use_bias", False) and not dense.tie_word_embeddings
        return replace(dense, experts=layers, lm_head_bias=has_bias)

    @property
    def names(self) -> Sequence[Rule]:
        # Layers and norms that predict several tokens at once.
        return (Ignore(r"^model\.mtp_"), *super().names)


class HunYuanMoe(HunYuan):
    checkpoint = (
        Rename(r"\.gate\.wg\.", ".gate."),
        Rename(r"\.shared_mlp\.", ".shared_experts."),
        *HunYuan.checkpoint,
        EXPERTS[0],
    )

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        num_experts, top_k = one_number(raw, "num_experts"), one_number(raw, "moe_topk")
        size, shared = raw["intermediate_size"], one_number({"num_shared_expert": 1} | raw, "num_shared_expert")
        own_size = one_number({"moe_intermediate_size": size} | raw, "moe_intermediate_size")
        experts = ExpertsConfig(Routing(num_experts, top_k), own_size, size * shared)
        return replace(HunYuan.read_config(raw), experts=everywhere(raw, experts))


class GraniteMoe(Granite):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        routing = Routing(raw["num_local_experts"], raw["num_experts_per_tok"])
        experts = ExpertsConfig(routing, raw["intermediate_size"], raw.get("shared_intermediate_size", 0))
        return replace(Granite.read_config(raw), experts=everywhere(raw, experts))

    @property
    def names(self) -> Sequence[Rule]:
        num_experts = self.config.raw["num_local_experts"]
        return (
            Rename(r"\.block_sparse_moe\.router(\.layer)?\.", ".mlp.gate."),
            Rename(r"\.block_sparse_moe\.experts\.", ".mlp.experts."),
            *stacked_names(num_experts),
            Unstack(r"\.block_sparse_moe\.input_linear\.", ".mlp.experts.gate_up_proj.", num_experts),
            Unstack(r"\.block_sparse_moe\.output_linear\.", ".mlp.experts.down_proj.", num_experts),
            Rename(r"\.shared_mlp\.input_linear\.", ".mlp.shared_experts.gate_up_proj."),
            Rename(r"\.shared_mlp\.output_linear\.", ".mlp.shared_experts.down_proj."),
            Split("gate_up_proj", ("gate_proj", "up_proj"), (1, 1)),
            EXPERTS[0],  # of a converted GGUF file
            *super().names,
        )


def one_number(raw: dict[str, Any], name: str) -> int:
    """Return an entry that may be written once or for each layer. `ModelError` if layers differ."""
    value = raw[name]
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise ModelError(f"config.json: {name} must be the same for all layers, got {value}")
        value = value[0]
    return int(value)


def from_layer(raw: dict[str, Any], first: int, experts: ExpertsConfig) -> tuple[ExpertsConfig | None, ...]:
    """Return the experts of all layers from `first` on."""
    return tuple(experts if i >= first else None for i in range(raw["num_hidden_layers"]))


def read_routing(raw: dict[str, Any]) -> Routing:
    """Return Qwen's spelling of how experts are chosen. transformers 5 writes `num_local_experts` for some."""
    num_experts = raw.get("num_local_experts")
    return Routing(
        num_experts or raw["num_experts"], raw["num_experts_per_tok"], renormalize=raw.get("norm_topk_prob", False)
    )


def sigmoid_routing(raw: dict[str, Any]) -> Routing:
    """Return how DeepSeek V3 and GLM choose experts: mostly by sigmoids, and a group by its best two."""
    return Routing(
        raw["n_routed_experts"], raw["num_experts_per_tok"], is_sigmoid=raw.get("scoring_func", "sigmoid") == "sigmoid",
        renormalize=raw.get("norm_topk_prob", True), factor=raw.get("routed_scaling_factor", 1.0),
        num_groups=raw.get("n_group", 1), topk_groups=raw.get("topk_group", 1), group_score=2,
    )  # fmt: skip


def everywhere(raw: dict[str, Any], experts: ExpertsConfig) -> tuple[ExpertsConfig, ...]:
    """Return the same experts for all layers."""
    return tuple([experts] * raw["num_hidden_layers"])


def every_few(raw: dict[str, Any], experts: ExpertsConfig) -> tuple[ExpertsConfig | None, ...]:
    """Return the experts of Qwen's layers: of each `decoder_sparse_step`-th but those of `mlp_only_layers`."""
    step, plain = raw.get("decoder_sparse_step") or 1, raw.get("mlp_only_layers") or ()
    return tuple(experts if i not in plain and (i + 1) % step == 0 else None for i in range(raw["num_hidden_layers"]))
