"""Convert GGUF files (llama.cpp's format) to Hugging Face folders: config, tokenizer, dequantized safetensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here, which takes a tenth of a
second where the `gguf` package's reader takes five; dequantization is that package's.
"""

import json
import logging
import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.errors import ModelError

logger = logging.getLogger(__name__)

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

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> pattern of the pieces that text is cut into before merging
WORDS = {"llama-bpe": LLAMA3_WORDS, "qwen2": LLAMA3_WORDS.replace("{1,3}", "")}
CONTROL, USER_DEFINED = 3, 4  # token types


@dataclass(frozen=True)
class GGUFTensor:
    """Describe one tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]  # row-major, as torch has it
    quantization: int  # gguf.GGMLQuantizationType
    offset: int  # bytes from the start of the file

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


def read_gguf(path: Path) -> GGUF:
    """Read metadata and the list of tensors. Raises `ModelError` unless the file is one GGUF of version 2 or 3."""
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                gguf = _Header(data).parse()
            except MALFORMED as error:
                raise ModelError(f"{path} is broken: {error}") from None
    if gguf.get("split.count", 1) > 1:
        raise ModelError(f"{path} is one of {gguf['split.count']} parts: merge them with llama-gguf-split first")
    return gguf


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


def convert(path: Path, folder: Path, dtype: torch.dtype, advance: Callable[[int], None]) -> None:
    """Write `path` as a Hugging Face folder with weights of `dtype`. Calls advance(num_bytes written) as it goes."""
    gguf = read_gguf(path)
    architecture = gguf["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise ModelError(f"GGUF architecture {architecture!r} is not supported, only {', '.join(ARCHITECTURES)}")
    data = np.memmap(path, dtype=np.uint8, mode="r")
    try:
        check_whole(gguf, len(data))
        rope_factors = next((dequantize(data, t) for t in gguf.tensors if t.name == ROPE_FACTORS), None)
        write_json(folder / "config.json", make_config(gguf, dtype, rope_factors))
        write_json(folder / "generation_config.json", special_ids(gguf))
        write_tokenizer(gguf, folder)
        write_weights(gguf, data, folder, dtype, advance)
    except MALFORMED as error:
        raise ModelError(f"{path} is broken: {type(error).__name__}: {error}") from error


def check_whole(gguf: GGUF, file_bytes: int) -> None:
    """Check that the file has all its tensors, before a conversion that takes minutes.

    Raises ValueError, or `ModelError` with the name of a tensor of unknown type.
    """
    end = max((tensor.offset + tensor.num_bytes for tensor in gguf.tensors), default=0)
    if end > file_bytes:
        raise ValueError(f"it has {file_bytes} bytes, its tensors go on to {end}: an unfinished download?")
    if not any(tensor.name == EMBEDDING for tensor in gguf.tensors):
        raise ValueError(f"it has no tensor {EMBEDDING}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
        "head_dim": gguf.get("{}.attention.key_length", gguf["{}.embedding_length"] // num_heads),
        "hidden_act": "silu",
        "rms_norm_eps": shortest(gguf["{}.attention.layer_norm_rms_epsilon"]),
        "max_position_embeddings": context_length,
        "rope_parameters": make_rope_parameters(gguf, context_length, rope_factors),
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "tie_word_embeddings": "output.weight" not in shapes,
        **special_ids(gguf),
    }


def make_rope_parameters(gguf: GGUF, context_length: int, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """Return the rope_parameters of config.json; `rope_factors` divide the frequencies, if any."""
    parameters = {"rope_theta": shortest(gguf.get("{}.rope.freq_base", 10000.0))}
    kind = gguf.get("{}.rope.scaling.type", "none")
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
    factor = gguf["{}.rope.scaling.factor"]
    return parameters | {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}


def shortest(value: float) -> float:
    """Return the shortest decimal that rounds to the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def special_ids(gguf: GGUF) -> dict[str, Any]:
    """Return the ids of the special tokens by their names in config.json."""
    eos = [gguf.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    return {
        "bos_token_id": gguf.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(token_id for token_id in eos if token_id is not None)),
        "pad_token_id": gguf.get("tokenizer.ggml.padding_token_id"),
    }


def write_tokenizer(gguf: GGUF, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json. Skips an unknown kind of tokenizer, with a warning."""
    from tokenizers import AddedToken

    builders = {"gpt2": byte_level_tokenizer, "llama": sentencepiece_tokenizer}
    kind, words = gguf["tokenizer.ggml.model"], gguf.get("tokenizer.ggml.pre", "default")
    if kind not in builders or (kind == "gpt2" and words not in ("smollm", "gpt-2", "default", *WORDS)):
        logger.warning("GGUF tokenizer %s (%s) is not converted: pass --tokenizer-path", kind, words)
        return
    tokens, types = gguf["tokenizer.ggml.tokens"], gguf.get("tokenizer.ggml.token_type", [])
    tokenizer = builders[kind](gguf)
    for wanted, is_special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [token for token, token_type in zip(tokens, types, strict=False) if token_type == wanted]
        tokenizer.add_tokens([AddedToken(token, special=is_special, normalized=False) for token in added])
    adds_bos = gguf.get("tokenizer.ggml.add_bos_token", kind == "llama" or words == "llama-bpe")
    bos_id = gguf.get("tokenizer.ggml.bos_token_id")
    if adds_bos and bos_id is not None:
        from tokenizers.processors import TemplateProcessing

        bos = tokens[bos_id]
        tokenizer.post_processor = TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, bos_id)]
        )
    # Not by `save`, which raises no OSError when the disk is full.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: gguf.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": gguf["{}.context_length"],
            "clean_up_tokenization_spaces": False,
            **{role: tokens[token_id] for role, token_id in ids.items() if token_id is not None},
            **({"chat_template": gguf["tokenizer.chat_template"]} if gguf.get("tokenizer.chat_template") else {}),
        },
    )


def byte_level_tokenizer(gguf: GGUF) -> Any:
    """Return a byte-level BPE tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = gguf.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in gguf["tokenizer.ggml.merges"]]
    # Llama 3 has whole words in its vocabulary that its merges cannot reach.
    tokenizer = Tokenizer(models.BPE(vocabulary(gguf), merges, ignore_merges=words == "llama-bpe"))
    tokenizer.decoder = decoders.ByteLevel()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words not in WORDS)
    steps: list[Any] = [byte_level]
    if words in WORDS:
        steps.insert(0, pre_tokenizers.Split(Regex(WORDS[words]), behavior="isolated"))
    elif words == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if words == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def sentencepiece_tokenizer(gguf: GGUF) -> Any:
    """Return a SentencePiece-like BPE tokenizer.

    The file has no merges: any two tokens that join to a third are a merge, the best-scored third first.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = vocabulary(gguf)
    scores = gguf["tokenizer.ggml.scores"]
    ranked = sorted(
        (-scores[token_id], vocab[token[:cut]], vocab[token[cut:]], token[:cut], token[cut:])
        for token, token_id in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    )
    unknown = gguf["tokenizer.ggml.tokens"][gguf.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(vocab, [pair[3:] for pair in ranked], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend("▁")] if gguf.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def vocabulary(gguf: GGUF) -> dict[str, int]:
    """Return the ids of all tokens."""
    return {token: token_id for token_id, token in enumerate(gguf["tokenizer.ggml.tokens"])}


def write_weights(
    gguf: GGUF, data: np.ndarray, folder: Path, dtype: torch.dtype, advance: Callable[[int], None]
) -> None:
    """Write the tensors as safetensors of at most `SHARD_BYTES` (or one tensor) each, with an index if several."""
    from safetensors.torch import save_file

    tensors = [tensor for tensor in gguf.tensors if tensor.name != ROPE_FACTORS]
    shards = list(split_by_size(tensors, SHARD_BYTES // dtype.itemsize))
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weights = {}
        for tensor in shard:
            weights[checkpoint_name(tensor.name)] = read_weight(gguf, data, tensor).to(dtype)
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
    """Return the dequantized tensor, float32.

    Llama files keep rotary pairs side by side in q and k; in a checkpoint they are half a head apart.
    """
    weight = torch.from_numpy(dequantize(data, tensor))
    num_heads = {"attn_q": gguf["{}.attention.head_count"], "attn_k": gguf.get("{}.attention.head_count_kv")}
    projection = tensor.name.split(".")[-2]
    if gguf["general.architecture"] == "llama" and projection in num_heads:
        heads = num_heads[projection] or num_heads["attn_q"]
        weight = weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
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
