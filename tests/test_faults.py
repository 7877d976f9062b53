"""Whatever raises, those it concerns end with a clear error, the others with their answers, and the engine goes on.

Faults are injected into the real engine on a tiny model. In the end nothing is held, and an answer is what it was.
"""

import asyncio
import json
import logging
import random
import resource
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import ClientConnectionError
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.web import StreamResponse

from engine.errors import EngineStopped
from engine.local import LocalEngine
from engine.state import Delta, RequestState
from engine.text.tokenizer import Tokenizer
from server.apis.blocks import Blocks
from server.app import build_app
from server.config import ServerConfig
from server.parsers import AnswerDelta
from tests.test_engine import check_pages, collect, make_state, running_engine

BAD = 77  # a token that the victim's prompt begins with, and no other's


@dataclass
class Scene:
    """Yield a running engine, and what an undisturbed request answers."""

    engine: LocalEngine
    monkeypatch: pytest.MonkeyPatch
    prompt: list[int]
    expected: list[int]

    def break_once(self, owner: Any, name: str, error: Exception) -> Callable[[], int]:
        """Make the next call of `owner.name` raise. Return a function that counts how often it has."""
        whole, num_raised = getattr(owner, name), 0

        def broken(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_raised
            self.monkeypatch.setattr(owner, name, whole)
            num_raised += 1
            raise error

        self.monkeypatch.setattr(owner, name, broken)
        return lambda: num_raised

    async def answer(self, **fields: Any) -> list[int]:
        _, tokens = await collect(self.engine, make_state(self.prompt, **fields))
        return tokens

    async def check_all_is_well(self) -> None:
        assert await self.answer() == self.expected
        assert await self.answer(stream=True) == self.expected
        assert self.engine.is_running
        assert self.engine.health().status == "ok"


@pytest.fixture(params=[False, True], ids=["overlap", "no_overlap"])
async def scene(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> AsyncIterator[Scene]:
    rng = random.Random(3)
    prompt = [rng.randrange(100, 380) for _ in range(40)]
    async with running_engine(tiny_llama, disable_overlap_schedule=request.param) as engine:
        _, expected = await collect(engine, make_state(prompt))
        yield Scene(engine, monkeypatch, prompt, expected)


def failure_of(deltas: list[Delta]) -> tuple[int | None, str]:
    reason = deltas[-1].finish_reason
    assert reason is not None
    return (reason.status_code, reason.message or "") if reason.type == "abort" else (None, "")


def faults(scene: Scene) -> dict[str, tuple[Any, str]]:
    parts = scene.engine.parts
    return {
        "forward": (parts.runner, "forward"),
        "logits": (parts.runner.model, "compute_logits"),
        "sampler": (parts.runner.sampler, "sample"),
        "sampling_plan": (parts.runner.sampler, "plan_work"),
        "staging": (parts.runner.stager, "write"),
        "allocator_of_prompts": (parts.scheduler.held.allocator, "extend"),
        "allocator_of_decodes": (parts.scheduler.held.allocator, "extend_each"),
        "cache_match": (parts.scheduler.held.cache, "match"),
        "cache_insert": (parts.scheduler.held.cache, "insert"),
        "rows": (parts.rows, "allocate"),
    }


@pytest.mark.parametrize(
    "place",
    ["forward", "logits", "sampler", "sampling_plan", "staging", "allocator_of_prompts", "allocator_of_decodes",
     "cache_match", "cache_insert", "rows"],
)  # fmt: skip
async def test_a_step_that_raises_ends_its_requests_and_the_engine_goes_on(scene: Scene, place: str) -> None:
    for stream in (False, True):
        owner, name = faults(scene)[place]
        num_raised = scene.break_once(owner, name, RuntimeError(f"injected into {place}"))
        deltas, _ = await collect(scene.engine, make_state([BAD, *scene.prompt], stream=stream))
        assert num_raised() == 1
        status, message = failure_of(deltas)
        assert status == 500
        assert f"injected into {place}" in message
        await scene.check_all_is_well()


@pytest.mark.parametrize("place", ["forward", "sampler", "allocator_of_decodes", "allocator_of_prompts"])
async def test_whoever_is_not_in_the_step_that_raised_gets_the_right_answer(scene: Scene, place: str) -> None:
    """Of many requests that come and go, those that end without an error have their answers to the last token."""
    owner, name = faults(scene)[place]
    rng = random.Random(7)
    outcomes: list[tuple[int | None, list[int]]] = []

    async def ask(i: int) -> None:
        await asyncio.sleep(rng.random() * 0.3)
        deltas, tokens = await collect(scene.engine, make_state(scene.prompt, stream=bool(i % 2)))
        outcomes.append((failure_of(deltas)[0], tokens))

    async def sabotage() -> None:
        for _ in range(3):
            await asyncio.sleep(0.08)
            scene.break_once(owner, name, RuntimeError("injected"))

    await asyncio.gather(sabotage(), *(ask(i) for i in range(24)))
    assert len(outcomes) == 24
    for status, tokens in outcomes:
        assert tokens == scene.expected if status is None else status == 500
    scene.monkeypatch.undo()
    await scene.check_all_is_well()


async def test_out_of_memory_on_the_device_is_one_steps_failure(scene: Scene) -> None:
    scene.break_once(scene.engine.parts.runner, "forward", torch.OutOfMemoryError("CUDA out of memory"))
    deltas, _ = await collect(scene.engine, make_state(scene.prompt[5:]))
    assert failure_of(deltas) == (500, "step failed: OutOfMemoryError: CUDA out of memory")
    await scene.check_all_is_well()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_logits_that_are_not_finite_end_their_own_request_only(
    scene: Scene, value: float, temperature: float
) -> None:
    """The victim stands in the same steps as the others, and its logits are poisoned after a few tokens."""
    sampler, seen = scene.engine.parts.runner.sampler, list[int]()
    sample = sampler.sample
    victim = make_state([BAD, *scene.prompt], stream=True, temperature=temperature, sampling_seed=1)

    def poisoned(logits: torch.Tensor, work: Any, rows: torch.Tensor, positions: torch.Tensor) -> Any:
        if len(seen) > 3:
            logits = logits.clone()
            logits[rows == victim.row] = value
        return sample(logits, work, rows, positions)

    scene.monkeypatch.setattr(sampler, "sample", poisoned)
    bystanders = [asyncio.create_task(scene.answer(stream=bool(i % 2))) for i in range(3)]
    deltas = []
    async for delta in scene.engine.generate(victim):
        seen += delta.token_ids
        deltas.append(delta)
    status, message = failure_of(deltas)
    assert status == 500
    assert "not finite" in message
    assert all(token >= 0 for token in seen)
    assert await asyncio.gather(*bystanders) == [scene.expected] * 3
    scene.monkeypatch.undo()
    await scene.check_all_is_well()


@dataclass
class BrokenText:
    """A text stream that raises at its third token."""

    inner: Any
    num_pushes: int = 0

    def push(self, token_ids: list[int]) -> str:
        self.num_pushes += len(token_ids)
        if self.num_pushes >= 3:
            raise ValueError("injected into the detokenizer")
        return self.inner.push(token_ids)

    def finish(self) -> str:
        return self.inner.finish()

    @property
    def has_stops(self) -> bool:
        return self.inner.has_stops

    @property
    def matched_stop(self) -> str | None:
        return self.inner.matched_stop


def break_texts(scene: Scene) -> None:
    """Of prompts that begin with BAD, until the scene's patches are undone."""
    text_stream = Tokenizer.text_stream

    def sometimes_broken(self: Tokenizer, params: Any, input_ids: list[int]) -> Any:
        whole = text_stream(self, params, input_ids)
        return BrokenText(whole) if input_ids[0] == BAD else whole

    scene.monkeypatch.setattr(Tokenizer, "text_stream", sometimes_broken)


async def test_a_detokenizer_that_raises_fails_its_own_request_only(scene: Scene) -> None:
    break_texts(scene)
    for stream in (False, True):
        bystanders = [asyncio.create_task(scene.answer(stream=bool(i % 2))) for i in range(3)]
        deltas, _ = await collect(scene.engine, make_state([BAD, *scene.prompt], stream=stream))
        status, message = failure_of(deltas)
        assert status == 500
        assert "injected into the detokenizer" in message
        assert await asyncio.gather(*bystanders) == [scene.expected] * 3
    scene.monkeypatch.undo()
    await scene.check_all_is_well()


@pytest.mark.parametrize("pattern", ["[0-9]{2}(never mind ){3}", "(never mind ){3}[0-9]{2}"])
async def test_a_detokenizer_that_raises_on_forced_tokens_fails_its_own_request_only(
    scene: Scene, pattern: str
) -> None:
    """They come within the answer, or join the prompt before it is queued."""
    break_texts(scene)
    bystanders = [asyncio.create_task(scene.answer(stream=bool(i % 2))) for i in range(3)]
    victim = make_state([BAD, *scene.prompt], stream=True, regex=pattern)
    deltas, _ = await collect(scene.engine, victim)
    status, message = failure_of(deltas)
    assert status == 500
    assert "injected into the detokenizer" in message
    assert await asyncio.gather(*bystanders) == [scene.expected] * 3
    scene.monkeypatch.undo()
    await scene.check_all_is_well()


async def test_a_parser_that_raises_ends_its_own_message_with_an_error(
    scene: Scene, tiny_llama: Path, tmp_path: Path
) -> None:
    """The victim's stream says what has happened; a whole answer is refused."""
    cut = Blocks.cut
    victims = list[Blocks]()

    def sometimes_broken(self: Blocks, parts: AnswerDelta) -> Any:
        if not victims or self is victims[0]:
            victims.append(self)
            raise RuntimeError("injected into the blocks")
        return cut(self, parts)

    async def ask(client: TestClient[Any, Any], **fields: Any) -> tuple[int, str]:
        body = {"max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, **fields}
        async with client.post("/v1/messages", json=body) as response:
            return response.status, await response.text()

    config = ServerConfig(model_path=str(tiny_llama), file_storage_path=str(tmp_path))
    async with TestClient(TestServer(build_app(scene.engine, config))) as client:
        _, whole = await ask(client, stream=True)
        scene.monkeypatch.setattr(Blocks, "cut", sometimes_broken)
        answers = await asyncio.gather(*(ask(client, stream=True) for _ in range(4)))
        failed = [text for _, text in answers if "injected into the blocks" in text]
        assert len(failed) == 1
        assert failed[0].rstrip().split("\n")[-2] == "event: error"
        good = [text for _, text in answers if text not in failed]
        assert [said(text) for text in good] == [said(whole)] * 3
        victims.clear()
        status, text = await ask(client)
        assert (status, json.loads(text)["type"]) == (500, "error")
    scene.monkeypatch.undo()
    await scene.check_all_is_well()


def said(events: str) -> str:
    """Return the text of a streamed message."""
    lines = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line.startswith("data: ")]
    return "".join(line["delta"].get("text", "") for line in lines if line["type"] == "content_block_delta")


async def test_a_tokenizer_that_raises_queues_nothing(scene: Scene) -> None:
    def broken(*_: Any, **__: Any) -> list[int]:
        raise RuntimeError("injected into the tokenizer")

    scene.monkeypatch.setattr(Tokenizer, "encode", broken)
    for length in (5, 10_000):  # on the event loop, and off it
        with pytest.raises(RuntimeError, match="injected into the tokenizer"):
            await scene.engine.encode("x" * length)
    scene.monkeypatch.setattr(Tokenizer, "text_stream", broken)
    with pytest.raises(RuntimeError, match="injected into the tokenizer"):
        scene.engine.submit(make_state(scene.prompt))
    assert scene.engine.progress() is None, "a request that was refused is not the engine's"
    scene.monkeypatch.undo()
    await scene.check_all_is_well()


async def test_a_receiver_that_raises_ends_its_own_request_only(scene: Scene) -> None:
    def broken(delta: Delta) -> None:
        raise RuntimeError("injected into the sink")

    def submit(prompt: list[int]) -> RequestState:
        state = make_state(prompt, stream=True)
        state.sink = broken
        scene.engine.submit(state)
        return state

    victim = submit([BAD, *scene.prompt])
    assert await asyncio.gather(*(scene.answer(stream=bool(i % 2)) for i in range(3))) == [scene.expected] * 3
    assert victim.finish_reason is not None
    assert victim.finish_reason.type == "abort"
    await scene.check_all_is_well()


async def test_a_fault_that_stays_ends_request_after_request_and_never_the_engine(scene: Scene) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("injected for good")

    scene.monkeypatch.setattr(scene.engine.parts.runner, "forward", broken)
    results = await asyncio.gather(*(collect(scene.engine, make_state([10 + i, 11])) for i in range(6)))
    assert [failure_of(deltas)[0] for deltas, _ in results] == [500] * 6
    scene.monkeypatch.undo()
    await scene.check_all_is_well()


async def test_an_engine_without_its_loop_says_so_and_ends_what_runs(scene: Scene) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("injected into the loop itself")

    scene.monkeypatch.setattr(scene.engine.parts.scheduler, "resolve", broken)
    deltas, _ = await collect(scene.engine, make_state(scene.prompt))
    assert failure_of(deltas)[0] == 500 and "injected into the loop itself" in failure_of(deltas)[1]
    assert "injected into the loop itself" in await asyncio.wait_for(scene.engine.failed(), 60)
    with pytest.raises(EngineStopped):
        scene.engine.submit(make_state(scene.prompt))


async def test_a_cache_that_raises_for_good_ends_request_after_request(scene: Scene) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("injected for good")

    cache_class = type(scene.engine.parts.scheduler.held.cache)
    scene.monkeypatch.setattr(cache_class, "insert", broken)
    results = await asyncio.gather(*(collect(scene.engine, make_state([10 + i, 11])) for i in range(6)))
    assert [failure_of(deltas)[0] for deltas, _ in results] == [500] * 6
    scene.monkeypatch.undo()
    await scene.check_all_is_well()


async def test_a_thousand_clients_that_vanish_leave_nothing_behind_two_steps_later(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their connections end without a word: most wait for their turn, some are within their answers."""
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # both ends of a connection take one
    async with running_engine(tiny_llama, max_running_requests=100, max_total_tokens=1 << 16) as engine:
        runner, all_are_there = engine.parts.runner, threading.Event()
        forward = runner.forward

        def slow_forward(*batch: Any) -> torch.Tensor:
            all_are_there.wait(120)
            time.sleep(0.03)  # so that no answer comes to its end before its client vanishes
            return forward(*batch)

        monkeypatch.setattr(runner, "forward", slow_forward)
        config = ServerConfig(model_path=str(tiny_llama), file_storage_path=str(tmp_path))
        server = TestServer(build_app(engine, config))
        await server.start_server()
        num_tasks = len(asyncio.all_tasks())
        body = (
            b'{"input_ids": [5, 6, 7], "stream": true, "sampling_params": {"max_new_tokens": 400, "ignore_eos": true}}'
        )
        head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        connections = [await asyncio.open_connection(server.host, server.port) for _ in range(1000)]
        for _, writer in connections:
            writer.write(head + body)
        async with asyncio.timeout(120):
            while engine.stats().num_requests < 1000:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            all_are_there.set()
            while engine.stats().scheduler.num_running < 100:  # noqa: ASYNC110
                await asyncio.sleep(0)
            await connections[0][0].readuntil(b"data: ")
        assert engine.stats().scheduler.num_running == 100
        assert engine.stats().scheduler.num_waiting == 900
        for _, writer in connections:
            writer.transport.abort()
        async with asyncio.timeout(60):
            while engine.stats().num_aborted < 1000:  # noqa: ASYNC110
                await asyncio.sleep(0)
            num_steps = engine.stats().loop.num_steps
            while engine.progress() is not None or len(asyncio.all_tasks()) > num_tasks:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert engine.stats().loop.num_steps - num_steps <= 2
        check_pages(engine)
        await server.close()


async def test_a_client_that_vanishes_before_the_headers_is_no_error_in_the_log(
    scene: Scene, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = ServerConfig(model_path=str(tiny_llama), file_storage_path=str(tmp_path))
    async with TestClient(TestServer(build_app(scene.engine, config))) as client:
        num_raised = scene.break_once(StreamResponse, "prepare", ConnectionResetError("injected into the headers"))
        body = {"input_ids": scene.prompt, "stream": True}
        with pytest.raises(ClientConnectionError):
            await client.post("/generate", json=body)
        assert num_raised() == 1
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    await scene.check_all_is_well()
