"""SGLang's own API: /generate, and the routes that ask or tell the server about itself."""

import asyncio
import dataclasses
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import orjson
from aiohttp import web

from engine.engine import Engine
from engine.errors import EngineStopped, InvalidRequest
from engine.request import Delta, Logprobs, Request, SamplingParams, ignore
from server.apis.meta_info import MetaInfo
from server.apis.sessions import SessionParams, Sessions
from server.config import ServerConfig
from server.http.intake import paced
from server.http.live import LiveRequests, Options, is_failure, make_requests, new_rid, written
from server.http.sse import Choice, EventStream, event
from server.parsers import AnswerParser
from server.parsers.reasoning import REASONING_ALIASES, REASONING_FORMATS, ReasoningParser
from server.parsers.tool_calls import TOOL_ALIASES, TOOL_FORMATS
from server.reading.chat import Chats
from server.reading.protocol import (
    JSON,
    Fields,
    cache_namespace,
    check_batch_size,
    check_n,
    check_token_ids,
    encode_prompt,
    is_int,
    json_response,
    native_error,
    read_json,
    refuse,
)
from server.reading.tool_choice import read_tool_choice

MAX_LOGPROBS = 1024  # of a token, the most likely ones and those of given ids each
HEALTH_GENERATE_TIMEOUT_S = 20.0
REASONING_END = "</think>"
# Fields of /generate that a list gives prompt by prompt.
PER_PROMPT = ("sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num", "priority")
# Better refused than ignored.
UNSUPPORTED = (
    "input_embeds", "image_data", "video_data", "audio_data", "lora_path", "custom_logit_processor",
    "return_hidden_states", "return_routed_experts", "return_sampling_mask", "return_entropy",
    "return_prompt_token_ids", "bootstrap_host", "bootstrap_room",
)  # fmt: skip


class NativeApi:
    def __init__(self, engine: Engine, config: ServerConfig, live: LiveRequests, chats: Chats) -> None:
        self.engine, self.config, self.live, self.chats = engine, config, live, chats
        self.sessions = Sessions(engine)
        self._probe: asyncio.Task[bool] | None = None  # /health_generate's, one at a time

    def routes(self) -> list[web.RouteDef]:
        return [
            *self.sessions.routes(),
            web.get("/", self.root),
            web.get("/health", self.health),
            web.get("/health_generate", self.health_generate),
            web.get("/get_model_info", self.model_info),
            web.get("/model_info", self.model_info),
            web.get("/get_server_info", self.server_info),
            web.get("/server_info", self.server_info),
            web.get("/get_load", self.load),
            web.post("/generate", self.generate),
            web.put("/generate", self.generate),
            web.get("/flush_cache", self.flush_cache),
            web.post("/flush_cache", self.flush_cache),
            web.post("/abort_request", self.abort_request),
            web.get("/start_profile", self.start_profile),
            web.post("/start_profile", self.start_profile),
            web.get("/stop_profile", self.stop_profile),
            web.post("/stop_profile", self.stop_profile),
            web.post("/tokenize", self.tokenize),
            web.post("/v1/tokenize", self.tokenize),
            web.get("/tokenizer_info", self.tokenizer_info),
            web.post("/detokenize", self.detokenize),
            web.post("/v1/detokenize", self.detokenize),
            web.post("/parse_function_call", self.parse_function_call),
            web.post("/separate_reasoning", self.separate_reasoning),
        ]

    # ---- /generate ----

    async def generate(self, http_request: web.Request) -> web.StreamResponse:
        return await self.generate_from(http_request, await read_json(http_request))

    async def generate_from(
        self, http_request: web.Request, body: Fields, envelope: str | None = None
    ) -> web.StreamResponse:
        """The answer to `body`; `envelope`: the field of an object that holds it, if it is not streamed."""
        refuse(body, UNSUPPORTED)
        session = body.object("session_params")
        if session is not None:
            return await self._generate_in_session(http_request, body, self.sessions.read(session))
        prompts, is_batch = await self._prompts(body)
        rid, requests = await self._requests(body, prompts, is_batch)
        return await self._answer(http_request, body, rid, requests, is_batch or len(requests) > 1, envelope)

    async def _generate_in_session(
        self, http_request: web.Request, body: Fields, params: SessionParams
    ) -> web.StreamResponse:
        prompts, is_batch = await self._prompts(body, add_special_tokens=params.previous is None)
        if is_batch:
            raise InvalidRequest("a session continues with one prompt at a time", "session_params")
        prompt, num_kept = self.sessions.continued(params, prompts[0])
        rid, requests = await self._requests(body, [prompt], is_batch)
        if len(requests) > 1:
            raise InvalidRequest("n must be 1 in a session", "n")
        with self.sessions.turn(params, requests[0], num_kept):
            return await self._answer(http_request, body, rid, requests, is_list=False)

    async def _answer(
        self,
        http_request: web.Request,
        body: Fields,
        rid: str,
        requests: list[Request],
        is_list: bool,
        envelope: str | None = None,
    ) -> web.StreamResponse:
        formatter = MetaInfo(self.engine.tokenizer, body.flag("return_text_in_logprobs"))
        if not body.flag("stream"):
            deltas = await self.live.answers(http_request, rid, requests)

            def write() -> web.Response:
                answers = [formatter.answer(delta) for delta in deltas]
                answer = answers if is_list else answers[0]
                return json_response({envelope: answer} if envelope else answer)

            return await written(write, requests)
        choices = [
            GenerateChoice(i, formatter, has_index=is_list, is_disjoint=self.config.stream_output)
            for i in range(len(requests))
        ]
        for choice, request in zip(choices, requests, strict=True):
            request.sink = choice.sink
        stream = EventStream(choices)
        async with self.live.submitted(http_request, rid, requests):
            return await stream.run(http_request)

    async def _prompts(self, body: Fields, add_special_tokens: bool = True) -> tuple[list[list[int]], bool]:
        """Token ids of each prompt, and whether the body holds a list of prompts."""
        text, ids = body.get("text"), body.get("input_ids")
        if (text is None) == (ids is None):
            raise InvalidRequest("give exactly one of text and input_ids", "text")
        if ids is not None:
            vocab_size = self.engine.model_config.vocab_size
            if isinstance(ids, list) and ids and isinstance(ids[0], list):
                check_batch_size(len(ids), "input_ids")
                return [check_token_ids(row, vocab_size, f"input_ids[{i}]") for i, row in enumerate(ids)], True
            return [check_token_ids(ids, vocab_size, "input_ids")], False
        if isinstance(text, str):
            return [await encode_prompt(self.engine, text, "text", add_special_tokens)], False
        if not isinstance(text, list) or not text:
            body.fail("text", "a string or a non-empty list of strings")
        check_batch_size(len(text), "text")
        return [await encode_prompt(self.engine, one, f"text[{i}]") async for i, one in paced(enumerate(text))], True

    async def _requests(self, body: Fields, prompts: list[list[int]], is_batch: bool) -> tuple[str, list[Request]]:
        """The rid that stands for all of them, and one request for each prompt and answer."""
        rid, rids = _rids(body, len(prompts), is_batch)
        namespace = cache_namespace(body)
        requests: list[Request] = []
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
            requests += make_requests(names, input_ids, params, options)
        return rid, requests

    # ---- about the server ----

    async def root(self, _: web.Request) -> web.Response:
        """What Ollama's command line, and others, ask first (HEAD) to see whether a server is there."""
        return web.Response(text="radixloop is running\n")

    async def health(self, _: web.Request) -> web.Response:
        """Judged by the step loop's heartbeat: nothing is generated, so a busy server is not thought dead."""
        health = self.engine.health()
        return json_response(health, 200 if health.status == "ok" else 503)

    async def health_generate(self, http_request: web.Request) -> web.Response:
        """As /health, and an idle engine is asked for one token. Probes that arrive together share the one."""
        health = self.engine.health()
        if health.status == "ok" and not health.num_running:
            if self._probe is None or self._probe.done():
                self._probe = asyncio.create_task(self._generates())
            if not await asyncio.shield(self._probe):
                raise EngineStopped(f"no token within {HEALTH_GENERATE_TIMEOUT_S:.0f} s")
        return await self.health(http_request)

    async def _generates(self) -> bool:
        is_generation = self.engine.is_generation
        params = SamplingParams(max_new_tokens=int(is_generation), temperature=0.0)
        probe = Request(rid=f"HEALTH_CHECK_{new_rid()}", input_ids=[0], sampling_params=params, sink=ignore)
        probe.pooling = None if is_generation else "last"
        try:
            async with asyncio.timeout(HEALTH_GENERATE_TIMEOUT_S):
                async for delta in self.engine.generate(probe):
                    if delta.finish_reason is not None:
                        return not is_failure(delta.finish_reason)
        except TimeoutError:
            pass
        return False

    async def model_info(self, _: web.Request) -> web.Response:
        model = self.engine.model_config
        return json_response(
            {
                "model_path": self.engine.maintenance.model_path,
                "tokenizer_path": self.config.tokenizer_path or self.config.model_path,
                "served_model_name": self.config.model_name,
                "is_generation": self.engine.is_generation,
                "preferred_sampling_params": self.engine.sampling_defaults or None,
                "weight_version": self.engine.maintenance.weight_version,
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "model_type": model.model_type,
                "architectures": list(model.architectures),
                "context_length": self.engine.context_length,
            }
        )

    async def server_info(self, _: web.Request) -> web.Response:
        return json_response(
            {
                **self.config.public_values(),
                "max_total_num_tokens": self.engine.max_total_num_tokens,
                "max_req_input_len": self.engine.context_length - 1,
                "internal_states": [dataclasses.asdict(stats) for stats in self.engine.replica_stats()],
                "version": _version(),
                "pid": os.getpid(),
            }
        )

    async def load(self, _: web.Request) -> web.Response:
        """For each replica; `num_tokens` are those in KV slots and in the prompts that wait."""
        schedulers = [stats.scheduler for stats in self.engine.replica_stats()]
        return json_response(
            [
                {
                    "dp_rank": i,
                    "num_reqs": scheduler.num_running + scheduler.num_waiting,
                    "num_waiting_reqs": scheduler.num_waiting,
                    "num_tokens": scheduler.num_held_tokens + scheduler.num_waiting_tokens,
                    "num_pending_tokens": scheduler.num_waiting_tokens,
                }
                for i, scheduler in enumerate(schedulers)
            ]
        )

    async def flush_cache(self, _: web.Request) -> web.Response:
        if self.engine.flush_cache():
            return web.Response(text="Cache flushed.\n")
        health = self.engine.health()
        message = f"cache not flushed: {health.num_running} requests are running and {health.num_queued} are waiting"
        return json_response(native_error(400, message), 400)

    async def abort_request(self, http_request: web.Request) -> web.Response:
        """200 also when there is no such request: it may have ended while the abort was on its way."""
        body = await read_json(http_request)
        if body.flag("abort_all"):
            self.engine.abort_all()
        elif rid := body.text("rid"):
            self.live.abort(rid)
        else:
            raise InvalidRequest("give a rid, or abort_all: true", "rid")
        return web.Response()

    async def start_profile(self, _: web.Request) -> web.Response:
        self.engine.start_profile(self.config.profile_dir)
        return web.Response(text="Profiling started.\n")

    async def stop_profile(self, _: web.Request) -> web.Response:
        """Answers when the trace is written."""
        return json_response({"path": await self.engine.stop_profile()})

    # ---- tokens ----

    async def tokenize(self, http_request: web.Request) -> web.Response:
        """Token ids of `prompt` (or `text`), a string or a list, or of `messages`, whose rendered prompt is shown."""
        body = await read_json(http_request)
        answer: JSON = {"max_model_len": self.engine.context_length}
        if body.has("messages"):
            answer["prompt"] = self.chats.render(body)
            tokens: Any = await self.engine.encode(answer["prompt"], add_special_tokens=False)
        else:
            name = "prompt" if body.has("prompt") else "text"
            prompt = body.get(name)
            add_special_tokens = body.flag("add_special_tokens", True)
            texts = prompt if isinstance(prompt, list) else [prompt]
            if not all(isinstance(text, str) for text in texts):
                body.fail(name, "a string or a list of strings")
            tokens = [await self.engine.encode(text, add_special_tokens) async for text in paced(texts)]
            if not isinstance(prompt, list):
                tokens = tokens[0]
        is_batch = bool(tokens) and isinstance(tokens[0], list)
        answer |= {"tokens": tokens, "count": [len(row) for row in tokens] if is_batch else len(tokens)}
        return json_response(answer)

    async def tokenizer_info(self, _: web.Request) -> web.Response:
        """vLLM's route: what a client needs to render conversations itself."""
        tokenizer = self.engine.tokenizer
        template = self.chats.template or tokenizer.chat_template
        return json_response({**tokenizer.named_tokens, "chat_template": template})

    async def detokenize(self, http_request: web.Request) -> web.Response:
        """The text, under SGLang's name and vLLM's."""
        body = await read_json(http_request)
        ids, vocab_size = body.get("tokens"), self.engine.model_config.vocab_size
        skip = body.flag("skip_special_tokens", True)
        if isinstance(ids, list) and ids and isinstance(ids[0], list):
            rows = [check_token_ids(row, vocab_size, f"tokens[{i}]") for i, row in enumerate(ids)]
            texts = [self.engine.tokenizer.decode(row, skip_special_tokens=skip) async for row in paced(rows)]
            return json_response({"text": texts, "prompt": texts})
        row = check_token_ids(ids, vocab_size, "tokens")
        text = self.engine.tokenizer.decode(row, skip_special_tokens=skip)
        return json_response({"text": text, "prompt": text})

    # ---- parts of an answer ----

    async def parse_function_call(self, http_request: web.Request) -> web.Response:
        """What of `text` is calls of `tools`. Arguments are JSON text."""
        body = await read_json(http_request)
        name = self._parser_name(body, "tool_call_parser", (*TOOL_FORMATS, *TOOL_ALIASES), self.chats.tool_call_parser)
        format_ = TOOL_FORMATS[TOOL_ALIASES.get(name, name)]()
        parser = AnswerParser(None, read_tool_choice(Fields({"tools": body.array("tools")})).new_parser(format_))
        parts = parser.parse(body.text("text"))
        calls = [
            {"tool_index": call.index, "name": call.name, "parameters": call.arguments} for call in parts.tool_calls
        ]
        return json_response({"normal_text": parts.text, "calls": calls})

    async def separate_reasoning(self, http_request: web.Request) -> web.Response:
        """Where in `text` the reasoning ends."""
        body = await read_json(http_request)
        name = self._parser_name(
            body, "reasoning_parser", (*REASONING_FORMATS, *REASONING_ALIASES), self.chats.reasoning_parser
        )
        format_ = REASONING_FORMATS[REASONING_ALIASES.get(name, name)]
        parts = AnswerParser(ReasoningParser(format_, is_inside=format_.is_always), None).parse(body.text("text"))
        return json_response({"reasoning_text": parts.reasoning, "text": parts.text})

    @staticmethod
    def _parser_name(body: Fields, field: str, known: Sequence[str], default: str | None) -> str:
        """The parser that the body names, else the model's."""
        name = body.text(field) or default
        if name is None or name not in known:
            body.fail(field, f"one of {', '.join(known)}")
        return name


# ---- reading /generate ----


def _rids(body: Fields, count: int, is_batch: bool) -> tuple[str, list[str]]:
    """(the rid that stands for the whole body, the rid of each prompt)."""
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
    """The body as the i-th of `count` prompts sees it."""
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
    options = Options(return_logprob=item.flag("return_logprob"), priority=item.integer("priority"))
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


# ---- writing /generate ----


class GenerateChoice(Choice):
    """Events whose text, ids and log-probabilities are cumulative, as SGLang's clients expect, or disjoint."""

    def __init__(self, index: int, formatter: MetaInfo, *, has_index: bool, is_disjoint: bool) -> None:
        super().__init__(index)
        self._formatter, self._is_disjoint = formatter, is_disjoint
        self._head = b'data: {"index":%d,"text":"' % index if has_index else b'data: {"text":"'
        self._text = self._ids = b""  # as they stand in the JSON: each piece is escaped once
        self._logprobs = Logprobs()
        self._meta = b""  # meta_info up to the number of tokens, which alone changes

    def events(self, delta: Delta) -> bytes:
        if not self._meta:
            counts = self._formatter.counts(delta.request, 0, None)
            self._meta = orjson.dumps(counts).removesuffix(b"0}")
        if delta.request.return_logprob:
            return self._event(delta, self._full_meta(delta))
        return self._event(delta, b"%b%d}" % (self._meta, self.num_output_tokens))

    def last_events(self, delta: Delta) -> bytes:
        reason = delta.finish_reason
        if reason is not None and is_failure(reason):
            return event(native_error(reason.status_code or 500, reason.message or "the request failed"))
        return self._event(delta, self._full_meta(delta))

    def _full_meta(self, delta: Delta) -> bytes:
        meta = self._formatter.counts(delta.request, self.num_output_tokens, delta.finish_reason)
        if delta.request.return_logprob:
            new = delta.logprobs or Logprobs()
            if not self._is_disjoint:
                known = self._logprobs
                known.token += new.token
                known.top += new.top
                known.token_ids += new.token_ids
                new = known
            meta |= self._formatter.logprobs(delta.request, new)
        return orjson.dumps(meta)

    def _event(self, delta: Delta, meta: bytes) -> bytes:
        text, ids = orjson.dumps(delta.text)[1:-1], orjson.dumps(delta.token_ids)[1:-1]
        if not self._is_disjoint:
            text = self._text = self._text + text
            ids = self._ids = b"%b,%b" % (self._ids, ids) if self._ids and ids else self._ids + ids
        return b'%b%b","output_ids":[%b],"meta_info":%b}\n\n' % (self._head, text, ids, meta)


def _version() -> str:
    try:
        return version("radixloop")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"
