"""Measure what the host does for the sampling of each step of decodes, for one stream and for many.

    python -m bench.sampling

CPU time of this thread, the least of many steps of the same requests; what the device does is in `bench.elementwise`.
"plan" decides what a step's logits need, "log-probabilities" turns those of a step into its answers' lists.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from engine.request import Request, SamplingParams
from engine.schedule.cohort import Cohort
from engine.schedule.plan import Plan
from engine.schedule.resolver import Outcome
from engine.schedule.rows import Rows
from engine.state import RequestState
from engine.step.logprobs import TokenLogprobs, take_logprobs
from engine.step.sampler import Sampler

NUM_STREAMS = (1, 64, 256)
VOCAB_SIZE, PROMPT_LEN = 128_256, 96
PLANS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature, top_p, top_k": SamplingParams(temperature=0.8, top_p=0.95, top_k=50),
    "penalties": SamplingParams(frequency_penalty=0.5, repetition_penalty=1.1),
    "logit_bias of 3": SamplingParams(logit_bias=dict.fromkeys(range(3), 1.0)),
    "logit_bias of 300": SamplingParams(logit_bias=dict.fromkeys(range(300), 1.0)),
    "min_new_tokens": SamplingParams(min_new_tokens=64),
}


def microseconds(work: Callable[[], object]) -> float:
    least = float("inf")
    for _ in range(200):
        start = time.thread_time()
        work()
        least = min(least, time.thread_time() - start)
    return 1e6 * least


def states(count: int, params: SamplingParams, num_logprobs: int = 0) -> list[RequestState]:
    """Return requests that have been admitted, but for their rows."""
    prompt = list(range(PROMPT_LEN))
    found = []
    for i in range(count):
        request = Request(str(i), prompt, params, return_logprob=num_logprobs > 0, top_logprobs_num=num_logprobs)
        state = RequestState(request)
        state.seed, state.prompt_ids = i, np.array(prompt, np.int32)
        found.append(state)
    return found


def plan_us(count: int, params: SamplingParams) -> float:
    rows = Rows(count, 2 * PROMPT_LEN)
    running = np.array([rows.allocate(state) for state in states(count, params)])
    sampler = Sampler(rows, VOCAB_SIZE, (2,), torch.device("cpu"), None)
    plan = Plan(
        rows=running, q_lens=np.ones(count, np.int64), seq_lens=np.full(count, PROMPT_LEN + 1),
        input_ids=np.full(count, -1, np.int32), out_cache_loc=np.arange(count, dtype=np.int32), num_decodes=count,
        samples=np.arange(count), epochs=rows.epoch[running], cohort=Cohort(rows, running),
    )  # fmt: skip
    return microseconds(lambda: sampler.plan_work(plan))


def logprobs_us(count: int, num_logprobs: int) -> float:
    values = TokenLogprobs(
        torch.randn(count), torch.randn(count, num_logprobs), torch.randint(VOCAB_SIZE, (count, num_logprobs)), None
    )
    outcome = Outcome(states(count, SamplingParams(), num_logprobs), list(range(count)), np.arange(count))

    def take() -> None:
        for state in outcome.states:
            state.unsent = None
        take_logprobs(values, np.arange(count), outcome)

    return microseconds(take)


def main() -> None:
    table = Table("host, µs a step", *(f"{count} streams" for count in NUM_STREAMS))
    for label, params in PLANS.items():
        table.add_row(f"plan: {label}", *(f"{plan_us(count, params):.1f}" for count in NUM_STREAMS))
    table.add_row("log-probabilities, 5 each", *(f"{logprobs_us(count, 5):.1f}" for count in NUM_STREAMS))
    Console().print(table)


if __name__ == "__main__":
    main()
