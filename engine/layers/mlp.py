"""The feed-forward half of a block."""

import torch

from engine.layers.layer import Layer, LayerConfig
from engine.layers.linear import activation, merged_column_parallel, row_parallel
from engine.model_config import ModelConfig
from kernels.weights import Norm


class GatedMLP(Layer):
    """act(gate x) * up x (Shazeer 2020). `down_proj`, which ends the branch, is the block's to call."""

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
