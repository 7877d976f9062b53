"""Steps of one token on a GPU whose weights have few bits: all products between two attentions are one kernel.

A layer's products take as long as their codes take to be read, if only something is read all the time: see
`kernels.quantized_chain`.
"""

from typing import Any, NamedTuple

import torch

from cache.pool import CachePool
from engine.layers.attention import Attention
from engine.layers.block import Block, PreNorm
from engine.layers.forward_batch import ForwardBatch
from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP
from engine.layers.norm import HiddenNorm
from engine.models.base import CausalLM, Decoder
from kernels.quantized_chain import ChainedProduct, can_chain, multiply_chain
from kernels.quantized_cuda import CudaQuantizedWeight


class _Parts(NamedTuple):
    """Name the parts of a block that can be chained."""

    attn: Attention
    mlp: GatedMLP
    first_norm: HiddenNorm
    second_norm: HiddenNorm

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.attn.qkv_proj, self.attn.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj


class ChainedSteps:
    """The blocks of a model for a single token."""

    def __init__(self, decoder: Decoder, device: torch.device) -> None:
        self._decoder = decoder
        self._arrivals = torch.zeros(1, dtype=torch.int64, device=device)

    @staticmethod
    def of(model: CausalLM, device: torch.device) -> "ChainedSteps | None":
        """Return the steps of a model of plain blocks whose weights can be chained; None for others."""
        decoder = model.model
        if type(model).__call__ is not CausalLM.__call__ or type(decoder).__call__ is not Decoder.__call__:
            return None
        found = [_parts(block) for block in decoder.layers]
        linears = [linear for parts in found if parts is not None for linear in parts.linears]
        weights = [linear.weight for linear in linears if isinstance(linear.weight, CudaQuantizedWeight)]
        is_plain = len(weights) == 4 * len(found) and can_chain(weights, device)
        return ChainedSteps(decoder, device) if is_plain else None

    def take(self, batch: ForwardBatch) -> bool:
        """Return whether `batch` is such a step."""
        return len(batch.input_ids) == batch.num_decodes == 1 and batch.features is None

    def __call__(self, batch: ForwardBatch, pool: CachePool) -> torch.Tensor:
        """Return what the decoder returns, [1, hidden]."""
        h = self._decoder.embed(batch)
        blocks = [parts for parts in map(_parts, self._decoder.layers) if parts is not None]
        first, following = blocks[0], [*blocks[1:], None]
        qkv = first.attn.qkv_proj(h, norm=first.first_norm)
        for (attn, mlp, _, norm), after in zip(blocks, following, strict=True):
            found = attn.answer(qkv, batch, pool)
            inner = h.new_empty(1, mlp.down_proj.weight.k)
            products = [
                _product(attn.o_proj, found, h, is_sum=True),
                _product(mlp.gate_up_proj, h, inner, norm=norm, act=mlp.act),
                _product(mlp.down_proj, inner, h, is_sum=True),
            ]
            if after is not None:
                qkv = h.new_empty(1, after.attn.qkv_proj.weight.n)
                products.append(_product(after.attn.qkv_proj, h, qkv, norm=after.first_norm))
            multiply_chain(products, self._arrivals)
        return self._decoder.norm(h)


def _product(linear: Linear, x: torch.Tensor, out: torch.Tensor, **fused: Any) -> ChainedProduct:
    assert isinstance(linear.weight, CudaQuantizedWeight)
    return ChainedProduct(linear.weight, x, out, linear.bias, **fused)


def _parts(block: Block) -> _Parts | None:
    """Return the parts of a block that computes what `PreNorm` says and nothing else, with norms that kernels fuse."""
    attn, mlp = block.self_attn, block.mlp
    if type(block).__call__ is not PreNorm.__call__ or type(attn) is not Attention or type(mlp) is not GatedMLP:
        return None
    assert isinstance(block, PreNorm)
    is_product = attn.make_qkv == attn.qkv_proj.__call__
    if not is_product or not block.fuses_norms or block.comm.size > 1:
        return None
    return _Parts(attn, mlp, block.input_layernorm, block.post_attention_layernorm)
