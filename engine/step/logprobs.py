"""Log-probabilities that requests ask for: of the tokens of their answers, and of their prompts'."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.models.base import CausalLM
from engine.schedule.plan import Plan
from engine.schedule.resolver import Outcome
from engine.state import Delta, Logprobs, RequestState
from engine.step.host_copies import to_host
from kernels import sampling

PROMPT_ROWS = 256  # logits rows at a time: 256 x 152k in float32 is 156 MB, whatever the prompt's length


@dataclass(slots=True)
class TokenLogprobs:
    """Hold the log-probabilities of N tokens, and of others in their places."""

    chosen: torch.Tensor  # float32 [N]
    top_values: torch.Tensor  # float32 [N, K]
    top_ids: torch.Tensor  # [N, K]
    ids_values: torch.Tensor | None  # float32 [N, M]

    def to_host(self) -> "TokenLogprobs":
        ids_values = None if self.ids_values is None else to_host(self.ids_values)
        return TokenLogprobs(to_host(self.chosen), to_host(self.top_values), to_host(self.top_ids), ids_values)


# ---- of answers ----


def take_logprobs(values: TokenLogprobs, samples: np.ndarray, outcome: Outcome) -> None:
    """Record the log-probabilities of a step's samples, int64 [N], for those that are still running."""
    # Lists of all at once: for each request's slices, torch would take 15 us.
    chosen, top_values, top_ids = values.chosen.tolist(), values.top_values.tolist(), values.top_ids.tolist()
    ids_values = None if values.ids_values is None else values.ids_values.tolist()
    index_of = {sample: i for i, sample in enumerate(samples.tolist())}
    for state, token, sample in zip(outcome.states, outcome.token_ids, outcome.samples.tolist(), strict=True):
        if (i := index_of.get(sample)) is None:
            continue
        if state.unsent is None:
            state.unsent = Delta(state, "", [])
        if (logprobs := state.unsent.logprobs) is None:
            logprobs = state.unsent.logprobs = Logprobs()
        logprobs.token.append((chosen[i], token))
        if k := state.top_logprobs_num:
            logprobs.top.append(list(zip(top_values[i][:k], top_ids[i][:k], strict=True)))
        if (wanted := state.token_ids_logprob) and ids_values is not None:
            logprobs.token_ids.append(list(zip(ids_values[i], wanted, strict=False)))  # padded for others' sake


# ---- of prompts ----


@dataclass(slots=True)
class PromptLogprobWork:
    state: RequestState | None  # None on ranks that only compute
    start: int
    first_token: int  # of the chunk, in the step's T tokens
    target_ids: np.ndarray  # int64 [N]


@dataclass(slots=True)
class PromptLogprobs:
    """Hold the log-probabilities of a prompt's tokens [start + 1, start + 1 + N), from one chunk."""

    state: RequestState
    start: int
    values: TokenLogprobs  # host, valid once the step has ended

    def deliver(self) -> None:
        """Add them to `RequestState.input_logprobs`. A prompt that was retracted repeats some positions."""
        state, collected = self.state, self.state.input_logprobs
        assert collected is not None
        next_position = state.logprob_start_len + len(collected.token)
        first, stop = next_position - self.start - 1, len(self.values.chosen)
        if first < stop:
            self._add_to(collected, slice(first, stop), state.request.input_ids[next_position : self.start + 1 + stop])

    def _add_to(self, collected: Logprobs, rows: slice, token_ids: Sequence[int]) -> None:
        """Add those of `token_ids`: with as many top tokens as the request wants, and its own wanted ids."""
        state, values = self.state, self.values
        collected.token += zip(values.chosen[rows].tolist(), token_ids, strict=True)
        if k := state.top_logprobs_num:
            top = zip(values.top_values[rows, :k].tolist(), values.top_ids[rows, :k].tolist(), strict=True)
            collected.top += [list(zip(*row, strict=True)) for row in top]
        if (wanted := state.token_ids_logprob) and values.ids_values is not None:
            of_ids = values.ids_values[rows, : len(wanted)].tolist()
            collected.token_ids += [list(zip(row, wanted, strict=True)) for row in of_ids]


def plan_prompt_logprobs(plan: Plan) -> list[PromptLogprobWork]:
    """Return the tokens of prompts in `plan` whose log-probabilities are wanted."""
    work = []
    for b, state, start in plan.prompt_logprobs:
        stop = min(int(plan.seq_lens[b]), state.prompt_len - 1)
        assert state.prompt_ids is not None
        target_ids = state.prompt_ids[start + 1 : stop + 1].astype(np.int64)
        work.append(PromptLogprobWork(state, start, int(plan.q_lens[:b].sum()), target_ids))
    return work


def prompt_logprobs(model: CausalLM, hidden: torch.Tensor, work: PromptLogprobWork) -> PromptLogprobs | None:
    """Compute what `work` wants of the step's hidden states [T, hidden]. None on a rank that only computes."""
    state = work.state
    wanted_ids = [] if state is None else state.token_ids_logprob
    ids = torch.tensor(wanted_ids, dtype=torch.int64, device=hidden.device)
    parts = []
    for first in range(0, len(work.target_ids), PROMPT_ROWS):
        targets = torch.from_numpy(work.target_ids[first : first + PROMPT_ROWS]).to(hidden.device)
        start = work.first_token + first
        logits = model.lm_head.gather(model.compute_logits(hidden[start : start + len(targets)]))
        if logits is None:
            continue
        assert state is not None
        wanted = ids.expand(len(targets), -1) if len(ids) else None
        parts.append(sampling.logprobs(logits, targets, state.top_logprobs_num, wanted))
    if state is None:
        return None
    chosen, top_values, top_ids = (torch.cat(column) for column in zip(*(part[:3] for part in parts), strict=True))
    parts_of_ids = [part[3] for part in parts if part[3] is not None]
    values = TokenLogprobs(chosen, top_values, top_ids, torch.cat(parts_of_ids) if parts_of_ids else None)
    return PromptLogprobs(state, work.start, values.to_host())
