"""Fixtures for all tests: tiny random models, a server without one, the `gpu` marker, a guard of the event loop."""

import asyncio
import atexit
import contextlib
import gc
import inspect
import math
import os
import random
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

# Before torch is imported: its idle OpenMP threads must not spin, the tests share few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import aiohttp
import numpy as np
import pytest
import torch
from _pytest.runner import runtestprotocol
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Before a kernel is decorated: without a GPU, Triton's interpreter runs it on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if TYPE_CHECKING:
    import openai

    from engine.schedule.scheduler import Scheduler
    from tests.client import Client
    from tests.fake_engine import FakeEngine

torch.set_num_threads(1)
# The same examples in every run, of whatever machine: one that is new or slow must not fail somebody else's change.
settings.register_profile(
    "same", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")


class OnGPU(torch.Tensor):
    """Stand for a tensor on a GPU."""

    is_cuda = True


@pytest.hookimpl(tryfirst=True)  # before fixtures
def pytest_runtest_setup() -> None:
    """Begin every test at the same random numbers: what it draws must not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Make ready what tests find, all modules being imported."""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") == "1":
        from tests.triton_interpreter import hasten_interpreter

        hasten_interpreter()
    gc.collect()
    gc.freeze()  # a collection need not walk what lives as long as the process: libraries, and thousands of tests
    gc.collect()  # counts what lives: the more, the later it looks again for what a test has left
    atexit.register(gc.unfreeze)  # as in `settle_garbage_collector`


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog. Once upon a time there was a small server with one event loop.",
    "Seven wise wizards were counting to 1234567890 while the rain in Spain stayed mainly in the plain.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))  # 3",
    '{"name": "Harry", "house": "Gryffindor", "alive": true, "age": 17}',
    "Grüße aus Köln, naïve café, 日本語のテキスト, 你好世界, Привет, мир! 🙂🚀",
)
MAX_CALLBACK_MS = 100
MAX_TEST_MS = 1000  # of a test's own steps, in which it may compute what it expects and make a client's classes
MAX_RERUNS = 3  # of a test in which a callback held the event loop
DELAYS_INTERVAL_S = 0.005  # between two looks at what threads waited for: a callback is charged less by so much at most
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 384


def save_tokenizer(folder: Path, more_tokens: Sequence[str] = ()) -> None:
    """Write a byte-level BPE tokenizer, `VOCAB_SIZE` entries: special tokens (ids 0 to 2), 256 bytes, a few merges.

    more_tokens: special tokens with the ids behind those.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in more_tokens])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


@torch.no_grad()
def randomize_constants(model: torch.nn.Module) -> None:
    """Change what is the same in all elements of a tensor, such as the weight of a norm, at random."""
    for tensor in (*model.parameters(), *(buffer for name, buffer in model.named_buffers() if "scalar" in name)):
        if tensor.numel() and (tensor == tensor.flatten()[0]).all():
            tensor.add_(torch.empty_like(tensor).uniform_(-0.5, 0.5))


@pytest.fixture(scope="session")
def make_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return `make(LlamaConfig, "name", **overrides)`: it writes a random float32 model and its tokenizer.

    With `random_norms`, what transformers starts at one or zero is random as well: weights of norms, biases, scales.

    The weights are ten times larger than at a usual initialization, so that greedy answers vary and no two logits tie.
    """

    def make(config_class: type, name: str, *, random_norms: bool = False, **overrides: Any) -> Path:
        from transformers import AutoModelForCausalLM

        folder = tmp_path_factory.mktemp(name)
        save_tokenizer(folder)
        sizes = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "initializer_range": 0.2,
        }
        # What a class computes of its other entries cannot be given.
        given = {k: v for k, v in sizes.items() if not isinstance(getattr(config_class, k, None), property)}
        config = config_class(**{**given, **overrides})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            if random_norms:
                randomize_constants(model)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_tiny_model: Callable[..., Path]) -> Path:
    """Return the folder of a random Llama: 2 layers, 4 heads of 16, 2 KV heads, context 512, weights not tied."""
    from transformers import LlamaConfig

    return make_tiny_model(LlamaConfig, "tiny_llama", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tiny_qwen3(make_tiny_model: Callable[..., Path]) -> Path:
    """Return the folder of a random Qwen3: like `tiny_llama`, with per-head q/k norms and tied embeddings."""
    from transformers import Qwen3Config

    return make_tiny_model(Qwen3Config, "tiny_qwen3", tie_word_embeddings=True)


def run_delays() -> dict[int, float]:
    """Return for each Python thread the seconds it was ready to run while others had its core, by native id.

    From the second figure (nanoseconds) of /proc's schedstat; empty where Linux does not report it.
    """
    delays = {}
    for thread in threading.enumerate():
        with contextlib.suppress(OSError), open(f"/proc/self/task/{thread.native_id}/schedstat", "rb") as file:
            delays[thread.native_id or 0] = int(file.read().split()[1]) / 1e9
    return delays


class OthersTime:
    """Measure how long callbacks were held up by what is not theirs, in seconds.

    That is the time that the event loop's thread waited for a core; that other threads did, which may have kept the
    interpreter meanwhile; and pauses of the garbage collector, which walks what all earlier tests have left.
    """

    def __init__(self) -> None:
        self._collected_s = 0.0  # of collections that have ended
        self._collecting_since = math.inf
        self._delays: dict[int, float] = {}
        self._read_at = -math.inf
        gc.callbacks.append(self._on_collection)

    def _on_collection(self, phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            self._collecting_since = time.perf_counter()
        else:
            self._collected_s += time.perf_counter() - self._collecting_since
            self._collecting_since = math.inf

    def _collection_s(self) -> float:
        # A collection on another thread counts while it is not recorded: that thread waits for the interpreter again.
        return self._collected_s + max(time.perf_counter() - self._collecting_since, 0.0)

    def start(self) -> float:
        """Return what `since` needs to know of the beginning of a callback."""
        if time.perf_counter() - self._read_at > DELAYS_INTERVAL_S:
            self._delays, self._read_at = run_delays(), time.perf_counter()
        return self._collection_s()

    def since(self, start: float) -> float:
        delays = run_delays()
        delay_s = sum(delay - self._delays.get(thread, 0.0) for thread, delay in delays.items())
        return delay_s + self._collection_s() - start

    def close(self) -> None:
        gc.callbacks.remove(self._on_collection)


@dataclass
class BlockingCallGuard:
    limit_s: float
    blocked: list[tuple[str, float]] = field(default_factory=list)  # (callback, seconds it held the loop)

    def report(self) -> str:
        lines = [f"{seconds * 1e3:.0f} ms: {callback}" for callback, seconds in self.blocked]
        return f"held the event loop for more than {self.limit_s * 1e3:.0f} ms:\n" + "\n".join(lines)


HELD_THE_LOOP = pytest.StashKey[bool]()  # is set on a test whose only fault is that


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Run a test, and some times more if all that is wrong is that a callback held the event loop.

    The guard leaves out what it knows of others' work. It cannot know of a virtual machine that stands still, of a
    file that is read from a busy disk, or of other work in the same caches; what blocks the loop does so each time.
    """
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for num_reruns in range(MAX_RERUNS + 1):
        item.stash[HELD_THE_LOOP] = False
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        if not item.stash[HELD_THE_LOOP] or sum(report.failed for report in reports) != 1:
            break
        if num_reruns < MAX_RERUNS:
            time.sleep(num_reruns)  # others' work may have gone by then
            item._initrequest()  # type: ignore[attr-defined]
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def describe_callback(callback: Any) -> str:
    """Return a task's coroutine and the line it waits at now, or the function's name."""
    owner = getattr(callback, "__self__", None)
    return repr(owner) if isinstance(owner, asyncio.Task) else f"{getattr(callback, '__qualname__', callback)!s}"


def is_step_of(callback: Any, function: Callable[..., Any]) -> bool:
    """Return whether a callback is a step of the test `function`, or of a client of its: one sends 50 MB at once."""
    owner = getattr(callback, "__self__", None)
    code = getattr(owner.get_coro(), "cr_code", None) if isinstance(owner, asyncio.Task) else None
    return code is not None and code in (inspect.unwrap(function).__code__, aiohttp.ClientRequest.write_bytes.__code__)


@pytest.fixture(autouse=True)
def blocking_call_guard(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[BlockingCallGuard | None]:
    """Fail an async test in which one callback held the event loop for more than 100 ms, or its own steps for 1 s.

    `@pytest.mark.max_callback_ms(200)` sets another limit for both; a comment beside it says why. Every callback and
    every step of a task is a `Handle._run`, those of async fixtures included; its length is wall time less
    `OthersTime`, so that a busy machine fails no test. A test may ask for the guard to read it; tests without a loop
    get None, and those of a GPU, where the first launch of a kernel that no warm-up knows compiles it.
    """
    if not inspect.iscoroutinefunction(request.function) or request.node.get_closest_marker("gpu"):
        yield None
        return
    marker = request.node.get_closest_marker("max_callback_ms")
    guard = BlockingCallGuard((marker.args[0] if marker else MAX_CALLBACK_MS) / 1e3)
    test_limit_s = guard.limit_s if marker else MAX_TEST_MS / 1e3
    others_time = OthersTime()
    run = asyncio.Handle._run

    def timed_run(handle: asyncio.Handle) -> None:
        callback = getattr(handle, "_callback", None)  # gone once a cancelled handle has run
        others = others_time.start()
        started = time.perf_counter()
        run(handle)
        held_s = time.perf_counter() - started
        if held_s <= guard.limit_s:
            return
        limit_s = test_limit_s if is_step_of(callback, request.function) else guard.limit_s
        if (held_s := held_s - others_time.since(others)) > limit_s:
            guard.blocked.append((describe_callback(callback), held_s))

    monkeypatch.setattr(asyncio.Handle, "_run", timed_run)
    # Official clients read the machine's 300 KB of certificates for every client made; no async test speaks TLS.
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", os.path.dirname(__file__))
    yield guard
    others_time.close()
    if guard.blocked:
        request.node.stash[HELD_THE_LOOP] = True
        pytest.fail(guard.report(), pytrace=False)


@pytest.fixture(scope="session")
def living_schedulers() -> "Iterator[WeakSet[Scheduler]]":
    """Every scheduler of this process, as long as it lives."""
    from engine.schedule.scheduler import Scheduler

    living: WeakSet[Scheduler] = WeakSet()
    init = Scheduler.__init__

    def registering(self: Scheduler, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        living.add(self)

    Scheduler.__init__ = registering  # type: ignore[method-assign]
    yield living
    Scheduler.__init__ = init  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def checked_schedulers(request: pytest.FixtureRequest, living_schedulers: "WeakSet[Scheduler]") -> Iterator[None]:
    """Fails a test that leaves a scheduler whose pages or locks are wrong: its own, or one that tests of a file share.

    `@pytest.mark.breaks_bookkeeping` is for those that do so on purpose, to a scheduler of their own.
    """
    shared = list(living_schedulers)  # fixtures of a file come before those of a test
    yield
    own = set(living_schedulers).difference(shared)
    if request.node.get_closest_marker("breaks_bookkeeping"):
        own.clear()
    for scheduler in (*shared, *own):
        scheduler.check()
    # No other test has those of this one. They live until the collector finds them, and to check them takes long.
    living_schedulers.clear()
    living_schedulers.update(shared)


@pytest.fixture
async def engine() -> "FakeEngine":
    """Return what `client` talks to; a file that wants another engine has a fixture of this name."""
    from tests.fake_engine import FakeEngine

    return FakeEngine()


@pytest.fixture
async def client(engine: "FakeEngine") -> "AsyncIterator[Client]":
    """Yield a client of a server around `engine`."""
    from tests.fake_engine import serving

    async with serving(engine) as client:
        yield client


@pytest.fixture
async def api(client: "Client") -> "AsyncIterator[openai.AsyncOpenAI]":
    """Yield OpenAI's own client of that server."""
    from tests.client import official

    async with official(client) as api:
        yield api
