"""Harmony, the format of gpt-oss's answers (OpenAI 2025): messages, each in a channel and maybe to a tool.

<|channel|>analysis<|message|>reasoning<|end|>
<|start|>assistant<|channel|>commentary<|message|>text ahead of calls<|end|>
<|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>
<|start|>assistant<|channel|>final<|message|>text<|return|>

The prompt has written the first message's <|start|>assistant. The recipient may stand before the channel, too.
"""

import re
from typing import NamedTuple

from server.parsers.reader import Malformed, Reader, Reading

START, CHANNEL, MESSAGE, END, CALL, RETURN = (
    "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>",
)  # fmt: skip
NEXT = f"{START}assistant"  # begins every message but the first
ANALYSIS = f"{CHANNEL}analysis{MESSAGE}"
FINAL = f"{CHANNEL}final{MESSAGE}"
TO_TOOL = f"{CHANNEL}commentary to="
FUNCTIONS = "functions."  # stands before the names of functions
MESSAGE_ENDS = (END, CALL, RETURN, START)
MAX_HEADER_LEN = 512  # longer ones are text
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")


class Header(NamedTuple):
    """The text before a message's content."""

    text: str  # with its marks
    channel: str
    recipient: str  # "": the user


def read_header(reader: Reader) -> Reading[Header | None]:
    """Read a message's header, up to its content. None: the answer ended in it. `Malformed`: it is none."""
    try:
        text = yield from reader.read_until((MESSAGE,), MAX_HEADER_LEN)
    except Malformed:
        reader.mark()
        is_too_long = len(reader.take(MAX_HEADER_LEN + 1)) > MAX_HEADER_LEN
        reader.rewind()
        if is_too_long:
            raise
        reader.take_rest()
        return None
    reader.take(len(MESSAGE))
    channel, recipient = _CHANNEL_NAME.search(text), _RECIPIENT.search(text)
    return Header(text + MESSAGE, channel[1] if channel else "", recipient[1] if recipient else "")
