"""Choices as OpenAI's /v1/completions and /v1/chat/completions spell them, with SGLang's and vLLM's extra fields."""

import time
from abc import abstractmethod
from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from engine.engine import TokenizerFacade
from engine.state import Delta, FinishReason, Logprobs, RequestState, TokenLogprob
from server.apis.answer import Answer, failure_of
from server.apis.chat_calls import CallWriter
from server.apis.meta_info import MetaInfo, last_hidden_state
from server.http.sse import event
from server.parsers import AnswerDelta, AnswerParser
from server.reading.chat import ChatTurn
from server.reading.error_shapes import openai_error
from server.reading.protocol import JSON

# Of a chat's deltas: SGLang's clients read the field without looking whether it is there.
NO_REASONING: JSON = {"reasoning_content": None}
MARK = "\0text\0"  # stands for the text while an event's JSON is made


@dataclass(slots=True)
class Usage:
    """Costs of one response, in tokens. The prompt of n answers counts once."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int | None = None  # of the completion; None: unknown to the endpoint

    def to_dict(self, with_cached: bool) -> JSON:
        usage: JSON = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }
        if with_cached:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached}
        if self.reasoning is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.reasoning}
        return usage


@dataclass(slots=True)
class Envelope:
    """Everything around the choices of one response, and the wishes that hold for each of them."""

    id: str
    model: str
    object: str  # of a whole response
    chunk_object: str  # of a stream's event
    created: int = field(default_factory=lambda: int(time.time()))
    meta_info: MetaInfo | None = None  # SGLang's, of each choice, if asked for
    # vLLM's:
    returns_token_ids: bool = False  # beside each choice's text
    names_tokens_by_id: bool = False  # in log-probabilities: "token_id:17", a name that no other token has
    has_continuous_usage: bool = False  # in each event of a stream
    has_usage: bool = False  # OpenAI's: in an event after a stream's last choice
    _head: JSON = field(init=False)

    def __post_init__(self) -> None:
        self._head = {"id": self.id, "created": self.created, "model": self.model}

    def response(self, choices: list[JSON], usage: JSON) -> JSON:
        return {**self._head, "object": self.object, "choices": choices, "usage": usage}

    def chunk(self, choices: list[JSON], usage: JSON | None = None) -> JSON:
        chunk = {**self._head, "object": self.chunk_object, "choices": choices}
        return chunk if usage is None else {**chunk, "usage": usage}


class OpenAIAnswer(Answer):
    """A choice. The JSON around a streamed text is made once a stream."""

    def __init__(
        self,
        index: int,
        state: RequestState,
        envelope: Envelope,
        tokenizer: TokenizerFacade,
        parser: AnswerParser | None = None,
    ) -> None:
        super().__init__(index, state, parser)
        self.envelope, self.tokenizer = envelope, tokenizer
        self._has_usage = envelope.has_continuous_usage
        self._head = self._end = b""  # of an event whose choice gains text, around the text
        self._logprobs: Any = None  # spelled ahead of the end, of a whole answer

    @property
    def num_reasoning_tokens(self) -> int | None:
        """Reasoning tokens of an answer that has ended; None if the endpoint does not know of any."""
        return None

    # ---- the spelling, by endpoint ----

    @abstractmethod
    def opening(self) -> JSON | None:
        """Return the choice of the event ahead of the first text, if there is one."""

    @abstractmethod
    def piece(self, text: str, logprobs: Any = None) -> JSON:
        """Return the fields of a choice that gains `text`."""

    @abstractmethod
    def last_piece(self) -> JSON:
        """Return the fields of a choice that gains nothing more."""

    def hidden_piece(self, state: list[float]) -> JSON:
        """Return the fields of a choice that has the last hidden state."""
        return {**self.last_piece(), "hidden_states": state, "finish_reason": None}

    @abstractmethod
    def spell_logprobs(self, logprobs: Logprobs | None) -> Any:
        """Return log-probabilities in the endpoint's shape."""

    @abstractmethod
    def choice(self, delta: Delta) -> JSON:
        """Return the choice of an answer that is not streamed."""

    def all_logprobs(self, delta: Delta) -> Any:
        """Return a whole answer's log-probabilities, of which `delta` has those that have not been read yet."""
        return _join(self._logprobs, self.spell_logprobs(delta.logprobs))

    # ---- for Answer ----

    def reader_of_logprobs(self) -> Callable[[Logprobs], None] | None:
        return self._read_logprobs

    def _read_logprobs(self, logprobs: Logprobs) -> None:
        self._logprobs = _join(self._logprobs, self.spell_logprobs(logprobs))

    def begin(self) -> bytes:
        choice = {"index": self.index, **self.piece(MARK), "finish_reason": None}
        # From the right: a rid may hold the mark, too.
        self._head, self._end = event(self.envelope.chunk([choice])).rsplit(orjson.dumps(MARK), 1)
        opening = self.opening()
        return b"" if opening is None else event(self.envelope.chunk([{"index": self.index, **opening}]))

    def text(self, delta: Delta) -> bytes:
        if delta.logprobs is None:
            if not delta.text:
                return b""
            if not self._has_usage:
                return self._head + orjson.dumps(delta.text) + self._end
        return self._event(**self.piece(delta.text, self.spell_logprobs(delta.logprobs)), finish_reason=None)

    def end(self, reason: FinishReason) -> bytes:
        return self._event(**self.last_piece(), **self.ending(reason), **self._meta(reason)) + self.hidden_event()

    def hidden_event(self) -> bytes:
        """Return the event behind the end that holds the last hidden state, as SGLang's; empty if nobody wants it."""
        if not self.state.return_hidden_states:
            return b""
        return self._event(**self.hidden_piece(last_hidden_state(self.state, self.num_output_tokens)))

    def fail(self, reason: FinishReason) -> bytes:
        return event(openai_error(*failure_of(reason)))

    def whole(self, delta: Delta) -> JSON:
        choice = {"index": self.index, **self.choice(delta), **self._meta(delta.finish_reason)}
        if self.state.return_hidden_states:
            choice["hidden_states"] = last_hidden_state(self.state, self.num_output_tokens)
        if self.envelope.returns_token_ids:
            choice |= {"prompt_token_ids": self.state.request.input_ids, "token_ids": delta.token_ids}
        return choice

    def ending(self, reason: FinishReason | None) -> JSON:
        return {"finish_reason": reason and reason.type, "matched_stop": reason and reason.matched}

    @property
    def token_name(self) -> Callable[[int], str]:
        """Return the function that names a token in log-probabilities."""
        return "token_id:{}".format if self.envelope.names_tokens_by_id else self.tokenizer.token_text

    def _event(self, **fields: Any) -> bytes:
        """Return an event of this choice, `fields` beside its index."""
        usage = None
        if self._has_usage:
            usage = Usage(self.state.prompt_len, self.num_output_tokens).to_dict(with_cached=False)
        return event(self.envelope.chunk([{"index": self.index, **fields}], usage))

    def _meta(self, reason: FinishReason | None) -> JSON:
        meta_info = self.envelope.meta_info
        if meta_info is None:
            return {}
        return {"meta_info": meta_info.counts(self.state, self.num_output_tokens, reason)}


class ChatAnswer(OpenAIAnswer):
    """A choice of /v1/chat/completions."""

    begins_at_once = True  # the role

    def __init__(
        self, index: int, state: RequestState, envelope: Envelope, tokenizer: TokenizerFacade, *, turn: ChatTurn
    ) -> None:
        super().__init__(index, state, envelope, tokenizer, turn.new_parser and turn.new_parser())
        self._turn = turn
        self._calls = CallWriter(turn.custom_tools)

    @property
    def num_reasoning_tokens(self) -> int | None:
        if self.parser is None or self.parser.reasoning is None:
            return None
        return self._turn.count_reasoning(self.state.output_ids, self.parser)

    def opening(self) -> JSON:
        delta = {"role": "assistant", "content": "", **NO_REASONING}
        return {"delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, text: str, logprobs: Any = None) -> JSON:
        return {"delta": {"content": text, **NO_REASONING}, "logprobs": logprobs}

    def last_piece(self) -> JSON:
        return {"delta": dict(NO_REASONING), "logprobs": None}

    def hidden_piece(self, state: list[float]) -> JSON:
        return {"delta": {"hidden_states": state}, "finish_reason": None}

    def parts(self, parts: AnswerDelta, logprobs: Logprobs | None) -> bytes:
        is_text = not (parts.reasoning or parts.tool_calls)
        if is_text and logprobs is None:
            if not parts.text:
                return b""
            if not self._has_usage:
                return self._head + orjson.dumps(parts.text) + self._end
        fields = NO_REASONING | _reasoning_fields(parts)
        if parts.tool_calls and (calls := self._calls.deltas(parts.tool_calls)):
            fields["tool_calls"] = calls
        if parts.text:
            fields["content"] = parts.text
        return self._event(delta=fields, logprobs=self.spell_logprobs(logprobs), finish_reason=None)

    def end(self, reason: FinishReason) -> bytes:
        held = self._calls.rest()
        if not held:
            return super().end(reason)
        return self._event(delta=NO_REASONING | {"tool_calls": held}, finish_reason=None) + super().end(reason)

    def ending(self, reason: FinishReason | None) -> JSON:
        ending = super().ending(reason)
        if self.parser is not None and self.parser.num_tool_calls and ending["finish_reason"] == "stop":
            ending["finish_reason"] = "tool_calls"
        return ending

    def choice(self, delta: Delta) -> JSON:
        message: JSON = {"role": "assistant", "content": delta.text}
        if self.parser is not None:
            parts = self.parser.parse(delta.text)
            message |= {"content": parts.text or (None if parts.tool_calls else ""), **_reasoning_fields(parts)}
            if parts.tool_calls:
                message["tool_calls"] = self._calls.whole(parts.tool_calls)
        return {"message": message, "logprobs": self.all_logprobs(delta), **self.ending(delta.finish_reason)}

    def spell_logprobs(self, logprobs: Logprobs | None) -> JSON | None:
        if logprobs is None:
            return None
        return {"content": spell_tokens(logprobs, self.tokenizer, self.token_name), "refusal": None}


class CompletionAnswer(OpenAIAnswer):
    """A choice of /v1/completions."""

    def __init__(
        self,
        index: int,
        state: RequestState,
        envelope: Envelope,
        tokenizer: TokenizerFacade,
        *,
        is_echo: bool,
        num_logprobs: int,
    ) -> None:
        super().__init__(index, state, envelope, tokenizer)
        self.is_echo, self.num_logprobs = is_echo, num_logprobs
        self._offset = 0  # whole characters of the tokens that have been reported
        self._decoder = getincrementaldecoder("utf-8")("replace")  # of these tokens: several may share a character

    def opening(self) -> JSON | None:
        if not self.is_echo:
            return None
        return {"text": self._prompt_text(), "logprobs": self._prompt_logprobs(), "finish_reason": None}

    def piece(self, text: str, logprobs: Any = None) -> JSON:
        return {"text": text, "logprobs": logprobs}

    def last_piece(self) -> JSON:
        return {"text": "", "logprobs": None}

    def last_events(self, delta: Delta, reason: FinishReason) -> bytes:
        """Put the end into the event of the last token, if that has log-probabilities: SGLang's clients expect some."""
        if delta.logprobs is None or not delta.logprobs.token:
            return super().last_events(delta, reason)
        begun = self.events(Delta(self.state, "", []))
        last = self.piece(delta.text, self.spell_logprobs(delta.logprobs))
        return begun + self._event(**last, **self.ending(reason), **self._meta(reason)) + self.hidden_event()

    def choice(self, delta: Delta) -> JSON:
        return {
            "text": self._prompt_text() + delta.text,
            "logprobs": self.all_logprobs(delta),
            **self.ending(delta.finish_reason),
        }

    def spell_logprobs(self, logprobs: Logprobs | None) -> JSON | None:
        if logprobs is None:
            return None
        name = self.token_name
        offsets = []
        for _, token_id in logprobs.token:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self.tokenizer.token_bytes(token_id)))
        top = [_alternatives(row, entry, name) for entry, row in zip(logprobs.token, logprobs.top, strict=False)]
        return {
            "tokens": [name(token_id) for _, token_id in logprobs.token],
            "token_logprobs": [_finite(logprob) for logprob, _ in logprobs.token],
            "top_logprobs": top if self.num_logprobs else None,
            "text_offset": offsets,
        }

    def reader_of_logprobs(self) -> Callable[[Logprobs], None] | None:
        return None if self.is_echo else super().reader_of_logprobs()  # the prompt's are spelled first

    def all_logprobs(self, delta: Delta) -> Any:
        return _join(self._prompt_logprobs(), super().all_logprobs(delta))

    def _prompt_text(self) -> str:
        return self.tokenizer.decode(self.state.request.input_ids, skip_special_tokens=False) if self.is_echo else ""

    def _prompt_logprobs(self) -> JSON | None:
        return self.spell_logprobs(self.state.input_logprobs) if self.is_echo else None


def _alternatives(
    row: list[TokenLogprob] | None, chosen: TokenLogprob, name: Callable[[int], str]
) -> dict[str, float | None] | None:
    """Return the most likely tokens by name, the chosen one included. Of tokens with one name, the likelier."""
    if row is None:
        return None
    likely: dict[str, float | None] = {}
    for logprob, token_id in row if chosen in row else [*row, chosen]:
        if (text := name(token_id)) not in likely:
            likely[text] = _finite(logprob)
    return likely


def spell_tokens(logprobs: Logprobs, tokenizer: TokenizerFacade, name: Callable[[int], str]) -> list[JSON]:
    """Return the log-probabilities of an answer's tokens, each with its alternatives, as OpenAI's chats spell them."""

    def spelled_token(entry: TokenLogprob) -> JSON:
        logprob, token_id = entry
        return {"token": name(token_id), "logprob": _finite(logprob), "bytes": list(tokenizer.token_bytes(token_id))}

    tops = logprobs.top or [None] * len(logprobs.token)
    return [
        {**spelled_token(entry), "top_logprobs": [spelled_token(other) for other in top or ()]}
        for entry, top in zip(logprobs.token, tops, strict=True)
    ]


def count_usage(answers: Sequence[OpenAIAnswer], n: int) -> Usage:
    """Add up the costs of ended answers, n to each prompt."""
    reasoning = [answer.num_reasoning_tokens for answer in answers]
    known = [count for count in reasoning if count is not None]
    return Usage(
        prompt=sum(answer.state.prompt_len for answer in answers[::n]),
        completion=sum(answer.num_output_tokens for answer in answers),
        cached=sum(answer.state.num_cached_tokens for answer in answers[::n]),
        reasoning=sum(known) if known else None,
    )


def _reasoning_fields(parts: AnswerDelta) -> JSON:
    # Some clients look for one name, some for the other.
    return {"reasoning_content": parts.reasoning, "reasoning": parts.reasoning} if parts.reasoning else {}


def _join(head: JSON | None, tail: JSON | None) -> JSON | None:
    if head is None or tail is None:
        return head or tail
    return {name: head[name] and head[name] + (tail[name] or []) for name in head}


def _finite(logprob: float | None) -> float | None:
    """Raise a log-probability to OpenAI's floor for impossible tokens: JSON has no infinity."""
    return None if logprob is None else max(logprob, -9999.0)
