"""Kimi's pictures: they keep their shape, are never enlarged, and are padded to whole squares of patches.

Kimi-VL and Kimi K2.5 have one tower, MoonViT, which transformers knows from K2.5; Kimi-VL's files have other names. Its
image processor, which needs torchvision there, is written here with Pillow and numpy, as the authors' own.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch

from engine.checkpoint.weights import checkpoint_files, tensors_of
from engine.config import EngineConfig
from engine.config_file import read_json
from engine.media import Image, Media, MediaSize
from engine.vision.family import NO_TEXT, Family

PLACEHOLDER = "<|media_pad|>"
# From the entries of config.json to those of transformers' Kimi_K25VisionConfig.
ENTRIES = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "merge_kernel_size",
    "pos_emb_height", "pos_emb_width", "pos_emb_time",
}  # fmt: skip
PREFIXES = re.compile("^(vt|init)_")
OURS = re.compile(r"(?:model\.)?((?:vision_tower|mm_projector|multi_modal_projector)\..+)")
# From Kimi-VL's names to those of K2.5.
LAYERS = {
    "multi_modal_projector.pre_norm.": "mm_projector.pre_norm.",
    "multi_modal_projector.linear_1.": "mm_projector.proj.0.",
    "multi_modal_projector.linear_2.": "mm_projector.proj.2.",
}


@dataclass(frozen=True)
class Processing:
    """Say what becomes of a picture's pixels."""

    patch_size: int
    merge_size: int  # patches of a feature, one way
    max_patches: int
    max_patches_one_way: int
    mean: Sequence[float]
    std: Sequence[float]

    def to_json_string(self) -> str:
        return json.dumps(asdict(self))


class KimiFiles:
    """See `engine.vision.family.Published`."""

    kind, model_class = "kimi", "Kimi_K25ForConditionalGeneration"
    token_text: Mapping[str, str] = {"image": PLACEHOLDER}
    video_config: Mapping[str, Any] = {}
    others: tuple[str, ...] = ()

    def __init__(
        self,
        folder: Path,
        raw: Mapping[str, Any],
        config: EngineConfig,  # noqa: ARG002
        token_id: Callable[[str], int | None],
    ) -> None:
        """raw: the entries of config.json. token_id: of a text."""
        from transformers import Kimi_K25Config

        given = raw.get("vision_config") or {}
        entries = {PREFIXES.sub("", name): value for name, value in given.items() if value is not None}
        placeholder = raw.get("media_placeholder_token_id", raw.get("image_token_id"))
        self.config = Kimi_K25Config(
            vision_config={name: value for name, value in entries.items() if name in ENTRIES},
            text_config=NO_TEXT | {"hidden_size": raw["hidden_size"]},
            projection_hidden_size=entries.get("hidden_size", 1152),
            image_token_id=token_id(PLACEHOLDER) if placeholder is None else placeholder,
        )
        vision, file = self.config.vision_config, read_json(folder / "preprocessor_config.json")
        file |= file.get("media_proc_cfg") or {}
        most = 4096 if "KimiVLForConditionalGeneration" in raw["architectures"] else 16384
        size = file.get("size") or {"max_height": 512}
        self.processor = Processing(
            vision.patch_size,
            vision.merge_kernel_size[0],
            file.get("in_patch_limit") or file.get("in_token_limit") or file.get("max_patches") or most,
            file.get("patch_limit_on_one_side") or size["max_height"],
            file.get("image_mean") or [0.5] * 3,
            file.get("image_std") or [0.5] * 3,
        )

    def weights(self, folder: Path) -> dict[str, torch.Tensor]:
        """Return the weights of a tower by the names of transformers' files."""
        found = tensors_of(checkpoint_files(folder), OURS)
        for old, new in LAYERS.items():
            found = {name.replace(old, new): one for name, one in found.items()}
        return found

    def complete(self, module: Any, folder: Path | None, dtype: torch.dtype) -> None:
        """Do nothing: the class makes all of it."""


class Kimi(Family):
    """Kimi-VL, Kimi K2.5: a grid of features; the tokens in its place follow each other in one line."""

    takes: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")

    def resized(self, size: MediaSize) -> tuple[int, int]:
        """Return the height and width in which a picture is seen, before it is padded."""
        patch, most = self.processor.patch_size, self.processor.max_patches_one_way * self.processor.patch_size
        num_patches = max(size.height // patch, 1) * max(size.width // patch, 1)
        scale = min(1.0, math.sqrt(self.processor.max_patches / num_patches), most / size.height, most / size.width)
        height, width = (min(max(int(length * scale), 1), most) for length in (size.height, size.width))
        return height, width

    def grid(self, size: MediaSize) -> tuple[int, int]:
        """Return the rows and columns of features."""
        side = self.processor.patch_size * self.processor.merge_size
        rows, columns = (-(-length // side) for length in self.resized(size))
        return rows, columns

    def num_features(self, size: MediaSize) -> int:
        return math.prod(self.grid(size))

    def inputs(self, media: Media) -> dict[str, torch.Tensor]:
        assert isinstance(media, Image)
        processor, (height, width) = self.processor, self.resized(media.size)
        seen = PIL.Image.fromarray(media.pixels)
        if seen.size != (width, height):
            seen = seen.resize((width, height), PIL.Image.Resampling.BICUBIC)
        patch, (rows, columns) = processor.patch_size, (one * processor.merge_size for one in self.grid(media.size))
        padding = ((0, rows * patch - height), (0, columns * patch - width), (0, 0))
        mean, std = (np.array(one, np.float32) for one in (processor.mean, processor.std))
        pixels = (np.pad(np.asarray(seen), padding).astype(np.float32) / 255 - mean) / std
        patches = pixels.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, patch, patch)
        return {"pixel_values": torch.from_numpy(patches), "image_grid_thw": torch.tensor([[1, rows, columns]])}
