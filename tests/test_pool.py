"""What layers keep of tokens: one buffer for equal layers, the views that each asked for, and the bytes of it all."""

import resource
from pathlib import Path

import pytest
import torch

from cache.layout import KV, Latent, bytes_per_token
from cache.pool import CachePool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_keys_and_values_of_equal_layers_are_views_of_one_zeroed_buffer(dtype: torch.dtype) -> None:
    layout = [KV(heads=2, head_dim=4)] * 3
    pool = CachePool(layout, num_slots=8, dtype=dtype, device="cpu")
    (buffer,) = pool.buffers
    assert buffer.float().abs().sum() == 0
    pool[1].v[5] = 1.0
    assert pool[1].k.shape == pool[1].v.shape == (8, 2, 4)
    assert buffer[1, 1, 5].float().sum() == buffer.float().sum() == 8
    assert pool.bytes_per_token == bytes_per_token(layout, dtype) == pool.nbytes // 8


def test_layers_that_keep_different_things_have_buffers_of_their_own_and_the_same_slots() -> None:
    layout = (KV(2, 4), KV(1, 8, v_dim=6), KV(2, 4), Latent(rank=5, rope_dim=3), KV(2, 4, window=16))
    pool = CachePool(layout, num_slots=8, dtype=torch.float32, device="cpu")
    assert len(pool.buffers) == 4
    assert pool[1].k.shape == (8, 1, 8) and pool[1].v.shape == (8, 1, 6)
    assert pool[3].latent.shape == (8, 1, 8)
    for layer in range(len(layout)):
        for i, view in enumerate(pool[layer]):
            view[3] = 10 * layer + i
    for layer in range(len(layout)):
        for i, view in enumerate(pool[layer]):
            assert bool((view[3] == 10 * layer + i).all()) and not view[4].any()
    values = 2 * (2 * 4) + (8 + 6) + 2 * (2 * 4) + (5 + 3) + 2 * (2 * 4)
    assert pool.bytes_per_token == 4 * values == pool.nbytes // 8


def test_released_buffers_come_back_empty() -> None:
    pool = CachePool([KV(2, 4)], num_slots=8, dtype=torch.float32, device="cpu")
    pool[0].k[1] = 1.0
    pool.release()
    assert pool.nbytes == 0
    pool.allocate()
    assert pool.nbytes == 8 * pool.bytes_per_token and not pool[0].k.any()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_pool_on_a_cpu_takes_memory_as_slots_are_written() -> None:
    before = resident_bytes()
    pool = CachePool((KV(4, 64),) * 4, 1 << 16, torch.bfloat16, "cpu")
    assert pool.nbytes == 256 << 20
    pool[3].k[1000:1100] = 1.0
    assert resident_bytes() - before < 32 << 20
    assert not pool[2].v[:100].any()
