"""Attention kernels on this GPU: right against the definition in float32, then timed for every candidate setting.

    python -m bench.attention [--limit 90] [--parts check,decode,prefill,shared,flashinfer] [--head-dim 128] [--write]

Kernels are compiled by a pool of processes first. Times are of launches inside a CUDA graph that goes through the
layers of a cache larger than the L2 cache, with slots scattered (page size 1); those of the definition in torch, which
no graph can hold, are on a stream. The last table has the best setting of each shape, beside FlashInfer's time; then
come the best settings as a table of `kernels/tuned`, which --write puts into this card's. Ends by itself after --limit
seconds, with what it has.
"""

import argparse
import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from triton.runtime.errors import OutOfResources

from bench.roofline import measure_roofline, stream_us
from bench.tables import publish
from engine.layers.forward_batch import SharedPrefixes
from kernels import flashinfer_attention, hopper_prefill
from kernels.attention import attention_torch
from kernels.attention_batch import AttentionBatch
from kernels.hopper import is_available
from kernels.timing import elapsed_us
from kernels.triton_attention import attention_triton
from kernels.triton_decode import DECODE_LIMITS, decode, decode_limit
from kernels.triton_prefill import prefill
from kernels.triton_softmax import DecodeConfig, PrefillConfig
from kernels.tuning import Entries

PARTS = ("check", "decode", "prefill", "shared", "flashinfer")
NUM_COMPILERS = 12
COMPILE_LIMIT_S = 45.0
MIN_CACHE_BYTES = 128 << 20  # a few times the L2 cache


@dataclass(frozen=True)
class Heads:
    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


LLAMA_8B = Heads("8b", 32, 8, 128)
QWEN_06B = Heads("0.6b", 16, 8, 128)
HEADS = {  # head_dim -> those that are timed; shapes of the second are left out where there is none
    64: (Heads("llama-3.2-1b", 32, 8, 64),),
    128: (LLAMA_8B, QWEN_06B),
    256: (Heads("gemma-2-9b", 16, 8, 256),),
    512: (Heads("gemma-4 global", 16, 2, 512),),
}

DECODE_KERNELS = {  # (block_n, num_warps, num_stages): programs on an SM
    (32, 4, 3): (6, 4, 3, 1),
    (32, 4, 4): (4, 3, 2, 1),
    (32, 4, 5): (3, 2),
    (32, 2, 4): (6, 4, 3),
    (32, 1, 2): (8,),
    (32, 1, 4): (4, 2),
    (64, 2, 3): (4, 3),
    (64, 4, 2): (5, 4, 3),
    (64, 4, 3): (3, 2, 1),
    (64, 4, 4): (2, 1),
    (64, 8, 3): (3, 2),
    (128, 8, 2): (3, 2),
}
DECODE_CONFIGS = [
    *(DecodeConfig(*kernel, count) for kernel, counts in DECODE_KERNELS.items() for count in counts),
    *(DecodeConfig(*kernel, count, True) for kernel in ((32, 4, 4), (64, 4, 3)) for count in (1, 3)),
]
DECODE_SHAPES: list[tuple[str, int, list[int]]] = [  # name, which of `HEADS`, lengths
    ("1x1024", 0, [1024]),
    ("1x8192", 0, [8192]),
    ("8x1024", 0, [1024] * 8),
    ("64x1024", 0, [1024] * 64),
    ("256x256", 0, [256] * 256),
    ("256x1024", 0, [1024] * 256),
    ("128x64..2048", 0, np.random.default_rng(0).integers(64, 2048, 128).tolist()),
    ("0.6b 256x256", 1, [256] * 256),
]
PREFILL_CONFIGS = [
    PrefillConfig(128, 64, 8, 2),
    PrefillConfig(128, 64, 8, 3),
    PrefillConfig(128, 128, 8, 2),
    PrefillConfig(128, 32, 8, 4),
    PrefillConfig(64, 64, 4, 2),
    PrefillConfig(64, 64, 4, 3),
    PrefillConfig(64, 32, 4, 3),
    PrefillConfig(64, 32, 4, 4),
]
PREFILL_SHAPES: list[tuple[str, int, list[tuple[int, int]]]] = [
    ("8x1024", 0, [(1024, 1024)] * 8),
    ("1x2048", 0, [(2048, 2048)]),
    ("1x128", 0, [(128, 128)]),
    ("4x512 after 3584", 0, [(512, 4096)] * 4),
    ("0.6b 8x1024", 1, [(1024, 1024)] * 8),
]
PREFIX_CONFIGS = [
    PrefillConfig(64, 64, 4, 2),
    PrefillConfig(64, 64, 4, 3),
    PrefillConfig(128, 64, 8, 2),
    PrefillConfig(128, 64, 8, 3),
    PrefillConfig(128, 128, 8, 2),
]
PREFIX_SPLITS = (1, 2, 4, 8, 16)
OTHERS = ("twin", "flashinfer", "ungrouped", "own slots")  # settings that are not the kernel's own
SHARED_SHAPES = {  # sizes of groups with 4096 tokens in common and 192 of each request's own
    "8 groups of 32": (32,) * 8,
    "1 group of 40": (40,),
    "1 group of 128": (128,),
    "32 groups of 2": (2,) * 32,
}


@dataclass
class Batch:
    """Requests of a step, as `kernels.attention_batch.AttentionBatch`."""

    rows: torch.Tensor
    seq_lens: torch.Tensor
    cu_q_lens: torch.Tensor
    slot_table: torch.Tensor
    num_decodes: int
    q_lens_host: np.ndarray
    seq_lens_host: np.ndarray
    slot_map: torch.Tensor | None = None
    seen_until: torch.Tensor | None = None
    shared: SharedPrefixes | None = None
    is_for_graph: bool = False


def make_batch(
    lens: list[tuple[int, int]],
    groups: list[tuple[int, list[int]]] | None = None,
    seed: int | None = None,
    device: str = "cuda",
) -> Batch:
    """Make requests of (q_len, seq_len), their slots scattered; groups of (shared tokens, members) share theirs."""
    rng = np.random.default_rng(seed)
    q_lens, seq_lens = (np.array(column, np.int64) for column in zip(*lens, strict=True))
    num_requests, num_rows, max_len = len(lens), len(lens) + 3, int(seq_lens.max()) + 5
    table = rng.permutation(num_rows * max_len).reshape(num_rows, max_len).astype(np.int32)
    rows = rng.permutation(num_rows)[:num_requests].astype(np.int32)

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    shared = None
    if groups is not None:
        num_groups = max(num_requests // 2, len(groups))  # as a step has them: most are unused
        prefix_lens, sizes = np.zeros((2, num_groups), np.int32)
        all_members, own_starts = np.zeros((2, num_requests), np.int32)
        num_members = 0
        for i, (prefix_len, members) in enumerate(groups):
            prefix_lens[i], sizes[i] = prefix_len, len(members)
            all_members[num_members : num_members + len(members)] = members
            num_members += len(members)
            own_starts[members] = prefix_len
            table[rows[members], :prefix_len] = table[rows[members[0]], :prefix_len]
        cu_members = np.cumsum([0, *sizes], dtype=np.int32)
        shared = SharedPrefixes(*map(on_device, (prefix_lens, cu_members, all_members, own_starts)))
    return Batch(
        rows=on_device(rows),
        seq_lens=on_device(seq_lens.astype(np.int32)),
        cu_q_lens=on_device(np.cumsum([0, *q_lens], dtype=np.int32)),
        slot_table=on_device(table),
        num_decodes=int((q_lens == 1).sum()),
        q_lens_host=q_lens,
        seq_lens_host=seq_lens,
        shared=shared,
    )


def random_groups(sizes: tuple[int, ...], prefix_len: int) -> list[tuple[int, list[int]]]:
    """Make groups of those sizes that the first sum(sizes) requests are in, at random."""
    members = iter(np.random.default_rng().permutation(sum(sizes)).tolist())
    return [(prefix_len, list(itertools.islice(members, size))) for size in sizes]


class Problem:
    """A batch with random queries [T, H, D] and a cache [L, 2, num_slots, Hkv, D]."""

    def __init__(
        self, batch: Batch, heads: Heads, num_layers: int = 1, dtype: torch.dtype = torch.bfloat16, options: Any = None
    ) -> None:
        self.batch, self.num_layers = batch, num_layers
        num_tokens, num_slots = int(batch.q_lens_host.sum()), batch.slot_table.numel()
        self.q = torch.randn(num_tokens, heads.num_heads, heads.head_dim, device="cuda").to(dtype)
        shape = (num_layers, 2, num_slots, heads.num_kv_heads, heads.head_dim)
        self.cache = torch.empty(shape, dtype=dtype, device="cuda").normal_()
        self.out = torch.empty_like(self.q)
        self.options = {"scale": heads.head_dim**-0.5, **(options or {})}

    def decode(self, layer: int = 0, **settings: Any) -> None:
        k, v = self.cache[layer]
        decode(self.q, k, v, self.batch, self.out, **self.options, **settings)

    def prefill(self, layer: int = 0, **settings: Any) -> None:
        k, v = self.cache[layer]
        prefill(self.q, k, v, self.batch, self.out, **self.options, **settings)

    def prefill_hopper(self, layer: int = 0) -> None:
        k, v = self.cache[layer]
        hopper_prefill.prefill(self.q, k, v, self.batch, self.out, **self.options)

    def twin(self) -> None:
        k, v = self.cache[0]
        attention_torch(self.q, k, v, self.batch, **self.options)

    def difference(self) -> float:
        """Return the largest difference of `out` from the definition in float32."""
        k, v = self.cache[0].float()
        expected = attention_torch(self.q.float(), k, v, self.batch, **self.options)
        return (self.out.float() - expected).abs().nan_to_num(float("inf")).max().item()


# ---- right? ----


@dataclass(frozen=True)
class Check:
    heads: Heads = LLAMA_8B
    lens: tuple[tuple[int, int], ...] = (
        (1, 9), (1, 1), (1, 700), (1, 333), (1, 64), (70, 70), (50, 300), (400, 400), (2, 37),
    )  # fmt: skip
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    group_sizes: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 0.03


GROUPED = (*[(1, 600)] * 24, (1, 700), (1, 20))
CHECKS = {
    "bf16": Check(),
    "fp16": Check(dtype=torch.float16, tolerance=0.004),
    "fp32": Check(dtype=torch.float32, tolerance=1e-4),
    "fp8": Check(kv_dtype=torch.float8_e4m3fn),
    "window": Check(options={"window": 100}),
    "softcap": Check(options={"softcap": 5.0}),
    "9 heads of 64": Check(Heads("", 9, 3, 64)),
    "8 heads of 80": Check(Heads("", 8, 8, 80)),
    "8 heads of 256": Check(Heads("", 8, 4, 256)),
    "0.6b": Check(QWEN_06B),
    "shared": Check(lens=(*GROUPED, (40, 90)), group_sizes=(18, 4, 2)),
    "shared, window": Check(lens=GROUPED, group_sizes=(18, 4, 2), options={"window": 300}),
    "128 requests": Check(lens=((1, 77),) * 128),
}


def run_check(name: str) -> float:
    """Return the largest difference of a fresh random batch from the definition in float32."""
    case = CHECKS[name]
    batch = make_batch(list(case.lens), random_groups(case.group_sizes, 400) if case.group_sizes else None)
    problem = Problem(batch, case.heads, 1, case.dtype, case.options)
    if case.kv_dtype is not None:
        problem.cache = problem.cache.to(case.kv_dtype)
    k, v = problem.cache[0]
    worst = 0.0
    for _ in range(3):  # again with the arrival counters that the run before left
        problem.out = attention_triton(problem.q, k, v, batch, **problem.options)
        worst = max(worst, problem.difference())
    return worst


def compile_decode(heads: Heads, num_requests: int, config: DecodeConfig) -> float:
    """Compile by running on a small batch; return the largest difference."""
    problem = Problem(make_batch([(1, 300)] * num_requests), heads)
    problem.decode(config=config)
    return problem.difference()


def compile_prefill(heads: Heads, config: PrefillConfig) -> float:
    problem = Problem(make_batch([(200, 300)]), heads)
    problem.prefill(config=config)
    return problem.difference()


def compile_shared(heads: Heads, config: PrefillConfig) -> float:
    problem = Problem(make_batch([(1, 500)] * 64, random_groups((50, 10, 2), 300)), heads)
    problem.decode(prefix_config=config)
    return problem.difference()


# ---- how fast? ----


def time_us(launch: Callable[[int], None], num_layers: int) -> float:
    """Return the microseconds of `launch(layer)` in a CUDA graph of many."""
    num_launches = max(8, num_layers)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(num_launches):
            launch(i % num_layers)

    def replay(count: int) -> float:
        return elapsed_us(graph.replay, count) / num_launches

    replay(1)
    count = int(max(2, min(30, 10e3 / (replay(1) * num_launches))))
    return min(replay(count) for _ in range(2))


@dataclass
class Results:
    """Rows of a table: shape -> (setting -> µs), and what each shape reads, or computes if that takes longer."""

    times: dict[str, dict[str, float]] = field(default_factory=dict)
    num_bytes: dict[str, float] = field(default_factory=dict)
    num_flops: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def add(self, shape: str, setting: str, launch: Callable[[int], None], num_layers: int) -> None:
        self.add_timed(shape, setting, lambda: time_us(launch, num_layers))

    def add_timed(self, shape: str, setting: str, measure: Callable[[], float]) -> None:
        try:
            us = measure()
        except OutOfResources:
            return  # too large for the head_dim
        except Exception as error:  # noqa: BLE001 - a setting that does not run is a result
            torch.cuda.synchronize()
            self.errors[setting] = f"{type(error).__name__}: {str(error)[:120]}"
            return
        self.times.setdefault(shape, {})[setting] = us

    def print_all(self, title: str) -> None:
        shapes = list(self.times)
        print(f"\n{title}, µs\n{'':28}" + "".join(f"{shape:>18}" for shape in shapes))
        for setting in dict.fromkeys(setting for row in self.times.values() for setting in row):
            cells = (self.times[shape].get(setting) for shape in shapes)
            print(f"{setting:28}" + "".join(f"{'' if us is None else f'{us:.1f}':>18}" for us in cells))

    def print_best(self) -> None:
        for shape, row in self.times.items():
            ours = {setting: us for setting, us in row.items() if setting not in OTHERS} or row
            ranked = sorted(ours.items(), key=lambda item: item[1])[:3]
            num_bytes, num_flops = self.num_bytes.get(shape, 0.0), self.num_flops.get(shape, 0.0)
            best = "   ".join(f"{setting} {us:.1f}" for setting, us in ranked)
            others = [f"{name} {us:.1f}" for name, us in row.items() if name in OTHERS]
            us = ranked[0][1]
            rate = f"{num_flops / us / 1e6:7.1f} TFLOP/s" if num_flops else f"{num_bytes / us / 1e6:7.2f} TB/s   "
            share = measure_roofline().share(us, num_bytes, num_flops)
            print(f"{shape:20} {rate} {share:4.0%} of the roofline, µs: {best}   {'; '.join(others)}")


def kv_bytes(heads: Heads, num_tokens: int) -> int:
    return num_tokens * 2 * heads.num_kv_heads * heads.head_dim * 2


def attention_flops(heads: Heads, lens: list[tuple[int, int]]) -> int:
    """Return the operations of the pairs that see each other; lens are (q_len, seq_len)."""
    pairs = sum(q_len * seq_len - q_len * (q_len - 1) // 2 for q_len, seq_len in lens)
    return 4 * pairs * heads.num_heads * heads.head_dim


def name_of(config: DecodeConfig | PrefillConfig) -> str:
    return ",".join(str(int(value)) for value in config)


def bench_decode(results: Results, head_dim: int, with_flashinfer: bool) -> None:
    for shape, which, lens in DECODE_SHAPES:
        if which >= len(HEADS[head_dim]):
            continue
        heads = HEADS[head_dim][which]
        amount = kv_bytes(heads, sum(lens))
        results.num_bytes[shape] = amount
        problem = Problem(make_batch([(1, seq_len) for seq_len in lens]), heads, -(-MIN_CACHE_BYTES // amount))
        if with_flashinfer:
            plan = DecodePlan(len(lens), sum(lens), problem.q.device)
            plan.plan(problem.batch, flashinfer_shape(heads))
            results.add(shape, "flashinfer", partial(run_decode_plan, plan, problem), problem.num_layers)
            continue
        for config in DECODE_CONFIGS:
            results.add(shape, name_of(config), partial(problem.decode, config=config), problem.num_layers)
        results.add_timed(shape, "twin", partial(stream_us, problem.twin))


class DecodePlan:
    """FlashInfer's tensor-core decode of `num_requests` single tokens.

    `run` can be captured in a CUDA graph: its inputs lie in fixed buffers, and `plan` refills them before a replay.
    """

    def __init__(self, num_requests: int, max_total_tokens: int, device: torch.device) -> None:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        self.wrapper = BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(flashinfer_attention.WORKSPACE_BYTES, dtype=torch.uint8, device=device),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=torch.empty(num_requests + 1, dtype=torch.int32, device=device),
            paged_kv_indices_buffer=torch.empty(max_total_tokens, dtype=torch.int32, device=device),
            paged_kv_last_page_len_buffer=torch.empty(num_requests, dtype=torch.int32, device=device),
        )

    def plan(self, batch: AttentionBatch, shape: flashinfer_attention.PlanShape) -> None:
        """Plan a batch of single tokens only. Takes 0.2 to 0.9 ms of the host's time."""
        indptr, slots = flashinfer_attention.kv_indices(batch, 0)
        last_page_lens = torch.ones(len(indptr) - 1, dtype=torch.int32)
        self.wrapper.plan(indptr, slots, last_page_lens, head_dim=shape.head_dim, **shape.arguments())

    def run(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor) -> None:
        self.wrapper.run(q, (k_cache[:, None], v_cache[:, None]), out=out)


def run_decode_plan(plan: DecodePlan, problem: Problem, layer: int) -> None:
    k, v = problem.cache[layer]
    plan.run(problem.q, k, v, problem.out)


def bench_prefill(results: Results, head_dim: int, with_flashinfer: bool) -> None:
    for shape, which, lens in PREFILL_SHAPES:
        if which >= len(HEADS[head_dim]):
            continue
        heads = HEADS[head_dim][which]
        results.num_flops[shape] = attention_flops(heads, lens)
        problem = Problem(make_batch(lens), heads)
        if with_flashinfer:
            plans = flashinfer_attention.PrefillPlans(problem.q.device)
            wrapper = plans.wrapper_for(problem.batch, flashinfer_shape(heads))
            results.add(shape, "flashinfer", partial(run_prefill_plan, wrapper, problem), 1)
            continue
        for config in PREFILL_CONFIGS:
            results.add(shape, name_of(config), partial(problem.prefill, config=config), 1)
        if is_available(problem.q.device) and head_dim in hopper_prefill.KEYS:
            results.add(shape, "hopper", problem.prefill_hopper, 1)
        results.add_timed(shape, "twin", partial(stream_us, problem.twin))


def run_prefill_plan(wrapper: Any, problem: Problem, layer: int) -> None:
    wrapper.run(problem.q, tuple(x[:, None] for x in problem.cache[layer]), out=problem.out)


def bench_shared(results: Results, head_dim: int) -> None:
    heads = HEADS[head_dim][0]
    for shape, group_sizes in SHARED_SHAPES.items():
        problem = Problem(make_batch([(1, 4096 + 192)] * sum(group_sizes), random_groups(group_sizes, 4096)), heads)
        results.num_bytes[shape] = kv_bytes(heads, len(group_sizes) * 4096 + sum(group_sizes) * 192)
        for config in PREFIX_CONFIGS:
            for num_splits in PREFIX_SPLITS:
                launch = partial(problem.decode, prefix_config=config, num_prefix_splits=num_splits)
                results.add(shape, f"{name_of(config)} / {num_splits}", launch, 1)
        results.add_timed(shape, "twin", partial(stream_us, problem.twin))
        problem.batch.shared = None
        results.add(shape, "ungrouped", problem.decode, 1)


def bench_shared_prompts(results: Results, head_dim: int) -> None:
    """Measure how prompts gain from a shared prefix, whose keys and values come from the L2 cache."""
    heads = HEADS[head_dim][0]
    for num_prompts, q_len in ((32, 128), (64, 16), (64, 4)):
        shape, lens = f"{num_prompts}x{q_len} after 4096", [(q_len, 4096 + q_len)] * num_prompts
        results.num_flops[shape] = attention_flops(heads, lens)
        sizes = (num_prompts // 2,) * 2
        for setting, groups in (("shared slots", random_groups(sizes, 4096)), ("own slots", None)):
            problem = Problem(make_batch(lens, groups), heads)
            results.add(shape, setting, problem.prefill, 1)


def flashinfer_shape(heads: Heads) -> flashinfer_attention.PlanShape:
    return flashinfer_attention.PlanShape(
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        torch.bfloat16,
        torch.bfloat16,
        heads.head_dim**-0.5,
        -1,
        0.0,
    )


# ---- all of it ----


def compile_tasks(
    parts: list[str], head_dim: int
) -> Iterator[tuple[str, Callable[..., float], tuple[Any, ...], float]]:
    """Yield (name, function, arguments, largest difference allowed) of every kernel that `parts` run."""
    if "check" in parts:
        for name, case in CHECKS.items():
            yield f"check {name}", run_check, (name,), case.tolerance
    if "decode" in parts:
        first, *others = HEADS[head_dim]
        for heads, num_requests in ((first, 1), (first, 8), (first, 32), *((other, 32) for other in others)):
            for config in {(*config[:3], config[4]): config for config in DECODE_CONFIGS}.values():
                name = f"decode {heads.name} {num_requests} {name_of(config)}"
                yield name, compile_decode, (heads, num_requests, config), 0.03
    if "prefill" in parts:
        for heads, prefill_config in itertools.product(HEADS[head_dim], PREFILL_CONFIGS):
            yield f"prefill {heads.name} {name_of(prefill_config)}", compile_prefill, (heads, prefill_config), 0.03
    if "shared" in parts:
        for prefill_config in PREFIX_CONFIGS:
            yield f"shared {name_of(prefill_config)}", compile_shared, (HEADS[head_dim][0], prefill_config), 0.03


def precompile(parts: list[str], head_dim: int, deadline: float) -> list[str]:
    """Compile and check kernels, which are left in Triton's cache folder. Return what is wrong, one line each."""
    tasks = {name: (function, args, tolerance) for name, function, args, tolerance in compile_tasks(parts, head_dim)}
    num_processes = max(1, min(NUM_COMPILERS, (os.cpu_count() or 2) - 2, len(tasks)))
    pool = ProcessPoolExecutor(num_processes, get_context("spawn"))
    futures = {pool.submit(function, *args): name for name, (function, args, _) in tasks.items()}
    done, late = wait(futures, timeout=min(COMPILE_LIMIT_S, deadline - time.monotonic()))
    wrong = [f"{futures[future]}: not ready in time" for future in late]
    for future in done:
        name = futures[future]
        error = future.exception()
        if isinstance(error, OutOfResources):
            continue  # settings that are too large for a head_dim are left out
        if error is not None:
            wrong.append(f"{name}: {type(error).__name__} {str(error)[:200]}")
        elif future.result() > tasks[name][2]:
            wrong.append(f"{name}: differs by {future.result():.3g}")
    pool.shutdown(wait=not late, cancel_futures=True)
    return wrong


def best_entries(tables: dict[str, Results], head_dim: int) -> Entries:
    """Return the best configurations as tables have them, for the heads that were timed."""
    entries: Entries = {"decode": {}, "prefill": {}, "prefix": {}}
    limits = {
        shape: decode_limit(len(lens), HEADS[head_dim][which].num_kv_heads)
        for shape, which, lens in DECODE_SHAPES
        if which < len(HEADS[head_dim])
    }
    for limit in DECODE_LIMITS:
        times = [row for shape, row in tables["decode"].times.items() if limits[shape] == limit]
        if config := best_config(times, DECODE_CONFIGS):
            entries["decode"][head_dim, limit] = config._asdict()
    prompts = [row for shape, row in tables["prefill"].times.items() if "after 4096" not in shape]
    if prefill_config := best_config(prompts, PREFILL_CONFIGS):
        entries["prefill"][head_dim,] = prefill_config._asdict()
    if prefix_config := best_config(list(tables["shared"].times.values()), PREFIX_CONFIGS):
        entries["prefix"][head_dim,] = prefix_config._asdict()
    return {kind: configs for kind, configs in entries.items() if configs}


def best_config(rows: list[dict[str, float]], configs: list[Any]) -> Any:
    """Return the configuration whose times are the smallest multiples of the best ones, None if none has them all.

    rows: of each shape, setting -> µs; of settings "configuration / splits" the best number of splits counts.
    """
    costs = {}
    for config in configs:
        name = name_of(config)
        times = [[us for setting, us in row.items() if setting.split(" / ")[0] == name] for row in rows]
        if times and all(times):
            costs[config] = sum(min(own) / min(row.values()) for own, row in zip(times, rows, strict=True))
    return min(costs, key=costs.__getitem__, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=90.0, help="seconds it may take")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ",".join(PARTS))
    parser.add_argument("--head-dim", type=int, default=128, choices=sorted(HEADS))
    parser.add_argument("--write", action="store_true", help="put what is found into this card's shipped table")
    args = parser.parse_args()
    parts = args.parts.split(",")
    started = time.monotonic()
    tables = {part: Results() for part in ("decode", "prefill", "shared")}
    wrong: list[str] = []

    def print_summary() -> int:
        """Print the best settings and what is wrong; return the exit status."""
        print(f"\n==== {torch.cuda.get_device_name()}, {time.monotonic() - started:.0f} s; best settings ====")
        for results in tables.values():
            with contextlib.suppress(RuntimeError):  # the watchdog may catch a table while it grows
                results.print_best()
        lines = wrong + [f"{name}: {error}" for results in tables.values() for name, error in results.errors.items()]
        print("all checks passed" if not lines else "WRONG:\n" + "\n".join(lines[:25]), flush=True)
        return 1 if lines else 0

    def give_up() -> None:
        print("\nout of time")
        print_summary()
        os._exit(3)

    watchdog = threading.Timer(args.limit, give_up)
    watchdog.daemon = True
    watchdog.start()

    print(measure_roofline(), flush=True)
    wrong += precompile(parts, args.head_dim, started + args.limit - 10)
    print(
        f"compiled and checked after {time.monotonic() - started:.0f} s: " + ("; ".join(wrong) or "all right"),
        flush=True,
    )
    if "decode" in parts:
        bench_decode(tables["decode"], args.head_dim, with_flashinfer=False)
        tables["decode"].print_all("decode: block_n, warps, stages, programs an SM, prefetch")
    if "prefill" in parts:
        bench_prefill(tables["prefill"], args.head_dim, with_flashinfer=False)
        tables["prefill"].print_all("prefill: block_m, block_n, warps, stages")
    if "shared" in parts:
        bench_shared(tables["shared"], args.head_dim)
        bench_shared_prompts(tables["prefill"], args.head_dim)
        tables["shared"].print_all("shared prefixes: block_m, block_n, warps, stages / splits")
    available, reason = flashinfer_attention.is_available()
    print(f"\n{reason}", flush=True)
    if "flashinfer" in parts and available:
        bench_decode(tables["decode"], args.head_dim, with_flashinfer=True)
        bench_prefill(tables["prefill"], args.head_dim, with_flashinfer=True)
    watchdog.cancel()
    status = print_summary()
    publish(best_entries(tables, args.head_dim), args.write)
    sys.exit(status)


if __name__ == "__main__":
    main()
