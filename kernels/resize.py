"""Resize pictures as Pillow does, bit for bit: by Pillow itself, or on a GPU, where it takes microseconds.

Pillow resizes 8-bit pictures with whole numbers, along rows and then along columns: each pixel of the result is a sum
of a few pixels, each times a weight of `WEIGHT_BITS` bits behind the point, rounded to a byte. Sums of whole numbers
are the same in any order, so a part of the result can be had alone, whatever the rest would take.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch

from kernels.resize_plan import REACH, WEIGHT_BITS, Plan, Resampling, plan_of

NARROW = 100  # times as high as wide: Pillow makes columns of such a picture shorter before it touches rows
MAX_WHOLE = 1 << 24  # pixels that a whole picture may get on a CPU if a part is wanted: of more, only the part is made


class Window(NamedTuple):
    """Name a part of a picture."""

    top: int
    left: int
    height: int
    width: int


Pass = Callable[[torch.Tensor, Plan, int], torch.Tensor]


def resize(frames: torch.Tensor, height: int, width: int, how: int, window: Window | None = None) -> torch.Tensor:
    """Return pictures in another size, uint8 [N, height, width, 3], or a part of each. frames: likewise, on any device.

    how: one of `PIL.Image.Resampling`.
    """
    may_be_whole = window is None or height * width <= MAX_WHOLE
    window = window or Window(0, 0, height, width)
    if how not in REACH or (not frames.is_cuda and may_be_whole):
        return resize_pillow(frames.cpu(), height, width, how, window).to(frames.device)
    if not frames.is_cuda:
        return resize_by(pass_torch, frames, height, width, how, window)
    from kernels.triton_resize import pass_triton  # here: a machine without a GPU need not have triton

    return resize_by(pass_triton, frames, height, width, how, window)


def resize_pillow(frames: torch.Tensor, height: int, width: int, how: int, window: Window) -> torch.Tensor:
    pictures = [PIL.Image.fromarray(frame).resize((width, height), Resampling(how)) for frame in frames.numpy()]
    made = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return made[:, window.top :, window.left :][:, : window.height, : window.width]


def resize_by(one_pass: Pass, frames: torch.Tensor, height: int, width: int, how: int, window: Window) -> torch.Tensor:
    """Do `resize` by passes, each along one dimension."""
    _, old_height, old_width, _ = frames.shape
    passes = [
        (2, plan_of(old_width, width, window.left, window.width, how)),
        (1, plan_of(old_height, height, window.top, window.height, how)),
    ]
    if old_height > NARROW * old_width and height < old_height:
        passes.reverse()
    for dim, plan in passes:
        frames = frames.narrow(dim, plan.used.start, plan.used.stop - plan.used.start)
    for dim, plan in passes:
        if plan.weights.shape[1] > 1:  # else the length stays
            frames = one_pass(frames, plan, dim)
    return frames


def pass_torch(frames: torch.Tensor, plan: Plan, dim: int) -> torch.Tensor:
    """Return pictures whose rows (dim 2) or columns (dim 1) were resized."""
    shape = [-1 if i == dim else 1 for i in range(frames.dim())]
    last, total = frames.shape[dim] - 1, torch.tensor(1 << (WEIGHT_BITS - 1), dtype=torch.int32, device=frames.device)
    for tap, weights in enumerate(plan.weights.to(frames.device).unbind(1)):
        places = (plan.first + tap).clamp(max=last).to(frames.device)
        total = total + frames.index_select(dim, places).int() * weights.view(shape)
    return (total >> WEIGHT_BITS).clamp(0, 255).to(torch.uint8)
