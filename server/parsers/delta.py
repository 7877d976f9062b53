"""The parts of an answer."""

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
    """The parts that a piece of text turned out to be, in this order."""

    reasoning: str = ""
    text: str = ""
    tool_calls: Sequence[ToolCallDelta] = ()
