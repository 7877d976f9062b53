"""Clients with keys of their own: who may do what with whose things, on every route."""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient

from engine.request import Request, SamplingParams
from engine.schedule.fairness import FairShares, Queue
from engine.state import FinishReason, RequestState
from server.apis import sessions
from server.config import ServerConfig, parse_args
from server.http import keys
from server.http.keys import KeyRing
from server.http.owners import MAX_OWN_PRIORITY
from tests.fake_engine import FakeEngine, serving

Client = TestClient[Any, Any]

KEYS = "alice: sk-alice\nbob: {key: sk-bob, weight: 3}\nroot: {key: sk-root, admin: true}\n"


def as_(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer sk-{name}"}


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    file = tmp_path / "keys.yaml"
    file.write_text(KEYS)
    return str(file)


@pytest.fixture
async def client(engine: FakeEngine, key_file: str) -> AsyncIterator[Client]:
    async with serving(engine, api_key_file=key_file) as client:
        yield client


async def call(client: Client, name: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    answer = await client.request(method, path, json=body, headers=as_(name))
    return answer.status, await answer.json(content_type=None) if answer.content_type == "application/json" else None


# ---- stored things ----

LINE = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": {"model": "fake-model", "input": "Hi"}}


async def make_file(client: Client, name: str) -> str:
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", json.dumps(LINE).encode(), filename="lines.jsonl")
    return str((await (await client.post("/v1/files", data=form, headers=as_(name))).json())["id"])


async def make_batch(client: Client, name: str) -> str:
    body = {"input_file_id": await make_file(client, name), "endpoint": "/v1/responses"}
    batch = (await call(client, name, "POST", "/v1/batches", body))[1]
    async with asyncio.timeout(10):
        while batch["status"] != "completed":
            await asyncio.sleep(0.02)
            batch = (await call(client, name, "GET", f"/v1/batches/{batch['id']}"))[1]
    return str(batch["id"])


async def make_response(client: Client, name: str) -> str:
    body = {"model": "fake-model", "input": "Hi"}
    return str((await call(client, name, "POST", "/v1/responses", body))[1]["id"])


MAKERS = {"file_id": make_file, "batch_id": make_batch, "response_id": make_response}
# Routes whose path names something that nobody owns.
OWNERLESS = {"/v1/models/{model}"}


async def test_nobody_finds_anothers_things_on_any_route_and_an_admin_finds_all(client: Client) -> None:
    """The routes are the server's own: a new one that names a stored thing is tried, or fails here."""
    routes = sorted(
        {
            (route.method, route.resource.canonical)
            for route in client.server.app.router.routes()  # type: ignore[attr-defined]
            if route.resource is not None and "{" in route.resource.canonical and route.method != "HEAD"
        }
    )
    assert len(routes) >= 9
    for method, path in routes:
        if path in OWNERLESS:
            continue
        kind = path.partition("{")[2].partition("}")[0]
        made = await MAKERS[kind](client, "alice")
        real = path.replace(f"{{{kind}}}", made)
        assert (await call(client, "bob", method, real))[0] == 404, (method, path)
        assert (await call(client, "root", method, real))[0] in (200, 400), (method, path)
        made = await MAKERS[kind](client, "alice")
        assert (await call(client, "alice", method, path.replace(f"{{{kind}}}", made)))[0] in (200, 400)


@pytest.mark.parametrize(("path", "make"), [("/v1/files", make_file), ("/v1/batches", make_batch)])
async def test_a_list_holds_what_is_ones_own(client: Client, path: str, make: Any) -> None:
    made = await make(client, "alice")
    for name, finds in (("alice", True), ("bob", False), ("root", True)):
        found = (await call(client, name, "GET", path))[1]["data"]
        assert (made in [thing["id"] for thing in found]) == finds
        assert not any("owner" in thing for thing in found)


async def test_a_batch_may_not_read_anothers_file_and_its_answers_are_its_makers(client: Client) -> None:
    file_id = await make_file(client, "alice")
    body = {"input_file_id": file_id, "endpoint": "/v1/responses"}
    assert (await call(client, "bob", "POST", "/v1/batches", body))[0] == 404
    batch_id = await make_batch(client, "alice")
    output_id = (await call(client, "alice", "GET", f"/v1/batches/{batch_id}"))[1]["output_file_id"]
    assert (await call(client, "bob", "GET", f"/v1/files/{output_id}"))[0] == 404
    answer = await client.get(f"/v1/files/{output_id}/content", headers=as_("alice"))
    response_id = json.loads(await answer.text())["response"]["body"]["id"]
    assert (await call(client, "alice", "GET", f"/v1/responses/{response_id}"))[0] == 200
    assert (await call(client, "bob", "GET", f"/v1/responses/{response_id}"))[0] == 404
    body = {"model": "fake-model", "input": "And?", "previous_response_id": response_id}
    assert (await call(client, "bob", "POST", "/v1/responses", body))[0] == 400


# ---- sessions and rids ----


async def test_a_session_is_its_openers(client: Client) -> None:
    session = {"session_id": "mine", "capacity_of_str_len": 100}
    assert (await call(client, "alice", "POST", "/open_session", session))[0] == 200
    body = {"text": "Hi", "session_params": {"id": "mine"}}
    assert (await call(client, "bob", "POST", "/generate", body))[0] == 400
    assert (await call(client, "bob", "POST", "/close_session", {"session_id": "mine"}))[0] == 400
    assert (await call(client, "bob", "POST", "/open_session", session))[0] == 200  # of his own, of the same name
    assert (await call(client, "alice", "POST", "/generate", body))[0] == 200
    assert (await call(client, "root", "POST", "/close_session", {"session_id": "mine"}))[0] == 200


async def test_one_client_cannot_take_all_sessions_and_idle_ones_end(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MAX_OWN_SESSIONS", 3)
    for _ in range(3):
        assert (await call(client, "alice", "POST", "/open_session", {}))[0] == 200
    assert (await call(client, "alice", "POST", "/open_session", {}))[0] == 400
    assert (await call(client, "bob", "POST", "/open_session", {}))[0] == 200
    monkeypatch.setattr(sessions, "IDLE_S", -1.0)
    assert (await call(client, "alice", "POST", "/open_session", {"session_id": "x"}))[0] == 200
    body = {"text": "Hi", "session_params": {"id": "x"}}
    assert (await call(client, "alice", "POST", "/generate", body))[0] == 400


async def test_a_session_cannot_end_anothers_request_by_its_rid(client: Client, engine: FakeEngine) -> None:
    engine.is_manual = True
    asking = asyncio.create_task(call(client, "alice", "POST", "/generate", {"text": "Hi", "rid": "hers"}))
    await engine.until(lambda: bool(engine.live))
    await call(client, "bob", "POST", "/open_session", {"session_id": "s"})
    preparing, go_on = asyncio.Event(), asyncio.Event()
    prepare = engine.prepare

    async def slow(states: Sequence[RequestState]) -> None:
        preparing.set()
        await go_on.wait()
        await prepare(states)

    engine.prepare = slow  # type: ignore[method-assign]
    body = {"text": "Ho", "rid": "hers", "session_params": {"id": "s"}}
    stealing = asyncio.create_task(call(client, "bob", "POST", "/generate", body))
    await preparing.wait()  # her rid is a turn of his session now
    replacing = {"text": "Ho", "rid": "his", "session_params": {"id": "s", "replace": True}}
    his = asyncio.create_task(call(client, "bob", "POST", "/generate", replacing))
    await asyncio.sleep(0.05)
    go_on.set()
    assert (await stealing)[0] == 400
    assert engine.aborted == []
    await engine.until(lambda: len(engine.live) == 2)
    for state in list(engine.states):
        engine.finish(state, FinishReason("stop"))
    assert (await asking)[0] == (await his)[0] == 200


# ---- the cache and the turns ----


@pytest.mark.parametrize("shares", [False, True])
async def test_cached_prefixes_are_divided_by_key(engine: FakeEngine, key_file: str, shares: bool) -> None:
    async with serving(engine, api_key_file=key_file, share_prefix_cache=shares) as client:
        for name in ("alice", "alice", "bob", "root"):
            for path, body in (
                ("/generate", {"text": "a", "extra_key": "k"}),
                ("/v1/completions", {"prompt": "a", "cache_salt": "k"}),
            ):
                assert (await call(client, name, "POST", path, body))[0] == 200
        await make_batch(client, "alice")
    names = [state.extra_key for state in engine.states]
    assert names == [request.extra_key for request in engine.requests]
    assert len({*names[:4]}) == 1
    assert all(name.endswith("k") for name in names[:8])
    if shares:
        assert {*names[:8]} == {"k"}
    else:
        assert len({names[0], names[4], names[6]}) == 3
        assert names[8] + "k" == names[0]  # a batch's lines are its maker's


async def test_a_clients_priority_counts_among_its_own_requests_and_is_bounded(
    client: Client, engine: FakeEngine
) -> None:
    for priority in (1 << 50, -(1 << 50), 7):
        assert (await call(client, "bob", "POST", "/generate", {"text": "a", "priority": priority}))[0] == 200
    assert [request.priority for request in engine.requests] == [0, 0, 0]
    assert [request.own_priority for request in engine.requests] == [MAX_OWN_PRIORITY, -MAX_OWN_PRIORITY, 7]


def test_own_priorities_order_a_clients_requests_and_take_no_turn_of_anothers() -> None:
    shares = FairShares()
    queue = Queue(shares)
    for i, (client, priority) in enumerate([("a", 0), ("b", 1), ("b", 9), ("b", 5), ("a", 2)]):
        params = SamplingParams(max_new_tokens=1)
        state = RequestState(Request(f"{i}", [1] * 8, params, client=client, own_priority=priority))
        shares.enter(state)
        queue.add(state)
    order = []
    while queue:
        state = queue.next()
        queue.remove(state)
        shares.admit(state, 0)
        order.append(state.rid)
    assert order == ["4", "2", "0", "3", "1"]


# ---- keys ----


@pytest.mark.parametrize("header", ["X-Api-Key", "api-key"])
async def test_a_key_may_come_as_anthropics_or_azures_clients_send_it(client: Client, header: str) -> None:
    answer = await client.post("/generate", json={"text": "a"}, headers={header: "sk-alice"})
    assert answer.status == 200
    assert (await client.post("/generate", json={"text": "a"}, headers={header: "sk-eve"})).status == 401


async def test_the_key_file_is_read_again_when_it_changes_and_a_wrong_one_changes_nothing(
    client: Client, key_file: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keys, "CHECK_INTERVAL_S", 0.0)

    async def status(name: str) -> int:
        return (await call(client, name, "POST", "/generate", {"text": "a"}))[0]

    def write(text: str) -> None:
        new = Path(key_file + ".new")
        new.write_text(text)
        os.replace(new, key_file)

    assert (await status("alice"), await status("carol")) == (200, 401)
    write("carol: sk-carol\n")
    assert (await status("alice"), await status("carol")) == (401, 200)
    write("carol: [")
    assert await status("carol") == 200
    assert "the keys stay as they were" in caplog.text
    os.remove(key_file)
    assert await status("carol") == 200


async def test_an_admin_of_the_key_file_reaches_into_the_server_and_nobody_else_does(client: Client) -> None:
    assert (await call(client, "root", "POST", "/flush_cache"))[0] == 200
    assert (await call(client, "bob", "POST", "/flush_cache"))[0] == 401


def test_keys_may_come_from_the_environment() -> None:
    environ = {"RADIXLOOP_API_KEY": "a", "RADIXLOOP_ADMIN_API_KEY": "b"}
    config = parse_args(["--model-path", "m"], environ)
    assert (config.api_key, config.admin_api_key) == ("a", "b")
    assert parse_args(["--model-path", "m", "--api-key", "c"], environ).api_key == "c"
    assert not {"a", "b"} & {*config.public_values().values()}


def test_an_owner_is_not_its_key(key_file: str) -> None:
    ring = KeyRing(ServerConfig(model_path="m", api_key_file=key_file))
    owners = [client.owner for client in ring._users.values()]
    assert len({*owners}) == 2
    assert all(len(owner) == 32 and "sk-" not in owner for owner in owners)


# ---- the log ----


async def test_a_rid_cannot_forge_a_line_of_the_log(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serving(engine, log_requests=True) as client:
        body = {"text": "Hi", "rid": "x\n[12:00:00] ERROR forged\r\x1b[31m\u2028y"}
        assert (await client.post("/generate", json=body)).status == 200
    (line,) = [record.getMessage() for record in caplog.records if "forged" in record.getMessage()]
    assert line.isprintable()
