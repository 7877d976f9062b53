"""Products of a weight of few bits and 1 to 64 tokens on tensor cores; `quantized_few.cu` says how.

A kernel is compiled for each kind of weight and number of tokens: all of a kind at its first product, at once.
"""

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernels.launch import cdiv, has_dependent_launch, next_power_of_2
from kernels.nvrtc import check, compile_source, has_nvrtc
from kernels.quantized_format import TABLES, Format
from kernels.quantized_layout import CHUNK
from kernels.tuning import Configs

MAX_TOKENS = 64
TOKEN_TILES = (0, 1, 2, 4, 8)  # of 8 tokens; 0: one token, whose norm and rounding are fused
MANY_WEIGHTS = 1 << 26  # elements of a weight that keep all multiprocessors busy with fewer warps each
MAX_SPLIT = 8  # blocks of a cluster
SHARED_BYTES = 227 << 10  # that a block may have on Hopper
OLD_SHARED_BYTES = 99 << 10  # on any GPU from Ampere on
OLDEST = (8, 0)
ACTS = {"silu": 1, "gelu_tanh": 2, "gelu": 3, "relu": 4, "relu2": 5}
WHOLE_ROW = 1 << 30  # a group of all inputs
CODES = {"int4": "INT4", "int8": "INT8", "fp8": "FP8"}
ROUNDS = {None: "NO_ROUND", "fp8": "TO_FP8", "int8": "TO_INT8"}
WORDS = ("INT4", "INT8", "FP8"), ("NO_OFFSET", "ZERO", "MINIMUM"), ("NO_ROUND", "TO_FP8", "TO_INT8")


class FewConfig(NamedTuple):
    """How a weight is cut: see `quantized_few.cu`. stages: pieces of 64 columns on their way to each warp, and one."""

    tiles: int
    warps_n: int
    warps_k: int
    split: int
    stages: int


@dataclass(frozen=True)
class Kind:
    """Weights that share kernels."""

    form: Format
    dtype: torch.dtype  # of x and the result
    is_tiled: bool
    group_size: int  # 0: a scale of the whole row, applied at the end
    parameter_dtype: torch.dtype

    @property
    def is_half(self) -> bool:
        """Whether products are of float16: inputs of 8 bits are exact in it, and e4m3 has an instruction to it."""
        return self.form.inputs is not None or self.dtype == torch.float16

    @property
    def input_dtype(self) -> torch.dtype:
        """The dtype of inputs that are rounded already."""
        return torch.float16 if self.is_half else torch.bfloat16

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the scales and offsets of two rows and a group."""
        if not self.group_size:
            return 0
        return (4 if self.form.has_zero or self.form.has_minimum else 2) * self.parameter_dtype.itemsize

    def stage_bytes(self, tiles: int) -> int:
        """Return the shared memory of one stage of a warp."""
        codes = 512 if self.form.code == "int4" else 1024
        groups = max(1, CHUNK // self.group_size) if self.group_size else 0
        return tiles * (codes + 32 * groups * self.parameter_bytes)


def default_config(num_rows: int, k: int, _bits: int, token_tiles: int, _is_gated: int) -> FewConfig:
    """Return the configuration of shapes that no table has, for a card like the H100."""
    num_chunks = k // CHUNK
    if token_tiles == 0:
        warps_k = 16 if num_rows * k < MANY_WEIGHTS else 8
        return FewConfig(2, 1, min(warps_k, next_power_of_2(num_chunks + 1) // 2), 1, 4)
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
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST and has_nvrtc()


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
    columns = _most_columns(config, kind, k)
    args = Args(
        codes=codes.data_ptr(),
        params=_address(parameters),
        scale=_address(scale),
        x=x.data_ptr(),
        norm=_address(norm_weight),
        x_scale=_address(x_scale),
        bias=_address(bias),
        residual=_address(residual),
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
    shared_bytes = _shared_bytes(config, kind, num_tokens, k)
    num_blocks = cdiv(n, 16 * config.warps_n * (config.tiles // 2 if act else config.tiles))
    kernel = _kernel(kind, token_tiles, config._replace(split=1), x.device)
    kernel.launch(num_blocks * config.split, config.split, shared_bytes, args, x.device)
    return out


def few_config(
    kind: Kind, num_rows: int, k: int, token_tiles: int, is_gated: bool, device: torch.device
) -> FewConfig | None:
    """Return the configuration of a product, or None if the tokens must be taken half by half."""
    bits = 4 if kind.form.code == "int4" else 8
    config = FEW_CONFIGS.get(device, num_rows, k, bits, token_tiles, int(is_gated))
    return _fitting(config, kind, token_tiles, k, device)


@functools.lru_cache(4096)
def _fitting(config: FewConfig, kind: Kind, token_tiles: int, k: int, device: torch.device) -> FewConfig | None:
    """Return `config`, with more blocks in a cluster, fewer stages or warps if a block had no room otherwise."""
    has_clusters = has_dependent_launch(device)
    limit, max_split = (SHARED_BYTES, MAX_SPLIT) if has_clusters else (OLD_SHARED_BYTES, 1)
    config = config._replace(split=min(config.split, max_split))
    while _shared_bytes(config, kind, max(1, 8 * token_tiles), k) > limit:
        if config.split < max_split and 2 * config.split * config.warps_k <= k // CHUNK:
            config = config._replace(split=2 * config.split)
        elif config.stages > 2:
            config = config._replace(stages=config.stages - 1)
        elif config.warps_k > 1:
            config = config._replace(warps_k=config.warps_k // 2)
        else:
            return None
    return config


def prepare_few(kind: Kind, num_rows: int, k: int, device: torch.device) -> None:
    """Compile all kernels that products with a weight may take, at once."""
    configs = {
        (token_tiles, config._replace(split=1))
        for token_tiles in TOKEN_TILES
        for is_gated in (False, True)
        if (config := few_config(kind, num_rows, k, token_tiles, is_gated, device))
    }
    new = [(tiles, config) for tiles, config in configs if (kind, tiles, config) not in _prepared]
    if not new:
        return
    _prepared.update((kind, tiles, config) for tiles, config in new)
    architecture = _architecture(device)
    with ThreadPoolExecutor(len(new)) as threads:
        list(threads.map(lambda pair: compile_source("quantized_few", source(kind, *pair), architecture), new))


_prepared: set[tuple[Kind, int, FewConfig]] = set()


def source(kind: Kind, token_tiles: int, config: FewConfig) -> str:
    """Return the source of a kernel, for NVRTC."""
    form = kind.form
    table = (0.0,) * 16 if form.table is None else TABLES[form.table]
    bits = torch.tensor(table).to(kind.input_dtype).view(torch.int16).tolist()
    defines = {word: i for words in WORDS for i, word in enumerate(words)} | {
        "CODE": CODES[form.code],
        "IS_TILED": int(kind.is_tiled),
        "GROUP": kind.group_size,
        "OFFSET": "ZERO" if form.has_zero else "MINIMUM" if form.has_minimum else "NO_OFFSET",
        "PARAM": "float" if kind.parameter_dtype == torch.float32 else "unsigned short",
        "PARAM_IS_HALF": int(kind.parameter_dtype == torch.float16),
        "IS_HALF": int(kind.is_half),
        "IS_X_HALF": int(kind.dtype == torch.float16),
        "HAS_TABLE": int(form.table is not None),
        "TABLE_LOW": _words_of_bytes([number & 255 for number in bits]),
        "TABLE_HIGH": _words_of_bytes([number >> 8 & 255 for number in bits]),
        "IS_ONE": int(token_tiles == 0),
        "ROUND": ROUNDS[form.inputs],
        "X_GROUP": form.input_group if form.inputs else 0,
        "TOKENS": max(token_tiles, 1),
        "TILES": config.tiles,
        "WARPS_N": config.warps_n,
        "WARPS_K": config.warps_k,
        "STAGES": config.stages,
    }
    lines = [f"#define {name} {value}\n" for name, value in defines.items()]
    return "".join(lines) + Path(__file__).with_suffix(".cu").read_text()


def _words_of_bytes(numbers: list[int]) -> str:
    return ", ".join(f"{int.from_bytes(numbers[i : i + 4], 'little'):#x}u" for i in range(0, 16, 4))


def _most_columns(config: FewConfig, kind: Kind, k: int) -> int:
    """Return the most columns that a block has of those it shares with its cluster."""
    unit = max(CHUNK, kind.form.input_group if kind.form.inputs else 0)
    return cdiv(k // unit, config.split) * unit


def _shared_bytes(config: FewConfig, kind: Kind, num_tokens: int, k: int) -> int:
    warps = config.warps_n * config.warps_k
    max_tokens = 1 if num_tokens == 1 else 8 * token_tiles_of(num_tokens)
    rings = warps * config.stages * kind.stage_bytes(config.tiles)
    x = 2 * num_tokens * (_most_columns(config, kind, k) + 8)
    group = kind.form.input_group if kind.form.inputs else 0
    x_scales = 4 * num_tokens * (k // group if group else 1)
    sums = 4 * config.warps_k * max_tokens * (16 * config.warps_n * config.tiles + 4)
    return 128 + max(rings + x + x_scales, sums)


def fits_few(kind: Kind, num_rows: int, num_tokens: int, k: int, device: torch.device) -> bool:
    """Return whether `multiply_few` takes so many tokens."""
    if not 0 < num_tokens <= MAX_TOKENS:
        return False
    return few_config(kind, num_rows, k, min(token_tiles_of(num_tokens), 1), False, device) is not None


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Args(ctypes.Structure):
    """The kernel's arguments; `quantized_few.cu` has the same struct."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "codes", "params", "scale", "x", "norm", "x_scale", "bias", "residual", "out",
        )),
        *((name, ctypes.c_int) for name in (
            "num_tokens", "n", "k", "num_groups", "x_stride", "split", "act", "is_gated", "is_out_float",
            "is_norm_float", "is_bias_float",
        )),
        ("eps", ctypes.c_float),
    )  # fmt: skip


class _Kernel:
    """A kernel that is compiled and loaded, to be launched on the current stream."""

    def __init__(self, cubin: bytes, num_threads: int, device: torch.device) -> None:
        from cuda.bindings import driver

        self._driver, self._num_threads, self._is_early = driver, num_threads, has_dependent_launch(device)
        module = check(driver.cuModuleLoadData(cubin))
        self._function = check(driver.cuModuleGetFunction(module, b"quantized_few"))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(self._function, limit, SHARED_BYTES if self._is_early else OLD_SHARED_BYTES))
        self._configs: dict[int, Any] = {}  # by blocks of a cluster

    def launch(self, num_blocks: int, split: int, shared_bytes: int, args: Args, device: torch.device) -> None:
        """Launch the kernel. On Hopper it may start, and load weights, before the kernel ahead has ended."""
        config = self._configs.get(split) or self._configs.setdefault(split, self._new_config(split))
        config.gridDimX = num_blocks
        config.sharedMemBytes = shared_bytes
        config.hStream = torch.cuda.current_stream(device).cuda_stream
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        check(self._driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0))

    def _new_config(self, split: int) -> Any:
        driver, attributes = self._driver, []
        if self._is_early:
            early = driver.CUlaunchAttribute()
            early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            early.value.programmaticStreamSerializationAllowed = 1
            attributes.append(early)
        if split > 1:
            cluster = driver.CUlaunchAttribute()
            cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = split, 1, 1
            attributes.append(cluster)
        config = driver.CUlaunchConfig()
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.blockDimX = self._num_threads
        config.attrs, config.numAttrs = attributes, len(attributes)
        return config


@functools.cache
def _kernel(kind: Kind, token_tiles: int, config: FewConfig, device: torch.device) -> _Kernel:
    with torch.cuda.device(device):
        cubin = compile_source("quantized_few", source(kind, token_tiles, config), _architecture(device))
        return _Kernel(cubin, 32 * config.warps_n * config.warps_k, device)


@functools.cache
def _architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
