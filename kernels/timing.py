"""The time that launches take on a GPU, by its own clock."""

from collections.abc import Callable

import torch


def graph_timer(launches: list[Callable[[], object]], num_replays: int) -> Callable[[], float]:
    """Capture launches, one after another, in a CUDA graph.

    Returns a function that replays the graph `num_replays` times and returns the microseconds of one launch.
    """
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches[:2]:
            launch()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for launch in launches:
                launch()
        for _ in range(3):
            graph.replay()
        stream.synchronize()  # kernels share counters: another stream's must not run beside these

    def time_us() -> float:
        with torch.cuda.stream(stream):
            return elapsed_us(graph.replay, num_replays) / len(launches)

    return time_us


def graph_us(launches: list[Callable[[], object]], num_replays: int = 20) -> float:
    """Return the microseconds of one launch when all run one after another in a CUDA graph."""
    return graph_timer(launches, num_replays)()


def elapsed_us(launch: Callable[[], object], num_launches: int) -> float:
    """Return the microseconds of one launch, of `num_launches` one after another on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(num_launches):
        launch()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / num_launches
