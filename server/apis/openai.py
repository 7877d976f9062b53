"""OpenAI's API: /v1/completions, /v1/chat/completions and /v1/models, with SGLang's extra fields."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from engine.engine import Engine, TokenizerFacade
from engine.errors import InvalidRequest
from engine.request import Delta, FinishReason, Logprobs, Request, SamplingParams, TokenLogprob
from server.apis.meta_info import MetaInfo
from server.config import ServerConfig
from server.http.intake import paced
from server.http.live import LiveRequests, Options, is_failure, make_requests, new_rid, written
from server.http.sse import DONE, Choice, EventStream, event
from server.parsers import AnswerDelta, AnswerParser, ToolCallDelta
from server.reading.chat import Chats, ChatTurn
from server.reading.model_name import served_model
from server.reading.protocol import JSON, Fields, Owner, check_n, json_response, openai_error, read_json, read_prompts
from server.reading.sampling import MAX_TOP_LOGPROBS, read_options, read_sampling_params

COMPLETION_MAX_TOKENS = 16


@dataclass(slots=True)
class Usage:
    """What an answer cost, in tokens. The prompt of n answers counts once."""

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


class OpenAIApi:
    def __init__(self, engine: Engine, config: ServerConfig, live: LiveRequests, chats: Chats) -> None:
        self.engine, self.config, self.live, self.chats = engine, config, live, chats
        self.started_at = int(time.time())

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/completions", self.completions),
            web.post("/v1/chat/completions", self.chat_completions),
            web.post("/v1/chat/completions/render", self.render),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{model:.+}", self.model),
        ]

    # ---- models ----

    async def models(self, _: web.Request) -> web.Response:
        return json_response({"object": "list", "data": [self._model_card()]})

    async def model(self, http_request: web.Request) -> web.Response:
        self._check_model(http_request.match_info["model"])
        return json_response(self._model_card())

    def _model_card(self) -> JSON:
        return {
            "id": self.config.model_name,
            "object": "model",
            "created": self.started_at,
            "owned_by": "radixloop",
            "root": self.config.model_path,
            "max_model_len": self.engine.context_length,
        }

    def _check_model(self, name: str) -> str:
        return served_model(self.config, name)

    # ---- the two endpoints ----

    async def completions(self, http_request: web.Request) -> web.StreamResponse:
        return await self.complete(http_request, await read_json(http_request))

    async def chat_completions(self, http_request: web.Request) -> web.StreamResponse:
        return await self.chat(http_request, await read_json(http_request))

    async def complete(self, owner: Owner, body: Fields) -> web.StreamResponse:
        """The answer to `body`. Only an HTTP request may ask for a stream."""
        model = self._check_model(body.text("model"))
        if body.text("suffix"):
            raise InvalidRequest("suffix is not supported: this server does not fill in the middle", "suffix")
        if body.integer("best_of", 1, low=1) > body.integer("n", 1):
            raise InvalidRequest("best_of larger than n is not supported", "best_of")
        params = read_sampling_params(body, self.engine, ("max_tokens",), COMPLETION_MAX_TOKENS)
        num_logprobs = body.integer("logprobs", -1, low=0, high=MAX_TOP_LOGPROBS)
        is_echo = body.flag("echo")
        options = read_options(body, num_logprobs)
        if is_echo and options.return_logprob:
            options.logprob_start_len = 0
        prompts = await read_prompts(self.engine, body, "prompt")
        check_n(params.n, len(prompts))
        format_ = CompletionFormat(self.engine.tokenizer, model, is_echo=is_echo, num_logprobs=num_logprobs)
        return await self._answer(owner, body, prompts, params, options, format_)

    async def chat(self, owner: Owner, body: Fields) -> web.StreamResponse:
        """As `complete`."""
        model = self._check_model(body.text("model"))
        turn = await self.chats.turn(body)
        format_ = ChatFormat(self.engine.tokenizer, model, turn)
        try:
            return await self._answer(owner, body, [turn.input_ids], turn.params, turn.options, format_)
        except InvalidRequest as error:
            raise turn.in_clients_terms(error) from None

    async def render(self, http_request: web.Request) -> web.Response:
        """What /v1/chat/completions would generate from."""
        body = await read_json(http_request)
        self._check_model(body.text("model"))
        turn = await self.chats.turn(body)
        return json_response({"prompt": turn.prompt, "prompt_token_ids": turn.input_ids})

    async def _answer(
        self,
        owner: Owner,
        body: Fields,
        prompts: list[list[int]],
        params: SamplingParams,
        options: Options,
        format_: "Format",
    ) -> web.StreamResponse:
        """n answers to each prompt, all in one response. Choice i belongs to prompt i // n."""
        rid = body.text("rid") or f"{format_.rid_prefix}-{new_rid()}"
        format_.returns_token_ids = body.flag("return_token_ids")
        if format_.returns_token_ids and options.stream:
            raise InvalidRequest("return_token_ids is not supported with stream: true", "return_token_ids")
        format_.names_tokens_by_id = body.flag("return_tokens_as_token_ids")
        stream_options = _stream_options(body, options.stream)
        include_usage = stream_options.flag("include_usage")
        format_.has_continuous_usage = stream_options.flag("continuous_usage_stats") and include_usage
        n = params.n
        requests: list[Request] = []
        async for i, input_ids in paced(enumerate(prompts), num_a_turn=-(-64 // n)):
            first = i * n
            names = [rid] if n * len(prompts) == 1 else [f"{rid}-{k}" for k in range(first, first + n)]
            requests += make_requests(names, input_ids, params, options)
        format_.begin(rid)
        if body.flag("return_meta_info"):
            format_.meta_info = MetaInfo(self.engine.tokenizer)
        if not options.stream:
            deltas = await self.live.answers(owner, rid, requests)

            def write() -> web.Response:
                choices = [format_.whole_choice(i, delta) for i, delta in enumerate(deltas)]
                usage = count_usage(requests, [len(delta.token_ids) for delta in deltas], n)
                usage.reasoning = format_.count_reasoning(requests)
                return json_response(format_.response(choices, usage.to_dict(self.config.enable_cache_report)))

            return await written(write, requests)

        streamed = [format_.new_choice(i) for i in range(len(requests))]
        for choice, request in zip(streamed, requests, strict=True):
            request.sink = choice.sink

        def tail() -> bytes:
            if not include_usage:
                return DONE
            usage = count_usage(requests, [choice.num_output_tokens for choice in streamed], n)
            usage.reasoning = format_.count_reasoning(requests)
            return event(format_.chunk([], usage.to_dict(self.config.enable_cache_report))) + DONE

        stream = EventStream(streamed, tail)
        assert isinstance(owner, web.Request)
        async with self.live.submitted(owner, rid, requests):
            return await stream.run(owner)

    # ---- reading ----


def _stream_options(body: Fields, is_stream: bool) -> Fields:
    options = body.object("stream_options")
    if options is not None and not is_stream:
        raise InvalidRequest("stream_options is allowed only with stream: true", "stream_options")
    return options or Fields({})


def count_usage(requests: Sequence[Request], num_output_tokens: Sequence[int], n: int) -> Usage:
    return Usage(
        prompt=sum(request.prompt_len for request in requests[::n]),
        completion=sum(num_output_tokens),
        cached=sum(request.num_cached_tokens for request in requests[::n]),
    )


# ---- writing ----


class Format:
    """What differs between the two endpoints' answers."""

    rid_prefix: str
    object: str
    chunk_object: str

    def __init__(self, tokenizer: TokenizerFacade, model: str) -> None:
        self.tokenizer, self.model = tokenizer, model
        self._head: JSON = {}
        self.meta_info: MetaInfo | None = None  # of the choices, if asked for
        # vLLM's fields:
        self.returns_token_ids = False  # beside each choice's text
        self.names_tokens_by_id = False  # in log-probabilities: "token_id:17", which no other token is called
        self.has_continuous_usage = False  # in each chunk of a stream

    def begin(self, rid: str) -> None:
        self._head = {"id": rid, "created": int(time.time()), "model": self.model}

    def response(self, choices: list[JSON], usage: JSON) -> JSON:
        return {**self._head, "object": self.object, "choices": choices, "usage": usage}

    def chunk(self, choices: list[JSON], usage: JSON | None = None) -> JSON:
        chunk = {**self._head, "object": self.chunk_object, "choices": choices}
        return chunk if usage is None else {**chunk, "usage": usage}

    def whole_choice(self, index: int, delta: Delta) -> JSON:
        """A whole answer."""
        choice = {**self.choice(index, delta), **self.meta_of(delta, len(delta.token_ids))}
        if self.returns_token_ids:
            choice |= {"prompt_token_ids": delta.request.input_ids, "token_ids": delta.token_ids}
        return choice

    def meta_of(self, delta: Delta, num_output_tokens: int) -> JSON:
        """What goes with the end of a choice, by SGLang's `return_meta_info`."""
        if self.meta_info is None:
            return {}
        return {"meta_info": self.meta_info.counts(delta.request, num_output_tokens, delta.finish_reason)}

    def token_name(self, token_id: int) -> str:
        """What a token is called in log-probabilities."""
        return f"token_id:{token_id}" if self.names_tokens_by_id else self.tokenizer.token_text(token_id)

    def choice(self, index: int, delta: Delta) -> JSON:
        raise NotImplementedError

    def new_choice(self, index: int) -> "OpenAIChoice":
        """A streamed choice."""
        return OpenAIChoice(index, self)

    def count_reasoning(self, requests: Sequence[Request]) -> int | None:
        """Tokens of the ended `requests` that were reasoning; None if the endpoint does not know of any."""
        return None

    def first_events(self, index: int, request: Request) -> bytes:
        """What goes before a choice's first text."""
        raise NotImplementedError

    def piece(self, text: str, logprobs: Any = None) -> JSON:
        """A streamed choice's new text."""
        raise NotImplementedError

    def no_piece(self) -> JSON:
        """A streamed choice without new text: its last."""
        raise NotImplementedError

    def streamed_logprobs(self, delta: Delta) -> Any:
        raise NotImplementedError


def _ending(reason: FinishReason | None) -> JSON:
    return {"finish_reason": reason and reason.type, "matched_stop": reason and reason.matched}


def parsed_ending(reason: FinishReason | None, parser: AnswerParser) -> JSON:
    ending = _ending(reason)
    if parser.num_tool_calls and ending["finish_reason"] == "stop":
        ending["finish_reason"] = "tool_calls"
    return ending


def message_parts(parts: AnswerDelta, *, is_delta: bool = False) -> JSON:
    """A message's fields besides its content."""
    fields: JSON = {}
    if parts.reasoning:  # some clients look for one name, some for the other
        fields["reasoning_content"] = fields["reasoning"] = parts.reasoning
    if parts.tool_calls:
        fields["tool_calls"] = [_tool_call(call, is_delta=is_delta) for call in parts.tool_calls]
    return fields


def _tool_call(call: ToolCallDelta, *, is_delta: bool) -> JSON:
    function: JSON = {"arguments": call.arguments}
    fields: JSON = {"index": call.index} if is_delta else {}
    if call.id is not None:
        fields |= {"id": call.id, "type": "function"}
        function = {"name": call.name, **function}
    return {**fields, "function": function}


class ChatFormat(Format):
    rid_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: TokenizerFacade, model: str, turn: ChatTurn) -> None:
        super().__init__(tokenizer, model)
        self._turn = turn
        self._parsers: dict[int, AnswerParser] = {}  # by choice

    def choice(self, index: int, delta: Delta) -> JSON:
        message: JSON = {"role": "assistant", "content": delta.text}
        ending = _ending(delta.finish_reason)
        if self._turn.new_parser is not None:
            parser = self._parsers[index] = self._turn.new_parser()
            parts = parser.parse(delta.text)
            message |= {"content": parts.text or (None if parts.tool_calls else ""), **message_parts(parts)}
            ending = parsed_ending(delta.finish_reason, parser)
        return {"index": index, "message": message, "logprobs": self.streamed_logprobs(delta), **ending}

    def new_choice(self, index: int) -> "OpenAIChoice":
        if self._turn.new_parser is None:
            return OpenAIChoice(index, self)
        parser = self._parsers[index] = self._turn.new_parser()
        return ParsedChoice(index, self, parser)

    def count_reasoning(self, requests: Sequence[Request]) -> int | None:
        if not any(parser.reasoning for parser in self._parsers.values()):
            return None
        count = self._turn.count_reasoning
        return sum(count(requests[i].output_ids, parser) for i, parser in self._parsers.items())

    def first_events(self, index: int, request: Request) -> bytes:
        role = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return event(self.chunk([role]))

    def piece(self, text: str, logprobs: Any = None) -> JSON:
        return {"delta": {"content": text}, "logprobs": logprobs}

    def no_piece(self) -> JSON:
        return {"delta": {}, "logprobs": None}

    def streamed_logprobs(self, delta: Delta) -> Any:
        logprobs = delta.logprobs
        if logprobs is None:
            return None
        tops = logprobs.top or [None] * len(logprobs.token)
        content = [
            {**self._token(entry), "top_logprobs": [self._token(other) for other in top or ()]}
            for entry, top in zip(logprobs.token, tops, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _token(self, entry: TokenLogprob) -> JSON:
        logprob, token_id = entry
        raw = self.tokenizer.token_bytes(token_id)
        return {"token": self.token_name(token_id), "logprob": _finite(logprob), "bytes": list(raw)}


class CompletionFormat(Format):
    rid_prefix = "cmpl"
    object = chunk_object = "text_completion"

    def __init__(self, tokenizer: TokenizerFacade, model: str, *, is_echo: bool, num_logprobs: int) -> None:
        super().__init__(tokenizer, model)
        self.is_echo, self.num_logprobs = is_echo, num_logprobs
        self._offsets: dict[str, int] = {}  # rid -> characters of the answer whose tokens have been reported

    def choice(self, index: int, delta: Delta) -> JSON:
        return {
            "index": index,
            "text": self._prompt_text(delta.request) + delta.text,
            "logprobs": self._join(self._prompt_logprobs(delta.request), self.streamed_logprobs(delta)),
            **_ending(delta.finish_reason),
        }

    def first_events(self, index: int, request: Request) -> bytes:
        if not self.is_echo:
            return b""
        text, logprobs = self._prompt_text(request), self._prompt_logprobs(request)
        return event(self.chunk([{"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}]))

    def piece(self, text: str, logprobs: Any = None) -> JSON:
        return {"text": text, "logprobs": logprobs}

    def no_piece(self) -> JSON:
        return {"text": "", "logprobs": None}

    def streamed_logprobs(self, delta: Delta) -> Any:
        return None if delta.logprobs is None else self._logprobs(delta.request, delta.logprobs)

    def _prompt_text(self, request: Request) -> str:
        return self.tokenizer.decode(request.input_ids, skip_special_tokens=False) if self.is_echo else ""

    def _prompt_logprobs(self, request: Request) -> JSON | None:
        if not self.is_echo or request.input_logprobs is None:
            return None
        return self._logprobs(request, request.input_logprobs)

    def _logprobs(self, request: Request, logprobs: Logprobs) -> JSON:
        text_of, name = self.tokenizer.token_text, self.token_name
        offset = self._offsets.get(request.rid, 0)
        offsets = []
        for _, token_id in logprobs.token:
            offsets.append(offset)
            offset += len(text_of(token_id))
        self._offsets[request.rid] = offset
        top = [self._alternatives(row, entry) for entry, row in zip(logprobs.token, logprobs.top, strict=False)]
        return {
            "tokens": [name(token_id) for _, token_id in logprobs.token],
            "token_logprobs": [_finite(logprob) for logprob, _ in logprobs.token],
            "top_logprobs": top if self.num_logprobs else None,
            "text_offset": offsets,
        }

    def _alternatives(self, row: list[TokenLogprob] | None, chosen: TokenLogprob) -> dict[str, float | None] | None:
        """The most likely tokens, and the chosen one if it is not among them. Of tokens with one text, the likelier."""
        if row is None:
            return None
        likely: dict[str, float | None] = {}
        for logprob, token_id in [*row, chosen]:
            likely.setdefault(self.token_name(token_id), _finite(logprob))
        return likely

    @staticmethod
    def _join(head: JSON | None, tail: JSON | None) -> JSON | None:
        if head is None or tail is None:
            return head or tail
        return {name: head[name] and head[name] + (tail[name] or []) for name in head}


def _finite(logprob: float | None) -> float | None:
    """OpenAI's floor for impossible tokens: JSON has no infinity."""
    return None if logprob is None else max(logprob, -9999.0)


class OpenAIChoice(Choice):
    """Events whose JSON around the text is made once a stream."""

    def __init__(self, index: int, format_: Format) -> None:
        super().__init__(index)
        self._format = format_
        self._head = self._end = b""
        self._has_usage, self._num_prompt_tokens = format_.has_continuous_usage, 0

    def events(self, delta: Delta) -> bytes:
        if not self._head:
            return self._first(delta.request) + self.events(delta)
        if delta.logprobs is None:
            if not delta.text:
                return b""
            if not self._has_usage:
                return self._head + orjson.dumps(delta.text) + self._end
        return self._event(**self._format.piece(delta.text, self._format.streamed_logprobs(delta)), finish_reason=None)

    def last_events(self, delta: Delta) -> bytes:
        reason = delta.finish_reason
        if reason is not None and is_failure(reason):
            return event(openai_error(reason.status_code or 500, reason.message or "the request failed"))
        meta = self._format.meta_of(delta, self.num_output_tokens)
        news = self.events(delta) + self._rest()
        return news + self._event(**self._format.no_piece(), **self._ending(reason), **meta)

    def _event(self, **fields: Any) -> bytes:
        """An event of the choice, `fields` beside its index."""
        usage = None
        if self._has_usage:
            usage = Usage(self._num_prompt_tokens, self.num_output_tokens).to_dict(with_cached=False)
        return event(self._format.chunk([{"index": self.index, **fields}], usage))

    def _rest(self) -> bytes:
        """The events of what was held back until the end."""
        return b""

    def _ending(self, reason: FinishReason | None) -> JSON:
        return _ending(reason)

    def _first(self, request: Request) -> bytes:
        mark = "\0text\0"
        self._num_prompt_tokens = request.prompt_len
        choice = {"index": self.index, **self._format.piece(mark), "finish_reason": None}
        self._head, self._end = event(self._format.chunk([choice])).rsplit(orjson.dumps(mark), 1)  # a rid may hold it
        return self._format.first_events(self.index, request)


class ParsedChoice(OpenAIChoice):
    """A chat answer with reasoning or tool calls in it."""

    def __init__(self, index: int, format_: Format, parser: AnswerParser) -> None:
        super().__init__(index, format_)
        self._parser = parser

    def events(self, delta: Delta) -> bytes:
        first = b"" if self._head else self._first(delta.request)
        return first + self._events_of(self._parser.push(delta.text), self._format.streamed_logprobs(delta))

    def _rest(self) -> bytes:
        return self._events_of(self._parser.finish(), None)

    def _ending(self, reason: FinishReason | None) -> JSON:
        return parsed_ending(reason, self._parser)

    def _events_of(self, parts: AnswerDelta, logprobs: JSON | None) -> bytes:
        fields = message_parts(parts, is_delta=True)
        if parts.text:
            if not fields and logprobs is None and not self._has_usage:
                return self._head + orjson.dumps(parts.text) + self._end
            fields["content"] = parts.text
        elif not fields and logprobs is None:
            return b""
        return self._event(delta=fields, logprobs=logprobs, finish_reason=None)
