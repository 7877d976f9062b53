"""Sizes of an engine: arithmetic on the configuration, without a model or a device."""

import math
from dataclasses import dataclass

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.step.cuda_graph import MAX_FEW_PROMPTS_TOKENS, MAX_GRAPH_WORK, MAX_PROMPTS, GraphSizes, default_batch_sizes

CPU_ROWS, CUDA_ROWS = 64, 1024  # requests that run at once
CPU_CHUNK, CUDA_CHUNK, SMALL_CUDA_CHUNK = 512, 8192, 2048  # prompt tokens of a step
SMALL_CUDA_BYTES = 25e9  # a GPU with less memory is small
CUDA_MAX_STEP_MS = 60.0
CPU_MAX_STEP_S = 1.0  # a chunk of prompts may otherwise take a minute, in which nobody gets a token
CUDA_GRAPH_MAX_BS = 1024
COUNTS = (
    "tp_size", "dp_size", "nnodes", "context_length", "max_total_tokens", "page_size", "max_running_requests",
    "max_prefill_tokens", "cuda_graph_max_bs", "stream_interval", "decode_log_interval",
)  # fmt: skip
MAY_BE_0 = ("max_queued_requests", "max_queued_tokens")


def check_sizes(config: EngineConfig) -> None:
    """Raise `ModelError` if a number is out of range, or if numbers of ranks, replicas and nodes contradict each other.

    The message names the flag.
    """
    for name in COUNTS + MAY_BE_0:
        value, least = getattr(config, name), int(name not in MAY_BE_0)
        if value is not None and value < least:
            raise ModelError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if any(size < 1 for size in config.cuda_graph_bs or ()):
        raise ModelError(f"--cuda-graph-bs must be at least 1 each, got {config.cuda_graph_bs}")
    if config.dist_timeout is not None and not 0 < config.dist_timeout < math.inf:
        raise ModelError(f"--dist-timeout must be a number of seconds above 0, got {config.dist_timeout:g}")
    if config.mem_fraction_static is not None and not 0 < config.mem_fraction_static <= 1:
        raise ModelError(f"--mem-fraction-static must be above 0 and at most 1, got {config.mem_fraction_static:g}")
    if config.swa_full_tokens_ratio is not None and not 0 < config.swa_full_tokens_ratio <= 1:
        raise ModelError(f"--swa-full-tokens-ratio must be above 0 and at most 1, got {config.swa_full_tokens_ratio:g}")
    if config.max_step_ms is not None and config.max_step_ms < 0:
        raise ModelError(f"--max-step-ms must not be negative, got {config.max_step_ms}")
    if not 0 <= config.ep_size <= config.tp_size or config.tp_size % config.num_expert_groups:
        raise ModelError(_misfit_of_experts(config))
    if config.tp_size % config.nnodes:
        raise ModelError(f"--tp-size {config.tp_size} cannot be split over --nnodes {config.nnodes}")
    if not 0 <= config.node_rank < config.nnodes:
        raise ModelError(f"--node-rank must be between 0 and {config.nnodes - 1}, got {config.node_rank}")
    if config.dp_size > 1 and config.nnodes > 1:
        raise ModelError(f"--dp-size {config.dp_size} is for one node, and --nnodes is {config.nnodes}")


def _misfit_of_experts(config: EngineConfig) -> str:
    """Return why --ep-size does not fit --tp-size, and what would."""
    ep, tp, dp = config.ep_size, config.tp_size, config.dp_size
    misfit = f"--ep-size must divide --tp-size, or be 0, which stands for that; got {ep} and {tp}"
    if dp == 1 or ep != dp * tp:
        return misfit
    return (
        f"--ep-size {ep} would spread experts over the {dp} engines of --dp-size, each of which has all its weights: "
        f"it may be at most --tp-size {tp}. One engine on all {ep} GPUs: --tp-size {ep} --ep-size {ep} "
        f"--nnodes {config.nnodes} without --dp-size; or --dp-size {dp} --tp-size {tp} --ep-size {tp}"
        + (" over several servers, behind `radixloop router`" if config.nnodes > 1 else "")
    )


def resolve_sizes(config: EngineConfig, cuda_bytes: int | None) -> EngineConfig:
    """Return `config` with every size decided. cuda_bytes: memory of the GPU; None on a CPU.

    Resolving the result once more changes nothing.
    """
    is_cuda = cuda_bytes is not None
    chunk = config.chunked_prefill_size
    if chunk is None:
        chunk = CPU_CHUNK if cuda_bytes is None else SMALL_CUDA_CHUNK if cuda_bytes < SMALL_CUDA_BYTES else CUDA_CHUNK
    num_rows = config.max_running_requests or (CUDA_ROWS if is_cuda else CPU_ROWS)
    return config.replace(
        chunked_prefill_size=config.max_prefill_tokens if chunk < 1 else chunk,
        max_running_requests=num_rows,
        max_step_ms=CUDA_MAX_STEP_MS if is_cuda and config.max_step_ms is None else config.max_step_ms,
        cuda_graph_max_bs=min(config.cuda_graph_max_bs or CUDA_GRAPH_MAX_BS, num_rows),
        cuda_graph_bs=sorted({min(size, num_rows) for size in config.cuda_graph_bs or ()}) or None,
    )


def max_wait_s(config: EngineConfig) -> float | None:
    """Return the seconds that any step may take, see `StepPace`; None: no limit, since a GPU's largest is short.

    config: resolved.
    """
    return CPU_MAX_STEP_S if config.device == "cpu" and config.max_step_ms != 0 else None


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of one rank's tables and buffers; the same on all ranks."""

    num_rows: int
    """Requests that run at once."""
    max_len: int
    """Tokens of the longest prompt with its answer."""
    chunk: int
    """Prompt tokens of a step at most."""
    page_size: int

    @classmethod
    def of(cls, config: EngineConfig, context_length: int) -> "Sizes":
        """config: resolved. context_length: the model's."""
        assert config.max_running_requests and config.chunked_prefill_size
        return cls(config.max_running_requests, context_length, config.chunked_prefill_size, config.page_size)

    @property
    def max_step_tokens(self) -> int:
        """Tokens of the largest step that is scheduled: a chunk, or a token of every row."""
        return max(self.chunk, self.num_rows)

    @property
    def max_staged_tokens(self) -> int:
        """Tokens of the largest step that is launched: longer by a graph's padding, or by a page.

        A chunk that is not a prompt's last is at least a page.
        """
        return self.max_step_tokens + max(self.num_rows, self.page_size)

    @property
    def max_staged_requests(self) -> int:
        """Requests of the largest step that is launched: a graph's padding included."""
        return self.num_rows + MAX_PROMPTS

    def num_slots(self, num_tokens: int) -> int:
        """Return the slots of a KV pool for `num_tokens`: a page more, which padding writes to."""
        return num_tokens + self.page_size


def max_graph_tokens(bytes_per_token: int) -> int:
    """Return the tokens of the largest step that a CUDA graph makes faster, of which each meets so much of weights."""
    return int(MAX_GRAPH_WORK / bytes_per_token)


def choose_graph_sizes(
    config: EngineConfig, sizes: Sizes, is_generation: bool, max_tokens: int, *, has_latents: bool = False
) -> GraphSizes | None:
    """Return which steps are captured as CUDA graphs, or None if none are. config: resolved, for CUDA.

    is_generation, has_latents: the model's, as its cache has. max_tokens: see `max_graph_tokens`.
    """
    is_captured = (
        is_generation
        and not (config.disable_cuda_graph or config.is_embedding)
        and config.attention_backend != "torch"  # which waits for the device
    )
    if not is_captured:
        return None
    assert config.cuda_graph_max_bs
    return GraphSizes(
        config.cuda_graph_bs or default_batch_sizes(config.cuda_graph_max_bs),
        max_prompt_tokens=min(sizes.chunk, sizes.max_len, *([MAX_FEW_PROMPTS_TOKENS] if has_latents else [])),
        max_tokens=max_tokens,
        max_requests=sizes.num_rows,
        has_latents=has_latents,
    )


def graphs_bytes(graph_sizes: GraphSizes | None, largest_step: int, max_step_tokens: int) -> int:
    """Return an estimate of the graphs' device memory: the share of `largest_step` bytes of the largest captured one.

    largest_step: bytes that a step of `max_step_tokens` takes.
    """
    if graph_sizes is None:
        return 0
    return largest_step * min(graph_sizes.max_prompt_tokens, graph_sizes.max_tokens) // max_step_tokens
