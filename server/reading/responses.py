"""From a body of OpenAI's Responses API to one of OpenAI's chats.

Codex sends the whole history in each request. Its items become messages, calls and results, or a short text where this
server has no use for them.
"""

from collections.abc import Callable
from typing import Any

import msgspec
import orjson

from engine.declared import convert
from server.reading.chat_messages import chat_call
from server.reading.contents import Content, sourced, uploaded
from server.reading.custom_tools import INPUT, arguments_of_input
from server.reading.left_out import CONTENT, HINT, LeftOut
from server.reading.openai_body import EXTRAS
from server.reading.protocol import JSON, REQUEST_FIELDS
from server.reading.responses_body import (
    CALLS,
    IMAGE_PARTS,
    OUTPUTS,
    UNSEEN_PARTS,
    AdditionalTools,
    ConfigurationUpdate,
    ContentPart,
    FunctionCall,
    FunctionCallOutput,
    InputMessage,
    Item,
    ItemReference,
    ReasoningConfig,
    ReasoningItem,
    ResponsesRequest,
    TextConfig,
    TextFormat,
    ToolCall,
    ToolOutput,
    UnseenItem,
)
from server.reading.responses_tools import KNOWN_TOOLS, Tools, function_name, read_choice

SAME_NAMES = (
    *EXTRAS, "stop", "structured_outputs", "stream", "parallel_tool_calls", "chat_template_kwargs",
    "max_thinking_tokens", "thinking_token_budget", *REQUEST_FIELDS,
)  # fmt: skip
LOGPROBS = "message.output_text.logprobs"
FORMAT_FIELDS = ("name", "description", "schema", "strict")


def chat_body(body: ResponsesRequest, messages: list[JSON], tools: Tools, left_out: LeftOut) -> JSON:
    """Return the same request to chat.completions, of `messages`. `InvalidRequest` names what cannot be said there."""
    text = convert(body.text, TextConfig, "text")
    for name, is_hint in (
        ("context_management", body.context_management), ("text.verbosity", text.verbosity != "medium"),
        ("truncation", body.truncation == "auto"),
    ):  # fmt: skip
        if is_hint:
            left_out.add(HINT, name)
    if body.instructions:
        messages = [{"role": "system", "content": body.instructions}, *messages]
    chat: JSON = {"messages": messages, **body.given(SAME_NAMES)}
    if body.max_output_tokens is not None:
        chat["max_completion_tokens"] = body.max_output_tokens
    if body.top_logprobs is not None or LOGPROBS in body.include:
        chat |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    if tools.functions:
        chat["tools"] = tools.functions
    if body.tool_choice is not None:
        chat["tool_choice"] = read_choice(body.tool_choice)
    chat["reasoning_effort"] = convert(body.reasoning, ReasoningConfig, "reasoning").effort
    if text.format is not None:
        chat["response_format"] = _read_format(text.format)
    return chat


def _read_format(format_: TextFormat) -> JSON:
    if format_.type != "json_schema":
        return {"type": format_.type, **format_.given(("schema",))}
    if format_.schema is None:
        raise format_.wrong("schema", "an object", "text.format")
    return {"type": format_.type, "json_schema": format_.given(FORMAT_FIELDS)}


# ---- the input ----


def configure(body: ResponsesRequest, items: list[JSON]) -> None:
    """Put what items of the input say of reasoning and text in place of what the body does."""
    for i, item in enumerate(items):
        if item.get("type") == "configuration_update":
            for name, kind in (("reasoning", ReasoningConfig), ("text", TextConfig)):
                if (given := item.get(name)) is not None:
                    convert(given, kind, f"input[{i}].{name}")
                    setattr(body, name, getattr(body, name) | given)


def resolved(given: str | list[JSON], find: Callable[[str, str], JSON]) -> str | list[JSON]:
    """Return the input with the items in place of references to them. find: return an item, given its id and its field.

    Each item may be referred to once: that bounds what a small body becomes.
    """
    if isinstance(given, str) or not any(map(_is_reference, given)):
        return given
    items: list[JSON] = []
    known: set[str] = set()
    for i, item in enumerate(given):
        if _is_reference(item):
            path = f"input[{i}]"
            reference = convert({**item, "type": "item_reference"}, ItemReference, path)
            if reference.id in known:
                raise reference.wrong("id", "that of an item which is referred to once", path)
            known.add(reference.id)
            item = find(reference.id, f"{path}.id")
        items.append(item)
    return items


def _is_reference(item: JSON) -> bool:
    """Return whether an item stands for an earlier one. OpenAI's clients may leave the type out."""
    kind = item.get("type")
    return kind == "item_reference" or (kind is None and "id" in item and item.keys() <= {"id", "type"})


def read_input(given: str | list[JSON], left_out: LeftOut, *, sees_images: bool = False) -> list[JSON]:
    """Return the input as OpenAI's chat messages. sees_images: the model does; else a short text stands for each."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    typed = [item if item.get("type") else {**item, "type": "message"} for item in given]
    reader = _Reader(left_out, sees_images)
    for i, item in enumerate(convert(typed, list[Item], "input")):
        reader.read(item, f"input[{i}]")
    return reader.messages or [{"role": "user", "content": ""}]  # a probe, which asks for a token


class _Reader:
    """Makes messages of chat.completions, one of several items where these are of one turn of the model."""

    def __init__(self, left_out: LeftOut, sees_images: bool) -> None:
        self._left_out, self._sees_images = left_out, sees_images
        self.messages: list[JSON] = []

    def read(self, item: Item, path: str) -> None:
        match item:
            case FunctionCall():
                self._add_call(item.call_id, function_name(item.name, item.namespace), item.arguments)
            case FunctionCallOutput():
                self._add_output(item.call_id, self._joined(item.output, path, "output"))
            case InputMessage():
                self._add_message(item, path)
            case ReasoningItem():
                self._add_reasoning(item)
            case ToolCall():
                name = _kind(item).removesuffix("_call")
                self._add_call(_call_id(item, path), item.name or name, _arguments(item, name))
            case ToolOutput():
                self._add_output(_call_id(item, path), self._output(item, path))
            case AdditionalTools() | ConfigurationUpdate():
                pass  # `Tools` and `configure` read them
            case UnseenItem():
                self._add_stand_in(item)

    def _add_message(self, item: InputMessage, path: str) -> None:
        if item.content is None and item.role != "assistant":
            raise item.wrong("content", "a string or a list of parts", path)
        content = self._joined(item.content, path, "content")
        if item.role == "assistant":
            self._assistant(lacks=("content", "tool_calls"))["content"] = content
        else:
            self.messages.append({"role": item.role, "content": content})

    def _add_reasoning(self, item: ReasoningItem) -> None:
        """Add reasoning in the clear. A summary is left out: it is not what the model thought."""
        if item.content:
            message = self._assistant(lacks=("content", "tool_calls", "reasoning_content"))
            message["reasoning_content"] = "\n".join([part.text or "" for part in item.content])
        elif item.encrypted_content:
            self._left_out.add(CONTENT, "reasoning")

    def _add_call(self, call_id: str, name: str, arguments: str) -> None:
        self._assistant(lacks=()).setdefault("tool_calls", []).append(chat_call(call_id, name, arguments))

    def _add_output(self, call_id: str, content: Content) -> None:
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": content})

    def _add_stand_in(self, item: UnseenItem) -> None:
        kind = _kind(item)
        self._left_out.add(CONTENT, kind)
        text = f"[{kind.replace('_', ' ')}{f': {item.name}' if item.name else ''}: not shown]"
        if "compaction" in kind:
            self.messages.append({"role": "user", "content": text})
        else:
            self._assistant(lacks=("content", "tool_calls"))["content"] = text

    def _assistant(self, lacks: tuple[str, ...]) -> JSON:
        """Return the assistant's message being put together, or a new one if that has one of `lacks` already."""
        messages = self.messages
        if not messages or messages[-1]["role"] != "assistant" or any(messages[-1].get(name) for name in lacks):
            messages.append({"role": "assistant", "content": ""})
        return messages[-1]

    def _joined(self, content: str | list[ContentPart] | None, path: str, field: str) -> Content:
        """Return the texts of a field of the item at `path` as one; a list of parts if there are images to see."""
        if not isinstance(content, list):
            return content or ""
        paths = [f"{path}.{field}[{i}]" for i in range(len(content))]
        if self._sees_images and any(map(_is_image, content)):
            return list(map(self._part, content, paths))
        return "\n".join(map(self._shown, content, paths))

    def _part(self, part: ContentPart, path: str) -> JSON:
        """Return a part of a message of chat.completions."""
        if not _is_image(part):
            return {"type": "text", "text": self._shown(part, path)}
        if part.file_id is not None:
            return uploaded(part.file_id, f"{path}.file_id", part.detail)
        assert part.image_url is not None
        return sourced(part.image_url, f"{path}.image_url", part.detail)

    def _shown(self, part: ContentPart, path: str) -> str:
        """Return what the model reads in place of a part."""
        if part.type == "refusal":  # an assistant's
            return part.refusal or ""
        if part.type == "input_image" and self._sees_images:  # with neither, or it would be shown
            raise part.wrong("image_url", "a string, or file_id", path)
        if part.type is not None and part.type in UNSEEN_PARTS:
            self._left_out.add(CONTENT, part.type)
            name = part.type.removeprefix("input_").replace("_", " ")
            why = "" if self._sees_images else ", which reads text only"
            return f"[{name}: cannot be shown to this model{why}]"
        if part.text is None:
            raise part.wrong("text", "a string", path)
        return part.text

    def _output(self, item: ToolOutput, path: str) -> Content:
        """Return a result as a text, which it is, or its parts have, or as what these show; else as JSON."""
        name = OUTPUTS[_kind(item)]
        output = getattr(item, name)
        if isinstance(output, dict) and output.get("type") in UNSEEN_PARTS:
            output = [output]  # a screenshot
        if isinstance(output, str):
            return output
        if isinstance(output, list) and all(isinstance(part, dict) and _has_text(part) for part in output):
            return self._joined(convert(output, list[ContentPart], f"{path}.{name}"), path, name)
        return msgspec.json.encode(output).decode()


def _is_image(part: ContentPart) -> bool:
    return part.type in IMAGE_PARTS and (part.image_url is not None or part.file_id is not None)


def _has_text(part: JSON) -> bool:
    return "text" in part or part.get("type") in UNSEEN_PARTS


def _kind(item: ToolCall | ToolOutput | UnseenItem) -> str:
    return str(item.__struct_config__.tag)


def _call_id(item: ToolCall | ToolOutput, path: str) -> str:
    call_id = item.call_id or item.id
    if call_id is None:
        raise item.wrong("call_id", "a string", path)
    return call_id


def _arguments(item: ToolCall, name: str) -> str:
    field = CALLS[_kind(item)]
    given = getattr(item, field)
    if field == INPUT or not isinstance(given, dict):
        given = arguments_of_input(given)
    elif known := KNOWN_TOOLS.get(name):
        given = {key: value for key, value in given.items() if key in known.properties and value is not None}
    return msgspec.json.encode(given).decode()


# ---- what the answer repeats, and what is kept ----


def echo_of(body: ResponsesRequest, model: str) -> JSON:
    """Return the fields of a request that its response repeats."""
    return {
        "model": model,
        "background": body.background,
        "instructions": body.instructions or None,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id or None,
        "reasoning": written({"effort": None, "summary": None} | body.reasoning),
        "store": body.store,
        "text": written({"format": {"type": "text"}} | body.text),
        "tool_choice": written(body.tool_choice or "auto"),
        "tools": written(body.tools),
        "top_logprobs": body.top_logprobs or 0,
        "truncation": body.truncation,
        "user": body.user or None,
    }


def input_items(given: str | list[JSON], response_id: str) -> list[JSON]:
    """Return the input as items with ids, as /v1/responses/{id}/input_items lists them."""
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


def written(value: Any) -> orjson.Fragment:
    """Return a client's values as JSON, which takes less memory. orjson would refuse integers beyond 64 bits."""
    return orjson.Fragment(msgspec.json.encode(value))
