"""The process of a replica: an engine that gets its requests from a channel and answers into another.

The other end is `engine.replicas.replica_set`.
"""

import asyncio
import logging
import pickle
from typing import Any

import torch
import uvloop

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.local import LocalEngine
from engine.ranks.channel import ChannelReader, ChannelWriter
from engine.ranks.children import Parent, settle_garbage_collector
from engine.replicas.messages import (
    ABORT,
    BRANCHES,
    FLUSH,
    PREFIXES,
    REPORT,
    REQUESTS,
    START_PROFILE,
    STOP_PROFILE,
    SUBMIT,
    Ready,
    Report,
    encode_delta,
    receive_long,
    send_answer,
    send_deltas,
)
from engine.request import Request
from engine.state import Delta, FinishReason, RequestState, RequestTimes

logger = logging.getLogger(__name__)

REPORT_S = 0.05  # between two reports, while there are requests


def run_replica(parent: Parent, config: EngineConfig, commands: ChannelReader, deltas: ChannelWriter) -> None:
    """Serve as a replica until the front end closes its channel. The target of the process."""
    torch.set_num_threads(max(torch.get_num_threads() // config.dp_size, 1))
    uvloop.run(ReplicaServer(parent, config, commands, deltas).run())


class ReplicaServer:
    """Does what the front end's messages say to the engine of this process."""

    def __init__(self, parent: Parent, config: EngineConfig, commands: ChannelReader, deltas: ChannelWriter) -> None:
        self.engine = LocalEngine(config)
        self._parent, self._commands, self._deltas = parent, commands, deltas
        self._pieces = bytearray()
        self._num_received = 0
        self._unsent: list[tuple[Any, ...]] = []
        self._flushing: asyncio.Handle | None = None
        self._reporting: asyncio.TimerHandle | None = None
        self._preparing: dict[str, asyncio.Task[None]] = {}
        self._stopping_profile: asyncio.Task[None] | None = None
        self._introduced: set[str] = set()  # rids whose prompt's log-probabilities were sent
        self._has_ended = asyncio.Event()

    async def run(self) -> None:
        """Serve until the front end closes its channel. `EngineError` if the engine fails."""
        loop = asyncio.get_running_loop()
        async with self.engine as engine:
            settle_garbage_collector()
            self._parent.tell(
                "ready",
                Ready(engine.config, engine.max_total_num_tokens, engine.context_length, self._new_report()),
            )
            loop.add_reader(self._commands.fileno(), self._on_message)
            engine.warm_up_grammars()
            engine.started.canary.on_alarm = self._report_soon  # there may be no request that brings a report
            engine.start_canary()
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
            self._send(PREFIXES, engine.top_prefixes(*args))
        elif command == BRANCHES:
            self._send(BRANCHES, engine.top_branches(*args))
        elif command == REQUESTS:
            self._send(REQUESTS, engine.oldest_requests(*args))
        elif command == START_PROFILE:
            engine.start_profile(*args)
        elif command == STOP_PROFILE:
            self._stopping_profile = asyncio.create_task(self._stop_profile())
        self._report_soon()

    def _submit(self, request: Request, arrived: float) -> None:
        """Submit `request`, which reached the front end at time.perf_counter() `arrived`, the same clock here."""
        state = RequestState(request, self._send_delta, times=RequestTimes(arrived))
        if request.sampling_params.constraint_name is None and request.max_thinking_tokens is None:
            self._submit_prepared(state)
        else:
            self._preparing[state.rid] = asyncio.create_task(self._prepare(state))

    async def _prepare(self, state: RequestState) -> None:
        try:
            await self.engine.prepare([state])
        except Exception as error:  # noqa: BLE001 - else whoever waits for the answer would wait for ever
            self._refuse(state, error)
        else:
            self._submit_prepared(state)
        self._preparing.pop(state.rid, None)

    def _submit_prepared(self, state: RequestState) -> None:
        try:
            self.engine.submit(state)
        except Exception as error:  # noqa: BLE001 - as in _prepare
            self._refuse(state, error)

    def _refuse(self, state: RequestState, error: Exception) -> None:
        status_code, message = 500, f"{type(error).__name__}: {error}"
        if isinstance(error, EngineError):
            status_code, message = error.status_code, str(error)
        else:
            logger.error("request %s could not be submitted", state.rid, exc_info=error)
        self._send_delta(Delta(state, "", [], FinishReason("abort", message=message, status_code=status_code)))

    async def _stop_profile(self) -> None:
        try:
            answer = await self.engine.stop_profile(), ""
        except Exception as error:  # noqa: BLE001 - as in _prepare
            answer = "", f"{self._parent.name} has no profile: {type(error).__name__}: {error}"
        self._send(STOP_PROFILE, answer)

    def _send_delta(self, delta: Delta) -> None:
        """Send `delta`; the sink of all requests. Deltas of one iteration of the event loop are one message."""
        state = delta.state
        is_first = state.logprob_start_len >= 0 and state.rid not in self._introduced
        self._unsent.append(encode_delta(delta, with_input_logprobs=is_first))
        if is_first:
            self._introduced.add(state.rid)
        if delta.finish_reason is not None:
            self._introduced.discard(state.rid)
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = None
        deltas, self._unsent = self._unsent, []
        send_deltas(self._deltas, deltas)
        self._report_soon()

    def _report_soon(self) -> None:
        if self._reporting is None:
            self._reporting = asyncio.get_running_loop().call_later(REPORT_S, self._report)

    def _report(self) -> None:
        self._reporting = None
        report = self._new_report()
        self._send(REPORT, report)
        health = report.health
        if health.num_running or health.num_queued or report.stats.scheduler.num_held_tokens:  # a step frees the last
            self._report_soon()

    def _new_report(self) -> Report:
        return Report(self.engine.stats(), self.engine.health(), self._num_received)

    def _send(self, kind: int, value: Any) -> None:
        send_answer(self._deltas, kind, value)
