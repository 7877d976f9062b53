"""Bodies of OpenAI's Responses API as agents send them, made into those that this server can answer.

Codex sends the whole history in each request. Its items become messages, calls and results, or a short text.
"""

from collections.abc import Callable
from typing import Any

import orjson

from server.reading.custom_tools import INPUT, arguments_of_input
from server.reading.left_out import CONTENT, HINT, LeftOut
from server.reading.protocol import JSON, Fields
from server.reading.responses_tools import KNOWN_TOOLS, function_name

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
    "context_compaction", "ghost_snapshot", "agent_message", "program", "program_output", "additional_tools",
))  # fmt: skip
UNSEEN_PARTS = frozenset(("input_image", "input_file", "input_audio", "computer_screenshot"))


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


def resolved(body: Fields, find: Callable[[str, str], JSON]) -> Fields:
    """Return `body` with the items in place of references to them. find: return an item, given its id and its field.

    Each item may be referred to once: that bounds what a small body becomes.
    """
    given = body.get("input")
    if not isinstance(given, list) or not any(map(_is_reference, given)):
        return body
    items: list[Any] = []
    known: set[str] = set()
    for i, item in enumerate(given):
        if _is_reference(item):
            fields = Fields(item, f"input[{i}]")
            fields.required("id", "an item's id")
            item_id = fields.text("id")
            if item_id in known:
                fields.fail("id", "that of an item which is referred to once")
            known.add(item_id)
            item = find(item_id, f"input[{i}].id")
        items.append(item)
    return Fields({**body.values, "input": items})


def _is_reference(item: Any) -> bool:
    """Return whether an item stands for an earlier one. OpenAI's clients may leave the type out."""
    if not isinstance(item, dict):
        return False
    kind = item.get("type")
    return kind == "item_reference" or (kind is None and "id" in item and item.keys() <= {"id", "type"})


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
    name = kind.removesuffix("_call")
    given = item.get(CALLS[kind])
    if kind == "custom_tool_call" or not isinstance(given, dict):
        given = arguments_of_input(given)
    elif known := KNOWN_TOOLS.get(name):
        given = {key: value for key, value in given.items() if key in known.properties and value is not None}
    return {
        "type": "function_call",
        "call_id": _call_id(item),
        "name": item.get("name") or name,
        "arguments": orjson.dumps(given).decode(),
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
