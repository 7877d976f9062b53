"""The options of an engine: one frozen dataclass.

The command line and its help are made from it; the README's table of flags is tested against it.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

from engine.replicas.balance import METHODS


def option(default: Any, group: str, help: str, *, aliases: tuple[str, ...] = (), choices: tuple[str, ...] = ()) -> Any:
    """Return a dataclass field that is also a command-line flag: `--name-with-dashes` and its aliases."""
    metadata = {"group": group, "help": help, "aliases": aliases, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


MODEL, MEMORY, SCHEDULE, KERNELS, PARALLEL = "model", "memory", "scheduling", "kernels", "parallelism"
DEBUG = "logging and debugging"
ANSWER_TIMEOUT_S, START_TIMEOUT_S = 30.0, 600.0  # of other ranks, and of other hosts


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Every option of the engine. None: decided at start, from the model and the device, or no limit."""

    model_path: str = option(
        "demo",
        MODEL,
        "folder, hub id, .gguf file (of a repository: org/name:Q4_K_M), or `demo` (SmolLM2-135M-Instruct)",
        aliases=("--model",),
    )
    tokenizer_path: str | None = option(None, MODEL, "folder or hub id of the tokenizer, if not the model's")
    skip_tokenizer_init: bool = option(
        False, MODEL, "load no tokenizer: requests bring input_ids, answers are output_ids, text and chats are refused"
    )
    load_format: str = option(
        "auto", MODEL, "how weights are stored; dummy: random weights", choices=("auto", "safetensors", "gguf", "dummy")
    )
    quantization: str | None = option(
        None, MODEL, "round weights while they are loaded: fp8, w8a8_int8, int8, int4; of a quantized checkpoint its "
        "method, which need not be named; none: dequantize GGUF weights, which stay packed by default",
        aliases=("-q", "--torchao-config"),
    )  # fmt: skip
    revision: str | None = option(None, MODEL, "branch, tag or commit of a hub id")
    download_dir: str | None = option(None, MODEL, "where downloads and converted weights are kept")
    use_modelscope: bool = option(False, MODEL, "take hub ids from ModelScope instead of Hugging Face")
    trust_remote_code: bool = option(
        False, MODEL, "run Python code that comes with a tokenizer, if it has no tokenizer.json"
    )
    dtype: str = option(
        "auto",
        MODEL,
        "of weights and activations; auto: the checkpoint's (bfloat16 for float32), on a CPU what it multiplies fast",
        choices=("auto", "half", "float16", "bfloat16", "float", "float32"),
    )
    context_length: int | None = option(None, MODEL, "longest prompt + answer in tokens, if not the model's")
    device: str | None = option(None, MODEL, "cuda or cpu; default: cuda where there is one")
    json_model_override_args: str = option("{}", MODEL, "JSON object that overrides entries of config.json")
    is_embedding: bool = option(False, MODEL, "turn prompts into vectors, and do nothing else")
    pooling: str | None = option(
        None, MODEL, "prompts become the last token's state or the mean; default: the model's own, or last",
        choices=("last", "mean"),
    )  # fmt: skip
    enable_return_hidden_states: bool = option(
        False, MODEL, "requests may ask for the hidden states of their tokens (`return_hidden_states`)"
    )
    sampling_defaults: str = option(
        "model", MODEL, "defaults of sampling fields: the model's generation_config.json or OpenAI's constants",
        choices=("model", "openai"),
    )  # fmt: skip
    preferred_sampling_params: str | None = option(
        None, MODEL, 'sampling fields that go before these defaults, as JSON: {"temperature": 0.6, "top_p": 0.95}',
        aliases=("--override-generation-config",),
    )  # fmt: skip

    kv_cache_dtype: str = option(
        "auto", MEMORY, "of cached keys and values", choices=("auto", "bfloat16", "fp8_e4m3", "fp8_e5m2")
    )
    mem_fraction_static: float | None = option(
        None, MEMORY, "share of device memory for weights + KV; default: measured, all that the largest step leaves"
    )
    max_total_tokens: int | None = option(None, MEMORY, "size of the KV pool in tokens, if not measured")
    page_size: int = option(1, MEMORY, "KV slots a page: the granularity of prefix reuse")
    disable_hybrid_swa_memory: bool = option(
        False, MEMORY, "layers that see a window of tokens hold the whole context, as all others"
    )
    swa_full_tokens_ratio: float | None = option(
        None, MEMORY, "tokens that layers with a window hold, per token of the KV pool; default: two windows for each "
        "request that may run and a chunk, 0.5 at most",
    )  # fmt: skip
    disable_radix_cache: bool = option(
        False, MEMORY, "do not reuse prefixes between requests", aliases=("--disable-radix",)
    )

    mm_embedding_cache_mb: int = option(
        512, MEMORY, "megabytes of what towers make of pictures, for requests that run and for those that come again"
    )

    max_running_requests: int | None = option(None, SCHEDULE, "requests that may run at once")
    max_queued_requests: int | None = option(None, SCHEDULE, "requests that wait for others to end; beyond it: 429")
    max_queued_tokens: int | None = option(None, SCHEDULE, "prompt tokens that may wait together; beyond it: 429")
    chunked_prefill_size: int | None = option(
        None, SCHEDULE, "prompt tokens computed in one step at most; -1: no limit"
    )
    max_prefill_tokens: int = option(16384, SCHEDULE, "prompt tokens of one step when chunking is off")
    max_step_ms: float | None = option(
        None,
        SCHEDULE,
        "while answers stream, cut prompt chunks so that a step takes at most this long; 0: any, on a CPU too",
    )
    request_waiting_timeout: float | None = option(None, SCHEDULE, "seconds a request may wait; beyond it: 503")
    request_running_timeout: float | None = option(None, SCHEDULE, "seconds a request may run; beyond it: 503")
    schedule_policy: str = option(
        "lpm", SCHEDULE, "order of the queue: longest prefix match, first come, by tree weight, random",
        choices=("lpm", "fcfs", "dfs-weight", "random"),
    )  # fmt: skip
    schedule_conservativeness: float = option(1.0, SCHEDULE, "larger: fewer retractions, fewer requests at once")
    grammar_backend: str = option(
        "llguidance", SCHEDULE,
        "what constrains answers; xgrammar: knows fewer schemas, no jump-forward; none: such requests are refused",
        choices=("llguidance", "xgrammar", "none"),
    )  # fmt: skip
    disable_jump_forward: bool = option(False, SCHEDULE, "compute the tokens that a grammar forces one by one")
    disable_overlap_schedule: bool = option(
        False, SCHEDULE, "wait for each step's tokens before deciding the next", aliases=("--disable-overlap",)
    )
    random_seed: int | None = option(None, SCHEDULE, "seed of requests that bring none")

    attention_backend: str | None = option(
        None, KERNELS, "attention kernels", choices=("flashinfer", "triton", "torch")
    )
    sampling_backend: str | None = option(
        None, KERNELS, "sampling kernels; for flashinfer, SGLang's default, Triton's serve",
        choices=("triton", "pytorch", "flashinfer"),
    )  # fmt: skip
    disable_cuda_graph: bool = option(False, KERNELS, "launch every kernel of a decode step by itself")
    cuda_graph_max_bs: int | None = option(None, KERNELS, "largest decode batch with a CUDA graph")
    cuda_graph_bs: list[int] | None = option(None, KERNELS, "the decode batch sizes with a CUDA graph")

    tp_size: int = option(
        1, PARALLEL, "GPUs, or CPU processes, that share one model", aliases=("--tp", "--tensor-parallel-size")
    )
    ep_size: int = option(
        1, PARALLEL, "groups of those that share out a layer's experts, instead of splitting each of them; must divide "
        "--tp-size; 0, as --enable-ep-moe: as many",
        aliases=("--ep", "--expert-parallel-size"),
    )  # fmt: skip
    dp_size: int = option(1, PARALLEL, "whole engines behind the one address", aliases=("--dp", "--data-parallel-size"))
    load_balance_method: str = option(
        "cache_aware", PARALLEL, "which engine gets a request: the one that knows its prefix, the next, the least busy",
        choices=METHODS,
    )  # fmt: skip
    base_gpu_id: int = option(0, PARALLEL, "the first GPU to use")
    enable_p2p_check: bool = option(
        False, PARALLEL, "at start, also move 64 MiB between each pair of ranks, check the bytes, and report the speed"
    )
    disable_custom_all_reduce: bool = option(
        False, PARALLEL, "do all sums over GPUs with NCCL, none through peer memory"
    )
    nnodes: int = option(
        1, PARALLEL, "hosts that share one model; each runs this command with its own --node-rank, or is started by "
        "`torchrun --nnodes N --nproc-per-node 1 ... -m server`, which sets this and the next three",
    )  # fmt: skip
    node_rank: int = option(0, PARALLEL, "which of them this is; 0 serves")
    dist_init_addr: str | None = option(
        None, PARALLEL, "HOST:PORT of node 0, free there, where the others find it", aliases=("--nccl-init-addr",)
    )
    join_dist_store: bool = option(
        False, PARALLEL, "a torch.distributed store is at --dist-init-addr already, as torchrun's: start none"
    )
    dist_timeout: float | None = option(
        None, PARALLEL, "seconds until a rank or host that does not answer ends the server, as it starts and in steps; "
        f"default: {ANSWER_TIMEOUT_S:g}, and {START_TIMEOUT_S:g} for all hosts to be started",
    )  # fmt: skip

    stream_interval: int = option(1, DEBUG, "least tokens of a streamed piece")
    decode_log_interval: int = option(40, DEBUG, "decode steps between two log lines")
    disable_canary: bool = option(
        False, DEBUG, "do not compute a known text again every 5 minutes, to notice weights or caches gone wrong"
    )
    watchdog_timeout: float = option(300.0, DEBUG, "seconds a step may take before the server gives up; 0: any")

    @property
    def answer_timeout_s(self) -> float:
        """Seconds that a rank or host which has begun may take to answer."""
        return ANSWER_TIMEOUT_S if self.dist_timeout is None else self.dist_timeout

    @property
    def start_timeout_s(self) -> float:
        """Seconds that all hosts may take to be started."""
        return START_TIMEOUT_S if self.dist_timeout is None else self.dist_timeout

    @property
    def num_expert_groups(self) -> int:
        """Groups of ranks that share out a layer's experts."""
        return self.ep_size or self.tp_size

    @property
    def ranks_per_node(self) -> int:
        return self.tp_size // self.nnodes

    def replace(self, **changes: Any) -> "EngineConfig":
        return dataclasses.replace(self, **changes)


def option_type(annotation: Any) -> tuple[type, bool]:
    """Return (scalar type, is a list) of a field's annotation, for parsers: `list[int] | None` gives (int, True)."""
    args = [arg for arg in get_args(annotation) if arg is not type(None)]
    if getattr(annotation, "__origin__", None) is list:
        return get_args(annotation)[0], True
    return option_type(args[0]) if args else (annotation, False)
