"""One block of a decoder, by the place of its norms: each class is an equation, and its attributes the checkpoint's.

h [T, hidden] is the residual stream; attention and MLP are what stands before the product that ends each branch.
"""

from typing import Any, ClassVar

import torch

from cache.pool import CachePool
from engine.layers.attention import AnyAttention, Attention
from engine.layers.communicator import Communicator
from engine.layers.forward_batch import ForwardBatch
from engine.layers.layer import Layer, LayerConfig, unique_layers
from engine.layers.linear import Linear
from engine.layers.mlp import MLP, GatedMLP
from engine.layers.moe import MoE
from engine.layers.norm import HiddenNorm, RMSNorm
from engine.layers.rotary import RotaryEmbedding
from engine.model_config import AttentionConfig, ExpertsConfig, ModelConfig
from kernels.tuning import WeightShape


class Block(Layer):
    """Attention, MLP, and the norms that the class names."""

    norm_class: ClassVar[type[HiddenNorm]] = RMSNorm
    attention_class: ClassVar[type[AnyAttention]] = Attention
    mlp_class: ClassVar[type[MLP]] = GatedMLP
    norm_names: ClassVar[tuple[str, ...]]
    branches_take_norms: ClassVar = True  # whether each branch's first product is given the norm ahead of it
    has_final_norm: ClassVar = True  # whether the last block's result is normalized once more

    def __init__(
        self,
        config: ModelConfig,
        attention: AttentionConfig,
        layer_id: int,
        rotary: RotaryEmbedding,
        layers: LayerConfig,
    ) -> None:
        """layer_id: in the cache, see `AnyAttention`."""
        hidden, eps = config.hidden_size, config.norm_eps
        self.self_attn = self.attention_class(
            attention, hidden, eps, layer_id, rotary, layers.within("self_attn"), self.norm_class
        )
        experts = config.experts[layers.block_index] if config.experts else None
        self.mlp = self.new_mlp(config, experts, layers.within("mlp"))
        for name in self.norm_names:
            setattr(self, name, self.norm_class(hidden, eps, layers))
        self.comm = layers.comm

    def new_mlp(self, config: ModelConfig, experts: ExpertsConfig | None, layers: LayerConfig) -> MLP:
        """Return what follows attention: a mixture of experts where the layer has one."""
        return self.mlp_class(config, layers) if experts is None else MoE(config, experts, layers)

    @property
    def mixture(self) -> MoE | None:
        """The block's experts, if it has any."""
        return self.mlp if isinstance(self.mlp, MoE) else None

    @property
    def kind(self) -> tuple[object, ...]:
        """Blocks of the same kind need the same kernels."""
        linears = [layer for layer in unique_layers(self) if isinstance(layer, Linear)]
        stored = [(linear.weight.storage, linear.bias is None) for linear in linears]
        return (type(self), type(self.mlp), self.self_attn.config, *stored)

    @property
    def fuses_norms(self) -> bool:
        """Return whether the first product of each branch takes in the norm ahead of it, where a kernel can."""
        return self.branches_take_norms and self.norm_class.is_rms

    def tuning_shapes(self) -> list[WeightShape | None]:
        """Return the shapes of the products of one token, each with what the block fuses."""
        mlp, has_norm = self.mlp, self.fuses_norms
        return [
            *self.self_attn.tuning_shapes(has_norm=has_norm),
            mlp.tuning_shape(has_norm=has_norm),
            mlp.down_proj.weight.tuning_shape(has_residual=True),
        ]

    def __call__(self, h: torch.Tensor, batch: ForwardBatch, pool: CachePool) -> torch.Tensor:
        """Return the new residual stream, which may be `h` itself, overwritten."""
        raise NotImplementedError


class PreNorm(Block):
    """Norms before attention and MLP, inside the residual branch (Llama).

    h = h + Wo attention(norm(h))
    h = h + Wdown mlp(norm(h))
    """

    norm_names: ClassVar = ("input_layernorm", "post_attention_layernorm")
    input_layernorm: HiddenNorm
    post_attention_layernorm: HiddenNorm

    def __call__(self, h: torch.Tensor, batch: ForwardBatch, pool: CachePool) -> torch.Tensor:
        attn, mlp = self.self_attn, self.mlp
        found = attn(h, batch, pool, norm=self.input_layernorm)
        h = sum_over_ranks(self.comm, attn.o_proj, found, residual=h, may_overwrite=True)
        gated = mlp(h, norm=self.post_attention_layernorm)
        return sum_over_ranks(self.comm, mlp.down_proj, gated, residual=h, may_overwrite=True)


class Parallel(Block):
    """Attention and MLP side by side, of the same normed input (Command-R, Phi).

    h = h + Wo attention(norm(h)) + Wdown mlp(norm(h))
    """

    norm_names: ClassVar = ("input_layernorm",)
    branches_take_norms: ClassVar = False
    input_layernorm: HiddenNorm

    def __call__(self, h: torch.Tensor, batch: ForwardBatch, pool: CachePool) -> torch.Tensor:
        attn, mlp, normed = self.self_attn, self.mlp, self.input_layernorm(h)
        found, inner = attn(normed, batch, pool), mlp(normed)
        return sum_both_over_ranks(self.comm, attn.o_proj, found, mlp.down_proj, inner, residual=h)


class ParallelTwoNorms(Block):
    """Attention and MLP side by side, each with a norm of its own (GPT-NeoX).

    h = h + Wo attention(norm(h)) + Wdown mlp(norm'(h))
    """

    norm_names: ClassVar = ("input_layernorm", "post_attention_layernorm")
    input_layernorm: HiddenNorm
    post_attention_layernorm: HiddenNorm

    def __call__(self, h: torch.Tensor, batch: ForwardBatch, pool: CachePool) -> torch.Tensor:
        attn, mlp = self.self_attn, self.mlp
        found = attn(h, batch, pool, norm=self.input_layernorm)
        inner = mlp(h, norm=self.post_attention_layernorm)
        return sum_both_over_ranks(self.comm, attn.o_proj, found, mlp.down_proj, inner, residual=h)


class ScaledPreNorm(Block):
    """A `PreNorm` whose branches are scaled by r, `residual_scale` (Granite, MiniCPM).

    h = h + r Wo attention(norm(h))
    h = h + r Wdown mlp(norm(h))
    """

    norm_names: ClassVar = ("input_layernorm", "post_attention_layernorm")
    input_layernorm: HiddenNorm
    post_attention_layernorm: HiddenNorm

    def __init__(self, config: ModelConfig, *args: Any) -> None:
        super().__init__(config, *args)
        self.residual_scale = config.residual_scale

    def __call__(self, h: torch.Tensor, batch: ForwardBatch, pool: CachePool) -> torch.Tensor:
        attn, mlp, r = self.self_attn, self.mlp, self.residual_scale
        found = attn(h, batch, pool, norm=self.input_layernorm)
        h = torch.add(h, sum_over_ranks(self.comm, attn.o_proj, found), alpha=r)
        gated = mlp(h, norm=self.post_attention_layernorm)
        return h.add_(sum_over_ranks(self.comm, mlp.down_proj, gated), alpha=r)


class PostNorm(Block):
    """Norms at the end of each branch, none before it (OLMo 2, EXAONE 4).

    h = h + norm(Wo attention(h))
    h = h + norm(Wdown mlp(h))
    """

    norm_names: ClassVar = ("post_attention_layernorm", "post_feedforward_layernorm")
    branches_take_norms: ClassVar = False
    post_attention_layernorm: HiddenNorm
    post_feedforward_layernorm: HiddenNorm

    def __call__(self, h: torch.Tensor, batch: ForwardBatch, pool: CachePool) -> torch.Tensor:
        attn, mlp = self.self_attn, self.mlp
        found = attn(h, batch, pool)
        h = h + self.post_attention_layernorm(sum_over_ranks(self.comm, attn.o_proj, found))
        gated = mlp(h)
        return h + self.post_feedforward_layernorm(sum_over_ranks(self.comm, mlp.down_proj, gated))


class PostLN(Block):
    """Norms of the residual stream, behind each sum (Vaswani et al. 2017).

    h = norm(h + Wo attention(h))
    h = norm(h + Wdown mlp(h))
    """

    norm_names: ClassVar = ("post_attention_layernorm", "post_feedforward_layernorm")
    branches_take_norms: ClassVar = False
    has_final_norm: ClassVar = False
    post_attention_layernorm: HiddenNorm
    post_feedforward_layernorm: HiddenNorm

    def __call__(self, h: torch.Tensor, batch: ForwardBatch, pool: CachePool) -> torch.Tensor:
        attn, mlp = self.self_attn, self.mlp
        found = attn(h, batch, pool)
        h = sum_over_ranks(self.comm, attn.o_proj, found, residual=h, may_overwrite=True)
        h = self.post_attention_layernorm(h)
        inner = mlp(h)
        h = sum_over_ranks(self.comm, mlp.down_proj, inner, residual=h, may_overwrite=True)
        return self.post_feedforward_layernorm(h)


class Sandwich(Block):
    """Norms before and after attention and MLP (Gemma 2).

    h = h + norm(Wo attention(norm(h)))
    h = h + norm(Wdown mlp(norm(h)))
    """

    norm_names: ClassVar = (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    )  # fmt: skip
    input_layernorm: HiddenNorm
    post_attention_layernorm: HiddenNorm
    pre_feedforward_layernorm: HiddenNorm
    post_feedforward_layernorm: HiddenNorm

    def __call__(self, h: torch.Tensor, batch: ForwardBatch, pool: CachePool) -> torch.Tensor:
        attn = self.self_attn
        found = attn(h, batch, pool, norm=self.input_layernorm)
        h = h + self.post_attention_layernorm(sum_over_ranks(self.comm, attn.o_proj, found))
        return h + self.post_feedforward_layernorm(self.feed_forward(h))

    def feed_forward(self, h: torch.Tensor) -> torch.Tensor:
        """Return Wdown mlp(norm(h)), of all ranks: a new tensor."""
        return sum_over_ranks(self.comm, self.mlp.down_proj, self.mlp(h, norm=self.pre_feedforward_layernorm))


def sum_over_ranks(
    comm: Communicator,
    linear: Linear,
    x: Any,
    *,
    residual: torch.Tensor | None = None,
    may_overwrite: bool = False,
) -> torch.Tensor:
    """Return residual + the sum of all ranks' x W^T + bias: what a row-parallel product stands for.

    The first rank alone adds residual and bias, before the sum: that costs no pass of its own.
    x: [T, inner], or what a mixture has in its place. may_overwrite: the result may be written into `residual`.
    """
    if comm.rank:
        return comm.all_reduce(linear.weight.product(x))
    return comm.all_reduce(linear(x, residual=residual, may_overwrite=may_overwrite))


def sum_both_over_ranks(
    comm: Communicator,
    first: Linear,
    x: torch.Tensor,
    second: Linear,
    y: torch.Tensor,
    *,
    residual: torch.Tensor,
) -> torch.Tensor:
    """Return residual + the sum of all ranks' x W^T + bias and y V^T + bias, W of `first` and V of `second`.

    One exchange serves both. The result may be written into `residual`; see `sum_over_ranks`.
    """
    if comm.rank:
        part = first.weight.product(x)
        return comm.all_reduce(second.weight.product(y, residual=part, may_overwrite=True))
    part = first(x, residual=residual, may_overwrite=True)
    return comm.all_reduce(second(y, residual=part, may_overwrite=True))
