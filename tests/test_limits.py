"""Prompts and answers beside the context's length: an upper bound is one, and clients can act on what is refused."""

from typing import Any

import pytest

from tests.fake_engine import FakeEngine, serving

MESSAGES = [{"role": "user", "content": "Hi"}]
BOUNDED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 32000},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 32000},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 32000},
    "/api/chat": {"messages": MESSAGES, "options": {"num_predict": 32000}, "stream": False},
    "/api/generate": {"prompt": "Hi", "options": {"num_predict": 32000}, "stream": False},
}
RAW = {"prompt": "Hi", "raw": True, "options": {"num_predict": 32000}, "stream": False}
EXACT: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hi", "max_tokens": 32000},
    "/generate": {"text": "Hi", "sampling_params": {"max_new_tokens": 32000}},
}


@pytest.mark.parametrize(("path", "body"), [*BOUNDED.items(), ("/api/generate", RAW)])
async def test_a_chats_max_tokens_is_a_bound_not_a_demand(path: str, body: dict[str, Any]) -> None:
    engine = FakeEngine("x" * 500, context_length=100)
    async with serving(engine) as client:
        response = await client.post(path, json=body)
        assert response.status == 200, await response.text()
        text = await response.text()
    [state] = engine.states
    assert state.max_new_tokens == 100 - state.prompt_len == len(state.output_ids)
    assert "length" in text or "max_tokens" in text or "max_output_tokens" in text


@pytest.mark.parametrize(("path", "body"), EXACT.items())
async def test_native_and_completions_refuse_an_answer_that_cannot_be_as_long(path: str, body: dict[str, Any]) -> None:
    async with serving(FakeEngine(context_length=100)) as client:
        assert (await client.post(path, json=body)).status == 400


@pytest.mark.parametrize(("path", "body"), [*BOUNDED.items(), ("/api/generate", RAW)])
async def test_strict_max_tokens_refuses_them_everywhere(path: str, body: dict[str, Any]) -> None:
    async with serving(FakeEngine(context_length=100), strict_max_tokens=True) as client:
        assert (await client.post(path, json=body)).status == 400


LONG = "x" * 300
TOO_LONG: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages", "maximum context length"),
    ("/v1/completions", {"prompt": LONG}, "prompt", "maximum context length"),
    ("/v1/responses", {"input": LONG}, "input", "maximum context length"),
]


@pytest.mark.parametrize(("path", "body", "field", "words"), TOO_LONG)
async def test_a_prompt_that_does_not_fit_is_named_as_openai_names_it(
    path: str, body: dict[str, Any], field: str, words: str
) -> None:
    async with serving(FakeEngine(context_length=200)) as client:
        response = await client.post(path, json=body)
        error = (await response.json())["error"]
    assert (response.status, error["code"], error["param"]) == (400, "context_length_exceeded", field)
    assert f"{words} is 200 tokens" in error["message"]
    assert f"{field} has 3" in error["message"]  # 300 and the template's
    assert "input_ids" not in error["message"]


async def test_a_prompt_that_does_not_fit_is_told_to_anthropics_clients_in_words_they_act_on() -> None:
    async with serving(FakeEngine(context_length=200)) as client:
        response = await client.post(
            "/v1/messages", json={"max_tokens": 5, "messages": [{"role": "user", "content": LONG}]}
        )
        error = (await response.json())["error"]
    assert (response.status, error["type"]) == (400, "invalid_request_error")
    assert error["message"] == "prompt is too long: 317 tokens > 200 maximum"


async def test_a_prompt_and_an_answer_that_do_not_fit_are_told_with_both_lengths() -> None:
    async with serving(FakeEngine(context_length=200), strict_max_tokens=True) as client:
        body: dict[str, Any] = {"max_tokens": 195, "messages": MESSAGES}
        error = (await (await client.post("/v1/messages", json=body)).json())["error"]
        assert error["message"] == "input length and `max_tokens` exceed context limit: 19 + 195 > 200"
        error = (await (await client.post("/v1/chat/completions", json=body)).json())["error"]
        assert "200 tokens" in error["message"] and "214 tokens (19 in messages, 195" in error["message"]
