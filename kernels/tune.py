"""Find configurations for the shapes of a model that no table knows, at its first start on a card."""

import functools
import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch

from kernels.experts import ExpertShape
from kernels.launch import compiling_ahead
from kernels.nvrtc import compile_source
from kernels.timing import graph_timer
from kernels.tuning import AttentionShape, LatentShape, Task, WeightShape, tables

logger = logging.getLogger(__name__)

BUDGET_S = 3.0  # of a first start
NUM_TIMINGS = 5  # of each candidate, in turns with the others; their median counts
NUM_REPLAYS = 3
MIN_GAIN = 0.02  # share of its time that a candidate must save to take the default's place: less is noise
WAVE_KERNELS = 8  # kernels compiled together at least, before they are timed and the clock is looked at

# Makes of launches a function that times them: the microseconds of one.
Timer = Callable[[list[Callable[[], object]]], Callable[[], float]]
graph_replays: Timer = functools.partial(graph_timer, num_replays=NUM_REPLAYS)


def tune_kernels(
    shapes: Sequence[WeightShape],
    budget_s: float = BUDGET_S,
    *,
    attention: Sequence[AttentionShape | LatentShape] = (),
    experts: Sequence[ExpertShape] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Find the fastest configuration of each kernel for those of a model's shapes that no table knows.

    Runs on the current device. Takes about `budget_s` seconds at most, 0: nothing is done; what is left keeps its
    default until a later start, which has nothing to do once every shape is known. Nothing is done without a GPU, or
    for float32, which is not served by configurations for it. Must run before kernels are compiled or captured in
    graphs for these shapes, and not inside `compiling_ahead`.

    Every rank calls it, for its own card and without waiting for others. At a first start they may so have different
    configurations, and results that differ by rounding; later starts of all on a host read the same file.
    """
    if not torch.cuda.is_available() or dtype.itemsize != 2 or budget_s <= 0:
        return
    device = torch.device("cuda", torch.cuda.current_device())
    # Here: a machine without a GPU need not have triton.
    from kernels.quantized_tasks import quantized_tasks
    from kernels.triton_tasks import tasks_of

    with torch.inference_mode():
        tasks = quantized_tasks(shapes, device) + tasks_of(shapes, attention, dtype, device, experts)
        found = tune(tasks, budget_s, device)
    if found:
        torch.cuda.empty_cache()  # what follows measures how much memory a step takes
        tables(device).save()


def tune(
    tasks: Sequence[Task],
    budget_s: float,
    device: torch.device,
    *,
    timer: Timer = graph_replays,
    compiling: Callable[[], AbstractContextManager[None]] = compiling_ahead,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Record the fastest configuration of each task whose shape is unknown; return how many were found.

    Candidates are compiled some tasks at a time, all of these at once. No more are begun when the time that the last
    ones took would pass `budget_s`; one log line counts what is left. A candidate that fails is skipped.
    """
    unknown = [task for task in tasks if task.candidates and not task.configs.is_tuned(device, task.key)]
    if not unknown:
        return 0
    start = last = clock()
    num_found, longest_s = 0, 0.0
    for wave in _waves(unknown):
        if last - start + longest_s > budget_s:
            break
        _compile(wave, compiling)
        for task in wave:
            if clock() - start > budget_s:
                break
            default = task.configs.get(device, *task.key)
            task.configs.record(device, task.key, _fastest(task, default, timer))
            num_found += 1
        last, before = clock(), last
        longest_s = max(longest_s, last - before)
    logger.info(
        "tuned kernels for %d of %d new shapes on %s in %.1f s%s",
        num_found,
        len(unknown),
        tables(device).card,
        last - start,
        "" if num_found == len(unknown) else "; the others keep their defaults, and a later start goes on",
    )
    return num_found


def _waves(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Cut tasks into runs of enough candidates to keep the compiling threads busy."""
    wave: list[Task] = []
    num_kernels = max(WAVE_KERNELS, len(os.sched_getaffinity(0)) // 2)
    for task in tasks:
        wave.append(task)
        if sum(len(task.candidates) for task in wave) >= num_kernels:
            yield wave
            wave = []
    if wave:
        yield wave


def _compile(wave: list[Task], compiling: Callable[[], AbstractContextManager[None]]) -> None:
    """Compile all candidates of `wave` at once, as far as they can be: `_fastest` finds out which cannot."""
    sources = {task.source_of(config) for task in wave if task.source_of for config in task.candidates}
    if sources:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            list(threads.map(_compile_source, sources))
    try:
        with compiling():
            for task in wave:
                if task.source_of:
                    continue
                launch = task.prepare()[0]
                for config in task.candidates:
                    launch(config)
    except _errors() as error:
        logger.debug("a candidate cannot be compiled: %s", error)


def _compile_source(source: tuple[str, str, str]) -> None:
    try:
        compile_source(*source)
    except RuntimeError as error:
        logger.debug("a candidate cannot be compiled: %s", error)


def _fastest(task: Task, default: Any, timer: Timer) -> Any:
    """Return the candidate with the least median time, or `default` unless another saves `MIN_GAIN` of its time."""
    try:
        launches = task.prepare()
    except _errors() as error:
        logger.debug("no room to tune %s for %s: %s", task.configs.kind, task.key, error)
        return default
    timers: dict[Any, Callable[[], float]] = {}
    for config in dict.fromkeys([default, *task.candidates]):
        try:
            timers[config] = timer([functools.partial(launch, config) for launch in launches])
        except _errors() as error:
            logger.debug("%s of %s cannot run for %s: %s", config, task.configs.kind, task.key, error)
    rounds = [{config: time_us() for config, time_us in timers.items()} for _ in range(NUM_TIMINGS)]
    medians = {config: statistics.median(times[config] for times in rounds) for config in timers}
    best = min(medians, key=medians.__getitem__, default=default)
    return best if medians.get(best, 0.0) < (1 - MIN_GAIN) * medians.get(default, math.inf) else default


@functools.cache
def _errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of a candidate that a card has no room for, or of inputs that memory has none for."""
    from triton.errors import TritonError

    return TritonError, RuntimeError
