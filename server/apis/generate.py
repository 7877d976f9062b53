"""SGLang's own /generate."""

from dataclasses import dataclass
from typing import Annotated, Any

import orjson
from aiohttp import web
from msgspec import Meta

from engine.declared import MAX_INT, Count, Int
from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.media import PromptMedia
from engine.request import SamplingParams
from engine.state import Delta, FinishReason, Logprobs, RequestState
from server.apis.answer import Answer, failure_of, respond
from server.apis.media_data import MediaData
from server.apis.meta_info import MetaInfo, hidden_states_of
from server.apis.sessions import SessionFields, SessionParams, Sessions
from server.config import ServerConfig
from server.http.intake import paced
from server.http.live import LiveRequests, Options, make_requests, new_rid
from server.http.sse import event
from server.media.reader import MediaPart, MediaReader
from server.reading.error_shapes import native_error
from server.reading.prompts import check_batch_size, check_n, check_prompt_ids, encode_prompt
from server.reading.protocol import JSON, read_body
from server.reading.shared_fields import Text, TokenIds

MAX_LOGPROBS = 1024  # of a token, the most likely ones and those of given ids each
REASONING_END = "</think>"
# Better refused than ignored.
UNSUPPORTED = (
    "input_embeds", "audio_data", "lora_path", "custom_logit_processor",
    "return_routed_experts", "return_sampling_mask", "return_entropy",
    "return_prompt_token_ids", "bootstrap_host", "bootstrap_room",
)  # fmt: skip


SAMPLING = {"$ref": "#/components/schemas/SamplingFields"}
LogprobStart = Annotated[int, Meta(ge=-1, le=MAX_INT)]
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]


class GenerateRequest(MediaData, unsupported=UNSUPPORTED):
    """A prompt or several. Lists of other fields give them prompt by prompt."""

    text: (
        Annotated[
            str | list[Text],
            Meta(
                description="the prompt or prompts; give this or input_ids",
                extra={"rule": "a string or a non-empty list of strings"},
            ),
        ]
        | None
    ) = None
    input_ids: TokenIds | None = None
    stream: bool = False
    rid: str | list[str] = ""
    priority: Int | list[Int | None] = 0  # type: ignore[assignment]
    sampling_params: (
        Annotated[
            JSON | list[JSON | None],
            Meta(
                extra_json_schema={"anyOf": [SAMPLING, {"type": "array", "items": SAMPLING}]},
                extra={"rule": "an object or a list of objects"},
            ),
        ]
        | None
    ) = None
    return_logprob: bool | list[bool | None] = False
    logprob_start_len: LogprobStart | list[LogprobStart | None] = -1
    top_logprobs_num: NumLogprobs | list[NumLogprobs | None] = 0
    token_ids_logprob: TokenIds = []
    return_text_in_logprobs: bool = False
    return_hidden_states: bool | list[bool | None] = False
    max_thinking_tokens: Count | None = None
    require_reasoning: bool = False
    session_params: SessionFields | None = None


@dataclass(frozen=True, slots=True)
class GeneratePrompt:
    input_ids: list[int]
    media: PromptMedia | None = None


class GenerateApi:
    def __init__(self, engine: Engine, config: ServerConfig, live: LiveRequests, media: MediaReader) -> None:
        self.engine, self.config, self.live, self.media = engine, config, live, media
        self.sessions = Sessions(live)

    def routes(self) -> list[web.RouteDef]:
        return [
            *self.sessions.routes(),
            web.post("/generate", self.generate),
            web.put("/generate", self.generate),
        ]

    async def generate(self, http_request: web.Request) -> web.StreamResponse:
        return await self.generate_from(http_request, await read_body(http_request, GenerateRequest))

    async def generate_from(
        self, http_request: web.Request, body: GenerateRequest, envelope: str | None = None
    ) -> web.StreamResponse:
        """Answer `body`. `envelope`: name of the field of an object that holds the answer, if it is not streamed."""
        if body.session_params is not None:
            session = self.sessions.read(http_request, body.session_params)
            return await self._generate_in_session(http_request, body, session)
        prompts, is_batch = await self._prompts(body)
        rid, states = await self._states(body, prompts, is_batch)
        return await self._answer(http_request, body, rid, states, is_batch or len(states) > 1, envelope)

    async def _generate_in_session(
        self, http_request: web.Request, body: GenerateRequest, params: SessionParams
    ) -> web.StreamResponse:
        prompts, is_batch = await self._prompts(body, add_special_tokens=params.previous is None)
        if is_batch:
            raise InvalidRequest("a session continues with one prompt at a time", "session_params")
        input_ids, media, num_kept = self.sessions.continued(params, prompts[0].input_ids, prompts[0].media)
        rid, states = await self._states(body, [GeneratePrompt(input_ids, media)], is_batch)
        if len(states) > 1:
            raise InvalidRequest("n must be 1 in a session", "n")
        with self.sessions.turn(params, states[0], num_kept, prompts[0].media):
            return await self._answer(http_request, body, rid, states, is_list=False)

    async def _answer(
        self,
        http_request: web.Request,
        body: GenerateRequest,
        rid: str,
        states: list[RequestState],
        is_list: bool,
        envelope: str | None = None,
    ) -> web.StreamResponse:
        meta_info = MetaInfo(self.engine.tokenizer, body.return_text_in_logprobs)
        has_text, is_disjoint = not self.config.skip_tokenizer_init, self.config.stream_output
        answers = [
            GenerateAnswer(i, state, meta_info, has_index=is_list, is_disjoint=is_disjoint, has_text=has_text)
            async for i, state in paced(enumerate(states))
        ]

        def whole(bodies: list[JSON]) -> Any:
            answer = bodies if is_list else bodies[0]
            return {envelope: answer} if envelope else answer

        return await respond(http_request, self.live, rid, answers, body=whole)

    async def _prompts(
        self, body: GenerateRequest, add_special_tokens: bool = True
    ) -> tuple[list[GeneratePrompt], bool]:
        """Return each prompt, and whether the body holds a list of them."""
        text, ids = body.text, body.input_ids
        if (text is None) == (ids is None):
            raise InvalidRequest("give exactly one of text and input_ids", "text")
        if ids is not None:
            if ids and isinstance(ids[0], list):
                check_batch_size(self.engine, len(ids), "input_ids")
                return [
                    await self._prompt_of_ids(row, body.media_of(i, len(ids)), f"input_ids[{i}]")
                    async for i, row in paced(enumerate(ids))
                ], True
            return [await self._prompt_of_ids(ids, body.media_of(None), "input_ids")], False
        if isinstance(text, str):
            media = body.media_of(None)
            return [await self._prompt(text, media, "text", add_special_tokens)], False
        if not text:
            raise body.wrong("text", "a string or a non-empty list of strings")
        check_batch_size(self.engine, len(text), "text")
        return [
            await self._prompt(one, body.media_of(i, len(text)), f"text[{i}]")
            async for i, one in paced(enumerate(text))
        ], True

    async def _prompt(
        self, text: str, media: list[MediaPart], field: str, add_special_tokens: bool = True
    ) -> GeneratePrompt:
        if media:
            return GeneratePrompt(*await self.media.encode(text, media, field, add_special_tokens))
        return GeneratePrompt(await encode_prompt(self.engine, text, field, add_special_tokens))

    async def _prompt_of_ids(self, ids: Any, media: list[MediaPart], field: str) -> GeneratePrompt:
        """Return the prompt of token ids, in which one placeholder stands for each picture, as in a text."""
        checked = check_prompt_ids(self.engine, ids, field)
        if not media:
            return GeneratePrompt(checked)
        return GeneratePrompt(*await self.media.encode(checked, media, field))

    async def _states(
        self, body: GenerateRequest, prompts: list[GeneratePrompt], is_batch: bool
    ) -> tuple[str, list[RequestState]]:
        """Return the rid that stands for all of them, and a state for each prompt and answer."""
        rid, rids = _rids(body, len(prompts), is_batch)
        shared = None if isinstance(body.sampling_params, list) else self._params(body.sampling_params, len(prompts))
        states: list[RequestState] = []
        async for i, prompt in paced(enumerate(prompts)):
            item = Item(body, i, len(prompts) if is_batch else None)
            params = shared or self._params(item.pick("sampling_params"), len(prompts))
            options = item.options()
            options.media = prompt.media
            if body.require_reasoning or options.max_thinking_tokens is not None:
                options.reasoning_end_ids = await self.engine.encode(REASONING_END, add_special_tokens=False)
            names = [rids[i]] if params.n == 1 else [f"{rids[i]}-{k}" for k in range(params.n)]
            states += map(RequestState, make_requests(names, prompt.input_ids, params, options))
        return rid, states

    def _params(self, given: JSON | None, num_prompts: int) -> SamplingParams:
        params = SamplingParams.from_dict(given or {}, self.engine.model_config.sampling_defaults)
        params.verify(self.engine.model_config.vocab_size)
        check_n(self.engine, params.n, num_prompts)
        return params


# ---- reading /generate ----


def _rids(body: GenerateRequest, count: int, is_batch: bool) -> tuple[str, list[str]]:
    """Return the rid that stands for the whole body, and the rid of each prompt."""
    given = body.rid
    if isinstance(given, list):
        if not is_batch or len(given) != count or not all(given):
            raise body.wrong("rid", f"a string, or a list of {count} of them beside as many prompts")
        if len(set(given)) != count:
            raise body.wrong("rid", "a list without repetitions")
        return new_rid(), given
    rid = given or new_rid()
    return rid, [f"{rid}-{i}" for i in range(count)] if is_batch else [rid]


@dataclass(frozen=True, slots=True)
class Item:
    """A body as it holds for its i-th prompt of `count`; None: for the only one."""

    body: GenerateRequest
    i: int
    count: int | None

    def pick(self, name: str) -> Any:
        values = getattr(self.body, name)
        return self._own(name, values) if isinstance(values, list) else values

    def _own(self, name: str, values: list[Any]) -> Any:
        if self.count is None:
            raise self.body.wrong(name, "a single value, beside a single prompt")
        if len(values) != self.count:
            raise InvalidRequest(f"{name} has {len(values)} entries for {self.count} prompts", name)
        return values[self.i]

    def options(self) -> Options:
        body, start = self.body, self.pick("logprob_start_len")
        options = Options(
            stream=body.stream,
            return_logprob=self.pick("return_logprob") or False,
            priority=self.pick("priority") or 0,
            extra_key=body.cache_namespace,
            max_thinking_tokens=body.max_thinking_tokens,
            return_hidden_states=self.pick("return_hidden_states") or False,
        )
        num_top, token_ids = self.pick("top_logprobs_num"), self._token_ids()
        if options.return_logprob:
            options.logprob_start_len = -1 if start is None else start
            options.top_logprobs_num, options.token_ids_logprob = num_top or 0, token_ids
        return options

    def _token_ids(self) -> list[int]:
        token_ids: list[Any] = self.body.token_ids_logprob
        if any(isinstance(row, list) for row in token_ids):
            token_ids = self._own("token_ids_logprob", token_ids)
        if not isinstance(token_ids, list) or len(token_ids) > MAX_LOGPROBS:
            raise self.body.wrong("token_ids_logprob", f"a list of at most {MAX_LOGPROBS} token ids")
        return token_ids


# ---- writing ----


class GenerateAnswer(Answer):
    """Events whose text, ids and log-probabilities are cumulative, as SGLang's clients expect, or disjoint."""

    def __init__(
        self,
        index: int,
        state: RequestState,
        meta_info: MetaInfo,
        *,
        has_index: bool,
        is_disjoint: bool,
        has_text: bool = True,
    ) -> None:
        """Make an answer. has_text: false where there is no tokenizer; SGLang's answers then have no `text`."""
        super().__init__(index, state)
        self._meta_info, self._is_disjoint, self._has_text = meta_info, is_disjoint, has_text
        before, behind = (b'"text":"', b'","output_ids":[') if has_text else (b"", b'"output_ids":[')
        self._head, self._before_ids = b"data: {%b%b" % (b'"index":%d,' % index if has_index else b"", before), behind
        self._text = self._ids = b""  # as they stand in the JSON: each piece is escaped once
        self._logprobs = Logprobs()
        self._meta = b""  # meta_info up to the number of tokens, the one part that changes

    @property
    def ends_slowly(self) -> bool:
        return self.state.return_hidden_states

    def begin(self) -> bytes:
        self._meta = orjson.dumps(self._meta_info.counts(self.state, 0, None)).removesuffix(b"0}")
        return b""

    def text(self, delta: Delta) -> bytes:
        if delta.finish_reason is not None or self.state.return_logprob:
            meta = self._full_meta(delta)
        else:
            meta = b"%b%d}" % (self._meta, self.num_output_tokens)
        text, ids = orjson.dumps(delta.text)[1:-1], orjson.dumps(delta.token_ids)[1:-1]
        if not self._is_disjoint:
            text = self._text = self._text + text
            ids = self._ids = b"%b,%b" % (self._ids, ids) if self._ids and ids else self._ids + ids
        return b'%b%b%b%b],"meta_info":%b}\n\n' % (self._head, text, self._before_ids, ids, meta)

    def end(self, _reason: FinishReason) -> bytes:
        return b""  # the last text's meta_info holds the end

    def fail(self, reason: FinishReason) -> bytes:
        return event(native_error(*failure_of(reason)))

    def whole(self, delta: Delta) -> JSON:
        answer = self._meta_info.answer(delta)
        if not self._has_text:
            del answer["text"]
        return answer

    def _full_meta(self, delta: Delta) -> bytes:
        meta = self._meta_info.counts(self.state, self.num_output_tokens, delta.finish_reason)
        if self.state.return_logprob:
            new = delta.logprobs or Logprobs()
            if not self._is_disjoint:
                known = self._logprobs
                known.token += new.token
                known.top += new.top
                known.token_ids += new.token_ids
                new = known
            meta |= self._meta_info.logprobs(self.state, new, self.num_output_tokens)
        if self.state.return_hidden_states and delta.finish_reason is not None:
            meta["hidden_states"] = hidden_states_of(self.state, self.num_output_tokens)
        return orjson.dumps(meta)
