"""Sessions: a request continues another's tokens, and the cache saves what was computed before."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from engine.state import FinishReason
from server.app import build_app
from server.config import ServerConfig
from tests.client import Client
from tests.fake_engine import FakeEngine, serving
from tests.test_engine import running_engine


async def post(client: Client, path: str, **body: Any) -> tuple[int, Any]:
    response = await client.post(path, json=body)
    text = await response.text()
    return response.status, await response.json() if text else None


async def opened(client: Client, **body: Any) -> str:
    status, session_id = await post(client, "/open_session", **body)
    assert status == 200
    return session_id


async def say(client: Client, session_id: str, text: str, rid: str = "", **params: Any) -> str:
    """Generate in the session, after turn `rid`. The new turn's rid."""
    session = {"id": session_id, "rid": rid or None, **params}
    status, answer = await post(client, "/generate", text=text, session_params=session)
    assert status == 200, answer
    return answer["meta_info"]["id"]


def prompts_of(engine: FakeEngine) -> list[str]:
    return [bytes(request.input_ids).decode() for request in engine.requests]


async def test_a_turn_continues_the_tokens_of_another() -> None:
    engine = FakeEngine("[A]")
    async with serving(engine) as client:
        session = await opened(client, capacity_of_str_len=1000)
        first = await say(client, session, "one")
        second = await say(client, session, "two", first)
        await say(client, session, "three", second)
        await say(client, session, "other", first)  # a branch
        await say(client, session, "new")  # without a rid nothing is continued
        assert prompts_of(engine) == ["one", "one[A]two", "one[A]two[A]three", "one[A]other", "new"]


async def test_offset_and_dropped_output_cut_what_is_continued() -> None:
    engine = FakeEngine("[A]")
    async with serving(engine) as client:
        session = await opened(client)
        first = await say(client, session, "one")
        second = await say(client, session, "two", first, offset=2)
        await say(client, session, "three", second, drop_previous_output=True)
        assert prompts_of(engine)[1:] == ["ontwo", "ontwothree"]


async def test_an_offset_counts_tokens_to_keep_from_either_end_and_0_keeps_all() -> None:
    engine = FakeEngine("[A]")
    async with serving(engine) as client:
        session = await opened(client)
        first = await say(client, session, "one")
        for offset in (0, -1, -2, 6, -6):
            await say(client, session, "x", first, offset=offset)
        assert prompts_of(engine)[1:] == ["one[A]x", "one[Ax", "one[x", "one[A]x", "x"]


async def test_an_offset_without_a_turn_to_continue_has_no_effect() -> None:
    engine = FakeEngine("[A]")
    async with serving(engine) as client:
        session = await opened(client)
        for offset in (1, 0, -1, -2):
            await say(client, session, "one", offset=offset)
        assert prompts_of(engine) == ["one"] * 4


async def test_replace_forgets_what_followed() -> None:
    engine = FakeEngine("[A]")
    async with serving(engine) as client:
        session = await opened(client)
        first = await say(client, session, "one")
        second = await say(client, session, "two", first)
        third = await say(client, session, "three", second)
        again = await say(client, session, "2", first, replace=True)
        assert prompts_of(engine)[-1] == "one[A]2"
        for gone in (second, third):
            body = {"text": "x", "session_params": {"id": session, "rid": gone}}
            assert (await post(client, "/generate", **body))[0] == 400
        await say(client, session, "three", again)
        assert prompts_of(engine)[-1] == "one[A]2[A]three"


async def test_a_running_turn_can_only_be_continued_by_ending_it() -> None:
    engine = FakeEngine(is_manual=True)
    async with serving(engine) as client:
        session = await opened(client)
        body = {"text": "one", "rid": "first", "session_params": {"id": session}}
        running = asyncio.create_task(post(client, "/generate", **body))
        await engine.until(lambda: "first" in engine.live)
        engine.emit(engine.live["first"], "[half")
        follow: dict[str, Any] = {"text": "two", "rid": "second", "session_params": {"id": session, "rid": "first"}}
        status, error = await post(client, "/generate", **follow)
        assert status == 400 and "has ended" in error["error"]["message"]
        follow["session_params"]["replace"] = True
        second = asyncio.create_task(post(client, "/generate", **follow))
        await engine.until(lambda: "second" in engine.live)
        assert prompts_of(engine)[-1] == "one[halftwo"
        engine.finish(engine.live["second"], FinishReason("stop"))
        assert (await running)[1]["meta_info"]["finish_reason"]["type"] == "abort"
        assert (await second)[0] == 200


async def test_a_refused_turn_is_no_turn() -> None:
    engine = FakeEngine("[A]", context_length=20)
    async with serving(engine) as client:
        session = await opened(client)
        body = {"rid": "mine", "sampling_params": {"max_new_tokens": 4}, "session_params": {"id": session}}
        assert (await post(client, "/generate", text="x" * 30, **body))[0] == 400
        assert (await post(client, "/generate", text="x", **body))[0] == 200
        status, error = await post(client, "/generate", text="x", **body)
        assert status == 400 and error["error"]["field"] == "rid"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"session_params": {"id": "nope"}}, "session_params.id"),
        ({"session_params": {"id": "s", "rid": "nope"}}, "session_params.rid"),
        ({"session_params": {"id": "s", "rid": "r", "offset": -99}}, "session_params.offset"),
        ({"session_params": {"id": "s", "rid": "r", "offset": 99}}, "session_params.offset"),
        ({"session_params": {"id": "s", "rid": 5}}, "session_params.rid"),
        ({"session_params": 5}, "session_params"),
        ({"text": ["a", "b"]}, "session_params"),
        ({"sampling_params": {"n": 2}}, "n"),
        ({"text": "x" * 50}, "session_params.id"),
    ],
)
async def test_what_is_wrong_is_named(changes: dict[str, Any], field: str) -> None:
    async with serving(FakeEngine()) as client:
        await opened(client, session_id="s", capacity_of_str_len=40)
        good = {"text": "a", "session_params": {"id": "s"}}
        assert (await post(client, "/generate", **good, rid="r"))[0] == 200
        status, error = await post(client, "/generate", **(good | changes))
        assert (status, error["error"]["field"]) == (400, field)


async def test_a_closed_session_is_gone() -> None:
    async with serving(FakeEngine()) as client:
        session = await opened(client, session_id="mine")
        assert session == "mine"
        assert (await post(client, "/open_session", session_id="mine"))[0] == 400
        assert (await post(client, "/close_session", session_id="mine"))[0] == 200
        assert (await post(client, "/close_session", session_id="mine"))[0] == 400
        assert (await post(client, "/generate", text="a", session_params={"id": "mine"}))[0] == 400


async def test_a_streamed_turn_is_continued_and_its_prefix_cached(tiny_llama: Path, tmp_path: Path) -> None:
    async with running_engine(tiny_llama) as engine:
        config = ServerConfig(model_path=str(tiny_llama), file_storage_path=str(tmp_path))
        async with TestClient(TestServer(build_app(engine, config))) as client:
            session = await opened(client)
            params = {"max_new_tokens": 20, "temperature": 0.0, "ignore_eos": True}
            body = {"text": "The quick brown fox", "rid": "first", "stream": True, "sampling_params": params}
            response = await client.post("/generate", json={**body, "session_params": {"id": session}})
            assert response.status == 200
            await response.read()
            body = {"text": " and then", "sampling_params": params, "session_params": {"id": session, "rid": "first"}}
            _, answer = await post(client, "/generate", **body)
            head = len(await engine.encode("The quick brown fox"))
            tail = len(await engine.encode(" and then", add_special_tokens=False))
            assert answer["meta_info"]["prompt_tokens"] == head + 20 + tail
            assert answer["meta_info"]["cached_tokens"] == head + 19, "all but the last sampled token"
