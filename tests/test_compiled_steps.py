"""Steps of single tokens on a CPU, compiled a layer at a time, have the bits of the blocks that they stand for."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.weights import pack_weights
from engine.step import compiled
from engine.step.compiled import CompiledSteps
from kernels import chain_cpu, dense
from kernels.cache_cpu import kernels
from kernels.products_cpu import kernels_ahead
from tests.test_engine import collect, make_state, running_engine
from tests.test_models import MakeTinyModel, ShorterSteps, TinyEngine, random_ids

DTYPES = [torch.float32, torch.bfloat16]
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {},  # norms of heads
    "Qwen2": {},  # biases
    "Mistral": {"sliding_window": 8},
}


@pytest.fixture(autouse=True)
def compiler() -> None:
    if kernels() is None or kernels_ahead().result() is None:
        pytest.skip("needs a C++ compiler, and AVX2")


@pytest.fixture(scope="module")
def folders(make_tiny_model: MakeTinyModel) -> dict[str, Path]:
    """Return a checkpoint of each family, and of one with other blocks."""
    import transformers

    made = FAMILIES | {"Gemma2": {}}
    return {
        name: make_tiny_model(getattr(transformers, f"{name}Config"), f"tiny_{name}", **more)
        for name, more in made.items()
    }


def engine_of(folder: Path, dtype: torch.dtype, quantization: str | None = "int4") -> TinyEngine:
    engine = TinyEngine(folder, dtype=dtype, quantization=quantization)
    pack_weights(engine.model)
    return engine


def compiled_engine_of(
    folder: Path, dtype: torch.dtype, quantization: str | None = "int4"
) -> tuple[TinyEngine, ShorterSteps]:
    engine: Any = engine_of(folder, dtype, quantization)
    engine.model = ShorterSteps(engine, CompiledSteps.of(engine.model, engine.pool))
    return engine, engine.model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_bits_are_those_of_the_blocks(name: str, dtype: torch.dtype, folders: dict[str, Path]) -> None:
    prompts = {0: random_ids(12, 0), 1: random_ids(9, 1), 2: random_ids(2, 2)}
    plain, (fast, counted) = engine_of(folders[name], dtype), compiled_engine_of(folders[name], dtype)
    assert torch.equal(fast.forward(prompts), plain.forward(prompts))
    for token, rows in enumerate(([0], [0, 1, 2], [2], [1, 0], [0, 1, 2])):
        step = {row: [token + row] for row in rows}
        assert torch.equal(fast.forward(step), plain.forward(step)), f"rows {rows}"
    assert counted.sizes == [1, 3, 1, 2, 3]


def test_weights_of_16_bits_take_part_where_the_cpu_has_no_units_for_them(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "has_onednn_units", lambda _: False)
    plain: Any = engine_of(folders["Llama"], torch.bfloat16, None)
    fast, counted = compiled_engine_of(folders["Llama"], torch.bfloat16, None)
    prompts = {0: random_ids(12, 0), 1: random_ids(9, 1)}
    assert torch.equal(fast.forward(prompts), plain.forward(prompts))
    for rows in ([0, 1], [1], [0, 1]):
        assert torch.equal(fast.forward({row: [row] for row in rows}), plain.forward({row: [row] for row in rows}))
    assert counted.sizes == [2, 1, 2]


def test_lengths_that_differ_too_much_to_be_gathered_at_once_attend_apart(folders: dict[str, Path]) -> None:
    plain = engine_of(folders["Llama"], torch.bfloat16)
    fast, counted = compiled_engine_of(folders["Llama"], torch.bfloat16)
    for engine in (plain, fast):
        # Rows of the slot table are as long as this.
        engine.slot_table = torch.arange(1, 226, dtype=torch.int32).flip(0).view(3, -1)
        engine.forward({0: random_ids(70, 0), 1: random_ids(3, 1)})
    for _ in range(2):
        assert torch.equal(fast.forward({0: [5], 1: [6]}), plain.forward({0: [5], 1: [6]}))
    assert counted.sizes == [2, 2]


def test_threads_share_a_step_and_torch_has_its_own_number_of_them_again(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, (fast, _) = engine_of(folders["Llama"], DTYPES[1]), compiled_engine_of(folders["Llama"], DTYPES[1])
    step = {row: [7 + row] for row in range(3)}  # one token alone is too little for several threads
    for engine in (plain, fast):
        engine.forward({row: random_ids(12, row) for row in step})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for _ in range(5):
            assert torch.equal(fast.forward(step), plain.forward(step))
        assert torch.get_num_threads() == 3

        def fail(*_: Any) -> torch.Tensor:
            raise RuntimeError("no memory")

        monkeypatch.setattr(compiled, "decode_gathered", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            fast.forward(step)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_other_blocks_and_weights_are_not_compiled(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, quantization in (("Gemma2", "int4"), ("Llama", "w8a8_int8"), ("Llama", None)):
        engine = TinyEngine(folders[name], quantization=quantization)
        pack_weights(engine.model)
        assert CompiledSteps.of(engine.model, engine.pool) is None, f"{name}, {quantization}"
    engine = TinyEngine(folders["Llama"], quantization="int4", kv_dtype=torch.float8_e4m3fn)
    pack_weights(engine.model)
    assert CompiledSteps.of(engine.model, engine.pool) is None
    engine = engine_of(folders["Llama"], torch.float32)
    monkeypatch.setattr(compiled, "kernels", lambda: None)
    assert CompiledSteps.of(engine.model, engine.pool) is None


async def test_an_engine_answers_by_them_from_a_pool_that_was_freed_and_made_anew(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, answers, num_runs = [random_ids(20, 0), random_ids(7, 1)], [], 0
    run = chain_cpu.Chain.run

    def counted(*args: Any) -> None:
        nonlocal num_runs
        num_runs += 1
        run(*args)

    monkeypatch.setattr(chain_cpu.Chain, "run", counted)
    async with running_engine(folders["Llama"], quantization="int4") as engine:
        for _ in range(2):
            found = await asyncio.gather(*(collect(engine, make_state(prompt)) for prompt in prompts))
            answers.append([tokens for _, tokens in found])
            await engine.maintenance.release_memory()
            await engine.maintenance.resume_memory()
    assert num_runs > 0
    monkeypatch.setattr(CompiledSteps, "of", staticmethod(lambda *_: None))
    async with running_engine(folders["Llama"], quantization="int4") as engine:
        found = await asyncio.gather(*(collect(engine, make_state(prompt)) for prompt in prompts))
    assert answers == 2 * [[tokens for _, tokens in found]]
