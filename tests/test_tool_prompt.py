"""Test tools and histories with models whose chat template shows little: nothing that was said is lost."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console

from engine.errors import InvalidRequest
from engine.text.tokenizer import Tokenizer
from server.__main__ import print_ready
from server.config import ServerConfig
from server.parsers import AnswerParser
from server.parsers.tool_calls import TOOL_FORMATS, Tool, ToolCallParser
from server.reading.protocol import JSON
from server.reading.templates import TemplateTraits, find_traits, shaped
from server.reading.tool_prompt import with_calls_as_text
from tests.client import Client, events_of
from tests.fake_engine import FakeEngine, FakeTokenizer, serving

USER: list[Any] = [{"role": "user", "content": "Weather?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION: JSON = {"name": "weather", "description": "Tell it.", "parameters": CITY}
TOOL: JSON = {"type": "function", "function": FUNCTION}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


class PlainTokenizer(FakeTokenizer):
    """Show roles and texts and nothing else, like the template of a model that knows no tools."""

    def render_chat(self, messages: Any, *_: Any, **options: Any) -> str:
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        return super().render_chat(plain, **{**options, "tools": None})


@pytest.fixture
async def engine() -> FakeEngine:
    engine = FakeEngine(CALL, context_length=4096)
    engine.tokenizer = PlainTokenizer()
    return engine


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[Client]:
    async with serving(engine) as client:
        yield client


def prompt_of(engine: FakeEngine) -> str:
    return bytes(engine.requests[-1].input_ids).decode()


async def post(client: Client, path: str, body: JSON) -> Any:
    response = await client.post(path, json=body)
    assert response.status == 200, await response.text()
    return await response.json()


# ---- tools for every model ----


def chat_call(answer: Any) -> tuple[str, Any]:
    function = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    return function["name"], json.loads(function["arguments"])


def messages_call(answer: Any) -> tuple[str, Any]:
    (block,) = answer["content"]
    return block["name"], block["input"]


def responses_call(answer: Any) -> tuple[str, Any]:
    (item,) = answer["output"]
    return item["name"], json.loads(item["arguments"])


def ollama_call(answer: Any) -> tuple[str, Any]:
    function = answer["message"]["tool_calls"][0]["function"]
    return function["name"], function["arguments"]


ANTHROPIC_TOOL: JSON = {"name": "weather", "description": "Tell it.", "input_schema": CITY}
APIS: dict[str, tuple[JSON, Any, Any]] = {
    "/v1/chat/completions": ({"messages": USER, "tools": [TOOL]}, chat_call, "required"),
    "/v1/messages": ({"messages": USER, "tools": [ANTHROPIC_TOOL], "max_tokens": 500}, messages_call, {"type": "any"}),
    "/v1/responses": ({"input": "Weather?", "tools": [{"type": "function", **FUNCTION}]}, responses_call, "required"),
    "/api/chat": ({"messages": USER, "tools": [TOOL], "stream": False}, ollama_call, None),
}


@pytest.mark.parametrize("path", APIS)
async def test_a_model_whose_template_shows_no_tools_is_told_of_them(
    client: Client, engine: FakeEngine, path: str
) -> None:
    body, call_of, required = APIS[path]
    assert call_of(await post(client, path, body)) == ("weather", {"city": "Ulm"})
    prompt = prompt_of(engine)
    assert prompt.startswith("[system]# Tools") and prompt.endswith("[user]Weather?[assistant]")
    assert '"description":"Tell it."' in prompt and '"city"' in prompt and "<tool_call>" in prompt
    if required is not None:
        assert call_of(await post(client, path, body | {"tool_choice": required})) == ("weather", {"city": "Ulm"})
        assert prompt_of(engine) == prompt
        assert '"weather"' in json.dumps(engine.requests[-1].sampling_params.structural_tag).replace("\\", "")


async def test_a_named_function_is_forced_and_seen(client: Client, engine: FakeEngine) -> None:
    other = {"type": "function", "function": {"name": "news"}}
    choice = {"type": "function", "function": {"name": "weather"}}
    body = {"messages": USER, "tools": [TOOL, other], "tool_choice": choice, "parallel_tool_calls": False}
    assert chat_call(await post(client, "/v1/chat/completions", body)) == ("weather", {"city": "Ulm"})
    tag = json.dumps(engine.requests[-1].sampling_params.structural_tag)
    assert "weather" in tag and "news" not in tag and "news" in prompt_of(engine)


async def test_streamed_calls_are_calls(client: Client) -> None:
    response = await client.post("/v1/chat/completions", json={"messages": USER, "tools": [TOOL], "stream": True})
    chunks = [json.loads(event) for event in events_of(await response.read())[:-1]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_system_message_is_kept_and_the_tools_follow_it(client: Client, engine: FakeEngine) -> None:
    await post(
        client, "/v1/chat/completions", {"messages": [{"role": "system", "content": "Brief."}, *USER], "tools": [TOOL]}
    )
    assert prompt_of(engine).startswith("[system]Brief.\n\n# Tools")
    await post(client, "/v1/chat/completions", {"messages": USER, "tools": [TOOL], "tool_choice": "none"})
    assert prompt_of(engine) == "[user]Weather?[assistant]"


async def test_calls_and_results_come_back_as_the_model_wrote_them(client: Client, engine: FakeEngine) -> None:
    answer = await post(client, "/v1/chat/completions", {"messages": USER, "tools": [TOOL]})
    said = answer["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "rain"}
    await post(client, "/v1/chat/completions", {"messages": [*USER, said, result, result, *USER], "tools": [TOOL]})
    told = '<tool_call>\n{"name": "weather", "arguments": {"city":"Ulm"}}\n</tool_call>'
    rain = "<tool_response>\nrain\n</tool_response>"
    assert prompt_of(engine).endswith(f"[assistant]{told}[user]{rain}\n{rain}\nWeather?[assistant]")


@pytest.mark.parametrize("options", [{"disable_tool_prompt": True}, {"tool_call_parser": "none"}])
async def test_where_it_is_switched_off_clients_are_told_that_tools_are_not_supported(
    engine: FakeEngine, options: dict[str, Any]
) -> None:
    async with serving(engine, **options) as client:
        for path, (body, _, _) in APIS.items():
            response = await client.post(path, json=body)
            error = (await response.json())["error"]
            message = error if path == "/api/chat" else error["message"]
            assert response.status == 400 and "does not support tools" in message, (path, message)
        shown = await post(client, "/api/show", {"model": "fake-model"})
        assert "tools" not in shown["capabilities"]
        await post(client, "/v1/chat/completions", {"messages": USER})


async def test_the_start_table_and_ollama_say_how_tools_are_shown(engine: FakeEngine) -> None:
    for tokenizer, options, told in (
        (PlainTokenizer(), {}, "described in a system text"),
        (PlainTokenizer(), {"disable_tool_prompt": True}, "refused"),
        (FakeTokenizer(), {"tool_call_parser": "hermes"}, "as asked"),
    ):
        engine.tokenizer = tokenizer
        config = ServerConfig(model_path="fake-model", **options)
        async with serving(engine, **options) as client:
            console = Console(record=True, width=200)
            print_ready(console, engine, config, client.app)
            assert told in console.export_text()
            capabilities = (await post(client, "/api/show", {"model": "fake-model"}))["capabilities"]
            assert ("tools" in capabilities) == (told != "refused")


ARGUMENTS = {"city": 'Ulm "x"\n', "days": 3, "exact": True, "tags": ["a", {"b": None}]}


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_every_format_reads_the_calls_that_it_writes(name: str) -> None:
    format_ = TOOL_FORMATS[name]()
    tool = Tool("weather", {"type": "object", "properties": {"city": {"type": "string"}}})
    for arguments in (ARGUMENTS, {}):
        parts = AnswerParser(None, ToolCallParser(format_, [tool])).parse(format_.written("weather", arguments))
        (call,) = parts.tool_calls
        read = orjson.loads(call.arguments)
        assert (call.name, read, parts.text) == ("weather", arguments, "")


def test_a_call_beside_text_stays_beside_it() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [{"role": "assistant", "content": "Hm.", "tool_calls": [call]}]
    (shown,) = with_calls_as_text(messages, TOOL_FORMATS["llama3"]())
    assert shown == {"role": "assistant", "content": 'Hm.\n{"name": "f", "parameters": {}}'}


# ---- what a template shows ----

LOOP = "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
TEMPLATES: dict[str, tuple[str, TemplateTraits]] = {
    "text": (
        "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}",
        TemplateTraits(shows_tools=False, shows_calls=False, shows_calls_alone=False),
    ),
    "parts": (
        "{% for m in messages %}{{ m.role }}" + LOOP + "{% endfor %}",
        TemplateTraits(
            frozenset({"user", "system", "assistant", "tool"}),
            shows_tools=False,
            shows_calls=False,
            shows_calls_alone=False,
        ),
    ),
    "either": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        + LOOP
        + "{% endif %}{% endfor %}",
        TemplateTraits(shows_tools=False, shows_calls=False, shows_calls_alone=False),
    ),
    "parts of users only": (
        "{% for m in messages %}{% if m.role == 'user' %}" + LOOP + "{% else %}{{ m.content }}{% endif %}{% endfor %}",
        TemplateTraits(frozenset({"user"}), shows_tools=False, shows_calls=False, shows_calls_alone=False),
    ),
    "no system": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}{% endfor %}",
        TemplateTraits(shows_system=False, shows_tools=False, shows_calls=False, shows_calls_alone=False),
    ),
    "tools and calls": (
        "{{ tools | tojson }}{% for m in messages %}{{ m.content }}"
        "{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}",
        TemplateTraits(),
    ),
    "calls but no tools": (
        "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}",
        TemplateTraits(shows_tools=False),
    ),
    "arguments as text": (
        "{{ tools | tojson }}{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}{% endfor %}{% endfor %}",
        TemplateTraits(takes_text_arguments=True),
    ),
    "calls only beside tools": (
        "{% for m in messages %}{{ m.content }}{% if tools %}{{ tools | tojson }}{{ m.tool_calls }}{% endif %}"
        "{% endfor %}",
        TemplateTraits(shows_calls_alone=False),
    ),
    "nothing": ("{{ raise_exception('no') }}", TemplateTraits()),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_shows_is_found_by_rendering_marks(tiny_llama: Path, name: str) -> None:
    text, expected = TEMPLATES[name]
    tokenizer = Tokenizer.load(tiny_llama, chat_template=text)
    assert find_traits(lambda messages, tools: tokenizer.render_chat(messages, tools)) == expected


class PartsTokenizer(FakeTokenizer):
    """Loop over the parts of each message's content, and show nothing of a text."""

    def render_chat(self, messages: Any, *_: Any, **options: Any) -> str:
        plain = []
        for message in messages:
            parts = [part["text"] for part in message["content"] if isinstance(part, dict)]
            plain.append({**message, "content": "".join(parts)})
        return super().render_chat(plain, **options)


async def test_a_template_that_loops_over_parts_shows_texts(engine: FakeEngine) -> None:
    engine.tokenizer, engine.answer = PartsTokenizer(), "Hi"
    history: list[Any] = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": None, "reasoning_content": "Hm"},
        {"role": "user", "content": [{"type": "text", "text": "B"}, {"type": "text", "text": "C"}]},
    ]
    async with serving(engine) as client:
        await post(client, "/v1/chat/completions", {"messages": history})
        assert prompt_of(engine) == "[system]S[user]A[assistant][user]B\nC[assistant]"
        await post(client, "/v1/messages", {"messages": USER, "max_tokens": 5})
        await post(client, "/v1/responses", {"input": "Weather?"})
        await post(client, "/api/chat", {"messages": USER, "stream": False})
        await post(client, "/api/generate", {"prompt": "Weather?", "stream": False})
        for request in engine.requests[1:]:
            assert bytes(request.input_ids) == b"[user]Weather?[assistant]"


def test_parts_are_made_for_the_roles_that_need_them() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert shaped(messages, TemplateTraits(frozenset({"user"}))) == [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
    ]


class OneCallTokenizer(FakeTokenizer):
    """Refuse messages of several calls, as the templates of some models do, and arguments that are no text."""

    def render_chat(self, messages: Any, *_: Any, **options: Any) -> str:
        for message in messages:
            calls = message.get("tool_calls") or ()
            if len(calls) > 1 or not all(isinstance(call["function"]["arguments"], str) for call in calls):
                raise InvalidRequest("chat template: one call at a time")
        return super().render_chat(messages, **options)


async def test_several_calls_come_back_although_the_template_allows_one(engine: FakeEngine) -> None:
    engine.tokenizer, engine.answer = OneCallTokenizer(), f"{CALL}{CALL}"
    async with serving(engine, tool_call_parser="hermes") as client:
        for num_calls, expected in ((1, "[weather]"), (2, "<tool_call>")):
            answer = await post(client, "/v1/chat/completions", {"messages": USER, "tools": [TOOL]})
            said = answer["choices"][0]["message"]
            said["tool_calls"] = said["tool_calls"][:num_calls]
            result = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
            await post(client, "/v1/chat/completions", {"messages": [*USER, said, result], "tools": [TOOL]})
            assert expected in prompt_of(engine).partition("[assistant]")[2] and "rain" in prompt_of(engine)
        wrong = {"messages": [{"role": "tool", "content": "x"}], "chat_template_kwargs": {"messages": []}}
        assert (await client.post("/v1/chat/completions", json=wrong)).status == 400


def test_a_template_that_refuses_is_not_tried_again() -> None:
    def refuse(_messages: Any, _tools: Any) -> str:
        raise InvalidRequest("no template")

    assert find_traits(refuse) == TemplateTraits()


# ---- histories as they come ----

BROKEN = ("{", '{"a": "x\ny"}', '{"a": 1,}', "[1]", "7", "", "null")


@pytest.fixture
async def plain(engine: FakeEngine) -> AsyncIterator[Client]:
    engine.tokenizer, engine.answer = FakeTokenizer(), "Hi"
    async with serving(engine, tool_call_parser="hermes") as client:
        yield client


@pytest.mark.parametrize("arguments", BROKEN)
async def test_a_call_whose_arguments_are_broken_may_come_back(
    plain: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    seen: list[Any] = []
    render_chat = engine.tokenizer.render_chat

    def seeing_render_chat(messages: Any, **options: Any) -> str:
        seen.append(messages)
        return render_chat(messages, **options)

    monkeypatch.setattr(engine.tokenizer, "render_chat", seeing_render_chat)
    function = {"name": "weather", "arguments": arguments}
    call = {"id": "c1", "type": "function", "function": function}
    item = {"type": "function_call", "call_id": "c1", **function}
    for path, body in (
        ("/v1/chat/completions", {"messages": [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}),
        ("/v1/responses", {"input": [{"role": "user", "content": "Hi"}, item]}),
        ("/api/chat", {"stream": False, "messages": [*USER, {"role": "assistant", "tool_calls": [call]}]}),
    ):
        await post(plain, path, body)
        shown = seen[-1][-1]["tool_calls"][0]["function"]["arguments"]
        assert shown == ({} if arguments in ("", "null") else {"INVALID_JSON": arguments}), path


async def test_a_stored_response_with_a_broken_call_is_continued(plain: Client, engine: FakeEngine) -> None:
    engine.answer = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ul'
    tools = [{"type": "function", **FUNCTION}]
    first = await post(plain, "/v1/responses", {"input": "Hi", "tools": tools, "max_output_tokens": 500})
    (call,) = first["output"]
    assert call["type"] == "function_call" and not call["arguments"].endswith("}")
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
    await post(plain, "/v1/responses", {"input": [result], "previous_response_id": first["id"], "tools": tools})
    await post(plain, "/v1/responses", {"input": [{"role": "user", "content": "Hi"}, call, result], "tools": tools})


EMPTY: list[JSON] = [
    {"role": "assistant"},
    {"role": "assistant", "content": None},
    {"role": "assistant", "content": None, "refusal": "I must not."},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": "I must not."}]},
    {"role": "assistant", "content": None, "reasoning_content": "Hm"},
    {"role": "assistant", "content": []},
    {"role": "assistant", "content": None, "tool_calls": []},
    {"role": "tool", "tool_call_id": "c1"},
    {"role": "tool", "tool_call_id": "c1", "content": None},
    {"role": "function", "name": "weather", "content": None},
]


@pytest.mark.parametrize("message", EMPTY)
async def test_a_message_of_the_model_or_a_tool_may_be_empty(plain: Client, engine: FakeEngine, message: JSON) -> None:
    await post(plain, "/v1/chat/completions", {"messages": [*USER, message, *USER]})
    told = "I must not." if "must" in json.dumps(message) else ""
    assert f"[{message['role']}]{told}[user]" in prompt_of(engine)


async def test_empty_items_and_blocks_may_come_back(plain: Client) -> None:
    for content in (None, [], [{"type": "refusal", "refusal": "No."}]):
        said = {"type": "message", "role": "assistant", "content": content}
        await post(plain, "/v1/responses", {"input": [{"role": "user", "content": "Hi"}, said]})
    empty = {"role": "assistant", "content": []}
    await post(plain, "/v1/messages", {"messages": [*USER, empty, *USER], "max_tokens": 5})
    output = {"type": "function_call_output", "call_id": "c1", "output": None}
    await post(plain, "/v1/responses", {"input": [{"role": "user", "content": "Hi"}, output]})
    await post(plain, "/api/chat", {"messages": [*USER, {"role": "assistant"}, *USER], "stream": False})


# ---- small fields ----


async def test_reasoning_is_left_out_where_the_client_does_not_want_it(engine: FakeEngine) -> None:
    engine.tokenizer, engine.answer = FakeTokenizer(), "<think>Hm</think>Yes"
    async with serving(engine, reasoning_parser="qwen3") as client:
        for more in ({}, {"separate_reasoning": False}, {"stream_reasoning": False}):
            body = {"messages": USER, "include_reasoning": False, **more}
            message = (await post(client, "/v1/chat/completions", body))["choices"][0]["message"]
            assert (message["content"], message.get("reasoning_content")) == ("Yes", None)
        kept = await post(client, "/v1/chat/completions", {"messages": USER, "include_reasoning": True})
        assert kept["choices"][0]["message"]["reasoning_content"] == "Hm"


async def test_json_object_with_a_schema_follows_it(plain: Client, engine: FakeEngine) -> None:
    format_ = {"type": "json_object", "schema": CITY}
    await post(plain, "/v1/chat/completions", {"messages": USER, "response_format": format_})
    await post(plain, "/v1/completions", {"prompt": "a", "response_format": format_})
    await post(plain, "/v1/responses", {"input": "a", "text": {"format": format_}})
    bare = {"type": "json_schema", "schema": CITY}
    await post(plain, "/v1/chat/completions", {"messages": USER, "response_format": bare})
    for request in engine.requests:
        assert request.sampling_params.json_schema == CITY
    await post(plain, "/v1/chat/completions", {"messages": USER, "response_format": {"type": "json_object"}})
    assert engine.requests[-1].sampling_params.json_schema == {"type": "object"}


async def test_a_schema_that_need_not_be_strict_is_not(plain: Client, engine: FakeEngine) -> None:
    for is_strict, expected in ((False, {**CITY, "x-strict": False}), (True, CITY), (None, CITY)):
        named = {"name": "x", "schema": CITY, "strict": is_strict}
        body = {"messages": USER, "response_format": {"type": "json_schema", "json_schema": named}}
        await post(plain, "/v1/chat/completions", body)
        assert engine.requests[-1].sampling_params.json_schema == expected
