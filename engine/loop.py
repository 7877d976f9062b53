"""The step loop, where the event loop meets the runner: it decides, launches and resolves steps.

Steps overlap. While step n runs on the device, step n+1 is already enqueued behind it, its input tokens taken on the
device from step n's output. When n's tokens arrive, n+2 is decided and enqueued first; only then is n's text made
and sent, so sockets are written while the device computes. Each iteration of the event loop serves a few streams, and
first checks whether the device has finished a step and needs the next one.
"""

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass

from engine.batch_log import BatchLog
from engine.output import OutputProcessor
from engine.pace import MIN_LEAD_S, MIN_RANKS_LEAD_S, StepPace
from engine.schedule.plan import Plan, PrefillBudget
from engine.schedule.scheduler import Scheduler
from engine.state import FinishReason, RequestState
from engine.step.model_runner import ModelRunner, Step

logger = logging.getLogger(__name__)

MAX_DELIVERIES = 4  # calls of `OutputProcessor.deliver` in one iteration of the event loop
MIN_SLEEP_S = 0.001  # seconds: uvloop's timers count milliseconds
# Seconds before and after the expected end of a GPU's step during which the loop busy-polls for it: the end is seen at
# once, and a core that has slept takes half as long again to decide and launch the next step.
AWAKE_S = 0.05
YIELD_S = 0.002  # seconds between the moments at which other threads get the interpreter


@dataclass(slots=True)
class LoopStats:
    """Count what the loop has done since the start, and the seconds it took."""

    num_steps: int = 0
    num_generated_tokens: int = 0
    num_failed_steps: int = 0
    num_violations: int = 0
    """Mistakes in the bookkeeping of KV slots and rows that were found while idle; one that stays counts once."""
    schedule_s: float = 0.0
    """Host seconds spent deciding steps."""
    launch_s: float = 0.0
    """Host seconds spent enqueuing steps."""
    resolve_s: float = 0.0
    """Host seconds spent recording the tokens of steps that have ended."""
    deliver_s: float = 0.0
    """Host seconds spent making and sending text."""
    device_idle_s: float = 0.0
    """Device seconds between the end of a step and the start of the next, pauses without work aside."""
    last_step_at: float = 0.0
    """time.perf_counter() when a step last resolved."""


class StepLoop:
    """Decide, launch and resolve steps, and deliver their output, on the event loop that calls `run`."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        output: OutputProcessor,
        *,
        is_overlapped: bool = True,
        max_step_ms: float | None = None,
        chunked_prefill_size: int = 8192,
        context_cost: float = 0.0,
        max_wait_s: float | None = None,
        decode_log_interval: int = 40,
    ) -> None:
        """Set up the loop; it starts with `run`.

        context_cost, max_wait_s: see `StepPace`; the others are named after the flags.
        """
        min_lead_s = MIN_LEAD_S if runner.ranks is None else MIN_RANKS_LEAD_S
        self.scheduler, self.runner, self.output = scheduler, runner, output
        self.stats = LoopStats()
        self._depth = 2 if is_overlapped else 1
        self._news = asyncio.Event()  # a step has ended, or there may be something to schedule
        self._may_step = True
        self._is_still = asyncio.Event()
        self._in_flight: deque[Step] = deque()
        self._yielded_at = 0.0  # time.perf_counter()
        self._seen_running = 0.0  # time.perf_counter() when a step was last seen running
        self._last_end = 0.0  # time.perf_counter() when a step last ended
        self._pace = StepPace(max_step_ms, chunked_prefill_size, context_cost, min_lead_s, max_wait_s)
        self._log = BatchLog(scheduler, decode_log_interval)
        self._num_verified_steps = 0  # that had come back when the bookkeeping was looked at last
        self._violations: list[str] = []  # what was wrong with it then

    def wake(self) -> None:
        """Wake the loop: there may be something to schedule."""
        self._news.set()

    async def pause(self) -> None:
        """Launch nothing more. Returns when all launched steps have ended and their output is delivered."""
        self._may_step = False
        self.wake()
        await self._is_still.wait()

    def resume(self) -> None:
        """Launch steps again after `pause`."""
        self._is_still.clear()
        self._may_step = True
        self.stats.last_step_at = time.perf_counter()  # so that the pause does not count as a step's delay
        self.wake()

    @property
    def is_still(self) -> bool:
        """Return whether a pause has begun: nothing is in flight, and nothing is launched."""
        return self._is_still.is_set()

    @property
    def steps_in_flight(self) -> list[Step]:
        """Return the steps that are launched and not resolved, oldest first."""
        return list(self._in_flight)

    async def run(self) -> None:
        """Run steps until cancelled."""
        while True:
            self._yield()
            self._news.clear()
            if self._has_ended():
                await self._resolve(self._in_flight[0])
            spare_s = 0.0
            while self._may_step and len(self._in_flight) < self._depth:
                spare_s = self._spare_s()
                if spare_s or not await self._launch():
                    break
            if self.output.has_pending or self._has_ended():
                self._deliver()
                await asyncio.sleep(0)  # let the connections run
            else:
                await self._wait(spare_s)

    def _yield(self) -> None:
        """Let other threads take the interpreter lock, every `YIELD_S`.

        uvloop releases the lock in each iteration, but takes it again before a waiting thread is awake. Such a thread
        neither gets the lock nor, because it was signalled that the lock is free, requests it: a loop whose iterations
        take 0.2 ms keeps threads waiting for a second.
        """
        now = time.perf_counter()
        if now - self._yielded_at > YIELD_S:
            self._yielded_at = now
            time.sleep(0)

    def _has_ended(self) -> bool:
        """Return whether the oldest step has ended."""
        if not self._in_flight:
            return False
        if self._in_flight[0].has_ended:
            return True
        self._seen_running = time.perf_counter()
        return False

    def _deliver(self) -> None:
        """Deliver some of the pending output: at most `MAX_DELIVERIES` calls, fewer once a step has ended."""
        start = time.perf_counter()
        for _ in range(MAX_DELIVERIES):
            self.output.deliver()
            if self._has_ended():
                break
        self.stats.deliver_s += time.perf_counter() - start

    async def _launch(self) -> bool:
        """Decide and enqueue the next step. Returns False if nothing can be computed now."""
        stats, clock = self.stats, time.perf_counter
        start = clock()
        try:
            plan = self.scheduler.schedule(self._prefill_budget())
        except Exception as error:  # noqa: BLE001 - a bug of ours must not end the server
            await self._abandon(error)
            return True
        scheduled = clock()
        stats.schedule_s += scheduled - start
        if plan is None:
            return False
        for state in plan.admitted:
            state.times.scheduled = start
        try:
            step = self.runner.launch(plan)
        except Exception as error:  # noqa: BLE001 - such as out of memory: only this step fails
            await self._fail(plan, error)
            return True
        self._in_flight.append(step)
        self._log.on_launch(plan)
        if not step.awaits_masks:
            self._tell_end_of(step)
        elif not await self._sample(step):
            return True
        launched = clock()
        stats.launch_s += launched - scheduled
        self._pace.observe_launch(plan, launched - start)
        return True

    def _tell_end_of(self, step: Step) -> None:
        """Have the worker that computes `step`, if there is one, wake the loop when the step ends."""
        if step.done is not None:
            loop = asyncio.get_running_loop()
            step.done.add_done_callback(lambda _: loop.call_soon_threadsafe(self.wake))  # without `step`: no cycle

    async def _wait(self, spare_s: float) -> None:
        """Wait until the loop is woken, or for at most `spare_s` seconds if that is not 0."""
        if not self._in_flight:
            if not self._may_step:
                self._is_still.set()
            elif self.scheduler.is_blocked:
                spare_s = MIN_SLEEP_S  # only the caller can free what the queue waits for
            else:
                self._verify()
        elif self._in_flight[0].done is None:  # a GPU's step: nothing wakes the loop at its end
            left_s = spare_s or self._left_s()
            if abs(left_s) < AWAKE_S:
                await asyncio.sleep(0)
                return
            spare_s = max(left_s - AWAKE_S, MIN_SLEEP_S)
        timer = asyncio.get_running_loop().call_later(spare_s, self.wake) if spare_s else None
        await self._news.wait()
        if timer is not None:
            timer.cancel()

    def _verify(self) -> None:
        """Check the scheduler's bookkeeping, once an idle period; report what was not wrong the last time."""
        stats = self.stats
        num_steps = stats.num_steps + stats.num_failed_steps
        if num_steps == self._num_verified_steps:
            return
        self._num_verified_steps = num_steps
        before, self._violations = self._violations, self.scheduler.violations()
        for violation in self._violations:
            if violation not in before:
                stats.num_violations += 1
                logger.error("the scheduler's bookkeeping is wrong: %s; %s", violation, self.scheduler.stats())

    @property
    def _has_prompts(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.prefilling)

    def _prefill_budget(self) -> PrefillBudget | None:
        if not self._has_prompts:
            return None
        scheduler = self.scheduler
        budget = self._pace.prefill_budget(scheduler.num_streams)
        if (graphs := self.runner.graphs) is not None:
            has_groups = scheduler.groups.groups is not None
            budget.sizes, largest = graphs.prompt_sizes(scheduler.num_decodes, has_groups)
            budget.keep_to_graph(largest)
        if self.runner.splitter.can_split:  # else there is no need to count
            best = self.runner.splitter.best_prompt_tokens(scheduler.num_decodes, scheduler.num_context_tokens)
            if best is not None:
                budget.max_tokens = min(budget.max_tokens, best)
        return budget

    def _begun_at(self, oldest: Step) -> float:
        """Return the time.perf_counter() at which the device began `oldest`, as far as is known."""
        return max(oldest.launched_at, self._last_end)

    def _left_s(self) -> float:
        """Return the seconds until the oldest step will probably end."""
        oldest = self._in_flight[0]
        return self._begun_at(oldest) + self._pace.predict_s(oldest.plan) - time.perf_counter()

    def _spare_s(self) -> float:
        """Return the seconds until the next step must be decided to keep the device busy; 0 if that is about now.

        Deciding late lets a request that arrives in the meantime join the very next step.
        """
        if not self._in_flight:
            return 0.0
        spare_s = self._left_s() - self._pace.lead_s(self._has_prompts)
        if self._in_flight[0].done is not None:  # on a CPU, where busy-polling would slow the step
            spare_s -= MIN_SLEEP_S  # a timer may be late by as much
            return spare_s if spare_s >= MIN_SLEEP_S else 0.0
        return max(spare_s, 0.0)

    async def _sample(self, step: Step) -> bool:
        """Enqueue the sampling of the newest step, if the matchers know all tokens before it.

        Returns False if sampling failed; the step has failed then, too.
        """
        assert step.work.masked is not None
        wanted = self.scheduler.resolver.matchers_of(step.plan, step.work.masked)
        if wanted is None:
            assert len(self._in_flight) > 1, "a token is waited for that no step brings"
            return True
        try:
            errors = self.runner.sample(step, *wanted)
        except Exception as error:  # noqa: BLE001 - as in `_launch`
            await self._fail(step.plan, error)
            return False
        self._tell_end_of(step)
        for i, message in errors.items():
            plan = step.plan
            state = self.scheduler.rows.state_at(plan.rows[plan.samples[wanted[0][i]]])
            self.abort(state, FinishReason("abort", message=f"the grammar failed: {message}", status_code=400))
        return True

    async def _resolve(self, step: Step) -> None:
        """Record the tokens of `step`, which has ended. If it raised, its own requests fail; the loop goes on."""
        try:
            step.result()
        except Exception as error:  # noqa: BLE001 - whatever a step raises ends that step's requests and no others
            await self._fail(step.plan, error)
            return
        self._in_flight.popleft()
        start = self.stats.last_step_at = time.perf_counter()
        assert step.tokens is not None
        outcome = self.scheduler.resolve(step.plan, step.tokens.numpy()[: len(step.plan.samples)])
        self.output.take(step, outcome)
        device_s, idle_s = self.runner.times(step)
        # By the device's own clock: the host's polls only bound the end from below and above.
        self._last_end = min(max(self._begun_at(step) + device_s, self._seen_running), start)
        self._pace.observe(step.plan, device_s, is_slow_way=step.is_slow_way)
        self._log.on_resolve(outcome)
        stats = self.stats
        stats.num_steps += 1
        stats.num_generated_tokens += outcome.num_tokens
        stats.device_idle_s += idle_s
        if self._in_flight and (newest := self._in_flight[-1]).awaits_masks:
            await self._sample(newest)  # before the next launch, which may overwrite its logits
        stats.resolve_s += time.perf_counter() - start

    async def _fail(self, plan: Plan, error: Exception) -> None:
        """Fail the requests of a step that raised."""
        logger.error("a step of %d requests failed", len(plan.rows), exc_info=error)
        await self._drop_in_flight()
        self._close(self.scheduler.fail(plan, _failure("step failed", error)))

    async def _abandon(self, error: Exception) -> None:
        """End the requests that may be why no step could be decided, so that the next one can."""
        logger.error("no step could be scheduled", exc_info=error)
        await self._drop_in_flight()
        self._close(self.scheduler.abandon(_failure("scheduling failed", error)))

    async def _drop_in_flight(self) -> None:
        """Discard the steps launched behind a failure: their inputs were never written."""
        self.stats.num_failed_steps += 1
        while self._in_flight:
            step = self._in_flight.popleft()
            while not step.has_ended:  # noqa: ASYNC110 - a GPU signals no event
                await asyncio.sleep(MIN_SLEEP_S)

    def _close(self, states: list[RequestState]) -> None:
        for state in states:
            self.output.close(state)

    def abort(self, state: RequestState, reason: FinishReason) -> None:
        """End `state` now; its slots are free before the next plan."""
        self.scheduler.finish(state, reason)
        self.output.close(state)


def _failure(what: str, error: Exception) -> FinishReason:
    return FinishReason("abort", message=f"{what}: {type(error).__name__}: {error}", status_code=500)
