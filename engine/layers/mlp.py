"""The feed-forward half of a block. `down_proj`, which ends the branch, is the block's to call."""

import functools
from abc import abstractmethod
from collections.abc import Callable

import torch

from engine.layers.layer import Layer, LayerConfig
from engine.layers.linear import Linear, activation, merged_column_parallel, row_parallel
from engine.model_config import ModelConfig
from kernels.elementwise import activate
from kernels.tuning import WeightShape
from kernels.weights import Norm


class MLP(Layer):
    """Compute the input of `down_proj` from that of the norm before it."""

    down_proj: Linear

    @abstractmethod
    def __init__(self, config: ModelConfig, layers: LayerConfig) -> None: ...

    @abstractmethod
    def __call__(self, x: torch.Tensor, *, norm: Norm | None = None) -> torch.Tensor:
        """Return [T, inner] of norm(x), x [T, hidden]."""

    @abstractmethod
    def tuning_shape(self, *, has_norm: bool) -> WeightShape | None:
        """Return the shape of the first product, with what it fuses. has_norm: an RMS norm stands before it."""


class GatedMLP(MLP):
    """act(gate x) * up x (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, layers: LayerConfig) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = merged_column_parallel(
            ("gate_proj", "up_proj"), (inner, inner), hidden, layers.within("gate_up_proj"), bias=bias
        )
        self.down_proj = row_parallel(inner, hidden, layers.within("down_proj"), bias=bias)
        self.act = activation(config.hidden_act)

    def __call__(self, x: torch.Tensor, *, norm: Norm | None = None) -> torch.Tensor:
        """Return [T, inner] of norm(x), x [T, hidden]: [T, 2 inner] is not kept."""
        return self.gate_up_proj(x, norm=norm, act=self.act)

    def tuning_shape(self, *, has_norm: bool) -> WeightShape | None:
        return self.gate_up_proj.weight.tuning_shape(has_norm=has_norm, act=self.act)


class PlainMLP(MLP):
    """act(up x), without a gate."""

    def __init__(self, config: ModelConfig, layers: LayerConfig) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.up_proj = merged_column_parallel((), (inner,), hidden, layers.within("up_proj"), bias=bias)
        self.down_proj = row_parallel(inner, hidden, layers.within("down_proj"), bias=bias)
        self.activation = self.make_activation(config)

    def make_activation(self, config: ModelConfig) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the activation: a function, or a layer if it has weights."""
        return functools.partial(activate, act=activation(config.hidden_act))

    def __call__(self, x: torch.Tensor, *, norm: Norm | None = None) -> torch.Tensor:
        return self.activation(self.up_proj(x, norm=norm))

    def tuning_shape(self, *, has_norm: bool) -> WeightShape | None:
        return self.up_proj.weight.tuning_shape(has_norm=has_norm)
