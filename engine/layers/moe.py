"""A mixture of experts in the place of a block's MLP (Shazeer et al. 2017; Jiang et al. 2024, Mixtral).

y = shared(x) + sum over a token's experts e of weight_e Wdown_e act(gate_e x) * up_e x

Ranks split each expert, as they do an MLP, or with --ep-size share out whole experts: every rank sees all tokens, makes
its own experts' part of the sum, and the sum over ranks that ends the branch is the same.
Experts of a layer are one weight, stacked row on row, so that every format of weights serves them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from engine.errors import ModelError
from engine.layers.layer import Layer, LayerConfig, meta_weight, padded_split
from engine.layers.linear import Linear, activation
from engine.layers.mlp import MLP, GatedMLP
from engine.model_config import ExpertsConfig, ModelConfig
from engine.quantization import Quantization
from kernels.experts import ExpertShape, ExpertStack, combine
from kernels.quantized import QuantizedWeight
from kernels.routing import route
from kernels.tuning import WeightShape
from kernels.weights import WHOLE, Norm, Part, Shard

if TYPE_CHECKING:
    from kernels.triton_experts import Sorted, Unsorted


class Router(Linear):
    """The product whose results say which experts a token goes to; whole on every rank, never quantized."""

    def __init__(self, experts: ExpertsConfig, hidden_size: int, layers: LayerConfig) -> None:
        plain = replace(layers, quantization=Quantization())
        super().__init__((), [Part(experts.routing.num_experts)], hidden_size, plain, bias=experts.router_bias)
        self.routing = experts.routing
        held = layers.held_experts(experts.routing.num_experts)
        self.held = held if layers.ep_size > 1 else None
        self.e_score_correction_bias: torch.Tensor | None = None
        if experts.has_correction:
            self.e_score_correction_bias = meta_weight(self.weight.n, dtype=torch.float32)

    def choose(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return experts and weights of tokens x [T, hidden], as `kernels.routing.route` does."""
        return self._route(self.weight.logits(x, self.bias))

    def choose_normed(self, x: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (norm(x), its experts, their weights) of tokens x [T, hidden], as `choose` does."""
        normed, logits = self.weight.normed_logits(x, norm, self.bias)
        return normed, *self._route(logits)

    def _route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return route(logits, self.routing, self.e_score_correction_bias, self.held)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().weights()
        if self.e_score_correction_bias is not None:
            yield "e_score_correction_bias", self.e_score_correction_bias

    def names_of(self, part: int) -> list[str]:
        correction = [] if self.e_score_correction_bias is None else ["e_score_correction_bias"]
        return super().names_of(part) + correction

    def materialize(self, device: torch.device) -> None:
        super().materialize(device)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias = torch.empty_like(self.e_score_correction_bias, device=device)

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        if name == "e_score_correction_bias":
            assert self.e_score_correction_bias is not None
            return self.e_score_correction_bias, loaded.reshape(-1)
        return super().place_weight(name, loaded, part)

    def move_to(self, device: torch.device) -> None:
        super().move_to(device)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias = self.e_score_correction_bias.to(device)

    def fill_dummy(self, generator: torch.Generator) -> None:
        super().fill_dummy(generator)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias.zero_()


class StackedLinear(Linear):
    """The same product of every expert of a layer that this rank has."""

    stack: range

    def __init__(
        self, part_names: Sequence[str], parts: Sequence[Part], input_size: int, num_experts: int, layers: LayerConfig,
        *, bias: bool = False, input_shard: Shard = WHOLE,
    ) -> None:  # fmt: skip
        """part_names, parts: of one expert. num_experts: on all ranks."""
        self.stack, self.num_stackable = layers.held_experts(num_experts), num_experts
        num_parts = len(self.stack)
        super().__init__(part_names, [*parts] * num_parts, input_size, layers, bias=bias, input_shard=input_shard)
        self.packed: ExpertStack | None = None

    def shape(self, act: str | None = None) -> ExpertShape:
        """Return the shape of the product, with what it fuses."""
        form = self.weight.form if isinstance(self.weight, QuantizedWeight) else None
        return ExpertShape(len(self.stack), self.weight.n // len(self.stack), self.weight.k, act, form)

    def pack(self) -> None:
        try:
            self.packed = ExpertStack(self.weight, len(self.stack), self.num_stackable)
        except NotImplementedError as error:
            raise ModelError(str(error)) from None

    def move_to(self, device: torch.device) -> None:
        super().move_to(device)
        if self.packed is None or self.packed.codes is not None:  # a GPU's kernels had the old addresses
            self.packed = None
            if device.type == "cuda":
                self.pack()

    def products(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        by_expert: "Sorted | Unsorted | None",
        act: str | None = None,
        *,
        has_bias: bool = True,
        following: "StackedLinear | None" = None,
    ) -> torch.Tensor:
        """Return each pair's product, as `ExpertStack.products` does. Not `has_bias`: without the bias, if any."""
        assert self.packed is not None, "not packed"
        bias = self.bias if has_bias else None
        return self.packed.products(x, ids, by_expert, act, bias, following=following.packed if following else None)


class Experts(Layer):
    """Gate, up and down of all experts of a layer."""

    def __init__(self, experts: ExpertsConfig, hidden_size: int, layers: LayerConfig) -> None:
        num_experts, size, of_down = experts.routing.num_experts, experts.intermediate_size, layers.within("down_proj")
        (scheme,) = of_down.schemes_of(("down_proj",))
        inner, shard = padded_split(layers.width_shard, size, scheme.input_unit(size))
        self.gate_up_proj = StackedLinear(
            ("gate_proj", "up_proj"), [Part(inner, shard)] * 2, hidden_size, num_experts,
            layers.within("gate_up_proj"), bias=experts.has_bias,
        )  # fmt: skip
        self.down_proj = StackedLinear(
            ("down_proj",), [Part(hidden_size)], inner, num_experts, of_down, bias=experts.has_bias, input_shard=shard
        )


class Routed(NamedTuple):
    """The state between the two products of a mixture."""

    inner: torch.Tensor  # [T k, inner], of pairs, as `down_proj` reads it
    ids: torch.Tensor  # [T, k]
    by_expert: "Sorted | Unsorted | None"
    weights: torch.Tensor  # float32 [T, k]
    shared: torch.Tensor | None  # [T, inner of the shared experts]


class MoE(MLP):
    """Routed experts, and maybe shared ones, to which every token goes."""

    def __init__(self, config: ModelConfig, experts: ExpertsConfig, layers: LayerConfig) -> None:
        hidden = config.hidden_size
        self.gate = Router(experts, hidden, layers.within("gate"))
        self.experts = Experts(experts, hidden, layers.within("experts"))
        self.shared_experts: GatedMLP | None = None
        self.shared_expert_gate: Linear | None = None
        if experts.shared_size:
            shared = replace(config, intermediate_size=experts.shared_size)
            self.shared_experts = GatedMLP(shared, layers.within("shared_experts"))
            if experts.has_shared_gate:
                plain = replace(layers.within("shared_expert_gate"), quantization=Quantization())
                self.shared_expert_gate = Linear((), [Part(1)], hidden, plain)
        self.shared_scale, self.weighs_inputs = experts.shared_scale, experts.weighs_inputs
        self.act = experts.act or activation(config.hidden_act)
        adds_bias, is_first = layers.width_shard.index == 0, layers.comm.rank == 0
        self.down_proj = Down(self, adds_bias=adds_bias, is_first=is_first)  # type: ignore[assignment]

    def __call__(self, x: torch.Tensor, *, norm: Norm | None = None) -> Routed:  # type: ignore[override]
        return self.routed(x, *self.gate.choose(x)) if norm is None else self.routed(*self.gate.choose_normed(x, norm))

    def routed(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Routed:
        """Return the inner state of tokens x [T, hidden] whose experts are `ids`, with `weights`: both [T, k]."""
        shared = None
        if self.shared_experts is not None:
            shared = self.shared_experts(x)
            if self.shared_expert_gate is not None:
                shared = shared * torch.sigmoid(self.shared_expert_gate(x))
            if self.shared_scale != 1.0:
                shared = shared * self.shared_scale
        if self.weighs_inputs:
            x = (x[:, None] * weights[:, :, None].to(x.dtype)).flatten(0, 1)
            weights = (weights != 0).float()  # another rank's experts have none
        gate_up, down = self.experts.gate_up_proj, self.experts.down_proj
        by_expert = gate_up.packed.sort(ids) if gate_up.packed is not None else None
        inner = gate_up.products(x, ids, by_expert, self.act, following=down)
        return Routed(inner, ids, by_expert, weights, shared)

    def tuning_shape(self, *, has_norm: bool) -> WeightShape | None:  # noqa: ARG002
        return None

    def expert_shapes(self) -> list[ExpertShape]:
        """Return the shapes of both products of experts."""
        return [self.experts.gate_up_proj.shape(self.act), self.experts.down_proj.shape()]


class Down:
    """The product that ends the branch, in a `Linear`'s place. Not a layer: its weights are the mixture's."""

    bias = None

    def __init__(self, moe: MoE, *, adds_bias: bool, is_first: bool) -> None:
        """adds_bias: the experts', if any: of ranks that split an expert, one does. is_first: of all ranks."""
        self._moe = moe
        self._has_bias, self._is_first = adds_bias, is_first

    @property
    def weight(self) -> "Down":
        return self

    def product(
        self,
        routed: Routed,
        *,
        residual: torch.Tensor | None = None,
        may_overwrite: bool = False,
    ) -> torch.Tensor:
        """Return residual + the weighted sums of this rank's experts, and of the shared ones: [T, hidden].

        may_overwrite: the shared ones' may be added to `residual` itself; the sum is a new tensor.
        """
        moe = self._moe
        pairs = moe.experts.down_proj.products(routed.inner, routed.ids, routed.by_expert, has_bias=self._has_bias)
        if routed.shared is not None:
            assert moe.shared_experts is not None
            shared = moe.shared_experts.down_proj
            bias = shared.bias if self._is_first else None
            residual = shared.weight.product(routed.shared, bias=bias, residual=residual, may_overwrite=may_overwrite)
        return combine(pairs, routed.weights, residual, has_gaps=moe.gate.held is not None)

    def __call__(self, routed: Routed, **fused: Any) -> torch.Tensor:
        return self.product(routed, **fused)

    def tuning_shape(self, **fused: Any) -> WeightShape | None:
        return None
