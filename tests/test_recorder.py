"""The last requests are written when one fails, and can be sent again."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.replay import Answer, Dump, compare, first_difference, replay
from engine.request import Request, SamplingParams
from engine.state import FinishReason, RequestState, Status
from server.watch.recorder import MAX_REQUESTS, MAX_TOKENS, RECORDER, RequestRecorder
from tests.fake_engine import FakeEngine, serving

PARAMS = SamplingParams(max_new_tokens=4)


def files_of(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def state_of(rid: str, num_tokens: int = 3, params: SamplingParams = PARAMS, **fields: Any) -> RequestState:
    return RequestState(Request(rid, list(range(num_tokens)), params), **fields)


def test_only_the_last_requests_are_remembered(tmp_path: Path) -> None:
    recorder = RequestRecorder(tmp_path, {})
    for i in range(MAX_REQUESTS + 10):
        recorder.remember(state_of(f"r{i}"))
    records = Dump.load(recorder.dump("test")).records
    assert [record["rid"] for record in records] == [f"r{i}" for i in range(10, MAX_REQUESTS + 10)]


def test_long_prompts_do_not_fill_the_memory(tmp_path: Path) -> None:
    recorder = RequestRecorder(tmp_path, {})
    for i in range(5):
        recorder.remember(state_of(f"r{i}", num_tokens=MAX_TOKENS // 2))
    assert [record["rid"] for record in Dump.load(recorder.dump("test")).records] == ["r3", "r4"]


def test_a_file_says_why_and_how_far_each_request_was(tmp_path: Path) -> None:
    recorder = RequestRecorder(tmp_path / "new" / "folder", {"model_path": "m"})
    params, reason = SamplingParams(max_new_tokens=4, logit_bias={5: 1.5}), FinishReason("length")
    ended = state_of("ended", params=params, status=Status.FINISHED, output_ids=[7, 8], finish_reason=reason)
    for state in (ended, state_of("running", status=Status.RUNNING)):
        recorder.remember(state)
    path = recorder.dump("a step hung")
    dump = Dump.load(path)
    assert dump.header["reason"] == "a step hung"
    assert dump.header["config"] == {"model_path": "m"}
    first, second = dump.records
    assert (first["output_ids"], first["finish_reason"]) == ([7, 8], {"type": "length", "length": 2})
    assert first["sampling_params"]["logit_bias"] == {"5": 1.5}
    assert (second["status"], second["finish_reason"]) == ("running", None)
    assert first["arrived_s"] < 0
    assert list(path.parent.iterdir()) == [path], "no half-written file is left"


async def test_a_failed_request_writes_one_file_and_an_ended_one_none(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with serving(engine, crash_dump_folder=str(tmp_path), api_key="sesame") as client:
        headers = {"Authorization": "Bearer sesame"}
        assert (await client.post("/generate", json={"text": "fine"}, headers=headers)).status == 200
        engine.failure = FinishReason("abort", message="boom", status_code=500)
        for _ in range(3):
            assert (await client.post("/generate", json={"text": "bad"}, headers=headers)).status == 500
        writing = client.app[RECORDER]._writing
        assert writing is not None
        file = await writing
    assert [file] == files_of(tmp_path)
    dump = Dump.load(file)
    assert "boom" in dump.header["reason"]
    assert [record["input_ids"] for record in dump.records][:2] == [list(b"fine"), list(b"bad")]
    assert "sesame" not in file.read_text()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_replay_gives_the_recorded_answers_again(tmp_path: Path, stream: bool) -> None:
    engine = FakeEngine()
    async with serving(engine, crash_dump_folder=str(tmp_path)) as client:
        for i in range(3):
            body = {"text": "a" * (i + 1), "stream": stream, "sampling_params": {"max_new_tokens": i + 3}}
            response = await client.post("/generate", json=body)
            await response.read()
        recorder = RequestRecorder(tmp_path, {})
        for state in engine.states:
            recorder.remember(state)
        dump = Dump.load(recorder.dump("test"))
        dump.records[1]["output_ids"] = [0]
        dump.records.append({**dump.records[0], "input_ids": [9999]})
        results = await replay(dump, f"http://{client.host}:{client.port}", speed=0)
    assert [verdict for *_, verdict in results] == ["same", "different", "same", "failed"]
    assert "9999" in results[3][1].error


def test_an_answer_that_had_not_ended_has_nothing_to_compare_with() -> None:
    assert compare({"finish_reason": None, "output_ids": []}, Answer([1])) == "unknown"
    aborted = json.loads('{"finish_reason": {"type": "abort"}, "output_ids": [1]}')
    assert compare(aborted, Answer([1])) == "unknown"
    assert compare(aborted, Answer([], "HTTP 500")) == "failed"
    assert first_difference([1, 2, 3], [1, 2]) == 2
    assert first_difference([1, 5], [1, 2]) == 1
