"""Read pictures for families of models: what stands for one in a prompt, and what their towers take.

A picture is resized, cut and normalized by the family's own image processor of Hugging Face, with Pillow and numpy, and
seen by its own tower. What is ours is to say, of its size alone, which tokens stand for it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch

from engine.media import Image, Media, MediaSize

Sized = TypeVar("Sized", Media, MediaSize)
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

# The config of a language model that is never run.
NO_TEXT = {"model_type": "llama", "vocab_size": 1, "bos_token_id": None, "eos_token_id": None}


@dataclass(frozen=True, slots=True)
class Writing:
    """Say how a picture is written in a prompt."""

    text: str
    num_features: int  # tokens of `text` whose vectors the tower makes: all that are placeholders
    grids: tuple[tuple[int, int, int], ...] = ()  # of its blocks of features: frames, rows, columns
    interval: float = 1.0  # positions from one frame of a block to the next


class Published(Protocol):
    """A folder as a model's authors publish it, which transformers cannot read: what it holds, in its terms."""

    kind: str  # of `engine.vision.families`
    model_class: str
    config: Any
    processor: Any
    token_text: Mapping[str, str]
    video_config: Mapping[str, Any]
    others: tuple[str, ...]  # modules whose weights are none of `weights`, as `complete` makes them

    def weights(self, folder: Path) -> dict[str, torch.Tensor]:
        """Return the weights of a tower by the names of transformers' files."""

    def complete(self, module: Any, folder: Path | None, dtype: torch.dtype) -> None:
        """Give `module` what its class cannot make. folder: with the weights; None: they are random."""


class Family:
    """A family that reads pictures of one kind at least; subclasses say what differs."""

    kinds: ClassVar[tuple[str, ...]] = ("image",)
    takes: ClassVar[tuple[str, ...]] = ("pixel_values",)  # of what the processor makes, what the tower takes
    on_host: ClassVar[frozenset[str]] = frozenset()  # of that, what is read as numbers, and so not moved to the device
    is_captured = False  # the tower's work depends on its inputs' shapes alone, and the values of those on the host
    is_whole = False  # the tokens of a picture see each other, those behind them too
    settings: ClassVar[frozenset[str]] = frozenset()  # of those that a client may ask for, those that make a difference
    published: "Published | None" = None  # what reads a checkpoint that transformers cannot; None: it can

    def __init__(
        self,
        config: Any,
        processor: Any,
        token_text: Mapping[str, str],
        video_config: Mapping[str, Any] | None = None,
    ) -> None:
        """config: transformers' of the whole model. processor: its image processor. video_config: that of its videos'.

        token_text: the texts of special tokens by their role, as "image" for the placeholder of one feature.
        """
        self.config, self.processor, self.token_text = config, processor, token_text
        self.video_config = video_config or {}

    @staticmethod
    def token_ids(config: Any) -> dict[str, int]:
        """Return the ids of special tokens by role."""
        return {"image": config.image_token_id}

    def frames(self) -> dict[str, int]:
        """Return how many frames of a video the model was made for, as `fps` and `max_frames`, as far as it says so."""
        return {}

    def placeholders(self) -> dict[str, str]:
        """Return the text that stands for a picture of each kind before it is written out."""
        return {kind: self.token_text[kind] for kind in self.kinds}

    def in_context(self, media: Sequence[Sized]) -> list[Sized]:
        """Return the pictures of one prompt, or their sizes, with what each must know of the others in its settings."""
        return list(media)

    def feature_texts(self) -> list[str]:
        """Return the texts of the tokens that stand for one feature each, of each kind."""
        return [self.token_text[kind] for kind in self.kinds]

    def pattern(self, kind: str) -> str:
        """Return the regular expression of what is replaced when a picture of that kind is written out."""
        return re.escape(self.placeholders()[kind])

    def write(self, size: MediaSize, times_s: Sequence[float] = ()) -> Writing:  # noqa: ARG002
        """Say how a picture is written. `InvalidRequest` if it cannot be read. times_s: of a video's frames."""
        num_features = self.num_features(size)
        return Writing(self.token_text[size.kind] * num_features, num_features)

    def num_features(self, size: MediaSize) -> int:
        raise NotImplementedError

    def look(self, media: Media) -> tuple[tuple[str, int] | int, ...]:
        """Return what the features of a picture depend on beside its pixels: the settings that make a difference."""
        return tuple(sorted((name, media.settings[name]) for name in self.settings & media.settings.keys()))

    def options(self, media: Media) -> dict[str, Any]:  # noqa: ARG002
        """Return the processor's arguments that a client's settings amount to."""
        return {}

    def inputs(self, media: Media) -> dict[str, torch.Tensor]:
        """Return what the tower takes of one picture, or of a video's frames as if they were pictures."""
        pixels = [media.pixels] if isinstance(media, Image) else list(media.frames)
        made = self.processor(
            images=pixels, input_data_format="channels_last", return_tensors="pt", **self.options(media)
        )
        return {name: made[name] for name in self.takes}

    def moved(self, media: Media) -> dict[str, torch.Tensor]:
        """Return what of a picture is moved to the device, where `made` makes `inputs` of it: the less, the better."""
        return self.inputs(media)

    def made(self, moved: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        """Return `inputs`, made of `moved` on the device."""
        return {name: value if name in self.on_host else value.to(device) for name, value in moved.items()}

    def joins(self, kind: str) -> bool:  # noqa: ARG002
        """Return whether the tower takes several pictures of that kind in one go."""
        return True

    def joined(self, inputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return what the tower takes of several pictures."""
        return {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}

    def prepare(self, tower: Any, device: torch.device, dtype: torch.dtype) -> None:
        """Make a tower ready that was loaded."""

    def arguments(self, tower: Any, joined: dict[str, torch.Tensor]) -> dict[str, Any]:  # noqa: ARG002
        """Return what the tower is called with."""
        return joined

    def features(self, tower: Any, arguments: dict[str, Any]) -> torch.Tensor:
        """Return the features of pictures, one behind the other, [1 + L, F, hidden].

        They are the tower's, and what is added behind the first L layers.
        """
        of_kind = tower.get_video_features if "pixel_values_videos" in arguments else tower.get_image_features
        found = of_kind(**arguments)
        deep = getattr(found, "deepstack_features", None) or []
        return torch.stack([_flat(layer) for layer in (found.pooler_output, *deep)])


def in_words(number: int) -> str:
    """Return a number below 1,000 in words."""
    if number >= 100:
        words = f"{ONES[number // 100]} hundred"
        return f"{words} and {in_words(number % 100)}" if number % 100 else words
    if number < len(ONES):
        return ONES[number]
    return "-".join([TENS[number // 10]] + ([ONES[number % 10]] if number % 10 else []))


def _flat(features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Return [features of all pictures, hidden] of what a tower returns, which may be one tensor a picture."""
    if isinstance(features, torch.Tensor):
        return features.flatten(0, -2)
    return torch.cat([one.flatten(0, -2) for one in features])


def rope_positions(prompt_len: int, blocks: Sequence[tuple[int, tuple[int, int, int], float]]) -> np.ndarray:
    """Return the position of each token on three axes, int32 [3, prompt_len].

    blocks: (first token, (frames, rows, columns), interval of frames) of each block of features, in order. Text
    advances on all axes alike; a block's tokens stand at their frame, row and column behind what is before it, and text
    goes on behind the largest of rows and columns (Qwen2-VL).
    """
    rope = np.empty((3, prompt_len), np.int32)
    end, position = 0, 0
    for first, (frames, rows, columns), interval in blocks:
        rope[:, end:first] = np.arange(position, position + first - end)
        position += first - end
        end = first + frames * rows * columns
        places = np.indices((frames, rows, columns)).reshape(3, -1)
        places[0] = places[0] * interval
        rope[:, first:end] = places + position
        position += max(rows, columns)
    rope[:, end:] = np.arange(position, position + prompt_len - end)
    return rope
