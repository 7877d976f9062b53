"""Products of a weight of few bits and more tokens than `quantized_few` is fast for, on Hopper.

`quantized_many.cu` says how. A kernel is compiled for each kind of weight and number of tokens: all of a kind at its
first product, at once.
"""

import functools
from typing import Any, NamedTuple

import torch

from kernels.card import HOPPER_SHARED_BYTES
from kernels.hopper import ARCHITECTURE, is_available, tensor_map
from kernels.launch import address, cdiv, next_power_of_2, only_compiles
from kernels.nvrtc import compile_source, compile_sources
from kernels.quantized_kernel import ACTS, Args, Kernel, Kind, source_of
from kernels.quantized_layout import CHUNK
from kernels.tuning import Configs

MOST_TOKENS = (16, 32, 64, 128, 256)  # of a block
FEW_TOKENS = 64  # up to so many two blocks share a multiprocessor
ROWS = 64  # of a warpgroup
X_BYTES = 128  # of a token and stage
MAX_SPLIT = 8  # blocks of a cluster
MAX_STAGES = 12
MOST_BLOCK_TOKENS = 128  # of a block whose threads have two sums of each output


class ManyConfig(NamedTuple):
    """Sizes into which a product is cut: see `quantized_many.cu`."""

    tokens: int
    warpgroups: int
    stages: int
    split: int


def default_config(num_rows: int, k: int, bits: int, most_tokens: int, _is_gated: int) -> ManyConfig:
    """Return the configuration of shapes that no table has, for a card like the H100."""
    num_blocks = cdiv(num_rows, 2 * ROWS)
    is_few = most_tokens <= FEW_TOKENS
    split, places = 1, 264 if is_few else 132
    while 2 * split <= MAX_SPLIT and 2 * split * num_blocks <= places and 8 * split * CHUNK <= k:
        split *= 2
    stage_bytes = most_tokens * X_BYTES + 2 * ROWS * (40 if bits == 4 else 128)
    room = HOPPER_SHARED_BYTES // (3 if is_few else 1) - 4096
    return ManyConfig(most_tokens, 2, max(2, min(MAX_STAGES, room // stage_bytes)), split)


MANY_CONFIGS = Configs("quantized_many", ManyConfig, default_config)  # by (rows, K, bits, most tokens, is gated)


def is_direct(kind: Kind) -> bool:
    """Return whether codes are multiplied as they are, by inputs of 8 bits."""
    return not kind.is_tiled


def has_blocks(kind: Kind) -> bool:
    """Return whether codes and inputs have scales of groups, which sums of so many columns are multiplied with."""
    return is_direct(kind) and bool(kind.form.input_group)


def fits_many(kind: Kind, num_rows: int, act: str | None, device: torch.device) -> bool:
    """Return whether `multiply_many` takes a weight."""
    form = kind.form
    if is_direct(kind) and (kind.group_size != form.input_group or (form.code == "int8" and form.input_group)):
        return False
    return num_rows % (32 if act else 8) == 0 and is_available(device)


def most_tokens_of(num_tokens: int) -> int:
    """Return the member of `MOST_TOKENS` for a number of tokens."""
    return min(max(next_power_of_2(num_tokens), MOST_TOKENS[0]), MOST_TOKENS[-1])


def multiply_many(
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
    config: ManyConfig | None = None,
) -> torch.Tensor:
    """Return residual + act(x W^T + bias), [T, num_rows or half of them], for x [T, K].

    codes, parameters, scale: as `kernels.quantized_layout` lays them; of codes that are row by row scale is [G, N].
    x: `inputs` that are rounded are codes where the weight's are row by row, else numbers of `kind.input_dtype`.
    x_scale: of theirs, [T], of groups the transpose of a matrix [G, T, or a few more]. residual: overwritten by the
    result, which is then returned.
    """
    num_tokens, k = x.shape
    n = num_rows // 2 if act else num_rows
    if residual is not None:
        out = residual
    elif out is None:
        out = torch.empty(num_tokens, n, dtype=out_dtype or kind.dtype, device=x.device)
    config = config or MANY_CONFIGS.get(
        x.device, num_rows, k, kind.bits, most_tokens_of(num_tokens), int(act is not None)
    )
    config = fitting(config, kind, k)
    if only_compiles():  # which `prepare_many` does
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
        split=config.split,
        act=ACTS[act] if act else 0,
        is_gated=act is not None,
        is_out_float=out.dtype == torch.float32,
        is_bias_float=bias is not None and bias.dtype == torch.float32,
    )
    maps = _maps(kind, x, codes, parameters, config.tokens)
    if has_blocks(kind):
        assert x_scale is not None and scale is not None
        maps = (*maps[:2], _map_of_scales(scale, ROWS), _map_of_scales(x_scale.t(), config.tokens))
    num_blocks = cdiv(num_rows, ROWS * config.warpgroups) * cdiv(num_tokens, config.tokens)
    kernel = _kernel(kind, config._replace(split=1), x.device)
    kernel.launch(num_blocks * config.split, config.split, shared_bytes(kind, config), (args, *maps), x.device)
    return out


@functools.lru_cache(4096)
def fitting(config: ManyConfig, kind: Kind, k: int) -> ManyConfig:
    """Return `config` with no more blocks in a cluster than there are stages, and as many stages as fit."""
    if has_blocks(kind):
        config = config._replace(tokens=min(config.tokens, MOST_BLOCK_TOKENS))
    while config.stages > 2 and shared_bytes(kind, config) > HOPPER_SHARED_BYTES:
        config = config._replace(stages=config.stages - 1)
    return config._replace(split=max(1, min(config.split, cdiv(k, X_BYTES))))


def shared_bytes(kind: Kind, config: ManyConfig) -> int:
    """Return the shared memory of a block."""
    rows = ROWS * config.warpgroups
    sums = 4 * config.tokens * (rows + 4)
    return max(config.stages * stage_bytes(kind, config), sums) + 16 * config.stages


def stage_bytes(kind: Kind, config: ManyConfig) -> int:
    """Return the shared memory of one stage."""
    weight = ROWS * X_BYTES if is_direct(kind) else 4 * sum(_box_bytes(kind))
    scales = 4 * (config.warpgroups * ROWS + config.tokens) if has_blocks(kind) else 0
    return cdiv(config.tokens * X_BYTES + config.warpgroups * weight + scales, 1024) * 1024


def _box_bytes(kind: Kind) -> tuple[int, int]:
    """Return the bytes of a tile's codes, and of its scales and offsets, in a stage."""
    return kind.tile_bytes, kind.groups_of_tile * 8 * kind.parameter_bytes


def prepare_many(kind: Kind, num_rows: int, k: int, device: torch.device, least_tokens: int = 1) -> None:
    """Compile all kernels that products of `least_tokens` or more with a weight may take, at once."""
    configs = {
        fitting(MANY_CONFIGS.get(device, num_rows, k, kind.bits, tokens, is_gated), kind, k)._replace(split=1)
        for tokens in MOST_TOKENS
        if tokens >= least_tokens
        for is_gated in (0, 1)
    }
    new = [config for config in configs if (kind, config) not in _prepared]
    _prepared.update((kind, config) for config in new)
    compile_sources("quantized_many", [source(kind, config) for config in new], ARCHITECTURE)


_prepared: set[tuple[Kind, ManyConfig]] = set()


def source(kind: Kind, config: ManyConfig) -> str:
    """Return the source of a kernel, for NVRTC."""
    sums = config.tokens // 2  # registers of a thread
    is_integer = is_direct(kind) and kind.form.code == "int8"
    if is_integer:
        types, end = "k32.s32.s8.s8", ""
    elif is_direct(kind):
        types, end = "k32.f32.e4m3.e4m3", ", 1, 1"
    else:
        short = "f16" if kind.is_half else "bf16"
        types, end = f"k16.f32.{short}.{short}", ", 1, 1, 0"
    num_a = 1 if is_direct(kind) else 4
    defines = {
        "TOKENS": config.tokens,
        "WARPGROUPS": config.warpgroups,
        "STAGES": config.stages,
        "IS_DIRECT": int(is_direct(kind)),
        "IS_INTEGER": int(is_integer),
        "WGMMA_TYPE": f'"m64n{config.tokens}{types}"',
        "WGMMA_END": f'"{end}"',
        "WGMMA_D": '"' + ", ".join(f"%{i}" for i in range(sums)) + '"',
        "WGMMA_A": '"' + ", ".join(f"%{i}" for i in range(sums, sums + num_a)) + '"',
        "WGMMA_X": f'"%{sums + num_a}"',
        "WGMMA_ADD": f'"%{sums + num_a + 1}"',
        "WGMMA_SUMS": ", ".join(f'"+{"r" if is_integer else "f"}"(d[{i}])' for i in range(sums)),
    }
    return source_of(kind, defines, "hopper.cu", "quantized_many.cu")


@functools.cache
def _kernel(kind: Kind, config: ManyConfig, device: torch.device) -> Kernel:
    with torch.cuda.device(device):
        cubin = compile_source("quantized_many", source(kind, config), ARCHITECTURE)
        has_many_sums = config.warpgroups == 2 and config.tokens >= 128
        return Kernel("quantized_many", cubin, 128 * config.warpgroups + (128 if has_many_sums else 32), device)


def _maps(
    kind: Kind, x: torch.Tensor, codes: torch.Tensor, parameters: torch.Tensor | None, tokens: int
) -> tuple[Any, Any, Any, Any]:
    """Return the tensor maps of x, codes, scales and offsets, and of the inputs' scales, or of another in its place."""
    num_tokens, k = x.shape
    x_map = _tensor_map(x.data_ptr(), num_tokens, k * x.element_size(), tokens, X_BYTES, x.element_size(), True)
    if is_direct(kind):
        w_map = _tensor_map(codes.data_ptr(), len(codes), k, ROWS, X_BYTES, 1, True)
        return x_map, w_map, w_map, x_map
    code_bytes, parameter_bytes = _box_bytes(kind)
    w_map = _tensor_map(codes.data_ptr(), len(codes), k // CHUNK * code_bytes, 4, code_bytes, 4, False)
    if parameters is None:
        return x_map, w_map, w_map, x_map
    p_map = _tensor_map(
        parameters.data_ptr(),
        len(parameters),
        parameters[0].nbytes,
        4,
        parameter_bytes,
        parameters.element_size(),
        False,
    )
    return x_map, w_map, p_map, x_map


def _map_of_scales(scales: torch.Tensor, width: int) -> Any:
    """Return the map of scales [G, width at a time], whose rows may go on behind those that count."""
    num_groups = len(scales)
    return _tensor_map(scales.data_ptr(), num_groups, 4 * scales.stride(0), 1, 4 * width, 4, False)


@functools.lru_cache(8192)
def _tensor_map(
    pointer: int, num_rows: int, row_bytes: int, box_rows: int, box_bytes: int, item_bytes: int, is_swizzled: bool
) -> Any:
    """Describe a contiguous matrix to the tensor memory accelerator, which reads boxes [box_rows, box_bytes] of it.

    Past its end it reads zeros.
    """
    sizes, box = (row_bytes // item_bytes, num_rows), (box_bytes // item_bytes, box_rows)
    return tensor_map(f"UINT{8 * item_bytes}", pointer, sizes, (row_bytes,), box, is_swizzled=is_swizzled)
