"""A request, what it asks of the sampler, and what it gains step by step."""

import enum
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import InvalidRequest, shown

if TYPE_CHECKING:
    from engine.text.grammar import Matcher  # which imports torch: `--help` should not wait for that

TOP_K_ALL = 1 << 30
GREEDY_TEMPERATURE = 1e-6
MIN_PENALTY, MAX_BIAS = 1e-6, 1e30  # beyond these a logit, divided by a temperature, may be more than float32 holds
MAX_STOP_CHARS = {"stop": 4096, "stop_regex": 1024}  # of all that a request has
MAX_UNROLLED_LEN = 1 << 14  # of all its stop regexes: some 5 MB, and 15 ms
REPEAT = re.compile(r"(\)?)\{(\d+)")
VERBOSE = re.compile(r"(?<!\\)(?:\\\\)*\(\?[a-zA-Z]*x")
CONSTRAINTS = ("json_schema", "regex", "ebnf", "structural_tag", "choice")


@dataclass(slots=True)
class SamplingParams:
    """How to pick the next token, and when to stop. Names, defaults and ranges are SGLang's."""

    max_new_tokens: int | None = 128  # None: up to the end of the context
    min_new_tokens: int = 0
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    stop_regex: list[str] = field(default_factory=list)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    sampling_seed: int | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    n: int = 1
    # At most one of these: what the answer must look like.
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None  # GBNF or Lark
    structural_tag: str | dict[str, Any] | None = None
    choice: list[str] | None = None

    @classmethod
    def from_dict(cls, given: dict[str, Any], defaults: dict[str, Any] | None = None) -> "SamplingParams":
        """From a JSON object. Null means the default; an unknown key or a wrong type is an `InvalidRequest`."""
        if not isinstance(given, dict):
            raise InvalidRequest("sampling_params must be an object", "sampling_params")
        unknown = given.keys() - _FIELD_NAMES
        if unknown:
            raise InvalidRequest(
                f"unknown sampling parameter: {', '.join(sorted(map(str, unknown)))}", "sampling_params"
            )
        values = {**(defaults or {}), **{name: value for name, value in given.items() if value is not None}}
        params = cls(**{name: _coerce(name, value) for name, value in values.items()})
        if "max_new_tokens" in given and given["max_new_tokens"] is None:
            params.max_new_tokens = cls().max_new_tokens
        return params

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def has_penalties(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0)

    @property
    def constraint(self) -> tuple[str, str] | None:
        """(field, text) of what the answer must look like, or None. Objects and lists are given as JSON."""
        for name in CONSTRAINTS:
            value = getattr(self, name)
            if value is not None:
                return name, value if isinstance(value, str) else json.dumps(value)
        return None

    def verify(self, vocab_size: int) -> None:
        """Raise `InvalidRequest` naming the first field that is out of range."""

        def check(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise InvalidRequest(f"{name} must be {rule}, got {shown(getattr(self, name))}", name)

        def ids_in_vocab(ids: Any) -> bool:
            return all(0 <= token_id < vocab_size for token_id in ids)

        check(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "a finite number >= 0")
        check(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        check(0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        check(self.top_k == -1 or 1 <= self.top_k <= TOP_K_ALL, "top_k", "-1 (off) or at least 1")
        check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "in [-2, 2]")
        check(-2 <= self.presence_penalty <= 2, "presence_penalty", "in [-2, 2]")
        check(MIN_PENALTY <= self.repetition_penalty <= 2, "repetition_penalty", f"between {MIN_PENALTY} and 2")
        check(self.max_new_tokens is None or self.max_new_tokens >= 0, "max_new_tokens", ">= 0")
        limit = math.inf if self.max_new_tokens is None else self.max_new_tokens
        check(0 <= self.min_new_tokens <= limit, "min_new_tokens", f"between 0 and max_new_tokens, which is {limit}")
        check(self.n >= 1, "n", "at least 1")
        check(ids_in_vocab(self.stop_token_ids), "stop_token_ids", f"ids below the vocabulary size {vocab_size}")
        check(ids_in_vocab(self.logit_bias), "logit_bias", f"keyed by ids below the vocabulary size {vocab_size}")
        is_near = all(abs(bias) <= MAX_BIAS for bias in self.logit_bias.values())
        check(is_near, "logit_bias", f"numbers between -{MAX_BIAS} and {MAX_BIAS}")
        check(self.sampling_seed is None or abs(self.sampling_seed) < 1 << 63, "sampling_seed", "a 64-bit integer")
        constraints = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(constraints) > 1:
            raise InvalidRequest(f"at most one of {', '.join(CONSTRAINTS)} may be given", constraints[1])
        if self.stop or self.stop_regex:
            self._verify_stops()

    def _verify_stops(self) -> None:
        """What searches for stops is made on the event loop, and takes memory for each of their characters."""
        for name, limit in MAX_STOP_CHARS.items():
            num_chars = sum(map(len, getattr(self, name)))
            if num_chars > limit:
                raise InvalidRequest(f"{name} has {num_chars} characters, the limit is {limit}", name)
        size = sum(map(unrolled_len, self.stop_regex))
        if size > MAX_UNROLLED_LEN:
            raise InvalidRequest(
                f"stop_regex may have {size} characters when its repetitions are written out, "
                f"the limit is {MAX_UNROLLED_LEN}",
                "stop_regex",
            )
        for pattern in self.stop_regex:
            if VERBOSE.search(pattern):
                raise InvalidRequest("stop_regex must not set the flag x, which hides repetitions", "stop_regex")
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise InvalidRequest(f"stop_regex is not a regular expression: {error}", "stop_regex") from None


def unrolled_len(pattern: str) -> int:
    """At most so long is `pattern` with its repetitions written out, as `regex` compiles it (a{10000000}: 3 GB)."""
    inner, outer = 1, 1
    for after_group, count in REPEAT.findall(pattern):
        if after_group:
            outer *= max(int(count), 1)
        else:
            inner += int(count)
    return len(pattern) * inner * outer


_FIELD_NAMES = frozenset(f.name for f in fields(SamplingParams))
_INT_FIELDS = frozenset({"max_new_tokens", "min_new_tokens", "top_k", "n", "sampling_seed"})
_FLOAT_FIELDS = frozenset(
    {"temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"}
)
_STR_LIST_FIELDS = frozenset({"stop", "stop_regex"})


def _coerce(name: str, value: Any) -> Any:
    """`value` as field `name` wants it: a lone string becomes a list, JSON's string keys become ids."""

    def expect(ok: bool, kind: str) -> None:
        if not ok:
            raise InvalidRequest(f"{name} must be {kind}, got {shown(value)}", name)

    def is_int(x: Any) -> bool:
        return isinstance(x, int) and not isinstance(x, bool)

    if value is None:
        return value
    if name in _INT_FIELDS:
        expect(is_int(value) and abs(value) < 1 << 63, "an integer")
    elif name in _FLOAT_FIELDS:
        expect(isinstance(value, (int, float)) and not isinstance(value, bool), "a number")
        return float(value)
    elif name in _STR_LIST_FIELDS:
        value = [value] if isinstance(value, str) else value
        expect(
            isinstance(value, (list, tuple)) and all(isinstance(s, str) for s in value), "a string or a list of strings"
        )
        return [s for s in value if s]
    elif name in ("json_schema", "structural_tag"):
        expect(isinstance(value, (str, dict)), "an object, or a string that holds one")
    elif name in ("regex", "ebnf"):
        expect(isinstance(value, str), "a string")
    elif name == "choice":
        is_list = isinstance(value, list) and all(isinstance(s, str) for s in value)
        expect(is_list and bool(value), "a non-empty list of strings")
    elif name == "stop_token_ids":
        expect(isinstance(value, (list, tuple)) and all(map(is_int, value)), "a list of integers")
        return list(value)
    elif name == "logit_bias":
        expect(isinstance(value, dict), "an object of token id to bias")
        try:
            return {int(token_id): float(bias) for token_id, bias in value.items()}
        except (TypeError, ValueError):
            expect(False, "an object of token id to bias")
    else:
        expect(isinstance(value, bool), "true or false")
    return value


class Status(enum.Enum):
    WAITING = enum.auto()  # in the queue: never admitted, or retracted
    RUNNING = enum.auto()  # owns a row
    FINISHED = enum.auto()


@dataclass(frozen=True, slots=True)
class FinishReason:
    """Why an answer ended: type "stop", "length" or "abort", in SGLang's shape."""

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
    """Log-probabilities of consecutive tokens, one entry a token in each list that was asked for."""

    token: list[TokenLogprob] = field(default_factory=list)
    top: list[list[TokenLogprob] | None] = field(default_factory=list)
    token_ids: list[list[TokenLogprob] | None] = field(default_factory=list)


@dataclass(slots=True)
class Delta:
    """What a request gained since its last delta. A request that does not stream gets one, at its end."""

    request: "Request"
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: Logprobs | None = None


def ignore(delta: Delta) -> None:
    """The sink of a request that nobody listens to, or nobody any more."""


@dataclass(slots=True)
class RequestTimes:
    """time.perf_counter() seconds; 0.0 until it happened."""

    arrived: float = 0.0
    scheduled: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0


@dataclass(slots=True, eq=False)
class Request:
    """One prompt and its one answer. The caller fills the first part, the engine owns the rest.

    `sink` is called on the event loop's thread, once a step at most, and must not block or raise;
    the last delta carries a `finish_reason`.
    """

    rid: str
    input_ids: list[int]
    sampling_params: SamplingParams
    sink: Callable[[Delta], None]
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = -1  # first prompt position whose log-probability is wanted; -1: none
    top_logprobs_num: int = 0
    token_ids_logprob: list[int] = field(default_factory=list)
    priority: int = 0  # larger runs first
    own_priority: int = 0  # likewise, among the requests of its client that have the same priority
    extra_key: str = ""  # requests share cached prefixes only within one key
    client: str = ""  # clients that wait take turns
    weight: float = 1.0  # its client's share of the server, beside other clients' weights
    max_thinking_tokens: int | None = None  # of the answer, before reasoning_end_ids are forced
    reasoning_end_ids: list[int] = field(default_factory=list)  # a grammar holds only after them; []: from the start
    pooling: str | None = None  # "last" or "mean": a vector is wanted, and no answer

    status: Status = Status.WAITING
    row: int = -1
    output_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0  # of the prompt, found in the cache when first admitted
    num_retractions: int = 0
    num_admitted_before: int = 0  # requests that the scheduler had admitted when this one came
    matcher: "Matcher | None" = None  # follows the answer, if it is constrained; made when prepared
    num_forced_tokens: int = 0  # of the answer: put there by the matcher, not sampled
    charged_tokens: float = 0.0  # to its client, while it runs
    input_logprobs: Logprobs | None = None  # of the prompt from logprob_start_len on, complete at the first delta
    embedding: np.ndarray | None = None  # float32, of a request with `pooling`; not normalized
    prompt_ids: np.ndarray | None = None  # input_ids as int32, once checked
    text_stream: Any = None  # engine.text.detokenizer.TextStream, made when submitted; None again if it failed
    new_token_ids: list[int] = field(default_factory=list)  # whose text has not been made yet
    unsent: Delta | None = None  # what the sink has not been given of all before them
    has_begun: bool = False  # the sink has been given something
    is_pending: bool = False  # it waits for its turn to be given something
    times: RequestTimes = field(default_factory=lambda: RequestTimes(arrived=time.perf_counter()))

    @property
    def prompt_len(self) -> int:
        return len(self.input_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids) + len(self.output_ids)

    @property
    def wants_tokens(self) -> bool:
        """Does someone look at the tokens as they come? If not, the text is made once, at the end."""
        params = self.sampling_params
        return self.stream or self.return_logprob or bool(params.stop or params.stop_regex)

    @property
    def runs_to_limit(self) -> bool:
        """Will the answer have `max_new_tokens`, whatever the tokens are?"""
        params = self.sampling_params
        return (
            params.ignore_eos
            and self.matcher is None
            and not (params.stop or params.stop_token_ids or params.stop_regex)
        )

    def all_token_ids(self) -> np.ndarray:
        """int32 [num_tokens]; the prompt's part is made once."""
        if self.prompt_ids is None:
            self.prompt_ids = np.asarray(self.input_ids, np.int32)
        if not self.output_ids:
            return self.prompt_ids
        return np.concatenate([self.prompt_ids, np.asarray(self.output_ids, np.int32)])
