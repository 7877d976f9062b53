"""Steps of a few single tokens on a CPU: all that stands between two attentions is one compiled call.

One token of a small model is some three hundred products, rotations and copies of 10 to 150 µs. Before each of them
Python takes as long again, and threads that sleep meanwhile come late. Here a call does those of one layer, and threads
are woken once for it (`kernels.chain_cpu`). Results are the same bits as those of the blocks.
"""

from typing import Any, NamedTuple

import torch

from cache.pool import CachePool
from engine.layers.attention import Attention
from engine.layers.forward_batch import ForwardBatch
from engine.layers.linear import Linear
from engine.models.base import CausalLM, Decoder
from engine.step.plain_blocks import PlainBlock, plain_blocks
from kernels.attention import DecodeSet, decode_gathered, only_set
from kernels.cache_cpu import Kernels, kernels
from kernels.chain_cpu import Operation
from kernels.products_cpu import MAX_CHAINED, CpuWeight

SMALL_ATTENTION = 1 << 18  # numbers of keys, to which one thread attends sooner than another one is there


class _Kind(NamedTuple):
    """Name what layers that attend to the same tokens have in common."""

    first: Attention
    gather: Operation

    @staticmethod
    def key(attn: Attention) -> tuple[object, ...]:
        return attn.window, attn.config.is_chunked, attn.slopes is not None


class _Reads(NamedTuple):
    """Hold what layers of a kind attend to in a step: each gathers its own into the same memory."""

    members: DecodeSet
    k: torch.Tensor
    v: torch.Tensor
    num_threads: int  # of torch


class CompiledSteps:
    """The blocks of a model as chains of operations, and room for what these pass on, of MAX_CHAINED tokens."""

    def __init__(self, decoder: Decoder, blocks: list[PlainBlock], pool: CachePool, compiled: Kernels) -> None:
        self._decoder, self._kernels, self._num_tokens = decoder, compiled, MAX_CHAINED
        attn, mlp = blocks[0].attn, blocks[0].mlp
        k_cache, v_cache = pool[attn.layer_id]
        self._h, self._qkv, inner = (
            torch.empty(MAX_CHAINED, size, dtype=attn.dtype)
            for size in (attn.qkv_proj.weight.k, attn.qkv_proj.weight.n, mlp.down_proj.weight.k)
        )
        self._q = torch.empty(MAX_CHAINED, attn.num_heads, attn.head_dim, dtype=attn.dtype)
        self._layers = [(block.attn, _Kind.key(block.attn)) for block in blocks]
        self._kinds: dict[tuple[object, ...], _Kind] = {}
        self._ropes: list[Any] = []  # calls, as those below
        self._outs: list[Any] = []
        chains: list[list[Operation]] = [[]]
        for block in blocks:
            attn, mlp = block.attn, block.mlp
            norms = (*attn.norm_weights, attn.eps)
            qkv = _product(attn.qkv_proj, self._h, self._qkv, norm=block.first_norm)
            rope = compiled.rope_operation(
                self._qkv, self._q, attn.rotary.cos_sin, k_cache, v_cache, attn.num_heads, attn.num_kv_heads, norms
            )
            out = _product(attn.o_proj, self._q.flatten(1), self._h, residual=self._h)
            gated = _product(mlp.gate_up_proj, self._h, inner, norm=block.second_norm, act=mlp.act)
            down = _product(mlp.down_proj, inner, self._h, residual=self._h)
            kind = self._kinds.setdefault(_Kind.key(attn), _Kind(attn, compiled.gather_operation(k_cache)))
            chains[-1] += [qkv, rope, kind.gather]
            chains.append([out, gated, down])
            self._ropes.append(rope.call)
            self._outs.append(out.call)
        self._chains = [compiled.chain(chain) for chain in chains]
        gathers = [kind.gather for kind in self._kinds.values()]
        self._calls: list[Any] = [op.call for chain in chains for op in chain if op not in gathers]

    @staticmethod
    def of(model: CausalLM, pool: CachePool) -> "CompiledSteps | None":
        """Return the steps of a model of plain blocks whose weights have compiled products; None for others."""
        blocks, compiled = plain_blocks(model), kernels()
        if compiled is None or blocks is None or not all(map(_can_compile, blocks)):
            return None
        if len({block.shape for block in blocks}) != 1:
            return None
        steps, attn = CompiledSteps(model.model, blocks, pool, compiled), blocks[0].attn
        caches = [pool[block.attn.layer_id] for block in blocks]
        can_rotate = all(compiled.can_rotate(steps._qkv, *views) and compiled.can_gather(*views) for views in caches)
        return steps if can_rotate and attn.head_dim == caches[0].v.shape[2] else None

    def take(self, batch: ForwardBatch) -> bool:
        """Return whether `batch` is such a step."""
        num_tokens = len(batch.input_ids)
        others = (batch.rotation, batch.features, batch.of_windows, batch.seen_until)
        is_plain = all(other is None for other in others)
        return num_tokens <= MAX_CHAINED and num_tokens == batch.num_decodes and is_plain

    def __call__(self, batch: ForwardBatch, pool: CachePool) -> torch.Tensor:
        """Return what the decoder returns, [T, hidden]."""
        num_tokens, num_threads = len(batch.input_ids), torch.get_num_threads()
        if num_tokens != self._num_tokens:
            for call in self._calls:
                call.num_tokens = num_tokens
            self._num_tokens = num_tokens
        h = self._h[:num_tokens].copy_(self._decoder.embed(batch))
        try:
            self._run_blocks(batch, pool, self._q[:num_tokens], num_threads)
        finally:
            self._kernels.use_threads(num_threads)
        return self._decoder.norm(h)

    def _run_blocks(self, batch: ForwardBatch, pool: CachePool, q: torch.Tensor, num_threads: int) -> None:
        positions, slots = batch.positions.data_ptr(), batch.out_cache_loc.data_ptr()
        aimed = {key: self._aim(kind, batch, pool, q.dtype, num_threads) for key, kind in self._kinds.items()}
        torch_threads = None
        for (attn, key), chain, rope, out in zip(self._layers, self._chains, self._ropes, self._outs, strict=False):
            k_cache, v_cache = pool[attn.layer_id]
            k_pointer, v_pointer = k_cache.data_ptr(), v_cache.data_ptr()
            rope.positions, rope.slots, rope.k_cache, rope.v_cache = positions, slots, k_pointer, v_pointer
            reads = aimed[key]
            wanted_threads = num_threads if reads is None else reads.num_threads
            if torch_threads != wanted_threads:
                self._kernels.use_threads(torch_threads := wanted_threads)
            if reads is None:
                chain.run(len(chain) - 1, num_threads)
                found = attn.find(q, k_cache, v_cache, batch)
            else:
                gather = self._kinds[key].gather.call
                gather.k_cache, gather.v_cache = k_pointer, v_pointer
                chain.run(len(chain), num_threads)
                members, k, v, _ = reads
                found = decode_gathered(q, k, v, members, attn.scale, attn.softcap, attn.sinks, attn.slopes)
            out.x = found.data_ptr()  # kept until the next one is there
        self._chains[-1].run(len(self._chains[-1]), num_threads)

    def _aim(
        self, kind: _Kind, batch: ForwardBatch, pool: CachePool, dtype: torch.dtype, num_threads: int
    ) -> _Reads | None:
        """Have layers of a kind gather what a step's tokens see; None where that is not done at once."""
        attn, views = kind.first, pool[kind.first.layer_id]
        members = only_set(batch, attn.window, attn.config.is_chunked, dtype, attn.slopes is not None)
        room = None if members is None else members.room(*views)
        if members is None or room is None:
            return None
        k, v = room.aim(kind.gather.call, *views)
        return _Reads(members, k, v, 1 if k.numel() <= SMALL_ATTENTION else num_threads)


def _product(linear: Linear, x: torch.Tensor, out: torch.Tensor, **fused: Any) -> Operation:
    assert isinstance(linear.weight, CpuWeight)
    return linear.weight.operation(x, out, bias=linear.bias, **fused)


def _can_compile(block: PlainBlock) -> bool:
    """Return whether a block's products are compiled ones, and nothing else is done to what they find."""
    acts = (None, None, block.mlp.act, None)
    weights = [linear.weight for linear in block.linears]
    can_chain = all(isinstance(w, CpuWeight) and w.can_chain(act) for w, act in zip(weights, acts, strict=True))
    return can_chain and block.attn.is_plain
