"""The server's last minutes, sampled now and then: nothing here runs for each token.

A tick is late by as long as the event loop was busy when it was due: that lateness is the loop's lag, what a request
that comes at a random moment waits for. While nothing runs, ticks are few.
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from aiohttp import web

from engine.engine import Engine
from engine.state import RequestState
from server.watch.history import History, Sample

TICK_S, IDLE_TICK_S = 0.05, 0.5
SAMPLE_S = 1.0
STEPS_S = {300: 0.0, 3600: 12.0, 86400: 288.0}  # by span of time in seconds: between two samples that are kept
SHORT_SPAN_S, *_ = STEPS_S
SMOOTHED_SAMPLES = 5  # that a drawn rate goes back in the short span
NUM_LAGS = 1200  # a minute under load
NUM_ENDED = 1000


@dataclass(frozen=True, slots=True)
class Ended:
    """Times of a request that has ended, in seconds."""

    queue_s: float
    first_token_s: float
    token_s: float | None
    """Mean time between two tokens; None if there was one."""
    total_s: float


@dataclass(frozen=True, slots=True)
class Rates:
    """Over a span of time, per second where no unit is named."""

    generated: float = 0.0
    prompt: float = 0.0
    steps: float = 0.0
    host_us_per_step: float = 0.0
    device_idle: float = 0.0
    """Share of the time."""
    hit_rate: float = 0.0
    """Share of prompt tokens found in the cache."""
    cpus: float = 0.0
    """CPU cores in use by this process."""


class Monitor:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.started_at = time.perf_counter()
        self.histories = {span_s: History(step_s) for span_s, step_s in STEPS_S.items()}
        self.lags: deque[float] = deque(maxlen=NUM_LAGS)  # seconds
        self.ended: deque[Ended] = deque(maxlen=NUM_ENDED)
        self.lag_observers: list[Callable[[float], None]] = []

    @property
    def samples(self) -> deque[Sample]:
        """Those of the last minutes, one a second."""
        return self.histories[SHORT_SPAN_S].samples

    async def running(self, _: web.Application) -> AsyncIterator[None]:
        """Sample as long as the application lives: a cleanup context."""
        task = asyncio.create_task(self._watch(), name="monitor")
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _watch(self) -> None:
        next_sample_at = 0.0
        while True:
            now = time.perf_counter()
            if now >= next_sample_at:
                sample = self.sample()
                for history in self.histories.values():
                    history.add(sample)
                next_sample_at = max(next_sample_at + SAMPLE_S, now + SAMPLE_S / 2)
            is_busy = self.samples[-1].num_running or self.engine.health().num_running
            due = now + (TICK_S if is_busy else IDLE_TICK_S)
            await asyncio.sleep(due - now)
            self.note_lag(max(time.perf_counter() - due, 0.0))

    def note_lag(self, lag_s: float) -> None:
        self.lags.append(lag_s)
        for observe in self.lag_observers:
            observe(lag_s)

    def sample(self) -> Sample:
        stats = self.engine.stats()
        scheduler, loop = stats.scheduler, stats.loop
        return Sample(
            at=time.perf_counter(),
            num_generated_tokens=loop.num_generated_tokens,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_hit_tokens=scheduler.num_hit_tokens,
            num_steps=loop.num_steps,
            host_s=loop.schedule_s + loop.launch_s + loop.resolve_s + loop.deliver_s,
            device_idle_s=loop.device_idle_s,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_held_tokens=scheduler.num_held_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            cpu_s=time.process_time(),
            num_generated_by_replica=tuple(
                replica.loop.num_generated_tokens for replica in self.engine.replica_stats()
            ),
        )

    def observe(self, state: RequestState) -> None:
        """Record a request that has ended."""
        times, num_tokens = state.times, len(state.output_ids)
        if times.scheduled and times.finished and num_tokens:
            token_s = (times.finished - times.first_token) / (num_tokens - 1) if num_tokens > 1 else None
            self.ended.append(
                Ended(
                    times.scheduled - times.arrived,
                    times.first_token - times.arrived,
                    token_s,
                    times.finished - times.arrived,
                )
            )

    def rates(self, span_s: float) -> Rates:
        """Return the rates over the last `span_s` seconds, or as far back as there are samples."""
        before, now = self._span(span_s)
        return Rates() if before is now else rates_between(before, now)

    def throughputs(self, span_s: float) -> list[float]:
        """Return the tokens that each replica generated a second, over the same span as `rates`."""
        before, now = self._span(span_s)
        seconds = now.at - before.at or math.inf
        counts = zip(before.num_generated_by_replica, now.num_generated_by_replica, strict=True)
        return [(count - earlier) / seconds for earlier, count in counts]

    def _span(self, span_s: float) -> tuple[Sample, Sample]:
        """Return the first sample of the last `span_s` seconds and one of now; twice that if there is none before."""
        now = self.sample()
        earlier = [sample for sample in self.samples if now.at - sample.at <= span_s]
        return (earlier[0] if earlier and now.at - earlier[0].at >= SAMPLE_S / 10 else now), now

    def series(self, span_s: int = SHORT_SPAN_S) -> list[tuple[Sample, Rates]]:
        """Return each sample of a span with the rates since the one before, or the few, oldest first."""
        samples = list(self.histories[span_s].samples)
        num_before = SMOOTHED_SAMPLES if span_s == SHORT_SPAN_S else 1
        return [
            (sample, rates_between(samples[max(i - num_before, 0)], sample)) for i, sample in enumerate(samples) if i
        ]


def rates_between(before: Sample, after: Sample) -> Rates:
    seconds = after.at - before.at
    steps = after.num_steps - before.num_steps
    prompt = after.num_prompt_tokens - before.num_prompt_tokens
    return Rates(
        generated=(after.num_generated_tokens - before.num_generated_tokens) / seconds,
        prompt=prompt / seconds,
        steps=steps / seconds,
        host_us_per_step=(after.host_s - before.host_s) / steps * 1e6 if steps else 0.0,
        device_idle=(after.device_idle_s - before.device_idle_s) / seconds,
        hit_rate=(after.num_hit_tokens - before.num_hit_tokens) / prompt if prompt else 0.0,
        cpus=(after.cpu_s - before.cpu_s) / seconds,
    )


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the smallest value that `share` of `values` do not exceed; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
