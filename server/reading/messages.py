"""From a body of Anthropic's Messages API to one of OpenAI's chats.

Claude Code sends hints for Anthropic's own cache and context, tools that only Anthropic runs, blocks that a text model
cannot see, and lines that change in each prompt. What is needed is kept; the rest is left out, or becomes a short text
so that a conversation that was begun elsewhere goes on.
"""

import re
from typing import Any, TypeVar

from engine.errors import InvalidRequest
from server.reading.chat_messages import chat_call
from server.reading.contents import sourced, uploaded
from server.reading.left_out import CONTENT, HINT, VOLATILE, LeftOut
from server.reading.messages_body import (
    HINTS,
    MEDIA_KINDS,
    AssistantMessage,
    Compaction,
    CountTokensRequest,
    Document,
    ImageBlock,
    ImageSource,
    MessagesRequest,
    MessagesToolChoice,
    Passage,
    RedactedThinking,
    SearchResult,
    ShownBlock,
    TextBlock,
    ThinkingBlock,
    ThinkingConfig,
    ToolAddition,
    ToolRemoval,
    ToolResult,
    ToolUse,
    Unseen,
    UserMessage,
)
from server.reading.messages_tools import MessagesTools
from server.reading.openai_body import EXTRAS
from server.reading.protocol import JSON, REQUEST_FIELDS

Block = TypeVar("Block")
BILLING = "x-anthropic-billing-header:"
# At the end of a text only: elsewhere it is what somebody wrote about it.
TOKENS_LEFT = re.compile(r"\s*<total_tokens>\s*\d+ tokens left\s*</total_tokens>\s*\Z")
TOKENS_LEFT_END = "</total_tokens>"
SAME_NAMES = (*EXTRAS, "structured_outputs", "max_tokens", "stream")
TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_body(
    body: CountTokensRequest,
    tools: MessagesTools,
    left_out: LeftOut,
    *,
    keeps_volatile: bool,
    sees_images: bool = False,
) -> JSON:
    """Return the same request to chat.completions. What this server has no use for is added to `left_out`.

    keeps_volatile: leave the lines in that change in each prompt. sees_images: the model does; else a short text
    stands for each.
    """
    for name in HINTS:
        if getattr(body, name):
            left_out.add(HINT, name)
    messages = _Reader(left_out, keeps_volatile, sees_images).messages(body)
    chat: JSON = {"messages": messages, **body.given(REQUEST_FIELDS)}
    if isinstance(body, MessagesRequest):
        chat |= {"stop": body.stop_sequences, **body.given(SAME_NAMES)}
    if messages[-1]["role"] == "assistant":
        if "tool_calls" in messages[-1]:
            raise InvalidRequest("messages must not end with a tool_use: its tool_result is missing", "messages")
        chat["continue_final_message"] = True
    if functions := tools.functions:
        chat["tools"] = functions
    if body.tool_choice is not None:
        chat |= _read_tool_choice(body.tool_choice)
    format_ = body.output_format
    if (output := body.output_config) is not None:
        format_ = format_ or output.format
        chat["reasoning_effort"] = output.effort
    if format_ is not None:
        described = {"name": "answer", "schema": format_.schema}
        chat["response_format"] = {"type": "json_schema", "json_schema": described}
    chat |= _read_thinking(body.thinking)
    chat["chat_template_kwargs"] |= body.chat_template_kwargs
    return chat


def _read_tool_choice(choice: MessagesToolChoice) -> JSON:
    chosen: Any = TOOL_CHOICES.get(choice.type)
    if chosen is None:
        if choice.name is None:
            raise choice.wrong("name", "a string", "tool_choice")
        chosen = {"type": "function", "function": {"name": choice.name}}
    return {"tool_choice": chosen, **({"parallel_tool_calls": False} if choice.disable_parallel_tool_use else {})}


def _read_thinking(thinking: ThinkingConfig | None) -> JSON:
    """Read `thinking`, off unless asked for: clients that did not ask take the first block for the answer."""
    is_on = thinking is not None and thinking.type != "disabled"
    read: JSON = {"chat_template_kwargs": {"enable_thinking": is_on, "thinking": is_on}}
    if thinking is not None and thinking.type == "enabled":
        if thinking.budget_tokens is None:
            raise thinking.wrong("budget_tokens", "an integer", "thinking")
        read["max_thinking_tokens"] = thinking.budget_tokens
    return read


class _Reader:
    """Makes messages of chat.completions."""

    def __init__(self, left_out: LeftOut, keeps_volatile: bool, sees_images: bool) -> None:
        self._left_out, self._keeps_volatile, self._sees_images = left_out, keeps_volatile, sees_images

    def messages(self, body: CountTokensRequest) -> list[JSON]:
        """Return the messages. One of Anthropic's becomes several where it holds tool results."""
        messages = [] if body.system is None else [self._system(body.system)]
        last_user = max((i for i, one in enumerate(body.messages) if isinstance(one, UserMessage)), default=-1)
        for i, message in enumerate(body.messages):
            path = f"messages[{i}].content"
            if isinstance(message, UserMessage):
                messages += self._user(message, path)
            elif isinstance(message, AssistantMessage):
                messages.append(self._assistant(message, path))
            elif message.clear_at == "never" or i > last_user:
                messages.append(self._system(message.content))
        return messages

    def _system(self, content: str | list[ShownBlock]) -> JSON:
        """Return a system prompt without a leading block, or line, of billing."""
        if isinstance(content, str):
            head, _, rest = content.partition("\n")
            text = self._text(rest if self._is_billing(head) else content)
        else:
            is_billed = bool(content) and isinstance(content[0], TextBlock) and self._is_billing(content[0].text)
            text = self._joined(content[is_billed:])
        return {"role": "system", "content": text}

    def _user(self, message: UserMessage, path: str) -> list[JSON]:
        """Return messages, tool results apart."""
        messages: list[JSON] = []
        for i, block in enumerate(_blocks(message.content)):
            if isinstance(block, ToolResult):
                messages.append(self._result(block, f"{path}[{i}].content"))
                continue
            if not messages or messages[-1]["role"] != "user":
                messages.append({"role": "user", "content": []})
            messages[-1]["content"] += self._parts(block, f"{path}[{i}]")
        return messages

    def _result(self, block: ToolResult, path: str) -> JSON:
        """Return a tool's message. The text of an error says that it is one: templates cannot."""
        content: str | list[JSON]
        if self._sees_images and isinstance(block.content, list):
            content = [part for i, each in enumerate(block.content) for part in self._parts(each, f"{path}[{i}]")]
            if block.is_error:
                content.insert(0, {"type": "text", "text": "Error:"})
        else:
            content = self._joined(block.content or "")
            content = f"Error: {content}" if block.is_error else content
        return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}

    def _assistant(self, message: AssistantMessage, path: str) -> JSON:
        parts, thoughts, calls = [], [], []
        for i, block in enumerate(_blocks(message.content)):
            if isinstance(block, ThinkingBlock):
                thoughts.append(block.thinking)
            elif isinstance(block, RedactedThinking):
                self._left_out.add(CONTENT, "redacted_thinking")
                thoughts.append("[thoughts that only their author can read]")
            elif isinstance(block, ToolUse):
                calls.append(chat_call(block.id, block.name, block.input))
            else:
                parts += self._parts(block, f"{path}[{i}]")
        read: JSON = {"role": "assistant", "content": parts}
        if thoughts:
            read["reasoning_content"] = "\n".join(thoughts)
        if calls:
            read["tool_calls"] = calls
        return read

    def _joined(self, content: str | list[ShownBlock]) -> str:
        return self._text(content) if isinstance(content, str) else "\n".join(map(self._shown, content))

    def _parts(self, block: ShownBlock, path: str) -> list[JSON]:
        """Return what a block shows: one part, or those of a document with pictures in it."""
        if self._sees_images and isinstance(block, ImageBlock):
            return [_picture(block.source or ImageSource(), path)]
        if isinstance(block, Document) and (passages := _with_pictures(block)):
            if self._sees_images:
                return _document_parts(block.title, passages, f"{path}.source.content")
            self._left_out.add(CONTENT, "image")
        return [_text_part(self._shown(block))]

    def _shown(self, block: ShownBlock) -> str:
        """Return what the model reads in place of a block."""
        if isinstance(block, TextBlock):
            return self._text(block.text)
        if isinstance(block, SearchResult):
            return "\n".join([block.title or "", *_texts(block.content)])
        if isinstance(block, Document) and (texts := _document(block)):
            return "\n".join(texts)
        if isinstance(block, ToolAddition | ToolRemoval):
            tool = block.tool.definition or block.tool
            return f"[tool {'added' if isinstance(block, ToolAddition) else 'removed'}: {tool.name or block.tool.type}]"
        kind = str(block.__struct_config__.tag)
        self._left_out.add(CONTENT, kind)
        if isinstance(block, Compaction) and block.content is not None:
            return block.content  # a summary in the clear
        if isinstance(block, Document) or kind in MEDIA_KINDS:
            return f"[{kind.replace('_', ' ')}: cannot be shown to this model{self._why}]"
        name = block.name or block.tool_name if isinstance(block, Unseen) else None
        return f"[{kind.replace('_', ' ')}{f': {name}' if name else ''}: not shown]"

    @property
    def _why(self) -> str:
        return "" if self._sees_images else ", which reads text only"

    def _is_billing(self, text: str) -> bool:
        is_billing = text.startswith(BILLING) and not self._keeps_volatile
        if is_billing:
            self._left_out.add(VOLATILE, "x-anthropic-billing-header")
        return is_billing

    def _text(self, text: str) -> str:
        if self._keeps_volatile or TOKENS_LEFT_END not in text[-64:]:
            return text
        kept = TOKENS_LEFT.sub("", text[-128:])
        if len(kept) == len(text[-128:]):
            return text
        self._left_out.add(VOLATILE, "total_tokens")
        return text[:-128] + kept


def _text_part(text: str) -> JSON:
    return {"type": "text", "text": text}


def _picture(source: ImageSource, path: str) -> JSON:
    """Return the part that shows the picture of a block at `path`."""
    if source.type == "base64" and source.data is not None:
        return sourced(source.data, f"{path}.source.data")
    if source.type == "url" and source.url is not None:
        return sourced(source.url, f"{path}.source.url")
    if source.type == "file" and source.file_id is not None:
        return uploaded(source.file_id, f"{path}.source.file_id")
    rule = "a source of the type base64 with data, url with url, or file with file_id"
    raise InvalidRequest(f"{path}.source must be {rule}", f"{path}.source")


def _with_pictures(block: Document) -> list[Passage]:
    """Return the parts of a document that has pictures; none of another."""
    passages = None if block.source is None else block.source.content
    if not isinstance(passages, list) or all(passage.source is None for passage in passages):
        return []
    return passages


def _document_parts(title: str | None, passages: list[Passage], path: str) -> list[JSON]:
    parts = [] if title is None else [_text_part(title)]
    for i, passage in enumerate(passages):
        if passage.source is not None:
            parts.append(_picture(passage.source, f"{path}[{i}]"))
        elif passage.text is not None:
            parts.append(_text_part(passage.text))
    return parts


def _blocks(content: str | list[Block]) -> list[Block] | list[TextBlock]:
    """Return content given as blocks, or as a string that stands for one of text."""
    return [TextBlock(text=content)] if isinstance(content, str) else content


def _texts(content: list[Passage] | None) -> list[str]:
    return [passage.text for passage in content or () if passage.text is not None]


def _document(block: Document) -> list[str]:
    """Return title and text of a document; none if it is no text."""
    source = block.source
    if source is None:
        return []
    if source.type == "text":
        texts = [] if source.data is None else [source.data]
    else:
        texts = [source.content] if isinstance(source.content, str) else _texts(source.content)
    return [block.title, *texts] if texts and block.title is not None else texts
