"""Building an engine: from a configuration to the parts that run."""

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.distributed import TCPStore

from cache.allocator import PageAllocator
from cache.layout import Latent
from cache.pool import CachePool
from cache.radix import NoCache, RadixCache
from cache.window import WindowSlots
from cache.window_radix import WindowRadixCache
from engine.checkpoint.folder import resolve_model
from engine.checkpoint.weights import load_weights, pack_weights
from engine.config import EngineConfig
from engine.layers.communicator import Communicator
from engine.layers.layer import LayerConfig
from engine.machine import check_positions, describe_backends, resolve_config
from engine.model_config import ModelConfig
from engine.model_files import load_model_files, new_grammars, new_reader
from engine.models.base import CausalLM
from engine.models.registry import build_model, load_config
from engine.rank_maintenance import RankMaintenance
from engine.ranks.channel import ChannelReader
from engine.ranks.children import Parent, settle_garbage_collector
from engine.ranks.leader import Follower, Ranks, arrive, follow, join_store
from engine.ranks.nodes import gloo_interface
from engine.ranks.placement import stay_near
from engine.schedule.rows import Rows
from engine.schedule.scheduler import Scheduler
from engine.sizes import Sizes, choose_graph_sizes, graphs_bytes, max_graph_tokens
from engine.step.batch import Stager
from engine.step.cuda_graph import GraphSizes
from engine.step.memory import MemoryBudget, plan_memory
from engine.step.model_runner import ModelRunner
from engine.step.sampler import Sampler
from engine.step.warmup import bytes_per_token, compile_kernels, load_kernels, measure_step
from engine.step.window_memory import KVSplit, max_window
from engine.text.grammar import GrammarCompiler, MaskFiller
from engine.text.tokenizer import Tokenizer
from engine.vision.reader import MediaReader
from engine.vision.tower import Tower, load_tower
from kernels.compilers import end_compilers

logger = logging.getLogger(__name__)

KV_DTYPES = {"bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
SELF_TEST_BYTES, P2P_CHECK_BYTES = 1 << 10, 64 << 20
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class EngineParts:
    """The objects of which an engine consists, for the step loop and everything around it."""

    config: EngineConfig
    model_config: ModelConfig
    tokenizer: Tokenizer
    rows: Rows
    scheduler: Scheduler
    runner: ModelRunner
    memory: MemoryBudget
    grammars: GrammarCompiler | None  # None: --grammar-backend none
    rank_maintenance: RankMaintenance
    ranks: Ranks | None  # the other ones
    reader: MediaReader | None  # of pictures, where the model reads any
    tower: Tower | None  # likewise


def build(
    config: EngineConfig,
    on_progress: Callable[[str], None],
    on_failure: Callable[[str], object] = logger.critical,
    on_tokenizer: Callable[[Tokenizer], object] | None = None,
) -> EngineParts:
    """Build every part of an engine. Blocks for as long as loading takes. `ModelError` if the model cannot be served.

    on_failure: called from a thread, with the reason, when one of several ranks can compute no more; nor can the
    engine then. on_tokenizer: see `Engine.start`.
    """
    config = resolve_config(config)
    folder = resolve_model(config)
    model_config, tokenizer = load_model_files(folder, config)
    if on_tokenizer is not None:
        on_tokenizer(tokenizer)
    if config.num_expert_groups > 1 and not any(model_config.experts):
        logger.warning("--ep-size has no effect: the model has no experts")
    if config.device == "cpu":
        check_positions(model_config)
    reader = new_reader(config, model_config, folder, tokenizer)
    comm = Communicator(0, config.tp_size)
    model = new_model(config, model_config, comm)  # raises if it cannot be split, before a process is started
    ranks = None
    if config.tp_size > 1:  # other hosts' CPUs may differ: the dtype is decided here
        dtype = str(model_config.dtype).removeprefix("torch.")
        ranks = Ranks(config.replace(dtype=dtype), folder, run_rank, on_failure)
    try:
        store = None if ranks is None else ranks.store
        tower, pictures_bytes = None, 0
        if reader is not None:  # before the rest, which takes what memory is left
            tower = load_tower(
                reader.family, folder, model_config, config.load_format, torch.device(config.device or "cpu")
            )
            pictures_bytes = tower.largest_bytes() + config.mm_embedding_cache_mb * MIB
            on_progress("tower loaded")
        runner, memory = build_runner(
            config, model_config, folder, model, comm, store, on_progress, pictures_bytes=pictures_bytes
        )
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

    scheduler = _new_scheduler(config, model_config, runner)
    maintenance = RankMaintenance(config, runner, lambda: new_model(config, model_config, comm))
    rows = runner.sampler.rows
    return EngineParts(
        config, model_config, tokenizer, rows, scheduler, runner, memory, grammars, maintenance, ranks, reader, tower
    )


def _new_scheduler(config: EngineConfig, model_config: ModelConfig, runner: ModelRunner) -> Scheduler:
    assert config.chunked_prefill_size and config.random_seed is not None
    is_eos = np.zeros(model_config.vocab_size, bool)
    is_eos[[token for token in model_config.eos_token_ids if token < model_config.vocab_size]] = True
    page_size, kv = config.page_size, runner.kv
    cache, windows, window = RadixCache(page_size), None, max_window(kv.layout)
    if kv.num_window_slots is not None:
        cache = WindowRadixCache(page_size, window)
        windows = WindowSlots(kv.num_slots // page_size, kv.num_window_slots // page_size, page_size, window)
    return Scheduler(
        runner.sampler.rows,
        PageAllocator(kv.num_slots // page_size, page_size),
        NoCache(page_size) if config.disable_radix_cache else cache,
        is_eos=is_eos,
        chunked_prefill_size=config.chunked_prefill_size,
        windows=windows,
        policy=config.schedule_policy,
        conservativeness=config.schedule_conservativeness,
        max_queued=config.max_queued_requests,
        max_queued_tokens=config.max_queued_tokens,
        seed=config.random_seed,
        has_rope_axes=runner.model.has_rope_axes,
    )


def build_runner(
    config: EngineConfig,
    model_config: ModelConfig,
    folder: Path,
    model: CausalLM,
    comm: Communicator,
    store: TCPStore | None,
    on_progress: Callable[[str], None],
    *,
    pictures_bytes: int = 0,
) -> tuple[ModelRunner, MemoryBudget]:
    """Load this rank's share of `model`, meet the others at `store`, measure, allocate the KV pool, capture graphs.

    The same on every rank. Blocks for as long as that takes. config: resolved. pictures_bytes: of features and of what
    makes them, on the rank that does.
    """
    device = _set_device(config, comm)
    if device.type != "cuda":
        end_compilers()  # a GPU was expected
    weights_bytes = _load_weights(model, folder, config, device)
    on_progress("weights loaded")
    if store is not None:
        _connect(config, comm, store, device, on_progress)

    sizes = Sizes.of(config, model_config.context_length)
    graph_sizes = None
    if device.type == "cuda":
        max_tokens = comm.minimum(max_graph_tokens(bytes_per_token(model, weights_bytes)))
        has_latents = any(isinstance(entry, Latent) for entry in model.cache_layout())
        graph_sizes = choose_graph_sizes(config, sizes, model_config.is_generation, max_tokens, has_latents=has_latents)
    slot_table = torch.zeros(sizes.num_rows + 1, sizes.max_len, dtype=torch.int32, device=device)
    stager = Stager(sizes.max_staged_tokens, sizes.max_staged_requests, slot_table)
    rows = Rows(sizes.num_rows, sizes.max_len)
    sampler = Sampler(rows, model_config.vocab_size, model_config.eos_token_ids, device, config.sampling_backend)

    has_window_slots = keeps_windows(config, model_config)
    layout, kv_dtype = model.cache_layout(), KV_DTYPES.get(config.kv_cache_dtype, model_config.dtype)

    def new_runner(num_tokens: int, num_window_tokens: int) -> ModelRunner:
        num_window_slots = sizes.num_slots(num_window_tokens) if has_window_slots else None
        pool = CachePool(layout, sizes.num_slots(num_tokens), kv_dtype, device, num_window_slots)
        return ModelRunner(model, pool, sampler, stager, comm)

    largest_step = 0
    if device.type == "cuda":
        if config.attention_backend == "flashinfer":
            on_progress("FlashInfer's kernels are loaded; the first time they are compiled, which takes some 90 s")
        largest_step = _measure(new_runner(sizes.max_step_tokens, sizes.max_step_tokens), sizes, graph_sizes)
    memory = plan_memory(
        config, sizes.max_len, KVSplit.of(config, sizes.max_len, layout, kv_dtype, has_window_slots), device,
        weights=weights_bytes, tables=slot_table.nbytes, largest_step=largest_step,
        graphs=graphs_bytes(graph_sizes, largest_step, sizes.max_step_tokens), pictures=pictures_bytes,
        comm=comm,
    )  # fmt: skip
    on_progress("memory: " + ", ".join(f"{what} {size}" for what, size in memory.rows()))
    runner = new_runner(memory.max_total_num_tokens, memory.num_window_tokens)
    if device.type == "cuda":
        _capture(runner, sizes, graph_sizes, on_progress)
    return runner, memory


def _set_device(config: EngineConfig, comm: Communicator) -> torch.device:
    """Make the rank's device this thread's current one, near which it stays; on a CPU, divide the cores among ranks."""
    device = torch.device(config.device or "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        stay_near(device)
        if torch.cuda.memory_allocated():  # of an earlier engine of this process, in cycles
            gc.collect()
            torch.cuda.empty_cache()
    elif comm.size > 1:
        torch.set_num_threads(max(torch.get_num_threads() // comm.size, 1))
    return device


def _connect(
    config: EngineConfig,
    comm: Communicator,
    store: TCPStore,
    device: torch.device,
    on_progress: Callable[[str], None],
) -> None:
    """Meet the other ranks and test the way to them; with --enable-p2p-check, also its speed."""
    arrive(store, comm.rank, comm.size)
    with gloo_interface(store.host, store.port):
        comm.connect(store, device, use_peer_memory=config.nnodes == 1 and not config.disable_custom_all_reduce)
    rate = comm.self_test(config.answer_timeout_s, P2P_CHECK_BYTES if config.enable_p2p_check else SELF_TEST_BYTES)
    at = f", {rate / 1e9:.1f} GB/s between the slowest pair" if config.enable_p2p_check else ""
    on_progress(f"{comm.size} ranks: {comm.describe()}{at}")


def _measure(probe: ModelRunner, sizes: Sizes, graph_sizes: GraphSizes | None) -> int:
    """Return the bytes that the largest step takes on the device, and close `probe`. Compiles the kernels first.

    probe: a runner with a KV pool that is just large enough.
    """
    try:
        compile_kernels(probe, graph_sizes, sizes.max_step_tokens, sizes.num_rows, sizes.max_len)
    finally:
        end_compilers()
    largest_step = measure_step(probe, sizes.max_step_tokens, sizes.num_rows, sizes.max_len)
    probe.close()
    return largest_step


def _capture(
    runner: ModelRunner, sizes: Sizes, graph_sizes: GraphSizes | None, on_progress: Callable[[str], None]
) -> None:
    """Capture the CUDA graphs, and run what the first steps would otherwise wait for."""
    if graph_sizes is not None:
        start = time.perf_counter()
        runner.capture_graphs(graph_sizes)
        on_progress(f"steps captured as CUDA graphs in {time.perf_counter() - start:.1f} s")
    # Once more: the memory that the largest step takes is then reserved.
    measure_step(runner, sizes.max_step_tokens, sizes.num_rows, sizes.max_len)
    load_kernels(runner, sizes.num_rows, sizes.max_len)


def run_rank(
    parent: Parent, config: EngineConfig, folder: Path, rank: int, host: str, port: int, plans: ChannelReader
) -> None:
    """Follow rank 0, step by step, until it closes the channel. The target of another rank's process.

    config: rank 0's.
    """
    device = torch.device(config.device or "cpu")
    if device.type == "cuda":
        config = config.replace(device=f"cuda:{config.base_gpu_id + rank % config.ranks_per_node}")
    model_config = load_config(folder, config)
    comm = Communicator(rank, config.tp_size)
    model = new_model(config, model_config, comm)
    store = join_store(host, port)
    runner, _ = build_runner(config, model_config, folder, model, comm, store, logger.info)
    maintenance = RankMaintenance(config, runner, lambda: new_model(config, model_config, comm))
    settle_garbage_collector()
    parent.tell("ready")
    follow(runner, plans, Follower(rank, store, maintenance))
    runner.close()
    comm.close()


def _layer_config(config: EngineConfig, model_config: ModelConfig, comm: Communicator) -> LayerConfig:
    return LayerConfig(
        model_config.dtype,
        config.attention_backend or "torch",
        kv_dtype=KV_DTYPES.get(config.kv_cache_dtype),
        has_window_slots=keeps_windows(config, model_config),
        comm=comm,
        ep_size=config.num_expert_groups,
    )


def keeps_windows(config: EngineConfig, model_config: ModelConfig) -> bool:
    """Return whether layers that see a window have a pool of their own: one that is shorter than a context may be."""
    return not config.disable_hybrid_swa_memory and 0 <= max(model_config.windows) < model_config.context_length


def new_model(config: EngineConfig, model_config: ModelConfig, comm: Communicator) -> CausalLM:
    """Return this rank's share of the model, with its weights still on the meta device."""
    return build_model(model_config, _layer_config(config, model_config, comm), config.quantization)


def _load_weights(model: CausalLM, folder: Path, config: EngineConfig, device: torch.device) -> int:
    """Load and pack this rank's weights, and return their bytes."""
    num_bytes = load_weights(model, folder, config.load_format, device)
    pack_weights(model)
    return num_bytes
