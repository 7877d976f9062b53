"""Elementwise and sampling kernels on a GPU: against their twins, and against the time of moving their bytes.

python -m bench.elementwise
"""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from bench.gemm import graph_us
from kernels import elementwise, sampling

EPS = 1e-5


class Row(NamedTuple):
    name: str
    num_bytes: float
    run: Callable[[], object]
    twin: Callable[[], object] | None = None  # also timed, if it can be captured


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").mul_(scale).bfloat16()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def rope_inputs(num_tokens: int, num_heads: int, num_kv_heads: int, has_norm: bool, cache_dtype: torch.dtype) -> dict:
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


def check() -> None:
    for num_tokens in (1, 5, 300):
        x, weight, gate_up = normal(num_tokens, 4096), normal(4096), normal(num_tokens, 2 * 14336)
        worst = difference(elementwise.rms_norm(x, weight, EPS), elementwise.rms_norm_torch(x, weight, EPS))
        print(f"T={num_tokens}: rms_norm {worst:.4f}", end="")
        for act in ("silu", "gelu", "gelu_tanh"):
            worst = difference(elementwise.act_and_mul(gate_up, act), elementwise.act_and_mul_torch(gate_up, act))
            print(f", {act} {worst:.4f}", end="")
        for num_heads, has_norm, dtype in (
            (32, False, torch.bfloat16), (16, True, torch.bfloat16), (16, True, torch.float8_e4m3fn)
        ):  # fmt: skip
            inputs = rope_inputs(num_tokens, num_heads, 8, has_norm, dtype)
            caches = {name: inputs[name].clone() for name in ("k_cache", "v_cache")}
            q = elementwise.rope_and_store(**inputs)
            expected = elementwise.rope_and_store_torch(**(inputs | caches))
            worst = max(difference(q, expected), *(difference(inputs[name], cache) for name, cache in caches.items()))
            print(f", rope {worst:.4f}", end="")
        print()
    for num_rows, vocab_size in ((1, 128256), (7, 151936), (200, 32000)):
        logits = normal(num_rows, vocab_size, scale=3)
        logits[0, 5] = logits[0].max()
        num_wrong = int((sampling.argmax(logits) != sampling.argmax_torch(logits)).sum())
        print(f"[{num_rows}, {vocab_size}]: argmax {num_wrong} wrong", end="")
        for temperature, top_k, top_p in ((1.0, 1 << 30, 1.0), (1.0, 1 << 30, 0.9), (0.6, 20, 0.95), (1.5, 1000, 0.5)):
            for values in (logits, logits.float() + torch.rand_like(logits, dtype=torch.float32) / 8):
                params = sampling_params(num_rows, temperature, top_k, top_p)
                differs = sampling.sample(values, **params) != sampling.sample_torch(values, **params)
                print(f", sample {int(differs.sum())} of {num_rows} differ", end="")
        worst = difference(sampling.logsumexp(logits), sampling.logsumexp_torch(logits))
        print(f", logsumexp {worst:.6f}")
    broken = normal(3, 32000)
    broken[1, 31999] = torch.nan
    broken[2] = -torch.inf
    params = sampling_params(3, 1.0, 40, 0.9)
    print("broken rows:", sampling.argmax(broken).tolist()[1:], sampling.sample(broken, **params).tolist()[1:])


def elementwise_rows(num_tokens: int) -> list[Row]:
    rows = []
    for name, n in (("Llama", 4096), ("Qwen", 1024)):
        x, weight = normal(num_tokens, n), normal(n)
        rows.append(
            Row(
                f"rms_norm {name} T={num_tokens}",
                4 * x.numel(),
                partial(elementwise.rms_norm, x, weight, EPS),
                partial(torch.nn.functional.rms_norm, x, (n,), weight, EPS),
            )
        )
    gate_up = normal(num_tokens, 2 * 14336)
    rows.append(
        Row(f"silu_and_mul T={num_tokens}", 3 * gate_up.numel(), lambda: elementwise.act_and_mul(gate_up, "silu"))
    )
    for name, num_heads, has_norm in (("Llama", 32, False), ("Qwen", 16, True)):
        inputs = rope_inputs(num_tokens, num_heads, 8, has_norm, torch.bfloat16)
        run = partial(elementwise.rope_and_store, **inputs)
        rows.append(Row(f"rope_and_store {name} T={num_tokens}", 4 * inputs["qkv"].numel(), run))
    return rows


def sampling_rows(num_rows: int, vocab_size: int) -> list[Row]:
    logits = normal(num_rows, vocab_size, scale=3)
    num_bytes = 2 * logits.numel()
    size = f"[{num_rows}, {vocab_size}]"
    rows = [Row(f"argmax {size}", num_bytes, lambda: sampling.argmax(logits), lambda: logits.argmax(dim=-1))]
    for label, temperature, top_k, top_p in (
        ("plain", 1.0, 1 << 30, 1.0), ("top_p 0.95", 0.8, 1 << 30, 0.95), ("top_k 20, top_p 0.95", 0.6, 20, 0.95)
    ):  # fmt: skip
        params = sampling_params(num_rows, temperature, top_k, top_p)
        rows.append(Row(f"sample {label} {size}", num_bytes, partial(sampling.sample, logits, **params)))
    rows.append(Row(f"logsumexp {size}", num_bytes, lambda: sampling.logsumexp(logits)))
    bitmask = torch.randint(-(2**31), 2**31, (num_rows, (vocab_size + 31) // 32), device="cuda").int()
    scratch = logits.clone()
    rows.append(Row(f"token bitmask {size}", num_bytes / 2, lambda: sampling.apply_token_bitmask(scratch, bitmask)))
    counts = torch.zeros(num_rows, vocab_size, dtype=torch.int16, device="cuda")
    index = torch.arange(num_rows, dtype=torch.int32, device="cuda")
    some = torch.full((num_rows,), 0.1, device="cuda")
    rows.append(
        Row(
            f"penalties {size}",
            3 * num_bytes,
            lambda: sampling.apply_penalties(scratch, index, counts, some, some, some + 1),
        )
    )
    return rows


def main() -> None:
    start = time.perf_counter()
    torch.manual_seed(time.time_ns() % 2**31)
    check()
    print(f"\n{'in a CUDA graph':48s}{'us':>9s}{'TB/s':>7s}{'torch us':>10s}")
    makers = [partial(elementwise_rows, num_tokens) for num_tokens in (1, 256, 8192)]
    makers += [partial(sampling_rows, *size) for size in ((1, 128256), (16, 128256), (256, 128256), (1, 151936))]
    for make in makers:
        for row in make():
            if time.perf_counter() - start > 90:
                print(f"{row.name:48s} (out of time)")
                continue
            us = graph_us([row.run] * 10, num_replays=10)
            twin = f"{graph_us([row.twin] * 10, num_replays=10):10.2f}" if row.twin else ""
            print(f"{row.name:48s}{us:9.2f}{row.num_bytes / us / 1e6:7.2f}{twin}", flush=True)
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
