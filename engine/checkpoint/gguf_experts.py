"""Read what a GGUF file says of a mixture of experts: entries of config.json, and names of tensors.

A file stacks a layer's experts: `blk.3.ffn_gate_exps` is [experts, rows, inputs]. Files of 2023 have each on its own,
`blk.3.ffn_gate.7`; stacks become that (`engine.checkpoint.gguf_names`), so both have one way.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from engine.checkpoint.gguf import GGUF, shortest
from engine.errors import ModelError
from engine.models.names import Piece

Names = dict[str, str]

ROUTER = "ffn_gate_inp.weight"
SIGMOID = 2  # of expert_gating_func
CORRECTION = "exp_probs_b.bias"


@dataclass(frozen=True)
class AsRow:
    """Make a matrix of one row of the vectors whose name `pattern` finds."""

    pattern: str

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        if re.search(self.pattern, piece.name):
            piece = Piece(piece.name, (*piece.transforms, torch.atleast_2d), piece.index)
        yield piece


def expert_names(module: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Names:
    """Return tensors of a router and its experts -> modules of the checkpoint; * stands for an expert's number.

    module: of a block, that holds both.
    """
    products = {"ffn_gate": gate, "ffn_up": up, "ffn_down": down}
    return {"ffn_gate_inp": f"{module}.gate"} | {
        f"{tensor}.*": f"{module}.experts.*.{name}" for tensor, name in products.items()
    }


def shared_names(module: str) -> Names:
    """Return tensors of what every token goes to -> modules below a block's `module`."""
    return {f"ffn_{product}_shexp": f"{module}.{product}_proj" for product in ("gate", "up", "down")}


def first_expert_layer(gguf: GGUF) -> int:
    """Return the number of the first layer with experts. `ModelError` if none has."""
    for i in range(gguf.num_layers):
        if f"blk.{i}.{ROUTER}" in gguf.shapes:
            return i
    raise ModelError(f"the GGUF file has experts, but no {ROUTER}")


def expert_size(gguf: GGUF) -> int:
    """Return an expert's number of inner values."""
    layer = first_expert_layer(gguf)
    for tensor in ("ffn_down_exps.weight", "ffn_down.0.weight"):
        if shape := gguf.shapes.get(f"blk.{layer}.{tensor}"):
            return shape[-1]
    raise ModelError(f"the GGUF file has no blk.{layer}.ffn_down_exps.weight")


def shared_size(gguf: GGUF) -> int:
    """Return the number of inner values of the experts that every token goes to; 0 if there are none."""
    layer = first_expert_layer(gguf)
    return gguf.shapes.get(f"blk.{layer}.ffn_down_shexp.weight", (0,))[-1]


def mixtral_experts(gguf: GGUF) -> dict[str, Any]:
    return {
        "num_local_experts": gguf["{}.expert_count"],
        "num_experts_per_tok": gguf["{}.expert_used_count"],
        "intermediate_size": expert_size(gguf),
    }


def granite_experts(gguf: GGUF) -> dict[str, Any]:
    return mixtral_experts(gguf) | {"shared_intermediate_size": shared_size(gguf)}


def minimax_experts(gguf: GGUF) -> dict[str, Any]:
    check_scores(gguf, SIGMOID)
    return mixtral_experts(gguf)


def qwen_experts(gguf: GGUF) -> dict[str, Any]:
    return {
        "num_experts": gguf["{}.expert_count"],
        "num_experts_per_tok": gguf["{}.expert_used_count"],
        "moe_intermediate_size": expert_size(gguf),
    }


def qwen2_experts(gguf: GGUF) -> dict[str, Any]:
    normed = bool(gguf.get("{}.expert_weights_norm", False))
    return qwen_experts(gguf) | {"shared_expert_intermediate_size": shared_size(gguf), "norm_topk_prob": normed}


def qwen3_experts(gguf: GGUF) -> dict[str, Any]:
    return qwen_experts(gguf) | {"norm_topk_prob": bool(gguf.get("{}.expert_weights_norm", True))}


def olmo_experts(gguf: GGUF) -> dict[str, Any]:
    return {
        "num_experts": gguf["{}.expert_count"],
        "num_experts_per_tok": gguf["{}.expert_used_count"],
        "intermediate_size": expert_size(gguf),
        "norm_topk_prob": bool(gguf.get("{}.expert_weights_norm", False)),
    }


def glm_experts(gguf: GGUF) -> dict[str, Any]:
    check_scores(gguf, SIGMOID)
    size = expert_size(gguf)
    return {
        "n_routed_experts": gguf["{}.expert_count"],
        "num_experts_per_tok": gguf["{}.expert_used_count"],
        "moe_intermediate_size": size,
        "n_shared_experts": shared_size(gguf) // size,
        "n_group": gguf.get("{}.expert_group_count", 1),
        "topk_group": gguf.get("{}.expert_group_used_count", 1),
        "first_k_dense_replace": first_expert_layer(gguf),
        "norm_topk_prob": bool(gguf.get("{}.expert_weights_norm", True)),
        "routed_scaling_factor": shortest(gguf.get("{}.expert_weights_scale", 1.0)),
    }


def deepseek_variant(gguf: GGUF) -> str:
    """Return the architecture of a DeepSeek file: of V2, of V3 and its likes, or of those without experts.

    V3 is known by its sigmoids; GLM-4.7-Flash, whose files may not say that it has them, by their correction.
    """
    if not gguf.get("{}.expert_count"):
        return "youtu"
    is_corrected = f"blk.{first_expert_layer(gguf)}.{CORRECTION}" in gguf.shapes
    has_sigmoids = gguf.get("{}.expert_gating_func", 0) == SIGMOID
    return "deepseek3" if is_corrected or has_sigmoids else "deepseek2"


def deepseek_experts(gguf: GGUF) -> dict[str, Any]:
    size, num_groups = expert_size(gguf), gguf.get("{}.expert_group_count", 1)
    return {
        "n_routed_experts": gguf["{}.expert_count"],
        "num_experts_per_tok": gguf["{}.expert_used_count"],
        "moe_intermediate_size": size,
        "n_shared_experts": shared_size(gguf) // size,
        "n_group": num_groups,
        "topk_group": gguf.get("{}.expert_group_used_count", 1),
        "topk_method": "group_limited_greedy" if num_groups > 1 else "greedy",
        "first_k_dense_replace": first_expert_layer(gguf),
        "norm_topk_prob": bool(gguf.get("{}.expert_weights_norm", False)),
        "routed_scaling_factor": shortest(gguf.get("{}.expert_weights_scale") or 1.0),
    }


def gemma4_experts(gguf: GGUF) -> dict[str, Any]:
    """Return the experts beside each layer's MLP; {} of a file without."""
    if not (num_experts := gguf.get("{}.expert_count")):
        return {}
    return {
        "enable_moe_block": True,
        "num_experts": num_experts,
        "top_k_experts": gguf["{}.expert_used_count"],
        "moe_intermediate_size": gguf["{}.expert_feed_forward_length"],
    }


def dbrx_experts(gguf: GGUF) -> dict[str, Any]:
    """Return DBRX's two halves of a configuration, whose keys and values lie in them too."""
    clip = gguf.get("{}.attention.clamp_kqv")
    return {
        "attn_config": {
            "kv_n_heads": gguf.kv_heads,
            "clip_qkv": None if clip is None else shortest(clip),
            "rope_theta": shortest(gguf.get("{}.rope.freq_base", 10000.0)),
        },
        "ffn_config": {
            "ffn_hidden_size": expert_size(gguf),
            "moe_num_experts": gguf["{}.expert_count"],
            "moe_top_k": gguf["{}.expert_used_count"],
        },
    }


def grok_experts(gguf: GGUF) -> dict[str, Any]:
    """Return Grok's experts, and whether there is an MLP beside them, as in Grok 2."""
    dense = gguf.shapes.get("blk.0.ffn_down.weight")
    return mixtral_experts(gguf) | {
        "moe_intermediate_size": expert_size(gguf),
        "intermediate_size": dense[-1] if dense else expert_size(gguf),
        "residual_moe": dense is not None,
    }


def llama4_experts(gguf: GGUF) -> dict[str, Any]:
    check_scores(gguf, SIGMOID)
    return mixtral_experts(gguf) | {
        "intermediate_size_mlp": gguf["{}.feed_forward_length"],
        "moe_layers": [i for i in range(gguf.num_layers) if f"blk.{i}.{ROUTER}" in gguf.shapes],
    }


def ernie_experts(gguf: GGUF) -> dict[str, Any]:
    size = expert_size(gguf)
    return {
        "moe_num_experts": gguf["{}.expert_count"],
        "moe_k": gguf["{}.expert_used_count"],
        "moe_intermediate_size": size,
        "moe_num_shared_experts": shared_size(gguf) // size,
        "moe_layer_start_index": first_expert_layer(gguf),
        "moe_layer_end_index": gguf.num_layers - 1,
        "moe_layer_interval": 1,
    }


def hunyuan_experts(gguf: GGUF) -> dict[str, Any]:
    size, shared = expert_size(gguf), shared_size(gguf)
    if shared != size:
        raise ModelError(f"a shared expert of another size is not supported: {shared} beside {size} of the GGUF file")
    return {
        "num_experts": gguf["{}.expert_count"],
        "moe_topk": gguf["{}.expert_used_count"],
        "intermediate_size": size,
    }


def check_scores(gguf: GGUF, wanted: int) -> None:
    """Raise `ModelError` if the file has another function of scores than the family; old files do not say."""
    found = gguf.get("{}.expert_gating_func", wanted) or wanted
    if found != wanted:
        raise ModelError(f"expert_gating_func of the GGUF file must be {wanted}, got {found}")
