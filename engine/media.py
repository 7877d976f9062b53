"""Pictures and videos of a request: as a client's bytes decode, and as a prompt holds them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

Kind = Literal["image", "video"]
# In a prompt's text, where it stands in what would else be a placeholder: that was written about, and shows nothing.
# Unicode has it for a program's own use, so texts of clients have none.
CUT = "\ufdd0"


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

    @property
    def num_bytes(self) -> int:
        """Bytes of the decoded pixels."""
        return sum((one.pixels if isinstance(one, Image) else one.frames).nbytes for one in self.media)

    def positions(self, num_tokens: int) -> np.ndarray:
        """Return the positions of the first tokens on three axes, int32 [3, num_tokens], those of an answer too."""
        num_known = self.prompt_len if self.rope is not None else 0
        behind = np.arange(num_known, num_tokens, dtype=np.int32)
        if self.rope is None:
            return np.broadcast_to(behind, (3, num_tokens))
        delta = int(self.rope.max()) + 1 - self.prompt_len
        return np.concatenate([self.rope[:, :num_tokens], np.broadcast_to(behind + delta, (3, len(behind)))], axis=1)

    def first(self, num_tokens: int) -> "PromptMedia":
        """Return what the first tokens show, of the prompt and an answer to it. `ValueError` if a picture is cut."""
        shown = [places[-1] < num_tokens for places in self.places]
        if any(places[0] < num_tokens <= places[-1] for places in self.places):
            raise ValueError("a picture would be cut")
        return replace(
            self,
            prompt_len=num_tokens,
            media=tuple(itertools.compress(self.media, shown)),
            keys=tuple(itertools.compress(self.keys, shown)),
            places=tuple(itertools.compress(self.places, shown)),
            rope=None if self.rope is None else self.positions(num_tokens),
        )

    def followed_by(self, other: "PromptMedia") -> "PromptMedia":
        """Return what a prompt shows that goes on with another."""
        rope = None
        if self.rope is not None or other.rope is not None:
            before = self.positions(self.prompt_len)
            position = int(before.max(initial=-1)) + 1
            rope = np.concatenate([before, other.positions(other.prompt_len) + position], axis=1)
        return PromptMedia(
            self.prompt_len + other.prompt_len,
            self.media + other.media,
            self.keys + other.keys,
            self.places + tuple(places + np.int32(self.prompt_len) for places in other.places),
            self.is_whole or other.is_whole,
            rope,
        )


@dataclass(slots=True)
class EncoderStats:
    """Count the work of what makes features of pictures, since the start."""

    num_encoded: int = 0
    """Pictures that the tower has seen."""
    num_hits: int = 0
    """Pictures that requests needed whose features were kept, or were being made for others."""
    num_failed: int = 0
    """Pictures that the tower failed on."""
    encode_s: float = 0.0
    """Seconds for which the tower had pictures to see."""
    feature_bytes: int = 0
    """Bytes of the features that requests hold or that are kept, now."""


def with_marks_cut(value: Any, marks: Sequence[str]) -> Any:
    """Return a JSON value in whose texts each of `marks` has a `CUT` behind its first character."""
    if isinstance(value, str):
        for mark in marks:
            if mark in value:
                value = value.replace(mark, f"{mark[0]}{CUT}{mark[1:]}")
        return value
    if isinstance(value, list):
        return [with_marks_cut(one, marks) for one in value]
    if isinstance(value, dict):
        return {name: with_marks_cut(one, marks) for name, one in value.items()}
    return value


def no_media(prompt_len: int) -> PromptMedia:
    """Return what a prompt of so many tokens shows that shows nothing."""
    return PromptMedia(prompt_len, (), (), ())
