"""Steps of prompts and decodes, whole and with decode attention beside gate and up (`kernels.corun`).

    python -m bench.corun --model-path FOLDER --load-format dummy

Takes every flag of the engine. Steps of several sizes run under steady load, which large GPUs answer with lower clocks:
milliseconds of each, as a median. Needs an H100 or H200, and a model of a block that can be split.
"""

import asyncio
import itertools
import statistics
import sys
import time

import numpy as np
import torch

from engine.local import LocalEngine
from engine.schedule.plan import Plan
from engine.step.model_runner import ModelRunner
from kernels.corun import STEP_TOKENS
from server.command_line import parse_args

PROMPT_LEN = 1024
SIZES = ((1152, 128), (STEP_TOKENS, 64), (STEP_TOKENS, 160), (STEP_TOKENS, 288), (4096, 288))  # tokens, decodes of them
CONTEXTS = (512, 1024)
STEADY_S = 0.6  # of a size, of which the second half counts


def mixed_plan(runner: ModelRunner, num_tokens: int, num_decodes: int, context: int) -> Plan:
    """Plan `num_decodes` behind `context` tokens each, the rest new prompts; rows and slots from the first on."""
    prompt_lens = [PROMPT_LEN] * ((num_tokens - num_decodes) // PROMPT_LEN)
    if rest := num_tokens - num_decodes - sum(prompt_lens):
        prompt_lens.append(rest)
    seq_lens = np.array([context] * num_decodes + prompt_lens)
    q_lens = np.array([1] * num_decodes + prompt_lens)
    ends = np.cumsum(seq_lens)
    for row, (end, length) in enumerate(zip(ends.tolist(), seq_lens.tolist(), strict=True), start=1):
        slots = torch.arange(1 + end - length, 1 + end, dtype=torch.int32)
        runner.stager.slot_table[row, :length] = slots.to(runner.device)
    new_slots = [np.arange(1 + end - length, 1 + end) for end, length in zip(ends, q_lens, strict=True)]
    return Plan(
        rows=np.arange(1, 1 + len(seq_lens)),
        q_lens=q_lens,
        seq_lens=seq_lens,
        input_ids=np.arange(num_tokens, dtype=np.int32) % 1000,
        out_cache_loc=np.concatenate(new_slots).astype(np.int32),
        num_decodes=num_decodes,
        samples=np.arange(len(seq_lens)),
        epochs=np.zeros(len(seq_lens), np.int64),
    )


def median_ms(runner: ModelRunner, plan: Plan) -> float:
    """Return the median milliseconds of a step, two of which are always under way."""
    took_ms, steps = [], [runner.launch(plan)]
    start = last = time.perf_counter()
    while last - start < STEADY_S:
        steps.append(runner.launch(plan))
        steps.pop(0).result()
        last, before = time.perf_counter(), last
        if last - start > STEADY_S / 2:
            took_ms.append(1e3 * (last - before))
    steps[-1].result()
    return statistics.median(took_ms)


def measure(runner: ModelRunner) -> None:
    if (costs := runner.splitter.costs) is None:
        print("steps are not split: the model's blocks or the GPU are not made for it")
        return
    print(f"{'tokens':>8s}{'decodes':>9s}{'context':>9s}{'whole, ms':>11s}{'split':>8s}{'ahead':>8s}{'gain':>7s}")
    for (num_tokens, num_decodes), context in itertools.product(SIZES, CONTEXTS):
        plan = mixed_plan(runner, num_tokens, num_decodes, context)
        runner.splitter.costs = None
        whole_ms = median_ms(runner, plan)
        runner.splitter.costs = costs
        step = runner.launch(plan)
        step.result()
        line = f"{num_tokens:>8d}{num_decodes:>9d}{context:>9d}{whole_ms:11.2f}"
        if step.corun is not None:
            split_ms = median_ms(runner, plan)
            line += f"{split_ms:8.2f}{step.corun.num_tokens:>8d}{1 - split_ms / whole_ms:7.1%}"
        print(line, flush=True)


async def main() -> None:
    engine = LocalEngine(parse_args(sys.argv[1:]))
    await engine.start(print)
    measure(engine.parts.runner)
    await engine.stop()


if __name__ == "__main__":
    asyncio.run(main())
