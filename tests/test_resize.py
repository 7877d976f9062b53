"""Pictures are resized, cut and normalized as Pillow and transformers' image processors do it, bit for bit."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import InvalidRequest
from engine.media import Image, MediaSize
from engine.vision import pixels
from engine.vision.families import Llava, Pixtral
from engine.vision.pixels import ALWAYS, bytes_of, is_plain, square_of
from kernels import resize as module
from kernels.resize import Pass, Window, pass_torch, resize, resize_by, resize_pillow
from kernels.resize_plan import REACH, Resampling
from kernels.triton_resize import pass_triton
from tests.vision_models import picture

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Height and width, before and after: smaller, larger, both, one way alone, one pixel, columns before rows.
SHAPES = (
    ((23, 31), (11, 13)), ((9, 5), (20, 11)), ((7, 30), (9, 8)), ((12, 10), (12, 15)), ((12, 10), (5, 10)),
    ((1, 1), (4, 3)), ((6, 7), (1, 1)), ((230, 2), (21, 9)), ((2, 201), (3, 9)), ((101, 1), (110, 2)),
)  # fmt: skip


def frames(height: int, width: int, num_frames: int = 1) -> torch.Tensor:
    return torch.cat([bytes_of(picture(height, width, seed)) for seed in range(num_frames)])


@pytest.mark.parametrize("one_pass", [pass_torch, pass_triton])
@pytest.mark.parametrize("how", REACH)
def test_sums_of_whole_numbers_are_what_pillow_makes(one_pass: Pass, how: Resampling) -> None:
    for (height, width), new in SHAPES:
        wanted = resize_pillow(frames(height, width, 2), *new, how, Window(0, 0, *new))
        found = resize_by(one_pass, frames(height, width, 2).to(DEVICE), *new, how, Window(0, 0, *new))
        assert torch.equal(found.cpu(), wanted), (height, width, new)


@pytest.mark.parametrize("one_pass", [pass_torch, pass_triton])
def test_a_part_of_a_picture_is_that_of_the_whole(one_pass: Pass) -> None:
    for window in (Window(3, 5, 4, 6), Window(0, 0, 1, 1), Window(10, 12, 1, 1), Window(0, 4, 11, 2)):
        whole = resize_pillow(frames(23, 41), 11, 13, Resampling.BICUBIC, Window(0, 0, 11, 13))
        part = resize_by(one_pass, frames(23, 41).to(DEVICE), 11, 13, Resampling.BICUBIC, window)
        top, left, height, width = window
        assert torch.equal(part.cpu(), whole[:, top : top + height, left : left + width])


def test_of_a_picture_that_would_become_huge_only_the_part_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of a million pixels would become 336 lines of 336 million."""
    long = frames(1, 1_000_000)
    middle = resize(long, 336, 336 * 1_000_000, Resampling.BICUBIC, Window(0, 168 * 1_000_000, 336, 336))
    assert middle.shape == (1, 336, 336, 3) and torch.equal(middle[0, 0, 168], long[0, 0, 500_000])
    monkeypatch.setattr(module, "MAX_WHOLE", 0)
    few = frames(30, 40).to(DEVICE)
    assert torch.equal(
        resize(few, 9, 9, Resampling.BOX).cpu(), resize_pillow(few.cpu(), 9, 9, Resampling.BOX, Window(0, 0, 9, 9))
    ), "Pillow's, as no other knows it"
    monkeypatch.setattr(module, "pass_torch", None)
    assert resize(few.cpu(), 9, 9, Resampling.BICUBIC).shape == (1, 9, 9, 3), "a whole picture is Pillow's at any size"


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 20}}),
        ("CLIPImageProcessorPil", {"size": {"height": 30, "width": 22}, "do_center_crop": False, "resample": 2}),
        ("SiglipImageProcessorPil", {"size": {"height": 28, "width": 28}}),
        ("Gemma3ImageProcessorPil", {"size": {"height": 32, "width": 32}}),
    ],
)
def test_a_plain_image_processor_is_done_without(
    name: str, entries: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    processor = getattr(transformers, name)(**entries)
    square = square_of(processor)
    assert square is not None
    for size in ((37, 53), (24, 24), (90, 11), (1, 70), (300, 2), (20, 50)):
        one = picture(*size)
        wanted = processor(images=[one.pixels], input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        monkeypatch.setattr(pixels, "MAX_MOVED", 0 if size == (37, 53) else 1 << 20)  # resized on the host, too
        found = square.made(bytes_of(one), DEVICE)
        assert found.dtype == wanted.dtype and torch.equal(found.cpu(), wanted), size


@pytest.mark.parametrize("entries", [{}, {"do_pad": False}, {"do_normalize": False}])
def test_pixtrals_image_processor_is_done_without_too(entries: dict[str, Any]) -> None:
    from transformers import PixtralImageProcessorPil

    config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=4), spatial_merge_size=2)
    processor = PixtralImageProcessorPil(size={"longest_edge": 60}, patch_size={"height": 4, "width": 4}, **entries)
    family = Pixtral(config, processor, {"image": "[IMG]"})
    for size in ((37, 53), (90, 11), (1, 50), (300, 200), (56, 32)):
        wanted, moved = family.inputs(picture(*size)), family.moved(picture(*size))
        found = family.made(moved, DEVICE)
        assert (moved["pixel_values"].dtype is torch.uint8) == ("do_normalize" not in entries)
        for name, one in wanted.items():
            assert found[name].dtype == one.dtype and torch.equal(found[name].cpu(), one), (name, size)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 24}, "do_center_crop": False}),  # of any shape
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 24}, "crop_size": {"height": 30, "width": 30}}),
        ("CLIPImageProcessorPil", {"do_normalize": False}),
        ("LlavaImageProcessorPil", {"do_pad": True}),
        ("Gemma3ImageProcessorPil", {"size": {"height": 32, "width": 32}, "do_pan_and_scan": True}),
        ("Idefics3ImageProcessorPil", {}),
    ],
)
def test_an_image_processor_that_does_more_is_asked(name: str, entries: dict[str, Any]) -> None:
    import transformers

    assert square_of(getattr(transformers, name)(**entries)) is None


def test_an_image_processor_of_a_version_that_lacks_the_classes_is_asked() -> None:
    assert not is_plain(SimpleNamespace(**dict.fromkeys(ALWAYS, True)), ["NoImageProcessorPil"])


def test_a_picture_that_bars_would_make_a_huge_square_is_refused() -> None:
    from transformers import LlavaImageProcessorPil

    vision = SimpleNamespace(patch_size=14)
    config = SimpleNamespace(vision_config=vision, vision_feature_select_strategy="default")
    padded, cut = (Llava(config, LlavaImageProcessorPil(do_pad=does), {"image": "<image>"}) for does in (True, False))
    assert padded.write(MediaSize("image", 10_000, 10)).num_features == 256
    assert cut.write(MediaSize("image", 10_001, 10)).num_features == 256
    with pytest.raises(InvalidRequest, match="it is made a square, and the limit of one is 10000x10000"):
        padded.write(MediaSize("image", 10_001, 10))


def test_pixels_that_nobody_may_write_to_are_read_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels.flags.writeable = False
    assert bytes_of(Image(pixels, b"")).shape == (1, 2, 3, 3) and not recwarn
