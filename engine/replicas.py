"""Data parallelism: several engines, each in a process of its own, behind the facade of one.

The front end checks a request, chooses an engine and sends it there; what the engine's steps bring comes back once a
step. Requests and reports travel pickled, a request or some twenty reports a second; the deltas in between as plain
tuples.
"""

import asyncio
import contextlib
import dataclasses
import logging
import marshal
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

import torch
import uvloop

from cache.radix import Prefix
from engine.balance import Balancer, Placement
from engine.build import check_gpus, load_tokenizer, new_grammars, resolve_config
from engine.channel import ChannelReader, ChannelWriter, open_channel
from engine.config import EngineConfig
from engine.engine import Engine, EngineStats, Health
from engine.errors import EngineError, EngineStopped, InvalidRequest, QueueFull
from engine.grammar import GrammarCompiler
from engine.model_config import ModelConfig
from engine.processes import Children, Parent
from engine.request import Delta, FinishReason, Logprobs, Request, Status
from engine.tokenizer import Tokenizer
from engine.weights import resolve_model, resolve_tokenizer

logger = logging.getLogger(__name__)

REPORT_S = 0.05
NUM_PREFIXES = 100
PIECE_BYTES = 4 << 20  # of a long message
SUBMIT, ABORT, FLUSH, PREFIXES, START_PROFILE, STOP_PROFILE, REPORT = range(7)  # what a message is about
# What an ended request has become: all that the engine owns of it but its means of work.
_FIELDS = [one.name for one in dataclasses.fields(Request)]
OUTCOME = [
    name
    for name in _FIELDS[_FIELDS.index("status") :]
    if name
    not in ("status", "row", "input_logprobs", "prompt_ids", "text_stream", "new_token_ids", "unsent", "matcher")
]
COMBINED: dict[str, Callable[[Sequence[Any]], Any]] = {"last_step_at": max, "new_token_ratio": fmean}  # others add up


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


@dataclass(slots=True)
class Replica:
    """An engine, as the front end knows it."""

    name: str
    commands: ChannelWriter
    deltas: ChannelReader
    report: Report = field(init=False)  # there is one once the engine is ready
    requests: dict[str, Request] = field(default_factory=dict)
    prefixes: list[Prefix] = field(default_factory=list)
    num_sent: int = 0
    num_heard: int = 0
    heard_at: float = 0.0  # or given the first request after a pause; time.monotonic()
    traces: asyncio.Queue[str] = field(default_factory=asyncio.Queue)  # paths of recorded profiles
    pieces: bytearray = field(default_factory=bytearray)

    def send(self, command: int, *args: Any) -> None:
        """`EngineStopped` if nobody reads it."""
        try:
            send_long(self.commands, pickle.dumps((command, args)))
        except OSError as error:
            raise EngineStopped(f"{self.name} does not answer: {error}") from None
        self.num_sent += 1


class ReplicaSet(Engine):
    """`dp_size` engines that look like one."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._replicas: list[Replica] = []
        self._placements: dict[str, Placement] = {}  # by rid
        self._balancer = Balancer(config.load_balance_method, config.dp_size)
        self._children: Children | None = None
        self._ready: list[Ready] = []
        self._is_profiling = False

    async def start(self, on_progress: Callable[[str], None] = logger.info) -> None:
        """Start the engines. `ModelError` if one cannot serve the model."""
        loop = asyncio.get_running_loop()
        config = await asyncio.to_thread(self._prepare_start)
        children = Children(lambda message: loop.call_soon_threadsafe(self._on_failure, message))
        self._children = children
        for i in range(config.dp_size):
            command_writer, (command_reader,) = open_channel(1)
            delta_writer, (delta_reader,) = open_channel(1)
            self._replicas.append(Replica(f"replica {i}", command_writer, delta_reader))
            replica_config = config.replace(
                base_gpu_id=config.base_gpu_id + i * config.tp_size,
                random_seed=(config.random_seed or 0) + i,
                max_queued_requests=None,  # the queue's limits are for all engines together
                max_queued_tokens=None,
            )
            # Not daemons: they may have ranks to start.
            children.spawn(f"replica {i}", run_replica, replica_config, command_reader, delta_writer, is_daemon=False)
            command_reader.close()
            delta_writer.close()
        children.checks.append(self._find_hung)
        children.watch()
        try:
            self._ready = await asyncio.to_thread(children.wait_ready)
        except BaseException:
            await asyncio.to_thread(children.kill)
            raise
        for replica, ready in zip(self._replicas, self._ready, strict=True):
            replica.report = ready.report
            loop.add_reader(replica.deltas.fileno(), self._on_message, replica)
        self.config = self._ready[0].config.replace(
            base_gpu_id=config.base_gpu_id,
            max_queued_requests=config.max_queued_requests,
            max_queued_tokens=config.max_queued_tokens,
        )
        on_progress(f"{config.dp_size} engines of {config.tp_size} rank(s) each, {config.load_balance_method}")

    def _prepare_start(self) -> EngineConfig:
        """What the front end needs of the model, and the configuration for the engines."""
        config = resolve_config(self.config)
        if torch.device(config.device or "cpu").type == "cuda":
            check_gpus(config.base_gpu_id, config.dp_size * config.tp_size)
        folder = resolve_model(config)  # downloaded and converted once, not by every engine
        self._model_config = ModelConfig.from_path(folder, config)
        self._tokenizer = load_tokenizer(folder, config)
        self._grammars = new_grammars(config, self._model_config, self._tokenizer)
        device = self.config.device and torch.device(self.config.device).type
        load_format = "dummy" if config.load_format == "dummy" else "auto"
        tokenizer_path = str(resolve_tokenizer(config, folder))
        return config.replace(
            model_path=str(folder), tokenizer_path=tokenizer_path, load_format=load_format, device=device
        )

    async def stop(self, drain_s: float = 0.0) -> None:
        self._is_stopping = True
        if self._requests and drain_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), drain_s)
        self.abort_all("the server is shutting down", status_code=503)
        if self._children is None:
            return
        loop = asyncio.get_running_loop()
        self._children.stop_watching()
        for replica in self._replicas:
            loop.remove_reader(replica.deltas.fileno())
            replica.commands.close()
        await asyncio.to_thread(self._children.close)
        for replica in self._replicas:
            replica.deltas.close()
        self._replicas = []

    # ---- what it is ----

    @property
    def model_config(self) -> ModelConfig:
        return self._model_config

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def grammars(self) -> GrammarCompiler | None:
        return self._grammars

    @property
    def max_total_num_tokens(self) -> int:
        return sum(ready.max_total_num_tokens for ready in self._ready)

    @property
    def max_running_requests(self) -> int:
        return sum(ready.config.max_running_requests or 0 for ready in self._ready)

    @property
    def maintenance(self) -> "NoMaintenance":  # type: ignore[override]
        return NoMaintenance(self.config)

    @property
    def context_length(self) -> int:
        return min(ready.context_length for ready in self._ready)

    @property
    def is_running(self) -> bool:
        return bool(self._ready and self._replicas) and not self.has_failed

    # ---- requests ----

    def submit(self, request: Request) -> None:
        """As Engine.submit. What an engine refuses all the same ends as an aborted request."""
        if self._is_stopping or not self.is_running:
            raise EngineStopped("the server is shutting down" if self._is_stopping else "the engine is not running")
        self._verify(request)
        self._check_queue(request)
        assert request.prompt_ids is not None
        head = request.extra_key.encode() + request.prompt_ids.tobytes()
        placement = self._balancer.pick(head)
        replica = self._replicas[placement.engine]
        if not replica.requests:
            replica.heard_at = time.monotonic()
        try:
            replica.send(SUBMIT, dataclasses.replace(request, sink=_drop, matcher=None))
        except EngineStopped:
            self._balancer.end(placement)
            raise
        replica.requests[request.rid] = self._requests[request.rid] = request
        self._placements[request.rid] = placement
        self._num_requests += 1

    def _check_queue(self, request: Request) -> None:
        config = self.config
        if config.max_queued_requests is None and config.max_queued_tokens is None:
            return
        scheduler = self.stats().scheduler
        num_unreported = sum(one.num_sent - one.report.num_received for one in self._replicas)
        for what, waiting, more, limit in (
            ("requests", scheduler.num_waiting + num_unreported, 1, config.max_queued_requests),
            ("prompt tokens", scheduler.num_waiting_tokens, request.prompt_len, config.max_queued_tokens),
        ):
            if limit is not None and waiting + more > limit:
                self._num_refused += 1
                raise QueueFull(f"{waiting} {what} are waiting, the limit is {limit}")

    def abort(self, rid: str, message: str = "aborted by the client", status_code: int = 499) -> bool:
        request = self._requests.get(rid)
        if request is None:
            return False
        with contextlib.suppress(EngineStopped):  # then there is nothing left to abort there
            self._replicas[self._placements[rid].engine].send(ABORT, rid)
        self._num_aborted += 1
        now = time.perf_counter()
        request.times.first_token = request.times.first_token or now
        request.times.finished = now
        delta = Delta(request, "", [])
        self._finish(request, FinishReason("abort", message=message, status_code=status_code), delta)
        return True

    def _finish(self, request: Request, reason: FinishReason, delta: Delta) -> None:
        placement = self._placements.pop(request.rid)
        self._balancer.end(placement)
        del self._requests[request.rid], self._replicas[placement.engine].requests[request.rid]
        request.status, request.finish_reason, delta.finish_reason = Status.FINISHED, reason, reason
        self._give(request, delta)
        if self._is_stopping and not self._requests:
            self._drained.set()

    def _give(self, request: Request, delta: Delta) -> None:
        try:
            request.sink(delta)
        except Exception:
            logger.exception("the receiver of request %s failed", request.rid)

    def _on_message(self, replica: Replica) -> None:
        try:
            message = receive_long(replica.deltas, replica.pieces)
        except EOFError:  # whoever watches the process tells of it
            asyncio.get_running_loop().remove_reader(replica.deltas.fileno())
            return
        if message is None:
            return
        replica.num_heard += 1
        replica.heard_at = time.monotonic()
        deltas, news = marshal.loads(message)
        for rid, *values in deltas:
            request = replica.requests.get(rid)
            if request is not None:  # else aborted meanwhile
                self._take(request, *values)
        if news is not None:
            what, value = pickle.loads(news)
            if what == REPORT:
                replica.report = value
            elif what == PREFIXES:
                replica.prefixes = value
            else:
                replica.traces.put_nowait(value)

    def _take(
        self, request: Request, text: str, token_ids: list[int], logprobs: Any, input_logprobs: Any, end: bytes | None
    ) -> None:
        """A delta, as `encode_delta` makes it."""
        if input_logprobs is not None:
            request.input_logprobs = Logprobs(*input_logprobs)
        delta = Delta(request, text, token_ids, None, None if logprobs is None else Logprobs(*logprobs))
        if end is None:
            self._give(request, delta)
            return
        reason, outcome = pickle.loads(end)
        for name, value in outcome.items():
            setattr(request, name, value)
        self._finish(request, reason, delta)

    def flush_cache(self) -> bool:
        if self._requests:
            return False
        for i, replica in enumerate(self._replicas):
            replica.send(FLUSH)
            self._balancer.forget(i)
        return True

    # ---- how it is ----

    def start_profile(self, output_dir: str) -> None:
        if self._is_profiling:
            raise InvalidRequest("a profile is being recorded")
        self._is_profiling = True
        for replica in self._replicas:
            replica.send(START_PROFILE, str(Path(output_dir, replica.name.replace(" ", "-"))))

    async def stop_profile(self) -> str:
        if not self._is_profiling:
            raise InvalidRequest("no profile is being recorded")
        self._is_profiling = False
        for replica in self._replicas:
            replica.send(STOP_PROFILE)
        return ", ".join([await replica.traces.get() for replica in self._replicas])

    def stats(self) -> EngineStats:
        total = combined(self.replica_stats())
        return dataclasses.replace(
            total, num_requests=self._num_requests, num_aborted=self._num_aborted, num_refused=self._num_refused
        )

    def replica_stats(self) -> list[EngineStats]:
        """As of their last reports."""
        return [replica.report.stats for replica in self._replicas]

    def health(self) -> Health:
        reports = [replica.report.health for replica in self._replicas]
        if not self._ready or not reports:
            return Health("stopped" if self._is_stopping else "starting", 0.0, 0.0, 0, 0)
        status = next((one.status for one in reports if one.status != "ok"), "ok")
        if not self.is_running:
            status = "stopped"
        elif self._is_stopping:
            status = "stopping"
        return Health(
            status,
            max(one.last_step_age_s for one in reports),
            max(one.oldest_queued_s for one in reports),
            sum(one.num_running for one in reports),
            sum(one.num_queued for one in reports),
        )

    def progress(self) -> tuple[int, ...] | None:
        return tuple(replica.num_heard for replica in self._replicas) if self._requests else None

    def describe(self) -> str:
        now = time.monotonic()
        return "".join(
            f"{one.name}: {len(one.requests)} requests, heard of {now - one.heard_at:.1f} s ago, {one.report}\n"
            for one in self._replicas
        )

    def top_prefixes(self, k: int) -> list[Prefix]:
        """As of the last time that someone asked."""
        for replica in self._replicas:
            replica.send(PREFIXES, NUM_PREFIXES)
        known = [prefix for replica in self._replicas for prefix in replica.prefixes]
        return sorted(known, key=lambda prefix: -prefix.hits)[:k]

    def _find_hung(self) -> str | None:
        limit_s = self.config.watchdog_timeout
        for i, replica in enumerate(self._replicas):
            silent_s = time.monotonic() - replica.heard_at
            if self._children and self._ready and limit_s and replica.requests and silent_s > limit_s:
                return f"{self._children.describe(i)} has requests and has not been heard of for {silent_s:.0f} s"
        return None


class NoMaintenance:
    """What engine.maintenance.Maintenance does is not done to several engines."""

    weight_version = "default"

    def __init__(self, config: EngineConfig) -> None:
        self.model_path, self._num_engines = config.model_path, config.dp_size

    async def refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise InvalidRequest(f"this works on one engine only, and the server has {self._num_engines} (--dp-size)")

    pause = resume = update_weights = weight = release_memory = resume_memory = refuse


def _drop(delta: Delta) -> None:
    """The sink of a request on its way."""


def combined(parts: Sequence[Any]) -> Any:
    """Statistics of several engines as those of one."""
    values = {}
    for one in dataclasses.fields(parts[0]):
        items = [getattr(part, one.name) for part in parts]
        nested = dataclasses.is_dataclass(items[0])
        values[one.name] = combined(items) if nested else COMBINED.get(one.name, sum)(items)
    return type(parts[0])(**values)


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
            self._parent.tell(
                "ready",
                Ready(engine.config, engine.max_total_num_tokens, engine.context_length, self._new_report()),
            )
            loop.add_reader(self._commands.fileno(), self._on_message)
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
        self._tell(STOP_PROFILE, await self.engine.stop_profile())

    def _take(self, delta: Delta) -> None:
        """The sink of all requests: what a step brings goes out in one message, when the step is through."""
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


def new_engine(config: EngineConfig) -> Engine:
    """One engine, or as many as `config` says behind one facade."""
    return Engine(config) if config.dp_size == 1 else ReplicaSet(config)
