"""The facade: what the server, and anyone in process, talks to."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.radix import Prefix
from engine.build import Parts, build
from engine.config import EngineConfig
from engine.errors import EngineError, EngineStopped, InvalidRequest, ModelError, PromptTooLong, QueueFull
from engine.loop import LoopStats, StepLoop
from engine.maintenance import Maintenance
from engine.model_config import ModelConfig
from engine.output import OutputProcessor
from engine.profiler import Profiler
from engine.request import Delta, FinishReason, Logprobs, Request, Status
from engine.schedule.fairness import DrainRate
from engine.schedule.scheduler import SchedulerStats
from engine.step.memory import MemoryBudget
from engine.step.pooling import LAST, MEAN
from engine.text.grammar import Grammar, GrammarCompiler, GrammarStats, Matcher
from engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

GRAMMAR_TIMEOUT_S = 10.0  # a grammar that takes longer to compile is refused
LONG_TEXT = 1500  # characters; shorter texts are tokenized on the event loop, in about a millisecond
STUCK_AFTER_S = 30.0  # a step this long makes /health fail; --watchdog-timeout is when the process gives up


@dataclass(frozen=True, slots=True)
class Health:
    status: str
    """ok, starting, stuck (a step has not come back), stopping, or stopped."""
    last_step_age_s: float
    """Since a step last came back, or since there was work again; 0 while idle."""
    oldest_queued_s: float
    num_running: int
    num_queued: int
    num_violations: int = 0
    """Mistakes in the bookkeeping of KV slots and rows, found while idle: see the log. None is expected."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    scheduler: SchedulerStats
    loop: LoopStats
    num_requests: int
    num_aborted: int
    num_refused: int
    """For a full queue."""
    drain_tokens_per_s: float
    """Tokens computed for requests that ended, by working second."""
    grammars: GrammarStats


class Engine:
    """One model, ready for requests between `start` and `stop`. Not thread-safe: use it from its event loop."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._parts: Parts | None = None
        self._loop: StepLoop | None = None
        self._maintenance: Maintenance | None = None
        self._output: OutputProcessor | None = None
        self._task: asyncio.Task[None] | None = None
        self._requests: dict[str, Request] = {}
        self._is_stopping = False
        self._drained = asyncio.Event()
        self._failure = ""  # what has happened, when a rank or the step loop is gone
        self._has_failed = asyncio.Event()
        self._profiler: Profiler | None = None
        self._warming_up: asyncio.Future[None] | None = None
        self._num_requests = self._num_aborted = self._num_refused = 0
        self._drain = DrainRate()
        self._busy_since = 0.0

    async def __aenter__(self) -> "Engine":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self, on_progress: Callable[[str], None] = logger.info) -> None:
        """Load the model and begin to step. `ModelError` if it cannot be served."""
        parts = self._parts = await self._build(on_progress)
        self.config = parts.config
        self._output = OutputProcessor(parts.scheduler, self.config.stream_interval, self._on_end)
        self._loop = StepLoop(
            parts.scheduler,
            parts.runner,
            self._output,
            is_overlapped=not self.config.disable_overlap_schedule,
            max_step_ms=self.config.max_step_ms or None,
            chunked_prefill_size=parts.scheduler.chunked_prefill_size,
            context_cost=parts.model_config.context_cost,
            decode_log_interval=self.config.decode_log_interval,
        )
        self._maintenance = Maintenance(parts, self._loop, self.abort_all)
        self._task = asyncio.create_task(self._loop.run(), name="step-loop")
        self._task.add_done_callback(self._on_loop_end)

    async def _build(self, on_progress: Callable[[str], None]) -> Parts:
        """A rank that ends meanwhile may leave the building thread waiting for it for ever: it is left behind."""
        loop = asyncio.get_running_loop()

        def on_failure(message: str) -> None:
            loop.call_soon_threadsafe(self._on_failure, message)

        building = asyncio.ensure_future(asyncio.to_thread(build, self.config, on_progress, on_failure))
        failing = asyncio.ensure_future(self._has_failed.wait())
        await asyncio.wait([building, failing], return_when=asyncio.FIRST_COMPLETED)
        failing.cancel()
        if self._failure:
            building.add_done_callback(_see)  # what it raises is a consequence
            raise ModelError(self._failure)
        return building.result()

    def _on_failure(self, message: str) -> None:
        """No step can be computed any more."""
        logger.critical("%s; the engine cannot go on", message)
        self._failure = message
        self._has_failed.set()
        self.abort_all(f"the engine has failed: {message}", status_code=500)

    @property
    def has_failed(self) -> bool:
        """For good: it cannot be stopped in good order either, and the process must end."""
        return self._has_failed.is_set()

    async def failed(self) -> str:
        """Returns, with the reason, once the engine has failed."""
        await self._has_failed.wait()
        return self._failure

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, give running ones `drain_s` seconds, abort the rest, let go of the device."""
        self._is_stopping = True
        if self._requests and drain_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), drain_s)
        self.abort_all("the server is shutting down", status_code=503)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._parts is not None and not self.has_failed:  # else a thread may wait for a rank that is gone
            await asyncio.to_thread(self._parts.runner.close)

    # ---- what it is ----

    @property
    def parts(self) -> Parts:
        if self._parts is None:
            raise EngineStopped("the engine is starting")
        return self._parts

    @property
    def maintenance(self) -> Maintenance:
        if self._maintenance is None or not self.is_running:
            raise EngineStopped("the engine is not running")
        return self._maintenance

    @property
    def model_config(self) -> ModelConfig:
        return self.parts.model_config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.parts.tokenizer

    @property
    def grammars(self) -> GrammarCompiler | None:
        return self.parts.grammars

    @property
    def memory(self) -> MemoryBudget:
        return self.parts.memory

    @property
    def max_total_num_tokens(self) -> int:
        return self.parts.scheduler.held.allocator.num_total

    @property
    def context_length(self) -> int:
        """Longest prompt + answer in tokens."""
        return min(self.parts.rows.max_len, self.max_total_num_tokens)

    @property
    def max_running_requests(self) -> int:
        return self.parts.rows.num_rows

    @property
    def max_req_input_len(self) -> int:
        return self.context_length - 1

    @property
    def is_generation(self) -> bool:
        """Does it answer prompts, or turn them into vectors only?"""
        return self.model_config.is_generation and not self.config.is_embedding

    @property
    def embedding_size(self) -> int:
        """Numbers of the vector that a prompt becomes."""
        return self.model_config.embedding_size

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """Sampling fields that the model's generation_config.json sets, unless the configuration says otherwise."""
        return dict(self.model_config.generation_defaults) if self.config.sampling_defaults == "model" else {}

    @property
    def is_running(self) -> bool:
        return self._task is not None and not self._task.done()

    # ---- requests ----

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Long texts are tokenized off the event loop."""
        encode = functools.partial(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return encode() if len(text) < LONG_TEXT else await asyncio.to_thread(encode)

    async def prepare(self, requests: Sequence[Request]) -> None:
        """Compile what constrains the answers of `requests`, off the event loop. Must come before `submit`.

        Raises `InvalidRequest` if that is impossible, or takes too long.
        """
        for request in requests:
            constraint, grammar = request.sampling_params.constraint, None
            if constraint is not None:
                grammar = await self._grammar(*constraint)
            elif request.max_thinking_tokens is None:
                continue
            may_jump = not (self.config.disable_jump_forward or request.return_logprob)
            request.matcher = Matcher(
                grammar, request.reasoning_end_ids, request.max_thinking_tokens, may_jump=may_jump
            )

    def warm_up_grammars(self) -> None:
        """To be called once the start is over, when nobody is likely to wait for anything."""
        if self.grammars is not None and self.is_generation:
            self._warming_up = asyncio.get_running_loop().run_in_executor(None, self.grammars.warm_up)

    async def _grammar(self, kind: str, text: str) -> Grammar:
        grammars = self.grammars
        if grammars is None:
            raise InvalidRequest(f"{kind} is not supported: the server runs with --grammar-backend none", kind)
        grammar = grammars.find(kind, text)
        if grammar is not None:
            return grammar
        compiling = asyncio.to_thread(grammars.compile, kind, text)
        try:
            return await asyncio.wait_for(compiling, GRAMMAR_TIMEOUT_S)
        except TimeoutError:
            message = f"{kind} is too complex: compiling it took more than {GRAMMAR_TIMEOUT_S:.0f} s"
            raise InvalidRequest(message, kind) from None

    def submit(self, request: Request) -> None:
        """Queue `request`, after `prepare`; its sink hears of it from now on.

        Raises `InvalidRequest` (a field out of range), `PromptTooLong`, `QueueFull` or `EngineStopped`.
        """
        if self.has_failed:
            raise EngineStopped("the engine has failed")
        if self._is_stopping or not self.is_running:
            raise EngineStopped("the server is shutting down" if self._is_stopping else "the engine is not running")
        self._verify(request)
        if request.pooling is None:
            request.text_stream = self.tokenizer.text_stream(request.sampling_params, request.input_ids)
        self._queue(request)
        if request.matcher is not None:
            try:
                self._jump_ahead(request, request.matcher)
            except Exception as error:
                self.parts.scheduler.finish(request, FinishReason("abort", message=str(error), status_code=500))
                raise
        self._requests[request.rid] = request
        self._num_requests += 1
        if request.logprob_start_len >= 0:  # nothing predicts the first
            request.input_logprobs = Logprobs([(None, request.input_ids[request.logprob_start_len])], [None], [None])
        assert self._loop is not None
        self._loop.wake()

    def _queue(self, request: Request) -> None:
        now, scheduler = time.perf_counter(), self.parts.scheduler
        try:
            scheduler.submit(request)
        except QueueFull as full:
            self._num_refused += 1
            full.retry_after_s = self._drain.seconds_for(scheduler.shares.num_waiting_work, now)
            raise
        if not self._has_work:
            self._busy_since = now
        self._drain.busy(now)

    @staticmethod
    def _jump_ahead(request: Request, matcher: Matcher) -> None:
        """What must come first joins the prompt, to be computed with it. One token at least is left to be sampled."""
        params = request.sampling_params
        assert params.max_new_tokens is not None
        if not matcher.may_jump or params.stop or params.stop_regex or params.stop_token_ids:
            return
        tokens = matcher.jump(max(params.max_new_tokens - 1, 0))
        if tokens and matcher.is_finished:
            matcher.step_back()
            tokens.pop()
        request.output_ids = tokens
        request.num_forced_tokens = len(tokens)
        if request.wants_tokens:
            request.new_token_ids = list(tokens)

    def _on_end(self, request: Request) -> None:
        if request.matcher is not None:
            request.matcher.close()
        self._requests.pop(request.rid, None)
        num_served = self.parts.scheduler.shares.num_served_tokens
        self._drain.observe(time.perf_counter(), num_served, is_idle=not self._requests)
        if self._is_stopping and not self._requests:
            self._drained.set()

    def _verify(self, request: Request) -> None:
        vocab_size = self.model_config.vocab_size
        request.sampling_params.verify(vocab_size)
        if request.sampling_params.constraint is not None and request.matcher is None:
            raise EngineError("a constrained request must be prepared before it is submitted")
        if request.max_thinking_tokens is not None and not request.reasoning_end_ids:
            raise InvalidRequest("max_thinking_tokens needs a model whose answers have an end of reasoning")
        if request.rid in self._requests:
            raise InvalidRequest(f"a request with rid {request.rid!r} is running", "rid")
        if request.pooling is None and not self.is_generation:
            raise InvalidRequest("this server turns prompts into vectors and does not generate", "model")
        if request.pooling is not None and (
            request.pooling not in (LAST, MEAN) or request.sampling_params.max_new_tokens != 0
        ):
            raise InvalidRequest(
                f"pooling must be {LAST} or {MEAN} with max_new_tokens 0, got {request.pooling!r}", "pooling"
            )
        if not request.input_ids:
            raise InvalidRequest("the prompt is empty", "input_ids")
        if request.prompt_len > self.max_req_input_len and request.sampling_params.max_new_tokens != 0:
            raise PromptTooLong(
                f"prompt has {request.prompt_len} tokens, the context is {self.context_length} "
                f"and at least one is left for the answer",
                "input_ids",
            )
        token_ids = np.asarray(request.input_ids, np.int64)
        is_bad = (token_ids < 0) | (token_ids >= vocab_size)
        if is_bad.any():
            bad = token_ids[is_bad.argmax()]
            raise InvalidRequest(f"token id {bad} is outside the vocabulary of {vocab_size}", "input_ids")
        request.prompt_ids = token_ids.astype(np.int32)
        if not all(0 <= token < vocab_size for token in request.token_ids_logprob):
            raise InvalidRequest(
                f"token_ids_logprob has ids outside the vocabulary of {vocab_size}", "token_ids_logprob"
            )
        if not 0 <= request.top_logprobs_num <= vocab_size:
            raise InvalidRequest(
                f"top_logprobs_num must be at least 0, got {request.top_logprobs_num}", "top_logprobs_num"
            )
        if not -1 <= request.logprob_start_len < request.prompt_len:
            raise InvalidRequest(
                f"logprob_start_len must be -1 or a position of the prompt, which has {request.prompt_len} tokens; "
                f"got {request.logprob_start_len}",
                "logprob_start_len",
            )

    def abort(self, rid: str, message: str = "aborted by the client", status_code: int = 499) -> bool:
        """End a request now; its sink gets a last delta. False if there is none of that name."""
        request = self._requests.get(rid)
        if request is None or request.status is Status.FINISHED:
            return False
        assert self._loop is not None
        self._loop.abort(request, FinishReason("abort", message=message, status_code=status_code))
        self._num_aborted += 1
        return True

    def abort_all(self, message: str = "aborted by the client", status_code: int = 499) -> int:
        """End every request. Returns how many there were."""
        num_aborted = sum(self.abort(rid, message, status_code) for rid in list(self._requests))
        if self._output is not None:
            self._output.flush()  # to those that had just ended by themselves
        return num_aborted

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Deltas of `request` up to the one with a finish reason. Leaving early aborts it."""
        deltas: asyncio.Queue[Delta] = asyncio.Queue()
        request.sink = deltas.put_nowait
        await self.prepare([request])
        self.submit(request)
        try:
            while True:
                delta = await deltas.get()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self.abort(request.rid)

    def flush_cache(self) -> bool:
        """Forget every cached prefix. False, and nothing done, while anything runs or waits."""
        return self.parts.scheduler.flush()

    # ---- how it is ----

    def start_profile(self, output_dir: str) -> None:
        """Record what host and device do, until `stop_profile`. `InvalidRequest` if that is going on already."""
        if self._profiler is not None:
            raise InvalidRequest("a profile is being recorded")
        make_profile_folder(output_dir)
        self._profiler = Profiler(output_dir)

    async def stop_profile(self) -> str:
        """Write the recording as a Chrome trace and return its path. `InvalidRequest` if there is none."""
        if self._profiler is None:
            raise InvalidRequest("no profile is being recorded")
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        return await asyncio.to_thread(profiler.write)

    def health(self) -> Health:
        if self._loop is None or self._parts is None:
            return Health("starting", 0.0, 0.0, 0, 0)
        now = time.perf_counter()
        scheduler = self._parts.scheduler
        age = now - max(self._busy_since, self._loop.stats.last_step_at) if self._has_work else 0.0
        oldest = min((request.times.arrived for request in scheduler.waiting), default=now)
        status = "ok"
        if not self.is_running:
            status = "stopped"
        elif self._is_stopping:
            status = "stopping"
        elif age > min(STUCK_AFTER_S, self.config.watchdog_timeout or STUCK_AFTER_S):
            status = "stuck"
        num_violations = self._loop.stats.num_violations
        return Health(status, age, now - oldest, scheduler.num_running, len(scheduler.waiting), num_violations)

    @property
    def _has_work(self) -> bool:
        if self._loop is None or self._loop.is_still:
            return False
        return bool(self._requests or self._loop.steps_in_flight)

    def progress(self) -> tuple[int, ...] | None:
        """Differs after each step; None while there is nothing to do. From any thread."""
        if self._loop is None or not self._has_work:
            return None
        return self._loop.stats.num_steps, self._loop.stats.num_failed_steps

    def describe(self) -> str:
        """What the engine is doing, for someone who must find out why it does not. From any thread."""
        now = time.perf_counter()
        lines = [f"{name}: {value}" for name, value in dataclasses.asdict(self.stats()).items()]
        for step in [] if self._loop is None else self._loop.steps_in_flight:
            plan = step.plan
            rids = [request.rid for row in plan.rows.tolist() if (request := self.parts.rows.requests[row])]
            lines.append(
                f"step in flight for {now - step.launched_at:.3f} s: {plan.num_tokens} tokens, "
                f"{plan.num_decodes} decodes, q_lens {plan.q_lens.tolist()}, seq_lens {plan.seq_lens.tolist()}, {rids}"
            )
        for request in list(self._requests.values()):
            lines.append(
                f"request {request.rid}: {request.status.name}, a prompt of {request.prompt_len} tokens, "
                f"{now - request.times.arrived:.3f} s old"
            )
        return "\n".join(lines) + "\n"

    def stats(self) -> EngineStats:
        assert self._loop is not None
        return EngineStats(
            self.parts.scheduler.stats(), self._loop.stats, self._num_requests, self._num_aborted, self._num_refused,
            self._drain.tokens_per_s, self.grammars.stats if self.grammars else GrammarStats(),
        )  # fmt: skip

    def replica_stats(self) -> list[EngineStats]:
        """Of each engine behind this facade."""
        return [self.stats()]

    def top_prefixes(self, k: int) -> list[Prefix]:
        """The k cached prefixes that were found most often, in full."""
        return self.parts.scheduler.held.cache.top_prefixes(k, head_len=1 << 20)

    def _on_loop_end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        logger.critical("the step loop ended", exc_info=task.exception())
        self._on_failure(f"the step loop ended: {task.exception()!r}")


def _see(task: asyncio.Task[Any]) -> None:
    """So that nobody is told that its exception was never looked at."""
    if not task.cancelled():
        task.exception()


def make_profile_folder(path: str) -> None:
    """`InvalidRequest` if it cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"no profile can be written to {path}: {error.strerror}", "output_dir") from None
