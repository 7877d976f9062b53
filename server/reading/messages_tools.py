"""Tools of Anthropic's Messages API, as the functions that a model is offered.

Those that only Anthropic runs are left out. Blocks of the messages add and remove tools in the middle of a
conversation: the model is offered those that there are at its end.
"""

from collections.abc import Iterator

from engine.errors import InvalidRequest
from server.reading.left_out import TOOL, LeftOut
from server.reading.messages_body import (
    AssistantMessage,
    ChangedTool,
    Compaction,
    MessagesTool,
    SystemMessage,
    ToolAddition,
    ToolRemoval,
    UserMessage,
)
from server.reading.protocol import JSON

Message = UserMessage | AssistantMessage | SystemMessage
NAMES = {
    "function": "", "function.name": ".name", "function.description": ".description",
    "function.parameters": ".input_schema", "function.strict": ".strict",
}  # fmt: skip
"""Fields of a tool in chat.completions, and what this API calls them."""


class MessagesTools:
    """The functions that the model is offered, and where the body describes each."""

    def __init__(self, given: list[MessagesTool], messages: list[Message], left_out: LeftOut) -> None:
        """Read the body's `tools`, then what its messages add and remove. What cannot be run goes to `left_out`."""
        self._left_out = left_out
        self._offered: list[tuple[JSON, str]] = []  # (function, path of its description)
        self._known: dict[str, tuple[JSON, str]] = {}  # by name, those removed among them
        self._left: set[str] = set()  # names of tools that cannot be run here
        for i, tool in enumerate(given):
            self._add(tool, f"tools[{i}]")
        for block, path in _changes(messages):
            self._change(block, path)

    @property
    def functions(self) -> list[JSON]:
        """Return the tools, as chat.completions has them."""
        return [{"type": "function", "function": function} for function, _ in self._offered]

    @property
    def names(self) -> dict[str, str]:
        """Return the names of fields of `functions` that the client has in another place."""
        return {
            f"tools[{i}].{ours}": path + theirs
            for i, (_, path) in enumerate(self._offered)
            if path != f"tools[{i}]"
            for ours, theirs in NAMES.items()
        }

    def _add(self, tool: MessagesTool, path: str) -> None:
        if tool.type != "custom":
            self._left_out.add(TOOL, tool.type)
            self._left.add(tool.name or "")
            return
        if tool.name is None:
            raise tool.wrong("name", "a string", path)
        if tool.input_schema is None:
            raise tool.wrong("input_schema", "an object", path)
        function = {"parameters": tool.input_schema, **tool.given(("name", "description", "strict"))}
        described = self._known[tool.name] = function, path
        self._offered.append(described)

    def _remove(self, name: str) -> None:
        self._offered = [described for described in self._offered if described[0]["name"] != name]

    def _change(self, block: ToolAddition | ToolRemoval, path: str) -> None:
        tool = block.tool
        if isinstance(block, ToolAddition) and tool.type == "tool_definition":
            if tool.definition is None:
                raise tool.wrong("definition", "a tool", path)
            self._remove(tool.definition.name or "")
            self._add(tool.definition, f"{path}.definition")
        elif tool.type != "tool_reference":
            self._left_out.add(TOOL, tool.type)
        elif (described := self._described(tool, path)) is not None:
            self._remove(described[0]["name"])
            if isinstance(block, ToolAddition):
                self._offered.append(described)

    def _described(self, tool: ChangedTool, path: str) -> tuple[JSON, str] | None:
        """Return the tool that is meant; None if it cannot be run here."""
        if tool.name is None:
            raise tool.wrong("name", "a string", path)
        described = self._known.get(tool.name)
        if described is None and tool.name not in self._left:
            raise InvalidRequest(f"{path}.name: no tool before it is named {tool.name[:128]!r}", f"{path}.name")
        return described


def _changes(messages: list[Message]) -> Iterator[tuple[ToolAddition | ToolRemoval, str]]:
    """Yield (block, path of its tool) of what adds or removes a tool, in order."""
    for i, message in enumerate(messages):
        if isinstance(message.content, str):
            continue
        for j, block in enumerate(message.content):
            path = f"messages[{i}].content[{j}]"
            if isinstance(block, ToolAddition | ToolRemoval):
                yield block, f"{path}.tool"
            elif isinstance(block, Compaction):  # of messages that are not sent any more
                for k, change in enumerate(block.tool_changes or ()):
                    yield change, f"{path}.tool_changes[{k}].tool"
