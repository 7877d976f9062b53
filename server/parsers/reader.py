"""Reading a text that comes in pieces, by generators that wait (`yield`) where they need more of it.

So a format is written down as a recursive descent parser, once, and reads whole answers and streams alike.
"""

import re
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]  # waits for more text, and returns a T
Emit = Callable[[str], object]

SCALAR_END = re.compile(r"[\s,}\]<]")
SPACE = re.compile(r"\s*")


class Malformed(Exception):
    """The text is not what it began to look like."""


class Syntax:
    """The openers, closers and quotes of a language of values."""

    def __init__(self, openers: str, closers: str, quotes: str) -> None:
        self.openers, self.quotes = openers, quotes
        self.structure = re.compile(f"[{re.escape(openers + closers + quotes)}]")
        self.quoted = {quote: re.compile(rf"(?:[^{quote}\\]|\\.)*+", re.DOTALL) for quote in quotes}


JSON_SYNTAX = Syntax("{[", "}]", '"')
PYTHON_SYNTAX = Syntax("{[(", "}])", "\"'")


class ValueScanner:
    """Finds the end of a bracketed or quoted value, looking at each character once."""

    def __init__(self, syntax: Syntax) -> None:
        self._syntax = syntax
        self._depth = 0
        self._quote = ""
        self._is_escaped = False

    def find_end(self, text: str, pos: int) -> int:
        """Return the position after the value, or -1 if all of `text` from `pos` on is in it: call again with more."""
        if self._is_escaped and pos < len(text):
            pos, self._is_escaped = pos + 1, False
        while True:
            if self._quote:
                match = self._syntax.quoted[self._quote].match(text, pos)
                assert match is not None
                pos = match.end() + 1
                if pos > len(text):
                    return -1
                if text[pos - 1] == "\\":  # the last there is
                    self._is_escaped = True
                    return -1
                self._quote = ""
            else:
                match = self._syntax.structure.search(text, pos)
                if match is None:
                    return -1
                pos, char = match.end(), match[0]
                if char in self._syntax.quotes:
                    self._quote = char
                    continue
                self._depth += 1 if char in self._syntax.openers else -1
            if self._depth <= 0:
                return pos


class Reader:
    """The text so far, and how far it has been read. What follows the mark can be read again."""

    def __init__(self) -> None:
        self._text = ""
        self._pos = 0
        self._mark: int | None = None
        self._is_closed = False

    def feed(self, text: str) -> None:
        """Append `text`. In time linear in all that is fed, however long the mark stays where it is."""
        start = self._pos if self._mark is None else self._mark
        kept, self._text = self._text, ""  # the only reference: CPython then appends in place
        if 2 * start >= len(kept):
            kept = kept[start:]
            self._pos -= start
            self._mark = None if self._mark is None else 0
        kept += text
        self._text = kept

    def close(self) -> None:
        """Note that no more text will come."""
        self._is_closed = True

    def mark(self) -> None:
        self._mark = self._pos

    def unmark(self) -> None:
        self._mark = None

    def rewind(self) -> int:
        """Go back to the mark, and remove it. Returns the number of characters that will be read again."""
        assert self._mark is not None
        num_chars = self._pos - self._mark
        self._pos, self._mark = self._mark, None
        return num_chars

    def take_rest(self) -> str:
        rest, self._pos = self._text[self._pos :], len(self._text)
        return rest

    def is_at_end(self) -> Reading[bool]:
        return not (yield from self.peek())

    def peek(self) -> Reading[str]:
        """Return the next character; empty at the end."""
        while self._pos == len(self._text) and not self._is_closed:
            yield
        return self._text[self._pos : self._pos + 1]

    def take(self, count: int) -> str:
        """Read characters that were seen already."""
        taken = self._text[self._pos : self._pos + count]
        self._pos += len(taken)
        return taken

    def skip_space(self) -> Reading[str]:
        """Pass over white space, and return it."""
        skipped = ""
        while True:
            match = SPACE.match(self._text, self._pos)
            assert match is not None
            self._pos = match.end()
            skipped += match[0]
            if self._pos < len(self._text) or self._is_closed:
                return skipped
            yield

    def looks_at(self, *words: str) -> Reading[str]:
        """Return the one of `words` that comes next; empty if none does."""
        while True:
            text = self._text[self._pos : self._pos + max(map(len, words))]
            for word in words:
                if text.startswith(word):
                    return word
            if self._is_closed or not any(word.startswith(text) for word in words):
                return ""
            yield

    def accept(self, *words: str) -> Reading[str]:
        """Read the one of `words` that comes next; empty if none does."""
        word = yield from self.looks_at(*words)
        self._pos += len(word)
        return word

    def expect(self, *words: str) -> Reading[str]:
        word = yield from self.accept(*words)
        if not word:
            raise Malformed
        return word

    def pass_until(self, marks: tuple[str, ...], emit: Emit) -> Reading[str]:
        """Emit what comes before the first of `marks`, as it comes, and return that mark (it is not read).

        Empty at the end of the text. No mark may lie inside another, except at its end.
        """
        head, pattern = patterns_of(marks)
        while True:
            match = None
            stop = len(self._text)
            if head.search(self._text, self._pos):  # most pieces of a text have nothing of a mark
                match = pattern.search(self._text, self._pos)
                if match:
                    stop = match.start()
                elif not self._is_closed:
                    stop = self._safe_end(marks)
            if stop > self._pos:
                emit(self.take(stop - self._pos))
            if match:
                return match[0]
            if self._is_closed:
                return ""
            yield

    def read_until(self, marks: tuple[str, ...], limit: int) -> Reading[str]:
        """Read up to the first of `marks`: at most `limit` characters, else the text is malformed."""
        _, pattern = patterns_of(marks)
        most = limit + max(map(len, marks))
        while True:
            match = pattern.search(self._text, self._pos, self._pos + most)
            if match and match.start() <= self._pos + limit:
                return self.take(match.start() - self._pos)
            if self._is_closed or len(self._text) >= self._pos + most:
                raise Malformed
            yield

    def pass_value(self, emit: Emit, syntax: Syntax = JSON_SYNTAX) -> Reading[None]:
        """Emit one value, as it comes; what there is of it if the text ends first."""
        head = yield from self.peek()
        if head and head in syntax.openers + syntax.quotes:
            find_end = ValueScanner(syntax).find_end
        else:
            find_end = _end_of_scalar
        while True:
            end = find_end(self._text, self._pos)
            emit(self.take((end if end >= 0 else len(self._text)) - self._pos))
            if end >= 0 or self._is_closed:
                return
            yield

    def read_value(self, syntax: Syntax = JSON_SYNTAX) -> Reading[str]:
        """Read one value, whole."""
        parts: list[str] = []
        yield from self.pass_value(parts.append, syntax)
        return "".join(parts)

    def _safe_end(self, marks: tuple[str, ...]) -> int:
        """Return where the text ends, less a tail that may be the head of a mark."""
        end = len(self._text)
        for start in range(max(self._pos, end - max(map(len, marks)) + 1), end):
            if any(mark.startswith(self._text[start:]) for mark in marks):
                return start
        return end


def _end_of_scalar(text: str, pos: int) -> int:
    match = SCALAR_END.search(text, pos)
    return match.start() if match else -1


@lru_cache(maxsize=64)
def patterns_of(marks: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return patterns of the first character of one of `marks`, and of one of them."""
    head = "".join({mark[0] for mark in marks})
    return re.compile(f"[{re.escape(head)}]"), re.compile("|".join(map(re.escape, marks)))
