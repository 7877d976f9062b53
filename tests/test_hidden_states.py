"""Hidden states that requests ask for: transformers' own, of each token that was computed."""

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.engine import Engine
from engine.request import Request, SamplingParams
from engine.state import RequestState
from tests.fake_engine import serving
from tests.test_engine import running_engine

MAX_DIFFERENCE = 1e-4
FORCED = {"type": "object", "properties": {"a_long_name": {"enum": ["x", "y"]}}, "required": ["a_long_name"]}
PROMPTS = [[5, 6, 7, *range(20, 50)], [5, 6, 7, *range(20, 50), 9], [11], list(range(100, 160))]
MIXES: dict[str, dict[str, Any]] = {
    "cached": {},
    "chunked": {"chunked_prefill_size": 7, "disable_overlap_schedule": True},
    "pages": {"page_size": 4, "chunked_prefill_size": 16},
    "retracting": {"max_total_tokens": 120, "schedule_conservativeness": 0.0},
    "two ranks": {"tp_size": 2, "chunked_prefill_size": 16},
    "two replicas": {"dp_size": 2},
    "gpu": {"device": "cuda"},
}
ASKED = {"enable_return_hidden_states": True}


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(tiny_llama, dtype=torch.float32)


def wanted(model: Any, token_ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        states: np.ndarray = model(torch.tensor([token_ids])).last_hidden_state[0].numpy()
    return states


async def ask(engine: Engine, i: int, wants: bool = True, **fields: Any) -> RequestState:
    params = SamplingParams(**{"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True, **fields})
    state = RequestState(Request(f"r{i}-{wants}-{len(fields)}", PROMPTS[i], params, return_hidden_states=wants))
    await engine.prepare([state])
    async for _ in engine.generate(state):
        pass
    return state


@pytest.mark.parametrize("mix", [pytest.param(mix, marks=[pytest.mark.gpu] * (mix == "gpu")) for mix in MIXES])
async def test_states_are_transformers_own_whatever_the_mix(tiny_llama: Path, model: Any, mix: str) -> None:
    async with running_engine(tiny_llama, **ASKED, **MIXES[mix]) as engine:
        for _ in range(2):  # the second time the prompts are cached
            asked = [ask(engine, i) for i in range(len(PROMPTS))]
            forced = ask(engine, 0, json_schema=json.dumps(FORCED), ignore_eos=False, max_new_tokens=60)
            others = [ask(engine, i, wants=False) for i in range(2)]
            *states, one, two = await asyncio.gather(*asked, forced, *others)
            assert one.hidden_states is None and two.hidden_states is None
            for state in states:
                computed = [*state.request.input_ids, *state.output_ids[:-1]]
                assert state.hidden_states is not None
                got = state.hidden_states[: len(computed)]
                assert np.abs(got - wanted(model, computed)).max() < MAX_DIFFERENCE
        assert mix != "retracting" or engine.stats().scheduler.num_retractions, "the pool was meant to run out"


async def test_meta_info_has_the_prompts_states_and_one_of_each_token_but_the_last(
    tiny_llama: Path, model: Any
) -> None:
    body = {"input_ids": PROMPTS[0], "return_hidden_states": True, "sampling_params": {"max_new_tokens": 4}}
    options: dict[str, Any] = {"served_model_name": ["fake-model"], "chat_template": "chatml"}
    async with running_engine(tiny_llama, **ASKED) as engine, serving(engine, **options) as client:
        answer = await (await client.post("/generate", json=body)).json()
        prompt, *tokens = answer["meta_info"]["hidden_states"]
        computed = PROMPTS[0] + answer["output_ids"][:-1]
        assert (len(prompt), len(tokens)) == (len(PROMPTS[0]), len(answer["output_ids"]) - 1)
        assert np.abs(np.array([*prompt, *tokens]) - wanted(model, computed)).max() < MAX_DIFFERENCE

        pair = {**body, "input_ids": PROMPTS[:2], "return_hidden_states": [True, False]}
        first, second = await (await client.post("/generate", json=pair)).json()
        assert len(first["meta_info"]["hidden_states"][0]) == len(PROMPTS[0])
        assert "hidden_states" not in second["meta_info"]

        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "return_hidden_states": True}
        [choice] = (await (await client.post("/v1/chat/completions", json=chat)).json())["choices"]
        assert len(choice["hidden_states"]) == len(tokens[0])
        chat["max_tokens"] = 1
        [choice] = (await (await client.post("/v1/chat/completions", json=chat)).json())["choices"]
        assert choice["hidden_states"] == []


async def events_of(client: Any, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await client.post(path, json={**body, "stream": True})
    lines = (await response.read()).split(b"\n")
    return [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: {")]


async def test_streams_end_with_the_states_of_an_answer_that_is_not_streamed(tiny_llama: Path) -> None:
    options: dict[str, Any] = {"served_model_name": ["fake-model"], "chat_template": "chatml"}
    limits = {"max_tokens": 4, "temperature": 0, "ignore_eos": True, "return_hidden_states": True}
    native = {"return_hidden_states": True, "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
    async with running_engine(tiny_llama, **ASKED) as engine, serving(engine, **options) as client:

        async def whole(path: str, body: dict[str, Any]) -> Any:
            return await (await client.post(path, json=body)).json()

        for ids in (PROMPTS[0], PROMPTS[:2]):
            body = {"input_ids": ids, **native}
            answers = await whole("/generate", body)
            events = await events_of(client, "/generate", body)
            for i, answer in enumerate(answers if isinstance(answers, list) else [answers]):
                *others, last = [event["meta_info"] for event in events if event.get("index", 0) == i]
                assert np.allclose(
                    [*last["hidden_states"][0], *last["hidden_states"][1:]],
                    [*answer["meta_info"]["hidden_states"][0], *answer["meta_info"]["hidden_states"][1:]],
                    atol=MAX_DIFFERENCE,
                )
                assert all("hidden_states" not in meta for meta in others)

        bodies: list[tuple[str, dict[str, Any]]] = [
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
            ("/v1/completions", {"prompt": "Hi"}),
            ("/v1/completions", {"prompt": "Hi", "logprobs": 1}),
        ]
        for path, body in bodies:
            [choice] = (await whole(path, {**body, **limits}))["choices"]
            *_, end, last = [event["choices"][0] for event in await events_of(client, path, {**body, **limits})]
            assert end["finish_reason"] == "length" and last["finish_reason"] is None
            streamed = last.get("delta", last)["hidden_states"]
            assert len(streamed) > 0 and np.allclose(streamed, choice["hidden_states"], atol=MAX_DIFFERENCE)


async def test_states_are_refused_by_name_where_the_server_cannot_give_them(tiny_llama: Path) -> None:
    asked: dict[str, Any] = {"return_hidden_states": True}
    bodies = {
        "/generate": {"input_ids": [5, 6], **asked},
        "/v1/completions": {"prompt": "Hi", **asked},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], **asked},
    }
    options: dict[str, Any] = {"served_model_name": ["fake-model"], "chat_template": "chatml"}
    async with running_engine(tiny_llama) as engine, serving(engine, **options) as client:
        for stream, (path, body) in itertools.product((False, True), bodies.items()):
            response = await client.post(path, json={**body, "stream": stream})
            error = (await response.json())["error"]
            assert response.status == 400 and "--enable-return-hidden-states" in error["message"], error
            assert error.get("param", error.get("field")) == "return_hidden_states"
