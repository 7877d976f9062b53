"""A plot of one run of `bench.serve`: how its times are distributed, and how many tokens a second came."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.result import Result

NUM_BINS = 60


def draw(results: Sequence[Result], duration_s: float, title: str, path: Path) -> None:
    """Write a plot, in the format that the name ends with. `ImportError` without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [result for result in results if not result.error]
    figure, (times, rate) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, values_s in (
        ("first token", [result.ttft_s for result in good]),
        ("whole answer", [result.e2e_s for result in good]),
        ("between tokens", [gap for result in good for gap in result.itl_s]),
    ):
        values = np.sort([value * 1e3 for value in values_s if value == value and value > 0])
        if values.size:
            times.step(values, np.arange(1, values.size + 1) / values.size, where="post", label=name)
    times.set(xscale="log", xlabel="ms", ylabel="share of requests, of gaps", ylim=(0, 1))
    times.legend(loc="best")
    edges, tokens_s = rate_of(good, duration_s)
    rate.stairs(tokens_s, edges, fill=True, alpha=0.3)
    rate.set(xlabel="seconds", ylabel="tokens a second", ylim=(0, None))
    for axes in (times, rate):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path)
    pyplot.close(figure)


def rate_of(results: Sequence[Result], duration_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges of the run's intervals, in seconds, and the tokens a second that came in each.

    An answer's tokens are spread over its pieces, of which one may hold several.
    """
    edges = np.linspace(0.0, duration_s, NUM_BINS + 1)
    tokens = np.zeros(NUM_BINS)
    for result in results:
        at_s = result.sent_s + np.cumsum([result.ttft_s, *result.itl_s])
        counts, _ = np.histogram(at_s, edges)
        tokens += counts * (result.output_len / len(at_s))
    return edges, tokens / (duration_s / NUM_BINS)
