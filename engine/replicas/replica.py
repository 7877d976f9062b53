"""One of several engines: what its process does, and what it and the front end tell each other.

Requests and reports travel pickled, a request or some twenty reports a second; the deltas in between as plain tuples.
"""

import asyncio
import dataclasses
import logging
import marshal
import pickle
from dataclasses import dataclass
from typing import Any

import torch
import uvloop

from engine.config import EngineConfig
from engine.engine import Engine, EngineStats, Health
from engine.errors import EngineError
from engine.ranks.channel import ChannelReader, ChannelWriter
from engine.ranks.children import Parent, settle_garbage_collector
from engine.request import Delta, FinishReason, Logprobs, Request

logger = logging.getLogger(__name__)

REPORT_S = 0.05
PIECE_BYTES = 4 << 20  # of a long message
SUBMIT, ABORT, FLUSH, PREFIXES, START_PROFILE, STOP_PROFILE, REPORT = range(7)  # what a message is about
# What an ended request has become: all that the engine owns of it but its means of work, and what deltas bring.
_FIELDS = [one.name for one in dataclasses.fields(Request)]
_NO_OUTCOME = {
    "status", "row", "input_logprobs", "prompt_ids", "text_stream", "new_token_ids", "unsent", "has_begun", "matcher",
}  # fmt: skip
OUTCOME = [name for name in _FIELDS[_FIELDS.index("status") :] if name not in _NO_OUTCOME]


@dataclass(slots=True)
class Report:
    """How an engine is."""

    stats: EngineStats
    health: Health
    num_received: int  # messages, so far


@dataclass(slots=True)
class Ready:
    """What an engine is, once it has started."""

    config: EngineConfig
    max_total_num_tokens: int
    context_length: int
    report: Report


def run_replica(parent: Parent, config: EngineConfig, commands: ChannelReader, deltas: ChannelWriter) -> None:
    """What a replica's process does."""
    torch.set_num_threads(max(torch.get_num_threads() // config.dp_size, 1))
    uvloop.run(ReplicaServer(parent, config, commands, deltas).run())


class ReplicaServer:
    """An engine that gets its requests from a channel and answers into another."""

    def __init__(self, parent: Parent, config: EngineConfig, commands: ChannelReader, deltas: ChannelWriter) -> None:
        self.engine = Engine(config)
        self._parent, self._commands, self._deltas = parent, commands, deltas
        self._pieces = bytearray()
        self._num_received = 0
        self._unsent: list[tuple[Any, ...]] = []
        self._flushing: asyncio.Handle | None = None
        self._reporting: asyncio.TimerHandle | None = None
        self._preparing: dict[str, asyncio.Task[None]] = {}
        self._stopping_profile: asyncio.Task[None] | None = None
        self._introduced: set[str] = set()  # requests whose prompt's log-probabilities were sent
        self._has_ended = asyncio.Event()

    async def run(self) -> None:
        """Until the front end closes its channel, or the engine fails."""
        loop = asyncio.get_running_loop()
        async with self.engine as engine:
            settle_garbage_collector()
            self._parent.tell(
                "ready",
                Ready(engine.config, engine.max_total_num_tokens, engine.context_length, self._new_report()),
            )
            loop.add_reader(self._commands.fileno(), self._on_message)
            engine.warm_up_grammars()
            ended, failed = asyncio.create_task(self._has_ended.wait()), asyncio.create_task(engine.failed())
            await asyncio.wait([ended, failed], return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                raise EngineError(failed.result())
            failed.cancel()

    def _on_message(self) -> None:
        try:
            message = receive_long(self._commands, self._pieces)
        except EOFError:
            asyncio.get_running_loop().remove_reader(self._commands.fileno())
            self._has_ended.set()
            return
        if message is None:
            return
        self._num_received += 1
        command, args = pickle.loads(message)
        engine = self.engine
        if command == SUBMIT:
            self._submit(*args)
        elif command == ABORT:
            (rid,) = args
            if rid in self._preparing:
                self._preparing.pop(rid).cancel()
            engine.abort(rid)
        elif command == FLUSH:
            engine.flush_cache()
        elif command == PREFIXES:
            self._tell(PREFIXES, engine.top_prefixes(*args))
        elif command == START_PROFILE:
            engine.start_profile(*args)
        elif command == STOP_PROFILE:
            self._stopping_profile = asyncio.create_task(self._stop_profile())
        self._report_soon()

    def _submit(self, request: Request) -> None:
        request.sink = self._take
        if request.sampling_params.constraint is None and request.max_thinking_tokens is None:
            self._submit_prepared(request)
        else:
            self._preparing[request.rid] = asyncio.create_task(self._prepare(request))

    async def _prepare(self, request: Request) -> None:
        try:
            await self.engine.prepare([request])
        except Exception as error:  # noqa: BLE001 - else whoever waits for the answer would wait for ever
            self._refuse(request, error)
        else:
            self._submit_prepared(request)
        self._preparing.pop(request.rid, None)

    def _submit_prepared(self, request: Request) -> None:
        try:
            self.engine.submit(request)
        except Exception as error:  # noqa: BLE001 - as in _prepare
            self._refuse(request, error)

    def _refuse(self, request: Request, error: Exception) -> None:
        status_code, message = 500, f"{type(error).__name__}: {error}"
        if isinstance(error, EngineError):
            status_code, message = error.status_code, str(error)
        else:
            logger.error("request %s could not be submitted", request.rid, exc_info=error)
        self._take(Delta(request, "", [], FinishReason("abort", message=message, status_code=status_code)))

    async def _stop_profile(self) -> None:
        try:
            answer = await self.engine.stop_profile(), ""
        except Exception as error:  # noqa: BLE001 - as in _prepare
            answer = "", f"{self._parent.name} has no profile: {type(error).__name__}: {error}"
        self._tell(STOP_PROFILE, answer)

    def _take(self, delta: Delta) -> None:
        """The sink of all requests: what is delivered in one turn of the loop goes out in one message."""
        request = delta.request
        is_first = request.logprob_start_len >= 0 and request.rid not in self._introduced
        self._unsent.append(encode_delta(delta, with_input_logprobs=is_first))
        if is_first:
            self._introduced.add(request.rid)
        if delta.finish_reason is not None:
            self._introduced.discard(request.rid)
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = None
        deltas, self._unsent = self._unsent, []
        send_long(self._deltas, marshal.dumps((deltas, None)))
        self._report_soon()

    def _report_soon(self) -> None:
        if self._reporting is None:
            self._reporting = asyncio.get_running_loop().call_later(REPORT_S, self._report)

    def _report(self) -> None:
        self._reporting = None
        report = self._new_report()
        self._tell(REPORT, report)
        if report.health.num_running or report.health.num_queued:
            self._report_soon()

    def _new_report(self) -> Report:
        return Report(self.engine.stats(), self.engine.health(), self._num_received)

    def _tell(self, what: int, value: Any) -> None:
        send_long(self._deltas, marshal.dumps(([], pickle.dumps((what, value)))))


def send_long(writer: ChannelWriter, message: bytes) -> None:
    """In pieces, if it is longer than the channel takes. The first byte of a piece tells whether it is the last."""
    for start in range(0, len(message), PIECE_BYTES):
        is_last = start + PIECE_BYTES >= len(message)
        writer.send(bytes([is_last]), memoryview(message)[start : start + PIECE_BYTES])


def receive_long(reader: ChannelReader, pieces: bytearray) -> bytes | memoryview | None:
    """The message that the next piece completes, or None; `pieces` are those received so far."""
    piece = reader.receive()
    if piece[0] and not pieces:
        return piece[1:]
    pieces += piece[1:]
    if not piece[0]:
        return None
    message = bytes(pieces)
    pieces.clear()
    return message


def encode_delta(delta: Delta, with_input_logprobs: bool) -> tuple[Any, ...]:
    """`delta`, and at the end what its request has become, for marshal; see `ReplicaSet._take`."""
    request, end = delta.request, None
    logprobs = None if delta.logprobs is None else _plain(delta.logprobs)
    input_logprobs = _plain(request.input_logprobs) if with_input_logprobs and request.input_logprobs else None
    if delta.finish_reason is not None:
        end = pickle.dumps((delta.finish_reason, {name: getattr(request, name) for name in OUTCOME}))
    return request.rid, delta.text, delta.token_ids, logprobs, input_logprobs, end


def _plain(logprobs: Logprobs) -> tuple[Any, ...]:
    return logprobs.token, logprobs.top, logprobs.token_ids
