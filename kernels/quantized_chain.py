"""Products of one token that follow each other, in one kernel: codes are read on while blocks wait for each other.

Between two kernels memory rests: blocks end, others begin, and read inputs before they have a use for codes. Here a
block on each multiprocessor has a part of every product, and codes are copied ahead from one to the next:
`quantized_chain.cu`.
"""

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernels.card import card_of
from kernels.hopper import ARCHITECTURE, tensor_map
from kernels.launch import address, cdiv, compile_ahead, num_sms, only_compiles
from kernels.nvrtc import compile_source, joined
from kernels.quantized_cuda import CudaQuantizedWeight
from kernels.quantized_few import HELD_RESIDUALS, HELD_SCALES, can_multiply_few, has_digits, has_signs
from kernels.quantized_kernel import ACTS, Args, Kernel, Kind, defines_of
from kernels.quantized_layout import CHUNK, TILE
from kernels.weights import Norm

ATTENTION_BYTES = 24 << 10  # of shared memory that attention's block has room in beside a chain's
MOST_STAGES = 16
MOST_DIRECT_STAGES = 4  # of codes row by row: 8 are no faster
MAP_BYTES = 128
SLAB = 128  # columns of codes row by row that a warpgroup multiplies at once
LEAST_BYTES = 6 << 20  # of a weight in the mean: smaller ones have not been measured


class ChainConfig(NamedTuple):
    """Sizes into which products are cut: see `quantized_chain.cu`."""

    tiles: int = 2
    warps: int = 16
    piece: int = 1
    stages: int = 4


class ChainedProduct(NamedTuple):
    """out = act(norm(x) W^T + bias), added to what `out` holds if `is_sum`."""

    weight: CudaQuantizedWeight
    x: torch.Tensor  # [1, k]
    out: torch.Tensor
    bias: torch.Tensor | None = None
    norm: Norm | None = None  # an RMS norm
    act: str | None = None
    is_sum: bool = False


def can_chain(weights: Sequence[CudaQuantizedWeight], device: torch.device) -> bool:
    """Return whether `multiply_chain` takes products with these weights, in the order they have them."""
    if not can_multiply_few(device) or not card_of(device).is_hopper:  # blocks that wait have run on no other card
        return False
    kinds, most_k = kinds_of(weights), max(weight.k for weight in weights)
    if not all(map(is_chained, kinds)) or not (len(kinds) == 1 or all(kind.is_tiled for kind in kinds)):
        return False
    if {kind.dtype.itemsize for kind in kinds} != {2} or len({kind.dtype for kind in kinds}) > 1 or has_neighbours():
        return False
    if sum(weight.codes.nbytes for weight in weights) < LEAST_BYTES * len(weights):
        return False
    fits = all(weight.order is None and weight.n % (2 * TILE) == 0 for weight in weights)
    fits = fits and (kinds[0].is_tiled or all(weight.k % SLAB == 0 for weight in weights))
    return fits and chain_config(kinds, most_k, device) is not None


def kinds_of(weights: Sequence[CudaQuantizedWeight]) -> tuple[Kind, ...]:
    """Return the kinds of weights that a chain's kernel is made for."""
    return tuple(dict.fromkeys(weight.kind for weight in weights))


def is_chained(kind: Kind) -> bool:
    """Return whether there are chains of a kind: of integers, or of codes that inputs are rounded to as well."""
    return has_digits(kind) or (not kind.is_tiled and not kind.group_size)


def has_neighbours() -> bool:
    """Return whether kernels of other processes run beside ours: NVIDIA's MPS has been started.

    A chain of each would keep multiprocessors that the other one waits for, for ever.
    """
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps", "control").exists()


def multiply_chain(
    products: Sequence[ChainedProduct],
    arrivals: torch.Tensor,
    config: ChainConfig | None = None,
    kinds: tuple[Kind, ...] = (),
) -> None:
    """Compute products one after the other, of weights that `can_chain`.

    arrivals: int64 [1] for any chains that are not computed at once, 0 at first. kinds: of these weights and maybe of
    others, whose chains have the same kernel then.
    """
    kinds, device = kinds or kinds_of([product.weight for product in products]), arrivals.device
    num_blocks, most_k = num_sms(device), max(product.weight.k for product in products)
    config = config or chain_config(kinds, most_k, device)
    assert config is not None
    if only_compiles():
        for num_products in (4, 3):  # of a layer, and of the last one
            compile_ahead(_kernel, kinds, config, num_products, device)
        return
    args, first = (Args * len(products))(), 0
    for i, (weight, x, out, bias, norm, act, is_sum) in enumerate(products):
        norm_weight = None if norm is None else norm.weight
        args[i] = Args(
            codes=weight.codes.data_ptr(),
            params=address(weight.parameters),
            scale=address(weight.scale),
            x=x.data_ptr(),
            norm=address(norm_weight),
            x_scale=address(weight.input_scale),
            bias=address(bias),
            residual=out.data_ptr() if is_sum else None,
            out=out.data_ptr(),
            arrivals=arrivals.data_ptr(),
            num_tokens=1,
            n=weight.n,
            k=weight.k,
            num_groups=1 if weight.parameters is None else weight.parameters.shape[1],
            x_stride=most_k + 8,
            split=1,
            act=ACTS[act] if act else 0,
            is_gated=act is not None,
            is_norm_float=norm_weight is not None and norm_weight.dtype == torch.float32,
            is_bias_float=bias is not None and bias.dtype == torch.float32,
            first=first,
            kind=kinds.index(weight.kind),
            eps=0.0 if norm is None else norm.eps,
        )
        first = (first + cdiv(weight.n, TILE * config.tiles)) % num_blocks
    kernel = _kernel(kinds, config, len(products), device)
    kernel.launch(num_blocks, 1, shared_bytes(kinds, config, most_k), (args, _maps(kinds[0], config, args)), device)


def _maps(kind: Kind, config: ChainConfig, args: Any) -> Any:
    """Return what describes codes row by row to the tensor memory accelerator, of all products; of tiles nothing."""
    of_rows = [] if kind.is_tiled else args
    found = b"".join(_map(config, arg.codes, arg.n, arg.k, bool(arg.is_gated)) for arg in of_rows)
    return ctypes.create_string_buffer(found, MAP_BYTES * len(args))


@functools.lru_cache(8192)
def _map(config: ChainConfig, codes: int, n: int, k: int, is_gated: bool) -> bytes:
    """Describe codes [n, k] in boxes of a stage: 128 bytes of each row, of half of a block's rows, twice, and so on."""
    half = TILE * config.tiles // 2
    distance = n // 2 if is_gated else half  # from a row to that of the other half
    sizes, strides = (SLAB, n - distance, 2, k // SLAB), (k, distance * k, SLAB)
    found = tensor_map("UINT8", codes, sizes, strides, (SLAB, half, 2, 2 * config.piece))
    return ctypes.string_at(found.getPtr(), MAP_BYTES)


@functools.cache
def chain_config(kinds: tuple[Kind, ...], most_k: int, device: torch.device) -> ChainConfig | None:
    """Return the configuration with the most stages that there is room for; None if there is for less than two."""
    room = card_of(device).shared_bytes - ATTENTION_BYTES
    config = ChainConfig(piece=2)
    if kinds[0].is_tiled:
        numbers = range(MOST_STAGES, 1, -1)
    else:  # each warpgroup has as many places in the ring
        numbers = range(MOST_DIRECT_STAGES, 0, -config.warps // 4)
    for stages in numbers:
        if shared_bytes(kinds, config._replace(stages=stages), most_k) <= room:
            return config._replace(stages=stages)
    return None


def shared_bytes(kinds: Sequence[Kind], config: ChainConfig, most_k: int) -> int:
    """Return the shared memory of a block, as `quantized_chain_kind.cu` lays it out."""
    rows, is_tiled = TILE * config.tiles, kinds[0].is_tiled
    parts = config.warps if is_tiled else config.warps // 2
    sums = 2 * 4 * parts * (rows + 4)
    x_scales = 8 * _most_groups(kinds) * (most_k // CHUNK) if is_tiled else 4  # of digits
    held = 4 * _held_scales(kinds) + 2 * HELD_RESIDUALS
    columns = 2 * SLAB * config.piece  # of a stage
    x = 2 * (most_k + 8) if is_tiled else cdiv(most_k, columns) * columns + 128
    return _ring_at(kinds, config) + config.stages * _slot_bytes(kinds, config) + sums + x + x_scales + held


def _ring_at(kinds: Sequence[Kind], config: ChainConfig) -> int:
    """Return where the ring of codes is: behind barriers, and where swizzled boxes may be."""
    return 128 + cdiv(16 * config.stages, 128) * 128 if kinds[0].is_tiled else 1024


def _slot_bytes(kinds: Sequence[Kind], config: ChainConfig) -> int:
    """Return the shared memory of a place in the ring, which has room for a stage of any kind."""
    return max(stage_bytes(kind, config) for kind in kinds)


def _most_groups(kinds: Sequence[Kind]) -> int:
    return max(1, *(kind.groups_of_tile for kind in kinds))


def _held_scales(kinds: Sequence[Kind]) -> int:
    return max(0 if kind.group_size else HELD_SCALES for kind in kinds)


def _piece(kind: Kind, config: ChainConfig) -> int:
    """Return the chunks of a warp and stage: of tiles of 8 bits half as many."""
    return max(1, config.piece // 2) if kind.is_tiled and kind.bits == 8 else config.piece


def stage_bytes(kind: Kind, config: ChainConfig) -> int:
    """Return the shared memory of a stage: codes, and parameters of all groups that it may have parts of."""
    if not kind.is_tiled:
        return config.tiles * TILE * SLAB * 2 * config.piece
    chunks = config.warps * _piece(kind, config)
    codes = chunks * kind.tile_bytes
    of_group = max(1, kind.group_size // CHUNK)
    groups = chunks * kind.groups_of_tile // of_group + (2 if chunks % of_group else 0)
    return config.tiles * (codes + groups * 8 * kind.parameter_bytes)


def source(kinds: Sequence[Kind], config: ChainConfig, num_products: int) -> str:
    """Return the source of a kernel, for NVRTC: what depends on a kind for each of them, and what does not."""
    of_all: dict[str, object] = {
        "IS_CHAIN": 1,
        "HELD_RESIDUALS": HELD_RESIDUALS,
        "PRODUCTS": num_products,
        "TILES": config.tiles,
        "WARPS_N": 1,
        "WARPS_K": config.warps,
        "STAGES": config.stages,
        "SLOT_BYTES": _slot_bytes(kinds, config),
        "RING_AT": _ring_at(kinds, config),
        "MOST_GROUPS": _most_groups(kinds),
        "MOST_HELD_SCALES": _held_scales(kinds),
    }
    parts = [joined(of_all, "hopper.cu")]
    for i, kind in enumerate(kinds):
        of_kind = defines_of(kind) | {
            "HAS_DIGITS": int(has_digits(kind)),
            "HAS_SIGNS": int(has_signs(kind)),
            "HELD_SCALES": 0 if kind.group_size else HELD_SCALES,
            "PIECE": _piece(kind, config),
            "IS_DIRECT": int(not kind.is_tiled),
            "IS_INTEGER": int(not kind.is_tiled and kind.form.code == "int8"),
        }
        body = joined({}, "quantized_parts.cu", "quantized_one.cu", "quantized_chain_kind.cu")
        defined = "".join(f"#undef {name}\n#define {name} {value}\n" for name, value in of_kind.items())
        parts.append(f"{defined}namespace kind_{i} {{\n{body}}}\n")
    calls = "".join(
        f" else if (args.kind == {i}) kind_{i}::function((const kind_{i}::Args&)args, __VA_ARGS__);"
        for i in range(1, len(kinds))
    )
    first = "kind_0::function(args, __VA_ARGS__);"
    each = f"{{ if (args.kind == 0) {first}{calls} }}" if calls else f"{{ {first} }}"
    return "".join([*parts, f"#define EACH_KIND(function, ...) {each}\n", joined({}, "quantized_chain.cu")])


@functools.cache
def _kernel(kinds: tuple[Kind, ...], config: ChainConfig, num_products: int, device: torch.device) -> Kernel:
    cubin = compile_source("quantized_chain", source(kinds, config, num_products), ARCHITECTURE)
    with torch.cuda.device(device):
        return Kernel("quantized_chain", cubin, 32 * (config.warps + 1), device)
