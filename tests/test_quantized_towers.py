"""Towers that a checkpoint holds in few bits make the features of what they stand for."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.weights import tensors_of
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.models.registry import load_config
from engine.text.tokenizer import Tokenizer
from engine.vision.llava_files import IN_MODEL
from engine.vision.reader import load_reader
from engine.vision.tower import load_tower
from tests.quantized_files import CASES, Case, Weights, write_quantized
from tests.vision_models import FAMILIES, make_vision_model, picture

FAMILY = "qwen 2.5 vl"
QUANTIZED = r"^visual\.blocks\.\d+\.(attn|mlp)\."
FC = "visual.blocks.1.mlp.up_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose tower's sizes are those of whole groups."""
    family = FAMILIES[FAMILY]
    vision = family.settings["vision_config"] | {"hidden_size": 64, "intermediate_size": 128}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, FAMILY, replace(family, settings=family.settings | {"vision_config": vision}))
        return make_vision_model(tmp_path_factory.mktemp("vision"), FAMILY)


def features(folder: Path) -> torch.Tensor:
    config = EngineConfig(model_path=str(folder), dtype="float32")
    model_config = load_config(folder, config)
    reader = load_reader(folder, model_config, Tokenizer.load(folder), config)
    assert reader is not None
    return load_tower(reader.family, folder, model_config, "auto", torch.device("cpu")).encode([picture(24, 32)])[0]


def quantized(name: str, plain: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return a case's checkpoint with a quantized tower, and the plain one that it stands for."""
    shutil.copytree(plain, tmp_path / "plain")

    def write(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor | None]:
        return CASES[name].write(module, weight, random) if weight.dim() == 2 else ({"weight": weight}, None)

    write_quantized(tmp_path / "plain", Case(CASES[name].config, write, modules=QUANTIZED), tmp_path / "packed")
    return tmp_path / "packed", tmp_path / "plain"


@pytest.mark.parametrize(
    "name",
    [
        "awq", "gptq, desc_act", "bitsandbytes, double", "bitsandbytes, int8", "compressed-tensors, FP8 dynamic",
        "compressed-tensors, W4A16", "fp8 of Mistral", "modelopt, NVFP4", "torchao, int8",
    ],
)  # fmt: skip
def test_a_quantized_tower_makes_the_features_of_what_it_stands_for(name: str, plain: Path, tmp_path: Path) -> None:
    packed, stands_for = quantized(name, plain, tmp_path)
    assert any(tensor.dtype.itemsize == 1 or tensor.dtype == torch.int32
               for tensor in load_file(packed / "model.safetensors").values())  # fmt: skip
    torch.testing.assert_close(features(packed), features(stands_for), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("weight_scale", rf"{FC}\.weight is of torch\.float8_e4m3fn, which stands for nothing without a scale"),
        ("weight", rf"{FC}\.weight_scale has no weight beside it"),
    ],
)
def test_a_tower_whose_codes_have_no_scales_is_named(absent: str, message: str, plain: Path, tmp_path: Path) -> None:
    packed, _ = quantized("compressed-tensors, FP8 dynamic", plain, tmp_path)
    tensors = load_file(packed / "model.safetensors")
    del tensors[f"{FC}.{absent}"]
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=message):
        features(packed)


def test_a_tower_of_a_wrong_shape_is_named(plain: Path, tmp_path: Path) -> None:
    packed, _ = quantized("compressed-tensors, FP8 dynamic", plain, tmp_path)
    tensors = load_file(packed / "model.safetensors")
    tensors[f"{FC}.weight_scale"] = tensors[f"{FC}.weight_scale"][:-1].clone()
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{FC}\.weight_scale, read as scale, has shape \[127, 1\].* \[128, 1\]"):
        features(packed)
    tensors[f"{FC}.weight"] = tensors[f"{FC}.weight"][:64].clone()
    tensors[f"{FC}.weight_scale"] = tensors[f"{FC}.weight_scale"][:64].clone()
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{FC}\.weight has shape \[64, 64\], the model wants \[128, 64\]"):
        features(packed)


def test_a_tower_of_codes_that_no_configuration_explains_is_named(plain: Path, tmp_path: Path) -> None:
    packed, _ = quantized("compressed-tensors, FP8 dynamic", plain, tmp_path)
    raw = json.loads((packed / "config.json").read_text())
    del raw["quantization_config"]
    (packed / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"visual\.\S+ is of torch\.float8_e4m3fn, which stands for nothing"):
        features(packed)


def test_codes_of_a_tower_in_its_authors_own_files_are_named(tmp_path: Path) -> None:
    name = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    save_file({name: torch.ones(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name} is of torch\.float8_e4m3fn, .* plain numbers only"):
        tensors_of([tmp_path / "model.safetensors"], IN_MODEL)
