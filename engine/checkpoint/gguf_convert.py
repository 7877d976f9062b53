"""Convert GGUF files to Hugging Face folders: config, tokenizer, dequantized safetensors."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.checkpoint.gguf import GGUF, MALFORMED, GGUFTensor, check_whole, dequantize, part_files, read_gguf
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
