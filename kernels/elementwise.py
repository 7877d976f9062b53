"""The passes between matrix products: norms, activations, rotary embedding with the KV store.

Each is defined by the torch function whose name ends in _torch; tensors on a GPU take a kernel of `triton_elementwise`.
"""

import torch
import torch.nn.functional as F

# gpt-oss's way to join gate and up.
CLAMPED_SWIGLU = "clamped_swiglu"
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if weight.dtype != x.dtype:
        return rms_norm_torch(x.float(), weight.float(), eps).to(x.dtype)
    size = x.shape[-1]
    # x and -x together have mean 0 and variance mean(x²). On a CPU layer_norm is one pass, F.rms_norm ten.
    return F.layer_norm(torch.cat((x, -x), dim=-1), (2 * size,), eps=eps)[..., :size] * weight


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x²) + eps) * weight over the last dimension; [T, N] -> [T, N].

    The normalized value is rounded to the weight's dtype before it meets the weight: x's own, as in Hugging Face's
    Llama, or float32, as in its Gemma.
    """
    if x.is_cuda:
        from kernels.triton_elementwise import rms_norm_triton  # here: a machine without a GPU need not have triton

        return rms_norm_triton(x, weight, eps)
    return rms_norm_torch(x, weight, eps)


def layer_norm_torch(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    if weight is not None and weight.dtype != x.dtype:
        bias = None if bias is None else bias.float()
        return layer_norm_torch(x.float(), weight.float(), bias, eps).to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Return (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension; [T, N] -> [T, N].

    Computed in fp32 and rounded once, as torch does. Without a weight or a bias, that step is left out.
    """
    if x.is_cuda:
        from kernels.triton_elementwise import layer_norm_triton

        return layer_norm_triton(x, weight, bias, eps)
    return layer_norm_torch(x, weight, bias, eps)


def layer_norm_heads_torch_(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    heads = x[:, : weight.numel()].unflatten(1, weight.shape)
    heads.copy_(F.layer_norm(heads.float(), weight.shape[1:], eps=eps) * weight)
    return x


def layer_norm_heads_(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalize each of the first H heads of x [T, at least H D] as `layer_norm` does, in place, and return x.

    weight [H, D]: each head has its own.
    """
    if x.is_cuda:
        from kernels.triton_elementwise import layer_norm_heads_triton_

        return layer_norm_heads_triton_(x, weight, eps)
    return layer_norm_heads_torch_(x, weight, eps)


def activate_torch(x: torch.Tensor, act: str) -> torch.Tensor:
    if act == "silu":
        return F.silu(x)
    if act == "relu":
        return F.relu(x)
    if act == "relu2":
        return F.relu(x).square_()
    return F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def activate(x: torch.Tensor, act: str) -> torch.Tensor:
    """Return act(x), act one of "silu", "gelu_tanh", "gelu", "relu", "relu2" (relu(x)²); [T, N] -> [T, N]."""
    if x.is_cuda:
        from kernels.triton_elementwise import activate_triton

        return activate_triton(x, act)
    return activate_torch(x, act)


def xielu_torch(x: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    alpha_p, alpha_n, beta, eps = parameters
    wide = x.float()
    positive = F.softplus(alpha_p) * wide * wide
    negative = (beta + F.softplus(alpha_n)) * (torch.expm1(wide.minimum(eps)) - wide)
    return (torch.where(wide > 0, positive, negative) + beta * wide).to(x.dtype)


def xielu(x: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """Return the activation xIELU (Huang and Schlag 2024) of x; [T, N] -> [T, N]. Computed in fp32 and rounded once.

    parameters: fp32 [4], α_p and α_n before their softplus, β and ε. With a = softplus(α_p), b = β + softplus(α_n), it
    is a x² + β x for x > 0, else b (exp(min(x, ε)) - 1 - x) + β x.
    """
    if x.is_cuda:
        from kernels.triton_elementwise import xielu_triton

        return xielu_triton(x, parameters)
    return xielu_torch(x, parameters)


def act_and_mul_torch(x: torch.Tensor, act: str) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    if act == CLAMPED_SWIGLU:
        gate, up = gate.float().clamp(max=SWIGLU_LIMIT), up.float().clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        return (gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)).to(x.dtype)
    return activate_torch(gate, act).mul_(up)


def act_and_mul(x: torch.Tensor, act: str) -> torch.Tensor:
    """Return act(gate) * up of x = [gate, up], act one of those of `activate`; [T, 2N] -> [T, N].

    Or, for "clamped_swiglu", gate * sigmoid(1.702 gate) * (up + 1) of a gate of at most 7 and an up from -7 to 7.
    """
    if x.is_cuda:
        from kernels.triton_elementwise import act_and_mul_triton

        return act_and_mul_triton(x, act)
    return act_and_mul_torch(x, act)


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
    v_norm: torch.Tensor | None = None,
) -> torch.Tensor:
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    qk, v = heads.split([num_heads + num_kv_heads, num_kv_heads], dim=1)
    if q_norm is not None or k_norm is not None:
        q, k = qk.split([num_heads, num_kv_heads], dim=1)
        q = q if q_norm is None else rms_norm_torch(q, q_norm, eps)
        k = k if k_norm is None else rms_norm_torch(k, k_norm, eps)
        qk = torch.cat([q, k], dim=1)
    if v_norm is not None:
        v = rms_norm_torch(v, v_norm, eps)
    rotary_dim = cos_sin.shape[1]
    cos, sin = cos_sin.index_select(0, positions).view(-1, 2, 1, rotary_dim // 2).unbind(1)  # [T, 1, rotary_dim / 2]
    x = qk[..., :rotary_dim].unflatten(-1, (2, rotary_dim // 2))
    y = x * cos.unsqueeze(2)  # fp32
    y[:, :, 0].addcmul_(x[:, :, 1], sin, value=-1)
    y[:, :, 1].addcmul_(x[:, :, 0], sin)
    rotated = y.flatten(2).to(qkv.dtype)
    if rotary_dim < head_dim:
        rotated = torch.cat([rotated, qk[..., rotary_dim:]], dim=-1)
    if num_kv_heads:
        slots = out_cache_loc.long()
        store(k_cache, slots, rotated[:, num_heads:])
        store(v_cache, slots, v)
    return rotated[:, :num_heads]


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
    v_norm: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate queries and keys by their positions, write keys and values to their slots, return the queries.

    qkv [T, (H + 2 Hkv) D]; positions and out_cache_loc int32 [T]; k_cache and v_cache [num_slots, Hkv, D] in the
    cache's dtype; q_norm and k_norm [D] scale an RMS norm of each head before the rotation, v_norm one of values. With
    num_kv_heads 0, qkv holds queries alone, and nothing is stored. cos_sin fp32
    [max_position, rotary_dim] holds cosines in its first half, sines in its second; the first rotary_dim elements of
    a head are rotated in GPT-NeoX pairs (i, i + rotary_dim / 2), in fp32. Returns q [T, H, D].
    """
    run = rope_and_store_torch
    if qkv.is_cuda:
        from kernels.triton_elementwise import rope_and_store_triton as run
    elif qkv.is_cpu:
        from kernels.cache_cpu import kernels

        compiled = kernels()
        if compiled is not None and compiled.can_rotate(qkv, k_cache, v_cache):
            run = compiled.rope_and_store
    norms = q_norm, k_norm, eps, v_norm
    return run(qkv, positions, cos_sin, k_cache, v_cache, out_cache_loc, num_heads, num_kv_heads, head_dim, *norms)


def rope_and_store_latent_torch(
    q: torch.Tensor,
    kv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    cache: torch.Tensor,
    out_cache_loc: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
) -> None:
    rank, rotary_dim = len(norm), cos_sin.shape[1]
    cos, sin = cos_sin.index_select(0, positions)[:, None].chunk(2, dim=-1)  # [T, 1, rotary_dim / 2]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        x1, x2 = x.float().chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)

    of_queries = q[..., -rotary_dim:]
    of_queries.copy_(rotated(of_queries))
    latents = rms_norm_torch(kv[:, None, :rank], norm, eps)
    store(cache, out_cache_loc.long(), torch.cat((latents, rotated(kv[:, None, rank:])), dim=-1))


def rope_and_store_latent(
    q: torch.Tensor,
    kv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    cache: torch.Tensor,
    out_cache_loc: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
) -> None:
    """Rotate the last P elements of each query by its position, in place, and write a token's latent to its slot.

    q [T, H, at least P]. kv [T, R + P]: its first R get an RMS norm scaled by `norm` [R], the others are rotated; the
    result goes to cache [num_slots, 1, R + P], in the cache's dtype. positions and out_cache_loc int32 [T]. cos_sin
    fp32 [max_position, P], as `rope_and_store` has it, GPT-NeoX pairs too.
    """
    run = rope_and_store_latent_torch
    if q.is_cuda:
        from kernels.triton_elementwise import rope_and_store_latent_triton as run
    run(q, kv, positions, cos_sin, cache, out_cache_loc, norm, eps)


def store(cache: torch.Tensor, slots: torch.Tensor, x: torch.Tensor) -> None:
    """Write x [T, Hkv, D] to its slots, int64 [T]."""
    x = to_cache_dtype(x, cache.dtype)
    if cache.dtype.itemsize == 1:  # torch copies no float8 by index
        cache, x = cache.view(torch.uint8), x.view(torch.uint8)
    cache.index_copy_(0, slots, x)


def to_cache_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast x to `dtype`, saturating: torch's cast to float8 turns values that overflow into NaN or infinity."""
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)


def softcap_torch_(x: torch.Tensor, cap: float) -> torch.Tensor:
    return x.div_(cap).tanh_().mul_(cap)


def softcap_(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Replace x by cap tanh(x / cap), in place, and return it."""
    if x.is_cuda:
        from kernels.triton_elementwise import softcap_triton_

        return softcap_triton_(x, cap)
    return softcap_torch_(x, cap)


def embed(input_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the rows `input_ids` of weight [vocab, N]; [T] -> [T, N]."""
    if weight.is_cuda:
        from kernels.triton_elementwise import embed_triton

        return embed_triton(input_ids, weight)
    return F.embedding(input_ids, weight)
