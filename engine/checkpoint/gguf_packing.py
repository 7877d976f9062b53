"""Choose which tensors of a GGUF file stay packed, and each one's format: the model that reads them has a say."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import torch

from engine.checkpoint.gguf import GGUF, GGUFTensor
from engine.checkpoint.gguf_blocks import BLOCKS, common_format
from engine.checkpoint.weights import checkpoint_targets
from engine.layers.embedding import VocabParallelEmbedding
from engine.layers.layer import Layer
from engine.layers.linear import Linear
from engine.models.base import CausalLM
from engine.models.names import Piece, pieces_of
from kernels.quantized import Format


@dataclass
class Packing:
    """The formats of what stays packed: tensors, by the file's names, and modules, by the model's."""

    tensors: dict[str, Format] = field(default_factory=dict)
    modules: dict[str, Format] = field(default_factory=dict)


def choose_formats(gguf: GGUF, pieces: Mapping[str, Sequence[Piece]], model: CausalLM) -> Packing:
    """Return how to pack for `model`, on the meta device. pieces: what becomes of each tensor, by its name.

    Tensors of one product get one format that holds all of them as they are.
    """
    forms: dict[str, Format | None] = {}
    tensors_of: dict[int, set[str]] = {}  # of a layer, by its id
    modules_of: dict[str, list[str]] = {}
    targets = checkpoint_targets(model)
    for tensor in gguf.tensors:
        for piece in pieces.get(tensor.name, ()):
            for placed in pieces_of(piece.name, model.rules):
                target = targets.get((placed.name, placed.index))
                if target is None or target.weight_name != "weight":
                    continue
                tensors_of.setdefault(id(target.layer), set()).add(tensor.name)
                modules_of.setdefault(tensor.name, []).append(placed.name.removesuffix(".weight"))
                form = format_of(tensor, target.layer, (piece, placed))
                forms[tensor.name] = common_format((forms.get(tensor.name, form), form))
    settle(forms, tensors_of.values())
    packing = Packing()
    for name, form in forms.items():
        if form is not None:
            packing.tensors[name] = form
            packing.modules |= dict.fromkeys(modules_of[name], form)
    return packing


def format_of(tensor: GGUFTensor, layer: Layer, pieces: Sequence[Piece]) -> Format | None:
    """Return the format in which a tensor can stay packed for `layer`, None if it cannot.

    pieces: that the folder has of the tensor, and the model of that.
    """
    kind = BLOCKS.get(tensor.quantization)
    if kind is None or not isinstance(layer, Linear | VocabParallelEmbedding):
        return None
    # Each on its own: GPT-2's matrices are turned for the folder, and turned back for the model.
    shape: tuple[int, ...] | None = tensor.shape[:-1]
    for piece in pieces:
        shape = moved_rows(piece, shape) if shape else None
    return kind.form if shape else None


def moved_rows(piece: Piece, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the number of rows of a piece of a matrix that is some of its rows in some order, else None.

    Codes can be moved so, too. shape: the matrix's number of rows, or a stack's of matrices and rows.
    """
    if len(shape) > 2:
        return None
    num_rows = prod(shape)
    numbered = piece.of(numbered_rows(shape))
    if numbered.dim() != 2 or numbered.shape[1] != 2 or numbered.is_floating_point():
        return None
    first, second = numbered.unbind(1)
    moves_rows = bool(((first >= 0) & (first < num_rows) & (second == first + num_rows)).all())
    return tuple(first.shape) if moves_rows else None


@lru_cache
def numbered_rows(shape: tuple[int, ...]) -> torch.Tensor:
    """Return rows of two numbers, [*shape, 2]: the row's own, and that and the number of rows."""
    num_rows = prod(shape)
    return torch.arange(2 * num_rows).view(2, *shape).movedim(0, -1)


def settle(forms: dict[str, Format | None], products: Iterable[set[str]]) -> None:
    """Bring the tensors of each product to a common format; one may belong to several."""
    products = list(products)
    changes = True
    while changes:
        changes = False
        for names in products:
            common = common_format([forms[name] for name in names])
            changes |= any(forms[name] != common for name in names)
            forms |= dict.fromkeys(names, common)
