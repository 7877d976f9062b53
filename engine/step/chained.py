"""Steps of one token on a GPU whose weights have few bits: all products between two attentions are one kernel.

A layer's products take as long as their codes take to be read, if only something is read all the time: see
`kernels.quantized_chain`.
"""

from typing import Any

import torch

from cache.pool import CachePool
from engine.layers.forward_batch import ForwardBatch
from engine.layers.linear import Linear
from engine.models.base import CausalLM, Decoder
from engine.step.plain_blocks import PlainBlock, plain_blocks
from kernels.quantized_chain import ChainedProduct, can_chain, kinds_of, multiply_chain
from kernels.quantized_cuda import CudaQuantizedWeight
from kernels.quantized_kernel import Kind


class ChainedSteps:
    """The blocks of a model for a single token."""

    def __init__(
        self, decoder: Decoder, blocks: list[PlainBlock], kinds: tuple[Kind, ...], device: torch.device
    ) -> None:
        """blocks: those of `decoder`, in their order. kinds: of all weights, so that all layers have one kernel."""
        self._decoder = decoder
        self._blocks = dict(zip(decoder.layers, blocks, strict=True))
        self._kinds = kinds
        self._arrivals = torch.zeros(1, dtype=torch.int64, device=device)

    @staticmethod
    def of(model: CausalLM, device: torch.device) -> "ChainedSteps | None":
        """Return the steps of a model of plain blocks whose weights can be chained; None for others."""
        blocks = plain_blocks(model)
        if blocks is None or any(attn.make_qkv != attn.qkv_proj.__call__ for attn, *_ in blocks):
            return None
        linears = [linear for block in blocks for linear in block.linears]
        weights = [linear.weight for linear in linears if isinstance(linear.weight, CudaQuantizedWeight)]
        if len(weights) < len(linears) or not can_chain(weights, device):
            return None
        return ChainedSteps(model.model, blocks, kinds_of(weights), device)

    def take(self, batch: ForwardBatch) -> bool:
        """Return whether `batch` is such a step."""
        return len(batch.input_ids) == batch.num_decodes == 1 and batch.features is None

    def __call__(self, batch: ForwardBatch, pool: CachePool) -> torch.Tensor:
        """Return what the decoder returns, [1, hidden]."""
        h = self._decoder.embed(batch)
        blocks = [self._blocks[block] for block in self._decoder.layers]  # some of them, while kernels are looked for
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
            multiply_chain(products, self._arrivals, kinds=self._kinds)
        return self._decoder.norm(h)


def _product(linear: Linear, x: torch.Tensor, out: torch.Tensor, **fused: Any) -> ChainedProduct:
    assert isinstance(linear.weight, CudaQuantizedWeight)
    return ChainedProduct(linear.weight, x, out, linear.bias, **fused)
