"""The functions that a chat request offers, its rules for calling them, and the grammar that enforces these."""

import re
from dataclasses import dataclass, replace

from engine.declared import convert
from engine.errors import InvalidRequest
from server.parsers.tool_calls import Tool, ToolCallParser, ToolFormat, schema_format
from server.reading.custom_tools import INPUT_SCHEMA, lark_of, shown_function
from server.reading.openai_body import (
    AllowedTools,
    ChatFields,
    ChatTool,
    ChosenTool,
    CustomTool,
    ToolChoiceBody,
)
from server.reading.protocol import JSON

NAME = re.compile(r"[\w.:/-]{1,128}")
FUNCTION, CUSTOM = "function", "custom"  # kinds of tools
NO_PARAMETERS: JSON = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`callable`: the functions that may be called; none if the answer is to be text."""

    shown: list[JSON] | None  # to the template, as the client wrote them; custom tools as functions
    callable: list[Tool]
    is_forced: bool  # at least one call
    is_parallel: bool  # more than one call
    custom: frozenset[str] = frozenset()  # names of the custom tools among them

    def new_parser(self, format_: ToolFormat) -> ToolCallParser:
        max_calls = None if self.is_parallel else 1
        return ToolCallParser(format_, self.callable, max_calls, is_forced=self.is_forced)


def read_tool_choice(body: ChatFields) -> ToolChoice:
    """Read tools and choice. `InvalidRequest` names the tool, or the choice, that is wrong."""
    tools, shown, custom = read_tools(body.tools)
    choice = _read_choice(body, tools, shown)
    return replace(choice, custom=custom) if custom else choice


def read_tools(given: list[JSON]) -> tuple[dict[str, Tool], list[JSON], frozenset[str]]:
    """Return the tools by name, all of them as the template is shown them, and the names of the custom ones."""
    tools: dict[str, Tool] = {}
    if not given:
        return tools, [], frozenset()
    shown, custom = [], []
    for i, (written, read) in enumerate(zip(given, convert(given, list[ChatTool], "tools"), strict=True)):
        path = f"tools[{i}]"
        inner = read.function if read.type == FUNCTION else read.custom
        if inner is None:
            raise read.wrong(read.type, "an object", path)
        if not NAME.fullmatch(inner.name):
            raise inner.wrong("name", "1 to 128 letters, digits, or characters of _ . : / -", f"{path}.{read.type}")
        if inner.name in tools:
            field = f"{path}.{read.type}.name"
            raise InvalidRequest(f"{field}: tools has two functions named {inner.name!r}", field)
        if isinstance(inner, CustomTool):
            tools[inner.name] = _custom(inner, path)
            shown.append(shown_function(inner))
            custom.append(inner.name)
        else:
            parameters: JSON = written["function"].get("parameters") or NO_PARAMETERS
            field = f"{path}.function.parameters"
            tools[inner.name] = Tool(inner.name, {"type": "object", **parameters}, inner.strict, field)
            shown.append(written)
    return tools, shown, frozenset(custom)


def _custom(tool: CustomTool, path: str) -> Tool:
    format_ = tool.format
    if format_ is not None and format_.type == "grammar" and format_.grammar is None:
        raise format_.wrong("grammar", "an object with syntax and definition", f"{path}.custom.format")
    lark = lark_of(tool)
    field = f"{path}.custom.format.grammar.definition" if lark else ""
    return Tool(tool.name, INPUT_SCHEMA, bool(lark), field, lark)


def _read_choice(body: ChatFields, tools: dict[str, Tool], shown: list[JSON]) -> ToolChoice:
    choice, is_parallel = body.tool_choice or "auto", body.parallel_tool_calls
    if isinstance(choice, ToolChoiceBody):
        if choice.type == "allowed_tools":
            return _allowed_choice(choice.allowed_tools, shown, tools, is_parallel)
        name = _chosen_name(choice, "tool_choice")
        if name not in tools:
            raise InvalidRequest(
                f"tool_choice names {name!r}, which is not in tools", f"tool_choice.{choice.type}.name"
            )
        return ToolChoice(shown, [tools[name]], True, is_parallel=False)  # a choice of one function is of one call
    if choice == "required" and not tools:
        raise InvalidRequest('tool_choice "required" needs tools', "tool_choice")
    if choice == "none" or not tools:
        return ToolChoice(None, [], False, is_parallel)
    return ToolChoice(shown, list(tools.values()), choice == "required", is_parallel)


def _allowed_choice(
    allowed: AllowedTools | None, shown: list[JSON], tools: dict[str, Tool], is_parallel: bool
) -> ToolChoice:
    """Read a choice among some of `tools`. All are shown, so that the prompt's prefix stays as it is."""
    field = "tool_choice.allowed_tools"
    if allowed is None:
        raise InvalidRequest(f"{field} must be an object with a mode and tools, got None", field)
    names = {_chosen_name(tool, f"{field}.tools[{i}]") for i, tool in enumerate(allowed.tools)}
    if unknown := names - tools.keys():
        raise InvalidRequest(f"tool_choice names {min(unknown)!r}, which is not in tools", field)
    allowed_tools = [tool for name, tool in tools.items() if name in names]
    if not allowed_tools:
        return ToolChoice(None, [], False, is_parallel)
    return ToolChoice(shown, allowed_tools, allowed.mode == "required", is_parallel)


def _chosen_name(choice: ToolChoiceBody | ChosenTool, path: str) -> str:
    """Return the name of the tool that is chosen."""
    tool = choice.function if choice.type == FUNCTION else choice.custom
    if tool is None or not tool.name:
        raise choice.wrong(choice.type, 'an object with a "name"', path)
    return tool.name


def tool_constraint(choice: ToolChoice, format_: ToolFormat) -> JSON | None:
    """Return the structural tag, in xgrammar's shape, that keeps calls valid; None: nothing is to be enforced.

    Forced calls begin at once. Otherwise the text is free until a call begins, and held only if a function is strict.
    """
    tags = format_.tags(choice.callable)
    if choice.is_forced:
        return _calls(tags, choice, format_)
    if not tags or not any(tool.is_strict for tool in choice.callable):
        return None
    if format_.opening:  # free text would not hold its marks
        text: JSON = {"type": "tag", "begin": format_.opening, "content": {"type": "any_text"}, "end": ""}
        return {"type": "or", "elements": [text, _calls(tags, choice, format_)]}
    return _free_text(tags, choice, format_)


def behind(text: str, format_: JSON) -> JSON:
    """Return the grammar of `text`, then what `format_` says."""
    return {"type": "sequence", "elements": [{"type": "const_string", "value": text}, format_]} if text else format_


def json_or_calls(schema: JSON, choice: ToolChoice, format_: ToolFormat | None, opening: str = "") -> JSON:
    """Return the grammar of JSON of `schema`, behind `opening`, or, if the format can be enforced, of calls."""
    tags = format_.tags(choice.callable) if format_ else []
    answer = behind(opening, schema_format(schema))
    return {"type": "or", "elements": [answer, _calls(tags, choice, format_)]} if format_ and tags else answer


def _calls(tags: list[JSON], choice: ToolChoice, format_: ToolFormat) -> JSON:
    """Return the grammar of a call or, if they may be several, of calls with no text between them or after them."""
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": format_.between,
        "at_least_one": True,
        "stop_after_first": not choice.is_parallel,
    }


def _free_text(tags: list[JSON], choice: ToolChoice, format_: ToolFormat) -> JSON:
    return {
        "type": "triggered_tags",
        "triggers": [format_.trigger],
        "tags": tags,
        "stop_after_first": not choice.is_parallel,
    }


def structural_tag(format_: JSON, thinks_between: tuple[str, str] | None) -> JSON:
    """Return `format_` as a sampling parameter. `thinks_between`: marks of a reasoning that may come first."""
    if thinks_between is not None:
        start, end = thinks_between
        thought: JSON = {"type": "tag", "begin": start, "content": {"type": "any_text"}, "end": end}
        nothing: JSON = {"type": "const_string", "value": ""}
        format_ = {"type": "sequence", "elements": [{"type": "or", "elements": [thought, nothing]}, format_]}
    return {"type": "structural_tag", "format": format_}
