"""Common base of the two ways to our own engine: requests in the shape of /generate, and `select`."""

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from ..choices import ChoiceLogprobs, ChoicesDecision, ChoicesSamplingMethod, check_select_temperature
from ..expressions import GenParams
from ..media import Media, media_data
from ..templates import ServedTemplate, TemplateRefused, get_chat_template, get_chat_template_by_model_path
from .base import JSON, BackendError, BaseBackend, Prompt


class NativeBackend(BaseBackend):
    caches_prefixes = True

    def use_template(self, name: str | None, model_path: str, media_texts: Mapping[str, str] | None = None) -> None:
        """Use the template named, or named by a registered rule; else the served model's.

        media_texts: what that one writes for a picture or video, by kind.
        """
        named = get_chat_template(name) if name is not None else get_chat_template_by_model_path(model_path)
        self.chat_template = named or ServedTemplate(self._render_or_refuse, self._bos_text, media_texts)
        self._bos: str | None = None

    # ---- what the two differ in ----

    @abstractmethod
    async def post(self, body: JSON) -> Any:
        """Return /generate's answer to `body`: an object, or a list if it holds a list of prompts."""

    @abstractmethod
    def post_stream(self, body: JSON) -> AsyncIterator[JSON]:
        """Yield /generate's events; their text is cumulative."""

    @abstractmethod
    async def render(self, messages: Sequence[JSON], add_generation_prompt: bool) -> str:
        """Return the served model's prompt for `messages`. `BackendError` 400 if its template refuses them."""

    @abstractmethod
    async def tokenize(self, text: str, add_special_tokens: bool) -> list[int]: ...

    @abstractmethod
    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""

    # ---- what programs ask for ----

    async def generate(self, prompt: Prompt, params: GenParams) -> tuple[list[str], list[JSON]]:
        answer = await self.post(_body(prompt.text, prompt.images, params))
        answers = answer if isinstance(answer, list) else [answer]
        return [one["text"] for one in answers], [one["meta_info"] for one in answers]

    async def generate_stream(self, prompt: Prompt, params: GenParams) -> AsyncIterator[tuple[str, JSON]]:
        num_chars = 0
        async for event in self.post_stream(_body(prompt.text, prompt.images, params)):
            yield event["text"][num_chars:], event["meta_info"]
            num_chars = len(event["text"])

    async def commit(self, text: str, images: Sequence[Media] = ()) -> None:
        await self._read(text, images)

    async def _read(self, text: str, images: Sequence[Media]) -> int:
        """Have the server cache `text`, and return its number of tokens."""
        answer = await self.post(_body(text, images, GenParams(max_new_tokens=0, temperature=0.0)))
        return int(answer["meta_info"]["prompt_tokens"])

    async def select(
        self, prompt: Prompt, choices: Sequence[str], temperature: float, method: ChoicesSamplingMethod
    ) -> ChoicesDecision:
        """Choose by the choices' log-probabilities, with token healing.

        A choice may change how the prompt's last token is read (" " + "a" is " a" to many models), so the choices are
        measured from that token on, unless it stays as it is.
        """
        check_select_temperature(temperature)
        num_prompt_tokens = await self._read(prompt.text, prompt.images)
        answers = await self._logprobs(
            {"text": [prompt.text + choice for choice in choices]}, prompt.images, max(num_prompt_tokens - 2, 0)
        )
        entries = [_of_choice(answer["meta_info"]["input_token_logprobs"], prompt.text) for answer in answers]
        without = None
        if method.requires_unconditional_logprobs:
            ids = [[token_id for _, token_id, _ in row] for row in entries]
            alone = await self._logprobs({"input_ids": ids}, (), 0)
            without = [
                [logprob or 0.0 for logprob, *_ in answer["meta_info"]["input_token_logprobs"]] for answer in alone
            ]
        return method(
            ChoiceLogprobs(
                choices,
                [[logprob for logprob, *_ in row] for row in entries],
                entries,
                [answer["meta_info"]["output_token_logprobs"] for answer in answers],
                without,
            )
        )

    async def _logprobs(self, prompts: JSON, images: Sequence[Media], start: int) -> list[JSON]:
        """Return an answer for each of `prompts`, with the log-probabilities of its tokens from `start` on."""
        count = len(next(iter(prompts.values())))
        answers: list[JSON] = await self.post(
            {
                **prompts,
                "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
                "return_logprob": True,
                "return_text_in_logprobs": True,
                "logprob_start_len": start,
                **{name: [sources] * count for name, sources in media_data(images).items()},
            }
        )
        return answers

    # ---- the served chat template ----

    async def _render_or_refuse(self, messages: Sequence[JSON], add_generation_prompt: bool) -> str:
        try:
            return await self.render(messages, add_generation_prompt)
        except BackendError as error:
            if error.status != 400:
                raise
            hint = "; a backend's chat_template_name chooses another template"
            raise TemplateRefused(f"{error}{hint}") from error

    async def _bos_text(self) -> str:
        """Return the text that the server's tokenizer puts before any other."""
        if self._bos is None:
            with_special, plain = await asyncio.gather(self.tokenize("a", True), self.tokenize("a", False))
            num_before = next((i for i in range(len(with_special)) if with_special[i:][: len(plain)] == plain), 0)
            self._bos = await self.detokenize(with_special[:num_before]) if num_before else ""
        return self._bos


def _of_choice(entries: Sequence[Any], prompt: str) -> list[Any]:
    """Return the tokens that belong to a choice; the first of `entries` is the last but one of the prompt's."""
    known = [entry for entry in entries if entry[0] is not None]
    return known[1:] if len(known) > 1 and prompt.endswith(known[0][2]) else known


def _body(text: str, images: Sequence[Media], params: GenParams) -> JSON:
    sampling: JSON = {
        "max_new_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "frequency_penalty": params.frequency_penalty,
        "presence_penalty": params.presence_penalty,
        "ignore_eos": params.ignore_eos,
    }
    rare: JSON = {
        "min_new_tokens": params.min_new_tokens,
        "stop": list(params.all_stops),
        "stop_token_ids": list(params.stop_token_ids),
        "stop_regex": list(params.stop_regex),
        "regex": params.pattern,
        "json_schema": params.json_schema,
    }
    sampling |= {name: value for name, value in rare.items() if value}
    if params.n > 1:
        sampling["n"] = params.n
    body: JSON = {"text": text, "sampling_params": sampling}
    options = {
        "return_logprob": params.return_logprob,
        "logprob_start_len": params.logprob_start_len,
        "top_logprobs_num": params.top_logprobs_num,
        "return_text_in_logprobs": params.return_text_in_logprobs,
    }
    body |= {name: value for name, value in options.items() if value is not None}
    return body | media_data(images)
