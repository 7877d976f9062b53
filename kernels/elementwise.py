"""The passes between matrix products: RMS norm, gated activations, rotary embedding with the KV store.

The torch function that ends in _torch is each kernel's definition; tensors on a GPU take the Triton one.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one ahead of it has ended (Hopper and later).

    Such a kernel reads nothing that a kernel before it writes until `gdc_wait`. Every kernel that lets its dependents
    start early also waits itself, so that the end of one means the end of all before it.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device, num_warps: int) -> dict[str, Any]:
    """Keyword arguments of every kernel here: PDL is the kernel's own, the others Triton's."""
    pdl = has_dependent_launch(device)
    return {"PDL": pdl, "launch_pdl": pdl, "num_warps": num_warps}


@triton.jit
def wait_for_input(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def activation(x, ACT: tl.constexpr):
    """fp32 to fp32; "silu", "gelu_tanh" or "gelu"."""
    if ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "gelu_tanh":
        # 0.5 (1 + tanh(z)) = sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension; [T, N] -> [T, N].

    The normalized value is rounded to x's dtype before it meets the weight, as Hugging Face's Llama does.
    """
    return rms_norm_triton(x, weight, eps) if x.is_cuda else rms_norm_torch(x, weight, eps)


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), None, eps) * weight


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    n = x.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.flatten(0, -2)
    if rows.shape[0]:
        block = triton.next_power_of_2(n)
        options = launch_options(x.device, num_warps=min(max(block // 512, 1), 16))
        _rms_norm_kernel[(rows.shape[0],)](rows, weight, out, rows.stride(0), eps, N=n, BLOCK=block, **options)
    return out


@triton.jit
def _rms_norm_kernel(x, weight, out, x_stride, eps, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    scale = tl.load(weight + n, mask=n < N, other=0.0)
    wait_for_input(PDL)
    values = tl.load(x + row * x_stride + n, mask=n < N, other=0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, axis=0) / N + eps)
    tl.store(out + row * N + n, values.to(out.dtype.element_ty) * scale, mask=n < N)


def act_and_mul(x: torch.Tensor, act: str) -> torch.Tensor:
    """act(gate) * up of x = [gate, up], act one of "silu", "gelu_tanh", "gelu"; [T, 2N] -> [T, N]."""
    return act_and_mul_triton(x, act) if x.is_cuda else act_and_mul_torch(x, act)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x = [gate, up]; [T, 2N] -> [T, N]."""
    return act_and_mul(x, "silu")


def gelu_and_mul(x: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
    """gelu(gate) * up of x = [gate, up]; [T, 2N] -> [T, N]. `approximate` is torch's: "tanh" or "none"."""
    return act_and_mul(x, "gelu_tanh" if approximate == "tanh" else "gelu")


def act_and_mul_torch(x: torch.Tensor, act: str) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    if act == "silu":
        return F.silu(gate).mul_(up)
    return F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none").mul_(up)


def act_and_mul_triton(x: torch.Tensor, act: str) -> torch.Tensor:
    n = x.shape[-1] // 2
    rows = x.flatten(0, -2)
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if rows.shape[0]:
        block = 1024
        options = launch_options(x.device, num_warps=4)
        grid = (triton.cdiv(n, block), rows.shape[0])
        _act_and_mul_kernel[grid](rows, out, rows.stride(0), N=n, ACT=act, BLOCK=block, **options)
    return out


@triton.jit
def _act_and_mul_kernel(x, out, x_stride, N: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_input(PDL)
    gate = tl.load(x + row * x_stride + n, mask=n < N, other=0.0)
    up = tl.load(x + row * x_stride + N + n, mask=n < N, other=0.0)
    activated = activation(gate.to(tl.float32), ACT).to(gate.dtype)  # rounded there, as torch does
    tl.store(out + row * N + n, activated * up, mask=n < N)


def rope_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out_cache_loc: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Rotate queries and keys by their positions, write keys and values to their slots, return the queries.

    qkv [T, (H + 2 Hkv) D]; positions and out_cache_loc int32 [T]; k_cache and v_cache [num_slots, Hkv, D] in the
    cache's dtype; q_norm and k_norm [D] scale an RMS norm of each head before the rotation. cos_sin fp32
    [max_position, rotary_dim] holds cosines in its first half, sines in its second; the first rotary_dim elements of
    a head are rotated in GPT-NeoX pairs (i, i + rotary_dim / 2), in fp32. Returns q [T, H, D].
    """
    run = rope_and_store_triton if qkv.is_cuda else rope_and_store_torch
    return run(
        qkv, positions, cos_sin, k_cache, v_cache, out_cache_loc, num_heads, num_kv_heads, head_dim, q_norm, k_norm, eps
    )


def rope_and_store_torch(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out_cache_loc: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    qk, v = heads.split([num_heads + num_kv_heads, num_kv_heads], dim=1)
    if q_norm is not None or k_norm is not None:
        q, k = qk.split([num_heads, num_kv_heads], dim=1)
        q = q if q_norm is None else rms_norm_torch(q, q_norm, eps)
        k = k if k_norm is None else rms_norm_torch(k, k_norm, eps)
        qk = torch.cat([q, k], dim=1)
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).split(half, dim=-1)
    x1, x2 = qk[..., :half], qk[..., half : 2 * half]
    rotated = torch.empty_like(qk, memory_format=torch.contiguous_format)
    torch.addcmul(x1 * cos, x2, sin, value=-1, out=rotated[..., :half])
    torch.addcmul(x2 * cos, x1, sin, out=rotated[..., half : 2 * half])
    if 2 * half < head_dim:
        rotated[..., 2 * half :] = qk[..., 2 * half :]
    k_cache[out_cache_loc] = to_cache_dtype(rotated[:, num_heads:], k_cache.dtype)
    v_cache[out_cache_loc] = to_cache_dtype(v, v_cache.dtype)
    return rotated[:, :num_heads]


def rope_and_store_triton(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out_cache_loc: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    num_tokens = qkv.shape[0]
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens:
        rotary_dim = cos_sin.shape[1]
        block_heads = 8
        grid = (triton.cdiv(num_heads + 2 * num_kv_heads, block_heads), num_tokens)
        _rope_and_store_kernel[grid](
            qkv,
            positions,
            cos_sin,
            k_cache,
            v_cache,
            out_cache_loc,
            q_norm,
            k_norm,
            q,
            qkv.stride(0),
            k_cache.stride(0),
            k_cache.stride(1),
            v_cache.stride(0),
            v_cache.stride(1),
            eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            HALF=rotary_dim // 2,
            CACHE_MAX=torch.finfo(k_cache.dtype).max if k_cache.dtype.itemsize == 1 else None,
            BLOCK_HEADS=block_heads,
            BLOCK_HALF=triton.next_power_of_2(rotary_dim // 2),
            BLOCK_REST=triton.next_power_of_2(head_dim - rotary_dim),
            **launch_options(qkv.device, num_warps=2),
        )
    return q


@triton.jit
def _rope_and_store_kernel(
    qkv,
    positions,
    cos_sin,
    k_cache,
    v_cache,
    out_cache_loc,
    q_norm,
    k_norm,
    q,
    qkv_stride,
    k_stride_slot,
    k_stride_head,
    v_stride_slot,
    v_stride_head,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    CACHE_MAX: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_input(PDL)
    token = tl.program_id(1).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64)
    slot = tl.load(out_cache_loc + token).to(tl.int64)
    head = tl.program_id(0) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)  # queries, then keys, then values
    is_q = head < NUM_HEADS
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    is_v = (head >= NUM_HEADS + NUM_KV_HEADS) & (head < NUM_HEADS + 2 * NUM_KV_HEADS)
    source = qkv + token * qkv_stride + head[:, None] * HEAD_DIM
    q_target = q + (token * NUM_HEADS + head[:, None]) * HEAD_DIM
    k_target = k_cache + slot * k_stride_slot + (head[:, None] - NUM_HEADS) * k_stride_head
    v_target = v_cache + slot * v_stride_slot + (head[:, None] - NUM_HEADS - NUM_KV_HEADS) * v_stride_head

    # A head is three pieces: the two halves that rotate into each other, and a rest that passes.
    i = tl.arange(0, BLOCK_HALF)
    is_half = (i < HALF)[None, :]
    is_in = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None]
    x1 = tl.load(source + i[None, :], mask=is_in & is_half, other=0.0)
    x2 = tl.load(source + HALF + i[None, :], mask=is_in & is_half, other=0.0)
    if 2 * HALF < HEAD_DIM:
        j = 2 * HALF + tl.arange(0, BLOCK_REST)
        is_rest = (j < HEAD_DIM)[None, :]
        x3 = tl.load(source + j[None, :], mask=is_in & is_rest, other=0.0)

    if q_norm is not None or k_norm is not None:
        squares = tl.sum(x1.to(tl.float32) * x1.to(tl.float32) + x2.to(tl.float32) * x2.to(tl.float32), axis=1)
        if 2 * HALF < HEAD_DIM:
            squares += tl.sum(x3.to(tl.float32) * x3.to(tl.float32), axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        x1 = _norm_heads(x1, scale, q_norm, k_norm, i, i < HALF, is_q, is_k)
        x2 = _norm_heads(x2, scale, q_norm, k_norm, HALF + i, i < HALF, is_q, is_k)
        if 2 * HALF < HEAD_DIM:
            x3 = _norm_heads(x3, scale, q_norm, k_norm, j, j < HEAD_DIM, is_q, is_k)

    cos = tl.load(cos_sin + position * 2 * HALF + i, mask=i < HALF, other=0.0)[None, :]
    sin = tl.load(cos_sin + position * 2 * HALF + HALF + i, mask=i < HALF, other=0.0)[None, :]
    is_rotated = (is_q | is_k)[:, None]
    y1 = tl.where(is_rotated, x1 * cos - x2 * sin, x1.to(tl.float32)).to(x1.dtype)
    y2 = tl.where(is_rotated, x2 * cos + x1 * sin, x2.to(tl.float32)).to(x2.dtype)

    tl.store(q_target + i[None, :], y1, mask=is_q[:, None] & is_half)
    tl.store(q_target + HALF + i[None, :], y2, mask=is_q[:, None] & is_half)
    _store_in_cache(k_target + i[None, :], y1, is_k[:, None] & is_half, CACHE_MAX)
    _store_in_cache(k_target + HALF + i[None, :], y2, is_k[:, None] & is_half, CACHE_MAX)
    _store_in_cache(v_target + i[None, :], y1, is_v[:, None] & is_half, CACHE_MAX)
    _store_in_cache(v_target + HALF + i[None, :], y2, is_v[:, None] & is_half, CACHE_MAX)
    if 2 * HALF < HEAD_DIM:
        tl.store(q_target + j[None, :], x3, mask=is_q[:, None] & is_rest)
        _store_in_cache(k_target + j[None, :], x3, is_k[:, None] & is_rest, CACHE_MAX)
        _store_in_cache(v_target + j[None, :], x3, is_v[:, None] & is_rest, CACHE_MAX)


@triton.jit
def _norm_heads(x, scale, q_norm, k_norm, offsets, is_element, is_q, is_k):
    """RMS norm of the query and key rows of x; the others stay."""
    normed = (x.to(tl.float32) * scale).to(x.dtype)
    if q_norm is not None:
        x = tl.where(is_q[:, None], normed * tl.load(q_norm + offsets, mask=is_element, other=0.0)[None, :], x)
    if k_norm is not None:
        x = tl.where(is_k[:, None], normed * tl.load(k_norm + offsets, mask=is_element, other=0.0)[None, :], x)
    return x


@triton.jit
def _store_in_cache(pointers, x, mask, CACHE_MAX: tl.constexpr):
    if CACHE_MAX is not None:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -CACHE_MAX), CACHE_MAX)
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)


def to_cache_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast, saturating: torch's cast to float8 turns what overflows into NaN or infinity."""
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)


def embed(input_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows of weight [vocab, N]; [T] -> [T, N]."""
    return F.embedding(input_ids, weight)
