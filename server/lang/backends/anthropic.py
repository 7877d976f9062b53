"""Anthropic's API, through the `anthropic` package."""

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic

from ..expressions import GenParams
from ..templates import get_chat_template
from .base import JSON, BackendError, BaseBackend, Prompt
from .openai import conversation, only, refuse

LACKING = (
    "regex", "min_new_tokens", "stop_token_ids", "stop_regex", "min_p", "frequency_penalty", "presence_penalty",
    "ignore_eos", "return_logprob",
)  # fmt: skip


class Anthropic(BaseBackend):
    """`Anthropic("claude-...")`. `client_options` go to the package's client (`api_key`, `base_url`, ...)."""

    is_chat = True

    def __init__(self, model_name: str, **client_options: Any) -> None:
        super().__init__()
        self.model_name = model_name
        self.chat_template = get_chat_template("claude")
        self.client = anthropic.AsyncAnthropic(**client_options)
        self.loop.on_close.append(self.client.close)

    def get_model_name(self) -> str:
        return self.model_name

    async def generate(self, prompt: Prompt, params: GenParams) -> tuple[list[str], list[JSON]]:
        if params.n > 1:
            raise ValueError(f"Anthropic's API gives one answer, n is {params.n}")
        try:
            answer = await self.client.messages.create(**self._request(prompt, params))
        except anthropic.APIStatusError as error:
            raise BackendError(error.message, error.status_code) from error
        except anthropic.APIConnectionError as error:
            raise BackendError(str(error)) from error
        text = "".join(block.text for block in answer.content if block.type == "text")
        meta = {"finish_reason": answer.stop_reason, **answer.usage.model_dump(exclude_none=True)}
        return [only(params.dtype, text)], [meta]

    async def generate_stream(self, prompt: Prompt, params: GenParams) -> AsyncIterator[tuple[str, JSON]]:
        refuse(params, ("dtype",), "a stream of Anthropic's API")
        try:
            async with self.client.messages.stream(**self._request(prompt, params)) as stream:
                async for text in stream.text_stream:
                    yield text, {"finish_reason": None}
        except anthropic.APIStatusError as error:
            raise BackendError(error.message, error.status_code) from error
        except anthropic.APIConnectionError as error:
            raise BackendError(str(error)) from error

    def _request(self, prompt: Prompt, params: GenParams) -> JSON:
        refuse(params, LACKING, "Anthropic's API")
        messages = conversation(prompt)
        request: JSON = {"model": self.model_name, "max_tokens": params.max_new_tokens}
        if messages and messages[0]["role"] == "system":
            request["system"] = messages.pop(0)["content"]
        request["messages"] = [{**message, "content": _blocks(message["content"])} for message in messages]
        if stops := [stop for stop in params.all_stops if stop.strip()]:  # the API refuses white space alone
            request["stop_sequences"] = stops
        if params.json_schema is not None:
            schema = json.loads(params.json_schema)
            request["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
        defaults = GenParams()  # some models refuse these fields whatever their value, and so does the package's call
        sampling = {name: getattr(params, name) for name in ("temperature", "top_p", "top_k")}
        if given := {name: value for name, value in sampling.items() if value != getattr(defaults, name)}:
            request["extra_body"] = given
        return request


def _blocks(content: Any) -> Any:
    """Return OpenAI's parts of a message as Anthropic's."""
    if isinstance(content, str):
        return content
    blocks = []
    for part in content:
        if part["type"] == "image_url":
            url = part["image_url"]["url"]
            head, is_data, data = url.partition(";base64,")
            source = (
                {"type": "base64", "media_type": head.removeprefix("data:"), "data": data}
                if is_data
                else {"type": "url", "url": url}
            )
            blocks.append({"type": "image", "source": source})
        elif part["type"] == "text":
            blocks.append(part)
        else:
            raise NotImplementedError(f"Anthropic's API takes no {part['type']}")
    return blocks
