"""Write what a GGUF file says of its model as config.json and generation_config.json say it."""

from typing import Any

import torch

from engine.checkpoint.gguf import GGUF, shortest
from engine.checkpoint.gguf_family import LAYER, RMS, Architecture
from engine.checkpoint.gguf_rope import Factors, head_dim
from engine.checkpoint.gguf_tokenizer import token_id
from engine.model_config import turn_ends

EMBEDDING = "token_embd.weight"


def make_config(gguf: GGUF, architecture: Architecture, dtype: torch.dtype, factors: Factors) -> dict[str, Any]:
    """Return the content of config.json for weights of `dtype`."""
    entries = {
        "vocab_size": gguf.shapes[EMBEDDING][0],
        "hidden_size": gguf["{}.embedding_length"],
        "intermediate_size": intermediate_size(gguf),
        "num_hidden_layers": gguf.num_layers,
        "num_attention_heads": gguf.heads,
        **({"num_key_value_heads": gguf.kv_heads} if architecture.has_like_heads else {}),
        "head_dim": head_dim(gguf),
        "hidden_act": "silu",
        "max_position_embeddings": gguf["{}.context_length"],
        "norm_eps": shortest(gguf.get(RMS) or gguf[LAYER]),
    }
    spellings = {"norm_eps": "rms_norm_eps"} | dict(architecture.spellings)
    keys = {entry: gguf.get(key) for entry, key in architecture.keys.items()}
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        **{spelling: value for entry, value in entries.items() if (spelling := spellings.get(entry, entry))},
        **({"rope_parameters": architecture.rope(gguf, factors)} if architecture.rope else {}),
        **{entry: has_bias(gguf, tensor) for entry, tensor in architecture.biases.items()},
        "tie_word_embeddings": "output.weight" not in gguf.shapes,
        **{entry: shortest(value) for entry, value in keys.items() if value is not None},
        **architecture.fixed,
        **{entry: value for derive in architecture.derived for entry, value in derive(gguf).items()},
        **special_ids(gguf),
    }


def intermediate_size(gguf: GGUF) -> int:
    """Return an MLP's number of inner values; where all layers have experts, what the file says of one."""
    shape = gguf.shapes.get("blk.0.ffn_down.weight")
    return shape[1] if shape else int(gguf["{}.feed_forward_length"])  # QWen says twice its number


def has_bias(gguf: GGUF, tensor: str) -> bool:
    """Return whether `tensor`, of the first block or of the whole model, has a bias."""
    fused = ("blk.0.attn_qkv",) if tensor == "attn_q" else ()
    return any(f"{name}.bias" in gguf.shapes for name in (tensor, f"blk.0.{tensor}", *fused))


def special_ids(gguf: GGUF) -> dict[str, Any]:
    """Return the ids of the special tokens by their names in config.json.

    An answer ends at the file's eos, eot and eom; old files have none of the latter, but texts that are known ends.
    """
    tokens = gguf["tokenizer.ggml.tokens"]
    eos = [token_id(gguf.metadata, name) for name in ("eos", "eot", "eom")]
    eos += [tokens.index(text) for text in turn_ends(set(tokens))]
    return {
        "bos_token_id": token_id(gguf.metadata, "bos"),
        "eos_token_id": list(dict.fromkeys(number for number in eos if number is not None)),
        "pad_token_id": token_id(gguf.metadata, "padding"),
    }
