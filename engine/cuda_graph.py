"""Decode steps as CUDA graphs: one graph a batch size of a ladder, smaller batches padded up to it.

A graph holds everything from the staged plan to the most likely tokens; attention reads lengths and slots on the
device, so one capture serves every step of its size. Graphs share one memory pool, the largest captured first.
"""

import bisect
from collections.abc import Callable

import numpy as np
import torch

from engine.batch import Shape, StagedBatch, Stager
from engine.plan import Plan


def default_batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, then steps of an eighth to a quarter: padding costs little, and so does capturing."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, largest + 1, 64)]
    return [size for size in sizes if size <= largest] or [largest]


class DecodeGraphs:
    def __init__(
        self, sizes: list[int], stager: Stager, run: Callable[[StagedBatch], tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """run: from a staged batch to (logits [B, V], their argmax [B]); called during capture only."""
        self.sizes = sorted(sizes)
        self._stager, self._run = stager, run
        self._graphs: dict[Shape, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor, StagedBatch]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def shape_for(self, plan: Plan) -> Shape | None:
        """Of the graph that serves `plan`, or None: it holds a prompt chunk, or more requests than any graph."""
        num_requests = len(plan.rows)
        if not plan.is_decode or num_requests > self.sizes[-1] or len(plan.samples) < num_requests:
            return None
        size = self.sizes[bisect.bisect_left(self.sizes, num_requests)]
        return Shape.of_decodes(size, plan.groups is not None)

    def capture_all(self) -> None:
        """The largest first, since the smaller ones then fit into the memory it took."""
        for size in reversed(self.sizes):
            plan = _padding_plan(size)
            shape = Shape.of_decodes(size, has_groups=False)
            self._stager.upload(self._stager.write(plan, shape))
            self._capture(shape, plan)

    def replay(self, shape: Shape, plan: Plan) -> tuple[torch.Tensor, torch.Tensor, StagedBatch]:
        """(logits, their argmax, the batch) of the staged plan; overwritten by the next replay of any graph."""
        if shape not in self._graphs:
            self._capture(shape, plan)
        graph, logits, greedy, staged = self._graphs[shape]
        graph.replay()
        return logits, greedy, staged

    def _capture(self, shape: Shape, plan: Plan) -> None:
        """Capture the staged plan's shape. It is also run once, which computes what a replay will compute again."""
        staged = self._stager.views(shape, plan)
        self._run(staged)  # compiles kernels and lets libraries allocate what they keep
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            logits, greedy = self._run(staged)
        self._graphs[shape] = graph, _without_ownership(logits), _without_ownership(greedy), staged


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
