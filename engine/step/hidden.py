"""Hidden states that requests ask for: of every token that is computed, after the last norm."""

from dataclasses import dataclass

import numpy as np
import torch

from engine.schedule.plan import Plan
from engine.schedule.rows import Rows
from engine.state import RequestState


@dataclass(slots=True)
class HiddenWork:
    """Say whose hidden states a step keeps: (state, position of the first token) and tokens of each."""

    parts: list[tuple[RequestState, int]]
    lens: list[int]
    tokens: np.ndarray  # int64, indices into the step's T tokens, part after part


@dataclass(slots=True)
class HiddenStates:
    """Hold the hidden states that a step computed for its requests."""

    work: HiddenWork
    values: torch.Tensor  # float32 [len(work.tokens), hidden]; host, valid once the step has ended

    def deliver(self) -> None:
        """Write each part to its place in `RequestState.hidden_states`. What was retracted is written again."""
        first = 0
        values = self.values.numpy()
        for (state, start), num_tokens in zip(self.work.parts, self.work.lens, strict=True):
            stop = start + num_tokens
            _with_room(state, stop, values.shape[1])[start:stop] = values[first : first + num_tokens]
            first += num_tokens


def plan_hidden(plan: Plan, rows: Rows) -> HiddenWork | None:
    """Return what `plan` keeps: of chunks of prompts, and of decodes, that want it; None if nobody does."""
    wanted = list(plan.hidden)
    chunks = {b for b, _, _ in wanted}
    decodes = plan.samples[plan.samples < plan.num_decodes]
    for b in decodes[rows.wants_hidden[plan.rows[decodes]]].tolist():
        if b not in chunks:
            wanted.append((b, rows.state_at(plan.rows[b]), int(plan.seq_lens[b]) - 1))
    if not wanted:
        return None
    firsts = np.cumsum(plan.q_lens) - plan.q_lens
    lens = [int(plan.q_lens[b]) for b, _, _ in wanted]
    tokens = [np.arange(firsts[b], firsts[b] + plan.q_lens[b]) for b, _, _ in wanted]
    return HiddenWork([(state, start) for _, state, start in wanted], lens, np.concatenate(tokens))


def _with_room(state: RequestState, num_tokens: int, size: int) -> np.ndarray:
    """Return the request's hidden states, float32 [at least num_tokens, size], longer than before if need be."""
    held = state.hidden_states
    if held is None or len(held) < num_tokens:
        room = max(num_tokens, state.prompt_len + 64, 0 if held is None else 2 * len(held))
        grown = np.empty((room, size), np.float32)
        if held is not None:
            grown[: len(held)] = held
        state.hidden_states = held = grown
    return held
