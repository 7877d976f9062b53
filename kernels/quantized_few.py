"""Products of a weight of few bits and 1 to 64 tokens on tensor cores; `quantized_few.cu` says how.

A kernel is compiled for each kind of weight and number of tokens: all of a kind at its first product, at once.
"""

import functools
from typing import NamedTuple

import torch

from kernels.card import HOPPER, card_of
from kernels.launch import address, cdiv, next_power_of_2, num_sms, only_compiles
from kernels.nvrtc import compile_source, compile_sources, has_nvrtc
from kernels.quantized_kernel import (
    ACTS,
    Args,
    Kernel,
    Kind,
    integers_of,
    source_of,
)
from kernels.quantized_layout import CHUNK
from kernels.tuning import Configs

MAX_TOKENS = 64
TOKEN_TILES = (0, 1, 2, 4, 8)  # of 8 tokens; 0: one token, whose norm and rounding are fused
MAX_SPLIT = 8  # blocks of a cluster
MOST_WARPS = 16  # of a block
LONG_ROW = 9216  # inputs, more than a model's hidden size mostly is
HELD_SCALES, HELD_RESIDUALS = 1024, 256  # rows' scales and residuals that a block of one token holds, at most
OLDEST = (8, 0)  # compute capability


class FewConfig(NamedTuple):
    """Say how a weight is cut: see `quantized_few.cu`.

    stages: pieces of 64 columns under way to each warp, and one. blocks: of one token, on a multiprocessor at most, so
    that the next kernel's find room beside them; 0: as many as have 16 warps.
    """

    tiles: int
    warps_n: int
    warps_k: int
    split: int
    stages: int
    blocks: int = 0


def default_config(num_rows: int, k: int, bits: int, token_tiles: int, _is_gated: int) -> FewConfig:
    """Return the configuration of shapes that no table has, for a card like the H100."""
    num_chunks = k // CHUNK
    if token_tiles == 0:
        # Of 4 bits, blocks are so small that the next kernel's fit beside them, down's too.
        is_small = bits == 4 and k < LONG_ROW
        most_warps = MOST_WARPS // 2 if is_small else MOST_WARPS
        warps_k = min(most_warps, next_power_of_2(num_chunks + 1) // 2)
        return FewConfig(2, 1, warps_k, 1, 4 if bits == 4 and not is_small else 3)
    tiles, warps_n = 2, 2 if token_tiles == 1 else 8
    warps_k = min(4 if token_tiles == 1 else 1, num_chunks)
    num_blocks, enough = cdiv(num_rows, 16 * tiles * warps_n), 128 if token_tiles == 1 else 264
    split = 1
    while (
        split < MAX_SPLIT
        and 2 * split * warps_k <= num_chunks
        and (num_blocks * split < enough or 8 * token_tiles * (k // split) > 32768)
    ):
        split *= 2
    return FewConfig(tiles, warps_n, warps_k, split, 4)


FEW_CONFIGS = Configs("quantized", FewConfig, default_config)  # by (rows, K, bits, tiles of tokens, is gated)


def can_multiply_few(device: torch.device) -> bool:
    """Return whether the kernels run on `device`: a GPU from Ampere on, where NVRTC is installed."""
    return device.type == "cuda" and card_of(device).capability >= OLDEST and has_nvrtc()


def token_tiles_of(num_tokens: int) -> int:
    """Return the member of `TOKEN_TILES` for a number of tokens."""
    return 0 if num_tokens == 1 else next_power_of_2(cdiv(num_tokens, 8))


def multiply_few(
    kind: Kind,
    x: torch.Tensor,
    codes: torch.Tensor,
    parameters: torch.Tensor | None,
    scale: torch.Tensor | None,
    num_rows: int,
    *,
    x_scale: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    act: str | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    config: FewConfig | None = None,
) -> torch.Tensor:
    """Return residual + act(norm(x) W^T + bias), [T, num_rows or half of them], for x [T, K].

    codes, parameters, scale: as `kernels.quantized_layout` lays them. x: of one token as it is, with `norm_weight` [K]
    to be normed by, and its known scale in x_scale; of more tokens with `inputs` rounded to numbers of
    `kind.input_dtype`, and their scales. residual: overwritten by the result, which is then returned.
    """
    num_tokens, k = x.shape
    n = num_rows // 2 if act else num_rows
    if residual is not None:
        out = residual
    elif out is None:
        out = torch.empty(num_tokens, n, dtype=out_dtype or kind.dtype, device=x.device)
    token_tiles = token_tiles_of(num_tokens)
    config = config or few_config(kind, num_rows, k, token_tiles, act is not None, x.device)
    if config is None:
        half = cdiv(num_tokens, 2)  # never one token: that kernel wants inputs as they are
        for rows in (slice(0, half), slice(half, num_tokens)):
            multiply_few(
                kind, x[rows], codes, parameters, scale, num_rows,
                x_scale=None if x_scale is None else x_scale[rows], bias=bias, act=act,
                residual=None if residual is None else residual[rows], out=out[rows],
            )  # fmt: skip
        return out
    if only_compiles():  # which `prepare_few` does
        return out
    columns = _most_columns(config, kind, k)
    args = Args(
        codes=codes.data_ptr(),
        params=address(parameters),
        scale=address(scale),
        x=x.data_ptr(),
        norm=address(norm_weight),
        x_scale=address(x_scale),
        bias=address(bias),
        residual=address(residual),
        out=out.data_ptr(),
        num_tokens=num_tokens,
        n=num_rows,
        k=k,
        num_groups=1 if parameters is None else parameters.shape[1],
        x_stride=columns + 8,
        split=config.split,
        act=ACTS[act] if act else 0,
        is_gated=act is not None,
        is_out_float=out.dtype == torch.float32,
        is_norm_float=norm_weight is not None and norm_weight.dtype == torch.float32,
        is_bias_float=bias is not None and bias.dtype == torch.float32,
        eps=eps,
    )
    shared_bytes = shared_bytes_of(config, kind, num_tokens, k)
    num_blocks = cdiv(n, 16 * config.warps_n * (config.tiles // 2 if act else config.tiles))
    kernel = _kernel(kind, token_tiles, config._replace(split=1, blocks=0), x.device)
    if token_tiles == 0:  # a block goes on to further rows
        num_blocks = min(num_blocks, _num_places(config, shared_bytes, x.device))
    kernel.launch(num_blocks * config.split, config.split, shared_bytes, (args,), x.device)
    return out


def few_config(
    kind: Kind, num_rows: int, k: int, token_tiles: int, is_gated: bool, device: torch.device
) -> FewConfig | None:
    """Return the configuration of a product, or None if the tokens must be taken half by half."""
    config = FEW_CONFIGS.get(device, num_rows, k, kind.bits, token_tiles, int(is_gated))
    return _fitting(config, kind, token_tiles, k, device)


@functools.lru_cache(4096)
def _fitting(config: FewConfig, kind: Kind, token_tiles: int, k: int, device: torch.device) -> FewConfig | None:
    """Return `config`, with more blocks in a cluster, fewer stages or warps if a block had no room otherwise."""
    card = card_of(device)
    limit, max_split = card.shared_bytes, MAX_SPLIT if card.capability >= HOPPER else 1
    config = config._replace(split=min(config.split, max_split))
    while shared_bytes_of(config, kind, max(1, 8 * token_tiles), k) > limit:
        if config.split < max_split and 2 * config.split * config.warps_k <= k // CHUNK:
            config = config._replace(split=2 * config.split)
        elif config.stages > 2:
            config = config._replace(stages=config.stages - 1)
        elif config.warps_k > 1:
            config = config._replace(warps_k=config.warps_k // 2)
        else:
            return None
    return config


def fits_config(config: FewConfig, kind: Kind, token_tiles: int, k: int, device: torch.device) -> bool:
    """Return whether a product can be cut so on a device."""
    has_parts = config.split * config.warps_k <= k // CHUNK
    return has_parts and _fitting(config, kind, token_tiles, k, device) == config


def prepare_few(kind: Kind, num_rows: int, k: int, device: torch.device, most_tokens: int = MAX_TOKENS) -> None:
    """Compile all kernels that products of up to `most_tokens` with a weight may take, at once."""
    configs = {
        (token_tiles, config._replace(split=1, blocks=0))
        for token_tiles in TOKEN_TILES
        if token_tiles <= token_tiles_of(most_tokens)
        for is_gated in (False, True)
        if (config := few_config(kind, num_rows, k, token_tiles, is_gated, device))
    }
    new = [(tiles, config) for tiles, config in configs if (kind, tiles, config) not in _prepared]
    _prepared.update((kind, tiles, config) for tiles, config in new)
    compile_sources("quantized_few", [source(kind, *pair) for pair in new], card_of(device).architecture)


_prepared: set[tuple[Kind, int, FewConfig]] = set()


def source(kind: Kind, token_tiles: int, config: FewConfig) -> str:
    """Return the source of a kernel, for NVRTC."""
    defines = {
        "IS_ONE": int(token_tiles == 0),
        "IS_CHAIN": 0,
        "IS_DIRECT": 0,
        "HAS_DIGITS": int(token_tiles == 0 and has_digits(kind)),
        "HAS_SIGNS": int(has_signs(kind)),
        "HELD_SCALES": 0 if kind.group_size or token_tiles else HELD_SCALES,
        "HELD_RESIDUALS": 0 if token_tiles else HELD_RESIDUALS,
        "TOKENS": max(token_tiles, 1),
        "TILES": config.tiles,
        "WARPS_N": config.warps_n,
        "WARPS_K": config.warps_k,
        "STAGES": config.stages,
    }
    return source_of(kind, defines, "quantized_one.cu", "quantized_few.cu")


def _most_columns(config: FewConfig, kind: Kind, k: int) -> int:
    """Return the most columns that a block has of those it shares with its cluster."""
    unit = max(CHUNK, kind.form.input_group if kind.form.inputs else 0)
    return cdiv(k // unit, config.split) * unit


def shared_bytes_of(config: FewConfig, kind: Kind, num_tokens: int, k: int) -> int:
    warps = config.warps_n * config.warps_k
    max_tokens = 1 if num_tokens == 1 else 8 * token_tiles_of(num_tokens)
    is_by_digits = num_tokens == 1 and has_digits(kind)
    rings = warps * config.stages * kind.stage_bytes(config.tiles, 1 if is_by_digits else None)
    x = 2 * num_tokens * (_most_columns(config, kind, k) + 8)
    group = kind.form.input_group if kind.form.inputs else 0
    if is_by_digits:
        x_scales = 8 * max(1, kind.groups_of_tile) * (k // CHUNK)  # the sum of each chunk and group, and its unit
    else:
        x_scales = 4 * num_tokens * (k // group if group else 1)
    sums = 4 * config.warps_k * max_tokens * (16 * config.warps_n * config.tiles + 4)
    if num_tokens == 1:
        held = (0 if kind.group_size else 4 * HELD_SCALES) + 2 * HELD_RESIDUALS
        return 128 + rings + 2 * sums + x + x_scales + held
    return 128 + max(rings + x + x_scales, sums)


def has_signs(kind: Kind) -> bool:
    """Return whether integers that digits meet have a sign."""
    return kind.bits == 8 or kind.form.table is not None


def has_digits(kind: Kind) -> bool:
    """Return whether a single token is multiplied as integers of two digits."""
    form = kind.form
    is_integer = form.table is None or integers_of(form.table) is not None
    return form.code in ("int4", "int8") and kind.is_tiled and is_integer and form.inputs is None


@functools.lru_cache(4096)
def _num_places(config: FewConfig, shared_bytes: int, device: torch.device) -> int:
    """Return how many clusters of blocks run at once."""
    most = config.blocks or MOST_WARPS // (config.warps_n * config.warps_k)
    blocks = max(1, min(most, card_of(device).shared_bytes // shared_bytes))
    return max(1, blocks * num_sms(device) // config.split)


def fits_few(kind: Kind, num_rows: int, num_tokens: int, k: int, device: torch.device) -> bool:
    """Return whether `multiply_few` takes so many tokens."""
    if not 0 < num_tokens <= MAX_TOKENS:
        return False
    return few_config(kind, num_rows, k, min(token_tiles_of(num_tokens), 1), False, device) is not None


@functools.cache
def _kernel(kind: Kind, token_tiles: int, config: FewConfig, device: torch.device) -> Kernel:
    with torch.cuda.device(device):
        cubin = compile_source("quantized_few", source(kind, token_tiles, config), card_of(device).architecture)
        return Kernel("quantized_few", cubin, 32 * config.warps_n * config.warps_k, device)
