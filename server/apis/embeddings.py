"""Vectors and scores of prompts, each route in the shape of who came up with it.

OpenAI      /v1/embeddings, also of conversations (vLLM's `messages`) and of pictures (SGLang's objects)
SGLang      /encode, /classify, /v1/rerank, and /v1/score with `query`, `items` and `label_token_ids`
vLLM        /v1/classify, /rerank and /v2/rerank (also Jina's and Cohere's), /v1/score with `text_1` and `text_2`
"""

import base64
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from aiohttp import web
from msgspec import Meta

from engine.declared import Object, convert
from engine.engine import Engine
from engine.errors import InvalidRequest, OutputNotFinite
from engine.media import Kind, PromptMedia
from engine.request import Request, SamplingParams
from engine.state import RequestState
from server.apis.meta_info import MetaInfo
from server.config import ServerConfig
from server.http.intake import paced
from server.http.live import LiveRequests, Options, make_requests, new_rid
from server.reading.chat import Chats
from server.reading.contents import sourced
from server.reading.model_name import served_model
from server.reading.openai_body import MESSAGES, AnyMessage, ChatFields
from server.reading.protocol import (
    JSON,
    Owner,
    check_batch_size,
    check_token_ids,
    encode_prompt,
    is_int,
    json_response,
    read_body,
    read_prompts,
)
from server.reading.shared_fields import Prompts, RequestFields, Text, Texts, TokenIds

NUM_A_PASS = 32  # vectors written as JSON before the streams have their turn


class PooledFields(RequestFields):
    model: str = ""
    add_special_tokens: bool = True


class Shown(Object):
    """SGLang's input of models that see: a text, a picture or both, as one message of a user."""

    text: str = ""
    image: Annotated[str, Meta(description="a data URI, base64 text, or a URL or path that the server allows")] = ""
    video: Annotated[str, Meta(description="likewise")] = ""


class EmbeddingsRequest(PooledFields):
    input: (
        Annotated[
            str | list[Text | int | list[int] | Shown],
            Meta(extra={"rule": "a string, a list of token ids, or a non-empty list of these or of objects"}),
        ]
        | None
    ) = None
    messages: Annotated[list[AnyMessage], MESSAGES] | None = None
    chat_template_kwargs: JSON = {}
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: (
        Annotated[int, Meta(ge=1, description="numbers of the vector to keep, which is then of length 1 again")] | None
    ) = None


class EncodeRequest(PooledFields, unsupported=("image_data", "video_data", "audio_data")):
    text: Prompts | None = None
    input_ids: TokenIds | None = None


class ClassifyRequest(PooledFields, kw_only=True):
    input: Prompts


class RerankRequest(PooledFields, kw_only=True):
    documents: Texts
    query: str = ""
    top_n: Annotated[int, Meta(ge=1)] | None = None
    return_documents: bool = True


class ScoreRequest(PooledFields):
    """Texts to compare (vLLM's), or items whose next token is looked at (SGLang's)."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    query: str | list[int] = ""
    items: str | list[str | int | list[int]] | None = None
    label_token_ids: list[int] | None = None
    apply_softmax: bool = False
    item_first: bool = False


class EmbeddingsApi:
    def __init__(self, engine: Engine, config: ServerConfig, live: LiveRequests, chats: Chats) -> None:
        self.engine, self.config, self.live, self.chats = engine, config, live, chats

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/embeddings", self.embeddings),
            web.post("/encode", self.encode),
            web.put("/encode", self.encode),
            web.post("/classify", self.classify),
            web.put("/classify", self.classify),
            web.post("/v1/classify", self.classify_with_labels),
            web.post("/v1/score", self.score),
            web.post("/score", self.score),
            web.post("/v1/rerank", self.rerank_for_sglang),
            web.post("/rerank", self.rerank),
            web.post("/v2/rerank", self.rerank),
        ]

    # ---- OpenAI ----

    async def embeddings(self, http_request: web.Request) -> web.StreamResponse:
        return await self.embed(http_request, await read_body(http_request, EmbeddingsRequest))

    async def embed(self, owner: Owner, body: EmbeddingsRequest) -> web.StreamResponse:
        """Answer a body of /v1/embeddings."""
        model = served_model(self.config, body.model)
        size = dimensions_of(body.dimensions, self.engine.model_config.embedding_size)
        if body.messages is None and not _has_shown(body.input):
            prompts = await read_prompts(self.engine, body.input, "input", body.add_special_tokens)
            states = await self._run(owner, body, prompts)
        else:
            chats = [await self.chats.rendered(chat, owner) for chat in self._conversations(body)]
            shown = [await self.chats.encode(prompt) for prompt in chats]
            states = await self._run(owner, body, [ids for ids, _ in shown], [media for _, media in shown])
        data = []
        async for i, state in paced(enumerate(states), NUM_A_PASS):
            vector = normalized(_vector(state)[:size])
            written = (
                base64.b64encode(vector.tobytes()).decode() if body.encoding_format == "base64" else json_vector(vector)
            )
            data.append({"object": "embedding", "index": i, "embedding": written})
        return json_response({"object": "list", "data": data, "model": model, "usage": _usage(states)})

    def _conversations(self, body: EmbeddingsRequest) -> list[ChatFields]:
        """Return what is embedded as the model's template writes it: a conversation (vLLM's), or several messages."""
        if body.messages is not None:
            names = ("messages", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
            if body.input is not None:
                raise InvalidRequest("give exactly one of input and messages", "messages")
            return [convert({name: getattr(body, name) for name in names}, ChatFields)]
        given = body.input if isinstance(body.input, list) else []
        check_batch_size(self.engine, len(given), "input")
        chats = []
        for i, one in enumerate(given):
            if not isinstance(one, Shown):
                raise InvalidRequest(f"input[{i}] must be an object, as others are", f"input[{i}]")
            sources: dict[Kind, str] = {"image": one.image, "video": one.video}
            parts = [sourced(source, f"input[{i}].{kind}", kind=kind) for kind, source in sources.items() if source]
            content = [*parts, {"type": "text", "text": one.text}] if one.text or not parts else parts
            messages = [{"role": "user", "content": content}]
            chats.append(convert({"messages": messages, "add_generation_prompt": True}, ChatFields))
        return chats

    # ---- SGLang ----

    async def encode(self, http_request: web.Request) -> web.Response:
        return await self._native(http_request, is_normalized=True)

    async def classify(self, http_request: web.Request) -> web.Response:
        """Return the raw scores of a model with a classification head."""
        self._check_classifier()
        return await self._native(http_request, is_normalized=False)

    async def _native(self, http_request: web.Request, *, is_normalized: bool) -> web.Response:
        body = await read_body(http_request, EncodeRequest)
        name = "text" if body.input_ids is None else "input_ids"
        value = body.text if body.input_ids is None else body.input_ids
        is_list = isinstance(value, list) and not (value and is_int(value[0]))
        prompts = await read_prompts(self.engine, value, name, body.add_special_tokens)
        states = await self._run(http_request, body, prompts)
        meta_info, answers = MetaInfo(self.engine.tokenizer), []
        async for state in paced(states, NUM_A_PASS):
            vector = normalized(_vector(state)) if is_normalized else _vector(state)
            answers.append(
                {"embedding": json_vector(vector), "meta_info": meta_info.counts(state, 0, state.finish_reason)}
            )
        return json_response(answers if is_list else answers[0])

    async def rerank_for_sglang(self, http_request: web.Request) -> web.Response:
        body = await read_body(http_request, RerankRequest)
        results, states = await self._reranked(http_request, body)
        meta_info = MetaInfo(self.engine.tokenizer)
        return json_response(
            [
                {
                    "score": score,
                    "index": index,
                    **({"document": document} if body.return_documents else {}),
                    "meta_info": meta_info.counts(states[-1], 0, states[-1].finish_reason),
                }
                for score, index, document in results
            ]
        )

    # ---- vLLM ----

    async def classify_with_labels(self, http_request: web.Request) -> web.Response:
        self._check_classifier()
        body = await read_body(http_request, ClassifyRequest)
        model = served_model(self.config, body.model)
        prompts = await read_prompts(self.engine, body.input, "input", body.add_special_tokens)
        states = await self._run(http_request, body, prompts)
        data = []
        async for i, state in paced(enumerate(states)):
            probs = _probabilities(_vector(state))
            label = self.engine.model_config.labels[int(probs.argmax())]
            data.append({"index": i, "label": label, "probs": json_vector(probs), "num_classes": len(probs)})
        return json_response(
            {
                "id": f"classify-{new_rid()}", "object": "list", "created": int(time.time()), "model": model,
                "data": data, "usage": _usage(states),
            }
        )  # fmt: skip

    async def rerank(self, http_request: web.Request) -> web.Response:
        body = await read_body(http_request, RerankRequest)
        model = served_model(self.config, body.model)
        results, states = await self._reranked(http_request, body)
        return json_response(
            {
                "id": f"rerank-{new_rid()}",
                "model": model,
                "usage": _usage(states),
                "results": [
                    {
                        "index": index,
                        "relevance_score": score,
                        **({"document": {"text": document}} if body.return_documents else {}),
                    }
                    for score, index, document in results
                ],
            }
        )

    async def _reranked(
        self, owner: Owner, body: RerankRequest
    ) -> tuple[list[tuple[float, int, str]], list[RequestState]]:
        """Return (score, index, document) of the best `top_n`, best first, and the requests that this took."""
        documents = _texts(body.documents)
        scores, states = await self._score_pairs(owner, body, [body.query], documents, ("query", "documents"))
        ranked = sorted(zip(scores, range(len(documents)), documents, strict=True), key=lambda one: (-one[0], one[1]))
        return ranked[: body.top_n], states

    async def score(self, http_request: web.Request) -> web.Response:
        body = await read_body(http_request, ScoreRequest)
        model = served_model(self.config, body.model)
        if body.label_token_ids is not None or body.items is not None:
            return await self._score_labels(http_request, body, model)
        if body.text_1 is None or body.text_2 is None:
            raise body.wrong("text_1" if body.text_1 is None else "text_2", "a string or a non-empty list of strings")
        first, second = _texts(body.text_1), _texts(body.text_2)
        if len(first) not in (1, len(second)):
            raise InvalidRequest(
                f"text_1 has {len(first)} texts for {len(second)} of text_2: give 1 or as many", "text_1"
            )
        scores, states = await self._score_pairs(http_request, body, first, second, ("text_1", "text_2"))
        return json_response(
            {
                "id": f"score-{new_rid()}", "object": "list", "created": int(time.time()), "model": model,
                "data": [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)],
                "usage": _usage(states),
            }
        )  # fmt: skip

    async def _score_pairs(
        self, owner: Owner, body: PooledFields, first: list[str], second: list[str], names: tuple[str, str]
    ) -> tuple[list[float], list[RequestState]]:
        """Score how well each of `second` fits its own of `first`, or the only one.

        A classifier reads both as one prompt, and its score, or that of its last label, becomes a probability. Other
        models read each by itself, and the cosine of the two vectors counts.
        """
        check_batch_size(self.engine, len(first) + len(second), names[1])
        heads = [await encode_prompt(self.engine, text, names[0]) async for text in paced(first)]
        is_classifier = self.engine.model_config.is_classifier
        tails = [await encode_prompt(self.engine, text, names[1], not is_classifier) async for text in paced(second)]
        if is_classifier:
            pairs = [heads[i % len(heads)] + tail for i, tail in enumerate(tails)]
            states = await self._run(owner, body, pairs)
            return [float(_probabilities(_vector(state))[-1]) for state in states], states
        states = await self._run(owner, body, heads + tails)
        vectors = [normalized(_vector(state)) async for state in paced(states)]
        pairs_of = [(vectors[i % len(heads)], vector) for i, vector in enumerate(vectors[len(heads) :])]
        return [float(head @ tail) for head, tail in pairs_of], states

    async def _score_labels(self, owner: Owner, body: ScoreRequest, model: str) -> web.Response:
        """Score how likely each of some tokens comes after `query` and an item (SGLang's)."""
        labels = check_token_ids(body.label_token_ids, self.engine.model_config.vocab_size, "label_token_ids")
        prompts, is_softmax = await self._items(body), body.apply_softmax
        params = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
        options = Options(
            return_logprob=True, token_ids_logprob=labels, priority=body.priority,
            extra_key=body.cache_namespace,
        )  # fmt: skip
        rid = body.rid or new_rid()
        states = [
            RequestState(request)
            async for i, input_ids in paced(enumerate(prompts))
            for request in make_requests([f"{rid}-{i}"], input_ids, params, options)
        ]
        scores = []
        for delta in await self.live.answers(owner, rid, states):
            assert delta.logprobs is not None
            entries = delta.logprobs.token_ids[0]
            assert entries is not None
            likely = np.exp(np.array([logprob for logprob, _ in entries], np.float64))
            scores.append((likely / max(likely.sum(), 1e-300) if is_softmax else likely).tolist())
        return json_response({"object": "scoring", "scores": scores, "model": model, "usage": _usage(states)})

    async def _items(self, body: ScoreRequest) -> list[list[int]]:
        """Return each of `items` joined to `query`; both are texts, or both token ids."""
        is_item_first = body.item_first
        items: Any = body.items
        if isinstance(body.query, str):
            texts = [items] if isinstance(items, str) else items
            if not texts or not all(isinstance(text, str) for text in texts):
                raise body.wrong("items", "a string or a non-empty list of strings")
            check_batch_size(self.engine, len(texts), "items")
            return [
                await encode_prompt(
                    self.engine, f"{text}{body.query}" if is_item_first else f"{body.query}{text}", f"items[{i}]"
                )
                async for i, text in paced(enumerate(texts))
            ]
        vocab_size = self.engine.model_config.vocab_size
        head = check_token_ids(body.query, vocab_size, "query", may_be_empty=True)
        if items and is_int(items[0]):
            items = [items]
        if not items or not all(isinstance(ids, list) for ids in items):
            raise body.wrong("items", "a non-empty list of lists of token ids, as query is token ids")
        check_batch_size(self.engine, len(items), "items")
        prompts = []
        async for i, item in paced(enumerate(items)):
            tail = check_token_ids(item, vocab_size, f"items[{i}]", may_be_empty=bool(head))
            prompts.append(tail + head if is_item_first else head + tail)
        return prompts

    # ---- all of them ----

    async def vectors(self, owner: Owner, body: PooledFields, prompts: Sequence[list[int]]) -> list[np.ndarray]:
        """Return the vector of each prompt, float32 [size], not normalized. `body`: see `_run`."""
        return [_vector(state) for state in await self._run(owner, body, prompts)] if prompts else []

    async def _run(
        self,
        owner: Owner,
        body: PooledFields,
        prompts: Sequence[list[int]],
        media: Sequence[PromptMedia | None] | None = None,
    ) -> list[RequestState]:
        """Run one request a prompt; their vectors are there then. `body` gives `rid`, `priority` and cache keys.

        media: what each prompt shows.
        """
        rid = body.rid or new_rid()
        priority, extra_key = body.priority, body.cache_namespace
        params, pooling = SamplingParams(max_new_tokens=0), self.engine.model_config.pooling
        states = [
            RequestState(
                Request(
                    rid=rid if len(prompts) == 1 else f"{rid}-{i}",
                    input_ids=input_ids,
                    sampling_params=params,
                    priority=priority,
                    extra_key=extra_key,
                    pooling=pooling,
                    media=media[i] if media else None,
                )
            )
            async for i, input_ids in paced(enumerate(prompts))
        ]
        await self.live.answers(owner, rid, states)
        return states

    def _check_classifier(self) -> None:
        if not self.engine.model_config.is_classifier:
            raise InvalidRequest("the model has no classification head", "model")


def _has_shown(given: Any) -> bool:
    return isinstance(given, list) and any(isinstance(one, Shown) for one in given)


def _texts(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given


def dimensions_of(asked: int | None, size: int) -> int:
    """Return how many numbers of a vector of `size` are wanted. `InvalidRequest` if it has fewer."""
    if asked is not None and asked > size:
        raise InvalidRequest(f"dimensions must be between 1 and {size}, got {asked}", "dimensions")
    return asked or size


def _vector(state: RequestState) -> np.ndarray:
    """Return a request's vector, float32 [size]."""
    vector = state.embedding
    if vector is None or not np.isfinite(vector).all():
        raise OutputNotFinite("the model's output is not finite (NaN or inf)")
    return vector


def normalized(vector: np.ndarray) -> np.ndarray:
    """Scale a vector to length 1."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def _probabilities(scores: np.ndarray) -> np.ndarray:
    """Return the probability of each label; of a single score its own (sigmoid)."""
    if len(scores) == 1:
        return np.asarray(1 / (1 + np.exp(-scores)))
    likely = np.exp(scores - scores.max())
    return np.asarray(likely / likely.sum())


def json_vector(vector: np.ndarray) -> Any:
    """Write JSON at once, and without a Python object for each number."""
    return orjson.Fragment(orjson.dumps(np.ascontiguousarray(vector, np.float32), option=orjson.OPT_SERIALIZE_NUMPY))


def _usage(states: Sequence[RequestState]) -> JSON:
    """Return the costs: prompts alone, also where a token was sampled for its log-probabilities."""
    num_tokens = sum(state.prompt_len for state in states)
    return {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens}
