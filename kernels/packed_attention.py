"""Attention within each of several sequences that lie one behind another: its definition in torch, and a kernel.

softmax(scale q k^T) v, where each token sees all of its own sequence, what is behind it too. No cache, no pages: this
is what towers do that see several pictures at once.
"""

import torch
import torch.nn.functional as F

from kernels.card import card_of

OLDEST_FLASH = (8, 0)  # compute capability, of torch's FlashAttention
MAX_HEAD_DIM = 256
HALF = (torch.bfloat16, torch.float16)


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, max_len: int, scale: float
) -> torch.Tensor:
    """Return the sums of T tokens, [T, H, D]. q, k, v: likewise.

    bounds: int32 [S + 1]: sequence i is tokens bounds[i] to bounds[i + 1]. max_len: tokens of the longest.
    """
    if not is_fast(q.device, q.dtype, q.shape[-1]):
        return torch_packed_attention(q, k, v, bounds, scale)
    # torch's own build of FlashAttention 2: with the bounds on the device, the host waits for nothing.
    return torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, max_len, max_len, 0.0, False, False, scale=scale
    )[0]


def torch_packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, scale: float
) -> torch.Tensor:
    lens = bounds.diff().tolist()
    parts = zip(*(one.transpose(0, 1)[None].split(lens, dim=2) for one in (q, k, v)), strict=True)
    sums = [F.scaled_dot_product_attention(q, k, v, scale=scale) for q, k, v in parts]
    return torch.cat(sums, dim=2)[0].transpose(0, 1)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate heads, [T, H, D] with heads beside each other, in place. cos, sin: [T, D]."""
    if not heads.is_cuda:
        heads.copy_(rotated_torch(heads, cos, sin))
        return
    from kernels.triton_rotation import rotate_triton  # here: a machine without a GPU need not have triton

    rotate_triton(heads, cos, sin)


def rotated_torch(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x = heads.float()
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos[:, None].float() + turned * sin[:, None].float()).to(heads.dtype)


def is_fast(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether there is a kernel that takes all sequences at once."""
    if device.type != "cuda" or dtype not in HALF or head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return False
    return card_of(device).capability >= OLDEST_FLASH
