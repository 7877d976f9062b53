"""Multi-head latent attention on this GPU: right against the definition in float32, then timed.

    python -m bench.mla [--models v2-lite glm-4.7-flash] [--kv-cache-dtype fp8_e4m3] [--tune] [--write]

What is timed is a layer's attention from queries to values, the products with the latents' matrix included, in CUDA
graphs over copies of the cache that together exceed the L2 cache; its share of the roofline is that of the way that
takes less. Prompts are timed both ways, and single tokens beside FlashInfer's kernel, which leaves those products out.
--tune finds configurations for the models' shapes, and --write puts them into this card's table.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from bench.attention import Batch, make_batch
from bench.roofline import ROTATION_BYTES, Roofline, measure_roofline, stream_us
from bench.tables import publish
from kernels import flashinfer_attention
from kernels.latents import Expansion, LatentSizes
from kernels.launch import cdiv
from kernels.mla import latent_attention_torch
from kernels.timing import graph_us
from kernels.triton_mla import LATENT_DECODE_LIMITS, latent_attention_triton
from kernels.triton_tasks import latent_task
from kernels.tuning import Entries, LatentShape

MODELS = {  # heads, N, P, V, R
    "v2-lite": LatentShape(16, 128, 64, 128, 512),  # also V3 on one of eight ranks
    "v3": LatentShape(128, 128, 64, 128, 512),
    "glm-4.7-flash": LatentShape(20, 192, 64, 256, 512),
    "minicpm3": LatentShape(40, 64, 32, 64, 256),
}
KV_DTYPES = {"bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}
Lens = list[tuple[int, int]]
DECODES: dict[str, Lens] = {
    "1x1024": [(1, 1024)],
    "1x32768": [(1, 32768)],
    "16x4096": [(1, 4096)] * 16,
    "64x1024": [(1, 1024)] * 64,
    "256x1024": [(1, 1024)] * 256,
}
PROMPTS: dict[str, Lens] = {
    "1x128": [(128, 128)],
    "1x2048": [(2048, 2048)],
    "8x1024": [(1024, 1024)] * 8,
    "4x512 after 3584": [(512, 4096)] * 4,
    "1x64 after 32768": [(64, 32832)],
    "1x2048 after 32768": [(2048, 34816)],
}
CHECKED: Lens = [(1, 9), (1, 1), (1, 700), (1, 333), (70, 70), (50, 300), (400, 400), (2, 37)]
TOLERANCE = 0.03
FLASHINFER_DIMS = (512, 64)  # of latents and their rotated part, that it has a kernel for


class Work(NamedTuple):
    """Count the least work of attention."""

    num_bytes: float
    num_flops: float


def work_of(shape: LatentShape, lens: Lens) -> Work:
    """Return the bytes of latents and their matrix, and the operations of the way that takes less."""
    sizes = LatentSizes(shape.key_dim, shape.value_dim, shape.rank)
    num_bytes = sum(seq_len for _, seq_len in lens) * (shape.rank + shape.rope_dim) * shape.kv_dtype.itemsize
    num_bytes += 2 * shape.num_heads * (shape.key_dim + shape.value_dim) * shape.rank
    num_flops = 0.0
    for q_len, seq_len in lens:
        pairs = q_len * seq_len - q_len * (q_len - 1) / 2
        of_token, is_absorbed = shape.rank * (shape.key_dim + shape.value_dim), sizes.saved_by_absorbing(q_len, seq_len)
        of_pair = 2 * shape.rank if is_absorbed > 0 else shape.key_dim + shape.value_dim
        num_expanded = q_len if is_absorbed > 0 else seq_len
        num_flops += 2 * shape.num_heads * (pairs * (of_pair + shape.rope_dim) + num_expanded * of_token)
    return Work(num_bytes, num_flops)


class Problem:
    """A batch with random queries, and layers of a cache."""

    def __init__(
        self,
        shape: LatentShape,
        lens: Lens,
        num_layers: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
    ) -> None:
        self.shape, self.num_layers = shape, num_layers
        self.batch: Batch = make_batch(lens, device=device)
        sizes = LatentSizes(shape.key_dim, shape.value_dim, shape.rank)
        rows = shape.num_heads * (shape.key_dim + shape.value_dim)
        weight = torch.randn(rows, shape.rank, device=device).mul_(shape.rank**-0.5).to(dtype)
        self.expansion = Expansion(weight, shape.num_heads, sizes)
        num_tokens, width = int(self.batch.q_lens_host.sum()), shape.key_dim + shape.rope_dim
        self.q = torch.randn(num_tokens, shape.num_heads, width, device=device).to(dtype)
        slots = self.batch.slot_table.numel()
        cache = torch.empty(num_layers, slots, 1, shape.rank + shape.rope_dim, device=device, dtype=dtype)
        self.cache = cache.normal_().to(dtype if dtype == torch.float32 else shape.kv_dtype)
        self.scale = width**-0.5

    def run(self, layer: int = 0, batch: Batch | None = None) -> torch.Tensor:
        return latent_attention_triton(self.q, self.cache[layer], self.expansion, batch or self.batch, scale=self.scale)

    def twin(self) -> torch.Tensor:
        return latent_attention_torch(self.q, self.cache[0], self.expansion, self.batch, scale=self.scale)

    def difference(self, batch: Batch | None = None) -> float:
        """Return the largest difference of `run` from the definition in float32."""
        expansion = self.expansion._replace(weight=self.expansion.weight.float())
        wanted = latent_attention_torch(self.q.float(), self.cache[0].float(), expansion, self.batch, scale=self.scale)
        return (self.run(0, batch).float() - wanted).abs().nan_to_num(float("inf")).max().item()

    def time_us(self, batch: Batch | None = None) -> float:
        launches: list[Callable[[], object]] = [partial(self.run, layer, batch) for layer in range(self.num_layers)]
        return graph_us(launches * cdiv(4, self.num_layers))


def flashinfer_run(problem: Problem) -> Callable[[int], object]:
    """Return FlashInfer's attention of single tokens, planned: a function of the layer."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    shape, batch, device = problem.shape, problem.batch, problem.q.device
    n, rank = shape.key_dim, shape.rank
    indptr, slots = flashinfer_attention.kv_indices(batch, 0)
    workspace = torch.empty(flashinfer_attention.WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = BatchMLAPagedAttentionWrapper(workspace)
    wrapper.plan(
        batch.cu_q_lens, indptr.to(device), slots, batch.seq_lens, shape.num_heads, rank, shape.rope_dim, 1, False,
        problem.scale, problem.q.dtype, problem.cache.dtype,
    )  # fmt: skip
    absorbed = torch.randn(len(problem.q), shape.num_heads, rank, device=device).to(problem.q.dtype)
    rotated = problem.q[..., n:].contiguous()

    def run(layer: int) -> object:
        cache = problem.cache[layer]
        return wrapper.run(absorbed, rotated, cache[..., :rank], cache[..., rank:])

    return run


def num_copies(shape: LatentShape, lens: Lens) -> int:
    """Return how many layers of a cache are more than the L2 cache holds."""
    return max(1, cdiv(ROTATION_BYTES, int(work_of(shape, lens).num_bytes)))


def rows(name: str, shape: LatentShape, roofline: Roofline, has_flashinfer: bool) -> Iterator[str]:
    """Yield a line for each batch."""
    for batch_name, lens in (DECODES | PROMPTS).items():
        problem, work = Problem(shape, lens, num_copies(shape, lens)), work_of(shape, lens)
        us, twin_us = problem.time_us(), stream_us(problem.twin, 2)
        line = f"{name:14s}{batch_name:>20s}{us:10.1f}{roofline.share(us, *work):8.0%}{twin_us:10.1f}"
        if batch_name in PROMPTS:
            line += f"{problem.time_us(replace(problem.batch, is_for_graph=True)):10.1f}"
        elif has_flashinfer and (shape.rank, shape.rope_dim) == FLASHINFER_DIMS:
            run = flashinfer_run(problem)
            launches: list[Callable[[], object]] = [partial(run, layer) for layer in range(problem.num_layers)]
            flashinfer_us = graph_us(launches * 2)
            line += f"{'':10s}{flashinfer_us:12.1f}"
        yield line


def tuned(shapes: list[LatentShape]) -> Entries:
    """Return the fastest candidate of each kernel and shape."""
    device, entries = torch.device("cuda", torch.cuda.current_device()), Entries()
    for shape in dict.fromkeys(shapes):
        limits = [("decode", limit) for limit in LATENT_DECODE_LIMITS]
        for form, limit in [*limits, ("absorbed", 1), ("expanded", 1)]:
            task = latent_task(form, shape, limit, torch.bfloat16, device)
            launches, times = task.prepare(), dict[Any, float]()
            for config in task.candidates:
                times[config] = graph_us([partial(launch, config) for launch in launches], 5)
                print(f"{task.configs.kind} {task.key} {tuple(config)}: {times[config]:.1f} us", flush=True)
            best = min(times, key=times.__getitem__)
            entries.setdefault(task.configs.kind, {})[task.key] = best._asdict()
    return entries


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--kv-cache-dtype", default="bfloat16", choices=KV_DTYPES)
    parser.add_argument("--tune", action="store_true", help="also find configurations")
    parser.add_argument("--write", action="store_true", help="put what is found into this card's shipped table")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU")
        return 0
    shapes = {name: MODELS[name]._replace(kv_dtype=KV_DTYPES[args.kv_cache_dtype]) for name in args.models}
    is_right, roofline = True, measure_roofline()
    for name, shape in shapes.items():
        problem = Problem(shape, CHECKED)
        found = {
            "expanded": problem.difference(),
            "absorbed": problem.difference(replace(problem.batch, is_for_graph=True)),
        }
        is_right &= max(found.values()) < TOLERANCE
        print(name, *(f"{way} differs by {worst:.3g}" for way, worst in found.items()), flush=True)
    has_flashinfer, reason = flashinfer_attention.is_available()
    has_flashinfer &= args.kv_cache_dtype == "bfloat16"
    print(f"{reason}\n{roofline}\n{'':34s}{'us':>10s}{'of it':>8s}{'twin':>10s}{'absorbed':>10s}{'flashinfer':>12s}")
    for name, shape in shapes.items():
        for line in rows(name, shape, roofline, has_flashinfer):
            print(line, flush=True)
    if args.tune or args.write:
        publish(tuned(list(shapes.values())), args.write)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
