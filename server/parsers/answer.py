"""An answer's text into reasoning, text and tool calls."""

from collections.abc import Sequence
from dataclasses import replace

from server.parsers.delta import AnswerDelta, ToolCallDelta
from server.parsers.reasoning import ReasoningParser
from server.parsers.tool_calls import ToolCallParser


class AnswerParser:
    """Reads one answer, whole or piece by piece: the parts are the same. Holds back what may become a mark."""

    def __init__(
        self,
        reasoning: ReasoningParser | None,
        tool_calls: ToolCallParser | None,
        *,
        streams_reasoning: bool = True,
        includes_reasoning: bool = True,
    ) -> None:
        """`streams_reasoning`: else reasoning comes in one piece, at its end; `includes_reasoning`: else not at all."""
        self.reasoning, self.tool_calls = reasoning, tool_calls
        self._streams_reasoning, self._includes_reasoning = streams_reasoning, includes_reasoning
        self._held: list[str] = []  # reasoning that does not stream

    @property
    def num_tool_calls(self) -> int:
        return 0 if self.tool_calls is None else self.tool_calls.num_tool_calls

    def push(self, text: str) -> AnswerDelta:
        reasoning = ""
        if self.reasoning is not None and not self.reasoning.is_done:
            reasoning, text = self.reasoning.push(text)
        return self._delta(reasoning, text)

    def finish(self) -> AnswerDelta:
        """Return what was held back: the answer has ended."""
        reasoning = text = ""
        if self.reasoning is not None and not self.reasoning.is_done:
            reasoning, text = self.reasoning.finish()
        delta = self._delta(reasoning, text)
        if self.tool_calls is not None:
            rest, calls = self.tool_calls.finish()
            delta.text += rest
            delta.tool_calls = [*delta.tool_calls, *calls]
        return delta

    def parse(self, text: str) -> AnswerDelta:
        """Return the parts of a whole answer."""
        delta, rest = self.push(text), self.finish()
        delta.reasoning += rest.reasoning
        delta.text += rest.text
        delta.tool_calls = joined([*delta.tool_calls, *rest.tool_calls])
        return delta

    def _delta(self, reasoning: str, text: str) -> AnswerDelta:
        calls: Sequence[ToolCallDelta] = ()
        if not self._includes_reasoning:
            reasoning = ""
        if not self._streams_reasoning and self.reasoning is not None:
            self._held.append(reasoning)
            reasoning = ""
            if self.reasoning.is_done:
                reasoning = "".join(self._held)
                self._held.clear()
        if self.tool_calls is not None and text:
            text, calls = self.tool_calls.push(text)
        return AnswerDelta(reasoning, text, calls)


def joined(deltas: Sequence[ToolCallDelta]) -> list[ToolCallDelta]:
    """Join the deltas of each call into one."""
    calls: list[ToolCallDelta] = []
    for delta in deltas:
        if delta.id is not None:
            calls.append(replace(delta))
        else:
            calls[delta.index].arguments += delta.arguments
    return calls
