"""The fields of a staged step: one table says where each lies, how it is padded, and in which form ranks get it.

All fields are int32 and lie one behind the other in one buffer, so that a step is one copy to the device and one
message to another rank. Padding is zeros: of row 0, token 0, slot 0, length 0. To add a field, add a line to `FIELDS`,
an attribute of the same name to the dataclass that shall have it (see engine.step.batch), and write its values in
`Stager.write`.
"""

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from engine.schedule.plan import Plan

ALIGNMENT = 4  # int32 numbers: fields start at the 16 bytes of a wide load
Array = TypeVar("Array", np.ndarray, torch.Tensor)


class StepShape(NamedTuple):
    """Give the sizes of a staged step. Where they are rounded up, as for a captured graph, the rest is padding.

    A key of dictionaries at each step, so a tuple: those hash fastest.
    """

    num_decodes: int
    num_prefills: int
    num_prefill_tokens: int
    num_samples: int
    has_groups: bool
    has_windows: bool = False  # layers with a window have slots of their own
    has_rope: bool = False  # rotations have three axes
    has_spans: bool = False  # some tokens see tokens behind them
    num_features: int = 0  # tokens that get a picture's features as their vectors
    has_feature_rows: bool = False  # each token says whether it gets one, in a graph
    is_long: bool = False  # the only token sees more than `kernels.one_token` is for, in a graph

    @property
    def num_requests(self) -> int:
        return self.num_decodes + self.num_prefills

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.num_prefill_tokens

    @property
    def is_decode(self) -> bool:
        """Return whether each request has one token, and each is sampled."""
        return not self.num_prefills and self.num_samples == self.num_decodes

    @classmethod
    def of(cls, plan: Plan) -> "StepShape":
        num_prefills = len(plan.rows) - plan.num_decodes
        has_groups, has_windows = plan.groups is not None, plan.window_cache_loc is not None
        num_samples, features = len(plan.samples), plan.features
        num_features = sum(len(part.tokens) for part in features) if features else 0
        return cls(
            plan.num_decodes, num_prefills, plan.num_prefill_tokens, num_samples, has_groups, has_windows,
            plan.rope is not None, plan.seen_until is not None, num_features,
        )  # fmt: skip


class Size(enum.IntEnum):
    """Name the quantity that says how many numbers a field has: an index into `counts_of`."""

    REQUESTS = 0  # B
    REQUEST_BOUNDS = 1  # B + 1
    TOKENS = 2  # T
    SAMPLES = 3  # S
    GROUPS = 4  # G
    GROUP_BOUNDS = 5  # G + 1
    FEATURES = 6  # F


def counts_of(shape: StepShape) -> tuple[int, ...]:
    """Return the quantities of `Size`, in its order."""
    num_requests = shape.num_requests
    num_groups = max(num_requests // 2, 1)  # a group has two members at least
    return (
        num_requests, num_requests + 1, shape.num_tokens, shape.num_samples, num_groups, num_groups + 1,
        shape.num_features,
    )  # fmt: skip


def _has_groups(shape: StepShape) -> bool:
    return shape.has_groups


def _has_windows(shape: StepShape) -> bool:
    return shape.has_windows


def _has_rope(shape: StepShape) -> bool:
    return shape.has_rope


def _has_spans(shape: StepShape) -> bool:
    return shape.has_spans


def _has_features(shape: StepShape) -> bool:
    return shape.num_features > 0


def _has_feature_rows(shape: StepShape) -> bool:
    return shape.has_feature_rows


@dataclass(frozen=True, slots=True)
class Field:
    """Describe one array of a staged step: [size], or [width, size]."""

    name: str
    size: Size
    width: int = 1
    when: Callable[[StepShape], bool] | None = None  # steps of other shapes do not have it; None: all do
    in_decodes: str = ""  # the field before it that has the same numbers where each request has one sampled token


FIELDS = (
    Field("rows", Size.REQUESTS),
    Field("seq_lens", Size.REQUESTS),
    Field("cu_q_lens", Size.REQUEST_BOUNDS),
    Field("input_ids", Size.TOKENS),
    Field("positions", Size.TOKENS),
    Field("out_cache_loc", Size.TOKENS),
    Field("window_cache_loc", Size.TOKENS, when=_has_windows),
    Field("rope", Size.TOKENS, width=3, when=_has_rope),
    Field("seen_until", Size.TOKENS, when=_has_spans),
    Field("feature_tokens", Size.FEATURES, when=_has_features),
    Field("feature_rows", Size.TOKENS, when=_has_feature_rows),
    Field("token_rows", Size.TOKENS, in_decodes="rows"),
    Field("sample_tokens", Size.SAMPLES, in_decodes="cu_q_lens"),  # 0, 1, ..., S - 1
    Field("sample_rows", Size.SAMPLES, in_decodes="rows"),
    Field("sample_positions", Size.SAMPLES, in_decodes="seq_lens"),
    Field("prefix_lens", Size.GROUPS, when=_has_groups),
    Field("cu_members", Size.GROUP_BOUNDS, when=_has_groups),
    Field("members", Size.REQUESTS, when=_has_groups),
    Field("own_starts", Size.REQUESTS, when=_has_groups),
)


class Layout:
    """Place the fields of a step of one shape in its buffer."""

    def __init__(self, shape: StepShape, fields: tuple[Field, ...]) -> None:
        self.places: dict[str, slice] = {}  # name -> its numbers
        self._widths: dict[str, int] = {}  # of those that have more than one
        counts, is_decode, end = counts_of(shape), shape.is_decode, 0
        for field in fields:
            if field.when is not None and not field.when(shape):
                continue
            size = field.width * counts[field.size]
            if field.in_decodes and is_decode:
                start = self.places[field.in_decodes].start
                self.places[field.name] = slice(start, start + size)
                continue
            self.places[field.name] = slice(end, end + size)
            if field.width > 1:
                self._widths[field.name] = field.width
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self.size = end  # int32 numbers of the whole step

    def views(self, buffer: Array) -> dict[str, Array]:
        """Return the fields in `buffer` (int32 [>= size]) by name. They share its memory."""
        views = {name: buffer[place] for name, place in self.places.items()}
        for name, width in self._widths.items():
            views[name] = views[name].reshape(width, -1)
        return views


@functools.lru_cache(1024)
def layout_of(shape: StepShape) -> Layout:
    return Layout(shape, FIELDS)


def max_size(max_tokens: int, max_requests: int) -> int:
    """Return the int32 numbers of the largest step of that many tokens and requests."""
    shape = StepShape(0, max_requests, max_tokens, max_requests, True, True, True, True, max_tokens, True)
    return layout_of(shape).size
