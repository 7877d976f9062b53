"""Read what a GGUF file says of latent attention, and put together what it has taken apart.

Files of 2024 have the product that makes keys and values of latents whole (`attn_kv_b`), later ones its two halves:
`attn_k_b` [heads, rank, key], turned so that queries can be taken to latents, and `attn_v_b` [heads, value, rank].
"""

from typing import Any

import torch

from engine.checkpoint.gguf import GGUF, shortest
from engine.checkpoint.gguf_rope import Factors, rope_parameters
from kernels.weights import ShapeError

KEYS, VALUES, BOTH = "attn_k_b.weight", "attn_v_b.weight", "attn_kv_b.weight"


def latent_sizes(gguf: GGUF) -> dict[str, Any]:
    """Return the sizes of latents and heads. Files that have halves give those of heads keys of their own."""
    rotary_dim = gguf["{}.rope.dimension_count"]
    key_dim = gguf.get("{}.attention.key_length_mla") or gguf["{}.attention.key_length"]
    value_dim = gguf.get("{}.attention.value_length_mla") or gguf.get("{}.attention.value_length")
    return {
        "kv_lora_rank": gguf["{}.attention.kv_lora_rank"],
        "q_lora_rank": gguf.get("{}.attention.q_lora_rank") or None,
        "qk_rope_head_dim": rotary_dim,
        "qk_nope_head_dim": key_dim - rotary_dim,
        "v_head_dim": value_dim or gguf["{}.embedding_length"] // gguf.heads,
        "head_dim": rotary_dim,
        "num_key_value_heads": gguf.heads,
    }


def latent_rope(gguf: GGUF, factors: Factors) -> dict[str, Any]:
    """Return the rotary embedding of the part of a head that is rotated, and how YaRN sharpens scores."""
    parameters = rope_parameters(gguf, factors)
    parameters.pop("partial_rotary_factor", None)
    if weight := gguf.get("{}.rope.scaling.yarn_log_multiplier"):  # a tenth of it, in these files
        parameters |= dict.fromkeys(("mscale", "mscale_all_dim"), shortest(round(10 * weight, 6)))
    return parameters


def joined(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the rows of each head's keys, and of its values, [heads * (key + value), rank]."""
    if keys.dim() != 3 or values.dim() != 3 or (keys.shape[0], keys.shape[1]) != (values.shape[0], values.shape[2]):
        raise ShapeError(f"{KEYS} {list(keys.shape)} and {VALUES} {list(values.shape)} are not halves of one matrix")
    return torch.cat((keys.transpose(1, 2), values), dim=1).flatten(0, 1)
