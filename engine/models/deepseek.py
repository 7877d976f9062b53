"""DeepSeek V2, V3 and R1, V3.2, Kimi-K2, GLM-4.7-Flash and GLM-5: latent attention, and experts beside shared ones.

DeepSeek MoE 16B, the first of them, has Llama's attention, V2's experts without groups, and no latents.

attention       latents (`engine.layers.mla`); rotary pairs lie side by side, and are reordered when loaded; where YaRN
                stretches positions, scores are sharpened by the square of its `mscale_all_dim`
experts         of all layers but the first; groups of them in the larger models, of which the best are chosen
V2              softmax; a group is as good as its best expert
V3, GLM         sigmoids, with a correction of the choice; a group is as good as its best two
V3.2, GLM-5     their indexer, which leaves out all but 2,048 of a long context's tokens to save time, is not loaded:
                all tokens count
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from engine.errors import ModelError
from engine.layers.block import PreNorm
from engine.layers.mla import LatentAttention
from engine.layers.rotary import mscale
from engine.model_config import ExpertsConfig, LatentConfig, ModelConfig, of_each_layer, read_decoder
from engine.models.base import CausalLM
from engine.models.moe import EXPERTS, sigmoid_routing
from engine.models.names import Ignore, Interleave, Rule, ignored_behind
from engine.rope_config import RopeConfig
from kernels.routing import Routing

logger = logging.getLogger(__name__)


class LatentBlock(PreNorm):
    attention_class = LatentAttention


def read_latent(raw: dict[str, Any], **differs: Any) -> ModelConfig:
    """Read a decoder with latent attention, as DeepSeek spells it. KeyError naming an entry that is missing.

    differs: see `read_decoder`.
    """
    rotary_dim = raw["qk_rope_head_dim"]
    config = read_decoder(raw, head_dim=rotary_dim, **differs)
    head_dim = raw["qk_nope_head_dim"] + rotary_dim
    scale = head_dim**-0.5
    sizes = {
        "num_kv_heads": config.attention[0].num_heads,
        "head_dim": head_dim,
        "kv_lora_rank": raw["kv_lora_rank"],
        "q_lora_rank": raw.get("q_lora_rank", 0),
        "v_head_dim": raw["v_head_dim"],
    }
    attention = []
    for layer in config.attention:
        if layer.rope.rotary_dim != rotary_dim:
            raise ModelError(f"config.json: of qk_rope_head_dim {rotary_dim} only {layer.rope.rotary_dim} are rotated")
        sharpened = scale * score_factor(layer.rope)
        attention.append(LatentConfig(**(vars(layer) | sizes | {"scale": sharpened})))
    return replace(config, attention=tuple(attention))


def score_factor(rope: RopeConfig) -> float:
    """Return by how much scores are multiplied beside the usual scale, where positions are stretched."""
    weight = rope.scaling.get("mscale_all_dim")
    return mscale(rope.scaling["factor"], weight) ** 2 if weight and rope.rope_type != "default" else 1.0


def latent_names(config: ModelConfig) -> tuple[Rule, ...]:
    """Return the rules for latent attention whose rotary pairs lie side by side."""
    layer = config.attention[0]
    assert isinstance(layer, LatentConfig)
    rotary_dim, rank = layer.rope.rotary_dim, layer.kv_lora_rank
    return (
        Interleave(r"\.q(_b)?_proj\.", layer.head_dim, rotary_dim, start=layer.qk_nope_head_dim),
        Interleave(r"\.kv_a_proj_with_mqa\.", rank + rotary_dim, rotary_dim, start=rank),
    )


def expert_layers(raw: dict[str, Any], experts: ExpertsConfig) -> tuple[ExpertsConfig | None, ...]:
    """Return the experts of each layer: as `mlp_layer_types` says, else of each `moe_layer_freq`-th but the first.

    Where that is a list, it has a number for each layer, 0 for those without experts.
    """
    num_layers = raw["num_hidden_layers"]
    if raw.get("mlp_layer_types"):
        kinds = of_each_layer(raw, "mlp_layer_types", num_layers)
        return tuple(experts if kind == "sparse" else None for kind in kinds)
    first, step = raw.get("first_k_dense_replace", 0), raw.get("moe_layer_freq", 1)
    if isinstance(step, list):
        return tuple(experts if each else None for each in of_each_layer(raw, "moe_layer_freq", num_layers))
    if step < 1:
        raise ModelError(f"config.json: moe_layer_freq must be positive, got {step}")
    return tuple(experts if i >= first and i % step == 0 else None for i in range(num_layers))


def read_experts(raw: dict[str, Any], routing: Routing, *, has_correction: bool) -> tuple[ExpertsConfig | None, ...]:
    """Return the experts of each layer. KeyError naming an entry that is missing."""
    size = raw["moe_intermediate_size"]
    shared = size * raw.get("n_shared_experts", 0)
    return expert_layers(raw, ExpertsConfig(routing, size, shared, has_correction=has_correction))


class DeepseekV2(CausalLM):
    block = LatentBlock
    checkpoint = EXPERTS

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        method = raw.get("topk_method", "greedy")
        if method == "noaux_tc":
            return DeepseekV3.read_config(raw)
        is_grouped = method == "group_limited_greedy"
        routing = Routing(
            raw["n_routed_experts"], raw["num_experts_per_tok"], renormalize=raw.get("norm_topk_prob", False),
            factor=raw.get("routed_scaling_factor", 1.0), num_groups=raw["n_group"] if is_grouped else 1,
            topk_groups=raw["topk_group"] if is_grouped else 1,
        )  # fmt: skip
        return read_latent(raw, experts=read_experts(raw, routing, has_correction=False))

    @property
    def names(self) -> Sequence[Rule]:
        is_interleaved = self.config.raw.get("rope_interleave", True)
        pairs = latent_names(self.config) if is_interleaved else ()
        return (*super().names, ignored_behind(self.config.raw), *pairs)


class DeepseekV3(DeepseekV2):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return read_latent(raw, experts=read_experts(raw, sigmoid_routing(raw), has_correction=True))


class DeepseekV32(DeepseekV3):
    checkpoint: ClassVar[Sequence[Rule]] = (Ignore(r"\.self_attn\.indexer\."), *EXPERTS)

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        logger.warning(
            "attention is to all tokens: the indexer, trained to leave out all but %d of a longer context, is not run",
            raw.get("index_topk", 2048),
        )
        return DeepseekV3.read_config(raw)


class Youtu(DeepseekV2):
    """No experts."""

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return read_latent(raw)


class DeepseekMoe(CausalLM):
    """Llama's attention."""

    checkpoint = EXPERTS

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        routing = Routing(
            raw["n_routed_experts"], raw["num_experts_per_tok"], is_sigmoid=raw.get("scoring_func") == "sigmoid",
            renormalize=raw.get("norm_topk_prob", False),
        )  # fmt: skip
        return read_decoder(raw, experts=read_experts(raw, routing, has_correction=False))
