"""The state of a request: what the engine keeps of it while it answers, and what it hands out."""

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.request import Request, SamplingParams

if TYPE_CHECKING:
    from engine.schedule.spans import Spans
    from engine.text.detokenizer import TextStream
    from engine.text.grammar import Matcher  # which imports torch: `--help` should not wait for that


class Status(enum.Enum):
    """Say where a request is."""

    WAITING = enum.auto()  # in the queue: never admitted, or retracted
    RUNNING = enum.auto()  # owns a row
    FINISHED = enum.auto()


@dataclass(frozen=True, slots=True)
class FinishReason:
    """Say why an answer ended: type "stop", "length" or "abort", in SGLang's shape."""

    type: str
    matched: int | str | None = None  # the stop token id or stop string
    message: str | None = None
    status_code: int | None = None

    def to_dict(self, num_output_tokens: int) -> dict[str, Any]:
        if self.type == "length":
            return {"type": "length", "length": num_output_tokens}
        if self.type == "stop":
            return {"type": "stop", "matched": self.matched}
        return {"type": "abort", "message": self.message, "status_code": self.status_code}


# (log-probability, token id); None for the prompt's first token, which nothing predicts.
TokenLogprob = tuple[float | None, int]


@dataclass(slots=True)
class Logprobs:
    """Hold log-probabilities of consecutive tokens, one entry a token in each list that was asked for."""

    token: list[TokenLogprob] = field(default_factory=list)
    top: list[list[TokenLogprob] | None] = field(default_factory=list)
    token_ids: list[list[TokenLogprob] | None] = field(default_factory=list)


@dataclass(slots=True)
class Delta:
    """Report what an answer gained since its last delta. A request that does not stream gets one, at its end."""

    state: "RequestState"
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: Logprobs | None = None


def ignore(delta: Delta) -> None:
    """Drop `delta`: the sink of a request that nobody listens to, or nobody any more."""


@dataclass(slots=True)
class RequestTimes:
    """Record when things happened, in time.perf_counter() seconds; 0.0: not yet."""

    arrived: float = 0.0
    scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0


Sink = Callable[[Delta], None]


@dataclass(slots=True, eq=False)
class RequestState:
    """Keep one request and how far its answer has come.

    The caller makes it from a request and a sink. Until it is submitted, the caller may set another sink, and the same
    request on another client's account; from then on the engine alone writes. `Constraints` sets the matcher,
    `RequestLimits` prompt_ids, `Intake` spans, the scheduler and its parts all from `status` to `charged_tokens`;
    resolved steps set input_logprobs, embedding and hidden_states; `OutputProcessor` sets the rest, and the sink to
    `ignore` at the end.

    All of it is written on the event loop's thread, and may be read there at any time. While a request runs its tokens
    are in its row (`Rows.output_ids`): `output_ids` is complete once the request has ended.

    `sink` is called on the event loop's thread, once a step at most, and must not block or raise; the last delta
    carries a `finish_reason`.
    """

    request: Request
    sink: Sink = ignore

    # The request's own, copied: steps, tokens and deliveries read these.
    rid: str = field(init=False)
    sampling_params: SamplingParams = field(init=False)
    prompt_len: int = field(init=False)
    stream: bool = field(init=False)
    return_logprob: bool = field(init=False)
    logprob_start_len: int = field(init=False)
    top_logprobs_num: int = field(init=False)
    token_ids_logprob: list[int] = field(init=False)
    extra_key: str = field(init=False)
    pooling: str | None = field(init=False)
    return_hidden_states: bool = field(init=False)
    wants_tokens: bool = field(init=False)  # somebody looks at them as they come; else the text is made at the end

    status: Status = Status.WAITING
    row: int = -1
    max_new_tokens: int = field(init=False)  # -1 while it is open: a request that has none gets the room when queued
    seed: int | None = field(init=False)  # where the request has none, drawn when it is first admitted
    output_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0  # of the prompt, found in the cache when first admitted
    num_retractions: int = 0
    joins_others: bool = False  # of one HTTP request, queued before it: a full queue takes the rest of them
    num_admitted_before: int = 0  # requests that the scheduler had admitted when this one came
    num_forced_tokens: int = 0  # of the answer: put there by the matcher, not sampled
    charged_tokens: float = 0.0  # to its client, while it runs
    matcher: "Matcher | None" = None  # follows the answer, if it is constrained; made when prepared
    input_logprobs: Logprobs | None = None  # of the prompt from logprob_start_len on, complete at the first delta
    embedding: np.ndarray | None = None  # float32, of a request with `pooling`; not normalized
    hidden_states: np.ndarray | None = None  # float32 [tokens or more, hidden], by position, if they are wanted
    prompt_ids: np.ndarray | None = None  # input_ids as int32, once checked
    spans: "Spans | None" = None  # the prompt's pictures, if it has any; set when submitted
    text_stream: "TextStream | None" = None  # made when submitted; None again if it failed
    new_token_ids: list[int] = field(default_factory=list)  # whose text has not been made yet
    unsent: Delta | None = None  # what the sink has not been given of all before them
    read_logprobs: Callable[[Logprobs], None] | None = None  # takes those of a whole answer that are there already
    has_begun: bool = False  # the sink has been given something
    is_pending: bool = False  # it waits for its turn to be given something
    times: RequestTimes = field(default_factory=lambda: RequestTimes(arrived=time.perf_counter()))

    def __post_init__(self) -> None:
        request = self.request
        self.sampling_params = params = request.sampling_params
        self.rid, self.prompt_len = request.rid, len(request.input_ids)
        self.stream, self.return_logprob = request.stream, request.return_logprob
        self.logprob_start_len, self.top_logprobs_num = request.logprob_start_len, request.top_logprobs_num
        self.token_ids_logprob = request.token_ids_logprob
        self.extra_key, self.pooling = request.extra_key, request.pooling
        self.return_hidden_states = request.return_hidden_states
        self.wants_tokens = request.stream or request.return_logprob or bool(params.stop or params.stop_regex)
        self.max_new_tokens = -1 if params.max_new_tokens is None else params.max_new_tokens
        self.seed = params.sampling_seed

    @property
    def num_tokens(self) -> int:
        return self.prompt_len + len(self.output_ids)

    @property
    def runs_to_limit(self) -> bool:
        """Return whether the answer will have `max_new_tokens`, whatever the tokens are."""
        params = self.sampling_params
        return (
            params.ignore_eos
            and self.matcher is None
            and not (params.stop or params.stop_token_ids or params.stop_regex)
        )

    def resolved_params(self) -> SamplingParams:
        """Return the sampling parameters with what the engine has filled in, as far as that is known by now."""
        params = self.sampling_params
        limit = self.max_new_tokens if self.max_new_tokens >= 0 else params.max_new_tokens
        return replace(params, max_new_tokens=limit, sampling_seed=self.seed)

    def all_token_ids(self) -> np.ndarray:
        """Return the tokens so far as the tree knows them, int32 [num_tokens]; the prompt's part is made once."""
        if self.prompt_ids is None:
            self.prompt_ids = np.asarray(self.request.input_ids, np.int32)
        prompt_ids = self.prompt_ids if self.spans is None else self.spans.tree_ids
        if not self.output_ids:
            return prompt_ids
        return np.concatenate([prompt_ids, np.asarray(self.output_ids, np.int32)])
