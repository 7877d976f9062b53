"""Expressions, executed one after the other.

What they write goes into the transcript; `gen` and `select` ask the backend.
"""

import asyncio
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from .backends.base import JSON, BaseBackend
from .expressions import (
    REASONING_SUFFIX,
    Expr,
    Gen,
    GenParams,
    Image,
    RoleBegin,
    RoleEnd,
    Select,
    SeparateReasoning,
    Text,
    VarScopeBegin,
    VarScopeEnd,
    Video,
    leaves,
    names_of,
)
from .media import Media, load_image, load_video
from .prefix import BatchPrefix
from .reasoning import split_reasoning
from .speculation import Recording, WrittenAhead
from .transcript import Transcript

Futures = dict[str, "Future[Any]"]  # of the variables that an expression writes


@dataclass(slots=True)
class Stream:
    """A variable that is, or was, written piece by piece."""

    text: str = ""
    meta_info: Any = None
    is_done: bool = False


class News:
    """Wakes the readers of pieces when something has been written."""

    def __init__(self, is_stream: bool) -> None:
        self._is_stream = is_stream  # nobody else waits for pieces
        self.event = asyncio.Event()

    def notify(self) -> None:
        if self._is_stream:
            event, self.event = self.event, asyncio.Event()
            event.set()


class Interpreter:
    """Executes the expressions of one state, on the backend's loop."""

    def __init__(
        self,
        backend: BaseBackend,
        defaults: GenParams,
        news: News,
        *,
        is_stream: bool = False,
        num_api_spec_tokens: int | None = None,
        batch_prefix: BatchPrefix | None = None,
    ) -> None:
        """`num_api_spec_tokens`: asked of a call that writes ahead; None: no call does."""
        self.backend, self.defaults, self.is_stream = backend, defaults, is_stream
        self.transcript = Transcript()
        self.streams: dict[str, Stream] = {}
        self.recording = Recording()
        self._ahead = WrittenAhead()
        self._num_api_spec_tokens = num_api_spec_tokens
        self._batch_prefix = batch_prefix
        self._news = news

    async def execute(self, item: Expr, futures: Futures) -> None:
        written = self.transcript
        match item:
            case Text(text):
                self.add_text(text)
            case Gen():
                await self._generate(item, futures)
            case Select(name, choices, temperature, method):
                await self.before_request()
                decision = await self.backend.select(written, choices, temperature, method)
                self._append(decision.decision)
                self._resolve(name, decision.decision, decision.meta_info, futures)
            case RoleBegin(role):
                written.check_no_role(role)
                self._append(await self.backend.chat_template.begin(written.roles, role))
                written.begin_role(role)
            case RoleEnd(role):
                await self._end_role(role)
            case Image(source):
                self._add_media(await asyncio.to_thread(load_image, source))
            case Video(path, num_frames):
                self._add_media(await asyncio.to_thread(load_video, path, num_frames))
            case VarScopeBegin(name):
                written.begin_scope(name)
            case VarScopeEnd(name):
                self._resolve(name, written.end_scope(name), {}, futures)
            case SeparateReasoning(expr, model_type):
                await self._separate_reasoning(expr, model_type, futures)
            case _:
                raise TypeError(f"{type(item).__name__} cannot be executed")

    def add_text(self, text: str) -> None:
        """Append a text of the program, as opposed to one of its chat template."""
        if self.transcript.role is None and self.backend.is_chat:
            self.transcript.loose_text += text.strip()
        self._append(text)

    async def before_request(self) -> None:
        """Wait for the batch's common prefix, where there is one, before the server is asked."""
        written = self.transcript
        if self._batch_prefix is not None:
            await self._batch_prefix.arrive(self, "" if written.images else written.text)
        written.num_committed = len(written.text)

    async def before_fork(self, num_alive: int) -> None:
        """Have the server cache a text from which `num_alive` children go on, if it is new to the server."""
        written = self.transcript
        if num_alive > 1 and len(written.text) > written.num_committed and self.backend.caches_prefixes:
            await self.before_request()
            await self.backend.commit(written.text, written.images)
        elif self._batch_prefix is not None:  # the children's prompts start with this one
            await self._batch_prefix.arrive(self, written.text)

    def _append(self, text: str) -> None:
        if self._records_chat:
            self.recording.add(Text(text))
            return
        self._ahead.skip(text)
        self._write(text)

    def _write(self, text: str) -> None:
        self.transcript.text += text
        self._news.notify()

    def _resolve(self, name: str | None, value: Any, meta_info: Any, futures: Futures) -> None:
        if name is None:
            return
        self.transcript.variables[name], self.transcript.meta_info[name] = value, meta_info
        if (future := futures.get(name)) is not None and not future.done():
            future.set_result(value)
        self._news.notify()

    # ---- gen ----

    def _params(self, overrides: JSON) -> GenParams:
        params = self.defaults.override(overrides)
        stops = self.backend.chat_template.stop_str
        if self.transcript.role is None or self.backend.is_chat or not stops:
            return params
        return params.override({"stop": (*params.stop, *stops)})

    async def _generate(self, expr: Gen, futures: Futures) -> None:
        params = self._params(expr.overrides)
        if self._records_chat:
            self.recording.add(expr, params.all_stops, futures.get(expr.name) if expr.name is not None else None)
            return
        await self.before_request()
        written = self.transcript
        if self.is_stream and params.n == 1:
            return await self._generate_stream(expr.name, params, futures)
        if self._num_api_spec_tokens is not None and params.n == 1:
            values, metas = await self._ahead.generate(self.backend, written, params, self._num_api_spec_tokens)
        else:
            values, metas = await self.backend.generate(written, params)
        self._write(values[0])
        written.num_committed = len(written.text)  # all but its last token
        is_one = params.n == 1
        self._resolve(expr.name, values[0] if is_one else values, metas[0] if is_one else metas, futures)

    async def _generate_stream(self, name: str | None, params: GenParams, futures: Futures) -> None:
        stream = Stream()
        if name is not None:
            self.streams[name] = stream
        async with aclosing(self.backend.generate_stream(self.transcript, params)) as pieces:  # type: ignore[type-var]
            async for piece, stream.meta_info in pieces:
                stream.text += piece
                self._write(piece)
        stream.is_done = True
        self._resolve(name, stream.text, stream.meta_info, futures)

    @property
    def _records_chat(self) -> bool:
        """True inside an assistant's message that is generated in one call, at its end."""
        return self._num_api_spec_tokens is not None and self.backend.is_chat and self.transcript.role == "assistant"

    async def _generate_recorded(self) -> None:
        recording, self.recording = self.recording, Recording()
        params = self._params({"max_new_tokens": self._num_api_spec_tokens})
        for part, text, meta, future in await recording.generate(self.backend, self.transcript, params):
            self._write(text)
            if isinstance(part, Gen):
                names = {part.name: future} if part.name is not None and future is not None else {}
                self._resolve(part.name, text, meta, names)

    # ---- messages ----

    async def _end_role(self, role: str) -> None:
        written = self.transcript
        written.check_role(role)
        if self.recording.parts:
            await self._generate_recorded()
        written.end_role(role)
        self._append(await self.backend.chat_template.end(written.roles))

    def _add_media(self, media: Media) -> None:
        written = self.transcript
        written.add_media(media)
        if self.backend.is_chat:
            if written.role is None:
                written.loose_text += f"<{media.kind}>"
        else:
            template = self.backend.chat_template
            token = template.video_token if media.kind == "video" else template.image_token
            self._append(token)
            if written.role is not None and written.role_text == token:
                written.move_role_start()

    async def _separate_reasoning(self, expr: Expr, model_type: str | None, futures: Futures) -> None:
        inner: Futures = {}  # their values are not known before they are separated
        written, start = self.transcript, len(self.transcript.text)
        for part in leaves(expr):
            await self.execute(part, futures if self.is_stream else inner)
        for name in [name for part in leaves(expr) for name in names_of(part)]:
            reasoning = None
            if not self.is_stream:
                whole = written.variables[name]
                reasoning, content = split_reasoning(whole, model_type)
                written.text = written.text[:start] + written.text[start:].replace(whole, content, 1)
                written.num_committed = start
                self._resolve(name, content, written.meta_info[name], futures)
            self._resolve(name + REASONING_SUFFIX, reasoning, {}, futures)
