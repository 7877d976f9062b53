"""Data parallelism: several engines, each in a process of its own, behind the facade of one.

The front end checks a request, chooses an engine and sends it there; what the engine's steps bring comes back once a
step. The other end is in `engine.replicas.replica`.
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

from cache.radix import Prefix
from engine.build import check_gpus, load_tokenizer, new_grammars, resolve_config
from engine.checkpoint.weights import resolve_model, resolve_tokenizer
from engine.config import EngineConfig
from engine.engine import Engine, EngineStats, Health, make_profile_folder
from engine.errors import EngineError, EngineStopped, InvalidRequest, QueueFull
from engine.model_config import ModelConfig
from engine.output import give
from engine.ranks.channel import ChannelReader, ChannelWriter, open_channel
from engine.ranks.children import Children
from engine.replicas.balance import Balancer, Placement
from engine.replicas.replica import (
    ABORT,
    FLUSH,
    PREFIXES,
    REPORT,
    START_PROFILE,
    STOP_PROFILE,
    SUBMIT,
    Ready,
    Report,
    receive_long,
    run_replica,
    send_long,
)
from engine.request import Delta, FinishReason, Logprobs, Request, Status, ignore
from engine.text.grammar import GrammarCompiler
from engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

NUM_PREFIXES = 100
COMBINED: dict[str, Callable[[Sequence[Any]], Any]] = {"last_step_at": max, "new_token_ratio": fmean}  # others add up


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
    traces: asyncio.Queue[tuple[str, str]] = field(default_factory=asyncio.Queue)  # (path of a profile, why none)
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
            replica.send(SUBMIT, dataclasses.replace(request, sink=ignore, matcher=None))
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
        give(request, delta)
        if self._is_stopping and not self._requests:
            self._drained.set()

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
            give(request, delta)
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
        folders = [str(Path(output_dir, replica.name.replace(" ", "-"))) for replica in self._replicas]
        for folder in folders:  # here, where the client can be told that it cannot be
            make_profile_folder(folder)
        self._is_profiling = True
        for replica, folder in zip(self._replicas, folders, strict=True):
            replica.send(START_PROFILE, folder)

    async def stop_profile(self) -> str:
        if not self._is_profiling:
            raise InvalidRequest("no profile is being recorded")
        self._is_profiling = False
        for replica in self._replicas:
            replica.send(STOP_PROFILE)
        answers = [await replica.traces.get() for replica in self._replicas]
        if reasons := [reason for _, reason in answers if reason]:
            raise EngineError("; ".join(reasons))
        return ", ".join(path for path, _ in answers)

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
            sum(one.num_violations for one in reports),
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


def combined(parts: Sequence[Any]) -> Any:
    """Statistics of several engines as those of one."""
    values = {}
    for one in dataclasses.fields(parts[0]):
        items = [getattr(part, one.name) for part in parts]
        nested = dataclasses.is_dataclass(items[0])
        values[one.name] = combined(items) if nested else COMBINED.get(one.name, sum)(items)
    return type(parts[0])(**values)


def new_engine(config: EngineConfig) -> Engine:
    """One engine, or as many as `config` says behind one facade."""
    return Engine(config) if config.dp_size == 1 else ReplicaSet(config)
