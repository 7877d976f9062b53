"""A request is what a client asks, and nobody writes to it; its state is what the engine makes of it."""

import dataclasses
import pickle
from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.replicas.messages import OUTCOME
from engine.request import Request, SamplingParams
from engine.state import FinishReason, RequestState
from tests.test_scheduler import Traffic

ASKED = Request(
    "r", [5, 6, 7], SamplingParams(max_new_tokens=9, sampling_seed=3), stream=True, logprob_start_len=1,
    top_logprobs_num=2, token_ids_logprob=[4], extra_key="k", pooling="last",
)  # fmt: skip


def test_what_is_asked_cannot_be_written_to() -> None:
    for asked in (ASKED, ASKED.sampling_params):
        for one in dataclasses.fields(asked):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(asked, one.name, None)


def test_a_state_begins_as_its_request_says() -> None:
    state = RequestState(ASKED)
    copied = {one.name for one in dataclasses.fields(Request)} & {one.name for one in dataclasses.fields(RequestState)}
    assert {"rid", "stream", "extra_key"} <= copied
    assert {name: getattr(state, name) for name in copied} == {name: getattr(ASKED, name) for name in copied}
    assert (state.prompt_len, state.max_new_tokens, state.seed, state.wants_tokens) == (3, 9, 3, True)


@pytest.mark.parametrize(
    ("options", "wants_tokens"),
    [({}, False), ({"stream": True}, True), ({"return_logprob": True}, True), ({"stop": ["x"]}, True)],
)
def test_tokens_are_looked_at_only_if_somebody_needs_them_as_they_come(
    options: dict[str, Any], wants_tokens: bool
) -> None:
    params = SamplingParams(stop=options.pop("stop", []))
    assert RequestState(Request("r", [1], params, **options)).wants_tokens == wants_tokens


def test_limit_and_seed_that_a_client_leaves_open_are_the_states() -> None:
    traffic = Traffic(64)
    state = RequestState(Request("r", [1, 2, 3], SamplingParams(max_new_tokens=None)))
    assert state.resolved_params() == state.request.sampling_params
    traffic.scheduler.submit(state)
    traffic.run_all()
    assert state.finish_reason == FinishReason("length") and len(state.output_ids) == state.max_new_tokens > 0
    assert state.seed is not None
    assert (state.request.sampling_params.max_new_tokens, state.request.sampling_params.sampling_seed) == (None, None)
    assert state.resolved_params() == SamplingParams(max_new_tokens=state.max_new_tokens, sampling_seed=state.seed)


def test_a_request_reaches_another_process_as_it_is() -> None:
    assert pickle.loads(pickle.dumps(ASKED)) == ASKED


def test_a_replica_reports_what_its_state_has() -> None:
    state = RequestState(ASKED)
    assert all(hasattr(state, name) for name in OUTCOME)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("top_k", 1.5, "an integer"), ("n", True, "an integer"),
        ("sampling_seed", 1 << 63, "an integer between -[0-9]+ and [0-9]+"),
        ("temperature", "hot", "a number"), ("top_p", True, "a number"), ("min_p", 10**400, "a number between 0 and 1"),
        ("stop", [1], "a string or a list of strings"), ("stop_regex", 5, "a string or a list of strings"),
        ("json_schema", 5, "an object, or a string that holds one"), ("regex", {}, "a string"),
        ("choice", [], "a non-empty list of strings"), ("choice", ["a", 1], "a non-empty list of strings"),
        ("stop_token_ids", [True], "a list of integers"), ("logit_bias", [], "an object of token id to bias"),
        ("logit_bias", {"x": 1}, "an object of token id to bias"), ("ignore_eos", 1, "true or false"),
    ],
)  # fmt: skip
def test_a_sampling_field_of_the_wrong_kind_is_named_with_what_it_must_be(name: str, value: Any, rule: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name} must be {rule}, got ") as refused:
        SamplingParams.from_dict({name: value})
    assert refused.value.field == name


def test_sampling_fields_are_converted_as_the_engine_wants_them() -> None:
    given = {"stop": "x", "stop_regex": ["", "y"], "temperature": 1, "logit_bias": {"7": 1}, "stop_token_ids": (3,)}
    params = SamplingParams.from_dict(given)
    assert (params.stop, params.stop_regex, params.logit_bias, params.stop_token_ids) == (["x"], ["y"], {7: 1.0}, [3])
    assert isinstance(params.temperature, float)


def test_null_means_the_default_also_for_the_length() -> None:
    assert SamplingParams.from_dict({"top_k": None}, {"top_k": 40}).top_k == 40
    assert SamplingParams.from_dict({"max_new_tokens": None}, {"max_new_tokens": 7}).max_new_tokens == 128
    assert SamplingParams.from_dict({}, {"max_new_tokens": None}).max_new_tokens is None
