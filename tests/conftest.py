"""What every test may use: tiny random models, a server without one, the `gpu` marker, and a guard against callbacks
that block the loop."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

# Before torch is imported: its idle OpenMP threads must not spin, the tests share few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Before a kernel is decorated: without a GPU, Triton's interpreter runs it on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if TYPE_CHECKING:
    from aiohttp.test_utils import TestClient

    from engine.schedule.scheduler import Scheduler
    from tests.fake_engine import FakeEngine

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 384


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` entries: special tokens (ids 0 to 2), 256 bytes, a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def make_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_tiny_model(LlamaConfig, "name", **overrides)`: a folder with a random float32 model and its tokenizer.

    The weights are ten times larger than at a usual initialization, so that greedy answers vary and no two logits tie.
    """

    def make(config_class: type, name: str, **overrides: Any) -> Path:
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
        config = config_class(**{**sizes, **overrides})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_tiny_model: Callable[..., Path]) -> Path:
    """Folder of a random Llama: 2 layers, 4 heads of 16, 2 KV heads, context 512, weights not tied."""
    from transformers import LlamaConfig

    return make_tiny_model(LlamaConfig, "tiny_llama", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tiny_qwen3(make_tiny_model: Callable[..., Path]) -> Path:
    """Folder of a random Qwen3: as `tiny_llama`, with per-head q/k norms and tied embeddings."""
    from transformers import Qwen3Config

    return make_tiny_model(Qwen3Config, "tiny_qwen3", tie_word_embeddings=True)


class RunDelay:
    """Seconds the calling thread was ready to run while others had its core; 0.0 where Linux does not say.

    From the second figure (nanoseconds) of /proc's schedstat.
    """

    def __init__(self) -> None:
        try:
            self.fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except OSError:
            self.fd = -1

    def __call__(self) -> float:
        return int(os.pread(self.fd, 64, 0).split()[1]) / 1e9 if self.fd >= 0 else 0.0

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


@dataclass
class BlockingCallGuard:
    limit_s: float
    blocked: list[tuple[str, float]] = field(default_factory=list)  # (callback, seconds it held the loop)

    def report(self) -> str:
        lines = [f"{seconds * 1e3:.0f} ms: {callback}" for callback, seconds in self.blocked]
        return f"held the event loop for more than {self.limit_s * 1e3:.0f} ms:\n" + "\n".join(lines)


def describe_callback(callback: Any) -> str:
    """A task's coroutine and the line it waits at now, or the function's name."""
    owner = getattr(callback, "__self__", None)
    return repr(owner) if isinstance(owner, asyncio.Task) else f"{getattr(callback, '__qualname__', callback)!s}"


@pytest.fixture
def blocking_call_guard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[BlockingCallGuard]:
    """Fails an async test in which one callback held the event loop for more than 50 ms.

    `@pytest.mark.max_callback_ms(200)` sets another limit. Every callback and every step of a task is a
    `Handle._run`; its length is wall time less the time the thread waited for a core, so a busy machine fails no test.
    """
    marker = request.node.get_closest_marker("max_callback_ms")
    guard = BlockingCallGuard((marker.args[0] if marker else 50) / 1e3)
    run_delay = RunDelay()  # opened on the loop's thread: tests and their loop share it
    run = asyncio.Handle._run

    def timed_run(handle: asyncio.Handle) -> None:
        callback = getattr(handle, "_callback", None)  # gone once a cancelled handle has run
        started, delayed = time.perf_counter(), run_delay()
        run(handle)
        held_s = time.perf_counter() - started
        if held_s > guard.limit_s and (held_s := held_s - (run_delay() - delayed)) > guard.limit_s:
            guard.blocked.append((describe_callback(callback), held_s))

    monkeypatch.setattr(asyncio.Handle, "_run", timed_run)
    yield guard
    run_delay.close()
    if guard.blocked:
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
    """Fails a test that leaves a scheduler whose pages or locks are wrong.

    `@pytest.mark.breaks_bookkeeping` is for those that do so on purpose, to a scheduler of their own.
    """
    before = set(living_schedulers)
    yield
    if request.node.get_closest_marker("breaks_bookkeeping"):
        for scheduler in set(living_schedulers) - before:
            living_schedulers.discard(scheduler)
    del before
    for scheduler in list(living_schedulers):
        scheduler.check()


@pytest.fixture
async def engine() -> "FakeEngine":
    """What `client` talks to; a file that wants another engine has a fixture of this name."""
    from tests.fake_engine import FakeEngine

    return FakeEngine()


@pytest.fixture
async def client(engine: "FakeEngine") -> "AsyncIterator[TestClient[Any, Any]]":
    """Of a server around `engine`."""
    from tests.fake_engine import serving

    async with serving(engine) as client:
        yield client
