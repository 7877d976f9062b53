"""Qwen's pictures and videos: they keep their shape, and become a grid of features."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import PIL.Image
import torch

from engine.errors import InvalidRequest
from engine.media import Media, MediaSize
from engine.vision.family import Family, Writing
from engine.vision.packed import pack_layers, plan_of, takes_plans, widen_products
from engine.vision.pixels import bytes_of, looked_up, resized, values_of
from kernels.packed_attention import HALF

# What towers call the pixels of a picture, and its grid of patches.
NAMES = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
PIXELS = {pixels for pixels, _ in NAMES.values()}
GRIDS = frozenset(grids for _, grids in NAMES.values())


class Grid(Family):
    """A family whose pictures keep their shape: patches of whole rows and columns, merged in squares (Qwen2-VL).

    Of a video, patches are of two frames; blocks of features have a frame's rows and columns for each two.
    """

    kinds: ClassVar[tuple[str, ...]] = ("image", "video")
    takes: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")
    on_host: ClassVar[frozenset[str]] = GRIDS
    computes_with_grids = False  # the tower does, on the device
    has_plans = True  # it takes what depends on grids alone
    is_captured = True
    settings: ClassVar = frozenset({"min_pixels", "max_pixels"})

    @staticmethod
    def token_ids(config: Any) -> dict[str, int]:
        ids = {"image": config.image_token_id, "video": config.video_token_id}
        return ids | {"begin": config.vision_start_token_id, "end": config.vision_end_token_id}

    def write(self, size: MediaSize, times_s: Sequence[float] = ()) -> Writing:
        frames, rows, columns = grid = self.grid(size)
        text, num_features = self.token_text[size.kind], frames * rows * columns
        return Writing(text * num_features, num_features, (grid,), self.interval(times_s) if times_s else 1.0)

    def interval(self, times_s: Sequence[float]) -> float:
        """Return the positions from one pair of a video's frames to the next."""
        per_second = getattr(self.config.vision_config, "tokens_per_second", None)
        if per_second is None or len(times_s) < 2:
            return 1.0
        return float(per_second * self.processor.temporal_patch_size * (times_s[-1] - times_s[0]) / (len(times_s) - 1))

    def grid(self, size: MediaSize) -> tuple[int, int, int]:
        """Return frames, rows and columns of the features of a picture."""
        height, width = self.resized(size)
        factor = self.processor.patch_size * self.processor.merge_size
        frames = 1 if size.kind == "image" else -(-size.num_frames // self.processor.temporal_patch_size)
        return frames, height // factor, width // factor

    def resized(self, size: MediaSize) -> tuple[int, int]:
        """Return the height and width that a picture, or a frame, is seen in."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        check_shape(size)
        factor = self.processor.patch_size * self.processor.merge_size
        height, width = smart_resize(size.height, size.width, factor, *self.limits(size))
        return height, width

    def resized_together(self, size: MediaSize) -> tuple[int, int]:
        """Return the height and width of frames that all together have room in the limits."""
        check_shape(size)
        factor, per_patch = self.processor.patch_size * self.processor.merge_size, self.processor.temporal_patch_size
        least, most = self.limits(size)
        height, width = size.height, size.width
        if min(height, width) < factor:
            height, width = (int(length * max(factor / size.height, factor / size.width)) for length in (height, width))
        num_frames = max(size.num_frames, per_patch)
        rows, columns = round(height / factor) * factor, round(width / factor) * factor
        num_pixels = round(num_frames / per_patch) * per_patch * rows * columns
        if num_pixels > most:
            ratio = math.sqrt(num_frames * height * width / most)
            rows, columns = (max(factor, math.floor(one / ratio / factor) * factor) for one in (height, width))
        elif num_pixels < least:
            ratio = math.sqrt(least / (num_frames * height * width))
            rows, columns = (math.ceil(one * ratio / factor) * factor for one in (height, width))
        return rows, columns

    def look(self, media: Media) -> tuple[int, int]:
        """Return the height and width that the picture is seen in: limits that it is within change nothing."""
        return self.resized(media.size)

    def limits(self, media: Media | MediaSize) -> tuple[int, int]:
        """Return the least and the most pixels of what is seen, within those of the model."""
        sizes = self.processor.size if media.kind == "image" else self.video_size()
        least, most = sizes["shortest_edge"], sizes["longest_edge"]
        most = max(min(media.settings.get("max_pixels", most), most), least)
        return min(max(media.settings.get("min_pixels", least), least), most), most

    def video_size(self) -> Mapping[str, int]:
        """Return the least and the most pixels of a frame."""
        factor = (self.processor.patch_size * self.processor.merge_size) ** 2
        return self.video_config.get("size") or {"shortest_edge": 128 * factor, "longest_edge": 768 * factor}

    def options(self, media: Media) -> dict[str, Any]:
        least, most = self.limits(media)
        return {"size": {"shortest_edge": least, "longest_edge": most}}

    def inputs(self, media: Media) -> dict[str, torch.Tensor]:
        return self.made(self.moved(media), torch.device("cpu"))

    def moved(self, media: Media) -> dict[str, torch.Tensor]:
        """Return the frames, as they are, and the grid of patches that they become."""
        (height, width), patch = self.resized(media.size), self.processor.patch_size
        num_frames = -(-media.size.num_frames // self.processor.temporal_patch_size)
        pixels, grids = NAMES[media.kind]
        return {pixels: bytes_of(media), grids: torch.tensor([[num_frames, height // patch, width // patch]])}

    def made(self, moved: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        """Return patches, as the image processor makes them: the last frame stands for those that the last pair lacks.

        Frames are moved to the device one by one: a video's may be larger by far than what they become.
        """
        [name], [grids] = PIXELS & moved.keys(), GRIDS & moved.keys()
        processor, is_image = self.processor, name == "pixel_values"
        per_patch, patch, merge = processor.temporal_patch_size, processor.patch_size, processor.merge_size
        height, width = (patch * num for num in moved[grids][0, 1:].tolist())
        how = processor.resample if is_image else PIL.Image.Resampling.BICUBIC
        frames = torch.cat([resized(frame, device, height, width, how) for frame in moved[name].split(1)])
        frames = torch.cat([frames, frames[-1:].expand(-len(frames) % per_patch, -1, -1, -1)])
        rows, columns = (length // (patch * merge) for length in frames.shape[1:3])
        cut = frames.view(-1, per_patch, rows, merge, patch, columns, merge, patch, 3)
        cut = cut.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
        values = values_of(processor, {} if is_image else self.video_config, device)
        return moved | {name: looked_up(cut, values, 5).reshape(math.prod(cut.shape[:5]), -1)}

    def prepare(self, tower: Any, device: torch.device, dtype: torch.dtype) -> None:
        pack_layers(tower.visual, device, dtype)
        if dtype in HALF:  # on any device, as weights move from one to another
            widen_products(tower.visual)
        self.has_plans = takes_plans()
        if not self.has_plans:
            self.computes_with_grids, self.is_captured = True, False

    def arguments(self, tower: Any, joined: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return pixels, grids, and all that depends on the grids alone."""
        [pixels], [grids] = PIXELS & joined.keys(), GRIDS & joined.keys()
        device, plan = joined[pixels].device, plan_of(tower.visual, joined[grids]) if self.has_plans else {}
        if self.computes_with_grids:
            plan[grids] = joined[grids]
        return joined | {name: one.to(device) if isinstance(one, torch.Tensor) else one for name, one in plan.items()}


class TimedGrid(Grid):
    """Qwen3-VL: each pair of a video's frames is a block of its own, behind its time in the text."""

    def pattern(self, kind: str) -> str:
        """Return that of a video with the marks around it: each block of its frames has its own."""
        if kind == "image":
            return super().pattern(kind)
        begin, end = re.escape(self.token_text["begin"]), re.escape(self.token_text["end"])
        return f"(?:{begin})?{super().pattern(kind)}(?:{end})?"

    def write(self, size: MediaSize, times_s: Sequence[float] = ()) -> Writing:
        if size.kind == "image":
            return super().write(size)
        frames, rows, columns = self.grid(size)
        per_patch = self.processor.temporal_patch_size
        times = list(times_s) or [0.0] * size.num_frames
        times += [times[-1]] * (-len(times) % per_patch)
        begin, end = self.token_text["begin"], self.token_text["end"]
        seen = begin + self.token_text["video"] * (rows * columns) + end
        text = "".join(
            f"<{(times[i] + times[i + per_patch - 1]) / 2:.1f} seconds>{seen}" for i in range(0, len(times), per_patch)
        )
        return Writing(text, frames * rows * columns, ((1, rows, columns),) * frames)

    def resized(self, size: MediaSize) -> tuple[int, int]:
        return super().resized(size) if size.kind == "image" else self.resized_together(size)


class Glm(Grid):
    """GLM-4.1V, GLM-4.5V: a picture is resized as a video of one patch's frames; a pair of frames is written as one."""

    computes_with_grids, is_captured = True, False

    @staticmethod
    def token_ids(config: Any) -> dict[str, int]:
        ids = dict.fromkeys(("image", "video"), config.image_token_id)
        return ids | {"whole video": config.video_token_id}

    def placeholders(self) -> dict[str, str]:
        return {"image": self.token_text["image"], "video": self.token_text["whole video"]}

    def write(self, size: MediaSize, times_s: Sequence[float] = ()) -> Writing:
        if size.kind == "image":
            return super().write(size)
        frames, rows, columns = self.grid(size)
        times = list(times_s[:: self.processor.temporal_patch_size]) or [0.0] * frames
        seen = f"<|begin_of_image|>{self.token_text['image'] * (rows * columns)}<|end_of_image|>"
        text = "".join(seen + self.stamp(time_s) for time_s in times)
        return Writing(text, frames * rows * columns, ((1, rows, columns),) * frames)

    @staticmethod
    def stamp(time_s: float) -> str:
        """Return how the time of a frame is told."""
        return str(int(time_s))

    def resized(self, size: MediaSize) -> tuple[int, int]:
        return self.resized_together(size)

    def video_size(self) -> Mapping[str, int]:
        return self.video_config.get("size") or {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 30000}


class Glm46(Glm):
    """GLM-4.6V, GLM-OCR: GLM-4.1V, but for how the time of a frame is told."""

    @staticmethod
    def stamp(time_s: float) -> str:
        return f"{time_s:.1f} seconds"


class PlainGrid(Grid):
    """EXAONE 4.5: no marks of its own around a picture; a model whose positions have one axis counts its tokens."""

    @staticmethod
    def token_ids(config: Any) -> dict[str, int]:
        return {"image": config.image_token_id, "video": config.video_token_id}


class PaddleOCR(Grid):
    """PaddleOCR-VL: a picture has at least one feature each way, however long the other becomes."""

    kinds: ClassVar[tuple[str, ...]] = ("image",)
    on_host: ClassVar[frozenset[str]] = frozenset()
    is_captured = False
    inputs, moved, made, prepare, arguments = (
        Family.inputs, Family.moved, Family.made, Family.prepare, Family.arguments
    )  # fmt: skip

    @staticmethod
    def token_ids(config: Any) -> dict[str, int]:
        return {"image": config.image_token_id}

    def resized(self, size: MediaSize) -> tuple[int, int]:
        from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import smart_resize

        factor = self.processor.patch_size * self.processor.merge_size
        try:
            height, width = smart_resize(size.height, size.width, factor, *self.limits(size))
        except ValueError as error:
            raise InvalidRequest(f"a picture of {size.width}x{size.height} pixels cannot be read: {error}") from None
        return height, width


def check_shape(size: MediaSize) -> None:
    """Raise `InvalidRequest` for what the families of Qwen take for no picture."""
    if max(size.width, size.height) > 200 * min(size.width, size.height):
        raise InvalidRequest(
            f"a picture of {size.width}x{size.height} pixels is too narrow: at most 200 times as long as wide"
        )
