"""Read the rotary embedding of a GGUF file as config.json's `rope_parameters`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from engine.checkpoint.gguf import GGUF, shortest
from engine.errors import ModelError

Factors = Mapping[str, list[float]]
"""The divisors of frequencies that a file holds, by the tensor's name without `.weight`."""
Rope = Callable[[GGUF, Factors], dict[str, Any]]

LLAMA_3 = "rope_freqs"  # Llama 3.1's scaling, as one divisor for each frequency
LONG, SHORT = "rope_factors_long", "rope_factors_short"
FACTOR_TENSORS = {f"{stem}.weight": stem for stem in (LLAMA_3, LONG, SHORT)}

# Key of the file, after `rope.scaling.` -> entry
YARN = {
    "attn_factor": "attention_factor",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


def rope_parameters(gguf: GGUF, factors: Factors) -> dict[str, Any]:
    """Return the rotary embedding of a model whose layers share one."""
    parameters = {"rope_theta": shortest(gguf.get("{}.rope.freq_base", 10000.0)), **partial_factor(gguf)}
    context_length = gguf["{}.context_length"]
    original = gguf.get("{}.rope.scaling.original_context_length", context_length)
    if LLAMA_3 in factors:
        # LongRoPE with the same divisors for all lengths: the file does not say from which numbers they were computed.
        both = {"short_factor": factors[LLAMA_3], "long_factor": factors[LLAMA_3], "attention_factor": 1.0}
        return parameters | {"rope_type": "longrope", **both, "original_max_position_embeddings": context_length}
    if LONG in factors:
        scaling = {"short_factor": factors[SHORT], "long_factor": factors[LONG], **scaling_entries(gguf)}
        return parameters | {"rope_type": "longrope", **scaling, "original_max_position_embeddings": original}
    factor = gguf.get("{}.rope.scaling.factor") or gguf.get("{}.rope.scale_linear") or 1.0  # the latter in old files
    kind = gguf.get("{}.rope.scaling.type") or ("none" if factor == 1.0 else "linear")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return parameters | {"rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise ModelError(f"rope scaling {kind!r} of the GGUF file is not supported")
    parameters |= {"rope_type": kind, "factor": shortest(factor)}
    if kind == "linear":
        return parameters
    return parameters | {"original_max_position_embeddings": original, **scaling_entries(gguf)}


def partly_rotated(gguf: GGUF, factors: Factors) -> dict[str, Any]:
    """Return the rotary embedding of a family that rotates a part of a head, unless its config.json says otherwise."""
    return {"partial_rotary_factor": 1.0} | rope_parameters(gguf, factors)


def rope_of_each_kind(gguf: GGUF, factors: Factors) -> dict[str, Any]:
    """Return the rotary embeddings of sliding layers, which nothing scales, and of full ones."""
    local = gguf.get("{}.rope.freq_base_swa", gguf.get("{}.rope.freq_base", 10000.0))
    sliding = {"rope_theta": shortest(local), "rope_type": "default"}
    return {"sliding_attention": sliding, "full_attention": rope_parameters(gguf, factors)}


def gemma3_rope(gguf: GGUF, factors: Factors) -> dict[str, Any]:
    """Return Gemma 3's rotary embeddings: sliding layers have a base of their own, which files leave out."""
    ropes = rope_of_each_kind(gguf, factors)
    ropes["sliding_attention"]["rope_theta"] = shortest(gguf.get("{}.rope.freq_base_swa", 10000.0))
    return ropes


def gemma4_rope(gguf: GGUF, factors: Factors) -> dict[str, Any]:
    """Return Gemma 4's rotary embeddings. Full layers rotate the pairs whose divisor is 1, the others' is vast.

    A quarter of the pairs, as in all released models, where the file has no divisors.
    """
    divisors = factors.get(LLAMA_3, [1.0, 1e30, 1e30, 1e30])
    rotated = sum(divisor == 1.0 for divisor in divisors) / len(divisors)
    ropes = gemma3_rope(gguf, {})
    theta = ropes["full_attention"]["rope_theta"]
    full = {"rope_type": "proportional", "rope_theta": theta, "partial_rotary_factor": rotated}
    return ropes | {"full_attention": full}


def ministral3_rope(gguf: GGUF, factors: Factors) -> dict[str, Any]:
    """Return Ministral 3's rotary embedding, which also says how queries grow with their positions."""
    multiplier = shortest(gguf.get("{}.rope.scaling.yarn_log_multiplier", 0.0))
    growth = shortest(gguf["{}.attention.temperature_scale"])
    entries = {"mscale": multiplier, "mscale_all_dim": multiplier, "llama_4_scaling_beta": growth}
    return rope_parameters(gguf, factors) | entries


def phimoe_rope(gguf: GGUF, factors: Factors) -> dict[str, Any]:
    """Return Phi-3.5-MoE's rotary embedding, whose two factors of cosines and sines are one in files."""
    parameters = rope_parameters(gguf, factors)
    scale = parameters.pop("attention_factor", None)
    return parameters if scale is None else parameters | {"short_mscale": scale, "long_mscale": scale}


def gpt_oss_rope(gguf: GGUF, factors: Factors) -> dict[str, Any]:
    """Return gpt-oss's rotary embedding, whose YaRN does not round the range that it blends to whole frequencies."""
    return rope_parameters(gguf, factors) | {"truncate": False}


def scaling_entries(gguf: GGUF) -> dict[str, Any]:
    """Return what the file says of YaRN or LongRoPE besides factors."""
    found = ((entry, gguf.get(f"{{}}.rope.scaling.{key}")) for key, entry in YARN.items())
    return {entry: shortest(value) for entry, value in found if value is not None}


def partial_factor(gguf: GGUF) -> dict[str, Any]:
    """Return {} if whole heads are rotated."""
    if rotary_dim(gguf) == head_dim(gguf):
        return {}
    # A little more than the ratio: it is multiplied and rounded down again.
    ratio = rotary_dim(gguf) / head_dim(gguf)
    exact = int(head_dim(gguf) * ratio) == rotary_dim(gguf)
    return {"partial_rotary_factor": ratio if exact else math.nextafter(ratio, 1)}


def head_dim(gguf: GGUF) -> int:
    """Return the length of a query or key head."""
    dim: int = gguf.get("{}.attention.key_length") or gguf["{}.embedding_length"] // gguf.heads
    return dim


def rotary_dim(gguf: GGUF) -> int:
    """Return how much of a head is rotated: its first elements."""
    dim: int = gguf.get("{}.rope.dimension_count") or head_dim(gguf)
    return dim
