"""Write tools, their calls and their results as plain text, for chat templates that show none."""

from collections.abc import Sequence

from server.parsers.tool_calls import ToolFormat, json_of
from server.reading.contents import together
from server.reading.protocol import JSON


def with_tools(messages: Sequence[JSON], tools: Sequence[JSON], format_: ToolFormat, *, has_system: bool) -> list[JSON]:
    """Return `messages` in which a system text describes `tools`; the first user's text where there is no system."""
    text = describe(tools, format_)
    messages = list(messages)
    role = "system" if has_system else "user"
    place = next((i for i, message in enumerate(messages) if message["role"] == role), None)
    if place is None or (has_system and place > 0):
        return [{"role": role, "content": text}, *messages]
    content = messages[place]["content"]
    both = (content, text) if has_system else (text, content)
    messages[place] = {**messages[place], "content": together(*both, separator="\n\n")}
    return messages


def describe(tools: Sequence[JSON], format_: ToolFormat) -> str:
    """Return a text that says which functions there are and how to call them in `format_`."""
    listed = "\n".join(map(json_of, tools))
    return (
        "# Tools\n\n"
        "You can call the functions listed here, one a line with a JSON schema of its arguments.\n"
        f"<tools>\n{listed}\n</tools>\n\n"
        "To call a function, write its name and its arguments in exactly this form:\n"
        f"{format_.written('function_name', {'argument_name': 'value'})}\n"
        "Then stop: the result comes in the next message, between <tool_response> and </tool_response>. "
        "If no function is needed, answer in plain text."
    )


def with_calls_as_text(messages: Sequence[JSON], format_: ToolFormat) -> list[JSON]:
    """Return `messages` with calls in their assistant's text, as the model wrote them, and results in a user's."""
    shown: list[JSON] = []
    answers_tools = False  # the last message is a user's of results
    for message in messages:
        if message["role"] in ("tool", "function"):
            result = together("<tool_response>", message["content"], "</tool_response>")
            if answers_tools:
                shown[-1]["content"] = together(shown[-1]["content"], result)
            else:
                shown.append({"role": "user", "content": result})
            answers_tools = True
            continue
        if answers_tools and message["role"] == "user":  # many templates want users and assistants in turn
            shown[-1]["content"] = together(shown[-1]["content"], message["content"])
            continue
        answers_tools = False
        shown.append(_with_calls(message, format_) if message.get("tool_calls") else message)
    return shown


def _with_calls(message: JSON, format_: ToolFormat) -> JSON:
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [format_.written(function.get("name") or "", function["arguments"]) for function in functions]
    contents = [message["content"], *calls] if message["content"] else calls
    return {**{name: value for name, value in message.items() if name != "tool_calls"}, "content": together(*contents)}
