"""Pictures and videos of a request: as a client's bytes decode, and as a prompt holds them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Kind = Literal["image", "video"]


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """Hold a decoded picture, and how its client wants it read."""

    pixels: np.ndarray  # uint8 [height, width, 3], RGB
    digest: bytes  # sha256 over kind, shape and pixels
    settings: Mapping[str, int] = field(default_factory=dict)  # min_pixels, max_pixels, ...: those asked for

    @property
    def kind(self) -> Kind:
        return "image"

    @property
    def size(self) -> "MediaSize":
        height, width, _ = self.pixels.shape
        return MediaSize("image", width, height, settings=self.settings)


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """Hold the frames taken of a video, and how its client wants them read."""

    frames: np.ndarray  # uint8 [frames, height, width, 3], RGB
    times_s: tuple[float, ...]  # of each frame, from the video's start
    digest: bytes  # sha256 over kind, shape, times and pixels
    settings: Mapping[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return "video"

    @property
    def size(self) -> "MediaSize":
        num_frames, height, width, _ = self.frames.shape
        return MediaSize("video", width, height, num_frames, self.settings)


Media = Image | Video


@dataclass(frozen=True, slots=True)
class MediaSize:
    """Say what a file's header does, before any pixel is decoded: enough to count tokens."""

    kind: Kind
    width: int
    height: int
    num_frames: int = 1
    settings: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class PromptMedia:
    """Hold the pictures and videos of one prompt, in order, and which of its tokens stand for them."""

    prompt_len: int
    media: tuple[Media, ...]
    keys: tuple[bytes, ...]
    """Of each, a digest of all that its features depend on."""
    places: tuple[np.ndarray, ...]
    """Of each, int32: the indices, ascending, of the prompt's tokens whose vectors its features are."""
    is_whole: bool = False
    """The tokens of each see each other, those behind them too."""
    rope: np.ndarray | None = None
    """int32 [3, prompt_len], where rotations have three axes: the position of each token on each; None: its index."""
