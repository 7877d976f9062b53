"""Tools of OpenAI's Responses API, as the functions that a model is offered, and their calls as the API has them.

Codex sends tools of many kinds. Those that the client runs become functions or custom tools of chat.completions; those
that only OpenAI runs are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.declared import convert
from server.parsers.tool_calls import object_of
from server.reading.custom_tools import input_of
from server.reading.left_out import TOOL, LeftOut
from server.reading.protocol import JSON
from server.reading.responses_body import Environment, NamedTool, ResponsesTool, ResponsesToolChoice

FUNCTION, CUSTOM = "function", "custom"
NAMES_OF_FUNCTION = {
    "function.name": "name", "function.description": "description", "function.parameters": "parameters",
    "function.strict": "strict",
}  # fmt: skip
NAMES_OF_CUSTOM = {
    "custom.name": "name", "custom.description": "description", "custom.format.type": "format.type",
    "custom.format.grammar.syntax": "format.syntax", "custom.format.grammar.definition": "format.definition",
}  # fmt: skip
"""Fields of a tool in chat.completions, and what this API calls them."""


@dataclass(frozen=True, slots=True)
class KnownTool:
    """A tool without a name that the client runs: how the model is to call it."""

    description: str
    properties: JSON
    required: tuple[str, ...]
    field: str  # of a call's item, which holds the arguments
    prefix: str  # of the item's id
    fixed: JSON  # beside the arguments in that field

    def function(self, name: str) -> JSON:
        parameters = {
            "type": "object",
            "properties": self.properties,
            "required": list(self.required),
            "additionalProperties": False,
        }
        return {"name": name, "description": self.description, "parameters": parameters, "strict": True}


TEXTS: JSON = {"type": "array", "items": {"type": "string"}}
TIMEOUT: JSON = {"type": "integer", "minimum": 0, "description": "milliseconds after which it is ended"}
KNOWN_TOOLS = {
    "local_shell": KnownTool(
        "Run a program on the user's machine and see what it writes.",
        {
            "command": {**TEXTS, "description": "the program and its arguments"},
            "working_directory": {"type": "string"},
            "timeout_ms": TIMEOUT,
        },
        ("command",), "action", "lsh", {"type": "exec", "env": {}},
    ),
    "shell": KnownTool(
        "Run commands in a shell on the user's machine and see what they write.",
        {
            "commands": {**TEXTS, "description": "lines for the shell, each run by itself"},
            "timeout_ms": TIMEOUT,
            "max_output_length": {"type": "integer", "minimum": 0, "description": "characters to see of the output"},
        },
        ("commands",), "action", "sh", {},
    ),
    "apply_patch": KnownTool(
        "Create, change or delete one file. The diff has a line for each line of the file that matters: '+' before one "
        "that is added, '-' before one that goes, a space before one that stays, '@@' between places.",
        {
            "type": {"enum": ["create_file", "update_file", "delete_file"]},
            "path": {"type": "string"},
            "diff": {"type": "string", "description": "none where a file is deleted"},
        },
        ("type", "path"), "operation", "ap", {},
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """A tool as the client knows it, behind a function that the model sees."""

    kind: str  # FUNCTION, CUSTOM or one of KNOWN_TOOLS
    name: str
    namespace: str = ""

    @property
    def prefix(self) -> str:
        """Return what the ids of its calls begin with."""
        return {FUNCTION: "fc", CUSTOM: "ctc"}.get(self.kind) or KNOWN_TOOLS[self.kind].prefix

    def call(self, call_id: str, arguments: str) -> JSON:
        """Return the item of a call, without its id. arguments: JSON text; empty where the call begins."""
        if self.kind == CUSTOM:
            given = input_of(arguments) if arguments else ""
            return {"type": "custom_tool_call", "call_id": call_id, "name": self.name, "input": given}
        if known := KNOWN_TOOLS.get(self.kind):
            action = {**known.fixed, **(object_of(arguments) if arguments else {})}
            return {"type": f"{self.kind}_call", "call_id": call_id, known.field: action}
        call = {"type": "function_call", "call_id": call_id, "name": self.name, "arguments": arguments}
        return {**call, "namespace": self.namespace} if self.namespace else call


class Tools:
    """The functions that the model is offered, and whose tools they are."""

    def __init__(self, given: list[JSON], left_out: LeftOut, items: Sequence[JSON] = ()) -> None:
        """Read the body's `tools`, and those in `items` of its input. What cannot be run here goes to `left_out`."""
        self.functions: list[JSON] = []  # as chat.completions has them, custom tools among them
        self.offered: dict[str, OfferedTool] = {}  # by the function's name
        self.names: dict[str, str] = {}  # fields of `functions` to the client's, where these are not in the same place
        self._left_out, self._may_replace = left_out, False
        self._add(given, "", "tools")
        self._may_replace = True
        for i, item in enumerate(items):
            if item.get("type") == "additional_tools":
                self._add(item.get("tools"), "", f"input[{i}].tools")

    def _add(self, given: Any, namespace: str, path: str) -> None:
        for i, tool in enumerate(convert(given, list[ResponsesTool], path)):
            self._add_tool(tool, namespace, f"{path}[{i}]")

    def _add_tool(self, tool: ResponsesTool, namespace: str, path: str) -> None:
        kind = tool.type
        if kind == "namespace":
            self._add(tool.tools or [], tool.name or "", f"{path}.tools")
        elif kind in KNOWN_TOOLS and kind not in self.offered and _is_clients(tool):
            function = {"type": FUNCTION, FUNCTION: KNOWN_TOOLS[kind].function(kind)}
            self._offer(function, OfferedTool(kind, kind), path, {})
        elif kind in (FUNCTION, CUSTOM):
            if tool.name is None:
                raise tool.wrong("name", "a string", path)
            read = _function(tool) if kind == FUNCTION else _custom(tool, path)
            function = {"type": kind, kind: {**read, "name": function_name(tool.name, namespace)}}
            names = NAMES_OF_FUNCTION if kind == FUNCTION else NAMES_OF_CUSTOM
            self._offer(function, OfferedTool(kind, tool.name, namespace), path, names)
        else:
            self._left_out.add(TOOL, kind)

    def _offer(self, function: JSON, tool: OfferedTool, path: str, names: dict[str, str]) -> None:
        name = function[function["type"]]["name"]
        index = len(self.functions)
        if self._may_replace and name in self.offered:
            index = list(self.offered).index(name)
        place = f"tools[{index}]"
        if place != path or names is not NAMES_OF_FUNCTION:
            self.names |= {f"{place}.{ours}": f"{path}.{theirs}" for ours, theirs in names.items()}
        self.offered[name] = tool
        self.functions[index : index + 1] = [function]


def function_name(name: str, namespace: str | None) -> str:
    """Return the name by which the model knows a tool of a namespace."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


def read_choice(given: str | JSON) -> Any:
    """Return a `tool_choice` as chat.completions has it."""
    if isinstance(given, str):
        return given
    choice = convert(given, ResponsesToolChoice, "tool_choice")
    if choice.type == "allowed_tools":
        tools = [_named(tool) for tool in choice.tools if tool.type in (FUNCTION, CUSTOM, *KNOWN_TOOLS)]
        return {"type": choice.type, "allowed_tools": {"mode": choice.mode, "tools": tools}}
    if not choice.name and choice.type not in KNOWN_TOOLS:
        raise choice.wrong("name", "a non-empty string", "tool_choice")
    return _named(choice)


def _named(choice: ResponsesToolChoice | NamedTool) -> JSON:
    return {"type": FUNCTION, FUNCTION: {"name": function_name(choice.name or choice.type, choice.namespace)}}


def _is_clients(tool: ResponsesTool) -> bool:
    """Return whether the client runs the tool, and not a container of the provider."""
    where = tool.environment
    return where is None or (isinstance(where, Environment) and where.type == "local")


def _function(tool: ResponsesTool) -> JSON:
    return tool.given(("description", "parameters", "strict"))


def _custom(tool: ResponsesTool, path: str) -> JSON:
    custom = tool.given(("description",))
    format_ = tool.format
    if format_ is not None and format_.type == "grammar":
        if format_.definition is None:
            raise format_.wrong("definition", "a string", f"{path}.format")
        custom["format"] = {"type": "grammar", "grammar": format_.given(("syntax", "definition"))}
    return custom
