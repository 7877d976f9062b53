"""The facade: everything the server, and any program that holds an engine, may ask of it.

Engine
├── engine.local.LocalEngine                one model on this process's device, with its step loop
├── engine.replicas.replica_set.ReplicaSet  several of them, each in a process of its own
└── tests.fake_engine.FakeEngine            no model: answers as a test says

Nothing here imports torch: the command line's help, the router and the front-end language read these types too.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

from engine.errors import InvalidRequest
from engine.media import EncoderStats, Media, MediaSize, PromptMedia
from engine.state import Delta, RequestState

if TYPE_CHECKING:
    from cache.radix import Prefix
    from engine.loop import LoopStats
    from engine.schedule.scheduler import SchedulerStats
    from engine.text.grammar import GrammarStats
    from engine.views import BranchView, RequestView
    from engine.vision.reader import MediaReader

logger = logging.getLogger(__name__)

LONG_TEXT = 1500  # characters; shorter texts are tokenized on the event loop, in about a millisecond


class ModelInfo(Protocol):
    """The part of `engine.model_config.ModelConfig` that users of an engine read."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def model_type(self) -> str: ...
    @property
    def whole_model_type(self) -> str: ...
    @property
    def architectures(self) -> Sequence[str]: ...
    @property
    def pooling(self) -> str: ...
    @property
    def is_classifier(self) -> bool: ...
    @property
    def labels(self) -> Sequence[str]: ...
    @property
    def embedding_size(self) -> int: ...  # length of the vector that a prompt becomes
    @property
    def sampling_defaults(self) -> dict[str, Any]: ...  # of generation_config.json, unless --sampling-defaults forbids


class TokenizerFacade(Protocol):
    """The part of `engine.text.tokenizer.Tokenizer` that users of an engine call."""

    @property
    def chat_template(self) -> str | dict[str, str] | None: ...
    @property
    def named_tokens(self) -> Mapping[str, str]: ...  # bos_token, eos_token, ...
    @property
    def origin(self) -> str: ...  # what it was made from, if not a tokenizer.json

    def check_chat_template(self, source: str) -> None: ...  # ValueError with the line that does not parse
    def encode(self, text: str, add_special_tokens: bool = True, *, context_length: int | None = None) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def token_text(self, token_id: int) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str: ...


@dataclass(frozen=True, slots=True)
class Health:
    status: str
    """ok, starting, stuck (a step has not come back), stopping, or stopped."""
    last_step_age_s: float = 0.0
    """Seconds since a step last came back, or since there was work again; 0 while idle."""
    oldest_queued_s: float = 0.0
    """Seconds for which the oldest queued request has waited; 0 if none waits."""
    num_running: int = 0
    num_queued: int = 0
    num_violations: int = 0
    """Mistakes in the bookkeeping of KV slots and rows, found while idle: see the log. None is expected."""
    num_canary_alarms: int = 0
    """Times that the log-probabilities of a known text differed from the first ones: see the log. None is expected."""
    canary_drift: float = 0.0
    """Their mean distance at the last look."""


@dataclass(slots=True)
class CanaryStats:
    """Count the canary's runs since the start; see `engine.canary`."""

    num_runs: int = 0
    num_alarms: int = 0
    """Runs whose log-probabilities differed from the first ones beyond rounding."""
    drift: float = 0.0
    """Mean distance of the last run's log-probabilities from the first ones."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    scheduler: SchedulerStats
    loop: LoopStats
    num_requests: int
    num_aborted: int
    num_refused: int
    """Requests refused because the queue was full."""
    drain_tokens_per_s: float
    """Tokens computed for requests that ended, per second in which there was work."""
    grammars: GrammarStats
    canary: CanaryStats = field(default_factory=CanaryStats)
    encoder: EncoderStats = field(default_factory=EncoderStats)


class Maintenance(ABC):
    """Operations that hold a running engine still. One runs at a time; later callers wait for it to end."""

    model_path: str
    """Where the weights that are served came from."""
    weight_version: str

    @abstractmethod
    async def pause(self, mode: str = "abort") -> int:
        """Launch no step until `resume`, and return how many requests were running.

        mode: "abort" ends all requests, "retract" computes the running ones anew later, "in_place" continues them.
        """

    @abstractmethod
    async def resume(self) -> None:
        """End a pause. Does nothing if there is none."""

    @abstractmethod
    async def update_weights(
        self,
        model_path: str,
        load_format: str = "auto",
        *,
        abort_all_requests: bool = False,
        flush_cache: bool = True,
        weight_version: str | None = None,
    ) -> int:
        """Serve the weights of another checkpoint of the same shape. Return how many requests were interrupted.

        The weights are read into host memory while the old ones serve; the pause is the copy alone. With
        `flush_cache`, running requests are computed anew, since their keys and values are the old weights'.
        `InvalidRequest` names the first tensor that does not fit, on any rank; all ranks then keep the old weights.
        """

    @abstractmethod
    async def weight(self, name: str, num_rows: int) -> list[Any]:
        """Return the first rows of the weight that a checkpoint calls `name`, as nested lists of floats."""

    @abstractmethod
    async def release_memory(self, tags: Collection[str] = ...) -> None:
        """Give device memory back. All requests, running ones too, wait until all of it has been resumed.

        kv_cache: with every cached prefix; running requests are computed anew. weights: kept in host memory.
        """

    @abstractmethod
    async def resume_memory(self, tags: Collection[str] = ...) -> None:
        """Take memory back; requests continue when nothing is released. `EngineError` if the device has no room."""


class Engine(ABC):
    """A model that answers requests between `start` and `stop`. Not thread-safe: use it on its event loop.

    Facts about the model are known once `start` has returned; before, they raise `EngineStopped`.
    """

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @abstractmethod
    async def start(
        self,
        on_progress: Callable[[str], None] = logger.info,
        on_tokenizer: Callable[[TokenizerFacade], object] | None = None,
    ) -> None:
        """Load the model and begin to step: seconds to minutes. `ModelError` if the model cannot be served.

        on_tokenizer: called once the tokenizer is loaded and before the weights are, perhaps on a thread; what it
        raises ends the start.
        """

    @abstractmethod
    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, give running ones `drain_s` seconds, abort the rest, release the device."""

    @property
    @abstractmethod
    def is_running(self) -> bool:
        """Return whether steps can be computed now."""

    @property
    @abstractmethod
    def has_failed(self) -> bool:
        """Return whether the engine is beyond repair: `stop` cannot release all it holds, and the process must end."""

    @abstractmethod
    async def failed(self) -> str:
        """Wait until the engine has failed, and return the reason."""

    # ---- facts ----

    @property
    @abstractmethod
    def model_config(self) -> ModelInfo: ...

    @property
    @abstractmethod
    def tokenizer(self) -> TokenizerFacade: ...

    @property
    @abstractmethod
    def max_total_num_tokens(self) -> int:
        """Tokens that the KV pool holds; of all replicas together."""

    @property
    @abstractmethod
    def context_length(self) -> int:
        """Longest prompt + answer in tokens."""

    @property
    @abstractmethod
    def max_running_requests(self) -> int:
        """Requests that run at once; in all replicas together."""

    @property
    @abstractmethod
    def is_generation(self) -> bool:
        """Return whether prompts are answered, and not only turned into vectors."""

    # ---- pictures and videos ----

    @property
    def media_reader(self) -> MediaReader | None:
        """Return what writes pictures into prompts; None: the model reads text alone."""
        return None

    @property
    def media_kinds(self) -> Mapping[str, str]:
        """Return the kinds that the model reads, and the text that stands for one in a prompt; {}: text alone.

        As in {"image": "<image>"}.
        """
        return {} if self.media_reader is None else self.media_reader.kinds

    @property
    def media_marks(self) -> tuple[str, ...]:
        """Return the texts that stand for pictures, or for parts of them, wherever they are in a prompt."""
        features = () if self.media_reader is None else self.media_reader.family.feature_texts()
        return tuple(dict.fromkeys([*self.media_kinds.values(), *features]))

    @property
    def video_frames(self) -> Mapping[str, int]:
        """Return how many frames of a video the model was made for, as `fps` and `max_frames`; {}: any number."""
        return {} if self.media_reader is None else self.media_reader.frames

    def count_media_tokens(self, sizes: Sequence[MediaSize]) -> list[int]:
        """Return how many tokens of a prompt stand for each of these. `InvalidRequest` for a kind that is not read."""
        if self.media_reader is not None:
            return self.media_reader.count(sizes)
        if sizes:
            raise InvalidRequest(f"this model reads text alone, and no {sizes[0].kind}")
        return []

    def media_text(self, ids: Sequence[int]) -> str:
        """Return a text in which the placeholders of a prompt's pictures stand as in its token ids."""
        if self.media_reader is not None:
            return self.media_reader.text_of(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    async def encode_media(
        self, prompt: str | Sequence[int], media: Sequence[Media], *, add_special_tokens: bool = False
    ) -> tuple[list[int], PromptMedia]:
        """Return the token ids of `prompt`, a text or token ids, and what goes into its request as `media`.

        prompt: holds the placeholder of its kind for each of `media`, in their order; as many tokens stand there as
        `count_media_tokens` says. A `CUT` in a text is left out of it. `InvalidRequest` if the numbers differ.
        """
        if self.media_reader is not None:
            encode = self.media_reader.encode
            return await asyncio.to_thread(
                encode, prompt, media, add_special_tokens=add_special_tokens, context_length=self.context_length
            )
        self.count_media_tokens([one.size for one in media])
        if isinstance(prompt, str):
            ids = await self.encode(prompt, add_special_tokens=add_special_tokens)
        else:
            ids = list(prompt)
        return ids, PromptMedia(len(ids), (), (), ())

    # ---- requests ----

    async def encode(self, text: str, add_special_tokens: bool = True, *, is_prompt: bool = True) -> list[int]:
        """Return the token ids of `text`. Long texts are tokenized off the event loop.

        is_prompt: raise `PromptTooLong`, without tokenizing all of it, for a text that can never fit the context.
        """
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        context_length = self.context_length if is_prompt else None
        encode = functools.partial(
            self.tokenizer.encode, text, add_special_tokens=add_special_tokens, context_length=context_length
        )
        return await asyncio.to_thread(encode)

    @abstractmethod
    async def prepare(self, states: Sequence[RequestState]) -> None:
        """Compile the grammars that constrain the answers of `states`, off the event loop. Call before `submit`.

        Raises `InvalidRequest` if that is impossible, or takes too long.
        """

    @abstractmethod
    def warm_up_grammars(self) -> None:
        """Build the tables that the first grammar needs, on a thread. Call when nobody waits for the start any more."""

    def start_canary(self) -> None:
        """Compute a known text's log-probabilities soon, and compare from then on. Call as `warm_up_grammars`.

        Engines made of several leave it to those.
        """
        return

    @abstractmethod
    def submit(self, state: RequestState) -> None:
        """Queue a request, after `prepare`. From now on its sink is called, and the engine alone writes to `state`.

        Raises `InvalidRequest` (a field out of range), `PromptTooLong`, `QueueFull` or `EngineStopped`. What only a
        replica can find out ends the request as an abort instead.
        """

    @abstractmethod
    def abort(self, rid: str, message: str = "aborted by the client", status_code: int = 499) -> bool:
        """End a request now; its sink gets a last delta. Return False if no request has that rid."""

    @abstractmethod
    def abort_all(self, message: str = "aborted by the client", status_code: int = 499) -> int:
        """End every request. Return how many there were."""

    async def generate(self, state: RequestState) -> AsyncGenerator[Delta, None]:
        """Prepare and submit a request, and yield its deltas up to the one with a finish reason.

        Sets the sink of `state`. Closing the generator aborts the request.
        """
        deltas: asyncio.Queue[Delta] = asyncio.Queue()
        state.sink = deltas.put_nowait
        await self.prepare([state])
        self.submit(state)
        try:
            while True:
                delta = await deltas.get()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self.abort(state.rid)

    # ---- cache and weights ----

    @property
    @abstractmethod
    def maintenance(self) -> Maintenance: ...

    @abstractmethod
    def flush_cache(self) -> bool:
        """Forget every cached prefix. Return False, with nothing done, while any request runs or waits."""

    @abstractmethod
    def top_prefixes(self, k: int) -> Sequence[Prefix]:
        """Return the k cached prefixes that were hit most often, in full. Walks the whole tree."""

    # ---- observation ----

    @abstractmethod
    def top_branches(self, k: int) -> Sequence[BranchView]:
        """Return k nodes of the prefix tree, each behind its parent: those in use, those hit most, those used last."""

    @abstractmethod
    def oldest_requests(self, k: int) -> Sequence[RequestView]:
        """Return the k live requests that came first."""

    @abstractmethod
    def health(self) -> Health: ...

    @abstractmethod
    def stats(self) -> EngineStats: ...

    def replica_stats(self) -> Sequence[EngineStats]:
        """Return the statistics of each engine behind the facade."""
        return [self.stats()]

    @abstractmethod
    def progress(self) -> object:
        """Return a value that differs after each step; None while there is nothing to do. Callable from any thread."""

    @abstractmethod
    def describe(self) -> str:
        """Return lines that help to find out why the engine hangs. Callable from any thread."""

    @abstractmethod
    def start_profile(self, output_dir: str) -> None:
        """Record what host and device do, until `stop_profile`. `InvalidRequest` if a profile is being recorded."""

    @abstractmethod
    async def stop_profile(self) -> str:
        """Write the recording as a Chrome trace and return its path. `InvalidRequest` if none is being recorded."""
