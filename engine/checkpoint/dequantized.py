"""Read a tower that a checkpoint holds in few bits as plain numbers: transformers' own modules compute with it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.weights import OpenFiles, checkpoint_files, read_all_heads
from engine.errors import ModelError
from engine.models.names import TOWER_NAMES, Convert, Piece
from engine.quantization import Quantization
from engine.quantization.methods import quantization_of
from engine.quantization.packed import Packed
from kernels.weights import WHOLE, Part, ShapeError

Source = tuple[str, Piece]
"""A tensor of the checkpoint, and what a format makes of it."""


def plain_tower(folder: Path, config: Mapping[str, Any] | None, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """Return the weights of towers, by their names in the files; None if they are plain numbers there.

    Those of few bits become plain ones of `dtype`. config: config.json's `quantization_config`. `ModelError` if one
    cannot be read.
    """
    quantization = quantization_of(config, None)
    heads = read_all_heads(checkpoint_files(folder), ())
    file_of = {head.tensor: head.file for head in heads if re.search(TOWER_NAMES, head.tensor)}
    modules: dict[str, dict[str, Source]] = {}  # by what follows a module's name
    for name in file_of:
        for piece in Convert(quantization)(Piece(name)):
            module, _, leaf = piece.name.rpartition(".")
            modules.setdefault(module, {})[leaf] = name, piece
    weights: dict[str, torch.Tensor] = {}
    is_plain = True
    with OpenFiles(file_of) as files:
        for module, sources in modules.items():
            if "scale" in sources and sources["scale"][0] != f"{module}.scale":
                weights[f"{module}.weight"] = _dequantized(sources, quantization, files, dtype)
                is_plain = False
            for leaf, (name, _) in sources.items():
                if name == f"{module}.{leaf}" and name not in weights:
                    weights[name] = _plain(name, file_of[name], files)
    return None if is_plain else weights


def _plain(name: str, file: Path, files: OpenFiles) -> torch.Tensor:
    """Return a tensor of the checkpoint, still in the mapped file. `ModelError` if it holds codes."""
    tensor: torch.Tensor = files.open(file).get_tensor(name)
    if tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool:
        raise ModelError(f"{name} is of {tensor.dtype}, which stands for nothing without a scale")
    return tensor


def _dequantized(
    sources: Mapping[str, Source], quantization: Quantization, files: OpenFiles, dtype: torch.dtype
) -> torch.Tensor:
    """Return what codes and scales stand for, [n, k]. `ModelError` names the tensor that contradicts the format."""
    first = "codes" if "codes" in sources else "weight"
    if first not in sources:
        raise ModelError(f"{sources['scale'][0]} has no weight beside it")
    scheme, codes = quantization.scheme_found(sources[first][0]), _made(sources[first], files)
    assert isinstance(scheme, Packed)  # it has a scale
    weight = scheme.weight([Part(len(codes))], codes.shape[1] * scheme.form.codes_per_byte, WHOLE, dtype)
    weight.materialize(torch.device("cpu"))
    for name, _ in weight.tensors():
        if name not in sources:
            raise ModelError(f"{sources[first][0]} has no {name} beside it")
        try:
            target, loaded = weight.place(name, codes if name == first else _made(sources[name], files), 0)
        except ShapeError as error:
            raise ModelError(f"{sources[name][0]}, read as {name}, {error}") from None
        target.copy_(loaded)
    try:
        weight.settle()
    except ShapeError as error:
        raise ModelError(f"{sources[first][0]} {error}") from None
    return weight.rows_of(0)


def _made(source: Source, files: OpenFiles) -> torch.Tensor:
    """Return what a format makes of a tensor. `ModelError` names it if that cannot be made."""
    name, piece = source
    loaded = files.find(name)
    assert loaded is not None
    try:
        return piece.of(loaded, files.find)
    except ShapeError as error:
        raise ModelError(f"{name} {error}") from None
