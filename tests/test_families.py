"""Families through the whole engine: greedy answers are transformers', in every mix and on several ranks.

Every family joins one cramped mix, on a GPU too: chunks and pages of a few tokens, a grammar, and a pool that forgets.
Those whose steps or caches are of a kind of their own join more, some on several ranks.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.engine import Engine
from tests.test_engine import (
    CONSTRAINED,
    DEVICES,
    GPU_MIXES,
    MIXES,
    NUM_NEW_TOKENS,
    collect,
    make_state,
    most_likely_allowed,
    new_matcher,
    prompts,
    running_engine,
)
from tests.test_experts import FAMILIES as EXPERTS
from tests.test_mla import FAMILIES as LATENT
from tests.test_native_families import FAMILIES

MakeTinyModel = Callable[..., Path]
__all__ = ["prompts"]  # a fixture

GEMMA_2 = {"sliding_window": 24, "query_pre_attn_scalar": 24, "num_hidden_layers": 3}
# LongRoPE chooses by the length of a sequence: here none is short.
LONG = {"original_max_position_embeddings": 4}
OWN = {
    "gemma 2": ("Gemma2Config", GEMMA_2),
    "dbrx": EXPERTS["dbrx"],
    "gpt-oss": ("GptOssConfig", EXPERTS["gpt-oss"][1] | {"sliding_window": 24, "num_hidden_layers": 3}),
    "gemma 4, experts": EXPERTS["gemma 4"],
    "llama 4": ("Llama4TextConfig", EXPERTS["llama 4"][1] | {"attention_chunk_size": 24}),
    "phi-3.5-moe": EXPERTS["phi-3.5-moe"],
    "qwen3-moe": EXPERTS["qwen3-moe"],
    "phi 4 mini": ("Phi3Config", FAMILIES["phi 4 mini"][1] | LONG),
}
ALL = FAMILIES | LATENT | OWN
CRAMPED = {"page_size": 4, "chunked_prefill_size": 12, "max_total_tokens": 160, "swa_full_tokens_ratio": 0.01}
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
SOME = ("batched", "large_chunks", "seven_token_chunks", "no_overlap")
# What differs where steps, chunks or caches could tell: windows, ropes, shared keys, vectors of layers, sinks, latents.
KINDS = (
    "gemma 2", "gemma 3", "gemma 4", "gemma 4 E2B", "phi 2", "phi 4 mini", "olmo 2", "olmo 3", "command-r7b",
    "granite 3", "smollm 3 with windows", "exaone 4", "ministral 3", "gpt-2", "hunyuan", "bloom", "gpt-oss",
    "deepseek v2 lite", "deepseek v3", "minicpm 3",
)  # fmt: skip
ON_ALL_GPU_MIXES = ("gemma 2", "gemma 4 E2B", "phi 2", "deepseek v3")
ON_TWO_RANKS = ("gemma 4 E2B", "command-r7b", "olmo 3", "gpt-oss", "deepseek v3", "llama 4")


def cases() -> list[Any]:
    """Return (family, device, options): of each kind two of the mixes, in turn, and what only some are for."""
    chosen = [
        pytest.param(family, "cpu", MIXES[mix], id=f"{family}-{mix}")
        for i, family in enumerate(KINDS)
        for mix in (SOME[i % 4], SOME[(i + 1) % 4])
    ]
    chosen += [pytest.param(family, "cpu", {"tp_size": 2}, id=f"{family}-two_ranks") for family in ON_TWO_RANKS]
    chosen.append(pytest.param("qwen3-moe", "cpu", {"tp_size": 2, "ep_size": 2}, id="qwen3-moe-experts_on_two_ranks"))
    return chosen + [
        pytest.param(family, "cuda", mix, id=f"{family}-cuda-{name}", marks=pytest.mark.gpu)
        for family in ON_ALL_GPU_MIXES
        for name, mix in GPU_MIXES.items()
    ]


WINDOW_CASES = (
    [pytest.param("gemma 2", "cpu", mix, id=name) for name, mix in WINDOW_MIXES.items()]
    + [
        pytest.param(family, "cuda", TIGHT | mix, id=f"{family}-cuda-{name}", marks=pytest.mark.gpu)
        for family in ("gemma 2", "gpt-oss")
        for name, mix in GPU_MIXES.items()
    ]
    + [pytest.param("gpt-oss", "cpu", TIGHT, id="gpt-oss-windows")]
)


class Reference:
    """transformers' model in a folder, which says in one forward whether an answer is its greedy one."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.folder = folder
        # Eager: older releases' other ways leave out the cap on Gemma's scores.
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(folder, dtype=torch.float32, attn_implementation="eager").eval()

    def most_likely(self, prompts: list[list[int]], answers: list[list[int]]) -> list[list[int]]:
        """Return the most likely token in place of each one of the answers, given all before it."""
        pairs = zip(prompts, answers, strict=True)
        return [self._logits(prompt, answer).argmax(dim=-1).tolist() for prompt, answer in pairs]

    def most_likely_constrained(self, prompts: list[list[int]], answers: list[list[int]]) -> list[list[int]]:
        """Return the most likely ones of those that the form of `CONSTRAINED` allows; answers are whole."""
        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            matcher, tokens = new_matcher(self.folder), []
            for logits, token in zip(self._logits(prompt, answer), answer, strict=True):
                tokens.append(most_likely_allowed(logits, matcher))
                matcher.consume_token(token)
            assert matcher.is_stopped()
            found.append(tokens)
        return found

    @torch.inference_mode()
    def _logits(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
        logits: torch.Tensor = self.model(torch.tensor([prompt + answer]), use_cache=False).logits
        return logits[0, len(prompt) - 1 : -1]


async def ask(engine: Engine, prompt: list[int], **fields: Any) -> list[int]:
    _, tokens = await collect(engine, make_state(prompt, **fields))
    return tokens


async def assert_greedy(engine: Engine, reference: Reference, prompts: list[list[int]], num_constrained: int) -> None:
    """Ask everything at once, twice, and compare. num_constrained: of the prompts that are asked for JSON as well."""
    constrained = prompts[:num_constrained]
    for _ in range(2):  # the second time everything is cached
        asked = asyncio.gather(*(ask(engine, prompt) for prompt in prompts))
        asked_for_form = asyncio.gather(*(ask(engine, prompt, **CONSTRAINED) for prompt in constrained))
        answers, of_form = await asked, await asked_for_form
        assert {len(answer) for answer in answers} == {NUM_NEW_TOKENS}
        # In a thread: transformers may take longer than a callback may.
        assert answers == await asyncio.to_thread(reference.most_likely, prompts, answers)
        assert of_form == await asyncio.to_thread(reference.most_likely_constrained, constrained, of_form)


@pytest.fixture(scope="module")
def references() -> dict[str, Reference]:
    """Return those that are made so far, by family."""
    return {}


@pytest.fixture
def reference(
    request: pytest.FixtureRequest, references: dict[str, Reference], make_tiny_model: MakeTinyModel
) -> Reference:
    """Return transformers' model of the family that is the test's parameter, with the folder it is in."""
    import transformers

    family: str = request.param
    if family not in references:
        config_class, overrides = ALL[family]
        has_random_norms = family != "gemma 2"
        make_config = getattr(transformers, config_class)
        references[family] = Reference(
            make_tiny_model(make_config, "family", random_norms=has_random_norms, **overrides)
        )
    return references[family]


@pytest.mark.parametrize("reference", ALL, indirect=True)
@pytest.mark.parametrize("device", DEVICES)
async def test_greedy_answers_of_every_family_equal_transformers_where_room_is_short(
    reference: Reference, device: str, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.schedule.grouping.MIN_SHARED_TOKENS", 1)  # even short prefixes are read once
    async with running_engine(reference.folder, device=device, **CRAMPED) as engine:
        shared = prompts[1:8:3]  # a head of 30 tokens
        await assert_greedy(engine, reference, [*shared, prompts[3], prompts[-1]], num_constrained=1)
        stats = engine.stats().scheduler
        assert stats.num_hit_tokens and stats.cache.num_evicted, "the pool was meant to be too small"


@pytest.mark.parametrize(("reference", "device", "options"), cases(), indirect=["reference"])
async def test_greedy_answers_of_a_family_equal_transformers(
    reference: Reference, device: str, options: dict[str, Any], prompts: list[list[int]]
) -> None:
    async with running_engine(reference.folder, device=device, **options) as engine:
        await assert_greedy(engine, reference, prompts[-10:], num_constrained=2)


@pytest.mark.parametrize(("reference", "device", "options"), WINDOW_CASES, indirect=["reference"])
async def test_layers_with_a_window_give_slots_back_and_answers_stay(
    reference: Reference,
    device: str,
    options: dict[str, Any],
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.schedule.grouping.MIN_SHARED_TOKENS", 1)  # prefixes are shared, and read once elsewhere
    async with running_engine(reference.folder, device=device, **options) as engine:
        some = prompts[-10:]
        await assert_greedy(engine, reference, some, num_constrained=0)
        num_tokens = sum(map(len, some)) + len(some) * NUM_NEW_TOKENS
        stats = engine.stats().scheduler
        if options.get("disable_hybrid_swa_memory"):
            assert stats.num_total_window_tokens == 0
        else:  # many times as many were written
            assert stats.num_total_window_tokens < 150 < num_tokens / 4
        if "schedule_conservativeness" in options:
            assert stats.num_retractions > 0
