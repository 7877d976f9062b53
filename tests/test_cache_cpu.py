"""Test kernels for a CPU between a layer's products: rotation with the store, and gathering, for any CPU."""

import functools
import logging
from typing import Any

import pytest
import torch

from kernels import attention as attention_module
from kernels import cache_cpu, cpp, elementwise
from kernels.attention import attention_torch
from kernels.cache_cpu import Kernels, load_kernels
from kernels.elementwise import rope_and_store, rope_and_store_torch
from tests.test_attention import MIXED, TOLERANCE, make_batch, make_inputs, map_slots, naive
from tests.test_kernels import ROPE_SHAPES, assert_near, rope_inputs
from tests.test_quantized_cpu import CAPABILITIES, MARCHES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="inputs are made on the GPU")


@pytest.fixture(params=["native", "haswell", "x86-64"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Return the kernels for this CPU, for one with AVX2 and for one with neither: 16 or 8 numbers at a time."""
    return kernels_for(request.param)


@functools.cache
def kernels_for(march: str) -> Kernels:
    has, wanted = torch.backends.cpu.get_cpu_capability(), MARCHES.get(march, "DEFAULT")
    if has not in CAPABILITIES or CAPABILITIES.index(has) < CAPABILITIES.index(wanted):
        pytest.skip(f"needs {wanted}")
    made = load_kernels(march)
    if made is None:
        pytest.skip("needs a C++ compiler")
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*ROPE_SHAPES, (4, 0, 48, 2, True), (2, 2, 256, 256, False)])
def test_rotation_and_store_equal_their_twin(
    kernels: Kernels, shape: tuple[int, int, int, int, bool], dtype: torch.dtype
) -> None:
    if dtype not in kernels.types:
        pytest.skip(f"no {dtype} in this compiler")
    torch.manual_seed(0)
    inputs, caches = rope_inputs(*shape, dtype), torch.zeros(2, 20, max(shape[1], 1), shape[2], dtype=dtype)
    assert kernels.can_rotate(inputs["qkv"], caches[0], caches[1])
    for v_norm in (None, torch.rand(shape[2])):
        results = []
        for run in (kernels.rope_and_store, rope_and_store_torch):
            k_cache, v_cache = caches.clone()
            q = run(**inputs, k_cache=k_cache, v_cache=v_cache, v_norm=v_norm)
            results.append((q, k_cache, v_cache))
        for name, found, wanted in zip("qkv", *results, strict=True):
            assert_near(found, wanted, name)


def test_a_norms_result_is_rounded_before_it_meets_a_weight_of_its_own_dtype_alone(kernels: Kernels) -> None:
    torch.manual_seed(0)
    inputs, caches = rope_inputs(8, 2, 64, 64, True, torch.bfloat16), torch.zeros(2, 20, 2, 64, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        given: dict[str, Any] = inputs | {name: inputs[name].to(dtype) for name in ("q_norm", "k_norm")}
        found = kernels.rope_and_store(**given, k_cache=caches[0], v_cache=caches[1])
        wanted = rope_and_store_torch(**given, k_cache=caches[0], v_cache=caches[1])
        assert (found != wanted).float().mean() < 0.01, "more than sums in another order round otherwise"


def test_queries_keys_and_values_may_be_views_of_wider_rows(kernels: Kernels) -> None:
    inputs = rope_inputs(4, 2, 64, 64, True, torch.float32)
    wide = torch.zeros(3, 3 + inputs["qkv"].shape[1])
    wide[:, :-3] = inputs["qkv"]
    caches, buffer = torch.zeros(2, 20, 2, 64), torch.zeros(20, 3, 2, 64)
    q = kernels.rope_and_store(**inputs, k_cache=caches[0], v_cache=caches[1])
    given = inputs | {"qkv": wide[:, :-3], "k_cache": buffer[:, 0], "v_cache": buffer[:, 2]}
    assert kernels.can_rotate(given["qkv"], given["k_cache"], given["v_cache"])
    assert torch.equal(kernels.rope_and_store(**given), q)
    assert torch.equal(buffer[:, 0], caches[0]) and torch.equal(buffer[:, 2], caches[1]) and not buffer[:, 1].any()


@pytest.mark.parametrize("has_map", [False, True])
def test_single_tokens_attend_to_what_is_gathered(
    kernels: Kernels, has_map: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch([*MIXED[:3], (1, 300), *MIXED[3:]])
    q, k, v = make_inputs(batch)
    wanted = naive(q, k, v, batch, 0.3, 8, 0.0)
    if has_map:
        k, v = map_slots(batch, k, v, 8)
    results = []
    for library in (kernels, None):
        monkeypatch.setattr(attention_module, "kernels", lambda library=library: library)
        attention_module._decode_sets.cache_clear()
        # Layer after layer, each with other keys, and others of another shape.
        for scale in (2.0, 1.0):
            result = attention_torch(q, k * scale, v, batch, scale=0.3 / scale, window=8)
        results.append(result)
    attention_module._decode_sets.cache_clear()
    assert torch.equal(*results), "bits do not depend on who gathers"
    assert (results[0].double() - wanted).abs().max() < TOLERANCE[q.dtype]


def test_layers_of_different_shapes_gather_apart(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "kernels", lambda: kernels)
    attention_module._decode_sets.cache_clear()
    batch = make_batch([(1, 9), (1, 40)])
    for num_kv_heads, head_dim in ((2, 16), (1, 32), (2, 16)):
        q, k, v = make_inputs(batch, 4, num_kv_heads, head_dim)
        found = attention_torch(q, k, v, batch, scale=0.3)
        assert (found.double() - naive(q, k, v, batch, 0.3, -1, 0.0)).abs().max() < TOLERANCE[q.dtype]
    attention_module._decode_sets.cache_clear()


def test_many_rows_are_gathered_by_several_threads(kernels: Kernels) -> None:
    cache, num_threads = torch.randn(2, 3000, 2, 64), torch.get_num_threads()
    slots = torch.randperm(3000, generator=torch.Generator().manual_seed(0))[:2000].int()
    try:
        torch.set_num_threads(3)
        k, v = kernels.room_for(cache[0], slots, 4).of(cache[0], cache[1])
    finally:
        torch.set_num_threads(num_threads)
    wanted = cache[:, slots.long()].view(2, 4, 500, 2, 64).transpose(2, 3)
    assert torch.equal(k, wanted[0]) and torch.equal(v, wanted[1])


@pytest.mark.parametrize(("head_dim", "cache_dtype"), [(24, torch.float32), (32, torch.float8_e4m3fn)])
def test_what_is_not_compiled_takes_the_definition(
    kernels: Kernels, head_dim: int, cache_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_cpu, "kernels", lambda: kernels)
    inputs, caches = (
        rope_inputs(4, 2, head_dim, 8, False, torch.float32),
        torch.zeros(2, 20, 2, head_dim).to(cache_dtype),
    )
    assert not kernels.can_rotate(inputs["qkv"], caches[0], caches[1])
    found = rope_and_store(**inputs, k_cache=caches[0], v_cache=caches[1])
    wanted = elementwise.rope_and_store_torch(**inputs, k_cache=caches[0], v_cache=caches[1])
    assert torch.equal(found, wanted)


def test_without_a_compiler_there_is_a_warning_and_no_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpp, "find_compiler", lambda: None)
    monkeypatch.setattr(cache_cpu, "load_library", cpp.load_library.__wrapped__)
    with caplog.at_level(logging.WARNING):
        assert load_kernels() is None
    assert "no C++ compiler here: answers of single requests are slower" in caplog.text


def test_what_is_large_is_not_kept(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, slots = torch.randn(2, 50, 2, 16), torch.tensor([3, 9], dtype=torch.int32)
    kept = kernels.room_for(cache[0], slots, 1)
    assert kept.of(*cache)[0].data_ptr() == kept.of(*cache)[0].data_ptr()
    monkeypatch.setattr(cache_cpu, "MAX_KEPT_BYTES", 100)
    room = kernels.room_for(cache[0], slots, 1)
    first, second = room.of(*cache), room.of(cache[1], cache[0])
    assert torch.equal(first[0], second[1]) and first[0].data_ptr() != second[0].data_ptr()
