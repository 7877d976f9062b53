"""SGLang's own /generate."""

from typing import Any

import orjson
from aiohttp import web

from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.request import SamplingParams
from engine.state import Delta, FinishReason, Logprobs, RequestState
from server.apis.answer import Answer, failure_of, respond
from server.apis.meta_info import MetaInfo
from server.apis.sessions import SessionParams, Sessions
from server.config import ServerConfig
from server.http.intake import paced
from server.http.live import LiveRequests, Options, make_requests, new_rid
from server.http.sse import event
from server.reading.protocol import (
    JSON,
    Fields,
    cache_namespace,
    check_batch_size,
    check_n,
    check_token_ids,
    encode_prompt,
    is_int,
    native_error,
    read_json,
    refuse,
)
from server.reading.sampling import wants_hidden_states

MAX_LOGPROBS = 1024  # of a token, the most likely ones and those of given ids each
REASONING_END = "</think>"
# Fields of /generate that a list gives prompt by prompt.
PER_PROMPT = (
    "sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "priority", "return_hidden_states",
)  # fmt: skip
# Better refused than ignored.
UNSUPPORTED = (
    "input_embeds", "image_data", "video_data", "audio_data", "lora_path", "custom_logit_processor",
    "return_routed_experts", "return_sampling_mask", "return_entropy",
    "return_prompt_token_ids", "bootstrap_host", "bootstrap_room",
)  # fmt: skip


class GenerateApi:
    def __init__(self, engine: Engine, config: ServerConfig, live: LiveRequests) -> None:
        self.engine, self.config, self.live = engine, config, live
        self.sessions = Sessions(live)

    def routes(self) -> list[web.RouteDef]:
        return [
            *self.sessions.routes(),
            web.post("/generate", self.generate),
            web.put("/generate", self.generate),
        ]

    async def generate(self, http_request: web.Request) -> web.StreamResponse:
        return await self.generate_from(http_request, await read_json(http_request))

    async def generate_from(
        self, http_request: web.Request, body: Fields, envelope: str | None = None
    ) -> web.StreamResponse:
        """Answer `body`. `envelope`: name of the field of an object that holds the answer, if it is not streamed."""
        refuse(body, UNSUPPORTED)
        session = body.object("session_params")
        if session is not None:
            return await self._generate_in_session(http_request, body, self.sessions.read(http_request, session))
        prompts, is_batch = await self._prompts(body)
        rid, states = await self._states(body, prompts, is_batch)
        return await self._answer(http_request, body, rid, states, is_batch or len(states) > 1, envelope)

    async def _generate_in_session(
        self, http_request: web.Request, body: Fields, params: SessionParams
    ) -> web.StreamResponse:
        prompts, is_batch = await self._prompts(body, add_special_tokens=params.previous is None)
        if is_batch:
            raise InvalidRequest("a session continues with one prompt at a time", "session_params")
        prompt, num_kept = self.sessions.continued(params, prompts[0])
        rid, states = await self._states(body, [prompt], is_batch)
        if len(states) > 1:
            raise InvalidRequest("n must be 1 in a session", "n")
        with self.sessions.turn(params, states[0], num_kept):
            return await self._answer(http_request, body, rid, states, is_list=False)

    async def _answer(
        self,
        http_request: web.Request,
        body: Fields,
        rid: str,
        states: list[RequestState],
        is_list: bool,
        envelope: str | None = None,
    ) -> web.StreamResponse:
        meta_info = MetaInfo(self.engine.tokenizer, body.flag("return_text_in_logprobs"))
        answers = [
            GenerateAnswer(i, state, meta_info, has_index=is_list, is_disjoint=self.config.stream_output)
            for i, state in enumerate(states)
        ]

        def whole(bodies: list[JSON]) -> Any:
            answer = bodies if is_list else bodies[0]
            return {envelope: answer} if envelope else answer

        return await respond(http_request, self.live, rid, answers, body=whole)

    async def _prompts(self, body: Fields, add_special_tokens: bool = True) -> tuple[list[list[int]], bool]:
        """Return the token ids of each prompt, and whether the body holds a list of prompts."""
        text, ids = body.get("text"), body.get("input_ids")
        if (text is None) == (ids is None):
            raise InvalidRequest("give exactly one of text and input_ids", "text")
        if ids is not None:
            vocab_size = self.engine.model_config.vocab_size
            if isinstance(ids, list) and ids and isinstance(ids[0], list):
                check_batch_size(len(ids), "input_ids")
                return [
                    check_token_ids(row, vocab_size, f"input_ids[{i}]") async for i, row in paced(enumerate(ids))
                ], True
            return [check_token_ids(ids, vocab_size, "input_ids")], False
        if isinstance(text, str):
            return [await encode_prompt(self.engine, text, "text", add_special_tokens)], False
        if not isinstance(text, list) or not text:
            body.fail("text", "a string or a non-empty list of strings")
        check_batch_size(len(text), "text")
        return [await encode_prompt(self.engine, one, f"text[{i}]") async for i, one in paced(enumerate(text))], True

    async def _states(self, body: Fields, prompts: list[list[int]], is_batch: bool) -> tuple[str, list[RequestState]]:
        """Return the rid that stands for all of them, and a state for each prompt and answer."""
        rid, rids = _rids(body, len(prompts), is_batch)
        namespace = cache_namespace(body)
        states: list[RequestState] = []
        async for i, input_ids in paced(enumerate(prompts)):
            item = _item(body, i, len(prompts)) if is_batch else body
            params = SamplingParams.from_dict(item.get("sampling_params") or {}, self.engine.sampling_defaults)
            params.verify(self.engine.model_config.vocab_size)
            check_n(params.n, len(prompts))
            options = _options(item, i if is_batch else None)
            if item.flag("require_reasoning") or options.max_thinking_tokens is not None:
                options.reasoning_end_ids = await self.engine.encode(REASONING_END, add_special_tokens=False)
            options.stream, options.extra_key = body.flag("stream"), namespace
            names = [rids[i]] if params.n == 1 else [f"{rids[i]}-{k}" for k in range(params.n)]
            states += map(RequestState, make_requests(names, input_ids, params, options))
        return rid, states


# ---- reading /generate ----


def _rids(body: Fields, count: int, is_batch: bool) -> tuple[str, list[str]]:
    """Return the rid that stands for the whole body, and the rid of each prompt."""
    given = body.get("rid")
    if isinstance(given, list):
        if not is_batch or len(given) != count or not all(isinstance(rid, str) and rid for rid in given):
            body.fail("rid", f"a string, or a list of {count} of them beside as many prompts")
        if len(set(given)) != count:
            body.fail("rid", "a list without repetitions")
        return new_rid(), given
    rid = body.text("rid") or new_rid()
    return rid, [f"{rid}-{i}" for i in range(count)] if is_batch else [rid]


def _item(body: Fields, i: int, count: int) -> Fields:
    """Return the body as it holds for the i-th of `count` prompts."""
    values = dict(body.values)
    for name in PER_PROMPT:
        if isinstance(values.get(name), list):
            values[name] = _pick(body, name, i, count)
    ids = values.get("token_ids_logprob")
    if isinstance(ids, list) and any(isinstance(row, list) for row in ids):
        values["token_ids_logprob"] = _pick(body, "token_ids_logprob", i, count)
    return Fields(values)


def _pick(body: Fields, name: str, i: int, count: int) -> Any:
    values = body.array(name)
    if len(values) != count:
        raise InvalidRequest(f"{name} has {len(values)} entries for {count} prompts", name)
    return values[i]


def _options(item: Fields, i: int | None) -> Options:
    params = item.get("sampling_params")
    if params is not None and not isinstance(params, dict):
        item.fail("sampling_params", "an object" if i is None else "an object or a list of objects")
    options = Options(
        return_logprob=item.flag("return_logprob"),
        priority=item.integer("priority"),
        return_hidden_states=wants_hidden_states(item),
    )
    if item.has("max_thinking_tokens"):
        options.max_thinking_tokens = item.integer("max_thinking_tokens", low=0)
    # Read, so that a wrong type is an error, even where return_logprob is off.
    start = item.integer("logprob_start_len", -1, low=-1)
    num_top = item.integer("top_logprobs_num", 0, low=0, high=MAX_LOGPROBS)
    token_ids = item.array("token_ids_logprob")
    if len(token_ids) > MAX_LOGPROBS or not all(map(is_int, token_ids)):
        item.fail("token_ids_logprob", f"a list of at most {MAX_LOGPROBS} token ids")
    if options.return_logprob:
        options.logprob_start_len, options.top_logprobs_num, options.token_ids_logprob = start, num_top, token_ids
    return options


# ---- writing ----


class GenerateAnswer(Answer):
    """Events whose text, ids and log-probabilities are cumulative, as SGLang's clients expect, or disjoint."""

    def __init__(
        self, index: int, state: RequestState, meta_info: MetaInfo, *, has_index: bool, is_disjoint: bool
    ) -> None:
        super().__init__(index, state)
        self._meta_info, self._is_disjoint = meta_info, is_disjoint
        self._head = b'data: {"index":%d,"text":"' % index if has_index else b'data: {"text":"'
        self._text = self._ids = b""  # as they stand in the JSON: each piece is escaped once
        self._logprobs = Logprobs()
        self._meta = b""  # meta_info up to the number of tokens, the one part that changes

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
        return b'%b%b","output_ids":[%b],"meta_info":%b}\n\n' % (self._head, text, ids, meta)

    def end(self, _reason: FinishReason) -> bytes:
        return b""  # the last text's meta_info holds the end

    def fail(self, reason: FinishReason) -> bytes:
        return event(native_error(*failure_of(reason)))

    def whole(self, delta: Delta) -> JSON:
        return self._meta_info.answer(delta)

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
        return orjson.dumps(meta)
