"""Calls of tools as chat.completions spells them: of functions, and of custom tools, whose input is a text."""

from collections.abc import Sequence

from server.parsers.delta import ToolCallDelta
from server.reading.custom_tools import input_of
from server.reading.protocol import JSON


class CallWriter:
    """Writes the calls of one answer."""

    def __init__(self, custom: frozenset[str]) -> None:
        """Write calls of tools, of which those in `custom` are custom tools."""
        self._custom = custom
        self._index = 0  # of the custom tool's call that is held
        self._held: list[str] | None = None  # its arguments: its text stands as JSON in them until they are whole

    def whole(self, calls: Sequence[ToolCallDelta]) -> list[JSON]:
        """Return the calls of an answer that is not streamed."""
        return [self._named(call, self._input(call.name, call.arguments)) for call in calls]

    def deltas(self, calls: Sequence[ToolCallDelta]) -> list[JSON]:
        """Return what a stream says of calls that begin or grow."""
        written: list[JSON] = []
        for call in calls:
            if call.id is not None:
                written += self.rest()
                is_custom = call.name in self._custom
                self._held, self._index = [call.arguments] if is_custom else None, call.index
                written.append({"index": call.index, **self._named(call, "" if is_custom else call.arguments)})
            elif self._held is not None:
                self._held.append(call.arguments)
            else:
                written.append({"index": call.index, "function": {"arguments": call.arguments}})
        return written

    def rest(self) -> list[JSON]:
        """Return the text of the custom tool's call that is held: it is whole."""
        if self._held is None:
            return []
        text, self._held = input_of("".join(self._held)), None
        return [{"index": self._index, "custom": {"input": text}}]

    def _input(self, name: str | None, arguments: str) -> str:
        return input_of(arguments) if name in self._custom else arguments

    def _named(self, call: ToolCallDelta, given: str) -> JSON:
        if call.name in self._custom:
            return {"id": call.id, "type": "custom", "custom": {"name": call.name, "input": given}}
        return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": given}}
