"""Steps as CUDA graphs: one a size of a ladder, smaller steps padded up to it.

A graph holds everything from the staged plan to the most likely tokens; attention reads lengths and slots on the
device, so one capture serves every step of its size. Decode steps have a fine ladder. Steps with prompt chunks beside
them have ladders too, the coarser the more they hold, up to the size at which the device takes clearly longer for the
kernels than the host to launch them one by one. All graphs share one memory pool, the largest captured first.
"""

import bisect
import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from engine.schedule.plan import Groups, Plan
from engine.step.batch import StagedBatch, Stager
from engine.step.fields import StepShape
from kernels.latents import MAX_ABSORBED_TOKENS, graph_room
from kernels.one_token import LONG_CONTEXT


class Ladder(NamedTuple):
    """List the sizes of graphs for steps with prompt chunks."""

    num_decodes: int  # at most
    num_prompts: int  # chunks at most
    num_tokens: tuple[int, ...]  # of all chunks, ascending
    has_groups: bool = False  # for steps whose decodes share prefixes


ALONE_TOKENS = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 2048)
FINE_TOKENS = tuple(range(64, 704, 64))
LONG_TOKENS = (*range(768, 1280, 128), 1280, 1536, 1792, 2048)
COARSE_TOKENS = (128, 256, 512, 1024, 2048, 4096, 6144, 8192)
# The first that fits serves.
LADDERS = (
    Ladder(0, 16, ALONE_TOKENS),
    Ladder(32, 16, tuple(size - 32 for size in FINE_TOKENS)),  # with the decodes, whole tiles of the products
    Ladder(8, 16, tuple(size - 8 for size in LONG_TOKENS)),  # there a decode that is none takes as long as a token
    Ladder(32, 16, tuple(size - 32 for size in LONG_TOKENS)),
    Ladder(64, 64, (128, 256, 384, 512, 640, 768, 1024)),  # runs of forced tokens, mostly
    Ladder(256, 72, COARSE_TOKENS),
    Ladder(512, 72, COARSE_TOKENS[2:]),
    Ladder(1024, 72, (512, 2048, 8192)),
    Ladder(512, 72, COARSE_TOKENS[2:], has_groups=True),
    Ladder(1024, 72, (512, 2048, 8192), has_groups=True),
)
MAX_PROMPTS = max(ladder.num_prompts for ladder in LADDERS)
MAX_FEW_PROMPTS, MAX_FEW_PROMPTS_TOKENS = LADDERS[0].num_prompts, LADDERS[0].num_tokens[-1]
# Tokens times bytes of weights, above which a step's kernels need no graph: to launch a layer's takes the host some
# 0.5 ms, which are then hidden by computing at least three times as long.
MAX_GRAPH_WORK = 3.4e13
SAMPLE_MULTIPLE = 64  # of the tokens that a step without a graph samples
SAME_TIME = 1.02  # times that differ by less are equal
TIMED_REPLAYS = 3  # of a graph: the first also uploads it, which once made 16 tokens seem slower than 32
TIMED_LONG_REPLAYS, LONG_STEP_TOKENS = 2, 512  # of so many tokens: they take most of a start's replays, and vary less
GROUPED_SIZE_RATIO = 1.3  # of neighbours on the ladder of decode steps with shared prefixes


def default_batch_sizes(largest: int) -> list[int]:
    """Return 1, 2, 4, then steps of an eighth to a quarter: padding costs little, and so does capturing."""
    fine = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32)]
    sizes = [*fine, *range(256, 512, 64), *range(512, largest + 1, 128)]
    return [size for size in sizes if size <= largest] or [largest]


class GraphSizes(NamedTuple):
    """Limit the steps that may be captured."""

    batch_sizes: list[int]  # of decode steps
    max_prompt_tokens: int  # of a step that has any
    max_tokens: int  # of all of a step
    max_requests: int  # that run at once
    has_latents: bool = False  # the cache: what prompts' contexts may be together depends on the graph


class StepGraphs:
    def __init__(
        self,
        sizes: GraphSizes,
        stager: Stager,
        run: Callable[[StagedBatch], tuple[torch.Tensor, torch.Tensor]],
        meet: Callable[[], None],
        *,
        has_windows: bool = False,
        has_rope: bool = False,
        has_feature_rows: bool = False,
    ) -> None:
        """run: from a staged batch to (logits [S, V], their argmax [S]). meet: `Communicator.meet`.

        has_windows, has_rope: of all steps, has_feature_rows: of those with prompts, see `StepShape`.
        """
        self._has_latents = sizes.has_latents
        self._has_feature_rows = has_feature_rows
        self._decode_shape = functools.partial(_decode_shape, has_windows=has_windows, has_rope=has_rope)
        self._prefill_shape = functools.partial(
            _prefill_shape, has_windows=has_windows, has_rope=has_rope, has_feature_rows=has_feature_rows
        )
        self.batch_sizes = sorted(sizes.batch_sizes)
        self.grouped_sizes = _coarse(self.batch_sizes)
        self.ladders = fitting_ladders(*sizes[1:])
        self._stager, self._run, self._meet = stager, run, meet
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor, StagedBatch]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._prompt_sizes: dict[tuple[int, bool], tuple[list[int], int]] = {}

    def shape_for(self, plan: Plan) -> StepShape | None:
        """Return the shape of the graph that serves `plan`. None: it is too large, or asks for what no graph does."""
        if plan.pooled or (plan.features and not self._takes_features(plan)):
            return None
        num_decodes, num_samples = plan.num_decodes, len(plan.samples)
        if plan.is_decode:
            if num_decodes > self.batch_sizes[-1] or num_samples < num_decodes:
                return None
            sizes = self.batch_sizes if plan.groups is None else self.grouped_sizes
            size = sizes[bisect.bisect_left(sizes, num_decodes)]
            is_long = size == 1 and plan.groups is None and plan.seq_lens[0] > LONG_CONTEXT
            return self._decode_shape(size, plan.groups is not None, is_long=bool(is_long))
        if not num_samples or plan.prompt_logprobs:
            return None
        num_prompts, num_tokens = len(plan.rows) - num_decodes, plan.num_prefill_tokens
        for ladder in self.ladders:
            if (
                num_decodes <= ladder.num_decodes
                and num_prompts <= ladder.num_prompts
                and num_tokens <= ladder.num_tokens[-1]
                and ladder.has_groups == (plan.groups is not None)
            ):
                size = ladder.num_tokens[bisect.bisect_left(ladder.num_tokens, num_tokens)]
                return self._prefill_shape(ladder, size) if self._has_room(size, plan) else None
        return None

    def _has_room(self, num_tokens: int, plan: Plan) -> bool:
        """Return whether the contexts of the prompts in `plan` fit into a graph for `num_tokens` of them."""
        room = graph_room(num_tokens) if self._has_latents else 0
        return not room or int(plan.seq_lens[plan.num_decodes :].sum()) <= room

    def is_slow_way(self, plan: Plan, shape: StepShape) -> bool:
        """Return whether the prompts in `plan` take more a token in the graph of `shape` than longer ones would."""
        return self._has_latents and not plan.is_decode and not graph_room(shape.num_prefill_tokens)

    def prompt_sizes(self, num_decodes: int, has_groups: bool) -> tuple[list[int], int]:
        """Return what `unpadded_sizes` does of these graphs, which must not be written to, and what chunks keep to.

        That is what `largest_size` returns; 0 where longer chunks take less a token than graphs do.
        """
        key = num_decodes, has_groups
        if key not in self._prompt_sizes:
            sizes = unpadded_sizes(self.ladders, *key, self._stager.max_tokens)
            largest = largest_size(self.ladders, *key)
            self._prompt_sizes[key] = sizes, 0 if self._has_latents and not graph_room(largest) else largest
        return self._prompt_sizes[key]

    def _takes_features(self, plan: Plan) -> bool:
        """Return whether the features of `plan` have rows in a graph's step."""
        return self._has_feature_rows and not plan.is_decode and plan.seen_until is None

    def eager_shape(self, plan: Plan) -> StepShape:
        """Return the shape of a step that no graph serves."""
        shape = StepShape.of(plan)
        if not self.ladders or plan.is_decode or plan.pooled:
            return shape
        return rounded_up(shape, self._stager.max_tokens)

    def eager_sizes(self) -> list[int]:
        """Return the numbers of tokens of steps that are too large for a graph."""
        sizes: list[int] = []
        if self.ladders:
            largest = max(ladder.num_tokens[-1] for ladder in self.ladders)
            if self._has_latents:  # behind long contexts smaller ones have no graph either
                largest = min(largest, MAX_ABSORBED_TOKENS)
            while (size := _round_up(largest + 1)) <= self._stager.max_tokens:
                sizes.append(largest := size)
        return sizes

    def _families(self) -> list[tuple[Sequence[int], Callable[[int], StepShape]]]:
        """Return (sizes, the shape of one) of each ladder, of one long request, of decodes with groups and without."""
        has_long = self.batch_sizes[0] == 1 and self._stager.slot_table.shape[1] > LONG_CONTEXT
        return [
            *((ladder.num_tokens, functools.partial(self._prefill_shape, ladder)) for ladder in self.ladders),
            ([1] if has_long else [], functools.partial(self._decode_shape, has_groups=False, is_long=True)),
            (self.grouped_sizes, functools.partial(self._decode_shape, has_groups=True)),
            (self.batch_sizes, functools.partial(self._decode_shape, has_groups=False)),
        ]

    def run_all(self) -> None:
        """Run an example of each shape, without a graph."""
        for sizes, shape_of in self._families():
            for size in sizes:
                self._run(self._example(shape_of(size)))
                torch.cuda.synchronize()  # the staging buffer is used again

    def capture_all(self) -> None:
        """Capture all shapes, after `run_all`. The largest first: the smaller ones then fit into the memory it took."""
        *of_ladders, of_long, of_grouped, of_decodes = self._families()
        for i, family in reversed(list(enumerate(of_ladders))):
            self.ladders[i] = self.ladders[i]._replace(num_tokens=tuple(self._capture_sizes(*family)))
        self._capture_sizes(*of_long)
        self.grouped_sizes = self._capture_sizes(*of_grouped)
        self.batch_sizes = self._capture_sizes(*of_decodes)

    def _capture_sizes(self, sizes: Sequence[int], shape_of: Callable[[int], StepShape]) -> list[int]:
        """Capture all `sizes` and return those to use.

        The graphs of all stay: each rank measures for itself, and what rank 0 finds counts.
        """
        took_ms = [self._capture_padding(shape_of(size)) for size in reversed(sizes)]
        return useful_sizes(sizes, took_ms[::-1])

    def replay(self, shape: StepShape) -> tuple[torch.Tensor, torch.Tensor, StagedBatch]:
        """Replay the staged plan: (logits, their argmax, the batch), overwritten by the next replay of any graph."""
        graph, logits, greedy, staged = self._graphs[shape]
        graph.replay()
        return logits, greedy, staged

    def _capture_padding(self, shape: StepShape) -> float:
        """Capture a step of padding and return the milliseconds of the fastest of a few replays."""
        self._capture(shape, self._example(shape))
        self._meet()  # else the time would be that of waiting for the others
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        least_ms = float("inf")
        is_long = shape.num_decodes + shape.num_prefill_tokens >= LONG_STEP_TOKENS
        for _ in range(TIMED_LONG_REPLAYS if is_long else TIMED_REPLAYS):  # as many on each rank
            begin.record()
            self._graphs[shape][0].replay()
            end.record()
            end.synchronize()
            least_ms = min(least_ms, begin.elapsed_time(end))
        return least_ms

    def _example(self, shape: StepShape) -> StagedBatch:
        plan = _example_plan(shape)
        self._stager.upload(self._stager.write(plan, shape))
        return self._stager.views(shape, plan, is_for_graph=True)

    def _capture(self, shape: StepShape, staged: StagedBatch) -> None:
        """Capture the staged plan's shape."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with (
            _no_garbage_collection(),
            torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
        ):
            logits, greedy = self._run(staged)
        self._graphs[shape] = graph, _without_ownership(logits), _without_ownership(greedy), staged


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep the collector from destroying a CUDA graph (an earlier engine's), which would break a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _coarse(batch_sizes: list[int]) -> list[int]:
    """Return the largest of them, and those that are well below the next one kept."""
    kept = batch_sizes[-1:]
    for size in reversed(batch_sizes):
        if size * GROUPED_SIZE_RATIO <= kept[0]:
            kept.insert(0, size)
    return kept


def useful_sizes(sizes: Sequence[int], took_ms: Sequence[float]) -> list[int]:
    """Return those of `sizes`, ascending, to which no larger one is preferable.

    For some sizes libraries choose kernels that are slower than those for more.
    """
    kept: list[int] = []
    least_ms = float("inf")
    for size, ms in zip(reversed(sizes), reversed(took_ms), strict=True):
        if ms < least_ms * SAME_TIME:
            kept.insert(0, size)
            least_ms = min(least_ms, ms)
    return kept


def fitting_ladders(
    max_prompt_tokens: int, max_tokens: int, max_requests: int, has_latents: bool = False
) -> list[Ladder]:
    """Return those of LADDERS that can be of use, cut to the limits: see `StepGraphs`."""
    ladders: list[Ladder] = []
    for ladder in LADDERS:
        num_decodes = min(ladder.num_decodes, max_requests)
        limit = min(max_prompt_tokens, max_tokens - num_decodes)
        if has_latents and ladder.num_prompts > MAX_FEW_PROMPTS:
            limit = min(limit, MAX_ABSORBED_TOKENS)  # keys are made for few prompts at a time
        num_tokens = tuple(size for size in ladder.num_tokens if size <= limit)
        is_covered = any(
            smaller.num_decodes >= num_decodes
            and smaller.num_prompts >= min(ladder.num_prompts, max_requests)
            and smaller.num_tokens[-1:] >= num_tokens[-1:]
            and smaller.has_groups == ladder.has_groups
            for smaller in ladders
        )
        if num_tokens and not is_covered:
            ladders.append(ladder._replace(num_decodes=num_decodes, num_tokens=num_tokens))
    return ladders


def unpadded_sizes(ladders: Sequence[Ladder], num_decodes: int, has_groups: bool, max_tokens: int) -> list[int]:
    """Return the numbers of prompt tokens, ascending, of steps that are not padded, with a graph or without one.

    num_decodes, has_groups: of the step's other tokens. max_tokens: of all of a step.
    """
    sizes: list[int] = []
    for ladder in _serving(ladders, num_decodes, has_groups):
        sizes += [size for size in ladder.num_tokens if not sizes or size > sizes[-1]]
    num_tokens = num_decodes + (sizes[-1] if sizes else 0)
    while ladders and (num_tokens := _round_up(num_tokens + 1)) <= max_tokens:
        sizes.append(num_tokens - num_decodes)
    return sizes


def largest_size(ladders: Sequence[Ladder], num_decodes: int, has_groups: bool) -> int:
    """Return the most prompt tokens beside `num_decodes` others that a graph has; 0: there is none."""
    return max((ladder.num_tokens[-1] for ladder in _serving(ladders, num_decodes, has_groups)), default=0)


def _serving(ladders: Sequence[Ladder], num_decodes: int, has_groups: bool) -> list[Ladder]:
    return [ladder for ladder in ladders if num_decodes <= ladder.num_decodes and has_groups == ladder.has_groups]


def rounded_up(shape: StepShape, max_tokens: int) -> StepShape:
    """Return the shape of a step with prompts as one of few sizes.

    For each number of rows libraries look for a kernel anew, and load it at its first use, which waits until the device
    is idle: they do so at the start for these.
    """
    num_tokens = min(_round_up(shape.num_decodes + shape.num_prefill_tokens), max_tokens)
    num_samples = -(-shape.num_samples // SAMPLE_MULTIPLE) * SAMPLE_MULTIPLE
    return shape._replace(num_prefill_tokens=num_tokens - shape.num_decodes, num_samples=num_samples)


def _round_up(num_tokens: int) -> int:
    """Return the next of eight sizes between powers of 2."""
    step = 1 << max(num_tokens.bit_length() - 4, 0)
    return -(-num_tokens // step) * step


def _decode_shape(
    size: int, has_groups: bool, has_windows: bool, has_rope: bool, *, is_long: bool = False
) -> StepShape:
    return StepShape(size, 0, 0, size, has_groups, has_windows, has_rope, is_long=is_long)


def _prefill_shape(
    ladder: Ladder, num_tokens: int, has_windows: bool, has_rope: bool, has_feature_rows: bool
) -> StepShape:
    return StepShape(
        ladder.num_decodes, ladder.num_prompts, num_tokens, ladder.num_decodes + ladder.num_prompts, ladder.has_groups,
        has_windows, has_rope, has_feature_rows=has_feature_rows,
    )  # fmt: skip


class _Borrowed:
    """Show device memory to numpy-like libraries (CUDA array interface, version 3)."""

    def __init__(self, tensor: torch.Tensor) -> None:
        shape = (*tensor.shape[:-1], tensor.shape[-1] * tensor.itemsize)
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": "|u1", "data": (tensor.data_ptr(), False), "version": 3,
        }  # fmt: skip


def _without_ownership(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same memory as a tensor that does not keep it: the next graph's capture may use it too.

    Logits of a whole ladder of graphs would take gigabytes, and only one graph's are alive at a time.
    """
    return torch.as_tensor(_Borrowed(tensor), device=tensor.device).view(tensor.dtype)


def _example_plan(shape: StepShape) -> Plan:
    """Return a plan that fills `shape` with padding: row 0, token 0, slot 0, no groups. One prompt has all tokens.

    Which kernels a graph has depends on lengths only where its shape says so: they are short or long accordingly.
    """
    num_decodes, num_prompts = shape.num_decodes, min(shape.num_prefills, 1)
    lens = np.array([1] * num_decodes + [shape.num_prefill_tokens] * num_prompts, np.int32)
    num_tokens = num_decodes + shape.num_prefill_tokens
    return Plan(
        rows=np.zeros(num_decodes + num_prompts, np.int32),
        q_lens=lens,
        seq_lens=lens + np.int32(LONG_CONTEXT) if shape.is_long else lens,
        input_ids=np.zeros(num_tokens, np.int32),
        out_cache_loc=np.zeros(num_tokens, np.int32),
        num_decodes=num_decodes,
        samples=np.arange(num_decodes + num_prompts, dtype=np.int32),
        epochs=np.zeros(num_decodes + num_prompts, np.int64),
        groups=_no_groups() if shape.has_groups else None,
        window_cache_loc=np.zeros(num_tokens, np.int32) if shape.has_windows else None,
        rope=np.zeros((3, num_tokens), np.int32) if shape.has_rope else None,
    )


def _no_groups() -> Groups:
    empty = np.zeros(0, np.int32)
    return Groups(prefix_lens=empty, cu_members=np.zeros(1, np.int32), members=empty, own_starts=empty)
