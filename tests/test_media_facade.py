"""Models that read text alone: what the facade says of pictures."""

import asyncio

import numpy as np
import pytest

from engine.errors import InvalidRequest
from engine.media import Image, Video
from tests.fake_engine import FakeEngine

PICTURE = Image(np.zeros((3, 5, 3), np.uint8), b"digest")


def test_a_media_size_is_the_width_and_height_of_the_pixels() -> None:
    assert (PICTURE.size.kind, PICTURE.size.width, PICTURE.size.height) == ("image", 5, 3)
    size = Video(np.zeros((7, 3, 5, 3), np.uint8), (0.0,) * 7, b"digest").size
    assert (size.kind, size.num_frames, size.width, size.height) == ("video", 7, 5, 3)


def test_a_text_model_reads_no_pictures_and_says_so() -> None:
    engine = FakeEngine()
    assert engine.media_kinds == {}
    assert engine.count_media_tokens([]) == []
    with pytest.raises(InvalidRequest, match="text alone, and no image"):
        engine.count_media_tokens([PICTURE.size])
    with pytest.raises(InvalidRequest, match="text alone, and no image"):
        asyncio.run(engine.encode_media("<image>", [PICTURE]))
