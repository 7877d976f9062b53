"""Find out what a model's chat template can show, by rendering marks and looking for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest
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
    """Whether tools given beside the messages are in the prompt."""
    shows_calls: bool = True
    """Whether calls of tools and their results are in the prompt."""


def find_traits(render: Render) -> TemplateTraits:
    """Try a template. One that shows no user's message either way is left to tell its own clients why."""

    def shows(messages: Sequence[JSON], tools: list[JSON] | None = None) -> bool:
        try:
            return MARK in render([dict(message) for message in messages], tools)
        except InvalidRequest:
            return False

    def needs_parts(before: list[JSON], role: str, after: list[JSON], **more: Any) -> bool:
        def with_content(content: Any) -> list[JSON]:
            return [*before, {"role": role, "content": content, **more}, *after]

        return not shows(with_content(MARK)) and shows(with_content(_parts(MARK)))

    parts_roles = {"user"} if needs_parts([], "user", []) else set[str]()
    user: JSON = {"role": "user", "content": _parts("Hi") if parts_roles else "Hi"}
    if not shows([{**user, "content": _parts(MARK) if parts_roles else MARK}]):
        return TemplateTraits()
    calling: JSON = {"role": "assistant", "content": "", "tool_calls": [_call("find")]}
    for role, before, after in (
        ("system", [], [user]),
        ("assistant", [user], [user]),
        ("tool", [user, calling], []),
    ):
        if needs_parts(
            before, role, after, **({"tool_call_id": "call00001", "name": "find"} if role == "tool" else {})
        ):
            parts_roles.add(role)

    def shown(role: str, text: str) -> Any:
        return _parts(text) if role in parts_roles else text

    result: JSON = {"role": "tool", "tool_call_id": "call00001", "name": "find"}
    return TemplateTraits(
        parts_roles=frozenset(parts_roles),
        shows_system=shows([{"role": "system", "content": shown("system", MARK)}, user]),
        shows_tools=shows([user], [_tool(MARK)]),
        shows_calls=shows([user, {**calling, "tool_calls": [_call(MARK)]}, {**result, "content": shown("tool", "1")}])
        and shows([user, calling, {**result, "content": shown("tool", MARK)}]),
    )


def in_parts(messages: Sequence[JSON], roles: frozenset[str]) -> list[JSON]:
    """Return `messages` with the texts of `roles` as lists of parts."""
    return [
        {**message, "content": _parts(message["content"])}
        if message["role"] in roles and isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _parts(text: str) -> list[JSON]:
    return [{"type": "text", "text": text}]


def _call(name: str) -> JSON:
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": {"a": "b"}}}


def _tool(name: str) -> JSON:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "description": "a"}}, "required": ["a"]}
    return {"type": "function", "function": {"name": name, "description": "Find a.", "parameters": parameters}}
