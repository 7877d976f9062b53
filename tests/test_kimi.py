"""Kimi-VL has K2.5's tower under other names, and a limit of its own for large pictures."""

import asyncio
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.media import MediaSize, Video
from engine.vision.kimi import Kimi, KimiVideos, Processing
from tests.test_engine import running_engine
from tests.test_llava_files import answers, features
from tests.vision_models import MEDIA_PAD, make_vision_model

NAMES = {"mm_projector.proj.0": "linear_1", "mm_projector.proj.2": "linear_2", "mm_projector.pre_norm": "pre_norm"}


@pytest.fixture(scope="module")
def k25(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision_model(tmp_path_factory.mktemp("k25"), "kimi k2.5")


def as_kimi_vl(source: Path, folder: Path) -> Path:
    """Write the model in `source` into `folder` by the names of Kimi-VL."""
    whole = json.loads((source / "config.json").read_text())
    vision = {re.sub("^pos_emb_", "init_pos_emb_", name): value for name, value in whole["vision_config"].items()}
    config = {
        "architectures": ["KimiVLForConditionalGeneration"],
        "model_type": "kimi_vl",
        "text_config": whole["text_config"] | {"model_type": "deepseek_v3"},
        "vision_config": vision | {"model_type": "moonvit"},
        "media_placeholder_token_id": MEDIA_PAD,
        "tie_word_embeddings": False,
    }
    weights = load_file(source / "model.safetensors")
    for ours, theirs in NAMES.items():
        weights = {name.replace(ours, f"multi_modal_projector.{theirs}"): one for name, one in weights.items()}
    for file in source.iterdir():
        if "token" in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    limits = {"in_token_limit": 150, "patch_limit_on_one_side": 16}  # the latter only because K2.5's has it
    (folder / "preprocessor_config.json").write_text(json.dumps(limits))
    return folder


async def test_features_and_answers_are_those_of_the_same_weights_by_k25s_names(k25: Path, tmp_path: Path) -> None:
    folder = as_kimi_vl(k25, tmp_path)
    found = [await asyncio.to_thread(features, path) for path in (folder, k25)]
    assert [len(one) for one in found[0]] == [1] * len(found[0])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    answered = []
    for path in (folder, k25):
        async with running_engine(path) as engine:
            assert engine.media_kinds["image"] == "<|media_pad|>"
            assert len(engine.media_kinds) == (2 if path is k25 else 1), "Kimi-VL reads no videos"
            answered.append(await answers(engine))
    assert answered[0] == answered[1]


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((1, 1), (1, 1)),
        ((28, 57), (1, 3)),
        ((700, 1000), (25, 36)),
        # More than 4,096 patches, or 512 one way: shrunk as a whole, then padded.
        ((1000, 1500), (27, 40)),
        ((3000, 1500), (46, 23)),
        ((20000, 28), (256, 1)),
    ],
)
def test_a_picture_is_shrunk_only_if_it_has_too_many_patches(size: tuple[int, int], grid: tuple[int, int]) -> None:
    family = Kimi(None, Processing(14, 2, 4096, 512, [0.5] * 3, [0.5] * 3), {"image": "<|media_pad|>"})
    assert family.grid(MediaSize("image", size[1], size[0])) == grid


def test_four_frames_of_a_video_become_one_behind_their_time() -> None:
    family = KimiVideos(None, Processing(14, 2, 16384, 512, [0.5] * 3, [0.5] * 3), {"image": "<|media_pad|>"})
    size = MediaSize("video", 57, 28, num_frames=6)
    seen = "<|media_begin|>video<|media_content|>" + "<|media_pad|>" * 3 + "<|media_end|>"
    written = family.write(size, (0.0, 0.5, 1.0, 1.5, 3725.25, 3726.0))
    assert (written.text, written.num_features) == (f"00:00:00.000{seen}01:02:05.250{seen}", 6)
    made = family.inputs(Video(np.zeros((6, 28, 57, 3), np.uint8), (), b""))
    assert made["image_grid_thw"].tolist() == [[4, 2, 6], [2, 2, 6]]
    assert len(made["pixel_values"]) == 6 * 2 * 6
    grids = family.grid(MediaSize("image", 2000, 2000)), family.grid(MediaSize("video", 2000, 2000))
    assert grids == ((65, 65), (33, 33)), "a frame has a limit of its own"
