"""Fetch what a name on the Hugging Face hub or on ModelScope stands for."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint.gguf import part_files
from engine.config import EngineConfig
from engine.errors import ModelError

CONFIG_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
WEIGHT_FILES = ["*.safetensors"]
# The same weights again, in the layout of the model's first authors.
DUPLICATES = ["consolidated*", "original/*", "onnx/*"]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
GGUF_FILE = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)/(?P<wanted>[^:]+\.gguf)", re.IGNORECASE)
GGUF_KIND = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+):(?P<wanted>[\w.-]+)")


@dataclass(frozen=True)
class GGUFName:
    """Name a GGUF model of a repository that may hold several."""

    repository: str
    wanted: str = ""  # a file, or a part of its name between "-" or ".", such as Q4_K_M; "": the only one


def parse_gguf_name(name: str) -> GGUFName | None:
    """Read `org/repository/file.gguf` or `org/repository:Q4_K_M`; None if it is neither."""
    match = GGUF_FILE.fullmatch(name) or GGUF_KIND.fullmatch(name)
    return GGUFName(**match.groupdict()) if match else None


def download(name: str, config: EngineConfig, patterns: Sequence[str]) -> Path:
    """Return the folder with the files of a hub id that match `patterns`; those that are here are not fetched again."""
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"no such folder or file: {name}")
    patterns = [*patterns, "*.py"] if config.trust_remote_code else list(patterns)
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


def download_gguf(name: GGUFName, config: EngineConfig, folder: Path | None = None) -> Path | None:
    """Return the first file of a GGUF model of a repository, all its parts fetched; None if it holds no such models.

    folder: where files of the repository are already. `ModelError` lists what there is unless `name` says which.
    """
    try:
        files = repository_files(name.repository, config)
    except ModelError:  # the hub cannot be asked: what is here
        folder = folder or download(name.repository, config, ["*.json"])
        files = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    models = gguf_models(files)
    if not models and not name.wanted:
        return None
    chosen = [model for model in models if is_wanted(model, name.wanted)]
    if len(chosen) != 1:
        of_that = f" that match {name.wanted!r}" if name.wanted else ""
        listed = ", ".join(map(str, chosen or models)) or "none"
        raise ModelError(
            f"{name.repository} holds {len(chosen)} GGUF models{of_that}, name one as {name.repository}:Q4_K_M or by "
            f"its file: {listed}"
        )
    parts = [str(part) for part in part_files(chosen[0])]
    if missing := [part for part in parts if part not in files]:
        raise ModelError(f"{name.repository} lacks {', '.join(missing)}: the model is in {len(parts)} files")
    return download(name.repository, config, parts) / parts[0]


def repository_files(repository: str, config: EngineConfig) -> list[str]:
    """Return the files of a repository on the Hugging Face hub. `ModelError` if it cannot be asked."""
    if config.use_modelscope:
        raise ModelError("files on ModelScope are not listed")
    from huggingface_hub import list_repo_files

    try:
        return list(list_repo_files(repository, revision=config.revision))
    except Exception as error:  # as in `download`
        raise ModelError(f"the files of {repository} cannot be listed: {error}") from error


def gguf_models(files: Iterable[str | Path]) -> list[Path]:
    """Return the GGUF models among `files`: the first file of each that is in several. Image towers are left out."""
    found = (Path(file) for file in files)
    models = {
        part_files(file)[0]
        for file in found
        if file.suffix.lower() == ".gguf" and not file.name.lower().startswith("mmproj")
    }
    return sorted(models)


def is_wanted(model: Path, wanted: str) -> bool:
    """Return whether `wanted` is the file, one of its parts, or stands in its name between "-" or "."."""
    if not wanted:
        return True
    if wanted.lower().endswith(".gguf"):
        return part_files(Path(wanted))[0] == model
    return bool(re.search(rf"(^|[-.]){re.escape(wanted)}([-.]|$)", model.stem, re.IGNORECASE))
