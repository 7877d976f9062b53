"""Products of weights with one token or a few, on a GPU: right, and how near to the memory's speed.

    python -m bench.gemm [--write]
    python -m bench.gemm --skinny [--write]

Every product of Llama-3-8B and Qwen3-0.6B in the fused form the model uses, in CUDA graphs over copies of the weights
that together exceed the L2 cache. First each configuration for one token, then whole layers with the best ones for one
to 128, beside cuBLAS. With --skinny instead the configurations for up to 16 and up to 32 tokens, each judged by the
time of whole layers: what a kernel takes alone says little of what it leaves to the next one, which begins while it
runs.
Prints what it finds as a table of `kernels/tuned`; --write puts it into this card's table.
"""

import argparse
import concurrent.futures
import functools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.roofline import ROTATION_BYTES, measure_roofline
from bench.tables import publish
from kernels import dense, elementwise, triton_gemm, triton_skinny
from kernels.dense import DenseWeight
from kernels.launch import compiling_ahead
from kernels.timing import graph_us
from kernels.triton_gemm import GemvConfig
from kernels.triton_skinny import SKINNY_CONFIGS, SkinnyConfig
from kernels.tuning import Fields, Key

EPS = 1e-5
COMPILE_LIMIT_S = 45


class Product(NamedTuple):
    """A weight [n, k] and what is fused to it: "norm", "add" (residual), "act" (norm and gated activation) or ""."""

    name: str
    n: int
    k: int
    fused: str

    @property
    def weight_bytes(self) -> int:
        return 2 * self.n * self.k

    @property
    def out_size(self) -> int:
        return self.n // 2 if self.fused == "act" else self.n


MODELS = {
    "Llama-3-8B": [
        Product("qkv", 6144, 4096, "norm"),
        Product("o", 4096, 4096, "add"),
        Product("gate_up", 28672, 4096, "act"),
        Product("down", 4096, 14336, "add"),
        Product("lm_head", 128256, 4096, ""),
    ],
    "Qwen3-0.6B": [
        Product("qkv", 4096, 1024, "norm"),
        Product("o", 1024, 2048, "add"),
        Product("gate_up", 6144, 1024, "act"),
        Product("down", 1024, 3072, "add"),
        Product("lm_head", 151936, 1024, ""),
    ],
}
PRODUCTS = [product for products in MODELS.values() for product in products]
# (block_n, warps, prefetch); block_k = 256 * warps
CANDIDATES = {
    1024: [(2, 4, 1), (4, 4, 1), (8, 4, 1), (2, 2, 2), (4, 2, 2), (8, 2, 2), (2, 1, 4), (4, 1, 4)],
    2048: [(1, 4, 2), (2, 4, 2), (4, 4, 2), (1, 8, 1), (2, 8, 1), (1, 2, 4), (2, 2, 4)],
    3072: [(1, 4, 3), (2, 4, 3), (4, 4, 3), (1, 2, 6), (2, 2, 6), (1, 4, 1), (4, 2, 6)],
    4096: [(2, 4, 4), (4, 4, 4), (4, 4, 2), (4, 4, 0), (8, 4, 1), (2, 8, 2), (4, 8, 2), (4, 2, 4)],
    14336: [(2, 4, 4), (4, 4, 4), (4, 4, 1), (2, 4, 2), (2, 8, 4), (4, 8, 4), (4, 8, 2), (8, 8, 1)],
}
# (block_n, block_k, warps, stages)
SKINNY_CANDIDATES = [
    (8, 128, 2, 4), (8, 128, 4, 3), (16, 64, 2, 6), (16, 64, 4, 4), (16, 64, 4, 6), (16, 128, 1, 3), (16, 128, 2, 3),
    (16, 128, 2, 4), (16, 128, 4, 3), (16, 128, 4, 4), (32, 64, 2, 4), (32, 64, 4, 3), (32, 128, 2, 3),
]  # fmt: skip
SKINNY_TOKENS = {16: 8, 32: 28}  # tokens at most -> tokens timed


def candidates(product: Product) -> list[GemvConfig]:
    found = [GemvConfig(n, 256 * warps, warps, prefetch) for n, warps, prefetch in CANDIDATES[product.k]]
    return [c for c in found if c.num_warps & (c.num_warps - 1) == 0]


class Inputs(NamedTuple):
    x: torch.Tensor
    norm_weight: torch.Tensor
    residual: torch.Tensor


def make_inputs(product: Product, num_tokens: int) -> Inputs:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").bfloat16()

    return Inputs(normal(num_tokens, product.k), normal(product.k), normal(num_tokens, product.out_size))


def make_weight(product: Product) -> torch.Tensor:
    return torch.empty(product.n, product.k, dtype=torch.bfloat16, device="cuda").normal_(0, product.k**-0.5)


def run_gemv(product: Product, inputs: Inputs, weight: torch.Tensor, config: GemvConfig | None) -> torch.Tensor:
    if product.fused == "add":
        return triton_gemm.gemv(inputs.x, weight, residual=inputs.residual, config=config)
    if product.fused == "":
        return triton_gemm.gemv(inputs.x, weight, config=config)
    act = "silu" if product.fused == "act" else None
    return triton_gemm.gemv(inputs.x, weight, norm_weight=inputs.norm_weight, eps=EPS, act=act, config=config)


def configured(product: Product, config: GemvConfig) -> Callable[[Inputs, torch.Tensor], torch.Tensor]:
    return lambda inputs, weight: run_gemv(product, inputs, weight, config)


def expected(product: Product, inputs: Inputs, weight: torch.Tensor) -> torch.Tensor:
    """Return the right product, in float32, from the same bf16 values."""
    x = inputs.x
    if product.fused in ("norm", "act"):
        x = elementwise.rms_norm_torch(x, inputs.norm_weight, EPS)
    out = x.float() @ weight.float().t()
    if product.fused == "act":
        out = elementwise.act_and_mul_torch(out, "silu")
    return out + inputs.residual.float() if product.fused == "add" else out


class Case(NamedTuple):
    product: Product
    num_tokens: int
    config: GemvConfig | None
    has_pdl: bool = True


def run_case(case: Case) -> float:
    """Compile and run once; return the largest error relative to the largest value."""
    torch.manual_seed(time.time_ns() % 2**31)
    inputs, weight = make_inputs(case.product, case.num_tokens), make_weight(case.product)
    right = expected(case.product, inputs, weight)
    with mock.patch.object(triton_gemm, "has_dependent_launch", lambda device: case.has_pdl):
        found = run_gemv(case.product, inputs, weight, case.config)
    return relative_error(found, right)


def relative_error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Return the largest error, as a share of the largest value."""
    return ((found.float() - right).abs().max() / right.abs().max()).item()


def compile_and_check(cases: list[Case]) -> set[Case]:
    """Return the cases that cannot run.

    They run in processes of their own, since compiling holds the interpreter's lock; Triton's cache then has their
    kernels.
    """
    start = time.perf_counter()
    num_workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    worst, num_done = 0.0, 0
    broken: set[Case] = set()
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"))
    futures = {pool.submit(run_case, case): case for case in cases}
    try:
        for future in concurrent.futures.as_completed(futures, timeout=COMPILE_LIMIT_S):
            case, exception = futures[future], future.exception()
            if exception is not None:
                broken.add(case)
                print(f"FAILED: {case}: {str(exception)[-500:]}")
                continue
            worst, num_done = max(worst, future.result()), num_done + 1
            if not future.result() < 0.01:
                broken.add(case)
                print(f"WRONG by {future.result():.3f}: {case}")
    except TimeoutError:
        print("compilation takes long: the rest is compiled where it is timed")
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"{num_done} kernels checked in {time.perf_counter() - start:.0f} s, largest relative error {worst:.4f}")
    return broken if num_done else set()  # none ran: processes may not share the GPU


def time_product(product: Product, num_tokens: int, run: Callable[[Inputs, torch.Tensor], torch.Tensor]) -> float:
    num_copies = max(1, math.ceil(ROTATION_BYTES / product.weight_bytes))
    weights = [make_weight(product) for _ in range(num_copies)]
    inputs = make_inputs(product, num_tokens)
    rounds = max(1, 16 // num_copies) if product.weight_bytes < 500 << 20 else 3
    return graph_us([functools.partial(run, inputs, weight) for weight in weights * rounds])


class RMSNorm:
    """A norm that products may fuse."""

    is_rms = True

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.eps = weight, EPS

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return elementwise.rms_norm(x, self.weight, self.eps)


def time_layers(products: list[Product], num_tokens: int, num_layers: int) -> float:
    """Return the microseconds of one layer's products, each fed by the one before; a fifth one follows them all."""
    qkv, o, gate_up, down, *last = products
    h = make_inputs(qkv, num_tokens).x
    norms = [RMSNorm(make_inputs(qkv, 1).norm_weight) for _ in range(2)]
    layers = [[DenseWeight.of(make_weight(part)) for part in (qkv, o, gate_up, down)] for _ in range(num_layers)]
    last_weights = [DenseWeight.of(make_weight(product)) for product in last]

    def step() -> None:
        nonlocal h
        for qkv_weight, o_weight, gate_up_weight, down_weight in layers:
            x = qkv_weight.product(h, norm=norms[0])[:, : o.k].contiguous()
            h = o_weight.product(x, residual=h, may_overwrite=True)
            gated = gate_up_weight.product(h, norm=norms[1], act="silu")
            h = down_weight.product(gated, residual=h, may_overwrite=True)
        for weight in last_weights:
            weight.product(h)

    return graph_us([step]) / num_layers


def no_few_gemm() -> Any:
    """Leave products of a few tokens to other kernels than `few_gemm`."""
    return mock.patch.object(dense, "can_few_gemm", lambda *_: False)


def run_skinny(
    product: Product, inputs: Inputs, weight: torch.Tensor, config: SkinnyConfig | None = None
) -> torch.Tensor:
    """Run the product without the norm, which is a kernel of its own there."""
    act = "silu" if product.fused == "act" else None
    residual = inputs.residual if product.fused == "add" else None
    return triton_skinny.skinny_gemm(inputs.x, weight, act=act, residual=residual, config=config)


def check_skinny() -> bool:
    errors = []
    for product in PRODUCTS:
        for num_tokens in (2, 16, 17, 32):
            inputs, weight = make_inputs(product, num_tokens), make_weight(product)
            normed = elementwise.rms_norm_torch(inputs.x, inputs.norm_weight, EPS)
            right = expected(product, inputs, weight)
            x = normed if product.fused in ("norm", "act") else inputs.x
            found = run_skinny(product, inputs._replace(x=x), weight)
            errors.append(relative_error(found, right))
    print(f"the skinny kernel for 2 to 32 tokens: largest relative error {max(errors):.4f}")
    return all(error < 0.01 for error in errors)  # not of one that is no number


def find_skinny_configs(products: list[Product], num_layers: int) -> dict[Key, Fields]:
    """Return the fastest configurations by shape: product by product, those before at their best."""
    device = torch.device("cuda", torch.cuda.current_device())
    best: dict[Key, Fields] = {}
    with compiling_ahead():
        for product in products:
            weight = make_weight(product)
            for max_tokens in SKINNY_TOKENS:
                inputs = make_inputs(product, max_tokens)
                for config in skinny_candidates(product):
                    run_skinny(product, inputs, weight, config)
    for max_tokens, num_tokens in SKINNY_TOKENS.items():
        print(
            f"# up to {max_tokens} tokens: {time_layers(products, num_tokens, num_layers):.1f} us a layer with these:"
        )
        for product in products:
            if product.fused == "act" and product.n * product.k > dense.SMALL_WEIGHT:
                continue  # `gated_gemm` has those
            key, timed = (product.n, product.k, max_tokens), []
            for config in skinny_candidates(product):
                SKINNY_CONFIGS.record(device, key, config)
                timed.append((time_layers(products, num_tokens, num_layers), config))
            timed.sort()
            SKINNY_CONFIGS.record(device, key, timed[0][1])
            best[key] = timed[0][1]._asdict()
            listed = ", ".join(f"{us:.1f} {tuple(config)[:4]}" for us, config in timed[:4])
            print(f"    {key} {product.name}: {listed}", flush=True)
    return best


def skinny_candidates(product: Product) -> list[SkinnyConfig]:
    configs = (SkinnyConfig(*candidate) for candidate in SKINNY_CANDIDATES)
    return [config for config in configs if product.k % (config.block_k * config.num_warps) == 0]


def num_layers_of(products: list[Product]) -> int:
    """Return a number of layers whose weights exceed the L2 cache."""
    return 6 if products[0].k == 4096 else 28


def check_capture_after_a_copy() -> None:
    """Check a dependent launch right behind a copy or memset node of a graph, and that replays give the same bits."""
    product = PRODUCTS[1]
    inputs, weight = make_inputs(product, 1), make_weight(product)
    source, right = torch.randn_like(inputs.residual), []
    graph = torch.cuda.CUDAGraph()
    run_gemv(product, inputs, weight, None)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        inputs.residual.copy_(source)
        scratch = torch.zeros_like(weight)
        out = run_gemv(product, inputs, weight, None)
    for _ in range(5):
        graph.replay()
        right.append(out.clone())
    fresh = Inputs(inputs.x, inputs.norm_weight, source.clone())
    error = (right[0].float() - expected(product, fresh, weight)).abs().max().item()
    is_same = all(torch.equal(right[0], other) for other in right)
    print(f"behind a copy in a graph: error {error:.4f}, replays equal: {is_same}")
    del scratch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skinny", action="store_true", help="the configurations for a few tokens")
    parser.add_argument("--write", action="store_true", help="put what is found into this card's shipped table")
    args = parser.parse_args()
    if args.skinny:
        found: dict[Key, Fields] = {}
        for model, products in MODELS.items():
            print(f"# {model}")
            with no_few_gemm():
                found |= find_skinny_configs(products, num_layers_of(products))
        publish({"skinny": found}, args.write)
        return
    start = time.perf_counter()
    cases = [Case(product, 1, config) for product in PRODUCTS for config in candidates(product)]
    cases += [Case(product, num_tokens, None) for product in PRODUCTS for num_tokens in (1, 2, 4)]
    broken = compile_and_check(cases)
    is_right = check_skinny() and not broken
    check_capture_after_a_copy()
    best = find_gemv_configs(broken)
    print_gemv_times(best)
    print_layer_times(deadline=start + 120)
    publish({"gemv": {(p.n, p.k): config._asdict() for p, (_, config) in best.items()}}, args.write)
    print(f"{time.perf_counter() - start:.0f} s in all")
    sys.exit(0 if is_right else 1)


def find_gemv_configs(broken: set[Case]) -> dict[Product, tuple[float, GemvConfig]]:
    """Return the fastest configuration of each product for one token and its microseconds; use it from now on."""
    print(f"\n{'':22s}{'n x k':>14s}  us of each (block_n, warps, prefetch)")
    device = torch.device("cuda", torch.cuda.current_device())
    best: dict[Product, tuple[float, GemvConfig]] = {}
    for model, products in MODELS.items():
        for product in products:
            timed = sorted(
                (time_product(product, 1, configured(product, config)), config)
                for config in candidates(product)
                if Case(product, 1, config) not in broken
            )
            best[product] = timed[0]
            listed = "  ".join(f"{us:.2f} ({c.block_n}, {c.num_warps}, {c.prefetch})" for us, c in timed)
            print(f"{model + ' ' + product.name:22s}{f'{product.n} x {product.k}':>14s}  {listed}", flush=True)
            triton_gemm.GEMV_CONFIGS.record(device, (product.n, product.k), timed[0][1])
    return best


def print_gemv_times(best: dict[Product, tuple[float, GemvConfig]]) -> None:
    """Print each product's best time for one token beside the roofline, no dependent launch and cuBLAS."""
    roofline = measure_roofline()
    print(f"\n{roofline}")
    columns = f"{'us':>9s}{'TB/s':>7s}{'of it':>7s}{'no PDL':>9s}{'cuBLAS (product alone)':>24s}"
    print(f"{'one token':22s}{'n x k':>14s}{columns}")
    for model, products in MODELS.items():
        for product in products:
            us, config = best[product]
            with mock.patch.object(triton_gemm, "has_dependent_launch", lambda device: False):
                alone = time_product(product, 1, configured(product, config))
            cublas = time_product(product, 1, lambda i, w: torch.nn.functional.linear(i.x, w))
            rate, share = product.weight_bytes / us / 1e6, roofline.share(us, product.weight_bytes)
            name, size = f"{model} {product.name}", f"{product.n} x {product.k}"
            print(f"{name:22s}{size:>14s}{us:9.2f}{rate:7.2f}{share:7.0%}{alone:9.2f}{cublas:24.2f}")


def print_layer_times(deadline: float) -> None:
    """Print the times of whole layers for one to 128 tokens beside cuBLAS's, of few more after `deadline`."""
    roofline = measure_roofline()
    print(f"\n{'layer, us':22s}{'tokens':>8s}{'ours':>9s}{'TB/s':>7s}{'of it':>7s}{'cuBLAS':>9s}")
    for model, products in MODELS.items():
        num_layers = num_layers_of(products)
        layer_bytes = sum(product.weight_bytes for product in products[:4])
        for num_tokens in (1, 2, 3, 4, 8, 16, 24, 32, 48, 64, 96, 128):
            ours = time_layers(products[:4], num_tokens, num_layers)
            no_gated_gemm = mock.patch.object(dense, "can_gated_gemm", lambda x, weight, act: False)
            no_kernels = mock.patch.multiple(dense, _is_gemv=lambda x, weight: False, SKINNY_MAX_TOKENS=0)
            with no_kernels, no_gated_gemm, no_few_gemm():
                cublas = time_layers(products[:4], num_tokens, num_layers)
            rate, share = layer_bytes / ours / 1e6, roofline.share(ours, layer_bytes)
            print(f"{model:22s}{num_tokens:>8d}{ours:9.1f}{rate:7.2f}{share:7.0%}{cublas:9.1f}", flush=True)
            if time.perf_counter() > deadline:
                break


if __name__ == "__main__":
    main()
