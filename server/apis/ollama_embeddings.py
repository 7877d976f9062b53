"""Ollama's routes that turn texts into vectors: /api/embed, and the older /api/embeddings."""

import time
from typing import Annotated

from aiohttp import web
from msgspec import Meta

from engine.engine import Engine
from server.apis.vectors import PooledFields, Vectors, dimensions_of, json_vector, normalized, vector_of
from server.config import ServerConfig
from server.http.intake import paced
from server.http.live import LiveRequests
from server.reading.model_name import ollama_model
from server.reading.prompts import check_batch_size, encode_prompt
from server.reading.protocol import json_response, read_body
from server.reading.shared_fields import Text


class OllamaEmbedFields(PooledFields):
    name: Annotated[str, Meta(description="an older name of model")] = ""


class EmbedRequest(OllamaEmbedFields):
    input: str | list[Text] = []
    truncate: bool = True
    dimensions: Annotated[int, Meta(ge=1)] | None = None


class EmbedPromptRequest(OllamaEmbedFields):
    prompt: str = ""


class OllamaEmbeddings:
    def __init__(self, engine: Engine, config: ServerConfig, live: LiveRequests) -> None:
        self.engine, self.config, self.vectors = engine, config, Vectors(engine, live)

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/api/embed", self.embed), web.post("/api/embeddings", self.embed_prompt)]

    async def embed(self, http_request: web.Request) -> web.Response:
        """Return a vector of length 1 for each text of `input`, cut to `dimensions`."""
        begun = time.perf_counter_ns()
        body = await read_body(http_request, EmbedRequest)
        model = ollama_model(self.config, body.model or body.name)
        size = dimensions_of(body.dimensions, self.engine.model_config.embedding_size)
        prompts = await self._prompts(body)
        states = await self.vectors.run(http_request, body, prompts) if prompts else []
        return json_response(
            {
                "model": model,
                "embeddings": [json_vector(normalized(vector_of(state)[:size])) async for state in paced(states)],
                "total_duration": time.perf_counter_ns() - begun,
                "load_duration": 0,
                "prompt_eval_count": sum(map(len, prompts)),
            }
        )

    async def embed_prompt(self, http_request: web.Request) -> web.Response:
        """Return the vector of `prompt` as the model makes it."""
        body = await read_body(http_request, EmbedPromptRequest)
        ollama_model(self.config, body.model or body.name)
        if not body.prompt:
            return json_response({"embedding": []})
        prompt = await self._prompt(body.prompt, "prompt", is_cut=True)
        [state] = await self.vectors.run(http_request, body, [prompt])
        return json_response({"embedding": json_vector(vector_of(state))})

    async def _prompts(self, body: EmbedRequest) -> list[list[int]]:
        """Return the token ids of `input`: a text or several, or nothing, by which a client has the model loaded."""
        texts = [body.input] if isinstance(body.input, str) else body.input
        check_batch_size(self.engine, len(texts), "input")
        return [
            await self._prompt(text, f"input[{i}]", body.truncate) async for i, text in paced(enumerate(texts)) if text
        ]

    async def _prompt(self, text: str, field: str, is_cut: bool) -> list[int]:
        return await encode_prompt(self.engine, text, field, is_cut=is_cut)
