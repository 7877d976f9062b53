"""The Hopper kernel of single tokens' latents: when it serves; equal to the definition on a GPU alone."""

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is decorated

from bench.attention import Batch, make_batch
from kernels import hopper_latents
from kernels.attention import decodes_torch
from kernels.card import HOPPER_SHARED_BYTES
from kernels.hopper import is_available
from kernels.hopper_latents import (
    ANY_NUMBER,
    MAX_GROUP,
    MAX_REQUESTS,
    RANK,
    ROPE,
    TILE,
    Variant,
    can_decode,
    decode,
    source,
)
from kernels.latents import Expansion, LatentSizes
from kernels.mla import latent_attention_torch
from kernels.triton_mla import latent_attention_triton
from kernels.triton_softmax import Rotated

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
TOLERANCE = 0.02  # of the largest number
KEY_DIM, VALUE_DIM = 16, 24


def make_inputs(
    batch: Batch, num_heads: int, dtype: torch.dtype, cache_dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries absorbed and rotated, the latter a part of longer rows, and a cache."""
    generator = torch.Generator(device).manual_seed(1)
    num_tokens, num_slots = int(batch.q_lens_host.sum()), batch.slot_table.numel()
    shapes = (num_tokens, num_heads, RANK), (num_tokens, num_heads, KEY_DIM + ROPE), (num_slots, 1, RANK + ROPE)
    q, whole, cache = (torch.randn(*shape, generator=generator, device=device) for shape in shapes)
    return q.to(dtype), whole.to(dtype)[..., KEY_DIM:], cache.to(cache_dtype)


def takes(
    batch: Batch, num_heads: int = 16, dtype: torch.dtype = BF16, cache_dtype: torch.dtype = BF16, rank: int = RANK
) -> bool:
    q, q_rope, cache = make_inputs(batch, num_heads, dtype, cache_dtype)
    cache = cache[..., RANK - rank :]
    return can_decode(q[..., :rank], Rotated(q_rope, cache[:, 0, rank:]), cache, batch)


# ---- when it serves ----


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Look like a Hopper GPU to the choice of a kernel; return the requests of each call of the kernel."""
    calls: list[int] = []

    def defined(q: Any, rotated: Rotated, cache: Any, batch: Batch, out: torch.Tensor, *, scale: float) -> None:
        calls.append(batch.num_decodes)
        whole, found = torch.cat((q, rotated.q), dim=2), torch.empty(*q.shape[:2], RANK + ROPE)
        decodes_torch(whole.float(), cache.float(), cache.float(), batch, found, scale=scale)
        out[: batch.num_decodes] = found[: batch.num_decodes, :, :RANK]

    monkeypatch.setattr(hopper_latents, "is_available", lambda device: True)
    monkeypatch.setattr(hopper_latents, "decode", defined)
    return calls


@pytest.mark.parametrize("prompts", [[], [(5, 20)]])
def test_single_tokens_go_to_the_hopper_kernel_and_prompts_do_not(
    hopper: list[int], prompts: list[tuple[int, int]]
) -> None:
    batch = make_batch([(1, 9), (1, 30), *prompts], seed=0, device="cpu")
    q = torch.randn(2 + 5 * len(prompts), 2, KEY_DIM + ROPE).to(FP16)
    cache = torch.randn(batch.slot_table.numel(), 1, RANK + ROPE).to(FP16)
    weight = torch.randn(2 * (KEY_DIM + VALUE_DIM), RANK).mul_(RANK**-0.5).to(FP16)
    expansion = Expansion(weight, 2, LatentSizes(KEY_DIM, VALUE_DIM, RANK))
    found = latent_attention_triton(q, cache, expansion, batch, scale=0.1)
    wanted = latent_attention_torch(q, cache, expansion, batch, scale=0.1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
    assert hopper == [2]


def test_it_takes_caches_of_sixteen_or_eight_bits(hopper: Any) -> None:
    batch = make_batch([(1, 9)], seed=0, device="cpu")
    assert takes(batch) and takes(batch, MAX_GROUP, FP16, FP16) and takes(batch, 1, BF16, FP8)


def test_it_leaves_what_it_cannot_do_to_triton(hopper: Any) -> None:
    batch = make_batch([(1, 9)], seed=0, device="cpu")
    assert not takes(batch, MAX_GROUP + 1), "more results than registers"
    assert not takes(batch, dtype=torch.float32, cache_dtype=torch.float32)
    assert not takes(batch, cache_dtype=torch.float8_e5m2)
    assert not takes(batch, dtype=FP16, cache_dtype=BF16)
    assert not takes(batch, rank=256), "MiniCPM3's"
    assert not takes(make_batch([(1, 9), (1, 9)], groups=[(4, [0, 1])], seed=0, device="cpu")), "a shared prefix"


def test_it_leaves_more_requests_than_a_block_lists_to_triton(hopper: Any) -> None:
    batch = make_batch([(1, 1)], seed=0, device="cpu")
    assert takes(replace(batch, num_decodes=MAX_REQUESTS)) and not takes(replace(batch, num_decodes=MAX_REQUESTS + 1))


def test_a_cpu_has_other_kernels() -> None:
    assert not takes(make_batch([(1, 9)], seed=0, device="cpu"))


@pytest.mark.parametrize(("prompts", "num_fresh"), [([], 3), ([(40, 100)], ANY_NUMBER)])
def test_what_a_request_of_the_same_step_writes_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, prompts: list[tuple[int, int]], num_fresh: int
) -> None:
    launched: list[Any] = []
    kernel = SimpleNamespace(launch=lambda _blocks, _split, _bytes, args, _device: launched.extend(args))
    monkeypatch.setattr(hopper_latents, "_kernel", lambda *_: kernel)
    monkeypatch.setattr(hopper_latents, "card_of", lambda _device: SimpleNamespace(num_sms=4))
    monkeypatch.setattr(hopper_latents, "merge_parts", lambda *_, **_options: None)
    batch = make_batch([(1, 129), (1, 130), (1, 131), *prompts], seed=0, device="cpu")
    q, q_rope, cache = make_inputs(batch, 4, BF16, BF16)
    decode(q, Rotated(q_rope, cache[:, 0, RANK:]), cache, batch, torch.empty_like(q), scale=0.1)
    assert [args.num_fresh for args in launched] == [num_fresh]


# ---- what it is compiled for ----


@pytest.mark.parametrize("is_bytes", [False, True])
@pytest.mark.parametrize("group", [1, 16, 20, MAX_GROUP])
def test_a_block_fits_into_a_multiprocessor(group: int, is_bytes: bool) -> None:
    variant = Variant(group, BF16, is_bytes, False)
    assert variant.shared_bytes <= HOPPER_SHARED_BYTES
    assert TILE % (variant.loaders // 8) == 0, "eight threads load a row"


@pytest.mark.parametrize(
    ("dtype", "is_bytes", "short"), [(BF16, False, "bf16"), (FP16, False, "f16"), (BF16, True, "f16")]
)
def test_the_source_names_the_instruction_of_its_heads(dtype: torch.dtype, is_bytes: bool, short: str) -> None:
    text = source(Variant(20, dtype, is_bytes, False))
    assert f'"m64n24k16.f32.{short}.{short}"' in text
    assert '"+f"(d[11])' in text and '"+f"(d[12])' not in text


# ---- is it right? ----

LENS = {
    "one": [700],
    "one short": [3],
    "few": [150, 9000, 64, 1],
    "some": [150, 40, 300, 64, 1, 129, 5000, 2000],
    "many": [1 + 37 * i % 1500 for i in range(300)],
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", LENS)
@pytest.mark.parametrize(
    ("num_heads", "dtype", "cache_dtype"),
    [
        (16, BF16, BF16), (20, BF16, BF16), (MAX_GROUP, FP16, FP16), (5, BF16, BF16), (20, BF16, FP8),
        (16, FP16, FP8), (MAX_GROUP, BF16, FP8),
    ],
)  # fmt: skip
def test_single_tokens_equal_the_definition(
    name: str, num_heads: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    if not is_available(torch.device("cuda")):
        pytest.skip("not a Hopper GPU")
    batch = make_batch([(1, seq_len) for seq_len in LENS[name]], seed=0)
    q, q_rope, cache = make_inputs(batch, num_heads, dtype, cache_dtype, "cuda")
    whole = torch.cat((q, q_rope), dim=2).float()
    wanted = torch.empty_like(whole)
    decodes_torch(whole, cache.float(), cache.float(), batch, wanted, scale=0.1)
    wanted = wanted[..., :RANK]
    is_token = torch.zeros(len(cache), dtype=torch.bool, device="cuda")
    for row, seq_len in zip(batch.rows.tolist(), batch.seq_lens.tolist(), strict=True):
        is_token[batch.slot_table[row, :seq_len].long()] = True
    cache.view(torch.uint8 if cache.itemsize == 1 else torch.int16)[~is_token] = 0x7F if cache.itemsize == 1 else 0x7FFF
    for _ in range(2):  # again with the arrival counters that the run before left
        found = torch.full_like(q, float("nan"))
        decode(q, Rotated(q_rope, cache[:, 0, RANK:]), cache, batch, found, scale=0.1)
        assert (found.float() - wanted).abs().max() < TOLERANCE * wanted.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("num_requests", [3, 40])
def test_padding_stays_as_it_is(num_requests: int) -> None:
    if not is_available(torch.device("cuda")):
        pytest.skip("not a Hopper GPU")
    batch = make_batch([(1, 200)] * num_requests, seed=0)
    q, q_rope, cache = make_inputs(batch, 16, BF16, BF16, "cuda")
    for num_real in (1, 0):
        batch.seq_lens[num_real:] = 0
        found = torch.full_like(q, float("nan"))
        decode(q, Rotated(q_rope, cache[:, 0, RANK:]), cache, batch, found, scale=0.1)
        assert found[num_real:].isnan().all() and found[:num_real].isfinite().all()
