"""Define for each family what its prompts and towers take of a picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from engine.errors import InvalidRequest
from engine.media import Image, Media, MediaSize, Video
from engine.vision.family import Family, Sized, Writing, in_words
from engine.vision.grid import Glm, Glm46, Grid, PaddleOCR, PlainGrid, TimedGrid
from engine.vision.kimi import Kimi, KimiVideos
from engine.vision.pixels import PAD, bytes_of, is_plain, looked_up, resized, square_of, values_of

ALONE = "alone"  # a setting that no client has: the prompt has no other picture
# Entries of a video processor's file that say how a frame becomes a square.
SQUARE = ("size", "crop_size", "do_center_crop", "image_mean", "image_std", "rescale_factor", "resample")
LAST_FRAME_S = 0.05  # that a video goes on after its last frame was taken
MAX_PADDED = 10_000  # pixels of a square, either way, that bars beside a picture make of it: 1 GB on the host
MUCH = 1.1  # how many times too many rows, and columns, of patches a picture may have before it is shrunk


class Alike(Family):
    """Families to whose towers all pictures are of one shape."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._square = square_of(self.processor)

    def moved(self, media: Media) -> dict[str, torch.Tensor]:
        return self.inputs(media) if self._square is None else {"pixel_values": bytes_of(media)}

    def made(self, moved: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        if self._square is None:
            return super().made(moved, device)
        return {"pixel_values": self._square.made(moved["pixel_values"], device)}


class Llava(Alike):
    """LLaVA 1.5: the patches of one square, whatever the picture's shape."""

    is_captured = True

    def write(self, size: MediaSize, times_s: Sequence[float] = ()) -> Writing:
        side = max(size.width, size.height)
        if getattr(self.processor, "do_pad", None) and side > MAX_PADDED:
            raise InvalidRequest(
                f"a picture of {size.width}x{size.height} pixels is too large: it is made a square, and the limit of "
                f"one is {MAX_PADDED}x{MAX_PADDED}"
            )
        return super().write(size, times_s)

    def num_features(self, size: MediaSize) -> int:  # noqa: ARG002
        crop, vision = self.processor.crop_size, self.config.vision_config
        num_patches: int = (crop["height"] // vision.patch_size) * (crop["width"] // vision.patch_size)
        return num_patches + 1 if self.config.vision_feature_select_strategy == "full" else num_patches


class LlavaNext(Family):
    """LLaVA 1.6: the whole picture, and tiles of it enlarged, without the padding; each row ends with a vector."""

    takes: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")

    def num_features(self, size: MediaSize) -> int:
        rows, columns = self.unpadded(size)
        base = self.num_patches**2 + int(self.config.vision_feature_select_strategy == "full")
        return rows * columns + rows + base

    @property
    def num_patches(self) -> int:
        """Return the patches of a tile, one way."""
        vision = self.config.vision_config
        num_patches: int = vision.image_size // vision.patch_size
        return num_patches

    def unpadded(self, size: MediaSize) -> tuple[int, int]:
        """Return the rows and columns of patches of all tiles that are not padding throughout."""
        from transformers.image_processing_utils import select_best_resolution

        tile = self.config.vision_config.image_size
        best = select_best_resolution((size.height, size.width), self.config.image_grid_pinpoints)
        rows, columns = (self.num_patches * (length // tile) for length in best)
        if size.width / size.height > columns / rows:
            rows -= 2 * ((rows - int(round(size.height * (columns / size.width), 7))) // 2)
        else:
            columns -= 2 * ((columns - int(round(size.width * (rows / size.height), 7))) // 2)
        return rows, columns

    def joined(self, inputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the tiles of all pictures one after another: they have different numbers of them."""
        tiles = torch.cat([one["pixel_values"][0] for one in inputs])
        return {"pixel_values": tiles, "image_sizes": torch.cat([one["image_sizes"] for one in inputs])}


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video: LLaVA 1.6; each frame of a video is one square, pooled to a quarter of its patches."""

    kinds: ClassVar[tuple[str, ...]] = ("image", "video")

    @staticmethod
    def token_ids(config: Any) -> dict[str, int]:
        return {"image": config.image_token_id, "video": config.video_token_id}

    def joins(self, kind: str) -> bool:
        return kind == "image"

    def num_features(self, size: MediaSize) -> int:
        if size.kind == "image":
            return super().num_features(size)
        num_features: int = size.num_frames * (self.num_patches // self.config.spatial_pool_stride) ** 2
        return num_features

    def inputs(self, media: Media) -> dict[str, torch.Tensor]:
        if isinstance(media, Image):
            return super().inputs(media)
        return {"pixel_values_videos": frames_of(media, self.video_config)}

    def joined(self, inputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return inputs[0] if "pixel_values_videos" in inputs[0] else super().joined(inputs)


def frames_of(video: Video, config: Mapping[str, Any]) -> torch.Tensor:
    """Return the frames of a video as squares, [1, frames, 3, height, width]. config: of its processor."""
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(**{name: config[name] for name in SQUARE if config.get(name) is not None})
    made = processor(images=list(video.frames), input_data_format="channels_last", return_tensors="pt")
    pixels: torch.Tensor = made["pixel_values"]
    return pixels[None]


class LlavaOnevision(LlavaNextVideo):
    """LLaVA-OneVision: tiles, shrunk if there are many, of a picture that is alone; of others the whole."""

    takes: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes", "batch_num_images")
    settings: ClassVar = frozenset({ALONE})

    def in_context(self, media: Sequence[Sized]) -> list[Sized]:
        num_images = sum(one.kind == "image" for one in media)
        return [replace(one, settings={ALONE: int(num_images == 1)}) for one in media]

    def num_features(self, size: MediaSize) -> int:
        if size.kind == "video":
            return size.num_frames * (-(-self.num_patches // 2)) ** 2 + 1
        if not size.settings.get(ALONE):
            return self.num_patches**2 + 1
        rows, columns = self.unpadded(size)
        most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * self.num_patches**2))
        if ratio > MUCH:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return rows * columns + rows + self.num_patches**2

    def inputs(self, media: Media) -> dict[str, torch.Tensor]:
        if isinstance(media, Video):
            defaults: dict[str, Any] = {"size": {"height": 384, "width": 384}, "do_center_crop": False}
            return {"pixel_values_videos": frames_of(media, {**defaults, **self.video_config})}
        # A picture among others is prepared beside itself.
        images = [[media.pixels] if media.settings.get(ALONE) else [media.pixels] * 2]
        made = self.processor(images=images, input_data_format="channels_last", return_tensors="pt")
        first = {name: made[name][:1] for name in self.takes}
        return first | {"batch_num_images": made["batch_num_images"]}

    def joined(self, inputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if "pixel_values_videos" in inputs[0]:
            return inputs[0]
        return super().joined(inputs) | {"batch_num_images": torch.cat([one["batch_num_images"] for one in inputs])}


class Pixtral(Family):
    """Pixtral, Mistral Small 3.1: rows of patches, of the picture's own shape, each ended by a mark."""

    takes: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    row_end, end = "[IMG_BREAK]", "[IMG_END]"

    @property
    def patch(self) -> int:
        """Return the pixels of what becomes one feature, one way."""
        size: int = self.config.vision_config.patch_size * getattr(self.config, "spatial_merge_size", 1)
        return size

    def write(self, size: MediaSize, times_s: Sequence[float] = ()) -> Writing:  # noqa: ARG002
        rows, columns = self.grid(size)
        row = self.token_text["image"] * columns
        return Writing(self.row_end.join([row] * rows) + self.end, rows * columns)

    def grid(self, size: MediaSize) -> tuple[int, int]:
        """Return rows and columns of the features of a picture."""
        most = self.processor.size["longest_edge"]
        ratio = max(size.height / most, size.width / most, 1.0)
        height, width = math.floor(size.height / ratio), math.floor(size.width / ratio)
        if not height or not width:
            raise InvalidRequest(f"a picture of {size.width}x{size.height} pixels is too narrow")
        return -(-height // self.patch), -(-width // self.patch)

    def moved(self, media: Media) -> dict[str, torch.Tensor]:
        if not is_plain(self.processor, ["PixtralImageProcessorPil"], [PAD]):  # to the size of others beside it
            return self.inputs(media)
        size = [num * self.patch for num in self.grid(media.size)]
        return {"pixel_values": bytes_of(media), "image_sizes": torch.tensor([size])}

    def made(self, moved: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        pixels, sizes = moved["pixel_values"], moved["image_sizes"]
        if pixels.dtype is torch.uint8:
            height, width = sizes[0].tolist()
            pixels = resized(pixels, device, height, width, self.processor.resample).permute(0, 3, 1, 2)
            pixels = looked_up(pixels, values_of(self.processor, {}, device), 1)
        return super().made({"pixel_values": pixels, "image_sizes": sizes}, device)

    def options(self, media: Media) -> dict[str, Any]:  # noqa: ARG002
        return {"patch_size": {"height": self.patch, "width": self.patch}}

    def features(self, tower: Any, arguments: dict[str, Any]) -> torch.Tensor:
        """See `Family.features`. Where patches are merged, the tower loses a dimension of one feature: it sees two."""
        is_merged = self.patch > self.config.vision_config.patch_size
        if not is_merged or tuple(arguments["pixel_values"].shape) != (1, 3, self.patch, self.patch):
            return super().features(tower, arguments)
        return super().features(tower, {name: torch.cat([one, one]) for name, one in arguments.items()})[:, :1]

    def joined(self, inputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the pictures padded to one size."""
        sizes = torch.cat([one["image_sizes"] for one in inputs])
        height, width = sizes.amax(dim=0).tolist()
        pixels = [one["pixel_values"] for one in inputs]
        padded = [F.pad(one, (0, width - one.shape[3], 0, height - one.shape[2])) for one in pixels]
        return {"pixel_values": torch.cat(padded), "image_sizes": sizes}


class LightOnOCR(Pixtral):
    """LightOnOCR: Mistral Small 3.1's rows of patches, without marks."""

    row_end, end = "", ""


class FramesAsPictures(Family):
    """Families to whose towers and prompts the frames of a video are pictures: a text stands for it, and no token."""

    kinds: ClassVar[tuple[str, ...]] = ("image", "video")
    video = "<video>"

    @staticmethod
    def token_ids(config: Any) -> dict[str, int]:
        return dict.fromkeys(("image", "video"), config.image_token_id)

    def placeholders(self) -> dict[str, str]:
        return {"image": self.token_text["image"], "video": self.video}


class InternVL(FramesAsPictures):
    """InternVL: the picture cut into squares, and the whole of it shrunk to one; each frame of a video is one."""

    settings: ClassVar = frozenset({"max_dynamic_patch"})
    begin, end = "<img>", "</img>"

    def options(self, media: Media | MediaSize) -> dict[str, Any]:
        if media.kind == "video":
            return {"crop_to_patches": False}
        most = media.settings.get("max_dynamic_patch")
        return {} if most is None else {"max_patches": max(min(most, self.processor.max_patches), 1)}

    def write(self, size: MediaSize, times_s: Sequence[float] = ()) -> Writing:  # noqa: ARG002
        vision = self.config.vision_config
        height, width = (length // patch for length, patch in zip(vision.image_size, vision.patch_size, strict=True))
        of_square, seen = int(height * width * self.config.downsample_ratio**2), self.token_text["image"]
        if size.kind == "video":
            frame = f"{self.begin}{seen * of_square}{self.end}"
            text = "\n".join(f"Frame{i}: {frame}" for i in range(1, size.num_frames + 1))
            return Writing(text, of_square * size.num_frames)
        num_squares = self.processor.get_number_of_image_patches(size.height, size.width, self.options(size))
        num_features = of_square * num_squares
        return Writing(f"{self.begin}{seen * num_features}{self.end}", num_features)


class QianfanOCR(InternVL):
    """Qianfan-OCR: InternVL, in whose prompts a text stands for a picture that is no token."""

    kinds: ClassVar[tuple[str, ...]] = ("image",)

    def placeholders(self) -> dict[str, str]:
        return {"image": "<image>"}

    def options(self, media: Media | MediaSize) -> dict[str, Any]:
        return {"crop_to_patches": True, **super().options(media)}


class DeepseekOCR(Family):
    """DeepSeek-OCR 2: the whole picture, tiles of one that is larger than a tile, and a vector behind them.

    A tile becomes as many features as the tower has queries, of which there are two numbers.
    """

    queries = (144, 256)

    def num_features(self, size: MediaSize) -> int:
        from transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2 import get_optimal_tiled_canvas

        processor, num_tiles = self.processor, 0
        tile, whole = processor.tile_size, processor.size["height"]
        short, long = sorted((size.height, size.width))
        if not round(short * (whole / long)):
            raise InvalidRequest(f"a picture of {size.width}x{size.height} pixels is too narrow")
        if long > tile:
            limits = processor.min_patches, processor.max_patches
            num_tiles = math.prod(get_optimal_tiled_canvas((size.height, size.width), (tile, tile), *limits))
        return self.of_square(whole) + num_tiles * self.of_square(tile) + 1

    def of_square(self, side: int) -> int:
        """Return the features of a square: the fewest queries that are as many as its patches, merged by 4 x 4."""
        num_patches = (side // self.config.vision_config.sam_config.patch_size // 4) ** 2
        return self.queries[num_patches > self.queries[0]]

    def inputs(self, media: Media) -> dict[str, torch.Tensor]:
        assert isinstance(media, Image)
        made = self.processor(images=[media.pixels], input_data_format="channels_last", return_tensors="pt")
        tile = self.processor.tile_size
        return {"pixel_values_local": torch.empty(0, 3, tile, tile), **made}

    def joined(self, inputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the tiles of all pictures one after another; not even none if there are none."""
        return {name: one for name, one in super().joined(inputs).items() if len(one)}


class Idefics3(Family):
    """Idefics 3: tiles, each behind a tag of its row and column, and the whole picture."""

    takes: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_attention_mask")
    around, whole = "<fake_token_around_image>", "<global-img>"

    @property
    def of_tile(self) -> int:
        """Return the features of a tile."""
        vision = self.config.vision_config
        num_features: int = (vision.image_size // vision.patch_size) ** 2 // self.config.scale_factor**2
        return num_features

    @property
    def seen_whole(self) -> str:
        """Return the text of a whole picture."""
        return f"{self.around}{self.whole}{self.token_text['image'] * self.of_tile}{self.around}"

    def write(self, size: MediaSize, times_s: Sequence[float] = ()) -> Writing:  # noqa: ARG002
        _, rows, columns = self.processor.get_number_of_image_patches(size.height, size.width, {})
        seen = self.token_text["image"] * self.of_tile
        text = "".join(
            "".join(f"{self.around}<row_{row}_col_{column}>{seen}" for column in range(1, columns + 1)) + "\n"
            for row in range(1, rows + 1)
        )
        text += "\n" if rows else ""
        return Writing(f"{text}{self.seen_whole}", self.of_tile * (rows * columns + 1))

    def joined(self, inputs: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the tiles of all pictures as if they were of one."""
        return {name: torch.cat([one[name] for one in inputs], dim=1) for name in inputs[0]}


class SmolVLM(FramesAsPictures, Idefics3):
    """SmolVLM 2: Idefics 3; a video is told in words, with each of its frames, whole, behind its time."""

    def frames(self) -> dict[str, int]:
        sampling = self.video_config.get("video_sampling", {})
        return {"fps": sampling.get("fps", 1), "max_frames": sampling.get("max_frames", 64)}

    def write(self, size: MediaSize, times_s: Sequence[float] = ()) -> Writing:
        if size.kind == "image":
            return super().write(size)
        times = [int(time_s) for time_s in times_s] or [0] * size.num_frames
        length = int(times_s[-1] + LAST_FRAME_S) if times_s else 0
        text = (
            f"You are provided the following series of {in_words(size.num_frames)} frames from a "
            f"{length // 3600}:{length // 60 % 60:02}:{length % 60:02} [H:MM:SS] video.\n"
        )
        text += "".join(f"\nFrame from {time // 60:02}:{time % 60:02}:{self.seen_whole}" for time in times)
        return Writing(f"{text}\n\n", self.of_tile * size.num_frames)

    def options(self, media: Media) -> dict[str, Any]:
        if media.kind == "image":
            return {}
        size = self.video_config.get("video_sampling", {}).get("video_size") or self.video_config.get("size")
        return {"do_image_splitting": False} | ({"size": size} if size else {})


class Gemma3(Alike):
    """Gemma 3: one square, as so many vectors, that see each other; between marks and empty lines."""

    is_captured = is_whole = True

    @staticmethod
    def token_ids(config: Any) -> dict[str, int]:
        return {"image": config.image_token_id, "begin": config.boi_token_index, "end": config.eoi_token_index}

    def placeholders(self) -> dict[str, str]:
        return {"image": self.token_text["begin"]}

    def write(self, size: MediaSize, times_s: Sequence[float] = ()) -> Writing:  # noqa: ARG002
        token, num_features = self.token_text, self.config.mm_tokens_per_image
        return Writing(f"\n\n{token['begin']}{token['image'] * num_features}{token['end']}\n\n", num_features)


class Gemma4(Family):
    """Gemma 4: so many squares of patches as fit, in the picture's own shape; in some models they see each other.

    Each frame of a video, fewer of them, stands behind its time.
    """

    kinds: ClassVar[tuple[str, ...]] = ("image", "video")
    takes: ClassVar[tuple[str, ...]] = ("pixel_values", "image_position_ids")

    def __init__(self, config: Any, *args: Any) -> None:
        super().__init__(config, *args)
        self.is_whole = config.get_text_config().use_bidirectional_attention == "vision"

    @staticmethod
    def token_ids(config: Any) -> dict[str, int]:
        ids = {"image": config.image_token_id, "video": config.video_token_id}
        return ids | {"begin": config.boi_token_id, "end": config.eoi_token_id}

    def frames(self) -> dict[str, int]:
        return {"max_frames": self.video_config.get("num_frames", 32)}

    def most(self, kind: str) -> int:
        """Return the features of a picture or a frame, at most."""
        num_features: int = (
            self.processor.max_soft_tokens if kind == "image" else self.video_config.get("max_soft_tokens", 70)
        )
        return num_features

    def options(self, media: Media) -> dict[str, Any]:
        return {"max_soft_tokens": self.most(media.kind)}

    def inputs(self, media: Media) -> dict[str, torch.Tensor]:
        made = super().inputs(media)
        if media.kind == "image":
            return made
        names = {"pixel_values": "pixel_values_videos", "image_position_ids": "video_position_ids"}
        return {names[name]: value for name, value in made.items()} | {
            "num_frames_per_video": torch.tensor([media.size.num_frames])
        }

    def write(self, size: MediaSize, times_s: Sequence[float] = ()) -> Writing:
        from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

        patch, pool = self.processor.patch_size, self.processor.pooling_kernel_size
        most = self.most(size.kind) * pool**2
        try:
            height, width = get_aspect_ratio_preserving_size(size.height, size.width, patch, most, pool)
        except ValueError as error:
            raise InvalidRequest(f"a picture of {size.width}x{size.height} pixels cannot be read: {error}") from None
        num_features, token = (height // (patch * pool)) * (width // (patch * pool)), self.token_text
        seen = f"{token['begin']}{token[size.kind] * num_features}{token['end']}"
        if size.kind == "image":
            return Writing(seen, num_features)
        times = [int(time_s) for time_s in times_s] or [0] * size.num_frames
        text = " ".join(f"{time // 60:02}:{time % 60:02} {seen}" for time in times)
        return Writing(text, num_features * size.num_frames)


# By the names that engine.models.architectures has for them.
FAMILIES: dict[str, type[Family]] = {
    "deepseek ocr": DeepseekOCR,
    "gemma 3": Gemma3,
    "gemma 4": Gemma4,
    "glm": Glm,
    "glm 4.6": Glm46,
    "grid": Grid,
    "timed grid": TimedGrid,
    "idefics 3": Idefics3,
    "internvl": InternVL,
    "kimi": Kimi,
    "kimi k2.5": KimiVideos,
    "lighton ocr": LightOnOCR,
    "llava": Llava,
    "llava next": LlavaNext,
    "llava next video": LlavaNextVideo,
    "llava onevision": LlavaOnevision,
    "paddle ocr": PaddleOCR,
    "pixtral": Pixtral,
    "plain grid": PlainGrid,
    "qianfan ocr": QianfanOCR,
    "smolvlm": SmolVLM,
}
