"""The language's programs with pictures, as SGLang's examples write them, on a tiny model that sees."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

import server.lang as sgl
from engine.media import Video
from server.lang.backends.openai import OpenAI
from tests.fake_engine import SeeingEngine
from tests.lang_servers import fake_backend, serving_engine, tiny_engine
from tests.vision_models import make_vision_model, picture

everywhere = pytest.mark.parametrize("backend", ["http", "in_process", "openai_chat"], indirect=True)
natively = pytest.mark.parametrize("backend", ["http", "in_process"], indirect=True)


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Yield backends by name; one engine answers for all of them."""
    folder = make_vision_model(tmp_path_factory.mktemp("llava"), "llava")
    with tiny_engine(folder) as engine, serving_engine(engine, served_model_name=["llava"]) as url:
        backends: dict[str, Any] = {
            "http": sgl.RuntimeEndpoint(url),
            "openai_chat": OpenAI("llava", base_url=f"{url}/v1", api_key="none"),
            "openai": OpenAI("llava", is_chat_model=False, base_url=f"{url}/v1", api_key="none"),
        }
        yield {**backends, "in_process": engine}
        for backend in backends.values():
            backend.shutdown()


@pytest.fixture
def backend(request: pytest.FixtureRequest, backends: dict[str, Any]) -> Iterator[str]:
    sgl.set_default_backend(backends[request.param])
    yield request.param
    sgl.set_default_backend(None)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the paths of two pictures."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(2):
        Pillow.fromarray(picture(40, 60, i).pixels).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(2)]


@sgl.function
def image_qa(s, image_path, question):
    s += sgl.user(sgl.image(image_path) + question)
    s += sgl.assistant(sgl.gen("answer"))


ASKED: dict[str, Any] = {"question": "What is this?", "max_new_tokens": 8, "temperature": 0}


@everywhere
def test_single_stream_and_batch_see_their_own_picture(backend: str, images: list[str]) -> None:
    single = [image_qa.run(image_path=image, **ASKED)["answer"] for image in images]
    assert single[0] != single[1]
    state = image_qa.run(image_path=images[0], stream=True, **ASKED)
    assert "".join(state.text_iter("answer")) == single[0]
    options = {name: ASKED[name] for name in ("max_new_tokens", "temperature")}
    arguments = [{"image_path": image, "question": ASKED["question"]} for image in images]
    assert [state["answer"] for state in image_qa.run_batch(arguments, **options)] == single


def test_all_backends_give_the_same_answers(backends: dict[str, Any], images: list[str]) -> None:
    chosen = [backends[name] for name in ("http", "in_process", "openai_chat")]
    assert len({image_qa.run(image_path=images[0], backend=backend, **ASKED)["answer"] for backend in chosen}) == 1


@sgl.function
def compare(s, first, second):
    s += sgl.user(sgl.image(first) + sgl.image(second) + "Which is larger?")
    s += sgl.assistant(sgl.gen("answer", max_tokens=4))
    s += sgl.user("And this?" + sgl.image(first))
    s += sgl.assistant(sgl.gen("again", max_tokens=4))


@natively
def test_several_pictures_over_turns_are_seen_and_found_cached(backend: str, images: list[str]) -> None:
    state = compare.run(*images, temperature=0)
    turned = compare.run(*reversed(images), temperature=0)
    assert state.text() != turned.text()
    meta = state.get_meta_info("again")
    before = state.get_meta_info("answer")["prompt_tokens"]
    assert meta["cached_tokens"] >= before
    assert len(state.messages()[0]["content"]) == 3


@natively
def test_a_choice_and_a_fork_go_on_from_a_picture(backend: str, images: list[str]) -> None:
    @sgl.function
    def program(s, image):
        s += sgl.image(image) + "It is "
        s += sgl.select("kind", choices=["a cat", "a dog"])
        forks = s.fork(2)
        forks += sgl.gen("more", max_tokens=3, temperature=0)
        forks.join()

    state = program.run(images[0])
    assert state["kind"] in ("a cat", "a dog")
    assert state["more"][0] == state["more"][1]


def test_completions_of_openai_do_not_drop_a_picture_silently(backends: dict[str, Any], images: list[str]) -> None:
    @sgl.function
    def program(s, image):
        s += sgl.image(image) + sgl.gen("answer")

    with pytest.raises(sgl.BackendError, match="show no images"):
        program.run(images[0], backend=backends["openai"])["answer"]


def test_a_picture_that_cannot_be_read_is_a_backend_error(backends: dict[str, Any]) -> None:
    for backend in (backends["http"], backends["in_process"]):
        with pytest.raises(sgl.BackendError, match="is no picture") as refused:
            image_qa.run(image_path=b"x" * 99, backend=backend, **ASKED)["answer"]
        assert refused.value.status == 400


def test_a_video_is_shown_as_the_frames_asked_for(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(48, 64, i).pixels, format="rgb24")))
        container.mux(stream.encode())
    (tmp_path / "cat.mp4").write_bytes(buffer.getvalue())

    @sgl.function
    def video_qa(s, path, num_frames):
        s += sgl.user(sgl.video(path, num_frames) + "What happens?")
        s += sgl.assistant(sgl.gen("answer", max_tokens=3))

    engine = SeeingEngine(context_length=4096)
    shown: list[Any] = []
    submit = engine.submit

    def noting(state: Any) -> None:
        shown.append(state.request.media)
        submit(state)

    engine.submit = noting  # type: ignore[method-assign]
    with fake_backend(engine) as backend:
        assert video_qa.run(str(tmp_path / "cat.mp4"), 5, backend=backend)["answer"] == "Hel"
    (video,) = shown[-1].media
    assert isinstance(video, Video)
    assert video.frames.shape == (5, 48, 64, 3)
