"""Flags of SGLang's and vLLM's servers that this one spells otherwise, does not need, or refuses: one table.

A flag whose effect this server has anyway, or whose lack changes only how fast it is, is accepted, and a line says
why it has no effect. One whose lack would change answers, memory or who is served is refused, with what to do instead.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

ANY = "*"  # in place of a flag's end, or of a value


@dataclass(frozen=True, kw_only=True)
class ForeignFlag:
    """Say what becomes of a flag, by its value."""

    flag: str
    """Ends with ANY: all flags that begin so."""
    num_values: int | None = 1
    """None: all words up to the next flag."""
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By value: the words that stand for it here; ANY among them stands for the value itself."""
    reason: str = ""
    """Why it has no effect; with no `words`, or none for its value, why it is refused."""
    is_refused: bool = False

    def translate(self, values: Sequence[str], note: Callable[[str], None]) -> list[str]:
        """Return the words for it. Raises `ValueError` if it is refused; calls `note` with why it has no effect."""
        value = " ".join(values).lower() if self.num_values else ANY
        words = self.words.get(value, self.words.get(ANY))
        if words is not None:
            return [one for word in words for one in (values if word == ANY else [word])]
        if self.is_refused:
            raise ValueError(self.reason)
        note(self.reason)
        return []

    def describe(self) -> str:
        """Return what becomes of it: the right side of its line in --help."""
        if not self.words and not self.is_refused:
            return f"no effect: {self.reason}"
        ours: dict[str, list[str]] = {}
        for value, words in self.words.items():
            ours.setdefault(" ".join(word for word in words if word != ANY), []).append(value or '""')
        meanings = [
            f"{', '.join(values)}: {text or 'no effect'}" if self.is_refused else text for text, values in ours.items()
        ]
        if self.is_refused:
            meanings.append(f"{'else ' if ours else ''}refused: {self.reason}")
        return "; ".join(meanings)


def alias(flag: str, *words: str) -> ForeignFlag:
    """Return a flag that means what `words` mean here, ANY among them being its value."""
    return ForeignFlag(flag=flag, num_values=int(ANY in words), words={ANY: words})


def by_value(flag: str, reason: str = "", **words: tuple[str, ...]) -> ForeignFlag:
    """Return a flag some of whose values have a meaning here, and whose others are refused."""
    return ForeignFlag(flag=flag, words=words, reason=reason, is_refused=True)


def no_effect(flag: str, reason: str, num_values: int | None = 0) -> ForeignFlag:
    return ForeignFlag(flag=flag, num_values=num_values, reason=reason)


def refused(flag: str, reason: str, num_values: int | None = 1, but: Iterable[str] = ()) -> ForeignFlag:
    """Return a flag that is refused, unless its value is one of `but`, which ask for nothing."""
    return ForeignFlag(
        flag=flag, num_values=num_values, reason=reason, words=dict.fromkeys(but, ()), is_refused=True
    )  # fmt: skip


SEEN_AGAIN = "a picture that comes again is found by what it holds"
OFF = ("none", "null", "")
COMPILED = "nothing is compiled: steps are CUDA graphs of our own kernels"
FLASHINFER = "FlashInfer serves only where --attention-backend asks for it"
FP8_KERNELS = "which product is fastest is chosen by device and shape"
SAMPLING = "Triton's kernels sample, on a CPU torch's"
NO_LORA, NO_DRAFTS = "there are no adapters: merge them into the weights", "there are no draft models"
NO_SSL = "this server speaks plain HTTP: put a proxy with the certificate before it"
NO_PIPELINE = "layers are not split over GPUs: --tp-size splits each weight, --nnodes spans hosts"
ONE_BACKEND = "one backend serves prompts and answers: --attention-backend"
WHITESPACE = "the whitespace of JSON is the grammar's"

VLLM_FLAGS = (
    alias("--max-model-len", "--context-length", ANY),
    alias("--max-num-seqs", "--max-running-requests", ANY),
    alias("--max-num-batched-tokens", "--chunked-prefill-size", ANY),
    alias("--block-size", "--page-size", ANY),
    alias("--enforce-eager", "--disable-cuda-graph"),
    alias("--no-enable-prefix-caching", "--disable-radix-cache"),
    alias("--no-enable-chunked-prefill", "--chunked-prefill-size=-1"),
    alias("--seed", "--random-seed", ANY),
    alias("--tokenizer", "--tokenizer-path", ANY),
    alias("--hf-overrides", "--json-model-override-args", ANY),
    alias("--enable-log-requests", "--log-requests"),
    alias("--uvicorn-log-level", "--log-level-http", ANY),
    by_value("--generation-config", "a model's own generation_config.json, or OpenAI's defaults (vllm)",
             auto=("--sampling-defaults", "model"), vllm=("--sampling-defaults", "openai")),
    by_value("--scheduling-policy", "first come (fcfs); priorities always go first",
             fcfs=("--schedule-policy", "fcfs"), priority=()),
    by_value("--task", "a model generates, classifies or scores as its architecture says, or embeds (embed)",
             auto=(), generate=(), classify=(), score=(), embed=("--is-embedding",), embedding=("--is-embedding",)),
    by_value("--runner", "a model generates, or embeds (pooling)",
             auto=(), generate=(), pooling=("--is-embedding",)),
    refused("--gpu-memory-utilization", "memory is measured: all that the largest step leaves is for the KV cache. "
            "--mem-fraction-static is the share of weights and KV cache alone, without what a step takes"),
    no_effect("--enable-chunked-prefill", "long prompts are always computed in chunks"),
    no_effect("--enable-prefix-caching", "prefixes are always reused"),
    no_effect("--enable-auto-tool-choice", "tools are always offered, and their calls parsed"),
    no_effect("--enable-reasoning", "reasoning is parsed as the chat template shows"),
    no_effect("--disable-log-requests", "requests are logged with --log-requests alone"),
    no_effect("--disable-log-stats", "see --decode-log-interval"),
    no_effect("--collect-detailed-traces", "every request's spans have its stages (--otlp-traces-endpoint)", 1),
    no_effect("--async-scheduling", "the next step is always decided while one runs"),
    no_effect("--guided-decoding-backend", "see --grammar-backend", 1),
    no_effect("--distributed-executor-backend", "ranks are processes, fed through shared memory", 1),
    no_effect("--swap-space", "what is retracted is computed again", 1),
    no_effect("--max-logprobs", "any number is served", 1),
    no_effect("--chat-template-content-format", "which one a template wants is found at the start", 1),
    no_effect("--compilation-config", COMPILED, 1),
    no_effect("--disable-mm-preprocessor-cache", SEEN_AGAIN),
    no_effect("--mm-processor-cache-gb", SEEN_AGAIN, 1),
    no_effect("--skip-mm-profiling", "memory is measured, the tower's too"),
    no_effect("--interleave-mm-strings", "a picture stands where its message has it"),
    refused("--mm-processor-kwargs", """give it by --mm-process-config '{"image": {...}}'"""),
    refused("--media-io-kwargs", """give it by --mm-process-config '{"video": {...}}'"""),
    refused("--rope-scaling", """give it by --json-model-override-args '{"rope_scaling": {...}}'"""),
    refused("--lora-modules", NO_LORA, None),
    refused("--ssl-keyfile", NO_SSL),
    refused("--ssl-certfile", NO_SSL),
    refused("--pipeline-parallel-size", NO_PIPELINE, but=("1",)),
)  # fmt: skip

# Of this and of earlier versions.
SGLANG_FLAGS = (
    alias("--max-num-reqs", "--max-running-requests", ANY),
    alias("--hf-chat-template-name", "--chat-template", ANY),
    no_effect("--disable-flashinfer", FLASHINFER),
    no_effect("--disable-flashinfer-sampling", SAMPLING),
    no_effect("--enable-torch-compile", COMPILED),
    no_effect("--torch-compile-max-bs", COMPILED, 1),
    alias("--enable-ep-moe", "--ep-size=0"),
    alias("--enable-expert-parallel", "--ep-size=0"),
    by_value("--moe-a2a-backend", "every rank sees all tokens, and one sum over ranks ends a layer", none=()),
    no_effect("--moe-dense-tp-size", "layers without experts are split over all ranks", 1),
    no_effect("--enable-mixed-chunk", "prompts and answers always share a step"),
    no_effect("--enable-nan-detection", "what is not finite always ends its own request"),
    no_effect("--enable-memory-saver", "memory can always be released and taken back"),
    no_effect("--enable-priority-scheduling", "priorities are always heeded"),
    no_effect("--enable-hierarchical-cache", "what the device's memory does not hold is computed again"),
    no_effect("--hicache-*", "what the device's memory does not hold is computed again", 1),
    no_effect("--disable-cuda-graph-padding", "sizes between two graphs are always padded"),
    no_effect("--disable-outlines-disk-cache", "grammars are not kept on disk"),
    no_effect("--disable-disk-cache", "grammars are not kept on disk"),
    no_effect("--num-continuous-decode-steps", "the next step is always decided while one runs", 1),
    no_effect("--triton-attention-num-kv-splits", "tuned for each shape", 1),
    no_effect("--triton-attention-reduce-in-fp32", "sums of attention are always float32"),
    no_effect("--nccl-port", "the ranks of a host find any free one", 1),
    no_effect("--fp8-gemm-backend", FP8_KERNELS, 1),
    no_effect("--fp8-gemm-runner-backend", FP8_KERNELS, 1),
    no_effect("--enable-multimodal", "a model that reads pictures always does"),
    no_effect("--disable-fast-image-processor", "pictures are prepared by the slow ones, on the CPU"),
    no_effect("--mm-attention-backend", "towers run as Hugging Face wrote them", 1),
    no_effect("--keep-mm-feature-on-device", "--mm-embedding-cache-mb is what features may take"),
    no_effect("--sleep-on-idle", "an idle server always sleeps"),
    no_effect("--show-time-cost", "see /start_profile"),
    no_effect("--warmups", "see --skip-server-warmup", 1),
    no_effect("--quantization-param-path", "FP8 keys and values (--kv-cache-dtype) are kept without scales", 1),
    refused("--cpu-offload-gb", "weights stay in the memory of the device that computes", but=("0", "0.0")),
    refused("--tokenizer-mode", "tokenizers are the fast ones", but=("auto",)),
    refused("--pp-size", NO_PIPELINE, but=("1",)),
    refused("--enable-dp-attention", "--dp-size runs whole engines", 0),
    refused("--enable-lora", NO_LORA, 0),
    refused("--lora-paths", NO_LORA, None),
    refused("--speculative-*", NO_DRAFTS),
    refused("--disaggregation-*", "prompts and answers are computed by the same server", but=OFF),
    refused("--prefill-attention-backend", ONE_BACKEND),
    refused("--decode-attention-backend", ONE_BACKEND),
    refused("--constrained-json-whitespace-pattern", WHITESPACE),
    refused("--constrained-json-disable-any-whitespace", WHITESPACE, 0),
    refused("--allow-auto-truncate", "a prompt that does not fit is refused, with the numbers", 0),
    refused("--enable-custom-logit-processor", "a client's code is not run", 0),
    refused("--enable-deterministic-inference", "answers at temperature 0 may differ with what runs beside them", 0),
    refused("--delete-ckpt-after-loading", "this server deletes no model", 0),
    refused("--preferred-sampling-params", "defaults are the model's generation_config.json or OpenAI's constants"),
)  # fmt: skip

SERVER_FLAGS = (*VLLM_FLAGS, *SGLANG_FLAGS)

PREFIXES = "a worker's known prefixes are bounded, and an idle one is preferred when loads differ much"
ROUTER_FLAGS = (
    *(no_effect(f"--{name}", PREFIXES, 1) for name in (
        "cache-threshold", "balance-abs-threshold", "balance-rel-threshold", "eviction-interval",
        "eviction-interval-secs", "max-tree-size",
    )),
    no_effect("--worker-startup-timeout-secs", "a worker joins whenever it is healthy", 1),
    no_effect("--worker-startup-check-interval", "see --health-check-interval", 1),
    refused("--pd-disaggregation", "prompts and answers are computed by the same server", 0),
    refused("--service-discovery", "POST /workers with a url adds a worker", 0),
)  # fmt: skip

MODELSCOPE_VARIABLES = ("SGLANG_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE")


def find(flag: str, table: Collection[ForeignFlag]) -> ForeignFlag | None:
    """Return the entry of a flag, spelled with dashes or, as vLLM takes it too, with underscores."""
    flag = flag.replace("_", "-")
    return next(
        (one for one in table if one.flag == flag or (one.flag[-1] == ANY and flag.startswith(one.flag[:-1]))), None
    )


def translate(argv: Sequence[str], table: Collection[ForeignFlag], note: Callable[[str], None]) -> list[str]:
    """Return a command line with the flags of `table` in this server's own words.

    note: called with a line for each flag without effect. Raises `ValueError` for a flag that is refused.
    """
    translated, left = list[str](), list(argv)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        foreign = find(name, table) if word.startswith("-") else None
        if foreign is None:
            translated.append(word)
            continue
        values = [value] if equals else []
        while not equals and left and not left[0].startswith("--"):
            if foreign.num_values is not None and len(values) >= foreign.num_values:
                break
            values.append(left.pop(0))
        try:
            translated += foreign.translate(values, lambda why, name=name: note(f"{name} has no effect: {why}"))  # type: ignore[misc]
        except ValueError as error:
            raise ValueError(f"{name} is refused: {error}") from None
    return translated


def uses_modelscope(environ: Mapping[str, str]) -> bool:
    """Return whether the environment says, as SGLang and vLLM read it, that hub ids are ModelScope's."""
    return any(environ.get(name, "").lower() in ("1", "true") for name in MODELSCOPE_VARIABLES)


def describe(table: Collection[ForeignFlag]) -> str:
    """Return the table as text, for --help."""
    lines = [f"  {one.flag:<42} {one.describe()}" for one in table]
    return "\n".join(["flags of SGLang and vLLM that are spelled otherwise, not needed, or refused:", *lines])
