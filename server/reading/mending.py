"""Mend JSON that some clients write and no parser takes: a byte order mark, and halves of surrogate pairs.

A client that cuts a text in the middle of an emoji, as agents cut the outputs of tools, sends such a half in every turn
from then on.
"""

import re

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
REPLACEMENT = rb"\ufffd"  # as long as what it replaces
MAX_SURROGATES = 1 << 16  # 40 ms; a text with more is left as it is


def mended(text: bytes) -> bytes | None:
    """Return `text` without what can be mended, a half of a pair as U+FFFD; None if there is nothing."""
    halves = _halves(text)
    if halves:
        mending = bytearray(text)
        for start in halves:
            mending[start : start + len(REPLACEMENT)] = REPLACEMENT
        text = bytes(mending)
    elif not text.startswith(BYTE_ORDER_MARK):
        return None
    return text.removeprefix(BYTE_ORDER_MARK)


def _halves(text: bytes) -> list[int]:
    """Return where halves of surrogate pairs are that stand alone."""
    alone: list[int] = []
    half = -len(REPLACEMENT)  # the first one of a pair, if the second follows
    for count, match in enumerate(SURROGATE.finditer(text)):
        if count == MAX_SURROGATES:
            return []
        start = match.start()
        if _is_escaped(text, start):
            continue
        is_second = text[start + 3] in b"cdefCDEF"
        if is_second and alone and alone[-1] == half == start - len(REPLACEMENT):
            alone.pop()
            continue
        alone.append(start)
        half = -len(REPLACEMENT) if is_second else start
    return alone


def _is_escaped(text: bytes, start: int) -> bool:
    """Return whether the backslash at `start` is text, which another one before it says."""
    first = start
    while first and text[first - 1] == ord("\\"):
        first -= 1
    return (start - first) % 2 == 1
