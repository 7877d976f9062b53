"""A request: a prompt, and what its client asks of the answer. Nobody writes to it: see `engine.state`."""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from engine.errors import InvalidRequest, shown

TOP_K_ALL = 1 << 30
GREEDY_TEMPERATURE = 1e-6
MIN_PENALTY, MAX_BIAS = 1e-6, 1e30  # beyond these a logit, divided by a temperature, may be more than float32 holds
MAX_STOP_CHARS = {"stop": 4096, "stop_regex": 1024}  # of all that a request has
MAX_UNROLLED_LEN = 1 << 14  # of all its stop regexes: some 5 MB, and 15 ms
REPEAT = re.compile(r"(\)?)\{(\d+)")
VERBOSE = re.compile(r"(?<!\\)(?:\\\\)*\(\?[a-zA-Z]*x")
CONSTRAINTS = ("json_schema", "regex", "ebnf", "structural_tag", "choice")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Say how to pick the next token, and when to stop. Names, defaults and ranges are SGLang's."""

    max_new_tokens: int | None = 128  # None: up to the end of the context
    min_new_tokens: int = 0  # of the answer, in which nothing ends it: neither tokens nor texts
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)  # those outside the vocabulary never come
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
        """Read a JSON object. Null means the default; an unknown key or a wrong type is an `InvalidRequest`."""
        if not isinstance(given, dict):
            raise InvalidRequest("sampling_params must be an object", "sampling_params")
        unknown = given.keys() - _FIELD_NAMES
        if unknown:
            raise InvalidRequest(
                f"unknown sampling parameter: {', '.join(sorted(map(str, unknown)))}", "sampling_params"
            )
        values = {**(defaults or {}), **{name: value for name, value in given.items() if value is not None}}
        if "max_new_tokens" in given and given["max_new_tokens"] is None:
            values.pop("max_new_tokens", None)  # the class's default, also where None is the caller's
        return cls(**{name: _coerce(name, value) for name, value in values.items()})

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1 or self.top_p == 0

    @property
    def has_penalties(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0)

    @property
    def constraint(self) -> tuple[str, str] | None:
        """Return (field, text) of what the answer must look like, or None. Objects and lists are given as JSON."""
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

        check(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "a finite number >= 0")
        check(0 <= self.top_p <= 1, "top_p", "in [0, 1]; 0: greedy")
        check(0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        check(-1 <= self.top_k <= TOP_K_ALL, "top_k", "-1 or 0 (off), or at least 1")
        check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "in [-2, 2]")
        check(-2 <= self.presence_penalty <= 2, "presence_penalty", "in [-2, 2]")
        check(MIN_PENALTY <= self.repetition_penalty <= 2, "repetition_penalty", f"between {MIN_PENALTY} and 2")
        check(self.max_new_tokens is None or self.max_new_tokens >= 0, "max_new_tokens", ">= 0")
        limit = math.inf if self.max_new_tokens is None else self.max_new_tokens
        check(0 <= self.min_new_tokens <= limit, "min_new_tokens", f"between 0 and max_new_tokens, which is {limit}")
        check(self.n >= 1, "n", "at least 1")
        is_in_vocab = all(0 <= token_id < vocab_size for token_id in self.logit_bias)
        check(is_in_vocab, "logit_bias", f"keyed by ids below the vocabulary size {vocab_size}")
        is_near = all(abs(bias) <= MAX_BIAS for bias in self.logit_bias.values())
        check(is_near, "logit_bias", f"numbers between -{MAX_BIAS} and {MAX_BIAS}")
        check(self.sampling_seed is None or abs(self.sampling_seed) < 1 << 63, "sampling_seed", "a 64-bit integer")
        constraints = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(constraints) > 1:
            raise InvalidRequest(f"at most one of {', '.join(CONSTRAINTS)} may be given", constraints[1])
        if self.stop or self.stop_regex:
            self._verify_stops()

    def _verify_stops(self) -> None:
        """Raise `InvalidRequest` if the stops are too large or no regular expressions.

        The searcher for stops is made on the event loop, and takes memory for each of their characters.
        """
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
    """Return the greatest length that `pattern` may have with its repetitions written out.

    `regex` compiles it so: a{10000000} takes 3 GB.
    """
    inner, outer = 1, 1
    for after_group, count in REPEAT.findall(pattern):
        if after_group:
            outer *= max(int(count), 1)
        else:
            inner += int(count)
    return len(pattern) * inner * outer


@dataclass(frozen=True, slots=True)
class _Kind:
    """Describe the values that a field takes: in words, as a check, and how they are converted."""

    rule: str  # completes "field must be ..."
    fits: Callable[[Any], bool]
    convert: Callable[[Any], Any] | None = None  # TypeError, ValueError or OverflowError: the value does not fit


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _all_strings(value: Iterable[Any]) -> bool:
    return all(isinstance(text, str) for text in value)


_INT = _Kind("an integer", lambda value: _is_int(value) and abs(value) < 1 << 63)
_NUMBER = _Kind("a number", lambda value: _is_int(value) or isinstance(value, float), float)
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_TEXT = _Kind("a string", lambda value: isinstance(value, str))
_TEXTS = _Kind(  # a lone string is a list of one
    "a string or a list of strings",
    lambda value: isinstance(value, str) or (isinstance(value, list | tuple) and _all_strings(value)),
    lambda value: [text for text in ([value] if isinstance(value, str) else value) if text],
)
_OBJECT = _Kind("an object, or a string that holds one", lambda value: isinstance(value, str | dict))
_CHOICE = _Kind(
    "a non-empty list of strings", lambda value: isinstance(value, list) and bool(value) and _all_strings(value)
)
_IDS = _Kind("a list of integers", lambda value: isinstance(value, list | tuple) and all(map(_INT.fits, value)), list)
_BIASES = _Kind(  # JSON has string keys
    "an object of token id to bias",
    lambda value: isinstance(value, dict),
    lambda value: {int(token_id): float(bias) for token_id, bias in value.items()},
)
_KINDS = {
    "max_new_tokens": _INT, "min_new_tokens": _INT, "top_k": _INT, "n": _INT, "sampling_seed": _INT,
    "temperature": _NUMBER, "top_p": _NUMBER, "min_p": _NUMBER,
    "frequency_penalty": _NUMBER, "presence_penalty": _NUMBER, "repetition_penalty": _NUMBER,
    "stop": _TEXTS, "stop_regex": _TEXTS, "stop_token_ids": _IDS, "logit_bias": _BIASES,
    "json_schema": _OBJECT, "structural_tag": _OBJECT, "regex": _TEXT, "ebnf": _TEXT, "choice": _CHOICE,
    "ignore_eos": _FLAG, "skip_special_tokens": _FLAG, "spaces_between_special_tokens": _FLAG, "no_stop_trim": _FLAG,
}  # fmt: skip
_FIELD_NAMES = frozenset(one.name for one in fields(SamplingParams))
assert _KINDS.keys() == _FIELD_NAMES, "every sampling parameter has a kind"


def _coerce(name: str, value: Any) -> Any:
    """Return `value` as field `name` wants it. `InvalidRequest` if it is of another kind."""
    kind = _KINDS[name]
    if value is None:
        return value
    if kind.fits(value):
        try:
            return kind.convert(value) if kind.convert else value
        except (TypeError, ValueError, OverflowError):
            pass
    raise InvalidRequest(f"{name} must be {kind.rule}, got {shown(value)}", name)


@dataclass(frozen=True, slots=True)
class Request:
    """Hold one prompt, and what its client asks of the one answer to it. It travels to replicas as it is."""

    rid: str
    input_ids: list[int]
    sampling_params: SamplingParams
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
    may_shorten: bool = False  # max_new_tokens is an upper bound: less if the context, or the KV pool, has less room
    pooling: str | None = None  # "last" or "mean": a vector is wanted, and no answer
    return_hidden_states: bool = False  # of each token but the last one sampled, which is not computed

    @property
    def prompt_len(self) -> int:
        return len(self.input_ids)
