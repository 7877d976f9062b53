"""Test several processes that serve one model, or one address: their messages, and how they end."""

import asyncio
import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineError, EngineStopped, InvalidRequest, ModelError
from engine.layers.communicator import Communicator
from engine.layers.layer import LayerConfig
from engine.local import LocalEngine
from engine.models.registry import build_model, load_config
from engine.ranks.channel import ChannelReader, open_channel
from engine.replicas.replica_set import ReplicaSet
from engine.request import Request, SamplingParams
from engine.state import Delta, FinishReason, RequestState
from tests.server_processes import descendants, ending, is_alive, is_rank, server, start_server, wait_until
from tests.test_engine import settled

SMALL = 1 << 12  # bytes of ring: a few messages


def sum_messages(reader: ChannelReader, pipe: multiprocessing.connection.Connection) -> None:
    """Check that every message is whole: all its numbers are equal."""
    count = total = 0
    try:
        while True:
            numbers = np.frombuffer(reader.receive(), np.int32)
            assert (numbers == numbers[:1]).all()
            count, total = count + 1, total + int(numbers.sum())
    except EOFError:
        pipe.send((count, total))


def test_messages_arrive_whole_in_other_processes_however_often_the_ring_wraps() -> None:
    context = multiprocessing.get_context("spawn")
    writer, (there, here) = open_channel(2, SMALL)
    ours, theirs = context.Pipe()
    process = context.Process(target=sum_messages, args=(there, theirs))
    process.start()
    there.close()
    thread = threading.Thread(target=sum_messages, args=(here, theirs))
    thread.start()
    total = 0
    for i in range(3000):  # some 600 times round
        numbers = np.full(i % 400, i, np.int32)
        total += int(numbers.sum())
        writer.send(numbers[: i % 7], numbers[i % 7 :], timeout_s=60)  # the process may take long to start
    writer.close()
    assert [ours.recv() for _ in range(2)] == [(3000, total)] * 2
    thread.join()
    process.join()


def test_eight_readers_get_every_message_each_at_its_own_pace() -> None:
    writer, readers = open_channel(8, SMALL)
    num_taken = [0] * 8

    def take(reader: int, num_left: int) -> None:
        while num_taken[reader] < writer.num_sent - num_left:
            i = num_taken[reader]
            assert np.array_equal(np.frombuffer(readers[reader].receive(), np.int32), [i] * (i % 90))
            num_taken[reader] += 1

    for i in range(400):
        writer.send(np.full(i % 90, i, np.int32))
        for reader in range(8):
            take(reader, num_left=reader)  # the last one is furthest behind
    assert [writer.num_unread(reader) for reader in range(8)] == list(range(8))
    writer.close()
    for reader in range(8):
        take(reader, num_left=0)
        with pytest.raises(EOFError):
            readers[reader].receive()


def test_a_slow_reader_holds_the_writer_back_and_loses_nothing() -> None:
    writer, (fast, slow) = open_channel(2, SMALL)
    message = bytes(SMALL // 4 - 8)
    for i in range(4):
        writer.send(message)
        assert len(fast.receive()) == len(message) and writer.num_unread(0) == 0 and writer.num_unread(1) == i + 1
    with pytest.raises(TimeoutError, match="reader 1"):
        writer.send(b"one too many", timeout_s=0.01)
    sender = threading.Thread(target=writer.send, args=(b"the last",))
    sender.start()
    received = [bytes(slow.receive()) for _ in range(5)]
    sender.join()
    assert received == [message] * 4 + [b"the last"]
    assert bytes(fast.receive()) == b"the last"


def test_a_message_stays_as_it_is_until_the_next_is_received() -> None:
    writer, (reader,) = open_channel(1, SMALL)
    writer.send(b"a" * 1000)
    view = reader.receive()
    for _ in range(3):
        writer.send(b"b" * 1000)
    with pytest.raises(TimeoutError):  # the first one's memory is still in use
        writer.send(b"c" * 1000, timeout_s=0.01)
    assert bytes(view) == b"a" * 1000
    reader.receive()
    writer.send(b"c" * 1000)


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    writer, _ = open_channel(1, SMALL)
    with pytest.raises(ValueError, match=r"5000 bytes.*2040"):
        writer.send(bytes(5000))


def test_a_writer_without_its_reader_hears_of_it() -> None:
    writer, (reader,) = open_channel(1, SMALL)
    reader.close()
    with pytest.raises(BrokenPipeError):
        writer.send(b"is anybody there?")


@pytest.mark.parametrize("tp_size", [3, 8])
async def test_what_cannot_be_split_is_told_with_the_numbers(tp_size: int, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=f"num_attention_heads is 4, which cannot be split over {tp_size} ranks"):
        await LocalEngine(EngineConfig(model_path=str(tiny_llama), device="cpu", tp_size=tp_size)).start()


def test_key_and_value_heads_that_cannot_be_split_are_told_with_the_numbers(tiny_llama: Path) -> None:
    sizes = '{"num_attention_heads": 24, "num_key_value_heads": 6, "head_dim": 16}'
    config = load_config(tiny_llama, EngineConfig(json_model_override_args=sizes))
    for num_ranks, is_fine in ((2, True), (3, True), (4, False), (6, True), (8, False), (12, True)):
        layers = LayerConfig(torch.float32, comm=Communicator(0, num_ranks))
        with (
            contextlib.nullcontext()
            if is_fine
            else pytest.raises(
                ModelError, match=f"num_key_value_heads is 6, which cannot be split over {num_ranks} ranks"
            )
        ):
            build_model(config, layers)


ENDLESS = 60_000  # tokens: no machine makes them within one of these tests


@pytest.fixture(scope="module")
def long_llama(make_tiny_model: Callable[..., Path]) -> Path:
    """Return the folder of a model whose context has room for `ENDLESS` tokens."""
    from transformers import LlamaConfig

    return make_tiny_model(LlamaConfig, "long_llama", max_position_embeddings=1 << 16)


@pytest.fixture
async def replicas(long_llama: Path) -> AsyncIterator[ReplicaSet]:
    config = EngineConfig(
        model_path=str(long_llama), device="cpu", dtype="float32", dp_size=2, max_total_tokens=1 << 16, random_seed=0
    )
    engine = ReplicaSet(config)
    async with engine:
        yield engine


async def ask(engine: Engine, input_ids: list[int], **fields: Any) -> list[Delta]:
    options = {name: fields.pop(name) for name in ("stream", "return_logprob", "logprob_start_len") if name in fields}
    params = SamplingParams(**{"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True, **fields})
    state = RequestState(Request(os.urandom(8).hex(), input_ids, params, **options))
    return [delta async for delta in engine.generate(state)]


async def test_engines_behind_one_facade_are_one_engine_until_one_dies(
    replicas: ReplicaSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = replicas
    (delta,) = await ask(engine, [5, 6, 7], return_logprob=True, logprob_start_len=0)
    state = delta.state
    assert len(state.output_ids) == 4 and state.finish_reason == FinishReason("length")
    assert state.input_logprobs is not None and len(state.input_logprobs.token) == 3
    assert state.times.arrived < state.times.scheduled < state.times.first_token <= state.times.finished
    streamed = await ask(engine, [5, 6, 7], stream=True)
    assert [token for delta in streamed for token in delta.token_ids] == state.output_ids and len(streamed) > 1

    (delta,) = await ask(engine, [5, 6, 7], regex="[0-9]{3}", ignore_eos=False, max_new_tokens=8)
    assert delta.text.isdigit() and len(delta.text) == 3
    with pytest.raises(InvalidRequest, match="regex"):
        await ask(engine, [5], regex="[")
    (delta,) = await ask(engine, [5], stop_regex=["(?s)(?:.|.|..)+(?<=\x00)"], max_new_tokens=300)  # refused later on
    assert delta.finish_reason is not None and delta.finish_reason.status_code == 400

    params = SamplingParams(max_new_tokens=ENDLESS, ignore_eos=True)
    endless = RequestState(Request("endless", [9], params, stream=True))
    async with aclosing(engine.generate(endless)) as deltas:
        await anext(deltas)
        assert engine.health().status == "ok" and not engine.flush_cache()
        async with asyncio.timeout(60):  # each look shows what the one before asked for
            while not (view := engine.oldest_requests(4)[0]).is_running or not engine.top_branches(8):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert view.rid == "endless" and view.num_output_tokens > 0
        assert {one.replica for one in engine.top_branches(8)} <= {0, 1}
    assert endless.finish_reason is not None and endless.finish_reason.type == "abort"
    for _ in range(3):  # what the replica still has to say of the one before is not said of the next one of its rid
        again = RequestState(Request("again", [9] * 64, params, stream=True))  # a prompt that goes where it went before
        async with aclosing(engine.generate(again)) as deltas:
            async with asyncio.timeout(60):
                texts = [await anext(deltas) for _ in range(3)]
            assert [delta.finish_reason for delta in texts] == [None] * 3
    await settled(engine)
    scheduler = engine.stats().scheduler
    assert (scheduler.num_running, scheduler.num_held_tokens, scheduler.num_total_tokens) == (0, 0, 2 << 16)
    assert engine.flush_cache()

    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequest, match="file/replica-0: Not a directory"):
        engine.start_profile(str(tmp_path / "file"))
    monkeypatch.setattr("engine.replicas.profile.make_profile_folder", lambda path: None)
    engine.start_profile(str(tmp_path / "file"))
    with pytest.raises(EngineError, match=r"replica 0 has no profile: .*; replica 1 has no profile: "):
        await asyncio.wait_for(engine.stop_profile(), 60)

    victim = min(filter(is_rank, descendants(os.getpid())))
    waiting = asyncio.create_task(ask(engine, [5, 6, 7], max_new_tokens=ENDLESS))
    await asyncio.sleep(0.05)
    os.kill(victim, signal.SIGKILL)
    assert f"(pid {victim}) was ended by SIGKILL" in await asyncio.wait_for(engine.failed(), 60)
    (delta,) = await waiting
    assert delta.finish_reason is not None and delta.finish_reason.status_code == 500
    with pytest.raises(EngineStopped):
        await ask(engine, [5, 6, 7])


async def test_two_ranks_draw_and_score_as_one_does(tiny_llama: Path) -> None:
    prompt = [5, 6, 7, *range(100, 140)]
    drawn, scores = [], []
    for tp_size in (1, 2):
        config = EngineConfig(model_path=str(tiny_llama), device="cpu", dtype="float32", max_total_tokens=2048)
        async with LocalEngine(config.replace(tp_size=tp_size, chunked_prefill_size=16)) as engine:
            fields = {"temperature": 1.2, "top_p": 0.9, "frequency_penalty": 1.0, "sampling_seed": 7}
            (delta,) = await ask(engine, prompt, max_new_tokens=16, **fields)
            drawn.append(delta.token_ids)
            (delta,) = await ask(engine, prompt, return_logprob=True, logprob_start_len=0)
            assert delta.logprobs is not None and delta.state.input_logprobs is not None
            entries = delta.state.input_logprobs.token[1:] + delta.logprobs.token
            scores.append([value for value, _ in entries])
    assert drawn[0] == drawn[1]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def url_of(log: Path) -> str:
    wait_until(lambda: "/generate" in log.read_text().partition("curl ")[2])  # it is shown piece by piece
    return log.read_text().partition("curl ")[2].partition("/generate")[0]


@pytest.mark.parametrize(
    ("number", "message"), [(signal.SIGKILL, "was ended by SIGKILL"), (signal.SIGSTOP, "has not taken up a step")]
)
def test_a_rank_that_dies_or_hangs_ends_the_server_by_name(
    number: signal.Signals, message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with server(tiny_llama, log, "--tp", "2", "--dist-timeout", "6") as process:
        family = descendants(process.pid)
        (rank,) = filter(is_rank, family)
        os.kill(rank, number)
        if number == signal.SIGSTOP:  # an idle server needs no rank: the next step does
            body = '{"input_ids": [1, 2, 3]}'
            subprocess.run(
                ["curl", "-s", f"{url_of(log)}/generate", "-H", "Content-Type: application/json", "-d", body],
                check=False, capture_output=True, timeout=60,
            )  # fmt: skip
        assert process.wait(60) == 1
        text = log.read_text()
        assert f"error: rank 1 (pid {rank}) " in text and message in text
        wait_until(lambda: not any(map(is_alive, family)))


@pytest.mark.parametrize(("sizes", "kind"), [(("--tp", "2"), "rank 1"), (("--dp", "2"), "replica [01]")])
def test_a_process_that_is_stopped_while_it_loads_ends_the_server_by_name(
    sizes: Sequence[str], kind: str, tiny_llama: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with ending(start_server(tiny_llama, log, *sizes, "--dist-timeout", "3")) as process:
        wait_until(lambda: any(map(is_rank, descendants(process.pid))), 60)
        victim = next(filter(is_rank, descendants(process.pid)))
        family = descendants(process.pid)
        os.kill(victim, signal.SIGSTOP)
        assert process.wait(60) == 1
        text = log.read_text()
        assert re.search(rf"error: {kind} \(pid {victim}\) was stopped by a signal while loading", text), text
        assert "Traceback" not in text
        wait_until(lambda: not any(map(is_alive, family)))


def test_an_answer_that_the_drain_is_too_short_for_is_told_so(long_llama: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with server(long_llama, log, "--drain-timeout", "1", "--max-total-tokens", "65536", "--dp", "2") as process:
        family = descendants(process.pid)
        params = f'{{"max_new_tokens": {ENDLESS}, "ignore_eos": true}}'
        body = f'{{"input_ids": [1], "stream": true, "sampling_params": {params}}}'
        client = subprocess.Popen(
            ["curl", "-sN", f"{url_of(log)}/generate", "-H", "Content-Type: application/json", "-d", body],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert client.stdout is not None and client.stdout.readline().startswith(b"data: ")
        process.terminate()
        rest, _ = client.communicate(timeout=60)
        assert b"the server is shutting down" in rest and rest.endswith(b"data: [DONE]\n\n")
        assert process.wait(60) == 0
        assert "Traceback" not in log.read_text()
        wait_until(lambda: not any(map(is_alive, family)))


def test_ranks_do_not_outlive_a_server_that_is_killed(tiny_llama: Path, tmp_path: Path) -> None:
    with server(tiny_llama, tmp_path / "log", "--tp", "2") as process:
        family = descendants(process.pid)
        assert any(map(is_rank, family))
        process.kill()
        wait_until(lambda: not any(map(is_alive, family)))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp_size": 0}, "tp-size must be at least 1, got 0"),
        ({"tp_size": 3, "nnodes": 2}, "3 cannot be split over --nnodes 2"),
        ({"tp_size": 4, "ep_size": 3}, "--ep-size must divide --tp-size.*3 and 4"),
        ({"tp_size": 2, "ep_size": 4}, "--ep-size must divide --tp-size.*4 and 2"),
        ({"dp_size": 8, "tp_size": 4, "ep_size": 32, "nnodes": 4}, "at most --tp-size 4.*--tp-size 32 --ep-size 32"),
        ({"tp_size": 2, "nnodes": 2, "node_rank": 2}, "between 0 and 1, got 2"),
        ({"tp_size": 2, "nnodes": 2, "dp_size": 2}, "--dp-size 2 is for one node"),
        ({"tp_size": 2, "nnodes": 2, "dist_init_addr": "somewhere"}, "HOST:PORT.*'somewhere'"),
    ],
)
async def test_sizes_that_do_not_fit_each_other_are_told(sizes: dict[str, Any], message: str, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=message):
        await LocalEngine(EngineConfig(model_path=str(tiny_llama), device="cpu", **sizes)).start()
