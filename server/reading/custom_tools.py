"""Custom tools, which take a text in place of arguments, as functions of one text: models are taught to call those."""

from typing import Any

import orjson

from engine.text.lark import lark_of_regex
from server.reading.openai_body import CustomTool
from server.reading.protocol import JSON

INPUT = "input"  # the function's one parameter
INPUT_SCHEMA: JSON = {
    "type": "object",
    "properties": {INPUT: {"type": "string"}},
    "required": [INPUT],
    "additionalProperties": False,
}


def shown_function(tool: CustomTool) -> JSON:
    """Return the function that the model is shown in place of a custom tool, as chat.completions has it.

    Its grammar, which is enforced, stands in the description: the model is to know what it can say.
    """
    description = tool.description
    syntax, definition = _grammar(tool)
    if syntax:
        description = f"{description}\n{INPUT} must match this {syntax} grammar:\n{definition}".lstrip()
    function = {"name": tool.name, "description": description, "parameters": INPUT_SCHEMA}
    return {"type": "function", "function": function}


def lark_of(tool: CustomTool) -> str:
    """Return the grammar of a custom tool's input in Lark; "" if it may be any text."""
    syntax, definition = _grammar(tool)
    return lark_of_regex(definition) if syntax == "regex" else definition


def _grammar(tool: CustomTool) -> tuple[str, str]:
    """Return (syntax, definition) of the tool's grammar; ("", "") if it has none."""
    if tool.format is None or tool.format.type == "text" or tool.format.grammar is None:
        return "", ""
    return tool.format.grammar.syntax, tool.format.grammar.definition


def input_of(arguments: str) -> str:
    """Return the text that a custom tool is called with, of the arguments of its function."""
    try:
        read = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments
    given = read.get(INPUT) if isinstance(read, dict) else None
    return given if isinstance(given, str) else arguments


def arguments_of_input(given: Any) -> JSON:
    """Return the arguments of a custom tool's function, of the text that it was called with."""
    return {INPUT: given}
