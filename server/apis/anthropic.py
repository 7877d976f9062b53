"""Anthropic's Messages API: /v1/messages and /v1/messages/count_tokens."""

import time
from typing import Any

import orjson
from aiohttp import web

from engine.declared import convert
from engine.errors import InvalidRequest
from engine.state import FinishReason
from server.apis.answer import failure_of
from server.apis.blocks import (
    REASONING,
    TEXT,
    TOOL_CALL,
    Block,
    BlockAnswer,
    arguments_of,
    chat_call,
    respond_in_blocks,
)
from server.config import ServerConfig
from server.http.live import LiveRequests, RequestFailed, new_rid
from server.http.sse import named_event
from server.reading.chat import Chats, ChatTurn
from server.reading.left_out import HINT, LeftOut, LeftOutBook
from server.reading.messages_body import answerable, own_tools
from server.reading.model_name import served_model
from server.reading.openai_body import ChatRequest
from server.reading.protocol import (
    JSON,
    REQUEST_FIELDS,
    Fields,
    anthropic_error,
    json_response,
    read_json,
    refuse,
    spelled,
)

UNSUPPORTED = ("n",)
SAME_NAMES = ("temperature", "top_p", "top_k", "max_tokens", "stream", *REQUEST_FIELDS)
OUR_NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "response_format.json_schema.schema": "output_config.format.schema",
    "json_schema": "output_config.format.schema",
    "tools[].function": "tools[]",
    "tools[].function.parameters": "tools[].input_schema",
    "reasoning_effort": "output_config.effort",
    "max_thinking_tokens": "thinking.budget_tokens",
}
ROLES = ("user", "assistant", "system")
PING = named_event({"type": "ping"})
MAX_SILENCE_S = 1.0  # before message_start, which a request that has its turn gets within milliseconds
TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class AnthropicApi:
    def __init__(self, config: ServerConfig, live: LiveRequests, chats: Chats, left_out: LeftOutBook) -> None:
        self.config, self.live, self.chats, self.left_out = config, live, chats, left_out

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/messages", self.messages),
            web.post("/v1/messages/count_tokens", self.count_tokens),
        ]

    async def messages(self, http_request: web.Request) -> web.StreamResponse:
        body = await read_json(http_request)
        model = served_model(self.config, body.text("model"))
        body.required("max_tokens", "an integer")
        with spelled(OUR_NAMES):
            turn = await self._turn(http_request, body)
            return await respond_in_blocks(http_request, self.live, MessageAnswer(turn, model))

    async def count_tokens(self, http_request: web.Request) -> web.Response:
        body = await read_json(http_request)
        served_model(self.config, body.text("model"))
        with spelled(OUR_NAMES):
            turn = await self._turn(http_request, body)
        return json_response({"input_tokens": len(turn.input_ids)})

    async def _turn(self, http_request: web.Request, body: Fields) -> ChatTurn:
        left_out = LeftOut()
        chat = chat_body(answerable(body, left_out, self.config.keep_volatile_prompts), left_out)
        if self.chats.reasoning_parser is None and chat.pop("max_thinking_tokens", None):
            left_out.add(HINT, "thinking.budget_tokens")  # agents send it to every model
        self.left_out.enter(http_request, left_out)
        return await self.chats.turn(convert(chat, ChatRequest))


# ---- reading ----


def chat_body(body: Fields, left_out: LeftOut) -> JSON:
    """Return the same request to chat.completions, but for tools that are not the client's own.

    `InvalidRequest` names what cannot be said there.
    """
    refuse(body, UNSUPPORTED)
    messages = read_messages(body)
    chat: JSON = {name: body.get(name) for name in SAME_NAMES if body.has(name)}
    chat |= {"messages": messages, "stop": body.strings("stop_sequences")}
    if messages[-1]["role"] == "assistant":
        if "tool_calls" in messages[-1]:
            raise InvalidRequest("messages must not end with a tool_use: its tool_result is missing", "messages")
        chat["continue_final_message"] = True
    if tools := own_tools(body, left_out):
        chat["tools"] = [_read_tool(tool) for tool in tools]
    if choice := body.object("tool_choice"):
        chat |= _read_tool_choice(choice)
    if output := body.object("output_config"):
        chat |= _read_output_config(output)
    return chat | _read_thinking(body.object("thinking"))


def read_messages(body: Fields) -> list[JSON]:
    """Return OpenAI's messages. One of Anthropic's becomes several where it holds tool results."""
    messages = [{"role": "system", "content": _join_texts(body, "system")}] if body.has("system") else []
    given = body.objects("messages")
    if not given:
        body.fail("messages", "a list of at least one message")
    for message in given:
        message.required("role", " or ".join(map(repr, ROLES)))
        role = message.one_of("role", ROLES, "user")
        if role == "assistant":
            messages.append(_read_assistant(message))
        elif role == "user":
            messages += _read_user(message)
        else:
            messages.append({"role": role, "content": _join_texts(message, "content")})
    return messages


def _blocks(owner: Fields, name: str) -> list[Fields]:
    """Return content given as blocks, or as a string that stands for one of text."""
    content = owner.required(name, "a string or a list of blocks")
    if isinstance(content, str):
        return [Fields({"type": "text", "text": content})]
    return owner.objects(name)


def _unreadable(block: Fields, *known: str) -> None:
    kind = block.text("type")
    if kind in ("image", "document"):
        block.fail("type", f"one of {', '.join(known)}: this model reads text only")
    block.fail("type", f"one of {', '.join(known)}")


def _join_texts(owner: Fields, name: str) -> str:
    texts = []
    for block in _blocks(owner, name):
        if block.text("type") != "text":
            _unreadable(block, "text")
        block.required("text", "a string")
        texts.append(block.text("text"))
    return "\n".join(texts)


def _read_user(message: Fields) -> list[JSON]:
    """Return messages, tool results apart. The text of an error says that it is one: templates cannot."""
    messages: list[JSON] = []
    for block in _blocks(message, "content"):
        match block.text("type"):
            case "text":
                block.required("text", "a string")
                part = {"type": "text", "text": block.text("text")}
                if messages and messages[-1]["role"] == "user":
                    messages[-1]["content"].append(part)
                else:
                    messages.append({"role": "user", "content": [part]})
            case "tool_result":
                block.required("tool_use_id", "a string")
                text = _join_texts(block, "content") if block.has("content") else ""
                if block.flag("is_error"):
                    text = f"Error: {text}"
                messages.append({"role": "tool", "tool_call_id": block.text("tool_use_id"), "content": text})
            case _:
                _unreadable(block, "text", "tool_result")
    if not messages:
        message.fail("content", "a string or a list of at least one block")
    return messages


def _read_assistant(message: Fields) -> JSON:
    texts, thoughts, calls = [], [], []
    for block in _blocks(message, "content"):
        match block.text("type"):
            case "text":
                block.required("text", "a string")
                texts.append({"type": "text", "text": block.text("text")})
            case "thinking":
                thoughts.append(block.text("thinking"))
            case "tool_use":
                block.required("name", "a string")
                arguments = block.object("input") or Fields({})
                text = orjson.dumps(arguments.values).decode()
                calls.append(chat_call(block.text("id"), block.text("name"), text))
            case _:
                _unreadable(block, "text", "thinking", "tool_use")
    read: JSON = {"role": "assistant", "content": texts}
    if thoughts:
        read["reasoning_content"] = "\n".join(thoughts)
    if calls:
        read["tool_calls"] = calls
    return read


def _read_tool(tool: Fields) -> JSON:
    tool.one_of("type", ("custom",), "custom")
    tool.required("name", "a string")
    tool.required("input_schema", "an object")
    schema = tool.object("input_schema")
    assert schema is not None
    function: JSON = {"name": tool.text("name"), "parameters": schema.values}
    if tool.has("description"):
        function["description"] = tool.text("description")
    if tool.has("strict"):
        function["strict"] = tool.flag("strict")
    return {"type": "function", "function": function}


def _read_tool_choice(choice: Fields) -> JSON:
    kind = choice.one_of("type", (*TOOL_CHOICES, "tool"), "auto")
    chosen: Any = TOOL_CHOICES.get(kind)
    if kind == "tool":
        choice.required("name", "a string")
        chosen = {"type": "function", "function": {"name": choice.text("name")}}
    read = {"tool_choice": chosen}
    if choice.flag("disable_parallel_tool_use"):
        read["parallel_tool_calls"] = False
    return read


def _read_output_config(output: Fields) -> JSON:
    read: JSON = {}
    if output.has("effort"):
        read["reasoning_effort"] = output.text("effort")
    if format_ := output.object("format"):
        format_.one_of("type", ("json_schema",), "json_schema")
        format_.required("schema", "an object")
        read["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": format_.get("schema")},
        }
    return read


def _read_thinking(thinking: Fields | None) -> JSON:
    """Read `thinking`, off unless asked for: clients that did not ask take the first block for the answer."""
    kind = "disabled"
    read: JSON = {}
    if thinking is not None:
        kind = thinking.one_of("type", ("enabled", "adaptive", "disabled"), "disabled")
        thinking.one_of("display", ("summarized", "omitted"), "summarized")
    if thinking is not None and kind == "enabled":
        thinking.required("budget_tokens", "an integer")
        read["max_thinking_tokens"] = thinking.integer("budget_tokens", low=1)
    is_on = kind != "disabled"
    return read | {"chat_template_kwargs": {"enable_thinking": is_on, "thinking": is_on}}


# ---- writing ----


class MessageAnswer(BlockAnswer):
    """Blocks are content blocks of the message."""

    begins_at_once = True

    def __init__(self, turn: ChatTurn, model: str) -> None:
        super().__init__(f"msg_{new_rid()}", turn)
        self.model = model

    def may_begin(self) -> bool:
        """Return whether it is known what the cache holds of the prompt, or the client has waited long enough.

        In a long queue `message_start` says that nothing is cached, which `message_delta` corrects.
        """
        times = self.state.times
        return times.scheduled > 0 or time.perf_counter() > times.arrived + MAX_SILENCE_S

    def begin(self) -> bytes:
        start = {"type": "message_start", "message": self._message([], None)}
        return named_event(start) + PING

    def ping(self) -> bytes:
        return PING

    def start(self, block: Block) -> bytes:
        empty: dict[str, JSON] = {
            REASONING: {"type": "thinking", "thinking": "", "signature": ""},
            TEXT: {"type": "text", "text": ""},
            TOOL_CALL: {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}},
        }
        start = {"type": "content_block_start", "index": block.index, "content_block": empty[block.kind]}
        return named_event(start)

    def grow(self, block: Block, piece: str) -> bytes:
        delta = {
            REASONING: {"type": "thinking_delta", "thinking": piece},
            TEXT: {"type": "text_delta", "text": piece},
            TOOL_CALL: {"type": "input_json_delta", "partial_json": piece},
        }[block.kind]
        return named_event({"type": "content_block_delta", "index": block.index, "delta": delta})

    def stop(self, block: Block) -> bytes:
        return named_event({"type": "content_block_stop", "index": block.index})

    def close(self, reason: FinishReason) -> bytes:
        if reason.type == "abort":
            return self.fail(reason)
        delta = {"type": "message_delta", "delta": self._ending(reason), "usage": self._usage()}
        return named_event(delta) + named_event({"type": "message_stop"})

    def fail(self, reason: FinishReason) -> bytes:
        return named_event(anthropic_error(*failure_of(reason)))

    def body(self, reason: FinishReason) -> JSON:
        if reason.type == "abort":  # Anthropic knows no such ending
            raise RequestFailed(reason)
        return self._message([self._content(block) for block in self.blocks.all], reason)

    @staticmethod
    def _content(block: Block) -> JSON:
        if block.kind == TEXT:
            return {"type": "text", "text": block.content}
        if block.kind == REASONING:
            return {"type": "thinking", "thinking": block.content, "signature": ""}
        return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": arguments_of(block)}

    def _message(self, content: list[JSON], reason: FinishReason | None) -> JSON:
        return {
            "id": self.state.rid,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            **self._ending(reason),
            "usage": self._usage(),
        }

    def _ending(self, reason: FinishReason | None) -> JSON:
        if reason is None:
            return {"stop_reason": None, "stop_sequence": None}
        matched = reason.matched if reason.matched in self.state.sampling_params.stop else None
        if reason.type == "length":
            stop_reason = "max_tokens"
        elif matched is not None:
            stop_reason = "stop_sequence"
        elif any(block.kind == TOOL_CALL for block in self.blocks.all):
            stop_reason = "tool_use"
        else:
            stop_reason = "end_turn"
        return {"stop_reason": stop_reason, "stop_sequence": matched}

    def _usage(self) -> JSON:
        """Return the usage. `input_tokens`: those that the cache did not hold, as at Anthropic."""
        cached = self.state.num_cached_tokens
        return {
            "input_tokens": self.state.prompt_len - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self.num_output_tokens,
        }
