"""Answers as blocks, the shape of APIs younger than chat.completions.

A block is a stretch of reasoning, a stretch of text, or one tool call. `BlockAnswer` turns the parts of an answer into
the beginning, the growth and the end of blocks, which each API's subclass spells.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from aiohttp import web

from engine.state import Delta, FinishReason, Logprobs, RequestState
from server.apis.answer import Answer, respond
from server.http.live import LiveRequests, make_requests
from server.http.sse import HEADERS
from server.parsers import AnswerDelta
from server.parsers.tool_calls import object_of
from server.reading.chat import ChatTurn
from server.reading.protocol import JSON, Owner, spelled

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
        """Text so far, or a call's arguments so far as JSON text."""
        return "".join(self.pieces)


def arguments_of(block: Block) -> JSON:
    """Return a call's arguments; see `object_of` for those that are no JSON object."""
    return object_of(block.content)


class Blocks:
    """Cuts one answer into blocks, as its parts come."""

    def __init__(self) -> None:
        self.all: list[Block] = []

    def cut(self, parts: AnswerDelta) -> list[tuple[Block, str]]:
        """Return the blocks that grew, each with the text that it gained, in the answer's order."""
        grown = []
        if parts.reasoning:
            grown.append(self._grow(REASONING, parts.reasoning))
        if parts.text:
            grown.append(self._grow(TEXT, parts.text))
        for call in parts.tool_calls:
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


class BlockAnswer(Answer):
    """The one answer to a chat's turn, streamed or whole."""

    def __init__(self, rid: str, turn: ChatTurn) -> None:
        [request] = make_requests([rid], turn.input_ids, turn.params, turn.options)
        super().__init__(0, RequestState(request), turn.new_parser and turn.new_parser())
        self.turn = turn
        self.blocks = Blocks()
        self._open: Block | None = None

    @property
    def is_cut(self) -> bool:
        """True if it ended before the model was done."""
        return self.reason is not None and self.reason.type != "stop"

    @property
    def num_reasoning_tokens(self) -> int:
        """Reasoning tokens of an answer that has ended."""
        return self.turn.count_reasoning(self.state.output_ids, self.parser)

    # ---- the spelling, by API; beside these `begin` and `fail` ----

    def start(self, _block: Block) -> bytes:
        """Return the events that begin a block."""
        return b""

    @abstractmethod
    def grow(self, block: Block, piece: str) -> bytes:
        """Return the events of a block's new text."""

    def stop(self, _block: Block) -> bytes:
        """Return the events that end a block."""
        return b""

    @abstractmethod
    def close(self, reason: FinishReason) -> bytes:
        """Return the events after the last block."""

    @abstractmethod
    def body(self, reason: FinishReason) -> JSON:
        """Return the whole answer, for a client that does not stream."""

    # ---- from parts to blocks ----

    def text(self, delta: Delta) -> bytes:
        block, text = self._open, delta.text
        if block is None or not text:
            return self._write(self.blocks.cut(AnswerDelta(text=text)))
        block.pieces.append(text)  # without a parser there is but this block
        return self.grow(block, text)

    def parts(self, parts: AnswerDelta, _logprobs: Logprobs | None) -> bytes:
        return self._write(self.blocks.cut(parts))

    def end(self, reason: FinishReason) -> bytes:
        stopped = b"" if self._open is None else self.stop(self._open)
        return stopped + self.close(reason)

    def whole(self, delta: Delta) -> JSON:
        parser = self.parser
        self.blocks.cut(AnswerDelta(text=delta.text) if parser is None else parser.push(delta.text))
        if parser is not None:
            self.blocks.cut(parser.finish())
        assert delta.finish_reason is not None
        return self.body(delta.finish_reason)

    def _write(self, grown: Sequence[tuple[Block, str]]) -> bytes:
        written = []
        for block, piece in grown:
            if block is not self._open:
                if self._open is not None:
                    written.append(self.stop(self._open))
                self._open = block
                written.append(self.start(block))
            if piece:
                written.append(self.grow(block, piece))
        return b"".join(written)


async def respond_in_blocks(
    owner: Owner, live: LiveRequests, answer: BlockAnswer, headers: Mapping[str, str] = HEADERS
) -> web.StreamResponse:
    """Return the response of `answer`, a stream if its request streams, which only an HTTP request may ask for."""
    with spelled(answer.turn.names):
        return await respond(
            owner, live, answer.state.rid, [answer], body=lambda bodies: bodies[0], tail=bytes, headers=headers
        )
