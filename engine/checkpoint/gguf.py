"""Read GGUF files, llama.cpp's format: metadata, the list of tensors, and one tensor's values.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here, which takes a tenth of a
second where the `gguf` package's reader takes five; dequantization is that package's.
"""

import mmap
import re
import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import ModelError

# Number of a metadata value's kind -> struct format; 8 is a string, 9 an array
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# Errors that a damaged file can raise: any entry may be of the wrong kind, length or size.
MALFORMED = (struct.error, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError)

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

    def get(self, key: str, default: Any = None) -> Any:
        """Return the metadata under `key` as `gguf[key]` does, or `default` if there is none."""
        return self.metadata.get(key.format(self.metadata.get("general.architecture", "")), default)


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
            raise ModelError(f"{path} is not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Header(data).parse()
            except MALFORMED as error:
                raise ModelError(f"{path} is broken: {error}") from None


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

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(SCALARS[kind])
        item_kind, length = self.scalar("I"), self.scalar("Q")
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


def dequantize(data: np.ndarray, tensor: GGUFTensor) -> np.ndarray:
    """Return `tensor` as float32 of its shape. data: the whole file, uint8. Raises `ModelError`."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as dequantize_blocks

    try:
        quantization = GGMLQuantizationType(tensor.quantization)
        blocks = data[tensor.offset : tensor.offset + tensor.num_bytes].reshape(*tensor.shape[:-1], -1)
        if quantization in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            blocks = blocks.view(np.float32 if quantization == GGMLQuantizationType.F32 else np.float16)
        return np.array(dequantize_blocks(blocks, quantization), dtype=np.float32)
    except (NotImplementedError, ValueError) as error:
        raise ModelError(f"GGUF tensor {tensor.name!r} cannot be dequantized: {error}") from None
