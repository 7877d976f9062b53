"""Pixels on their way to a tower: moved to the device as bytes, and resized, cut and normalized there.

What transformers' image processors do with Pillow and numpy takes the host tens of milliseconds a picture, and a GPU
some microseconds. What comes out is the same, bit for bit: a byte has 256 values, and what a processor makes of each is
looked up.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from engine.media import Image, Media
from kernels.resize import Window, resize

# Steps that image processors may take, first those that all take.
ALWAYS, CROP, PAD = {"do_resize", "do_rescale", "do_normalize"}, "do_center_crop", "do_pad"
STEPS = (*ALWAYS, CROP, PAD, "do_pan_and_scan")

MAX_MOVED = 1 << 26  # bytes of a picture that is moved as it is, 22 million pixels: of a larger one, what it becomes


def bytes_of(media: Media) -> torch.Tensor:
    """Return the pixels of a picture, or of a video's frames, uint8 [frames, height, width, 3], as they are."""
    frames = media.pixels[None] if isinstance(media, Image) else media.frames
    return torch.from_numpy(frames if frames.flags.writeable else frames.copy())


def resized(
    frames: torch.Tensor, device: torch.device, height: int, width: int, how: int, window: Window | None = None
) -> torch.Tensor:
    """Do `resize`, on the device unless that would take much of its memory. frames: on the host."""
    if frames.nbytes > MAX_MOVED:
        return resize(frames, height, width, how, window).to(device)
    return resize(frames.to(device), height, width, how, window)


def values_of(processor: Any, config: Mapping[str, Any], device: torch.device) -> torch.Tensor:
    """Return what becomes of each byte of each color, float32 [3 x 256]. config: entries that come first."""
    mean, std = (config.get(name) or getattr(processor, name) for name in ("image_mean", "image_std"))
    values = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    values = processor.normalize(processor.rescale(values, processor.rescale_factor), mean, std)
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).flatten().to(device)


def looked_up(pixels: torch.Tensor, values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the `values_of` bytes. dim: that of colors."""
    shape = [1] * pixels.dim()
    shape[dim] = 3
    colors = 256 * torch.arange(3, dtype=torch.int32, device=pixels.device)
    return values[pixels.int() + colors.view(shape)]


class Square:
    """Do what a plain image processor of transformers does: all pictures become alike, and may lose their edges."""

    def __init__(self, processor: Any, edges: tuple[int, int], *, is_whole: bool) -> None:
        """edges: height and width. is_whole: a picture is stretched to them; else they are cut out of its middle."""
        self._processor, self._edges, self._is_whole = processor, edges, is_whole

    def made(self, frames: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return what a tower takes of pictures, float32 [N, 3, height, width]. frames: uint8 [N, ..., ..., 3]."""
        height, width = self._edges
        stretched = self._edges if self._is_whole else self._shrunk(*frames.shape[1:3])
        window = Window((stretched[0] - height) // 2, (stretched[1] - width) // 2, height, width)
        squares = resized(frames, device, *stretched, self._processor.resample, window).permute(0, 3, 1, 2)
        return looked_up(squares, values_of(self._processor, {}, device), 1)

    def _shrunk(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of a picture of that shape whose shorter edge is the processor's."""
        edge, short = self._processor.size["shortest_edge"], min(height, width)
        return int(edge * height / short), int(edge * width / short)


def is_plain(processor: Any, names: Sequence[str], may: Sequence[str] = ()) -> bool:
    """Return whether an image processor of transformers resizes, rescales and normalizes, and does no more.

    names: of classes that do no more unless they are asked to, which early versions 5 do not have. may: further steps
    that it may be asked for.
    """
    import transformers

    plain = [getattr(transformers, name)._preprocess for name in names if hasattr(transformers, name)]
    does = {step for step in STEPS if getattr(processor, step, None)}
    return getattr(type(processor), "_preprocess", None) in plain and does.difference(may) == ALWAYS


def square_of(processor: Any) -> Square | None:
    """Return what makes the same of pictures as an image processor of transformers; None: it does more."""
    if not is_plain(processor, ("CLIPImageProcessorPil", "Gemma3ImageProcessorPil"), (CROP,)):
        return None
    size, crop = dict(processor.size), dict(processor.crop_size) if getattr(processor, CROP, None) else {}
    if not crop and size.keys() == {"height", "width"}:
        return Square(processor, (size["height"], size["width"]), is_whole=True)
    if crop and size.keys() == {"shortest_edge"} and max(crop.values()) <= size["shortest_edge"]:
        return Square(processor, (crop["height"], crop["width"]), is_whole=False)
    return None
