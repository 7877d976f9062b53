"""Decode attention beside a product: steps that are split give the same tokens, and are split where it pays."""

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is decorated

import bench.attention
from engine.schedule.plan import Plan
from kernels import corun
from kernels.attention import attention
from kernels.corun import Corun, CorunCosts, choose_corun, gated_beside_decodes
from kernels.dense import DenseWeight
from kernels.elementwise import act_and_mul_torch
from tests.test_engine import collect, make_state, running_engine

LLAMA_8B = CorunCosts(context_bytes=4096, token_flops=4 * 4096 * 14336)
DECODES = 256


def test_more_context_takes_more_prompt_tokens_beside_it() -> None:
    splits = [choose_corun(LLAMA_8B, 4096 + DECODES, DECODES, context) for context in range(80_000, 500_000, 40_000)]
    assert [split.num_tokens for split in splits if split] == sorted(split.num_tokens for split in splits if split)
    assert all(split and split.num_tokens % corun.MULTIPLE == 0 for split in splits)
    assert len({split.num_tokens for split in splits if split}) > 4


def test_where_prompt_tokens_are_few_attention_gets_more_of_the_chip() -> None:
    many, few = (choose_corun(LLAMA_8B, size + DECODES, DECODES, 300_000) for size in (4096, 1300))
    assert many is not None and few is not None
    assert many.num_free_sms < few.num_free_sms and many.num_tokens > few.num_tokens


@pytest.mark.parametrize(
    ("num_prompt_tokens", "num_decodes", "context"),
    [(2048, 256, 30_000), (0, 256, 300_000), (500, 256, 300_000), (2048, 4, 300_000)],
)
def test_a_step_is_left_whole_where_little_could_be_gained(
    num_prompt_tokens: int, num_decodes: int, context: int
) -> None:
    assert choose_corun(LLAMA_8B, num_prompt_tokens + num_decodes, num_decodes, context) is None
    assert choose_corun(LLAMA_8B, 2048 + DECODES, DECODES, 300_000) is not None


def test_decodes_are_never_among_the_tokens_ahead() -> None:
    for num_prompt_tokens in range(0, 4096, 100):
        split = choose_corun(LLAMA_8B, num_prompt_tokens + DECODES, DECODES, 200_000)
        assert split is None or split.num_tokens <= num_prompt_tokens


async def test_answers_are_the_same_when_steps_are_split(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    prompts = [[rng.randrange(3, 384) for _ in range(length)] for length in rng.choices(range(5, 120), k=16)]
    monkeypatch.setattr(corun, "MIN_BYTES", 1)
    monkeypatch.setattr(corun, "MIN_DECODES", 1)
    monkeypatch.setattr(corun, "MULTIPLE", 3)
    splits: list[Corun | None] = []

    async def answers(costs: CorunCosts | None) -> list[list[int]]:
        async with running_engine(tiny_llama, chunked_prefill_size=48) as engine:
            runner = engine.parts.runner
            runner.splitter.costs = costs
            launch = runner.launch

            def noting_launch(plan: Plan) -> Any:
                step = launch(plan)
                splits.append(step.corun)
                return step

            monkeypatch.setattr(runner, "launch", noting_launch)
            given = await asyncio.gather(*(collect(engine, make_state(prompt)) for prompt in prompts))
            return [tokens for _, tokens in given]

    whole = await answers(None)
    assert not any(splits)
    assert await answers(CorunCosts(context_bytes=1, token_flops=20_000)) == whole
    assert sum(split is not None for split in splits) > 5


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [None, [(256, [0, 3, 5])]])
@pytest.mark.parametrize("num_free_sms", [32, 48])
def test_two_kernels_at_once_compute_what_they_do_alone(
    groups: list[tuple[int, list[int]]] | None, num_free_sms: int
) -> None:
    lens = [(1, 300 + 37 * i) for i in range(200)] + [(700, 900)]
    batch = bench.attention.make_batch(lens, groups, seed=0, device="cuda")
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device="cuda").bfloat16()

    k, v = normal(batch.slot_table.numel(), 8, 128), normal(batch.slot_table.numel(), 8, 128)
    weight = normal(2 * 3072, 1024) / 32
    for _ in range(20):
        q, x = normal(900, 32, 128), normal(700, 1024)
        whole = attention(q, k, v, batch, scale=0.09, backend="triton")
        gated_whole = act_and_mul_torch((x.double() @ weight.double().t()).float(), "silu")
        attended = attention(q, k, v, batch, scale=0.09, backend="triton", has_decodes=False)
        attended[:200] = torch.nan
        gated = torch.full((700, 3072), torch.nan, device="cuda").bfloat16()
        matrix, free = DenseWeight.of(weight), num_free_sms
        gated_beside_decodes(x, matrix, "silu", gated, q, k, v, batch, attended, num_free_sms=free, scale=0.09)
        torch.testing.assert_close(attended, whole, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(gated.float(), gated_whole, rtol=2e-2, atol=2e-2)
