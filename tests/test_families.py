"""Families through the whole engine: greedy answers are transformers', in every mix and on several ranks."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_engine import GPU_MIXES, MIXES, collect, make_state, prompts, running_engine

MakeTinyModel = Callable[..., Path]
__all__ = ["prompts"]  # a fixture

# What differs from Llama where steps, chunks, caches or ranks could tell: windows, norms behind a sum, caps.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma 2": ("Gemma2Config", {"sliding_window": 24, "query_pre_attn_scalar": 24, "num_hidden_layers": 3}),
    "phi 2": ("PhiConfig", {"random_norms": True}),
}
# As few window slots as a request needs beside its chunk: they are given back all the time.
TIGHT = {"swa_full_tokens_ratio": 0.01, "chunked_prefill_size": 16, "max_total_tokens": 1000}
WINDOW_MIXES: dict[str, dict[str, Any]] = {
    "windows": TIGHT,
    "windows_uncached": TIGHT | {"disable_radix_cache": True},
    "windows_pages_of_4": TIGHT | {"page_size": 4},
    "windows_retracting": TIGHT | {"max_total_tokens": 300, "schedule_conservativeness": 0.0},
    "windows_no_overlap": TIGHT | {"disable_overlap_schedule": True},
    "windows_on_two_ranks": TIGHT | {"tp_size": 2},
    "whole_contexts": {"disable_hybrid_swa_memory": True},
}
SOME = ("plain", "cached", "seven_token_chunks", "pages_of_16", "retracting")
CASES = [pytest.param("cpu", {**MIXES, "two_ranks": {"tp_size": 2}}[mix], id=mix) for mix in (*SOME, "two_ranks")] + [
    pytest.param("cuda", mix, id=f"cuda-{name}", marks=pytest.mark.gpu) for name, mix in GPU_MIXES.items()
]
WINDOW_CASES = [pytest.param("cpu", mix, id=name) for name, mix in WINDOW_MIXES.items()] + [
    pytest.param("cuda", TIGHT | mix, id=f"cuda-{name}", marks=pytest.mark.gpu) for name, mix in GPU_MIXES.items()
]


@pytest.fixture(scope="module")
def families(make_tiny_model: MakeTinyModel, prompts: list[list[int]]) -> dict[str, tuple[Path, list[list[int]]]]:
    """Name -> (folder, transformers' greedy answers to `prompts`)."""
    import transformers

    made = {}
    for name, (config_class, overrides) in FAMILIES.items():
        folder = make_tiny_model(getattr(transformers, config_class), "family", **overrides)
        # Eager: older releases' other ways leave out the cap on Gemma's scores.
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(folder, dtype=torch.float32, attn_implementation="eager")
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        answers = [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]
        made[name] = folder, answers
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("device", "options"), CASES)
async def test_greedy_answers_of_a_family_equal_transformers(
    family: str,
    device: str,
    options: dict[str, Any],
    families: dict[str, tuple[Path, list[list[int]]]],
    prompts: list[list[int]],
) -> None:
    folder, wanted = families[family]
    async with running_engine(folder, device=device, **options) as engine:
        for _ in range(2):  # the second time everything is cached
            answers = await asyncio.gather(*(collect(engine, make_state(prompt)) for prompt in prompts))
            assert [tokens for _, tokens in answers] == wanted


@pytest.mark.parametrize(("device", "options"), WINDOW_CASES)
async def test_layers_with_a_window_give_slots_back_and_answers_stay(
    device: str,
    options: dict[str, Any],
    families: dict[str, tuple[Path, list[list[int]]]],
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.schedule.grouping.MIN_SHARED_TOKENS", 1)  # prefixes are shared, and read once elsewhere
    folder, wanted = families["gemma 2"]
    async with running_engine(folder, device=device, **options) as engine:
        for _ in range(2):
            answers = await asyncio.gather(*(collect(engine, make_state(prompt)) for prompt in prompts))
            assert [tokens for _, tokens in answers] == wanted
        whole = [prompt + answer for prompt, answer in zip(prompts, wanted, strict=True)]
        stats = engine.stats().scheduler
        if options.get("disable_hybrid_swa_memory"):
            assert stats.num_total_window_tokens == 0
        else:  # many times as many were written
            assert stats.num_total_window_tokens < 150 < sum(map(len, whole)) / 4
        if "schedule_conservativeness" in options:
            assert stats.num_retractions > 0
