"""Pool the hidden states of a prompt into one vector, chunk by chunk."""

from dataclasses import dataclass

import torch

from engine.models.base import CausalLM
from engine.schedule.plan import Plan
from engine.state import RequestState
from engine.step.host_copies import to_host

LAST, MEAN = "last", "mean"


@dataclass(slots=True)
class PooledChunks:
    """Hold the vectors that a step adds to its requests' embeddings."""

    parts: list[tuple[RequestState, int]]  # (state, first position of the chunk)
    values: torch.Tensor  # float32 [len(parts), size]; host, valid once the step has ended

    def deliver(self) -> None:
        """Add each vector to its `RequestState.embedding`. A prompt that was retracted starts again at position 0."""
        for (state, start), value in zip(self.parts, self.values.numpy(), strict=True):
            if state.embedding is None or start == 0 or state.pooling == LAST:
                state.embedding = value.copy()
            else:
                state.embedding += value


def pool(model: CausalLM, hidden: torch.Tensor, plan: Plan) -> PooledChunks | None:
    """Pool the step's hidden states [T, hidden] for `plan.pooled`. None: no chunk of it adds anything.

    The last token's state comes with the last chunk; a mean is the sum of its chunks' shares.
    """
    parts, pooled = [], []
    for b, state, start in plan.pooled:
        first = int(plan.q_lens[:b].sum())
        chunk = hidden[first : first + int(plan.q_lens[b])]
        if state.pooling == MEAN:
            pooled.append(chunk.sum(0, dtype=torch.float32) / state.prompt_len)
        elif plan.seq_lens[b] == state.prompt_len:
            pooled.append(chunk[-1].float())
        else:
            continue
        parts.append((state, start))
    return PooledChunks(parts, to_host(model.pool(torch.stack(pooled)))) if pooled else None
