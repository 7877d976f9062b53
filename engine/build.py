"""From a configuration to the parts of a running engine."""

import importlib.util
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.distributed import TCPStore

from cache.allocator import PageAllocator
from cache.layout import bytes_per_token
from cache.pool import CachePool
from cache.radix import NoCache, RadixCache
from engine.checkpoint.weights import load_weights, resolve_model, resolve_tokenizer
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.layers.communicator import Communicator
from engine.layers.layer import LayerConfig, unique_layers
from engine.model_config import ModelConfig
from engine.models.base import CausalLM
from engine.models.registry import build_model, load_config
from engine.ranks.channel import ChannelReader
from engine.ranks.children import Parent, settle_garbage_collector
from engine.ranks.leader import Follower, Ranks, follow, join_store
from engine.schedule.rows import Rows
from engine.schedule.scheduler import Scheduler
from engine.step.batch import Stager
from engine.step.cuda_graph import MAX_GRAPH_WORK, MAX_PROMPTS, GraphSizes, default_batch_sizes
from engine.step.memory import MemoryBudget, plan_memory
from engine.step.model_runner import ModelRunner
from engine.step.sampler import Sampler
from engine.step.warmup import compile_kernels, load_kernels, measure_step
from engine.text.grammar import GrammarCompiler, MaskFiller
from engine.text.tokenizer import Tokenizer
from engine.upkeep import Upkeep
from kernels import gated_gemm
from kernels.attention import choose_backend
from kernels.dense import SKINNY_MAX_TOKENS

logger = logging.getLogger(__name__)

KV_DTYPES = {"bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
CPU_ROWS, CUDA_ROWS = 64, 1024
CPU_CHUNK, CUDA_CHUNK, SMALL_CUDA_CHUNK = 512, 8192, 2048
SMALL_CUDA_BYTES = 25e9
CUDA_MAX_STEP_MS = 60.0
CUDA_GRAPH_MAX_BS = 1024
COUNTS = (
    "tp_size", "dp_size", "nnodes", "context_length", "max_total_tokens", "page_size", "max_running_requests",
    "max_prefill_tokens", "cuda_graph_max_bs", "stream_interval", "decode_log_interval",
)  # fmt: skip
SELF_TEST_BYTES, P2P_CHECK_BYTES = 1 << 10, 64 << 20


@dataclass(frozen=True, slots=True)
class Parts:
    config: EngineConfig
    model_config: ModelConfig
    tokenizer: Tokenizer
    rows: Rows
    scheduler: Scheduler
    runner: ModelRunner
    memory: MemoryBudget
    grammars: GrammarCompiler | None  # None: --grammar-backend none
    upkeep: Upkeep
    ranks: Ranks | None  # the other ones


def resolve_config(config: EngineConfig) -> EngineConfig:
    """`config` with everything decided that depends on the machine alone."""
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda was asked for, and torch sees no CUDA device")
    is_cuda = device.type == "cuda"
    check_sizes(config)
    if is_cuda:
        device = torch.device("cuda", config.base_gpu_id if device.index is None else device.index)
        check_gpus(device.index, config.ranks_per_node)
    if config.grammar_backend == "xgrammar" and importlib.util.find_spec("xgrammar") is None:
        raise ModelError("--grammar-backend xgrammar needs xgrammar: pip install 'radixloop[xgrammar]'")
    chunk = config.chunked_prefill_size
    if chunk is None:
        is_small = is_cuda and torch.cuda.get_device_properties(device).total_memory < SMALL_CUDA_BYTES
        chunk = (SMALL_CUDA_CHUNK if is_small else CUDA_CHUNK) if is_cuda else CPU_CHUNK
    max_running = config.max_running_requests or (CUDA_ROWS if is_cuda else CPU_ROWS)
    try:
        backend = choose_backend(config.attention_backend, device)
    except ValueError as error:
        raise ModelError(str(error)) from None
    sampling_backend = config.sampling_backend
    if sampling_backend == "flashinfer":
        logger.warning("sampling backend 'flashinfer' is not used: Triton's kernels, which sort nothing either, serve")
        sampling_backend = "triton"
    return config.replace(
        device=str(device),
        base_gpu_id=device.index or 0,
        chunked_prefill_size=config.max_prefill_tokens if chunk < 1 else chunk,
        max_running_requests=max_running,
        attention_backend=backend,
        sampling_backend=sampling_backend,
        max_step_ms=CUDA_MAX_STEP_MS if is_cuda and config.max_step_ms is None else config.max_step_ms,
        cuda_graph_max_bs=min(config.cuda_graph_max_bs or CUDA_GRAPH_MAX_BS, max_running),
        cuda_graph_bs=sorted({min(size, max_running) for size in config.cuda_graph_bs or ()}) or None,
        random_seed=time.time_ns() % (1 << 30) if config.random_seed is None else config.random_seed,
    )


def check_sizes(config: EngineConfig) -> None:
    """`ModelError` if a number is none that can be, or those of ranks, replicas and nodes do not fit each other."""
    for name in COUNTS:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ModelError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if any(size < 1 for size in config.cuda_graph_bs or ()):
        raise ModelError(f"--cuda-graph-bs must be at least 1 each, got {config.cuda_graph_bs}")
    if config.max_step_ms is not None and config.max_step_ms < 0:
        raise ModelError(f"--max-step-ms must not be negative, got {config.max_step_ms}")
    if config.tp_size % config.nnodes:
        raise ModelError(f"--tp-size {config.tp_size} cannot be split over --nnodes {config.nnodes}")
    if not 0 <= config.node_rank < config.nnodes:
        raise ModelError(f"--node-rank must be between 0 and {config.nnodes - 1}, got {config.node_rank}")
    if config.dp_size > 1 and config.nnodes > 1:
        raise ModelError(f"--dp-size {config.dp_size} is for one node, and --nnodes is {config.nnodes}")


def check_gpus(first: int, count: int) -> None:
    """`ModelError` if this machine does not have GPUs `first` to `first` + `count` - 1."""
    num_present = torch.cuda.device_count()
    if first + count > num_present:
        raise ModelError(
            f"{count} GPUs are needed, from number {first} on (--tp-size, --dp-size, --base-gpu-id); "
            f"this machine has {num_present}"
        )


def describe_backends(config: EngineConfig, device: torch.device, *, has_corun: bool = False) -> dict[str, str]:
    """Operation -> what serves it, and why. `config` is resolved; has_corun: steps may be split (`kernels.corun`)."""
    if device.type == "cpu":
        return {"all operations": "torch (the one for a CPU)"}
    attention = {
        "triton": "Triton (compiles in seconds, on any GPU)",
        "flashinfer": "FlashInfer for prompts (as asked), Triton in CUDA graphs and for single tokens (needs no plan)",
        "torch": "torch (as asked; slow, and without CUDA graphs)",
    }
    products = f"cuBLAS; Triton for up to {SKINNY_MAX_TOKENS} tokens (near the memory's speed)"
    if gated_gemm.is_available(device):
        products += "; gate and up by our own kernel (Hopper)"
    steps = "CUDA graphs; larger ones by kernel"
    if config.disable_cuda_graph:
        steps = "kernel by kernel (as asked)"
    elif config.attention_backend == "torch":
        steps = "kernel by kernel (torch's attention cannot be captured)"
    if has_corun:
        steps += "; attention of many decodes beside gate and up of prompts"
    return {
        "attention": attention[config.attention_backend or "torch"],
        "norms, rope, KV writes": "Triton (one pass each)",
        "products": products,
        "sampling": "torch (as asked)" if config.sampling_backend == "pytorch" else "Triton (no sort)",
        "steps": steps,
    }


def build(
    config: EngineConfig, on_progress: Callable[[str], None], on_failure: Callable[[str], object] = logger.critical
) -> Parts:
    """Everything a running engine consists of. Blocks for as long as loading takes.

    With several ranks, `on_failure` is told when one of them can no longer go on, from a thread; nor can the engine.
    """
    config = resolve_config(config)
    folder = resolve_model(config)
    model_config = load_config(folder, config)
    comm = Communicator(0, config.tp_size)
    model = new_model(config, model_config, comm)  # tells what cannot be split, before a process is started
    ranks = Ranks(config, folder, run_rank, on_failure) if config.tp_size > 1 else None
    try:
        with ThreadPoolExecutor(1) as executor:
            loading_tokenizer = executor.submit(load_tokenizer, folder, config)
            store = None if ranks is None else ranks.store
            runner, memory = build_runner(config, model_config, folder, model, comm, store, on_progress)
            tokenizer = loading_tokenizer.result()
        grammars = new_grammars(config, model_config, tokenizer)
        is_pinned = runner.device.type == "cuda"
        if grammars is None:  # the end of thinking is forced through masks, too
            runner.masks = MaskFiller(model_config.vocab_size, is_pinned)
        else:
            runner.masks = grammars.new_mask_filler(is_pinned)
        if ranks is not None:
            ranks.wait_ready()
            runner.ranks = ranks
    except BaseException as error:
        if ranks is None:
            raise
        raise ranks.abandon(error) from error
    has_corun = runner.splitter.can_split
    for operation, backend in describe_backends(config, runner.device, has_corun=has_corun).items():
        on_progress(f"{operation}: {backend}")

    assert config.chunked_prefill_size and config.random_seed is not None
    is_eos = np.zeros(model_config.vocab_size, bool)
    is_eos[[token for token in model_config.eos_token_ids if token < model_config.vocab_size]] = True
    cache_class = NoCache if config.disable_radix_cache else RadixCache
    rows = runner.sampler.rows
    scheduler = Scheduler(
        rows,
        PageAllocator(runner.kv.num_slots // config.page_size, config.page_size),
        cache_class(config.page_size),
        is_eos=is_eos,
        chunked_prefill_size=config.chunked_prefill_size,
        policy=config.schedule_policy,
        conservativeness=config.schedule_conservativeness,
        max_queued=config.max_queued_requests,
        max_queued_tokens=config.max_queued_tokens,
        seed=config.random_seed,
    )
    upkeep = Upkeep(config, runner, lambda: new_model(config, model_config, comm))
    return Parts(config, model_config, tokenizer, rows, scheduler, runner, memory, grammars, upkeep, ranks)


def build_runner(
    config: EngineConfig,
    model_config: ModelConfig,
    folder: Path,
    model: CausalLM,
    comm: Communicator,
    store: TCPStore | None,
    on_progress: Callable[[str], None],
) -> tuple[ModelRunner, MemoryBudget]:
    """What every rank does alike: load its share of `model`, meet the others at `store`, measure, make its KV pool."""
    device = torch.device(config.device or "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif comm.size > 1:
        torch.set_num_threads(max(torch.get_num_threads() // comm.size, 1))
    weights_bytes = _load_weights(model, folder, config, device)
    on_progress("weights loaded")
    if store is not None:
        comm.connect(store, device, use_peer_memory=config.nnodes == 1 and not config.disable_custom_all_reduce)
        rate = comm.self_test(config.dist_timeout, P2P_CHECK_BYTES if config.enable_p2p_check else SELF_TEST_BYTES)
        at = f", {rate / 1e9:.1f} GB/s between the slowest pair" if config.enable_p2p_check else ""
        on_progress(f"{comm.size} ranks: {comm.describe()}{at}")

    assert config.max_running_requests and config.chunked_prefill_size
    kv_dtype = KV_DTYPES.get(config.kv_cache_dtype, model_config.dtype)
    max_len = model_config.context_length
    num_rows = config.max_running_requests
    slot_table = torch.zeros(num_rows + 1, max_len, dtype=torch.int32, device=device)
    rows = Rows(num_rows, max_len)
    max_step_tokens = max(config.chunked_prefill_size, num_rows)
    # A step may be longer by a graph's padding, or by a page: no chunk that goes on is shorter.
    max_extra_tokens = max(num_rows, config.page_size)
    stager = Stager(max_step_tokens + max_extra_tokens, num_rows + MAX_PROMPTS, slot_table)
    sampler = Sampler(rows, model_config.vocab_size, model_config.eos_token_ids, device, config.sampling_backend)

    def new_pool(num_tokens: int) -> CachePool:
        return CachePool(model.cache_layout(), num_tokens + config.page_size, kv_dtype, device)

    largest_step = 0
    is_captured = (
        device.type == "cuda"
        and not (config.disable_cuda_graph or config.is_embedding)
        and model_config.is_generation
        and config.attention_backend != "torch"
    )
    max_graph_tokens = comm.minimum(int(MAX_GRAPH_WORK / weights_bytes))
    graph_sizes = None
    if is_captured:
        assert config.cuda_graph_max_bs
        graph_sizes = GraphSizes(
            config.cuda_graph_bs or default_batch_sizes(config.cuda_graph_max_bs),
            max_prompt_tokens=min(config.chunked_prefill_size, max_len),
            max_tokens=max_graph_tokens,
            max_requests=num_rows,
        )
    graph_tokens = min(graph_sizes.max_prompt_tokens, graph_sizes.max_tokens) if graph_sizes is not None else 0
    if device.type == "cuda":
        if config.attention_backend == "flashinfer":
            on_progress("FlashInfer's kernels are loaded; the first time they are compiled, which takes some 90 s")
        probe = ModelRunner(model, new_pool(max_step_tokens), sampler, stager, comm)
        compile_kernels(probe, graph_sizes, max_step_tokens, num_rows, max_len)
        largest_step = measure_step(probe, max_step_tokens, num_rows, max_len)
        probe.close()
        del probe
    memory = plan_memory(
        config, model_config.context_length, bytes_per_token(model.cache_layout(), kv_dtype), device,
        weights=weights_bytes, tables=slot_table.nbytes, largest_step=largest_step,
        graphs=largest_step * graph_tokens // max_step_tokens,
        comm=comm,
    )  # fmt: skip
    on_progress("memory: " + ", ".join(f"{what} {size}" for what, size in memory.rows()))
    runner = ModelRunner(model, new_pool(memory.max_total_num_tokens), sampler, stager, comm)
    if graph_sizes is not None:
        start = time.perf_counter()
        runner.capture_graphs(graph_sizes)
        on_progress(f"steps captured as CUDA graphs in {time.perf_counter() - start:.1f} s")
    if device.type == "cuda":
        measure_step(runner, max_step_tokens, num_rows, max_len)  # once more: the memory it takes is then at hand
        load_kernels(runner, num_rows, max_len)
    return runner, memory


def run_rank(
    parent: Parent, config: EngineConfig, folder: Path, rank: int, host: str, port: int, plans: ChannelReader
) -> None:
    """What the process of another rank does: the same as rank 0's, one step after the other. `config` is rank 0's."""
    device = torch.device(config.device or "cpu")
    if device.type == "cuda":
        config = config.replace(device=f"cuda:{config.base_gpu_id + rank % config.ranks_per_node}")
    model_config = load_config(folder, config)
    comm = Communicator(rank, config.tp_size)
    model = new_model(config, model_config, comm)
    store = join_store(host, port)
    runner, _ = build_runner(config, model_config, folder, model, comm, store, logger.info)
    upkeep = Upkeep(config, runner, lambda: new_model(config, model_config, comm))
    settle_garbage_collector()
    parent.tell("ready")
    follow(runner, plans, Follower(rank, store, upkeep))
    runner.close()
    comm.close()


def load_tokenizer(folder: Path, config: EngineConfig) -> Tokenizer:
    return Tokenizer.load(resolve_tokenizer(config, folder), config.trust_remote_code)


def new_grammars(config: EngineConfig, model_config: ModelConfig, tokenizer: Tokenizer) -> GrammarCompiler | None:
    if config.grammar_backend == "none":
        return None
    compiler_class: type[GrammarCompiler] = GrammarCompiler
    if config.grammar_backend == "xgrammar":
        from engine.text.xgrammar import XGrammarCompiler  # its library takes seconds to import

        compiler_class = XGrammarCompiler
    return compiler_class(
        tokenizer.to_json(),
        max(model_config.vocab_size, tokenizer.vocab_size),
        [token for token in model_config.eos_token_ids if token < tokenizer.vocab_size],
        tokenizer.backend.special_tokens,
        tokenizer.token_bytes,
    )


def _layer_config(config: EngineConfig, model_config: ModelConfig, comm: Communicator) -> LayerConfig:
    return LayerConfig(model_config.dtype, config.attention_backend or "torch", comm)


def new_model(config: EngineConfig, model_config: ModelConfig, comm: Communicator) -> CausalLM:
    """This rank's share, with its weights still on the meta device."""
    return build_model(model_config, _layer_config(config, model_config, comm))


def _load_weights(model: CausalLM, folder: Path, config: EngineConfig, device: torch.device) -> int:
    """Bytes of this rank's weights."""
    load_weights(model, folder, config.load_format, device)
    layers = unique_layers(model)
    num_bytes = sum(weight.nbytes for layer in layers for _, weight in layer.weights())
    for layer in layers:
        layer.pack()
    return num_bytes
