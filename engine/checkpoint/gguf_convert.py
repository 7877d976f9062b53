"""Convert GGUF files to Hugging Face folders: config, tokenizer, dequantized safetensors."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.checkpoint.gguf import GGUF, GGUFTensor, check_whole, dequantize, naming, part_files, read_gguf
from engine.checkpoint.gguf_architectures import architecture_of
from engine.checkpoint.gguf_config import EMBEDDING, make_config, special_ids
from engine.checkpoint.gguf_names import placed
from engine.checkpoint.gguf_rope import FACTOR_TENSORS, Factors
from engine.checkpoint.gguf_tokenizer import check_tokenizer, has_known_tokenizer, write_json, write_tokenizer
from engine.errors import ModelError
from engine.models.names import Piece
from engine.models.registry import is_supported

SHARD_BYTES = 4 << 30  # most bytes of a safetensors file
CHUNK_ELEMENTS = 1 << 17  # dequantized at once by a thread: they stay in its cache
MAX_THREADS = 8
SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


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
    path: Path, folder: Path, dtype: torch.dtype, advance: Callable[[int], None], *, needs_tokenizer: bool = True
) -> None:
    """Write `path` as a Hugging Face folder with weights of `dtype`. Calls advance(num_bytes written) as it goes.

    Without `needs_tokenizer`, a tokenizer of unknown kind is left out.
    """
    gguf = read_gguf(path)
    data = [np.memmap(file, dtype=np.uint8, mode="r") for file in part_files(path)]
    with naming(path):
        for part, content in enumerate(data):
            check_whole(gguf, part, len(content))
        architecture = architecture_of(gguf)
        pieces = placed(gguf, architecture)
        write_json(folder / "config.json", make_config(gguf, architecture, dtype, rope_factors(gguf, data)))
        write_json(folder / "generation_config.json", special_ids(gguf))
        if needs_tokenizer or has_known_tokenizer(gguf.metadata):
            write_tokenizer(gguf.metadata, gguf["{}.context_length"], folder)
        write_weights(gguf, data, pieces, folder, dtype, advance)


def rope_factors(gguf: GGUF, data: Sequence[np.ndarray]) -> Factors:
    """Return the divisors of rotary frequencies that the file holds. data: the model's files, uint8."""
    found = ((FACTOR_TENSORS[tensor.name], tensor) for tensor in gguf.tensors if tensor.name in FACTOR_TENSORS)
    return {stem: dequantize(data[tensor.part], tensor).tolist() for stem, tensor in found}


@dataclass(frozen=True)
class Source:
    """Name a tensor of the file, and what becomes of it."""

    tensor: GGUFTensor
    pieces: Sequence[Piece]

    def shape_of(self, piece: Piece) -> tuple[int, ...]:
        """Return the shape of `piece`, without reading the tensor."""
        return tuple(piece.of(torch.empty(self.tensor.shape, device="meta")).shape)


def write_weights(
    gguf: GGUF,
    data: Sequence[np.ndarray],
    pieces: Mapping[str, Sequence[Piece]],
    folder: Path,
    dtype: torch.dtype,
    advance: Callable[[int], None],
) -> None:
    """Write the tensors as safetensors of at most `SHARD_BYTES` (or one tensor) each, with an index if several.

    No more than one tensor is in memory at once. data: the model's files, uint8.
    """
    sources = [Source(tensor, pieces[tensor.name]) for tensor in gguf.tensors if tensor.name in pieces]
    shards = list(split_by_size(sources, SHARD_BYTES // dtype.itemsize))
    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        for i, shard in enumerate(shards):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            header = make_header(shard, dtype)
            with open(folder / file, "wb") as output:
                output.write(len(header).to_bytes(8, "little") + header)
                for source in shard:
                    loaded = read_tensor(data[source.tensor.part], source.tensor, dtype, pool)
                    for piece in source.pieces:
                        weight = piece.of(loaded).to(dtype).contiguous()
                        output.write(weight.view(torch.uint8).numpy().data)
                    advance(source.tensor.num_elements * dtype.itemsize)
            weight_map |= {piece.name: file for source in shard for piece in source.pieces}
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def make_header(shard: Sequence[Source], dtype: torch.dtype) -> bytes:
    """Return the header of a safetensors file whose weights follow in the order of `shard`."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for source in shard:
        for piece in source.pieces:
            shape = source.shape_of(piece)
            start, end = end, end + prod(shape) * dtype.itemsize
            entries[piece.name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def split_by_size(sources: list[Source], max_elements: int) -> Iterator[list[Source]]:
    """Split `sources` into consecutive lists of at most `max_elements` elements, or one tensor, each."""
    shard: list[Source] = []
    num_elements = 0
    for source in sources:
        size = source.tensor.num_elements
        if shard and num_elements + size > max_elements:
            yield shard
            shard, num_elements = [], 0
        shard.append(source)
        num_elements += size
    yield shard


def read_tensor(data: np.ndarray, tensor: GGUFTensor, dtype: torch.dtype, pool: ThreadPoolExecutor) -> torch.Tensor:
    """Return the dequantized tensor, by several threads: a vector as float32, anything larger in `dtype`.

    data: its file, uint8.
    """
    if len(tensor.shape) < 2:
        return torch.from_numpy(dequantize(data, tensor))
    loaded = torch.empty(tensor.shape, dtype=dtype)
    num_rows = max(1, CHUNK_ELEMENTS // prod(tensor.shape[1:]))

    def read(start: int) -> None:
        rows = slice(start, start + num_rows)
        loaded[rows] = torch.from_numpy(dequantize(data, tensor, rows))

    for _ in pool.map(read, range(0, tensor.shape[0], num_rows)):
        pass
    return loaded
