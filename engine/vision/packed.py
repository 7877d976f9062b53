"""Towers that see several pictures at once, the patches of one behind those of another (Qwen-VL and what follows it).

What of their attention depends on the pictures' grids alone, transformers computes on the device, layer by layer, and
waits for it each time. Here it is computed once, on the host, and given to the tower, which takes it instead. On a GPU,
layers have kernels for what transformers does in a dozen steps each.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kernels.elementwise import rms_norm
from kernels.packed_attention import is_fast, packed_attention, rotate

NAME = "radixloop_flash"  # "flash" in it: to others, transformers says nothing of the longest sequence
MULTIPLE = 64  # of the width of a product: by others, cuBLAS takes three times as long


class PackedAttention(nn.Module):
    """Attend within all sequences at once."""

    def __init__(self, its: Any) -> None:
        """its: transformers' module."""
        super().__init__()
        self.qkv, self.proj = its.qkv, its.proj
        self.q_norm, self.k_norm = (getattr(its, name, None) for name in ("q_norm", "k_norm"))  # GLM-OCR's
        self.num_heads, self.scale = its.num_heads, its.scaling
        self.num_kv_heads = getattr(its, "num_key_value_heads", its.num_heads)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        max_seqlen: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        num_heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        qkv = self.qkv(hidden_states).view(len(hidden_states), sum(num_heads), -1)
        for heads, norm in zip(qkv.split(num_heads, dim=1), (self.q_norm, self.k_norm), strict=False):
            if norm is not None:
                heads.copy_(norm(heads))
        rotate(qkv[:, : -self.num_kv_heads], *position_embeddings)
        q, k, v = qkv.split(num_heads, dim=1)
        longest = _longest(cu_seqlens) if max_seqlen is None else max_seqlen
        made: torch.Tensor = self.proj(packed_attention(q, k, v, cu_seqlens, longest, self.scale).flatten(1))
        return made


class FusedNorm(nn.Module):
    """Do an RMS norm of transformers'."""

    def __init__(self, its: Any) -> None:
        super().__init__()
        self.weight, self.eps = its.weight, its.variance_epsilon

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.eps)


def pack_layers(vision: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Have a tower's layers take all sequences at once, by kernels, where there are such."""
    config = vision.config
    num_heads = getattr(config, "num_heads", None) or config.num_attention_heads
    if not is_fast(device, dtype, config.hidden_size // num_heads):
        return
    for part in reversed(list(vision.modules())):  # the inner ones first: attention has norms
        if hasattr(part, "config"):
            part.config._attn_implementation = NAME
        for name, child in part.named_children():
            if hasattr(child, "qkv") and not isinstance(child, PackedAttention):
                setattr(part, name, PackedAttention(child))
            elif hasattr(child, "variance_epsilon"):
                setattr(part, name, FusedNorm(child))


def widen_products(vision: Any) -> None:
    """Add zeros to the hidden layers of a tower, up to a width that products are fast with. Sums stay as they are."""
    for part in vision.modules():
        if hasattr(part, "gate_proj") and (missing := -len(part.gate_proj.weight) % MULTIPLE):
            for linear in (part.gate_proj, part.up_proj):
                _pad(linear, "weight", (0, 0, 0, missing))
                _pad(linear, "bias", (0, missing))
            _pad(part.down_proj, "weight", (0, missing))


def _pad(linear: Any, name: str, numbers: tuple[int, ...]) -> None:
    if (weight := getattr(linear, name)) is not None:
        setattr(linear, name, nn.Parameter(F.pad(weight.detach(), numbers), requires_grad=False))


def takes_plans() -> bool:
    """Return whether transformers' towers take what `plan_of` returns: early versions 5 compute it themselves."""
    return importlib.util.find_spec("transformers.vision_utils") is not None


def plan_of(vision: Any, grids: torch.Tensor) -> dict[str, Any]:
    """Return what a tower of Qwen's would compute of the grids of patches, int64 [pictures, 3] on the host."""
    from transformers import vision_utils

    merge = vision.spatial_merge_size
    plan: dict[str, Any] = {
        "position_ids": vision_utils.get_vision_position_ids(grids, merge),
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(grids),
    }
    plan["max_seqlen"] = _longest(plan["cu_seqlens"])
    if hasattr(vision, "fullatt_block_indexes"):  # the others' attention is within windows
        index, bounds = vision_utils.get_vision_window_index(
            grids, spatial_merge_size=merge, window_size=vision.window_size, patch_size=vision.patch_size
        )
        plan |= {"window_index": index, "cu_window_seqlens": bounds, "max_window_seqlen": _longest(bounds)}
    if hasattr(vision, "num_grid_per_side"):  # of position embeddings, of which each patch gets a mixture
        plan["interp_indices"], plan["interp_weights"] = vision_utils.get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=vision.num_grid_per_side,
            mode=vision.interpolation_mode,
            align_corners=vision.interpolation_align_corners,
            spatial_merge_size=merge,
        )
    return plan


def _longest(bounds: torch.Tensor) -> int:
    return int(bounds.diff().max())
