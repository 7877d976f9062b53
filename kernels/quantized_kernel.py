"""Kinds of weights, arguments and launching, which `quantized_few` and `quantized_many` have in common."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels.card import card_of
from kernels.launch import has_dependent_launch
from kernels.nvrtc import check, joined
from kernels.quantized_format import TABLES, Format
from kernels.quantized_layout import CHUNK

ACTS = {"silu": 1, "gelu_tanh": 2, "gelu": 3, "relu": 4, "relu2": 5}
WHOLE_ROW = 1 << 30  # a group of all inputs
CODES = {"int4": "INT4", "int8": "INT8", "fp8": "FP8"}
ROUNDS = {None: "NO_ROUND", "fp8": "TO_FP8", "int8": "TO_INT8"}
WORDS = ("INT4", "INT8", "FP8"), ("NO_OFFSET", "ZERO", "MINIMUM"), ("NO_ROUND", "TO_FP8", "TO_INT8")


@dataclass(frozen=True)
class Kind:
    """Weights that share kernels."""

    form: Format
    dtype: torch.dtype  # of x and the result
    is_tiled: bool
    group_size: int  # 0: a scale of the whole row, applied at the end
    parameter_dtype: torch.dtype

    @property
    def bits(self) -> int:
        """Return the bits of a code."""
        return 4 if self.form.code == "int4" else 8

    @property
    def tile_bytes(self) -> int:
        """Return the bytes of a tile's codes, 16 rows of a chunk."""
        return 128 * self.bits

    @property
    def groups_of_tile(self) -> int:
        """Return the groups of a row that a chunk has parts of; 0 if its row has one scale."""
        return max(1, CHUNK // self.group_size) if self.group_size else 0

    @property
    def is_half(self) -> bool:
        """Return whether products are of float16: 8 bits are exact in it, and e4m3 has an instruction to it."""
        return self.form.inputs is not None or self.dtype == torch.float16

    @property
    def input_dtype(self) -> torch.dtype:
        """Return the dtype of inputs that are rounded already."""
        return torch.float16 if self.is_half else torch.bfloat16

    @property
    def parameter_bytes(self) -> int:
        """Return the bytes of the scales and offsets of two rows and a group."""
        if not self.group_size:
            return 0
        return (4 if self.form.has_zero or self.form.has_minimum else 2) * self.parameter_dtype.itemsize

    def stage_bytes(self, tiles: int, groups: int | None = None) -> int:
        """Return the shared memory of one stage of a warp. groups: that each thread has parameters of."""
        groups = self.groups_of_tile if groups is None else min(groups, self.groups_of_tile)
        return tiles * (self.tile_bytes + 32 * groups * self.parameter_bytes)


def source_of(kind: Kind, defines: Mapping[str, object], *files: str) -> str:
    """Return a kernel's source for NVRTC: `files`, with `defines` and what describes `kind` in front."""
    return joined(defines_of(kind) | dict(defines), "quantized_parts.cu", *files)


def defines_of(kind: Kind) -> dict[str, object]:
    """Return what describes `kind` to kernels."""
    form = kind.form
    table = (0.0,) * 16 if form.table is None else TABLES[form.table]
    integers, unit = integers_of(form.table) or ((0,) * 16, 1.0)
    bits = torch.tensor(table).to(kind.input_dtype).view(torch.int16).tolist()
    every: dict[str, object] = {word: i for words in WORDS for i, word in enumerate(words)}
    every |= {
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
        "TABLE_INTEGERS": _words_of_bytes([number & 255 for number in integers]),
        "TABLE_UNIT": f"{unit}f",
        "ROUND": ROUNDS[form.inputs],
        "X_GROUP": form.input_group if form.inputs else 0,
    }
    return every


def integers_of(table: str | None) -> tuple[tuple[int, ...], float] | None:
    """Return a table's numbers as integers of 8 bits and their unit, if they are such."""
    if table is None:
        return None
    for unit in (1.0, 0.5):
        numbers = [number / unit for number in TABLES[table]]
        if all(number.is_integer() and abs(number) < 128 for number in numbers):
            return tuple(map(int, numbers)), unit
    return None


def _words_of_bytes(numbers: list[int]) -> str:
    return ", ".join(f"{int.from_bytes(numbers[i : i + 4], 'little'):#x}u" for i in range(0, 16, 4))


class Args(ctypes.Structure):
    """The kernel's arguments; `quantized_few.cu` has the same struct."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "codes", "params", "scale", "x", "norm", "x_scale", "bias", "residual", "out", "arrivals",
        )),
        *((name, ctypes.c_int) for name in (
            "num_tokens", "n", "k", "num_groups", "x_stride", "split", "act", "is_gated", "is_out_float",
            "is_norm_float", "is_bias_float", "first", "kind",
        )),
        ("eps", ctypes.c_float),
    )  # fmt: skip


class Kernel:
    """A kernel that is compiled and loaded, to be launched on the current stream."""

    def __init__(self, name: str, cubin: bytes, num_threads: int, device: torch.device) -> None:
        from cuda.bindings import driver

        self._driver, self._num_threads, self._is_early = driver, num_threads, has_dependent_launch(device)
        module = check(driver.cuModuleLoadData(cubin))
        self._function = check(driver.cuModuleGetFunction(module, name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(self._function, limit, card_of(device).shared_bytes))
        self._configs: dict[int, Any] = {}  # by blocks of a cluster

    def launch(self, num_blocks: int, split: int, shared_bytes: int, args: Sequence[Any], device: torch.device) -> None:
        """Launch the kernel. On Hopper it may start, and load weights, before the kernel ahead has ended.

        args: structs of ctypes or the driver's, in the order of the kernel's parameters.
        """
        config = self._configs.get(split) or self._configs.setdefault(split, self._new_config(split))
        config.gridDimX = num_blocks
        config.sharedMemBytes = shared_bytes
        config.hStream = torch.cuda.current_stream(device).cuda_stream
        addresses = [arg.getPtr() if hasattr(arg, "getPtr") else ctypes.addressof(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(args))(*addresses)
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
