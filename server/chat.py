"""From an OpenAI `messages` list to the prompt's text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from engine.errors import InvalidRequest
from engine.request import SamplingParams
from server.config import ServerConfig
from server.live import Options
from server.parsers import AnswerParser
from server.protocol import JSON, Engine, Fields, TokenizerFacade, check_n
from server.sampling import MAX_TOP_LOGPROBS, read_options, read_sampling_params

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MEDIA_PARTS = ("image_url", "input_image", "image", "input_audio", "audio_url", "video_url")

RESERVED_VARIABLES = frozenset(
    {"self", "messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"}
)

# For models that bring no template of their own.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
VICUNA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + '</s>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
BUILT_IN_TEMPLATES = {"chatml": CHATML, "llama-3-instruct": LLAMA_3, "vicuna_v1.1": VICUNA}


def load_chat_template(name: str | None, tokenizer: TokenizerFacade) -> str | None:
    """The template that --chat-template names: one of the model's, a built-in one, or a file (Jinja, or JSON that
    holds a `chat_template`). None means the model's own. `ValueError` if there is no such template."""
    if name is None:
        return None
    of_model = tokenizer.chat_template
    if isinstance(of_model, dict) and name in of_model:
        return of_model[name]
    if name in BUILT_IN_TEMPLATES:
        return BUILT_IN_TEMPLATES[name]
    file = Path(name)
    if not file.is_file():
        known = [*BUILT_IN_TEMPLATES, *(of_model if isinstance(of_model, dict) else ())]
        raise ValueError(f"--chat-template {name}: no such file, nor one of {', '.join(known)}")
    text = file.read_text()
    if file.suffix == ".json":
        values = orjson.loads(text)
        if not isinstance(values, dict) or not isinstance(values.get("chat_template"), str):
            raise ValueError(f"--chat-template {name}: no text under the key chat_template")
        return values["chat_template"]
    return text


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """A conversation's next answer: what to generate it from and how, and how to read it."""

    input_ids: list[int]
    params: SamplingParams
    options: Options
    new_parser: Callable[[], AnswerParser] | None  # one for each answer; None: all of an answer is its text


class Chats:
    """Reads chat requests: the prompt by the model's template, or the one given on the command line."""

    def __init__(self, engine: Engine, config: ServerConfig) -> None:
        self.engine = engine
        self.template = load_chat_template(config.chat_template, engine.tokenizer)

    async def turn(self, body: Fields) -> ChatTurn:
        """What an OpenAI chat body asks for. `InvalidRequest` names the field that is wrong."""
        params = read_sampling_params(body, self.engine, ("max_completion_tokens", "max_tokens"), None)
        check_n(params.n, 1)
        num_top = body.integer("top_logprobs", 0, low=0, high=MAX_TOP_LOGPROBS)
        has_logprobs = body.flag("logprobs")
        if num_top and not has_logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
        options = read_options(body, num_top if has_logprobs else -1)
        input_ids = await self.engine.encode(self.render(body), add_special_tokens=False)  # the template wrote them
        if not input_ids:
            raise InvalidRequest("messages make an empty prompt", "messages")
        return ChatTurn(input_ids, params, options, None)

    def render(self, body: Fields) -> str:
        """The prompt of a chat request. `InvalidRequest` names the message, or says why the template refused."""
        messages = parse_messages(body)
        continues = body.flag("continue_final_message")
        if continues and messages[-1]["role"] != "assistant":
            raise InvalidRequest("continue_final_message needs an assistant message at the end", "messages")
        variables = body.object("chat_template_kwargs") or Fields({})
        if taken := RESERVED_VARIABLES & variables.values.keys():
            raise InvalidRequest(
                f"chat_template_kwargs must not hold {', '.join(sorted(taken))}", "chat_template_kwargs"
            )
        return self.engine.tokenizer.render_chat(
            messages,
            tools=_tools(body),
            add_generation_prompt=body.flag("add_generation_prompt", not continues),
            continue_final_message=continues,
            chat_template=self.template,
            **variables.values,
        )


def parse_messages(body: Fields) -> list[JSON]:
    """Checked messages: known roles, content as one string (null only beside tool calls)."""
    given = body.array("messages")
    if not given:
        raise InvalidRequest("messages must be a list of at least one message", "messages")
    return [_parse_message(Fields(message, f"messages[{i}]"), f"messages[{i}]") for i, message in enumerate(given)]


def _parse_message(fields: Fields, path: str) -> JSON:
    if not fields.has("role"):
        fields.fail("role", " or ".join(map(repr, ROLES)))
    role = fields.one_of("role", ROLES, "user")
    message = {**fields.values, "role": "system" if role == "developer" else role}
    content = fields.get("content")
    if isinstance(content, list):
        message["content"] = _join_parts(content, f"{path}.content")
    elif content is None and role == "assistant" and fields.has("tool_calls"):
        message["content"] = ""
    elif not isinstance(content, str):
        fields.fail("content", "a string or a list of parts")
    if fields.has("tool_calls"):
        message["tool_calls"] = [
            _parse_tool_call(call, f"{path}.tool_calls[{i}]") for i, call in enumerate(fields.array("tool_calls"))
        ]
    return message


def _join_parts(parts: list[Any], path: str) -> str:
    texts = []
    for i, part in enumerate(parts):
        fields = Fields(part, f"{path}[{i}]")
        kind = fields.text("type")
        if kind in MEDIA_PARTS:
            raise InvalidRequest(f"{path}[{i}] is {kind}, but this model reads text only", f"{path}[{i}].type")
        if kind not in ("text", "input_text") or not fields.has("text"):
            raise InvalidRequest(f'{path}[{i}] must be {{"type": "text", "text": ...}}', f"{path}[{i}]")
        texts.append(fields.text("text"))
    return "\n".join(texts)


def _parse_tool_call(call: Any, path: str) -> JSON:
    """Templates want a call's arguments as an object; OpenAI's clients send them as JSON text."""
    fields = Fields(call, path)
    function = fields.object("function")
    if function is None:
        fields.fail("function", "an object")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments or "{}")
        except orjson.JSONDecodeError:
            function.fail("arguments", "a JSON object as text")
    return {**fields.values, "function": {**function.values, "arguments": arguments}}


def _tools(body: Fields) -> list[JSON] | None:
    tools = [Fields(tool, f"tools[{i}]").values for i, tool in enumerate(body.array("tools"))]
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise InvalidRequest('tool_choice must be "auto" or "none": this server cannot force a call', "tool_choice")
    return tools if tools and choice != "none" else None
