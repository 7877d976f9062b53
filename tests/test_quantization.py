"""Quantized checkpoints, written by the formulas of their formats, give the logits of their dequantized selves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.layers.communicator import Communicator
from engine.layers.layer import named_layers, unique_layers
from engine.layers.linear import Linear
from tests.test_models import MakeTinyModel, TinyEngine, assert_equals_reference, random_ids

Weights = dict[str, torch.Tensor]
Write = Callable[[str, torch.Tensor, torch.Generator], tuple[Weights, torch.Tensor]]
"""(module, its weight [n, k], randomness) -> the checkpoint's tensors, by their names, and what they stand for."""

GROUP = 32


def group_wise(of_groups: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return of_groups.repeat_interleave(GROUP, dim)


def int32_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack values [..., count] into int32 [..., count * bits / 32], the first in the lowest bits."""
    per_word = 32 // bits
    grouped = values.long().unflatten(-1, (-1, per_word))
    words = (grouped << (torch.arange(per_word) * bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def write_awq(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
    n, k = weight.shape
    codes = torch.randint(0, 16, (k, n), generator=random)
    zeros = torch.randint(0, 16, (k // GROUP, n), generator=random)
    scales = (torch.rand(k // GROUP, n, generator=random) * 0.01).half()

    def packed(values: torch.Tensor) -> torch.Tensor:
        return int32_words(values.unflatten(1, (-1, 8))[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)

    tensors = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}
    stands_for = (codes - group_wise(zeros)) * group_wise(scales.float())
    return {f"{module}.{name}": tensor for name, tensor in tensors.items()}, stands_for.t()


FORMATS: dict[str, tuple[dict[str, Any], Write]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, write_awq),
}


def engine_of(folder: Path, comm: Communicator | None = None) -> TinyEngine:
    """Return a model that is packed, as a server's is."""
    engine = TinyEngine(folder, comm)
    for layer in unique_layers(engine.model):
        layer.pack()
    return engine


def quantized(folder: Path, write: Write, config: dict[str, Any], target: Path) -> None:
    """Write the checkpoint of `folder` quantized to `target`, and overwrite it with what that stands for."""
    random = torch.Generator().manual_seed(0)
    plain, packed = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj.weight" in name:
            tensors, plain[name] = write(name.removesuffix(".weight"), weight, random)
            packed.update(tensors)
        else:
            plain[name] = packed[name] = weight
    target.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in packed.items()}, target / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))


@pytest.fixture(params=FORMATS)
def folders(request, make_tiny_model: MakeTinyModel, tmp_path: Path) -> tuple[Path, Path]:
    """Return a quantized checkpoint and the plain one that it stands for."""
    from transformers import LlamaConfig

    config, write = FORMATS[request.param]
    plain = make_tiny_model(LlamaConfig, "tiny_plain", intermediate_size=128)
    target = tmp_path / "quantized"
    quantized(plain, write, config, target)
    return target, plain


def test_a_quantized_checkpoint_has_the_logits_of_what_it_stands_for(folders):
    packed, plain = folders
    assert_equals_reference(engine_of(packed), plain, random_ids(20, seed=0), random_ids(13, seed=1))


def linears(engine: TinyEngine) -> dict[str, Linear]:
    return {path: layer for path, layer in named_layers(engine.model) if isinstance(layer, Linear)}


@pytest.mark.parametrize("rank", range(2))
def test_a_rank_holds_its_slices_of_codes_and_scales(folders, rank: int):
    packed, plain = folders
    comm = Communicator(rank, 2)
    wanted = linears(TinyEngine(plain, comm))
    for path, layer in linears(engine_of(packed, comm)).items():
        for part in range(len(layer.weight.parts)):
            torch.testing.assert_close(layer.weight.rows_of(part), wanted[path].weight.rows_of(part))
