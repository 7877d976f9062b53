"""SGLang's and vLLM's routes on text alone: into tokens and back, and the parts of an answer."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from aiohttp import web
from msgspec import Meta

from engine.declared import Object
from engine.engine import Engine
from engine.errors import InvalidRequest
from server.http.intake import paced
from server.parser_names import REASONING_ALIASES, TOOL_ALIASES
from server.parsers import AnswerParser
from server.parsers.reasoning import REASONING_FORMATS
from server.parsers.tool_calls import TOOL_FORMATS, ToolCallParser
from server.reading.chat import Chats
from server.reading.openai_body import DetokenizeRequest, TokenizeRequest
from server.reading.prompts import check_token_ids
from server.reading.protocol import JSON, json_response, read_body
from server.reading.shared_fields import described_as
from server.reading.tool_choice import read_tools

T = TypeVar("T")
LONG = 4096  # characters or token ids: more are read off the event loop
MANY_IDS = 1 << 14  # checked in one go, in a millisecond


async def off_loop(count: int, function: Callable[[], T]) -> T:
    """Call `function`, which works on `count` characters or ids; in a thread if they are many."""
    return await asyncio.to_thread(function) if count > LONG else function()


class ParseFunctionCallRequest(Object):
    text: str = ""
    tools: list[Annotated[JSON, Meta(extra_json_schema=described_as("ChatTool"))]] = []
    tool_call_parser: Literal[(*TOOL_FORMATS, *TOOL_ALIASES)] | None = None  # type: ignore[valid-type]


class SeparateReasoningRequest(Object):
    text: str = ""
    reasoning_parser: Literal[(*REASONING_FORMATS, *REASONING_ALIASES)] | None = None  # type: ignore[valid-type]


class TextApi:
    def __init__(self, engine: Engine, chats: Chats) -> None:
        self.engine, self.chats = engine, chats

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/tokenize", self.tokenize),
            web.post("/v1/tokenize", self.tokenize),
            web.get("/tokenizer_info", self.tokenizer_info),
            web.post("/detokenize", self.detokenize),
            web.post("/v1/detokenize", self.detokenize),
            web.post("/parse_function_call", self.parse_function_call),
            web.post("/separate_reasoning", self.separate_reasoning),
        ]

    # ---- tokens ----

    async def tokenize(self, http_request: web.Request) -> web.Response:
        """Return the token ids of `prompt` (or `text`), a string or a list, or of `messages`, their prompt beside."""
        body = await read_body(http_request, TokenizeRequest)
        answer: JSON = {"max_model_len": self.engine.context_length}
        if body.messages:
            prompt = await self.chats.rendered(body, http_request)
            answer["prompt"] = prompt.shown
            tokens: Any
            tokens, _ = await self.chats.encode(prompt, is_prompt=False)
        else:
            given = body.text if body.prompt is None else body.prompt
            if given is None:
                raise body.wrong("text", "a string or a list of strings")
            add_special_tokens = body.add_special_tokens is not False
            texts = given if isinstance(given, list) else [given]
            tokens = [
                await self.engine.encode(text, add_special_tokens, is_prompt=False) async for text in paced(texts)
            ]
            if not isinstance(given, list):
                tokens = tokens[0]
        is_batch = bool(tokens) and isinstance(tokens[0], list)
        answer |= {"tokens": tokens, "count": [len(row) for row in tokens] if is_batch else len(tokens)}
        return json_response(answer)

    async def tokenizer_info(self, _: web.Request) -> web.Response:
        """Return the needs of a client that renders conversations itself (vLLM's route)."""
        tokenizer = self.engine.tokenizer
        template = self.chats.template or tokenizer.chat_template
        return json_response({**tokenizer.named_tokens, "chat_template": template})

    async def detokenize(self, http_request: web.Request) -> web.Response:
        """Return the text, under SGLang's name and vLLM's."""
        if self.chats.config.skip_tokenizer_init:
            raise InvalidRequest("tokens have no text: the server runs with --skip-tokenizer-init", "tokens")
        body = await read_body(http_request, DetokenizeRequest)
        ids, vocab_size, skip = body.tokens, self.engine.model_config.vocab_size, body.skip_special_tokens
        if ids and isinstance(ids[0], list):
            rows = [
                check_token_ids(row, vocab_size, f"tokens[{i}]", may_be_empty=True)
                async for i, row in paced(enumerate(ids))
            ]
            texts = [await self._decode(row, skip) async for row in paced(rows)]
            return json_response({"text": texts, "prompt": texts})
        if ids is None:
            raise body.wrong("tokens", "a list of token ids")
        row = []
        async for start in paced(range(0, len(ids), MANY_IDS)):
            row += check_token_ids(ids[start : start + MANY_IDS], vocab_size, "tokens")
        text = await self._decode(row, skip)
        return json_response({"text": text, "prompt": text})

    async def _decode(self, ids: list[int], skip: bool) -> str:
        return await off_loop(len(ids), lambda: self.engine.tokenizer.decode(ids, skip_special_tokens=skip))

    # ---- parts of an answer ----

    async def parse_function_call(self, http_request: web.Request) -> web.Response:
        """Find the calls of `tools` in `text`. Arguments are JSON text."""
        body = await read_body(http_request, ParseFunctionCallRequest)
        name = body.tool_call_parser or self.chats.tool_call_parser
        if name is None:
            raise body.wrong("tool_call_parser", f"one of {', '.join((*TOOL_FORMATS, *TOOL_ALIASES))}")
        format_ = TOOL_FORMATS[TOOL_ALIASES.get(name, name)]()
        tools, _, _ = read_tools(body.tools)
        parser = AnswerParser(None, ToolCallParser(format_, list(tools.values())))
        parts = await off_loop(len(body.text), lambda: parser.parse(body.text))
        calls = [
            {"tool_index": call.index, "name": call.name, "parameters": call.arguments} for call in parts.tool_calls
        ]
        return json_response({"normal_text": parts.text, "calls": calls})

    async def separate_reasoning(self, http_request: web.Request) -> web.Response:
        """Split `text` into reasoning and the rest."""
        body = await read_body(http_request, SeparateReasoningRequest)
        name = body.reasoning_parser or self.chats.reasoning_parser
        if name is None:
            raise body.wrong("reasoning_parser", f"one of {', '.join((*REASONING_FORMATS, *REASONING_ALIASES))}")
        format_ = REASONING_FORMATS[REASONING_ALIASES.get(name, name)]
        parser = AnswerParser(format_.new_parser(is_inside=format_.is_always), None)
        parts = await off_loop(len(body.text), lambda: parser.parse(body.text))
        return json_response({"reasoning_text": parts.reasoning, "text": parts.text})
