"""Llama 4 (Meta 2025): Llamas with experts, whose layers see chunks of a context, but for every fourth.

attention       three of four layers: rotary pairs side by side, heads without length (an RMS norm without a weight),
                and of a context the chunk that a token is in
                the fourth: all of a context, no rotation, queries that grow with the logarithm of their positions
experts         one for each token, whose input is weighted by a sigmoid, and a shared one; of all layers (Scout), or of
                every other one, the rest having a wider MLP (Maverick)
on disk         experts stacked, [E, inputs, outputs], gate and up in one; ModelOpt packs their inputs, in the middle
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.layers.rotary import FIRST_POSITION, QUERY_SCALING
from engine.model_config import ExpertsConfig, ModelConfig, QKNorm, head_dim_of, read_decoder, rotated_layers
from engine.models.base import CausalLM
from engine.models.moe import BESIDE_STACKS, EXPERTS, stacked_experts
from engine.models.names import Ignore, Interleave, Rename, Rule, Split
from engine.rope_config import ORIGINAL_LENGTH, RopeConfig, parse_rope
from kernels.routing import Routing


class Llama4(CausalLM):
    checkpoint = (
        Ignore(r"^vision_model\."),
        Rename(r"\.feed_forward\.", ".mlp."),
        Rename(r"\.mlp\.router\.", ".mlp.gate."),
        Rename(r"\.shared_expert\.", ".shared_experts."),
        *EXPERTS,
    )

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        num_layers = raw["num_hidden_layers"]
        rotates, chunk = rotated_layers(raw), raw.get("attention_chunk_size", 8192)
        rope, has_norms = parse_rope(raw, head_dim_of(raw)), raw.get("use_qk_norm", True)
        rope = rope.without_sharpening if has_norms else rope
        config = read_decoder(
            raw | {"intermediate_size": raw.get("intermediate_size_mlp", 16384)},
            windows=[chunk if rotates[i] and chunk else -1 for i in range(num_layers)],
            ropes=[rope if rotates[i] else unrotated(raw, rope) for i in range(num_layers)],
            norm_eps=raw.get("rms_norm_eps", 1e-5),
            experts=read_experts(raw),
        )
        norm = QKNorm.UNIT_HEADS if has_norms else QKNorm.NONE
        attention = [
            replace(layer, is_chunked=layer.window > 0, qk_norm=norm if rotates[i] else QKNorm.NONE)
            for i, layer in enumerate(config.attention)
        ]
        return replace(config, attention=tuple(attention))

    @property
    def stacks(self) -> Sequence[Rule]:
        return stacked_experts(self.config.raw["num_local_experts"])

    @property
    def names(self) -> Sequence[Rule]:
        head_dim = self.config.attention[0].head_dim
        halves = Split("gate_up_proj", ("gate_proj", "up_proj"), (1, 1))
        return (BESIDE_STACKS, halves, *super().names, Interleave(r"\.[qk]_proj\.", head_dim, head_dim))


def unrotated(raw: dict[str, Any], rope: RopeConfig) -> RopeConfig:
    """Return what layers without a rotation have: growing queries, if anything."""
    scaling = {QUERY_SCALING: raw.get("attn_scale", 0.1), ORIGINAL_LENGTH: raw.get("floor_scale", 8192)}
    grows = raw.get("attn_temperature_tuning", True)
    return replace(rope.without_rotation, scaling=scaling | {FIRST_POSITION: 1} if grows else {})


def read_experts(raw: dict[str, Any]) -> tuple[ExpertsConfig | None, ...]:
    """Return the experts of each layer: those of `moe_layers`, else the last one of every few."""
    num_layers, step = raw["num_hidden_layers"], raw.get("interleave_moe_layer_step", 1)
    layers = raw.get("moe_layers")
    if layers is None:
        layers = range(step - 1, num_layers, step)
    routing = Routing(
        raw["num_local_experts"], raw.get("num_experts_per_tok", 1), is_sigmoid=True, renormalize=False
    )  # fmt: skip
    size = raw["intermediate_size"]
    experts = ExpertsConfig(routing, size, shared_size=size, weighs_inputs=True)
    return tuple(experts if i in layers else None for i in range(num_layers))
