"""Tools and reasoning through the chat API: what clients get, and what grammars hold models to."""

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from engine.config import EngineConfig
from engine.local import LocalEngine
from engine.text.grammar import GrammarCompiler
from engine.text.tokenizer import Tokenizer
from server.parsers import AnswerParser
from server.parsers.reasoning import REASONING_FORMATS
from server.parsers.tool_calls import TOOL_FORMATS, Tool, ToolCallParser
from server.reading.tool_choice import ToolChoice, structural_tag, tool_constraint
from tests.client import Client, events
from tests.fake_engine import FakeEngine, serving

USER: list[Any] = [{"role": "user", "content": "Hi"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or CITY, **more}}


TOOLS: list[Any] = [tool("weather"), tool("news")]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "news", "arguments": {"city": "a \\"}\\" b"}}\n</tool_call>'


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine(context_length=4096)


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[Client]:
    async with serving(engine, tool_call_parser="hermes", reasoning_parser="qwen3") as client:
        yield client


async def ask(client: Client, **body: Any) -> Any:
    response = await client.post("/v1/chat/completions", json={"messages": USER, **body})
    assert response.status == 200, await response.text()
    return await response.json()


async def chunks(client: Client, **body: Any) -> list[Any]:
    return await events(client, "/v1/chat/completions", **({"messages": USER} | body))


def question(path: str) -> dict[str, Any]:
    """Return a body of the API at `path` that asks something, in few tokens where it must say how many."""
    return {"input": "Hi"} if path == "/v1/responses" else {"messages": USER, "max_tokens": 5}


def tag_of(engine: FakeEngine) -> Any:
    return engine.requests[-1].sampling_params.structural_tag


# ---- calls ----


async def test_two_calls_are_a_message_without_content(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.answer = f"{CALL}\n{OTHER}"
    answer = await api.chat.completions.create(model="fake-model", messages=USER, tools=TOOLS)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    calls: Any = choice.message.tool_calls
    assert [(call.type, call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("function", "weather", {"city": "Ulm"}),
        ("function", "news", {"city": 'a "}" b'}),
    ]
    assert len({call.id for call in calls}) == 2


async def test_the_official_client_accumulates_streamed_calls(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.answer = f"Let me see.\n{CALL}{OTHER}"
    async with api.chat.completions.stream(model="fake-model", messages=USER, tools=TOOLS) as stream:
        done = [event.arguments async for event in stream if event.type == "tool_calls.function.arguments.done"]
        answer = await stream.get_final_completion()
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    calls: Any = choice.message.tool_calls
    assert [call.function.name for call in calls] == ["weather", "news"]
    assert done == ['{"city": "Ulm"}', '{"city": "a \\"}\\" b"}']


async def test_a_streamed_call_begins_with_its_id_and_name(client: Client, engine: FakeEngine) -> None:
    engine.answer = CALL
    role, *middle, last = await chunks(client, tools=TOOLS)
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": "", "reasoning_content": None}
    first, *rest = [chunk["choices"][0]["delta"]["tool_calls"][0] for chunk in middle]
    assert (first["index"], first["type"], first["function"]["name"]) == (0, "function", "weather")
    assert first["id"]
    assert all(call.keys() == {"index", "function"} for call in rest)
    assert all(call["function"].keys() == {"arguments"} for call in rest)
    assert len(rest) > 5, "arguments come as the model writes them"
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == (
        {"reasoning_content": None},
        "tool_calls",
    )


async def test_each_of_n_answers_has_its_own_calls(client: Client, engine: FakeEngine) -> None:
    engine.answer = CALL
    answer = await ask(client, tools=TOOLS, n=2)
    ids = [choice["message"]["tool_calls"][0]["id"] for choice in answer["choices"]]
    assert len(set(ids)) == 2
    indices = {chunk["choices"][0]["index"] for chunk in await chunks(client, tools=TOOLS, n=2)}
    assert indices == {0, 1}


async def test_an_answer_cut_off_in_a_call_ended_by_length(client: Client, engine: FakeEngine) -> None:
    engine.answer = CALL
    (choice,) = (await ask(client, tools=TOOLS, max_tokens=len(CALL) - 20))["choices"]
    assert choice["finish_reason"] == "length"
    assert '{"city": "Ulm"}'.startswith(choice["message"]["tool_calls"][0]["function"]["arguments"])


async def test_a_malformed_call_is_content(client: Client, engine: FakeEngine) -> None:
    for answer in ("<tool_call>", '<tool_call>{"name": "weather', "<tool_call>weather</tool_call> !", "<tool_cal"):
        engine.answer = answer
        (choice,) = (await ask(client, tools=TOOLS))["choices"]
        assert choice["message"] == {"role": "assistant", "content": answer}
        assert choice["finish_reason"] == "stop"
        streamed = [chunk["choices"][0]["delta"].get("content", "") for chunk in await chunks(client, tools=TOOLS)]
        assert "".join(streamed) == answer


async def test_without_tools_marks_are_text(client: Client, engine: FakeEngine) -> None:
    engine.answer = CALL
    for body in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        (choice,) = (await ask(client, **body))["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


async def test_one_call_at_most_where_parallel_calls_are_off(client: Client, engine: FakeEngine) -> None:
    engine.answer = CALL + OTHER
    (choice,) = (await ask(client, tools=TOOLS, parallel_tool_calls=False))["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather"]


async def test_logprobs_of_all_tokens_come_with_streamed_calls(client: Client, engine: FakeEngine) -> None:
    engine.answer = CALL
    found = await chunks(client, tools=TOOLS, logprobs=True)
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in found if chunk["choices"][0]["logprobs"]]
    assert "".join(entry["token"] for some in logprobs for entry in some["content"]) == CALL


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        ("<tool_call> in a template", CALL),
        ("[TOOL_CALLS]", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Ulm"}}]'),
        (
            "<tool_call><function=",
            "<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</parameter>\n</function></tool_call>",
        ),
    ],
)
async def test_the_chat_template_tells_the_format(engine: FakeEngine, template: str, answer: str) -> None:
    engine.tokenizer.chat_template, engine.answer = template, answer
    async with serving(engine) as client:
        (choice,) = (await ask(client, tools=TOOLS))["choices"]
        assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "Ulm"}
    async with serving(engine, tool_call_parser="none") as client:
        assert (await ask(client, tools=TOOLS))["choices"][0]["message"]["content"] == answer


async def test_marks_that_are_special_tokens_are_not_left_out_of_the_text(
    client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ask(client, tools=TOOLS)
    assert engine.requests[-1].sampling_params.skip_special_tokens
    monkeypatch.setattr(engine.tokenizer, "decode", lambda token_ids, skip_special_tokens=True: "")
    async with serving(engine, tool_call_parser="mistral") as client:
        await ask(client, tools=TOOLS)
        assert not engine.requests[-1].sampling_params.skip_special_tokens
        await ask(client)
        assert engine.requests[-1].sampling_params.skip_special_tokens


# ---- reasoning ----


async def test_reasoning_then_a_call(api: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.answer = f"<think>\nUlm?\n</think>\n\n{CALL}"
    answer = await api.chat.completions.create(model="fake-model", messages=USER, tools=TOOLS)
    message: Any = answer.choices[0].message
    assert (message.reasoning_content, message.reasoning, message.content) == ("Ulm?", "Ulm?", None)
    assert message.tool_calls[0].function.name == "weather"
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("<think>\nUlm?\n</think>")


async def test_streamed_reasoning_is_told_in_its_own_field(client: Client, engine: FakeEngine) -> None:
    engine.answer = "<think>Hm, 2.</think>Two"
    found = await chunks(client, stream_options={"include_usage": True})
    deltas = [chunk["choices"][0]["delta"] for chunk in found if chunk["choices"]]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "Hm, 2."
    assert "".join(delta.get("content", "") for delta in deltas) == "Two"
    assert found[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": len("<think>Hm, 2.</think>")}

    deltas = [chunk["choices"][0]["delta"] for chunk in await chunks(client, stream_reasoning=False)]
    assert [delta["reasoning"] for delta in deltas if "reasoning" in delta] == ["Hm, 2."]


async def test_reasoning_stays_in_the_text_if_asked(client: Client, engine: FakeEngine) -> None:
    engine.answer = "<think>Hm</think>Two"
    message = (await ask(client, separate_reasoning=False))["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "<think>Hm</think>Two"}


@pytest.mark.parametrize("field", ["max_thinking_tokens", "thinking_token_budget"])
async def test_a_thinking_budget_is_given_to_the_engine(client: Client, engine: FakeEngine, field: str) -> None:
    engine.answer = "Hm</think>Two"
    message = (await ask(client, **{field: 7}))["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("Hm", "Two")
    (request,) = engine.requests
    assert (request.max_thinking_tokens, bytes(request.reasoning_end_ids)) == (7, b"</think>")
    assert bytes(request.input_ids).endswith(b"[assistant]<think>\n"), "what is to be cut must begin"


async def test_a_budget_without_known_marks_is_refused(engine: FakeEngine) -> None:
    async with serving(engine) as client:
        for field in ("max_thinking_tokens", "thinking_token_budget"):
            response = await client.post("/v1/chat/completions", json={"messages": USER, field: 5})
            assert (response.status, (await response.json())["error"]["param"]) == (400, field)


async def test_a_prompt_that_ends_the_reasoning_has_none(client: Client, engine: FakeEngine) -> None:
    engine.answer = "<think> is a mark"
    messages = [*USER, {"role": "assistant", "content": "<think>\n\n</think>\n\n"}]
    answer = await ask(client, messages=messages, continue_final_message=True)
    assert answer["choices"][0]["message"]["content"] == "<think> is a mark"
    messages[-1] = {"role": "assistant", "content": "<think>Well"}
    engine.answer = ", so</think>Two"
    answer = await ask(client, messages=messages, continue_final_message=True)
    assert answer["choices"][0]["message"]["reasoning"] == ", so"


async def test_template_variables_come_from_the_body(
    client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def render_chat(messages: Any, tools: Any = None, **variables: Any) -> str:
        seen.append({"tools": tools, **variables})
        return "x"

    monkeypatch.setattr(engine.tokenizer, "render_chat", render_chat)
    await ask(client, reasoning_effort="high", tools=TOOLS, chat_template_kwargs={"enable_thinking": True})
    await ask(client, reasoning_effort="none", tools=TOOLS, tool_choice="none")
    assert (seen[0]["tools"], seen[0]["reasoning_effort"], seen[0]["enable_thinking"]) == (TOOLS, "high", True)
    assert (seen[1]["tools"], seen[1]["enable_thinking"]) == (None, False)


async def test_template_variables_of_the_command_line_hold_unless_a_request_says_otherwise(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def render_chat(messages: Any, tools: Any = None, **variables: Any) -> str:
        seen.append(variables)
        return "x"

    monkeypatch.setattr(engine.tokenizer, "render_chat", render_chat)
    defaults = '{"enable_thinking": false, "reasoning_effort": "low", "persona": "pirate"}'
    async with serving(engine, default_chat_template_kwargs=defaults) as client:
        wishes: list[dict[str, Any]] = [
            {}, {"chat_template_kwargs": {"enable_thinking": True}}, {"thinking": {"type": "enabled"}},
            {"reasoning_effort": "high"}, {"thinking": {"type": "enabled"}, "chat_template_kwargs": {"thinking": 1}},
        ]  # fmt: skip
        seen.clear()  # what the template is like was tried at the start
        for wish in wishes:
            await ask(client, **wish)
    assert [variables["enable_thinking"] for variables in seen] == [False, True, True, False, True]
    assert [variables["reasoning_effort"] for variables in seen] == ["low"] * 3 + ["high", "low"]
    assert [variables.get("thinking") for variables in seen] == [None, None, True, None, 1]
    assert {variables["persona"] for variables in seen} == {"pirate"}


# ---- channels ----


@pytest.fixture
async def gpt_oss(engine: FakeEngine) -> AsyncIterator[Client]:
    async with serving(engine, tool_call_parser="gpt-oss", reasoning_parser="gpt-oss") as client:
        yield client


THOUGHT = "<|channel|>analysis<|message|>Ulm?<|end|>"


async def test_messages_in_channels_are_reasoning_text_and_calls(gpt_oss: Client, engine: FakeEngine) -> None:
    call = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Ulm"}<|call|>'
    engine.answer = f"{THOUGHT}<|start|>assistant{call}"
    (choice,) = (await ask(gpt_oss, tools=TOOLS))["choices"]
    assert (choice["finish_reason"], choice["message"]["reasoning_content"]) == ("tool_calls", "Ulm?")
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}
    engine.answer = f"{THOUGHT}<|start|>assistant<|channel|>final<|message|>Sun."
    found = await ask(gpt_oss)
    message = found["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Ulm?", "Sun.")
    assert found["usage"]["completion_tokens_details"] == {"reasoning_tokens": len(THOUGHT)}
    message = (await ask(gpt_oss, separate_reasoning=False))["choices"][0]["message"]
    assert message["content"] == f"{THOUGHT}Sun."


async def test_json_and_calls_that_are_held_stand_in_messages(gpt_oss: Client, engine: FakeEngine) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}}
    await ask(gpt_oss, response_format=schema)
    thought, answer = tag_of(engine)["format"]["elements"]
    assert thought["elements"][0]["end"] == "<|end|><|start|>assistant"
    opening, held = answer["elements"]
    assert (opening["value"], held["json_schema"]) == ("<|channel|>final<|message|>", CITY)
    await ask(gpt_oss, response_format=schema, max_thinking_tokens=5)
    between, answer = tag_of(engine)["format"]["elements"]
    assert (between["value"], answer["elements"][0]) == ("<|start|>assistant", opening)
    await ask(gpt_oss, tools=[*TOOLS, tool("clock", strict=True)])
    text, calls = tag_of(engine)["format"]["elements"][1]["elements"]
    assert (text["begin"], len(calls["tags"])) == ("<|channel|>final<|message|>", 3)


# ---- forced calls ----


async def test_calls_are_held_only_where_forced_or_strict(client: Client, engine: FakeEngine) -> None:
    await ask(client, tools=TOOLS)
    assert tag_of(engine) is None
    await ask(client, tools=[*TOOLS, tool("clock", strict=True)])
    assert tag_of(engine)["format"]["elements"][1]["type"] == "triggered_tags"
    await ask(client, tools=TOOLS, tool_choice="required")
    assert len(tag_of(engine)["format"]["elements"][1]["tags"]) == 2
    named = {"type": "function", "function": {"name": "news"}}
    await ask(client, tools=TOOLS, tool_choice=named, parallel_tool_calls=False)
    (only,) = tag_of(engine)["format"]["elements"][1]["tags"]
    assert (only["begin"], only["content"]["json_schema"]) == (
        '<tool_call>\n{"name": "news", "arguments": ',
        CITY | {"x-strict": False},
    )


async def test_a_choice_of_one_function_is_one_call_of_it_and_required_may_be_several(
    client: Client, engine: FakeEngine
) -> None:
    engine.answer = f"{CALL}\n{CALL}"
    for choice, count in (({"type": "function", "function": {"name": "weather"}}, 1), ("required", 2)):
        (answer,) = (await ask(client, tools=TOOLS, tool_choice=choice))["choices"]
        assert len(answer["message"]["tool_calls"]) == count
        assert tag_of(engine)["format"]["elements"][1]["stop_after_first"] == (count == 1)


async def test_a_forced_call_is_read_where_the_format_is_unknown(engine: FakeEngine) -> None:
    engine.answer = CALL
    async with serving(engine) as client:
        (choice,) = (await ask(client, tools=TOOLS, tool_choice="required"))["choices"]
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"
        assert tag_of(engine)["format"]["tags"][0]["begin"].startswith("<tool_call>")
        assert (await ask(client, tools=TOOLS))["choices"][0]["message"]["content"] == CALL


async def test_a_grammar_waits_for_the_end_of_reasoning_that_has_begun(engine: FakeEngine) -> None:
    async with serving(engine, tool_call_parser="hermes", reasoning_parser="deepseek-r1") as client:
        await ask(client, tools=TOOLS, tool_choice="required")
    assert bytes(engine.requests[0].reasoning_end_ids) == b"</think>"


SAMPLE = {"city": "Ulm", "days": 3, "unit": "C"}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = Tool("weather", SCHEMA, is_strict=True)
COMPACT = json.dumps(SAMPLE, separators=(",", ":"))
WRITTEN = {
    "qwen25": f'<tool_call>\n{{"name": "weather", "arguments": {COMPACT}}}\n</tool_call>',
    "llama3": f'{{"name": "weather", "parameters": {COMPACT}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "weather", "arguments": {COMPACT}}}]',
    "mistral_v11": f"[TOOL_CALLS]weather[ARGS]{COMPACT}",
    "deepseekv3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    f"{COMPACT}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseekv31": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{COMPACT}"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    f"{COMPACT}<|tool_call_end|><|tool_calls_section_end|>",
    "gpt-oss": f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{COMPACT}",
    "glm45": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Ulm</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>3</arg_value>\n<arg_key>unit</arg_key>\n<arg_value>C</arg_value>\n</tool_call>",
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n<parameter=unit>\nC\n</parameter>\n</function>\n</tool_call>",
    "seed_oss": "<seed:tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n<parameter=unit>\nC\n</parameter>\n</function>\n</seed:tool_call>",
    "minimax-m2": '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Ulm</parameter>\n'
    '<parameter name="days">3</parameter>\n<parameter name="unit">C</parameter>\n</invoke>\n</minimax:tool_call>',
    "hunyuan": f'<tool_calls>[{{"name": "weather", "arguments": {COMPACT}}}]</tool_calls>',
    "granite": f'<|tool_call|>[{{"name": "weather", "arguments": {COMPACT}}}]',
}


@pytest.fixture(scope="module")
def grammars(tiny_llama: Path) -> tuple[Tokenizer, GrammarCompiler]:
    tokenizer = Tokenizer.load(tiny_llama)
    assert tokenizer.eos_token_id is not None
    description = tokenizer.backend.to_json()
    eos = [tokenizer.eos_token_id]
    return tokenizer, GrammarCompiler(description, tokenizer.vocab_size, eos, {}, tokenizer.token_bytes)


def is_allowed(grammars: tuple[Tokenizer, GrammarCompiler], choice: ToolChoice, name: str, text: str) -> bool:
    """Return whether an answer under the constraint may be `text`, from its first to its last token."""
    tokenizer, compiler = grammars
    held = tool_constraint(choice, TOOL_FORMATS[name]())
    assert held is not None
    grammar = compiler.compile("structural_tag", json.dumps(structural_tag(held, ("<think>", "</think>"))))
    matcher = grammar.start.deep_copy()
    return all(map(matcher.consume_token, tokenizer.encode(text, False))) and matcher.is_accepting()


@pytest.mark.parametrize("name", WRITTEN)
def test_a_grammar_allows_what_its_parser_reads_and_nothing_else(
    grammars: tuple[Tokenizer, GrammarCompiler], name: str
) -> None:
    written = WRITTEN[name]
    parser = AnswerParser(None, ToolCallParser(TOOL_FORMATS[name](), [WEATHER]))
    (call,) = parser.parse(written).tool_calls
    assert json.loads(call.arguments) == SAMPLE
    forced = ToolChoice([], [WEATHER], is_forced=True, is_parallel=False)
    assert is_allowed(grammars, forced, name, written)
    assert is_allowed(grammars, forced, name, f"<think>\nHm.\n</think>{written}")
    for wrong in ("", "No.", written + "!", written + written, written.replace("Ulm", "Ulm", 1).replace("3", "many")):
        assert not is_allowed(grammars, forced, name, wrong)
    parallel = ToolChoice([], [WEATHER], is_forced=True, is_parallel=True)
    several = written + TOOL_FORMATS[name]().between + written
    assert len(AnswerParser(None, ToolCallParser(TOOL_FORMATS[name](), [WEATHER])).parse(several).tool_calls) == 2
    assert is_allowed(grammars, parallel, name, several)
    for wrong in (f"{written}\nThe answer is", f"{written}\n{written}\nNo.", f"Well: {written}"):
        assert not is_allowed(grammars, parallel, name, wrong)
    free = ToolChoice([], [WEATHER], is_forced=False, is_parallel=True)
    opening = TOOL_FORMATS[name]().opening
    assert is_allowed(grammars, free, name, f"{opening}No.")
    well = "" if opening else "Well: "  # text of the same message
    assert is_allowed(grammars, free, name, f"{well}{written}")
    assert not is_allowed(grammars, free, name, written.replace("3", "many"))
    single = ToolChoice([], [WEATHER], is_forced=False, is_parallel=False)
    assert is_allowed(grammars, single, name, f"{well}{written}")
    assert not is_allowed(grammars, single, name, f"{written}\n{written}")


@pytest.mark.parametrize("name", WRITTEN)
def test_of_a_forced_call_that_is_cut_nothing_is_text(name: str) -> None:
    forced = ToolChoice([], [WEATHER], is_forced=True, is_parallel=True)
    format_ = TOOL_FORMATS[name]()
    written = WRITTEN[name] + format_.between + WRITTEN[name]
    reasoning = "gpt-oss" if name == "gpt-oss" else "qwen3"
    for end in range(len(written)):
        for pieces in ([written[:end]], list(written[:end])):
            parser = AnswerParser(REASONING_FORMATS[reasoning].new_parser(is_inside=False), forced.new_parser(format_))
            deltas = [*map(parser.push, pieces), parser.finish()]
            assert "".join(delta.text for delta in deltas) == ""
            assert parser.num_tool_calls <= 2


async def test_reasoning_that_stays_in_the_text_of_a_forced_call_that_is_cut_is_kept(
    client: Client, engine: FakeEngine
) -> None:
    engine.answer = '<think>Where?</think><tool_call>\n{"na'
    for separate, content in ((False, "<think>Where?</think>"), (True, "")):
        (choice,) = (await ask(client, tools=TOOLS, tool_choice="required", separate_reasoning=separate))["choices"]
        assert (choice["message"]["content"], "tool_calls" in choice["message"]) == (content, False)
    (choice,) = (await ask(client, tools=TOOLS))["choices"]
    assert choice["message"]["content"] == '<tool_call>\n{"na', "it may have been text"


async def test_a_random_model_that_must_call_calls(tiny_llama: Path, tmp_path: Path) -> None:
    template = tmp_path / "names.jinja"
    template.write_text("{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{{ messages[-1].content }}")
    choices = {"unit": {"enum": ["C", "F"]}, "sure": {"type": "boolean"}}
    schema = {"type": "object", "properties": choices, "required": ["unit", "sure"], "additionalProperties": False}
    body = {"tools": [tool("set", schema), tool("get", schema)], "parallel_tool_calls": False, "max_tokens": 200}
    config = EngineConfig(model_path=str(tiny_llama), dtype="float32", device="cpu", max_total_tokens=4096)
    named = {"type": "function", "function": {"name": "get"}}
    async with LocalEngine(config) as engine:
        async with serving(engine, chat_template=str(template)) as client:
            for choice in (await ask(client, **body, tool_choice="required", seed=7, n=4))["choices"]:
                assert choice["finish_reason"] == "tool_calls"
                (call,) = choice["message"]["tool_calls"]
                arguments = json.loads(call["function"]["arguments"])
                assert arguments.keys() == {"unit", "sure"}
                assert arguments["unit"] in ("C", "F")
            wrong = tool("set", {"type": "object", "properties": {"a": {"type": "nonsense"}}})
            for choice in ("required", {"type": "function", "function": {"name": "set"}}):
                refused = {"messages": USER, "tools": [wrong], "tool_choice": choice}
                response = await client.post("/v1/chat/completions", json=refused)
                error = (await response.json())["error"]
                assert (response.status, error["param"]) == (400, "tools[0].function.parameters")
                assert error["message"].startswith("tools[0].function.parameters cannot be used: ")
        async with serving(engine, chat_template=str(template), reasoning_parser="qwen3") as client:
            found = await chunks(client, **body, tool_choice=named, max_thinking_tokens=5, seed=7)
    deltas = [chunk["choices"][0]["delta"] for chunk in found]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["function"]["name"] == "get"
    assert json.loads("".join(call["function"]["arguments"] for call in calls)).keys() == {"unit", "sure"}
    assert any("reasoning" in delta for delta in deltas)


SET = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
ODD: Any = {"type": "object", "properties": {"a": SET, "b": {"type": "string", "format": "binary"}}}


async def test_a_schema_that_cannot_be_held_is_called_what_the_client_calls_it(
    tiny_llama: Path, tmp_path: Path
) -> None:
    template = tmp_path / "names.jinja"
    template.write_text("{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{{ messages[-1].content }}")
    config = EngineConfig(model_path=str(tiny_llama), dtype="float32", device="cpu", max_total_tokens=4096)
    named = {"type": "json_schema", "name": "x", "schema": ODD}
    format_ = {**named, "json_schema": named}
    free: dict[str, Any] = {"type": "function", "name": "f"}
    strict: dict[str, Any] = {"name": "f", "strict": True}
    chat = "/v1/chat/completions"
    fields: list[tuple[str, dict[str, Any], str]] = [
        (chat, {"tools": [tool("f", ODD, strict=True)]}, "tools[0].function.parameters"),
        (chat, {"response_format": format_}, "response_format.json_schema.schema"),
        (chat, {"tools": TOOLS, "response_format": format_}, "response_format.json_schema.schema"),
        (chat, {"guided_json": ODD}, "guided_json"),
        ("/v1/completions", {"prompt": "a", "guided_json": ODD}, "guided_json"),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"json": ODD}}, "structured_outputs.json"),
        ("/v1/responses", {"tools": [{"type": "function", "parameters": ODD, **strict}]}, "tools[0].parameters"),
        ("/v1/responses", {"text": {"format": named}}, "text.format.schema"),
        ("/v1/responses", {"text": {"format": named}, "background": True}, "text.format.schema"),
        ("/v1/responses", {"tools": [free], "text": {"format": named}}, "text.format.schema"),
        ("/v1/messages", {"tools": [{"input_schema": ODD, **strict}]}, "tools[0].input_schema"),
        ("/v1/messages", {"tools": [{"name": "f", "input_schema": CITY}], "output_config": {"format": named}},
         "output_config.format.schema"),
        ("/v1/messages", {"output_config": {"format": named}}, "output_config.format.schema"),
        ("/api/chat", {"tools": [tool("f", ODD, strict=True)]}, "tools[0].function.parameters"),
        ("/api/chat", {"format": ODD}, "format"),
    ]  # fmt: skip
    async with (
        LocalEngine(config) as engine,
        serving(engine, chat_template=str(template), tool_call_parser="hermes") as client,
    ):
        for path, more, field in fields:
            response = await client.post(path, json={**question(path), "stream": False, **more})
            error = (await response.json())["error"]
            message = error if isinstance(error, str) else error["message"]
            assert response.status == 400 and message.startswith(f"{field} cannot be used: "), (path, message)
            assert "uniqueItems" in message and "x-strict" in message, message
            assert not any(word in message for word in ("structural_tag", "%json", "part_", "json_schema has"))
        for choice in ("auto", "required"):
            odd = [tool("f", ODD), tool("g", CITY, strict=True)]
            await ask(client, tools=odd, tool_choice=choice, max_tokens=5)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"tools": [{"name": "a b", "input_schema": CITY}]}),
        ("/v1/responses", {"tools": [{"type": "function", "name": "a b"}]}),
    ],
)
async def test_a_tools_name_that_cannot_be_is_refused_as_the_client_spelled_it(
    client: Client, path: str, body: dict[str, Any]
) -> None:
    response = await client.post(path, json={**question(path), **body})
    assert response.status == 400
    assert (await response.json())["error"]["message"].startswith("tools[0].name must be 1 to 128 letters")


@pytest.mark.parametrize(
    ("path", "offered", "name"),
    [
        ("/v1/messages", lambda name, schema: {"name": name, "input_schema": schema}, "input_schema"),
        ("/v1/responses", lambda name, schema: {"type": "function", "name": name, "parameters": schema}, "parameters"),
        (
            "/v1/chat/completions",
            lambda name, schema: {"type": "function", "function": {"name": name, "parameters": schema}},
            "function.parameters",
        ),
    ],
)
async def test_what_is_wrong_within_a_tools_schema_is_named_as_the_client_spelled_it(
    client: Client, path: str, offered: Callable[[str, Any], Any], name: str
) -> None:
    for schema, field in (({"type": "string"}, ".type"), ({"properties": []}, ".properties"), (5, "")):
        tools = [offered("a", CITY), offered("b", schema)]
        response = await client.post(path, json={**question(path), "tools": tools})
        assert response.status == 400
        assert (await response.json())["error"]["message"].startswith(f"tools[1].{name}{field} must be ")


async def test_a_schema_and_tools_together_mean_json_or_a_call(client: Client, engine: FakeEngine) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY}}
    await ask(client, tools=TOOLS, response_format=schema)
    assert engine.requests[0].sampling_params.json_schema is None
    answer, calls = tag_of(engine)["format"]["elements"][1]["elements"]
    assert answer["json_schema"] == CITY
    assert calls["type"] == "tags_with_separator"


FORMAT = {"type": "json_schema", "name": "x", "schema": CITY}
FUNCTION = {"type": "function", **TOOLS[0]["function"]}
DESCRIBED = {"name": "weather", "input_schema": CITY}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/chat/completions",
            {"tools": TOOLS, "tool_choice": "required", "response_format": {**FORMAT, "json_schema": FORMAT}},
        ),
        (
            "/v1/chat/completions",
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
        ),
        ("/v1/responses", {"tools": [FUNCTION], "tool_choice": "required", "text": {"format": FORMAT}}),
        (
            "/v1/messages",
            {
                "tools": [DESCRIBED],
                "tool_choice": {"type": "any"},
                "output_config": {"format": FORMAT},
            },
        ),
    ],
)
async def test_a_form_of_the_texts_does_not_forbid_a_forced_call(
    client: Client, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    response = await client.post(path, json={**question(path), **body})
    assert response.status == 200, await response.text()
    assert engine.requests[0].sampling_params.json_schema is None
    assert tag_of(engine)["format"]["elements"][1]["type"] == "tags_with_separator"


async def test_a_form_of_the_whole_answer_forbids_a_forced_call_by_name(client: Client) -> None:
    body = {"messages": USER, "tools": TOOLS, "tool_choice": "required", "guided_regex": "a+"}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status == 400
    assert "guided_regex wants another form" in (await response.json())["error"]["message"]


# ---- history, and the small routes ----


async def test_calls_and_results_of_earlier_turns_reach_the_template(
    client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def render_chat(messages: Any, **_: Any) -> str:
        seen.extend(messages)
        return "x"

    monkeypatch.setattr(engine.tokenizer, "render_chat", render_chat)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    history = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "Hm"},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    await ask(client, messages=history, tools=TOOLS)
    assert seen[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Ulm"}
    assert seen[1]["reasoning_content"] == seen[1]["thinking"] == "Hm"
    await ask(client, messages=[*USER, {"role": "assistant", "content": "Yes.", "reasoning": "Hm"}, *USER])
    assert "thinking" not in seen[-2]
    assert seen[2] == {"role": "tool", "tool_call_id": "c1", "content": "sunny"}


async def test_a_prompt_can_be_looked_at(client: Client) -> None:
    response = await client.post("/v1/chat/completions/render", json={"messages": USER})
    assert await response.json() == {
        "prompt": "[user]Hi[assistant]",
        "prompt_token_ids": list(b"[user]Hi[assistant]"),
    }


async def test_texts_can_be_parsed(client: Client) -> None:
    body = {"text": f"Well.{CALL}", "tools": TOOLS, "tool_call_parser": "qwen25"}
    answer = await (await client.post("/parse_function_call", json=body)).json()
    assert answer["normal_text"] == "Well."
    assert answer["calls"] == [{"tool_index": 0, "name": "weather", "parameters": '{"city": "Ulm"}'}]
    body = {"text": "Hm</think>Two", "reasoning_parser": "deepseek-r1"}
    answer = await (await client.post("/separate_reasoning", json=body)).json()
    assert answer == {"reasoning_text": "Hm", "text": "Two"}
    for path in ("/parse_function_call", "/separate_reasoning"):
        response = await client.post(path, json={"text": "", "tool_call_parser": "x", "reasoning_parser": "x"})
        assert response.status == 400


BAD_BODIES: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{}]}, "tools[0].function"),
    ({"tools": ["x"]}, "tools[0]"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
    ({"tools": [tool("")]}, "tools[0].function.name"),
    ({"tools": [tool("a b")]}, "tools[0].function.name"),
    ({"tools": [tool("a"), tool("a")]}, "tools[1].function.name"),
    ({"tools": [{"function": {"name": "a", "parameters": "x"}}]}, "tools[0].function.parameters"),
    ({"tools": [tool("a", {"type": "string"})]}, "tools[0].function.parameters.type"),
    ({"tools": [tool("a", {"properties": []})]}, "tools[0].function.parameters.properties"),
    ({"tools": [tool("a", {"required": 5})]}, "tools[0].function.parameters.required"),
    ({"tools": [tool("a", strict=1)]}, "tools[0].function.strict"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": 5}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tools": TOOLS, "tool_choice": {"function": {"name": "x"}}}, "tool_choice.function.name"),
    ({"tools": TOOLS, "tool_choice": "required", "regex": "a"}, "tool_choice"),
    ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"reasoning_effort": 2}, "reasoning_effort"),
    ({"max_thinking_tokens": -1}, "max_thinking_tokens"),
    ({"separate_reasoning": "x"}, "separate_reasoning"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": 5}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
]


@pytest.mark.parametrize(("body", "param"), BAD_BODIES)
async def test_a_bad_body_is_a_400_that_names_the_field(client: Client, body: Any, param: str) -> None:
    response = await client.post("/v1/chat/completions", json={"messages": USER, **body})
    error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, param), error
