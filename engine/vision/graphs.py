"""CUDA graphs of a tower: pictures of a shape that comes again cost one launch instead of a thousand."""

import gc
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)

Inputs = dict[str, torch.Tensor]

MAX_GRAPHS = 16
MIN_TIMES = 2  # that a shape comes before it has a graph: to capture one takes as long as a few runs
MAX_COUNTED = 1024  # shapes


@dataclass(slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Inputs  # that it reads
    arguments: dict[str, Any]  # made of them, and of what else is the same whenever it is replayed
    made: torch.Tensor  # where it writes


class TowerGraphs:
    """Run a tower, by a graph where one was captured for inputs like these. On one thread, one stream: the current."""

    def __init__(
        self,
        arguments_of: Callable[[Inputs], dict[str, Any]],
        run: Callable[[dict[str, Any]], torch.Tensor],
        on_host: frozenset[str],
    ) -> None:
        """arguments_of: what the tower is called with. run: calls it.

        Inputs are on the device but for those `on_host`, on whose values the tower's work depends.
        """
        self._arguments_of, self._run, self._on_host = arguments_of, run, on_host
        self._times: Counter[Hashable] = Counter()
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()  # least recently used first
        self._pool = torch.cuda.graph_pool_handle()
        self._can_capture = True

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """Return what the tower makes of `inputs`, without waiting for it."""
        key = self._key(inputs)
        if key not in self._captured and not (self._is_worth_it(key) and self._capture(key, inputs)):
            return self._run(self._arguments_of(inputs))
        self._captured.move_to_end(key)
        captured = self._captured[key]
        for name in inputs.keys() - self._on_host:
            captured.inputs[name].copy_(inputs[name])
        captured.graph.replay()
        return captured.made.clone()  # the next graph writes to the same memory

    def clear(self) -> None:
        """Forget the graphs: they hold the addresses of weights."""
        self._captured.clear()

    def _key(self, inputs: Inputs) -> Hashable:
        return tuple(
            (name, tuple(one.flatten().tolist()) if name in self._on_host else one.shape)
            for name, one in sorted(inputs.items())
        )

    def _is_worth_it(self, key: Hashable) -> bool:
        if len(self._times) >= MAX_COUNTED:
            self._times.clear()
        self._times[key] += 1
        return self._can_capture and self._times[key] >= MIN_TIMES

    def _capture(self, key: Hashable, inputs: Inputs) -> bool:
        """Capture a graph, in the place of the one used least recently if there are many. False: it cannot be done."""
        kept = {name: one.clone() for name, one in inputs.items()}
        arguments, graph = self._arguments_of(kept), torch.cuda.CUDAGraph()
        was_enabled = gc.isenabled()
        gc.disable()  # a collection that destroys a graph breaks a capture
        try:
            # Not by torch.cuda.graph, which waits for all streams and collects garbage first.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                made = self._run(arguments)
            finally:
                graph.capture_end()
        except RuntimeError as error:
            logger.warning("towers run without CUDA graphs: %s", error)
            self._can_capture = False
            return False
        finally:
            if was_enabled:
                gc.enable()
        while len(self._captured) >= MAX_GRAPHS:
            self._captured.popitem(last=False)
        self._captured[key] = _Captured(graph, kept, arguments, made)
        return True
