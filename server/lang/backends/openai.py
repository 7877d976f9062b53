"""OpenAI's API, and every server that speaks it, through the `openai` package."""

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import openai

from ..choices import ChoiceLogprobs, ChoicesDecision, ChoicesSamplingMethod, check_select_temperature
from ..expressions import GenParams
from ..templates import ChatTemplate, get_chat_template
from .base import JSON, BackendError, BaseBackend, Prompt

COMPLETION_MODELS = ("gpt-3.5-turbo-instruct", "davinci-002", "babbage-002")


class OpenAI(BaseBackend):
    """`OpenAI("gpt-4o")`. `is_chat_model`: None means that only OpenAI's own completion models are none.

    `client_options` go to the package's client (`api_key`, `base_url`, `azure_endpoint`, ...). `regex` is sent as the
    field that our servers and SGLang's know; OpenAI itself refuses it.
    """

    def __init__(
        self,
        model_name: str,
        is_chat_model: bool | None = None,
        chat_template: ChatTemplate | None = None,
        is_azure: bool = False,
        **client_options: Any,
    ) -> None:
        super().__init__()
        self.model_name = model_name
        self.is_chat = model_name not in COMPLETION_MODELS if is_chat_model is None else is_chat_model
        self.chat_template = chat_template or get_chat_template("default")
        self.connect(is_azure, client_options)
        self.token_usage = {"prompt_tokens": 0, "completion_tokens": 0}

    def connect(self, is_azure: bool, client_options: JSON) -> None:
        client_type = openai.AsyncAzureOpenAI if is_azure else openai.AsyncOpenAI
        self.client = client_type(**client_options)
        self.loop.on_close.append(self.client.close)

    def get_model_name(self) -> str:
        return self.model_name

    async def generate(self, prompt: Prompt, params: GenParams) -> tuple[list[str], list[JSON]]:
        answer = await self.create(prompt, params)
        usage = self._count(answer.usage)
        texts = [(choice.message.content if self.is_chat else choice.text) or "" for choice in answer.choices]
        metas = [{"finish_reason": choice.finish_reason, **usage} for choice in answer.choices]
        return [only(params.dtype, text) for text in texts], metas

    async def generate_stream(self, prompt: Prompt, params: GenParams) -> AsyncIterator[tuple[str, JSON]]:
        refuse(params, ("dtype",), "a stream of OpenAI's API")  # it is found in the whole answer
        async with await self.create(prompt, params, stream=True) as stream:
            async for chunk in stream:
                for choice in chunk.choices:
                    text = choice.delta.content if self.is_chat else choice.text
                    yield text or "", {"finish_reason": choice.finish_reason}

    async def select(
        self, prompt: Prompt, choices: Sequence[str], temperature: float, method: ChoicesSamplingMethod
    ) -> ChoicesDecision:
        """Select by the log-probabilities of echoed prompts, which only completion models report."""
        if self.is_chat:
            return await super().select(prompt, choices, temperature, method)
        if method.requires_unconditional_logprobs:
            raise NotImplementedError("this choices_method measures token ids, which OpenAI's API does not tell")
        check_select_temperature(temperature)
        texts = [prompt.text + choice for choice in choices]
        answer = await self.post(
            self.client.completions.create, {"prompt": texts, "echo": True, "logprobs": 1, "max_tokens": 0}
        )
        self._count(answer.usage)
        rows = [_of_choice(one.logprobs, choice) for one, choice in zip(answer.choices, choices, strict=True)]
        return method(ChoiceLogprobs(choices, [[logprob for logprob, *_ in row] for row in rows], rows))

    async def create(self, prompt: Prompt, params: GenParams, **options: Any) -> Any:
        request = {**self.request_of(params), **options}
        if self.is_chat:
            return await self.post(self.client.chat.completions.create, {"messages": conversation(prompt), **request})
        if prompt.images:
            raise BackendError("OpenAI's completions show no images: this needs is_chat_model=True", 400)
        return await self.post(self.client.completions.create, {"prompt": prompt.text, **request})

    async def post(self, create: Callable[..., Awaitable[Any]], request: JSON) -> Any:
        try:
            return await create(model=self.model_name, **request)
        except openai.APIStatusError as error:
            raise BackendError(error.message, error.status_code) from error
        except openai.APIConnectionError as error:
            raise BackendError(str(error)) from error

    def _count(self, usage: Any) -> JSON:
        """Add to `token_usage`, and return the answer's share as a dict."""
        if usage is None:
            return {}
        for name in self.token_usage:
            self.token_usage[name] += getattr(usage, name)
        share: JSON = usage.model_dump()
        return share

    def request_of(self, params: GenParams) -> JSON:
        """Return the fields that differ from the API's defaults: some models refuse fields whatever their value."""
        refuse(params, ("return_logprob",), "a gen of this backend")
        request: JSON = {"max_tokens": params.max_new_tokens}
        own: JSON = {"min_p": params.min_p, "ignore_eos": params.ignore_eos, "regex": params.regex}
        if self.is_chat and self.model_name.startswith(("o1", "o3", "o4", "gpt-5")):
            request["max_completion_tokens"] = request.pop("max_tokens")
        if params.json_schema is not None:
            schema = {"name": "answer", "schema": json.loads(params.json_schema), "strict": True}
            format_ = {"type": "json_schema", "json_schema": schema}
            (request if self.is_chat else own)["response_format"] = format_  # completions have it at our servers only
        if params.top_k > 0:
            own["top_k"] = params.top_k
        defaults = GenParams()
        for name in ("temperature", "top_p", "frequency_penalty", "presence_penalty", "n"):
            if getattr(params, name) != getattr(defaults, name):
                request[name] = getattr(params, name)
        if params.all_stops:
            request["stop"] = list(params.all_stops)
        if params.stop_token_ids:
            own["stop_token_ids"] = list(params.stop_token_ids)
        if params.stop_regex:
            own["stop_regex"] = list(params.stop_regex)
        if params.min_new_tokens:
            own["min_tokens"] = params.min_new_tokens
        if extra := {name: value for name, value in own.items() if value}:
            request["extra_body"] = extra
        return request


def _of_choice(logprobs: Any, choice: str) -> list[Any]:
    """Return [log-probability, None, text] of each token that reaches into the choice, the end of the echoed text."""
    ends = [*logprobs.text_offset[1:], logprobs.text_offset[-1] + len(logprobs.tokens[-1])]
    start = ends[-1] - len(choice)
    tokens = zip(logprobs.token_logprobs, logprobs.tokens, ends, strict=True)
    return [[logprob, None, text] for logprob, text, end in tokens if end > start and logprob is not None]


def conversation(prompt: Prompt) -> list[JSON]:
    """Return the messages to answer. `RuntimeError` where a program writes what no chat API can continue."""
    if prompt.role != "assistant" or prompt.role_text:
        raise RuntimeError(
            "a chat API answers whole messages: gen must come first in the assistant's message "
            "(with num_api_spec_tokens, one call writes all of it)"
        )
    if prompt.loose_text:
        raise RuntimeError(
            "a chat API is sent messages, and not what a program writes outside of them (use system, user or "
            f"assistant): {prompt.loose_text[:200]!r}"
        )
    return list(prompt.messages)


def refuse(params: GenParams, names: Sequence[str], api: str) -> None:
    """Raise `NotImplementedError` if one of these fields is asked for: better than an answer without it."""
    if given := [name for name in names if getattr(params, name)]:
        raise NotImplementedError(f"{api} has no {', '.join(given)}")


DTYPE_PATTERNS = {int: r"[-+]?\d+", float: r"[-+]?\d*\.?\d+", bool: r"True|False", str: r'"[^"]*"'}


def only(dtype: type | None, text: str) -> str:
    """Find the `dtype` in a free answer, where an API cannot be held to it. `ValueError` if there is none."""
    if dtype is None:
        return text
    found = re.search(DTYPE_PATTERNS[dtype], text)
    if found is None:
        if dtype is str:
            return json.dumps(text.strip())
        raise ValueError(f"the answer holds no {dtype.__name__}: {text!r}")
    return found[0]
