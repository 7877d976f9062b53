"""Pictures and videos on every API: the model sees them where the client put them, and errors name its own fields."""

import base64
import io
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from PIL import Image as Pillow

from engine.media import CUT, Image, Video
from engine.state import FinishReason
from server.apis import sessions
from server.apis.kept_images import GONE, KeptImages
from server.apis.response_store import ResponseStore
from server.http.bodies import BODY_BUDGET
from tests.client import Client
from tests.fake_engine import FakeEngine, FakeTokenizer, SeeingEngine, serving

RED, BLUE = (255, 0, 0), (0, 0, 255)
MODEL = {"model": "fake-model"}


def png(color: tuple[int, int, int] = RED, size: tuple[int, int] = (30, 20)) -> str:
    buffer = io.BytesIO()
    Pillow.new("RGB", size, color).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def uri(color: tuple[int, int, int] = RED, size: tuple[int, int] = (30, 20)) -> str:
    return f"data:image/png;base64,{png(color, size)}"


LARGE = png(size=(3000, 2000))
VIDEO = f"data:video/jpeg;base64,{png(BLUE)},{png()}"
BROKEN = "data:image/png;base64,aGk="


@pytest.fixture
def engine() -> SeeingEngine:
    return SeeingEngine(context_length=4096)


@pytest.fixture
async def client(engine: SeeingEngine) -> AsyncIterator[Client]:
    async with serving(engine) as client:
        yield client


async def post(client: Client, path: str, **body: Any) -> Any:
    response = await client.post(path, json={**MODEL, **body})
    text = await response.text()
    assert response.status == 200, text
    return json.loads(text)


async def refusal(client: Client, path: str, **body: Any) -> str:
    response = await client.post(path, json={**MODEL, **body})
    assert response.status == 400
    return await response.text()


def colors(engine: FakeEngine, i: int = -1) -> list[tuple[int, ...]]:
    """Return the color of each picture, and of each video's first frame, that request `i` shows."""
    media = SEEN[engine.states[i].rid]
    return [tuple((one.pixels if isinstance(one, Image) else one.frames[0])[0, 0].tolist()) for one in media]


SEEN: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _seeing(engine: SeeingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Note what each request shows when it is submitted: afterwards it shows nothing any more."""
    SEEN.clear()
    submit = engine.submit

    def noting(state: Any) -> None:
        SEEN[state.rid] = () if state.request.media is None else state.request.media.media
        submit(state)

    monkeypatch.setattr(engine, "submit", noting)


def prompt(engine: FakeEngine, i: int = -1) -> str:
    """Return a request's prompt, a picture's tokens as one #."""
    text = engine.tokenizer.decode(engine.requests[i].input_ids)
    while "\x01\x01" in text:
        text = text.replace("\x01\x01", "\x01")
    return text.replace("\x01", "#")


def image_part(source: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": source, **more}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


# ---- OpenAI's chats ----


async def test_a_chat_shows_pictures_where_they_stand_over_messages_and_turns(
    client: Client, engine: SeeingEngine
) -> None:
    messages = [
        user(text_part("This"), image_part(uri(RED)), text_part("and"), image_part(uri(BLUE)), text_part("?")),
        {"role": "assistant", "content": "Two"},
        user(image_part(uri(BLUE)), text_part("Which?")),
    ]
    answer = await post(client, "/v1/chat/completions", messages=messages)
    assert prompt(engine) == "[user]This\n#\nand\n#\n?[assistant]Two[user]#\nWhich?[assistant]"
    assert colors(engine) == [RED, BLUE, BLUE]
    assert answer["usage"]["prompt_tokens"] == len(engine.requests[-1].input_ids)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": uri()}, {"type": "input_image", "image_url": uri()},
        {"type": "image", "image": uri()}, image_part(uri(), detail="high"), {**image_part(uri()), "uuid": "a"},
        image_part(png()), {"image_url": uri()}, {"type": "image", "url": uri()},
    ],
    ids=range(8),
)  # fmt: skip
async def test_a_picture_is_seen_in_each_clients_spelling(client: Client, engine: SeeingEngine, part: Any) -> None:
    await post(client, "/v1/chat/completions", messages=[user(part)])
    assert colors(engine) == [RED]


async def test_how_a_picture_is_read_reaches_the_model(client: Client, engine: SeeingEngine) -> None:
    parts = [
        image_part(uri(), detail="low"), image_part(uri(), max_pixels=999, min_pixels=7),
        {**image_part(uri()), "max_dynamic_patch": 6}, image_part(uri()),
    ]  # fmt: skip
    await post(client, "/v1/chat/completions", messages=[user(*parts)])
    assert [dict(one.settings) for one in SEEN[engine.states[-1].rid]] == [
        {"max_pixels": 512 * 512}, {"max_pixels": 999, "min_pixels": 7}, {"max_dynamic_patch": 6}, {},
    ]  # fmt: skip
    body = {"messages": [user(parts[1], parts[3])], "mm_processor_kwargs": {"max_pixels": 500, "fps": 3}}
    await post(client, "/v1/chat/completions", **body)
    assert [dict(one.settings) for one in SEEN[engine.states[-1].rid]] == [
        {"max_pixels": 999, "min_pixels": 7, "fps": 3}, {"max_pixels": 500, "fps": 3},
    ]  # fmt: skip


async def test_a_video_is_seen_as_frames(client: Client, engine: SeeingEngine) -> None:
    jpegs = f"data:video/jpeg;base64,{png(RED)},{png(BLUE)}"
    for part in ({"type": "video", "video": [uri(RED), uri(BLUE)]}, {"type": "video_url", "video_url": {"url": jpegs}}):
        await post(client, "/v1/chat/completions", messages=[user(part, text_part("What?"))])
        (video,) = SEEN[engine.states[-1].rid]
        assert isinstance(video, Video)
        assert video.frames[:, 0, 0].tolist() == [[*RED], [*BLUE]]


class PartsTokenizer(FakeTokenizer):
    """Writes the parts of a user's message itself, pictures before texts, as LLaVA's template does."""

    def render_chat(self, messages: Sequence[dict[str, Any]], *args: Any, **options: Any) -> str:
        written = []
        for message in messages:
            content = message["content"]
            if message["role"] == "user" and isinstance(content, list):
                kinds = {"image": "<image>", "video": "<video>"}
                shown = [kinds[part["type"]] for part in content if part["type"] in kinds]
                texts = [part["text"] for part in content if part["type"] == "text"]
                content = "".join([*sorted(shown), *texts])
            written.append({**message, "content": content})
        return super().render_chat(written, *args, **options)


async def test_a_template_that_writes_pictures_gets_them_as_parts_and_may_change_their_order(
    engine: SeeingEngine,
) -> None:
    engine.tokenizer = PartsTokenizer()
    frames = {"type": "video", "video": [uri(BLUE)]}
    async with serving(engine) as client:
        await post(
            client,
            "/v1/chat/completions",
            messages=[user(frames, text_part("a"), image_part(uri(RED)), text_part("b"))],
        )
        assert prompt(engine) == "[user]#ab[assistant]"
        assert colors(engine) == [RED, BLUE]
        call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        result = {"role": "tool", "tool_call_id": "a", "content": [text_part("Here"), image_part(uri(BLUE))]}
        messages = [user(text_part("Look")), {"role": "assistant", "tool_calls": [call]}, result]
        await post(client, "/v1/chat/completions", messages=messages)
        assert "Here\n#" in prompt(engine)  # which it does not write for a tool
        assert colors(engine) == [BLUE]


async def test_a_placeholder_in_a_clients_text_is_no_picture(client: Client, engine: SeeingEngine) -> None:
    await post(client, "/v1/chat/completions", messages=[user(text_part("an <image>"), image_part(uri()))])
    assert prompt(engine).startswith(f"[user]an <{CUT}image>") and "#" in prompt(engine)


async def test_a_chat_streams_and_is_counted_and_rendered_with_its_pictures(
    client: Client, engine: SeeingEngine
) -> None:
    messages = [user(image_part(uri(size=(100, 100))), text_part("?"))]
    response = await client.post("/v1/chat/completions", json={**MODEL, "messages": messages, "stream": True})
    assert (
        "".join(
            json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            for line in (await response.text()).splitlines()
            if line.startswith("data: {")
        )
        == "Hello, world"
    )
    prompt_len = engine.states[-1].prompt_len
    assert prompt_len == len("[user]\n?[assistant]") + 11
    assert (await post(client, "/tokenize", messages=messages))["count"] == prompt_len
    rendered = await post(client, "/v1/chat/completions/render", messages=messages)
    assert len(rendered["prompt_token_ids"]) == prompt_len
    assert rendered["prompt"] == "[user]<image>\n?[assistant]"


async def test_pictures_are_let_go_when_their_request_has_ended(client: Client, engine: SeeingEngine) -> None:
    await post(client, "/v1/chat/completions", messages=[user(image_part(uri()))])
    assert engine.states[-1].request.media is None


# ---- the other APIs ----


async def test_messages_show_pictures_also_in_results_of_tools(client: Client, engine: SeeingEngine) -> None:
    def block(color: tuple[int, int, int]) -> dict[str, Any]:
        return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": png(color)}}

    messages = [
        user(block(RED), text_part("Look")),
        {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "look", "input": {}}]},
        user({"type": "tool_result", "tool_use_id": "a", "content": [text_part("Seen:"), block(BLUE)]}),
    ]
    answer = await post(client, "/v1/messages", messages=messages, max_tokens=5)
    assert prompt(engine) == "[user]#\nLook[assistant][look][tool]Seen:\n#[assistant]"
    assert colors(engine) == [RED, BLUE]
    counted = await post(client, "/v1/messages/count_tokens", messages=messages)
    usage = answer["usage"]
    assert counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]


async def test_documents_show_their_pictures_where_they_stand(client: Client, engine: SeeingEngine) -> None:
    def document(*colors: tuple[int, int, int]) -> dict[str, Any]:
        blocks = [{"type": "image", "source": {"type": "base64", "data": png(color)}} for color in colors]
        source = {"type": "content", "content": [text_part("See"), *blocks, text_part("there")]}
        return {"type": "document", "title": "Letter", "source": source}

    result = {"type": "tool_result", "tool_use_id": "a", "content": [document(BLUE)]}
    messages = [user(document(RED, BLUE), text_part("?")), CALL, user(result)]
    await post(client, "/v1/messages", messages=messages, max_tokens=5)
    assert prompt(engine) == "[user]Letter\nSee\n#\n#\nthere\n?[assistant][look][tool]Letter\nSee\n#\nthere[assistant]"
    assert colors(engine) == [RED, BLUE, BLUE]
    broken = document(RED)
    broken["source"]["content"][1]["source"]["data"] = "aGk="
    text = await refusal(client, "/v1/messages", messages=[user(broken)], max_tokens=5)
    assert "messages[0].content[0].source.content[1].source.data is no picture" in text


async def test_responses_show_pictures_also_in_outputs_of_tools_and_when_they_go_on(
    client: Client, engine: SeeingEngine
) -> None:
    def part(color: tuple[int, int, int]) -> dict[str, Any]:
        return {"type": "input_image", "image_url": uri(color, (400, 300)), "detail": "auto"}

    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Look"}, part(RED)]},
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": [part(BLUE)]},
        {"type": "computer_call", "call_id": "b", "action": {"type": "screenshot"}},
        {"type": "computer_call_output", "call_id": "b", "output": {**part(RED), "type": "computer_screenshot"}},
    ]
    first = await post(client, "/v1/responses", input=items)
    assert colors(engine) == [RED, BLUE, RED]
    await post(client, "/v1/responses", input="And?", previous_response_id=first["id"])
    assert colors(engine) == [RED, BLUE, RED]
    assert prompt(engine).endswith("[user]And?[assistant]")
    listed = await (await client.get(f"/v1/responses/{first['id']}/input_items?order=asc")).json()
    assert listed["data"][0]["content"][1]["image_url"] == uri(RED, (400, 300))
    item_id = listed["data"][0]["id"]
    await post(client, "/v1/responses", input=[{"type": "item_reference", "id": item_id}])
    assert colors(engine) == [RED]


async def test_ollama_shows_pictures_before_the_text(client: Client, engine: SeeingEngine) -> None:
    messages = [{"role": "user", "content": "What?", "images": [png(RED), png(BLUE)]}]
    await post(client, "/api/chat", messages=messages, stream=False)
    assert prompt(engine) == "[user]#\n#\nWhat?[assistant]"
    assert colors(engine) == [RED, BLUE]
    await post(client, "/api/generate", prompt="What?", images=[png(BLUE)], stream=False)
    assert (prompt(engine), colors(engine)) == ("[user]#\nWhat?[assistant]", [BLUE])
    await post(client, "/api/generate", prompt="A <image>?", images=[png(BLUE)], raw=True, stream=False)
    assert (prompt(engine), colors(engine)) == ("A #?", [BLUE])
    assert "vision" in (await post(client, "/api/show"))["capabilities"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"text": "a<image>", "image_data": png(RED)}, [[RED]]),
        ({"text": "<image><image>", "image_data": [png(RED), uri(BLUE)], "modalities": ["multi-images"]},
         [[RED, BLUE]]),
        ({"text": ["<image>", "b", "<image><image>"], "image_data": [png(RED), None, [png(BLUE), png(RED)]]},
         [[RED], [], [BLUE, RED]]),
        ({"text": ["<image>", "<image>"], "image_data": png(BLUE)}, [[BLUE], [BLUE]]),
        ({"text": ["<image>"], "image_data": [[png(BLUE)]]}, [[BLUE]]),
        ({"text": "<image>", "image_data": [[png(BLUE)]]}, [[BLUE]]),
        ({"text": "<video>", "image_data": [png(RED), png(BLUE)], "modalities": ["video"]}, [[RED]]),
        ({"text": "<video><image>", "image_data": png(RED), "video_data": VIDEO}, [[BLUE, RED]]),
        ({"text": "plain", "image_data": None}, [[]]),
        ({"input_ids": list(b"a<image>b"), "image_data": png(BLUE)}, [[BLUE]]),
        ({"input_ids": [list(b"a"), list(b"<image>")], "image_data": [None, png(RED)]}, [[], [RED]]),
        ({"text": "<image>", "image_data": {"url": png(BLUE)}}, [[BLUE]]),
        ({"text": ["<image>", "<image>"], "image_data": [{"url": png(RED), "max_pixels": 9}, [{"url": png(BLUE)}]]},
         [[RED], [BLUE]]),
    ],
    ids=range(13),
)  # fmt: skip
async def test_generate_shows_each_prompt_its_own(
    client: Client, engine: SeeingEngine, body: dict[str, Any], expected: list[list[Any]]
) -> None:
    await post(client, "/generate", **body)
    assert [colors(engine, i) for i in range(len(engine.states))] == expected


async def test_a_batch_line_shows_pictures(client: Client, engine: SeeingEngine) -> None:
    import aiohttp

    body = {**MODEL, "messages": [user(image_part(uri(BLUE)), text_part("?"))]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", json.dumps(line).encode(), filename="lines.jsonl")
    file_id = (await (await client.post("/v1/files", data=form)).json())["id"]
    await post(client, "/v1/batches", input_file_id=file_id, endpoint="/v1/chat/completions")
    await engine.until(lambda: bool(engine.states))
    assert colors(engine) == [BLUE]


# ---- refusals ----

BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": [text_part("x"), BLOCK]}
CALL = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "look", "input": {}}]}
INPUT = {"type": "input_image", "image_url": BROKEN}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/chat/completions", {"messages": [user(text_part("Hi"), image_part(BROKEN))]},
         "messages[0].content[1].image_url.url"),
        ("/v1/chat/completions", {"messages": [user({"type": "input_image", "image_url": BROKEN})]},
         "messages[0].content[0].image_url"),
        ("/v1/chat/completions", {"messages": [user({"type": "video", "video": [BROKEN]})]},
         "messages[0].content[0].video"),
        ("/v1/chat/completions", {"messages": [user(image_part(""))]}, "messages[0].content[0].image_url.url"),
        ("/v1/chat/completions", {"messages": [user({"type": "image_url"})]}, "messages[0].content[0].image_url"),
        ("/v1/chat/completions", {"messages": [user(image_part(uri(), detail="huge"))]},
         "messages[0].content[0].image_url.detail"),
        ("/v1/chat/completions", {"messages": [user({"type": "input_audio"})]}, "messages[0].content[0].type"),
        ("/v1/messages", {"system": "Be", "messages": [user(text_part("x")), user(BLOCK)], "max_tokens": 5},
         "messages[1].content[0].source.data"),
        ("/v1/messages", {"messages": [user(text_part("x")), CALL, user(RESULT)], "max_tokens": 5},
         "messages[2].content[0].content[1].source.data"),
        ("/v1/messages", {"messages": [user({"type": "image"})], "max_tokens": 5}, "messages[0].content[0].source"),
        ("/v1/messages", {"messages": [user({"type": "image", "source": {"type": "url", "data": "aGk="}})],
                          "max_tokens": 5}, "messages[0].content[0].source"),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input[0].content[0].image_url"),
        ("/v1/responses", {"instructions": "Be", "input": [{"role": "user", "content": [INPUT]}]},
         "input[0].content[0].image_url"),
        ("/v1/responses", {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
                                     {"type": "function_call_output", "call_id": "a", "output": [INPUT]}]},
         "input[1].output[0].image_url"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": [png(), "aGk="]}]},
         "messages[0].images[1]"),
        ("/api/generate", {"prompt": "x", "images": ["aGk="]}, "images[0]"),
        ("/api/generate", {"prompt": "x<image>", "images": ["aGk="], "raw": True}, "images[0]"),
        ("/generate", {"text": "<image>", "image_data": "aGk="}, "image_data"),
        ("/generate", {"text": "<image><image>", "image_data": [png(), "aGk="]}, "image_data[1]"),
        ("/generate", {"text": ["a", "<image>"], "image_data": [None, ["aGk="]]}, "image_data[1]"),
        ("/generate", {"text": ["a", "b"], "image_data": [png()]}, "image_data"),
        ("/generate", {"text": "<image>", "image_data": [[png()], [png()]]}, "image_data"),
        ("/generate", {"text": "no place", "image_data": png()}, "text"),
        ("/generate", {"input_ids": [1], "image_data": png()}, "input_ids"),
        ("/generate", {"input_ids": list(b"<image>"), "image_data": "aGk="}, "image_data"),
        ("/generate", {"text": "<image>", "image_data": "/etc/passwd"}, "image_data"),
        ("/generate", {"text": "<image>", "image_data": {"format": "processor_output"}}, "image_data.format"),
        ("/generate", {"text": "<image>", "image_data": [{"detail": "low"}]}, "image_data.url"),
        ("/generate", {"text": "<image>", "image_data": png(), "modalities": ["smell"]}, "modalities"),
        ("/generate", {"text": "<video>", "video_data": "file:///etc/passwd"}, "video_data"),
        ("/tokenize", {"messages": [user(image_part(BROKEN))]}, "messages[0].content[0].image_url.url"),
        ("/v1/messages/count_tokens", {"messages": [user(BLOCK)]}, "messages[0].content[0].source.data"),
    ],
)  # fmt: skip
async def test_a_picture_that_cannot_be_read_is_named_as_the_client_wrote_it(
    client: Client, engine: SeeingEngine, path: str, body: dict[str, Any], field: str
) -> None:
    text = await refusal(client, path, **body)
    assert json.loads(text)["error"] if path.startswith("/api") else field in text
    assert f"{field} " in text or f'{field}"' in text
    assert not engine.states
    assert client.server.app[BODY_BUDGET].num_bytes <= 2 * 30 * 20 * 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/chat/completions", {"messages": [user(image_part(uri()))]}, "messages[0].content[0]"),
        ("/v1/chat/completions", {"messages": [user({"type": "video_url", "video_url": "x"})]},
         "messages[0].content[0]"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": [png()]}]}, "messages[0].images[0]"),
        ("/api/generate", {"prompt": "x", "images": [png()]}, "images[0]"),
        ("/api/generate", {"prompt": "x", "images": [png()], "raw": True}, "images[0]"),
        ("/generate", {"text": "x", "image_data": png()}, "image_data"),
        ("/generate", {"text": "x", "video_data": png()}, "video_data"),
    ],
)  # fmt: skip
async def test_a_text_model_refuses_pictures_and_says_that_it_reads_text_only(
    path: str, body: dict[str, Any], field: str
) -> None:
    async with serving(FakeEngine()) as client:
        text = await refusal(client, path, **body)
    assert field in text
    assert "this model reads text only" in text


async def test_a_model_of_images_alone_refuses_a_video_on_every_api(engine: SeeingEngine) -> None:
    engine.media_kinds = {"image": "<image>"}
    async with serving(engine) as client:
        for path, body in (
            ("/v1/chat/completions", {"messages": [user({"type": "video", "video": [uri()]}, image_part(uri()))]}),
            ("/generate", {"text": "<image><video>", "video_data": png(), "image_data": png()}),
        ):
            assert "is a video, but this model reads text and images" in await refusal(client, path, **body)


async def test_a_hundred_pictures_are_refused_and_none_is_decoded(client: Client, engine: SeeingEngine) -> None:
    text = await refusal(client, "/v1/chat/completions", messages=[user(*[image_part(uri())] * 100)])
    assert "messages[0].content[64].image_url.url is one of 100 images, the limit is 64 a request" in text
    assert client.server.app[BODY_BUDGET].num_bytes == 0  # type: ignore[attr-defined]


async def test_pictures_beyond_the_context_are_refused_as_a_prompt_that_is_too_long(client: Client) -> None:
    messages = [user(image_part(f"data:image/png;base64,{LARGE}"))]
    for path, words in (
        ("/v1/chat/completions", "context_length_exceeded"),
        ("/v1/messages", "prompt is too long: 6001 tokens > 4096 maximum"),
    ):
        source = {"type": "base64", "data": LARGE}
        if path == "/v1/messages":
            messages = [user({"type": "image", "source": source})]
        assert words in await refusal(client, path, messages=messages, max_tokens=5)


async def test_a_session_goes_on_with_its_pictures_and_holds_so_many(
    client: Client, engine: SeeingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    params: dict[str, Any] = {"id": await post(client, "/open_session", capacity_of_str_len=1000)}

    async def say(text: str, image: str | None, **more: Any) -> str:
        session = {**params, **more}
        answer = await post(client, "/generate", text=text, image_data=image, session_params=session)
        return str(answer["meta_info"]["id"])

    first = await say("a<image>b", png(RED, (100, 100)))
    second = await say("c", None, rid=first)
    assert (colors(engine), prompt(engine)) == ([RED], "a#bHello, worldc")
    third = await say("<image>d", png(BLUE), rid=second)
    assert (colors(engine), prompt(engine)) == ([RED, BLUE], "a#bHello, worldcHello, world#d")
    await say("e", None, rid=third, offset=13)  # of a, 11 tokens of the picture, b
    assert (colors(engine), prompt(engine)) == ([RED], "a#be")
    await say("f", None, rid=third, offset=1)
    assert (colors(engine), prompt(engine)) == ([], "af")
    body = {"text": "g", "session_params": {**params, "rid": third, "offset": 5}}
    assert "the last is in the middle of a picture" in await refusal(client, "/generate", **body)
    monkeypatch.setattr(sessions, "MAX_MEDIA_BYTES", 100 * 100 * 3 + 2 * 30 * 20 * 3 - 1)
    body = {"text": "<image>", "image_data": png(), "session_params": params}
    assert "those of the session 31800, the limit is 33599" in await refusal(client, "/generate", **body)


# ---- what is kept ----


async def test_the_pictures_of_stored_responses_are_kept_once_and_within_a_limit() -> None:
    def message(text: str) -> dict[str, Any]:
        return {"role": "user", "content": [image_part(text), text_part("?")]}

    def item(text: str) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "input_image", "image_url": text}]}

    texts = [letter * 4000 for letter in "abc"]
    images = KeptImages(max_bytes=10_000)
    kept = await images.kept("", [message(texts[0]), item(texts[0]), message(texts[1]), message("http://short")])
    assert images.num_bytes == 8000
    assert "aaaa" not in json.dumps(kept)
    assert kept[3] == message("http://short")
    assert images.filled("", kept)[:3] == [message(texts[0]), item(texts[0]), message(texts[1])]
    images.filled("", kept[:1])
    await images.kept("", [message(texts[2])])
    assert images.num_bytes == 8000
    filled = images.filled("", kept)
    assert filled[:2] == [message(texts[0]), item(texts[0])]
    assert filled[2]["content"][0] == text_part(GONE)


async def test_nobody_finds_anothers_pictures_or_loses_theirs_to_anothers_many() -> None:
    images = KeptImages(max_bytes=10_000)
    (hers,) = await images.kept("alice", [user(image_part("a" * 3000))])
    for letter in "bcdefg":
        await images.kept("bob", [user(image_part(letter * 3000))])
    assert images.filled("alice", [hers]) == [user(image_part("a" * 3000))]
    assert images.filled("bob", [hers]) == [user(text_part(GONE))]


async def test_what_is_stored_of_a_response_has_no_bytes_of_pictures(
    engine: SeeingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[Any] = []
    put = ResponseStore.put

    def noting(self: ResponseStore, *given: Any) -> None:
        put(self, *given)
        stored.extend(self._shelves[""].texts.values())

    monkeypatch.setattr(ResponseStore, "put", noting)
    part = {"type": "input_image", "image_url": uri(BLUE, (700, 600))}
    async with serving(engine) as client:
        await post(client, "/v1/responses", input=[{"role": "user", "content": [part]}])
    assert png(BLUE, (700, 600))[:100].encode() not in stored[0]
    assert b"kept:" in stored[0]


async def test_the_line_of_a_request_in_the_log_has_no_pictures(
    engine: SeeingEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with serving(engine, log_requests=True, log_requests_level=3) as client:
        await post(client, "/v1/chat/completions", messages=[user(image_part(uri()))])
    assert "request chatcmpl" in caplog.text
    assert png()[:40] not in caplog.text


@pytest.mark.parametrize("has_failed", [False, True])
async def test_a_crash_dump_has_tokens_and_no_pictures(engine: SeeingEngine, tmp_path: Any, has_failed: bool) -> None:
    if has_failed:
        engine.failure = FinishReason("abort", message="x", status_code=500)
    async with serving(engine, crash_dump_folder=str(tmp_path)) as client:
        await client.post("/generate", json={"text": "<image>", "image_data": png()})
        await client.post("/generate", json={"text": "a"})
    for path in tmp_path.glob("*.jsonl"):
        assert png()[:40] not in path.read_text()
