"""SGLang's sessions: requests that continue each other's tokens, which the client need not send again.

A session is a tree of turns. Each holds what it adds to the turn before it, so that a long conversation is kept once;
that its prefix need not be computed again is the radix cache's doing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.state import RequestState, Status
from server.http.live import new_rid
from server.reading.protocol import Fields, json_response, read_json

MAX_SESSIONS = 4096
MAX_TURNS = 4096  # of one session


@dataclass(slots=True, eq=False)
class Turn:
    rid: str
    parent: "Turn | None"
    num_kept: int  # of the parent's tokens
    input_ids: list[int]  # that came with this turn
    output_ids: list[int] = field(default_factory=list)
    state: RequestState | None = None  # until its answer is out

    @property
    def is_running(self) -> bool:
        return self.state is not None and self.state.status is not Status.FINISHED

    def token_ids(self, *, with_output: bool) -> list[int]:
        """Token ids of the whole conversation up to here."""
        path = [self]
        while (parent := path[-1].parent) is not None:
            path.append(parent)
        tokens: list[int] = []
        for turn in reversed(path):
            tokens = tokens[: turn.num_kept] + turn.input_ids
            if turn is not self or with_output:
                tokens += turn.output_ids if turn.state is None else turn.state.output_ids
        return tokens


@dataclass(slots=True, eq=False)
class Session:
    capacity: int | None  # tokens of a conversation
    turns: dict[str, Turn] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SessionParams:
    """`session_params` of /generate, checked."""

    session: Session
    previous: Turn | None
    offset: int  # tokens of the previous turn to keep, negative ones counted from its end; 0: all
    replaces: bool
    drops_output: bool


class Sessions:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._sessions: dict[str, Session] = {}

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/open_session", self.open), web.post("/close_session", self.close)]

    async def open(self, http_request: web.Request) -> web.Response:
        """Open a session and return its id."""
        body = await read_json(http_request)
        capacity = body.integer("capacity_of_str_len", 0, low=0)
        session_id = body.text("session_id") or new_rid()
        if session_id in self._sessions:
            body.fail("session_id", "one that is not open")
        if len(self._sessions) >= MAX_SESSIONS:
            raise InvalidRequest(f"{MAX_SESSIONS} sessions are open, the limit: close some", "session_id")
        self._sessions[session_id] = Session(capacity or None)
        return json_response(session_id)

    async def close(self, http_request: web.Request) -> web.Response:
        """Forget a session. What runs in it goes on."""
        body = await read_json(http_request)
        if self._sessions.pop(body.text("session_id"), None) is None:
            body.fail("session_id", "an open session")
        return web.Response()

    def read(self, fields: Fields) -> SessionParams:
        """Read the parameters. `InvalidRequest` if session or turn do not exist, or the turn is still running."""
        session = self._sessions.get(fields.text("id"))
        if session is None:
            fields.fail("id", "an open session")
        previous, rid = None, fields.text("rid")
        replaces = fields.flag("replace")
        if rid:
            previous = session.turns.get(rid)
            if previous is None:
                fields.fail("rid", "a request of the session")
            if previous.is_running and not replaces:
                fields.fail("rid", "a request that has ended, unless replace is true")
        offset = fields.integer("offset")
        drops_output = fields.flag("drop_previous_output")
        return SessionParams(session, previous, offset, replaces, drops_output)

    def continued(self, params: SessionParams, input_ids: list[int]) -> tuple[list[int], int]:
        """Return the prompt that continues the previous turn with `input_ids`, and how many of its tokens are kept."""
        kept: list[int] = []
        if params.previous is not None:
            running = params.previous.state
            if running is not None:
                self.engine.abort(running.rid)
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
        return kept + input_ids, len(kept)

    @contextmanager
    def turn(self, params: SessionParams, state: RequestState, num_kept: int) -> Iterator[None]:
        """Make a request a turn of the session, unless it is refused. With `replace`, those after the previous go."""
        session = params.session
        if state.rid in session.turns:
            raise InvalidRequest(f"the session has a request {state.rid!r} already", "rid")
        if params.replaces:
            self._forget_after(session, params.previous)
        if len(session.turns) >= MAX_TURNS:
            raise InvalidRequest(f"the session has {MAX_TURNS} requests, the limit", "session_params.id")
        turn = Turn(state.rid, params.previous, num_kept, state.request.input_ids[num_kept:], state=state)
        session.turns[turn.rid] = turn
        try:
            yield
        finally:
            turn.output_ids, turn.state = state.output_ids, None
            if state.status is not Status.FINISHED:
                session.turns.pop(turn.rid, None)

    def _forget_after(self, session: Session, previous: Turn | None) -> None:
        """Forget all turns that follow `previous`, or all there are. Those that run are ended."""
        gone = {rid: turn for rid, turn in session.turns.items() if previous is None or _follows(turn, previous)}
        for rid, turn in gone.items():
            del session.turns[rid]
            if turn.state is not None:
                self.engine.abort(rid)


def _follows(turn: Turn, previous: Turn) -> bool:
    ancestor = turn.parent
    while ancestor is not None and ancestor is not previous:
        ancestor = ancestor.parent
    return ancestor is previous
