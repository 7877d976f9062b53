"""The Hopper kernel of gate and up: right, and beside cuBLAS with the activation as a pass of its own.

    python -m bench.gated_gemm

The products of Llama-3-8B and Qwen3-0.6B for few to many tokens, in CUDA graphs over copies of the weights that
together exceed the L2 cache. Each runs for some milliseconds: under steady load large ones get slower, as the card
reaches its limit of power. The tile is the one that `choose_tile` takes.
"""

import functools
import math
import sys

import torch

from bench.roofline import ROTATION_BYTES, measure_roofline
from kernels.elementwise import act_and_mul, act_and_mul_torch
from kernels.gated_gemm import ROWS, choose_tile, gated_gemm
from kernels.hopper import is_available
from kernels.launch import cdiv, num_sms
from kernels.timing import graph_us

SIZES = {"Llama-3-8B": (14336, 4096), "Qwen3-0.6B": (3072, 1024)}  # columns of the result, K
NUM_TOKENS = (8, 64, 128, 256, 384, 512, 768, 1024, 2048, 8192)
TIMED_US = 2000


def cublas(x: torch.Tensor, weight: torch.Tensor, act: str) -> torch.Tensor:
    return act_and_mul(torch.nn.functional.linear(x, weight), act)


def main() -> int:
    device = torch.device("cuda")
    if not torch.cuda.is_available() or not is_available(device):
        print("there is no Hopper GPU, or no NVRTC: cuBLAS multiplies")
        return 0
    roofline, is_right = measure_roofline(), True
    print(f"{roofline}\n{'':12s}{'tokens':>8s}{'tile':>10s}{'us':>9s}{'TFLOP/s':>9s}{'of it':>7s}{'cuBLAS + act':>14s}")
    for model, (n, k) in SIZES.items():
        num_bytes = 2 * 2 * n * k
        weights = [
            torch.randn(2 * n, k, device=device).mul_(k**-0.5).bfloat16()
            for _ in range(math.ceil(ROTATION_BYTES / num_bytes))
        ]
        for num_tokens in NUM_TOKENS:
            x = torch.randn(num_tokens, k, device=device).bfloat16()
            expected = act_and_mul_torch(x.float() @ weights[0].float().t(), "silu")
            error = ((gated_gemm(x, weights[0], "silu").float() - expected).norm() / expected.norm()).item()
            num_flops = 2.0 * num_tokens * 2 * n * k
            rounds = max(1, int(TIMED_US / (num_flops / 6e8) / len(weights)))
            took_us = [
                graph_us([functools.partial(run, x, weight, "silu") for weight in weights * rounds], num_replays=3)
                for run in (gated_gemm, cublas)
            ]
            tile = choose_tile(cdiv(num_tokens, ROWS), n, num_sms(device))
            assert tile is not None
            name = f"{ROWS}x{tile.columns}"
            share = roofline.share(took_us[0], num_bytes + 2 * num_tokens * (n + k), num_flops)
            print(
                f"{model:12s}{num_tokens:>8d}{name:>10s}{took_us[0]:9.1f}{num_flops / took_us[0] / 1e6:9.0f}"
                f"{share:7.0%}{took_us[1]:14.1f}{'' if error < 0.01 else f'  WRONG by {error:.3f}'}",
                flush=True,
            )
            is_right &= error < 0.01
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
