"""Decode steps as CUDA graphs: one graph a batch size of a ladder, smaller batches padded up to it.

A graph holds everything from the staged plan to the logits; attention reads lengths and slots on the device, so one
capture serves every step of its size. Graphs share one memory pool, the largest captured first.
"""

import bisect
from collections.abc import Callable

import numpy as np
import torch

from engine.batch import ForwardBatch, Stager
from engine.plan import Plan


def default_batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, then multiples of 8 up to 64, of 16 up to 256, of 32 up to `largest`."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, largest + 1, 32)]
    return [size for size in sizes if size <= largest] or [largest]


class DecodeGraphs:
    def __init__(self, sizes: list[int], stager: Stager, run: Callable[[ForwardBatch], torch.Tensor]) -> None:
        """run: from a batch to logits [B, V]; called during capture only."""
        self.sizes = sorted(sizes)
        self._stager, self._run = stager, run
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def size_for(self, plan: Plan) -> int | None:
        """The graph that serves `plan`, or None: it holds a prompt chunk, or more requests than any graph."""
        if not plan.is_decode or len(plan.rows) > self.sizes[-1] or not len(plan.samples):
            return None
        return self.sizes[bisect.bisect_left(self.sizes, len(plan.rows))]

    def capture_all(self) -> None:
        """The largest first, since the smaller ones then fit into the memory it took."""
        for size in reversed(self.sizes):
            plan = _padding_plan(size)
            self._stager.upload(self._stager.write(plan, size))
            batch, *_ = self._stager.views(plan, size)
            self._capture(size, batch)

    def replay(self, size: int, batch: ForwardBatch) -> torch.Tensor:
        """Logits [size, V] of the staged batch; overwritten by the next replay of any graph."""
        if (size, batch.shared is not None) not in self._graphs:
            self._capture(size, batch)
        graph, logits = self._graphs[size, batch.shared is not None]
        graph.replay()
        return logits

    def _capture(self, size: int, batch: ForwardBatch) -> None:
        """Capture the staged batch's shape. It is also run once, which computes what a replay will compute again."""
        self._run(batch)  # compiles kernels and lets libraries allocate what they keep
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            logits = self._run(batch)
        self._graphs[size, batch.shared is not None] = graph, _without_ownership(logits)


class _Borrowed:
    """Device memory that numpy-like libraries may look at (CUDA array interface, version 3)."""

    def __init__(self, tensor: torch.Tensor) -> None:
        shape = (*tensor.shape[:-1], tensor.shape[-1] * tensor.itemsize)
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": "|u1", "data": (tensor.data_ptr(), False), "version": 3,
        }  # fmt: skip


def _without_ownership(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that does not keep it: the next graph's capture may use it too.

    Logits of a whole ladder of graphs would take gigabytes, and only one graph's are alive at a time.
    """
    return torch.as_tensor(_Borrowed(tensor), device=tensor.device).view(tensor.dtype)


def _padding_plan(size: int) -> Plan:
    """`size` requests that all are padding: row 0, token 0, slot 0."""
    zeros = np.zeros(size, np.int32)
    return Plan(
        rows=zeros,
        q_lens=zeros + 1,
        seq_lens=zeros + 1,
        input_ids=zeros,
        out_cache_loc=zeros,
        num_decodes=size,
        samples=np.arange(size, dtype=np.int32),
        epochs=np.zeros(size, np.int64),
    )
