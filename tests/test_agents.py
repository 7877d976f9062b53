"""Coding agents' requests as they are recorded: nothing of them is refused, what is left out is named."""

from pathlib import Path
from typing import Any

import pytest

from server.apis.anthropic import chat_body
from server.reading.left_out import HEADER, LeftOut
from server.reading.messages_body import answerable
from server.reading.protocol import Fields
from tests.fake_engine import FakeEngine, serving
from tests.test_engine import running_engine

SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
PNG = {"type": "base64", "media_type": "image/png", "data": "aGk="}
UNSEEN = "cannot be shown to this model, which reads text only"
EPHEMERAL = {"type": "ephemeral", "ttl": "1h"}


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
    options: dict[str, Any] = {"chat_template": "chatml", "served_model_name": "fake-model"}
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
    given = Fields({"max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}], **body})
    return chat_body(answerable(given, left_out, False), left_out)["messages"], left_out


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
    left_out = LeftOut()
    given = Fields(
        {"messages": [{"role": "user", "content": "Hi"}], "output_format": {"type": "json_schema", "schema": SCHEMA}}
    )
    chat = chat_body(answerable(given, left_out, False), left_out)
    assert chat["response_format"]["json_schema"]["schema"] == SCHEMA


def test_a_header_is_short_and_safe_whatever_names_the_client_chose() -> None:
    left_out = LeftOut()
    for i in range(100):
        left_out.add("tool", f"x\r\nSet-Cookie: {i}" + "y" * 1000)
    assert len(left_out.header) < 4000 and "\n" not in left_out.header and " " not in left_out.header.replace(", ", "")
