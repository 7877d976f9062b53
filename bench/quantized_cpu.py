"""Time products of weights of few bits on a CPU, each checked against its definition, beside those of bfloat16.

    python -m bench.quantized_cpu [--shape 3072 576] [--tokens 1 8 64 512] [--formats q4_1 q8_0] [--march haswell]

Of one thread, in its CPU time, so that what else the machine does matters little: the least of several runs over
weights that do not fit the caches together, GB/s of codes, scales and zeros read, GFLOP/s.
"""

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table

from kernels.dense import DenseWeight
from kernels.products_cpu import load_kernels
from kernels.quantized import Format, QuantizedWeight
from kernels.quantized_cpu import CpuQuantizedWeight
from kernels.weights import Part, Weight

HALF = torch.float16
FORMATS = {
    "q4_0": Format("int4", 32, scale_dtype=HALF),
    "q4_1": Format("int4", 32, has_minimum=True, scale_dtype=HALF),
    "q8_0": Format("int8", 32, scale_dtype=HALF),
    "q6_k": Format("int8", 16),
    "awq": Format("int4", 128, has_zero=True, scale_dtype=HALF),
    "nf4": Format("int4", 64, table="nf4"),
    "mxfp4": Format("int4", 32, table="fp4"),
    "int8": Format("int8"),
    "fp8": Format("fp8", 128),
}
TOTAL_BYTES = 64 << 20  # of the weights that take turns
RUN_S = 0.5


def make_weight(form: Format, n: int, k: int, dtype: torch.dtype) -> QuantizedWeight:
    weight = QuantizedWeight([Part(n)], k, dtype, form)
    weight.materialize(torch.device("cpu"))
    weight.fill_random(torch.Generator().manual_seed(0))
    return weight


def check(weight: QuantizedWeight, packed: Weight) -> None:
    """Assert that `packed` multiplies as its definition does, summed in float64."""
    x = torch.randn(33, weight.k, generator=torch.Generator().manual_seed(1)).to(weight.dtype)
    wanted = x.double() @ weight.dequantized().double().t()
    for num_tokens in (1, 5, 33):
        error = (packed.logits(x[:num_tokens]) - wanted[:num_tokens]).abs().max() / wanted.abs().max()
        if error > 1e-5:
            raise SystemExit(f"{weight.form}: wrong by {error:.1e} of the largest result")


def least_s(function: Callable[[int], object]) -> float:
    """Return the least CPU time of calls of `function`, which gets their number."""
    function(0)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - start < RUN_S:
        before = time.thread_time()
        function(len(times))
        times.append(time.thread_time() - before)
    return min(times)


def measure(weights: Sequence[Weight], num_tokens: int, dtype: torch.dtype) -> str:
    x = torch.randn(num_tokens, weights[0].k).to(dtype)
    seconds = least_s(lambda i: weights[i % len(weights)].product(x))
    read = sum(tensor.nbytes for _, tensor in weights[0].tensors())
    flops = 2 * num_tokens * weights[0].n * weights[0].k
    return f"{1e6 * seconds:,.0f} ({read / seconds / 1e9:.1f}, {flops / seconds / 1e9:.0f})"


def cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        return next((line.partition(": ")[2].strip() for line in file if line.startswith("model name")), "a CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[3072, 576], metavar=("N", "K"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--march", default="native", help="the CPU to compile for, in the words of GCC")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype, (n, k) = getattr(torch, args.dtype), args.shape
    kernels = load_kernels(args.march)
    if kernels is None:
        raise SystemExit("no C++ compiler here")
    table = Table("", *(f"{num_tokens} tokens" for num_tokens in args.tokens))
    for name in args.formats:
        plain = make_weight(FORMATS[name], n, k, dtype)
        check(plain, CpuQuantizedWeight(plain, kernels))
        count = max(1, TOTAL_BYTES // plain.codes.nbytes)
        weights = [CpuQuantizedWeight(make_weight(FORMATS[name], n, k, dtype), kernels) for _ in range(count)]
        table.add_row(name, *(measure(weights, num_tokens, dtype) for num_tokens in args.tokens))
    data = [torch.randn(n, k).to(dtype) for _ in range(max(1, TOTAL_BYTES // (n * k * dtype.itemsize)))]
    dense = [DenseWeight.of(tensor).pack() for tensor in data]
    table.add_row(f"{args.dtype} weights", *(measure(dense, num_tokens, dtype) for num_tokens in args.tokens))
    units = f"vectors of {kernels.lanes}" + (" and AMX" if kernels.has_tiles else "")
    Console().print(f"{cpu_name()}, {units}, one thread; {n} x {k}, inputs of {args.dtype}: µs (GB/s, GFLOP/s)", table)


if __name__ == "__main__":
    main()
