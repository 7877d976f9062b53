"""The OpenAI API, through its own client where that can say what is meant."""

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from engine.state import FinishReason
from server.apis.openai_answers import NO_REASONING
from tests.client import Client, events, official
from tests.fake_engine import FakeEngine, serving

USER: list[Any] = [{"role": "user", "content": "Hi"}]


# ---- chat ----


async def test_a_chat_answer_has_message_usage_and_reason(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    answer = await api.chat.completions.create(model="fake-model", messages=USER)
    assert answer.choices[0].message.content == "Hello, world"
    assert (answer.choices[0].message.role, answer.choices[0].finish_reason) == ("assistant", "stop")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (19, 12, 31)
    assert answer.usage.prompt_tokens_details is None
    assert (answer.model, answer.object) == ("fake-model", "chat.completion")
    assert answer.id == engine.requests[0].rid
    assert bytes(engine.requests[0].input_ids) == b"[user]Hi[assistant]"


async def test_a_chat_without_a_limit_may_fill_the_context(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    await api.chat.completions.create(model="fake-model", messages=USER)
    assert engine.states[0].max_new_tokens == 256 - 19


async def test_chat_fields_reach_the_sampler_under_its_names(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    await api.chat.completions.create(
        model="fake-model",
        messages=USER,
        max_completion_tokens=5,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop="END",
        logit_bias={"65": -100},
        presence_penalty=0.1,
        frequency_penalty=0.2,
        extra_body={"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True},
    )
    params = engine.requests[0].sampling_params
    assert (params.max_new_tokens, params.min_new_tokens, params.sampling_seed, params.stop) == (5, 2, 3, ["END"])
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.logit_bias, params.ignore_eos) == ({65: -100.0}, True)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.1, 0.2, 1.1)


async def test_the_models_own_sampling_defaults_hold_unless_a_client_says_otherwise(engine: FakeEngine) -> None:
    engine.model_config.sampling_defaults = {"temperature": 0.6, "top_k": 20}
    async with serving(engine) as client:
        await client.post("/v1/chat/completions", json={"messages": USER, "top_k": 5})
    params = engine.requests[0].sampling_params
    assert (params.temperature, params.top_k) == (0.6, 5)


async def test_a_streamed_chat_starts_with_the_role_and_ends_with_the_reason(client: Client) -> None:
    first, *middle, last = await events(client, "/v1/chat/completions", messages=USER, max_tokens=5)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", **NO_REASONING}
    assert [chunk["choices"][0]["delta"] for chunk in middle] == [
        {"content": letter, **NO_REASONING} for letter in "Hello"
    ]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in middle)
    assert last["choices"][0] == {
        "index": 0, "delta": NO_REASONING, "logprobs": None, "finish_reason": "length", "matched_stop": None,
    }  # fmt: skip
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in (first, *middle, last)}) == 1
    assert "usage" not in last


async def test_no_rid_spoils_its_stream(client: Client) -> None:
    for rid in ("\0text\0", '"}]}', "data: [DONE]\n\n"):
        first, *_ = await events(client, "/v1/chat/completions", messages=USER, max_tokens=5, rid=rid)
        assert first["id"] == rid


async def test_the_usage_chunk_comes_last_and_only_when_asked_for(api: openai.AsyncOpenAI) -> None:
    stream = await api.chat.completions.create(
        model="fake-model", messages=USER, stream=True, n=2, max_tokens=4, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (19, 8)
    assert all(chunk.usage is None for chunk in chunks)
    for index in (0, 1):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == "Hell"
        assert mine[-1].finish_reason == "length"


async def test_cached_tokens_are_told_with_enable_cache_report(engine: FakeEngine) -> None:
    async with serving(engine, enable_cache_report=True) as client, official(client) as api:
        answer = await api.chat.completions.create(model="fake-model", messages=USER, n=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


async def test_n_answers_are_choices_of_one_response(api: openai.AsyncOpenAI) -> None:
    answer = await api.chat.completions.create(model="fake-model", messages=USER, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (19, 36)


async def test_chat_logprobs_have_tokens_bytes_and_alternatives(api: openai.AsyncOpenAI) -> None:
    answer = await api.chat.completions.create(
        model="fake-model", messages=USER, max_tokens=2, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert [(entry.token, entry.logprob, entry.bytes) for entry in content] == [("H", -0.5, [72]), ("e", -0.5, [101])]
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("H", -0.5), ("I", -1.0)]


async def test_streamed_chat_logprobs_come_with_their_tokens(client: Client) -> None:
    _, *middle, _ = await events(client, "/v1/chat/completions", messages=USER, max_tokens=2, logprobs=True)
    entries = [chunk["choices"][0]["logprobs"]["content"] for chunk in middle]
    assert [[entry["token"] for entry in content] for content in entries] == [["H"], ["e"]]


async def test_content_parts_and_developer_messages_are_understood(client: Client, engine: FakeEngine) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    response = await client.post("/v1/chat/completions", json={"messages": messages})
    assert response.status == 200
    assert bytes(engine.requests[0].input_ids) == b"[system]Be brief.[user]a\nb[assistant]"


async def test_the_last_message_can_be_continued(client: Client, engine: FakeEngine) -> None:
    messages = [*USER, {"role": "assistant", "content": "Well"}]
    body = {"messages": messages, "continue_final_message": True}
    assert (await client.post("/v1/chat/completions", json=body)).status == 200
    assert bytes(engine.requests[0].input_ids).endswith(b"[assistant]Well")


async def test_a_model_without_a_template_refuses_to_chat(client: Client, engine: FakeEngine) -> None:
    engine.tokenizer.chat_template = None
    response = await client.post("/v1/chat/completions", json={"messages": USER})
    assert response.status == 400
    assert "--chat-template" in (await response.json())["error"]["message"]


async def test_a_chat_template_is_a_name_or_a_file(engine: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    for name in ("chatml", str(file)):
        async with serving(engine, chat_template=name) as client:
            assert (await client.post("/v1/chat/completions", json={"messages": USER})).status == 200
    with pytest.raises(ValueError, match="chatml"):
        async with serving(engine, chat_template="nope"):
            pass


async def test_a_built_in_template_whose_turns_end_in_plain_text_ends_answers_there() -> None:
    engine = FakeEngine("Fine.\n### Human: and then?")
    async with serving(engine, chat_template="yi-vl") as client:
        found = await client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}], "stop": "!"}
        )
        assert found.status == 200
    assert engine.requests[0].sampling_params.stop == ["!", "###"]


# ---- completions ----


@pytest.mark.parametrize(
    ("prompt", "lengths"),
    [("Hi", [2]), ([72, 105], [2]), (["a", "bcd"], [1, 3]), ([[1], [2, 3]], [1, 2])],
    ids=["text", "ids", "texts", "lists of ids"],
)
async def test_a_prompt_is_text_or_ids_or_a_list_of_them(
    api: openai.AsyncOpenAI, engine: FakeEngine, prompt: Any, lengths: list[int]
) -> None:
    answer = await api.completions.create(model="fake-model", prompt=prompt)
    assert [choice.text for choice in answer.choices] == ["Hello, world"] * len(lengths)
    assert [request.prompt_len for request in engine.requests] == lengths
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(lengths)
    assert engine.states[0].max_new_tokens == 16


async def test_choices_are_numbered_prompt_by_prompt(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    answer = await api.completions.create(model="fake-model", prompt=["a", "bc"], n=2, echo=True, max_tokens=1)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "aH"), (1, "aH"), (2, "bcH"), (3, "bcH")]


async def test_echo_with_logprobs_scores_the_prompt(client: Client) -> None:
    body = {"prompt": "Hi", "echo": True, "logprobs": 1, "max_tokens": 1}
    answer = await (await client.post("/v1/completions", json=body)).json()
    assert answer["choices"][0]["text"] == "HiH"
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["H", "i", "H"],
        "token_logprobs": [None, -0.5, -0.5],
        "top_logprobs": [None, {"i": -0.5}, {"H": -0.5}],
        "text_offset": [0, 1, 2],
    }


async def test_the_command_line_may_have_every_stream_end_with_its_usage(engine: FakeEngine) -> None:
    async with serving(engine, enable_force_include_usage=True) as client:
        wishes: list[dict[str, Any]] = [{}, {"stream_options": {"include_usage": False}}]
        for wish in wishes:
            last = (await events(client, "/v1/completions", prompt="Hi", max_tokens=2, **wish))[-1]
            assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 2)
            last = (await events(client, "/v1/chat/completions", messages=USER, max_tokens=2, **wish))[-1]
            assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 2)


async def test_a_student_of_a_model_may_have_more_alternatives_than_openai_gives(client: Client) -> None:
    body = {"messages": USER, "max_tokens": 1, "logprobs": True, "top_logprobs": 100}
    (choice,) = (await (await client.post("/v1/chat/completions", json=body)).json())["choices"]
    assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 100
    body = {"prompt": "Hi", "max_tokens": 1, "logprobs": 100}
    (choice,) = (await (await client.post("/v1/completions", json=body)).json())["choices"]
    assert len(choice["logprobs"]["top_logprobs"][0]) == 100
    body = {"input": "Hi", "max_output_tokens": 1, "top_logprobs": 100}
    response = await (await client.post("/v1/responses", json=body)).json()
    assert len(response["output"][0]["content"][0]["logprobs"][0]["top_logprobs"]) == 100


@pytest.mark.parametrize("is_stream", [False, True])
async def test_offsets_count_characters_however_many_tokens_they_are_made_of(
    client: Client, engine: FakeEngine, is_stream: bool
) -> None:
    engine.answer = "€2 ó"  # a token is a byte
    body = {"prompt": "né", "echo": True, "logprobs": 0, "max_tokens": 7}
    if is_stream:
        chunks = await events(client, "/v1/completions", **body)
        choices = [chunk["choices"][0] for chunk in chunks]
    else:
        choices = (await (await client.post("/v1/completions", json=body)).json())["choices"]
    offsets = [offset for choice in choices if choice["logprobs"] for offset in choice["logprobs"]["text_offset"]]
    assert offsets == [0, 1, 1, 2, 2, 2, 3, 4, 5, 5]


async def test_a_prompt_can_be_scored_without_an_answer(client: Client) -> None:
    body = {"prompt": "Hi", "echo": True, "logprobs": 0, "max_tokens": 0}
    (choice,) = (await (await client.post("/v1/completions", json=body)).json())["choices"]
    assert choice["text"] == "Hi"
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5]
    assert choice["logprobs"]["top_logprobs"] is None


async def test_streamed_completions_echo_first_and_count_offsets_on(client: Client) -> None:
    echo, *middle, last = await events(client, "/v1/completions", prompt="Hi", echo=True, logprobs=1, max_tokens=2)
    assert echo["choices"][0]["text"] == "Hi"
    assert echo["choices"][0]["logprobs"]["text_offset"] == [0, 1]
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in middle] == [[2], [3]]
    assert "".join(chunk["choices"][0]["text"] for chunk in middle) == "He"
    assert (last["choices"][0]["text"], last["choices"][0]["finish_reason"]) == ("", "length")
    assert last["object"] == "text_completion"


async def test_a_stream_ended_before_its_first_token_still_ends_well(engine: FakeEngine) -> None:
    engine.answer = ""
    async with serving(engine) as client:
        chunks = await events(client, "/v1/chat/completions", messages=USER)
        assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
            {"role": "assistant", "content": "", **NO_REASONING},
            NO_REASONING,
        ]
        (last,) = await events(client, "/v1/completions", prompt="Hi")
        assert last["choices"][0]["finish_reason"] == "stop"


# ---- models ----


async def test_the_model_is_listed_with_the_context_it_really_has(api: openai.AsyncOpenAI) -> None:
    (model,) = [model async for model in api.models.list()]
    assert model.id == "fake-model"
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == 256
    assert (await api.models.retrieve("fake-model")).id == "fake-model"
    with pytest.raises(openai.NotFoundError):
        await api.models.retrieve("other")


async def test_a_served_name_and_the_path_and_default_are_all_the_model(engine: FakeEngine) -> None:
    async with serving(engine, served_model_name=["org/pet"]) as client:
        for name, answered in (("org/pet", "org/pet"), ("fake-model", "fake-model"), ("default", "org/pet")):
            response = await client.post("/v1/completions", json={"model": name, "prompt": "a"})
            assert (await response.json())["model"] == answered
        assert (await (await client.get("/v1/models/org/pet")).json())["id"] == "org/pet"


async def test_an_unknown_model_is_a_404(api: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        await api.chat.completions.create(model="gpt-9", messages=USER)
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
    assert "'fake-model'" in raised.value.message


# ---- what clients do wrong ----


def chat(**body: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"messages": USER, **body}


def completion(**body: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": "a", **body}


def message(**fields: Any) -> tuple[str, dict[str, Any]]:
    return chat(messages=[{"role": "user", "content": "Hi", **fields}])


BAD_BODIES: list[tuple[tuple[str, dict[str, Any]], str]] = [
    (chat(messages=None), "messages"),
    (chat(messages=[]), "messages"),
    (chat(messages="Hi"), "messages"),
    (chat(messages=["Hi"]), "messages[0]"),
    (message(role="wizard"), "messages[0].role"),
    (message(role=None), "messages[0].role"),
    (message(content=5), "messages[0].content"),
    (message(content=None), "messages[0].content"),
    (message(content=[{"type": "text"}]), "messages[0].content[0]"),
    (message(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "messages[0].content[0].type"),
    (
        message(role="assistant", tool_calls=[{"function": {"arguments": ["{"]}}]),
        "messages[0].tool_calls[0].function.arguments",
    ),
    (chat(max_tokens=-1), "max_tokens"),
    (chat(max_completion_tokens="many"), "max_completion_tokens"),
    (chat(temperature=-0.1), "temperature"),
    (chat(temperature=[]), "temperature"),
    (chat(top_p=1.5), "top_p"),
    (chat(n=0), "n"),
    (chat(n=10**6), "n"),
    (chat(n=1.5), "n"),
    (chat(seed="x"), "seed"),
    (chat(seed=10**30), "seed"),
    (chat(stop=5), "stop"),
    (chat(stop_regex="("), "stop_regex"),
    (chat(logit_bias={"x": 1}), "logit_bias"),
    (chat(logit_bias={"99999": 1}), "logit_bias"),
    (chat(presence_penalty=3), "presence_penalty"),
    (chat(min_tokens=-5), "min_tokens"),
    (chat(logprobs=1), "logprobs"),
    (chat(top_logprobs=2), "top_logprobs"),
    (chat(logprobs=True, top_logprobs=129), "top_logprobs"),
    (chat(stream="yes"), "stream"),
    (chat(stream_options={"include_usage": True}), "stream_options"),
    (chat(stream=True, stream_options=5), "stream_options"),
    (chat(stream=True, stream_options={"include_usage": 1}), "stream_options.include_usage"),
    (chat(model=5), "model"),
    (chat(tools="x"), "tools"),
    (chat(response_format={"type": "yaml"}), "response_format.type"),
    (chat(response_format={"type": "json_schema"}), "response_format.json_schema"),
    (chat(response_format={"type": "json_object"}, regex="a"), "response_format"),
    (chat(guided_json={}, structured_outputs={"regex": "a"}), "guided_json"),
    (chat(regex=5), "regex"),
    (chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs"),
    (chat(continue_final_message=True), "messages"),
    (completion(prompt=None), "prompt"),
    (completion(prompt=""), "prompt"),
    (completion(prompt=[]), "prompt"),
    (completion(prompt=[""]), "prompt"),
    (completion(prompt=["a", ""]), "prompt[1]"),
    (completion(prompt={}), "prompt"),
    (completion(prompt=[1, "a"]), "prompt"),
    (completion(prompt=[[]]), "prompt"),
    (completion(prompt=[-1]), "prompt"),
    (completion(prompt=[10**9]), "prompt"),
    (completion(suffix="x"), "suffix"),
    (completion(best_of=3), "best_of"),
    (completion(logprobs=-1), "logprobs"),
    (completion(logprobs=129), "logprobs"),
    (completion(logprobs=True), "logprobs"),
    (completion(echo="x"), "echo"),
    (completion(max_tokens=-5), "max_tokens"),
    (completion(priority="high"), "priority"),
]


@pytest.mark.parametrize(("call", "param"), BAD_BODIES)
async def test_a_bad_body_is_a_400_in_openais_shape(client: Client, call: Any, param: str) -> None:
    path, body = call
    response = await client.post(path, json=body)
    error = (await response.json())["error"]
    assert (response.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert len(error["message"]) < 300
    assert (await client.post("/v1/completions", json={"prompt": "a"})).status == 200


async def test_the_official_client_reads_our_errors(api: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        await api.completions.create(model="fake-model", prompt="a" * 300)
    assert raised.value.code == "context_length_exceeded"
    assert "300 tokens" in raised.value.message
    with pytest.raises(openai.BadRequestError) as raised:
        await api.completions.create(model="fake-model", prompt="a", max_tokens=-1)
    assert raised.value.param == "max_tokens"
    assert "max_new_tokens" not in raised.value.message


async def test_unknown_top_level_fields_are_ignored(client: Client) -> None:
    body = {"prompt": "a", "user": "me", "metadata": {}, "some_new_thing": 1}
    assert (await client.post("/v1/completions", json=body)).status == 200


async def test_a_wrong_key_is_an_authentication_error(engine: FakeEngine) -> None:
    async with serving(engine, api_key="k") as client, official(client) as api:
        with pytest.raises(openai.AuthenticationError):
            await api.models.list()


async def test_a_full_queue_is_a_rate_limit_error(engine: FakeEngine) -> None:
    engine.max_queued = 0
    async with serving(engine) as client, official(client) as api:
        with pytest.raises(openai.RateLimitError):
            await api.completions.create(model="fake-model", prompt="a")


async def test_a_step_that_fails_is_an_error_to_both_kinds_of_clients(engine: FakeEngine) -> None:
    engine.failure = FinishReason("abort", message="step failed", status_code=500)
    async with serving(engine) as client, official(client) as api:
        with pytest.raises(openai.InternalServerError):
            await api.completions.create(model="fake-model", prompt="a")
        stream = await api.chat.completions.create(model="fake-model", messages=USER, stream=True)
        with pytest.raises(openai.APIError, match="step failed"):
            _ = [chunk async for chunk in stream]


# ---- clients that leave ----


async def test_leaving_a_stream_aborts_it(engine: FakeEngine) -> None:
    engine.is_manual = True
    async with serving(engine) as client, official(client) as api:
        stream = await api.chat.completions.create(model="fake-model", messages=USER, stream=True, n=2)
        await engine.until(lambda: len(engine.live) == 2)
        rids = [request.rid for request in engine.requests]
        await stream.close()
        await engine.until(lambda: not engine.live)
    assert engine.aborted == rids


async def test_a_cancelled_call_aborts_its_request(engine: FakeEngine) -> None:
    engine.is_manual = True
    async with serving(engine) as client, official(client) as api:
        call = asyncio.create_task(api.completions.create(model="fake-model", prompt="a"))
        await engine.until(lambda: bool(engine.live))
        call.cancel()
        await engine.until(lambda: not engine.live)
    assert len(engine.aborted) == 1
