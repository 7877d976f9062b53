"""Is this server right on this GPU, and how fast is it? One script, no network, bounded in time.

    python -m bench.gpu
    python -m bench.gpu --only correctness --checks greedy logits
    python -m bench.gpu --only speed --models llama3-8b --workloads decode1 stream256 --server-args "--page-size 16"
    python -m bench.gpu --only speed --models qwen3-30b-a3b --starts 1 --server-args "--tp 4 --ep-size 4"

Correctness first, each check in a process of its own:
greedy: the demo model's greedy answers in float32 are on the GPU what they are on the CPU, token for token.
logits: in bfloat16 the error of our logits is that of transformers' on the same GPU, each against transformers in
        float32, for small random checkpoints of every family and for one of Llama-3-8B's shape; prompts in chunks,
        mixed steps and decode steps, with every attention backend there is.
pool:   a KV pool that is too small, down to a sixteenth of what is asked for at once: all answers are what they are
        with room for all, or part from that where two tokens are as likely; nothing is left behind, and the rate falls
        no faster than the pool.
pace:   while answers stream, a prompt of 100,000 tokens, another one, and a long tail behind the first one's cached
        tokens stretch no time between two tokens of a stream beyond --max-step-ms.
pytest: the tests marked `gpu`.

Then speed: for each model `python -m server` on dummy weights of the real shape, measured from its start to its first
healthy answer (the first time with the kernel caches as found, the second time with warm ones), loaded with
`bench.compare`'s workloads, watched while idle, and told to stop: it must exit with 0 and leave no GPU memory behind.

A --demo folder may lack weights (config.json and tokenizer.json are small enough to take anywhere): then random ones of
its shape stand in. `--device cpu --models demo --scale 0.02 --length-scale 0.1` tries the script itself without a GPU.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.compare import WORKLOADS, number, wide_console
from bench.cpu import ROOT, free_port, measure_idle
from bench.shapes import LLAMA3_8B, SHAPES
from cache.pool import CachePool
from engine.checkpoint.folder import resolve_model
from engine.checkpoint.weights import load_weights
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.layers.layer import LayerConfig
from engine.local import LocalEngine
from engine.models.registry import build_model, load_config
from engine.request import Request, SamplingParams
from engine.schedule.plan import Plan
from engine.state import Delta, RequestState
from engine.step.batch import Stager
from engine.step.fields import StepShape
from kernels import flashinfer_attention

DEFAULT_MODELS = ["llama3-8b", "qwen3-0.6b"]

# --- model folders ----------------------------------------------------------------------------------------------------


def make_dummy(folder: Path, config: dict[str, Any], tokenizer_folder: Path) -> None:
    """Write a model folder without weights; its tokenizer is another one's, filled up so that every id decodes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    taken = {*vocab.values(), *(token["id"] for token in tokenizer.get("added_tokens", ()))}
    vocab |= {f"token{i}": i for i in range(config["vocab_size"]) if i not in taken}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer_folder / name).is_file():
            shutil.copy(tokenizer_folder / name, folder)


def save_random(folder: Path, config: Any, device: str, dtype: torch.dtype) -> None:
    """Write a checkpoint with random weights for a transformers config; biases and norms are random, too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    model.save_pretrained(folder)


def demo_folder(args: argparse.Namespace) -> Path:
    return resolve_model(EngineConfig(model_path=args.demo, dtype="float32", quantization="none"))


def demo_with_weights(args: argparse.Namespace, console: Console) -> Path:
    """Return the demo's folder, or a copy with random weights if it has none."""
    source = demo_folder(args)
    if any(source.glob("*.safetensors")):
        return source
    from transformers import AutoConfig

    console.print(f"{source} has no weights: random ones of its shape stand in", style="yellow")
    config = AutoConfig.from_pretrained(source)
    config.initializer_range = 0.07  # answers vary, and no two logits tie
    config.tie_word_embeddings = False
    folder = args.cache_dir / "random-demo"
    save_random(folder, config, "cpu", torch.float32)
    for path in source.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


# --- correctness: greedy answers --------------------------------------------------------------------------------------

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "Seven wise wizards were counting to",
    "The three laws of motion are:\n1.",
    "Q: What is the boiling point of water?\nA:",
    "Grüße aus Köln! Das Wetter ist heute",
    "A long prompt repeats itself. " * 40 + "It says:",
)
NUM_GREEDY_TOKENS = 48


async def greedy_answers(folder: Path, device: str, **options: Any) -> list[list[int]]:
    """Greedy answers to all of `PROMPTS` at once, in float32."""
    config = EngineConfig(
        model_path=str(folder), dtype="float32", device=device, max_total_tokens=8192, max_running_requests=16,
        chunked_prefill_size=128, random_seed=0, **options,
    )  # fmt: skip
    async with LocalEngine(config) as engine:

        async def answer(prompt: str) -> list[int]:
            params = SamplingParams(max_new_tokens=NUM_GREEDY_TOKENS, temperature=0.0, ignore_eos=True)
            input_ids = await engine.encode(prompt)
            state = RequestState(Request(prompt, input_ids, params))
            return [token async for delta in engine.generate(state) for token in delta.token_ids]

        return await asyncio.gather(*map(answer, PROMPTS))


def check_greedy(args: argparse.Namespace, console: Console) -> bool:
    folder = demo_with_weights(args, console)
    wanted = asyncio.run(greedy_answers(folder, "cpu"))
    variants: dict[str, dict[str, Any]] = {
        "defaults": {},
        "no CUDA graphs, no overlap": {"disable_cuda_graph": True, "disable_overlap_schedule": True},
    }
    table = Table("greedy, float32", "answers as on the CPU", "first difference", box=box.SIMPLE)
    is_right = True
    for name, options in variants.items():
        got = asyncio.run(greedy_answers(folder, args.device, **options))
        differences = [
            f"prompt {prompt}, token {next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)}"
            for prompt, (ours, theirs) in enumerate(zip(got, wanted, strict=True))
            if ours != theirs
        ]
        table.add_row(name, f"{len(PROMPTS) - len(differences)} of {len(PROMPTS)}", (differences or ["none"])[0])
        is_right = is_right and not differences
    console.print(table)
    return is_right


# --- correctness: logits ----------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048,
    "initializer_range": 0.1, "tie_word_embeddings": False,
}  # fmt: skip
SMALL_LATENT: dict[str, Any] = SMALL | {
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64, "kv_lora_rank": 512, "q_lora_rank": 128,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "embedding_initializer_range": 0.1,
}  # fmt: skip
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "small Llama": ("LlamaConfig", SMALL),
    "small Mistral, window 100": ("MistralConfig", SMALL | {"sliding_window": 100}),
    "small Qwen2": ("Qwen2Config", SMALL),
    "small Qwen3, tied": ("Qwen3Config", SMALL | {"tie_word_embeddings": True}),
    "small Youtu, latent attention": ("YoutuConfig", SMALL_LATENT),
    "Llama-3-8B": ("LlamaConfig", LLAMA3_8B),
}
SEQUENCE_LENS = (700, 333)
NUM_DECODE_STEPS = 6
# Errors of two roundings of the same sums: as large on the whole, less so at their worst.
MAX_RMS_RATIO, MAX_PEAK_RATIO = 1.25, 2.0


def steps_of(lens: Sequence[int]) -> list[list[int]]:
    """Tokens of each sequence in each step: chunks of their prompts together, decode and prefill mixed, decode."""
    decode = [[1] * len(lens)] * NUM_DECODE_STEPS
    halves = [length // 2 for length in lens]
    rest = [length - half - NUM_DECODE_STEPS - 1 for length, half in zip(lens, halves, strict=True)]
    # The first sequence decodes a token while the others' prompts end, and ends its own while they decode.
    return [halves, [1, *rest[1:]], [rest[0], *[1] * (len(lens) - 1)], *decode]


@torch.inference_mode()
def our_logits(folder: Path, device: torch.device, backend: str, sequences: Sequence[np.ndarray]) -> torch.Tensor:
    """float32 [total tokens, vocabulary] of a bfloat16 model that gets `sequences` as `steps_of` says."""
    config = load_config(folder, EngineConfig(dtype="bfloat16"))
    model = build_model(config, LayerConfig(config.dtype, attention_backend=backend))
    load_weights(model, folder, "auto", device)
    lens = [len(sequence) for sequence in sequences]
    num_slots = sum(lens) + 1  # and slot 0, which belongs to nobody
    pool = CachePool(model.cache_layout(), num_slots, config.dtype, device)
    slot_table = np.zeros((len(lens), max(lens)), np.int32)
    scattered = np.random.default_rng(1).permutation(num_slots - 1).astype(np.int32) + 1
    for row, slots in enumerate(np.split(scattered, np.cumsum(lens)[:-1])):
        slot_table[row, : len(slots)] = slots
    stager = Stager(sum(lens), len(lens), torch.from_numpy(slot_table).to(device))
    done = np.zeros(len(lens), np.int32)
    parts: list[list[torch.Tensor]] = [[] for _ in lens]
    for step in steps_of(lens):
        rows = np.array(sorted(range(len(lens)), key=lambda row: step[row] > 1), np.int32)
        q_lens = np.array(step, np.int32)[rows]
        spans = [(row, done[row], done[row] + step[row]) for row in rows]
        plan = Plan(
            rows=rows,
            q_lens=q_lens,
            seq_lens=done[rows] + q_lens,
            input_ids=np.concatenate([sequences[row][start:end] for row, start, end in spans]),
            out_cache_loc=np.concatenate([slot_table[row, start:end] for row, start, end in spans]),
            num_decodes=int((q_lens == 1).sum()),
            samples=np.arange(len(rows), dtype=np.int32),
            epochs=np.zeros(len(rows), np.int64),
        )
        stager.upload(stager.write(plan, StepShape.of(plan)))
        batch = stager.views(StepShape.of(plan), plan).batch
        logits = model.compute_logits(model(batch, pool)).float()
        for row, part in zip(rows, logits.split(q_lens.tolist()), strict=True):
            parts[row].append(part.clone())
        done[rows] += q_lens
        if device.type == "cuda":
            torch.cuda.synchronize()  # the staging buffer is written again
    return torch.cat([part for row in parts for part in row])


@torch.inference_mode()
def transformers_logits(
    folder: Path, device: torch.device, dtype: torch.dtype, sequences: Sequence[np.ndarray]
) -> torch.Tensor:
    """float32 [total tokens, vocabulary]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    inputs = [torch.from_numpy(sequence).long().to(device)[None] for sequence in sequences]
    return torch.cat([model(ids, use_cache=False).logits[0].float() for ids in inputs])


def backends_of(device: torch.device) -> list[str]:
    """Return the attention backends that can run here."""
    if device.type == "cpu":
        return ["torch"]
    return ["torch", "triton", *(["flashinfer"] if flashinfer_attention.is_available()[0] else [])]


def rms_and_peak(values: torch.Tensor) -> tuple[float, float]:
    return float(values.square().mean().sqrt()), float(values.abs().max())


def check_logits(args: argparse.Namespace, console: Console) -> bool:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    device = torch.device(args.device)
    table = Table(box=box.SIMPLE)
    columns = ("logits, bfloat16", "attention", "size, rms", "theirs: error, rms", "ours", "theirs: worst", "ours")
    for i, column in enumerate((*columns, "same argmax", "right")):
        table.add_column(column, justify="right" if i > 1 else "left")
    is_right = True
    for name, (config_class, sizes) in CHECKPOINTS.items():
        if device.type == "cpu" and sizes["hidden_size"] > 1024:
            continue
        folder = args.cache_dir / "random-checkpoint"
        save_random(folder, getattr(transformers, config_class)(**sizes), args.device, torch.bfloat16)
        rng = np.random.default_rng(0)
        sequences = [rng.integers(3, sizes["vocab_size"], length).astype(np.int32) for length in SEQUENCE_LENS]
        exact = transformers_logits(folder, device, torch.float32, sequences)
        theirs = transformers_logits(folder, device, torch.bfloat16, sequences) - exact
        their_rms, their_peak = rms_and_peak(theirs)
        for backend in backends_of(device):
            ours = our_logits(folder, device, backend, sequences) - exact
            our_rms, our_peak = rms_and_peak(ours)
            # NaNs compare as false
            is_close = our_rms <= MAX_RMS_RATIO * their_rms and our_peak <= MAX_PEAK_RATIO * their_peak
            is_right = is_right and is_close
            same = (ours + exact).argmax(-1) == (theirs + exact).argmax(-1)
            table.add_row(
                name, backend, f"{rms_and_peak(exact)[0]:.3f}", f"{their_rms:.4f}", f"{our_rms:.4f}",
                f"{their_peak:.3f}", f"{our_peak:.3f}", f"{same.float().mean():.1%}",
                "yes" if is_close else "[red]NO[/]",
            )  # fmt: skip
        shutil.rmtree(folder)
    console.print(table)
    if device.type == "cuda":
        console.print(flashinfer_attention.is_available()[1], style="dim")
    return is_right


# --- correctness: a pool that runs out --------------------------------------------------------------------------------

NUM_CROWD, CROWD_PROMPT_LEN, CROWD_ANSWER_LEN = 64, 32, 224
POOL_SHARES = (1, 2, 4, 8, 16)
MIN_RATE = 0.5  # of what a pool's share of the whole would give
MAX_TIE = 1e-3  # between the log-probabilities of tokens that rounding may exchange: who was retracted is computed anew


@dataclass
class Crowd:
    """Record the answers to `NUM_CROWD` requests that came at once."""

    prompts: list[list[int]]
    answers: list[list[int]]
    tokens_per_s: float
    num_retractions: int
    num_left: int  # tokens of the pool that are neither free nor cached after the end


async def serve_crowd(folder: Path, device: str, pool_tokens: int) -> Crowd:
    """Return greedy answers in float32.

    Admission expects no request to need room for its answer, so that the pool does run out.
    """
    config = EngineConfig(
        model_path=str(folder), dtype="float32", device=device, max_total_tokens=pool_tokens, random_seed=0,
        max_running_requests=NUM_CROWD, schedule_conservativeness=0.0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    async with LocalEngine(config) as engine:
        prompts = rng.integers(3, engine.model_config.vocab_size, (NUM_CROWD, CROWD_PROMPT_LEN)).tolist()

        async def answer(i: int, prompt: list[int]) -> list[int]:
            params = SamplingParams(max_new_tokens=CROWD_ANSWER_LEN, temperature=0.0, ignore_eos=True)
            state = RequestState(Request(f"crowd-{i}", prompt, params))
            return [token async for delta in engine.generate(state) for token in delta.token_ids]

        started = time.perf_counter()
        answers = await asyncio.gather(*(answer(i, prompt) for i, prompt in enumerate(prompts)))
        seconds = time.perf_counter() - started
        engine.parts.scheduler.check()
        stats = engine.stats().scheduler
        num_left = stats.num_total_tokens - stats.num_free_tokens - stats.num_cached_tokens
        return Crowd(prompts, answers, sum(map(len, answers)) / seconds, stats.num_retractions, num_left)


async def gaps_between(folder: Path, device: str, ours: Crowd, theirs: Crowd, parted: Sequence[int]) -> list[float]:
    """Return how far apart the log-probabilities of two tokens are where answers to prompts `parted` first differ."""
    config = EngineConfig(
        model_path=str(folder), dtype="float32", device=device, max_total_tokens=4096, max_running_requests=1
    )
    gaps = []
    async with LocalEngine(config) as engine:
        for i in parted:
            a, b = ours.answers[i], theirs.answers[i]
            place = next(place for place, (one, other) in enumerate(zip(a, b, strict=True)) if one != other)
            request = Request(
                "gap", ours.prompts[i] + a[:place], SamplingParams(max_new_tokens=1, temperature=0.0),
                return_logprob=True, token_ids_logprob=[a[place], b[place]],
            )  # fmt: skip
            async for delta in engine.generate(RequestState(request)):
                assert delta.logprobs is not None
                ((one, _), (other, _)) = delta.logprobs.token_ids[0] or []
                assert one is not None and other is not None
                gaps.append(abs(one - other))
    return gaps


def check_pool(args: argparse.Namespace, console: Console) -> bool:
    folder = demo_with_weights(args, console)
    wanted_tokens = NUM_CROWD * (CROWD_PROMPT_LEN + CROWD_ANSWER_LEN)
    columns = ("tokens/s", "retractions", "answers as with room", "others: largest gap", "left behind")
    table = Table(f"pool of {wanted_tokens:,} tokens", *columns)
    ample: Crowd | None = None
    is_right = True
    for share in POOL_SHARES:
        crowd = asyncio.run(serve_crowd(folder, args.device, wanted_tokens // share + 1))
        ample = ample or crowd
        parted = [i for i, answer in enumerate(crowd.answers) if answer != ample.answers[i]]
        gaps = asyncio.run(gaps_between(folder, args.device, crowd, ample, parted)) if parted else []
        is_whole = all(len(answer) == CROWD_ANSWER_LEN for answer in crowd.answers)
        is_graceful = crowd.tokens_per_s >= MIN_RATE * ample.tokens_per_s / share
        is_tied = max(gaps, default=0.0) <= MAX_TIE
        is_right = is_right and is_whole and is_graceful and is_tied and not crowd.num_left
        table.add_row(
            f"1/{share}", f"{crowd.tokens_per_s:,.0f}", str(crowd.num_retractions),
            f"{NUM_CROWD - len(parted)} of {NUM_CROWD}", f"{max(gaps):.1e}" if gaps else "", str(crowd.num_left),
        )  # fmt: skip
    console.print(table)
    return is_right


# --- correctness: streams beside a long prompt ------------------------------------------------------------------------

NUM_STREAMS, STREAM_PROMPT_LEN = 8, 64
LONG_PROMPT_LEN = 100_000  # less where the context is shorter: three quarters of it
MAX_STEP_MS = 60.0
MAX_STRETCH = 1.15  # of the time between two tokens at its worst: the loop and its timer have their share


async def streams_beside(engine: LocalEngine, prompt: list[int]) -> tuple[list[float], float]:
    """Milliseconds between the tokens of `NUM_STREAMS` streams while `prompt` was computed, and seconds it took.

    Tokens that come together, as half characters do, shared the time.
    """
    rng = np.random.default_rng()
    arrivals: list[list[tuple[float, int]]] = [[] for _ in range(NUM_STREAMS)]  # time.perf_counter(), tokens
    streams, have_begun = [], asyncio.Event()
    for i, given in enumerate(arrivals):
        ids = rng.integers(3, engine.model_config.vocab_size, STREAM_PROMPT_LEN).tolist()
        max_new_tokens = engine.context_length - STREAM_PROMPT_LEN - 1
        params = SamplingParams(max_new_tokens=max_new_tokens // 4, temperature=0.0, ignore_eos=True)

        def sink(delta: Delta, given: list[tuple[float, int]] = given) -> None:
            given.append((time.perf_counter(), len(delta.token_ids)))
            if min(map(len, arrivals)) == 20:
                have_begun.set()

        streams.append(RequestState(Request(f"stream-{i}", ids, params, stream=True), sink))
        engine.submit(streams[-1])
    await have_begun.wait()
    params = SamplingParams(max_new_tokens=1, temperature=0.0)
    started = time.perf_counter()
    async for _ in engine.generate(RequestState(Request("long", prompt, params))):
        ended = time.perf_counter()
    for stream in streams:
        engine.abort(stream.rid)
    gaps = [(a, b, count) for given in arrivals for (a, _), (b, count) in itertools.pairwise(given) if count]
    return [1e3 * (b - a) / count for a, b, count in gaps if b > started and a < ended], ended - started


async def measure_pace(folder: Path, args: argparse.Namespace, table: Table) -> bool:
    config = EngineConfig(
        model_path=str(folder), load_format="dummy", device=args.device, max_step_ms=MAX_STEP_MS, random_seed=0
    )
    is_right = True
    async with LocalEngine(config) as engine:
        length = min(LONG_PROMPT_LEN, engine.context_length * 3 // 4)
        first, other, tail = np.random.default_rng(0).integers(3, engine.model_config.vocab_size, (3, length)).tolist()
        for name, prompt in (
            (f"{length:,} tokens, the first ones", first),
            (f"{length:,} others", other),
            (f"{length // 16:,} behind the first {length:,}", first + tail[: length // 16]),
        ):
            gaps_ms, seconds = await streams_beside(engine, prompt)
            worst = max(gaps_ms)
            is_kept = worst <= MAX_STRETCH * MAX_STEP_MS
            is_right = is_right and is_kept
            p50, p99 = np.percentile(gaps_ms, (50, 99))
            table.add_row(
                name, f"{seconds:.2f}", f"{p50:.1f}", f"{p99:.1f}", f"{worst:.1f}", "yes" if is_kept else "[red]NO[/]"
            )
    return is_right


def check_pace(args: argparse.Namespace, console: Console) -> bool:
    if args.device == "cpu":
        folder = demo_folder(args)
    else:
        folder = args.cache_dir / "llama3-8b"
        make_dummy(folder, SHAPES["llama3-8b"], demo_folder(args))
    title = f"a prompt beside {NUM_STREAMS} streams"
    table = Table(
        title, "its s", "between tokens: p50, ms", "p99", "worst", f"{MAX_STEP_MS:.0f} ms kept", box=box.SIMPLE
    )
    is_right = asyncio.run(measure_pace(folder, args, table))
    console.print(table)
    return is_right


CHECKS = {"greedy": check_greedy, "logits": check_logits, "pool": check_pool, "pace": check_pace}
PYTEST = "pytest"


# --- processes --------------------------------------------------------------------------------------------------------


def child_environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}


def run_bounded(command: Sequence[str], timeout_s: float) -> int | None:
    """Exit status of `command`, which writes to our output; None if it took too long and was killed."""
    with subprocess.Popen(command, cwd=ROOT, env=child_environment(), start_new_session=True) as process:
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def query_gpus(what: str) -> list[str]:
    """Return a line a GPU of nvidia-smi's answer; none where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()


def used_gpu_mib() -> int:
    return sum(int(line) for line in query_gpus("memory.used"))


def check_all(args: argparse.Namespace, console: Console) -> dict[str, str]:
    """Return the result of each check: "passed", "FAILED" or "TIMED OUT"."""
    outcomes = {}
    for name in args.checks:
        console.rule(f"correctness: {name}", style="dim")
        command = [sys.executable, "-m", "bench.gpu", "--check", name, "--device", args.device, "--demo", args.demo]
        command += ["--cache-dir", str(args.cache_dir)]
        if name == PYTEST:
            command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
        code = run_bounded(command, args.timeout_s)
        outcomes[name] = "passed" if code == 0 else "TIMED OUT" if code is None else "FAILED"
    return outcomes


# --- speed ------------------------------------------------------------------------------------------------------------

MAX_STOP_S = 90.0
MAX_LEFT_MIB = 64  # other users of the GPU, and the driver, come and go
NUM_IDLE_S = 5.0


@dataclass
class ServerFigures:
    """Record how one model's server did. GPU memory in MiB, less what was used before it started."""

    model: str
    server_args: str
    ready_s: list[float] = field(default_factory=list)  # of each start
    ready_mib: int = 0
    loaded_mib: int = 0  # after the workloads
    left_mib: int = 0  # after its end
    idle_cpu_percent: float = float("nan")
    failures: list[str] = field(default_factory=list)


@contextlib.contextmanager
def running_server(command: Sequence[str], log: Path, figures: ServerFigures) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server process; on leaving it gets a SIGTERM, and what goes wrong then joins the failures."""
    before_mib = used_gpu_mib()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=child_environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            if code := process.wait(MAX_STOP_S):
                figures.failures.append(f"the server exited with {code}, see {log}")
        except subprocess.TimeoutExpired:
            figures.failures.append(f"the server did not stop in {MAX_STOP_S:.0f} s after SIGTERM, see {log}")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        deadline = time.monotonic() + 10  # the driver takes a moment
        while (left := used_gpu_mib() - before_mib) > MAX_LEFT_MIB and time.monotonic() < deadline:
            time.sleep(0.5)
        figures.left_mib = max(figures.left_mib, left)
        if left > MAX_LEFT_MIB:
            figures.failures.append(f"{left} MiB of GPU memory were left behind")


async def wait_until_healthy(base_url: str, process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Return False if the process ended before it was healthy, or took too long."""
    deadline = time.monotonic() + timeout_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{base_url}/health") as response:
                    if response.status == 200:
                        return True
            await asyncio.sleep(0.02)
    return False


def measure_model(model: str, args: argparse.Namespace, console: Console) -> ServerFigures:
    figures = ServerFigures(model, args.server_args)
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "server", "--port", str(port), "--device", args.device]
    if model in SHAPES:
        folder = args.cache_dir / model
        make_dummy(folder, SHAPES[model], demo_folder(args))
        command += ["--model-path", str(folder), "--load-format", "dummy", "--served-model-name", model]
    else:
        command += ["--model-path", model]
    command += shlex.split(args.server_args)
    log = args.cache_dir / f"{model.replace('/', '_')}.log"
    log.unlink(missing_ok=True)
    console.print(f"{shlex.join(command)} > {log}", style="dim", soft_wrap=True)
    before_mib = used_gpu_mib()
    for i in range(args.starts):
        started = time.perf_counter()
        with running_server(command, log, figures) as process:
            if not asyncio.run(wait_until_healthy(base_url, process, args.timeout_s)):
                console.print(log.read_text(errors="replace")[-4000:], markup=False)
                figures.failures.append("the server did not become healthy")
                return figures
            figures.ready_s.append(time.perf_counter() - started)
            console.print(f"healthy after {figures.ready_s[-1]:.1f} s", style="dim")
            figures.ready_mib = used_gpu_mib() - before_mib
            if i == args.starts - 1:
                load(base_url, model, process, args, figures)
                figures.loaded_mib = used_gpu_mib() - before_mib
    return figures


def load(
    base_url: str, model: str, process: subprocess.Popen[bytes], args: argparse.Namespace, figures: ServerFigures
) -> None:
    command = [sys.executable, "-m", "bench.compare", "--base-url", base_url, "--model", model]
    command += ["--scale", str(args.scale), "--length-scale", str(args.length_scale), "--workloads", *args.workloads]
    if args.output_file:
        command += ["--output-file", str(args.output_file.resolve())]
    code = run_bounded(command, args.timeout_s)
    if code != 0:
        figures.failures.append("the workloads " + ("took too long" if code is None else "failed"))
    if process.poll() is not None:
        figures.failures.append("the server ended under load")
    else:
        figures.idle_cpu_percent = asyncio.run(measure_idle(process.pid, NUM_IDLE_S))


def servers_table(all_figures: Sequence[ServerFigures]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("server")
    for figures in all_figures:
        table.add_column(figures.model, justify="right")
    for column in ("SGLang, 8B", "vLLM, 0.6B", "aim"):
        table.add_column(column, justify="right")

    def start(i: int) -> list[str]:
        return [number(f.ready_s[i]) if i < len(f.ready_s) else "" for f in all_figures]

    table.add_row("start to healthy, s: first, caches as found", *start(0), "143–151", "256", "≤ 45 if there were none")
    table.add_row("start to healthy, s: again", *start(1), "80–86", "118", "≤ 12")
    table.add_row("GPU memory when ready, MiB", *(f"{f.ready_mib:,}" for f in all_figures))
    table.add_row("after the workloads", *(f"{f.loaded_mib:,}" for f in all_figures))
    table.add_row("after its end", *(f"{f.left_mib:,}" for f in all_figures), "", "", f"≤ {MAX_LEFT_MIB}")
    table.add_row("CPU when idle, % of a core", *(number(f.idle_cpu_percent) for f in all_figures), "~100", "", "< 1")
    return table


# --- everything -------------------------------------------------------------------------------------------------------


def machine() -> str:
    gpus = query_gpus("name,memory.total,driver_version")
    python = ".".join(map(str, sys.version_info[:3]))
    named = "; ".join(f"{name}, {mib} MiB, driver {driver}" for name, mib, driver in (g.split(", ") for g in gpus))
    return f"{named or 'no GPU'}; torch {torch.__version__}, Python {python}; {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", choices=("correctness", "speed"))
    add("--checks", nargs="+", choices=(*CHECKS, PYTEST), default=[*CHECKS, PYTEST])
    add("--models", nargs="+", default=DEFAULT_MODELS, help=f"{', '.join(SHAPES)} (dummy weights), or any --model-path")
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME", help=", ".join(WORKLOADS))
    add("--server-args", default="", help="more flags for the server, in one string")
    add("--starts", type=int, default=2, help="of each server; the workloads come after the last one")
    add("--scale", type=float, default=1.0, help="number of requests, as a share of the real workload's")
    add("--length-scale", type=float, default=1.0, help="tokens of prompts and answers, likewise")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--demo", default="demo", help="the demo model: its name, its .gguf file, or its converted folder")
    add("--cache-dir", type=Path, default=Path.home() / ".cache" / "radixloop" / "bench", help="for models and logs")
    add("--timeout-s", type=float, default=600.0, help="of each check, of a server's start, of a model's workloads")
    add("--output-file", type=Path, help="append JSON lines: one for each server, one for each of its workloads")
    add("--check", choices=CHECKS, help=argparse.SUPPRESS)  # what the script starts itself with
    return parser


def run(args: argparse.Namespace, console: Console) -> int:
    console.print(machine())
    failures = []
    if args.only != "speed":
        outcomes = check_all(args, console)
        table = Table("correctness", "", box=box.SIMPLE)
        for name, outcome in outcomes.items():
            table.add_row(name, f"[{'green' if outcome == 'passed' else 'red'}]{outcome}[/]")
        console.print(table)
        failures += [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome != "passed"]
    if args.only != "correctness":
        all_figures = []
        for model in args.models:
            console.rule(f"speed: {model}", style="dim")
            figures = measure_model(model, args, console)
            all_figures.append(figures)
            failures += [f"{model}: {failure}" for failure in figures.failures]
            if args.output_file:
                with args.output_file.open("ab") as file:
                    line = {"machine": machine(), **asdict(figures)}
                    file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        console.print(servers_table(all_figures))
    for failure in failures:
        console.print(failure, style="bold red", markup=False)
    return 1 if failures else 0


def main() -> None:
    args = argument_parser().parse_args()
    args.cache_dir = args.cache_dir.expanduser().resolve()
    args.cache_dir.mkdir(parents=True, exist_ok=True)
    console = wide_console()
    try:
        if args.check:
            sys.exit(0 if CHECKS[args.check](args, console) else 1)
        sys.exit(run(args, console))
    except ModelError as error:
        console.print(f"error: {error}", style="bold red", markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
