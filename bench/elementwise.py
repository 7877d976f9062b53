"""Elementwise, bookkeeping and sampling kernels on a GPU: right, and how near to the memory's speed.

    python -m bench.elementwise [--limit 90] [--flashinfer]

Each kernel against its twin and against the roofline: the time of moving its bytes. Inputs of a few tokens stay in the
L2 cache, so these may pass it. --flashinfer also times FlashInfer's kernels, which it compiles for minutes at first.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from bench.roofline import measure_roofline, stream_us
from kernels import bookkeeping, elementwise, flashinfer_attention, sampling
from kernels.timing import graph_us

EPS = 1e-5
BF16_DIFFERENCE, FP8_DIFFERENCE = 0.01, 0.13  # one rounding to the other side, of the largest value


class Row(NamedTuple):
    name: str
    num_bytes: float
    run: Callable[[], object]
    twin: Callable[[], object]
    flashinfer: Callable[[], object] | None = None  # its kernel for the same, where it has one
    is_twin_captured: bool = True  # else it waits for the device, and is timed without a graph


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").mul_(scale).bfloat16()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def rope_inputs(
    num_tokens: int, num_heads: int, num_kv_heads: int, has_norm: bool, cache_dtype: torch.dtype
) -> dict[str, Any]:
    head_dim, num_slots = 128, 16384
    angles = torch.rand(4096, head_dim // 2, device="cuda")
    return {
        "qkv": normal(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim),
        "positions": torch.randint(0, 4096, (num_tokens,), device="cuda", dtype=torch.int32),
        "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=-1),
        "k_cache": torch.zeros(num_slots, num_kv_heads, head_dim, device="cuda").to(cache_dtype),
        "v_cache": torch.zeros(num_slots, num_kv_heads, head_dim, device="cuda").to(cache_dtype),
        "out_cache_loc": torch.randperm(num_slots, device="cuda")[:num_tokens].int(),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "q_norm": normal(head_dim) if has_norm else None,
        "k_norm": normal(head_dim) if has_norm else None,
    }


def sampling_params(num_rows: int, temperature: float, top_k: int, top_p: float) -> dict[str, torch.Tensor]:
    def full(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((num_rows,), value, dtype=dtype, device="cuda")

    return {
        "temperature": full(temperature),
        "top_k": full(top_k, torch.int32),
        "top_p": full(top_p),
        "min_p": full(0.0),
        "seed": torch.randint(0, 2**62, (num_rows,), device="cuda"),
        "position": torch.arange(num_rows, dtype=torch.int32, device="cuda"),
    }


def check() -> list[str]:
    """Print all differences, as shares of the largest value; return the ones that are too large."""
    wrong = []

    def report(name: str, found: float, allowed: float, end: str = ", ") -> None:
        print(f"{name} {found:.4g}", end=end)
        if not found <= allowed:  # NaN is wrong, too
            wrong.append(f"{name}: {found:.4g}, and {allowed} is allowed")

    for num_tokens in (1, 5, 300):
        x, weight, gate_up = normal(num_tokens, 4096), normal(4096), normal(num_tokens, 2 * 14336)
        worst = difference(elementwise.rms_norm(x, weight, EPS), elementwise.rms_norm_torch(x, weight, EPS))
        report(f"T={num_tokens}: rms_norm", worst, BF16_DIFFERENCE)
        worst = difference(
            elementwise.layer_norm(x + 1, weight, weight, EPS), elementwise.layer_norm_torch(x + 1, weight, weight, EPS)
        )
        report("layer_norm", worst, BF16_DIFFERENCE)
        heads = normal(32, 128)
        found, expected = x.clone(), x.clone()
        elementwise.layer_norm_heads_(found, heads, EPS)
        elementwise.layer_norm_heads_torch_(expected, heads, EPS)
        report("layer_norm_heads", difference(found, expected), BF16_DIFFERENCE)
        parameters = torch.tensor([0.2, -1.05, 0.5, -1e-6], device="cuda")
        worst = difference(elementwise.xielu(x, parameters), elementwise.xielu_torch(x, parameters))
        report("xielu", worst, BF16_DIFFERENCE)
        for act in ("relu", "relu2", "gelu_tanh"):
            worst = difference(elementwise.activate(gate_up, act), elementwise.activate_torch(gate_up, act))
            report(act, worst, BF16_DIFFERENCE)
        for act in ("silu", "gelu", "gelu_tanh"):
            worst = difference(elementwise.act_and_mul(gate_up, act), elementwise.act_and_mul_torch(gate_up, act))
            report(act, worst, BF16_DIFFERENCE)
        for num_heads, has_norm, dtype, allowed in (
            (32, False, torch.bfloat16, BF16_DIFFERENCE), (16, True, torch.bfloat16, BF16_DIFFERENCE),
            (16, True, torch.float8_e4m3fn, FP8_DIFFERENCE),
        ):  # fmt: skip
            inputs = rope_inputs(num_tokens, num_heads, 8, has_norm, dtype)
            caches = {name: inputs[name].clone() for name in ("k_cache", "v_cache")}
            q = elementwise.rope_and_store(**inputs)
            expected = elementwise.rope_and_store_torch(**(inputs | caches))
            worst = max(difference(q, expected), *(difference(inputs[name], cache) for name, cache in caches.items()))
            report("rope", worst, allowed)
        print()
    for num_rows, vocab_size in ((1, 128256), (7, 151936), (200, 32000)):
        logits = normal(num_rows, vocab_size, scale=3)
        logits[0, 5] = logits[0].max()
        num_wrong = int((sampling.argmax(logits) != sampling.argmax_torch(logits)).sum())
        report(f"[{num_rows}, {vocab_size}]: other tokens by argmax", num_wrong, 0)
        for temperature, top_k, top_p in ((1.0, 1 << 30, 1.0), (1.0, 1 << 30, 0.9), (0.6, 20, 0.95), (1.5, 1000, 0.5)):
            for values in (logits, logits.float() + torch.rand_like(logits, dtype=torch.float32) / 8):
                params = sampling_params(num_rows, temperature, top_k, top_p)
                differs = sampling.sample(values, **params) != sampling.sample_torch(values, **params)
                report("sample", int(differs.sum()), 1 + num_rows // 100)  # a draw may hang on a logarithm's last bit
        report("5 likeliest", difference(sampling.likeliest(logits, 5)[0], logits.topk(5).values), 0)
        report("logsumexp", difference(sampling.logsumexp(logits), sampling.logsumexp_torch(logits)), 1e-5, end="\n")
    broken = normal(3, 32000)
    broken[1, 31999] = torch.nan
    broken[2] = -torch.inf
    params = sampling_params(3, 1.0, 40, 0.9)
    for tokens in (sampling.argmax(broken), sampling.sample(broken, **params)):
        report("broken rows that give a token", int((tokens[1:] != -1).sum()), 0)
    print()
    return wrong


def elementwise_rows(num_tokens: int) -> list[Row]:
    rows = []
    for name, n in (("Llama", 4096), ("Qwen", 1024)):
        x, weight = normal(num_tokens, n), normal(n)
        rows.append(
            Row(
                f"rms_norm {name} T={num_tokens}",
                4 * x.numel(),
                partial(elementwise.rms_norm, x, weight, EPS),
                partial(elementwise.rms_norm_torch, x, weight, EPS),
                partial(rms_norm_flashinfer, x, weight),
            )
        )
    x, weight, heads = normal(num_tokens, 8192), normal(8192), normal(64, 128)
    rows += [
        Row(
            f"layer_norm Command-R T={num_tokens}",
            4 * x.numel(),
            partial(elementwise.layer_norm, x, weight, None, EPS),
            partial(elementwise.layer_norm_torch, x, weight, None, EPS),
        ),
        Row(
            f"layer_norm_heads Command-R+ T={num_tokens}",
            4 * x.numel(),
            partial(elementwise.layer_norm_heads_, x, heads, EPS),
            partial(elementwise.layer_norm_heads_torch_, x, heads, EPS),
        ),
    ]
    gate_up = normal(num_tokens, 2 * 14336)
    rows.append(
        Row(
            f"relu2 Nemotron T={num_tokens}",
            4 * gate_up.numel(),
            partial(elementwise.activate, gate_up, "relu2"),
            partial(elementwise.activate_torch, gate_up, "relu2"),
        )
    )
    rows.append(
        Row(
            f"silu_and_mul T={num_tokens}",
            3 * gate_up.numel(),
            lambda: elementwise.act_and_mul(gate_up, "silu"),
            lambda: elementwise.act_and_mul_torch(gate_up, "silu"),
            lambda: peer("activation").silu_and_mul(gate_up),
        )
    )
    for name, num_heads, has_norm in (("Llama", 32, False), ("Qwen", 16, True)):
        inputs = rope_inputs(num_tokens, num_heads, 8, has_norm, torch.bfloat16)
        rows.append(
            Row(
                f"rope_and_store {name} T={num_tokens}",
                4 * inputs["qkv"].numel(),
                partial(elementwise.rope_and_store, **inputs),
                partial(elementwise.rope_and_store_torch, **inputs),
            )
        )
    return rows + bookkeeping_rows(num_tokens)


def bookkeeping_rows(num_tokens: int) -> list[Row]:
    index = torch.arange(num_tokens, dtype=torch.int32, device="cuda")
    ids, last_tokens = torch.full_like(index, -1), torch.zeros_like(index)
    table = torch.zeros(num_tokens, 64, dtype=torch.int32, device="cuda")
    step = (ids, index % 64, index, index, last_tokens, table)
    return [
        Row(
            f"begin_step T={num_tokens}",
            7 * 4 * num_tokens,
            partial(bookkeeping.begin_step, *step),
            partial(bookkeeping.begin_step_torch, *step),
        ),
        Row(
            f"end_step S={num_tokens}",
            3 * 4 * num_tokens,
            partial(bookkeeping.end_step, ids, index, last_tokens),
            partial(bookkeeping.end_step_torch, ids, index, last_tokens),
        ),
    ]


def sampling_rows(num_rows: int, vocab_size: int) -> list[Row]:
    logits = normal(num_rows, vocab_size, scale=3)
    wide = logits.float()  # what FlashInfer reads
    num_bytes = 2 * logits.numel()
    size = f"[{num_rows}, {vocab_size}]"
    rows = [Row(f"argmax {size}", num_bytes, partial(sampling.argmax, logits), partial(sampling.argmax_torch, logits))]
    for label, temperature, top_k, top_p in (
        ("plain", 1.0, 1 << 30, 1.0), ("top_p 0.95", 0.8, 1 << 30, 0.95), ("top_k 20, top_p 0.95", 0.6, 20, 0.95)
    ):  # fmt: skip
        params = sampling_params(num_rows, temperature, top_k, top_p)
        rows.append(
            Row(
                f"sample {label} {size}",
                num_bytes,
                partial(sampling.sample, logits, **params),
                partial(sampling.sample_torch, logits, **params),
                partial(sample_flashinfer, wide, min(top_k, vocab_size), top_p),
                is_twin_captured=False,
            )
        )
    rows.append(
        Row(
            f"logsumexp {size}",
            num_bytes,
            partial(sampling.logsumexp, logits),
            partial(sampling.logsumexp_torch, logits),
        )
    )
    likeliest = partial(sampling.likeliest, logits, 5)
    rows.append(Row(f"5 likeliest {size}", num_bytes, likeliest, partial(torch.topk, logits, 5)))
    bitmask = torch.randint(-(2**31), 2**31, (num_rows, (vocab_size + 31) // 32), device="cuda").int()
    scratch = logits.clone()
    rows.append(
        Row(
            f"token bitmask {size}",
            num_bytes / 2,
            partial(sampling.apply_token_bitmask, scratch, bitmask),
            partial(sampling.apply_token_bitmask_torch, scratch, bitmask),
        )
    )
    counts = torch.zeros(num_rows, vocab_size, dtype=torch.int16, device="cuda")
    index = torch.arange(num_rows, dtype=torch.int32, device="cuda")
    some = torch.full((num_rows,), 0.1, device="cuda")
    penalties = (scratch, index, counts, some, some, some + 1)
    rows.append(
        Row(
            f"penalties {size}",
            3 * num_bytes,
            partial(sampling.apply_penalties, *penalties),
            partial(sampling.apply_penalties_torch, *penalties),
        )
    )
    return rows


def peer(module: str) -> Any:
    return importlib.import_module(f"flashinfer.{module}")


def rms_norm_flashinfer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return peer("norm").rmsnorm(x, weight, EPS)


def sample_flashinfer(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    if top_k == logits.shape[1] and top_p == 1.0:
        return peer("sampling").sampling_from_logits(logits)
    if top_k == logits.shape[1]:
        return peer("sampling").top_p_sampling_from_probs(logits.softmax(-1), top_p)
    return peer("sampling").top_k_top_p_sampling_from_logits(logits, top_k, top_p)


def timed(measure: Callable[[], float]) -> str:
    try:
        return f"{measure():.2f}"
    except Exception as error:  # noqa: BLE001 - a peer that does not run is a result
        torch.cuda.synchronize()
        return type(error).__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=90.0, help="seconds after which nothing more is timed")
    parser.add_argument("--flashinfer", action="store_true", help="time FlashInfer's kernels, too")
    args = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(time.time_ns() % 2**31)
    wrong = check()
    available, reason = flashinfer_attention.is_available()
    has_peer = args.flashinfer and available
    roofline = measure_roofline()
    print(f"\n{roofline}" + (f"; {reason}" if args.flashinfer else ""))
    print(f"{'in a CUDA graph':48s}{'us':>9s}{'TB/s':>7s}{'of it':>7s}{'twin us':>11s} {'FlashInfer us':>20s}")
    makers = [partial(elementwise_rows, num_tokens) for num_tokens in (1, 256, 8192)]
    makers += [partial(sampling_rows, *size) for size in ((1, 128256), (16, 128256), (256, 128256), (1, 151936))]
    for make in makers:
        for row in make():
            if time.perf_counter() - start > args.limit:
                print(f"{row.name:48s} (out of time)")
                continue
            us = graph_us([row.run] * 10, num_replays=10)
            twin_us = graph_us([row.twin] * 10, num_replays=3) if row.is_twin_captured else stream_us(row.twin)
            flashinfer = ""
            if has_peer and row.flashinfer is not None:
                flashinfer = timed(partial(graph_us, [row.flashinfer] * 10, num_replays=10))
            rate, share = row.num_bytes / us / 1e6, roofline.share(us, row.num_bytes)
            print(f"{row.name:48s}{us:9.2f}{rate:7.2f}{share:7.0%}{twin_us:11.2f} {flashinfer:>20s}", flush=True)
    print(f"{time.perf_counter() - start:.0f} s in all")
    sys.exit("WRONG:\n" + "\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
