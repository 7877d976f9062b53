"""The boundary between an answer's reasoning and the rest."""

from dataclasses import dataclass

from server.parsers.harmony import (
    ANALYSIS,
    CALL,
    CHANNEL,
    END,
    FINAL,
    MESSAGE,
    MESSAGE_ENDS,
    NEXT,
    START,
    TO_TOOL,
    Header,
    read_header,
)
from server.parsers.reader import Emit, Malformed, Reader, Reading


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """Reasoning stands between two marks, at the answer's head."""

    start: str
    end: str
    is_always: bool = False  # answers begin inside, with or without the start mark
    after: str = ""  # what the model writes between the end mark and the rest
    opening: str = ""  # what the model writes ahead of the text that is no reasoning

    def begins_inside(self, prompt: str) -> bool | None:
        """Return what a prompt's end has decided: inside, past the reasoning (None), or not yet (False)."""
        head = prompt.rstrip()
        if head.endswith(self.start):
            return True
        return None if head.endswith(self.end) else self.is_always

    def new_parser(self, *, is_inside: bool, is_separate: bool = True) -> "ReasoningParser":
        return ReasoningParser(self, is_inside=is_inside, is_separate=is_separate)


class Harmony(ReasoningFormat):
    """Reasoning stands in messages of its own, anywhere in the answer."""

    def begins_inside(self, prompt: str) -> bool | None:
        return prompt.rstrip().endswith(self.start)

    def new_parser(self, *, is_inside: bool, is_separate: bool = True) -> "ReasoningParser":
        return HarmonyParser(self, is_inside=is_inside, is_separate=is_separate)


class Hunyuan(ReasoningFormat):
    """The text has marks of its own, <answer> and </answer>, behind reasoning or without it."""

    def begins_inside(self, prompt: str) -> bool:
        """Return whether the prompt has begun the reasoning. Past it, the text's marks are still to be read."""
        return bool(super().begins_inside(prompt))

    def new_parser(self, *, is_inside: bool, is_separate: bool = True) -> "ReasoningParser":
        return HunyuanParser(self, is_inside=is_inside, is_separate=is_separate)


THINK = ReasoningFormat("<think>", "</think>")
ALWAYS_THINK = ReasoningFormat("<think>", "</think>", is_always=True)
REASONING_FORMATS = {
    "deepseek-r1": ALWAYS_THINK,
    "deepseek-v3": THINK,
    "glm45": THINK,
    "gpt-oss": Harmony(ANALYSIS, END, after=NEXT, opening=FINAL),
    "hunyuan": Hunyuan("<think>", "</think>"),
    "kimi": ReasoningFormat("◁think▷", "◁/think▷"),
    "kimi_k2": THINK,
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
    "qwen3": THINK,
    "qwen3-thinking": ALWAYS_THINK,
    "seed_oss": ReasoningFormat("<seed:think>", "</seed:think>"),
    "step3": ALWAYS_THINK,
}


def find_reasoning_format(template: str) -> str | None:
    """Return the name of the format whose marks a chat template writes. Whether it has begun is the prompt's to say."""
    if "<think>" in template and ("<|extra_0|>" in template or "<｜hy_" in template):
        return "hunyuan"
    for mark, name in (
        (CHANNEL, "gpt-oss"), ("◁think▷", "kimi"), ("[THINK]", "mistral"), ("<seed:think>", "seed_oss"),
        ("<think>", "qwen3"), ("</think>", "qwen3"),
    ):  # fmt: skip
        if mark in template:
            return name
    return None


class ReasoningParser:
    """Splits an answer into (reasoning, the rest)."""

    def __init__(self, format_: ReasoningFormat, *, is_inside: bool, is_separate: bool = True) -> None:
        """`is_inside`: the prompt has written the start mark. `is_separate`: else reasoning is text, marks and all."""
        self._format, self._is_separate = format_, is_separate
        self.is_inside = is_inside
        self.is_done = False  # all that follows is the rest
        self._reader = Reader()
        self._reasoning: list[str] = []
        self._rest: list[str] = []
        self._space: list[str] = []  # reasoning's last white space, dropped at its end
        self._program = self._read()

    def push(self, text: str) -> tuple[str, str]:
        self._reader.feed(text)
        return self._run()

    def finish(self) -> tuple[str, str]:
        self._reader.close()
        return self._run()

    def _run(self) -> tuple[str, str]:
        self.is_done = next(self._program, True) is True  # it yields None while it waits
        if self.is_done:
            self._rest.append(self._reader.take_rest())
        parts = "".join(self._reasoning), "".join(self._rest)
        self._reasoning.clear()
        self._rest.clear()
        return parts

    def _read(self) -> Reading[None]:
        reader, format_ = self._reader, self._format
        space = yield from reader.skip_space()
        start = yield from reader.accept(format_.start)
        if not (start or self.is_inside):
            self._rest.append(space)
            return
        self.is_inside = True
        if not self._is_separate:
            self._rest.append(space + start)
            if (yield from reader.pass_until((format_.end,), self._rest.append)):
                self._rest.append(reader.take(len(format_.end)))
        else:
            yield from reader.skip_space()
            if (yield from reader.pass_until((format_.end,), self._add)):
                reader.take(len(format_.end))
                space = yield from reader.skip_space()
                if not (yield from reader.is_at_end()):
                    self._rest.append(space[space.rfind("\n") + 1 :] if "\n" in space else "")  # an indentation stays

    def _add(self, text: str) -> None:
        shown = text.rstrip()
        if shown:
            self._reasoning += (*self._space, shown)
            self._space = []
        self._space.append(text[len(shown) :])


class HunyuanParser(ReasoningParser):
    """Splits an answer whose text stands between marks: these are left out, unless reasoning stays in the text."""

    def _read(self) -> Reading[None]:
        reader = self._reader
        yield from super()._read()
        if not self._is_separate:
            return
        space = yield from reader.skip_space()
        if not (yield from reader.accept("<answer>")):
            self._rest.append(space)
            return
        yield from reader.skip_space()
        if mark := (yield from reader.pass_until(("\n</answer>", "</answer>"), self._rest.append)):
            reader.take(len(mark))
            yield from reader.skip_space()


class HarmonyParser(ReasoningParser):
    """Splits an answer in `server.parsers.harmony`'s format: the analysis, and the text of all other messages.

    Messages to tools are handed on with their marks, in the spelling that the format of calls reads.
    """

    _has_text = False  # of a message, so that another one's begins on a new line

    def _read(self) -> Reading[None]:
        reader = self._reader
        if self.is_inside:
            yield from self._read_content(Header("", "analysis", ""))
        while (yield from reader.pass_until((START, CHANNEL), self._rest.append)):
            try:
                header = yield from read_header(reader)
            except Malformed:
                self._rest.append(reader.take(1))  # no mark any more
                continue
            if header is not None:
                yield from self._read_content(header)

    def _read_content(self, header: Header) -> Reading[None]:
        """Read a message's content, and the mark at its end."""
        reader, around = self._reader, header.text
        is_reasoning = header.channel == "analysis" and not header.recipient
        emit: Emit = self._rest.append
        if is_reasoning and self._is_separate:
            self.is_inside, around, emit = True, "", self._add
            if self._space:
                self._space.append("\n")
            yield from reader.skip_space()
        elif header.recipient:
            around = f"{TO_TOOL}{header.recipient}{MESSAGE}"
        elif not is_reasoning:
            around = "\n" if self._has_text else ""
            self._has_text = True
        if around:
            emit(around)
        mark = yield from reader.pass_until(MESSAGE_ENDS, emit)
        if mark and mark != START:
            end = reader.take(len(mark))
            if header.recipient or (is_reasoning and not self._is_separate):
                self._rest.append(CALL if header.recipient else end)
            yield from reader.skip_space()
