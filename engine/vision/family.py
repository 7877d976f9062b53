"""How families of models read pictures: what stands for one in a prompt, and what their towers take.

A picture is resized, cut and normalized by the family's own image processor of Hugging Face, with Pillow and numpy, and
seen by its own tower. What is ours is to say, of its size alone, which tokens stand for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from engine.errors import InvalidRequest
from engine.media import Image, Media, MediaSize


@dataclass(frozen=True, slots=True)
class Writing:
    """Say how a picture is written in a prompt."""

    text: str
    num_features: int  # tokens of `text` whose vectors the tower makes: all that are placeholders
    grids: tuple[tuple[int, int, int], ...] = ()  # of its blocks of features: frames, rows, columns


class Family:
    """A family that reads pictures of one kind at least; subclasses say what differs."""

    kinds: ClassVar[tuple[str, ...]] = ("image",)
    takes: ClassVar[tuple[str, ...]] = ("pixel_values",)  # of what the processor makes, what the tower takes
    is_whole: ClassVar = False  # the tokens of a picture see each other, those behind them too
    settings: ClassVar[frozenset[str]] = frozenset()  # of those that a client may ask for, those that make a difference

    def __init__(self, config: Any, processor: Any, token_text: Mapping[str, str]) -> None:
        """config: transformers' of the whole model. processor: its image processor.

        token_text: the texts of special tokens by their role, as "image" for the placeholder of one feature.
        """
        self.config, self.processor, self.token_text = config, processor, token_text

    @staticmethod
    def token_ids(config: Any) -> dict[str, int]:
        """Return the ids of special tokens by role."""
        return {"image": config.image_token_id}

    def placeholders(self) -> dict[str, str]:
        """Return the text that stands for a picture of each kind before it is written out."""
        return {kind: self.token_text[kind] for kind in self.kinds}

    def feature_texts(self) -> list[str]:
        """Return the texts of the tokens that stand for one feature each, of each kind."""
        return [self.token_text[kind] for kind in self.kinds]

    def write(self, size: MediaSize) -> Writing:
        """Say how a picture of `size` is written. `InvalidRequest` if it cannot be read."""
        num_features = self.num_features(size)
        return Writing(self.token_text[size.kind] * num_features, num_features)

    def num_features(self, size: MediaSize) -> int:
        raise NotImplementedError

    def options(self, media: Media) -> dict[str, Any]:  # noqa: ARG002
        """Return the processor's arguments that a client's settings amount to."""
        return {}

    def inputs(self, media: Media) -> dict[str, torch.Tensor]:
        """Return what the tower takes of one picture."""
        assert isinstance(media, Image)
        made = self.processor(
            images=[media.pixels], input_data_format="channels_last", return_tensors="pt", **self.options(media)
        )
        return {name: made[name] for name in self.takes}

    def joined(self, inputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return what the tower takes of several pictures."""
        return {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}

    def features(self, tower: Any, inputs: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Return the features of each picture, [1 + L, features, hidden]: the tower's, and those of L layers more."""
        found = tower.get_image_features(**self.joined(inputs))
        deep = getattr(found, "deepstack_features", None) or []
        flat = [found.pooler_output[i] for i in range(len(found.pooler_output))]
        lens = [len(one) for one in flat]
        layers = [flat, *(layer.split(lens) if isinstance(layer, torch.Tensor) else layer for layer in deep)]
        return [torch.stack([layer[i] for layer in layers]) for i in range(len(flat))]


class Llava(Family):
    """LLaVA 1.5: the patches of one square, whatever the picture's shape."""

    def num_features(self, size: MediaSize) -> int:  # noqa: ARG002
        crop, vision = self.processor.crop_size, self.config.vision_config
        num_patches: int = (crop["height"] // vision.patch_size) * (crop["width"] // vision.patch_size)
        return num_patches + 1 if self.config.vision_feature_select_strategy == "full" else num_patches


class Grid(Family):
    """A family whose pictures keep their shape: patches of whole rows and columns, merged in squares (Qwen2-VL)."""

    takes = ("pixel_values", "image_grid_thw")
    settings = frozenset({"min_pixels", "max_pixels"})

    def write(self, size: MediaSize) -> Writing:
        _, rows, columns = grid = self.grid(size)
        num_features = rows * columns
        return Writing(self.token_text["image"] * num_features, num_features, grids=(grid,))

    def grid(self, size: MediaSize) -> tuple[int, int, int]:
        """Return frames, rows and columns of the features of a picture."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        processor = self.processor
        factor, limits = processor.patch_size * processor.merge_size, self._limits(size.settings)
        if max(size.width, size.height) > 200 * min(size.width, size.height):
            raise InvalidRequest(
                f"a picture of {size.width}x{size.height} pixels is too narrow: at most 200 times as long as wide"
            )
        height, width = smart_resize(size.height, size.width, factor, *limits)
        return 1, height // factor, width // factor

    def _limits(self, settings: Mapping[str, int]) -> tuple[int, int]:
        """Return the least and the most pixels of a resized picture, within those of the model."""
        least, most = self.processor.size["shortest_edge"], self.processor.size["longest_edge"]
        most = max(min(settings.get("max_pixels", most), most), least)
        return min(max(settings.get("min_pixels", least), least), most), most

    def options(self, media: Media) -> dict[str, Any]:
        least, most = self._limits(media.settings)
        return {"size": {"shortest_edge": least, "longest_edge": most}}


class Gemma3(Family):
    """Gemma 3: one square, as so many vectors, that see each other; between marks and empty lines."""

    is_whole = True

    @staticmethod
    def token_ids(config: Any) -> dict[str, int]:
        return {"image": config.image_token_id, "begin": config.boi_token_index, "end": config.eoi_token_index}

    def placeholders(self) -> dict[str, str]:
        return {"image": self.token_text["begin"]}

    def write(self, size: MediaSize) -> Writing:  # noqa: ARG002
        token, num_features = self.token_text, self.config.mm_tokens_per_image
        return Writing(f"\n\n{token['begin']}{token['image'] * num_features}{token['end']}\n\n", num_features)


FAMILIES: dict[str, type[Family]] = {"gemma 3": Gemma3, "grid": Grid, "llava": Llava}


def rope_positions(prompt_len: int, blocks: Sequence[tuple[int, tuple[int, int, int]]]) -> np.ndarray:
    """Return the position of each token on three axes, int32 [3, prompt_len].

    blocks: (first token, (frames, rows, columns)) of each block of features, in order. Text advances on all axes alike;
    a block's tokens stand at their frame, row and column behind what is before it, and text goes on behind the largest
    of rows and columns (Qwen2-VL).
    """
    rope = np.empty((3, prompt_len), np.int32)
    end, position = 0, 0
    for first, (frames, rows, columns) in blocks:
        rope[:, end:first] = np.arange(position, position + first - end)
        position += first - end
        end = first + frames * rows * columns
        rope[:, first:end] = np.indices((frames, rows, columns)).reshape(3, -1) + position
        position += max(rows, columns)
    rope[:, end:] = np.arange(position, position + prompt_len - end)
    return rope
