"""Answers as blocks, which is what APIs younger than chat.completions speak of.

A block is a stretch of reasoning, a stretch of text, or one tool call. `BlockChoice` turns a request's deltas into
the beginning, the growth and the end of blocks; each API's subclass writes these down in its own words.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

from engine.request import Delta, FinishReason
from server.http.live import LiveRequests, is_failure, make_requests
from server.http.sse import HEADERS, Choice, EventStream
from server.parsers import AnswerDelta, AnswerParser
from server.reading.chat import ChatTurn
from server.reading.protocol import JSON, Owner, json_response

REASONING, TEXT, TOOL_CALL = "reasoning", "text", "tool_call"


@dataclass(slots=True)
class Block:
    index: int  # among the answer's blocks
    kind: str  # REASONING, TEXT or TOOL_CALL
    call_id: str = ""  # of a tool call
    name: str = ""  # of the function it calls
    pieces: list[str] = field(default_factory=list)

    @property
    def content(self) -> str:
        """The text, or a call's arguments as JSON text; up to now."""
        return "".join(self.pieces)


def arguments_of(block: Block) -> JSON:
    """A call's arguments. What is no JSON object, because the answer was cut or the model erred, is given as Anthropic
    advises: under the key INVALID_JSON."""
    try:
        arguments: Any = orjson.loads(block.content or "{}")
    except orjson.JSONDecodeError:
        arguments = None
    return arguments if isinstance(arguments, dict) else {"INVALID_JSON": block.content}


def chat_call(call_id: str, name: str, arguments: str) -> JSON:
    """A tool call as chat.completions has it; `arguments` is JSON text."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


class Blocks:
    """Cuts one answer into blocks, as its text comes."""

    def __init__(self, parser: AnswerParser | None) -> None:
        self.all: list[Block] = []
        self.parser = parser

    def push(self, text: str) -> list[tuple[Block, str]]:
        """Blocks and what each gained, in the answer's order."""
        return self._cut(AnswerDelta(text=text) if self.parser is None else self.parser.push(text))

    def finish(self) -> list[tuple[Block, str]]:
        """As `push`, of what the parser held back."""
        return self._cut(AnswerDelta() if self.parser is None else self.parser.finish())

    def _cut(self, delta: AnswerDelta) -> list[tuple[Block, str]]:
        grown = []
        if delta.reasoning:
            grown.append(self._grow(REASONING, delta.reasoning))
        if delta.text:
            grown.append(self._grow(TEXT, delta.text))
        for call in delta.tool_calls:
            if call.id is not None:
                self.all.append(Block(len(self.all), TOOL_CALL, call.id, call.name or ""))
            grown.append(self._grow(TOOL_CALL, call.arguments))
        return grown

    def _grow(self, kind: str, piece: str) -> tuple[Block, str]:
        if not self.all or self.all[-1].kind != kind:
            self.all.append(Block(len(self.all), kind))
        block = self.all[-1]
        block.pieces.append(piece)
        return block, piece


class BlockChoice(Choice):
    """The one answer to a turn, streamed or whole."""

    def __init__(self, rid: str, turn: ChatTurn) -> None:
        super().__init__(0)
        [self.request] = make_requests([rid], turn.input_ids, turn.params, turn.options)
        self.request.sink = self.sink
        self.turn = turn
        self.blocks = Blocks(turn.new_parser and turn.new_parser())
        self.has_begun = False
        self.is_cut = False  # it ended before the model was done
        self._open: Block | None = None

    @property
    def num_reasoning_tokens(self) -> int:
        """Of an answer that has ended."""
        return self.turn.count_reasoning(self.request.output_ids, self.blocks.parser)

    # ---- what an API writes ----

    def begin(self) -> bytes:
        """What goes before the first block."""
        return b""

    def start(self, block: Block) -> bytes:
        return b""

    @abstractmethod
    def grow(self, block: Block, piece: str) -> bytes: ...

    def stop(self, block: Block) -> bytes:
        return b""

    @abstractmethod
    def end(self, reason: FinishReason) -> bytes:
        """What goes after the last block."""

    @abstractmethod
    def fail(self, reason: FinishReason) -> bytes:
        """The end of an answer that failed; perhaps before it began."""

    @abstractmethod
    def whole(self, reason: FinishReason) -> JSON:
        """The answer to a client that does not stream."""

    # ---- from deltas to these ----

    def events(self, delta: Delta) -> bytes:
        begun = b"" if self.has_begun else self.begin()
        self.has_begun = True
        return begun + b"".join(self._write(self.blocks.push(delta.text)))

    def last_events(self, delta: Delta) -> bytes:
        reason = delta.finish_reason
        assert reason is not None
        if is_failure(reason):
            return self.fail(reason)
        self.is_cut = reason.type != "stop"
        written = [self.events(delta), *self._write(self.blocks.finish())]
        if self._open is not None:
            written.append(self.stop(self._open))
        return b"".join([*written, self.end(reason)])

    def read_whole(self, delta: Delta) -> JSON:
        """The answer of a request that does not stream, from its only delta."""
        self.num_output_tokens = len(delta.token_ids)
        self.blocks.push(delta.text)
        self.blocks.finish()
        reason = delta.finish_reason
        assert reason is not None
        self.is_cut = reason.type != "stop"
        return self.whole(reason)

    def _write(self, grown: Sequence[tuple[Block, str]]) -> Iterator[bytes]:
        for block, piece in grown:
            if block is not self._open:
                if self._open is not None:
                    yield self.stop(self._open)
                self._open = block
                yield self.start(block)
            if piece:
                yield self.grow(block, piece)


async def answer(
    owner: Owner, live: LiveRequests, choice: BlockChoice, headers: Mapping[str, str] = HEADERS
) -> web.StreamResponse:
    """The response that `choice` writes: a stream if its request streams, which only an HTTP request may ask for."""
    request = choice.request
    if not request.stream:
        [delta] = await live.answers(owner, request.rid, [request])
        return json_response(choice.read_whole(delta))
    assert isinstance(owner, web.Request)
    async with live.submitted(owner, request.rid, [request]):
        return await EventStream([choice], bytes, headers).run(owner)
