"""Models whose blocks can be computed by other means than their own calls: see `compiled` and `chained`."""

from typing import NamedTuple

from engine.layers.attention import Attention
from engine.layers.block import Block, PreNorm
from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP
from engine.layers.norm import HiddenNorm
from engine.models.base import CausalLM, Decoder


class PlainBlock(NamedTuple):
    """Name the parts of a block that computes what `PreNorm` says and nothing else."""

    attn: Attention
    mlp: GatedMLP
    first_norm: HiddenNorm
    second_norm: HiddenNorm

    @property
    def linears(self) -> tuple[Linear, Linear, Linear, Linear]:
        return self.attn.qkv_proj, self.attn.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj

    @property
    def shape(self) -> tuple[int, ...]:
        attn = self.attn
        return attn.num_heads, attn.num_kv_heads, attn.head_dim, self.mlp.down_proj.weight.k


def plain_blocks(model: CausalLM) -> list[PlainBlock] | None:
    """Return the blocks of a model on one rank that has nothing but such, with norms that kernels fuse; else None."""
    decoder = model.model
    if type(model).__call__ is not CausalLM.__call__ or type(decoder).__call__ is not Decoder.__call__:
        return None
    blocks = [plain for plain in map(_plain_block, decoder.layers) if plain is not None]
    return blocks if len(blocks) == len(decoder.layers) else None


def _plain_block(block: Block) -> PlainBlock | None:
    attn, mlp = block.self_attn, block.mlp
    if type(block).__call__ is not PreNorm.__call__ or type(attn) is not Attention or type(mlp) is not GatedMLP:
        return None
    assert isinstance(block, PreNorm)
    if not block.fuses_norms or block.comm.size > 1:
        return None
    return PlainBlock(attn, mlp, block.input_layernorm, block.post_attention_layernorm)
