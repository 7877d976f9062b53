"""Sums through each other's memory: processes whose shared memory stands for the GPUs', the kernel interpreted."""

from multiprocessing import get_context
from multiprocessing.connection import Connection

import pytest
import torch

from kernels.all_reduce import all_reduce_torch
from kernels.peer_memory import PeerMemory

pytest.importorskip("triton")
MAX_BYTES = 8192


def addend(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float32).to(dtype)


def work(
    rank: int, buffers: list[torch.Tensor], sums: list[tuple[tuple[int, ...], torch.dtype]], pipe: Connection
) -> None:
    """Add up as one rank, one sum after the other as fast as it can: that they come right is the protocol's doing."""
    import kernels.triton_all_reduce as module  # with the interpreter, which conftest has asked for

    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers])
    epochs = torch.zeros(PeerMemory.num_programs(MAX_BYTES), dtype=torch.int32)
    memory = PeerMemory(rank, len(buffers), MAX_BYTES, addresses, epochs)
    for shape, dtype in sums:
        pipe.send(module.all_reduce_triton(addend(rank, shape, dtype), memory).float().numpy())


def test_every_rank_gets_the_same_sum_of_all_time_after_time() -> None:
    size = 3
    sums = [((1, 128), torch.bfloat16), ((3, 500), torch.float32), ((2, 6), torch.float16), ((4, 512), torch.bfloat16)]
    sums = sums * 3
    context = get_context("spawn")
    words = PeerMemory.buffer_words(size, MAX_BYTES)
    buffers = [torch.zeros(words, dtype=torch.int64).share_memory_() for _ in range(size)]
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(rank, buffers, sums, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    try:
        for shape, dtype in sums:
            expected = all_reduce_torch([addend(rank, shape, dtype) for rank in range(size)]).float()
            assert all(pipe.poll(60) for pipe in pipes), "a sum did not end"
            first, *others = [torch.from_numpy(pipe.recv()) for pipe in pipes]
            assert all(torch.equal(first, other) for other in others)
            # The interpreter truncates where the device rounds.
            torch.testing.assert_close(first, expected, rtol=torch.finfo(dtype).eps, atol=0)
    finally:
        for process in processes:
            process.kill()


def test_what_does_not_fit_or_is_of_another_kind_is_not_for_peer_memory() -> None:
    memory = PeerMemory(0, 2, MAX_BYTES, torch.zeros(2, dtype=torch.int64), torch.zeros(4, dtype=torch.int32))
    assert memory.can_sum(torch.zeros(1, MAX_BYTES // 2, dtype=torch.bfloat16))
    assert not memory.can_sum(torch.zeros(1, MAX_BYTES // 2 + 2, dtype=torch.bfloat16))
    assert not memory.can_sum(torch.zeros(1, 3, dtype=torch.bfloat16)), "half a word"
    assert not memory.can_sum(torch.zeros(4, dtype=torch.int32))
    assert not memory.can_sum(torch.zeros(4, 4).t())
    assert not memory.can_sum(torch.zeros(0))
