"""The boundary between an answer's reasoning and the rest."""

from dataclasses import dataclass

from server.parsers.reader import Reader, Reading


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """Reasoning stands between two marks, at the answer's head."""

    start: str
    end: str
    is_always: bool = False  # answers begin inside, with or without the start mark

    def begins_inside(self, prompt: str) -> bool | None:
        """Return what a prompt's end has decided: inside, past the reasoning (None), or not yet (False)."""
        head = prompt.rstrip()
        if head.endswith(self.start):
            return True
        return None if head.endswith(self.end) else self.is_always


THINK = ReasoningFormat("<think>", "</think>")
ALWAYS_THINK = ReasoningFormat("<think>", "</think>", is_always=True)
REASONING_FORMATS = {
    "deepseek-r1": ALWAYS_THINK,
    "deepseek-v3": THINK,
    "glm45": THINK,
    "kimi": ReasoningFormat("◁think▷", "◁/think▷"),
    "kimi_k2": THINK,
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
    "qwen3": THINK,
    "qwen3-thinking": ALWAYS_THINK,
    "step3": ALWAYS_THINK,
}
REASONING_ALIASES = {  # vLLM's spellings
    "deepseek_r1": "deepseek-r1",
    "deepseek_v3": "deepseek-v3",
}


def find_reasoning_format(template: str) -> str | None:
    """Return the name of the format whose marks a chat template writes. Whether it has begun is the prompt's to say."""
    for mark, name in (("◁think▷", "kimi"), ("[THINK]", "mistral"), ("<think>", "qwen3"), ("</think>", "qwen3")):
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
