"""Test a server that a program starts for itself, in a process of its own, and the engine's own methods."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

import server.lang as sgl
from tests.lang_servers import tiny_engine


@sgl.function
def count(s: Any) -> None:
    s += "One, two," + sgl.gen("x", max_tokens=4)


def test_a_runtime_serves_until_it_is_shut_down(tiny_llama: Path) -> None:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_total_tokens": 2048}
    with sgl.Runtime(model_path=str(tiny_llama), **options) as runtime, tiny_engine(tiny_llama) as engine:
        state = count.run(backend=runtime, temperature=0)
        assert state.error() is None
        assert state["x"] == count.run(backend=engine, temperature=0)["x"]
        params = {"max_new_tokens": 4, "temperature": 0}
        assert runtime.generate("One, two,", params)["text"] == state["x"]
        assert runtime.get_server_info()["max_total_tokens"] == 2048
        assert runtime.get_tokenizer().encode("One, two,") == engine.get_tokenizer().encode("One, two,")
        assert runtime.flush_cache()
    assert runtime.process.returncode == 0
    with pytest.raises(RuntimeError, match="shut down"):
        count.run(backend=runtime)


def test_a_server_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with status 1"):
        sgl.Runtime(model_path=str(tmp_path / "no-model"))


async def test_an_engine_generates_without_a_program(tiny_llama: Path) -> None:
    params = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
    with tiny_engine(tiny_llama) as engine:
        whole = engine.generate("One, two,", params)
        assert whole["meta_info"]["completion_tokens"] == 4
        both = engine.generate(["One, two,", "The"], [params, {**params, "max_new_tokens": 2}])
        assert [one["meta_info"]["completion_tokens"] for one in both] == [4, 2] and both[0]["text"] == whole["text"]
        ids = engine.get_tokenizer().encode("One, two,")
        assert (await engine.async_generate(input_ids=ids, sampling_params=params))["text"] == whole["text"]
        events = list(engine.generate("One, two,", params, stream=True))
        assert events[-1]["text"] == whole["text"] and len(events) > 1
        streamed = [event async for event in await engine.async_generate("One, two,", params, stream=True)]
        assert streamed[-1]["text"] == whole["text"]
        with pytest.raises(sgl.BackendError, match="nothing"):
            await asyncio.to_thread(engine.generate, "a", {"nothing": 1})
        for wrong, message in (
            ({"prompt": "a", "lora_path": "adapter"}, "does not take lora_path"),
            ({"prompt": "a", "input_ids": [1]}, "exactly one of text and input_ids"),
            ({}, "exactly one of text and input_ids"),
            ({"input_ids": ["x"]}, "input_ids must hold integers only"),
            ({"prompt": ["a", "b"], "sampling_params": [params]}, "has 1 items for 2 prompts"),
        ):
            with pytest.raises(sgl.BackendError, match=message):
                await asyncio.to_thread(engine.generate, **wrong)
        with pytest.raises(sgl.BackendError, match="streams one answer at a time, not 2"):
            list(engine.generate(["a", "b"], params, stream=True))
        assert engine.get_server_info()["internal_states"] and engine.flush_cache()
