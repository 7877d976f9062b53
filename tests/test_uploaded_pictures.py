"""Pictures that were uploaded to /v1/files and are shown by their ids: whose they are, and what is refused."""

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engine.media import Image
from engine.state import RequestState
from server.media.limits import MAX_FILE_BYTES
from tests.client import Client
from tests.fake_engine import SeeingEngine, serving
from tests.test_media_apis import BLUE, RED, png, uri

KEYS = "alice: sk-alice\nbob: sk-bob\nroot: {key: sk-root, admin: true}\n"
ALICE, BOB, ROOT = ({"Authorization": f"Bearer sk-{name}"} for name in ("alice", "bob", "root"))


Color = tuple[int, ...]


class NotingEngine(SeeingEngine):
    """Notes the color of each picture of a request when it comes: once it has ended, it shows nothing."""

    def __init__(self) -> None:
        super().__init__(context_length=4096)
        self.shown: list[list[Color]] = []

    def submit(self, state: RequestState) -> None:
        media = state.request.media
        pictures = [one for one in media.media if isinstance(one, Image)] if media is not None else []
        self.shown.append([tuple(one.pixels[0, 0].tolist()) for one in pictures])
        super().submit(state)


@pytest.fixture
def engine() -> NotingEngine:
    return NotingEngine()


@pytest.fixture
async def client(engine: NotingEngine, tmp_path: Path) -> AsyncIterator[Client]:
    (tmp_path / "keys.yaml").write_text(KEYS)
    async with serving(engine, api_key_file=str(tmp_path / "keys.yaml")) as client:
        yield client


async def upload(client: Client, content: bytes, purpose: str = "vision") -> str:
    """Return the id of a file of Alice's."""
    form = aiohttp.FormData({"purpose": purpose})
    form.add_field("file", content, filename="a.png")
    response = await client.post("/v1/files", data=form, headers=ALICE)
    assert response.status == 200, await response.text()
    return str((await response.json())["id"])


async def ask(client: Client, call: tuple[str, dict[str, Any]], who: dict[str, str] = ALICE) -> tuple[int, Any]:
    path, body = call
    response = await client.post(path, json={"model": "fake-model", **body}, headers=who)
    return response.status, await response.json()


def chat(*files: Any) -> tuple[str, dict[str, Any]]:
    parts = [{"type": "file", "file": file} for file in files]
    content = [{"type": "text", "text": "See"}, *parts]
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": content}]}


def response(file_id: Any, **more: Any) -> tuple[str, dict[str, Any]]:
    content = [{"type": "input_text", "text": "See"}, {"type": "input_image", "file_id": file_id, "detail": "high"}]
    return "/v1/responses", {"input": [{"role": "user", "content": content}], **more}


def message(file_id: Any) -> tuple[str, dict[str, Any]]:
    image = {"type": "image", "source": {"type": "file", "file_id": file_id}}
    return "/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": [image]}]}


async def test_a_picture_is_shown_by_its_id_on_every_api_and_in_later_turns(
    client: Client, engine: NotingEngine
) -> None:
    red, blue = await upload(client, base64.b64decode(png(RED))), await upload(client, base64.b64decode(png(BLUE)))
    both = chat({"file_id": red}, {"file_data": uri(BLUE), "filename": "b.png"})
    for call, colors in ((both, [RED, BLUE]), (message(blue), [BLUE])):
        status, answer = await ask(client, call)
        assert (status, engine.shown[-1]) == (200, colors), answer
    _, first = await ask(client, response(blue))
    status, _ = await ask(client, response(red, previous_response_id=first["id"]))
    assert (status, engine.shown[-1]) == (200, [BLUE, RED])


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda file_id: chat({"file_id": file_id}), "messages[0].content[1].file.file_id"),
        (response, "input[0].content[1].file_id"),
        (message, "messages[0].content[0].source.file_id"),
    ],
)
async def test_others_have_no_such_file_and_errors_name_the_clients_field(
    client: Client, engine: NotingEngine, call: Any, field: str
) -> None:
    red, lines = await upload(client, base64.b64decode(png(RED))), await upload(client, b"{}\n", "batch")
    assert (await ask(client, call(red), ROOT))[0] == 200
    num_requests = len(engine.shown)
    for file_id, who in ((red, BOB), ("file-1", ALICE), ("../keys.yaml", ALICE)):
        status, answer = await ask(client, call(file_id), who)
        assert (status, f"no such file: {file_id!r}" in answer["error"]["message"]) == (404, True)
        assert answer["error"].get("param", field) == field  # Anthropic's errors have none
    status, answer = await ask(client, call(lines))
    assert (status, answer["error"]["message"].startswith(f"{field} ")) == (400, True)
    assert len(engine.shown) == num_requests


async def test_a_picture_that_was_deleted_or_is_too_large_is_refused(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = base64.b64decode(png(RED))
    red = await upload(client, content, "user_data")
    _, first = await ask(client, response(red))
    monkeypatch.setitem(MAX_FILE_BYTES, "image", len(content) - 1)
    status, answer = await ask(client, response(red))
    assert (status, f"has {len(content)} bytes, the limit is" in answer["error"]["message"]) == (400, True)
    assert (await client.delete(f"/v1/files/{red}", headers=ALICE)).status == 200
    status, answer = await ask(client, ("/v1/responses", {"input": "?", "previous_response_id": first["id"]}))
    assert (status, f"no such file: {red!r}" in answer["error"]["message"]) == (404, True)


async def test_a_part_of_a_file_names_one_or_holds_a_picture(client: Client, engine: NotingEngine) -> None:
    field = "messages[0].content[1].file"
    for file, reason in (
        ({}, f"{field} must have a file_id, or file_data"),
        ({"file_data": "data:application/pdf;base64,aGk="}, f"{field}.file_data is 'application/pdf' by its data URI"),
        ({"file_id": 3}, f"{field}.file_id must be"),
    ):
        status, answer = await ask(client, chat(file))
        assert (status, reason in answer["error"]["message"]) == (400, True), answer
    engine.media_kinds = {}
    status, answer = await ask(client, chat({"file_id": "file-1"}))
    assert (status, "messages[0].content[1] is file, but this model reads text only" in str(answer)) == (400, True)
