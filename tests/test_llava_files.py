"""LLaVA as its authors publish it: the same weights as transformers' own files of it give the same answers."""

import asyncio
import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import InvalidRequest, ModelError
from engine.media import Media
from engine.models.registry import load_config
from engine.text.tokenizer import Tokenizer
from engine.vision.llava_files import LlavaFiles, new_projector
from engine.vision.reader import load_reader
from engine.vision.tower import load_tower
from tests.conftest import VOCAB_SIZE, save_tokenizer
from tests.fake_engine import serving
from tests.test_engine import running_engine
from tests.test_vision import EXTREME_SIZES, SIZES, ask, pictures, prompt
from tests.vision_models import PINPOINTS, make_vision_model, picture, video

CPU = torch.device("cpu")
CLIP_LAYERS, SIGLIP_LAYERS = 3, 2
IN_FILES = r"model.vision_tower.vision_tower.vision_model.\1"
# What config.json says of pictures, by what reads them in transformers' files.
ENTRIES: dict[str, dict[str, Any]] = {
    "llava": {"architectures": ["LlavaLlamaForCausalLM"], "image_aspect_ratio": "pad"},
    "llava next": {
        "architectures": ["LlavaMistralForCausalLM"],
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[width, height] for height, width in PINPOINTS],
    },
    "llava onevision": {
        "architectures": ["LlavaQwenForCausalLM"],
        "image_aspect_ratio": "anyres_max_9",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[width, height] for height, width in [*PINPOINTS, [112, 112]]],
    },
}


def publish(source: Path, folder: Path, family: str, **entries: Any) -> Path:
    """Write the model in `source`, transformers' files, into `folder` as LLaVA's authors do.

    Its vocabulary is that of texts. entries: of config.json, instead of those that describe the model.
    """
    tower = folder / "tower"
    whole = json.loads((source / "config.json").read_text())
    vision = whole["vision_config"]
    vision |= {"num_hidden_layers": vision["num_hidden_layers"] + (family == "llava onevision")}
    tower.mkdir(parents=True)
    (tower / "config.json").write_text(json.dumps(vision))
    flat = {
        **whole["text_config"],
        "model_type": "llava",
        "vocab_size": VOCAB_SIZE,
        "mm_vision_tower": "tower",
        "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu",
        "tie_word_embeddings": False,
        **ENTRIES[family],
        **entries,
    }
    (folder / "config.json").write_text(json.dumps(flat))
    weights = {}
    for name, weight in load_file(source / "model.safetensors").items():
        new = re.sub(r"^(?:model\.)?language_model\.(?:model\.)?", "model.", name).replace("model.lm_head", "lm_head")
        new = re.sub(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?(.*)", IN_FILES, new)
        new = re.sub(r"^(?:model\.)?image_newline", "model.image_newline", new)
        for part, index in (("linear_1", 0), ("linear_2", 2)):
            new = re.sub(rf"^(?:model\.)?multi_modal_projector\.{part}", f"model.mm_projector.{index}", new)
        rows = slice(VOCAB_SIZE) if "embed_tokens" in new or new == "lm_head.weight" else slice(None)
        weights[new] = weight[rows].contiguous()
    save_file(weights, folder / "model.safetensors")
    save_tokenizer(folder)
    return folder


def move_tower(folder: Path, tower: Path) -> None:
    """Move the tower's weights out of the model's files into a folder of their own, as that of a whole CLIP."""
    weights = load_file(folder / "model.safetensors")
    prefix = IN_FILES.removesuffix(r"\1")
    moved = {f"vision_model.{name.removeprefix(prefix)}": one for name, one in weights.items() if prefix in name}
    tower.mkdir(exist_ok=True)
    save_file({**moved, "logit_scale": torch.ones(1)}, tower / "model.safetensors")
    save_file({name: one for name, one in weights.items() if prefix not in name}, folder / "model.safetensors")


async def answers(engine: Engine) -> list[tuple[list[int], list[int]]]:
    """Return where features stand in each prompt, and the greedy answer to it."""
    found = []
    for i, sizes in enumerate(SIZES[:3]):
        ids, media = await prompt(engine, i, pictures(sizes))
        answer, _ = await ask(engine, ids, media)
        found.append(([int(place) for places in media.places for place in places], answer))
    return found


def features(folder: Path, **options: Any) -> list[torch.Tensor]:
    config = EngineConfig(model_path=str(folder), dtype="float32", **options)
    model_config = load_config(folder, config)
    reader = load_reader(folder, model_config, Tokenizer.load(folder), config)
    assert reader is not None
    tower = load_tower(reader.family, folder, model_config, config.load_format, CPU)
    media = reader.family.in_context(pictures((*SIZES[-1], *EXTREME_SIZES[:3])))
    return [found for one in media for found in tower.encode([one])]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder of each family as transformers writes it."""
    found = {family: make_vision_model(tmp_path_factory.mktemp("hf"), family) for family in ENTRIES}
    processor = transformers.LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    processor.save_pretrained(found["llava"])
    file = found["llava onevision"] / "preprocessor_config.json"
    halves = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    file.write_text(json.dumps(json.loads(file.read_text()) | halves))
    for folder in found.values():
        weights = load_file(folder / "model.safetensors")
        for name in weights:
            if name.endswith("lm_head.weight"):
                weights[name][VOCAB_SIZE:] = 0.0  # no answer has what the published vocabulary lacks
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return found


@pytest.mark.parametrize(
    ("family", "is_apart"), [("llava", False), ("llava", True), ("llava next", False), ("llava onevision", True)]
)
async def test_features_and_answers_are_those_of_transformers_files(
    family: str, is_apart: bool, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources[family]
    folder = publish(source, tmp_path / "published", family)
    if is_apart:
        move_tower(folder, folder / "tower")
    found = [await asyncio.to_thread(features, path) for path in (folder, source)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    # One tokenizer knows the placeholder, by an id that the model's vocabulary lacks; the other does not.
    tokenizer = source if is_apart else folder
    async with running_engine(source) as engine:
        wanted = await answers(engine)
    async with running_engine(folder, tokenizer_path=str(tokenizer)) as engine:
        assert engine.media_kinds["image"] == "<image>"
        assert await answers(engine) == wanted


async def test_frames_stand_beside_pictures_without_a_token_for_either(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = publish(sources["llava onevision"], tmp_path / "published", "llava onevision")
    found = []
    for path in (folder, sources["llava onevision"]):
        async with running_engine(path) as engine:
            media: list[Media] = [video(3, 44, 37), picture(40, 61)]
            ids, its_media = await engine.encode_media("See <video> and <image>: what moves?", media)
            answer, _ = await ask(engine, ids, its_media)
            found.append(([place.tolist() for place in its_media.places], answer))
            with pytest.raises(InvalidRequest, match="place 0 of the prompt is for images, not for videos"):
                await engine.encode_media("See <image> and <video>", media)
    assert found[0] == found[1]


async def test_a_picture_is_padded_only_where_the_config_says_so(sources: dict[str, Path], tmp_path: Path) -> None:
    folders = [
        publish(sources["llava"], tmp_path / ratio, "llava", image_aspect_ratio=ratio) for ratio in ("pad", "square")
    ]
    padded, cropped = [await asyncio.to_thread(features, folder) for folder in folders]
    square = SIZES[-1].index((48, 48))
    assert [torch.equal(*pair) for pair in zip(padded, cropped, strict=True)].count(True) == 3
    assert torch.equal(padded[square], cropped[square])


async def test_norms_stand_behind_each_layer_of_yi_vls_projector(sources: dict[str, Path], tmp_path: Path) -> None:
    plain = await asyncio.to_thread(features, publish(sources["llava"], tmp_path / "plain", "llava"))
    entries = {"architectures": ["YiVLForCausalLM"], "mm_projector_type": "mlp2x_gelu_Norm"}
    folder = publish(sources["llava"], tmp_path / "yi", "llava", **entries)
    weights = load_file(folder / "model.safetensors")
    projector = {name: one for name, one in weights.items() if "mm_projector" in name}
    with pytest.raises(
        ModelError,
        match=r"mm_projector in .*yi has weights .*, an mlp2x_gelu_Norm of config.json's .*'1.weight': \[64\]",
    ):
        await asyncio.to_thread(features, folder)
    norms = {f"model.mm_projector.{i}.{name}": torch.rand(64) for i in (1, 4) for name in ("weight", "bias")}
    moved = {name.replace("projector.2", "projector.3"): one for name, one in projector.items()}
    others = {name: one for name, one in weights.items() if name not in projector}
    save_file(others | moved | norms, folder / "model.safetensors")
    found = await asyncio.to_thread(features, folder)

    def normed(hidden: torch.Tensor, i: int) -> torch.Tensor:
        prefix = f"model.mm_projector.{i}"
        return torch.nn.functional.layer_norm(hidden, (64,), norms[f"{prefix}.weight"], norms[f"{prefix}.bias"])

    # Behind the last layer the plain model's features, had its first layer a norm as well.
    first, second = (torch.nn.Linear(32, 64), torch.nn.Linear(64, 64))
    for layer, i in ((first, 0), (second, 2)):
        layer.load_state_dict({name: projector[f"model.mm_projector.{i}.{name}"] for name in ("weight", "bias")})
    layers = new_projector("mlp2x_gelu_Norm", 32, 64)
    layers.load_state_dict({name.removeprefix("model.mm_projector."): one for name, one in (moved | norms).items()})
    hidden = torch.randn(3, 32)
    with torch.inference_mode():
        wanted = normed(second(torch.nn.functional.gelu(normed(first(hidden), 1))), 4)
        assert torch.equal(layers(hidden), wanted)
    assert not any(torch.equal(*pair) for pair in zip(found, plain, strict=True))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"mm_vision_tower": "org/no-such-tower"}, "mm_vision_tower is not to be had: .*--json-model-override-args"),
        ({"mm_vision_tower": None}, "mm_vision_tower must name a tower, got None"),
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio 'highres' with mm_patch_merge_type 'flat'"),
        ({"image_aspect_ratio": "anyres"}, "'anyres' with mm_patch_merge_type 'flat' is not served"),
        ({"mm_vision_select_feature": "cls"}, "'cls' is none of patch, cls_patch"),
        ({"mm_projector_type": "ldpnet"}, "mm_projector_type 'ldpnet' is not served"),
        (
            {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": "(1x1)"},
            r"must be a list of \[width, height\], got '\(1x1\)'",
        ),
    ],
)
async def test_what_cannot_be_read_is_named(
    entries: dict[str, Any], message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = publish(sources["llava"], tmp_path / "published", "llava", **entries)
    with pytest.raises(ModelError, match=message):
        await asyncio.to_thread(features, folder)


async def test_the_towers_of_the_published_models_need_no_folder_but_for_their_weights(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    names = {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    folder = publish(sources["llava"], tmp_path / "published", "llava", **names)
    config = EngineConfig(model_path=str(folder))
    files = LlavaFiles(folder, load_config(folder, config).raw, config, {"<image>": 7}.get)
    assert (files.config.vision_config.image_size, files.config.vision_config.hidden_size) == (336, 1024)
    assert files.processor.crop_size["height"] == 336 and files.config.image_token_id == 7
    move_tower(folder, tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="openai/clip-vit-large-patch14-336 is no local folder"):
        files.weights(folder)


async def test_the_seeds_command_answers_about_a_picture_and_a_second_turn_reads_it_from_the_cache(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = publish(sources["llava"], tmp_path / "published", "llava")
    buffer = io.BytesIO()
    Pillow.fromarray(picture(40, 61).pixels).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 8}
    options = {"tokenizer_path": str(sources["llava"])}
    async with (
        running_engine(folder, **options) as engine,
        serving(engine, chat_template="vicuna_v1.1", enable_cache_report=True) as client,
    ):
        first = await (await client.post("/v1/chat/completions", json=body)).json()
        answer = first["choices"][0]["message"]
        body["messages"] += [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": "And?"}]
        second = await (await client.post("/v1/chat/completions", json=body)).json()
        body["messages"] = [{"role": "user", "content": "<image>"}]
        written = await client.post("/v1/chat/completions", json=body)
        assert written.status == 200  # text, and no picture
        assert engine.started.encoder is not None and engine.started.encoder.stats.num_encoded == 1
    usage = second["usage"]
    num_cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert first["usage"]["prompt_tokens"] - 1 <= num_cached < usage["prompt_tokens"]
