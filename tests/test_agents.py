"""Coding agents' requests as they are recorded: nothing of them is refused, what is left out is named."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from bench import agent
from engine.declared import convert
from server.reading.left_out import HEADER, LeftOut
from server.reading.messages import chat_body
from server.reading.messages_body import CountTokensRequest, MessagesRequest
from server.reading.messages_tools import MessagesTools
from server.reading.openai_body import ChatFields
from server.reading.responses import read_input
from server.reading.responses_tools import Tools
from server.reading.tool_choice import read_tool_choice
from tests.client import official
from tests.fake_engine import PARSERS, FakeEngine, serving
from tests.test_engine import running_engine

SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
PNG = {"type": "base64", "media_type": "image/png", "data": "aGk="}
UNSEEN = "cannot be shown to this model, which reads text only"
EPHEMERAL = {"type": "ephemeral", "ttl": "1h"}


@pytest.fixture(scope="module", autouse=True)
def _models_of_the_official_client() -> None:
    """Use the official client once before the event loop is guarded: it builds its models then, for 0.2 s."""

    async def use() -> None:
        async with serving(FakeEngine(context_length=1024)) as client, official(client) as api:
            response = await api.responses.create(model="fake-model", input="Hi")
            await api.responses.input_items.list(response.id)
            async with api.responses.stream(model="fake-model", input="Hi") as stream:
                await stream.get_final_response()

    asyncio.run(use())


# ---- Claude Code: /v1/messages ----


def claude_code(turn: int = 0, **more: Any) -> dict[str, Any]:
    """Return its request number `turn` of one session, all that it sends beside the conversation included."""
    said: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "List the files", "cache_control": EPHEMERAL}]}
    ]
    if turn:
        said += [
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "I look", "signature": "EqQB"},
                {"type": "redacted_thinking", "data": "EqQC"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"path": "."}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [
                    {"type": "text", "text": "a.py"}, {"type": "image", "source": PNG},
                ], "cache_control": EPHEMERAL},
            ]},
        ]  # fmt: skip
    billing = f"x-anthropic-billing-header: cc_version=2.1.36.{turn}a1; cc_entrypoint=cli; cch=1a2b{turn};"
    left = f"\n<total_tokens>{190000 - turn} tokens left</total_tokens>"
    said[-1]["content"].append({"type": "text", "text": f"Be quick.{left}"})
    return {
        "model": "fake-model",
        "max_tokens": 32000,
        "stream": False,
        "system": [
            {"type": "text", "text": billing},
            {"type": "text", "text": "You are an agent. " * 8, "cache_control": EPHEMERAL},
        ],
        "messages": said,
        "tools": [
            {"name": "Read", "description": "a file", "input_schema": SCHEMA, "cache_control": EPHEMERAL},
            {"type": "custom", "name": "Edit", "input_schema": SCHEMA, "defer_loading": True, "input_examples": []},
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        ],
        "tool_choice": {"type": "auto"},
        "metadata": {"user_id": "user_1_account__session_2"},
        "thinking": {"type": "enabled", "budget_tokens": 31999, "display": "omitted"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "container": {"skills": []},
        "mcp_servers": [{"type": "url", "url": "https://example.com", "name": "x"}],
        "service_tier": "auto",
        "inference_geo": "us",
        "betas": ["context-management-2025-06-27"],
        **more,
    }


@pytest.mark.parametrize("turn", [0, 1])
async def test_claude_codes_request_is_answered_and_counted_and_its_header_names_what_was_left_out(turn: int) -> None:
    engine = FakeEngine(context_length=2048)
    async with serving(engine, enable_metrics=True) as client:
        answer = await client.post("/v1/messages?beta=true", json=claude_code(turn))
        assert answer.status == 200, await answer.text()
        counted = await client.post("/v1/messages/count_tokens", json=claude_code(turn))
        assert counted.status == 200, await counted.text()
        num_tokens = (await counted.json())["input_tokens"]
        streamed = await client.post("/v1/messages", json=claude_code(turn, stream=True))
        metrics = await (await client.get("/metrics")).text()
    assert num_tokens == len(engine.requests[0].input_ids)
    wanted = {
        "context_management", "container", "mcp_servers", "inference_geo", "web_search_20250305",
        "x-anthropic-billing-header", "total_tokens", "thinking.budget_tokens",
    } | ({"image", "redacted_thinking"} if turn else set())  # fmt: skip
    for response in (answer, counted, streamed):
        assert set(response.headers[HEADER].split(", ")) == wanted
    assert 'radixloop:left_out_total{kind="volatile",model_name="fake-model"} 6.0' in metrics
    assert 'radixloop:left_out_total{kind="tool",model_name="fake-model"} 3.0' in metrics


async def test_a_request_that_is_answered_in_full_has_no_such_header() -> None:
    body = {"max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}], "metadata": {"user_id": "x"}}
    async with serving(FakeEngine()) as client:
        response = await client.post("/v1/messages", json=body)
    assert response.status == 200 and HEADER not in response.headers


@pytest.mark.parametrize("keeps", [False, True])
async def test_of_the_second_of_two_recorded_turns_only_the_new_tokens_are_computed(
    tiny_llama: Path, keeps: bool
) -> None:
    """Unless the lines that change in each prompt are kept: then nothing is found but the template's first tokens."""
    usages = []
    options: dict[str, Any] = {"chat_template": "chatml", "served_model_name": ["fake-model"]}
    async with (
        running_engine(tiny_llama, context_length=4096) as engine,
        serving(engine, keep_volatile_prompts=keeps, tool_call_parser="none", **options) as client,
    ):
        for turn in range(2):
            body = claude_code(turn, max_tokens=1, tools=[])
            body["messages"][0]["content"] = [{"type": "text", "text": "List the files"}]
            response = await client.post("/v1/messages", json=body)
            assert response.status == 200, await response.text()
            usages.append((await response.json())["usage"])
    first, second = usages
    num_first = first["input_tokens"] + first["cache_read_input_tokens"]
    if keeps:
        assert second["cache_read_input_tokens"] < num_first / 2
    else:
        assert second["cache_read_input_tokens"] == num_first


def shown(**body: Any) -> tuple[list[Any], LeftOut]:
    left_out = LeftOut()
    given = convert({"max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}], **body}, MessagesRequest)
    tools = MessagesTools(given.tools, given.messages, left_out)
    return chat_body(given, tools, left_out, keeps_volatile=False)["messages"], left_out


def test_the_billing_line_is_left_out_wherever_a_system_prompt_begins() -> None:
    line = "x-anthropic-billing-header: cc_version=2; cch=1;"
    assert shown(system=[{"type": "text", "text": line}])[0][0] == {"role": "system", "content": ""}
    assert shown(system=f"{line}\nBe brief")[0][0]["content"] == "Be brief"
    inside = [{"role": "system", "content": f"{line}\nBe brief"}, {"role": "user", "content": "Hi"}]
    assert shown(messages=inside)[0][0]["content"] == "Be brief"


@pytest.mark.parametrize("text", ["Why does <total_tokens>5 tokens left</total_tokens> change?", "</total_tokens>"])
def test_what_somebody_wrote_about_such_lines_stays(text: str) -> None:
    messages, left_out = shown(messages=[{"role": "user", "content": text}])
    assert messages == [{"role": "user", "content": [{"type": "text", "text": text}]}]
    assert not left_out.parts


@pytest.mark.parametrize(
    ("block", "text"),
    [
        ({"type": "image", "source": PNG}, f"[image: {UNSEEN}]"),
        ({"type": "document", "source": {"type": "text", "data": "Dear"}, "title": "Letter"}, "Letter\nDear"),
        ({"type": "document", "source": PNG}, f"[document: {UNSEEN}]"),
        ({"type": "search_result", "title": "A", "content": [{"type": "text", "text": "b"}]}, "A\nb"),
        ({"type": "container_upload", "file_id": "f"}, f"[container upload: {UNSEEN}]"),
        ({"type": "compaction", "content": "So far"}, "So far"),
        ({"type": "mcp_tool_listing", "tools": []}, "[mcp tool listing: not shown]"),
    ],
)  # fmt: skip
def test_content_a_text_model_cannot_see_becomes_a_short_text(block: Any, text: str) -> None:
    messages, _ = shown(messages=[{"role": "user", "content": [block]}])
    assert messages == [{"role": "user", "content": [{"type": "text", "text": text}]}]
    result = {"type": "tool_result", "tool_use_id": "a", "content": [block]}
    assert shown(messages=[{"role": "user", "content": [result]}])[0][0]["content"] == text


def test_calls_and_results_of_a_servers_tools_become_a_short_text() -> None:
    blocks = [
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "x"}},
        {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [{"type": "web_search_result"}]},
        {"type": "text", "text": "Found", "citations": []},
    ]
    messages, left_out = shown(messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": blocks}])
    texts = [part["text"] for part in messages[1]["content"]]
    assert texts == ["[server tool use: web_search: not shown]", "[web search tool result: not shown]", "Found"]
    assert left_out.header == "server_tool_use, web_search_tool_result"


def test_an_older_name_of_the_output_format_is_read() -> None:
    format_ = {"type": "json_schema", "schema": SCHEMA}
    body = convert({"messages": [{"role": "user", "content": "Hi"}], "output_format": format_}, CountTokensRequest)
    chat = chat_body(body, MessagesTools([], [], LeftOut()), LeftOut(), keeps_volatile=False)
    assert chat["response_format"]["json_schema"]["schema"] == SCHEMA


# ---- Codex: /v1/responses ----

LARK = 'start: "*** Begin Patch" LF\nLF: "\\n"'
CODEX_TOOLS: list[Any] = [
    {"type": "function", "name": "shell", "description": "runs", "strict": False, "parameters": SCHEMA},
    {"type": "web_search", "external_web_access": True},
    {"type": "image_generation", "output_format": "png"},
    {"type": "custom", "name": "apply_patch", "description": "Edits",
     "format": {"type": "grammar", "syntax": "lark", "definition": LARK}},
    {"type": "namespace", "name": "mcp__files", "description": "x", "tools": [
        {"type": "function", "name": "read", "parameters": SCHEMA}]},
]  # fmt: skip


def codex(**more: Any) -> dict[str, Any]:
    """Return its request in the middle of a session."""
    return {
        "model": "fake-model",
        "instructions": "You are an agent.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be safe"}]},
            {"type": "message", "role": "user", "content": [
                {"type": "input_text", "text": "Go"}, {"type": "input_image", "image_url": "data:,x"},
            ]},
            {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "x"}], "content": None,
             "encrypted_content": "gAAA"},
            {"type": "function_call", "name": "read", "namespace": "mcp__files", "arguments": "{}", "call_id": "a"},
            {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_image", "image_url": "x"}]},
            {"type": "custom_tool_call", "call_id": "b", "name": "apply_patch", "input": "*** Begin Patch"},
            {"type": "custom_tool_call_output", "call_id": "b", "output": "Done"},
            {"type": "local_shell_call", "call_id": "c", "status": "completed",
             "action": {"type": "exec", "command": ["ls"]}},
            {"type": "local_shell_call_output", "id": "c", "output": "a.py"},
            {"type": "web_search_call", "id": "ws_1", "action": {"type": "search", "query": "x"}},
            {"type": "image_generation_call", "id": "ig_1", "status": "completed", "result": "aGk="},
            {"type": "tool_search_call", "call_id": "d", "status": "completed", "arguments": {"query": "x"}},
            {"type": "tool_search_output", "call_id": "d", "status": "completed", "tools": [{"name": "x"}]},
            {"type": "compaction", "encrypted_content": "gAAB"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Well"},
                                                                 {"type": "refusal", "refusal": "No"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "And?"}]},
        ],
        "tools": CODEX_TOOLS,
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199",
        "client_metadata": {"x": "y"},
        "text": {"verbosity": "low"},
        "truncation": "auto",
        **more,
    }  # fmt: skip


async def test_codexs_request_is_answered_and_its_header_names_what_was_left_out() -> None:
    engine = FakeEngine(context_length=4096)
    async with serving(engine) as client:
        for is_stream in (False, True):
            response = await client.post("/v1/responses", json=codex(stream=is_stream))
            assert response.status == 200, await response.text()
            assert set(response.headers[HEADER].split(", ")) == {
                "web_search", "image_generation", "text.verbosity", "truncation", "input_image", "reasoning",
                "web_search_call", "image_generation_call", "compaction",
            }  # fmt: skip
            await response.read()
    prompt = bytes(engine.requests[0].input_ids).decode()
    for text in (f"[user]Go\n[image: {UNSEEN}]", f"[tool][image: {UNSEEN}]", "[tool]Done", "[tool]a.py", "Well\nNo"):
        assert text in prompt


def test_every_call_of_the_history_is_a_call_of_a_function() -> None:
    messages = read_input(codex()["input"], LeftOut())
    calls = [call["function"] for message in messages for call in message.get("tool_calls", [])]
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [
        ("mcp__files__read", {}),
        ("apply_patch", {"input": "*** Begin Patch"}),
        ("local_shell", {"command": ["ls"]}),
        ("tool_search", {"query": "x"}),
    ]
    assert [message["tool_call_id"] for message in messages if message["role"] == "tool"] == ["a", "b", "c", "d"]


def test_a_custom_tool_is_offered_with_its_grammar_and_a_namespaces_under_its_name() -> None:
    choice = read_tool_choice(convert({"tools": Tools(codex()["tools"], LeftOut()).functions}, ChatFields))
    functions = {tool["function"]["name"]: tool["function"] for tool in choice.shown or ()}
    assert list(functions) == ["shell", "apply_patch", "mcp__files__read"]
    assert functions["apply_patch"]["description"] == f"Edits\ninput must match this lark grammar:\n{LARK}"
    assert functions["apply_patch"]["parameters"]["required"] == ["input"]
    assert choice.custom == {"apply_patch"}


def call_of(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


async def test_a_custom_tools_call_comes_back_as_one_and_a_namespaces_under_both_names() -> None:
    patch = '*** Begin Patch\n+ "x"'
    text = call_of("apply_patch", input=patch) + "\n" + call_of("mcp__files__read", path="a")
    async with serving(FakeEngine(text, context_length=4096), **PARSERS) as client, official(client) as api:
        body = codex(parallel_tool_calls=True)
        del body["stream"], body["client_metadata"]
        whole = (await api.responses.create(**body)).output
        async with api.responses.stream(**body) as stream:
            kinds = [event.type async for event in stream]
            streamed: Any = (await stream.get_final_response()).output
    for custom, function in (whole, streamed):
        assert custom.type == "custom_tool_call" and (custom.name, custom.input) == ("apply_patch", patch)
        assert custom.id is not None and custom.id.startswith("ctc_")
        assert function.type == "function_call" and (function.name, function.namespace) == ("read", "mcp__files")
        assert json.loads(function.arguments) == {"path": "a"}
    assert "response.custom_tool_call_input.done" in kinds


@pytest.mark.parametrize("given", ["", []])
async def test_a_probe_without_input_is_answered(given: Any) -> None:
    async with serving(FakeEngine()) as client:
        response = await client.post("/v1/responses", json={"input": given, "max_output_tokens": 1, "store": False})
        assert response.status == 200, await response.text()
        assert (await response.json())["usage"]["output_tokens"] == 1


@pytest.mark.parametrize("mode", ["auto", "required"])
async def test_of_allowed_tools_all_are_shown_and_few_may_be_called(mode: str) -> None:
    flat = [{"type": "function", "name": "shell"}]
    nested = [{"type": "function", "function": {"name": "shell"}}]
    functions = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("shell", "read")]
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "tools": functions}
    for path, body in (
        ("/v1/responses", codex(tool_choice={"type": "allowed_tools", "mode": mode, "tools": flat})),
        ("/v1/chat/completions",
         chat | {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": nested}}}),
    ):  # fmt: skip
        engine = FakeEngine(call_of("read"), context_length=4096)
        async with serving(engine, **PARSERS) as client:
            response = await client.post(path, json=body)
            assert response.status == 200, await response.text()
            assert "function_call" not in {item["type"] for item in (await response.json()).get("output", [])}
        constraint = engine.requests[0].sampling_params.constraint
        assert (constraint is not None) == (mode == "required")
        assert constraint is None or ("shell" in constraint[1] and "read" not in constraint[1])


async def test_allowed_tools_that_are_not_there_are_refused_by_name() -> None:
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "nope"}]}
    async with serving(FakeEngine(context_length=4096)) as client:
        response = await client.post("/v1/responses", json=codex(tool_choice=choice))
        assert response.status == 400 and "'nope'" in (await response.json())["error"]["message"]


async def test_the_input_of_a_stored_response_is_listed_by_pages() -> None:
    async with serving(FakeEngine(context_length=4096)) as client, official(client) as api:
        first = await api.responses.create(model="fake-model", input="Hi")
        item: Any
        [item] = (await api.responses.input_items.list(first.id)).data
        assert item.type == "message" and item.content[0].text == "Hi"
        given: Any = [{"role": "user", "content": f"{i}"} for i in range(5)]
        many = await api.responses.create(model="fake-model", input=given)
        page: Any = await api.responses.input_items.list(many.id, limit=2)
        texts = [item.content[0].text async for item in page]
        assert texts == ["4", "3", "2", "1", "0"] and page.has_more
        oldest: Any = await api.responses.input_items.list(many.id, order="asc", limit=1)
        assert oldest.data[0].content[0].text == "0"
        for wrong in ("limit=0", "limit=x", "order=up", "after=nope"):
            assert (await client.get(f"/v1/responses/{many.id}/input_items?{wrong}")).status == 400
        assert (await client.get("/v1/responses/resp_x/input_items")).status == 404


async def test_models_are_listed_for_codex_too() -> None:
    async with serving(FakeEngine()) as client:
        listed = await (await client.get("/v1/models")).json()
    assert [card["id"] for card in listed["data"]] == ["fake-model"] and listed["models"] == []


@pytest.mark.parametrize("kind", [[], {}, 1, ["text"]])
async def test_a_type_that_is_no_text_is_a_400(kind: Any) -> None:
    part = {"type": kind, "text": "x"}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [part]}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": [part]}]}),
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": [result]}]}),
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "x"}], "tools": [part]}),
        ("/v1/responses", {"input": [{"role": "user", "content": [part]}]}),
        ("/v1/responses", {"input": [part]}),
        ("/v1/responses", {"input": "x", "tools": [part]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tool_choice": part}),
    ]
    async with serving(FakeEngine()) as client:
        for path, body in bodies:
            assert (await client.post(path, json=body)).status == 400, body


def test_a_header_is_short_and_safe_whatever_names_the_client_chose() -> None:
    left_out = LeftOut()
    for i in range(100):
        left_out.add("tool", f"x\r\nSet-Cookie: {i}" + "y" * 1000)
    assert len(left_out.header) < 4000 and "\n" not in left_out.header and " " not in left_out.header.replace(", ", "")


@pytest.mark.parametrize("api", agent.APIS)
async def test_of_a_replayed_session_what_is_new_is_computed_and_little_else(tiny_llama: Path, api: str) -> None:
    session = agent.Session.drawn(0, num_turns=4, num_tools=3, system_words=50, result_words=20)
    options: dict[str, Any] = {"chat_template": "chatml", "served_model_name": ["fake-model"]}
    async with (
        running_engine(tiny_llama, context_length=4096, max_total_tokens=16384) as engine,
        serving(engine, **options) as client,
    ):
        turns = await agent.replay(str(client.make_url("/")), api, session, model="default", answer_len=2, key="none")
    assert len(turns) == 4 and all(turn.num_new > 20 for turn in turns)
    assert 1.0 <= agent.computed_per_new(turns) < 1.2
    agent.show(api, turns)


async def test_the_usage_of_message_start_is_that_of_the_end(tiny_llama: Path) -> None:
    options: dict[str, Any] = {"chat_template": "chatml", "served_model_name": ["fake-model"]}
    body = {"max_tokens": 3, "stream": True, "messages": [{"role": "user", "content": "Once upon a time " * 9}]}
    async with running_engine(tiny_llama) as engine, serving(engine, **options) as client:
        for turn in range(2):
            response = await client.post("/v1/messages", json=body)
            data = [json.loads(line[6:]) for line in (await response.read()).splitlines() if line.startswith(b"data: ")]
            [start], [end] = (
                [event for event in data if event["type"] == f"message_{kind}"] for kind in ("start", "delta")
            )
            begun, ended = start["message"]["usage"], end["usage"]
            assert (begun["cache_read_input_tokens"] > 0) == (turn == 1)
            assert {**begun, "output_tokens": 0} == {**ended, "output_tokens": 0}
