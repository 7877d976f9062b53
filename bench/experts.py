"""The kernels of a mixture of experts on a GPU: right, and how near to the roofline.

    python -m bench.experts [--limit 150] [--ep-size 1]

A layer by its parts: the router, gate and up, down, and the sum over a token's experts; of one token to a long prompt,
so that all three regimes are met: pairs one by one, small tiles of pairs sorted by expert, and large ones. Each part's
share is of what bounds it: the weights of the experts that the step's tokens have chosen, each once, or the products.
--ep-size: the first of so many ranks that share experts out.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from bench.roofline import ROTATION_BYTES, measure_roofline
from kernels.dense import DenseWeight
from kernels.elementwise import act_and_mul_torch
from kernels.experts import ExpertStack, combine
from kernels.quantized import QuantizedWeight
from kernels.quantized_format import Format
from kernels.routing import Routing, route, route_torch
from kernels.timing import graph_us
from kernels.weights import Part, Weight

TOKENS = (1, 4, 16, 64, 256, 2048, 8192)
FORMS = {
    "fp32": None,
    "bf16": None,
    "fp8": Format("fp8", 128),
    "mxfp4": Format("int4", 32, table="fp4", scale_dtype=torch.bfloat16),
}
ROUTERS = {
    "softmax, 8 of 128": Routing(128, 8),
    "sigmoid, 8 of 256 in 4 of 8 groups": Routing(
        256, 8, is_sigmoid=True, num_groups=8, topk_groups=4, group_score=2, factor=2.5
    ),
    "SparseMixer, 2 of 16": Routing(16, 2, margin=0.02),
}
MAX_DIFFERENCE, MAX_WIDE_DIFFERENCE = 0.02, 1e-5  # of the largest value; the second of float32


class Shape(NamedTuple):
    """The experts of a layer."""

    name: str
    num_experts: int
    top_k: int
    hidden: int
    inner: int
    form: str


SHAPES = (
    Shape("Qwen3-30B-A3B", 128, 8, 2048, 768, "bf16"),
    Shape("Qwen3-30B-A3B", 128, 8, 2048, 768, "fp8"),
    Shape("gpt-oss-20b", 32, 4, 2880, 2880, "mxfp4"),
    Shape("Mixtral 8x7B", 8, 2, 4096, 14336, "bf16"),
)


def new_stack(form: str, num_experts: int, n: int, k: int, num_on_all_ranks: int) -> ExpertStack:
    """Return random experts on the GPU, each a matrix [n, k]."""
    parts, how = [Part(n)] * num_experts, FORMS[form]
    dense = DenseWeight(parts, k, torch.float32 if form == "fp32" else torch.bfloat16)
    stack: Weight = dense if how is None else QuantizedWeight(parts, k, torch.bfloat16, how)
    stack.materialize(torch.device("cuda"))
    stack.fill_random(torch.Generator("cuda").manual_seed(0))
    return ExpertStack(stack, num_experts, num_on_all_ranks)


def bytes_of_expert(stack: ExpertStack) -> float:
    return sum(tensor.nbytes for _, tensor in stack.stack.tensors()) / stack.num_experts


def num_chosen(ids: torch.Tensor, num_experts: int) -> tuple[int, int]:
    """Return (experts of this rank that some token has chosen, pairs of a token and such an expert)."""
    own = ids[ids < num_experts]
    return len(own.unique()), own.numel()


def regime(by_expert: object) -> str:
    return "pairs" if by_expert is None else f"tiles of {by_expert.block_m}"  # type: ignore[attr-defined]


class Row(NamedTuple):
    name: str
    launches: list[Callable[[], object]]
    num_bytes: float
    num_flops: float


def rows_of(shape: Shape, num_tokens: int, gate_up: ExpertStack, down: ExpertStack) -> Iterator[Row]:
    """Yield a row a part. Launches differ in what they choose: the same experts again would be in the L2 cache."""
    held = range(gate_up.num_experts) if gate_up.num_experts < shape.num_experts else None
    x = torch.randn(num_tokens, shape.hidden, device="cuda").bfloat16()
    inner = torch.randn(num_tokens * shape.top_k, shape.inner, device="cuda").bfloat16()
    logits = [torch.randn(num_tokens, shape.num_experts, device="cuda") for _ in range(16)]
    routing = Routing(shape.num_experts, shape.top_k)
    chosen = [route(one, routing, held=held) for one in logits]
    first_ids, first_weights = chosen[0]
    yield Row("router", [partial(route, one, routing, None, held) for one in logits], logits[0].nbytes, 0)
    sorted_ids = [gate_up.sort(ids) for ids, _ in chosen]
    if hasattr(sorted_ids[0], "order"):
        yield Row("sort", [partial(gate_up.sort, ids) for ids, _ in chosen], first_ids.nbytes * 1.5, 0)
    experts, pairs = num_chosen(first_ids, gate_up.num_experts)
    for name, stack, act, source in (("gate, up", gate_up, "silu", x), ("down", down, None, inner)):
        n, k = (2 * shape.inner, shape.hidden) if act else (shape.hidden, shape.inner)
        num_bytes = experts * bytes_of_expert(stack) + source.nbytes + pairs * n * (1 if act else 2)
        launches: list[Callable[[], object]] = [
            partial(stack.products, source, ids, by_expert, act)
            for (ids, _), by_expert in zip(chosen, sorted_ids, strict=True)
        ]
        enough = max(2, min(16, int(2 * ROTATION_BYTES / num_bytes)))
        yield Row(f"{name}, {regime(sorted_ids[0])}", launches[:enough], num_bytes, 2.0 * pairs * n * k)
    products = torch.randn(num_tokens * shape.top_k, shape.hidden, device="cuda").bfloat16()
    add = partial(combine, products, first_weights, x, has_gaps=held is not None)
    yield Row("sum", [add] * 4, pairs * shape.hidden * 2 + 2 * x.nbytes, 0)


def check() -> list[str]:
    """Compare each router with its definition, and experts' products with one by one; return what differs."""
    wrong = []
    for name, routing in ROUTERS.items():
        logits = torch.randn(300, routing.num_experts, device="cuda")
        correction = torch.rand(routing.num_experts, device="cuda") if routing.is_sigmoid else None
        ids, weights = route(logits, routing, correction)
        wanted_ids, wanted = route_torch(logits, routing, correction)
        num_others = int((ids.sort(dim=1).values != wanted_ids.sort(dim=1).values).any(dim=1).sum())
        difference = float((weights.sum(dim=1) - wanted.sum(dim=1)).abs().max())
        print(f"{name}: {num_others} of 300 tokens have other experts, weights differ by {difference:.2g}")
        if num_others > 1 or difference > 1e-3:
            wrong.append(name)
    for form in FORMS:
        stack = new_stack(form, 16, 256, 512, 16)
        numbers = stack.stack.decoded() if isinstance(stack.stack, QuantizedWeight) else next(stack.stack.tensors())[1]
        bias = torch.randn(16 * 256, device="cuda").to(numbers.dtype)
        acts = (None,) if form == "fp32" else (None, "silu", "clamped_swiglu")
        down = new_stack(form, 16, 512, 128, 16)
        for num_tokens, act in product((1, 12, 40, 70, 100, 180, 240, 700), acts):
            x = torch.randn(num_tokens, 512, device="cuda").to(numbers.dtype)
            ids, _ = route(torch.randn(num_tokens, 16, device="cuda"), Routing(16, 4))
            by_expert = stack.sort(ids)
            inner = stack.products(x, ids, by_expert, act, bias)
            found = inner.view(num_tokens, 4, -1).float()
            if act is not None:
                handed_on = stack.products(x, ids, by_expert, act, bias, following=down)
                if not torch.equal(down.products(handed_on, ids, by_expert), down.products(inner, ids, by_expert)):
                    wrong.append(f"{form}, {num_tokens} tokens, {act}: down reads other inputs")
            wanted = torch.einsum("tk,tenk->ten", x.float(), numbers.float().view(16, 256, 512)[ids])
            wanted += bias.float().view(16, 256)[ids]
            if act is not None:
                wanted = act_and_mul_torch(wanted, act)
            difference = float((found - wanted).abs().max() / wanted.abs().max())
            print(f"{form}, {num_tokens} tokens, {act}: products differ by {difference:.2g} of the largest")
            if not difference <= (MAX_WIDE_DIFFERENCE if form == "fp32" else MAX_DIFFERENCE):
                wrong.append(f"{form}, {num_tokens} tokens, {act}: {difference:.2g}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=150.0, help="seconds after which nothing more is timed")
    parser.add_argument("--ep-size", type=int, default=1, help="ranks that share experts out")
    args = parser.parse_args()
    start = time.perf_counter()
    wrong = check()
    roofline = measure_roofline()
    print(f"\n{roofline}\n{'in a CUDA graph':48s}{'us':>9s}{'TB/s':>7s}{'TFLOP/s':>9s}{'of it':>7s}")
    for name, routing in ROUTERS.items():
        for num_tokens in (1, 256, 8192):
            logits = torch.randn(num_tokens, routing.num_experts, device="cuda")
            num_bytes = logits.nbytes + 12 * num_tokens * routing.top_k  # an id and a weight of each pair
            us = graph_us([partial(route, logits, routing)] * 10)
            share = roofline.share(us, num_bytes)
            print(f"{f'router, {name}, {num_tokens} tokens':48s}{us:9.2f}{num_bytes / us / 1e6:7.2f}{share:16.0%}")
    for shape in SHAPES:
        num_own = shape.num_experts // args.ep_size
        gate_up = new_stack(shape.form, num_own, 2 * shape.inner, shape.hidden, shape.num_experts)
        down = new_stack(shape.form, num_own, shape.hidden, shape.inner, shape.num_experts)
        for num_tokens in TOKENS:
            print(f"{shape.name}, {shape.form}, {num_tokens} tokens")
            total = 0.0
            for row in rows_of(shape, num_tokens, gate_up, down):
                if time.perf_counter() - start > args.limit:
                    sys.exit("out of time" + "".join(f"\nWRONG: {what}" for what in wrong))
                us = graph_us(row.launches, num_replays=10)
                total += us
                rate, flops = row.num_bytes / us / 1e6, row.num_flops / us / 1e6
                share = roofline.share(us, row.num_bytes, row.num_flops)
                print(f"  {row.name:46s}{us:9.2f}{rate:7.2f}{flops:9.1f}{share:7.0%}", flush=True)
            print(f"  {'together':46s}{total:9.2f}")
        del gate_up, down
    print(f"{time.perf_counter() - start:.0f} s in all")
    sys.exit("WRONG:\n" + "\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
