"""Scores of how well texts fit, each route in the shape of who came up with it.

SGLang      /v1/rerank, and /v1/score with `query`, `items` and `label_token_ids`
vLLM        /rerank and /v2/rerank (also Jina's and Cohere's), /v1/score with `text_1` and `text_2`
"""

import time
from typing import Annotated, Any

import numpy as np
from aiohttp import web
from msgspec import Meta

from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.request import SamplingParams
from engine.state import RequestState
from server.apis.meta_info import MetaInfo
from server.apis.vectors import PooledFields, Vectors, normalized, probabilities_of, usage_of, vector_of
from server.config import ServerConfig
from server.http.intake import paced
from server.http.live import LiveRequests, Options, make_requests, new_rid
from server.reading.model_name import served_model
from server.reading.prompts import check_batch_size, check_token_ids, encode_prompt
from server.reading.protocol import Owner, is_int, json_response, read_body
from server.reading.shared_fields import Texts


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


class ScoresApi:
    def __init__(self, engine: Engine, config: ServerConfig, live: LiveRequests) -> None:
        self.engine, self.config, self.live, self.vectors = engine, config, live, Vectors(engine, live)

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/score", self.score),
            web.post("/score", self.score),
            web.post("/v1/rerank", self.rerank_for_sglang),
            web.post("/rerank", self.rerank),
            web.post("/v2/rerank", self.rerank),
        ]

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

    async def rerank(self, http_request: web.Request) -> web.Response:
        body = await read_body(http_request, RerankRequest)
        model = served_model(self.config, body.model)
        results, states = await self._reranked(http_request, body)
        return json_response(
            {
                "id": f"rerank-{new_rid()}",
                "model": model,
                "usage": usage_of(states),
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
                "usage": usage_of(states),
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
            states = await self.vectors.run(owner, body, pairs)
            return [float(probabilities_of(vector_of(state))[-1]) for state in states], states
        states = await self.vectors.run(owner, body, heads + tails)
        vectors = [normalized(vector_of(state)) async for state in paced(states)]
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
        return json_response({"object": "scoring", "scores": scores, "model": model, "usage": usage_of(states)})

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


def _texts(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given
