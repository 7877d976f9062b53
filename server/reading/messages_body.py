"""Bodies of Anthropic's Messages API as agents send them, made into those that this server can answer.

Claude Code sends hints for Anthropic's own cache and context, tools that only Anthropic runs, blocks that a text model
cannot see, and lines that change in each prompt. What is needed is kept; the rest is left out, or becomes a short text
so that a conversation that was begun elsewhere goes on.
"""

import re
from typing import Any

from server.reading.left_out import CONTENT, HINT, TOOL, VOLATILE, LeftOut
from server.reading.protocol import JSON, Fields

# Of the body. `cache_control`, `betas`, `metadata` and `service_tier` change nothing here, and are not worth a word.
HINTS = ("context_management", "container", "mcp_servers", "inference_geo", "speed")
# Blocks that hold results of servers' tools, and calls of such tools.
SERVER_BLOCKS = frozenset((
    "server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result",
    "bash_code_execution_tool_result", "text_editor_code_execution_tool_result", "tool_search_tool_result",
    "advisor_tool_result", "mcp_tool_use", "mcp_tool_result",
))  # fmt: skip
UNSEEN_BLOCKS = frozenset(("image", "document", "container_upload", "tool_reference", "compaction", "fallback"))
BILLING = "x-anthropic-billing-header:"
# At the end of a text only: elsewhere it is what somebody wrote about it.
TOKENS_LEFT = re.compile(r"\s*<total_tokens>\s*\d+ tokens left\s*</total_tokens>\s*\Z")
TOKENS_LEFT_END = "</total_tokens>"


def answerable(body: Fields, left_out: LeftOut, keeps_volatile: bool) -> Fields:
    """Return `body` without what this server has no use for, which is added to `left_out`.

    keeps_volatile: leave the lines in that change in each prompt. What is neither known nor harmless stays, to be
    refused by whoever reads it.
    """
    values = dict(body.values)
    for name in HINTS:
        if values.pop(name, None):
            left_out.add(HINT, name)
    reader = _Reader(left_out, keeps_volatile)
    if body.has("system"):
        values["system"] = reader.system(body.get("system"))
    if isinstance(messages := body.get("messages"), list):
        values["messages"] = [reader.message(message) for message in messages]
    if isinstance(values.get("output_format"), dict):  # its name before `output_config.format`
        config = body.get("output_config")
        values["output_config"] = {**(config if isinstance(config, dict) else {}), "format": values["output_format"]}
        del values["output_format"]
    return Fields(values)


def own_tools(body: Fields, left_out: LeftOut) -> list[Fields]:
    """Return the tools that the body describes; others are Anthropic's to know."""
    own = []
    for tool in body.objects("tools"):
        kind = tool.text("type", "custom")
        if kind == "custom":
            own.append(tool)
        else:
            left_out.add(TOOL, kind)
    return own


class _Reader:
    """Makes content readable. Wrong types are passed on as they are: whoever reads them names them."""

    def __init__(self, left_out: LeftOut, keeps_volatile: bool) -> None:
        self._left_out, self._keeps_volatile = left_out, keeps_volatile

    def system(self, content: Any) -> Any:
        """Return the system prompt without a leading block, or line, of billing."""
        if isinstance(content, str):
            head, _, rest = content.partition("\n")
            return self._text(rest if self._is_billing(head) else content)
        if not isinstance(content, list):
            return content
        is_billed = bool(content) and isinstance(content[0], dict) and self._is_billing(content[0].get("text"))
        return self._content(content[is_billed:])

    def message(self, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        content = message.get("content")
        return {
            **message,
            "content": self.system(content) if message.get("role") == "system" else self._content(content),
        }

    def _is_billing(self, text: Any) -> bool:
        is_billing = isinstance(text, str) and text.startswith(BILLING) and not self._keeps_volatile
        if is_billing:
            self._left_out.add(VOLATILE, "x-anthropic-billing-header")
        return is_billing

    def _content(self, content: Any) -> Any:
        if isinstance(content, str):
            return self._text(content)
        return [self._block(block) for block in content] if isinstance(content, list) else content

    def _text(self, text: str) -> str:
        if self._keeps_volatile or TOKENS_LEFT_END not in text[-64:]:
            return text
        kept = TOKENS_LEFT.sub("", text[-128:])
        if len(kept) == len(text[-128:]):
            return text
        self._left_out.add(VOLATILE, "total_tokens")
        return text[:-128] + kept

    def _block(self, block: Any) -> Any:
        if not isinstance(block, dict) or not isinstance(kind := block.get("type"), str):
            return block
        if kind == "text" and isinstance(block.get("text"), str):
            return {**block, "text": self._text(block["text"])}
        if kind == "tool_result":
            return {**block, "content": self._content(block.get("content"))}
        if kind == "search_result":
            return _text_block("\n".join([str(block.get("title") or ""), *_texts(block.get("content"))]))
        if kind == "document" and (texts := _document(block)):
            return _text_block("\n".join(texts))
        if kind == "redacted_thinking":
            self._left_out.add(CONTENT, kind)
            return {"type": "thinking", "thinking": "[thoughts that only their author can read]"}
        if kind in SERVER_BLOCKS or kind in UNSEEN_BLOCKS:
            self._left_out.add(CONTENT, kind)
            return _text_block(_stand_in(kind, block))
        return block


def _text_block(text: str) -> JSON:
    return {"type": "text", "text": text}


def _texts(content: Any) -> list[str]:
    """Return the texts among blocks."""
    blocks = content if isinstance(content, list) else []
    return [block["text"] for block in blocks if isinstance(block, dict) and isinstance(block.get("text"), str)]


def _document(block: JSON) -> list[str]:
    """Return title and text of a document; none if it is no text."""
    source = block.get("source")
    source = source if isinstance(source, dict) else {}
    if source.get("type") == "text":
        texts = [source["data"]] if isinstance(source.get("data"), str) else []
    else:
        content = source.get("content")
        texts = [content] if isinstance(content, str) else _texts(content)
    title = block.get("title")
    return [title, *texts] if texts and isinstance(title, str) else texts


def _stand_in(kind: str, block: JSON) -> str:
    """Return what the model reads in place of a block."""
    if kind in ("image", "document", "container_upload"):
        return f"[{kind.replace('_', ' ')}: cannot be shown to this model, which reads text only]"
    if kind == "compaction" and isinstance(block.get("content"), str):
        return str(block["content"])  # a summary in the clear
    name = block.get("name") or block.get("tool_name")
    return f"[{kind.replace('_', ' ')}{f': {name}' if isinstance(name, str) else ''}: not shown]"
