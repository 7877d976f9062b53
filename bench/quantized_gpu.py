"""Time a layer's products of weights of few bits on a GPU, each checked against its definition.

    python -m bench.quantized_gpu [--model llama3-8b] [--formats fp8 w4] [--tokens 1 16] [--search 20] [--table FILE]

Microseconds in CUDA graphs, of each product alone and of the layer's four one after another, as a decode step has them:
kernels load codes before the one ahead has ended, so a layer is not the sum of its parts. --search: for so many seconds
what is fastest alone is tried in the layer, and what is fastest there is printed; --table adds it to a file of such.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.shapes import SHAPES
from kernels import elementwise
from kernels.card import card_of
from kernels.hopper import ARCHITECTURE
from kernels.nvrtc import compile_source
from kernels.quantized import QuantizedWeight
from kernels.quantized_cuda import CudaQuantizedWeight
from kernels.quantized_few import FEW_CONFIGS, MOST_WARPS, FewConfig, source, token_tiles_of
from kernels.quantized_format import Format
from kernels.quantized_many import MANY_CONFIGS, ManyConfig, fitting, most_tokens_of
from kernels.quantized_many import source as source_of_many
from kernels.quantized_some import SOME_CONFIGS, SomeConfig, pieces_of
from kernels.quantized_some import fitting as fitting_some
from kernels.quantized_some import most_tokens_of as most_some_of
from kernels.quantized_some import source as source_of_some
from kernels.timing import graph_us
from kernels.tuning import Configs, write_table
from kernels.weights import Part

DTYPE = torch.bfloat16
DENSE = ("llama3-8b", "llama3-70b", "qwen2-7b", "qwen3-0.6b")
FORMATS = {"fp8": Format("fp8", inputs="fp8"), "w4": Format("int4", 128, has_zero=True, scale_dtype=torch.float16)}
TOTAL_BYTES = 240 << 20  # of the layers that take turns: more than an L2 cache holds
NUM_KEPT = 7  # configurations of a product that are tried in the layer
NUM_ROUNDS = 2  # of trying them
MIN_GAIN = 0.002
EPS = 1e-5
ONE = [
    (2, 1, 16, 1, 3), (2, 1, 16, 1, 4), (2, 1, 12, 1, 3), (2, 1, 12, 1, 4), (1, 1, 16, 1, 4), (1, 1, 16, 1, 8),
    (2, 1, 8, 1, 3), (2, 1, 8, 1, 4), (2, 1, 8, 1, 6), (2, 2, 4, 1, 4), (2, 4, 4, 1, 3), (4, 1, 8, 1, 2),
]  # fmt: skip
FEW = [
    (2, 2, 4, 1, 4), (2, 2, 4, 2, 4), (2, 4, 2, 2, 4), (2, 4, 2, 4, 4), (2, 4, 1, 4, 4), (2, 4, 1, 8, 4),
    (2, 8, 1, 4, 4), (2, 8, 1, 8, 4), (4, 2, 2, 4, 3), (4, 4, 1, 4, 3), (4, 4, 1, 8, 3), (1, 4, 2, 4, 6),
]  # fmt: skip
MANY = [(1, 8), (1, 12), (1, 16), (2, 4), (2, 6), (2, 8), (4, 4), (4, 6)]  # warpgroups and stages
SPLITS = (1, 2, 4, 8)
SOME = [(8, 4), (4, 6), (4, 4), (2, 6)]  # warps that share columns, and stages

Key = tuple[int, ...]


class RmsNorm:
    """Stand in for a layer's norm."""

    is_rms, eps = True, EPS

    def __init__(self, size: int, device: torch.device) -> None:
        self.weight = torch.ones(size, dtype=DTYPE, device=device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return elementwise.rms_norm(x, self.weight, self.eps)


class Product(NamedTuple):
    """One of a layer's products: what it reads, and what is fused to it."""

    name: str
    num_rows: int
    k: int
    act: str | None
    has_residual: bool


def products_of(config: dict[str, Any]) -> list[Product]:
    """Return the products of a dense layer of a model's config file."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    num_qkv = (heads + 2 * config["num_key_value_heads"]) * head_dim
    return [
        Product("qkv", num_qkv, hidden, None, False),
        Product("o", hidden, heads * head_dim, None, True),
        Product("gate_up", 2 * config["intermediate_size"], hidden, "silu", False),
        Product("down", hidden, config["intermediate_size"], None, True),
    ]


class Bench:
    """A model's layers in a format, and inputs for a number of tokens."""

    def __init__(self, products: Sequence[Product], form: Format, num_tokens: int, device: torch.device) -> None:
        self.products, self.num_tokens, self.device = products, num_tokens, device
        num_bytes = sum(product.num_rows * product.k for product in products) // form.codes_per_byte
        num_layers = max(2, -(-TOTAL_BYTES // num_bytes))
        self.layers = [[self._weight(product, form, seed) for product in products] for seed in range(num_layers)]
        self.inputs = {k: torch.randn(num_tokens, k, device=device).to(DTYPE) for k in {p.k for p in products}}
        self.residual = torch.zeros(num_tokens, products[1].num_rows, dtype=DTYPE, device=device)
        self.norms = {k: RmsNorm(k, device) for k in self.inputs}

    def _weight(self, product: Product, form: Format, seed: int) -> CudaQuantizedWeight:
        return CudaQuantizedWeight(self.definition(product, form, seed))

    def definition(self, product: Product, form: Format, seed: int) -> QuantizedWeight:
        weight = QuantizedWeight([Part(product.num_rows)], product.k, DTYPE, form)
        weight.materialize(self.device)
        weight.fill_random(torch.Generator(self.device).manual_seed(seed))
        return weight

    def multiply(self, product: Product, weight: Any) -> torch.Tensor:
        """Multiply as a layer does: the residual stream's norm goes in, or its sum comes out."""
        x = self.inputs[product.k]
        if product.has_residual:
            result: torch.Tensor = weight.product(x, residual=self.residual, may_overwrite=True)
            return result
        result = weight.product(x, norm=self.norms[product.k], act=product.act)
        return result

    def alone_us(self, index: int) -> float:
        launches: list[Callable[[], object]]
        launches = [functools.partial(self.multiply, self.products[index], layer[index]) for layer in self.layers]
        return graph_us(launches * max(1, 8 // len(launches)), num_replays=5)

    def layer_us(self) -> float:
        launches: list[Callable[[], object]] = [
            functools.partial(self.multiply, product, weight)
            for layer in self.layers
            for product, weight in zip(self.products, layer, strict=True)
        ]
        return len(self.products) * graph_us(launches, num_replays=10)

    def check(self, index: int, form: Format) -> None:
        """Exit if a product is not what its definition says."""
        product = self.products[index]
        self.residual.zero_()
        wanted = self.multiply(product, self.definition(product, form, 0)).float()
        self.residual.zero_()
        found = self.multiply(product, self.layers[0][index]).float()
        error = ((found - wanted).abs().max() / wanted.abs().max()).item()
        if not error < 2e-2:  # gate, up and their product are rounded three times, or once
            raise SystemExit(f"{product.name} is wrong by {error:.1e} of its largest result")


def configs_of(bench: Bench, index: int) -> tuple[Configs[Any], Key, list[Any]]:
    """Return the kernel that a product takes: its configurations, the shape's key in them, and candidates."""
    product, weight, num_tokens = bench.products[index], bench.layers[0][index], bench.num_tokens
    n, k, is_gated = product.num_rows, product.k, int(product.act is not None)
    kernel = weight._kernel(bench.inputs[k], product.act)
    if kernel == weight.few:
        token_tiles = token_tiles_of(num_tokens)
        few = [FewConfig(*c) for c in (FEW if token_tiles else ONE)]
        if not token_tiles:
            few = [c._replace(blocks=n) for c in few for n in ((1, 2) if c.warps_n * c.warps_k < MOST_WARPS else (1,))]
        fits = [c for c in few if c.split * c.warps_k * 64 <= k and not (is_gated and c.tiles % 2)]
        fits = [c for c in fits if c.tiles * max(token_tiles, 1) <= 16]
        return FEW_CONFIGS, (n, k, weight.kind.bits, token_tiles, is_gated), fits
    if kernel == weight.some:
        key = n, k, weight.kind.bits, most_some_of(num_tokens), is_gated
        now = SOME_CONFIGS.get(bench.device, *key)
        some = [
            fitting_some(SomeConfig(now.tiles * now.warps_n // warps_n, warps_n, warps_k, stages), weight.kind, key[3])
            for warps_n in range(1, 9)
            for warps_k, stages in SOME
            if now.tiles * now.warps_n % warps_n == 0 and warps_n * warps_k <= 16
        ]
        return SOME_CONFIGS, key, list(dict.fromkeys(some))
    most_tokens = most_tokens_of(num_tokens)
    many = [
        fitting(ManyConfig(most_tokens, warpgroups, stages, split), weight.kind, k)
        for warpgroups, stages in MANY
        for split in SPLITS
        if split * 512 <= k and not (is_gated and warpgroups == 1)
    ]
    return MANY_CONFIGS, (n, k, weight.kind.bits, most_tokens, is_gated), list(dict.fromkeys(many))


def compile_all(bench: Bench, spaces: Sequence[tuple[Configs[Any], Key, list[Any]]]) -> None:
    """Compile all candidates' kernels at once."""
    kind, token_tiles = bench.layers[0][0].kind, token_tiles_of(bench.num_tokens)
    sources: set[tuple[str, str, str]] = set()
    for configs, key, candidates in spaces:
        for config in candidates:
            if configs is SOME_CONFIGS:
                text = source_of_some(kind, config, key[3], pieces_of(kind, key[1], config))
                sources.add(("quantized_some", text, ARCHITECTURE))
            elif configs is FEW_CONFIGS:
                text = source(kind, token_tiles, config._replace(split=1, blocks=0))
                sources.add(("quantized_few", text, card_of(bench.device).architecture))
            else:
                sources.add(("quantized_many", source_of_many(kind, config._replace(split=1)), ARCHITECTURE))
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda each: compile_source(*each), sources))


def search(bench: Bench, seconds: float) -> Iterator[tuple[str, Key, Any]]:
    """Find the configurations with which a layer is fastest, use them, and yield (kernel, key, configuration)."""
    device, best, kept = bench.device, [], []
    spaces = [configs_of(bench, index) for index in range(len(bench.products))]
    compile_all(bench, spaces)
    deadline = time.perf_counter() + seconds
    for index, (configs, key, candidates) in enumerate(spaces):
        now, alone_us = configs.get(device, *key), functools.partial(bench.alone_us, index)
        times = {now: _time(configs, key, now, device, alone_us)}
        for config in candidates:
            if time.perf_counter() < deadline:
                times[config] = _time(configs, key, config, device, alone_us)
        kept.append(sorted(times, key=times.__getitem__)[:NUM_KEPT])
        best.append(now)
        configs.record(device, key, now)
    least = bench.layer_us()
    for _ in range(NUM_ROUNDS):
        for index, (configs, key, _) in enumerate(spaces):
            for config in kept[index]:
                if config != best[index] and time.perf_counter() < deadline:
                    us = _time(configs, key, config, device, bench.layer_us)
                    if us < least * (1 - MIN_GAIN):
                        least, best[index] = us, config
            configs.record(device, key, best[index])
    yield from ((configs.kind, key, config) for (configs, key, _), config in zip(spaces, best, strict=True))


def _time(configs: Configs[Any], key: Key, config: Any, device: torch.device, time_us: Callable[[], float]) -> float:
    """Return the microseconds with a configuration; infinite for one that a multiprocessor has no room for."""
    configs.record(device, key, config)
    try:
        return time_us()
    except RuntimeError as error:
        print(f"{configs.kind} {key} {tuple(config)}: {error}")
        return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3-8b", choices=DENSE)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--search", type=float, default=0.0, help="seconds, of each format and number of tokens")
    parser.add_argument("--table", type=Path, help="where what is found goes")
    args = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    found: dict[str, dict[Key, dict[str, int]]] = {}
    for name in args.formats:
        for num_tokens in args.tokens:
            bench = Bench(products_of(SHAPES[args.model]), FORMATS[name], num_tokens, device)
            before = bench.layer_us()
            for kind, key, config in search(bench, args.search) if args.search else ():
                found.setdefault(kind, {})[key] = config._asdict()
                print(f"  {kind} {key}: {tuple(config)}")
            for index in range(len(bench.products)):
                bench.check(index, FORMATS[name])
            alone = ", ".join(f"{p.name} {bench.alone_us(i):.1f}" for i, p in enumerate(bench.products))
            now = bench.layer_us()
            print(
                f"{args.model} {name}, {num_tokens} tokens: {before:.1f} us a layer, now {now:.1f}; {alone}", flush=True
            )
    if args.table:
        write_table(args.table, [card_of(device).name], found)


if __name__ == "__main__":
    main()
