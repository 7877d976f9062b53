"""Towers that see several pictures at once, the patches of one behind those of another (Qwen-VL and what follows it).

What of their attention depends on the pictures' grids alone, transformers computes on the device, layer by layer, and
waits for it each time. Here it is computed once, on the host, and given to the tower, which takes it instead.
"""

import importlib.util
from typing import Any

import torch

from kernels.packed_attention import is_fast, packed_attention

# A name with "flash" in it: to others, transformers gives one sequence at a time.
NAME = "radixloop_flash"


def attend(
    module: Any,  # noqa: ARG001
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Do `packed_attention`, as transformers calls it: with and without a batch of one, heads before tokens."""
    q, k, v = (one[0].transpose(0, 1) for one in (query, key, value))
    return packed_attention(q, k, v, cu_seq_lens_q, max_length_q, scaling)[None], None


def pack_attention(vision: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Have a tower's attention take all sequences at once, where there is a kernel for it. False: there is none."""
    from transformers import AttentionInterface

    config = vision.config
    num_heads = getattr(config, "num_heads", None) or config.num_attention_heads
    if not is_fast(device, dtype, config.hidden_size // num_heads):
        return False
    AttentionInterface.register(NAME, attend)
    for part in vision.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = NAME
    return True


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
