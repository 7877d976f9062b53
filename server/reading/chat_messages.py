"""Messages of a chat, checked, and in the form that chat templates read."""

from engine.declared import convert
from engine.errors import InvalidRequest
from server.media.reader import MediaPart
from server.parsers.tool_calls import object_of
from server.reading.contents import is_media, media_part, refused
from server.reading.custom_tools import arguments_of_input
from server.reading.openai_body import Message, MessageToolCall, Part
from server.reading.protocol import JSON


def chat_call(call_id: str, name: str, arguments: str | JSON) -> JSON:
    """Return a tool call as messages have it. arguments: an object, or one as JSON text."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def parse_messages(given: list[JSON], media: list[MediaPart] | None = None) -> list[JSON]:
    """Check messages: known roles, content as one string (null only beside tool calls), or a list if it shows media.

    media: gets what the messages show; None: they may show nothing. See `server.reading.contents` for the lists.
    """
    if not given:
        raise InvalidRequest("messages must be a list of at least one message", "messages")
    read = convert(given, list[Message], "messages")
    return [_parse_message(*both, f"messages[{i}]", media) for i, both in enumerate(zip(given, read, strict=True))]


def _parse_message(written: JSON, read: Message, path: str, media: list[MediaPart] | None) -> JSON:
    message = {**written, "role": "system" if read.role == "developer" else read.role}
    if isinstance(read.content, list):
        message["content"] = _parse_parts(written["content"], read.content, f"{path}.content", media)
    elif read.content is None and read.role in ("assistant", "tool", "function"):
        message["content"] = read.refusal or ""  # beside calls, reasoning or a refusal, or for nothing
    elif read.content is None:
        raise read.wrong("content", "a string or a list of parts", path)
    if reasoning := read.reasoning_content or read.reasoning:
        message["reasoning_content"] = message["reasoning"] = reasoning  # templates know it by one of these
        if not message["content"]:
            message.setdefault("thinking", reasoning)  # gpt-oss's, which refuses it beside a text
    if read.tool_calls:
        calls = zip(written["tool_calls"], read.tool_calls, strict=True)
        message["tool_calls"] = [_parse_tool_call(*call, f"{path}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return message


def _parse_parts(written: list[JSON], parts: list[Part], path: str, media: list[MediaPart] | None) -> str | list[JSON]:
    """Return the texts as one, or in a list with the places of what is shown between them."""
    if not any(map(is_media, parts)):
        return "\n".join(_text_of(part, f"{path}[{i}]") for i, part in enumerate(parts))
    contents: list[JSON] = []
    for i, part in enumerate(parts):
        if not is_media(part):
            contents.append({"type": "text", "text": _text_of(part, f"{path}[{i}]")})
            continue
        if media is None:
            raise refused(written[i], part, f"{path}[{i}]")
        media.append(media_part(written[i], part, f"{path}[{i}]"))
        contents.append({"type": media[-1].kind})
    return contents


def _text_of(part: Part, path: str) -> str:
    if part.type == "refusal":  # an assistant's
        return part.refusal or ""
    if part.type not in ("text", "input_text") or part.text is None:
        raise InvalidRequest(f'{path} must be {{"type": "text", "text": ...}}', path)
    return part.text


def _parse_tool_call(written: JSON, read: MessageToolCall, path: str) -> JSON:
    """Read a call. Templates expect its arguments as an object; OpenAI's clients send them as JSON text."""
    if (custom := read.custom) is not None:
        called = {"name": custom.name, "arguments": arguments_of_input(custom.input)}
        return {"id": read.id, "type": "function", "function": called}
    if read.function is None:
        raise read.wrong("function", "an object", path)
    arguments = read.function.arguments
    if isinstance(arguments, str):
        arguments = object_of(arguments)
    return {**written, "function": {**written["function"], "arguments": arguments or {}}}
