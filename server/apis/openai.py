"""OpenAI's API: /v1/completions, /v1/chat/completions and /v1/models, with SGLang's extra fields."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

from aiohttp import web

from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.request import SamplingParams
from engine.state import RequestState
from server.apis.answer import respond
from server.apis.meta_info import MetaInfo
from server.apis.openai_answers import ChatAnswer, CompletionAnswer, Envelope, OpenAIAnswer, count_usage
from server.config import ServerConfig
from server.http.intake import paced
from server.http.live import LiveRequests, Options, make_requests, new_rid
from server.http.sse import DONE, event
from server.reading.chat import Chats
from server.reading.grammars import names_of_constraint
from server.reading.model_name import served_model
from server.reading.openai_body import ChatRequest, CompletionRequest, OpenAIFields
from server.reading.prompts import check_n, read_prompts
from server.reading.protocol import JSON, Owner, json_response, read_body, spelled
from server.reading.sampling import read_options, read_sampling_params

COMPLETION_MAX_TOKENS = 16


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
        # Codex wants its own catalogue beside OpenAI's list: empty, it keeps its prompt and settings for any model.
        cards = [self._model_card(name) for name in self.config.model_names]
        ends = {"has_more": False, "first_id": cards[0]["id"], "last_id": cards[-1]["id"]}  # Anthropic's, of a page
        return json_response({"object": "list", "data": cards, "models": [], **ends})

    async def model(self, http_request: web.Request) -> web.Response:
        return json_response(self._model_card(self._check_model(http_request.match_info["model"])))

    def _model_card(self, name: str) -> JSON:
        """Return what OpenAI's clients read of a model, and what Anthropic's do, under the same paths."""
        return {
            "id": name,
            "object": "model",
            "created": self.started_at,
            "owned_by": "radixloop",
            "type": "model",
            "display_name": name,
            "created_at": datetime.fromtimestamp(self.started_at, UTC).isoformat(),
            "root": self.config.model_path,
            "max_model_len": self.engine.context_length,
        }

    def _check_model(self, name: str) -> str:
        return served_model(self.config, name)

    # ---- the two endpoints ----

    async def completions(self, http_request: web.Request) -> web.StreamResponse:
        return await self.complete(http_request, await read_body(http_request, CompletionRequest))

    async def chat_completions(self, http_request: web.Request) -> web.StreamResponse:
        return await self.chat(http_request, await read_body(http_request, ChatRequest))

    async def complete(self, owner: Owner, body: CompletionRequest) -> web.StreamResponse:
        """Answer `body`. Only an HTTP request may ask for a stream."""
        model = self._check_model(body.model)
        if body.suffix:
            raise InvalidRequest("suffix is not supported: this server does not fill in the middle", "suffix")
        if body.best_of > (body.given(("n",)) or {"n": 1})["n"]:
            raise InvalidRequest("best_of larger than n is not supported", "best_of")
        params = read_sampling_params(body, self.engine, ("max_tokens",), COMPLETION_MAX_TOKENS)
        num_logprobs = -1 if body.logprobs is None else body.logprobs
        options = read_options(body, num_logprobs)
        if body.echo and options.return_logprob:
            options.logprob_start_len = 0
        prompts = await read_prompts(self.engine, body.prompt, "prompt", body.add_special_tokens is not False)
        check_n(self.engine, params.n, len(prompts))
        envelope = self._envelope(body, options, model, "cmpl", "text_completion", "text_completion")
        new_answer = partial(CompletionAnswer, is_echo=body.echo, num_logprobs=num_logprobs)
        with spelled(names_of_constraint(body)):
            return await self._answer(owner, prompts, params, options, envelope, new_answer)

    async def chat(self, owner: Owner, body: ChatRequest) -> web.StreamResponse:
        """Answer `body`. Only an HTTP request may ask for a stream."""
        model = self._check_model(body.model)
        turn = await self.chats.turn(body, owner)
        envelope = self._envelope(body, turn.options, model, "chatcmpl", "chat.completion", "chat.completion.chunk")
        new_answer = partial(ChatAnswer, turn=turn)
        with spelled(turn.names):
            return await self._answer(owner, [turn.input_ids], turn.params, turn.options, envelope, new_answer)

    async def render(self, http_request: web.Request) -> web.Response:
        """Return the prompt that /v1/chat/completions would generate from, and its tokens."""
        body = await read_body(http_request, ChatRequest)
        self._check_model(body.model)
        turn = await self.chats.turn(body, http_request)
        return json_response({"prompt": turn.prompt, "prompt_token_ids": turn.input_ids})

    def _envelope(
        self, body: OpenAIFields, options: Options, model: str, prefix: str, name: str, chunk_name: str
    ) -> Envelope:
        """Read the fields of `body` that concern the response around its choices. `prefix` begins a rid of ours."""
        rid = body.rid or f"{prefix}-{new_rid()}"
        envelope = Envelope(rid, model, name, chunk_name, returns_token_ids=body.return_token_ids)
        if envelope.returns_token_ids and options.stream:
            raise InvalidRequest("return_token_ids is not supported with stream: true", "return_token_ids")
        envelope.names_tokens_by_id = body.return_tokens_as_token_ids
        envelope.has_usage = self.config.enable_force_include_usage
        if body.stream_options is not None:
            if not options.stream:
                raise InvalidRequest("stream_options is allowed only with stream: true", "stream_options")
            envelope.has_usage |= body.stream_options.include_usage
            envelope.has_continuous_usage = body.stream_options.continuous_usage_stats and envelope.has_usage
        if body.return_meta_info:
            envelope.meta_info = MetaInfo(self.engine.tokenizer)
        return envelope

    async def _answer(
        self,
        owner: Owner,
        prompts: list[list[int]],
        params: SamplingParams,
        options: Options,
        envelope: Envelope,
        new_answer: Callable[..., OpenAIAnswer],
    ) -> web.StreamResponse:
        """Return n answers to each prompt, all in one response. Choice i belongs to prompt i // n."""
        rid, n = envelope.id, params.n
        states: list[RequestState] = []
        async for i, input_ids in paced(enumerate(prompts), num_a_pass=-(-64 // n)):
            first = i * n
            names = [rid] if n * len(prompts) == 1 else [f"{rid}-{k}" for k in range(first, first + n)]
            states += map(RequestState, make_requests(names, input_ids, params, options))
        answers = [new_answer(i, state, envelope, self.engine.tokenizer) async for i, state in paced(enumerate(states))]

        def usage() -> JSON:
            return count_usage(answers, n).to_dict(self.config.enable_cache_report)

        def body(choices: list[JSON]) -> JSON:
            return envelope.response(choices, usage())

        def tail() -> bytes:
            return event(envelope.chunk([], usage())) + DONE if envelope.has_usage else DONE

        return await respond(owner, self.live, rid, answers, body=body, tail=tail)
