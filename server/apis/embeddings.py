"""Vectors of prompts, each route in the shape of who came up with it.

OpenAI      /v1/embeddings, also of conversations (vLLM's `messages`) and of pictures (SGLang's objects)
SGLang      /encode and /classify
vLLM        /v1/classify
"""

import base64
import time
from typing import Annotated, Any, Literal

from aiohttp import web
from msgspec import Meta

from engine.declared import Object, convert
from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.media import Kind
from server.apis.meta_info import MetaInfo
from server.apis.vectors import (
    PooledFields,
    Vectors,
    dimensions_of,
    json_vector,
    normalized,
    probabilities_of,
    usage_of,
    vector_of,
)
from server.config import ServerConfig
from server.http.intake import paced
from server.http.live import LiveRequests, new_rid
from server.reading.chat import Chats
from server.reading.contents import sourced
from server.reading.model_name import served_model
from server.reading.openai_body import MESSAGES, AnyMessage, ChatFields
from server.reading.prompts import check_batch_size, read_prompts
from server.reading.protocol import JSON, Owner, is_int, json_response, read_body
from server.reading.shared_fields import Prompts, Text, TokenIds

NUM_A_PASS = 32  # vectors written as JSON before the streams have their turn


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


class EmbeddingsApi:
    def __init__(self, engine: Engine, config: ServerConfig, live: LiveRequests, chats: Chats) -> None:
        self.engine, self.config, self.chats, self.vectors = engine, config, chats, Vectors(engine, live)

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/embeddings", self.embeddings),
            web.post("/encode", self.encode),
            web.put("/encode", self.encode),
            web.post("/classify", self.classify),
            web.put("/classify", self.classify),
            web.post("/v1/classify", self.classify_with_labels),
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
            states = await self.vectors.run(owner, body, prompts)
        else:
            chats = [await self.chats.rendered(chat, owner) for chat in self._conversations(body)]
            shown = [await self.chats.encode(prompt) for prompt in chats]
            states = await self.vectors.run(owner, body, [ids for ids, _ in shown], [media for _, media in shown])
        data = []
        async for i, state in paced(enumerate(states), NUM_A_PASS):
            vector = normalized(vector_of(state)[:size])
            written = (
                base64.b64encode(vector.tobytes()).decode() if body.encoding_format == "base64" else json_vector(vector)
            )
            data.append({"object": "embedding", "index": i, "embedding": written})
        return json_response({"object": "list", "data": data, "model": model, "usage": usage_of(states)})

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
        states = await self.vectors.run(http_request, body, prompts)
        meta_info, answers = MetaInfo(self.engine.tokenizer), []
        async for state in paced(states, NUM_A_PASS):
            vector = normalized(vector_of(state)) if is_normalized else vector_of(state)
            answers.append(
                {"embedding": json_vector(vector), "meta_info": meta_info.counts(state, 0, state.finish_reason)}
            )
        return json_response(answers if is_list else answers[0])

    # ---- vLLM ----

    async def classify_with_labels(self, http_request: web.Request) -> web.Response:
        self._check_classifier()
        body = await read_body(http_request, ClassifyRequest)
        model = served_model(self.config, body.model)
        prompts = await read_prompts(self.engine, body.input, "input", body.add_special_tokens)
        states = await self.vectors.run(http_request, body, prompts)
        data = []
        async for i, state in paced(enumerate(states)):
            probs = probabilities_of(vector_of(state))
            label = self.engine.model_config.labels[int(probs.argmax())]
            data.append({"index": i, "label": label, "probs": json_vector(probs), "num_classes": len(probs)})
        return json_response(
            {
                "id": f"classify-{new_rid()}", "object": "list", "created": int(time.time()), "model": model,
                "data": data, "usage": usage_of(states),
            }
        )  # fmt: skip

    def _check_classifier(self) -> None:
        if not self.engine.model_config.is_classifier:
            raise InvalidRequest("the model has no classification head", "model")


def _has_shown(given: Any) -> bool:
    return isinstance(given, list) and any(isinstance(one, Shown) for one in given)
