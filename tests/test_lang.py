"""Test what each construct of the language promises, over HTTP and in process."""

import asyncio
import base64
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import server.lang as sgl
from engine.state import FinishReason, RequestState
from server.lang.backends.native import NativeBackend
from server.lang.executor import Executor
from server.lang.expressions import Gen, GenParams
from server.lang.loop import LoopThread
from server.lang.media import load_image
from server.lang.state import ProgramState
from tests.fake_engine import FakeEngine
from tests.lang_servers import fake_backend, listening, serving_engine, tiny_engine
from tests.test_lang_programs import multi_turn_question, tip_suggestion


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> Iterator[sgl.Engine]:
    with tiny_engine(tiny_llama) as engine:
        yield engine


@pytest.fixture(scope="module")
def endpoint(engine: sgl.Engine) -> Iterator[sgl.RuntimeEndpoint]:
    with serving_engine(engine) as url:
        endpoint = sgl.RuntimeEndpoint(url)
        yield endpoint
        endpoint.shutdown()


@pytest.fixture(params=["http", "in_process"])
def backend(
    request: pytest.FixtureRequest, endpoint: sgl.RuntimeEndpoint, engine: sgl.Engine
) -> Iterator[NativeBackend]:
    is_http = request.param == "http"
    sgl.set_default_backend(endpoint if is_http else engine)
    assert sgl.flush_cache()
    yield endpoint if is_http else engine.endpoint
    sgl.set_default_backend(None)


# ---- programs ----


def test_a_conversation_alternates_and_each_turn_finds_the_last_one_cached(backend):
    state = multi_turn_question.run(
        question_1="What is the capital of the United States?", question_2="List two local attractions.", temperature=0
    )
    roles = [message["role"] for message in state.messages()]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert state.messages()[2]["content"] == state["answer_1"].lstrip()
    rendered = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in state.messages())
    assert state.text() == rendered, "the served model's own template"
    first, second = state.get_meta_info("answer_1"), state.get_meta_info("answer_2")
    # A random model's answer need not be read as the tokens that it was written in.
    assert second["cached_tokens"] >= first["prompt_tokens"] - 1


def test_a_fork_finds_its_prefix_cached(backend):
    state = tip_suggestion.run(temperature=0)
    tips = state["detailed_tip"]
    assert len(tips) == 2
    assert state.text().endswith(f"Tip 1:{tips[0]}\nTip 2:{tips[1]}\nIn summary{state['summary']}")
    prefix = "Here are two tips for staying healthy: 1. Balanced Diet. 2. Regular Exercise.\n\n"
    num_prefix = len(backend.loop.run(backend.tokenize(prefix, True)))
    for meta in state.get_meta_info("detailed_tip"):
        assert num_prefix - 2 <= meta["cached_tokens"] < meta["prompt_tokens"]


@sgl.function
def text_qa(s, question):
    s += "Q: " + question + "\n"
    s += "A:" + sgl.gen("answer", stop="\n", max_tokens=8)


QUESTIONS = ["What is the capital of the United Kingdom?", "What is the capital of France?", "And of Japan?"]


def test_a_batch_keeps_its_order(backend):
    batch = [{"question": question} for question in QUESTIONS]
    states = text_qa.run_batch(batch, progress_bar=True, temperature=0)
    assert [state.text().split("\n")[0] for state in states] == [f"Q: {question}" for question in QUESTIONS]
    alone = [text_qa.run(question=question, temperature=0)["answer"] for question in QUESTIONS]
    assert [state["answer"] for state in states] == alone
    by_position = text_qa.run_batch([(question,) for question in QUESTIONS], temperature=0, num_threads=2)
    assert [state["answer"] for state in by_position] == alone
    in_turn = text_qa.run_batch(batch, temperature=0, generator_style=True)
    assert [state["answer"] for state in in_turn] == alone
    assert text_qa.run_batch([]) == []
    with pytest.raises(TypeError, match="Given arguments mismatch"):
        text_qa.run_batch([("a", "b")])


def test_a_batch_is_checked_before_it_runs(backend):
    @sgl.function
    def translate(s, text, language="French", tone="plain"):
        s += f"{text} in {language}, {tone}:"

    states = translate.run_batch([("a",), ("b", "German")])
    assert [state.text() for state in states] == ["a in French, plain:", "b in German, plain:"]
    assert [state.text() for state in translate.bind(text="c").run_batch([()])] == ["c in French, plain:"]
    for mismatch in ((), ("a", "b", "c", "d")):
        with pytest.raises(TypeError, match=f"item 0 has {len(mismatch)}, translate takes 1 to 3"):
            translate.run_batch([mismatch])
    items: list[Any] = ["a", 1]
    for item in items:
        with pytest.raises(TypeError, match="item 0 of a batch must be a dict or a tuple"):
            translate.run_batch([item])
    for num_threads in (0, "many"):
        with pytest.raises(ValueError, match="num_threads must be"):
            translate.run_batch([("a",)], num_threads=num_threads)


def test_streaming_gives_the_text_piece_by_piece(backend):
    whole = text_qa.run(question="What is the capital of France?", temperature=0).text()
    state = text_qa.run(question="What is the capital of France?", temperature=0, stream=True)
    pieces = list(state.text_iter())
    assert "".join(pieces) == whole and len(pieces) > 2
    state = text_qa.run(question="What is the capital of France?", temperature=0, stream=True)
    assert "".join(state.text_iter("answer")) == state["answer"]
    assert list(text_qa.run(question="x", temperature=0).text_iter()) == [text_qa.run("x", temperature=0).text()]


async def test_streaming_works_in_a_running_loop(backend):
    state = text_qa.run(question="What is the capital of France?", temperature=0, stream=True)  # as in a notebook
    pairs = [pair async for pair in state.text_async_iter("answer", return_meta_data=True)]
    assert "".join(text for text, _ in pairs) == state["answer"]
    assert pairs[-1][1]["completion_tokens"] == state.get_meta_info("answer")["completion_tokens"]
    whole = text_qa.run(question="What is the capital of France?", temperature=0)  # the synchronous API, there as well
    assert "".join([text async for text in whole.text_async_iter()]) == state.text()
    with pytest.raises(ValueError, match="var_name"):
        await anext(state.text_async_iter(return_meta_data=True))


def test_a_role_cannot_begin_inside_another(backend):
    @sgl.function
    def nested(s):
        with s.user(), s.assistant():
            s += sgl.gen("answer")

    with pytest.raises(ValueError, match="assistant message cannot begin inside the user"):
        nested.run()["answer"]


# ---- what is sent: a server that remembers and refuses nothing ----


@pytest.fixture
def recorder() -> Iterator[tuple[sgl.RuntimeEndpoint, list[dict[str, Any]]]]:
    """Yield a backend, and the bodies of its /generate."""
    bodies: list[dict[str, Any]] = []

    async def info(_: web.Request) -> web.Response:
        return web.json_response({"model_path": "recorder"})

    async def generate(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        meta = {"prompt_tokens": 3, "completion_tokens": 1, "cached_tokens": 0, "id": "r"}
        return web.json_response({"text": "1", "meta_info": meta})

    app = web.Application()
    app.add_routes([web.get("/get_model_info", info), web.post("/generate", generate)])
    loop = LoopThread("recorder")
    with listening(loop, app) as url:
        endpoint = sgl.RuntimeEndpoint(url, chat_template_name="chatml-llava")
        yield endpoint, bodies
        endpoint.shutdown()
    loop.close()


IP = r"((25[0-5]|2[0-4]\d|[01]?\d\d?).){3}(25[0-5]|2[0-4]\d|[01]?\d\d?)"
CHARACTER = r"""\{\n    "name": "[\w\d\s]{1,16}",\n    "alive": (Alive|Deceased)\n\}"""


def test_constraints_are_sent_as_the_server_wants_them(recorder):
    endpoint, bodies = recorder

    @sgl.function
    def constrained(s):
        s += "Q: What is the IP address of the Google DNS servers?\nA: "
        s += sgl.gen("ip", temperature=0, regex=IP) + sgl.gen("character", max_tokens=256, regex=CHARACTER)
        s += sgl.gen("city", json_schema={"type": "object"})
        s += sgl.gen("age", dtype=int) + sgl.gen_int("year", max_tokens=4) + sgl.gen("fine", dtype=bool)
        s += sgl.gen_string("name", stop=["."]) + sgl.gen("price", dtype=float)

    state = constrained.run(backend=endpoint, max_new_tokens=7, top_p=0.9)
    assert state.error() is None
    params = [body["sampling_params"] for body in bodies]
    assert [p.get("regex") for p in params] == [
        IP, CHARACTER, None, r"[-+]?[0-9]+[ \n]*", r"[-+]?[0-9]+[ \n]*", "(True|False)", r"\"[\w\d\s]*\"",
        r"[-+]?[0-9]*\.?[0-9]+[ \n]*",
    ]  # fmt: skip
    assert params[2]["json_schema"] == '{"type": "object"}'
    assert [p["max_new_tokens"] for p in params] == [7, 256, 7, 7, 4, 7, 7, 7]
    assert [p.get("stop") for p in params] == [None, None, None, [" ", "\n"], [" ", "\n"], None, ["."], [" ", "\n"]]
    assert {p["top_p"] for p in params} == {0.9}


def test_images_go_with_the_prompt_and_into_the_message(recorder, tmp_path):
    endpoint, bodies = recorder
    picture = b"\x89PNG\r\n\x1a\n" + bytes(20)
    (tmp_path / "cat.png").write_bytes(picture)

    @sgl.function
    def image_qa(s, image_path, question):
        s += sgl.user(sgl.image(image_path) + question)
        s += sgl.assistant(sgl.gen("answer"))

    state = image_qa.run(image_path=str(tmp_path / "cat.png"), question="What is this?", backend=endpoint)
    encoded = base64.b64encode(picture).decode()
    assert bodies[0]["image_data"] == [encoded]
    assert bodies[0]["text"].endswith("<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n")
    assert state.messages()[0]["content"] == [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "text", "text": "What is this?"},
    ]
    with pytest.raises(FileNotFoundError):
        image_qa.run(image_path="no-such.png", question="?", backend=endpoint)["answer"]


def test_an_image_may_be_base64_text_of_any_length_or_a_data_url():
    for num_bytes in (8, 300, 5000):  # a name of more than 255 bytes is an error to the file system
        encoded = base64.b64encode(b"\x89PNG" + bytes(num_bytes)).decode()
        url = f"data:image/png;base64,{encoded}"
        assert load_image(encoded).source == encoded
        assert load_image(encoded).url == load_image(url).url == load_image(url).source == url


def test_a_video_is_sent_with_its_number_of_frames(recorder, tmp_path):
    endpoint, bodies = recorder
    (tmp_path / "cat.mp4").write_bytes(b"film")

    @sgl.function
    def video_qa(s):
        s += sgl.user(sgl.video(str(tmp_path / "cat.mp4"), 4) + "What happens?") + sgl.assistant(sgl.gen("answer"))

    assert video_qa.run(backend=endpoint)["answer"] == "1"
    assert bodies[0]["video_data"] == ["video:4:" + base64.b64encode(b"film").decode()]


def test_an_in_process_engine_says_that_it_reads_text_only(engine):
    @sgl.function
    def image_qa(s):
        s += sgl.image(b"\x89PNG") + sgl.gen("answer")

    with pytest.raises(sgl.BackendError, match="image_data"):
        image_qa.run(backend=engine)["answer"]


# ---- constructs ----


def test_a_state_is_read_and_written_like_a_mapping(backend):
    @sgl.function
    def program(s):
        s["note"] = 7
        with s.var_scope("scope"):
            s += "a" + sgl.gen("x", max_tokens=3) + "b"
        with s.copy() as branch:
            branch += "tail" + sgl.gen("y", max_tokens=2)
        s.set_var("late", s["x"])
        return "returned"

    state = program.run(temperature=0)
    assert state["note"] == 7 and "note" in state and "nothing" not in state
    assert state["scope"] == f"a{state['x']}b" == state.text()
    assert state["late"] == state["x"] and isinstance(state["y"], list) and len(state["y"]) == 1
    assert state.ret_value == "returned"
    with pytest.raises(KeyError):
        state["nothing"]
    with pytest.raises(ValueError, match="None"):
        state += None  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="int"):
        state += 5  # type: ignore[arg-type]


def test_n_gives_a_list_and_the_text_goes_on_with_the_first(backend):
    @sgl.function
    def program(s):
        s += "Once" + sgl.gen("x", n=3, max_tokens=4)

    state = program.run(temperature=1.0)
    assert len(state["x"]) == 3 and len(state.get_meta_info("x")) == 3
    assert state.text() == "Once" + state["x"][0]


def test_branches_join_by_variables_or_by_text(backend):
    @sgl.function
    def program(s, mode):
        s += "Start. "
        with s.fork(3) as forks:
            forks += lambda i: f"[{i}]"
            forks += sgl.gen("x", max_tokens=3)
            forks += ["a", "b", "c"]
            with pytest.raises(ValueError, match="lone string"):
                forks += "text"
            if mode == "concate_and_append":
                forks.join(mode)
                return

    gathered = program.run("gather_variable", temperature=0)
    assert len(gathered["x"]) == 3 and gathered.text() == "Start. "
    state = program.run("concate_and_append", temperature=0)
    assert state.text() == "Start. " + "".join(
        f"[{i}]{x}{end}" for i, (x, end) in enumerate(zip(gathered["x"], "abc", strict=True))
    )


def test_a_branch_can_be_appended_to_by_its_index(backend):
    @sgl.function
    def program(s):
        forks = s.fork(2)
        forks[0] += "a"
        forks[1] += "b" + sgl.gen("x", max_tokens=3)
        with pytest.raises(TypeError, match="not replaced"):
            forks[0] = forks[1]
        forks.join("concate_and_append")
        s["tail"] = forks[1]["x"]

    state = program.run(temperature=0)
    assert state.text() == f"ab{state['tail']}"


def test_a_message_is_appended_once_however_it_is_written(backend):
    @sgl.function
    def program(s):
        s += s.system("Be brief.")
        s.user("Who?")
        with s.assistant():
            s += sgl.gen("x", max_tokens=3)

    state = program.run(temperature=0)
    assert [message["role"] for message in state.messages()] == ["system", "user", "assistant"]


def test_log_probabilities_come_with_the_answer(backend):
    @sgl.function
    def program(s):
        s += "Once upon" + sgl.gen("x", max_tokens=3, return_logprob=True, top_logprobs_num=2, ignore_eos=True)

    meta = program.run(temperature=0).get_meta_info("x")
    assert len(meta["output_token_logprobs"]) == 3
    assert [len(row) for row in meta["output_top_logprobs"]] == [2, 2, 2]
    assert meta["output_token_logprobs"][0][0] == pytest.approx(meta["output_top_logprobs"][0][0][0], abs=1e-5)


def test_an_error_surfaces_where_the_variable_is_read(backend):
    @sgl.function
    def program(s):
        s += "a" + sgl.gen("fine", max_tokens=2)
        s += sgl.gen("wrong", temperature=-1.0)
        s += sgl.gen("after")

    state = program.run(temperature=0)
    assert isinstance(state["fine"], str)
    for name in ("wrong", "after"):
        with pytest.raises(sgl.BackendError, match="temperature"):
            state[name]
    error = state.error()
    assert isinstance(error, sgl.BackendError) and error.status == 400
    streamed = program.run(temperature=0, stream=True)
    with pytest.raises(sgl.BackendError, match="temperature"):
        list(streamed.text_iter("wrong"))
    with pytest.raises(sgl.BackendError, match="temperature"):
        list(streamed.text_iter())


def test_an_error_in_the_body_is_raised_by_run(backend):
    @sgl.function
    def program(s):
        s += "a" + sgl.gen("x", max_tokens=2)
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        program.run()
    with pytest.raises(LookupError, match="mine"):
        program.run_batch([{}, {}])


def test_an_error_in_a_streamed_body_is_raised_where_its_text_is_read(backend):
    @sgl.function
    def program(s):
        s += "a" + sgl.gen("x", max_tokens=2)
        s["x"]
        raise LookupError("mine")

    for name in (None, "y"):
        with pytest.raises(LookupError, match="mine"):
            list(program.run(stream=True).text_iter(name))


@pytest.mark.max_callback_ms(10_000)  # it also calls the ways to run that wait, as a script may
async def test_asynchronous_bodies_wait_without_a_thread(backend):
    @sgl.function
    async def program(s, i):
        s += f"Count to {i}:" + sgl.gen("x", max_tokens=3)
        s += "!" * len(await s.get("x")) + sgl.gen("y", max_tokens=2)

    states = await asyncio.gather(*[program.arun(i=i, temperature=0) for i in range(20)])
    assert [state.text().split(":")[0] for state in states] == [f"Count to {i}" for i in range(20)]
    assert [await state.get("x") for state in states] == [state["x"] for state in states]
    plain = await text_qa.arun(question="x", temperature=0)
    assert plain["answer"] == text_qa.run(question="x", temperature=0)["answer"]
    batch = program.run_batch([{"i": i} for i in range(5)], temperature=0)
    assert [state.text() for state in batch] == [state.text() for state in states[:5]]


def test_bound_arguments_join_the_run(backend):
    bound = text_qa.bind(question="And of Japan?")
    assert bound.run(temperature=0).text().startswith("Q: And of Japan?\n")
    assert len(bound.run_batch([{}, {}], temperature=0)) == 2
    with pytest.raises(TypeError, match="no argument nothing"):
        text_qa.bind(nothing=1)
    with pytest.raises(TypeError, match="must be named s"):
        sgl.function(lambda state: None)


FEW_SHOT = "".join(f"Q: What is {i} plus {i}?\nA: {2 * i}\n" for i in range(12))  # long enough to be worth asking for


@sgl.function
def few_shot(s, question):
    s += FEW_SHOT
    s += "Q: " + question + "\nA:" + sgl.gen("answer", max_tokens=4, stop="\n")


def test_a_batch_has_its_common_prefix_cached_before_anyone_needs_it(backend):
    states = few_shot.run_batch([{"question": f"What is {i} plus {i + 1}?"} for i in range(6)], temperature=0)
    num_prefix = len(backend.loop.run(backend.tokenize(FEW_SHOT, True)))
    assert min(state.get_meta_info("answer")["cached_tokens"] for state in states) >= num_prefix - 2


def test_a_program_caches_the_text_that_every_run_starts_with(backend):
    assert few_shot.cache() == FEW_SHOT + "Q: "
    meta = few_shot.run("What is 1 plus 2?", temperature=0).get_meta_info("answer")
    assert meta["cached_tokens"] >= len(backend.loop.run(backend.tokenize(FEW_SHOT, True))) - 2
    prefix = multi_turn_question.cache()
    assert prefix == "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"


def test_a_program_whose_trace_stops_caches_what_comes_before(backend):
    @sgl.function
    def shouting(s, question):
        s += "Answer me."
        s += question.upper()

    @sgl.function
    def looking(s, question):
        s += "Answer me."
        if "?" in question:
            s += "Now!"

    @sgl.function
    async def asynchronous(s, question):
        s += "Answer me." + sgl.gen("x")
        s += await s.get("x")
        await asyncio.sleep(1)

    for program in (shouting, looking, asynchronous):
        assert program.cache() == "Answer me."
        with pytest.raises(sgl.TraceStopped):
            program.trace()


def test_a_trace_lists_what_a_program_appends():
    trace = tip_like.trace()
    assert [type(node).__name__ for node in trace.flatten_nodes()] == ["Text", "Variable", "Gen", "Variable"]
    assert [len(child.nodes) for child in trace.children] == [1, 1]
    with pytest.raises(sgl.TraceStopped, match="not known"):
        branching.trace()


@sgl.function
def tip_like(s, topic):
    s += "On " + topic + sgl.gen("x")
    forks = s.fork(2)
    forks += sgl.gen("y")
    s += forks[0]["y"]


@sgl.function
def branching(s):
    s += sgl.gen("x")
    if s["x"] == "a":
        s += "b"


def test_thoughts_are_kept_apart_from_the_answer():
    with fake_backend(FakeEngine("<think>hm, well</think>\n\nyes")) as backend:

        @sgl.function
        def program(s):
            s += sgl.user("Is it?")
            s += sgl.assistant(sgl.separate_reasoning(sgl.gen("answer"), model_type="qwen3"))

        state = program.run(backend=backend)
        assert (state["answer"], state["answer_reasoning_content"]) == ("yes", "hm, well")
        assert state.messages()[-1]["content"] == "yes"


# ---- what the runtime is told ----


def test_a_branch_that_nobody_can_read_any_more_is_aborted():
    engine = FakeEngine(is_manual=True)
    with fake_backend(engine) as backend:

        @sgl.function
        def program(s):
            s += "start"
            forks = s.fork(3)
            forks += sgl.gen("x")
            wait_for(lambda: len(engine.live) == 3)
            kept = forks[1]
            forks[2].abort()
            del forks
            wait_for(lambda: len(engine.live) == 1)
            [request] = engine.live.values()
            backend.loop.call(engine.finish, request, FinishReason("stop"))
            return kept["x"]

        release_commits(engine, backend)
        assert program.run(backend=backend).ret_value == ""
        assert len(engine.aborted) == 2


def test_a_reader_of_an_aborted_state_is_told():
    engine = FakeEngine(is_manual=True)
    with fake_backend(engine) as backend:
        state = text_qa.run(question="x", backend=backend, stream=True)
        wait_for(lambda: bool(engine.live))
        state.abort()
        with pytest.raises(sgl.ProgramAborted):
            state["answer"]
        wait_for(lambda: not engine.live)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("ends_by", ["error", "reader"])
def test_a_batch_that_nobody_reads_on_is_aborted(ends_by, is_async):
    begun = []

    def plain(s, i):
        begun.append(i)
        if i == 0 and ends_by == "error":
            raise LookupError("mine")
        if i:
            s += f"{i}" + sgl.gen("x")
            s["x"]

    async def asynchronous(s, i):
        begun.append(i)
        if i == 0 and ends_by == "error":
            raise LookupError("mine")
        if i:
            s += f"{i}" + sgl.gen("x")
            await s.get("x")

    engine = FakeEngine(is_manual=True)  # nothing is ever answered
    with fake_backend(engine) as backend:
        program = sgl.function(asynchronous if is_async else plain)
        batch = program.run_batch([(i,) for i in range(10)], backend=backend, num_threads=4, generator_style=True)
        with pytest.raises(LookupError) if ends_by == "error" else nullcontext():
            next(batch)
        batch.close()
        assert len(begun) < 10
        wait_for(lambda: not engine.live)


def test_a_state_that_is_aborted_before_its_work_begins_tells_its_readers():
    with fake_backend(FakeEngine(is_manual=True)) as backend:
        state = ProgramState(Executor(backend, GenParams()))

        def write_and_abort() -> None:  # on the loop, which begins nothing in between
            state.submit("a" + sgl.gen("x"))
            state.abort()

        backend.loop.call(write_and_abort)
        wait_for(lambda: "x" in state._executor._futures)
        with pytest.raises(sgl.ProgramAborted):
            state._executor._futures["x"].result(timeout=60)


def wait_for(condition) -> None:
    """Poll another thread's state."""
    pause = threading.Event()
    for _ in range(12_000):  # two minutes
        if condition():
            return
        pause.wait(0.01)
    raise TimeoutError


def release_commits(engine: FakeEngine, backend: NativeBackend) -> None:
    """Let requests for no tokens end by themselves, as the real engine does."""
    submit = engine.submit

    def submit_and_release(state: RequestState) -> None:
        submit(state)
        if state.max_new_tokens == 0:
            backend.loop.loop.call_soon(engine.finish, state, FinishReason("length"))

    engine.submit = submit_and_release  # type: ignore[method-assign]


def test_thousands_of_states_need_no_thread_each():
    engine = FakeEngine(is_manual=True, max_queued=10_000)
    others = threading.active_count()  # left by other tests of this process
    with fake_backend(engine) as backend:

        @sgl.function
        def program(s, i):
            s += f"{i}" + sgl.gen("x", max_tokens=4) + " and " + sgl.gen("y", max_tokens=4)

        most_threads = 0

        def release() -> None:
            nonlocal most_threads
            wait_for(lambda: len(engine.live) == 2000)
            most_threads = threading.active_count()
            engine.is_manual = False
            for request in list(engine.live.values()):
                backend.loop.call(engine._step, request)

        threading.Thread(target=release).start()
        states = program.run_batch([{"i": i} for i in range(2000)], backend=backend)
        assert [state["y"] for state in states] == ["Hell"] * 2000
        assert most_threads - others < 150


def test_waiting_on_the_loop_that_works_is_refused():
    with fake_backend(FakeEngine()) as backend:

        @sgl.function
        async def program(s):
            s += "a" + sgl.gen("x")
            return s["x"]

        with pytest.raises(RuntimeError, match=r"await s\.get"):
            program.run(backend=backend)


def test_importing_the_language_does_not_import_torch():
    code = "import sys, server.lang as sgl; sgl.RuntimeEndpoint, sgl.Engine; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_a_server_that_is_not_there_is_an_error():
    with pytest.raises(sgl.BackendError, match=r"127\.0\.0\.1:9"):
        sgl.RuntimeEndpoint("http://127.0.0.1:9")
    with pytest.raises(ValueError, match="begins with http"):
        sgl.RuntimeEndpoint("localhost:30000")
    sgl.set_default_backend(None)
    with pytest.raises(ValueError, match="set_default_backend"):
        text_qa.run("x")
    for wrong in ("http://localhost:30000", sgl.RuntimeEndpoint):
        with pytest.raises(TypeError, match="a backend is"):
            sgl.set_default_backend(wrong)
        with pytest.raises(TypeError, match="a backend is"):
            text_qa.run("x", backend=wrong)


def test_a_backend_that_was_shut_down_says_so(recwarn):
    with fake_backend(FakeEngine()) as backend:
        pass
    for ask in (backend.get_server_info, backend.flush_cache, lambda: text_qa.run("x", backend=backend)):
        with pytest.raises(RuntimeError, match="has been shut down"):
            ask()
    assert not [warning for warning in recwarn if "never awaited" in str(warning.message)]


def test_an_api_key_is_sent(engine):
    with serving_engine(engine, api_key="sesame") as url:
        with pytest.raises(sgl.BackendError) as refused:
            sgl.RuntimeEndpoint(url)
        assert refused.value.status == 401
        endpoint = sgl.RuntimeEndpoint(url, api_key="sesame")
        assert isinstance(text_qa.run("x", backend=endpoint, temperature=0)["answer"], str)
        endpoint.shutdown()


def test_gen_checks_what_it_can_at_once():
    with pytest.raises(ValueError, match="regular expression"):
        sgl.gen("x", regex="(")
    with pytest.raises(ValueError, match="dtype"):
        sgl.gen("x", dtype=list)
    with pytest.warns(UserWarning, match="dtype is used"):
        expr = sgl.gen("x", dtype=int, regex="a")
    assert isinstance(expr, Gen) and "regex" not in expr.overrides
    with pytest.raises(ValueError, match="choices"):
        sgl.select("x")
    for write in (sgl.gen, sgl.select):
        with pytest.raises(ValueError, match="at least one"):
            write("x", choices=[])
        no_strings: list[Any] = ["yes", [1, 2]]
        for wrong in no_strings:
            with pytest.raises(TypeError, match="a list of strings"):
                write("x", choices=wrong)
    assert GenParams().override({"stop": "a", "temperature": None}) == GenParams(stop=("a",))
    assert re.fullmatch(IP, "8.8.8.8") and json.loads('"x"') == "x"
