"""Google's Gemini API and Vertex AI, through the `google-genai` package."""

import base64
import json
from collections.abc import AsyncIterator
from typing import Any

from google import genai
from google.genai import errors, types

from ..expressions import GenParams
from ..templates import get_chat_template
from .base import JSON, BackendError, BaseBackend, Prompt
from .openai import conversation, only, refuse

LACKING = ("regex", "min_new_tokens", "stop_token_ids", "stop_regex", "min_p", "ignore_eos", "return_logprob")
ROLES = {"user": "user", "assistant": "model"}


class Gemini(BaseBackend):
    """`Gemini("gemini-2.5-flash", api_key=...)`. `client_options` go to the package's client."""

    is_chat = True

    def __init__(
        self, model_name: str, safety_settings: list[types.SafetySetting] | None = None, **client_options: Any
    ) -> None:
        super().__init__()
        self.model_name, self.safety_settings = model_name, safety_settings
        self.chat_template = get_chat_template("default")
        self.client = genai.Client(**client_options)
        self.loop.on_close.append(self.client.aio.aclose)

    def get_model_name(self) -> str:
        return self.model_name

    async def generate(self, prompt: Prompt, params: GenParams) -> tuple[list[str], list[JSON]]:
        contents, config = self._request(prompt, params)
        try:
            answer = await self.client.aio.models.generate_content(
                model=self.model_name, contents=contents, config=config
            )
        except errors.APIError as error:
            raise BackendError(str(error), error.code) from error
        candidates = answer.candidates or []
        if not candidates:
            raise BackendError("the model gave no answer; its safety settings may have kept it back")
        usage = answer.usage_metadata.model_dump(exclude_none=True) if answer.usage_metadata else {}
        return (
            [only(params.dtype, _text(candidate)) for candidate in candidates],
            [{"finish_reason": candidate.finish_reason, **usage} for candidate in candidates],
        )

    async def generate_stream(self, prompt: Prompt, params: GenParams) -> AsyncIterator[tuple[str, JSON]]:
        refuse(params, ("dtype",), "a stream of Gemini's API")
        contents, config = self._request(prompt, params)
        try:
            stream = await self.client.aio.models.generate_content_stream(
                model=self.model_name, contents=contents, config=config
            )
            async for chunk in stream:
                for candidate in chunk.candidates or []:
                    yield _text(candidate), {"finish_reason": candidate.finish_reason}
        except errors.APIError as error:
            raise BackendError(str(error), error.code) from error

    def _request(self, prompt: Prompt, params: GenParams) -> tuple[list[Any], types.GenerateContentConfig]:
        refuse(params, LACKING, "Gemini's API")
        messages = conversation(prompt)
        config: JSON = {
            "max_output_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "frequency_penalty": params.frequency_penalty or None,
            "presence_penalty": params.presence_penalty or None,
            "safety_settings": self.safety_settings,
        }
        if messages and messages[0]["role"] == "system":
            config["system_instruction"] = messages.pop(0)["content"]
        if params.top_k > 0:
            config["top_k"] = params.top_k
        if params.n > 1:
            config["candidate_count"] = params.n
        if params.all_stops:
            config["stop_sequences"] = list(params.all_stops)
        if params.json_schema is not None:
            config |= {
                "response_mime_type": "application/json",
                "response_json_schema": json.loads(params.json_schema),
            }
        contents = [types.Content(role=ROLES[m["role"]], parts=_parts(m["content"])) for m in messages]
        return contents, types.GenerateContentConfig(**config)


class VertexAI(Gemini):
    """Gemini in a project of Google Cloud: `VertexAI("gemini-2.5-flash", project=..., location=...)`."""

    def __init__(
        self, model_name: str, safety_settings: list[types.SafetySetting] | None = None, **client_options: Any
    ) -> None:
        super().__init__(model_name, safety_settings, vertexai=True, **client_options)


def _parts(content: Any) -> list[types.Part]:
    """Return OpenAI's parts of a message as Gemini's."""
    if isinstance(content, str):
        return [types.Part(text=content)]
    parts = []
    for part in content:
        if part["type"] == "text":
            parts.append(types.Part(text=part["text"]))
            continue
        if part["type"] != "image_url":
            raise NotImplementedError(f"Gemini's API is not sent {part['type']} by this backend")
        head, is_data, data = part["image_url"]["url"].partition(";base64,")
        parts.append(
            types.Part.from_bytes(data=base64.b64decode(data), mime_type=head.removeprefix("data:"))
            if is_data
            else types.Part.from_uri(file_uri=head)
        )
    return parts


def _text(candidate: types.Candidate) -> str:
    content = candidate.content
    return "".join(part.text or "" for part in (content.parts or [] if content else []) if not part.thought)
