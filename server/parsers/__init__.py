"""An answer's text, as it comes, into reasoning, text and tool calls."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class ToolCallDelta:
    """More of the answer's `index`-th call. `id` and `name` come with the call's first delta only."""

    index: int
    id: str | None
    name: str | None
    arguments: str  # more of its JSON text


@dataclass(slots=True)
class AnswerDelta:
    """What a piece of text turned out to be, in this order."""

    reasoning: str = ""
    text: str = ""
    tool_calls: Sequence[ToolCallDelta] = ()


class AnswerParser:
    """Reads one answer piece by piece. Holds back what may become a marker."""

    num_tool_calls = 0

    def push(self, text: str) -> AnswerDelta:
        return AnswerDelta(text=text)

    def finish(self) -> AnswerDelta:
        """The answer has ended: what was held back."""
        return AnswerDelta()
