"""The Triton kernels of `elementwise`, and parts that kernels share: dependent launch, prefetching, activations."""

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.launch import cdiv, fast_launch, has_dependent_launch, next_power_of_2

MAX_EMBED_BLOCK = 2048


def launch_options(device: torch.device, num_warps: int) -> dict[str, Any]:
    """Return the keyword arguments of every kernel here: PDL is the kernel's own, the others Triton's."""
    pdl = has_dependent_launch(device)
    return {"PDL": pdl, "launch_pdl": pdl, "num_warps": num_warps}


@triton.jit
def wait_for_input(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch_to_l2(pointers, N: tl.constexpr):
    """Start to bring the N elements at each pointer to the L2 cache."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [pointers, tl.full([1], N * pointers.dtype.element_ty.primitive_bitwidth // 8, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def activation(x, ACT: tl.constexpr):
    """Return the activation of x, fp32; ACT is "silu", "gelu_tanh", "gelu", "relu" or "relu2"."""
    if ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "relu":
        return tl.maximum(x, 0.0)
    elif ACT == "relu2":
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif ACT == "gelu_tanh":
        # 0.5 (1 + tanh(z)) = sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gated(gate, up, ACT: tl.constexpr):
    """Return what `kernels.elementwise.act_and_mul` makes of gate and up, fp32, rounded nowhere."""
    if ACT == "clamped_swiglu":
        gate = tl.minimum(gate, 7.0)
        return gate * tl.sigmoid(1.702 * gate) * (tl.minimum(tl.maximum(up, -7.0), 7.0) + 1.0)
    else:
        return activation(gate, ACT) * up


def embed_triton(input_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    n = weight.shape[1]
    out = torch.empty(len(input_ids), n, dtype=weight.dtype, device=weight.device)
    block = min(next_power_of_2(n), MAX_EMBED_BLOCK)
    if len(input_ids):
        # It lets dependents begin, but begins itself when all before it is done: what that writes, as the slots of the
        # step, is read by kernels before they wait.
        options = launch_options(weight.device, num_warps=4) | {"launch_pdl": False}
        grid = (len(input_ids), cdiv(n, block))
        _embed_kernel[grid](input_ids, weight, out, weight.stride(0), N=n, BLOCK=block, **options)
    return out


@fast_launch
@triton.jit
def _embed_kernel(input_ids, weight, out, weight_stride, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_input(PDL)
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(input_ids + token).to(tl.int64)
    tl.store(out + token * N + n, tl.load(weight + row * weight_stride + n, mask=n < N), mask=n < N)


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    n = x.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.flatten(0, -2)
    if rows.shape[0]:
        block = next_power_of_2(n)
        options = launch_options(x.device, num_warps=min(max(block // 512, 1), 16))
        _rms_norm_kernel[(rows.shape[0],)](rows, weight, out, rows.stride(0), eps, N=n, BLOCK=block, **options)
    return out


@fast_launch
@triton.jit
def _rms_norm_kernel(x, weight, out, x_stride, eps, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    scale = tl.load(weight + n, mask=n < N, other=0.0)
    wait_for_input(PDL)
    values = tl.load(x + row * x_stride + n, mask=n < N, other=0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, axis=0) / N + eps)
    scaled = values.to(weight.dtype.element_ty) * scale
    tl.store(out + row * N + n, scaled.to(out.dtype.element_ty), mask=n < N)


def layer_norm_triton(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    n = x.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = x.flatten(0, -2)
    if rows.shape[0]:
        block = next_power_of_2(n)
        options = launch_options(x.device, num_warps=min(max(block // 512, 1), 16))
        _layer_norm_kernel[(rows.shape[0],)](rows, weight, bias, out, rows.stride(0), eps, N=n, BLOCK=block, **options)
    return out


@fast_launch
@triton.jit
def _layer_norm_kernel(x, weight, bias, out, x_stride, eps, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    if weight is not None:
        scale = tl.load(weight + n, mask=n < N, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    wait_for_input(PDL)
    values = tl.load(x + row * x_stride + n, mask=n < N, other=0.0).to(tl.float32)
    values = tl.where(n < N, values - tl.sum(values, axis=0) / N, 0.0)
    values *= tl.rsqrt(tl.sum(values * values, axis=0) / N + eps)
    if weight is not None:
        values *= scale
    if bias is not None:
        values += shift
    tl.store(out + row * N + n, values.to(out.dtype.element_ty), mask=n < N)


def layer_norm_heads_triton_(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if len(x):
        num_heads, head_dim = weight.shape
        block_heads = 8
        _layer_norm_heads_kernel[(cdiv(num_heads, block_heads), len(x))](
            x,
            weight,
            x.stride(0),
            eps,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            BLOCK_HEADS=block_heads,
            BLOCK=next_power_of_2(head_dim),
            **launch_options(x.device, num_warps=2),
        )
    return x


@fast_launch
@triton.jit
def _layer_norm_heads_kernel(
    x,
    weight,
    x_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    i = tl.arange(0, BLOCK)
    places = head[:, None] * HEAD_DIM + i[None, :]
    is_in = (head < NUM_HEADS)[:, None] & (i < HEAD_DIM)[None, :]
    scale = tl.load(weight + places, mask=is_in, other=0.0).to(tl.float32)
    wait_for_input(PDL)
    pointers = x + tl.program_id(1).to(tl.int64) * x_stride + places
    values = tl.load(pointers, mask=is_in, other=0.0).to(tl.float32)
    values = tl.where(is_in, values - tl.sum(values, axis=1)[:, None] / HEAD_DIM, 0.0)
    values *= tl.rsqrt(tl.sum(values * values, axis=1) / HEAD_DIM + eps)[:, None]
    tl.store(pointers, (values * scale).to(x.dtype.element_ty), mask=is_in)


def activate_triton(x: torch.Tensor, act: str) -> torch.Tensor:
    rows = x.flatten(0, -2)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if rows.shape[0]:
        block, n = 1024, x.shape[-1]
        options = launch_options(x.device, num_warps=4)
        _activate_kernel[(cdiv(n, block), rows.shape[0])](
            rows, out, rows.stride(0), N=n, ACT=act, BLOCK=block, **options
        )
    return out


@fast_launch
@triton.jit
def _activate_kernel(x, out, x_stride, N: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_input(PDL)
    values = tl.load(x + row * x_stride + n, mask=n < N, other=0.0)
    tl.store(out + row * N + n, activation(values.to(tl.float32), ACT).to(out.dtype.element_ty), mask=n < N)


def xielu_triton(x: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    rows = x.flatten(0, -2)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if rows.shape[0]:
        block, n = 1024, x.shape[-1]
        options = launch_options(x.device, num_warps=4)
        grid = (cdiv(n, block), rows.shape[0])
        _xielu_kernel[grid](rows, parameters, out, rows.stride(0), N=n, BLOCK=block, **options)
    return out


@fast_launch
@triton.jit
def _xielu_kernel(x, parameters, out, x_stride, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    beta = tl.load(parameters + 2)
    eps = tl.load(parameters + 3)
    a = _softplus(tl.load(parameters))
    b = beta + _softplus(tl.load(parameters + 1))
    wait_for_input(PDL)
    values = tl.load(x + row * x_stride + n, mask=n < N, other=0.0).to(tl.float32)
    z = tl.minimum(values, eps)
    # Near 0 exp(z) - 1 loses all digits: its series does not.
    expm1 = tl.where(z > -0.01, z * (1.0 + z * (0.5 + z * (1.0 / 6.0 + z / 24.0))), tl.exp(z) - 1.0)
    activated = tl.where(values > 0, a * values * values, b * (expm1 - values)) + beta * values
    tl.store(out + row * N + n, activated.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


def act_and_mul_triton(x: torch.Tensor, act: str) -> torch.Tensor:
    n = x.shape[-1] // 2
    rows = x.flatten(0, -2)
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if rows.shape[0]:
        block = 1024
        options = launch_options(x.device, num_warps=4)
        grid = (cdiv(n, block), rows.shape[0])
        _act_and_mul_kernel[grid](rows, out, rows.stride(0), N=n, ACT=act, BLOCK=block, **options)
    return out


@fast_launch
@triton.jit
def _act_and_mul_kernel(x, out, x_stride, N: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_input(PDL)
    gate = tl.load(x + row * x_stride + n, mask=n < N, other=0.0)
    up = tl.load(x + row * x_stride + N + n, mask=n < N, other=0.0)
    if ACT == "clamped_swiglu":
        result = gated(gate.to(tl.float32), up.to(tl.float32), ACT).to(gate.dtype)
    else:
        result = activation(gate.to(tl.float32), ACT).to(gate.dtype) * up  # rounded there, as torch does
    tl.store(out + row * N + n, result, mask=n < N)


def softcap_triton_(x: torch.Tensor, cap: float) -> torch.Tensor:
    if x.numel():
        block = 2048
        rows = x.flatten(0, -2)
        grid = (cdiv(rows.shape[1], block), rows.shape[0])
        _softcap_kernel[grid](rows, rows.stride(0), rows.shape[1], cap, BLOCK=block, **launch_options(x.device, 4))
    return x


@fast_launch
@triton.jit
def _softcap_kernel(x, x_stride, N, cap, BLOCK: tl.constexpr, PDL: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pointers = x + tl.program_id(1).to(tl.int64) * x_stride + n
    wait_for_input(PDL)
    values = tl.load(pointers, mask=n < N, other=0.0).to(tl.float32) / cap
    tanh = 2.0 * tl.sigmoid(2.0 * values) - 1.0
    tl.store(pointers, (cap * tanh).to(x.dtype.element_ty), mask=n < N)


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
    v_norm: torch.Tensor | None = None,
) -> torch.Tensor:
    num_tokens = qkv.shape[0]
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens:
        rotary_dim = cos_sin.shape[1]
        block_heads = 8
        grid = (cdiv(num_heads + 2 * num_kv_heads, block_heads), num_tokens)
        _rope_and_store_kernel[grid](
            qkv,
            positions,
            cos_sin,
            k_cache,
            v_cache,
            out_cache_loc,
            q_norm,
            k_norm,
            v_norm,
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
            BLOCK_HALF=next_power_of_2(rotary_dim // 2),
            BLOCK_REST=next_power_of_2(head_dim - rotary_dim),
            **launch_options(qkv.device, num_warps=2),
        )
    return q


@fast_launch
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
    v_norm,
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

    if q_norm is not None or k_norm is not None or v_norm is not None:
        squares = tl.sum(x1.to(tl.float32) * x1.to(tl.float32) + x2.to(tl.float32) * x2.to(tl.float32), axis=1)
        if 2 * HALF < HEAD_DIM:
            squares += tl.sum(x3.to(tl.float32) * x3.to(tl.float32), axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        x1 = _norm_heads(x1, scale, q_norm, k_norm, v_norm, i, i < HALF, is_q, is_k, is_v)
        x2 = _norm_heads(x2, scale, q_norm, k_norm, v_norm, HALF + i, i < HALF, is_q, is_k, is_v)
        if 2 * HALF < HEAD_DIM:
            x3 = _norm_heads(x3, scale, q_norm, k_norm, v_norm, j, j < HEAD_DIM, is_q, is_k, is_v)

    cos = tl.load(cos_sin + position * 2 * HALF + i, mask=i < HALF, other=0.0)[None, :]
    sin = tl.load(cos_sin + position * 2 * HALF + HALF + i, mask=i < HALF, other=0.0)[None, :]
    is_rotated = (is_q | is_k)[:, None]
    y1 = tl.where(is_rotated, x1 * cos - x2 * sin, x1.to(tl.float32)).to(x1.dtype)
    y2 = tl.where(is_rotated, x2 * cos + x1 * sin, x2.to(tl.float32)).to(x2.dtype)

    tl.store(q_target + i[None, :], y1, mask=is_q[:, None] & is_half)
    tl.store(q_target + HALF + i[None, :], y2, mask=is_q[:, None] & is_half)
    store_in_cache(k_target + i[None, :], y1, is_k[:, None] & is_half, CACHE_MAX)
    store_in_cache(k_target + HALF + i[None, :], y2, is_k[:, None] & is_half, CACHE_MAX)
    store_in_cache(v_target + i[None, :], y1, is_v[:, None] & is_half, CACHE_MAX)
    store_in_cache(v_target + HALF + i[None, :], y2, is_v[:, None] & is_half, CACHE_MAX)
    if 2 * HALF < HEAD_DIM:
        tl.store(q_target + j[None, :], x3, mask=is_q[:, None] & is_rest)
        store_in_cache(k_target + j[None, :], x3, is_k[:, None] & is_rest, CACHE_MAX)
        store_in_cache(v_target + j[None, :], x3, is_v[:, None] & is_rest, CACHE_MAX)


@triton.jit
def _norm_heads(x, scale, q_norm, k_norm, v_norm, offsets, is_element, is_q, is_k, is_v):
    """Return x with its query, key and value rows scaled by an RMS norm, where they have one."""
    normed = x.to(tl.float32) * scale
    x = _scale_rows(x, normed, q_norm, offsets, is_element, is_q)
    x = _scale_rows(x, normed, k_norm, offsets, is_element, is_k)
    return _scale_rows(x, normed, v_norm, offsets, is_element, is_v)


@triton.jit
def _scale_rows(x, normed, norm, offsets, is_element, is_row):
    if norm is not None:  # rounded as `rms_norm` does
        weight = tl.load(norm + offsets, mask=is_element, other=0.0)[None, :]
        x = tl.where(is_row[:, None], (normed.to(weight.dtype) * weight).to(x.dtype), x)
    return x


@triton.jit
def store_in_cache(pointers, x, mask, CACHE_MAX: tl.constexpr):
    if CACHE_MAX is not None:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -CACHE_MAX), CACHE_MAX)
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)


def rope_and_store_latent_triton(
    q: torch.Tensor,
    kv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    cache: torch.Tensor,
    out_cache_loc: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
) -> None:
    num_tokens, num_heads, head_dim = q.shape
    if num_tokens:
        rank, rotary_dim = len(norm), cos_sin.shape[1]
        block_heads = 8
        _rope_and_store_latent_kernel[(1 + cdiv(num_heads, block_heads), num_tokens)](
            q,
            kv,
            positions,
            cos_sin,
            cache,
            out_cache_loc,
            norm,
            q.stride(0),
            q.stride(1),
            kv.stride(0),
            cache.stride(0),
            eps,
            NUM_HEADS=num_heads,
            ROTATED_AT=head_dim - rotary_dim,
            RANK=rank,
            HALF=rotary_dim // 2,
            CACHE_MAX=torch.finfo(cache.dtype).max if cache.dtype.itemsize == 1 else None,
            BLOCK_HEADS=block_heads,
            BLOCK_RANK=next_power_of_2(rank),
            BLOCK_HALF=next_power_of_2(rotary_dim // 2),
            **launch_options(q.device, num_warps=2),
        )


@fast_launch
@triton.jit
def _rope_and_store_latent_kernel(
    q,
    kv,
    positions,
    cos_sin,
    cache,
    out_cache_loc,
    norm,
    q_stride,
    q_stride_head,
    kv_stride,
    cache_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    ROTATED_AT: tl.constexpr,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    CACHE_MAX: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_input(PDL)
    token = tl.program_id(1).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64)
    i = tl.arange(0, BLOCK_HALF)
    is_half = i < HALF
    cos = tl.load(cos_sin + position * 2 * HALF + i, mask=is_half, other=0.0)
    sin = tl.load(cos_sin + position * 2 * HALF + HALF + i, mask=is_half, other=0.0)
    if tl.program_id(0) > 0:
        head = (tl.program_id(0) - 1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        mask = (head < NUM_HEADS)[:, None] & is_half[None, :]
        first = q + token * q_stride + head[:, None] * q_stride_head + ROTATED_AT + i[None, :]
        x1 = tl.load(first, mask=mask, other=0.0)
        x2 = tl.load(first + HALF, mask=mask, other=0.0)
        tl.store(first, (x1 * cos[None, :] - x2 * sin[None, :]).to(x1.dtype), mask=mask)
        tl.store(first + HALF, (x2 * cos[None, :] + x1 * sin[None, :]).to(x1.dtype), mask=mask)
    else:
        source = kv + token * kv_stride
        target = cache + tl.load(out_cache_loc + token).to(tl.int64) * cache_stride
        n = tl.arange(0, BLOCK_RANK)
        values = tl.load(source + n, mask=n < RANK, other=0.0)
        weight = tl.load(norm + n, mask=n < RANK, other=0.0)
        wide = values.to(tl.float32)
        wide *= tl.rsqrt(tl.sum(wide * wide, axis=0) / RANK + eps)
        normed = (wide.to(weight.dtype) * weight).to(values.dtype)  # rounded as `rms_norm` does
        store_in_cache(target + n, normed, n < RANK, CACHE_MAX)
        k1 = tl.load(source + RANK + i, mask=is_half, other=0.0)
        k2 = tl.load(source + RANK + HALF + i, mask=is_half, other=0.0)
        store_in_cache(target + RANK + i, (k1 * cos - k2 * sin).to(k1.dtype), is_half, CACHE_MAX)
        store_in_cache(target + RANK + HALF + i, (k2 * cos + k1 * sin).to(k1.dtype), is_half, CACHE_MAX)
