"""What is added to logits before a draw: logit_bias, and -inf for tokens that may not end an answer yet."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from engine.schedule.rows import Rows


class LogitEdits:
    """Hold values to add to a step's logits [S, V], each place once."""

    def __init__(self, samples: np.ndarray, token_ids: np.ndarray, values: np.ndarray) -> None:
        """Take the places, int64 [E] of both axes, and what is added there, float32 [E]."""
        self._parts = tuple(map(torch.from_numpy, (samples, token_ids, values)))

    def apply(self, logits: torch.Tensor) -> None:
        """Add the values in place. They are copied to the logits' device once, for all steps that share this."""
        self._parts = samples, token_ids, values = tuple(part.to(logits.device) for part in self._parts)
        logits[samples, token_ids] += values.to(logits.dtype)


class _RowEdits(NamedTuple):
    """Hold what one request adds: token ids (int64), values (float32)."""

    epoch: int  # of the row that it runs in
    below_min: tuple[np.ndarray, np.ndarray]  # while its answer is shorter than it must be
    above_min: tuple[np.ndarray, np.ndarray]


class LogitEditor:
    """Find the edits of steps. Those of a request are made once, and put together anew only when a step's differ."""

    def __init__(self, rows: Rows, eos_token_ids: Sequence[int], vocab_size: int) -> None:
        self._rows, self._eos_token_ids, self._vocab_size = rows, eos_token_ids, vocab_size
        self._of_row: dict[int, _RowEdits] = {}
        self._key: tuple[bytes, ...] = ()
        self._edits: LogitEdits | None = None

    def find(self, sampled: np.ndarray, seq_lens: np.ndarray) -> LogitEdits | None:
        """Return what to add to the logits of rows, None for nothing.

        sampled, seq_lens: int64 [S], the rows and how many tokens their sequences have.
        """
        rows = self._rows
        (samples,) = rows.has_logit_edits[sampled].nonzero()
        edited = sampled[samples]
        is_short = seq_lens[samples] < rows.min_tokens[edited]
        key = (samples.tobytes(), edited.tobytes(), rows.epoch[edited].tobytes(), is_short.tobytes())
        if key != self._key:
            self._key, self._edits = key, self._put_together(samples, edited.tolist(), is_short.tolist())
        return self._edits

    def _put_together(self, samples: np.ndarray, edited: list[int], is_short: list[bool]) -> LogitEdits | None:
        parts = []
        for row, is_below in zip(edited, is_short, strict=True):
            of_row = self._edits_of(row)
            parts.append(of_row.below_min if is_below else of_row.above_min)
        counts = [len(ids) for ids, _ in parts]
        if not any(counts):
            return None
        ids, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return LogitEdits(np.repeat(samples, counts), ids, values)

    def _edits_of(self, row: int) -> _RowEdits:
        epoch = int(self._rows.epoch[row])
        found = self._of_row.get(row)
        if found is None or found.epoch != epoch:
            params = self._rows.state_at(row).sampling_params
            stops = [one for one in (*self._eos_token_ids, *params.stop_token_ids) if 0 <= one < self._vocab_size]
            below_min = params.logit_bias | dict.fromkeys(stops, -np.inf)
            found = self._of_row[row] = _RowEdits(epoch, _arrays(below_min), _arrays(params.logit_bias))
        return found


def _arrays(edits: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    count = len(edits)
    return np.fromiter(edits, np.int64, count), np.fromiter(edits.values(), np.float32, count)
