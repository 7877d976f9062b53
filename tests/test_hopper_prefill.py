"""The Hopper kernel of prompts: when it serves and how its work is cut; equal to the definition on a GPU alone."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is decorated

import bench.attention
from bench.attention import Batch
from kernels import hopper_prefill, triton_attention
from kernels.attention import attention_torch
from kernels.card import HOPPER_SHARED_BYTES
from kernels.hopper_prefill import (
    KEYS,
    LEAST_WINDOW,
    MAX_PARTS,
    MAX_REQUESTS,
    RUN_SLOTS,
    SHARED_DIM,
    SHARED_SIZES,
    Variant,
    can_prefill,
    can_prefill_shared,
    prefill,
    source,
)

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {FP16: 4e-3, BF16: 3e-2}
PROMPTS = [(1, 9), (150, 150), (40, 300), (700, 700), (513, 2100), (3, 77)]


def make_inputs(
    batch: Batch, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    num_tokens, num_slots = int(batch.q_lens_host.sum()), batch.slot_table.numel()
    shapes = (num_tokens, num_heads), (num_slots, num_kv_heads), (num_slots, num_kv_heads)
    q, k, v = (torch.randn(*shape, head_dim, generator=generator, device=device).to(dtype) for shape in shapes)
    return q, k, v


# ---- when it serves ----


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Look like a Hopper GPU to the choice of a kernel; return the options of each call of the Hopper kernel."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(hopper_prefill, "is_available", lambda device: True)
    monkeypatch.setattr(hopper_prefill, "prefill", lambda q, k, v, batch, out, **options: calls.append(options))
    return calls


def test_prompts_go_to_the_hopper_kernel_and_single_tokens_do_not(hopper: list[dict[str, Any]]) -> None:
    batch = bench.attention.make_batch([(1, 9), (5, 30)], seed=0, device="cpu")
    q, k, v = make_inputs(batch, 4, 2, 64, FP16)
    sinks = torch.zeros(4)
    out = triton_attention.attention_triton(q, k, v, batch, scale=0.3, window=2000, softcap=2.0, sinks=sinks)
    expected = attention_torch(q, k, v, batch, scale=0.3, window=2000, softcap=2.0, sinks=sinks)
    torch.testing.assert_close(out[:1], expected[:1], rtol=0, atol=TOLERANCE[FP16])
    assert hopper == [{"scale": 0.3, "window": 2000, "is_chunked": False, "softcap": 2.0, "sinks": sinks}]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_it_takes_sixteen_bits_and_common_head_sizes(hopper: Any, head_dim: int, dtype: torch.dtype) -> None:
    batch = bench.attention.make_batch([(5, 30)], seed=0, device="cpu")
    assert can_prefill(*make_inputs(batch, 4, 2, head_dim, dtype), batch)
    assert can_prefill(*make_inputs(batch, 4, 2, head_dim, dtype), batch, sinks=torch.zeros(4, dtype=dtype))


def test_it_leaves_what_it_cannot_do_to_triton(hopper: Any) -> None:
    batch = bench.attention.make_batch([(5, 30)], seed=0, device="cpu")
    q, k, v = make_inputs(batch, 4, 2, 64, BF16)
    others: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {
        "head size": (q[..., :48].contiguous(), k[..., :48].contiguous(), v[..., :48].contiguous()),
        "float32": (q.float(), k.float(), v.float()),
        "float8": (q, k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)),
        "narrower values": (q, k, v[..., :32]),
        "rows that do not begin at 16 bytes": (torch.zeros(5, 4, 68, dtype=BF16)[..., 4:], k, v),
    }
    for name, tensors in others.items():
        assert not can_prefill(*tensors, batch), name
    assert not can_prefill(q, k, v, batch, slopes=torch.zeros(4))
    batch.seen_until = torch.arange(26, 31, dtype=torch.int32)
    assert not can_prefill(q, k, v, batch)


@pytest.mark.parametrize("head_dim", KEYS)
def test_it_leaves_narrow_windows_to_triton(hopper: Any, head_dim: int) -> None:
    batch = bench.attention.make_batch([(2, 4)], seed=0, device="cpu")
    least = LEAST_WINDOW[head_dim]
    assert can_prefill(*make_inputs(batch, 1, 1, head_dim, BF16), batch, window=least)
    assert not can_prefill(*make_inputs(batch, 1, 1, head_dim, BF16), batch, window=least - 1)


def test_it_leaves_more_prompts_than_a_block_lists_to_triton(hopper: Any) -> None:
    for num_prompts in (MAX_REQUESTS, MAX_REQUESTS + 1):
        batch = bench.attention.make_batch([(1, 4)] * 3 + [(2, 4)] * num_prompts, seed=0, device="cpu")
        assert can_prefill(*make_inputs(batch, 1, 1, 64, BF16), batch) == (num_prompts == MAX_REQUESTS)


def test_keys_may_share_their_last_elements_in_sizes_that_fit(hopper: Any) -> None:
    q = torch.zeros(5, 4, 192, dtype=BF16)
    assert can_prefill_shared(q, 128, 64) and can_prefill_shared(torch.zeros(5, 4, 256, dtype=FP16), 256, 64)
    for others in ((q, 192, 64), (q, 128, 32), (q.float(), 128, 64), (q[..., :128].contiguous(), 128, 64)):
        assert not can_prefill_shared(*others)


def test_a_cpu_has_other_kernels() -> None:
    batch = bench.attention.make_batch([(5, 30)], seed=0, device="cpu")
    assert not can_prefill(*make_inputs(batch, 4, 2, 64, BF16), batch)


# ---- how its work is cut ----


@pytest.mark.parametrize("head_dim", KEYS)
def test_a_block_fits_into_a_multiprocessor(head_dim: int) -> None:
    variant = Variant(head_dim, BF16)
    assert variant.shared_bytes <= HOPPER_SHARED_BYTES
    assert variant.num_threads <= 512, "128 registers of each, or loaders have none to leave"
    assert KEYS[head_dim] % (2 * RUN_SLOTS) == 0, "two warps load a tile, in whole runs of slots"


@pytest.mark.parametrize("head_dim", SHARED_SIZES)
def test_a_block_fits_where_keys_share_elements(head_dim: int) -> None:
    assert Variant(head_dim, BF16, has_shared=True).shared_bytes <= HOPPER_SHARED_BYTES
    assert SHARED_SIZES[head_dim][1] % (2 * RUN_SLOTS) == 0


@pytest.mark.parametrize(("dtype", "short"), [(BF16, "bf16"), (FP16, "f16")])
def test_the_source_names_the_instructions_of_its_tiles(dtype: torch.dtype, short: str) -> None:
    text = source(Variant(256, dtype))
    assert f'"m64n64k16.f32.{short}.{short}"' in text and f'"m64n256k16.f32.{short}.{short}"' in text
    assert '"+f"(s[31])' in text and '"+f"(s[32])' not in text
    assert '"+f"(o[127])' in text and '"+f"(o[128])' not in text


# ---- is it right? ----


def lay_in_a_row(batch: Batch) -> None:
    """Give tokens slots that follow each other, but backwards from the 70th on."""
    num_rows, max_len = batch.slot_table.shape
    slots = torch.arange(num_rows * max_len, dtype=torch.int32, device=batch.slot_table.device).view(num_rows, max_len)
    slots[:, 70:200] = slots[:, 70:200].flip(1)
    batch.slot_table = slots


def check(
    lens: list[tuple[int, int]],
    num_heads: int = 8,
    num_kv_heads: int = 2,
    head_dim: int = 128,
    dtype: torch.dtype = BF16,
    most_parts: int = MAX_PARTS,
    is_in_a_row: bool = True,
    growth: float = 1.0,
    **options: Any,
) -> None:
    """Compare with the definition, and read nothing of slots that are no token's.

    growth: keys of the first 40 tokens, which come last, are so much larger.
    """
    batch = bench.attention.make_batch(lens, seed=0)
    if is_in_a_row:
        lay_in_a_row(batch)
    q, k, v = make_inputs(batch, num_heads, num_kv_heads, head_dim, dtype, "cuda")
    k[batch.slot_table[:, :40].long()] *= growth
    options = {"scale": head_dim**-0.5, **options}
    expected = attention_torch(q.float(), k.float(), v.float(), batch, **options)
    is_token = torch.zeros(len(k), dtype=torch.bool, device="cuda")
    for row, seq_len in zip(batch.rows.tolist(), batch.seq_lens.tolist(), strict=True):
        is_token[batch.slot_table[row, :seq_len].long()] = True
    k[~is_token] = v[~is_token] = float("nan")
    for _ in range(2):  # again with the arrival counters that the run before left
        found = torch.full_like(q, float("nan"))
        prefill(q, k, v, batch, found, most_parts=most_parts, **options)
        first = batch.num_decodes
        assert found[:first].isnan().all(), "single tokens are left as they are"
        assert (found[first:].float() - expected[first:]).abs().max().item() < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", KEYS)
@pytest.mark.parametrize("is_in_a_row", [True, False])
@pytest.mark.parametrize("most_parts", [1, 3, MAX_PARTS])
def test_prompts_equal_the_definition(head_dim: int, is_in_a_row: bool, most_parts: int) -> None:
    check(PROMPTS, head_dim=head_dim, is_in_a_row=is_in_a_row, most_parts=most_parts)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (28, 4), (20, 1)])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_any_number_of_heads_may_share_keys(num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> None:
    check(PROMPTS, num_heads, num_kv_heads, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", KEYS)
@pytest.mark.parametrize(
    "options",
    [{"window": 1}, {"window": 300}, {"window": 130, "is_chunked": True}, {"softcap": 3.0}, {"sinks": BF16},
     {"sinks": torch.float32, "window": 128, "softcap": 3.0}],
)  # fmt: skip
def test_options_equal_the_definition(head_dim: int, options: dict[str, Any]) -> None:
    if "sinks" in options:
        options = options | {"sinks": 3 * torch.randn(8, device="cuda").to(options["sinks"])}
    check(PROMPTS, head_dim=head_dim, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", KEYS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("growth", [10.0, 30.0, 1000.0])
def test_scores_may_exceed_all_before_by_any_factor(head_dim: int, dtype: torch.dtype, growth: float) -> None:
    check(PROMPTS, head_dim=head_dim, dtype=dtype, growth=growth)
    check(PROMPTS, head_dim=head_dim, dtype=dtype, growth=growth, window=700)
    check(PROMPTS, head_dim=head_dim, dtype=dtype, growth=growth, softcap=300.0, most_parts=1)


@pytest.mark.gpu
def test_there_may_be_many_prompts_and_long_contexts() -> None:
    check([(17 + i % 9, 30 + i) for i in range(200)])
    check([(500, 20000), (3, 5000)])
    check([(500, 20000), (3, 5000)], window=4000)


@pytest.mark.gpu
@pytest.mark.parametrize("most_parts", [1, MAX_PARTS])
def test_the_padding_of_a_graph_costs_no_result(most_parts: int) -> None:
    check([(1, 9), (1, 30), (700, 2100), (40, 300), *[(0, 0)] * 14], most_parts=most_parts)


@pytest.mark.gpu
def test_slots_may_be_mapped_and_what_is_behind_a_window_may_be_anything() -> None:
    batch = bench.attention.make_batch([(40, 300), (150, 150)], seed=0)
    q, k, v = make_inputs(batch, 8, 2, 128, BF16, "cuda")
    expected = attention_torch(q.float(), k.float(), v.float(), batch, scale=0.1, window=50)
    batch.slot_map = torch.randperm(len(k), device="cuda", dtype=torch.int32)
    mapped = [torch.full_like(x[:1], float("nan")).repeat(len(x) + 1, 1, 1) for x in (k, v)]
    for x, where in zip((k, v), mapped, strict=True):
        where[batch.slot_map.long()] = x
    batch.slot_map[batch.slot_table[batch.rows[0], : 300 - 40 + 1 - 50].long()] = len(k)
    found = torch.empty_like(q)
    prefill(q, mapped[0], mapped[1], batch, found, scale=0.1, window=50)
    assert (found.float() - expected).abs().max().item() < TOLERANCE[BF16]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", SHARED_SIZES)
@pytest.mark.parametrize("most_parts", [1, 3, MAX_PARTS])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_keys_that_share_elements_equal_the_definition(head_dim: int, most_parts: int, dtype: torch.dtype) -> None:
    batch = bench.attention.make_batch([(150, 150), (40, 300), (700, 2100), (3, 77)], seed=0)
    lens, value_dim, own_dim = batch.seq_lens, SHARED_SIZES[head_dim][0], head_dim - SHARED_DIM
    starts = lens.cumsum(0, dtype=torch.int32) - lens
    num_slots, num_tokens = int(lens.sum()), int(batch.q_lens_host.sum())
    q = torch.randn(num_tokens, 3, head_dim, device="cuda").to(dtype)
    made = torch.randn(num_slots, 3, own_dim + value_dim, device="cuda").to(dtype)
    shared = torch.randn(num_slots, 512 + SHARED_DIM, device="cuda").to(dtype)[:, -SHARED_DIM:]
    keys, values = torch.cat((made[..., :own_dim], shared[:, None].expand(-1, 3, -1)), dim=2), made[..., own_dim:]
    slots = torch.arange(num_slots, dtype=torch.int32, device="cuda")
    table = torch.stack([slots.roll(-int(start)) for start in starts])
    expected = attention_torch(
        q.float(), keys.float(), values.float(), replace(batch, slot_table=table, rows=torch.arange(4, device="cuda")),
        scale=0.07,
    )  # fmt: skip
    found = torch.full((num_tokens, 3, value_dim), float("nan"), dtype=dtype, device="cuda")
    in_a_row = replace(batch, rows=starts)
    prefill(q, made[..., :own_dim], values, in_a_row, found, scale=0.07, shared_keys=shared, most_parts=most_parts)
    assert (found.float() - expected).abs().max().item() < TOLERANCE[dtype]
