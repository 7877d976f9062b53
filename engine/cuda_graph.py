"""Decode steps as CUDA graphs: one graph a batch size of a ladder, smaller batches padded up to it.

A graph holds everything from the staged plan to the logits; attention reads lengths and slots on the device, so one
capture serves every step of its size. Graphs share one memory pool, the largest captured first.
"""

import bisect
from collections.abc import Callable

import numpy as np
import torch

from engine.batch import ForwardBatch, Stager
from engine.plan import Groups, Plan


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

    def capture_all(self, progress: Callable[[int], None]) -> None:
        for size in reversed(self.sizes):
            self._capture(size, is_shared=False)
            progress(size)

    def replay(self, size: int, batch: ForwardBatch) -> torch.Tensor:
        """Logits [size, V] of the staged batch; overwritten by the next replay of any graph."""
        key = (size, batch.shared is not None)
        if key not in self._graphs:
            self._capture(*key)
        graph, logits = self._graphs[key]
        graph.replay()
        return logits

    def _capture(self, size: int, is_shared: bool) -> None:
        batch, *_ = self._stager.views(_example_plan(size, is_shared), size)
        self._run(batch)  # compiles kernels and lets libraries allocate what they keep
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
        ):
            logits = self._run(batch)
        self._graphs[size, is_shared] = graph, logits


def _example_plan(size: int, is_shared: bool) -> Plan:
    """A decode plan of the graph's shape; a capture reads its sizes, never its contents."""
    ones = np.ones(size, np.int32)
    none = np.zeros(0, np.int32)
    groups = Groups(none, np.zeros(1, np.int32), none, np.zeros(size, np.int32)) if is_shared else None
    return Plan(
        rows=ones,
        q_lens=ones,
        seq_lens=ones,
        input_ids=ones,
        out_cache_loc=ones,
        num_decodes=size,
        samples=np.arange(size, dtype=np.int32),
        epochs=np.zeros(size, np.int64),
        groups=groups,
    )
