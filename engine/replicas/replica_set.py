"""Data parallelism: several engines, each in a process of its own, behind the facade of one.

The front end verifies a request, chooses a replica and sends the request there; the deltas of the replica's steps come
back once a step. The other end is in `engine.replicas.replica`.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Sequence

from cache.radix import Prefix
from engine.config import EngineConfig
from engine.constraints import Constraints
from engine.engine import Engine, EngineStats, Health
from engine.errors import EngineStopped, QueueFull
from engine.failure import Failure
from engine.model_config import ModelConfig
from engine.output import give
from engine.ranks.channel import ChannelReader, ChannelWriter, open_channel
from engine.ranks.children import Children, StoppedChildren
from engine.replicas.balance import Balancer, Placement
from engine.replicas.front_end import FrontEnd, config_of_replica, load_front_end
from engine.replicas.handle import ReplicaHandle
from engine.replicas.maintenance import NoMaintenance
from engine.replicas.messages import BRANCHES, FLUSH, PREFIXES, REQUESTS, Ready, decode_delta
from engine.replicas.profile import ReplicaProfiles
from engine.replicas.replica import run_replica
from engine.replicas.stats import combined, combined_health
from engine.request_table import RequestTable
from engine.schedule.spans import told_apart
from engine.state import Delta, FinishReason, RequestState, Status
from engine.text.tokenizer import Tokenizer
from engine.verify import RequestLimits, limits_of
from engine.views import BranchView, RequestView
from engine.vision.reader import MediaReader

logger = logging.getLogger(__name__)

NUM_PREFIXES = 100  # of each replica, at most


@dataclasses.dataclass(frozen=True, slots=True)
class Started:
    """The objects of a set whose replicas are ready."""

    front_end: FrontEnd
    constraints: Constraints
    limits: RequestLimits
    max_total_num_tokens: int
    max_running_requests: int


Channel = tuple[ChannelWriter, list[ChannelReader]]


class ReplicaSet(Engine):
    """`dp_size` engines that look like one."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config  # resolved once `start` has returned
        self._started: Started | None = None
        self._replicas: list[ReplicaHandle] = []
        self._children: Children | None = None
        self._requests = RequestTable()
        self._placements: dict[str, Placement] = {}  # by rid
        self._balancer = Balancer(config.load_balance_method, config.dp_size)
        self._failure = Failure()
        self._profiles = ReplicaProfiles()

    async def start(
        self,
        on_progress: Callable[[str], None] = logger.info,
        on_tokenizer: Callable[[Tokenizer], object] | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        front_end = await asyncio.to_thread(load_front_end, self.config)
        if on_tokenizer is not None:
            on_tokenizer(front_end.tokenizer)
        config, model_config = front_end.replica_config, front_end.model_config
        # Memory of channels is mapped page by page: 0.1 s that the event loop has better uses for.
        channels = await asyncio.to_thread(lambda: [(open_channel(1), open_channel(1)) for _ in range(config.dp_size)])
        children = Children(lambda message: loop.call_soon_threadsafe(self._on_failure, message))
        self._children = children
        for i, (commands, answers) in enumerate(channels):
            self._replicas.append(spawn_replica(children, i, config, commands, answers))
        children.checks += [self._find_hung, StoppedChildren(children, config.answer_timeout_s).find]
        children.watch()
        try:
            ready: list[Ready] = await asyncio.to_thread(children.wait_ready)
        except BaseException:
            await asyncio.to_thread(children.kill)
            raise
        for replica, its in zip(self._replicas, ready, strict=True):
            replica.report = its.report
            loop.add_reader(replica.answers.fileno(), self._on_message, replica)
        self.config = ready[0].config.replace(
            base_gpu_id=config.base_gpu_id,
            max_queued_requests=config.max_queued_requests,
            max_queued_tokens=config.max_queued_tokens,
        )
        context_length = min(its.context_length for its in ready)
        self._started = Started(
            front_end,
            Constraints(front_end.grammars, may_jump=not config.disable_jump_forward),
            limits_of(config, model_config, context_length, reads_media=front_end.reader is not None),
            sum(its.max_total_num_tokens for its in ready),
            sum(its.config.max_running_requests or 0 for its in ready),
        )
        on_progress(f"{config.dp_size} engines of {config.tp_size} rank(s) each, {config.load_balance_method}")

    def _on_failure(self, message: str) -> None:
        logger.critical("%s; the engine cannot go on", message)
        self._failure.record(message)
        self.abort_all(f"the engine has failed: {message}", status_code=500)

    async def stop(self, drain_s: float = 0.0) -> None:
        await self._requests.drain(drain_s)
        self.abort_all("the server is shutting down", status_code=503)
        if self._children is None:
            return
        loop = asyncio.get_running_loop()
        self._children.stop_watching()
        for replica in self._replicas:
            loop.remove_reader(replica.answers.fileno())
            replica.commands.close()
        await asyncio.to_thread(self._children.close)
        for replica in self._replicas:
            replica.answers.close()
        self._replicas = []

    @property
    def is_running(self) -> bool:
        return bool(self._started and self._replicas) and not self.has_failed

    @property
    def has_failed(self) -> bool:
        return self._failure.has_happened

    async def failed(self) -> str:
        return await self._failure.wait()

    # ---- facts ----

    @property
    def started(self) -> Started:
        if self._started is None:
            raise EngineStopped("the engine is starting")
        return self._started

    @property
    def model_config(self) -> ModelConfig:
        return self.started.front_end.model_config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.started.front_end.tokenizer

    @property
    def max_total_num_tokens(self) -> int:
        return self.started.max_total_num_tokens

    @property
    def context_length(self) -> int:
        return self.started.limits.context_length

    @property
    def max_running_requests(self) -> int:
        return self.started.max_running_requests

    @property
    def is_generation(self) -> bool:
        return self.started.limits.is_generation

    # ---- pictures and videos ----

    @property
    def media_reader(self) -> MediaReader | None:
        return self.started.front_end.reader

    # ---- requests ----

    async def prepare(self, states: Sequence[RequestState]) -> None:
        """Compile the grammars here, where they can be refused; the replica compiles them once more."""
        await self.started.constraints.prepare(states)

    def warm_up_grammars(self) -> None:
        if self.is_generation:
            self.started.constraints.warm_up()

    def submit(self, state: RequestState) -> None:
        self._requests.check_open(self.is_running)
        self.started.limits.verify(state, self._requests.by_rid)
        self._check_queue(state)
        assert state.prompt_ids is not None
        head = state.extra_key.encode() + told_apart(state.prompt_ids, state.request.media).tobytes()
        placement = self._balancer.pick(head)
        replica = self._replicas[placement.engine]
        try:
            replica.submit(state)
        except EngineStopped:
            self._balancer.end(placement)
            raise
        self._placements[state.rid] = placement
        self._requests.add(state)

    def _check_queue(self, state: RequestState) -> None:
        config = self.config
        if (config.max_queued_requests is None and config.max_queued_tokens is None) or state.joins_others:
            return
        scheduler = self.stats().scheduler
        num_unreported = sum(one.num_sent - one.report.num_received for one in self._replicas)
        num_free = 0 if scheduler.num_waiting else self.max_running_requests - scheduler.num_running
        for what, waiting, more, limit in (
            ("requests", scheduler.num_waiting + num_unreported - num_free, 1, config.max_queued_requests),
            ("prompt tokens", scheduler.num_waiting_tokens, state.prompt_len, config.max_queued_tokens),
        ):
            if limit is not None and waiting + more > limit:
                self._requests.num_refused += 1
                raise QueueFull(f"{waiting} {what} are waiting, the limit is {limit}")

    def abort(self, rid: str, message: str = "aborted by the client", status_code: int = 499) -> bool:
        state = self._requests.by_rid.get(rid)
        if state is None:
            return False
        with contextlib.suppress(EngineStopped):  # then there is nothing left to abort there
            self._replicas[self._placements[rid].engine].abort(rid)
        self._requests.num_aborted += 1
        now = time.perf_counter()
        state.times.first_token = state.times.first_token or now
        state.times.finished = now
        reason = FinishReason("abort", message=message, status_code=status_code)
        self._finish(state, Delta(state, "", [], reason))
        return True

    def abort_all(self, message: str = "aborted by the client", status_code: int = 499) -> int:
        return sum(self.abort(rid, message, status_code) for rid in list(self._requests.by_rid))

    def _on_message(self, replica: ReplicaHandle) -> None:
        try:
            deltas = replica.receive()
        except EOFError:  # the watcher of the process reports its end
            asyncio.get_running_loop().remove_reader(replica.answers.fileno())
            return
        for ticket, *values in deltas:
            state = replica.states.get(ticket)
            if state is None:  # aborted meanwhile
                continue
            delta = decode_delta(state, *values)
            if delta.finish_reason is None:
                give(state, delta)
            else:
                self._finish(state, delta)

    def _finish(self, state: RequestState, delta: Delta) -> None:
        """Forget `state` and send its last delta."""
        placement = self._placements.pop(state.rid)
        self._balancer.end(placement)
        self._replicas[placement.engine].forget(state)
        self._requests.remove(state)
        state.status, state.finish_reason = Status.FINISHED, delta.finish_reason
        give(state, delta)

    # ---- cache and weights ----

    @property
    def maintenance(self) -> NoMaintenance:
        return NoMaintenance(self.config.model_path, self.config.dp_size)

    def flush_cache(self) -> bool:
        if self._requests.by_rid:
            return False
        for i, replica in enumerate(self._replicas):
            replica.send(FLUSH)
            self._balancer.forget(i)
        return True

    def top_prefixes(self, k: int) -> list[Prefix]:
        """Return them as they were when somebody last asked: this call asks for the next."""
        for replica in self._replicas:
            replica.send(PREFIXES, NUM_PREFIXES)
        known = [prefix for replica in self._replicas for prefix in replica.prefixes]
        return sorted(known, key=lambda prefix: -prefix.hits)[:k]

    # ---- observation ----

    def top_branches(self, k: int) -> list[BranchView]:
        """Return them as `top_prefixes` does, each replica's behind those of the one before."""
        branches: list[BranchView] = []
        for i, replica in enumerate(self._replicas):
            replica.send(BRANCHES, max(k // len(self._replicas), 1))
            first = len(branches)
            branches += (
                dataclasses.replace(one, replica=i, parent=one.parent + first if one.parent >= 0 else -1)
                for one in replica.branches
            )
        return branches

    def oldest_requests(self, k: int) -> list[RequestView]:
        """Return them as `top_prefixes` does; what a replica has not reported yet has no tokens."""
        for replica in self._replicas:
            replica.send(REQUESTS, k)
        known = {one.rid: one for replica in self._replicas for one in replica.requests}
        rids = itertools.islice(self._requests.by_rid, k)
        return [known.get(rid, RequestView(rid, False, 0, 0)) for rid in rids]

    def health(self) -> Health:
        if self._started is None or not self._replicas:
            return Health("stopped" if self._requests.is_stopping else "starting")
        health = combined_health([replica.report.health for replica in self._replicas])
        if not self.is_running:
            return dataclasses.replace(health, status="stopped")
        return dataclasses.replace(health, status="stopping") if self._requests.is_stopping else health

    def stats(self) -> EngineStats:
        """Return the sums of the replicas' last reports; requests are counted here."""
        return dataclasses.replace(
            combined(self.replica_stats()),
            num_requests=self._requests.num_requests,
            num_aborted=self._requests.num_aborted,
            num_refused=self._requests.num_refused,
        )

    def replica_stats(self) -> list[EngineStats]:
        return [replica.report.stats for replica in self._replicas]

    def progress(self) -> tuple[int, ...] | None:
        return tuple(replica.num_received for replica in self._replicas) if self._requests.by_rid else None

    def describe(self) -> str:
        return "".join(f"{replica.describe()}\n" for replica in self._replicas)

    def _find_hung(self) -> str | None:
        """Return which replica has requests and is silent, if one is: a check of `Children`, called from a thread."""
        limit_s = self.config.watchdog_timeout
        for i, replica in enumerate(self._replicas):
            silent_s = time.monotonic() - replica.last_sign_at
            if self._children and self._started and limit_s and replica.states and silent_s > limit_s:
                return f"{self._children.describe(i)} has requests and has not been heard of for {silent_s:.0f} s"
        return None

    def start_profile(self, output_dir: str) -> None:
        self._profiles.start(self._replicas, output_dir)

    async def stop_profile(self) -> str:
        return await self._profiles.stop(self._replicas)


def spawn_replica(children: Children, i: int, config: EngineConfig, to: Channel, back: Channel) -> ReplicaHandle:
    """Start the process of replica `i`, and return the handle to it.

    config: for all replicas. to, back: channels for commands and for answers.
    """
    commands, (command_reader,) = to
    answer_writer, (answers,) = back
    name = f"replica {i}"
    # Not a daemon: it may have ranks to start.
    children.spawn(name, run_replica, config_of_replica(config, i), command_reader, answer_writer, is_daemon=False)
    command_reader.close()
    answer_writer.close()
    return ReplicaHandle(name, commands, answers)
