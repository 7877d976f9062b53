"""Decisions that depend on the machine: whether it can serve at all, on which device, and by which kernels."""

import importlib.util
import logging
import time

import torch

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.model_config import ModelConfig
from engine.sizes import check_sizes, resolve_sizes
from engine.step.host_memory import available_host_memory
from engine.step.memory import GIB
from kernels import hopper
from kernels.attention import choose_backend
from kernels.card import OLDEST_E4M3, card_of
from kernels.dense import SKINNY_MAX_TOKENS
from kernels.few_gemm import MOST_TOKENS

logger = logging.getLogger(__name__)

ANGLE_BYTES = 10  # of a position and a rotated dimension, while cosines and sines are computed in float32


def resolve_config(config: EngineConfig) -> EngineConfig:
    """Return `config` with everything decided that depends on the machine alone."""
    device = device_of(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda was asked for, and torch sees no CUDA device")
    check_sizes(config)
    cuda_bytes = None
    if device.type == "cuda":
        device = torch.device("cuda", config.base_gpu_id if device.index is None else device.index)
        check_gpus(device.index, config.ranks_per_node)
        properties = torch.cuda.get_device_properties(device)
        check_kv_dtype(config.kv_cache_dtype, (properties.major, properties.minor))
        cuda_bytes = properties.total_memory
    if config.grammar_backend == "xgrammar" and importlib.util.find_spec("xgrammar") is None:
        raise ModelError("--grammar-backend xgrammar needs xgrammar: pip install 'radixloop[xgrammar]'")
    try:
        backend = choose_backend(config.attention_backend, device)
    except ValueError as error:
        raise ModelError(str(error)) from None
    sampling_backend = config.sampling_backend
    if sampling_backend == "flashinfer":
        logger.warning("sampling backend 'flashinfer' is not used: Triton's kernels, which sort nothing either, serve")
        sampling_backend = "triton"
    return resolve_sizes(config, cuda_bytes).replace(
        device=str(device),
        base_gpu_id=device.index or 0,
        attention_backend=backend,
        sampling_backend=sampling_backend,
        random_seed=time.time_ns() % (1 << 30) if config.random_seed is None else config.random_seed,
    )


def device_of(name: str) -> torch.device:
    """Return the device of that name. Raises `ModelError` if this engine does not run on it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # nor on this one
    if device.type not in ("cuda", "cpu"):
        raise ModelError(f"--device must be cuda, cuda:NUMBER or cpu, got {name!r}")
    return device


def check_gpus(first: int, count: int) -> None:
    """Raise `ModelError` if this machine does not have GPUs `first` to `first` + `count` - 1."""
    num_present = torch.cuda.device_count()
    if first + count > num_present:
        raise ModelError(
            f"{count} GPUs are needed, from number {first} on (--tp-size, --dp-size, --base-gpu-id); "
            f"this machine has {num_present}"
        )


def check_kv_dtype(name: str, capability: tuple[int, int]) -> None:
    """Raise `ModelError` if kernels cannot read a cache of that dtype on a GPU of that compute capability."""
    if name == "fp8_e4m3" and capability < OLDEST_E4M3:
        (major, minor), (oldest, oldest_minor) = capability, OLDEST_E4M3
        raise ModelError(
            f"--kv-cache-dtype fp8_e4m3 needs a GPU of compute capability {oldest}.{oldest_minor}, this one has "
            f"{major}.{minor}: fp8_e5m2 takes as little memory"
        )


def check_positions(model_config: ModelConfig) -> None:
    """Raise `ModelError` if cosines and sines alone would exceed this host's memory, which Linux hands out."""
    num_bytes = ANGLE_BYTES * model_config.context_length * model_config.rope.rotary_dim
    available = available_host_memory()
    if num_bytes > available:
        raise ModelError(
            f"--context-length {model_config.context_length} takes {num_bytes / GIB:.1f} GiB for positions alone, and "
            f"{available / GIB:.1f} GiB of memory are left"
        )


def describe_backends(config: EngineConfig, device: torch.device, *, has_corun: bool = False) -> dict[str, str]:
    """Return for each operation which implementation serves it, and why.

    config: resolved. has_corun: steps may be split (`kernels.corun`).
    """
    if device.type == "cpu":
        return {"all operations": "torch (the one for a CPU)"}
    attention = {
        "triton": "Triton (compiles in seconds, on any GPU)",
        "flashinfer": "FlashInfer for prompts (as asked), Triton in CUDA graphs and for single tokens (needs no plan)",
        "torch": "torch (as asked; slow, and without CUDA graphs)",
    }
    few = f"Triton for up to {SKINNY_MAX_TOKENS} tokens"
    if hopper.is_available(device):
        few = f"our own kernels for gate and up, and for up to {MOST_TOKENS} tokens"
        attention["triton"] += "; prompts by our own kernel (Hopper)"
    steps = "CUDA graphs; larger ones by kernel"
    if config.disable_cuda_graph:
        steps = "kernel by kernel (as asked)"
    elif config.attention_backend == "torch":
        steps = "kernel by kernel (torch's attention cannot be captured)"
    if has_corun:
        steps += "; attention of many decodes beside gate and up of prompts"
    return {
        "kernels by the limits of": card_of(device).describe(),
        "attention": attention[config.attention_backend or "torch"],
        "norms, rope, KV writes": "Triton (one pass each)",
        "products": f"cuBLAS; {few} (near the memory's speed)",
        "sampling": "torch (as asked)" if config.sampling_backend == "pytorch" else "Triton (no sort)",
        "steps": steps,
    }
