"""A model that reads pictures, served whole: from each API's bytes to an answer that depends on the picture."""

import asyncio
import base64
import io
import json
import resource
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from server.http.bodies import BODY_BUDGET
from tests.client import Client, events_of, post
from tests.fake_engine import serving
from tests.test_engine import running_engine
from tests.test_media_reading import png_of_size, webp_of_size
from tests.vision_models import IMAGE, VISION_END, VISION_START, make_vision_model, picture

PROMPT = "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
GREEDY: dict[str, Any] = {"model": "default", "temperature": 0, "max_tokens": 8}


def encoded(seed: int, format_: str = "PNG", size: tuple[int, int] = (40, 60)) -> str:
    """Return a picture of that height and width as base64 text."""
    buffer = io.BytesIO()
    Pillow.fromarray(picture(*size, seed).pixels).save(buffer, format_)
    return base64.b64encode(buffer.getvalue()).decode()


ONE, OTHER = encoded(1), encoded(2)
RESULTS = ("seen", "found", "failed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision_model(tmp_path_factory.mktemp("llava"), "llava")


@pytest.fixture
async def client(folder: Path) -> AsyncIterator[Client]:
    async with running_engine(folder) as engine, serving(engine) as client:
        yield client


def chat(image: str, **more: Any) -> dict[str, Any]:
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:;base64,{image}"}},
        {"type": "text", "text": "What is it?"},
    ]
    return {**GREEDY, "messages": [{"role": "user", "content": parts}], **more}


async def generated(client: Client, text: str, images: Any) -> tuple[str, int, int]:
    """Return the answer, and how many of the prompt's tokens there were, and were cached."""
    params = {"temperature": 0, "max_new_tokens": 8}
    answer = await post(client, "/generate", text=text, image_data=images, sampling_params=params)
    meta = answer["meta_info"]
    return answer["text"], meta["prompt_tokens"], meta["cached_tokens"]


async def test_an_answer_depends_on_the_picture_and_not_on_the_api_that_brings_it(client: Client) -> None:
    answers = {}
    for image in (ONE, OTHER):
        completion = await post(client, "/v1/chat/completions", **chat(image))
        answer = answers[image] = completion["choices"][0]["message"]["content"]
        twice = await post(client, "/v1/chat/completions", **chat(image, n=2))
        assert [choice["message"]["content"] for choice in twice["choices"]] == [answer, answer]
        assert (await generated(client, PROMPT, image))[0] == answer
        block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": image}}
        message = {"role": "user", "content": [block, {"type": "text", "text": "What is it?"}]}
        assert (await post(client, "/v1/messages", **GREEDY, messages=[message]))["content"][0]["text"] == answer
        parts = [{"type": "input_image", "image_url": image}, {"type": "input_text", "text": "What is it?"}]
        body = {"temperature": 0, "max_output_tokens": 8, "input": [{"role": "user", "content": parts}]}
        assert (await post(client, "/v1/responses", **body))["output"][0]["content"][0]["text"] == answer
        options = {"temperature": 0, "num_predict": 8}
        messages = [{"role": "user", "content": "What is it?", "images": [image]}]
        told = await post(client, "/api/chat", stream=False, options=options, messages=messages)
        assert told["message"]["content"] == answer
        response = await client.post("/v1/chat/completions", json=chat(image, stream=True))
        events = [json.loads(event) for event in events_of(await response.read()) if event != "[DONE]"]
        assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == answer
    assert answers[ONE] != answers[OTHER]


async def test_a_second_turn_computes_its_own_tokens_and_another_picture_shares_none(client: Client) -> None:
    head = PROMPT.index("<image>")
    _, prompt_len, cached = await generated(client, PROMPT, ONE)
    num_before = len((await post(client, "/tokenize", prompt=PROMPT[:head], add_special_tokens=False))["tokens"])
    assert cached == 0
    assert (await generated(client, PROMPT, encoded(1, "BMP")))[1:] == (prompt_len, prompt_len - 1)
    assert (await generated(client, PROMPT + "It is<|im_end|>\nSure?", ONE))[2] == prompt_len
    assert (await generated(client, PROMPT, OTHER))[2] == num_before
    assert (await generated(client, PROMPT + PROMPT, [ONE, OTHER]))[2] >= prompt_len
    both, _, _ = await generated(client, PROMPT + PROMPT, [ONE, OTHER])
    swapped, _, cached = await generated(client, PROMPT + PROMPT, [OTHER, ONE])
    assert both != swapped
    assert cached == prompt_len


async def test_metrics_count_pictures_that_the_tower_saw_and_those_that_were_kept(folder: Path) -> None:
    async with running_engine(folder) as engine, serving(engine, enable_metrics=True) as client:
        for image in (ONE, OTHER, ONE):
            assert engine.flush_cache()
            await generated(client, PROMPT, image)
        text = await (await client.get("/metrics")).text()
        named = text.replace('model_name="fake-model",', "").replace('model_name="fake-model"', "")
        values = dict(line.rsplit(" ", 1) for line in named.splitlines())
        found = {result: values[f'radixloop:pictures_total{{result="{result}"}}'] for result in RESULTS}
        assert found == {"seen": "2.0", "found": "1.0", "failed": "0.0"}
        assert float(values["radixloop:tower_seconds_total{}"]) > 0
        [num_features], row_bytes = engine.count_media_tokens([picture(40, 60).size]), 64 * 4
        assert float(values["radixloop:feature_bytes{}"]) == 2 * num_features * row_bytes


# As Qwen's: it writes the parts of a message itself.
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><image><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_vision_model(tmp_path_factory.mktemp("qwen"), "qwen 2 vl")
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    return folder


async def test_a_template_of_parts_and_sizes_that_clients_choose_reach_the_model(qwen: Path) -> None:
    config = '{"image": {"max_pixels": 2000}}'
    async with running_engine(qwen) as engine:
        async with serving(engine) as client:
            large = {"url": f"data:image/png;base64,{encoded(1, size=(90, 120))}"}

            async def tokens(**settings: Any) -> int:
                parts = [{"type": "text", "text": "On "}, {"type": "image_url", "image_url": {**large, **settings}}]
                body = {**GREEDY, "messages": [{"role": "user", "content": parts}]}
                rendered = await post(client, "/v1/chat/completions/render", **body)
                assert rendered["prompt"].startswith(
                    "<|im_start|>user\nOn <|vision_start|><image><|vision_end|><|im_end|>"
                )
                usage = (await post(client, "/v1/chat/completions", **body))["usage"]
                assert usage["prompt_tokens"] == len(rendered["prompt_token_ids"])
                return int(usage["prompt_tokens"])

            whole = await tokens()
            # Its own limit is 3072.
            assert await tokens(max_pixels=1000) < await tokens(max_pixels=2000) < whole
            assert whole == await tokens(max_pixels=6000) == await tokens(detail="low")
            info = await (await client.get("/model_info")).json()
            assert info["image_token"] == "<|vision_start|><image><|vision_end|>"
            assert (info["model_type"], info["text_model_type"]) == ("qwen2_vl", "qwen2_vl_text")
            few = await tokens(max_pixels=2000)
        async with serving(engine, mm_process_config=config) as client:
            assert await tokens() == await tokens(max_pixels=100_000) == few


async def test_a_detail_or_limit_that_changes_nothing_of_a_picture_finds_it_in_the_cache(qwen: Path) -> None:
    async with running_engine(qwen) as engine, serving(engine, enable_cache_report=True) as client:
        url = f"data:image/png;base64,{encoded(1, size=(90, 120))}"
        computed = []
        for settings in ({}, {"detail": "low"}, {"detail": "auto"}, {"max_pixels": 6000}, {"max_pixels": 1000}):
            part = {"type": "image_url", "image_url": {"url": url, **settings}}
            answer = await post(
                client, "/v1/chat/completions", **GREEDY, messages=[{"role": "user", "content": [part]}]
            )
            usage = answer["usage"]
            computed.append(usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"])
        assert computed[1:4] == [1, 1, 1] and min(computed[0], computed[4]) > 1
        assert engine.stats().encoder.num_encoded == 2


@pytest.mark.parametrize("name", ["folder", "qwen"])
async def test_placeholders_that_somebody_wrote_about_are_text_and_show_nothing(
    name: str, request: pytest.FixtureRequest
) -> None:
    written = "the <image> and <video> of a file"
    function = {"name": "read", "arguments": json.dumps({"text": written})}
    call = {
        "role": "assistant",
        "content": written,
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }
    result = {"role": "tool", "tool_call_id": "1", "content": written}
    parameters = {"type": "object", "properties": {"text": {"type": "string", "description": written}}}
    tool = {"type": "function", "function": {"name": "read", "description": written, "parameters": parameters}}
    text, image = {"type": "text", "text": written}, {"type": "image_url", "image_url": {"url": f"data:;base64,{ONE}"}}
    async with running_engine(request.getfixturevalue(name)) as engine, serving(engine) as client:
        for parts, num_pictures in (([text], 0), ([text, image, text], 1), ([image, text, image], 2)):
            turns = [{"role": "system", "content": written}, {"role": "user", "content": parts}, call, result]
            body = {**GREEDY, "messages": [*turns, {"role": "user", "content": "<image>?"}], "tools": [tool]}
            rendered = await post(client, "/v1/chat/completions/render", **body)
            prompt, ids = rendered["prompt"], rendered["prompt_token_ids"]
            assert prompt.count("<image>") == prompt.count("<video>") + 1 + num_pictures > num_pictures + 5
            assert (await post(client, "/tokenize", **body))["prompt"] == prompt
            [num_features] = engine.count_media_tokens([picture(40, 60).size])
            assert ids.count(IMAGE) == num_pictures * num_features
            if not num_pictures:
                assert engine.tokenizer.decode(ids, skip_special_tokens=False) == prompt
            usage = (await post(client, "/v1/chat/completions", **body))["usage"]
            assert usage["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("num_pictures", [0, 1])
async def test_a_text_of_placeholders_alone_is_refused_before_all_of_it_is_read(
    client: Client, num_pictures: int
) -> None:
    shown = [{"type": "image_url", "image_url": {"url": f"data:;base64,{ONE}"}}] * num_pictures
    for text, why in (("<image>" * 100_000, "more than 8192 tokens"), ("word " * 100_000, "500")):
        message = {"role": "user", "content": [*shown, {"type": "text", "text": text}]}
        response = await client.post("/v1/chat/completions", json={**GREEDY, "messages": [message]})
        error = (await response.json())["error"]
        assert (response.status, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
        assert why in error["message"] and "the context is 2048" in error["message"]


async def test_token_ids_may_show_pictures_where_no_text_is_read(qwen: Path) -> None:
    ids = [5, VISION_START, IMAGE, VISION_END, 6]
    body = {"input_ids": ids, "image_data": ONE, "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
    async with running_engine(qwen) as engine, serving(engine) as client:
        wanted = (await post(client, "/generate", **body))["output_ids"]
    has_none = {"skip_tokenizer_init": True}
    async with running_engine(qwen, **has_none) as engine, serving(engine, **has_none) as client:
        assert (await post(client, "/generate", **body))["output_ids"] == wanted


async def test_a_sessions_next_turn_is_the_whole_conversation_and_computes_its_own_tokens(qwen: Path) -> None:
    texts = "See <|vision_start|><image><|vision_end|>: what?", "And <|vision_start|><image><|vision_end|>?"
    params = {"temperature": 0, "max_new_tokens": 5, "ignore_eos": True}
    async with running_engine(qwen) as engine, serving(engine) as client:
        session: dict[str, Any] = {"id": await post(client, "/open_session")}
        ids: list[int] = []
        for text, image in zip(texts, (ONE, OTHER), strict=True):
            body = {"text": text, "image_data": image, "sampling_params": params, "session_params": session}
            answer = await post(client, "/generate", **body)
            session["rid"] = answer["meta_info"]["id"]
            ids += [*await engine.encode(text), *answer["output_ids"]]
        assert answer["meta_info"]["cached_tokens"] > 40  # of the first turn
        whole = {"input_ids": ids[: -params["max_new_tokens"]], "image_data": [ONE, OTHER], "sampling_params": params}
        assert engine.flush_cache()
        assert (await post(client, "/generate", **whole))["output_ids"] == answer["output_ids"]


async def test_a_vector_is_of_a_text_and_its_picture_in_sglangs_and_vllms_spelling(qwen: Path) -> None:
    async with running_engine(qwen) as engine, serving(engine) as client:

        async def vectors(**body: Any) -> list[list[float]]:
            answer = await post(client, "/v1/embeddings", model="default", **body)
            return [item["embedding"] for item in answer["data"]]

        def messages(image: str) -> list[dict[str, Any]]:
            return chat(image)["messages"]

        first, other, text = await vectors(
            input=[{"image": ONE, "text": "What is it?"}, {"image": OTHER, "text": "What is it?"}, {"text": "What?"}]
        )
        assert len({tuple(vector) for vector in (first, other, text)}) == 3
        for image, vector in ((ONE, first), (OTHER, other)):
            again = await vectors(messages=messages(image), add_generation_prompt=True)
            assert again == [pytest.approx(vector, abs=1e-5)]
            assert await vectors(messages=messages(image)) != again
        for body, field in (
            ({"input": [{"image": "aGk="}]}, "input[0].image"), ({"input": [{"text": "a"}, "b"]}, "input[1]"),
            ({"input": "a", "messages": messages(ONE)}, "messages"), ({}, "input"),
        ):  # fmt: skip
            response = await client.post("/v1/embeddings", json=body)
            assert (response.status, (await response.json())["error"]["param"]) == (400, field)


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision_model(tmp_path_factory.mktemp("onevision"), "llava onevision")


async def test_an_answer_depends_on_a_video_and_on_the_images_beside_it(onevision: Path) -> None:
    frames = [[encoded(seed), encoded(seed + 1)] for seed in (3, 5)]
    image = {"type": "image_url", "image_url": {"url": ONE}}
    async with running_engine(onevision) as engine, serving(engine) as client:

        async def answer(*parts: dict[str, Any]) -> str:
            content = [*parts, {"type": "text", "text": "What happens?"}]
            body = {**GREEDY, "messages": [{"role": "user", "content": content}]}
            return str((await post(client, "/v1/chat/completions", **body))["choices"][0]["message"]["content"])

        first, second = ({"type": "video", "video": shown} for shown in frames)
        uri = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{','.join(frames[0])}"}}
        answers = [await answer(*parts) for parts in ((first,), (second,), (first, image), (image, first))]
        assert len(set(answers)) == 4
        assert await answer(uri) == answers[0]
        native = await post(
            client,
            "/generate",
            text="<|im_start|>user\n<video>\nWhat happens?<|im_end|>\n<|im_start|>assistant\n",
            image_data=frames[0],
            modalities=["video"],
            sampling_params={"temperature": 0, "max_new_tokens": 8},
        )
        assert native["text"] == answers[0]


@pytest.mark.max_callback_ms(200)  # memory for 9 million pixels is mapped and unmapped beside it
async def test_hostile_pictures_are_refused_and_change_nothing_for_others(client: Client) -> None:
    hostile = [
        base64.b64encode(data).decode()
        for data in (
            png_of_size(60_000, 60_000), png_of_size(3_000, 3_000), webp_of_size(16_000, 16_000), b"GIF89a", b"x",
        )
    ]  # fmt: skip
    expected = (await post(client, "/v1/chat/completions", **chat(ONE)))["choices"][0]["message"]["content"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    async def status(body: dict[str, Any]) -> int:
        return (await client.post("/v1/chat/completions", json=body)).status

    attacks = [asyncio.create_task(status(chat(hostile[i % len(hostile)]))) for i in range(30)]
    many = [{"type": "image_url", "image_url": {"url": ONE}}] * 100
    attacks.append(asyncio.create_task(status({**GREEDY, "messages": [{"role": "user", "content": many}]})))
    answers = await asyncio.gather(*(post(client, "/v1/chat/completions", **chat(ONE)) for _ in range(8)))
    assert {answer["choices"][0]["message"]["content"] for answer in answers} == {expected}
    assert {await attack for attack in attacks} <= {400, 429}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 600_000  # KiB
    kept = np.prod((40, 60, 3))
    assert client.server.app[BODY_BUDGET].num_bytes <= 3 * kept  # type: ignore[attr-defined]
