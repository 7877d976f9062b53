"""Ollama's API: /api/chat and /api/generate, which stream lines of JSON, and its routes about models."""

import hashlib
from abc import abstractmethod
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import orjson
from aiohttp import web
from msgspec import Meta

from engine.declared import MAX_INT, Int, Object, convert
from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.request import SamplingFields
from engine.state import Delta, FinishReason, Logprobs
from server.apis.answer import failure_of
from server.apis.blocks import (
    REASONING,
    TEXT,
    TOOL_CALL,
    Block,
    BlockAnswer,
    arguments_of,
    respond_in_blocks,
)
from server.apis.openai_answers import spell_tokens
from server.config import ServerConfig
from server.http.live import LiveRequests, new_rid
from server.media.reader import MediaPart
from server.parsers import AnswerDelta
from server.reading.chat import Chats, ChatTurn
from server.reading.chat_messages import chat_call
from server.reading.contents import Content, sourced
from server.reading.error_shapes import ollama_error
from server.reading.model_name import ollama_model
from server.reading.openai_body import ChatRequest, CompletionRequest, TopLogprobs
from server.reading.prompts import encode_prompt
from server.reading.protocol import JSON, REQUEST_FIELDS, json_response, read_body, spelled
from server.reading.sampling import num_alternatives, read_options, read_sampling_params
from server.reading.shared_fields import MAX_OBJECTS, PrefixFields

VERSION = "0.12.6"  # of Ollama, whose API this is: clients refuse a server that is too old for them
NDJSON = {"Content-Type": "application/x-ndjson", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
FOREVER = "2318-01-01T00:00:00Z"  # when the model is unloaded; Ollama's own way to say never

UNSUPPORTED = ("suffix", "template", "context", "n")
SAME_NAMES = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "stop")
OUR_NAMES = {name: f"options.{name}" for name in (*SAME_NAMES, "top_k")} | {
    "max_tokens": "options.num_predict",
    "max_completion_tokens": "options.num_predict",
    "seed": "options.seed",
    "repetition_penalty": "options.repeat_penalty",
    "response_format": "format",
    "reasoning_effort": "think",
    "response_format.json_schema.schema": "format",
    "json_schema": "format",
}
# Options of samplers that this server lacks: the one value that leaves the answer as it is. `typical_p` is Ollama's
# own dead letter, and `repeat_last_n` a window that is always the whole text here, unless it is 0.
NEUTRAL = {"mirostat": 0, "tfs_z": 1}
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


class OllamaModel(Object):
    model: str = ""
    name: Annotated[str, Meta(description="an older name of model")] = ""


class PullRequest(OllamaModel):
    stream: bool = True


class Options(
    Object, like=SamplingFields, names={name: name for name in SAME_NAMES} | {"repeat_penalty": "repetition_penalty"}
):
    if TYPE_CHECKING:
        repeat_penalty: float | None = None
    num_predict: Int | None = None
    repeat_last_n: (
        Annotated[int, Meta(ge=-1, le=MAX_INT, description="0: no penalties; else they count the whole text")] | None
    ) = None
    typical_p: Annotated[float, Meta(ge=0, le=1, description="has no effect, as in Ollama itself")] | None = None
    top_k: Int | None = None
    seed: Int | None = None
    mirostat: Any = None
    tfs_z: Any = None


Images = Annotated[list[str], Meta(description="pictures as base64 text")]


class OllamaFunction(Object, kw_only=True):
    name: str
    arguments: str | JSON | None = None


class OllamaCall(Object, kw_only=True):
    function: OllamaFunction
    id: str = ""


class OllamaMessage(Object, kw_only=True):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    images: Images = []
    thinking: str | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[OllamaCall] = []


class OllamaFields(PrefixFields, unsupported=UNSUPPORTED):
    model: str = ""
    name: Annotated[str, Meta(description="an older name of model")] = ""
    stream: bool = True
    options: Options | None = None
    format: Literal["json", ""] | JSON | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    keep_alive: Any = None
    logprobs: bool = False
    top_logprobs: TopLogprobs = 0


class OllamaChatRequest(OllamaFields, unsupported=("images",)):
    messages: Annotated[list[OllamaMessage], Meta(max_length=MAX_OBJECTS)] = []
    tools: list[JSON] = []


class OllamaGenerateRequest(OllamaFields, unsupported=("tools",)):
    prompt: str = ""
    images: Images = []
    system: str = ""
    raw: bool = False


class OllamaApi:
    def __init__(self, engine: Engine, config: ServerConfig, live: LiveRequests, chats: Chats) -> None:
        self.engine, self.config, self.live, self.chats = engine, config, live, chats
        self.started_at = _now()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/api/chat", self.chat),
            web.post("/api/generate", self.generate),
            web.get("/api/tags", self.tags),
            web.get("/api/ps", self.running),
            web.post("/api/show", self.show),
            web.post("/api/pull", self.pull),
            web.get("/api/version", self.version),
        ]

    async def chat(self, http_request: web.Request) -> web.StreamResponse:
        body = await read_body(http_request, OllamaChatRequest)
        model = ollama_model(self.config, body.model or body.name)
        messages = [_read_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)]
        if not messages:
            return json_response(_loaded(model, body, {"message": {"role": "assistant", "content": ""}}))
        with spelled(OUR_NAMES):
            turn = await self.chats.turn(_chat(body, messages), http_request)
            return await respond_in_blocks(http_request, self.live, ChatLines(turn, model, self.engine), NDJSON)

    async def generate(self, http_request: web.Request) -> web.StreamResponse:
        body = await read_body(http_request, OllamaGenerateRequest)
        model = ollama_model(self.config, body.model or body.name)
        if not body.prompt:
            return json_response(_loaded(model, body, {"response": ""}))
        with spelled(OUR_NAMES):
            turn = await (self._raw_turn(body) if body.raw else self._prompt_turn(http_request, body))
            return await respond_in_blocks(http_request, self.live, GenerateLines(turn, model, self.engine), NDJSON)

    async def _prompt_turn(self, http_request: web.Request, body: OllamaGenerateRequest) -> ChatTurn:
        messages: list[JSON] = [{"role": "user", "content": _content(body.prompt, body.images, "images")}]
        if body.system:
            messages.insert(0, {"role": "system", "content": body.system})
        return await self.chats.turn(_chat(body, messages), http_request)

    async def _raw_turn(self, body: OllamaGenerateRequest) -> ChatTurn:
        """Read a prompt that is the client's own: no template, and nothing to parse in its answer."""
        for name, value in (("system", body.system), ("think", body.think)):
            if value:
                raise InvalidRequest(f"{name} is not supported by this server with raw: true", name)
        chat = convert(chat_body(body) | {"prompt": body.prompt}, CompletionRequest)
        params = read_sampling_params(chat, self.engine, ("max_tokens",), None)
        options = read_options(chat, num_alternatives(body.logprobs, body.top_logprobs))
        media = [MediaPart("image", image, f"images[{i}]") for i, image in enumerate(body.images)]
        if media:
            input_ids, options.media = await self.chats.media.encode(body.prompt, media, "prompt")
        else:
            input_ids = await encode_prompt(self.engine, body.prompt, "prompt")
        options.may_shorten = not self.config.strict_max_tokens
        return ChatTurn(body.prompt, input_ids, params, options, None)

    # ---- about models ----

    async def tags(self, _: web.Request) -> web.Response:
        return json_response({"models": [self._card(name) for name in self.config.model_names]})

    async def running(self, _: web.Request) -> web.Response:
        held = {"expires_at": FOREVER, "size_vram": 0, "context_length": self.engine.context_length}
        return json_response({"models": [self._card(name) | held for name in self.config.model_names]})

    async def show(self, http_request: web.Request) -> web.Response:
        asked = await read_body(http_request, OllamaModel)
        ollama_model(self.config, asked.model or asked.name)
        model = self.engine.model_config
        template = self.chats.template or self.engine.tokenizer.chat_template
        return json_response(
            {
                "modelfile": f"FROM {self.config.model_path}\n",
                "parameters": "\n".join(f"{name} {value}" for name, value in model.sampling_defaults.items()),
                "template": template if isinstance(template, str) else "",
                "modified_at": self.started_at,
                "details": self._details(),
                "model_info": {
                    "general.architecture": model.model_type,
                    f"{model.model_type}.context_length": self.engine.context_length,
                },
                "capabilities": self._capabilities() if self.engine.is_generation else ["embedding"],
            }
        )

    async def pull(self, http_request: web.Request) -> web.Response:
        """Answer as if the model had been fetched: it is there, or unknown."""
        body = await read_body(http_request, PullRequest)
        ollama_model(self.config, body.model or body.name)
        steps: list[JSON] = [{"status": "pulling manifest"}, {"status": "success"}]
        if not body.stream:
            return json_response(steps[-1])
        return web.Response(body=b"".join(orjson.dumps(step) + b"\n" for step in steps), headers=NDJSON)

    async def version(self, _: web.Request) -> web.Response:
        return json_response({"version": VERSION})

    def _capabilities(self) -> list[str]:
        found = {
            "tools": self.chats.supports_tools,
            "thinking": self.chats.reasoning_parser,
            "vision": "image" in self.engine.media_kinds,
        }
        return ["completion", *(name for name, is_there in found.items() if is_there)]

    def _card(self, name: str) -> JSON:
        return {
            "name": name,
            "model": name,
            "modified_at": self.started_at,
            "size": 0,
            "digest": hashlib.sha256(name.encode()).hexdigest(),
            "details": self._details(),
        }

    def _details(self) -> JSON:
        family = self.engine.model_config.model_type
        return {
            "parent_model": "",
            "format": "safetensors",
            "family": family,
            "families": [family],
            "parameter_size": "",
            "quantization_level": "",
        }


# ---- reading ----


def _chat(body: OllamaChatRequest | OllamaGenerateRequest, messages: list[JSON]) -> ChatRequest:
    """Return the same request to chat.completions."""
    wanted = {"logprobs": body.logprobs, "top_logprobs": body.top_logprobs}
    return convert(chat_body(body) | wanted | {"messages": messages}, ChatRequest)


def chat_body(body: OllamaChatRequest | OllamaGenerateRequest) -> JSON:
    """Return what requests to chat.completions and to completions have alike."""
    chat = body.given(REQUEST_FIELDS) | {"stream": body.stream}
    if body.options is not None:
        chat |= _read_options(body.options)
    if isinstance(body, OllamaChatRequest) and body.tools:
        chat["tools"] = body.tools
    if body.format:
        schema = {"name": "answer", "schema": body.format}
        is_any = body.format == "json"
        chat["response_format"] = {"type": "json_object"} if is_any else {"type": "json_schema", "json_schema": schema}
    if body.think is not None:
        if isinstance(body.think, str):
            chat["reasoning_effort"] = body.think
        is_on = bool(body.think)
        chat["chat_template_kwargs"] = {"enable_thinking": is_on, "thinking": is_on}
    return chat


def _read_options(options: Options) -> JSON:
    """Read options. Those about hardware are ignored, `num_ctx` too: the context is always the model's."""
    for name, value in NEUTRAL.items():
        if getattr(options, name) not in (None, value):
            raise options.wrong(name, f"{value} (this server has no such sampler)", "options")
    read = options.given(SAME_NAMES)
    if options.num_predict is not None and options.num_predict >= 0:
        read["max_tokens"] = options.num_predict
    if options.top_k is not None:
        read["top_k"] = options.top_k or -1  # 0: off
    if options.seed is not None and options.seed >= 0:
        read["seed"] = options.seed
    if options.repeat_penalty is not None:
        read["repetition_penalty"] = options.repeat_penalty
    if options.repeat_last_n == 0:
        read = {name: value for name, value in read.items() if name not in PENALTIES}
    return read


def _content(text: str, images: list[str], path: str) -> Content:
    """Return a message's content: pictures stand before the text, as in Ollama."""
    if not images:
        return text
    parts: list[JSON] = [sourced(image, f"{path}[{i}]") for i, image in enumerate(images)]
    return [*parts, {"type": "text", "text": text}]


def _read_message(message: OllamaMessage, path: str) -> JSON:
    read: JSON = {"role": message.role, "content": _content(message.content, message.images, f"{path}.images")}
    if message.thinking is not None:
        read["reasoning_content"] = message.thinking
    if message.tool_name is not None:
        read["name"] = message.tool_name
    if message.tool_call_id is not None:
        read["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        read["tool_calls"] = [_read_call(call) for call in message.tool_calls]
    return read


def _read_call(call: OllamaCall) -> JSON:
    given = call.function.arguments
    if not isinstance(given, str):  # as OpenAI's clients send them
        given = msgspec.json.encode(given or {}).decode()
    return chat_call(call.id, call.function.name, given)


# ---- writing ----


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _loaded(model: str, body: OllamaFields, empty: JSON) -> JSON:
    """Answer a client that only asks for the model to be loaded, or not to be kept: it stays."""
    reason = "unload" if body.keep_alive in (0, "0", "0s", "0m", "0h") else "load"
    return {"model": model, "created_at": _now(), **empty, "done": True, "done_reason": reason}


class Lines(BlockAnswer):
    """JSON lines. A tool call makes one, when it is complete.

    Log-probabilities come with the next line, of tokens whose text is held back or is no text, too.
    """

    def __init__(self, turn: ChatTurn, model: str, engine: Engine) -> None:
        super().__init__(new_rid(), turn)
        self.model, self._tokenizer = model, engine.tokenizer
        self._logprobs: list[JSON] = []  # which no line has brought yet

    @abstractmethod
    def said(self, text: str, thinking: str, calls: list[JSON]) -> JSON:
        """Return the endpoint's fields for what is new."""

    def text(self, delta: Delta) -> bytes:
        self._hold_logprobs(delta.logprobs)
        return super().text(delta)

    def parts(self, parts: AnswerDelta, logprobs: Logprobs | None) -> bytes:
        self._hold_logprobs(logprobs)
        return super().parts(parts, logprobs)

    def whole(self, delta: Delta) -> JSON:
        self._hold_logprobs(delta.logprobs)
        return super().whole(delta)

    def _hold_logprobs(self, logprobs: Logprobs | None) -> None:
        if logprobs is not None:
            self._logprobs += spell_tokens(logprobs, self._tokenizer, self._tokenizer.token_text)

    def ping(self) -> bytes:
        return self._line(self.said("", "", []), done=False)

    def grow(self, block: Block, piece: str) -> bytes:
        if block.kind == TOOL_CALL:
            return b""
        is_text = block.kind == TEXT
        return self._line(self.said(piece if is_text else "", "" if is_text else piece, []), done=False)

    def stop(self, block: Block) -> bytes:
        return self._line(self.said("", "", [_call(block)]), done=False) if block.kind == TOOL_CALL else b""

    def close(self, reason: FinishReason) -> bytes:
        return self._line(self.said("", "", []), done=True, **self._ending(reason))

    def fail(self, reason: FinishReason) -> bytes:
        return orjson.dumps(ollama_error(*failure_of(reason))) + b"\n"

    def body(self, reason: FinishReason) -> JSON:
        def all_of(kind: str) -> str:
            return "".join(block.content for block in self.blocks.all if block.kind == kind)

        calls = [_call(block) for block in self.blocks.all if block.kind == TOOL_CALL]
        return self._value(self.said(all_of(TEXT), all_of(REASONING), calls), done=True, **self._ending(reason))

    def _line(self, said: JSON, **more: Any) -> bytes:
        return orjson.dumps(self._value(said, **more)) + b"\n"

    def _value(self, said: JSON, **more: Any) -> JSON:
        if self._logprobs:
            more["logprobs"], self._logprobs = self._logprobs, []
        return {"model": self.model, "created_at": _now(), **said, **more}

    def _ending(self, reason: FinishReason) -> JSON:
        """Return the last line's fields. Durations are in nanoseconds."""
        state, times = self.state, self.state.times
        return {
            "done_reason": reason.type,
            "total_duration": _nanoseconds(times.arrived, times.finished),
            "load_duration": 0,
            "prompt_eval_count": state.prompt_len,
            "prompt_eval_duration": _nanoseconds(times.scheduled, times.first_token),
            "eval_count": self.num_output_tokens,
            "eval_duration": _nanoseconds(times.first_token, times.finished),
        }


class ChatLines(Lines):
    def said(self, text: str, thinking: str, calls: list[JSON]) -> JSON:
        message: JSON = {"role": "assistant", "content": text}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = calls
        return {"message": message}


class GenerateLines(Lines):
    def said(self, text: str, thinking: str, _calls: list[JSON]) -> JSON:
        return {"response": text, **({"thinking": thinking} if thinking else {})}


def _call(block: Block) -> JSON:
    return {"id": block.call_id, "function": {"name": block.name, "arguments": arguments_of(block)}}


def _nanoseconds(begin: float, end: float) -> int:
    """Return the time from `begin` to `end`; 0 where one of the two never happened."""
    return int((end - begin) * 1e9) if 0.0 < begin <= end else 0
