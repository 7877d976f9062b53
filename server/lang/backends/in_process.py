"""The engine in this process, without HTTP."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from engine.declared import convert
from engine.engine import Engine
from engine.errors import EngineError, InvalidRequest
from engine.request import Request, SamplingParams
from engine.state import Delta, Logprobs, RequestState
from server.apis.generate import GeneratePrompt, GenerateRequest, Item
from server.apis.media_data import MediaData
from server.apis.meta_info import MetaInfo
from server.http.bodies import BodyBudget
from server.http.live import make_requests, new_rid
from server.media.limits import MediaLimits
from server.media.reader import MediaReader
from server.reading.prompts import check_token_ids, encode_prompt
from server.reading.templates import find_media_texts

from .base import JSON, BackendError
from .native import NativeBackend

# Fields of /generate; others would be ignored.
KNOWN = frozenset(
    {
        "text", "input_ids", "sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num",
        "token_ids_logprob", "return_text_in_logprobs", "image_data", "video_data",
    }
)  # fmt: skip

MAX_MEDIA_BYTES = 1 << 30  # of pictures that are being read, or belong to requests


class EngineBackend(NativeBackend):
    """Requests to a started engine, whose event loop must be `self.loop`'s."""

    engine: Engine

    def __init__(self, model_path: str) -> None:
        super().__init__()
        self.model_path = model_path

    def attach(self, engine: Engine, chat_template_name: str | None) -> None:
        self.engine = engine
        self._formatters = {flag: MetaInfo(engine.tokenizer, flag) for flag in (False, True)}
        self._media = MediaReader(engine, MediaLimits(), BodyBudget(MAX_MEDIA_BYTES))
        texts = find_media_texts(engine.tokenizer.render_chat, engine.media_kinds)
        self.use_template(chat_template_name, self.model_path, texts)

    async def post(self, body: JSON) -> Any:
        formatter = self._formatters[bool(body.get("return_text_in_logprobs"))]
        requests, is_list = await self._requests(body, is_stream=False)
        deltas = await asyncio.gather(*[self._last(request) for request in requests])
        answers = [formatter.answer(delta) for delta in deltas]
        return answers if is_list else answers[0]

    async def _last(self, request: Request) -> Delta:
        try:
            async for delta in self.engine.generate(RequestState(request)):
                if delta.finish_reason is not None:
                    _check(delta)
                    return delta
        except EngineError as error:
            raise BackendError(str(error), error.status_code) from error
        raise BackendError("the engine gave no answer", 500)

    async def post_stream(self, body: JSON) -> AsyncIterator[JSON]:
        formatter = self._formatters[bool(body.get("return_text_in_logprobs"))]
        [request], _ = await self._requests(body, is_stream=True)
        text, token_ids, logprobs = "", [], Logprobs()
        try:
            async with aclosing(self.engine.generate(RequestState(request))) as deltas:
                async for delta in deltas:
                    _check(delta)
                    text += delta.text
                    token_ids += delta.token_ids
                    meta = formatter.counts(delta.state, len(token_ids), delta.finish_reason)
                    if request.return_logprob:
                        new = delta.logprobs or Logprobs()
                        logprobs.token += new.token
                        logprobs.top += new.top
                        meta |= formatter.logprobs(delta.state, logprobs, len(token_ids))
                    yield {"text": text, "output_ids": token_ids, "meta_info": meta}
        except EngineError as error:
            raise BackendError(str(error), error.status_code) from error

    async def _requests(self, body: JSON, is_stream: bool) -> tuple[list[Request], bool]:
        """Return a request for each prompt and answer, and whether /generate would answer with a list."""
        if unknown := [name for name, value in body.items() if value and name not in KNOWN]:
            raise BackendError(f"the engine in this process does not take {', '.join(unknown)}", 400)
        try:
            prompts, is_list = await self._prompts(body)
            given = body.get("sampling_params") or {}
            per_prompt = given if isinstance(given, list) else [given] * len(prompts)
            if len(per_prompt) != len(prompts):
                raise InvalidRequest(f"sampling_params has {len(per_prompt)} items for {len(prompts)} prompts")
            params = [SamplingParams.from_dict(one, self.engine.model_config.sampling_defaults) for one in per_prompt]
            options = Item(convert({**body, "stream": is_stream}, GenerateRequest), 0, None).options()
        except EngineError as error:
            raise BackendError(str(error), error.status_code) from error
        requests = [
            request
            for prompt, own in zip(prompts, params, strict=True)
            for request in make_requests(
                [new_rid() for _ in range(own.n)], prompt.input_ids, own, replace(options, media=prompt.media)
            )
        ]
        if is_stream and len(requests) != 1:
            raise BackendError(f"the engine in this process streams one answer at a time, not {len(requests)}", 400)
        return requests, is_list or len(requests) > 1

    async def _prompts(self, body: JSON) -> tuple[list[GeneratePrompt], bool]:
        """Return each prompt, and whether the body holds a list of them."""
        text, ids = body.get("text"), body.get("input_ids")
        if (text is None) == (ids is None):
            raise InvalidRequest("give exactly one of text and input_ids")
        if ids is not None:
            is_list = bool(ids) and isinstance(ids[0], list)
            vocab_size = self.engine.model_config.vocab_size
            rows = ids if is_list else [ids]
            return [GeneratePrompt(check_token_ids(row, vocab_size, "input_ids")) for row in rows], is_list
        texts = text if isinstance(text, list) else [text]
        data = convert({name: body.get(name) for name in ("image_data", "video_data")}, MediaData)
        prompts = []
        for i, one in enumerate(texts):
            media = data.media_of(i, len(texts)) if isinstance(text, list) else data.media_of(None)
            if media:
                prompts.append(GeneratePrompt(*await self._media.encode(one, media, "text", add_special_tokens=True)))
            else:
                prompts.append(GeneratePrompt(await encode_prompt(self.engine, one, "text")))
        return prompts, isinstance(text, list)

    async def render(self, messages: Sequence[JSON], add_generation_prompt: bool) -> str:
        try:
            return self.engine.tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)
        except EngineError as error:
            raise BackendError(str(error), error.status_code) from error

    async def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        return await self.engine.encode(text, add_special_tokens)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return self.engine.tokenizer.decode(token_ids, skip_special_tokens=False)

    def get_model_name(self) -> str:
        return self.model_path

    def get_server_info(self) -> JSON:
        async def stats() -> JSON:
            return dataclasses.asdict(self.engine.stats())

        return {"model_path": self.model_path, "internal_states": [self.loop.run(stats())]}

    def flush_cache(self) -> bool:
        async def flush() -> bool:
            return self.engine.flush_cache()

        return self.loop.run(flush())


def _check(delta: Delta) -> None:
    reason = delta.finish_reason
    if reason is not None and reason.type == "abort":
        raise BackendError(reason.message or "the request was aborted", reason.status_code or 500)
