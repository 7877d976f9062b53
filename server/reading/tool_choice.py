"""The functions that a chat request offers, its rules for calling them, and the grammar that enforces these."""

import re
from dataclasses import dataclass, replace

from engine.errors import InvalidRequest
from server.parsers.tool_calls import Tool, ToolCallParser, ToolFormat, schema_format
from server.reading.custom_tools import INPUT_SCHEMA, lark_of, shown_function
from server.reading.protocol import JSON, Fields

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
        return ToolCallParser(format_, self.callable, None if self.is_parallel else 1)


def read_tool_choice(body: Fields) -> ToolChoice:
    """Read tools and choice. `InvalidRequest` names the tool, or the choice, that is wrong."""
    tools, shown, custom = _read_tools(body)
    choice = _read_choice(body, tools, shown)
    return replace(choice, custom=custom) if custom else choice


def _read_tools(body: Fields) -> tuple[dict[str, Tool], list[JSON], frozenset[str]]:
    """Return the tools by name, all of them as the template is shown them, and the names of the custom ones."""
    tools: dict[str, Tool] = {}
    shown, custom = [], []
    for i, given in enumerate(body.array("tools")):
        fields = Fields(given, f"tools[{i}]")
        kind = fields.one_of("type", (FUNCTION, CUSTOM), FUNCTION)
        inner = fields.object(kind)
        if inner is None:
            fields.fail(kind, "an object")
        tool = _read_function(inner, f"tools[{i}]") if kind == FUNCTION else _read_custom(inner, f"tools[{i}]")
        if tool.name in tools:
            raise InvalidRequest(f"tools has two functions named {tool.name!r}", f"tools[{i}].{kind}.name")
        tools[tool.name] = tool
        shown.append(given if kind == FUNCTION else shown_function(inner))
        if kind == CUSTOM:
            custom.append(tool.name)
    return tools, shown, frozenset(custom)


def _read_choice(body: Fields, tools: dict[str, Tool], shown: list[JSON]) -> ToolChoice:
    choice = body.get("tool_choice")
    is_parallel = body.flag("parallel_tool_calls", True)
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return _allowed_choice(Fields(choice, "tool_choice"), shown, tools, is_parallel)
    if isinstance(choice, dict):
        kind, name = _chosen_name(Fields(choice, "tool_choice"))
        if name not in tools:
            raise InvalidRequest(f"tool_choice names {name!r}, which is not in tools", f"tool_choice.{kind}.name")
        return ToolChoice(shown, [tools[name]], True, is_parallel)
    choice = body.one_of("tool_choice", ("auto", "none", "required"), "auto") if choice is not None else "auto"
    if choice == "required" and not tools:
        raise InvalidRequest('tool_choice "required" needs tools', "tool_choice")
    if choice == "none" or not tools:
        return ToolChoice(None, [], False, is_parallel)
    return ToolChoice(shown, list(tools.values()), choice == "required", is_parallel)


def _allowed_choice(choice: Fields, shown: list[JSON], tools: dict[str, Tool], is_parallel: bool) -> ToolChoice:
    """Read a choice among some of `tools`. All are shown, so that the prompt's prefix stays as it is."""
    allowed = choice.object("allowed_tools")
    if allowed is None:
        choice.fail("allowed_tools", "an object with a mode and tools")
    mode = allowed.one_of("mode", ("auto", "required"), "auto")
    names = {_chosen_name(tool)[1] for tool in allowed.objects("tools")}
    if unknown := names - tools.keys():
        raise InvalidRequest(f"tool_choice names {min(unknown)!r}, which is not in tools", "tool_choice.allowed_tools")
    allowed_tools = [tool for name, tool in tools.items() if name in names]
    if not allowed_tools:
        return ToolChoice(None, [], False, is_parallel)
    return ToolChoice(shown, allowed_tools, mode == "required", is_parallel)


def _read_function(function: Fields, path: str) -> Tool:
    name = _read_name(function)
    function.text("description")
    parameters = function.object("parameters") or Fields(NO_PARAMETERS, f"{path}.function.parameters")
    parameters.one_of("type", ("object",), "object")
    parameters.object("properties")
    parameters.strings("required")
    field = f"{path}.function.parameters"
    return Tool(name, {"type": "object", **parameters.values}, function.flag("strict"), field)


def _read_custom(custom: Fields, path: str) -> Tool:
    name, lark = _read_name(custom), lark_of(custom)
    return Tool(name, INPUT_SCHEMA, bool(lark), f"{path}.custom.format.grammar.definition" if lark else "", lark)


def _read_name(tool: Fields) -> str:
    name = tool.text("name")
    if not NAME.fullmatch(name):
        tool.fail("name", "1 to 128 letters, digits, or characters of _ . : / -")
    return name


def _chosen_name(choice: Fields) -> tuple[str, str]:
    """Return (kind, name) of the tool that is chosen."""
    kind = choice.one_of("type", (FUNCTION, CUSTOM), FUNCTION)
    tool = choice.object(kind)
    if tool is None or not tool.has("name"):
        choice.fail(kind, 'an object with a "name"')
    return kind, tool.text("name")


def tool_constraint(choice: ToolChoice, format_: ToolFormat) -> JSON | None:
    """Return the structural tag, in xgrammar's shape, that keeps calls valid; None: nothing is to be enforced.

    Forced calls begin at once. Otherwise the text is free until a call begins, and held only if a function is strict.
    """
    tags = format_.tags(choice.callable)
    if choice.is_forced:
        return _calls(tags, choice, format_)
    return _free_text(tags, choice, format_) if tags and any(tool.is_strict for tool in choice.callable) else None


def json_or_calls(schema: JSON, choice: ToolChoice, format_: ToolFormat | None) -> JSON:
    """Return the grammar of JSON of `schema` or, if the format can be enforced, of calls."""
    tags = format_.tags(choice.callable) if format_ else []
    answer = schema_format(schema)
    return {"type": "or", "elements": [answer, _calls(tags, choice, format_)]} if format_ and tags else answer


def _calls(tags: list[JSON], choice: ToolChoice, format_: ToolFormat) -> JSON:
    """Return the grammar of a call, at once, and if they may be several, text with more of them."""
    first: JSON = {"type": "or", "elements": tags}
    if not choice.is_parallel:
        return first
    return {"type": "sequence", "elements": [first, _free_text(tags, choice, format_)]}


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
