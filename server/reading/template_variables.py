"""The variables of a chat template beside the conversation: the server's defaults and what a request says."""

from typing import TYPE_CHECKING, Any

import orjson

from engine.errors import InvalidRequest

if TYPE_CHECKING:
    from server.reading.openai_body import ChatFields  # `--help` should not wait for that

JSON = dict[str, Any]
RESERVED = frozenset({"self", "messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"})


def read_defaults(text: str | None) -> JSON:
    """Read --default-chat-template-kwargs. `ValueError` says what is wrong with it."""
    flag = "--default-chat-template-kwargs"
    try:
        defaults = orjson.loads(text or "{}")
    except orjson.JSONDecodeError as error:
        raise ValueError(f'{flag} must be a JSON object such as {{"enable_thinking": false}}: {error}') from None
    if not isinstance(defaults, dict):
        raise ValueError(f'{flag} must be a JSON object such as {{"enable_thinking": false}}, got {text}')
    if taken := RESERVED & defaults.keys():
        raise ValueError(f"{flag} must not hold {', '.join(sorted(taken))}")
    return defaults


def template_variables(body: "ChatFields", defaults: JSON) -> JSON:
    """Return the variables for `body`: its own go before what its other fields mean, and these before `defaults`."""
    own = body.chat_template_kwargs
    if taken := RESERVED & own.keys():
        raise InvalidRequest(f"chat_template_kwargs must not hold {', '.join(sorted(taken))}", "chat_template_kwargs")
    variables = dict(defaults)
    if body.reasoning_effort == "none":
        variables |= _thinking(is_on=False)
    elif body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    if body.thinking is not None:
        variables |= _thinking(is_on=body.thinking.type != "disabled")
    return variables | own


def _thinking(*, is_on: bool) -> JSON:
    return {"enable_thinking": is_on, "thinking": is_on}
