"""A request: a prompt, and what its client asks of the answer. Nobody writes to it: see `engine.state`."""

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from engine.declared import Object, convert
from engine.errors import InvalidRequest, shown
from engine.media import PromptMedia
from engine.misfits import members, rule_of, type_info

TOP_K_ALL = 1 << 30
GREEDY_TEMPERATURE = 1e-6
MIN_PENALTY, MAX_BIAS = 1e-6, 1e30  # beyond these a logit, divided by a temperature, may be more than float32 holds
MAX_STOP_CHARS = {"stop": 4096, "stop_regex": 1024}  # of all that a request has
MAX_UNROLLED_LEN = 1 << 14  # of all its stop regexes: some 5 MB, and 15 ms
REPEAT = re.compile(r"(\)?)\{(\d+)")
VERBOSE = re.compile(r"(?<!\\)(?:\\\\)*\(\?[a-zA-Z]*x")
NOT_NEGATIVE = Meta(ge=0)
LongInt = Annotated[int, Meta(ge=1 - (1 << 63), le=(1 << 63) - 1)]
Text = Annotated[str | dict[str, Any], Meta(extra={"rule": "an object, or a string that holds one"})]
CONSTRAINTS = ("json_schema", "regex", "ebnf", "structural_tag", "choice")


class SamplingFields(Object):
    """The sampling parameters as clients write them: kinds, ranges and what they mean."""

    max_new_tokens: Annotated[int, NOT_NEGATIVE] | None = None
    min_new_tokens: Annotated[int, NOT_NEGATIVE] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[LongInt] | None = None
    stop_regex: str | list[str] | None = None
    temperature: Annotated[float, NOT_NEGATIVE] | None = None
    top_p: (
        Annotated[
            float,
            Meta(
                ge=0,
                le=1,
                description="drawn from are the likeliest tokens that have this probability together; 0: greedy",
            ),
        ]
        | None
    ) = None
    top_k: (
        Annotated[
            int,
            Meta(ge=-1, le=TOP_K_ALL, description="only so many of the likeliest tokens are drawn from; -1 or 0: all"),
        ]
        | None
    ) = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=MIN_PENALTY, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[int, float],
            Meta(description="token id to what is added to its logit", extra={"rule": "an object of token id to bias"}),
        ]
        | None
    ) = None
    sampling_seed: LongInt | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    n: Annotated[int, Meta(ge=1, description="answers to each prompt; default 1")] | None = None
    json_schema: Annotated[Text, Meta(description="the answer is JSON of this schema")] | None = None
    regex: Annotated[str, Meta(description="the answer matches it")] | None = None
    ebnf: Annotated[str, Meta(description="a grammar, in GBNF or Lark")] | None = None
    structural_tag: Text | None = None
    choice: Annotated[list[str], Meta(min_length=1)] | None = None


def _ranges() -> dict[str, tuple[float, float, str]]:
    """Return the limits of the numbers, and in words."""
    found = {}
    for one in msgspec.structs.fields(SamplingFields):
        info = members(type_info(one.type))[0]
        if isinstance(info, msgspec.inspect.IntType | msgspec.inspect.FloatType) and info.ge is not None:
            high = math.inf if info.le is None else info.le
            found[one.name] = info.ge, high, rule_of(info, 0)
    return found


RANGES = _ranges()
SAMPLING_NAMES = frozenset(SamplingFields.__struct_fields__)


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
        unknown = given.keys() - SAMPLING_NAMES
        if unknown:
            raise InvalidRequest(
                f"unknown sampling parameter: {', '.join(sorted(map(str, unknown)))}", "sampling_params"
            )
        values = {**(defaults or {}), **{name: value for name, value in given.items() if value is not None}}
        if "max_new_tokens" in given and given["max_new_tokens"] is None:
            values.pop("max_new_tokens", None)  # the class's default, also where None is the caller's
        return cls.of_fields({**values, **convert(values, SamplingFields).given(values)})

    @classmethod
    def of_fields(cls, values: dict[str, Any]) -> "SamplingParams":
        """Make parameters of values that are as `SamplingFields` declares them."""
        values = values.copy()
        for name in MAX_STOP_CHARS:  # a lone string is a list of one
            if (texts := values.get(name)) is not None:
                values[name] = [text for text in ([texts] if isinstance(texts, str) else texts) if text]
        return cls(**values)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1 or self.top_p == 0

    @property
    def has_penalties(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0)

    @property
    def constraint_name(self) -> str | None:
        """Return the field that says what the answer must look like, if one does."""
        return next((name for name in CONSTRAINTS if getattr(self, name) is not None), None)

    @property
    def constraint(self) -> tuple[str, str] | None:
        """Return (field, text) of what the answer must look like, or None. Objects and lists are written as JSON.

        That may be a megabyte: ask for `constraint_name` to learn whether there is one.
        """
        name = self.constraint_name
        if name is None:
            return None
        value = getattr(self, name)
        return name, value if isinstance(value, str) else msgspec.json.encode(value).decode()

    def has_constraint_of(self, other: "SamplingParams") -> bool:
        """Return whether both hold the same constraint, the same object and not only an equal one."""
        return all(getattr(self, name) is getattr(other, name) for name in CONSTRAINTS)

    def verify(self, vocab_size: int) -> None:
        """Raise `InvalidRequest` naming the first field that is out of range."""

        def wrong(name: str, rule: str) -> InvalidRequest:
            return InvalidRequest(f"{name} must be {rule}, got {shown(getattr(self, name))}", name)

        for name, (low, high, rule) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise wrong(name, rule)
        if not math.isfinite(self.temperature):
            raise wrong("temperature", "a finite number")
        limit = math.inf if self.max_new_tokens is None else self.max_new_tokens
        if not 0 <= self.min_new_tokens <= limit:
            raise wrong("min_new_tokens", f"between 0 and max_new_tokens, which is {limit}")
        if not all(0 <= token_id < vocab_size for token_id in self.logit_bias):
            raise wrong("logit_bias", f"keyed by ids below the vocabulary size {vocab_size}")
        if not all(abs(bias) <= MAX_BIAS for bias in self.logit_bias.values()):
            raise wrong("logit_bias", f"numbers between -{MAX_BIAS} and {MAX_BIAS}")
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
    media: PromptMedia | None = None  # pictures and videos, whose tokens are in input_ids: see `Engine.encode_media`

    @property
    def prompt_len(self) -> int:
        return len(self.input_ids)
