"""Every provider that LiteLLM knows, through the `litellm` package."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import litellm

from ..expressions import GenParams
from ..templates import ChatTemplate
from .base import JSON, Prompt
from .openai import OpenAI, conversation, refuse


class LiteLLM(OpenAI):
    """`LiteLLM("mistral/mistral-large-latest", api_key=...)`: chat models, by LiteLLM's names.

    `options` go to every call (`api_key`, `api_base`, `drop_params`, ...). What a provider lacks, it refuses.
    """

    def __init__(self, model_name: str, chat_template: ChatTemplate | None = None, **options: Any) -> None:
        super().__init__(model_name, True, chat_template, **options)

    def connect(self, _is_azure: bool, client_options: JSON) -> None:
        self.options = client_options  # the package connects with each call

    async def generate_stream(self, prompt: Prompt, params: GenParams) -> AsyncIterator[tuple[str, JSON]]:
        refuse(params, ("dtype",), "a stream of LiteLLM's")
        async with aclosing(await self.create(prompt, params, stream=True)) as stream:
            async for chunk in stream:
                for choice in chunk.choices:
                    yield choice.delta.content or "", {"finish_reason": choice.finish_reason}

    async def create(self, prompt: Prompt, params: GenParams, **options: Any) -> Any:
        request = {"messages": conversation(prompt), **self.request_of(params), **options}
        return await self.post(litellm.acompletion, {**self.options, **request})  # its errors are of openai's kinds
