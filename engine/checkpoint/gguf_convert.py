"""Convert GGUF files to Hugging Face folders: config, tokenizer, and safetensors, packed or dequantized."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.checkpoint.gguf import GGUF, GGUFTensor, check_whole, dequantize, naming, part_files, read_gguf
from engine.checkpoint.gguf_architectures import architecture_of
from engine.checkpoint.gguf_blocks import BLOCKS, unpack_rows
from engine.checkpoint.gguf_config import EMBEDDING, make_config, special_ids
from engine.checkpoint.gguf_family import Architecture
from engine.checkpoint.gguf_latents import BOTH, KEYS, VALUES, joined
from engine.checkpoint.gguf_names import placed
from engine.checkpoint.gguf_packing import Packing, choose_formats
from engine.checkpoint.gguf_rope import FACTOR_TENSORS, Factors
from engine.checkpoint.gguf_tokenizer import check_tokenizer, has_known_tokenizer, write_json, write_tokenizer
from engine.errors import ModelError
from engine.layers.layer import LayerConfig
from engine.models.names import Piece
from engine.models.registry import build_model, is_supported, load_config
from engine.quantization.gguf import config_of, names_of
from kernels.quantized import Format, QuantizedWeight
from kernels.weights import Part

SHARD_BYTES = 4 << 30  # most bytes of a safetensors file
CHUNK_ELEMENTS = 1 << 20  # unpacked or dequantized at once by a thread: with fewer, threads wait for the interpreter
MAX_THREADS = 8
SAFETENSORS_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8",
}  # fmt: skip


def check_convertible(path: Path, gguf: GGUF, *, needs_tokenizer: bool = True) -> None:
    """Raise `ModelError`, before a conversion that takes minutes, if the model or its tokenizer is of unknown kind."""
    with naming(path):
        architecture = architecture_of(gguf)
        if not is_supported(architecture.name):
            raise ModelError(
                f"GGUF architecture {gguf['general.architecture']!r} is a {architecture.name}, which is not supported"
            )
        placed(gguf, architecture)
        if EMBEDDING not in gguf.shapes:
            raise ValueError(f"it has no tensor {EMBEDDING}")
    if needs_tokenizer:
        check_tokenizer(gguf.metadata)


def convert(
    path: Path,
    folder: Path,
    dtype: torch.dtype,
    advance: Callable[[int], None],
    *,
    needs_tokenizer: bool = True,
    keeps_packed: bool = False,
    gguf: GGUF | None = None,
) -> None:
    """Write `path` as a Hugging Face folder with weights of `dtype`. Calls advance(bytes of the file done) as it goes.

    Without `needs_tokenizer`, a tokenizer of unknown kind is left out. keeps_packed: matrices of few bits stay so, as
    codes and scales that this engine alone reads. gguf: what `read_gguf` returned, if it has been called.
    """
    gguf = gguf or read_gguf(path)
    data = [np.memmap(file, dtype=np.uint8, mode="r") for file in part_files(path)]
    with naming(path):
        for part, content in enumerate(data):
            check_whole(gguf, part, len(content))
        architecture = architecture_of(gguf)
        pieces = placed(gguf, architecture)
        config = make_config(gguf, architecture, dtype, rope_factors(gguf, data))
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", special_ids(gguf))
        if needs_tokenizer or has_known_tokenizer(gguf.metadata):
            write_tokenizer(gguf.metadata, gguf["{}.context_length"], folder)
        packing = Packing()
        if keeps_packed:
            packing = choose_formats(gguf, pieces, build_model(load_config(folder), LayerConfig(dtype)))
        if packing.modules:
            write_json(folder / "config.json", config | {"quantization_config": config_of(packing.modules)})
        sources = [
            Source(tensor, pieces[tensor.name], dtype_of(tensor, dtype), packing.tensors.get(tensor.name))
            for tensor in gguf.tensors
            if pieces.get(tensor.name)
        ]
        made = numbers_of(gguf, architecture, dtype)
        write_weights([*sources, *made, *joined_halves(gguf, architecture, dtype)], data, folder, advance)


def dtype_of(tensor: GGUFTensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a dense tensor: what corrects the choice of experts keeps its differences, as everywhere."""
    return torch.float32 if ".exp_probs_b." in tensor.name else dtype


def numbers_of(gguf: GGUF, architecture: Architecture, dtype: torch.dtype) -> list["MadeTensor"]:
    """Return the tensors of one number that the file has among its metadata."""
    return [
        MadeTensor(Entry(f"{architecture.layers}.{i}.{name}", dtype, number.shape), float(value))
        for name, number in architecture.numbers.items()
        for i, value in enumerate(gguf[number.key])
    ]


def joined_halves(gguf: GGUF, architecture: Architecture, dtype: torch.dtype) -> list["JoinedTensor"]:
    """Return the products that make keys and values of latents, of a file that has them in halves."""
    if not architecture.has_latents:
        return []
    tensors = {tensor.name: tensor for tensor in gguf.tensors}
    module = architecture.block[BOTH.removesuffix(".weight")]
    return [
        JoinedTensor(f"{architecture.layers}.{i}.{module}.weight", dtype, tensors[keys], tensors[f"blk.{i}.{VALUES}"])
        for i in range(gguf.num_layers)
        if (keys := f"blk.{i}.{KEYS}") in tensors and f"blk.{i}.{BOTH}" not in tensors
    ]


def rope_factors(gguf: GGUF, data: Sequence[np.ndarray]) -> Factors:
    """Return the divisors of rotary frequencies that the file holds. data: the model's files, uint8."""
    found = ((FACTOR_TENSORS[tensor.name], tensor) for tensor in gguf.tensors if tensor.name in FACTOR_TENSORS)
    return {stem: dequantize(data[tensor.part], tensor).tolist() for stem, tensor in found}


class Entry(NamedTuple):
    """Name a tensor of a safetensors file."""

    name: str
    dtype: torch.dtype
    shape: Sequence[int]

    @property
    def num_bytes(self) -> int:
        """Return the bytes that it takes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """Name a tensor of the file, and what becomes of it."""

    tensor: GGUFTensor
    pieces: Sequence[Piece]
    dtype: torch.dtype  # of dense weights
    form: Format | None = None  # None: dense

    @cached_property
    def fields(self) -> dict[str, Entry]:
        """Return what it is read into: codes, scale, ..., or for the dense one, of no name."""
        if self.form is None:
            return {"": Entry("", self.dtype, self.tensor.shape)}
        *stack, k = self.tensor.shape
        weight = QuantizedWeight([Part(prod(stack))], k, self.dtype, self.form)
        return {
            field: Entry(field, tensor.dtype, (*stack, *tensor.shape[1:])) for field, tensor in weight.fields.items()
        }

    @cached_property
    def entries(self) -> list[Entry]:
        """Return what is written, in order, without reading the tensor."""
        names = {} if self.form is None else dict(names_of(self.form))
        return [
            Entry(
                f"{piece.name.removesuffix('.weight')}.{names.get(field, field)}" if field else piece.name,
                entry.dtype,
                # Not of the meta device: some operators on it import torch's compiler, which takes seconds.
                piece.of(torch.zeros((), dtype=torch.uint8).expand(*entry.shape)).shape,
            )
            for piece in self.pieces
            for field, entry in self.fields.items()
        ]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all that is written."""
        return sum(entry.num_bytes for entry in self.entries)

    @property
    def bytes_read(self) -> int:
        """Return the bytes of the file that it is made of."""
        return self.tensor.num_bytes

    def read(self, data: Sequence[np.ndarray], pool: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
        """Yield the values of `entries`. data: the model's files, uint8."""
        content = data[self.tensor.part]
        if self.form is None:
            fields = {"": read_tensor(content, self.tensor, self.dtype, pool)}
        else:
            fields = read_packed(content, self, pool)
        for piece in self.pieces:
            for field, entry in self.fields.items():
                yield piece.of(fields[field]).to(entry.dtype).contiguous()


@dataclass(frozen=True)
class MadeTensor:
    """Hold a tensor of one number, which the file has among its metadata: see `Source`."""

    entry: Entry
    value: float
    bytes_read: int = 0

    @property
    def entries(self) -> list[Entry]:
        """Return the one entry."""
        return [self.entry]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all that is written."""
        return self.entry.num_bytes

    def read(self, _data: Sequence[np.ndarray], _pool: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
        """Yield the one value."""
        yield torch.tensor([self.value], dtype=self.entry.dtype)


@dataclass(frozen=True)
class JoinedTensor:
    """Name two tensors of the file that become one, dense: see `Source`."""

    name: str
    dtype: torch.dtype
    keys: GGUFTensor
    values: GGUFTensor

    @property
    def entries(self) -> list[Entry]:
        """Return the one entry."""
        halves = (torch.zeros((), dtype=torch.uint8).expand(*tensor.shape) for tensor in (self.keys, self.values))
        return [Entry(self.name, self.dtype, joined(*halves).shape)]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all that is written."""
        return self.entries[0].num_bytes

    @property
    def bytes_read(self) -> int:
        """Return the bytes of the file that it is made of."""
        return self.keys.num_bytes + self.values.num_bytes

    def read(self, data: Sequence[np.ndarray], pool: ThreadPoolExecutor) -> Iterator[torch.Tensor]:
        """Yield the one tensor."""
        yield joined(*(read_tensor(data[half.part], half, self.dtype, pool) for half in (self.keys, self.values)))


Written = Source | MadeTensor | JoinedTensor


def check_names(sources: Sequence[Written]) -> None:
    """Raise ValueError if two tensors get one name: of a file that has a `.scale` beside a tensor, for example."""
    names = Counter(entry.name for source in sources for entry in source.entries)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"two of its tensors become {', '.join(twice)}")


def write_weights(
    sources: Sequence[Written], data: Sequence[np.ndarray], folder: Path, advance: Callable[[int], None]
) -> None:
    """Write the tensors as safetensors of at most `SHARD_BYTES` (or one tensor) each, with an index if several.

    No more than two tensors are in memory at once. data: the model's files, uint8.
    """
    check_names(sources)
    shards = list(split_by_size(sources, SHARD_BYTES))
    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        for i, shard in enumerate(shards):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            header = make_header(shard)
            with open(folder / file, "wb") as output:
                output.write(len(header).to_bytes(8, "little") + header)
                for source, weights in read_ahead(shard, data, pool):
                    for weight in weights:
                        output.write(weight.view(torch.uint8).numpy().data)
                    advance(source.bytes_read)
            weight_map |= {entry.name: file for source in shard for entry in source.entries}
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def read_ahead(
    sources: Sequence[Written], data: Sequence[np.ndarray], pool: ThreadPoolExecutor
) -> Iterator[tuple[Written, list[torch.Tensor]]]:
    """Yield each source and the values of its entries; the next one's are made meanwhile."""
    with ThreadPoolExecutor(1) as reader:

        def begin(source: Written) -> Future[list[torch.Tensor]]:
            return reader.submit(lambda: list(source.read(data, pool)))

        coming = begin(sources[0])
        for source, following in zip_longest(sources, sources[1:]):
            weights = coming.result()
            if following is not None:
                coming = begin(following)
            yield source, weights


def make_header(shard: Sequence[Written]) -> bytes:
    """Return the header of a safetensors file whose weights follow in the order of `shard`."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in (entry for source in shard for entry in source.entries):
        start, end = end, end + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def split_by_size(sources: Sequence[Written], max_bytes: int) -> Iterator[list[Written]]:
    """Split `sources` into consecutive lists of at most `max_bytes`, or one tensor, each."""
    shard: list[Written] = []
    num_bytes = 0
    for source in sources:
        if shard and num_bytes + source.num_bytes > max_bytes:
            yield shard
            shard, num_bytes = [], 0
        shard.append(source)
        num_bytes += source.num_bytes
    yield shard


def read_packed(data: np.ndarray, source: Source, pool: ThreadPoolExecutor) -> dict[str, torch.Tensor]:
    """Return the fields of a tensor that stays packed, unpacked by several threads. data: its file, uint8."""
    tensor, form = source.tensor, source.form
    assert form is not None
    kind = BLOCKS[tensor.quantization]
    *stack, k = tensor.shape
    num_rows = prod(stack)
    if k % kind.block_size:
        raise ModelError(f"GGUF tensor {tensor.name!r} has rows of {k}, which are no blocks of {kind.block_size}")
    stored = data[tensor.offset : tensor.offset + tensor.num_bytes].reshape(num_rows, -1)
    fields = {field: torch.empty(*entry.shape, dtype=entry.dtype) for field, entry in source.fields.items()}
    by_row = {field: values.view(num_rows, -1).numpy() for field, values in fields.items()}

    def read(start: int) -> None:
        rows = slice(start, start + max(1, CHUNK_ELEMENTS // k))
        for field, values in unpack_rows(stored[rows], kind, form).items():
            by_row[field][rows] = values

    for _ in pool.map(read, range(0, num_rows, max(1, CHUNK_ELEMENTS // k))):
        pass
    return fields


def read_tensor(data: np.ndarray, tensor: GGUFTensor, dtype: torch.dtype, pool: ThreadPoolExecutor) -> torch.Tensor:
    """Return the dequantized tensor, by several threads: a vector as float32, anything larger in `dtype`.

    data: its file, uint8.
    """
    if len(tensor.shape) < 2:
        return torch.from_numpy(dequantize(data, tensor))
    *stack, k = tensor.shape
    matrix = replace(tensor, shape=(prod(stack), k))
    loaded = torch.empty(matrix.shape, dtype=dtype)
    num_rows = max(1, CHUNK_ELEMENTS // k)

    def read(start: int) -> None:
        rows = slice(start, start + num_rows)
        loaded[rows] = torch.from_numpy(dequantize(data, matrix, rows))

    for _ in pool.map(read, range(0, len(loaded), num_rows)):
        pass
    return loaded.view(tensor.shape)
