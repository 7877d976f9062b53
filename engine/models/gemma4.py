"""Gemma 4: Gemma 3 with layers of two kinds, and what its smallest models save memory with.

norms           scaled by the weight itself; also of each value head, without a weight; scores are not scaled
layers          five of six have a window; the others have larger heads, fewer KV heads, and rotate a quarter of a head;
                their values may be their keys, before norm and rotation. Each layer's output is scaled by a number
E2B, E4B        the last layers read the keys and values of the last ones before them, and have a wider MLP; a second
                embedding gives each layer a vector of its own for each token
26B-A4B         experts beside the MLP, each with norms of its own behind it; the router reads the residual stream,
                normalized with a weight of its own, and each expert's weight is scaled by a number
logits          soft-capped
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from cache.pool import CachePool
from engine.errors import ModelError
from engine.layers.block import Sandwich, sum_over_ranks
from engine.layers.embedding import VocabParallelEmbedding
from engine.layers.forward_batch import ForwardBatch
from engine.layers.layer import Layer, LayerConfig, meta_weight
from engine.layers.linear import Linear, activation
from engine.layers.mlp import MLP
from engine.layers.moe import MoE
from engine.layers.norm import Float32RMSNorm
from engine.layers.rotary import RotaryEmbedding
from engine.model_config import AttentionConfig, ExpertsConfig, ModelConfig, QKNorm, every_nth_global, local_layers
from engine.models.base import CausalLM, Decoder, RunBlock
from engine.models.gemma import read_gemma
from engine.models.moe import EXPERTS, everywhere, name_of_stack, unstacked_experts
from engine.models.names import Beside, Copy, Ignore, Rename, Rule
from engine.rope_config import parse_rope
from kernels.elementwise import act_and_mul
from kernels.routing import Routing
from kernels.weights import Part

# What files may leave out.
DEFAULTS = {"head_dim": 256, "num_key_value_heads": 4, "max_position_embeddings": 131072, "sliding_window": 512}
GLOBAL_ROPE = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}


def whole(input_size: int, output_size: int, layers: LayerConfig) -> Linear:
    """Return a small product that every rank computes."""
    return Linear((), [Part(output_size)], input_size, layers)


class RouterNorm(Float32RMSNorm):
    """The norm ahead of a router, whose weight a checkpoint has √size times as large."""

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        target, source = super().place_weight(name, loaded, part)
        return target, source.float() / math.sqrt(len(self.weight))

    def weight_part(self, name: str, part: int) -> torch.Tensor:
        return super().weight_part(name, part) * math.sqrt(len(self.weight))


class ExpertScales(Layer):
    """A number for each expert, which scales its weight; whole on every rank."""

    weight_names: ClassVar = ("weight",)

    def __init__(self, num_experts: int, held: range, layers: LayerConfig) -> None:
        self.first, self.weight = held.start, meta_weight(num_experts, dtype=layers.dtype)

    def __call__(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return weights [T, k] of `ids`, which count from this rank's first expert; behind its last they are 0.

        While a start only compiles kernels, nothing has written the ids: they may be anything.
        """
        return weights * self.weight[(ids + self.first).clamp(0, len(self.weight) - 1)].float()

    def fill_dummy(self, generator: torch.Generator) -> None:  # noqa: ARG002 - nothing is random here
        self.weight.fill_(1.0)


class Gemma4Block(Sandwich):
    """A `Sandwich`, then h = h + norm(Wp (gelu(Wg h) * v)) where it has a vector v for each token, then s h.

    With experts, what follows attention is norm_1(Wdown mlp(norm(h))) + norm_2(experts(norm(h))).
    """

    norm_class = Float32RMSNorm
    weight_names: ClassVar = ("layer_scalar",)
    index = 0  # in the decoder

    def __init__(
        self,
        config: ModelConfig,
        attention: AttentionConfig,
        layer_id: int,
        rotary: RotaryEmbedding,
        layers: LayerConfig,
    ) -> None:
        if attention.kv_owner is not None and config.raw.get("use_double_wide_mlp", False):
            config = replace(config, intermediate_size=2 * config.intermediate_size)
        super().__init__(config, attention, layer_id, rotary, layers)
        self.layer_scalar = meta_weight(1, dtype=layers.dtype)
        hidden, size = config.hidden_size, config.raw.get("hidden_size_per_layer_input", 0)
        self.moe: MoE | None = None
        if config.experts and (experts := config.experts[layers.block_index]):
            num_experts = experts.routing.num_experts
            self.moe = MoE(config, experts, layers.within("moe"))
            self.router_norm = RouterNorm(hidden, config.norm_eps, layers)
            self.expert_scales = ExpertScales(num_experts, layers.held_experts(num_experts), layers)
            self.pre_feedforward_layernorm_2 = self.norm_class(hidden, config.norm_eps, layers)
            self.post_feedforward_layernorm_1 = self.norm_class(hidden, config.norm_eps, layers)
            self.post_feedforward_layernorm_2 = self.norm_class(hidden, config.norm_eps, layers)
        if size:
            self.act = activation(config.hidden_act)
            self.per_layer_input_gate = whole(hidden, size, layers.within("per_layer_input_gate"))
            self.per_layer_projection = whole(size, hidden, layers.within("per_layer_projection"))
            self.post_per_layer_input_norm = self.norm_class(hidden, config.norm_eps, layers)

    def new_mlp(self, config: ModelConfig, experts: ExpertsConfig | None, layers: LayerConfig) -> MLP:  # noqa: ARG002
        return self.mlp_class(config, layers)  # experts are beside it

    @property
    def mixture(self) -> MoE | None:
        return self.moe

    def feed_forward(self, h: torch.Tensor) -> torch.Tensor:
        found = super().feed_forward(h)
        if self.moe is None:
            return found
        ids, weights = self.moe.gate.choose(self.router_norm(h))
        routed = self.moe.routed(self.pre_feedforward_layernorm_2(h), ids, self.expert_scales(ids, weights))
        mixed = sum_over_ranks(self.comm, self.moe.down_proj, routed)
        return self.post_feedforward_layernorm_1(found) + self.post_feedforward_layernorm_2(mixed)

    def __call__(
        self, h: torch.Tensor, batch: ForwardBatch, pool: CachePool, vectors: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the new residual stream. vectors: [T, size] of this layer."""
        h = super().__call__(h, batch, pool)
        if vectors is not None:
            gated = act_and_mul(torch.cat((self.per_layer_input_gate(h), vectors), dim=-1), self.act)
            h = h + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return h.mul_(self.layer_scalar)

    def fill_dummy(self, generator: torch.Generator) -> None:  # noqa: ARG002 - nothing is random here
        self.layer_scalar.fill_(1.0)


class Gemma4Decoder(Decoder):
    """A decoder whose second embedding holds vectors of all layers for each token, if it has one."""

    def __init__(self, config: ModelConfig, block_class: type[Gemma4Block], layers: LayerConfig) -> None:
        super().__init__(config, block_class, layers)
        num_layers, self.size = len(self.layers), config.raw.get("hidden_size_per_layer_input", 0)
        for i, block in enumerate(self.layers):
            assert isinstance(block, Gemma4Block)
            block.index = i
        self.padding = config.raw.get("pad_token_id") or 0
        if self.size:
            self.embed_tokens_per_layer = VocabParallelEmbedding(
                config.raw.get("vocab_size_per_layer_input", config.vocab_size),
                num_layers * self.size,
                layers.within("embed_tokens_per_layer"),
                self.size**0.5,
            )
            self.per_layer_model_projection = whole(
                config.hidden_size, num_layers * self.size, layers.within("per_layer_model_projection")
            )
            self.per_layer_projection_norm = block_class.norm_class(self.size, config.norm_eps, layers)
            self.projection_scale = config.hidden_size**-0.5

    def __call__(self, batch: ForwardBatch, pool: CachePool, run_block: RunBlock | None = None) -> torch.Tensor:
        if not self.size:
            return super().__call__(batch, pool, run_block)
        assert run_block is None, "no step of this model is split"
        input_ids, features = batch.input_ids, batch.features
        h = self.embed_tokens(input_ids)
        if features is not None:
            features.put(h)
            input_ids = features.hide(input_ids, self.padding)  # parts of pictures are no tokens
        vectors = self.vectors(input_ids, h)
        for block in self.layers:
            assert isinstance(block, Gemma4Block)
            h = block(h, batch, pool, vectors[:, block.index])
        return self.norm(h)

    def vectors(self, input_ids: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Return what each layer gets of each token, [T, layers, size]: (norm(W x) + embedding) / √2, x `embedded`."""
        projected = self.per_layer_model_projection(embedded).mul_(self.projection_scale)
        normed = self.per_layer_projection_norm(projected.unflatten(1, (-1, self.size)))
        return (normed + self.embed_tokens_per_layer(input_ids).view_as(normed)).mul_(2**-0.5)


class Gemma4(CausalLM):
    decoder = Gemma4Decoder
    block = Gemma4Block

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        raw = DEFAULTS | raw
        is_local = gemma4_local_layers(raw)
        config = read_gemma(
            raw, scale=1.0, qk_norm=QKNorm.HEADS, v_norm=True, logit_softcap=raw.get("final_logit_softcapping", 0.0)
        )
        num_shared = raw.get("num_kv_shared_layers", 0)
        owners = range(len(is_local) - num_shared)
        attention = [
            read_local(raw, layer) if local else read_global(raw, layer, i)
            for i, (layer, local) in enumerate(zip(config.attention, is_local, strict=True))
        ]
        for i in range(len(owners), len(is_local)):
            same = [owner for owner in owners if is_local[owner] == is_local[i]]
            if not same:
                raise ModelError(f"config.json: num_kv_shared_layers {num_shared} leaves no layer to share the keys of")
            attention[i] = replace(attention[i], kv_owner=same[-1])
        return replace(config, attention=tuple(attention), experts=read_experts(raw))

    @property
    def stacks(self) -> Sequence[Rule]:
        return unstacked_experts(self.config.raw.get("num_experts", 0))

    @property
    def names(self) -> Sequence[Rule]:
        attention = self.config.attention
        shared = [i for i, layer in enumerate(attention) if layer.kv_owner is not None]
        values_are_keys, is_local = self.config.raw.get("attention_k_eq_v", False), gemma4_local_layers(self.config.raw)
        without_values = [i for i, local in enumerate(is_local) if values_are_keys and not local]
        return (
            Beside(name_of_stack, lambda _, one: one),
            *super().names,
            Rename(r"\.router\.proj\.", ".moe.gate."),
            Rename(r"\.router\.scale$", ".router_norm.weight"),
            Rename(r"\.router\.per_expert_scale$", ".expert_scales.weight"),
            Rename(r"^(model\.layers\.\d+)\.experts\.", r"\1.moe.experts."),
            EXPERTS[0],  # quantized files have them one by one, some below `moe`
            Ignore(rf"{attention_of(shared)}(k_proj|v_proj|k_norm)\."),  # the files have them, nothing reads them
            Copy(rf"({attention_of(without_values)})k_proj\.", r"\1v_proj."),
        )


def read_experts(raw: dict[str, Any]) -> tuple[ExpertsConfig, ...]:
    """Return the experts that all layers have beside their MLPs, or ()."""
    if not raw.get("enable_moe_block", False):
        return ()
    routing = Routing(raw["num_experts"], raw["top_k_experts"])
    return everywhere(raw, ExpertsConfig(routing, raw["moe_intermediate_size"]))


def attention_of(layers: Sequence[int]) -> str:
    """Return a pattern that finds how names of the attention of `layers` begin."""
    return rf"^model\.layers\.(?:{'|'.join(map(str, layers))})\.self_attn\."


def gemma4_local_layers(raw: dict[str, Any]) -> list[bool]:
    """Return which layers have a window, one a layer; the last never does."""
    return [*local_layers(raw, every_nth_global(6, raw["num_hidden_layers"]))[:-1], False]


def read_local(raw: dict[str, Any], layer: AttentionConfig) -> AttentionConfig:
    rope = parse_rope(raw, layer.head_dim, "sliding_attention")
    return replace(layer, window=raw["sliding_window"], rope=rope)


def read_global(raw: dict[str, Any], layer: AttentionConfig, index: int) -> AttentionConfig:
    """Read a layer without a window.

    Newer files list its sizes by its number where they are not those of all layers, others have entries for all such.
    """
    sizes = (raw.get("per_layer_config") or {}).get(str(index), {})
    head_dim = sizes.get("head_dim") or raw.get("global_head_dim")
    head_dim = head_dim or (layer.head_dim if "per_layer_config" in raw else 512)
    num_kv_heads = sizes.get("num_key_value_heads") or layer.num_kv_heads
    if raw.get("attention_k_eq_v", False):
        num_kv_heads = raw.get("num_global_key_value_heads", num_kv_heads)
    rope = parse_rope(raw, head_dim, "full_attention", **GLOBAL_ROPE)
    return replace(layer, window=-1, head_dim=head_dim, num_kv_heads=num_kv_heads, rope=rope, sees_ahead=False)
