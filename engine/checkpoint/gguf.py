"""Read GGUF files, llama.cpp's format: metadata, the list of tensors, and one tensor's values.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here, which takes a tenth of a
second where the `gguf` package's reader takes five; dequantization is that package's.
"""

import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoint.pointers import is_pointer
from engine.errors import ModelError
from kernels.weights import ShapeError

# Number of a metadata value's kind -> struct format; 8 is a string, 9 an array
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")  # of a string, before its bytes

# Errors that a damaged file can raise: any entry may be of the wrong kind, length or size.
MALFORMED = (struct.error, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, ShapeError)

MAGIC = b"GGUF"
PART_NAME = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE)  # of one file of several


@dataclass(frozen=True)
class GGUFTensor:
    """Describe one tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]  # row-major, as torch has it
    quantization: int  # gguf.GGMLQuantizationType
    offset: int  # bytes from the start of the file
    part: int = 0  # which file of several

    @property
    def num_elements(self) -> int:
        """Return the number of elements, dequantized."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Return the bytes in the file. Raises `ModelError` if the quantization is unknown."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(self.quantization)]
        except ValueError:
            raise ModelError(f"GGUF tensor {self.name!r} is of a type that is not known: {self.quantization}") from None
        return self.num_elements // int(block_size) * int(block_bytes)


@dataclass(frozen=True)
class GGUF:
    """Hold the metadata and the list of tensors of a GGUF file."""

    metadata: dict[str, Any]
    tensors: list[GGUFTensor]

    def __getitem__(self, key: str) -> Any:
        """Return the metadata under `key`; `{}` in the key stands for the architecture's name. Raises `ModelError`."""
        key = key.format(self.metadata.get("general.architecture", ""))
        if key not in self.metadata:
            raise ModelError(f"the GGUF file has no {key!r}")
        return self.metadata[key]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by its name."""
        return {tensor.name: tensor.shape for tensor in self.tensors}

    @property
    def num_layers(self) -> int:
        """Return the number of layers, without those behind them that predict several tokens at once."""
        return int(self["{}.block_count"]) - int(self.get("{}.nextn_predict_layers", 0))

    @property
    def heads(self) -> int:
        """Return the number of query heads. Raises `ModelError` if layers differ."""
        return self.alike("{}.attention.head_count")

    @property
    def kv_heads(self) -> int:
        """Return the number of key and value heads. Raises `ModelError` if layers differ."""
        return self.alike("{}.attention.head_count_kv", self.heads)

    def alike(self, key: str, default: int | None = None) -> int:
        """Return a number that may be written once or for each layer. Raises `ModelError` if layers differ."""
        value = self[key] if default is None else self.get(key, default)
        if not isinstance(value, list):
            return int(value)
        if len(set(value)) != 1:
            raise ModelError(f"layers that differ are not supported: {key.format('*')} of the GGUF file is {value}")
        return int(value[0])

    def get(self, key: str, default: Any = None) -> Any:
        """Return the metadata under `key` as `gguf[key]` does, or `default` if there is none."""
        return self.metadata.get(key.format(self.metadata.get("general.architecture", "")), default)


def shortest(value: Any) -> Any:
    """Return the shortest decimal that rounds to the same float32: 1e-05, not 9.999999747378752e-06.

    Integers are returned as they are. ValueError if it is no number.
    """
    return value if isinstance(value, int) else float(str(np.float32(value)))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise `ModelError` that names `path` in place of what a damaged file can raise."""
    try:
        yield
    except MALFORMED as error:
        raise ModelError(f"{path} is broken: {type(error).__name__}: {error}") from error


def is_gguf(path: Path) -> bool:
    """Return whether the file begins as GGUF files do, whatever its name is: Ollama's have no suffix."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def part_files(path: Path) -> list[Path]:
    """Return all files of the model that `path` is a file of, by their names: most models have one."""
    match = PART_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match.groups()
    return [path.with_name(f"{stem}-{i:05d}-of-{count}{path.suffix}") for i in range(1, int(count) + 1)]


def read_gguf(path: Path) -> GGUF:
    """Read the metadata and the list of tensors of a model in one file, or in the several that `part_files` names.

    Raises `ModelError` unless all are GGUF files of version 2 or 3.
    """
    files = part_files(path)
    first, *others = headers = [_read_header(file) for file in files]
    if (count := first.get("split.count", 1)) > 1 and count != len(files):
        raise ModelError(
            f"{path} is one of {count} parts, which must be named NAME-00001-of-{count:05d}.gguf and so on"
        )
    if not others:
        return first
    tensors = [replace(tensor, part=i) for i, header in enumerate(headers) for tensor in header.tensors]
    return GGUF(first.metadata, tensors)


def _read_header(path: Path) -> GGUF:
    if not path.is_file():
        raise ModelError(f"{path} is missing: the model is in several files")
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            if is_pointer(path):
                raise ModelError(f"{path} is a pointer of Git LFS, not the model: fetch it by git lfs pull")
            raise ModelError(f"{path} is not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, naming(path):
            return _Header(data).parse()


class _Header:
    """Parse the first part of a file, at a cursor."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 4

    def parse(self) -> GGUF:
        version = self.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}")
        num_tensors, num_entries = self.scalar("Q"), self.scalar("Q")
        metadata = {self.string(): self.value(self.scalar("I")) for _ in range(num_entries)}
        tensors = []
        for _ in range(num_tensors):
            name, num_dims = self.string(), self.scalar("I")
            shape = tuple(self.scalar("Q") for _ in range(num_dims))[::-1]
            tensors.append(GGUFTensor(name, shape, self.scalar("I"), self.scalar("Q")))
        alignment = metadata.get("general.alignment", 32)
        start = -(-self.position // alignment) * alignment
        return GGUF(metadata, [GGUFTensor(t.name, t.shape, t.quantization, start + t.offset) for t in tensors])

    def scalar(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.position)
        self.position += struct.calcsize(f"<{kind}")
        return value

    def string(self) -> str:
        end = self.scalar("Q") + self.position
        value = self.data[self.position : end].decode("utf-8", "replace")
        self.position = end
        return value

    def strings(self, length: int) -> list[str]:
        """Return an array of them: vocabularies and merges are most of a header, so in few Python calls a string."""
        data, position, items = self.data, self.position, []
        for _ in range(length):
            start = position + LENGTH.size
            position = start + LENGTH.unpack_from(data, position)[0]
            items.append(data[start:position].decode("utf-8", "replace"))
        self.position = position
        return items

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(SCALARS[kind])
        item_kind, length = self.scalar("I"), self.scalar("Q")
        if item_kind == STRING:
            return self.strings(length)
        if item_kind not in SCALARS:
            return [self.value(item_kind) for _ in range(length)]
        items = struct.unpack_from(f"<{length}{SCALARS[item_kind]}", self.data, self.position)
        self.position += struct.calcsize(f"<{length}{SCALARS[item_kind]}")
        return list(items)


def check_whole(gguf: GGUF, part: int, file_bytes: int) -> None:
    """Check that a file has all its tensors, before a conversion that takes minutes.

    Raises ValueError, or `ModelError` with the name of a tensor of unknown type.
    """
    end = max((tensor.offset + tensor.num_bytes for tensor in gguf.tensors if tensor.part == part), default=0)
    if end > file_bytes:
        raise ValueError(f"it has {file_bytes} bytes, its tensors go on to {end}: an unfinished download?")


def dequantize(data: np.ndarray, tensor: GGUFTensor, rows: slice = slice(None)) -> np.ndarray:
    """Return `tensor`, or some of its rows, as float32. data: the whole file, uint8. Raises `ModelError`."""
    import gguf.quants as quants
    from gguf.constants import GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(tensor.quantization)
        stored = data[tensor.offset : tensor.offset + tensor.num_bytes].reshape(tensor.shape[0], -1)[rows]
        shape = (len(stored), *tensor.shape[1:])
        if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            kind_of_float = np.float32 if kind == GGMLQuantizationType.F32 else np.float16
            return stored.view(kind_of_float).astype(np.float32).reshape(shape)
        method = getattr(quants, kind.name, None)
        if method is None:
            raise NotImplementedError(f"{kind.name} is not implemented")
        method.init_grid()
        # All blocks at once: the package's own `dequantize` takes 16 rows at a time, and up to twice as long.
        blocks: np.ndarray = method.dequantize_blocks(stored.reshape(-1, method.type_size))
        return blocks.reshape(shape)
    except (NotImplementedError, ValueError) as error:
        raise ModelError(f"GGUF tensor {tensor.name!r} cannot be dequantized: {error}") from None
