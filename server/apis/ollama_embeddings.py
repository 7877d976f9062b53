"""Ollama's routes that turn texts into vectors: /api/embed, and the older /api/embeddings."""

import time

from aiohttp import web

from engine.engine import Engine
from server.apis.embeddings import EmbeddingsApi, json_vector, normalized
from server.config import ServerConfig
from server.reading.model_name import ollama_model
from server.reading.protocol import Fields, check_batch_size, encode_prompt, json_response, read_json


class OllamaEmbeddings:
    def __init__(self, engine: Engine, config: ServerConfig, embeddings: EmbeddingsApi) -> None:
        self.engine, self.config, self.embeddings = engine, config, embeddings

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/api/embed", self.embed), web.post("/api/embeddings", self.embed_prompt)]

    async def embed(self, http_request: web.Request) -> web.Response:
        """Return a vector of length 1 for each text of `input`, cut to `dimensions`."""
        begun = time.perf_counter_ns()
        body = await read_json(http_request)
        model = ollama_model(self.config, body)
        size = self.engine.embedding_size
        size = body.integer("dimensions", size, low=1, high=size)
        prompts = await self._prompts(body)
        vectors = await self.embeddings.vectors(http_request, body, prompts)
        return json_response(
            {
                "model": model,
                "embeddings": [json_vector(normalized(vector[:size])) for vector in vectors],
                "total_duration": time.perf_counter_ns() - begun,
                "load_duration": 0,
                "prompt_eval_count": sum(map(len, prompts)),
            }
        )

    async def embed_prompt(self, http_request: web.Request) -> web.Response:
        """Return the vector of `prompt` as the model makes it."""
        body = await read_json(http_request)
        ollama_model(self.config, body)
        text = body.text("prompt")
        if not text:
            return json_response({"embedding": []})
        [vector] = await self.embeddings.vectors(http_request, body, [await self._prompt(text, "prompt", is_cut=True)])
        return json_response({"embedding": json_vector(vector)})

    async def _prompts(self, body: Fields) -> list[list[int]]:
        """Return the token ids of `input`: a text or several, or nothing, by which a client has the model loaded."""
        given, is_cut = body.get("input"), body.flag("truncate", True)
        texts = [given] if isinstance(given, str) else body.strings("input")
        check_batch_size(len(texts), "input")
        return [await self._prompt(text, f"input[{i}]", is_cut) for i, text in enumerate(texts) if text]

    async def _prompt(self, text: str, field: str, is_cut: bool) -> list[int]:
        ids = await encode_prompt(self.engine, text, field)
        return ids[: self.engine.context_length] if is_cut else ids
