"""Bodies of OpenAI's Responses API as agents send them, made into those that this server can answer.

Codex sends tools of many kinds and the whole history in each request. Tools that the client runs become functions;
those that only OpenAI runs are left out. Items of the history become messages, calls and results, or a short text.
"""

from dataclasses import dataclass
from typing import Any

import orjson

from server.reading.left_out import CONTENT, HINT, TOOL, LeftOut
from server.reading.protocol import JSON, Fields

FUNCTION, CUSTOM = "function", "custom"
INPUT = "input"  # the one parameter of a custom tool's function
MAX_NAME = 128
CUSTOM_SCHEMA: JSON = {
    "type": "object",
    "properties": {INPUT: {"type": "string"}},
    "required": [INPUT],
    "additionalProperties": False,
}
HINTS = ("context_management",)
# Calls that the client ran, by the field that says what was called, and their results by the field that holds them.
CALLS = {
    "custom_tool_call": INPUT, "local_shell_call": "action", "shell_call": "action", "tool_search_call": "arguments",
    "apply_patch_call": "operation", "computer_call": "action",
}  # fmt: skip
OUTPUTS = {
    "custom_tool_call_output": "output", "local_shell_call_output": "output", "shell_call_output": "output",
    "tool_search_output": "tools", "apply_patch_call_output": "output", "computer_call_output": "output",
}  # fmt: skip
# Of the provider's own tools, and of conversations that it alone can read.
UNSEEN_ITEMS = frozenset((
    "web_search_call", "file_search_call", "image_generation_call", "code_interpreter_call", "mcp_list_tools",
    "mcp_approval_request", "mcp_approval_response", "mcp_call", "compaction", "compaction_summary",
    "context_compaction", "ghost_snapshot", "agent_message",
))  # fmt: skip
UNSEEN_PARTS = frozenset(("input_image", "input_file", "input_audio", "computer_screenshot"))


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """A tool as the client knows it, behind a function that the model sees."""

    kind: str  # FUNCTION or CUSTOM
    name: str
    namespace: str = ""


class Tools:
    """The functions that the model is offered, and whose tools they are."""

    def __init__(self, body: Fields, left_out: LeftOut) -> None:
        """Read `tools`. What cannot be run here is added to `left_out`."""
        self.functions: list[JSON] = []  # as chat.completions has them
        self.offered: dict[str, OfferedTool] = {}  # by the function's name
        self._left_out = left_out
        for tool in body.objects("tools"):
            self._add(tool, "")

    def choice(self, body: Fields) -> Any:
        """Return `tool_choice` as chat.completions has it."""
        if isinstance(body.get("tool_choice"), str):
            return body.one_of("tool_choice", ("auto", "none", "required"), "auto")
        choice = body.object("tool_choice") or Fields({})
        if choice.one_of("type", (FUNCTION, CUSTOM, "allowed_tools"), "") == "allowed_tools":
            allowed = [_named(tool) for tool in choice.objects("tools") if tool.text("type") in (FUNCTION, CUSTOM)]
            mode = choice.one_of("mode", ("auto", "required"), "auto")
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": allowed}}
        choice.required("name", "a string")
        return _named(choice)

    def _add(self, tool: Fields, namespace: str) -> None:
        kind = tool.text("type")
        if not kind:
            tool.fail("type", "a kind of tool")
        if kind == "namespace":
            for inner in tool.objects("tools"):
                self._add(inner, tool.text("name"))
        elif kind in (FUNCTION, CUSTOM):
            tool.required("name", "a string")
            function = _function(tool) if kind == FUNCTION else _custom(tool)
            function["name"] = function_name(tool.text("name"), namespace)
            self.offered[function["name"]] = OfferedTool(kind, tool.text("name"), namespace)
            self.functions.append({"type": "function", "function": function})
        else:
            self._left_out.add(TOOL, kind)


def function_name(name: str, namespace: str) -> str:
    """Return the name by which the model knows a tool of a namespace."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


def _named(choice: Fields) -> JSON:
    return {"type": "function", "function": {"name": function_name(choice.text("name"), choice.text("namespace"))}}


def _function(tool: Fields) -> JSON:
    tool.object("parameters")  # a wrong type is an error
    return {name: tool.get(name) for name in ("description", "parameters", "strict") if tool.has(name)}


def _custom(tool: Fields) -> JSON:
    """Return a function of one text. A grammar is shown to the model; one that is a regex is kept, too."""
    description, schema = tool.text("description"), CUSTOM_SCHEMA
    format_ = tool.object("format")
    if format_ is not None and format_.one_of("type", ("text", "grammar"), "text") == "grammar":
        syntax = format_.one_of("syntax", ("lark", "regex"), "lark")
        format_.required("definition", "a string")
        definition = format_.text("definition")
        description = f"{description}\n{INPUT} must match this {syntax} grammar:\n{definition}".lstrip()
        if syntax == "regex":
            schema = {**schema, "properties": {INPUT: {"type": "string", "pattern": f"^(?:{definition})$"}}}
    return {"description": description, "parameters": schema}


def custom_input(arguments: str) -> str:
    """Return the text that a custom tool is called with, of the arguments of its function."""
    try:
        read = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments
    given = read.get(INPUT) if isinstance(read, dict) else None
    return given if isinstance(given, str) else arguments


# ---- the body and its history ----


def answerable(body: Fields, left_out: LeftOut) -> Fields:
    """Return `body` without what this server has no use for, which is added to `left_out`.

    What is neither known nor harmless stays, to be refused by whoever reads it.
    """
    values = dict(body.values)
    for name in HINTS:
        if values.pop(name, None):
            left_out.add(HINT, name)
    text = values.get("text")
    if isinstance(text, dict) and text.get("verbosity") in ("low", "high"):
        left_out.add(HINT, "text.verbosity")
    if values.get("truncation") == "auto":
        left_out.add(HINT, "truncation")
    if isinstance(given := values.get("input"), list):
        values["input"] = [_item(item, left_out) for item in given]
    return Fields(values)


def _item(item: Any, left_out: LeftOut) -> Any:
    """Return an item as a message, a function's call or its result. Wrong types are passed on as they are."""
    if not isinstance(item, dict) or not isinstance(kind := item.get("type") or "message", str):
        return item
    if kind == "message":
        return {**item, "content": _parts(item.get("content"), left_out)}
    if kind == "function_call" and isinstance(item.get("name"), str) and isinstance(item.get("namespace"), str):
        return {**item, "name": function_name(item["name"], item["namespace"])}
    if kind == "function_call_output":
        return {**item, "output": _parts(item.get("output"), left_out)}
    if kind in CALLS:
        return _call(kind, item)
    if kind in OUTPUTS:
        output = _parts(item.get(OUTPUTS[kind]), left_out)
        return {"type": "function_call_output", "call_id": _call_id(item), "output": _as_text(output)}
    if kind == "reasoning" and item.get("encrypted_content") and not item.get("content"):
        left_out.add(CONTENT, kind)
    if kind in UNSEEN_ITEMS:
        left_out.add(CONTENT, kind)
        name = item.get("name")
        text = f"[{kind.replace('_', ' ')}{f': {name}' if isinstance(name, str) else ''}: not shown]"
        return {"type": "message", "role": "user" if "compaction" in kind else "assistant", "content": text}
    return item


def _call(kind: str, item: JSON) -> JSON:
    given = item.get(CALLS[kind])
    arguments = {INPUT: given} if kind == "custom_tool_call" else given
    return {
        "type": "function_call",
        "call_id": _call_id(item),
        "name": item.get("name") or kind.removesuffix("_call"),
        "arguments": orjson.dumps(arguments if isinstance(arguments, dict) else {INPUT: arguments}).decode(),
    }


def _call_id(item: JSON) -> Any:
    return item.get("call_id") or item.get("id")


def _parts(content: Any, left_out: LeftOut) -> Any:
    """Return content whose images and files are a short text each."""
    if not isinstance(content, list):
        return content
    return [_part(part, left_out) for part in content]


def _part(part: Any, left_out: LeftOut) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "refusal":
        return {"type": "output_text", "text": part.get("refusal")}
    if not isinstance(kind, str) or kind not in UNSEEN_PARTS:
        return part
    left_out.add(CONTENT, kind)
    name = kind.removeprefix("input_").replace("_", " ")
    return {"type": "input_text", "text": f"[{name}: cannot be shown to this model, which reads text only]"}


def _as_text(output: Any) -> Any:
    """Return a result as a text or a list of its parts."""
    is_parts = isinstance(output, list) and all(isinstance(part, dict) and "text" in part for part in output)
    return output if isinstance(output, str) or is_parts else orjson.dumps(output).decode()


def input_items(body: Fields, response_id: str) -> list[JSON]:
    """Return the input as items with ids, as /v1/responses/{id}/input_items lists them."""
    given = body.get("input")
    if isinstance(given, str):
        given = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    items = []
    for i, item in enumerate(given):
        item = {"type": "message", **item}
        content = item.get("content")
        if item["type"] == "message" and isinstance(content, str):
            kind = "output_text" if item.get("role") == "assistant" else "input_text"
            item["content"] = [{"type": kind, "text": content}]
        items.append({"id": f"item_{response_id.removeprefix('resp_')}{i:04x}", **item})
    return items
