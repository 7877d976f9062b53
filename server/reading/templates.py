"""Find out what a model's chat template can show, by rendering marks and looking for them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.errors import InvalidRequest
from server.reading.contents import as_parts, as_text
from server.reading.protocol import JSON

MARK = "radixloop7mark"
Render = Callable[[list[JSON], list[JSON] | None], str]  # messages, tools -> prompt; `InvalidRequest`: it refuses them


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """Say what a chat template shows. The defaults are those of one that cannot be tried."""

    parts_roles: frozenset[str] = frozenset()
    """Roles whose messages are shown only if their content is a list of parts."""
    shows_system: bool = True
    shows_tools: bool = True
    """True if tools given beside the messages are in the prompt."""
    shows_calls: bool = True
    """True if calls of tools and their results are in the prompt, beside the tools where these are shown."""
    shows_calls_alone: bool = True
    """True if calls are in the prompt where no tools are given: that may be another template."""
    takes_text_arguments: bool = False
    """True if a call is shown only if its arguments are JSON text."""


def find_traits(render: Render) -> TemplateTraits:
    """Try a template. One that shows no user's message either way is left to tell its own clients why."""

    def shows(messages: Sequence[JSON], tools: list[JSON] | None = None) -> bool:
        try:
            return MARK in render([dict(message) for message in messages], tools)
        except InvalidRequest:
            return False

    def needs_parts(before: list[JSON], message: JSON, after: list[JSON]) -> bool:
        as_text, as_parts = ([*before, {**message, "content": content}, *after] for content in (MARK, _parts(MARK)))
        return not shows(as_text) and shows(as_parts)

    parts_roles = {"user"} if needs_parts([], {"role": "user"}, []) else set[str]()
    user: JSON = {"role": "user", "content": _parts("Hi") if parts_roles else "Hi"}
    if not shows([{**user, "content": _parts(MARK) if parts_roles else MARK}]):
        return TemplateTraits()
    result: JSON = {"role": "tool", "tool_call_id": "call00001", "name": "find"}
    for before, message, after in (
        ([], {"role": "system"}, [user]),
        ([user], {"role": "assistant"}, [user]),
        ([user, _calling("find")], result, []),
        ([user, _calling("find", '{"a": "b"}')], result, []),
    ):
        if needs_parts(before, message, after):
            parts_roles.add(message["role"])

    def shown(role: str, text: str) -> Any:
        return _parts(text) if role in parts_roles else text

    def shows_calls(tools: list[JSON] | None, arguments: Any) -> bool:
        called = [user, _calling(MARK, arguments), {**result, "content": shown("tool", "1")}]
        returned = [user, _calling("find", arguments), {**result, "content": shown("tool", MARK)}]
        return shows(called, tools) and shows(returned, tools)

    shows_tools = shows([user], [_tool(MARK)])
    tools = [_tool("find")] if shows_tools else None
    takes_text = not shows_calls(tools, {"a": "b"}) and shows_calls(tools, '{"a": "b"}')
    arguments = '{"a": "b"}' if takes_text else {"a": "b"}
    return TemplateTraits(
        parts_roles=frozenset(parts_roles),
        shows_system=shows([{"role": "system", "content": shown("system", MARK)}, user]),
        shows_tools=shows_tools,
        shows_calls=shows_calls(tools, arguments),
        shows_calls_alone=shows_calls(None, arguments),
        takes_text_arguments=takes_text,
    )


def find_media_roles(
    render: Render, placeholders: Mapping[str, str], traits: TemplateTraits
) -> frozenset[tuple[str, str]]:
    """Return (role, kind) of each message whose template writes the placeholder of that kind for a part of that type.

    placeholders: by kind, of the model. For other roles the placeholder has to stand in the text.
    """
    user: JSON = {"role": "user", "content": _parts("Hi") if "user" in traits.parts_roles else "Hi"}
    around: dict[str, tuple[list[JSON], list[JSON]]] = {
        "user": ([], []),
        "system": ([], [user]),
        "assistant": ([user], [user]),
        "tool": ([user, _calling("find")], []),
    }
    found = set()
    for kind, placeholder in placeholders.items():
        for role, (before, behind) in around.items():
            message: JSON = {"role": role, "content": [{"type": kind}, *_parts(MARK)]}
            if role == "tool":
                message |= {"tool_call_id": "call00001", "name": "find"}
            try:
                text = render([*before, message, *behind], None)
            except InvalidRequest:
                continue
            if MARK in text and text.count(placeholder) == 1:
                found.add((role, kind))
    return frozenset(found)


def find_media_texts(render: Render, placeholders: Mapping[str, str]) -> dict[str, str]:
    """Return what a conversation's prompt has between the beginning of a user's message and its text, by kind shown.

    For whoever writes prompts alone: a placeholder, and what the template puts behind it.
    """
    if not placeholders:
        return {}
    traits = find_traits(render)
    roles = find_media_roles(render, placeholders, traits)

    def before_text(content: Any) -> str:
        messages = shaped([{"role": "user", "content": content}], traits, roles, placeholders)
        return render(messages, None).partition(MARK)[0]

    found = {}
    for kind, placeholder in placeholders.items():
        try:
            before, text = before_text(MARK), before_text([{"type": kind}, *_parts(MARK)])
        except InvalidRequest:
            before = text = ""
        shown = text.removeprefix(before)
        found[kind] = shown if placeholder in shown and text.startswith(before) else f"{placeholder}\n"
    return found


def shaped(
    messages: Sequence[JSON],
    traits: TemplateTraits,
    media_roles: Collection[tuple[str, str]] = (),
    placeholders: Mapping[str, str] = {},
) -> list[JSON]:
    """Return `messages` in the shapes that a template of these traits shows.

    media_roles: see `find_media_roles`. placeholders: by kind, of pictures and videos.
    """
    if not (traits.parts_roles or traits.takes_text_arguments or placeholders):
        return list(messages)
    return [_shaped(message, traits, media_roles, placeholders) for message in messages]


def _shaped(
    message: JSON, traits: TemplateTraits, media_roles: Collection[tuple[str, str]], placeholders: Mapping[str, str]
) -> JSON:
    changed, role, content = dict(message), message["role"], message.get("content")
    if isinstance(content, list) and not all(
        part["type"] == "text" or (role, part["type"]) in media_roles for part in content
    ):
        content = changed["content"] = as_text(content, placeholders)
    if role in traits.parts_roles and isinstance(content, str):
        changed["content"] = as_parts(content)
    if traits.takes_text_arguments and message.get("tool_calls"):
        changed["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
    return changed


def _with_text_arguments(call: JSON) -> JSON:
    function = call["function"]
    return {**call, "function": {**function, "arguments": msgspec.json.encode(function["arguments"]).decode()}}


def _calling(name: str, arguments: Any = None) -> JSON:
    """Return an assistant's message that calls a tool."""
    function = {"name": name, "arguments": {"a": "b"} if arguments is None else arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
    }


def _parts(text: str) -> list[JSON]:
    return [{"type": "text", "text": text}]


def _tool(name: str) -> JSON:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "description": "a"}}, "required": ["a"]}
    return {"type": "function", "function": {"name": name, "description": "Find a.", "parameters": parameters}}
