"""Samples of the server's counters over minutes, an hour and a day: the longer, the coarser, and always as many."""

import dataclasses
from collections import deque
from dataclasses import dataclass
from statistics import fmean

NUM_SAMPLES = 301  # of each span


@dataclass(frozen=True, slots=True)
class Sample:
    """The engine's counters and gauges at one moment; of a coarse one, the gauges' means since the one before."""

    at: float
    """time.perf_counter() seconds."""
    num_generated_tokens: int
    num_prompt_tokens: int
    num_hit_tokens: int
    num_steps: int
    host_s: float
    """Seconds of deciding, launching, resolving and delivering steps, since the start."""
    device_idle_s: float
    """Seconds between two steps, since the start."""
    num_running: float
    num_waiting: float
    num_held_tokens: float
    num_cached_tokens: float
    cpu_s: float
    """CPU time of all threads of this process, since the start."""
    num_generated_by_replica: tuple[int, ...] = ()
    """Each replica's share of num_generated_tokens."""


class History:
    """Keep the samples of one span of time."""

    def __init__(self, step_s: float) -> None:
        """Start without samples. `step_s`: between two that are kept; 0: each is."""
        self.step_s = step_s
        self.samples: deque[Sample] = deque(maxlen=NUM_SAMPLES)
        self._since: list[Sample] = []  # the last one that was kept

    def add(self, sample: Sample) -> None:
        """Take a sample of now, of which there is about one a second."""
        if not self.step_s or not self.samples:
            self.samples.append(sample)
            return
        self._since.append(sample)
        if sample.at - self.samples[-1].at >= self.step_s:
            self.samples.append(
                dataclasses.replace(
                    sample,
                    num_running=self._mean("num_running"),
                    num_waiting=self._mean("num_waiting"),
                    num_held_tokens=self._mean("num_held_tokens"),
                    num_cached_tokens=self._mean("num_cached_tokens"),
                )
            )
            self._since.clear()

    def _mean(self, gauge: str) -> float:
        return fmean(getattr(sample, gauge) for sample in self._since)
