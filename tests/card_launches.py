"""Launch every Triton kernel as a model's steps do, on tensors without data, and name the sources of those in CUDA.

`tests.cards` compiles them.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from kernels import (
    few_gemm,
    fp4_experts,
    gated_gemm,
    hopper_latents,
    hopper_prefill,
    long_token,
    one_token,
    quantized_chain,
    quantized_few,
    quantized_many,
    quantized_rows,
    quantized_some,
    triton_bookkeeping,
    triton_elementwise,
    triton_quantized,
    triton_sampling,
)
from kernels.attention_batch import HeadRotation
from kernels.card import OLDEST_BFLOAT16, OLDEST_E4M3, OLDEST_INT8, Card
from kernels.hopper import ARCHITECTURE
from kernels.latents import FEW_TOKENS, Expansion, LatentSizes
from kernels.launch import cdiv
from kernels.peer_memory import PeerMemory
from kernels.quantized_format import FP8, Format
from kernels.quantized_kernel import Kind
from kernels.resize_plan import plan_of
from kernels.routing_rule import Routing
from kernels.triton_all_reduce import all_reduce_triton
from kernels.triton_attention import attention_of_products_triton, attention_triton
from kernels.triton_decode import DECODE_LIMITS
from kernels.triton_experts import (
    Codes,
    Unsorted,
    combine_triton,
    expert_products_triton,
    permuted_triton,
    sort_pairs,
    tile_height,
)
from kernels.triton_gemm import gemv
from kernels.triton_latents import head_products
from kernels.triton_likeliest import likeliest_triton
from kernels.triton_mla import latent_attention_triton
from kernels.triton_quantized_gemm import gemm_8bit
from kernels.triton_resize import pass_triton
from kernels.triton_rotation import rotate_triton
from kernels.triton_routing import route_triton
from kernels.triton_skinny import fits_skinny, skinny_gemm

Launch = Callable[[], object]
F32, I32, I64 = torch.float32, torch.int32, torch.int64
WIDTHS = (576, 1024, 4096, 16384)  # of hidden states
# (heads, of keys and values, head_dim)
HEADS = (
    (32, 8, 128), (28, 4, 128), (48, 1, 128), (16, 16, 128), (32, 8, 64), (9, 3, 64), (32, 32, 80), (32, 32, 96),
    (8, 4, 256), (8, 1, 256), (16, 2, 512),
)  # fmt: skip
# (heads, N, P, V, R): of DeepSeek-V2-Lite and V3, of GLM-4.7-Flash, of MiniCPM3
LATENTS = ((16, 128, 64, 128, 512), (128, 128, 64, 128, 512), (20, 192, 64, 256, 512), (40, 64, 32, 64, 256))
# (rows, K, act, has a residual)
PRODUCTS = (
    (28672, 4096, "silu", False), (4096, 14336, None, True), (6144, 4096, None, False), (128256, 4096, None, False),
    (6144, 1024, "silu", False), (1024, 3072, None, True), (151936, 1024, None, False), (1536, 576, "gelu_tanh", False),
    (2560, 9728, None, True), (640, 640, None, False),
)  # fmt: skip
# (experts, top_k, rows of gate and up, hidden size, act)
EXPERTS = ((128, 8, 1536, 2048, "silu"), (8, 2, 28672, 4096, "silu"), (32, 4, 5760, 2880, "clamped_swiglu"))
NUM_EXPERT_TOKENS = (1, 32, 256, 1024, 8192)


def empty(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches(card: Card) -> Iterator[tuple[str, Launch]]:
    """Yield what an engine on `card` may launch, with a name."""
    dtypes = [torch.float16, torch.bfloat16] if card.capability >= OLDEST_BFLOAT16 else [torch.float16]
    caches = [torch.float8_e5m2, FP8] if card.capability >= OLDEST_E4M3 else [torch.float8_e5m2]
    for dtype in (dtypes[-1], F32):
        yield from attention_launches(dtype, [dtype, *caches] if dtype != F32 else [dtype])
        yield from single_token_launches(dtype, [dtype, *caches] if dtype != F32 else [dtype])
        yield from latent_launches(dtype, [dtype, *caches] if dtype != F32 else [dtype])
        yield from product_launches(dtype)
        yield from router_launches(dtype)
        yield from elementwise_launches(dtype, [dtype, *caches])
        yield from expert_launches(dtype)
        yield from routing_launches(dtype)
    for dtype in (*dtypes, F32):
        yield from sampling_launches(dtype)
        yield from all_reduce_launches(dtype)
    yield from quantized_launches(dtypes[-1], card)
    yield from bookkeeping_launches()
    for dtype in dtypes:
        angles = empty(4900, 80)
        yield f"rotate {dtype}", partial(rotate_triton, empty(4900, 48, 80, dtype=dtype)[:, :32], angles, angles)
    yield "resize", partial(pass_triton, empty(1, 900, 700, 3, dtype=torch.uint8), plan_of(900, 800, 0, 800, 3), 1)


# ---- attention ----


def batch_of(num_decodes: int, prompts: tuple[int, ...] = (), *, is_shared: bool = False, **more: Any) -> Any:
    """Return single tokens of `num_decodes` requests and prompts of so many tokens."""
    num_requests = num_decodes + len(prompts)
    shared = None
    if is_shared:
        shared = SimpleNamespace(
            prefix_lens=empty(4, dtype=I32), cu_members=empty(5, dtype=I32), members=empty(num_decodes, dtype=I32),
            own_starts=empty(num_decodes, dtype=I32),
        )  # fmt: skip
    q_lens = np.array([1] * num_decodes + list(prompts))
    fields: dict[str, Any] = {
        "rows": empty(num_requests, dtype=I32), "seq_lens": empty(num_requests, dtype=I32),
        "cu_q_lens": empty(num_requests + 1, dtype=I32), "slot_table": empty(256, 4096, dtype=I32), "slot_map": None,
        "seen_until": None, "num_decodes": num_decodes, "q_lens_host": q_lens, "seq_lens_host": q_lens,
        "shared": shared, "is_for_graph": False,
    }  # fmt: skip
    return SimpleNamespace(**fields | more)


def attention_launches(dtype: torch.dtype, caches: list[torch.dtype]) -> Iterator[tuple[str, Launch]]:
    few, some, *_ = DECODE_LIMITS
    plain = [("1", batch_of(1)), ("8", batch_of(some)), ("256, shared", batch_of(256, is_shared=True))]
    plain += [("prompt", batch_of(0, (2048,))), ("prompts", batch_of(few, (300,) * 20))]
    for heads in HEADS if dtype != F32 else HEADS[:1] + HEADS[-2:]:
        for cache in caches:
            for name, batch in plain:
                yield f"attention {heads} {dtype} {cache} {name}", attention_of(heads, dtype, cache, batch)
    slots, seen = empty(1 << 20, dtype=I32), empty(4096, dtype=I32)
    for heads in HEADS[:1] if dtype == F32 else (HEADS[0], HEADS[4], HEADS[8]):
        num_heads = heads[0]
        variants: dict[str, dict[str, Any]] = {
            "window": {"window": 128}, "chunks": {"window": 128, "is_chunked": True}, "softcap": {"softcap": 50.0},
            "sinks": {"sinks": empty(num_heads, dtype=dtype), "window": 128}, "slopes": {"slopes": empty(num_heads)},
        }  # fmt: skip
        batches = [batch_of(64, is_shared=True), batch_of(0, (2048,))]
        batches += [batch_of(64, slot_map=slots), batch_of(0, (2048,), slot_map=slots, seen_until=seen)]
        for name, options in variants.items():
            for batch in batches:
                yield f"attention {heads} {dtype} {name}", attention_of(heads, dtype, dtype, batch, **options)


def attention_of(
    heads: tuple[int, int, int], dtype: torch.dtype, cache: torch.dtype, batch: Any, **options: Any
) -> Launch:
    def launch() -> None:
        num_heads, num_kv_heads, head_dim = heads
        num_tokens = int(batch.q_lens_host.sum())
        qkv = empty(num_tokens, num_heads, head_dim, dtype=dtype)
        k, v = empty(2, 1 << 20, num_kv_heads, head_dim, dtype=cache)
        attention_triton(qkv, k, v, batch, scale=head_dim**-0.5, **options)

    return launch


def single_token_launches(dtype: torch.dtype, caches: list[torch.dtype]) -> Iterator[tuple[str, Launch]]:
    """Yield the attention of single tokens that rotates and stores their heads, of one request to many."""
    for num_heads, num_kv_heads, head_dim in HEADS[:1] if dtype == F32 else (HEADS[0], HEADS[4], HEADS[8]):
        norm = empty(head_dim, dtype=dtype)
        for cache, num_requests in itertools.product(caches, (1, DECODE_LIMITS[1], 300)):
            qkv = empty(num_requests, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
            k, v = empty(2, 1 << 20, num_kv_heads, head_dim, dtype=cache)
            for weight in (None, norm):
                rotation = HeadRotation(empty(num_requests, dtype=I32), empty(4096, head_dim), weight, weight, 1e-5)
                arguments = qkv, rotation, k, v, batch_of(num_requests), num_heads
                launch = partial(attention_of_products_triton, *arguments, scale=1.0)
                yield f"{num_requests} single tokens {head_dim} {cache}", launch


def latent_launches(dtype: torch.dtype, caches: list[torch.dtype]) -> Iterator[tuple[str, Launch]]:
    batches = [batch_of(1), batch_of(16), batch_of(256, is_shared=True), batch_of(0, (2048,))]
    batches += [batch_of(0, (256,), is_for_graph=True), batch_of(0, (256,) * 20, is_for_graph=True)]
    for shape in LATENTS if dtype != F32 else LATENTS[:2]:
        for cache in caches:
            for batch in batches:
                yield f"latent attention {shape} {dtype} {cache}", latent_attention_of(shape, dtype, cache, batch)
        num_heads, key_dim, _, value_dim, rank = shape
        if dtype != F32:
            keys, values = empty(num_heads, key_dim, rank, dtype=dtype), empty(num_heads, value_dim, rank, dtype=dtype)
            found, out = empty(FEW_TOKENS, num_heads, rank, dtype=dtype), empty(FEW_TOKENS, num_heads, 256, dtype=dtype)
            yield f"latent products {shape} {dtype}", partial(head_products, out[..., :key_dim], keys, found)
            yield (
                f"latent products {shape} {dtype}",
                partial(head_products, found, values.transpose(1, 2), out[..., :value_dim]),
            )


def latent_attention_of(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, cache: torch.dtype, batch: Any
) -> Launch:
    def launch() -> None:
        num_heads, key_dim, rope_dim, value_dim, rank = shape
        weight = empty(num_heads * (key_dim + value_dim), rank, dtype=dtype)
        expansion = Expansion(weight, num_heads, LatentSizes(key_dim, value_dim, rank))
        q = empty(int(batch.q_lens_host.sum()), num_heads, key_dim + rope_dim, dtype=dtype)
        latents = empty(1 << 20, 1, rank + rope_dim, dtype=cache)
        latent_attention_triton(q, latents, expansion, batch, scale=1.0)

    return launch


# ---- products ----


def product_launches(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    for num_rows, k, act, has_residual in PRODUCTS:
        for num_tokens in (1, 3, 8, 32):
            x, weight = empty(num_tokens, k, dtype=dtype), empty(num_rows, k, dtype=dtype)
            n = num_rows // 2 if act else num_rows
            options: dict[str, Any] = {"act": act, "residual": empty(num_tokens, n, dtype=dtype)}
            if not has_residual:
                options["residual"] = None
            name = f"{num_tokens} x {num_rows} x {k} {dtype}"
            if num_tokens == 1 or (num_tokens <= 3 and num_rows * k <= 8 << 20):
                norm = None if has_residual else empty(k, dtype=dtype)
                yield f"gemv {name}", partial(gemv, x, weight, **options | {"norm_weight": norm})
            elif num_tokens > 3 and dtype.itemsize == 2 and fits_skinny(k):
                yield f"skinny {name}", partial(skinny_gemm, x, weight, **options)


def router_launches(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    for num_experts, hidden in ((128, 2048), (32, 2880), (256, 7168)):
        for num_tokens in (1, 3):
            x, weight = empty(num_tokens, hidden, dtype=dtype), empty(num_experts, hidden, dtype=dtype)
            launch = partial(
                gemv, x, weight, norm_weight=empty(hidden, dtype=dtype), eps=1e-6, normed=torch.empty_like(x)
            )
            yield f"router of {num_tokens} x {num_experts} x {hidden} {dtype}", partial(launch, out_dtype=F32)


def expert_launches(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    for num_experts, top_k, rows, hidden, act in EXPERTS:
        kinds = codes_of(num_experts * rows, hidden) if dtype != F32 else {}
        for kind, codes in {"plain": Codes(empty(num_experts * rows, hidden, dtype=dtype), hidden), **kinds}.items():
            for num_tokens in NUM_EXPERT_TOKENS:
                x, ids = empty(num_tokens, hidden, dtype=dtype), empty(num_tokens, top_k, dtype=I64)
                name = f"experts {num_experts}, {num_tokens * top_k} pairs, {rows} x {hidden}, {kind} {dtype}"
                yield name, partial(products_of, x, ids, codes, num_experts, act)
        weights, products = empty(7, top_k), empty(7 * top_k, hidden, dtype=dtype)
        yield f"combine {num_experts} {dtype}", partial(combine_triton, products, weights, None)
    yield f"permute {dtype}", partial(permuted_triton, empty(4, 2880, dtype=dtype))


def products_of(x: torch.Tensor, ids: torch.Tensor, codes: Codes, num_experts: int, act: str) -> None:
    height = tile_height(ids.numel(), num_experts)
    by_expert = None if height is None else sort_pairs(ids, num_experts, height)
    expert_products_triton(x, ids, codes, num_experts, act, by_expert)
    if len(x) <= Unsorted().block_m:
        expert_products_triton(x, ids, codes, num_experts, act, Unsorted())


def codes_of(num_rows: int, k: int) -> dict[str, Codes]:
    """Return weights of each way to code them."""
    half, nibbles = torch.float16, empty(num_rows, k // 2, dtype=torch.uint8)
    group, block = empty(num_rows, cdiv(k, 32), dtype=half), empty(num_rows, cdiv(k, 128))
    return {
        "mxfp4": Codes(empty(num_rows, k // 8, dtype=torch.int32), k, "fp4", group, group_size=32),
        "nf4": Codes(nibbles, k, "int4", group, table=empty(16), group_size=32),
        "awq": Codes(nibbles, k, "int4", group, zero=empty(*group.shape, dtype=torch.uint8), group_size=32),
        "q4_k": Codes(nibbles, k, "int4", group, minimum=group, group_size=32),
        "gptq": Codes(nibbles, k, "int4", block, group_size=128, offset=8),
        "int8": Codes(empty(num_rows, k, dtype=torch.int8), k, "int8", empty(num_rows, 1), group_size=k),
        "fp8 blocks": Codes(empty(num_rows, k, dtype=torch.uint8), k, "fp8", block, group_size=128),
    }


def routing_launches(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    rules = [Routing(8, 2), Routing(32, 4), Routing(128, 8), Routing(384, 8, is_sigmoid=True)]
    rules += [Routing(256, 8, is_sigmoid=True, num_groups=8, topk_groups=4, group_score=2)]
    for rule in rules:
        correction = empty(rule.num_experts) if rule.is_sigmoid else None
        logits = empty(4, rule.num_experts, dtype=dtype)
        yield f"route {rule.num_experts} {dtype}", partial(route_triton, logits, rule, correction)


# ---- quantized weights ----


def quantized_launches(dtype: torch.dtype, card: Card) -> Iterator[tuple[str, Launch]]:
    for num_rows, k in ((4096, 4096), (28672, 4096), (4096, 14336)):
        tiles, chunks = num_rows // 16, k // 64
        words, small = empty(tiles, chunks, 128, dtype=I32), empty(tiles, chunks, 1024, dtype=torch.int8)
        parameters = empty(tiles, k // 32, 16, dtype=torch.float16)
        both = empty(tiles, k // 32, 32, dtype=torch.float16)
        scale, table, ids = empty(num_rows, 1), empty(16), empty(5, dtype=I64)
        ways: list[tuple[Any, ...]] = [
            (words, parameters, None, 32, "eight", None), (words, both, None, 32, "zero", None),
            (words, both, None, 32, "minimum", None), (words, parameters, None, 32, None, table),
            (words, None, scale, 0, "eight", None), (small, None, scale, 0, None, None),
            (small.view(FP8), None, scale, 0, None, None), (small, parameters, None, 32, None, None),
        ]  # fmt: skip
        for codes, of_groups, of_rows, group, offset, meanings in ways:
            how = {"group_size": group, "offset": offset, "table": meanings}
            panel = empty(512, k, dtype=dtype)
            name = f"{codes.dtype} {offset} {num_rows} x {k}"
            tensors = codes, of_groups, of_rows
            yield f"dequantize {name}", partial(triton_quantized.dequantize_tiles, *tensors, panel, 0, **how)
            yield f"look up {name}", partial(triton_quantized.look_up, ids, *tensors, dtype, **how)
        x, norm = empty(40, k, dtype=dtype), empty(k, dtype=dtype)
        roundings = [("int8", torch.int8, 0), ("fp8", torch.float16, 0)]
        if card.capability >= OLDEST_E4M3:
            roundings += [("fp8", FP8, 0), ("fp8", FP8, 128)]
        for to, kind, group in roundings:
            options: dict[str, Any] = {"to": to, "group": group, "norm_weight": norm}
            yield f"round {to} {kind}", partial(triton_quantized.round_inputs, x, kind, **options)
            yield f"round {to} {group}", partial(triton_quantized.rounded_values, x, to=to, group=group)
        oldest = {torch.int8: OLDEST_INT8, FP8: OLDEST_E4M3}
        for code in (code for code in oldest if card.capability >= oldest[code]):
            for num_groups in (1, k // 128) if code == FP8 else (1,):
                for num_tokens in (40, 200, 2000):
                    arguments = (
                        empty(num_tokens, k, dtype=code), empty(num_tokens, num_groups),
                        empty(num_rows, k, dtype=code), empty(num_groups, num_rows), dtype,
                    )  # fmt: skip
                    yield f"8-bit product {num_tokens} {name}", partial(gemm_8bit, *arguments)


# ---- kernels in CUDA C++ ----


def cuda_sources(card: Card) -> Iterator[tuple[str, str, str, int]]:
    """Yield a name, the source, the architecture to compile for, and the shared memory of a block."""
    half, wide = torch.float16, torch.bfloat16
    yield from quantized_sources(card)
    for tiling in fp4_experts.TILINGS.values() if card.is_hopper else ():
        yield f"fp4_experts {tiling}", tiling.source("clamped_swiglu"), ARCHITECTURE, tiling.shared_bytes
    prompts = [hopper_prefill.Variant(head_dim, wide) for head_dim in hopper_prefill.KEYS]
    prompts += [hopper_prefill.Variant(head_dim, half, 1, True, F32) for head_dim in hopper_prefill.KEYS]
    prompts += [hopper_prefill.Variant(head_dim, wide, has_shared=True) for head_dim in hopper_prefill.SHARED_SIZES]
    for variant in prompts if card.is_hopper else ():
        yield f"hopper_prefill {variant}", hopper_prefill.source(variant), ARCHITECTURE, variant.shared_bytes
    latents = [hopper_latents.Variant(group, wide, False, False) for group in (16, 20, hopper_latents.MAX_GROUP)]
    latents += [hopper_latents.Variant(20, half, True, is_merged_later) for is_merged_later in (False, True)]
    for few in latents if card.is_hopper else ():
        yield f"hopper_latents {few}", hopper_latents.source(few), ARCHITECTURE, few.shared_bytes
    for num_heads, num_kv_heads, head_dim in HEADS if card.is_hopper else ():
        group = num_heads // num_kv_heads
        if head_dim in one_token.HEAD_DIMS and group <= one_token.MAX_GROUP:
            plain = one_token.Variant(head_dim, group, head_dim // 2, wide)
            for form in (plain, plain._replace(window=1, has_softcap=True, has_map=True, sink_dtype=wide)):
                yield f"one_token {form}", one_token.source(form), ARCHITECTURE, form.shared_bytes
                if head_dim <= long_token.MAX_HEAD_DIM:
                    yield f"long_token {form}", long_token.source(form), ARCHITECTURE, long_token.shared_bytes(form)
    yield from few_sources(card) if card.is_hopper else ()
    for columns in gated_gemm.TILE_COLUMNS if card.is_hopper else ():
        tile = gated_gemm.Tile(columns, shares_weights=True)
        yield f"gated_gemm {tile}", gated_gemm.source(wide, "silu", tile), ARCHITECTURE, tile.shared_bytes


def quantized_sources(card: Card) -> Iterator[tuple[str, str, str, int]]:
    half, wide, device = torch.float16, torch.bfloat16, torch.device("meta")
    kinds = {
        "awq": Kind(Format("int4", 128, has_zero=True, scale_dtype=half), wide, True, 128, half),
        "mxfp4": Kind(Format("int4", 32, table="fp4", scale_dtype=wide), wide, True, 32, wide),
        "q6_k": Kind(Format("int8", 16, scale_dtype=half), wide, True, 16, half),
        "fp8": Kind(Format("fp8", inputs="fp8"), wide, False, 0, F32),
        "fp8 blocks": Kind(Format("fp8", 128, inputs="fp8", input_group=128), wide, False, 128, F32),
        "int8 of float16": Kind(Format("int8", inputs="int8"), half, False, 0, F32),
    }
    k, num_rows = 4096, 6144
    for name, kind in kinds.items() if card.capability >= quantized_few.OLDEST else ():
        for token_tiles in quantized_few.TOKEN_TILES:
            config = quantized_few.few_config(kind, num_rows, k, token_tiles, False, device)
            if config is not None:
                room = quantized_few.shared_bytes_of(config, kind, max(1, 8 * token_tiles), k)
                text = quantized_few.source(kind, token_tiles, config)
                yield f"quantized_few {name} {config}", text, card.architecture, room
        yield from chain_sources(name, (kind,), k, card)
        for most_tokens in quantized_many.MOST_TOKENS if card.is_hopper else ():
            many = quantized_many.default_config(num_rows, k, kind.bits, most_tokens, 0)
            many = quantized_many.fitting(many, kind, k)
            text = quantized_many.source(kind, many)
            room = quantized_many.shared_bytes(kind, many)
            yield f"quantized_many {name} {many}", text, ARCHITECTURE, room
        yield from some_sources(name, kind, num_rows, k) if card.is_hopper and kind.is_tiled else ()
        if kind.is_tiled:
            yield f"quantized_rows {name}", quantized_rows.source(kind), card.architecture, quantized_rows.SHARED_BYTES
    yield from chain_sources("awq and q6_k", (kinds["awq"], kinds["q6_k"]), k, card)


def some_sources(name: str, kind: Kind, num_rows: int, k: int) -> Iterator[tuple[str, str, str, int]]:
    for most_tokens in quantized_some.MOST_TOKENS:
        for is_gated in (0, 1):
            config = quantized_some.default_config((1 + 3 * is_gated) * num_rows, k, kind.bits, most_tokens, is_gated)
            config = quantized_some.fitting(config, kind, most_tokens)
            text = quantized_some.source(kind, config, most_tokens, quantized_some.pieces_of(kind, k, config))
            room = quantized_some.shared_bytes(kind, config, most_tokens)
            yield f"quantized_some {name} {most_tokens} tokens {config}", text, ARCHITECTURE, room


def few_sources(card: Card) -> Iterator[tuple[str, str, str, int]]:
    for tokens, tiles in (*((tokens, 1) for tokens in few_gemm.TOKENS), (few_gemm.TOKENS[-1], 2)):
        for num_rows, k, act, _ in PRODUCTS:
            if act is not None and tokens * tiles > few_gemm.MOST_GATED_TOKENS:
                continue
            n = num_rows // 2 if act else num_rows
            few = few_gemm.few_config(n, k, tokens, act is not None, card.num_sms, tiles)
            text = few_gemm.source(torch.bfloat16, act, tokens, few)
            yield f"few_gemm {tokens} {few}", text, ARCHITECTURE, few_gemm.shared_bytes(tokens, few, act is not None)


def chain_sources(name: str, kinds: tuple[Kind, ...], k: int, card: Card) -> Iterator[tuple[str, str, str, int]]:
    can_chain = card.is_hopper and all(map(quantized_chain.is_chained, kinds))
    config = quantized_chain.chain_config(kinds, k, torch.device("meta")) if can_chain else None
    if config is not None:
        text, room = quantized_chain.source(kinds, config, 4), quantized_chain.shared_bytes(kinds, config, k)
        yield f"quantized_chain {name} {config}", text, ARCHITECTURE, room


# ---- the rest ----


def elementwise_launches(dtype: torch.dtype, caches: list[torch.dtype]) -> Iterator[tuple[str, Launch]]:
    module = triton_elementwise
    for n in WIDTHS:
        x, weight = empty(4, n, dtype=dtype), empty(n, dtype=dtype)
        yield f"rows of ids {n}", partial(module.embed_triton, empty(4, dtype=torch.int32), x)
        yield f"rms norm {n}", partial(module.rms_norm_triton, x, weight, 1e-5)
        yield f"layer norm {n}", partial(module.layer_norm_triton, x, weight, weight, 1e-5)
    for act in ("silu", "relu", "relu2", "gelu_tanh", "gelu"):
        yield act, partial(module.activate_triton, x, act)
        yield f"gated {act}", partial(module.act_and_mul_triton, x, act)
    yield "clamped", partial(module.act_and_mul_triton, x, "clamped_swiglu")
    yield "xielu", partial(module.xielu_triton, x, empty(4))
    yield "softcap", partial(module.softcap_triton_, x, 30.0)
    of_heads = empty(4, 64 * 128, dtype=dtype), empty(64, 128, dtype=dtype)
    yield "head norms", partial(module.layer_norm_heads_triton_, *of_heads, 1e-5)
    positions = empty(4, dtype=I32)
    for num_heads, num_kv_heads, head_dim in ((32, 8, 128), (32, 32, 80), (16, 2, 512)):
        qkv, norm = empty(4, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype), empty(head_dim, dtype=dtype)
        for cache in caches:
            slots = empty(1024, num_kv_heads, head_dim, dtype=cache)
            for rotary_dim, norms in ((head_dim, ()), (head_dim, (norm, norm)), (head_dim // 2, (norm, norm))):
                places = positions, empty(4096, rotary_dim), slots, slots, positions
                sizes = num_heads, num_kv_heads, head_dim
                yield f"rope {sizes} {cache}", partial(module.rope_and_store_triton, qkv, *places, *sizes, *norms)
    for num_heads, key_dim, rope_dim, _, rank in LATENTS:
        q, kv = empty(4, num_heads, key_dim + rope_dim, dtype=dtype), empty(4, rank + rope_dim, dtype=dtype)
        angles, norm = empty(4096, rope_dim), empty(rank, dtype=dtype)
        for cache in caches:
            slots = empty(1024, 1, rank + rope_dim, dtype=cache)
            arguments = q, kv, positions, angles, slots, positions, norm, 1e-5
            yield f"latent rope {rank} {cache}", partial(module.rope_and_store_latent_triton, *arguments)


def sampling_launches(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    module = triton_sampling
    for num_rows, vocab_size in ((1, 32000), (64, 151936), (256, 262144)):
        logits, floats = empty(num_rows, vocab_size, dtype=dtype), empty(num_rows)
        whole, long = empty(num_rows, dtype=I32), empty(num_rows, dtype=I64)
        name = f"{num_rows} x {vocab_size} {dtype}"
        counts, mask = empty(512, vocab_size, dtype=torch.int16), empty(num_rows, cdiv(vocab_size, 32), dtype=I32)
        yield f"argmax {name}", partial(module.argmax_triton, logits)
        rules = floats, whole, floats, floats, long, whole, whole
        yield f"sample {name}", partial(module.sample_triton, logits, *rules)
        yield f"log-sum-exp {name}", partial(module.logsumexp_triton, logits)
        yield f"likeliest {name}", partial(likeliest_triton, logits, 20)
        yield f"penalties {name}", partial(module.apply_penalties_triton, logits, whole, counts, floats, floats, floats)
        yield f"mask {name}", partial(module.apply_token_bitmask_triton, logits, mask, whole)


def all_reduce_launches(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    for size in (2, 4, 8):
        memory = PeerMemory(1, size, 1 << 20, empty(size, dtype=I64), empty(512, dtype=I32))
        yield f"sum of {size} {dtype}", partial(all_reduce_triton, empty(8, 4096, dtype=dtype), memory)


def bookkeeping_launches() -> Iterator[tuple[str, Launch]]:
    module = triton_bookkeeping
    of_tokens, table = empty(300, dtype=I32), empty(256, 4096, dtype=I32)
    tokens = of_tokens, of_tokens, of_tokens, of_tokens, of_tokens
    yield "copy", partial(module.copy_triton, of_tokens, empty(300, dtype=I32))
    for window in (None, of_tokens):
        yield "begin", partial(module.begin_step_triton, *tokens, table, window, window)
    for counts in (None, empty(512, 32000, dtype=torch.int16)):
        yield "end", partial(module.end_step_triton, of_tokens, of_tokens, of_tokens, counts)
