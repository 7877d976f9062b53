"""Anthropic's Messages API: /v1/messages and /v1/messages/count_tokens."""

import time

from aiohttp import web

from engine.declared import convert
from engine.state import FinishReason
from server.apis.answer import failure_of
from server.apis.blocks import (
    REASONING,
    TEXT,
    TOOL_CALL,
    Block,
    BlockAnswer,
    arguments_of,
    respond_in_blocks,
)
from server.config import ServerConfig
from server.http.live import LiveRequests, RequestFailed, new_rid
from server.http.sse import named_event
from server.reading.chat import Chats, ChatTurn
from server.reading.error_shapes import anthropic_error
from server.reading.grammars import names_beside_format
from server.reading.left_out import HINT, LeftOut, LeftOutBook
from server.reading.messages import chat_body
from server.reading.messages_body import CountTokensRequest, MessagesRequest
from server.reading.messages_tools import NAMES, MessagesTools
from server.reading.model_name import served_model
from server.reading.openai_body import ChatRequest
from server.reading.protocol import JSON, json_response, read_body, spelled

OUR_NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "response_format.json_schema.schema": "output_config.format.schema",
    "json_schema": "output_config.format.schema",
    **{f"tools[].{ours}": f"tools[]{theirs}" for ours, theirs in NAMES.items()},
    "reasoning_effort": "output_config.effort",
    "max_thinking_tokens": "thinking.budget_tokens",
}
PING = named_event({"type": "ping"})
MAX_SILENCE_S = 1.0  # before message_start, which a request that has its turn gets within milliseconds


class AnthropicApi:
    def __init__(self, config: ServerConfig, live: LiveRequests, chats: Chats, left_out: LeftOutBook) -> None:
        self.config, self.live, self.chats, self.left_out = config, live, chats, left_out

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/messages", self.messages),
            web.post("/v1/messages/count_tokens", self.count_tokens),
        ]

    async def messages(self, http_request: web.Request) -> web.StreamResponse:
        body = await read_body(http_request, MessagesRequest)
        model = served_model(self.config, body.model)
        left_out = LeftOut()
        tools = MessagesTools(body.tools, body.messages, left_out)
        with spelled(OUR_NAMES | tools.names | names_beside_format(body)):
            turn = await self._turn(http_request, body, tools, left_out)
            return await respond_in_blocks(http_request, self.live, MessageAnswer(turn, model))

    async def count_tokens(self, http_request: web.Request) -> web.Response:
        body = await read_body(http_request, CountTokensRequest)
        served_model(self.config, body.model)
        left_out = LeftOut()
        tools = MessagesTools(body.tools, body.messages, left_out)
        with spelled(OUR_NAMES | tools.names):
            turn = await self._turn(http_request, body, tools, left_out)
        return json_response({"input_tokens": len(turn.input_ids)})

    async def _turn(
        self, http_request: web.Request, body: CountTokensRequest, tools: MessagesTools, left_out: LeftOut
    ) -> ChatTurn:
        chat = chat_body(
            body,
            tools,
            left_out,
            keeps_volatile=self.config.keep_volatile_prompts,
            sees_images="image" in self.chats.engine.media_kinds,
        )
        if self.chats.reasoning_parser is None and chat.pop("max_thinking_tokens", None):
            left_out.add(HINT, "thinking.budget_tokens")  # agents send it to every model
        self.left_out.enter(http_request, left_out)
        return await self.chats.turn(convert(chat, ChatRequest), http_request)


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
