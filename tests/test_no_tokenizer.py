"""--skip-tokenizer-init: token ids in, token ids out, and a 400 for everything that would need a text."""

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.local import LocalEngine
from server.__main__ import example_request, warm_up
from tests.client import Client, events_of
from tests.fake_engine import serving
from tests.test_engine import running_engine

PROMPT = [5, 6, 7, 8]
PARAMS: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, "ignore_eos": True}
BODY: dict[str, Any] = {"input_ids": PROMPT, "sampling_params": PARAMS}


@pytest.fixture
def without_text(tiny_llama: Path, tmp_path: Path) -> Path:
    """Return the model without any file of its tokenizer."""
    names = ("tokenizer*", "special_tokens*", "chat_template*")
    return Path(shutil.copytree(tiny_llama, tmp_path / "model", ignore=shutil.ignore_patterns(*names)))


@pytest.fixture
async def engine(without_text: Path) -> AsyncIterator[LocalEngine]:
    async with running_engine(without_text, skip_tokenizer_init=True) as engine:
        yield engine


@pytest.fixture
async def client(engine: LocalEngine) -> AsyncIterator[Client]:
    async with serving(engine, served_model_name=["fake-model"], skip_tokenizer_init=True) as client:
        yield client


async def test_answers_are_the_token_ids_that_a_tokenizer_would_make_text_of(
    client: Client, engine: LocalEngine, tiny_llama: Path
) -> None:
    answer = await (await client.post("/generate", json=BODY)).json()
    async with running_engine(tiny_llama) as other, serving(other, served_model_name=["fake-model"]) as with_text:
        wanted = await (await with_text.post("/generate", json=BODY)).json()
    assert answer["output_ids"] == wanted["output_ids"]
    stopped = {**BODY, "sampling_params": {**PARAMS, "stop_token_ids": [answer["output_ids"][2]]}}
    assert (await (await client.post("/generate", json=stopped)).json())["output_ids"] == answer["output_ids"][:3]
    response = await client.post("/generate", json={**BODY, "stream": True, "return_logprob": True})
    *events, _ = events_of(await response.read())
    assert json.loads(events[-1])["output_ids"] == answer["output_ids"]
    await warm_up(engine, reads_text=False)


@pytest.mark.parametrize("prompts", [PROMPT, [PROMPT, PROMPT[1:]]])
async def test_answers_have_no_text_at_all(client: Client, prompts: list[Any]) -> None:
    """SGLang's clients tell by that whether the server has a tokenizer."""
    body = {**BODY, "input_ids": prompts}
    whole = await (await client.post("/generate", json=body)).json()
    *events, _ = events_of(await (await client.post("/generate", json={**body, "stream": True})).read())
    pieces = [json.loads(event) for event in events]
    answers = [*(whole if isinstance(whole, list) else [whole]), *pieces]
    assert all(answer["output_ids"] and "text" not in answer for answer in answers)
    assert all(("index" in piece) == isinstance(prompts[0], list) for piece in pieces)


async def test_a_stream_has_each_token_as_it_comes(client: Client) -> None:
    *events, _ = events_of(await (await client.post("/generate", json={**BODY, "stream": True})).read())
    lens = [len(json.loads(event)["output_ids"]) for event in events]
    assert len(lens) > 2 and lens == sorted(set(lens)) and lens[-1] == PARAMS["max_new_tokens"]


async def test_the_first_request_that_the_server_shows_is_answered(client: Client, engine: LocalEngine) -> None:
    path, body = example_request(engine, reads_text=False)
    response = await client.post(path, data=body, headers={"Content-Type": "application/json"})
    assert response.status == 200, await response.text()


CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/generate", {"text": "Hi"}, "text"),
        ("/generate", {**BODY, "sampling_params": {"stop": "x"}}, "stop"),
        ("/generate", {**BODY, "sampling_params": {"stop_regex": "x"}}, "stop_regex"),
        ("/generate", {**BODY, "sampling_params": {"regex": "x"}}, "regex"),
        ("/v1/completions", {"prompt": "Hi"}, "prompt"),
        ("/v1/chat/completions", CHAT, "messages"),
        ("/v1/responses", {"input": "Hi"}, "input"),
        ("/v1/messages", {**CHAT, "max_tokens": 5}, None),
        ("/api/chat", CHAT, None),
        ("/tokenize", {"prompt": "Hi"}, "text"),
        ("/detokenize", {"tokens": [5]}, "tokens"),
    ],
)
async def test_what_needs_a_text_is_refused_with_the_flags_name(
    client: Client, path: str, body: dict[str, Any], field: str | None
) -> None:
    response = await client.post(path, json=body)
    said = await response.text()
    assert response.status == 400 and "--skip-tokenizer-init" in said
    if field is not None:
        error = json.loads(said)["error"]
        assert error.get("param", error.get("field")) == field


async def test_several_engines_do_without_as_well(without_text: Path) -> None:
    async with (
        running_engine(without_text, skip_tokenizer_init=True, dp_size=2) as engine,
        serving(engine, served_model_name=["fake-model"], skip_tokenizer_init=True) as client,
    ):
        answer = await (await client.post("/generate", json=BODY)).json()
        assert len(answer["output_ids"]) == PARAMS["max_new_tokens"]
