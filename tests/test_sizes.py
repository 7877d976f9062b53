"""Sizes are arithmetic: no model, no device."""

from typing import Any

import pytest

from engine.config import EngineConfig
from engine.sizes import (
    CPU_CHUNK,
    CPU_MAX_STEP_S,
    CUDA_CHUNK,
    SMALL_CUDA_CHUNK,
    Sizes,
    choose_graph_sizes,
    graphs_bytes,
    max_graph_tokens,
    max_wait_s,
    resolve_sizes,
)
from engine.step.cuda_graph import MAX_PROMPTS

H200, SMALL_GPU = 141 << 30, 16 << 30


def resolved(cuda_bytes: int | None = H200, **options: Any) -> EngineConfig:
    return resolve_sizes(EngineConfig(**options), cuda_bytes)


def sizes_of(context_length: int = 4096, **options: Any) -> Sizes:
    return Sizes.of(resolved(**options), context_length)


@pytest.mark.parametrize(
    ("cuda_bytes", "chunk", "rows"),
    [(None, CPU_CHUNK, 64), (SMALL_GPU, SMALL_CUDA_CHUNK, 1024), (H200, CUDA_CHUNK, 1024)],
)
def test_the_memory_of_the_device_decides_the_chunk_and_its_kind_the_rows(
    cuda_bytes: int | None, chunk: int, rows: int
) -> None:
    config = resolved(cuda_bytes)
    assert (config.chunked_prefill_size, config.max_running_requests) == (chunk, rows)


def test_without_chunks_a_step_has_max_prefill_tokens() -> None:
    assert resolved(chunked_prefill_size=-1, max_prefill_tokens=3000).chunked_prefill_size == 3000


@pytest.mark.parametrize("cuda_bytes", [None, SMALL_GPU, H200])
def test_resolving_twice_changes_nothing(cuda_bytes: int | None) -> None:
    config = resolved(cuda_bytes, cuda_graph_bs=[4, 2000, 1], max_running_requests=100)
    assert resolve_sizes(config, cuda_bytes) == config


@pytest.mark.parametrize(
    ("options", "largest", "staged"),
    [
        ({"chunked_prefill_size": 512, "max_running_requests": 64}, 512, 512 + 64),
        ({"chunked_prefill_size": 16, "max_running_requests": 64}, 64, 64 + 64),
        ({"chunked_prefill_size": 64, "max_running_requests": 2, "page_size": 64}, 64, 64 + 64),
    ],
)
def test_a_staged_step_has_room_for_the_largest_step_and_its_padding_or_a_page(
    options: dict[str, Any], largest: int, staged: int
) -> None:
    sizes = sizes_of(**options)
    assert (sizes.max_step_tokens, sizes.max_staged_tokens) == (largest, staged)
    assert sizes.max_staged_requests == options["max_running_requests"] + MAX_PROMPTS


def test_a_pool_has_a_page_that_no_request_gets() -> None:
    assert sizes_of(page_size=16).num_slots(4096) == 4096 + 16


@pytest.mark.parametrize(
    ("options", "is_generation"),
    [
        ({"disable_cuda_graph": True}, True),
        ({"is_embedding": True}, True),
        ({"attention_backend": "torch"}, True),
        ({}, False),
    ],
)
def test_nothing_is_captured_that_cannot_be_or_is_never_decoded(options: dict[str, Any], is_generation: bool) -> None:
    assert choose_graph_sizes(resolved(**options), sizes_of(**options), is_generation, 10_000) is None


def test_graphs_are_for_the_rows_and_for_prompts_no_longer_than_a_chunk_or_the_context() -> None:
    config = resolved(max_running_requests=24, chunked_prefill_size=2048)
    graphs = choose_graph_sizes(config, Sizes.of(config, 1000), True, 10_000)
    assert graphs is not None
    assert (graphs.max_prompt_tokens, graphs.max_requests, max(graphs.batch_sizes)) == (1000, 24, 24)
    of_latents = choose_graph_sizes(config, Sizes.of(config, 1000), True, 10_000, has_latents=True)
    assert of_latents == graphs._replace(has_latents=True)
    longer = choose_graph_sizes(resolved(), Sizes.of(resolved(), 10_000), True, 10_000, has_latents=True)
    assert longer is not None and longer.max_prompt_tokens == 2048, "more keys are not made at a time in a graph"
    asked = resolved(max_running_requests=24, cuda_graph_bs=[8, 64, 2])
    chosen = choose_graph_sizes(asked, Sizes.of(asked, 1000), True, 10_000)
    assert chosen is not None
    assert chosen.batch_sizes == [2, 8, 24]


def test_the_memory_of_graphs_is_that_of_their_largest_step() -> None:
    config = resolved(chunked_prefill_size=8192)
    graphs = choose_graph_sizes(config, Sizes.of(config, 1 << 20), True, 2048)
    assert graphs_bytes(graphs, largest_step=8 << 20, max_step_tokens=8192) == 2 << 20
    assert graphs_bytes(None, largest_step=8 << 20, max_step_tokens=8192) == 0


def test_the_heavier_the_weights_the_smaller_the_steps_that_need_a_graph() -> None:
    assert max_graph_tokens(16 << 30) == max_graph_tokens(8 << 30) // 2


@pytest.mark.parametrize(
    ("device", "max_step_ms", "limit"),
    [("cpu", None, CPU_MAX_STEP_S), ("cpu", 200.0, CPU_MAX_STEP_S), ("cpu", 0.0, None), ("cuda:0", None, None)],
)
def test_a_step_on_a_cpu_is_short_unless_any_length_was_asked_for(
    device: str, max_step_ms: float | None, limit: float | None
) -> None:
    assert max_wait_s(EngineConfig(device=device, max_step_ms=max_step_ms)) == limit
