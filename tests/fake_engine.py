"""An engine without a model, behind the real facade: it answers at once, or when a test says so."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from aiohttp.test_utils import TestClient, TestServer

from cache.radix import Prefix, RadixStats
from engine.engine import Engine, EngineStats, Health, Maintenance
from engine.errors import EngineStopped, InvalidRequest, PromptTooLong, QueueFull
from engine.loop import LoopStats
from engine.media import Media, MediaSize, PromptMedia
from engine.request import Request
from engine.schedule.scheduler import SchedulerStats
from engine.state import Delta, FinishReason, Logprobs, RequestState, Status, TokenLogprob
from engine.text.grammar import GrammarStats
from engine.text.tokenizer import NO_CHAT_TEMPLATE
from engine.views import BranchView, RequestView
from server.app import build_app
from server.config import ServerConfig

VOCAB_SIZE = 260
EOS = 257


# An answer with all that parsers know, and the options of a server that reads it so.
THOUGHT_AND_CALL = (
    '<think>Where?</think>Let me look.<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
)
PARSERS = {"reasoning_parser": "qwen3", "tool_call_parser": "qwen25"}


class FakeTokenizer:
    """A token is a byte."""

    chat_template: str | dict[str, str] | None = "fake"
    origin = ""

    def __init__(self) -> None:
        self.named_tokens = {"bos_token": "<s>", "eos_token": "</s>"}

    def check_chat_template(self, source: str) -> None:
        pass

    def encode(self, text: str, add_special_tokens: bool = True, *, context_length: int | None = None) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return bytes(token_id for token_id in token_ids if token_id < 256).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id])

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        if chat_template is None and not self.chat_template:
            raise InvalidRequest(NO_CHAT_TEMPLATE, "messages")
        text = "".join(f"[{tool['function']['name']}]" for tool in tools or ())
        for message in messages:
            calls = "".join(f"[{call['function'].get('name')}]" for call in message.get("tool_calls") or ())
            text += f"[{message['role']}]{message['content']}{calls}"
        return text + ("[assistant]" if add_generation_prompt else "")


@dataclass
class FakeModel:
    vocab_size: int = VOCAB_SIZE
    model_type: str = "fake"
    whole_model_type: str = "fake_vl"
    architectures: tuple[str, ...] = ("FakeForCausalLM",)
    pooling: str = "last"
    labels: tuple[str, ...] = ("bad", "good")
    embedding_size: int = 4
    sampling_defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def is_classifier(self) -> bool:
        return "FakeForSequenceClassification" in self.architectures


def fake_stats() -> EngineStats:
    return EngineStats(
        SchedulerStats(
            num_running=1,
            num_waiting=2,
            num_waiting_tokens=30,
            num_total_tokens=1000,
            num_free_tokens=250,
            num_cached_tokens=500,
            num_held_tokens=250,
            num_retractions=0,
            num_prompt_tokens=100,
            num_hit_tokens=40,
            new_token_ratio=0.7,
            cache=RadixStats(3, 500, 100, 9, 120, 40, 60),
        ),
        LoopStats(
            num_steps=4,
            num_generated_tokens=7,
            schedule_s=0.001,
            launch_s=0.002,
            resolve_s=0.003,
            deliver_s=0.004,
            device_idle_s=0.005,
        ),
        num_requests=3,
        num_aborted=1,
        num_refused=5,
        drain_tokens_per_s=1234.0,
        grammars=GrammarStats(2, 6, 0.5),
    )


def logprobs_of(token_ids: Sequence[int], num_top: int, ids: Sequence[int], *, is_prompt: bool = False) -> Logprobs:
    """-0.5 for each token, then half less for each alternative; the first token of a prompt has none."""

    def row(start: int, count: int) -> list[TokenLogprob]:
        return [(-0.5 - k / 2, (start + k) % 128) for k in range(count)]

    result = Logprobs(
        token=[(-0.5, token_id) for token_id in token_ids],
        top=[row(token_id, num_top) for token_id in token_ids],
        token_ids=[[(-3.0, token_id) for token_id in ids] for _ in token_ids],
    )
    if is_prompt:
        result.token[0] = (None, token_ids[0])
        result.top[0] = result.token_ids[0] = None
    return result


class FakeMaintenance(Maintenance):
    """Weights "0.weight" of one row; a checkpoint fits if its path is "other"."""

    def __init__(self) -> None:
        self.model_path, self.weight_version = "fake-model", "default"
        self.calls: list[Any] = []

    async def pause(self, mode: str = "abort") -> int:
        self.calls.append(mode)
        return 0

    async def resume(self) -> None:
        self.calls.append("resume")

    async def update_weights(self, model_path: str, load_format: str = "auto", **options: Any) -> int:
        if model_path != "other":
            raise InvalidRequest("0.weight has shape [1], the model wants [2]", "model_path")
        self.calls.append((model_path, load_format, options))
        return 3

    async def weight(self, name: str, num_rows: int) -> list[Any]:
        if name != "0.weight":
            raise InvalidRequest(f"the model has no weight {name!r}", "name")
        return [[0.5, 1.0]]

    async def release_memory(self, tags: Collection[str] = ()) -> None:
        self.calls.append(("release", tags))

    async def resume_memory(self, tags: Collection[str] = ()) -> None:
        self.calls.append(("resume", tags))


# Until the first token, as a model's takes longer: a handler has begun its stream by then, though it lets others run
# once or twice. Else tokens would come together, or not, as the machine is busy.
FIRST_PASSES = 10


class FakeEngine(Engine):
    """Answers every request with the bytes of `answer`, one a step; with `is_manual`, as `emit` and `finish` say.

    The facts are attributes, which tests change.
    """

    is_running, has_failed = True, False
    is_generation, max_running_requests = True, 8
    context_length = max_total_num_tokens = 0
    model_config, tokenizer, maintenance = FakeModel(), FakeTokenizer(), FakeMaintenance()

    def __init__(
        self,
        answer: str = "Hello, world",
        *,
        context_length: int = 256,
        is_manual: bool = False,
        max_queued: int = 1000,
    ) -> None:
        self.answer, self.is_manual, self.max_queued = answer, is_manual, max_queued
        self.context_length = context_length
        self.current_stats = fake_stats()
        self.num_replicas = 1
        self.maintenance = FakeMaintenance()
        self.max_total_num_tokens = 4 * context_length
        self.model_config, self.tokenizer = FakeModel(), FakeTokenizer()
        self.states: list[RequestState] = []
        self.aborted: list[str] = []
        self.live: dict[str, RequestState] = {}
        self.has_changed = asyncio.Event()
        self.health_status = "ok"
        self.is_profiling = False
        self.failure: FinishReason | None = None  # how every request ends

    @property
    def requests(self) -> list[Request]:
        """Those that were submitted, oldest first."""
        return [state.request for state in self.states]

    async def start(
        self, on_progress: Callable[[str], None] = print, on_tokenizer: Callable[[Any], object] | None = None
    ) -> None:
        if on_tokenizer is not None:
            on_tokenizer(self.tokenizer)

    async def stop(self, drain_s: float = 0.0) -> None:
        pass

    def warm_up_grammars(self) -> None:
        pass

    async def prepare(self, states: Sequence[RequestState]) -> None:
        pass

    def submit(self, state: RequestState) -> None:
        if self.health_status == "stopping":
            raise EngineStopped("the server is shutting down")
        if len(self.live) >= self.max_queued:
            raise QueueFull(f"{len(self.live)} requests are waiting, the limit is {self.max_queued}", 2.0)
        state.sampling_params.verify(VOCAB_SIZE)
        room = self.context_length - state.prompt_len
        if state.max_new_tokens < 0:
            state.max_new_tokens = max(room, 0)
        elif state.request.may_shorten:
            state.max_new_tokens = min(state.max_new_tokens, max(room, 1))
        if room < state.max_new_tokens:
            raise PromptTooLong(
                f"prompt has {state.prompt_len} tokens, the context is {self.context_length}",
                "text",
                prompt_len=state.prompt_len,
                answer_len=state.max_new_tokens if room > 0 else 0,
                limit=self.context_length,
            )
        if not -1 <= state.logprob_start_len < state.prompt_len:
            raise InvalidRequest("logprob_start_len must be -1 or a position of the prompt", "logprob_start_len")
        self.states.append(state)
        state.times.scheduled = state.times.arrived + 0.5
        self.live[state.rid] = state
        state.num_cached_tokens = 2
        if state.logprob_start_len >= 0:
            prompt = state.request.input_ids[state.logprob_start_len :]
            num_top, ids = state.top_logprobs_num, state.token_ids_logprob
            state.input_logprobs = logprobs_of(prompt, num_top, ids, is_prompt=True)
        self._changed()
        if not self.is_manual:
            self._begin(state, FIRST_PASSES)

    def _begin(self, state: RequestState, num_passes: int) -> None:
        """Bring the first token after so many passes of the loop."""
        work = (self._begin, state, num_passes - 1) if num_passes else (self._step, state)
        asyncio.get_running_loop().call_soon(*work)

    def _step(self, state: RequestState) -> None:
        """One token."""
        if state.rid not in self.live:
            return
        if self.failure is not None:
            return self.finish(state, self.failure)
        if state.pooling is not None:
            state.embedding = np.array([state.prompt_len, sum(state.request.input_ids), 3, 4], np.float32)
            if self.model_config.is_classifier:
                state.embedding = np.array([0.0, state.request.input_ids[-1] / 128], np.float32)
        answer, limit = self.answer.encode(), state.max_new_tokens
        done = len(state.output_ids)
        if done == limit:
            return self.finish(state, FinishReason("length"))
        if done == len(answer):
            return self.finish(state, FinishReason("stop", matched=EOS))
        self.emit(state, bytes([answer[done]]).decode(errors="ignore"), [answer[done]])
        asyncio.get_running_loop().call_soon(self._step, state)

    def emit(self, state: RequestState, text: str, token_ids: list[int] | None = None) -> None:
        """Bring a step's news: the sink gets it if the request streams."""
        ids = list(text.encode()) if token_ids is None else token_ids
        state.output_ids += ids
        state.times.first_token = state.times.first_token or state.times.scheduled + 0.25
        if state.stream:
            state.sink(self._delta(state, text, ids))

    def finish(self, state: RequestState, reason: FinishReason) -> None:
        del self.live[state.rid]
        state.status, state.finish_reason = Status.FINISHED, reason
        state.times.first_token = state.times.first_token or state.times.scheduled + 0.25
        state.times.finished = state.times.first_token + 1.0
        if state.stream:
            delta = Delta(state, "", [], reason)
        else:
            delta = self._delta(state, self.tokenizer.decode(state.output_ids), state.output_ids)
            delta.finish_reason = reason
        state.sink(delta)
        self._changed()

    def _delta(self, state: RequestState, text: str, ids: list[int]) -> Delta:
        logprobs = None
        if state.return_logprob:
            logprobs = logprobs_of(ids, state.top_logprobs_num, state.token_ids_logprob)
        return Delta(state, text, ids, None, logprobs)

    def abort(self, rid: str, message: str = "aborted by the client", status_code: int = 499) -> bool:
        state = self.live.get(rid)
        if state is None:
            return False
        self.aborted.append(rid)
        self.finish(state, FinishReason("abort", message=message, status_code=status_code))
        return True

    def abort_all(self, message: str = "aborted by the client", status_code: int = 499) -> int:
        return sum(self.abort(rid, message, status_code) for rid in list(self.live))

    def flush_cache(self) -> bool:
        return not self.live

    def stats(self) -> EngineStats:
        return self.current_stats

    def replica_stats(self) -> list[EngineStats]:
        return [self.stats()] * self.num_replicas

    def top_prefixes(self, k: int) -> list[Prefix]:
        return [Prefix(np.array(list(b"<b>S"), np.int32), 4, 1, 42)][:k]

    def top_branches(self, k: int) -> list[BranchView]:
        head = np.array(list(b"<b>S"), np.int32)
        return [BranchView(0, -1, 0, 40, head, 1, 42, 2, ()), BranchView(0, 0, 40, 8, head, 0, 3, 0, ())][:k]

    def oldest_requests(self, k: int) -> list[RequestView]:
        return [
            RequestView(state.rid, True, len(state.output_ids), state.num_cached_tokens)
            for state in list(self.live.values())[:k]
        ]

    def start_profile(self, output_dir: str) -> None:
        if self.is_profiling:
            raise InvalidRequest("a profile is being recorded")
        self.is_profiling = True

    async def stop_profile(self) -> str:
        if not self.is_profiling:
            raise InvalidRequest("no profile is being recorded")
        self.is_profiling = False
        return "trace.json"

    def progress(self) -> object:
        return None

    def describe(self) -> str:
        return "a fake engine\n"

    async def failed(self) -> str:
        return await asyncio.get_running_loop().create_future()

    def health(self) -> Health:
        return Health(self.health_status, num_running=len(self.live))

    def _changed(self) -> None:
        self.has_changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that a submission, an end or an abort brings about."""
        async with asyncio.timeout(60):
            while not condition():
                self.has_changed.clear()
                await self.has_changed.wait()


class SeeingEngine(FakeEngine):
    """Sees pictures and videos: each takes a token, and one more for each 1,000 pixels."""

    media_kinds: Mapping[str, str] = {"image": "<image>", "video": "<video>"}

    def count_media_tokens(self, sizes: Sequence[MediaSize]) -> list[int]:
        return [size.num_frames * (size.width * size.height // 1000 + 1) for size in sizes]

    async def encode_media(
        self, prompt: str | Sequence[int], media: Sequence[Media], *, add_special_tokens: bool = False
    ) -> tuple[list[int], PromptMedia]:
        """Write as many bytes 1 as there are tokens for each."""
        text = prompt if isinstance(prompt, str) else bytes(prompt).decode()
        counts = self.count_media_tokens([one.size for one in media])
        places, ids = [], list[int]()
        for count, one in zip(counts, media, strict=True):
            before, placeholder, text = text.partition(self.media_kinds[one.size.kind])
            assert placeholder
            ids += before.encode()
            places.append(np.arange(len(ids), len(ids) + count, dtype=np.int32))
            ids += [1] * count
        ids += text.encode()
        return ids, PromptMedia(len(ids), tuple(media), tuple(one.digest for one in media), tuple(places))


@asynccontextmanager
async def serving(engine: Engine, **options: Any) -> AsyncIterator[TestClient[Any, Any]]:
    """Yield a client of a server around `engine`."""
    with TemporaryDirectory() as folder:
        config = ServerConfig(model_path="fake-model", **{"file_storage_path": folder, **options})
        async with TestClient(TestServer(build_app(engine, config))) as client:
            yield client
