"""Answers into reasoning, text and calls: every format, whole and in pieces."""

import json
import random
import time
from typing import Any

import pytest

from server.parsers import AnswerDelta, AnswerParser, ToolCallDelta
from server.parsers.reasoning import REASONING_FORMATS, ReasoningParser, find_reasoning_format
from server.parsers.tool_calls import TOOL_FORMATS, Tool, ToolCallParser, find_tool_format

WEATHER = Tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "detail": {"type": "object"},
            "unit": {"enum": ["C", "F"]},
        },
    },
)
CLOCK = Tool("get_time", {"type": "object", "properties": {"zone": {"type": "string"}}})
TOOLS = (WEATHER, CLOCK)
Result = tuple[str, str, list[tuple[str, Any]]]  # reasoning, text, (name, arguments) of each call


def new_parser(tools: str | None = None, reasoning: str | None = None, *, is_inside: bool = False) -> AnswerParser:
    return AnswerParser(
        REASONING_FORMATS[reasoning].new_parser(is_inside=is_inside) if reasoning else None,
        ToolCallParser(TOOL_FORMATS[tools](), TOOLS) if tools else None,
    )


def read(parser: AnswerParser, pieces: list[str]) -> Result:
    """Return what a client makes of the deltas, which must come in order: a call's id and name first, and once."""
    deltas = [*map(parser.push, pieces), parser.finish()]
    calls: list[ToolCallDelta] = []
    for call in (call for delta in deltas for call in delta.tool_calls):
        if call.index == len(calls):
            assert call.id and call.name
            calls.append(ToolCallDelta(call.index, call.id, call.name, ""))
        else:
            assert call.index == len(calls) - 1
            assert call.id is call.name is None
        calls[-1].arguments += call.arguments
    assert len({call.id for call in calls}) == len(calls) == parser.num_tool_calls
    return (
        "".join(delta.reasoning for delta in deltas),
        "".join(delta.text for delta in deltas),
        [(str(call.name), json.loads(call.arguments)) for call in calls],
    )


NASTY = {"city": 'Zü"rich} \\ {[</tool_call>ℝ🌧', "days": 3, "detail": {"a": [{"b": "}]"}], "c": None}}
CALLS: list[tuple[str, dict[str, Any]]] = [("get_weather", NASTY), ("get_time", {"zone": "UTC"})]


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def json_call(name: str, arguments: Any, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {dump(arguments)}}}'


def deepseek(name: str, arguments: Any) -> str:
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{dump(arguments)}\n```<｜tool▁call▁end｜>"


def glm(name: str, arguments: dict[str, Any]) -> str:
    pairs = [
        f"<arg_key>{key}</arg_key>\n<arg_value>{value if isinstance(value, str) else dump(value)}</arg_value>\n"
        for key, value in arguments.items()
    ]
    return f"<tool_call>{name}\n{''.join(pairs)}</tool_call>"


def qwen_coder(name: str, arguments: dict[str, Any]) -> str:
    pairs = [
        f"<parameter={key}>\n{value if isinstance(value, str) else dump(value)}\n</parameter>\n"
        for key, value in arguments.items()
    ]
    return f"<tool_call>\n<function={name}>\n{''.join(pairs)}</function>\n</tool_call>"


def minimax(name: str, arguments: dict[str, Any]) -> str:
    pairs = [
        f'<parameter name="{key}">{value if isinstance(value, str) else dump(value)}</parameter>\n'
        for key, value in arguments.items()
    ]
    return f'<invoke name="{name}">\n{"".join(pairs)}</invoke>\n'


def python_call(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


ANSWERS = {
    "qwen25": "\n".join(f"<tool_call>\n{json_call(*call)}\n</tool_call>" for call in CALLS),
    "llama3": "; ".join(json_call(*call, key="parameters") for call in CALLS),
    "llama3 with its tag": "<|python_tag|>" + ";".join(json_call(*call, key="parameters") for call in CALLS),
    "mistral": f"[TOOL_CALLS] [{', '.join(json_call(*call) for call in CALLS)}]",
    "mistral_v11": "".join(f"[TOOL_CALLS]{name}[ARGS]{dump(arguments)}" for name, arguments in CALLS),
    "mistral with ids": "".join(f"[TOOL_CALLS]{name}[CALL_ID]abc123xyz[ARGS]{dump(given)}" for name, given in CALLS),
    "deepseekv3": f"<｜tool▁calls▁begin｜>{chr(10).join(deepseek(*call) for call in CALLS)}<｜tool▁calls▁end｜>",
    "deepseekv31": "<｜tool▁calls▁begin｜>"
    + "".join(f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{dump(given)}<｜tool▁call▁end｜>" for name, given in CALLS)
    + "<｜tool▁calls▁end｜>",
    "kimi_k2": "<|tool_calls_section_begin|>"
    + "".join(
        f"<|tool_call_begin|>functions.{name}:{i}<|tool_call_argument_begin|>{dump(given)}<|tool_call_end|>"
        for i, (name, given) in enumerate(CALLS)
    )
    + "<|tool_calls_section_end|>",
    "pythonic": f"[{', '.join(python_call(*call) for call in CALLS)}]",
    "pythonic with marks": f"<|python_start|>[{', '.join(python_call(*call) for call in CALLS)}]<|python_end|>",
    "glm45": "\n".join(glm(*call) for call in CALLS),
    "gpt-oss": "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{dump(given)}<|call|>"
        for name, given in CALLS
    ),
    "gpt-oss with recipients first": "".join(
        f"<|start|>assistant to=functions.{name}<|channel|>commentary json<|message|>{dump(given)}<|call|>"
        for name, given in CALLS
    ),
    "qwen3_coder": "\n".join(qwen_coder(*call) for call in CALLS),
    "seed_oss": "\n".join(
        qwen_coder(*call).replace("<tool_call>", "<seed:tool_call>", 1)[: -len("</tool_call>")] + "</seed:tool_call>"
        for call in CALLS
    ),
    "minimax-m2": f"<minimax:tool_call>\n{''.join(minimax(*call) for call in CALLS)}</minimax:tool_call>",
    "minimax-m2 one by one": "\n".join(f"<minimax:tool_call>\n{minimax(*call)}</minimax:tool_call>" for call in CALLS),
    "hunyuan": f"<tool_calls>[\n{', '.join(json_call(*call) for call in CALLS)}\n]</tool_calls>",
    "granite": f"<|tool_call|>[{', '.join(json_call(*call) for call in CALLS)}]",
    "granite of Phi": f"<|tool_call|>[{', '.join(json_call(*call) for call in CALLS)}]<|/tool_call|>",
}


def format_of(case: str) -> str:
    return case.partition(" ")[0]


@pytest.mark.parametrize("case", ANSWERS)
def test_two_calls_are_read_alike_whole_and_split_anywhere(case: str) -> None:
    answer = ANSWERS[case]
    expected = ("", "", CALLS)
    assert read(new_parser(format_of(case)), [answer]) == expected
    assert read(new_parser(format_of(case)), list(answer)) == expected
    for i in range(len(answer)):
        assert read(new_parser(format_of(case)), [answer[:i], answer[i:]]) == expected, i


@pytest.mark.parametrize("case", [case for case in ANSWERS if case not in ("llama3", "pythonic")])
def test_text_before_and_after_calls_stays_text(case: str) -> None:
    answer = f"Let me look. < [ {{ \n{ANSWERS[case]}\n"
    for pieces in ([answer], list(answer)):
        assert read(new_parser(format_of(case)), pieces) == ("", "Let me look. < [ {", CALLS)
    _, text, calls = read(new_parser(format_of(case)), list(ANSWERS[case] + "\nDone: 2 < 3.\n"))
    assert (text.strip(), calls) == ("Done: 2 < 3.", CALLS)


@pytest.mark.parametrize("case", ANSWERS)
@pytest.mark.parametrize("thinks", [True, False], ids=["start mark", "prompt"])
def test_reasoning_then_calls(case: str, thinks: bool) -> None:
    answer = ("<think>" if thinks else "") + f"\nA <tool_call> or not?\n\n</think>\n\n{ANSWERS[case]}"
    for pieces in ([answer], list(answer)):
        parser = new_parser(format_of(case), "qwen3", is_inside=not thinks)
        assert read(parser, pieces) == ("A <tool_call> or not?", "", CALLS)


@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_cut_off_anywhere_loses_nothing(case: str) -> None:
    answer = ANSWERS[case]
    whole = new_parser(format_of(case)).parse(answer)
    for i in range(len(answer)):
        delta = new_parser(format_of(case)).parse(answer[:i])
        if not delta.tool_calls:
            assert delta.text == answer[:i]
        for call, full in zip(delta.tool_calls, whole.tool_calls, strict=False):
            assert call.name == full.name
            if format_of(case) not in (
                "glm45",
                "minimax-m2",
                "qwen3_coder",
                "seed_oss",
            ):  # half an end mark is part of their values
                assert full.arguments.startswith(call.arguments)


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_malformed_calls_are_text(name: str) -> None:
    format_ = TOOL_FORMATS[name]()
    rng = random.Random(0)
    words = [
        *format_.begins,
        format_.bare,
        "{",
        "[",
        "(",
        ":",
        ",",
        '"name"',
        '"get_time"',
        "get_time",
        "</x>",
        "\n",
        " ",
    ]
    for _ in range(300):
        text = "x" + "".join(rng.choices(words, k=rng.randint(1, 12)))
        whole = new_parser(name).parse(text)
        assert whole.tool_calls or whole.text == text
        parser = new_parser(name)
        assert "".join(parser.push(char).text for char in text) + parser.finish().text == whole.text
        assert parser.num_tool_calls == len(whole.tool_calls)


UNKNOWN = {
    "qwen25": '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
    "llama3": '{"name": "rm", "parameters": {}}',
    "mistral": '[TOOL_CALLS] [{"name": "rm", "arguments": {}}]',
    "deepseekv31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>rm<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
    "pythonic": "[rm(a=1)]",
    "glm45": "<tool_call>rm\n</tool_call>",
    "gpt-oss": "<|channel|>commentary to=functions.rm <|constrain|>json<|message|>{}<|call|>",
    "qwen3_coder": "<tool_call>\n<function=rm>\n</function>\n</tool_call>",
    "minimax-m2": '<minimax:tool_call>\n<invoke name="rm">\n</invoke>\n</minimax:tool_call>',
    "granite": '<|tool_call|>[{"name": "rm", "arguments": {}}]',
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_call_of_an_unknown_function_is_text(name: str) -> None:
    assert read(new_parser(name), list(UNKNOWN[name])) == ("", UNKNOWN[name], [])


@pytest.mark.parametrize(
    ("answer", "arguments"),
    [
        ('<tool_call>{"arguments": {"zone": "a"}, "name": "get_time"}</tool_call>', {"zone": "a"}),
        ('<tool_call>{"name": "get_time", "arguments": "{\\"zone\\": \\"a\\"}"}</tool_call>', {"zone": "a"}),
        ('<tool_call>{"name": "get_time", "arguments": null}</tool_call>', {}),
        ('<tool_call>{"name": "get_time"}</tool_call>', {}),
        ('<tool_call>{"name": "get_time", "arguments": {"zone": "a"}</tool_call>', {"zone": "a"}),
        ('<tool_call>{"name": "get_time", "arguments": {"zone": "a"}}}</tool_call>', {"zone": "a"}),
        ('<tool_call>{"id": 1, "name": "get_time", "arguments": {"zone": "a"}}', {"zone": "a"}),
    ],
    ids=["name last", "as a string", "null", "none", "a brace short", "a brace too many", "no end mark"],
)
def test_small_mistakes_in_json_calls_are_forgiven(answer: str, arguments: Any) -> None:
    for pieces in ([answer], list(answer)):
        assert read(new_parser("qwen25"), pieces) == ("", "", [("get_time", arguments)])


def test_a_json_answer_that_is_no_call_streams_at_once() -> None:
    parser = new_parser("llama3")
    assert parser.push('{"story": "Once').text == '{"story": "Once'
    assert parser.push(" upon").text == " upon"


def test_arguments_stream_as_they_come() -> None:
    parser = new_parser("qwen25")
    assert not parser.push('<tool_call>{"name": "get_time", "arguments": ').tool_calls
    (first,) = parser.push('{"zone": "Eu').tool_calls
    assert (first.name, first.arguments) == ("get_time", '{"zone": "Eu')
    (second,) = parser.push("rope").tool_calls
    assert second == ToolCallDelta(0, None, None, "rope")

    parser = new_parser("qwen3_coder")
    (first,) = parser.push("<tool_call><function=get_time><parameter=zone>\nEu\n").tool_calls
    assert (first.name, first.arguments) == ("get_time", '{"zone": "Eu')
    (second,) = parser.push("rope").tool_calls
    assert second.arguments == "\\nrope"


def test_xml_values_are_read_by_their_schema() -> None:
    answer = glm("get_weather", {"city": "12", "days": "12", "unit": "C", "detail": '{"a": True', "other": "null"})
    _, _, ((_, arguments),) = read(new_parser("glm45"), [answer])
    assert arguments == {"city": "12", "days": 12, "unit": "C", "detail": '{"a": True', "other": None}


def test_python_literals_become_json() -> None:
    answer = "[get_weather(city='a\\'b', days=-3, detail={'x': (True, none, null, 1.5)})]".replace("none", "None")
    _, _, ((_, arguments),) = read(new_parser("pythonic"), [answer])
    assert arguments == {"city": "a'b", "days": -3, "detail": {"x": [True, None, None, 1.5]}}


@pytest.mark.parametrize(
    "call", ["__import__('os')", "'Berlin'", "days=1+x", "days=10**9", "**{'a': 1}", "city=f'{1}'"]
)
def test_python_that_is_no_literal_is_text(call: str) -> None:
    answer = f"[get_weather({call})]"
    assert read(new_parser("pythonic"), [answer]) == ("", answer, [])


def test_calls_beyond_the_allowed_number_are_left_out() -> None:
    for name in ("qwen25", "llama3", "mistral", "qwen3_coder"):
        parser = AnswerParser(None, ToolCallParser(TOOL_FORMATS[name](), TOOLS, max_calls=1))
        assert read(parser, list(ANSWERS[name])) == ("", "", CALLS[:1])


def test_ids_have_the_shape_that_templates_want() -> None:
    (mistral, _) = new_parser("mistral").parse(ANSWERS["mistral"]).tool_calls
    assert mistral.id is not None
    assert len(mistral.id) == 9
    kimi = new_parser("kimi_k2").parse(ANSWERS["kimi_k2"]).tool_calls
    assert [call.id for call in kimi] == ["functions.get_weather:0", "functions.get_time:1"]


# ---- reasoning ----


@pytest.mark.parametrize("name", REASONING_FORMATS)
def test_reasoning_is_split_alike_whole_and_split_anywhere(name: str) -> None:
    format_ = REASONING_FORMATS[name]
    answer = f"{format_.start}\nWhy < 3?\n\nSo.\n{format_.end}\n\nBecause.\n"
    expected: Result = ("Why < 3?\n\nSo.", "Because.\n", [])
    for i in range(len(answer)):
        assert read(new_parser(reasoning=name), [answer[:i], answer[i:]]) == expected
    assert read(new_parser(reasoning=name), list(answer)) == expected
    inside = answer.removeprefix(format_.start)
    assert read(new_parser(reasoning=name, is_inside=True), list(inside)) == expected


ANSWER = "<answer>\nIt is <b>2</b>.\n\nYes </answer, or so.\n</answer>"


@pytest.mark.parametrize(
    ("answer", "is_inside", "thought"),
    [
        (f"<think>\nWell.\n</think>\n{ANSWER}", False, "Well."),
        (f"\nWell.\n</think>\n{ANSWER}\n", True, "Well."),
        (f"<think>\n\n</think>\n{ANSWER}", False, ""),
        (ANSWER, False, ""),  # the prompt has closed the reasoning
    ],
)
def test_the_marks_around_hunyuans_text_are_left_out(answer: str, is_inside: bool, thought: str) -> None:
    expected: Result = (thought, "It is <b>2</b>.\n\nYes </answer, or so.", [])
    for pieces in ([answer], list(answer), answer.partition("</ans")):
        assert read(new_parser(reasoning="hunyuan", is_inside=is_inside), [*pieces]) == expected
    assert REASONING_FORMATS["hunyuan"].begins_inside("<think>\n\n</think>\n") is False


def test_hunyuans_text_is_whole_without_marks_or_with_the_first_alone_and_may_hold_calls() -> None:
    for text in (" a <answer> b </answer>", "\n a", "<answe"):
        assert read(new_parser(reasoning="hunyuan"), list(text)) == ("", text, [])
    assert read(new_parser(reasoning="hunyuan"), list("<answer>\nIt is")) == ("", "It is", [])
    calls = f"<think>\nA call.\n</think>\n<answer>\n{ANSWERS['hunyuan']}\n</answer>"
    assert read(new_parser("hunyuan", "hunyuan"), list(calls)) == ("A call.", "", CALLS)
    reasoning = REASONING_FORMATS["hunyuan"].new_parser(is_inside=False, is_separate=False)
    assert AnswerParser(reasoning, None).parse("<think>a</think><answer>b</answer>").text.endswith("<answer>b</answer>")


def test_an_answer_without_reasoning_is_text_as_it_stands() -> None:
    for answer in ("", "\n", " <b>2 < 3</b>", "\n<thin>"):
        assert read(new_parser(reasoning="qwen3"), list(answer)) == ("", answer, [])


def test_reasoning_cut_off_is_reasoning() -> None:
    assert read(new_parser(reasoning="qwen3", is_inside=True), list("Well, 2 </thi")) == ("Well, 2 </thi", "", [])


def test_reasoning_may_come_in_one_piece() -> None:
    parser = AnswerParser(ReasoningParser(REASONING_FORMATS["qwen3"], is_inside=True), None, streams_reasoning=False)
    assert parser.push("Well, ") == AnswerDelta()
    assert parser.push("yes.</think>Y") == AnswerDelta("Well, yes.", "Y")


def test_reasoning_that_is_not_wanted_apart_hides_its_marks_from_no_one() -> None:
    answer = f"<think>a <tool_call> b</think>\nSo:{ANSWERS['qwen25']}"
    for pieces in ([answer], list(answer)):
        reasoning = ReasoningParser(REASONING_FORMATS["qwen3"], is_inside=False, is_separate=False)
        parser = AnswerParser(reasoning, ToolCallParser(TOOL_FORMATS["qwen25"](), TOOLS))
        _, text, calls = read(parser, pieces)
        assert text.startswith("<think>a <tool_call> b</think>\nSo:")
        assert calls == CALLS


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("<assistant>", False), ("<assistant><think>\n", True), ("<assistant><think>\n\n</think>\n\n", None)],
)
def test_the_prompt_tells_whether_reasoning_has_begun(prompt: str, expected: bool | None) -> None:
    assert REASONING_FORMATS["qwen3"].begins_inside(prompt) is expected


HARMONY = (
    "<|channel|>analysis<|message|>Where < when?<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
    "<|start|>assistant<|channel|>analysis<|message|>Now the call.<|end|><|start|>assistant" + ANSWERS["gpt-oss"]
)


def test_an_answer_in_channels_is_reasoning_text_and_calls_whole_and_split_anywhere() -> None:
    expected: Result = ("Where < when?\nNow the call.", "I look.", CALLS)
    for i in range(len(HARMONY)):
        assert read(new_parser("gpt-oss", "gpt-oss"), [HARMONY[:i], HARMONY[i:]]) == expected, i
    assert read(new_parser("gpt-oss", "gpt-oss"), list(HARMONY)) == expected


@pytest.mark.parametrize("end", ["", "<|return|>", "<|end|>"])
def test_the_final_channel_is_the_text(end: str) -> None:
    answer = f"<|channel|>final<|message|> 2 < 3\n\n| a |{end}"
    thought = "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant"
    for pieces in ([answer], list(answer)):
        assert read(new_parser("gpt-oss", "gpt-oss"), pieces) == ("", " 2 < 3\n\n| a |", [])
        assert read(new_parser(None, "gpt-oss"), [thought, *pieces]) == ("Easy.", " 2 < 3\n\n| a |", [])


def test_text_of_the_final_channel_streams_as_it_comes() -> None:
    parser = new_parser("gpt-oss", "gpt-oss")
    assert parser.push("<|channel|>analysis<|message|>Hm, ").reasoning == "Hm,"
    assert parser.push("well<|end|><|start|>assistant<|channel|>final<|mess") == AnswerDelta(" well")
    assert parser.push("age|>Yes,").text == "Yes,"
    assert parser.push(" but").text == " but"


def test_a_header_in_which_an_answer_ends_is_no_text_and_a_long_one_is() -> None:
    assert read(new_parser("gpt-oss", "gpt-oss"), ["<|channel|>analysis<|message|>A<|end|><|start|>assi"])[1] == ""
    text = "<|channel|>" + 300 * "no header "
    for pieces in ([text], list(text)):
        assert read(new_parser(None, "gpt-oss"), pieces) == ("", text, [])


def test_analysis_that_is_not_wanted_apart_keeps_its_marks_and_calls_are_found() -> None:
    reasoning = REASONING_FORMATS["gpt-oss"].new_parser(is_inside=False, is_separate=False)
    parser = AnswerParser(reasoning, ToolCallParser(TOOL_FORMATS["gpt-oss"](), TOOLS))
    _, text, calls = read(parser, list(HARMONY))
    assert text.startswith("<|channel|>analysis<|message|>Where < when?<|end|>I look.")
    assert calls == CALLS


# ---- templates ----


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ('{{ \'<tool_call>\n{"name": "\' }} {% if enable_thinking %}<think>', "qwen25", "qwen3"),
        ("<tool_call>\n<function=example>\n<parameter=a>", "qwen3_coder", None),
        ("<tool_call>{name}\n<arg_key>k</arg_key><think></think>", "glm45", "qwen3"),
        ("[TOOL_CALLS] [", "mistral", None),
        ("[TOOL_CALLS]{{ name }}[ARGS] [THINK]", "mistral_v11", "mistral"),
        ("<｜tool▁calls▁begin｜>{{ name }}\n```json\n", "deepseekv3", None),
        ("<｜tool▁calls▁begin｜>{{ name }}<｜tool▁sep｜>", "deepseekv31", None),
        ("<|tool_calls_section_begin|>", "kimi_k2", None),
        ("<|start|>assistant to=functions.{{ name }}<|channel|>commentary json<|message|>", "gpt-oss", "gpt-oss"),
        ("<|python_start|>", "pythonic", None),
        ("{%- set begin = '<minimax:tool_call>' %}<invoke name=\"<think>", "minimax-m2", "qwen3"),
        ("{%- set begin = '<seed:tool_call>' %}<function=example><seed:think>", "seed_oss", "seed_oss"),
        ("<|extra_0|><tool_calls>[{{ call | tojson }}]</tool_calls><think>", "hunyuan", "hunyuan"),
        ("<｜hy_User｜><tool_calls>[{{ call | tojson }}]</tool_calls><think>", "hunyuan", "hunyuan"),
        ("<tool_calls>[{{ call | tojson }}]</tool_calls><think>", "hunyuan", "qwen3"),
        ("<|start_of_role|>assistant<|end_of_role|><|tool_call|>", "granite", None),
        ("{{ '<|' + message['role'] + '|>' }}<|tool|>{{ message['tools'] }}<|/tool|>", "granite", None),
        ("<|python_tag|>", "llama3", None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None, None),
    ],
)
def test_a_chat_template_shows_its_formats(template: str, tools: str | None, reasoning: str | None) -> None:
    assert (find_tool_format(template), find_reasoning_format(template)) == (tools, reasoning)


HOSTILE = (
    "<tool_call>", '<tool_call>{"name": ', '<tool_call>{"id": [', '<tool_call>{"arguments": {"',
    "[TOOL_CALLS]", "[TOOL_CALLS] [", "[TOOL_CALLS]x[ARGS]", '<|python_tag|>{"parameters": {', "<|python_start|>[f(",
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "<|tool_calls_section_begin|><|tool_call_begin|>",
    "<tool_call>get_time<arg_key>", "<tool_call>get_weather<arg_key>days</arg_key><arg_value>",
    "<|channel|>", "<|start|>", "<|channel|>commentary to=", "<|channel|>commentary to=functions.get_time<|message|>",
    "<function=", "<function=get_weather><parameter=days>", "<tool_calls>[", "<|tool_call|>[{",
    "<minimax:tool_call><invoke name=get_weather>",
    '<minimax:tool_call><invoke name="get_weather"><parameter name=days>',
)  # fmt: skip


@pytest.mark.parametrize("piece_len", [0, 700], ids=["whole", "in pieces"])
@pytest.mark.parametrize("format_", TOOL_FORMATS)
def test_the_time_to_read_a_hostile_answer_is_linear_in_its_length(format_: str, piece_len: int) -> None:
    start = time.process_time()
    for mark in HOSTILE:
        text = mark * (300_000 // len(mark))
        parser = new_parser(format_, "gpt-oss" if format_ == "gpt-oss" else None)
        for at in range(0, len(text), piece_len or len(text)):
            parser.push(text[at : at + (piece_len or len(text))])
        parser.finish()
    assert time.process_time() - start < 20  # usually 0.5; up to minutes when it was quadratic


def test_white_space_that_comes_piece_by_piece_costs_linear_time() -> None:
    parser = new_parser("qwen25", "qwen3", is_inside=True)
    start = time.process_time()
    for part in ("a", " ", "</think>b", " "):
        for _ in range(100_000 if part == " " else 1):
            parser.push(part)
    assert time.process_time() - start < 40  # usually 0.5; minutes when it was quadratic


@pytest.mark.parametrize(
    "between", ["{0}\n{1}", "{0}{1}", "{0}, {1}", "{0};{1}", "[{0}, {1}]", "[{0},{1}]\n", "{0}}}\n{1}"]
)
@pytest.mark.parametrize("piece_len", [1, 1000])
def test_one_mark_may_hold_several_calls(between: str, piece_len: int) -> None:
    calls = between.format(*(json_call(name, arguments) for name, arguments in CALLS))
    text = f"So: <tool_call>\n{calls}\n</tool_call> Done."
    pieces = [text[at : at + piece_len] for at in range(0, len(text), piece_len)]
    assert read(new_parser("qwen25"), pieces) == ("", "So: Done.", CALLS)


@pytest.mark.parametrize("rest", [', and {"more": 1}', '{"name": "unknown"}', "; done"])
def test_what_follows_a_call_inside_its_marks_and_is_none_stays_text(rest: str) -> None:
    text = "<tool_call>" + json_call(*CALLS[1]) + rest
    assert read(new_parser("qwen25"), [text]) == ("", rest, [CALLS[1]])


@pytest.mark.parametrize("piece_len", [1, 1000])
def test_the_first_lines_indentation_after_reasoning_is_kept(piece_len: int) -> None:
    text = "<think>Code.</think>\n\n    def f():\n        pass"
    pieces = [text[at : at + piece_len] for at in range(0, len(text), piece_len)]
    assert read(new_parser(reasoning="qwen3"), pieces) == ("Code.", "    def f():\n        pass", [])
    assert read(new_parser(reasoning="qwen3"), ["<think>Well.</think>\n\n   \n  "]) == ("Well.", "", [])
