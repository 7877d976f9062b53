"""What is added to logits: by whom, until when, and that it is put together no more often than it changes."""

import numpy as np
import torch

from engine.request import Request, SamplingParams
from engine.schedule.rows import Rows
from engine.state import RequestState
from engine.step.logit_edits import LogitEditor, LogitEdits

EOS, VOCAB_SIZE = 3, 10


def running(rows: Rows, **params: object) -> int:
    state = RequestState(Request("r", [1, 2], SamplingParams(**params)))  # type: ignore[arg-type]
    state.seed = 0
    return rows.allocate(state)


def added(edits: LogitEdits | None, num_samples: int) -> torch.Tensor:
    logits = torch.zeros(num_samples, VOCAB_SIZE)
    if edits is not None:
        edits.apply(logits)
    return logits


def test_biases_are_added_and_an_answer_cannot_end_before_its_least_length() -> None:
    rows = Rows(4, 16)
    plain, biased = running(rows), running(rows, logit_bias={5: 2.0, EOS: 1.0})
    longer = running(rows, min_new_tokens=3, stop_token_ids=[7, 99], logit_bias={7: 4.0, 8: 1.0})
    editor = LogitEditor(rows, (EOS,), VOCAB_SIZE)
    sampled = np.array([longer, plain, biased])

    found = added(editor.find(sampled, np.array([4, 4, 4])), 3)
    expected = torch.zeros(3, VOCAB_SIZE)
    expected[2, [5, EOS]] = torch.tensor([2.0, 1.0])
    expected[0, [7, EOS, 8]] = torch.tensor([-torch.inf, -torch.inf, 1.0])
    assert torch.equal(found, expected)

    expected[0, [7, EOS]] = torch.tensor([4.0, 0.0])
    assert torch.equal(added(editor.find(sampled, np.array([5, 5, 5])), 3), expected)


def test_edits_are_made_anew_only_for_other_requests_or_lengths() -> None:
    rows = Rows(2, 16)
    row = running(rows, logit_bias={5: 2.0}, min_new_tokens=2)
    editor = LogitEditor(rows, (EOS,), VOCAB_SIZE)
    sampled = np.array([row])
    first = editor.find(sampled, np.array([2]))
    assert editor.find(sampled, np.array([3])) is first
    longer = editor.find(sampled, np.array([4]))
    assert longer is not first and editor.find(sampled, np.array([5])) is longer

    rows.free(row)
    assert running(rows, logit_bias={6: 1.0}) == row
    assert added(editor.find(sampled, np.array([5])), 1)[0, 5:7].tolist() == [0.0, 1.0]


def test_a_least_length_that_is_reached_adds_nothing() -> None:
    rows = Rows(2, 16)
    row = running(rows, min_new_tokens=2)
    editor = LogitEditor(rows, (EOS,), VOCAB_SIZE)
    assert editor.find(np.array([row]), np.array([9])) is None
