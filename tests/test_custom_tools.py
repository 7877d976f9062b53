"""Custom tools, and those that clients run themselves: what is offered, held, said and taken back."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from server.reading.left_out import HEADER
from tests.client import official
from tests.fake_engine import PARSERS, FakeEngine, serving
from tests.test_agents import SCHEMA, call_of
from tests.test_engine import running_engine

USER: list[Any] = [{"role": "user", "content": "Hi"}]
SYNTAXES = {  # a grammar, and a pattern of its texts
    "lark": (
        'start: line+ "."?\nline: ("a" | "\\"" /[b-d\\t\\\\]{1,3}/) LF\n%import common.LF',
        r'(?:(?:a|"[b-d\t\\]{1,3})\n)+\.?',
    ),
    "regex": (r'[x"]y\n+z', r'[x"]y\n+z'),
}
OPTIONS: dict[str, Any] = {"served_model_name": ["fake-model"], "chat_template": "chatml"}


@pytest.fixture(scope="module", autouse=True)
def _models_of_the_official_client() -> None:
    """Use the official client once before the event loop is guarded: it builds its models then, for 0.2 s."""

    async def use() -> None:
        async with serving(FakeEngine(context_length=1024)) as client, official(client) as api:
            async with api.responses.stream(model="fake-model", input="Hi") as stream:
                await stream.get_final_response()
            await api.chat.completions.create(model="fake-model", messages=USER)

    asyncio.run(use())


def custom_tool(path: str, syntax: str, definition: str) -> dict[str, Any]:
    grammar = {"syntax": syntax, "definition": definition}
    if path == "/v1/responses":
        return {"type": "custom", "name": "edit", "format": {"type": "grammar", **grammar}}
    return {"type": "custom", "custom": {"name": "edit", "format": {"type": "grammar", "grammar": grammar}}}


def asked(path: str, **more: Any) -> dict[str, Any]:
    if path == "/v1/responses":
        return {"input": "Hi", "max_output_tokens": 300, **more}
    return {"messages": USER, "max_tokens": 300, **more}


def inputs_of(path: str, answer: Any) -> list[str]:
    """Return what custom tools are called with in a whole answer."""
    if path == "/v1/responses":
        return [item["input"] for item in answer["output"] if item["type"] == "custom_tool_call"]
    calls = answer["choices"][0]["message"]["tool_calls"]
    return [call["custom"]["input"] for call in calls if call["type"] == "custom"]


PATHS = ("/v1/responses", "/v1/chat/completions")


@pytest.mark.parametrize("parser", ["hermes", "qwen3_coder", "llama3"])
async def test_a_custom_tools_input_is_a_text_of_its_grammar(tiny_llama: Path, parser: str) -> None:
    """A random model that must call writes what the grammar says, whether the call has it as JSON or as it stands."""
    async with (
        running_engine(tiny_llama, context_length=2048) as engine,
        serving(engine, tool_call_parser=parser, **OPTIONS) as client,
    ):
        for path in PATHS:
            for syntax, (definition, pattern) in SYNTAXES.items():
                tools = [custom_tool(path, syntax, definition)]
                body = asked(path, tools=tools, tool_choice="required", parallel_tool_calls=False, temperature=1.5)
                response = await client.post(path, json=body)
                assert response.status == 200, await response.text()
                [given] = inputs_of(path, await response.json())
                assert re.fullmatch(pattern, given), given


@pytest.mark.parametrize("path", PATHS)
async def test_a_call_that_is_not_forced_is_held_once_it_has_begun(path: str) -> None:
    engine = FakeEngine(context_length=4096)
    held, free = (custom_tool(path, "lark", definition) for definition in ('start: "a"', ""))
    free.get("custom", free).pop("format")
    chosen: dict[str, Any] = {"type": "custom", "name": "edit", "custom": {"name": "edit"}}
    async with serving(engine, tool_call_parser="hermes") as client:
        for tool, choice in ((held, "auto"), (held, chosen), (free, "auto"), (free, chosen)):
            response = await client.post(path, json=asked(path, tools=[tool], tool_choice=choice))
            assert response.status == 200, await response.text()
    tags: list[Any] = [request.sampling_params.structural_tag or {} for request in engine.requests]
    kinds = [tag.get("format", {}) for tag in tags]
    assert [kind.get("type") for kind in kinds] == [
        "triggered_tags",
        "tags_with_separator",
        None,
        "tags_with_separator",
    ]
    assert ["lark_string" in str(kind) for kind in kinds] == [True, True, False, False]


async def test_a_broken_grammar_is_a_400_that_names_the_clients_field(tiny_llama: Path) -> None:
    options: dict[str, Any] = OPTIONS | {"tool_call_parser": "hermes"}
    fields = ("tools[1].format.definition", "tools[0].custom.format.grammar.definition")
    async with running_engine(tiny_llama) as engine, serving(engine, **options) as client:
        for path, field in zip(PATHS, fields, strict=True):
            hosted = [{"type": "web_search"}] if path == "/v1/responses" else []
            tools = [*hosted, custom_tool(path, "lark", "start: nowhere")]
            response = await client.post(path, json=asked(path, tools=tools))
            error = (await response.json())["error"]
            assert (response.status, error["param"]) == (400, field), error
            assert field in error["message"] and "nowhere" in error["message"]


async def test_a_streamed_call_of_a_custom_tool_is_what_the_whole_answer_has() -> None:
    tools: list[Any] = [
        {"type": "custom", "custom": {"name": "edit"}},
        {"type": "function", "function": {"name": "read", "parameters": SCHEMA}},
    ]
    text = call_of("edit", input='a "b"\n') + call_of("read", path="x") + call_of("edit", input="c")
    body: dict[str, Any] = {"model": "fake-model", "messages": USER, "tools": tools}
    async with serving(FakeEngine(text, context_length=4096), **PARSERS) as client, official(client) as api:
        whole: Any = (await api.chat.completions.create(**body)).choices[0].message.tool_calls
        inputs: dict[int, str] = {}
        async for chunk in await api.chat.completions.create(**body, stream=True):
            for call in chunk.choices[0].delta.tool_calls or ():
                custom: Any = call.to_dict().get("custom")
                if custom is not None:
                    inputs[call.index] = inputs.get(call.index, "") + custom.get("input", "")
        assert [call.type for call in whole] == ["custom", "function", "custom"]
        assert [whole[0].custom.input, whole[2].custom.input] == ['a "b"\n', "c"]
        assert inputs == {0: 'a "b"\n', 2: "c"}
        again = [*body["messages"], {"role": "assistant", "tool_calls": [call.to_dict() for call in whole]}]
        again += [{"role": "tool", "tool_call_id": call.id, "content": "done"} for call in whole]
        assert (await api.chat.completions.create(**{**body, "messages": again})).choices


async def test_shells_and_patches_are_functions_whose_calls_come_back_as_the_clients_items() -> None:
    tools = [{"type": "local_shell"}, {"type": "shell", "environment": {"type": "local"}}, {"type": "apply_patch"}]
    operation = {"type": "update_file", "path": "a.py", "diff": "-x\n+y"}
    text = call_of("local_shell", command=["ls", "-l"], timeout_ms=5) + call_of("shell", commands=["ls"])
    text += call_of("apply_patch", **operation)
    async with serving(FakeEngine(text, context_length=8192), **PARSERS) as client, official(client) as api:
        body: dict[str, Any] = {"model": "fake-model", "input": "Go", "tools": tools, "store": False}
        output: Any = (await api.responses.create(**body)).output
        async with api.responses.stream(**body) as stream:
            async for _ in stream:
                pass
            streamed: Any = (await stream.get_final_response()).output
        for items in (output, streamed):
            local, shell, patch = items
            assert (local.type, local.action.command, local.action.timeout_ms) == ("local_shell_call", ["ls", "-l"], 5)
            assert (local.action.type, local.action.env) == ("exec", {})
            assert (shell.type, shell.action.commands) == ("shell_call", ["ls"])
            assert (patch.type, patch.operation.to_dict()) == ("apply_patch_call", operation)
        items = [item.to_dict() for item in output]
        items += [
            {"type": "local_shell_call_output", "id": local.call_id, "output": "a.py"},
            {"type": "shell_call_output", "call_id": shell.call_id, "output": [
                {"stdout": "a.py", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]},
            {"type": "apply_patch_call_output", "call_id": patch.call_id, "status": "completed"},
        ]  # fmt: skip
        response = await client.post("/v1/responses", json={**body, "input": items})
        assert response.status == 200 and HEADER not in response.headers, await response.text()
        hosted = {**body, "tools": [{"type": "shell", "environment": {"type": "container_auto"}}]}
        assert (await client.post("/v1/responses", json=hosted)).headers[HEADER] == "shell"
        chosen = await client.post("/v1/responses", json={**body, "tool_choice": {"type": "local_shell"}})
        assert chosen.status == 200, await chosen.text()
