"""OpenAI's Responses API: /v1/responses, with answers that are kept to be continued or fetched later."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial

from aiohttp import web

from engine.declared import convert
from engine.errors import EngineError, InvalidRequest
from server.apis.blocks import respond_in_blocks
from server.apis.files import page_of
from server.apis.kept_images import KeptImages
from server.apis.response_answer import ResponseAnswer, ScoredResponseAnswer
from server.apis.response_store import ResponseStore, StoredResponse
from server.config import ServerConfig
from server.http.event_log import EventLog
from server.http.live import LiveRequests, new_rid
from server.http.owners import may_find, owner_of
from server.reading.chat import Chats
from server.reading.grammars import names_beside_format
from server.reading.left_out import LeftOut, LeftOutBook
from server.reading.model_name import served_model
from server.reading.openai_body import ChatRequest
from server.reading.protocol import JSON, Owner, json_response, read_body, spelled
from server.reading.responses import chat_body, configure, echo_of, input_items, read_input, resolved, written
from server.reading.responses_body import ResponsesRequest
from server.reading.responses_tools import Tools

OUR_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema.schema": "text.format.schema",
    "response_format.schema": "text.format.schema",
    "json_schema": "text.format.schema",
    "tools[].function": "tools[]",
    "tools[].function.name": "tools[].name",
    "tools[].function.parameters": "tools[].parameters",
    "reasoning_effort": "reasoning.effort",
    "messages": "input",
}
RID_LEN = len(new_rid())


class ResponseNotFound(EngineError):
    status_code = 404
    code = "response_not_found"
    field = "response_id"


class ItemNotFound(EngineError):
    status_code = 404
    code = "item_not_found"

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class ResponsesApi:
    def __init__(self, config: ServerConfig, live: LiveRequests, chats: Chats, left_out: LeftOutBook) -> None:
        self.config, self.live, self.chats, self.left_out = config, live, chats, left_out
        self.store, self.images = ResponseStore(), KeptImages()
        self._background: dict[str, BackgroundResponse] = {}  # those that run

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/responses", self.create),
            web.post("/v1/responses/input_tokens", self.count_tokens),
            web.get("/v1/responses/{response_id}", self.retrieve),
            web.get("/v1/responses/{response_id}/input_items", self.list_input),
            web.delete("/v1/responses/{response_id}", self.delete),
            web.post("/v1/responses/{response_id}/cancel", self.cancel),
        ]

    async def running(self, _: web.Application) -> AsyncIterator[None]:
        """End background responses with the server: a cleanup context."""
        yield
        tasks = [background.task for background in self._background.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def create(self, http_request: web.Request) -> web.StreamResponse:
        return await self.respond(http_request, await read_body(http_request, ResponsesRequest))

    async def respond(self, caller: Owner, body: ResponsesRequest) -> web.StreamResponse:
        """Answer `body`. Only an HTTP request may ask for a stream, or for an answer in the background."""
        model, is_background = served_model(self.config, body.model), body.background
        if is_background and not body.store:
            raise InvalidRequest("background needs store: true", "background")
        answer = await self._answer(caller, body, model)
        with spelled(answer.names):
            if not is_background:
                return await respond_in_blocks(caller, self.live, answer)
            assert isinstance(caller, web.Request)
            background = BackgroundResponse(owner_of(caller), answer, self.store if body.stream else None)
            await background.begin(caller, self.live)
        self._background[background.id] = background
        background.task.add_done_callback(lambda _: self._background.pop(background.id))
        return await background.log.send(caller) if body.stream else json_response(background.state())

    async def _answer(self, caller: Owner, body: ResponsesRequest, model: str) -> "ResponseAnswer":
        """Read `body`, whose fields the answer does not hold but for what is stored at its end."""
        owner, left_out = owner_of(caller), LeftOut()
        items_of = functools.cache(lambda response_id: self._items(response_id, caller))
        given = resolved(body.input, lambda item_id, field: _found_item(items_of, item_id, field))
        items = given if isinstance(given, list) else []
        configure(body, items)
        tools = Tools(body.tools, left_out, items)
        sees_images = "image" in self.chats.engine.media_kinds
        messages = self._earlier_messages(body, caller) + read_input(given, left_out, sees_images=sees_images)
        names = OUR_NAMES | tools.names | names_beside_format(body)
        with spelled(names):
            chat = chat_body(body, messages, tools, left_out)
            self.left_out.enter(caller, left_out)
            turn = await self.chats.turn(convert(chat, ChatRequest), caller)
            turn.options.stream |= body.background
            echo = echo_of(body, model)
            answer = (
                ScoredResponseAnswer(turn, echo, tools.offered, names, self.chats.engine.tokenizer)
                if turn.options.return_logprob
                else ResponseAnswer(turn, echo, tools.offered, names)
            )
        if body.store:
            kept = await self.images.kept(owner, messages)
            if isinstance(given, list):
                given = await self.images.kept(owner, given)
            stored = written(input_items(given, answer.state.rid))
            answer.on_end = lambda response: self.store.put(owner, response, [*kept, answer.message()], stored)
        return answer

    async def count_tokens(self, http_request: web.Request) -> web.Response:
        """Count the tokens of the prompt that the same body to /v1/responses makes."""
        body = await read_body(http_request, ResponsesRequest)
        answer = await self._answer(http_request, body, served_model(self.config, body.model))
        return json_response({"object": "response.input_tokens", "input_tokens": len(answer.turn.input_ids)})

    async def retrieve(self, http_request: web.Request) -> web.StreamResponse:
        """Return a response; with `?stream=true` its events, those after number `starting_after` if that is given."""
        query, response_id = http_request.query, http_request.match_info["response_id"]
        background = self._find_background(response_id, http_request)
        stream = query.get("stream", "false").lower()  # Python's own spelling of a boolean is no rarity
        if stream not in ("true", "false"):
            raise InvalidRequest(f"stream must be true or false, got {stream[:20]!r}", "stream")
        if stream == "false":
            return json_response(background.state() if background else self._find(response_id, http_request).response)
        if background is not None:
            log = background.log if background.keeps_events else None
        else:
            self._find(response_id, http_request)
            events = self.store.events(response_id)
            log = None if events is None else EventLog(events)
        if log is None:
            raise InvalidRequest("stream: only a response made with background and stream can be streamed", "stream")
        return await log.send(http_request, _first_event(query.get("starting_after")))

    async def list_input(self, http_request: web.Request) -> web.Response:
        """Return a page of the items that a response answered: `limit` of them `after` one, the newest first."""
        response_id = http_request.match_info["response_id"]
        if self._find_background(response_id, http_request) is not None:
            raise InvalidRequest("the input of a response that still runs cannot be listed", "response_id")
        stored = self._find(response_id, http_request)
        order = http_request.query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise InvalidRequest(f"order must be 'asc' or 'desc', got {order[:32]!r}", "order")
        return json_response(page_of(stored.items[:: 1 if order == "asc" else -1], http_request, default_limit=20))

    async def cancel(self, http_request: web.Request) -> web.Response:
        """Cancel a response and return it as it ended. One that had ended before stays as it was."""
        response = (await self._end(http_request)).response
        if not response["background"]:
            raise InvalidRequest("only a response made with background: true can be cancelled", "response_id")
        return json_response(response)

    async def delete(self, http_request: web.Request) -> web.Response:
        """Delete a response. One that still runs is cancelled first."""
        await self._end(http_request)
        response_id = http_request.match_info["response_id"]
        self.store.remove(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    async def _end(self, http_request: web.Request) -> StoredResponse:
        """Return a response, aborted if it ran."""
        response_id = http_request.match_info["response_id"]
        background = self._find_background(response_id, http_request)
        if background is not None:
            self.live.abort(response_id)
            await asyncio.shield(background.task)
        return self._find(response_id, http_request)

    def _find_background(self, response_id: str, caller: Owner) -> "BackgroundResponse | None":
        background = self._background.get(response_id)
        return background if background is not None and may_find(caller, background.owner) else None

    def _find_stored(self, response_id: str, caller: Owner) -> StoredResponse | None:
        owner = self.store.owner(response_id)
        stored = self.store.get(owner, response_id) if owner is not None and may_find(caller, owner) else None
        if stored is None:
            return None
        assert owner is not None
        fill = partial(self.images.filled, owner)
        return replace(stored, messages=fill(stored.messages), items=fill(stored.items))

    def _find(self, response_id: str, caller: Owner) -> StoredResponse:
        stored = self._find_stored(response_id, caller)
        if stored is None:
            raise ResponseNotFound(f"there is no response {response_id!r}: never stored, deleted, or long ago")
        return stored

    def _items(self, response_id: str, caller: Owner) -> dict[str, JSON]:
        """Return the items of a stored response's input and output by id."""
        stored = self._find_stored(response_id, caller)
        items = [] if stored is None else [*stored.items, *stored.response["output"]]
        return {item["id"]: item for item in items if isinstance(item["id"], str)}

    def _earlier_messages(self, body: ResponsesRequest, caller: Owner) -> list[JSON]:
        """Return the conversation up to and with the answer of `previous_response_id`."""
        previous = body.previous_response_id
        if not previous:
            return []
        if self._find_background(previous, caller):
            raise InvalidRequest(f"previous_response_id: {previous!r} has not ended yet", "previous_response_id")
        stored = self._find_stored(previous, caller)
        if stored is None:
            raise InvalidRequest(f"previous_response_id: there is no response {previous!r}", "previous_response_id")
        return stored.messages


# ---- keeping ----


class BackgroundResponse:
    """A response that goes on whether somebody waits for it or not."""

    def __init__(self, owner: str, answer: ResponseAnswer, store: ResponseStore | None) -> None:
        """store: where its events are kept once it has ended; None: they are not."""
        self.owner, self.answer, self.id = owner, answer, answer.state.rid
        self.log, self._store = EventLog(), store
        self.task: asyncio.Task[None]

    @property
    def keeps_events(self) -> bool:
        return self._store is not None

    async def begin(self, http_request: web.Request, live: LiveRequests) -> None:
        """Submit the request. An `EngineError` if it is refused."""
        self.answer.stream = self.log
        self.answer.state.sink = self.answer.sink
        submitted = AsyncExitStack()
        with spelled(self.answer.turn.names):
            await submitted.enter_async_context(live.submitted(http_request, self.id, [self.answer.state]))
        self.log.write(self.answer.open())
        self.task = asyncio.create_task(self._finish(submitted))

    async def _finish(self, submitted: AsyncExitStack) -> None:
        try:
            async with submitted:
                await self.log.wake.wait()
                self.log.write(self.answer.take_held())
                if self._store is not None:
                    self._store.keep_events(self.id, self.log.events)
        finally:
            self.log.close()

    def state(self) -> JSON:
        status = "in_progress" if self.answer.state.times.scheduled else "queued"
        return self.answer.response(status) | {"output": []}


# ---- reading ----


def _first_event(starting_after: str | None) -> int:
    """Return the number of the first event that a client wants."""
    if starting_after is None:
        return 0
    if not starting_after.isdecimal():
        raise InvalidRequest(f"starting_after must be an event's number, got {starting_after[:20]!r}", "starting_after")
    return int(starting_after[:9]) + 1


def _found_item(items_of: Callable[[str], dict[str, JSON]], item_id: str, field: str) -> JSON:
    """Return an item by its id, which begins with its response's."""
    found = items_of(f"resp_{item_id.partition('_')[2][:RID_LEN]}").get(item_id)
    if found is None:
        raise ItemNotFound(f"{field}: there is no item {item_id[:64]!r}, or its response is not stored any more", field)
    return found
