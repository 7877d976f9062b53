"""An answer on the terminal as it comes: markdown through rich, or the bare text."""

import contextlib
import sys
import termios
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, Self, TextIO

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.segment import Segment

THOUGHT_LINES = 3  # of the reasoning, while it is written
FENCES = ("```", "~~~")


class Display(Protocol):
    """Shows one answer. Used as a context, which leaves what has come on the screen."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc_info: object) -> None: ...
    def think(self, text: str) -> None: ...
    def write(self, text: str) -> None: ...


def printable(text: str) -> str:
    """Return a model's text without control characters, which could move the cursor or rename the terminal."""
    return text if text.isprintable() else "".join(c for c in text if c.isprintable() or c in "\n\t")


def finished_len(text: str) -> int:
    """Return how much of a markdown text is blocks that no later text can change.

    A block ends with a blank line outside a fence, unless what follows is indented: then it goes on.
    """
    end, pos, fence, was_blank = 0, 0, "", False
    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        if was_blank and not fence and stripped and not line[0].isspace():
            end = pos
        if fence:
            fence = "" if stripped.startswith(fence) else fence
        else:
            fence = next((mark for mark in FENCES if stripped.startswith(mark)), "")
        was_blank = not stripped and line.endswith("\n")
        pos += len(line)
    return end


@contextlib.contextmanager
def silent_keys() -> Iterator[None]:
    """Do not echo what is typed meanwhile: it would move the lines that are drawn again. The next prompt reads it."""
    try:
        before = termios.tcgetattr(sys.stdin)
    except (termios.error, OSError, ValueError):  # no terminal
        yield
        return
    silent = before.copy()
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


class PlainDisplay:
    """Writes the text as it is, and no reasoning: for pipes."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file or sys.stdout
        self._ends_line = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._ends_line:
            self.write("\n")

    def think(self, text: str) -> None:
        pass

    def write(self, text: str) -> None:
        self.file.write(printable(text) if self.file.isatty() else text)
        self.file.flush()
        self._ends_line = text.endswith("\n")


class MarkdownDisplay:
    """Renders markdown: finished blocks for good, the one being written again and again below them."""

    def __init__(self, console: "Console") -> None:
        from rich.live import Live

        self.console = console
        self.live: Live = Live(console=console, auto_refresh=True, refresh_per_second=12, transient=True)
        self._text = self._thought = ""

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.live.stop()
        self._print(self._text)
        self._text = ""

    def think(self, text: str) -> None:
        from rich.text import Text

        self._thought += printable(text)
        self.live.update(LastLines(Text(self._thought.strip(), style="dim italic"), THOUGHT_LINES))

    def write(self, text: str) -> None:
        from rich.markdown import Markdown

        self._text += printable(text)
        if end := finished_len(self._text):
            self._print(self._text[:end])
            self._text = self._text[end:]
        self.live.update(LastLines(Markdown(self._text), max(self.console.height - 2, 1)))

    def _print(self, text: str) -> None:
        from rich.markdown import Markdown

        if text.strip():
            self.console.print(LastLines(Markdown(text)), "")


class LastLines:
    """Renders the last lines of something, so that what is written now can be seen however long it is.

    Blank lines before and after it are left out: rich puts them around some kinds of blocks only.
    """

    def __init__(self, content: "RenderableType", count: int = 0) -> None:
        """count: 0 for all lines."""
        self.content, self.count = content, count

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.segment import Segment

        lines = console.render_lines(self.content, options.update(height=None), pad=False)
        while lines and is_blank(lines[0]):
            del lines[0]
        while lines and is_blank(lines[-1]):
            lines.pop()
        for line in lines[-self.count :]:
            yield from line
            yield Segment.line()


def is_blank(line: "list[Segment]") -> bool:
    return all(not segment.text.strip() and not (segment.style and segment.style.bgcolor) for segment in line)
