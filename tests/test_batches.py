"""Files and batches through OpenAI's own client, and what a restart leaves of them."""

import asyncio
import errno
import json
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import FormData
from openai.types import Batch

from engine.errors import QueueFull
from engine.state import FinishReason, RequestState
from server.reading.chat import Chats, ChatTurn
from server.reading.openai_body import ChatRequest
from server.reading.protocol import Owner
from tests.fake_engine import FakeEngine, serving


@asynccontextmanager
async def api_of(engine: FakeEngine, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(engine, **options) as client,
        openai.AsyncOpenAI(base_url=str(client.make_url("/v1")), api_key="none", max_retries=0, timeout=60) as api,
    ):
        yield api


def chat_line(custom_id: str, content: str = "Hi", **changes: Any) -> dict[str, Any]:
    body = {"model": "fake-model", "messages": [{"role": "user", "content": content}]}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body, **changes}


async def start(api: openai.AsyncOpenAI, lines: list[Any], **options: Any) -> Batch:
    content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode()
    file = await api.files.create(file=("lines.jsonl", content), purpose="batch")
    fields: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **options}
    return await api.batches.create(input_file_id=file.id, **fields)


def output_in(folder: Path) -> Path:
    """Return the one file of answers there."""
    [path] = folder.glob("*-output")
    return path


def write_half_a_line(folder: Path) -> None:
    """Leave a line as a crash in the middle of a write does."""
    with open(output_in(folder), "ab") as file:
        file.write(b'{"id": "batch_req_1", "custom_')


async def until(api: openai.AsyncOpenAI, batch_id: str, reached: Callable[[Batch], bool]) -> Batch:
    async with asyncio.timeout(60):
        while True:
            batch = await api.batches.retrieve(batch_id)
            if reached(batch):
                return batch
            await asyncio.sleep(0.01)


def has_ended(batch: Batch) -> bool:
    return batch.status in ("failed", "completed", "expired", "cancelled")


async def lines_of(api: openai.AsyncOpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    content = (await api.files.content(file_id)).text
    return {line["custom_id"]: line for line in map(json.loads, content.splitlines())}


async def test_a_batch_answers_every_line_and_says_which_failed() -> None:
    async with api_of(FakeEngine(), max_body_bytes=1000) as api:
        lines = [chat_line(f"line-{i}", "x" * 100) for i in range(12)]
        lines += [chat_line("long", "y" * 300), chat_line("bad", body={"messages": []})]
        batch = await start(api, lines, metadata={"for": "a test"})
        assert (batch.status, batch.metadata) == ("validating", {"for": "a test"})
        batch = await until(api, batch.id, has_ended)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (14, 12, 2)
        answers = await lines_of(api, batch.output_file_id)
        assert set(answers) == {f"line-{i}" for i in range(12)}
        body = answers["line-3"]["response"]["body"]
        assert body["choices"][0]["message"]["content"] == "Hello, world"
        assert body["object"] == "chat.completion"
        errors = await lines_of(api, batch.error_file_id)
        assert errors["long"]["response"]["status_code"] == 400
        assert errors["long"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
        assert errors["bad"]["response"]["body"]["error"]["param"] == "messages"
        assert [one.id for one in (await api.batches.list()).data] == [batch.id]


@pytest.mark.parametrize(
    ("endpoint", "body", "kind"),
    [
        ("/v1/completions", {"prompt": "Hi"}, "text_completion"),
        ("/v1/embeddings", {"input": ["Hi", "Ho"]}, "list"),
        ("/v1/responses", {"input": "Hi", "store": False}, "response"),
    ],
)
async def test_other_endpoints_have_batches_too(endpoint: Any, body: dict[str, Any], kind: str) -> None:
    async with api_of(FakeEngine()) as api:
        line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body}
        batch = await until(api, (await start(api, [line], endpoint=endpoint)).id, has_ended)
        answers = await lines_of(api, batch.output_file_id)
        assert answers["a"]["response"]["body"]["object"] == kind
        assert batch.error_file_id is None


async def test_a_line_that_raises_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = Chats.turn

    async def sometimes_broken(self: Chats, body: ChatRequest, caller: Owner) -> ChatTurn:
        if "boom" in str(body.messages):
            raise RuntimeError("injected into the template")
        return await turn(self, body, caller)

    monkeypatch.setattr(Chats, "turn", sometimes_broken)
    async with api_of(FakeEngine()) as api:
        batch = await start(api, [chat_line("1"), chat_line("2", "boom"), chat_line("3")])
        batch = await until(api, batch.id, has_ended)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
        assert batch.error_file_id is not None
        [line] = map(json.loads, (await api.files.content(batch.error_file_id)).text.splitlines())
        assert (line["custom_id"], line["response"]["status_code"]) == ("2", 500)


@pytest.mark.parametrize("value", ["1e999", '"\\ud83d"', "9" * 400, '"\udcff"'])
async def test_a_line_is_answered_as_it_was_checked_whatever_stands_in_a_field_that_nobody_reads(value: str) -> None:
    line = json.dumps(chat_line("odd"))[:-1] + f', "note": {value}}}'
    async with api_of(FakeEngine()) as api:
        content = "\n".join([line, json.dumps(chat_line("plain"))]).encode(errors="surrogateescape")
        file = await api.files.create(file=("lines.jsonl", content), purpose="batch")
        fields: Any = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = await api.batches.create(input_file_id=file.id, **fields)
        batch = await until(api, batch.id, has_ended)
        assert batch.status == "completed", batch.errors
        assert set(await lines_of(api, batch.output_file_id)) == {"odd", "plain"}


async def test_a_line_cannot_ask_for_a_stream() -> None:
    async with api_of(FakeEngine()) as api:
        line = chat_line("a")
        line["body"]["stream"] = True
        batch = await until(api, (await start(api, [line])).id, has_ended)
        errors = await lines_of(api, batch.error_file_id)
        assert errors["a"]["response"]["body"]["error"]["param"] == "stream"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        (chat_line(""), "custom_id"),
        (chat_line("a", method="GET"), "method"),
        (chat_line("a", url="/v1/completions"), "url"),
        (chat_line("a", body=None), "body"),
        (chat_line("first"), "was used before"),
        ("[" * 300 + "]" * 300, "the line must be a JSON object"),
    ],
)
async def test_a_wrong_line_fails_the_batch_before_anything_is_computed(line: Any, message: str) -> None:
    engine = FakeEngine()
    async with api_of(engine) as api:
        batch = await until(api, (await start(api, [chat_line("first"), line])).id, has_ended)
        assert batch.status == "failed"
        assert batch.errors is not None and batch.errors.data is not None
        assert [error.line for error in batch.errors.data] == [2]
        assert message in (batch.errors.data[0].message or "")
        assert not engine.requests


async def test_lines_run_below_every_other_request_and_a_bounded_number_at_once() -> None:
    engine = FakeEngine(is_manual=True)
    async with api_of(engine) as api:
        await start(api, [chat_line(f"line-{i}") for i in range(20)])
        limit = engine.max_running_requests // 2
        await engine.until(lambda: len(engine.live) == limit)
        await asyncio.sleep(0.05)
        assert len(engine.requests) == limit
        assert all(request.priority < -1000 for request in engine.requests)
        engine.finish(engine.states[0], FinishReason("stop"))
        await engine.until(lambda: len(engine.requests) == limit + 1)


async def test_a_restarted_server_computes_no_line_twice(tmp_path: Path) -> None:
    engine = FakeEngine(is_manual=True)
    async with api_of(engine, file_storage_path=str(tmp_path)) as api:
        batch = await start(api, [chat_line(f"line-{i}", f"{i}") for i in range(6)])
        await engine.until(lambda: len(engine.live) == 4)
        for request in list(engine.live.values())[:3]:
            engine.finish(request, FinishReason("stop"))
        await until(
            api, batch.id, lambda batch: batch.request_counts is not None and batch.request_counts.completed == 3
        )
    assert not engine.live, "what is not done is aborted"
    write_half_a_line(tmp_path)
    engine = FakeEngine()
    async with api_of(engine, file_storage_path=str(tmp_path)) as api:
        batch = await until(api, batch.id, has_ended)
        assert batch.status == "completed"
        assert batch.request_counts is not None and batch.request_counts.completed == 6
        assert len(engine.requests) == 3
        assert set(await lines_of(api, batch.output_file_id)) == {f"line-{i}" for i in range(6)}
    async with api_of(FakeEngine(), file_storage_path=str(tmp_path)) as api:
        assert (await api.batches.retrieve(batch.id)).status == "completed"
        assert len((await api.files.list()).data) == 2


WHOLE_BATCH: dict[str, Any] = {
    "id": "batch_1", "endpoint": "/v1/chat/completions", "input_file_id": "file-1", "status": "in_progress",
    "expires_at": 1 << 40, "in_progress_at": 1, "created_at": 1,
    "request_counts": {"total": 1, "completed": 0, "failed": 0},
}  # fmt: skip
DAMAGES: list[Any] = [b"", b"{}", b"[]", b'{"id": "file-other"}', b"\xff", *(
    {**WHOLE_BATCH, **change} for change in (
        {"status": "half way"}, {"status": 7}, {"created_at": "today"}, {"request_counts": {"total": 1}},
        {"request_counts": None}, {"expires_at": None}, {"input_file_id": ["file-1"]}, {"endpoint": 1},
    )
), *({name: value for name, value in WHOLE_BATCH.items() if name != without} for without in WHOLE_BATCH)]  # fmt: skip


@pytest.mark.parametrize("damage", [*DAMAGES, "folder"])
async def test_a_damaged_record_is_put_aside_by_name_and_the_server_starts(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with api_of(FakeEngine(), file_storage_path=str(tmp_path)) as api:
        batch = await until(api, (await start(api, [chat_line("a")])).id, has_ended)
    damaged = [tmp_path / "file-1.json", tmp_path / "batches" / "batch_1.json"]
    for path in damaged:
        if damage == "folder":
            path.mkdir()
        else:
            path.write_bytes(damage if isinstance(damage, bytes) else json.dumps(damage).encode())
    async with api_of(FakeEngine(), file_storage_path=str(tmp_path)) as api:
        assert [one.id for one in (await api.batches.list()).data] == [batch.id]
        assert len((await api.files.list()).data) == 2
        assert (await until(api, (await start(api, [chat_line("b")])).id, has_ended)).status == "completed"
    for path in damaged:
        assert f"{path} is damaged and left out" in caplog.text
        assert not path.exists() and len(list((path.parent / "damaged").glob(f"{path.name}.*"))) == 1


async def test_a_storage_folder_full_of_the_wrong_things_is_cleared_and_used(tmp_path: Path) -> None:
    (tmp_path / "file-1.part").mkdir()
    (tmp_path / "batches").write_text("a file in a folder's place")
    (tmp_path / "file-2.json").write_text(
        json.dumps({"id": "file-2", "created_at": 1, "bytes": 3, "filename": "x", "purpose": "batch"})
    )  # whose bytes are missing
    async with api_of(FakeEngine(), file_storage_path=str(tmp_path)) as api:
        assert (await api.files.list()).data == []
        assert (await until(api, (await start(api, [chat_line("a")])).id, has_ended)).status == "completed"


@pytest.mark.parametrize("name", ["lock", "batches", "."])
async def test_a_disk_without_an_inode_left_costs_files_and_batches_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "files"

    def refuse(place: str) -> None:
        made = getattr(os, place)

        def sometimes(path: Any, *args: Any, **more: Any) -> Any:
            if Path(path) == folder / name:
                raise OSError(errno.ENOSPC, "No space left on device")
            return made(path, *args, **more)

        monkeypatch.setattr(os, place, sometimes)

    refuse("mkdir")
    refuse("open")
    async with serving(FakeEngine(), file_storage_path=str(folder)) as client:
        assert (await client.post("/generate", json={"text": "Hi"})).status == 200
        response = await client.get("/v1/batches")
        assert (response.status, "No space left" in await response.text()) == (503, True)


async def test_a_damaged_answer_is_put_aside_and_computed_again(tmp_path: Path) -> None:
    engine = FakeEngine(is_manual=True)
    async with api_of(engine, file_storage_path=str(tmp_path)) as api:
        batch = await start(api, [chat_line(f"line-{i}") for i in range(4)])
        await engine.until(lambda: len(engine.live) == 4)
        for request in list(engine.live.values())[:3]:
            engine.finish(request, FinishReason("stop"))
        await until(api, batch.id, lambda one: one.request_counts is not None and one.request_counts.completed == 3)
    path = output_in(tmp_path)
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\0" * len(second) + b"\n[]\n" + third)
    engine = FakeEngine()
    async with api_of(engine, file_storage_path=str(tmp_path)) as api:
        batch = await until(api, batch.id, has_ended)
        assert (batch.status, len(engine.requests)) == ("completed", 2)
        assert len(await lines_of(api, batch.output_file_id)) == 4
    assert len(list((tmp_path / "damaged").glob(f"{path.name}.*"))) == 1


async def test_a_batch_whose_input_is_gone_fails_with_the_answers_that_there_are(tmp_path: Path) -> None:
    engine = FakeEngine(is_manual=True)
    async with api_of(engine, file_storage_path=str(tmp_path)) as api:
        batch = await start(api, [chat_line("a"), chat_line("b")])
        await engine.until(lambda: len(engine.live) == 2)
        engine.finish(engine.states[0], FinishReason("stop"))
        await until(api, batch.id, lambda one: one.request_counts is not None and one.request_counts.completed == 1)
    (tmp_path / batch.input_file_id).unlink()
    async with api_of(FakeEngine(), file_storage_path=str(tmp_path)) as api:
        batch = await until(api, batch.id, has_ended)
        assert batch.status == "failed" and batch.errors is not None and batch.errors.data is not None
        assert "no such file" in (batch.errors.data[0].message or "")
        assert len(await lines_of(api, batch.output_file_id)) == 1


# ---- a disk that is full ----


class FullDisk:
    """Refuses what is written into a folder, after half of it, until there is room."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full, self._folder, self._write = False, str(folder), os.write
        self._write_bytes = Path.write_bytes
        monkeypatch.setattr("server.apis.batch.DISK_RETRY_S", 0.01)
        monkeypatch.setattr(os, "write", self.write)
        monkeypatch.setattr(Path, "write_bytes", lambda path, content: self.write_bytes(path, content))

    def write(self, fd: int, content: Any) -> int:
        if self.is_full and os.readlink(f"/proc/self/fd/{fd}").startswith(self._folder):
            if len(content) > 1:
                return self._write(fd, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._write(fd, content)

    def write_bytes(self, path: Path, content: bytes) -> int:
        if self.is_full and str(path).startswith(self._folder):
            path.touch()
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._write_bytes(path, content)


async def test_a_batch_waits_while_the_disk_is_full_and_ends_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk, engine = FullDisk(tmp_path, monkeypatch), FakeEngine(is_manual=True)
    async with api_of(engine, file_storage_path=str(tmp_path)) as api:
        batch = await start(api, [chat_line(f"line-{i}") for i in range(4)])
        await engine.until(lambda: len(engine.live) == 4)
        engine.finish(engine.states[0], FinishReason("stop"))
        await until(api, batch.id, lambda one: one.request_counts is not None and one.request_counts.completed == 1)
        disk.is_full = True
        for request in list(engine.live.values()):
            engine.finish(request, FinishReason("stop"))
        batch = await until(api, batch.id, lambda _: "waits until the disk takes its answers" in caplog.text)
        assert (batch.status, batch.request_counts and batch.request_counts.completed) == ("in_progress", 1)
        path = output_in(tmp_path)
        assert [json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()] == ["line-0"]
        with pytest.raises(openai.APIStatusError, match="No space left"):
            await api.batches.cancel(batch.id)
        assert (await api.batches.retrieve(batch.id)).status == "in_progress", "what the disk refused has not happened"
        assert caplog.text.count("waits until the disk takes its answers") == 1
        disk.is_full = False
        batch = await until(api, batch.id, has_ended)
        assert batch.status == "completed"
        assert set(await lines_of(api, batch.output_file_id)) == {f"line-{i}" for i in range(4)}


@pytest.mark.parametrize("ending", ["in_progress", "finalizing"])
async def test_a_server_that_ends_on_a_full_disk_leaves_a_batch_that_the_next_one_completes(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk, engine = FullDisk(tmp_path, monkeypatch), FakeEngine(is_manual=True)
    async with api_of(engine, file_storage_path=str(tmp_path)) as api:
        batch = await start(api, [chat_line(f"line-{i}") for i in range(3)])
        await engine.until(lambda: len(engine.live) == 3)
        engine.finish(engine.states[0], FinishReason("stop"))
        await until(api, batch.id, lambda one: one.request_counts is not None and one.request_counts.completed == 1)
        if ending == "finalizing":
            monkeypatch.setattr("server.apis.batch.Batch._keep_answers", lambda *_: setattr(disk, "is_full", True))
        else:
            disk.is_full = True
        for request in list(engine.live.values()):
            engine.finish(request, FinishReason("stop"))
        batch = await until(api, batch.id, lambda _: "waits until the disk takes its answers" in caplog.text)
        assert batch.status == ending
    monkeypatch.undo()
    assert json.loads((tmp_path / "batches" / f"{batch.id}.json").read_bytes())["status"] == ending
    assert not [name for name in os.listdir(tmp_path / "batches") if name.endswith(".part")]
    engine = FakeEngine()
    async with api_of(engine, file_storage_path=str(tmp_path)) as api:
        batch = await until(api, batch.id, has_ended)
        assert (batch.status, len(engine.requests)) == ("completed", 2 if ending == "in_progress" else 0)
        assert len(await lines_of(api, batch.output_file_id)) == 3


async def test_a_cancelled_batch_keeps_its_answers() -> None:
    engine = FakeEngine(is_manual=True)
    async with api_of(engine) as api:
        batch = await start(api, [chat_line(f"line-{i}") for i in range(6)])
        await engine.until(lambda: len(engine.live) == 4)
        engine.finish(engine.states[0], FinishReason("stop"))
        await until(
            api, batch.id, lambda batch: batch.request_counts is not None and batch.request_counts.completed == 1
        )
        assert (await api.batches.cancel(batch.id)).status == "cancelling"
        batch = await until(api, batch.id, has_ended)
        assert batch.status == "cancelled"
        assert not engine.live
        assert len(await lines_of(api, batch.output_file_id)) == 1
        errors = await lines_of(api, batch.error_file_id)
        assert [line["error"]["code"] for line in errors.values()] == ["batch_cancelled"] * 5
        with pytest.raises(openai.BadRequestError, match="nothing to cancel"):
            await api.batches.cancel(batch.id)


@pytest.mark.parametrize("line", ["{", "[]", json.dumps({"method": "POST"})])
async def test_a_batch_can_be_cancelled_before_its_file_is_known_to_be_wrong(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_cancelled = threading.Event()
    monkeypatch.setattr("server.apis.batch.check_lines", lambda *_: is_cancelled.wait(60))
    async with api_of(FakeEngine()) as api:
        batch = await start(api, [line])
        await asyncio.sleep(0)
        assert (await api.batches.cancel(batch.id)).status == "cancelling"
        is_cancelled.set()
        batch = await until(api, batch.id, has_ended)
        assert (batch.status, batch.output_file_id, batch.error_file_id) == ("cancelled", None, None)


async def test_a_batch_that_outlives_its_window_expires() -> None:
    async with api_of(FakeEngine(is_manual=True)) as api:
        batch = await start(api, [chat_line("a")], completion_window="1s")
        batch = await until(api, batch.id, has_ended)
        assert batch.status == "expired"
        assert (await lines_of(api, batch.error_file_id))["a"]["error"]["code"] == "batch_expired"


async def test_a_full_queue_only_delays_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.apis.batch.RETRY_S", 0.01)
    engine = FakeEngine()
    submit, num_refused = engine.submit, 0

    def refuse_twice(state: RequestState) -> None:
        nonlocal num_refused
        if num_refused < 2:
            num_refused += 1
            raise QueueFull("the queue is full")
        submit(state)

    monkeypatch.setattr(engine, "submit", refuse_twice)
    async with api_of(engine) as api:
        batch = await until(api, (await start(api, [chat_line("a")])).id, has_ended)
        assert batch.request_counts is not None and batch.request_counts.completed == 1


# ---- files ----


async def test_a_file_comes_back_as_it_was_until_it_is_deleted() -> None:
    async with api_of(FakeEngine()) as api:
        content = bytes(range(256)) * 10_000
        file = await api.files.create(file=("some.jsonl", content), purpose="batch")
        assert (file.bytes, file.filename, file.purpose, file.object) == (len(content), "some.jsonl", "batch", "file")
        assert (await api.files.content(file.id)).content == content
        assert [one.id for one in (await api.files.list()).data] == [file.id]
        assert (await api.files.retrieve(file.id)).id == file.id
        assert (await api.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await api.files.retrieve(file.id)


@pytest.mark.parametrize("place", ["pathlib.Path.write_bytes", "builtins.open"])
async def test_a_full_disk_is_told_and_leaves_nothing(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with api_of(FakeEngine(), file_storage_path=str(tmp_path)) as api:
        before = sorted(os.listdir(tmp_path))
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            with pytest.raises(openai.APIStatusError, match=f"{tmp_path}: No space left") as caught:
                await api.files.create(file=("a", b"x"), purpose="batch")
        assert caught.value.status_code == 503
        assert sorted(os.listdir(tmp_path)) == before


async def test_a_batch_that_the_disk_has_no_room_for_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with api_of(FakeEngine(is_manual=True)) as api:
        batch = await start(api, [chat_line("a")])
        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.write_bytes", fail)
            with pytest.raises(openai.APIStatusError, match="No space left") as caught:
                await api.batches.create(
                    input_file_id=batch.input_file_id, endpoint="/v1/chat/completions", completion_window="24h"
                )
        assert caught.value.status_code == 503
        assert [one.id for one in (await api.batches.list()).data] == [batch.id]


async def test_a_file_that_a_batch_reads_cannot_be_deleted() -> None:
    async with api_of(FakeEngine(is_manual=True)) as api:
        batch = await start(api, [chat_line("a")])
        with pytest.raises(openai.BadRequestError, match=batch.id):
            await api.files.delete(batch.input_file_id)


async def test_a_long_file_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    async with api_of(FakeEngine(), max_file_bytes=1000, file_storage_path=str(tmp_path)) as api:
        with pytest.raises(openai.APIStatusError) as caught:
            await api.files.create(file=("a.jsonl", b"x" * 1001), purpose="batch")
        assert caught.value.status_code == 413
        assert set(os.listdir(tmp_path)) == {"lock", "batches"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"file": b"{}"}, "purpose"),
        ({"file": b"{}", "purpose": "assistants"}, "purpose"),
        ({"purpose": "batch"}, "file"),
        ({"file": b"{}", "purpose": "batch", "expires_after": "1"}, "expires_after"),
    ],
)
async def test_a_wrong_form_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    async with serving(FakeEngine()) as client:
        form = FormData(default_to_multipart=True)
        for name, value in fields.items():
            form.add_field(name, value, filename="a.jsonl" if name == "file" else None)
        response = await client.post("/v1/files", data=form)
        assert response.status == 400
        assert (await response.json())["error"]["param"] == named


def form_part(headers: bytes, content: bytes) -> bytes:
    return b"--x\r\nContent-Disposition: form-data; " + headers + b"\r\n\r\n" + content + b"\r\n"


A_FILE = form_part(b'name="file"; filename="a.jsonl"', b"{}")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (A_FILE, "more than one file"),
        (form_part(b'name="\xe9"', b"1"), "unknown field"),
        (form_part(b'name="a\0"', b"1"), "headers"),
        (form_part(b'name="a"\r\nX: ' + b"x" * 20_000, b"1"), "headers"),
    ],
)
async def test_a_form_that_is_wrong_in_its_bytes_is_refused_and_leaves_nothing(
    part: bytes, message: str, tmp_path: Path
) -> None:
    async with serving(FakeEngine(), file_storage_path=str(tmp_path)) as client:
        form = form_part(b'name="purpose"', b"batch") + A_FILE + part + b"--x--\r\n"
        response = await client.post(
            "/v1/files", data=form, headers={"Content-Type": "multipart/form-data; boundary=x"}
        )
        assert response.status == 400
        assert message in (await response.json())["error"]["message"]
        assert set(os.listdir(tmp_path)) == {"lock", "batches"}


async def test_a_file_whose_name_is_not_utf_8_is_kept_and_listed() -> None:
    async with serving(FakeEngine()) as client:
        form = form_part(b'name="purpose"', b"batch") + A_FILE.replace(b"a.jsonl", b"caf\xe9.jsonl") + b"--x--\r\n"
        response = await client.post(
            "/v1/files", data=form, headers={"Content-Type": "multipart/form-data; boundary=x"}
        )
        assert response.status == 200
        assert (await response.json())["filename"] == "caf\N{REPLACEMENT CHARACTER}.jsonl"
        assert len((await (await client.get("/v1/files")).json())["data"]) == 1


async def test_lists_come_in_pages_newest_first() -> None:
    async with api_of(FakeEngine()) as api:
        ids = [(await api.files.create(file=("a", b"{}"), purpose="batch")).id for _ in range(3)]
        first = await api.files.list(limit=2)
        assert [file.id for file in first.data] == ids[:0:-1]
        assert first.has_more
        assert [file.id async for file in first] == ids[::-1]


@pytest.mark.parametrize("limit", ["0", "-1", "10001", "x", "1.5", "", "9" * 5000])
async def test_a_page_that_cannot_be_is_refused(limit: str) -> None:
    async with serving(FakeEngine()) as client:
        for path in ("/v1/files", "/v1/batches"):
            response = await client.get(path, params={"limit": limit})
            assert response.status == 400
            assert (await response.json())["error"]["param"] == "limit"


async def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    async with (
        api_of(FakeEngine(), file_storage_path=str(tmp_path)),
        api_of(FakeEngine(), file_storage_path=str(tmp_path)) as second,
    ):
        with pytest.raises(openai.APIStatusError, match="--file-storage-path") as caught:
            await second.files.list()
        assert caught.value.status_code == 503
