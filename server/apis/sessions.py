"""SGLang's sessions: requests that continue each other's tokens, which the client need not send again.

A session is a tree of turns. Each holds what it adds to the turn before it, so that a long conversation is kept once;
that its prefix need not be computed again is the radix cache's doing.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

from aiohttp import web
from msgspec import Meta

from engine.declared import Count, Int, Object
from engine.errors import InvalidRequest
from engine.media import PromptMedia, no_media
from engine.state import RequestState, Status
from server.http.live import LiveRequests, new_rid
from server.http.owners import Caller, may_find, owner_of
from server.reading.protocol import json_response, read_body

MAX_SESSIONS = 4096
MAX_OWN_SESSIONS = 512  # of a client with a key of its own
IDLE_S = 3600.0  # without a request, after which a session is closed
MAX_TURNS = 4096  # of one session
MAX_MEDIA_BYTES = 64 << 20  # of the pixels that one session holds
MAX_ALL_MEDIA_BYTES = 512 << 20


class OpenSession(Object):
    capacity_of_str_len: Annotated[Count, Meta(description="tokens of a conversation; 0: as many as fit")] = 0
    session_id: str = ""


class CloseSession(Object):
    session_id: str = ""


class SessionFields(Object):
    """`session_params` of /generate."""

    id: str = ""
    rid: Annotated[str, Meta(description="the request to continue")] = ""
    offset: Annotated[Int, Meta(description="tokens of it to keep, negative ones counted from its end; 0: all")] = 0
    replace: bool = False
    drop_previous_output: bool = False


@dataclass(slots=True, eq=False)
class Turn:
    rid: str
    parent: "Turn | None"
    num_kept: int  # of the parent's tokens
    input_ids: list[int]  # that came with this turn
    output_ids: list[int] = field(default_factory=list)
    state: RequestState | None = None  # until its answer is out
    media: PromptMedia | None = None  # that came with this turn

    @property
    def is_running(self) -> bool:
        return self.state is not None and self.state.status is not Status.FINISHED

    @property
    def path(self) -> "list[Turn]":
        """Return the turns of the conversation up to here, oldest first."""
        path = [self]
        while (parent := path[-1].parent) is not None:
            path.append(parent)
        return path[::-1]

    def token_ids(self, *, with_output: bool) -> list[int]:
        """Token ids of the whole conversation up to here."""
        tokens: list[int] = []
        for turn in self.path:
            tokens = tokens[: turn.num_kept] + turn.input_ids
            if turn is not self or with_output:
                tokens += turn.output_ids if turn.state is None else turn.state.output_ids
        return tokens

    def shown(self, num_tokens: int) -> PromptMedia:
        """Return what the first tokens of the conversation show. `InvalidRequest` if they end in a picture."""
        shown = no_media(0)
        for turn in self.path:
            shown = shown.first(turn.num_kept).followed_by(turn.media or no_media(len(turn.input_ids)))
        try:
            return shown.first(num_tokens)
        except ValueError:
            raise InvalidRequest(
                f"offset keeps {num_tokens} tokens, and the last is in the middle of a picture", "session_params.offset"
            ) from None


@dataclass(slots=True, eq=False)
class Session:
    owner: str
    capacity: int | None  # tokens of a conversation
    turns: dict[str, Turn] = field(default_factory=dict)
    has_media: bool = False
    used_at: float = field(default_factory=time.monotonic)

    @property
    def media_bytes(self) -> int:
        return sum(turn.media.num_bytes for turn in self.turns.values() if turn.media is not None)

    @property
    def is_over(self) -> bool:
        return time.monotonic() - self.used_at > IDLE_S and not any(turn.is_running for turn in self.turns.values())


@dataclass(frozen=True, slots=True)
class SessionParams:
    """`session_params` of /generate, checked."""

    session: Session
    previous: Turn | None
    offset: int  # tokens of the previous turn to keep, negative ones counted from its end; 0: all
    replaces: bool
    drops_output: bool


class Sessions:
    def __init__(self, live: LiveRequests) -> None:
        self.live = live
        self._sessions: dict[tuple[str, str], Session] = {}  # by owner and id

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/open_session", self.open), web.post("/close_session", self.close)]

    async def open(self, http_request: web.Request) -> web.Response:
        """Open a session of the caller's and return its id."""
        body = await read_body(http_request, OpenSession)
        owner, session_id = owner_of(http_request), body.session_id or new_rid()
        self._sessions = {key: session for key, session in self._sessions.items() if not session.is_over}
        if (owner, session_id) in self._sessions:
            raise body.wrong("session_id", "one that is not open")
        num_own = sum(session.owner == owner for session in self._sessions.values()) if owner else 0
        if len(self._sessions) >= MAX_SESSIONS or num_own >= MAX_OWN_SESSIONS:
            limit = MAX_OWN_SESSIONS if num_own >= MAX_OWN_SESSIONS else MAX_SESSIONS
            raise InvalidRequest(f"{limit} sessions are open, the limit: close some", "session_id")
        self._sessions[owner, session_id] = Session(owner, body.capacity_of_str_len or None)
        return json_response(session_id)

    async def close(self, http_request: web.Request) -> web.Response:
        """Forget a session. What runs in it goes on."""
        body = await read_body(http_request, CloseSession)
        key = self._key(http_request, body.session_id)
        if key is None:
            raise body.wrong("session_id", "an open session")
        del self._sessions[key]
        return web.Response()

    def _key(self, caller: Caller, session_id: str) -> tuple[str, str] | None:
        """Return the key of the session that `caller` calls so: its own, or for an admin anybody's."""
        own = owner_of(caller), session_id
        if own in self._sessions:
            return own
        others = (key for key in self._sessions if key[1] == session_id and may_find(caller, key[0]))
        return next(others, None)

    def read(self, caller: Caller, fields: SessionFields) -> SessionParams:
        """Read the parameters. `InvalidRequest` if session or turn do not exist, or the turn is still running."""
        key = self._key(caller, fields.id)
        session = None if key is None else self._sessions[key]
        if session is None or session.is_over:
            raise fields.wrong("id", "an open session", "session_params")
        session.used_at = time.monotonic()
        previous = None
        if fields.rid:
            previous = session.turns.get(fields.rid)
            if previous is None:
                raise fields.wrong("rid", "a request of the session", "session_params")
            if previous.is_running and not fields.replace:
                raise fields.wrong("rid", "a request that has ended, unless replace is true", "session_params")
        return SessionParams(session, previous, fields.offset, fields.replace, fields.drop_previous_output)

    def continued(
        self, params: SessionParams, input_ids: list[int], media: PromptMedia | None = None
    ) -> tuple[list[int], PromptMedia | None, int]:
        """Return the prompt that continues the previous turn, what it shows, and how many tokens of before it keeps.

        input_ids, media: what is added.
        """
        kept: list[int] = []
        if params.previous is not None:
            running = params.previous.state
            if running is not None:
                self.live.end(running)
            kept = params.previous.token_ids(with_output=not params.drops_output)
            if params.offset:
                if abs(params.offset) > len(kept):
                    raise InvalidRequest(
                        f"offset is {params.offset}, the request to continue has {len(kept)} tokens",
                        "session_params.offset",
                    )
                kept = kept[: params.offset]
        num_tokens, capacity = len(kept) + len(input_ids), params.session.capacity
        if capacity is not None and num_tokens > capacity:
            raise InvalidRequest(
                f"the conversation has {num_tokens} tokens, the session was opened for {capacity}", "session_params.id"
            )
        if media is not None:
            self._check_media(params.session, media)
        if params.previous is not None and (media is not None or params.session.has_media):
            media = params.previous.shown(len(kept)).followed_by(media or no_media(len(input_ids)))
        return kept + input_ids, media, len(kept)

    def _check_media(self, session: Session, media: PromptMedia) -> None:
        """Raise `InvalidRequest` if sessions would hold too many pixels: they do so until they are closed."""
        held, all_held = session.media_bytes, sum(one.media_bytes for one in self._sessions.values() if one.has_media)
        for num_bytes, limit, whose in (
            (held, MAX_MEDIA_BYTES, "the session"), (all_held, MAX_ALL_MEDIA_BYTES, "all sessions"),
        ):  # fmt: skip
            if num_bytes + media.num_bytes > limit:
                raise InvalidRequest(
                    f"the request's pictures have {media.num_bytes} bytes of pixels and those of {whose} {num_bytes}, "
                    f"the limit is {limit}: close sessions, or send smaller ones",
                    "image_data",
                )

    @contextmanager
    def turn(
        self, params: SessionParams, state: RequestState, num_kept: int, media: PromptMedia | None = None
    ) -> Iterator[None]:
        """Make a request a turn of the session, unless it is refused. With `replace`, those after the previous go.

        media: what the turn adds.
        """
        session = params.session
        if state.rid in session.turns:
            raise InvalidRequest(f"the session has a request {state.rid!r} already", "rid")
        if params.replaces:
            self._forget_after(session, params.previous)
        if len(session.turns) >= MAX_TURNS:
            raise InvalidRequest(f"the session has {MAX_TURNS} requests, the limit", "session_params.id")
        turn = Turn(state.rid, params.previous, num_kept, state.request.input_ids[num_kept:], state=state, media=media)
        session.has_media |= media is not None
        session.turns[turn.rid] = turn
        try:
            yield
        finally:
            turn.output_ids, turn.state = state.output_ids, None
            session.used_at = time.monotonic()
            if state.status is not Status.FINISHED:
                session.turns.pop(turn.rid, None)

    def _forget_after(self, session: Session, previous: Turn | None) -> None:
        """Forget all turns that follow `previous`, or all there are. Those that run are ended."""
        gone = {rid: turn for rid, turn in session.turns.items() if previous is None or _follows(turn, previous)}
        for rid, turn in gone.items():
            del session.turns[rid]
            if turn.state is not None:
                self.live.end(turn.state)


def _follows(turn: Turn, previous: Turn) -> bool:
    ancestor = turn.parent
    while ancestor is not None and ancestor is not previous:
        ancestor = ancestor.parent
    return ancestor is previous
