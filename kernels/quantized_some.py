"""Products of a weight of few bits and 2 to 32 tokens, on Hopper: a decode step of several streams.

`quantized_some.cu` says how.
"""

import functools
import math
from typing import Any, NamedTuple

import torch

from kernels.card import HOPPER_SHARED_BYTES
from kernels.hopper import ARCHITECTURE, is_available, kind_of, tensor_map
from kernels.launch import address, cdiv, compile_ahead, next_power_of_2, num_sms, only_compiles
from kernels.nvrtc import compile_source, compile_sources
from kernels.quantized_kernel import ACTS, Args, Kernel, Kind, source_of
from kernels.quantized_layout import CHUNK, TILE
from kernels.tuning import Configs

MOST_TOKENS = (8, 16, 32)  # of a kernel
MOST_TILES = {8: 7, 16: 7, 32: 3}  # of a warp, whose sums are in registers, by most tokens
MOST_WARPS = {8: 8, 16: 8, 32: 4}  # that share a stage's columns
WARPS_N = {8: (1, 2, 3, 4), 16: (1, 2, 3, 4), 32: (1, 2, 3, 4, 6, 7, 8)}
MOST_STAGES = 4
MOST_BYTES_STAGES = 6  # of codes of 8 bits
MOST_BOX = 256  # numbers along an edge of what a copy takes
HOPPER_SMS = 132


class Pieces(NamedTuple):
    """Say how much of a tile is a row of a copy's box."""

    code_bytes: int
    param_words: int  # of scales and offsets; 0: all of a stage


class SomeConfig(NamedTuple):
    """Sizes into which a product is cut: see `quantized_some.cu`."""

    tiles: int
    warps_n: int
    warps_k: int
    stages: int


def default_config(num_rows: int, _k: int, bits: int, most_tokens: int, is_gated: int) -> SomeConfig:
    """Return the configuration that gives each multiprocessor of a card like the H200 as many tiles as any other."""
    cut_as = most_tokens if bits == 4 else MOST_TOKENS[-1]  # stages of 8 bits are as large with half of the columns
    halves, most_tiles, choices = 2 if is_gated else 1, MOST_TILES[cut_as], WARPS_N[cut_as]
    share = cdiv(cdiv(num_rows, TILE * halves), HOPPER_SMS) * halves
    share = cdiv(share, cdiv(share, most_tiles * choices[-1]))  # in several turns, if warps cannot take it at once
    share += share % halves
    fits = [(cdiv(share, warps_n), warps_n) for warps_n in choices if share <= most_tiles * warps_n]
    even = [(tiles, warps_n) for tiles, warps_n in fits if tiles * warps_n % halves == 0]
    tiles, warps_n = min(even, key=lambda each: (each[0] * each[1], each[1]))
    most_stages = MOST_STAGES if bits == 4 else MOST_BYTES_STAGES
    return SomeConfig(tiles, warps_n, max(1, MOST_WARPS[cut_as] // warps_n), most_stages)


SOME_CONFIGS = Configs("quantized_some", SomeConfig, default_config)  # by (rows, K, bits, most tokens, is gated)


def fits_some(kind: Kind, num_rows: int, act: str | None, num_tokens: int, device: torch.device) -> bool:
    """Return whether `multiply_some` takes a weight and so many tokens."""
    is_known = kind.is_tiled and not kind.form.input_group
    is_right_number = 1 < num_tokens <= MOST_TOKENS[-1]
    return is_known and is_right_number and num_rows % (32 if act else 8) == 0 and is_available(device)


def most_tokens_of(num_tokens: int) -> int:
    """Return the member of `MOST_TOKENS` for a number of tokens."""
    return max(next_power_of_2(num_tokens), MOST_TOKENS[0])


def multiply_some(
    kind: Kind,
    x: torch.Tensor,
    codes: torch.Tensor,
    parameters: torch.Tensor | None,
    scale: torch.Tensor | None,
    num_rows: int,
    *,
    x_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    act: str | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    config: SomeConfig | None = None,
) -> torch.Tensor:
    """Return residual + act(x W^T + bias), [T, num_rows or half of them], for x [T, K] of `kind.input_dtype`.

    codes, parameters, scale: as `kernels.quantized_layout` lays them. x_scale: [T], of inputs that are rounded.
    residual: overwritten by the result, which is then returned.
    """
    num_tokens, k = x.shape
    is_gated, tokens = act is not None, most_tokens_of(num_tokens)
    if residual is not None:
        out = residual
    elif out is None:
        n = num_rows // 2 if is_gated else num_rows
        out = torch.empty(num_tokens, n, dtype=out_dtype or kind.dtype, device=x.device)
    config = config or SOME_CONFIGS.get(x.device, num_rows, k, kind.bits, tokens, int(is_gated))
    config = fitting(config, kind, tokens)
    pieces = pieces_of(kind, k, config)
    if only_compiles():
        compile_ahead(_kernel, kind, config, tokens, pieces, x.device)
        return out
    args = Args(
        scale=address(scale),
        x_scale=address(x_scale),
        bias=address(bias),
        residual=address(residual),
        out=out.data_ptr(),
        num_tokens=num_tokens,
        n=num_rows,
        k=k,
        act=ACTS[act] if act else 0,
        is_gated=is_gated,
        is_out_float=out.dtype == torch.float32,
        is_bias_float=bias is not None and bias.dtype == torch.float32,
    )
    maps = (
        _map_of_inputs(x.data_ptr(), x.dtype, num_tokens, k, tokens, config),
        *_maps_of_weight(kind, codes, parameters, k, config, 2 if is_gated else 1),
    )
    kernel = _kernel(kind, config, tokens, pieces, x.device)
    num_row_blocks = cdiv(num_rows, TILE * config.tiles * config.warps_n)
    num_blocks = min(num_row_blocks, num_sms(x.device))
    kernel.launch(num_blocks, 1, shared_bytes(kind, config, tokens), (args, *maps), x.device)
    return out


@functools.lru_cache(4096)
def fitting(config: SomeConfig, kind: Kind, tokens: int) -> SomeConfig:
    """Return `config` with as many stages, and as many of their columns, as fit.

    Warps that need sums of inputs, which each of them makes, have as many tiles as they can.
    """
    if kind.bits == 4 and kind.form.has_minimum and kind.group_size:
        num_tiles = config.tiles * config.warps_n
        tiles = max(count for count in range(1, MOST_TILES[tokens] + 1) if num_tiles % count == 0)
        if tiles > config.tiles:
            config = config._replace(tiles=tiles, warps_n=num_tiles // tiles)
    while config.warps_k > 1 and not (
        (_box_of_parameters(kind, config) <= MOST_BOX or 0 < kind.group_size <= CHUNK)
        and shared_bytes(kind, config._replace(stages=2), tokens) <= HOPPER_SHARED_BYTES
    ):
        config = config._replace(warps_k=config.warps_k // 2)
    while config.stages > 2 and shared_bytes(kind, config, tokens) > HOPPER_SHARED_BYTES:
        config = config._replace(stages=config.stages - 1)
    return config


def shared_bytes(kind: Kind, config: SomeConfig, tokens: int) -> int:
    """Return the shared memory of a block."""
    sums = 4 * config.warps_k * tokens * (TILE * config.tiles * config.warps_n + 4)
    return config.stages * (stage_bytes(kind, config, tokens) + 16) + sums


def stage_bytes(kind: Kind, config: SomeConfig, tokens: int) -> int:
    """Return the shared memory of one stage."""
    chunks = 2 * config.warps_k
    tile_bytes = chunks * kind.tile_bytes + _stage_groups(kind, config) * 8 * kind.parameter_bytes
    num_bytes = chunks * tokens * 2 * CHUNK + config.tiles * config.warps_n * tile_bytes
    return cdiv(num_bytes, 1024) * 1024


def _stage_groups(kind: Kind, config: SomeConfig) -> int:
    """Return of how many groups a stage has scales."""
    chunks = 2 * config.warps_k
    if not kind.group_size:
        return 0
    if kind.group_size < CHUNK:
        return chunks * kind.groups_of_tile
    of_group = kind.group_size // CHUNK
    if of_group % chunks == 0:
        return 1
    return chunks // of_group + (2 if chunks % of_group else 0)


def _box_of_parameters(kind: Kind, config: SomeConfig) -> int:
    """Return the words of a tile's scales and offsets in a stage."""
    return _stage_groups(kind, config) * 2 * kind.parameter_bytes


def pieces_of(kind: Kind, k: int, config: SomeConfig) -> Pieces:
    """Return how copies are cut of a weight with rows of `k`."""
    code_bytes = 1024 if k // CHUNK * kind.tile_bytes % 1024 == 0 else 512
    if _box_of_parameters(kind, config) <= MOST_BOX:
        return Pieces(code_bytes, 0)
    of_group = 2 * kind.parameter_bytes
    num_groups = math.gcd(MOST_BOX // of_group, _stage_groups(kind, config), k // kind.group_size)
    return Pieces(code_bytes, of_group * num_groups)


def prepare_some(kind: Kind, num_rows: int, k: int, is_gated: bool, device: torch.device) -> None:
    """Compile all kernels that products with a weight may take, at once."""
    configs = {
        (fitting(SOME_CONFIGS.get(device, num_rows, k, kind.bits, tokens, int(is_gated)), kind, tokens), tokens)
        for tokens in MOST_TOKENS
    }
    new = [(kind, config, tokens, pieces_of(kind, k, config)) for config, tokens in configs]
    new = [each for each in new if each not in _prepared]
    _prepared.update(new)
    compile_sources("quantized_some", [source(*each) for each in new], ARCHITECTURE)


_prepared: set[tuple[Kind, SomeConfig, int, Pieces]] = set()


def source(kind: Kind, config: SomeConfig, tokens: int, pieces: Pieces) -> str:
    """Return the source of a kernel, for NVRTC."""
    defines = {
        "TOKENS": tokens,
        "TILES": config.tiles,
        "WARPS_N": config.warps_n,
        "WARPS_K": config.warps_k,
        "STAGES": config.stages,
        "PIECE_BYTES": pieces.code_bytes,
        "PARAM_WORDS": pieces.param_words,
    }
    return source_of(kind, defines, "hopper.cu", "quantized_some.cu")


@functools.cache
def _kernel(kind: Kind, config: SomeConfig, tokens: int, pieces: Pieces, device: torch.device) -> Kernel:
    with torch.cuda.device(device):
        cubin = compile_source("quantized_some", source(kind, config, tokens, pieces), ARCHITECTURE)
        return Kernel("quantized_some", cubin, 32 * (config.warps_n * config.warps_k + 2), device)


def _maps_of_weight(
    kind: Kind, codes: torch.Tensor, parameters: torch.Tensor | None, k: int, config: SomeConfig, halves: int
) -> tuple[Any, Any]:
    """Return the tensor maps of codes, and of scales and offsets or of another in their place.

    halves: 2 if a box has as many tiles of gate as of up.
    """
    (piece, param_words), row_bytes = pieces_of(kind, k, config), k // CHUNK * kind.tile_bytes
    tiles, box_tiles = len(codes) // halves, config.tiles * config.warps_n // halves
    of_codes = _map(
        "UINT32",
        codes.data_ptr(),
        (piece // 4, row_bytes // piece, tiles, halves),
        (piece, row_bytes, tiles * row_bytes),
        (piece // 4, 2 * config.warps_k * kind.tile_bytes // piece, box_tiles, halves),
        False,
    )
    if parameters is None:
        return of_codes, of_codes
    row_bytes = parameters[0].nbytes
    if param_words:
        of_parameters = _map(
            "UINT32",
            parameters.data_ptr(),
            (param_words, row_bytes // 4 // param_words, tiles, halves),
            (4 * param_words, row_bytes, tiles * row_bytes),
            (param_words, _box_of_parameters(kind, config) // param_words, box_tiles, halves),
            False,
        )
        return of_codes, of_parameters
    of_parameters = _map(
        "UINT32",
        parameters.data_ptr(),
        (row_bytes // 4, tiles, halves),
        (row_bytes, tiles * row_bytes),
        (_box_of_parameters(kind, config), box_tiles, halves),
        False,
    )
    return of_codes, of_parameters


def _map_of_inputs(pointer: int, dtype: torch.dtype, num_tokens: int, k: int, tokens: int, config: SomeConfig) -> Any:
    """Return the tensor map of inputs, of which a box has a chunk's columns of all tokens behind the next chunk's."""
    sizes, box = (CHUNK, num_tokens, k // CHUNK), (CHUNK, tokens, 2 * config.warps_k)
    return _map(kind_of(dtype), pointer, sizes, (2 * k, 2 * CHUNK), box, True)


@functools.lru_cache(8192)
def _map(
    item: str, pointer: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], is_swizzled: bool
) -> Any:
    return tensor_map(item, pointer, sizes, strides, box, is_swizzled=is_swizzled)
