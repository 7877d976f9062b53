"""The Triton kernels whose configurations `tune` finds: their candidates, and inputs to time them with."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kernels.card import card_of
from kernels.dense import DenseWeight
from kernels.experts import ExpertShape, code_of, codes_of
from kernels.latents import Expansion, LatentSizes
from kernels.launch import cdiv, next_power_of_2
from kernels.quantized import QuantizedWeight
from kernels.triton_decode import DECODE_BYTES_CONFIGS, DECODE_CONFIGS, DECODE_LIMITS, PREFIX_CONFIGS, decode
from kernels.triton_experts import (
    TILE_CODES,
    TILE_CONFIGS,
    Sorted,
    TileConfig,
    expert_products_triton,
    kernel_code,
    sort_pairs,
)
from kernels.triton_gemm import GEMV_CONFIGS, GemvConfig, gemv
from kernels.triton_mla import LATENT_DECODE_LIMITS, config_keys, latent_attention_triton, latent_configs
from kernels.triton_prefill import PREFILL_CONFIGS, prefill
from kernels.triton_skinny import SKINNY_CONFIGS, SkinnyConfig, fits_skinny, skinny_gemm
from kernels.triton_softmax import DecodeConfig, PrefillConfig
from kernels.tuning import AttentionShape, LatentShape, Task, WeightShape
from kernels.weights import Part, Weight

ROTATION_BYTES = 128 << 20  # that launches read before one reads the same again: more than an L2 cache holds
MAX_COPIES = 64  # of a weight or a layer of the cache; of small ones some stay in the L2 cache
MIN_LAUNCHES = 4  # a graph

# (block_n, warps, prefetch); block_k is 256 * warps
GEMV_CANDIDATES = {
    "few rows": [(1, 4, 2), (2, 2, 4), (1, 2, 6), (2, 1, 4)],
    "many rows": [(4, 4, 4), (2, 4, 4), (2, 8, 2), (8, 4, 1), (4, 1, 4)],
}
MAX_GEMV_PIECES = 16  # of K: the kernel's loop over them is unrolled
MANY_ROWS = 4096
SKINNY_CANDIDATES = [(16, 128, 4, 4), (16, 128, 2, 4), (8, 128, 2, 4), (32, 128, 2, 3), (16, 64, 2, 6)]
SKINNY_TOKENS = {16: 8, 32: 28}  # most tokens -> tokens timed
DECODE_CANDIDATES = {
    4: [DecodeConfig(64, 4, 3, 1, True), DecodeConfig(32, 4, 4, 1, True), DecodeConfig(64, 4, 3, 2)],
    16: [DecodeConfig(32, 1, 4, 2), DecodeConfig(32, 2, 4, 3), DecodeConfig(64, 4, 3, 2)],
    64: [DecodeConfig(32, 1, 4, 4), DecodeConfig(32, 2, 4, 4), DecodeConfig(64, 4, 2, 4)],
    1 << 20: [DecodeConfig(32, 1, 2, 8), DecodeConfig(32, 1, 4, 4), DecodeConfig(64, 4, 2, 4)],
}
# As candidates too, where heads have up to 64 values, and where a cache has 8 bits: more tokens have room.
NARROW_HEAD = 64
DECODE_NARROW_CANDIDATES = {
    4: [], 16: [], 64: [DecodeConfig(64, 1, 4, 4)], 1 << 20: [DecodeConfig(64, 1, 4, 4), DecodeConfig(64, 1, 2, 8)]
}  # fmt: skip
DECODE_BYTES_CANDIDATES = {
    4: [], 16: [DecodeConfig(32, 1, 4, 4)], 64: [DecodeConfig(32, 1, 3, 8)], 1 << 20: [DecodeConfig(32, 1, 3, 8)]
}  # fmt: skip
# Most requests -> requests and tokens of each, timed.
DECODE_LENS = {4: (1, 4096), 16: (8, 1024), 64: (64, 1024), 1 << 20: (256, 256)}
PREFILL_CANDIDATES = [PrefillConfig(64, 64, 4, 3), PrefillConfig(128, 64, 8, 2), PrefillConfig(64, 32, 4, 3)]
PROMPT_LEN = 2048
# By the fields of `LatentConfigs`.
LATENT_CANDIDATES: dict[str, list[Any]] = {
    "decode": [DecodeConfig(32, 8, 3, 1), DecodeConfig(64, 8, 2, 1), DecodeConfig(32, 4, 2, 3)],
    "absorbed": [PrefillConfig(64, 32, 8, 2), PrefillConfig(64, 64, 8, 2), PrefillConfig(64, 16, 8, 3)],
    "expanded": [PrefillConfig(128, 64, 8, 2), PrefillConfig(128, 64, 8, 3), PrefillConfig(64, 64, 4, 3)],
}
ABSORBED_LEN = 256  # tokens of a prompt that goes the absorbed way
PREFIX_REQUESTS, PREFIX_LEN, OWN_LEN = 32, 2048, 64
TILE_CANDIDATES = {  # pairs of a tile -> configurations
    16: [TileConfig(64, 128, 4, 4), TileConfig(64, 128, 2, 4), TileConfig(32, 128, 4, 5), TileConfig(128, 64, 8, 4)],
    32: [TileConfig(64, 128, 4, 3), TileConfig(64, 64, 4, 5), TileConfig(128, 64, 8, 4)],
    64: [TileConfig(128, 64, 4, 4), TileConfig(128, 64, 8, 4), TileConfig(64, 64, 4, 4)],
    128: [TileConfig(128, 64, 8, 3), TileConfig(128, 64, 8, 4), TileConfig(64, 64, 8, 4)],
}
DOWN_TILES = {32: [TileConfig(128, 128, 4, 2)]}  # as candidates too, of plain numbers and without an activation
TILE_PAIRS = {16: 2, 32: 16, 64: 48, 128: 128}  # pairs of a tile -> those of an expert, timed


def tasks_of(
    weights: Sequence[WeightShape],
    attention: Sequence[AttentionShape | LatentShape],
    dtype: torch.dtype,
    device: torch.device,
    experts: Sequence[ExpertShape] = (),
) -> list[Task]:
    """Return what can be tuned for a model, each shape once, in the order of what single requests gain."""
    dense = [shape for shape in dict.fromkeys(weights) if shape.kind is None]
    largest_first = sorted(dense, key=lambda shape: -shape.num_rows * shape.k)
    heads = [shape for shape in dict.fromkeys(attention) if isinstance(shape, AttentionShape)]
    latents = [shape for shape in dict.fromkeys(attention) if isinstance(shape, LatentShape)]
    tasks = [gemv_task(shape, dtype, device) for shape in largest_first]
    tasks += [decode_task(shape, limit, dtype, device) for shape in heads for limit in DECODE_LIMITS]
    tasks += [latent_task("decode", shape, limit, dtype, device) for shape in latents for limit in LATENT_DECODE_LIMITS]
    tasks += [prefill_task(shape, dtype, device) for shape in heads]
    tasks += [latent_task(form, shape, 1, dtype, device) for form in ("expanded", "absorbed") for shape in latents]
    tasks += [
        skinny_task(shape, max_tokens, dtype, device)
        for max_tokens in SKINNY_TOKENS
        for shape in largest_first
        if shape.max_tokens > 1 and fits_skinny(shape.k)
    ]
    tasks += [expert_task(shape, height, dtype, device) for height in TILE_CANDIDATES for shape in experts]
    tasks += [prefix_task(shape, dtype, device) for shape in heads]
    return list({(task.configs.kind, task.key): task for task in reversed(tasks)}.values())[::-1]


# ---- products ----


def gemv_task(shape: WeightShape, dtype: torch.dtype, device: torch.device) -> Task:
    """Return the task of one token's product with a weight."""

    def prepare() -> list[Callable[[GemvConfig], object]]:
        x, residual, weights = _product_inputs(shape, 1, dtype, device)
        options: dict[str, Any] = {"act": shape.act, "residual": residual}
        if shape.has_norm:
            options |= {"norm_weight": torch.ones(shape.k, dtype=dtype, device=device), "eps": 1e-5}
        return [functools.partial(_multiply, gemv, x, weight, options) for weight in weights]

    return Task(GEMV_CONFIGS, (shape.num_rows, shape.k), gemv_candidates(shape.num_rows, shape.k), prepare)


def gemv_candidates(num_rows: int, k: int) -> list[GemvConfig]:
    """Return configurations that cut K into a few pieces, with larger blocks for many rows."""
    candidates = GEMV_CANDIDATES["many rows" if num_rows >= MANY_ROWS else "few rows"]
    configs = [GemvConfig(n, 256 * warps, warps, prefetch) for n, warps, prefetch in candidates]
    return [config for config in configs if config.block_k <= k <= MAX_GEMV_PIECES * config.block_k]


def skinny_task(shape: WeightShape, max_tokens: int, dtype: torch.dtype, device: torch.device) -> Task:
    """Return the task of a few tokens' product with a weight; max_tokens: 16 or 32."""

    def prepare() -> list[Callable[[SkinnyConfig], object]]:
        x, residual, weights = _product_inputs(shape, SKINNY_TOKENS[max_tokens], dtype, device)
        options: dict[str, Any] = {"act": shape.act, "residual": residual}
        return [functools.partial(_multiply, skinny_gemm, x, weight, options) for weight in weights]

    key = (shape.num_rows, shape.k, max_tokens)
    return Task(SKINNY_CONFIGS, key, skinny_candidates(shape, max_tokens, card_of(device).shared_bytes), prepare)


def skinny_candidates(shape: WeightShape, max_tokens: int, shared_bytes: int) -> list[SkinnyConfig]:
    """Return configurations that divide K and whose stages fit into a multiprocessor's shared memory."""
    configs = [SkinnyConfig(*candidate) for candidate in SKINNY_CANDIDATES]
    num_tiles = 2 if shape.act else 1

    def stage_bytes(config: SkinnyConfig) -> int:
        return 2 * config.num_warps * config.block_k * (max_tokens + num_tiles * config.block_n)

    return [
        config
        for config in configs
        if shape.k % (config.block_k * config.num_warps) == 0
        and config.num_stages * stage_bytes(config) <= shared_bytes
    ]


def _multiply(
    run: Callable[..., object], x: torch.Tensor, weight: torch.Tensor, options: dict[str, Any], config: Any
) -> None:
    run(x, weight, config=config, **options)


def _product_inputs(
    shape: WeightShape, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
    """Return x [T, K], the residual [T, N] if there is one, and a weight for each launch."""
    x = torch.randn(num_tokens, shape.k, device=device).to(dtype)
    num_columns = shape.num_rows // 2 if shape.act else shape.num_rows
    residual = torch.zeros(num_tokens, num_columns, dtype=dtype, device=device) if shape.has_residual else None
    copies = num_copies(shape.num_rows * shape.k * dtype.itemsize)
    weights = torch.empty(copies, shape.num_rows, shape.k, dtype=dtype, device=device)
    weights.normal_(0, shape.k**-0.5)
    return x, residual, list(weights) * cdiv(MIN_LAUNCHES, copies)


def num_copies(num_bytes: int) -> int:
    """Return how many weights of so many bytes the L2 cache does not hold together."""
    return min(MAX_COPIES, cdiv(ROTATION_BYTES, num_bytes))


def expert_task(shape: ExpertShape, block_m: int, dtype: torch.dtype, device: torch.device) -> Task:
    """Return the task of products of pairs sorted by expert, in tiles of `block_m`."""

    def prepare() -> list[Callable[[TileConfig], object]]:
        parts = [Part(shape.num_experts * shape.num_rows)]
        stack: Weight = DenseWeight(parts, shape.k, dtype)
        if shape.form is not None:
            stack = QuantizedWeight(parts, shape.k, dtype, shape.form)
        stack.materialize(device)
        stack.fill_random(torch.Generator(device).manual_seed(0))
        codes, num_pairs = codes_of(stack), TILE_PAIRS[block_m] * shape.num_experts
        x = torch.randn(num_pairs, shape.k, device=device).to(dtype)

        def launch(ids: torch.Tensor, by_expert: Sorted, config: TileConfig) -> None:
            expert_products_triton(x, ids, codes, shape.num_experts, shape.act, by_expert, config=config)

        launches: list[Callable[[TileConfig], object]] = []
        for _ in range(MIN_LAUNCHES):
            ids = torch.randint(shape.num_experts, (num_pairs, 1), device=device)
            launches.append(functools.partial(launch, ids, sort_pairs(ids, shape.num_experts, block_m)))
        return launches

    code = kernel_code(None if shape.form is None else code_of(shape.form, shape.k), device)
    key = (shape.num_rows, shape.k, TILE_CODES.index(code), block_m)
    is_plain_down = shape.form is None and shape.act is None
    candidates = TILE_CANDIDATES[block_m] + (DOWN_TILES.get(block_m, []) if is_plain_down else [])
    return Task(TILE_CONFIGS, key, candidates, prepare)


# ---- attention ----


@dataclass
class _Shared:
    """Stands in for a step's `SharedPrefixes`."""

    prefix_lens: torch.Tensor
    cu_members: torch.Tensor
    members: torch.Tensor
    own_starts: torch.Tensor


@dataclass
class _Batch:
    """Stands in for a step's `AttentionBatch`, of requests that are all alike."""

    rows: torch.Tensor
    seq_lens: torch.Tensor
    cu_q_lens: torch.Tensor
    slot_table: torch.Tensor
    num_decodes: int
    q_lens_host: np.ndarray
    seq_lens_host: np.ndarray
    slot_map: torch.Tensor | None = None
    seen_until: torch.Tensor | None = None
    shared: _Shared | None = None
    is_for_graph: bool = False


def _batch(num_requests: int, q_len: int, seq_len: int, device: torch.device) -> _Batch:
    """Return requests of `seq_len` tokens, the last `q_len` of them new, in slots at random."""
    index = torch.arange(num_requests + 1, dtype=torch.int32, device=device)
    slots = torch.randperm(num_requests * seq_len, device=device).to(torch.int32)
    return _Batch(
        rows=index[:-1],
        seq_lens=torch.full((num_requests,), seq_len, dtype=torch.int32, device=device),
        cu_q_lens=index * q_len,
        slot_table=slots.view(num_requests, seq_len),
        num_decodes=num_requests if q_len == 1 else 0,
        q_lens_host=np.full(num_requests, q_len),
        seq_lens_host=np.full(num_requests, seq_len),
    )


def _attention_launches(
    run: Callable[..., object], shape: AttentionShape, batch: _Batch, dtype: torch.dtype, config_name: str = "config"
) -> list[Callable[[Any], object]]:
    """Return launches of `run` for the batch, over as many layers of a cache as the L2 cache does not hold."""
    device, num_slots = batch.rows.device, batch.slot_table.numel()
    q = torch.randn(int(batch.q_lens_host.sum()), shape.num_heads, shape.head_dim, device=device).to(dtype)
    out, scale = torch.empty_like(q), shape.head_dim**-0.5
    layer_shape = (2, num_slots, shape.num_kv_heads, shape.head_dim)
    num_layers = num_copies(math.prod(layer_shape) * shape.kv_dtype.itemsize)
    cache = torch.empty(num_layers, *layer_shape, dtype=dtype, device=device).normal_().to(shape.kv_dtype)

    def launch(layer: torch.Tensor, config: Any) -> None:
        run(q, layer[0], layer[1], batch, out, scale=scale, **{config_name: config})

    launches: list[Callable[[Any], object]] = [functools.partial(launch, layer) for layer in cache]
    return launches * cdiv(MIN_LAUNCHES, num_layers)


def decode_task(shape: AttentionShape, limit: int, dtype: torch.dtype, device: torch.device) -> Task:
    """Return the task of single tokens' attention, of at most `limit` requests."""

    def prepare() -> list[Callable[[DecodeConfig], object]]:
        num_requests, seq_len = DECODE_LENS[limit]
        return _attention_launches(decode, shape, _batch(num_requests, 1, seq_len, device), dtype)

    configs, candidates = DECODE_CONFIGS, DECODE_CANDIDATES[limit]
    if shape.head_dim <= NARROW_HEAD:
        candidates = candidates + DECODE_NARROW_CANDIDATES[limit]
    if shape.kv_dtype.itemsize == 1:
        configs, candidates = DECODE_BYTES_CONFIGS, DECODE_BYTES_CANDIDATES[limit] + candidates
    return Task(configs, (next_power_of_2(shape.head_dim), limit), candidates, prepare)


def prefill_task(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Task:
    """Return the task of a prompt's attention."""

    def prepare() -> list[Callable[[PrefillConfig], object]]:
        return _attention_launches(prefill, shape, _batch(1, PROMPT_LEN, PROMPT_LEN, device), dtype)

    return Task(PREFILL_CONFIGS, (next_power_of_2(shape.head_dim),), PREFILL_CANDIDATES, prepare)


def prefix_task(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Task:
    """Return the task of attention to a prefix that single tokens' requests share."""

    def prepare() -> list[Callable[[PrefillConfig], object]]:
        batch = _batch(PREFIX_REQUESTS, 1, PREFIX_LEN + OWN_LEN, device)
        batch.slot_table[:, :PREFIX_LEN] = batch.slot_table[0, :PREFIX_LEN].clone()
        batch.shared = _Shared(
            prefix_lens=torch.tensor([PREFIX_LEN], dtype=torch.int32, device=device),
            cu_members=torch.tensor([0, PREFIX_REQUESTS], dtype=torch.int32, device=device),
            members=torch.arange(PREFIX_REQUESTS, dtype=torch.int32, device=device),
            own_starts=torch.full((PREFIX_REQUESTS,), PREFIX_LEN, dtype=torch.int32, device=device),
        )
        return _attention_launches(decode, shape, batch, dtype, "prefix_config")

    return Task(PREFIX_CONFIGS, (next_power_of_2(shape.head_dim),), PREFILL_CANDIDATES, prepare)


def latent_task(form: str, shape: LatentShape, limit: int, dtype: torch.dtype, device: torch.device) -> Task:
    """Return the task of latent attention's kernels. form: a field of `LatentConfigs`. limit: of single tokens."""
    sizes = LatentSizes(shape.key_dim, shape.value_dim, shape.rank)
    configs, key = getattr(config_keys(shape.num_heads, sizes, limit, device), form)

    def prepare() -> list[Callable[[Any], object]]:
        num_requests, seq_len = DECODE_LENS[limit] if form == "decode" else (1, PROMPT_LEN)
        q_len = {"decode": 1, "absorbed": min(ABSORBED_LEN, seq_len), "expanded": seq_len}[form]
        batch = _batch(num_requests, q_len, seq_len, device)
        batch.is_for_graph = form == "absorbed"  # expanded where that is less work
        expansion = Expansion(
            torch.randn(shape.num_heads * (shape.key_dim + shape.value_dim), shape.rank, device=device).to(dtype),
            shape.num_heads,
            sizes,
        )
        q = torch.randn(num_requests * q_len, shape.num_heads, shape.key_dim + shape.rope_dim, device=device).to(dtype)
        num_values = num_requests * seq_len * (shape.rank + shape.rope_dim)
        num_layers = num_copies(num_values * shape.kv_dtype.itemsize)
        cache = torch.empty(num_layers, num_values, dtype=dtype, device=device).normal_().to(shape.kv_dtype)
        default = latent_configs(q, sizes, batch.num_decodes)

        def launch(layer: torch.Tensor, config: Any) -> None:
            own = default._replace(**{form: config})
            latents = layer.view(num_requests * seq_len, 1, -1)
            latent_attention_triton(q, latents, expansion, batch, scale=q.shape[2] ** -0.5, configs=own)

        launches: list[Callable[[Any], object]] = [functools.partial(launch, layer) for layer in cache]
        return launches * cdiv(MIN_LAUNCHES, num_layers)

    return Task(configs, key, LATENT_CANDIDATES[form], prepare)
