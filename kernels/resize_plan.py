"""Which pixels of a row make each one of a longer or shorter row, and how much each counts: Pillow's rules."""

import functools
import math
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch

Resampling = PIL.Image.Resampling
REACH = {Resampling.BILINEAR: 1.0, Resampling.BICUBIC: 2.0, Resampling.LANCZOS: 3.0}  # pixels, either way
WEIGHT_BITS = 22
MAX_PLANS = 256  # that are remembered, of 20 KB each for common sizes


class Plan(NamedTuple):
    """Say which pixels of a row, or a column, make each one of the result."""

    used: slice  # of its pixels
    first: torch.Tensor  # int32 [pixels of the result]: among those used
    weights: torch.Tensor  # int32 [pixels of the result, T]: of the pixels from `first` on; beyond the end they are 0


@functools.lru_cache(MAX_PLANS)
def plan_of(length: int, new_length: int, start: int, num: int, how: int) -> Plan:
    """Return how rows of `length` pixels become `num` pixels, from `start` on, of rows of `new_length`. On the host."""
    if length == new_length:
        ones = torch.full((num, 1), 1 << WEIGHT_BITS, dtype=torch.int32)
        return Plan(slice(start, start + num), torch.arange(num, dtype=torch.int32), ones)
    step = length / new_length
    stretch = max(step, 1.0)  # of the curve that weighs pixels by their distance: if pixels become fewer, all count
    reach = REACH[Resampling(how)] * stretch
    centers = (np.arange(start, start + num) + 0.5) * step
    first = np.maximum(np.trunc(centers - reach + 0.5), 0)
    stop = np.minimum(np.trunc(centers + reach + 0.5), length)
    places = first[:, None] + np.arange(2 * math.ceil(reach) + 1)
    weights = _curve((places - centers[:, None] + 0.5) * (1.0 / stretch), how)
    weights = np.where(places < stop[:, None], weights, 0.0)
    weights /= weights.cumsum(axis=1)[:, -1:]  # added up from the left, as Pillow does: not as np.sum
    rounded = np.trunc(weights * (1 << WEIGHT_BITS) + np.copysign(0.5, weights)).astype(np.int32)
    used = slice(int(first[0]), int(stop[-1]))
    return Plan(used, torch.from_numpy((first - used.start).astype(np.int32)), torch.from_numpy(rounded))


def _curve(x: np.ndarray, how: int) -> np.ndarray:
    """Return the weights of pixels `x` away, before they are made to add up to one."""
    if how == Resampling.LANCZOS:
        return np.where(np.abs(x) < REACH[Resampling.LANCZOS], _sinc(x) * _sinc(x / REACH[Resampling.LANCZOS]), 0.0)
    x = np.abs(x)
    if how == Resampling.BILINEAR:
        return np.where(x < 1.0, 1.0 - x, 0.0)
    near, far = (1.5 * x - 2.5) * x * x + 1.0, (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return np.where(x < 1.0, near, np.where(x < REACH[Resampling.BICUBIC], far, 0.0))


def _sinc(x: np.ndarray) -> np.ndarray:
    angles = x * math.pi
    return np.divide(np.sin(angles), angles, out=np.ones_like(x), where=x != 0.0)
