"""Pool the hidden states of a prompt into one vector, chunk by chunk."""

from dataclasses import dataclass

import torch

from engine.models.base import CausalLM
from engine.request import Request
from engine.schedule.plan import Plan

LAST, MEAN = "last", "mean"


@dataclass(slots=True)
class PooledChunks:
    """Hold the vectors that a step adds to its requests' embeddings."""

    parts: list[tuple[Request, int]]  # (request, first position of the chunk)
    values: torch.Tensor  # float32 [len(parts), size]; host, valid once the step has ended

    def deliver(self) -> None:
        """Add each vector to its `Request.embedding`. A prompt that was retracted starts again at position 0."""
        for (request, start), value in zip(self.parts, self.values.numpy(), strict=True):
            if request.embedding is None or start == 0 or request.pooling == LAST:
                request.embedding = value.copy()
            else:
                request.embedding += value


def pool(model: CausalLM, hidden: torch.Tensor, plan: Plan) -> tuple[list[tuple[Request, int]], torch.Tensor | None]:
    """Pool the step's hidden states [T, hidden] for `plan.pooled`.

    Returns (parts, values) of `PooledChunks`, still on the device; values are None without parts. The last token's
    state comes with the last chunk; a mean is the sum of its chunks' shares.
    """
    parts, states = [], []
    for b, request, start in plan.pooled:
        first = int(plan.q_lens[:b].sum())
        chunk = hidden[first : first + int(plan.q_lens[b])]
        if request.pooling == MEAN:
            states.append(chunk.sum(0, dtype=torch.float32) / request.prompt_len)
        elif plan.seq_lens[b] == request.prompt_len:
            states.append(chunk[-1].float())
        else:
            continue
        parts.append((request, start))
    return parts, model.pool(torch.stack(states)) if states else None
