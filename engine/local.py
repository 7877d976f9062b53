"""One model on this process's device, with its step loop."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cache.radix import Prefix
from engine.build import EngineParts, build
from engine.canary import Canary, canary_of
from engine.config import EngineConfig
from engine.constraints import Constraints
from engine.diagnostics import Diagnostics
from engine.engine import Engine, EngineStats, Health
from engine.errors import EngineStopped, InvalidRequest, ModelError
from engine.failure import Failure
from engine.intake import Intake
from engine.loop import StepLoop
from engine.maintenance import LocalMaintenance
from engine.model_config import ModelConfig
from engine.output import OutputProcessor
from engine.profiler import Profiler, make_profile_folder
from engine.request_table import RequestTable
from engine.sizes import max_wait_s
from engine.state import FinishReason, RequestState, Status
from engine.step.memory import OUT_OF_MEMORY, describe_lack_of_memory
from engine.text.tokenizer import Tokenizer
from engine.time_limits import TimeLimits
from engine.verify import RequestLimits, limits_of
from engine.views import BranchView, RequestView
from engine.vision.encoder import Encoder
from engine.vision.reader import MediaReader
from engine.vision.tower import MAX_BATCH, Tower

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Started:
    """The objects of an engine whose model is loaded."""

    parts: EngineParts
    limits: RequestLimits
    intake: Intake
    constraints: Constraints
    output: OutputProcessor
    loop: StepLoop
    maintenance: LocalMaintenance
    time_limits: TimeLimits
    canary: Canary
    diagnostics: Diagnostics
    task: asyncio.Task[None]  # runs `loop`
    encoder: Encoder | None  # of pictures, where the model reads any


class LocalEngine(Engine):
    def __init__(self, config: EngineConfig) -> None:
        self.config = config  # resolved once `start` has returned
        self._started: Started | None = None
        self._requests = RequestTable()
        self._failure = Failure()
        self._profiler: Profiler | None = None

    async def start(
        self,
        on_progress: Callable[[str], None] = logger.info,
        on_tokenizer: Callable[[Tokenizer], object] | None = None,
    ) -> None:
        parts = await _build(self.config, on_progress, on_tokenizer, self._failure, self._on_failure)
        config = self.config = parts.config
        scheduler, requests = parts.scheduler, self._requests
        context_length = min(parts.rows.max_len, scheduler.held.allocator.num_total)
        limits = limits_of(config, parts.model_config, context_length, reads_media=parts.reader is not None)
        intake = Intake(scheduler, parts.tokenizer, limits, requests)
        constraints = Constraints(parts.grammars, may_jump=not config.disable_jump_forward)
        output = OutputProcessor(scheduler, config.stream_interval, intake.end)
        loop = StepLoop(
            scheduler,
            parts.runner,
            output,
            is_overlapped=not config.disable_overlap_schedule,
            max_step_ms=config.max_step_ms or None,
            chunked_prefill_size=scheduler.chunked_prefill_size,
            context_cost=parts.model_config.context_cost,
            max_wait_s=max_wait_s(config),
            decode_log_interval=config.decode_log_interval,
        )
        encoder = None if parts.tower is None else _new_encoder(parts, parts.tower, loop)
        maintenance = LocalMaintenance(parts, loop, self.abort_all, encoder)
        canary = canary_of(self.generate, parts, loop, lambda: maintenance.num_updates, context_length)
        time_limits = TimeLimits(
            requests.by_rid, self.abort, config.request_waiting_timeout, config.request_running_timeout
        )
        time_limits.start()
        diagnostics = Diagnostics(parts, loop, intake, constraints, canary, encoder)
        task = asyncio.create_task(loop.run(), name="step-loop")
        task.add_done_callback(self._on_loop_end)
        self._started = Started(
            parts,
            limits,
            intake,
            constraints,
            output,
            loop,
            maintenance,
            time_limits,
            canary,
            diagnostics,
            task,
            encoder,
        )

    def _on_failure(self, message: str) -> None:
        logger.critical("%s; the engine cannot go on", message)
        self._failure.record(message)
        self.abort_all(f"the engine has failed: {message}", status_code=500)

    def _on_loop_end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        logger.critical("the step loop ended", exc_info=task.exception())
        self._on_failure(f"the step loop ended: {task.exception()!r}")

    async def stop(self, drain_s: float = 0.0) -> None:
        if self._started is not None:
            self._started.canary.stop()
            self._started.time_limits.stop()
        await self._requests.drain(drain_s)
        self.abort_all("the server is shutting down", status_code=503)
        if self._started is None:
            return
        self._started.task.cancel()
        await asyncio.wait([self._started.task])
        if self._started.encoder is not None:
            await asyncio.to_thread(self._started.encoder.close)
        if not self.has_failed:  # else a thread may wait for a rank that is gone
            await asyncio.to_thread(self._started.parts.runner.close)

    @property
    def started(self) -> Started:
        if self._started is None:
            raise EngineStopped("the engine is starting")
        return self._started

    @property
    def parts(self) -> EngineParts:
        return self.started.parts

    @property
    def is_running(self) -> bool:
        return self._started is not None and not self._started.task.done()

    @property
    def has_failed(self) -> bool:
        return self._failure.has_happened

    async def failed(self) -> str:
        return await self._failure.wait()

    # ---- facts ----

    @property
    def model_config(self) -> ModelConfig:
        return self.parts.model_config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.parts.tokenizer

    @property
    def max_total_num_tokens(self) -> int:
        return self.parts.scheduler.held.allocator.num_total

    @property
    def context_length(self) -> int:
        return self.started.limits.context_length

    @property
    def max_running_requests(self) -> int:
        return self.parts.rows.num_rows

    @property
    def is_generation(self) -> bool:
        return self.started.limits.is_generation

    # ---- pictures and videos ----

    @property
    def media_reader(self) -> MediaReader | None:
        return self.parts.reader

    # ---- requests ----

    async def prepare(self, states: Sequence[RequestState]) -> None:
        await self.started.constraints.prepare(states)

    def warm_up_grammars(self) -> None:
        if self.is_generation:
            self.started.constraints.warm_up()

    def start_canary(self) -> None:
        if self.is_generation and not self.config.disable_canary:
            self.started.canary.start()

    def submit(self, state: RequestState) -> None:
        if self.has_failed:
            raise EngineStopped("the engine has failed")
        self._requests.check_open(self.is_running)
        started = self.started
        is_idle = not started.diagnostics.has_work
        started.intake.submit(state)
        if is_idle:
            started.diagnostics.record_work()
        started.loop.wake()

    def abort(self, rid: str, message: str = "aborted by the client", status_code: int = 499) -> bool:
        state = self._requests.by_rid.get(rid)
        if state is None or state.status is Status.FINISHED:
            return False
        self.started.loop.abort(state, FinishReason("abort", message=message, status_code=status_code))
        self._requests.num_aborted += not self.started.canary.owns(rid)
        return True

    def abort_all(self, message: str = "aborted by the client", status_code: int = 499) -> int:
        num_aborted = sum(self.abort(rid, message, status_code) for rid in list(self._requests.by_rid))
        if self._started is not None:
            self._started.output.flush()  # to those that had just ended by themselves
        return num_aborted

    # ---- cache and weights ----

    @property
    def maintenance(self) -> LocalMaintenance:
        if not self.is_running:
            raise EngineStopped("the engine is not running")
        return self.started.maintenance

    def flush_cache(self) -> bool:
        return self.parts.scheduler.flush()

    def top_prefixes(self, k: int) -> list[Prefix]:
        found = self.parts.scheduler.held.cache.top_prefixes(k + 1, head_len=1 << 20)
        shown = self.started.intake.interner.tokens
        return [
            one._replace(token_ids=shown(one.token_ids))
            for one in found
            if not self.started.canary.has_prefix(one.token_ids.tolist())
        ][:k]

    # ---- observation ----

    def top_branches(self, k: int) -> list[BranchView]:
        return self.started.diagnostics.top_branches(k)

    def oldest_requests(self, k: int) -> list[RequestView]:
        return self.started.diagnostics.oldest_requests(k)

    def health(self) -> Health:
        if self._started is None:
            return Health("starting")
        return self._started.diagnostics.health(self.is_running)

    def stats(self) -> EngineStats:
        return self.started.diagnostics.stats()

    def progress(self) -> tuple[int, ...] | None:
        return None if self._started is None else self._started.diagnostics.progress()

    def describe(self) -> str:
        return "the engine is starting\n" if self._started is None else self._started.diagnostics.describe()

    def start_profile(self, output_dir: str) -> None:
        if self._profiler is not None:
            raise InvalidRequest("a profile is being recorded")
        make_profile_folder(output_dir)
        self._profiler = Profiler(output_dir)

    async def stop_profile(self) -> str:
        if self._profiler is None:
            raise InvalidRequest("no profile is being recorded")
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        return await asyncio.to_thread(profiler.write)


async def _build(
    config: EngineConfig,
    on_progress: Callable[[str], None],
    on_tokenizer: Callable[[Tokenizer], object] | None,
    failure: Failure,
    on_failure: Callable[[str], None],
) -> EngineParts:
    """Build the parts on a thread. `ModelError` if they cannot be built, or if `failure` happens first.

    A rank that ends meanwhile may leave the building thread waiting for it for ever: the thread is then abandoned.
    """
    loop = asyncio.get_running_loop()

    def report_failure(message: str) -> None:
        loop.call_soon_threadsafe(on_failure, message)

    building = asyncio.ensure_future(asyncio.to_thread(build, config, on_progress, report_failure, on_tokenizer))
    failing = asyncio.ensure_future(failure.wait())
    await asyncio.wait([building, failing], return_when=asyncio.FIRST_COMPLETED)
    failing.cancel()
    if failure.has_happened:
        building.add_done_callback(_retrieve_exception)  # what it raises is a consequence
        raise ModelError(failure.reason)
    try:
        return building.result()
    except OUT_OF_MEMORY as error:
        raise ModelError(describe_lack_of_memory(error)) from error


def _new_encoder(parts: EngineParts, tower: Tower, loop: StepLoop) -> Encoder:
    """Return what computes features of pictures for the scheduler of `parts`, on the event loop that runs now."""
    config, model, scheduler = parts.config, parts.runner.model, parts.scheduler
    row_bytes = (1 + model.num_deep_layers) * model.config.hidden_size * model.config.dtype.itemsize
    max_batch = MAX_BATCH if parts.runner.device.type == "cuda" else 1  # on a CPU, one by one
    call_soon = asyncio.get_running_loop().call_soon_threadsafe
    encoder = Encoder(tower, row_bytes, config.mm_embedding_cache_mb << 20, max_batch, call_soon)

    def on_ready(state: RequestState) -> None:
        scheduler.resume(state)
        loop.wake()

    def on_failed(state: RequestState, error: BaseException) -> None:
        logger.error("the pictures of request %s could not be read", state.rid, exc_info=error)
        message = f"a picture could not be read: {type(error).__name__}: {error}"
        loop.abort(state, FinishReason("abort", message=message, status_code=500))

    encoder.on_ready, encoder.on_failed = on_ready, on_failed
    scheduler.feature_source = encoder
    return encoder


def _retrieve_exception(task: asyncio.Task[Any]) -> None:
    """Keep asyncio from logging that nobody has retrieved the exception of `task`."""
    if not task.cancelled():
        task.exception()
