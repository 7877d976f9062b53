"""Clients with keys of their own: who may do what with whose things, on every route."""

import asyncio
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from engine.request import Request, SamplingParams
from engine.schedule.fairness import FairShares, Queue
from engine.state import FinishReason, RequestState
from server.apis import sessions
from server.command_line import parse_args
from server.config import ServerConfig
from server.http import keys
from server.http.keys import KeyRing
from server.http.owners import MAX_OWN_PRIORITY
from server.watch.openapi import routes_of
from tests.client import Client
from tests.fake_engine import FakeEngine, serving

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

MODEL = {"model": "fake-model"}
LINE: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": {**MODEL, "input": "Hi"}}


async def make_file(client: Client, name: str, line: Any = LINE) -> str:
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", json.dumps(line).encode(), filename="lines.jsonl")
    return str((await (await client.post("/v1/files", data=form, headers=as_(name))).json())["id"])


async def make_batch(client: Client, name: str, line: Any = LINE) -> str:
    body = {"input_file_id": await make_file(client, name, line), "endpoint": "/v1/responses"}
    batch = (await call(client, name, "POST", "/v1/batches", body))[1]
    async with asyncio.timeout(60):
        while batch["status"] != "completed":
            await asyncio.sleep(0.02)
            batch = (await call(client, name, "GET", f"/v1/batches/{batch['id']}"))[1]
    return str(batch["id"])


async def make_response(client: Client, name: str) -> str:
    body = {"model": "fake-model", "input": "Hi"}
    return str((await call(client, name, "POST", "/v1/responses", body))[1]["id"])


async def make_session(client: Client, name: str) -> str:
    return str((await call(client, name, "POST", "/open_session", {"capacity_of_str_len": 100}))[1])


async def make_item(client: Client, name: str) -> str:
    response_id = await make_response(client, name)
    listed = await call(client, name, "GET", f"/v1/responses/{response_id}/input_items")
    return str(listed[1]["data"][0]["id"])


MAKERS = {
    "file_id": make_file, "batch_id": make_batch, "response_id": make_response, "session_id": make_session,
    "item_id": make_item,
}  # fmt: skip


# ---- who may do what: a row for each route, and for each field that names a stored thing ----

ANYBODY, CLIENTS, OWNERS, ADMINS = "anybody", "clients", "owners", "admins"
WHO_MAY = {
    ANYBODY: "GET / | GET /docs | GET /health | GET /ping | GET /dashboard",
    # Whoever has a key. What they store or run is theirs.
    CLIENTS: """
        GET /openapi.json | GET /health_generate | GET /metrics | GET /get_load | GET /v1/loads | GET /load
        GET /version | GET /model_info | GET /get_model_info | GET /server_info | GET /get_server_info
        POST /generate | PUT /generate | POST /generate_from_file | POST /invocations | POST /vertex_generate
        POST /v1/chat/completions | POST /v1/chat/completions/render | POST /v1/completions
        GET /v1/models | GET /v1/models/{model} | POST /v1/messages | POST /v1/messages/count_tokens
        POST /api/chat | POST /api/generate | POST /api/embed | POST /api/embeddings
        POST /api/show | POST /api/pull | GET /api/tags | GET /api/ps | GET /api/version
        POST /v1/embeddings | POST /encode | PUT /encode | POST /classify | PUT /classify | POST /v1/classify
        POST /v1/score | POST /score | POST /v1/rerank | POST /rerank | POST /v2/rerank
        POST /tokenize | POST /v1/tokenize | GET /tokenizer_info | POST /detokenize | POST /v1/detokenize
        POST /parse_function_call | POST /separate_reasoning
        POST /open_session | POST /close_session
        POST /v1/responses | POST /v1/responses/input_tokens
        POST /v1/files | GET /v1/files | POST /v1/batches | GET /v1/batches
    """,
    # Whoever made the thing that the path names, and admins. To all others it does not exist.
    OWNERS: """
        GET /v1/files/{file_id} | DELETE /v1/files/{file_id} | GET /v1/files/{file_id}/content
        GET /v1/batches/{batch_id} | POST /v1/batches/{batch_id}/cancel
        GET /v1/responses/{response_id} | DELETE /v1/responses/{response_id}
        GET /v1/responses/{response_id}/input_items | POST /v1/responses/{response_id}/cancel
    """,
    ADMINS: """
        GET /flush_cache | POST /flush_cache | POST /abort_request | GET /dashboard/data | POST /configure_logging
        GET /start_profile | POST /start_profile | GET /stop_profile | POST /stop_profile
        POST /pause_generation | POST /continue_generation
        POST /update_weights_from_disk | POST /update_weight_version | POST /get_weights_by_name
        POST /release_memory_occupation | POST /resume_memory_occupation
    """,
}
ROWS = {row: who for who, rows in WHO_MAY.items() for row in map(str.strip, rows.strip().replace("\n", "|").split("|"))}
# Fields of bodies that name a stored thing: who did not make it is answered as if it did not exist.
NAMED: list[tuple[str, str, Any]] = [
    ("input_file_id", "POST /v1/batches", {"input_file_id": "ID", "endpoint": "/v1/responses"}),
    ("previous_response_id", "POST /v1/responses", {**MODEL, "input": "And?", "previous_response_id": "ID"}),
    ("item_id", "POST /v1/responses", {**MODEL, "input": [{"type": "item_reference", "id": "ID"}]}),
    ("previous_response_id", "POST /v1/responses/input_tokens", {"input": "And?", "previous_response_id": "ID"}),
    ("item_id", "POST /v1/responses/input_tokens", {"input": [{"type": "item_reference", "id": "ID"}]}),
    ("session_params.id", "POST /generate", {"text": "Hi", "session_params": {"id": "ID"}}),
    ("session_params.id", "PUT /generate", {"text": "Hi", "session_params": {"id": "ID"}}),
    ("session_id", "POST /close_session", {"session_id": "ID"}),
]
MAKER_OF = {"input_file_id": "file_id", "previous_response_id": "response_id", "session_params.id": "session_id"}
# Fields whose names end so and that name nothing stored: parts of the conversation that is sent, tokens, and the rid,
# which is the client's choice: one of a running request is refused; a picture's uuid finds nothing. Models that see
# have file_id: tests/test_uploaded_pictures.py.
NAMELESS = {"id", "tool_use_id", "tool_call_id", "call_id", "token_id", "rid", "uuid", "file_id"}


async def test_every_route_has_a_row_that_says_who_may_call_it(engine: FakeEngine, key_file: str) -> None:
    async with serving(engine, api_key_file=key_file, enable_metrics=True) as client:
        routes = [f"{method} {path}" for method, path in routes_of(client.app)]
    assert sorted(routes) == sorted(ROWS)
    assert {row for row in routes if "{" in row} == {row for row in ROWS if ROWS[row] == OWNERS} | {
        "GET /v1/models/{model}"
    }


async def test_every_field_that_names_a_stored_thing_has_a_row(client: Client) -> None:
    document = (await call(client, "alice", "GET", "/openapi.json"))[1]
    names = {*re.findall(r'"(\w*id)": ?{', json.dumps(document))}
    assert names - NAMELESS == {name for name, *_ in NAMED} - {"item_id", "session_params.id"}


EVERYBODY = {"", "eve", "bob", "root"}  # who has no key, who has a wrong one, a client and an admin
# Options, who may call what is for clients, and what is for admins.
CONFIGS: list[tuple[dict[str, str], dict[str, set[str]]]] = [
    ({}, {CLIENTS: EVERYBODY, ADMINS: EVERYBODY}),
    ({"api_key": "sk-bob"}, {CLIENTS: {"bob"}, ADMINS: {"bob"}}),
    ({"api_key": "sk-bob", "admin_api_key": "sk-root"}, {CLIENTS: {"bob", "root"}, ADMINS: {"root"}}),
    ({"admin_api_key": "sk-root"}, {CLIENTS: EVERYBODY, ADMINS: {"root"}}),
    ({"api_key_file": KEYS}, {CLIENTS: {"bob", "root"}, ADMINS: {"root"}}),
    ({"api_key_file": "bob: sk-bob"}, {CLIENTS: {"bob"}, ADMINS: set()}),
]


@pytest.mark.parametrize(("options", "may"), CONFIGS, ids=[" ".join(options) or "no keys" for options, _ in CONFIGS])
async def test_a_route_is_open_to_those_whom_its_row_names_and_nobody_else(
    engine: FakeEngine, tmp_path: Path, options: dict[str, str], may: dict[str, set[str]]
) -> None:
    if keys_text := options.get("api_key_file"):
        (tmp_path / "keys.yaml").write_text(keys_text)
        options = options | {"api_key_file": str(tmp_path / "keys.yaml")}
    may = may | {ANYBODY: EVERYBODY, OWNERS: may[CLIENTS]}
    async with serving(engine, enable_metrics=True, **options) as client:
        for row, who in ROWS.items():
            method, path = row.split()
            for name in EVERYBODY:
                headers = as_(name) if name else {}
                body: Any = None if method == "GET" else {}
                answer = await client.request(method, re.sub("{.*?}", "x", path), json=body, headers=headers)
                assert answer.status < 500, (row, name)
                assert (answer.status not in (401, 403)) == (name in may[who]), (row, name, answer.status)


async def test_no_spelling_of_its_path_opens_an_admins_route(client: Client) -> None:
    for path in {row.split()[1] for row, who in ROWS.items() if who == ADMINS}:
        quoted = f"/%{ord(path[1]):x}{path[2:]}"
        for spelled in (path, quoted, path.replace("_", "%5F"), f"/{path}", f"{path}/", f"/.{path}", f"/x/..{path}",
                        f"{path}?key=sk-root", f"{path}%00", f"{path};x", f"/%2F{path[1:]}", path.upper()):  # fmt: skip
            url = URL(f"{client.make_url('/').origin()}{spelled}", encoded=True)
            for method in ("GET", "HEAD", "POST"):  # HEAD comes with each GET
                answer = await client.session.request(method, url, headers=as_("bob"), json={})
                assert answer.status in (400, 401, 404, 405), (method, url, answer.status)


async def test_a_thing_that_a_path_names_exists_for_its_maker_and_admins_alone(client: Client) -> None:
    for row in (row for row, who in ROWS.items() if who == OWNERS):
        method, path = row.split()
        kind = path.partition("{")[2].partition("}")[0]
        for name in ("root", "alice"):
            made = await MAKERS[kind](client, "alice")
            of_bob, nothing = [
                await call(client, "bob", method, path.replace(f"{{{kind}}}", thing)) for thing in (made, "x-" + made)
            ]
            assert of_bob[0] == 404, row
            assert str(of_bob).replace(made, "x-" + made) == str(nothing), f"{row}: bob can tell that it exists"
            assert (await call(client, name, method, path.replace(f"{{{kind}}}", made)))[0] in (200, 400), (row, name)


@pytest.mark.parametrize(("field", "row", "body"), NAMED, ids=[f"{row} {field}" for field, row, _ in NAMED])
async def test_a_thing_that_a_body_names_exists_for_its_maker_and_admins_alone(
    client: Client, field: str, row: str, body: Any
) -> None:
    def naming(thing: str) -> Any:
        return json.loads(json.dumps(body).replace('"ID"', json.dumps(thing)))

    method, path = row.split()
    for name in ("root", "alice"):
        made = await MAKERS[MAKER_OF.get(field, field)](client, "alice")
        other = made[:-4] + "beef"
        of_bob, nothing = [await call(client, "bob", method, path, naming(thing)) for thing in (made, other)]
        assert of_bob[0] in (400, 404)
        assert str(of_bob).replace(made, other) == str(nothing), "bob can tell that it exists"
        assert (await call(client, name, method, path, naming(made)))[0] == 200, name


async def test_a_line_of_a_batch_finds_what_its_maker_finds(client: Client) -> None:
    response_id = await make_response(client, "alice")
    line = {**LINE, "body": {**LINE["body"], "previous_response_id": response_id}}
    for name, counts in (("bob", (0, 1)), ("alice", (1, 0))):
        batch_id = await make_batch(client, name, line)
        found = (await call(client, name, "GET", f"/v1/batches/{batch_id}"))[1]["request_counts"]
        assert (found["completed"], found["failed"]) == counts


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
