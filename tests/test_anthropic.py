"""Anthropic's Messages API, through its own client where that can say what is meant."""

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest

from engine.declared import convert
from engine.errors import InvalidRequest
from engine.state import FinishReason
from server.reading.left_out import LeftOut
from server.reading.messages import chat_body
from server.reading.messages_body import MessagesRequest
from server.reading.messages_tools import MessagesTools
from tests.client import Client
from tests.fake_engine import PARSERS, THOUGHT_AND_CALL, FakeEngine, serving

USER: list[Any] = [{"role": "user", "content": "Hi"}]
WEATHER: Any = {"name": "weather", "description": "Of a city", "input_schema": {"type": "object", "properties": {}}}
ADAPTIVE: Any = {"type": "adaptive"}


@pytest.fixture
async def api(client: Client) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with official(client) as api:
        yield api


def official(client: Client, key: str = "none") -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=str(client.make_url("/")), api_key=key, max_retries=0, timeout=60)


async def events(client: Client, **body: Any) -> list[tuple[str, Any]]:
    """(name, data) of each event."""
    response = await client.post("/v1/messages", json={"max_tokens": 20, "messages": USER, **body, "stream": True})
    assert response.status == 200, await response.text()
    found = []
    for text in (await response.text()).removesuffix("\n\n").split("\n\n"):
        name, data = text.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    assert all(name == data["type"] for name, data in found)
    return found


# ---- answers ----


async def test_its_clients_find_the_model(api: anthropic.AsyncAnthropic) -> None:
    [listed] = [model async for model in api.models.list()]
    found = await api.models.retrieve("fake-model")
    for model in (listed, found):
        assert (model.id, model.type, model.display_name) == ("fake-model", "model", "fake-model")
        assert model.created_at.year > 2000


async def test_a_message_has_text_usage_and_stop_reason(api: anthropic.AsyncAnthropic, engine: FakeEngine) -> None:
    message = await api.messages.create(model="fake-model", max_tokens=20, messages=USER)
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "Hello, world"}]
    assert (message.role, message.type, message.model, message.stop_reason) == (
        "assistant", "message", "fake-model", "end_turn",
    )  # fmt: skip
    assert message.id == engine.requests[0].rid
    assert bytes(engine.requests[0].input_ids) == b"[user]Hi[assistant]"


async def test_input_tokens_are_those_that_the_cache_did_not_hold(api: anthropic.AsyncAnthropic) -> None:
    usage = (await api.messages.create(model="fake-model", max_tokens=20, messages=USER)).usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (17, 2, 12)


async def test_the_limit_and_the_stop_sequence_are_told_apart(
    engine: FakeEngine, api: anthropic.AsyncAnthropic
) -> None:
    cut = await api.messages.create(model="fake-model", max_tokens=5, messages=USER)
    assert (cut.stop_reason, cut.stop_sequence) == ("max_tokens", None)
    engine.failure = FinishReason("stop", matched="END")
    stopped = await api.messages.create(model="fake-model", max_tokens=5, messages=USER, stop_sequences=["END"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "END")
    assert engine.requests[1].sampling_params.stop == ["END"]


async def test_sampling_fields_reach_the_sampler(client: Client, engine: FakeEngine) -> None:
    body = {"max_tokens": 7, "messages": USER, "temperature": 0.5, "top_p": 0.9, "top_k": 3}
    assert (await client.post("/v1/messages", json=body)).status == 200
    params = engine.requests[0].sampling_params
    assert (params.max_new_tokens, params.temperature, params.top_p, params.top_k) == (7, 0.5, 0.9, 3)


async def test_a_stream_is_a_message_that_starts_grows_and_stops(client: Client) -> None:
    found = await events(client, max_tokens=3)
    assert [name for name, _ in found] == [
        "message_start", "ping", "content_block_start",
        "content_block_delta", "content_block_delta", "content_block_delta",
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert found[0][1]["message"]["usage"]["cache_read_input_tokens"] == 2
    assert [data["delta"] for _, data in found[3:6]] == [{"type": "text_delta", "text": letter} for letter in "Hel"]
    assert found[-2][1]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert found[-2][1]["usage"]["output_tokens"] == 3


async def test_the_official_stream_accumulates_to_the_same_message(api: anthropic.AsyncAnthropic) -> None:
    whole = await api.messages.create(model="fake-model", max_tokens=20, messages=USER)
    async with api.messages.stream(model="fake-model", max_tokens=20, messages=USER) as stream:
        texts = [text async for text in stream.text_stream]
        final = await stream.get_final_message()
    assert texts == list("Hello, world")
    assert final.content[0].type == "text" and final.content[0].text == "Hello, world"
    assert (final.usage, final.stop_reason, final.model) == (whole.usage, whole.stop_reason, whole.model)


async def test_tokens_are_counted_without_generating(api: anthropic.AsyncAnthropic, engine: FakeEngine) -> None:
    count = await api.messages.count_tokens(model="fake-model", messages=USER, system="Be brief")
    assert count.input_tokens == len("[system]Be brief[user]Hi[assistant]")
    assert not engine.requests


# ---- thinking and tools ----


async def test_thinking_text_and_a_call_are_blocks_of_their_own() -> None:
    async with serving(FakeEngine(THOUGHT_AND_CALL, context_length=1024), **PARSERS) as client, official(client) as api:
        message = await api.messages.create(
            model="fake-model", max_tokens=200, messages=USER, tools=[WEATHER], thinking=ADAPTIVE
        )
    thinking, text, call = message.content
    assert thinking.type == "thinking" and thinking.thinking == "Where?"
    assert text.type == "text" and text.text == "Let me look."
    assert call.type == "tool_use" and (call.name, call.input) == ("weather", {"city": "Oslo"})
    assert message.stop_reason == "tool_use"


async def test_a_streamed_call_accumulates_to_the_same_input() -> None:
    body: Any = {"model": "fake-model", "max_tokens": 200, "messages": USER, "tools": [WEATHER], "thinking": ADAPTIVE}
    async with (
        serving(FakeEngine(THOUGHT_AND_CALL, context_length=1024), **PARSERS) as client,
        official(client) as api,
        api.messages.stream(**body) as stream,
    ):
        kinds = [event.type async for event in stream]
        final = await stream.get_final_message()
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    thinking, text, call = final.content
    assert thinking.type == "thinking" and thinking.thinking == "Where?"
    assert text.type == "text" and text.text == "Let me look."
    assert call.type == "tool_use" and (call.name, call.input) == ("weather", {"city": "Oslo"})
    assert final.stop_reason == "tool_use"


async def test_each_of_several_calls_is_a_block() -> None:
    text = "".join(f'<tool_call>\n{{"name": "weather", "arguments": {{"n": {n}}}}}\n</tool_call>\n' for n in (1, 2))
    async with serving(FakeEngine(text, context_length=1024), **PARSERS) as client:
        found = await events(client, max_tokens=500, tools=[WEATHER])
    starts = [data["content_block"] for name, data in found if name == "content_block_start"]
    assert [start["type"] for start in starts] == ["tool_use", "tool_use"]
    assert starts[0]["id"] != starts[1]["id"]
    for index in (0, 1):
        pieces = [data["delta"]["partial_json"] for _, data in found if "delta" in data and data.get("index") == index]
        assert json.loads("".join(pieces)) == {"n": index + 1}


async def test_a_call_is_forced_and_a_form_is_kept_by_the_engines_grammars(client: Client, engine: FakeEngine) -> None:
    schema = {"type": "object"}
    for body in (
        {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}},
        {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
    ):
        response = await client.post("/v1/messages", json={"max_tokens": 5, "messages": USER, **body})
        assert response.status == 200, await response.text()
    forced, formed = (request.sampling_params.constraint for request in engine.requests)
    assert forced is not None and "weather" in forced[1]
    assert formed is not None and (formed[0], json.loads(formed[1])) == ("json_schema", schema)


async def test_a_call_that_was_cut_keeps_what_there_was_of_it() -> None:
    async with serving(FakeEngine(THOUGHT_AND_CALL, context_length=1024), **PARSERS) as client:
        body = {"max_tokens": len(THOUGHT_AND_CALL) - 20, "messages": USER, "tools": [WEATHER]}
        message = await (await client.post("/v1/messages", json=body)).json()
    assert message["stop_reason"] == "max_tokens"
    assert message["content"][-1]["input"].keys() == {"INVALID_JSON"}


# ---- translation ----


def translated(**body: Any) -> dict[str, Any]:
    given = convert({"max_tokens": 5, "messages": USER, **body}, MessagesRequest)
    return chat_body(given, MessagesTools(given.tools, given.messages, LeftOut()), LeftOut(), keeps_volatile=False)


def named(name: str) -> dict[str, Any]:
    return {"name": name, "input_schema": {"type": "object"}}


def change(kind: str, name: str | None, **tool: Any) -> dict[str, Any]:
    return {"type": f"tool_{kind}", "tool": {"type": "tool_reference", "name": name, **tool}}


def test_tools_that_messages_add_and_remove_are_those_at_their_end() -> None:
    def defined(tool: dict[str, Any]) -> dict[str, Any]:
        return change("addition", None, type="tool_definition", definition=tool)

    compacted = {"type": "compaction", "content": "", "tool_changes": [change("removal", "c")]}
    messages = [
        *USER,
        {"role": "system", "content": [change("removal", "b"), defined(named("c"))]},
        {"role": "assistant", "content": [compacted]},
        {"role": "system", "content": [defined({**named("a"), "description": "another"})]},
        {"role": "system", "content": [change("removal", "bash"), change("addition", "b"), change("addition", "b")]},
        {"role": "system", "content": [change("removal", "", type="mcp_toolset_reference", server_name="s")]},
        *USER,
    ]
    given = [named("a"), {"type": "bash_20250124", "name": "bash"}, named("b")]
    chat = translated(tools=given, messages=messages)
    functions = [tool["function"] for tool in chat["tools"]]
    assert [(one["name"], one.get("description")) for one in functions] == [("a", "another"), ("b", None)]
    assert chat["messages"][1]["content"] == "[tool removed: b]\n[tool added: c]"


def test_a_system_message_may_be_cleared_by_the_next_user_message() -> None:
    note = {"role": "system", "content": "It rains.", "clear_at": "next_user_message"}
    answer = {"role": "assistant", "content": "Yes"}
    assert [one["role"] for one in translated(messages=[*USER, note])["messages"]] == ["user", "system"]
    assert [one["role"] for one in translated(messages=[*USER, note, answer, *USER])["messages"]] == [
        "user", "assistant", "user",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tools", "content", "field"),
    [
        ([{"type": "bash_20250124", "name": "bash"}, named("a b")], [], "tools[1].name"),
        ([{"type": "bash_20250124", "name": "bash"}, named("a"), named("a")], [], "tools[2].name"),
        ([], [change("addition", "", type="tool_definition", definition=named("?"))],
         "messages[0].content[0].tool.definition.name"),
        ([named("a")], [change("removal", "b")], "messages[0].content[0].tool.name"),
        ([named("a")], [change("addition", "", type="tool_definition")], "messages[0].content[0].tool.definition"),
        ([named("a")], [{"type": "tool_removal"}], "messages[0].content[0].tool"),
    ],
)  # fmt: skip
async def test_a_tool_that_is_wrong_is_named_where_the_client_has_it(
    client: Client, tools: list[Any], content: list[Any], field: str
) -> None:
    body = {"max_tokens": 5, "tools": tools, "messages": [{"role": "system", "content": content}, *USER]}
    response = await client.post("/v1/messages", json=body)
    assert response.status == 400
    assert field in (await response.json())["error"]["message"]


def test_a_system_prompt_is_the_first_message() -> None:
    blocks = [{"type": "text", "text": "A", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "B"}]
    assert translated(system="A")["messages"][0] == {"role": "system", "content": "A"}
    assert translated(system=blocks)["messages"][0] == {"role": "system", "content": "A\nB"}


def test_tool_results_become_messages_before_the_text_that_follows() -> None:
    messages = [
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm", "signature": ""},
            {"type": "text", "text": "I look"},
            {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Oslo"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "rain"}]},
            {"type": "tool_result", "tool_use_id": "b", "content": "no", "is_error": True},
            {"type": "text", "text": "And?"},
        ]},
    ]  # fmt: skip
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    said = [{"type": "text", "text": "I look"}]
    assert translated(messages=messages)["messages"] == [
        {"role": "assistant", "content": said, "reasoning_content": "Hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
        {"role": "tool", "tool_call_id": "b", "content": "Error: no"},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ]


@pytest.mark.parametrize(
    ("choice", "theirs"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        ({"type": "any", "disable_parallel_tool_use": True}, {"tool_choice": "required", "parallel_tool_calls": False}),
        ({"type": "tool", "name": "f"}, {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ],
)
def test_tool_choices_have_their_counterparts(choice: Any, theirs: Any) -> None:
    chat = translated(tools=[WEATHER], tool_choice=choice)
    assert {name: chat[name] for name in chat if name in ("tool_choice", "parallel_tool_calls")} == theirs
    assert chat["tools"][0]["function"]["parameters"] == WEATHER["input_schema"]


def test_an_answer_that_was_begun_is_continued() -> None:
    assert translated(messages=[*USER, {"role": "assistant", "content": "The"}])["continue_final_message"] is True
    assert "continue_final_message" not in translated()


def test_thinking_is_off_unless_asked_for() -> None:
    assert translated()["chat_template_kwargs"]["enable_thinking"] is False
    chat = translated(thinking={"type": "enabled", "budget_tokens": 2000})
    assert (chat["chat_template_kwargs"]["enable_thinking"], chat["max_thinking_tokens"]) == (True, 2000)


def test_an_output_format_is_a_response_format() -> None:
    schema = {"type": "object"}
    chat = translated(output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "low"})
    assert (chat["response_format"]["json_schema"]["schema"], chat["reasoning_effort"]) == (schema, "low")


# ---- errors ----


def said(role: str, **block: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": [block]}]}


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("messages", {"messages": []}),
        ("messages[0].role", {"messages": [{"content": "x"}]}),
        ("messages[0].content", {"messages": [{"role": "user"}]}),
        ("messages[0].content[0].type", said("user", type="hologram")),
        ("messages[0].content[0].type", said("assistant", type="tool_result")),
        ("messages", said("assistant", type="tool_use", name="f", input={})),
        ("tools[0].input_schema", {"tools": [{"name": "f"}]}),
        ("tool_choice.name", {"tool_choice": {"type": "tool"}}),
        ("thinking.budget_tokens", {"thinking": {"type": "enabled"}}),
        ("stop_sequences", {"stop_sequences": [1]}),
        ("n", {"n": 2}),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(field: str, body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as error:
        translated(**body)
    assert error.value.field == field
    assert field in str(error.value)


@pytest.mark.parametrize(
    ("message", "body"),
    [
        ("messages[0].role must be 'assistant' or 'system' or 'user', got 'tool'",
         {"messages": [{"role": "tool", "content": "x"}]}),
        ("messages[1].content[1].text must be a string, got 5",
         {"messages": [*USER, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": 5}]}]}),
        ("messages[0].content[0].content[0].text must be a string, got None",
         said("user", type="tool_result", tool_use_id="a", content=[{"type": "text"}])),
        ("messages[0].content[0].input must be an object, got '{}'",
         said("assistant", type="tool_use", name="f", input="{}")),
        ("messages[0].content must be a string or a list of at least one block, got []",
         {"messages": [{"role": "user", "content": []}]}),
        ("tools[1].name must be a string, got None", {"tools": [WEATHER, {"input_schema": {}}]}),
        ("thinking.budget_tokens must be an integer between 1 and 9007199254740992, got 0",
         {"thinking": {"type": "enabled", "budget_tokens": 0}}),
        ("temperature must be a number of at least 0, got -1", {"temperature": -1}),
        ("messages has 20000 entries, the limit is 16384", {"messages": USER * 20000}),
    ],
)  # fmt: skip
def test_an_error_says_what_a_value_must_be_and_what_it_is(message: str, body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as error:
        translated(**body)
    assert str(error.value) == message


def test_a_block_of_another_role_is_refused_with_the_kinds_that_may_be_there() -> None:
    with pytest.raises(InvalidRequest, match=r"content\[0\].type must be .*'text' or .*'tool_result' or .*, got 'thin"):
        translated(**said("user", type="thinking", thinking="Hm"))


async def test_errors_have_anthropics_shape(api: anthropic.AsyncAnthropic, client: Client) -> None:
    with pytest.raises(anthropic.NotFoundError) as not_found:
        await api.messages.create(model="claude", max_tokens=5, messages=USER)
    assert isinstance(not_found.value.body, dict)
    assert not_found.value.body["type"] == "error"
    assert not_found.value.body["error"]["type"] == "not_found_error"
    response = await client.post("/v1/messages", json={"messages": USER})
    assert response.status == 400
    error = (await response.json())["error"]
    assert error["type"] == "invalid_request_error"
    assert "max_tokens" in error["message"]


async def test_an_error_inside_names_the_clients_field(client: Client) -> None:
    response = await client.post("/v1/messages", json={"messages": USER, "max_tokens": -1})
    assert (await response.json())["error"]["message"].startswith("max_tokens must be")


async def test_a_failure_ends_a_stream_with_an_error_event(client: Client, engine: FakeEngine) -> None:
    engine.failure = FinishReason("abort", message="out of memory", status_code=500)
    (start, _), _ping, (name, data) = await events(client)
    assert start == "message_start"
    assert (name, data["error"]) == ("error", {"type": "api_error", "message": "out of memory"})


async def test_an_aborted_message_is_an_error_since_no_stop_reason_says_so(client: Client, engine: FakeEngine) -> None:
    engine.failure = FinishReason("abort", message="aborted by the client", status_code=499)
    response = await client.post("/v1/messages", json={"max_tokens": 5, "messages": USER})
    assert (response.status, (await response.json())["type"]) == (499, "error")


async def test_a_disconnect_aborts_the_message() -> None:
    engine = FakeEngine(is_manual=True)
    async with serving(engine) as client, official(client) as api:
        async with api.messages.stream(model="fake-model", max_tokens=5, messages=USER) as stream:
            await engine.until(lambda: bool(engine.requests))
            engine.emit(engine.states[0], "H")
            assert await anext(aiter(stream.text_stream)) == "H"
        await engine.until(lambda: engine.aborted == [engine.requests[0].rid])


async def test_a_key_may_come_in_anthropics_header() -> None:
    body: Any = {"max_tokens": 5, "messages": USER}
    async with serving(FakeEngine(), api_key="secret") as client:
        async with official(client, "secret") as api:  # sends a bearer, as OpenAI's does; it did not always
            assert (await api.messages.create(model="fake-model", **body)).content
        for key, status in (("secret", 200), ("wrong", 401), ("", 401)):
            response = await client.post("/v1/messages", json=body, headers={"x-api-key": key})
            assert response.status == status
        assert (await response.json())["error"]["type"] == "authentication_error"
