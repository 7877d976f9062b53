"""Convert GGUF files (llama.cpp's format) to Hugging Face folders: config, tokenizer, dequantized safetensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here, which takes a tenth of a
second where the `gguf` package's reader takes five; dequantization is that package's.
"""

import math
import mmap
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.checkpoint.gguf_tokenizer import check_tokenizer, has_known_tokenizer, write_json, write_tokenizer
from engine.errors import ModelError
from engine.model_config import turn_ends

SHARD_BYTES = 4 << 30  # most bytes of a safetensors file

# general.architecture -> architecture in config.json
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# GGUF name -> checkpoint name, both without ".weight" or ".bias"
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EMBEDDING = "token_embd.weight"
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1's scaling, as one divisor for each frequency

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


def check_convertible(gguf: GGUF, *, needs_tokenizer: bool = True) -> None:
    """Raise `ModelError`, before a conversion that takes minutes, if the model or its tokenizer is of unknown kind."""
    architecture = gguf["general.architecture"]
    if str(architecture) not in ARCHITECTURES:
        raise ModelError(f"GGUF architecture {architecture!r} is not supported, only {', '.join(ARCHITECTURES)}")
    if needs_tokenizer:
        check_tokenizer(gguf.metadata)


def convert(
    path: Path, folder: Path, dtype: torch.dtype, advance: Callable[[int], None], *, needs_tokenizer: bool = True
) -> None:
    """Write `path` as a Hugging Face folder with weights of `dtype`. Calls advance(num_bytes written) as it goes.

    Without `needs_tokenizer`, a tokenizer of unknown kind is left out.
    """
    gguf = read_gguf(path)
    check_convertible(gguf, needs_tokenizer=needs_tokenizer)
    data = [np.memmap(file, dtype=np.uint8, mode="r") for file in part_files(path)]
    try:
        for part, content in enumerate(data):
            check_whole(gguf, part, len(content))
        if not any(tensor.name == EMBEDDING for tensor in gguf.tensors):
            raise ValueError(f"it has no tensor {EMBEDDING}")
        rope_factors = next((dequantize(data[t.part], t) for t in gguf.tensors if t.name == ROPE_FACTORS), None)
        write_json(folder / "config.json", make_config(gguf, dtype, rope_factors))
        write_json(folder / "generation_config.json", special_ids(gguf))
        if needs_tokenizer or has_known_tokenizer(gguf.metadata):
            write_tokenizer(gguf.metadata, gguf["{}.context_length"], folder)
        write_weights(gguf, data, folder, dtype, advance)
    except MALFORMED as error:
        raise ModelError(f"{path} is broken: {type(error).__name__}: {error}") from error


def check_whole(gguf: GGUF, part: int, file_bytes: int) -> None:
    """Check that a file has all its tensors, before a conversion that takes minutes.

    Raises ValueError, or `ModelError` with the name of a tensor of unknown type.
    """
    end = max((tensor.offset + tensor.num_bytes for tensor in gguf.tensors if tensor.part == part), default=0)
    if end > file_bytes:
        raise ValueError(f"it has {file_bytes} bytes, its tensors go on to {end}: an unfinished download?")


def make_config(gguf: GGUF, dtype: torch.dtype, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """Return the content of config.json."""
    shapes = {tensor.name: tensor.shape for tensor in gguf.tensors}
    num_heads, context_length = gguf["{}.attention.head_count"], gguf["{}.context_length"]
    return {
        "architectures": [ARCHITECTURES[gguf["general.architecture"]]],
        "model_type": gguf["general.architecture"],
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": shapes[EMBEDDING][0],
        "hidden_size": gguf["{}.embedding_length"],
        "intermediate_size": gguf["{}.feed_forward_length"],
        "num_hidden_layers": gguf["{}.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": gguf.get("{}.attention.head_count_kv", num_heads),
        "head_dim": head_dim(gguf),
        "hidden_act": "silu",
        "rms_norm_eps": shortest(gguf["{}.attention.layer_norm_rms_epsilon"]),
        "max_position_embeddings": context_length,
        "rope_parameters": make_rope_parameters(gguf, context_length, rope_factors),
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "tie_word_embeddings": "output.weight" not in shapes,
        **special_ids(gguf),
    }


def head_dim(gguf: GGUF) -> int:
    """Return the length of a query or key head."""
    dim: int = gguf.get("{}.attention.key_length") or gguf["{}.embedding_length"] // gguf["{}.attention.head_count"]
    return dim


def rotary_dim(gguf: GGUF) -> int:
    """Return how much of a head is rotated: its first elements."""
    dim: int = gguf.get("{}.rope.dimension_count") or head_dim(gguf)
    return dim


def make_rope_parameters(gguf: GGUF, context_length: int, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """Return the rope_parameters of config.json; `rope_factors` divide the frequencies, if any."""
    parameters = {"rope_theta": shortest(gguf.get("{}.rope.freq_base", 10000.0))}
    if rotary_dim(gguf) != head_dim(gguf):
        # A little more than the ratio: it is multiplied and rounded down again.
        parameters["partial_rotary_factor"] = math.nextafter(rotary_dim(gguf) / head_dim(gguf), 1)
    factor = gguf.get("{}.rope.scaling.factor") or gguf.get("{}.rope.scale_linear") or 1.0  # the latter in old files
    kind = gguf.get("{}.rope.scaling.type") or ("none" if factor == 1.0 else "linear")
    if rope_factors is not None:
        factors = rope_factors.tolist()
        return parameters | {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": context_length,
        }
    if kind == "none":
        return parameters | {"rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise ModelError(f"rope scaling {kind!r} of the GGUF file is not supported")
    original = gguf.get("{}.rope.scaling.original_context_length", context_length)
    return parameters | {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}


def shortest(value: float) -> float:
    """Return the shortest decimal that rounds to the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def special_ids(gguf: GGUF) -> dict[str, Any]:
    """Return the ids of the special tokens by their names in config.json.

    An answer ends at the file's eos, eot and eom; old files have none of the latter, but texts that are known ends.
    """
    tokens = gguf["tokenizer.ggml.tokens"]
    eos = [gguf.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    eos += [tokens.index(text) for text in turn_ends(set(tokens))]
    return {
        "bos_token_id": gguf.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(token_id for token_id in eos if token_id is not None)),
        "pad_token_id": gguf.get("tokenizer.ggml.padding_token_id"),
    }


def write_weights(
    gguf: GGUF, data: Sequence[np.ndarray], folder: Path, dtype: torch.dtype, advance: Callable[[int], None]
) -> None:
    """Write the tensors as safetensors of at most `SHARD_BYTES` (or one tensor) each, with an index if several.

    data: the model's files, uint8.
    """
    from safetensors.torch import save_file

    tensors = [tensor for tensor in gguf.tensors if tensor.name != ROPE_FACTORS]
    shards = list(split_by_size(tensors, SHARD_BYTES // dtype.itemsize))
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weights = {}
        for tensor in shard:
            weights[checkpoint_name(tensor.name)] = read_weight(gguf, data[tensor.part], tensor).to(dtype)
            advance(tensor.num_elements * dtype.itemsize)
        save_file(weights, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(weights, file)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def split_by_size(tensors: list[GGUFTensor], max_elements: int) -> Iterator[list[GGUFTensor]]:
    """Split `tensors` into consecutive lists of at most `max_elements` elements, or one tensor, each."""
    shard: list[GGUFTensor] = []
    num_elements = 0
    for tensor in tensors:
        size = tensor.num_elements
        if shard and num_elements + size > max_elements:
            yield shard
            shard, num_elements = [], 0
        shard.append(tensor)
        num_elements += size
    yield shard


def checkpoint_name(name: str) -> str:
    """Translate a name: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. Raises `ModelError`."""
    stem, _, kind = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{kind}"
    block, _, rest = stem.removeprefix("blk.").partition(".")
    if not stem.startswith("blk.") or rest not in BLOCK_NAMES:
        raise ModelError(f"GGUF tensor {name!r} belongs to no layer of the families supported")
    return f"model.layers.{block}.{BLOCK_NAMES[rest]}.{kind}"


def read_weight(gguf: GGUF, data: np.ndarray, tensor: GGUFTensor) -> torch.Tensor:
    """Return the dequantized tensor, float32. data: its file, uint8.

    Llama files keep rotary pairs side by side in q and k; in a checkpoint they are half of what is rotated apart.
    """
    weight = torch.from_numpy(dequantize(data, tensor))
    num_heads = {"attn_q": gguf["{}.attention.head_count"], "attn_k": gguf.get("{}.attention.head_count_kv")}
    projection = tensor.name.split(".")[-2]
    if gguf["general.architecture"] == "llama" and projection in num_heads:
        heads = num_heads[projection] or num_heads["attn_q"]
        by_head = weight.view(heads, -1, *weight.shape[1:])
        rotated, rest = by_head[:, : rotary_dim(gguf)], by_head[:, rotary_dim(gguf) :]
        pairs = rotated.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2)
        weight = torch.cat((pairs.reshape(rotated.shape), rest), 1).reshape(weight.shape)
    return weight


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
