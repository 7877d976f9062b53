"""Products on a CPU whose weight lies in oneDNN's blocked layout.

Given a plain weight, oneDNN lays it out anew in every call. For the few tokens of a decode step that costs half as
much again as the product itself (576 x 3072, bf16, AMX: 900 µs instead of 640).
"""

import torch

_linear = torch.ops.mkldnn._linear_pointwise.default
_linear_add = torch.ops.mkldnn._linear_pointwise.binary
_pack = torch.ops.mkldnn._reorder_linear_weight.default


def can_pack(weight: torch.Tensor) -> bool:
    """float32 stays as it is: its products do not go through oneDNN."""
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def pack_onednn(weight: torch.Tensor) -> torch.Tensor:
    """A copy of weight [N, K] that only the functions below can read."""
    return _pack(weight)


def linear_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _linear(x, weight, bias, "none", [], "")


def linear_add_onednn(
    x: torch.Tensor, weight: torch.Tensor, h: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """h + linear(x), added in fp32 before the one rounding; a new tensor."""
    return _linear_add(x, h, weight, bias, "add")
