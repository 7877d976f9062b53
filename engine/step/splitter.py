"""Steps whose layers are split: attention of single tokens beside gate's and up's product (`kernels.corun`)."""

from collections.abc import Sequence

import torch

from cache.layout import bytes_per_token
from cache.pool import CachePool
from engine.layers.attention import Attention
from engine.layers.block import Block, PreNorm, sum_over_ranks
from engine.layers.forward_batch import ForwardBatch
from engine.layers.mlp import GatedMLP
from engine.models.base import Decoder
from engine.schedule.plan import Plan, context_tokens
from engine.step.fields import StepShape
from kernels.corun import STEP_TOKENS, Corun, CorunCosts, can_corun, choose_corun, gated_beside_decodes


class StepSplitter:
    """Chooses which steps are split, and runs their blocks. No family knows of it."""

    def __init__(self, decoder: Decoder, pool: CachePool) -> None:
        self._pool = pool
        self.costs = costs_of(decoder.layers, pool)  # None: no step of this model can be split

    @property
    def can_split(self) -> bool:
        return self.costs is not None

    def choose(self, plan: Plan, shape: StepShape) -> Corun | None:
        """Return how the layers of a step are split; None: not at all."""
        if self.costs is None or not plan.num_decodes or plan.is_decode:
            return None
        num_context_tokens = context_tokens(plan.seq_lens[: plan.num_decodes], plan.groups)
        num_tokens = shape.num_decodes + shape.num_prefill_tokens
        return choose_corun(self.costs, num_tokens, plan.num_decodes, num_context_tokens)

    def best_prompt_tokens(self, num_decodes: int, num_context_tokens: int) -> int | None:
        """Return how many prompt tokens a step should have beside `num_decodes` that see `num_context_tokens`.

        None: as many as it may.
        """
        if self.costs is None:
            return None
        corun = choose_corun(self.costs, STEP_TOKENS, num_decodes, num_context_tokens)
        return None if corun is None else STEP_TOKENS - num_decodes

    def run_block(self, block: Block, h: torch.Tensor, batch: ForwardBatch, corun: Corun) -> torch.Tensor:
        """Compute a block with the last tokens ahead of the others: they do not need the attention of the decodes."""
        assert isinstance(block, PreNorm) and isinstance(block.mlp, GatedMLP)
        attn, mlp, norm, comm = block.self_attn, block.mlp, block.post_attention_layernorm, block.comm
        assert isinstance(attn, Attention)
        q, found = attn.attend(h, batch, self._pool, norm=block.input_layernorm)
        k_cache, v_cache = self._pool[attn.layer_id]
        first, weight = len(h) - corun.num_tokens, mlp.gate_up_proj.weight
        gated = h.new_empty(len(h), weight.n // 2)
        ahead, others = h[first:], h[:first]
        ahead = sum_over_ranks(comm, attn.o_proj, found[first:].flatten(1), residual=ahead, may_overwrite=True)
        gated_beside_decodes(
            norm(ahead),
            weight,
            mlp.act,
            gated[first:],
            q,
            k_cache,
            v_cache,
            batch,
            found,
            num_free_sms=corun.num_free_sms,
            scale=attn.scale,
            softcap=attn.softcap,
            sinks=attn.sinks,
            slopes=attn.slopes,
        )
        others = sum_over_ranks(comm, attn.o_proj, found[:first].flatten(1), residual=others, may_overwrite=True)
        weight.product(norm(others), act=mlp.act, out=gated[:first])
        if others.data_ptr() != h.data_ptr():  # on a CPU products may make new tensors
            h = torch.cat((others, ahead))
        return sum_over_ranks(comm, mlp.down_proj, gated, residual=h, may_overwrite=True)


def costs_of(blocks: Sequence[Block], pool: CachePool) -> CorunCosts | None:
    """Return what decides how steps are split; None where one of the blocks cannot be split as all others."""
    costs = {_costs_of_block(block, pool) for block in blocks}
    return costs.pop() if len(costs) == 1 else None


def _costs_of_block(block: Block, pool: CachePool) -> CorunCosts | None:
    if not isinstance(block, PreNorm) or not isinstance(block.mlp, GatedMLP):
        return None
    attn, gate_up = block.self_attn, block.mlp.gate_up_proj
    if not isinstance(attn, Attention) or attn.k_scale is not None:
        return None
    is_alone = block.comm.size == 1  # else each half has a sum over ranks of its own: 8 % slower on two GPUs
    has_kernel = attn.backend != "torch"
    has_window = attn.window >= 0  # and little for attention to read
    if not is_alone or not has_kernel or has_window or gate_up.bias is not None:
        return None
    if not can_corun(gate_up.weight, block.mlp.act):
        return None
    return CorunCosts(bytes_per_token([attn.cache], pool.dtype), 2 * gate_up.weight.n * gate_up.weight.k)
