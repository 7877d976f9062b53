"""Tasks of `kernels.tune` for weights of few bits: a single token's products, and those of 16.

Kernels do not depend on a weight's shape, so that the candidates of all shapes are compiled once.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from kernels.card import card_of
from kernels.hopper import ARCHITECTURE
from kernels.launch import cdiv
from kernels.quantized import QuantizedWeight
from kernels.quantized_cuda import CudaQuantizedWeight
from kernels.quantized_few import FEW_CONFIGS, FewConfig, can_multiply_few, fits_config, source, token_tiles_of
from kernels.quantized_kernel import Kind
from kernels.quantized_many import MANY_CONFIGS, ManyConfig, fits_many, fitting
from kernels.quantized_many import source as source_of_many
from kernels.quantized_some import SOME_CONFIGS, SomeConfig, fits_some, pieces_of
from kernels.quantized_some import default_config as even_config
from kernels.quantized_some import fitting as fitting_some
from kernels.quantized_some import source as source_of_some
from kernels.triton_tasks import MIN_LAUNCHES, num_copies
from kernels.tuning import Task, WeightShape
from kernels.weights import Part

TOKENS = 16
ONE_CANDIDATES = [
    (2, 1, 12, 1, 4, 2), (2, 1, 16, 1, 4, 1), (2, 1, 12, 1, 3, 2), (2, 1, 16, 1, 3, 2), (1, 1, 16, 1, 8, 2)
]  # fmt: skip
FEW_CANDIDATES = [(2, 4, 2, 4, 4), (2, 8, 1, 8, 4), (4, 4, 1, 8, 3), (2, 4, 1, 1, 4)]
MANY_CANDIDATES = [  # warpgroups, stages, split
    (2, 6, 1), (2, 8, 1), (2, 6, 2), (2, 8, 2), (2, 8, 4), (1, 12, 1), (1, 12, 2),
]  # fmt: skip


class _Norm:
    """Stand for a layer's norm."""

    is_rms, eps = True, 1e-5

    def __init__(self, k: int, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.ones(k, dtype=dtype, device=device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("products take it in")


def quantized_tasks(shapes: Sequence[WeightShape], device: torch.device) -> list[Task]:
    """Return what can be tuned for a model's weights of few bits, the largest first."""
    if not can_multiply_few(device):
        return []
    of_few_bits = [shape for shape in dict.fromkeys(shapes) if shape.kind is not None]
    found = sorted(of_few_bits, key=lambda shape: -shape.num_rows * shape.k)
    tasks = [few_task(shape, 1, ONE_CANDIDATES, device) for shape in found]
    for shape in found:
        assert isinstance(shape.kind, Kind)
        if fits_some(shape.kind, shape.num_rows, shape.act, TOKENS, device):
            tasks.append(some_task(shape, device))
        elif fits_many(shape.kind, shape.num_rows, shape.act, device):
            tasks.append(many_task(shape, device))
        else:
            tasks.append(few_task(shape, TOKENS, FEW_CANDIDATES, device))
    return list({(task.configs.kind, task.key): task for task in reversed(tasks)}.values())[::-1]


def few_task(shape: WeightShape, num_tokens: int, candidates: Sequence[tuple[int, ...]], device: torch.device) -> Task:
    """Return the task of a product by `quantized_few`."""
    kind, is_gated, token_tiles = shape.kind, int(shape.act is not None), token_tiles_of(num_tokens)
    assert isinstance(kind, Kind)
    configs = [FewConfig(*candidate) for candidate in candidates]
    fits = [
        config
        for config in configs
        if not (is_gated and config.tiles % 2) and fits_config(config, kind, token_tiles, shape.k, device)
    ]
    architecture = card_of(device).architecture

    def source_of(config: FewConfig) -> tuple[str, str, str]:
        return "quantized_few", source(kind, token_tiles, config._replace(split=1, blocks=0)), architecture

    key = (shape.num_rows, shape.k, kind.bits, token_tiles, is_gated)
    return Task(FEW_CONFIGS, key, fits, functools.partial(_launches, shape, num_tokens, device), source_of)


def many_task(shape: WeightShape, device: torch.device) -> Task:
    """Return the task of a product by `quantized_many`."""
    kind = shape.kind
    assert isinstance(kind, Kind)
    candidates = [candidate for candidate in MANY_CANDIDATES if candidate[0] > 1 or not shape.act]
    configs = [fitting(ManyConfig(TOKENS, *candidate), kind, shape.k) for candidate in candidates]

    def source_of(config: ManyConfig) -> tuple[str, str, str]:
        return "quantized_many", source_of_many(kind, config._replace(split=1)), ARCHITECTURE

    key = (shape.num_rows, shape.k, kind.bits, TOKENS, int(shape.act is not None))
    prepare = functools.partial(_launches, shape, TOKENS, device)
    return Task(MANY_CONFIGS, key, list(dict.fromkeys(configs)), prepare, source_of)


def some_task(shape: WeightShape, device: torch.device) -> Task:
    """Return the task of a product by `quantized_some`."""
    kind, is_gated = shape.kind, int(shape.act is not None)
    assert isinstance(kind, Kind)
    key = (shape.num_rows, shape.k, kind.bits, TOKENS, is_gated)
    even = even_config(*key)
    fewer = even._replace(warps_k=even.warps_k // 2)
    configs = [fitting_some(config, kind, TOKENS) for config in (even, fewer)]

    def source_of(config: SomeConfig) -> tuple[str, str, str]:
        return "quantized_some", source_of_some(kind, config, TOKENS, pieces_of(kind, shape.k, config)), ARCHITECTURE

    prepare = functools.partial(_launches, shape, TOKENS, device)
    return Task(SOME_CONFIGS, key, list(dict.fromkeys(configs)), prepare, source_of)


def _launches(shape: WeightShape, num_tokens: int, device: torch.device) -> list[Callable[[Any], object]]:
    """Return launches of products with other weights each."""
    kind = shape.kind
    assert isinstance(kind, Kind)
    dtype, k = kind.dtype, shape.k
    copies = num_copies(shape.num_rows * k * kind.bits // 8)
    weights = [_weight(kind, shape.num_rows, k, device) for _ in range(copies)]
    x = torch.randn(num_tokens, k, device=device).to(dtype)
    num_columns = shape.num_rows // 2 if shape.act else shape.num_rows
    residual = torch.zeros(num_tokens, num_columns, dtype=dtype, device=device) if shape.has_residual else None
    norm = _Norm(k, dtype, device) if shape.has_norm and (num_tokens == 1 or kind.form.inputs) else None

    def launch(weight: CudaQuantizedWeight, config: Any) -> None:
        kernel = {FewConfig: weight.few, SomeConfig: weight.some}.get(type(config), weight.many)
        kernel(x, norm, None, act=shape.act, residual=residual, config=config)

    launches: list[Callable[[Any], object]] = [functools.partial(launch, weight) for weight in weights]
    return launches * cdiv(MIN_LAUNCHES, copies)


def _weight(kind: Kind, num_rows: int, k: int, device: torch.device) -> CudaQuantizedWeight:
    form = replace(kind.form, has_order=False, has_input_scale=False)
    weight = QuantizedWeight([Part(num_rows)], k, kind.dtype, form)
    weight.materialize(device)
    weight.fill_random(torch.Generator(device).manual_seed(0))
    weight.settle()
    return CudaQuantizedWeight(weight)
