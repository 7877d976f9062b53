"""Load the weights of a folder into a model, onto the device."""

import contextlib
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.checkpoint.pointers import is_pointer
from engine.checkpoint.progress import progress_bar
from engine.config_file import read_json
from engine.errors import ModelError
from engine.layers.attention import Attention
from engine.layers.embedding import VocabParallelEmbedding
from engine.layers.layer import Layer, named_layers, unique_layers
from engine.layers.linear import Linear
from engine.models.base import CausalLM
from engine.models.names import Piece, Rule, pieces_of
from engine.quantization import CHECKED, DENSE, Quantization, Scheme
from kernels.quantized import FP8
from kernels.weights import ShapeError

logger = logging.getLogger(__name__)

# Of an embedding, by a model's rules, which call a tied head's so as well.
NUMBERS, SCALE = ("model.embed_tokens.weight", "model.embed_tokens.codes"), "model.embed_tokens.scale"
OTHERS = ("consolidated", "adapter_model")  # how files begin that hold the weights in other names, or other weights
# What ends the names of codes and of what goes with them.
OF_FEW_BITS = {
    "qweight",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "absmax",
    "SCB",
    "_weight_qdata",
    "blocks",
}
MOST_LISTED = 50  # names of weights in an error
STAGING_BYTES = 16 << 20  # of each of the two pinned buffers that weights pass through


def load_weights(model: CausalLM, folder: Path, load_format: str, device: torch.device) -> int:
    """Put the model's weights on `device` and fill them from `folder`'s safetensors, or at random ("dummy").

    Returns their bytes on this rank. `ModelError` names every weight that is missing or unexpected, before anything
    is copied.
    """
    started = time.perf_counter()
    files: Located = {}
    if load_format != "dummy":
        paths = checkpoint_files(folder)
        heads = settle_tie(model, paths)
        settle_formats(model, heads)
        files = locate_weights(paths, heads, checkpoint_targets(model), model.quantization)
    layers = unique_layers(model)
    for layer in layers:
        layer.materialize(device)
    if load_format == "dummy":
        generator = torch.Generator(device).manual_seed(0)
        for layer in layers:
            layer.fill_dummy(generator)
    else:
        copy_weights(files, {head.tensor: head.file for head in heads}, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    num_bytes = sum(weight.nbytes for layer in layers for _, weight in layer.weights())
    logger.info("weights: %.2f GB in %.2f s", num_bytes / 1e9, time.perf_counter() - started)
    return num_bytes


def pack_weights(model: CausalLM) -> None:
    """Lay out loaded weights as kernels read them. `ModelError` if the tensors of one contradict each other."""
    packed = set()
    for path, layer in named_layers(model):
        if id(layer) not in packed:
            packed.add(id(layer))
            try:
                layer.pack()
            except ShapeError as error:
                raise ModelError(f"{path} {error}") from None


class Target(NamedTuple):
    """The place of a tensor: the `part`-th of a layer's weight `weight_name`."""

    layer: Layer
    weight_name: str
    part: int


class Source(NamedTuple):
    """The source of a target: a piece of the tensor `tensor` of a checkpoint."""

    tensor: str
    piece: Piece
    target: Target | None  # None: the tensor is only looked at


Key = tuple[str, int | None]
"""A name after all rules, and the number in a stack."""
Located = dict[Path, list[Source]]


def checkpoint_targets(model: CausalLM) -> dict[Key, Target | None]:
    """Return where each tensor of a checkpoint belongs, by its name after the model's rules; None: on other ranks.

    Tensors of a stacked weight have numbers: its parts are those of the first in the stack, then of the second, ...
    """
    targets: dict[Key, Target | None] = {}
    for path, layer in named_layers(model):
        parent, _, leaf = path.rpartition(".")
        modules = layer.part_names or (leaf,)
        for part, module in enumerate(modules):
            for weight_name in layer.names_of(part):
                name = ".".join(filter(None, (parent, module, weight_name)))
                if layer.stack is None:
                    targets[name, None] = Target(layer, weight_name, part)
                    continue
                targets |= dict.fromkeys((name, i) for i in range(layer.num_stackable))
                for nth, i in enumerate(layer.stack):
                    targets[name, i] = Target(layer, weight_name, nth * len(modules) + part)
    return targets


def read_index(folder: Path) -> dict[str, Path] | None:
    """Return the file of each tensor, as a checkpoint's index says; None if it has none."""
    index_file = folder / "model.safetensors.index.json"
    if not index_file.is_file():
        return None
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index_file}: weight_map must be an object that gives each weight's file")
    return {tensor: folder / name for tensor, name in weight_map.items()}


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the safetensors files that the index names, or the only one, or all."""
    if (file_of := read_index(folder)) is not None:
        files = sorted(set(file_of.values()))
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith(OTHERS))
    if not files:
        raise ModelError(
            f"{folder} has no *.safetensors (pickled weights, *.bin and *.pt, are not loaded: convert them, or name a "
            "--revision of the repository that has others, such as a pull request of its converter, refs/pr/1)"
        )
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ModelError(f"{folder} lacks {', '.join(absent)}, which its index names")
    return files


class Head(NamedTuple):
    """A tensor of a file and what becomes of it, before anything of it is read."""

    file: Path
    tensor: str
    pieces: list[Piece]


def names_in(file: Path) -> list[str]:
    """Return the names of a file's tensors. `ModelError` if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as checkpoint:
            return list(checkpoint.keys())
    except (OSError, SafetensorError) as error:
        if is_pointer(file):
            raise ModelError(f"{file} is a pointer of Git LFS, not the weights: fetch them by git lfs pull") from None
        raise ModelError(f"{file} cannot be read, or is broken: {error}") from None


def read_heads(file: Path, rules: Sequence[Rule]) -> list[Head]:
    """Return a file's tensors. `ModelError` if it cannot be read."""
    return [Head(file, name, pieces_of(name, rules)) for name in names_in(file)]


def read_all_heads(paths: Sequence[Path], rules: Sequence[Rule]) -> list[Head]:
    """Return the tensors of a checkpoint's files. Of one that several have, the index says which counts, or the first.

    paths: in one folder.
    """
    heads = [head for path in paths for head in read_heads(path, rules)]
    if len({head.tensor for head in heads}) == len(heads):
        return heads
    of_index, file_of = read_index(paths[0].parent) or {}, dict[str, Path]()
    for head in heads:
        if head.tensor not in file_of or of_index.get(head.tensor) == head.file:
            file_of[head.tensor] = head.file
    return [head for head in heads if file_of[head.tensor] == head.file]


def settle_tie(model: CausalLM, paths: Sequence[Path]) -> list[Head]:
    """Return what is in the files. Unties a head that they have beside the embedding, with other values.

    As transformers does: what is there counts, not what config.json says of it.
    """
    heads = read_all_heads(paths, model.rules)
    named = [(head, piece) for head in heads for piece in head.pieces if piece.name in NUMBERS]
    if not model.lm_head.is_tied or len(named) < 2:
        return heads
    if not any(piece.name == SCALE for head in heads for piece in head.pieces):  # both are plain numbers
        first, second = (piece.of(read_tensor(head.file, head.tensor)) for head, piece in named[:2])
        if torch.equal(first, second):
            return heads
    names = " and ".join(head.tensor for head, _ in named)
    logger.warning("%s differ, and tie_word_embeddings says that they are one: both are used", names)
    model.untie()
    return read_all_heads(paths, model.rules)


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """Return a tensor of a file."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as checkpoint:
        tensor: torch.Tensor = checkpoint.get_tensor(name)
        return tensor


def tensors_of(files: Sequence[Path], pattern: re.Pattern[str]) -> dict[str, torch.Tensor]:
    """Return the tensors whose whole name `pattern` matches, by the first group of it.

    `ModelError` if a file cannot be read, or one of them holds codes, which are read of other families' towers alone.
    """
    matches = {match: file for file in files for name in names_in(file) if (match := pattern.fullmatch(name))}
    found = {}
    with OpenFiles({match[0]: file for match, file in matches.items()}) as opened:
        for match, file in matches.items():
            one: torch.Tensor = opened.open(file).get_tensor(match[0])
            if one.dtype.itemsize == 1:
                raise ModelError(f"{match[0]} is of {one.dtype}, the tower is read of plain numbers only")
            found[match[1]] = one
    return found


class OpenFiles:
    """Open each file of a checkpoint once: one with the names of all experts takes a tenth of a second each time.

    A context manager, which closes them.
    """

    def __init__(self, file_of: Mapping[str, Path]) -> None:
        """file_of: the file of each tensor."""
        self._file_of, self._opened, self._stack = file_of, dict[Path, Any](), contextlib.ExitStack()

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def open(self, file: Path) -> Any:
        """Return a file, open."""
        from safetensors import safe_open

        if file not in self._opened:
            self._opened[file] = self._stack.enter_context(safe_open(file, framework="pt"))
        return self._opened[file]

    def find(self, name: str) -> torch.Tensor | None:
        """Return a tensor of the checkpoint, None if there is no such."""
        file = self._file_of.get(name)
        return None if file is None else self.open(file).get_tensor(name)


def settle_formats(model: CausalLM, heads: Sequence[Head]) -> None:
    """Give each layer, or part of one, the format in which the checkpoint has it.

    What is there counts, not what a configuration says of the model's names: it is written in the names of many
    libraries. `ModelError` if a format cannot have the layer's shape.
    """
    found = {piece.name: head.tensor for head in heads for piece in head.pieces}
    settle_cache_scales(model, found)
    for path, layer in named_layers(model):
        if not isinstance(layer, Linear | VocabParallelEmbedding) or not layer.names_of(0):  # as a tied head has
            continue
        parent, _, leaf = path.rpartition(".")
        modules = [f"{parent}.{name}" if parent else name for name in layer.part_names or (leaf,)]
        pairs = zip(modules, layer.schemes, strict=True)
        schemes = [_scheme_found(model.quantization, module, found) or scheme for module, scheme in pairs]
        if schemes != layer.schemes:
            try:
                layer.expect(schemes)
            except ShapeError as error:
                raise ModelError(f"{path} {error}") from None


def settle_cache_scales(model: CausalLM, found: Mapping[str, str]) -> None:
    """Let layers that round keys and values to FP8 divide them by the numbers that the checkpoint has, if it has any.

    found: the checkpoint's tensors by the model's names. `ModelError` if they are for another FP8 than the cache's.
    """
    layers = {path: layer for path, layer in named_layers(model) if isinstance(layer, Attention)}
    scaled = [path for path in layers if f"{path}.k_scale" in found]
    is_shared = any(layer.config.kv_owner is not None for layer in layers.values())
    if not scaled or is_shared or layers[scaled[0]].kv_dtype.itemsize > 1:
        return
    if layers[scaled[0]].kv_dtype != FP8:
        raise ModelError(
            "--kv-cache-dtype fp8_e5m2, but the checkpoint has scales of keys and values, which are for fp8_e4m3 "
            f"({found[f'{scaled[0]}.k_scale']})"
        )
    for path in scaled:
        layers[path].expect_cache_scales()


def _scheme_found(quantization: Quantization, module: str, found: Mapping[str, str]) -> Scheme | None:
    """Return the format of a module of the model; None if its tensors do not say.

    found: the checkpoint's tensors by the model's names.
    """
    tensor = found.get(f"{module}.codes") or found.get(f"{module}.weight")
    scheme = None if tensor is None else quantization.scheme_found(tensor)
    is_plain = f"{module}.weight" in found and f"{module}.scale" not in found
    return DENSE if scheme is not None and is_plain else scheme


def locate_weights(
    files: list[Path], heads: Sequence[Head], targets: dict[Key, Target | None], quantization: Quantization
) -> Located:
    """Return for every file what to take from it; each target once. Strict about names.

    quantization: says what the checkpoint calls a target, and what else it may hold.
    """
    located: Located = {file: [] for file in files}
    unexpected, found = [], set()
    for file, name, piece in ((head.file, head.tensor, piece) for head in heads for piece in head.pieces):
        key = piece.name, piece.index
        if piece.name == CHECKED:
            located[file].append(Source(name, piece, None))
        elif key not in targets:
            if (check := quantization.spare(piece.name)) is None:
                unexpected.append(name)
            else:
                located[file].append(Source(name, Piece(CHECKED, (check,)), None))
        elif key not in found:
            found.add(key)
            if (target := targets[key]) is not None:
                located[file].append(Source(name, piece, target))
    absent = ((quantization.in_file(name), index) for name, index in targets.keys() - found)
    missing = [name if index is None else f"{name}[{index}]" for name, index in absent]
    if missing or unexpected:
        raise ModelError(f"the weights in {files[0].parent} do not fit the model; {_misfit(missing, unexpected)}")
    return located


def _misfit(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """Return what is missing and what there is too much, and what that is a sign of."""
    lists = {"missing": sorted(missing), "unexpected": list(dict.fromkeys(unexpected))}
    found = [f"{kind}: {_listed(names)}" for kind, names in lists.items() if names]
    if missing and not _has_few_bits(missing) and _has_few_bits(unexpected):
        found.append("those are of few bits, of which the quantization_config in config.json says nothing")
    return "; ".join(found)


def _has_few_bits(names: Sequence[str]) -> bool:
    return any(name.partition("[")[0].rpartition(".")[2] in OF_FEW_BITS for name in names)


def _listed(names: Sequence[str]) -> str:
    """Return names in a row: of a model with experts there are a hundred thousand."""
    more = len(names) - MOST_LISTED
    return ", ".join(names[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def copy_weights(located: Located, file_of: Mapping[str, Path], device: torch.device) -> None:
    """Copy from the mapped files to the device; of a sharded weight only this rank's part is read.

    file_of: the file of each tensor of the checkpoint.
    """
    copy = StagedCopy() if device.type == "cuda" else torch.Tensor.copy_
    total = sum(file.stat().st_size for file in located)
    with progress_bar("Loading weights", total) as advance, OpenFiles(file_of) as files:
        for file, sources in located.items():
            last, num_left = None, file.stat().st_size  # bytes that the bar has not been moved by
            for name, piece, target in sources:
                if name != last:  # pieces of one tensor follow each other
                    last, loaded = name, files.open(file).get_tensor(name)
                    if piece.transforms and not piece.is_of_stack and device.type == "cuda":
                        loaded = loaded.to(device)
                    advance(loaded.nbytes)
                    num_left -= loaded.nbytes
                try:
                    _place(piece.of(loaded, files.find, device), target, copy)
                except (ShapeError, ModelError) as error:
                    is_changed = target is not None and not name.endswith(f".{target.weight_name}")
                    read_as = f", read as {target.weight_name}," if target and is_changed else ""
                    raise ModelError(f"{name}{read_as} {error}") from None
            advance(max(num_left, 0))  # its header, and other ranks' experts


def _place(piece: torch.Tensor, target: Target | None, copy: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
    """Copy a piece of a checkpoint to its place; None: it has none."""
    if target is None:
        return
    to, source = target.layer.place_weight(target.weight_name, piece, target.part)
    if to.is_floating_point() != source.is_floating_point():
        raise ModelError(f"is of {source.dtype}, the model wants {to.dtype}")
    if source.is_floating_point() and source.dtype.itemsize == 1 < to.dtype.itemsize:
        raise ModelError(f"is of {source.dtype}, which stands for nothing without a scale, and there is none for it")
    copy(to, source)


class StagedCopy:
    """Host to device through two pinned buffers in turn: 16 GB in 0.5 s on an H100, 2.2 s from pageable memory."""

    def __init__(self) -> None:
        self.buffers = [torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.was_read = [torch.cuda.Event() for _ in self.buffers]
        self.turn = 0

    def __call__(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue the copy of `source`, which is free on return; dtypes may differ."""
        if not len(target):  # another rank has all of it
            return
        if source.is_cuda:
            target.copy_(source)
            return
        num_rows = max(1, STAGING_BYTES // target[0].nbytes)
        for to, rows in zip(target.split(num_rows), source.split(num_rows), strict=True):
            self.turn ^= 1
            self.was_read[self.turn].synchronize()
            staged = self.buffers[self.turn][: to.nbytes].view(to.dtype).view(to.shape)
            staged.copy_(rows)
            to.copy_(staged, non_blocking=True)
            self.was_read[self.turn].record()
