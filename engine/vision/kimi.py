"""Kimi's pictures and videos: they keep their shape, are never enlarged, and are padded to whole squares of patches.

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
from engine.vision.family import NO_TEXT, Family, Writing

PLACEHOLDER, VIDEO = "<|media_pad|>", "<|kimi_k25_video_placeholder|>"
KIMI_VL = "KimiVLForConditionalGeneration"
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
    max_frame_patches: int = 4096  # of one frame of a video
    chunk: int = 4  # frames of a video that become one
    fps: int = 2

    def to_json_string(self) -> str:
        return json.dumps(asdict(self))


class KimiFiles:
    """See `engine.vision.family.Published`."""

    model_class = "Kimi_K25ForConditionalGeneration"
    token_text: Mapping[str, str] = {"image": PLACEHOLDER, "video": PLACEHOLDER}
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

        is_vl = KIMI_VL in raw["architectures"]
        self.kind = "kimi" if is_vl else "kimi k2.5"
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
        most = 4096 if is_vl else 16384
        size = file.get("size") or {"max_height": 512}
        self.processor = Processing(
            vision.patch_size,
            vision.merge_kernel_size[0],
            file.get("in_patch_limit") or file.get("in_token_limit") or file.get("max_patches") or most,
            file.get("patch_limit_on_one_side") or size["max_height"],
            file.get("image_mean") or [0.5] * 3,
            file.get("image_std") or [0.5] * 3,
            file.get("in_patch_limit_each_frame") or 4096,
            file.get("temporal_merge_kernel_size") or 4,
            int(file.get("sample_fps") or 2),
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
    """Kimi-VL: a grid of features; the tokens in its place follow each other in one line."""

    takes: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")

    def resized(self, size: MediaSize) -> tuple[int, int]:
        """Return the height and width in which a picture is seen, before it is padded."""
        processor, patch = self.processor, self.processor.patch_size
        most = processor.max_patches_one_way * patch
        max_patches = processor.max_patches if size.kind == "image" else processor.max_frame_patches
        num_patches = max(size.height // patch, 1) * max(size.width // patch, 1)
        scale = min(1.0, math.sqrt(max_patches / num_patches), most / size.height, most / size.width)
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
        rows, columns = (one * self.processor.merge_size for one in self.grid(media.size))
        frames = [media.pixels] if isinstance(media, Image) else list(media.frames)
        patches = np.concatenate([self._patches(frame, self.resized(media.size), rows, columns) for frame in frames])
        chunk = self.processor.chunk
        grids = [[len(frames[i : i + chunk]), rows, columns] for i in range(0, len(frames), chunk)]
        return {"pixel_values": torch.from_numpy(patches), "image_grid_thw": torch.tensor(grids)}

    def _patches(self, pixels: np.ndarray, resized: tuple[int, int], rows: int, columns: int) -> np.ndarray:
        """Return the patches of a picture, float32 [rows x columns, 3, patch, patch]."""
        processor, patch, (height, width) = self.processor, self.processor.patch_size, resized
        seen = PIL.Image.fromarray(pixels)
        if seen.size != (width, height):
            seen = seen.resize((width, height), PIL.Image.Resampling.BICUBIC)
        padding = ((0, rows * patch - height), (0, columns * patch - width), (0, 0))
        mean, std = (np.array(one, np.float32) for one in (processor.mean, processor.std))
        values = (np.pad(np.asarray(seen), padding).astype(np.float32) / 255 - mean) / std
        return values.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, patch, patch)


class KimiVideos(Kimi):
    """Kimi K2.5: so many frames of a video become one, behind their time."""

    kinds: ClassVar[tuple[str, ...]] = ("image", "video")

    @staticmethod
    def token_ids(config: Any) -> dict[str, int]:
        return dict.fromkeys(("image", "video"), config.image_token_id)

    def placeholders(self) -> dict[str, str]:
        return {"image": PLACEHOLDER, "video": VIDEO}

    def frames(self) -> dict[str, int]:
        return {"fps": self.processor.fps}

    def write(self, size: MediaSize, times_s: Sequence[float] = ()) -> Writing:
        num_features = self.num_features(size)
        if size.kind == "image":
            return Writing(PLACEHOLDER * num_features, num_features)
        times = (list(times_s) or [0.0] * size.num_frames)[:: self.processor.chunk]
        seen = f"<|media_begin|>video<|media_content|>{PLACEHOLDER * num_features}<|media_end|>"
        return Writing("".join(_stamp(time_s) + seen for time_s in times), num_features * len(times))


def _stamp(time_s: float) -> str:
    """Return a time as hours, minutes and seconds, with milliseconds."""
    seconds, ms = int(time_s), int(time_s % 1 * 1000)
    return f"{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{ms:03}"
