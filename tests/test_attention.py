"""Attention: the torch definition against a naive float64 one, and the Triton kernels (interpreted without a GPU)."""

import dataclasses
import os
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is decorated

import bench.attention
from bench.attention import Batch
from kernels import attention as torch_attention
from kernels import flashinfer_attention, one_token, triton_elementwise
from kernels.attention import (
    attention,
    attention_of_products_torch,
    attention_torch,
    choose_backend,
    fits_one_kernel,
)
from kernels.attention_batch import HeadRotation
from kernels.hopper import is_available
from kernels.launch import arrival_counters
from kernels.long_token import attend_long_token, can_attend_long_token
from kernels.one_token import attend_one_token
from kernels.triton_attention import attention_triton
from kernels.triton_decode import decode
from kernels.triton_prefill import prefill, prefill_splits
from kernels.triton_softmax import DecodeConfig, PrefillConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make_batch(lens: list[tuple[int, int]], groups: list[tuple[int, list[int]]] | None = None) -> Batch:
    return bench.attention.make_batch(lens, groups, seed=0, device=DEVICE)


def make_inputs(
    batch: Batch, num_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    num_slots = batch.slot_table.numel()
    num_tokens = int(batch.q_lens_host.sum())
    q = torch.randn(num_tokens, num_heads, head_dim, generator=generator)
    k = torch.randn(num_slots, num_kv_heads, head_dim, generator=generator)
    v = torch.randn(num_slots, num_kv_heads, head_dim, generator=generator)
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype), v.to(DEVICE, dtype)


def naive(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: Batch,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    is_chunked: bool = False,
) -> torch.Tensor:
    """Compute one token and one head at a time, in float64."""
    out = torch.empty(q.shape, dtype=torch.float64)
    q, k_cache, v_cache = (x.double().cpu() for x in (q, k_cache, v_cache))
    table, rows = batch.slot_table.cpu(), batch.rows.tolist()
    group = q.shape[1] // k_cache.shape[1]
    token = 0
    for i, (q_len, seq_len) in enumerate(zip(batch.q_lens_host.tolist(), batch.seq_lens_host.tolist(), strict=True)):
        for position in range(seq_len - q_len, seq_len):
            first = max(0, position - window + 1) if window >= 0 else 0
            first = position - position % window if is_chunked else first
            last = position + 1 if batch.seen_until is None or q_len == 1 else int(batch.seen_until[token])
            slots = table[rows[i], first:last].long()
            for head in range(q.shape[1]):
                scores = k_cache[slots, head // group] @ q[token, head] * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if slopes is not None:
                    scores -= slopes[head].double().cpu() * (position - torch.arange(first, position + 1))
                if sinks is not None:
                    scores = torch.cat((scores, sinks[head : head + 1].double().cpu()))
                out[token, head] = scores.softmax(0)[: len(slots)] @ v_cache[slots, head // group]
            token += 1
    return out


def check(result: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    difference = (result.double().cpu() - expected.double().cpu()).abs().max().item()
    print(f"largest difference {difference:.2e}")
    assert difference < TOLERANCE[dtype]


MIXED = [(1, 9), (1, 1), (1, 40), (7, 7), (5, 30), (24, 24), (2, 37)]
DECODES = [(1, 70), (1, 1), (1, 17), (1, 64)]
KERNELS = pytest.mark.parametrize("kernel", [attention_torch, attention_triton])


@KERNELS
@pytest.mark.parametrize(("window", "softcap"), [(-1, 0.0), (1, 0.0), (8, 2.0), (100, 0.0), (-1, 2.0)])
def test_a_mixed_batch_equals_the_naive_definition(kernel: Any, window: int, softcap: float) -> None:
    batch = make_batch(MIXED)
    q, k, v = make_inputs(batch)
    result = kernel(q, k, v, batch, scale=0.3, window=window, softcap=softcap)
    check(result, naive(q, k, v, batch, 0.3, window, softcap), q.dtype)


@KERNELS
@pytest.mark.parametrize("window", [1, 8, 24, 100])
def test_tokens_see_the_chunk_that_they_are_in(kernel: Any, window: int) -> None:
    batch = make_batch(MIXED)
    q, k, v = make_inputs(batch)
    result = kernel(q, k, v, batch, scale=0.3, window=window, is_chunked=True)
    check(result, naive(q, k, v, batch, 0.3, window, 0.0, is_chunked=True), q.dtype)


@KERNELS
@pytest.mark.parametrize("window", [-1, 8])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_tokens_of_a_picture_see_each_other(kernel: Any, window: int, num_splits: int) -> None:
    lens = [(1, 9), (24, 24), (40, 90), (5, 30)]
    batch = make_batch(lens)
    until = [9]
    for q_len, seq_len in lens[1:]:
        ends = np.arange(seq_len - q_len + 1, seq_len + 1)
        ends[1:5] = ends[4]  # a picture within the chunk
        ends[-3:] = seq_len  # and one at its end
        ends[8:35] = ends[min(34, q_len - 1)] if q_len > 8 else ends[8:35]  # across blocks of queries and of keys
        until += ends.tolist()
    batch.seen_until = torch.tensor(until, dtype=torch.int32, device=DEVICE)
    q, k, v = make_inputs(batch)
    if kernel is attention_torch:
        result = kernel(q, k, v, batch, scale=0.3, window=window)
    else:
        result = attention_triton(q, k, v, batch, scale=0.3, window=window)
        config = PrefillConfig(16, 16, 4, 1)
        prefill(
            q, k, v, batch, result, scale=0.3, window=window, config=config, num_splits=num_splits, min_split_len=16
        )
    check(result, naive(q, k, v, batch, 0.3, window, 0.0), q.dtype)


@pytest.mark.parametrize("window", [16, 41])
def test_tokens_see_the_chunk_that_they_are_in_where_a_prefix_is_shared(window: int) -> None:
    batch = make_batch(GROUPED, groups=GROUPS)
    q, k, v = make_inputs(batch)
    out = torch.full_like(q, float("nan"))
    decode(
        q, k, v, batch, out, scale=0.3, window=window, is_chunked=True, config=DecodeConfig(16, 4, 1, 1),
        num_programs=7, prefix_config=PrefillConfig(16, 16, 4, 1), num_prefix_splits=2,
    )  # fmt: skip
    check(out, naive(q, k, v, batch, 0.3, window, 0.0, is_chunked=True), q.dtype)


def map_slots(batch: Batch, k: torch.Tensor, v: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give `batch` a map of its slots, and return the caches that lie as it says.

    Tokens that nobody sees any more are mapped to a slot of another request's, which holds no numbers.
    """
    num_slots = len(k)
    slot_map = torch.randperm(num_slots, generator=torch.Generator().manual_seed(2), dtype=torch.int32).to(k.device)
    mapped = [torch.full_like(cache[:1], float("nan")).repeat(num_slots + 1, 1, 1) for cache in (k, v)]
    for cache, where in zip((k, v), mapped, strict=True):
        where[slot_map] = cache
    for row, q_len, seq_len in zip(batch.rows, batch.q_lens_host, batch.seq_lens_host, strict=True):
        slot_map[batch.slot_table[row, : max(seq_len - q_len + 1 - window, 0)]] = num_slots
    batch.slot_map = slot_map
    return mapped[0], mapped[1]


@KERNELS
@pytest.mark.parametrize("window", [1, 8, 20])
def test_slots_may_be_mapped_and_what_is_behind_a_window_may_be_anything(kernel: Any, window: int) -> None:
    batch = make_batch([*MIXED, (20, 60)])
    q, k, v = make_inputs(batch)
    expected = naive(q, k, v, batch, 0.3, window, 0.0)
    check(kernel(q, *map_slots(batch, k, v, window), batch, scale=0.3, window=window), expected, q.dtype)


@pytest.mark.parametrize(("num_splits", "softcap", "num_times"), [(2, 0.0, 1), (3, 2.0, 2), (8, 0.0, 1)])
def test_a_context_cut_into_parts_gives_the_same_result(num_splits: int, softcap: float, num_times: int) -> None:
    batch = make_batch([(1, 20), (3, 90), (7, 7), (20, 150), (5, 33), (2, 2)])
    q, k, v = make_inputs(batch)
    for _ in range(num_times):  # and leaves nothing behind that the next one would stumble over
        result = torch.full_like(q, float("nan"))
        decode(q, k, v, batch, result, scale=0.3, softcap=softcap)
        prefill(q, k, v, batch, result, scale=0.3, softcap=softcap, num_splits=num_splits, min_split_len=16)
        check(result, naive(q, k, v, batch, 0.3, -1, softcap), q.dtype)


def make_sinks(num_heads: int) -> torch.Tensor:
    """Return scores of all sizes: of a head that sees tokens only, of one that sees hardly any, and others."""
    sinks = torch.randn(num_heads, generator=torch.Generator().manual_seed(3))
    sinks[0], sinks[1] = -1000.0, 200.0
    return sinks.to(DEVICE)


@KERNELS
@pytest.mark.parametrize(("window", "softcap"), [(-1, 0.0), (8, 0.0), (-1, 2.0)])
def test_sinks_take_their_share_of_the_softmax(kernel: Any, window: int, softcap: float) -> None:
    batch, sinks = make_batch(MIXED), make_sinks(6)
    q, k, v = make_inputs(batch, 6, 2)
    result = kernel(q, k, v, batch, scale=0.3, window=window, softcap=softcap, sinks=sinks)
    check(result, naive(q, k, v, batch, 0.3, window, softcap, sinks), q.dtype)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_sinks_count_once_however_the_context_is_cut(num_splits: int) -> None:
    batch, sinks = make_batch([*DECODES, (3, 90), (20, 150), (2, 2)]), make_sinks(6)
    q, k, v = make_inputs(batch, 6, 2)
    result = torch.full_like(q, float("nan"))
    decode(q, k, v, batch, result, scale=0.3, sinks=sinks, config=DecodeConfig(16, 4, 1, 1), num_programs=7)
    prefill(q, k, v, batch, result, scale=0.3, sinks=sinks, num_splits=num_splits, min_split_len=16)
    check(result, naive(q, k, v, batch, 0.3, -1, 0.0, sinks), q.dtype)


def test_sinks_count_once_where_a_prefix_is_shared() -> None:
    batch, sinks = make_batch(GROUPED, groups=GROUPS), make_sinks(6)
    q, k, v = make_inputs(batch, 6, 2)
    out = torch.full_like(q, float("nan"))
    decode(
        q, k, v, batch, out, scale=0.3, sinks=sinks, config=DecodeConfig(16, 4, 1, 1), num_programs=7,
        prefix_config=PrefillConfig(32, 16, 4, 1), num_prefix_splits=3,
    )  # fmt: skip
    check(out, naive(q, k, v, batch, 0.3, -1, 0.0, sinks), q.dtype)


SLOPES = torch.tensor([0.5, 0.0, 0.03, 0.25, 1.0, 0.004], device=DEVICE)


@KERNELS
@pytest.mark.parametrize(("window", "softcap"), [(-1, 0.0), (8, 0.0), (-1, 2.0)])
def test_slopes_take_from_scores_with_distance(kernel: Any, window: int, softcap: float) -> None:
    batch = make_batch(MIXED)
    q, k, v = make_inputs(batch, 6, 2)
    result = kernel(q, k, v, batch, scale=0.3, window=window, softcap=softcap, slopes=SLOPES)
    check(result, naive(q, k, v, batch, 0.3, window, softcap, slopes=SLOPES), q.dtype)


def test_the_definition_takes_slopes_with_bfloat16() -> None:
    batch = make_batch([(1, 300), (1, 270), (20, 280)])
    q, k, v = make_inputs(batch, 6, 2, dtype=torch.bfloat16)
    result = attention_torch(q, k, v, batch, scale=0.3, slopes=SLOPES)
    check(result, naive(q, k, v, batch, 0.3, -1, 0.0, slopes=SLOPES), q.dtype)


def test_slopes_and_sinks_may_come_together() -> None:
    batch, sinks = make_batch(MIXED), make_sinks(6)
    q, k, v = make_inputs(batch, 6, 2)
    result = attention_torch(q, k, v, batch, scale=0.3, sinks=sinks, slopes=SLOPES)
    check(result, naive(q, k, v, batch, 0.3, -1, 0.0, sinks, SLOPES), q.dtype)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_slopes_count_from_the_query_however_the_context_is_cut(num_splits: int) -> None:
    batch = make_batch([*DECODES, (3, 90), (20, 150), (2, 2)])
    q, k, v = make_inputs(batch, 6, 2)
    result = torch.full_like(q, float("nan"))
    decode(q, k, v, batch, result, scale=0.3, slopes=SLOPES, config=DecodeConfig(16, 4, 1, 1), num_programs=7)
    prefill(q, k, v, batch, result, scale=0.3, slopes=SLOPES, num_splits=num_splits, min_split_len=16)
    check(result, naive(q, k, v, batch, 0.3, -1, 0.0, slopes=SLOPES), q.dtype)


@pytest.mark.parametrize(("window", "softcap"), [(-1, 0.0), (45, 2.0)])
def test_slopes_count_from_the_query_where_a_prefix_is_shared(window: int, softcap: float) -> None:
    batch = make_batch(GROUPED, groups=GROUPS)
    q, k, v = make_inputs(batch, 6, 2)
    out = torch.full_like(q, float("nan"))
    decode(
        q, k, v, batch, out, scale=0.3, window=window, softcap=softcap, slopes=SLOPES,
        config=DecodeConfig(16, 4, 1, 1), num_programs=7, prefix_config=PrefillConfig(32, 16, 4, 1),
        num_prefix_splits=3,
    )  # fmt: skip
    check(out, naive(q, k, v, batch, 0.3, window, softcap, slopes=SLOPES), q.dtype)


@pytest.mark.parametrize("options", [{"sinks": make_sinks(2)}, {"slopes": SLOPES[:2]}])
def test_flashinfer_leaves_sinks_and_slopes_to_triton(options: dict[str, Any]) -> None:
    batch = make_batch([(1, 9), (6, 6), (3, 21)])
    q, k, v = make_inputs(batch, 2, 1, 64, dtype=torch.float16)
    result = flashinfer_attention.attention_flashinfer(q, k, v, batch, scale=0.1, **options)
    check(result, naive(q, k, v, batch, 0.1, -1, 0.0, **options), q.dtype)


@KERNELS
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(3, 1, 16), (4, 4, 24), (6, 2, 16), (20, 1, 16)])
def test_any_number_of_heads_and_head_dim(kernel: Any, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    batch = make_batch([(1, 9), (1, 20), (6, 6), (3, 21)])
    q, k, v = make_inputs(batch, num_heads, num_kv_heads, head_dim)
    check(kernel(q, k, v, batch, scale=0.2), naive(q, k, v, batch, 0.2, -1, 0.0), q.dtype)


@KERNELS
def test_half_precision(kernel: Any) -> None:
    batch = make_batch(MIXED)
    q, k, v = make_inputs(batch, dtype=torch.float16)
    check(kernel(q, k, v, batch, scale=0.3), naive(q, k, v, batch, 0.3, -1, 0.0), q.dtype)


def test_the_definition_takes_bfloat16() -> None:
    batch = make_batch(MIXED)
    q, k, v = make_inputs(batch, dtype=torch.bfloat16)
    check(attention_torch(q, k, v, batch, scale=0.3), naive(q, k, v, batch, 0.3, -1, 0.0), q.dtype)


@KERNELS
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_float8_cache_is_read_as_the_numbers_it_holds(kernel: Any, cache_dtype: torch.dtype) -> None:
    batch = make_batch([(1, 9), (1, 20), (6, 6), (3, 21)])
    q, k, v = make_inputs(batch)
    k, v = k.to(cache_dtype), v.to(cache_dtype)
    check(kernel(q, k, v, batch, scale=0.3), naive(q, k, v, batch, 0.3, -1, 0.0), q.dtype)


@KERNELS
def test_queries_and_caches_may_be_views_of_larger_tensors(kernel: Any) -> None:
    batch = make_batch(MIXED)
    q, k, v = make_inputs(batch)
    wide_q, buffer = q.new_zeros(q.shape[0], 9, q.shape[2]), k.new_zeros(3, 2, *k.shape)
    wide_q[:, :4], buffer[1, 0], buffer[1, 1] = q, k, v
    result = kernel(wide_q[:, :4], buffer[1, 0], buffer[1, 1], batch, scale=0.3)
    check(result, naive(q, k, v, batch, 0.3, -1, 0.0), q.dtype)


@pytest.mark.parametrize(("num_programs", "block_n", "window"), [(1, 16, -1), (3, 16, 20), (5, 32, -1), (40, 16, -1)])
def test_however_the_work_is_cut_the_parts_merge_to_the_same(num_programs: int, block_n: int, window: int) -> None:
    batch = make_batch(DECODES)
    q, k, v = make_inputs(batch)
    out = torch.full_like(q, float("nan"))
    config = DecodeConfig(block_n, 4, 1, 1)
    decode(q, k, v, batch, out, scale=0.3, window=window, config=config, num_programs=num_programs)
    check(out, naive(q, k, v, batch, 0.3, window, 0.0), q.dtype)


@pytest.mark.parametrize(("num_programs", "window"), [(1, -1), (7, -1), (61, 20), (500, -1)])
def test_many_requests_may_be_of_any_length_and_padding_among_them(num_programs: int, window: int) -> None:
    lens = np.random.default_rng(0).choice([1, 2, 15, 16, 17, 33, 100], 24)
    batch = make_batch([(1, int(length)) for length in lens])
    padding = [0, 9, 10, len(lens) - 1]
    batch.seq_lens[padding] = 0
    q, k, v = make_inputs(batch)
    out = torch.full_like(q, float("nan"))
    config = DecodeConfig(16, 4, 1, 1)
    decode(q, k, v, batch, out, scale=0.3, window=window, config=config, num_programs=num_programs)
    is_request = batch.seq_lens.cpu() > 0
    check(out[is_request], naive(q, k, v, batch, 0.3, window, 0.0)[is_request], q.dtype)
    assert out[padding].isnan().all(), "padding is left as it is"


@pytest.mark.skipif(DEVICE != "cpu", reason="what a kernel waits for is counted where it is interpreted")
@pytest.mark.parametrize("lens", [[0, 0, 0], [0, 5, 0], [40, 70, 3]])
def test_who_waits_for_single_tokens_attention_has_waited_for_the_kernel_ahead_of_it(
    lens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton.language as tl  # here: its own functions are decorated, too

    waits: list[int] = []
    monkeypatch.setattr(triton_elementwise, "has_dependent_launch", lambda device: True)
    monkeypatch.setattr(tl.extra.cuda, "gdc_launch_dependents", lambda: None)
    monkeypatch.setattr(tl.extra.cuda, "gdc_wait", lambda: waits.append(1))
    batch = make_batch([(1, max(length, 1)) for length in lens])
    batch.seq_lens[:] = torch.tensor(lens)  # 0: padding, of which a graph's step may have nothing else
    q, k, v = make_inputs(batch)
    decode(q, k, v, batch, torch.empty_like(q), scale=0.3, num_programs=5)
    assert waits


def make_products(
    lens: list[int], heads: tuple[int, int, int, int], dtype: torch.dtype, norms: list[str]
) -> tuple[torch.Tensor, HeadRotation, torch.Tensor, torch.Tensor, Batch]:
    """Return (products, their rotation, caches, single tokens) for `attention_of_products`.

    heads: their number, that of KV heads, their size, and how much of it is rotated.
    """
    num_heads, num_kv_heads, head_dim, rotary_dim = heads
    batch = make_batch([(1, length) for length in lens])
    _, k, v = make_inputs(batch, num_heads, num_kv_heads, head_dim, dtype)
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(len(lens), (num_heads + 2 * num_kv_heads) * head_dim, generator=generator).to(DEVICE, dtype)
    cos_sin = torch.randn(max(lens), rotary_dim, generator=generator).to(DEVICE)
    weights = {name: torch.rand(head_dim, generator=generator).to(DEVICE, dtype) for name in norms}
    positions = (batch.seq_lens - 1).int()
    rotation = HeadRotation(positions, cos_sin, weights.get("q_norm"), weights.get("k_norm"), eps=1e-5)
    return qkv, rotation, k, v, batch


@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "norms", "num_programs"),
    [(16, 16, ["q_norm", "k_norm"], 5), (24, 16, ["k_norm"], 40), (32, 32, [], 1)],
)
@pytest.mark.parametrize("lens", [[1, 40, 16, 33], [5, 9, 70, 18] * 5], ids=str)
def test_products_are_rotated_stored_and_attended_to_in_one_kernel(
    lens: list[int], head_dim: int, rotary_dim: int, norms: list[str], num_programs: int
) -> None:
    qkv, rotation, k, v, batch = make_products(lens, (4, 2, head_dim, rotary_dim), torch.float32, norms)
    wanted_k, wanted_v = k.clone(), v.clone()
    wanted = attention_of_products_torch(qkv, rotation, wanted_k, wanted_v, batch, 4, scale=0.3)
    q, out = qkv[:, : 4 * head_dim].unflatten(1, (4, head_dim)), torch.full_like(wanted, float("nan"))
    config = DecodeConfig(16, 4, 1, 1)
    decode(q, k, v, batch, out, scale=0.3, rotation=rotation, config=config, num_programs=num_programs)
    check(out, wanted, qkv.dtype)
    check(k.float(), wanted_k.float(), qkv.dtype)
    check(v.float(), wanted_v.float(), qkv.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("lens", [[1], [64], [1000, 1, 130], [129, 1025], [5000]])
@pytest.mark.parametrize(
    ("num_heads", "head_dim", "rotary_dim", "options"),
    [
        (4, 128, 128, {}),
        (6, 64, 64, {"window": 70}),
        (10, 128, 64, {"softcap": 2.0}),
        (14, 128, 128, {"window": 128, "is_chunked": True}),
        (16, 64, 64, {"window": 128, "sinks": [1.0, -2.0] * 8}),
        (4, 256, 256, {"window": 100, "softcap": 1.5}),
        (16, 256, 128, {}),
        (16, 128, 128, {}),
        (2, 128, 32, {}),
        (6, 64, 16, {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_of_one_token_equals_its_twin(
    lens: list[int], num_heads: int, head_dim: int, rotary_dim: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    norms = ["q_norm", "k_norm"] if rotary_dim == 128 else []
    qkv, rotation, k, v, batch = make_products(lens, (num_heads, 2, head_dim, rotary_dim), dtype, norms)
    if "sinks" in options:
        options = options | {"sinks": torch.tensor(options["sinks"]).to(DEVICE, dtype)}
    if not is_available(qkv.device):
        pytest.skip("it is for Hopper")
    if head_dim == 64:  # as where windows have slots of their own
        batch.slot_map = torch.randperm(len(k), generator=torch.Generator().manual_seed(3)).int().to(DEVICE)
    wanted_k, wanted_v = k.clone(), v.clone()
    wanted = attention_of_products_torch(qkv, rotation, wanted_k, wanted_v, batch, num_heads, scale=0.1, **options)
    out = attend_one_token(qkv, rotation, k, v, batch, num_heads, scale=0.1, **options)
    check(out, wanted, dtype)
    check(k, wanted_k, dtype)
    check(v, wanted_v, dtype)


def test_one_kernel_takes_single_tokens_without_a_prefix_to_share() -> None:
    assert fits_one_kernel(make_batch([(1, 9)]), "triton")
    assert fits_one_kernel(make_batch([(1, 9)] * 40), "triton")
    assert not fits_one_kernel(make_batch([(1, 9)]), "torch")
    assert not fits_one_kernel(make_batch([(1, 9), (2, 5)]), "triton")
    assert not fits_one_kernel(make_batch([(2, 9)]), "triton")
    assert not fits_one_kernel(make_batch([(1, 9)], groups=[]), "triton")
    of_windows = make_batch([(1, 9), (1, 9)])
    of_windows.slot_map = torch.zeros(9, dtype=torch.int32)
    assert not fits_one_kernel(of_windows, "triton"), "a token may be stored anew there, while others see it"


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 500, 4097, 20_011])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rotary_dim", "options"),
    [
        (32, 8, 128, 128, {}),
        (32, 4, 128, 64, {"softcap": 2.0}),
        (14, 2, 64, 16, {}),
        (7, 1, 128, 32, {"window": 3000, "is_chunked": True}),
        (64, 8, 64, 64, {"window": 128, "sinks": [1.0, -2.0] * 32}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_of_a_long_context_equals_its_twin(
    length: int, num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int, options: dict[str, Any],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    norms = ["q_norm", "k_norm"] if rotary_dim == 128 else []
    qkv, rotation, k, v, batch = make_products([length], (num_heads, num_kv_heads, head_dim, rotary_dim), dtype, norms)
    if "sinks" in options:
        options = options | {"sinks": torch.tensor(options["sinks"]).to(DEVICE, dtype)}
    if not is_available(qkv.device):
        pytest.skip("it is for Hopper")
    wanted_k, wanted_v = k.clone(), v.clone()
    wanted = attention_of_products_torch(qkv, rotation, wanted_k, wanted_v, batch, num_heads, scale=0.1, **options)
    out = attend_long_token(qkv, rotation, k, v, batch, num_heads, scale=0.1, **options)
    check(out, wanted, dtype)
    check(k, wanted_k, dtype)
    check(v, wanted_v, dtype)
    assert not arrival_counters(qkv.device, 1).any()


def test_a_token_has_the_kernel_for_its_context_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_token, "is_available", lambda device: True)
    long = one_token.LONG_CONTEXT

    def taken_by(lens: list[int], num_kv_heads: int = 8, head_dim: int = 64, **options: Any) -> str:
        heads = 2 * num_kv_heads, num_kv_heads, head_dim, 64
        qkv, rotation, k, v, batch = make_products(lens, heads, torch.bfloat16, [])
        arguments = qkv, rotation, k, v, batch, heads[0]
        if one_token.can_attend_one_token(*arguments, **options):
            return "one"
        return "long" if can_attend_long_token(*arguments, **options) else "triton"

    assert taken_by([long]) == taken_by([9], num_kv_heads=one_token.MIN_KV_HEADS) == "one"
    assert taken_by([long + 1]) == taken_by([long + 1], num_kv_heads=2) == "long"
    assert taken_by([long + 1], window=long) == "one", "a window is no longer than that"
    assert taken_by([9], num_kv_heads=one_token.MIN_KV_HEADS - 1) == "triton"
    assert taken_by([long + 1], head_dim=256) == taken_by([9, 9]) == taken_by([long + 1] * 2) == "triton"


def test_the_arrival_counters_are_zero_again() -> None:
    batch = make_batch(DECODES)
    q, k, v = make_inputs(batch)
    for num_programs in (3, 7):
        decode(q, k, v, batch, torch.empty_like(q), scale=0.3, num_programs=num_programs)
    assert not arrival_counters(q.device, 1).any()


GROUPED = [(1, 50), (1, 3), (1, 45), (1, 41), (1, 64), (1, 39)]
GROUPS = [(40, [0, 2, 3]), (33, [4, 5])]


@pytest.mark.parametrize(
    ("window", "softcap", "num_splits", "num_programs", "block_m", "cache_dtype"),
    [(-1, 0.0, 1, 2, 16, torch.float32), (-1, 0.0, 3, 7, 32, torch.float8_e4m3fn), (5, 0.0, 2, 7, 32, torch.float32),
     (45, 0.0, 7, 2, 16, torch.float32), (-1, 2.0, 3, 7, 32, torch.float32), (45, 2.0, 2, 7, 16, torch.float8_e4m3fn)],
)  # fmt: skip
def test_shared_prefixes_change_nothing(
    window: int, softcap: float, num_splits: int, num_programs: int, block_m: int, cache_dtype: torch.dtype
) -> None:
    batch = make_batch(GROUPED, groups=GROUPS)
    q, k, v = make_inputs(batch, 6, 2)
    k, v = k.to(cache_dtype), v.to(cache_dtype)
    out = torch.full_like(q, float("nan"))
    decode(
        q, k, v, batch, out, scale=0.3, window=window, softcap=softcap, config=DecodeConfig(16, 4, 1, 1),
        num_programs=num_programs, prefix_config=PrefillConfig(block_m, 16, 4, 1), num_prefix_splits=num_splits,
    )  # fmt: skip
    check(out, naive(q, k, v, batch, 0.3, window, softcap), q.dtype)


@KERNELS
def test_a_batch_of_a_captured_graph_may_have_no_groups(kernel: Any) -> None:
    batch = make_batch(DECODES, groups=[])
    q, k, v = make_inputs(batch)
    check(kernel(q, k, v, batch, scale=0.3), naive(q, k, v, batch, 0.3, -1, 0.0), q.dtype)


@KERNELS
def test_a_grouped_batch_with_prompts(kernel: Any) -> None:
    batch = make_batch([*GROUPED, (9, 30), (4, 4)], groups=GROUPS)
    q, k, v = make_inputs(batch)
    check(kernel(q, k, v, batch, scale=0.3), naive(q, k, v, batch, 0.3, -1, 0.0), q.dtype)


@pytest.mark.parametrize(("block_m", "block_n", "window"), [(16, 16, -1), (64, 16, -1), (16, 32, 6)])
def test_prompts_in_tiles_of_any_shape(block_m: int, block_n: int, window: int) -> None:
    batch = make_batch([(1, 5), (17, 17), (2, 35), (33, 60)])
    q, k, v = make_inputs(batch)
    out = torch.zeros_like(q)
    prefill(q, k, v, batch, out, scale=0.3, window=window, config=PrefillConfig(block_m, block_n, 4, 1))
    check(out[1:], naive(q, k, v, batch, 0.3, window, 0.0)[1:], q.dtype)


def test_requests_are_padded_only_to_similar_lengths() -> None:
    lens = np.array([1000, 10, 900, 40, 5000, 70], np.int32)
    sets = [members.tolist() for members in torch_attention._similar_lengths(lens)]
    assert sets == [[4], [0, 2], [1, 3, 5]]


@pytest.mark.skipif(DEVICE != "cpu", reason="a kernel may cut its work by what is in the batch")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tokens_attention_is_the_same_bits_alone_beside_others_and_in_chunks(dtype: torch.dtype) -> None:
    lens = [(1, 45), (1, 53), (1, 300), (37, 37), (21, 90)]
    together = make_batch(lens)
    q, k, v = make_inputs(together, num_heads=6, head_dim=64, dtype=dtype)
    result = attention_torch(q, k, v, together, scale=0.125)

    def part(request: int, start: int, stop: int) -> torch.Tensor:
        """Return the attention of tokens [start, stop) of one request's, which alone are there."""
        first = int(together.cu_q_lens[request])
        seq_len = int(together.seq_lens[request]) - int(together.q_lens_host[request]) + stop
        q_lens, seq_lens = np.array([stop - start]), np.array([seq_len])
        batch = dataclasses.replace(
            together,
            rows=together.rows[request : request + 1],
            seq_lens=torch.from_numpy(seq_lens),
            cu_q_lens=torch.tensor([0, stop - start]),
            num_decodes=int(stop - start == 1),
            q_lens_host=q_lens,
            seq_lens_host=seq_lens,
        )
        return attention_torch(q[first + start : first + stop], k, v, batch, scale=0.125)

    alone = [part(i, 0, q_len) for i, (q_len, _) in enumerate(lens)]
    assert torch.equal(torch.cat(alone), result)
    if dtype == torch.float32:
        return  # a product of one row may be summed otherwise, and nothing is rounded after it
    chunks = [part(3, 0, 7), part(3, 7, 8), part(3, 8, 37)]
    assert torch.equal(torch.cat(chunks), alone[3])


def test_the_cpu_runs_the_definition() -> None:
    batch = make_batch(MIXED)
    q, k, v = make_inputs(batch)
    result = attention(q, k, v, batch, scale=0.3, backend=choose_backend(None, torch.device("cpu")))
    assert torch.equal(result, attention_torch(q, k, v, batch, scale=0.3))


def test_flashinfer_gets_the_slots_of_the_prompts_one_after_another() -> None:
    batch = make_batch(MIXED)
    indptr, slots = flashinfer_attention.kv_indices(batch, batch.num_decodes)
    assert indptr.tolist() == [0, 7, 37, 61, 98]
    rows = batch.rows.tolist()
    expected = [batch.slot_table[rows[i], : batch.seq_lens_host[i]] for i in range(batch.num_decodes, len(rows))]
    assert torch.equal(slots, torch.cat(expected))


def test_flashinfer_is_given_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch([(1, 9), (3, 21), (5, 5)])
    q, k, v = make_inputs(batch)
    padded = torch.cat([q, torch.zeros_like(q)])
    given: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Plans:
        def wrapper_for(self, *_: object) -> "Plans":
            return self

        def run(self, q: torch.Tensor, cache: object, out: torch.Tensor) -> None:
            given.append((q, out))

    monkeypatch.setattr(flashinfer_attention, "_prefill_plans", lambda device: Plans())
    monkeypatch.setattr(flashinfer_attention, "HEAD_DIMS", (q.shape[2],))
    flashinfer_attention.attention_flashinfer(padded.bfloat16(), k.bfloat16(), v.bfloat16(), batch, scale=0.3)
    ((queries, out),) = given
    assert torch.equal(queries, q[1:].bfloat16())
    assert out.shape == queries.shape


def test_a_context_is_cut_so_that_the_last_wave_of_programs_is_not_nearly_empty() -> None:
    places = 264
    for num_programs in range(1, 6 * places):
        num_splits, min_len = prefill_splits(num_programs, places)
        waves, uncut = -(-num_programs * num_splits // places) / num_splits, -(-num_programs // places)
        assert waves <= uncut
        assert num_splits == 1 or min_len <= 512 or waves < uncut, "cut for nothing"
        if places / 2 < num_programs <= 4 * places:
            assert waves <= 1.2 * num_programs / places


def test_flashinfer_reads_the_last_tokens_slot_for_what_is_behind_a_window() -> None:
    batch = make_batch(MIXED)
    map_slots(batch, *make_inputs(batch)[1:], window=8)
    assert batch.slot_map is not None
    _, slots = flashinfer_attention.kv_indices(batch, batch.num_decodes, window=8)
    row = batch.slot_map[batch.slot_table[batch.rows[4], :30].long()]
    num_hidden = 30 - 5 + 1 - 8
    assert slots[7:37].tolist() == [int(row[29])] * num_hidden + row[num_hidden:].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("window", "softcap", "cache_dtype"), [(-1, 0.0, torch.bfloat16), (8, 2.0, torch.float8_e4m3fn)]
)
def test_flashinfer_equals_the_naive_definition(window: int, softcap: float, cache_dtype: torch.dtype) -> None:
    available, reason = flashinfer_attention.is_available()
    if not available:
        pytest.skip(reason)
    batch = make_batch(MIXED)
    q, k, v = make_inputs(batch, head_dim=64, dtype=torch.bfloat16)
    k, v = k.to(cache_dtype), v.to(cache_dtype)
    result = flashinfer_attention.attention_flashinfer(q, k, v, batch, scale=0.3, window=window, softcap=softcap)
    check(result, naive(q, k, v, batch, 0.3, window, softcap), q.dtype)


@pytest.mark.gpu
def test_flashinfer_equals_the_naive_definition_where_slots_are_mapped() -> None:
    available, reason = flashinfer_attention.is_available()
    if not available:
        pytest.skip(reason)
    batch = make_batch(MIXED)
    q, k, v = make_inputs(batch, head_dim=64, dtype=torch.bfloat16)
    expected = naive(q, k, v, batch, 0.3, 8, 0.0)
    k, v = map_slots(batch, k, v, window=8)
    check(flashinfer_attention.attention_flashinfer(q, k, v, batch, scale=0.3, window=8), expected, q.dtype)


@pytest.mark.parametrize("backend", ["triton", "flashinfer", "cudnn"])
def test_a_backend_that_cannot_run_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=backend):
        choose_backend(backend, torch.device("cpu"))
