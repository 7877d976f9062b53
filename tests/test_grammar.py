"""Test constrained answers: every kind has the requested form, whatever else the request asks for."""

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tokenizers
import torch
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from engine.errors import InvalidRequest
from engine.local import LocalEngine
from engine.request import SamplingParams
from engine.state import FinishReason, RequestState
from engine.text.grammar import Grammar, GrammarCompiler, GrammarError, MaskFiller, Matcher
from engine.text.tokenizer import FastBackend, Tokenizer
from server.app import build_app
from server.config import ServerConfig
from tests.client import events_of
from tests.test_engine import NUM_NEW_TOKENS, collect, make_state, running_engine

EOS = 2
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "house": {"enum": ["Gryffindor", "Slytherin"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "house", "age"],
    "additionalProperties": False,
}
THINK_END = [50, 60]
MARK = "▁"


def person_is_well_formed(text: str) -> bool:
    jsonschema.validate(json.loads(text), PERSON)
    return True


def compiler_for(tokenizer: Tokenizer, eos: int, backend: str = "llguidance") -> GrammarCompiler:
    """Make a compiler whose masks are for a model with a few more logits than the tokenizer has tokens."""
    compiler_class: type[GrammarCompiler] = GrammarCompiler
    if backend == "xgrammar":
        pytest.importorskip("xgrammar")
        from engine.text.xgrammar import XGrammarCompiler

        compiler_class = XGrammarCompiler
    special_tokens = tokenizer.backend.special_tokens
    size = tokenizer.vocab_size + 7
    return compiler_class(tokenizer.to_json(), size, (eos,), special_tokens, tokenizer.token_bytes)


@pytest.fixture(params=["llguidance", "xgrammar"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "xgrammar":
        pytest.importorskip("xgrammar")
    return request.param


@pytest.fixture(scope="module")
def compiler(tiny_llama: Path) -> GrammarCompiler:
    return compiler_for(Tokenizer.load(tiny_llama), EOS)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.load(tiny_llama)


def constrained(prompt: Sequence[int] = (5, 6, 7), **fields: Any) -> RequestState:
    defaults = {"max_new_tokens": 100, "ignore_eos": False}
    return make_state(list(prompt), **(defaults | fields))


async def answer(engine: LocalEngine, state: RequestState) -> tuple[str, FinishReason]:
    deltas, _ = await collect(engine, state)
    assert state.finish_reason is not None
    return "".join(delta.text for delta in deltas), state.finish_reason


# ---- the start ----


async def test_what_the_first_grammar_waits_for_is_made_before_anybody_asks(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[GrammarCompiler] = []
    make_tokenizer = GrammarCompiler._make_tokenizer

    def noting_make_tokenizer(compiler: GrammarCompiler) -> Any:
        made.append(compiler)
        return make_tokenizer(compiler)

    monkeypatch.setattr(GrammarCompiler, "_make_tokenizer", noting_make_tokenizer)
    async with running_engine(tiny_llama) as engine:
        engine.warm_up_grammars()
        assert engine.started.constraints.warming_up is not None
        await engine.started.constraints.warming_up
        assert len(made) == 1
        text, _ = await answer(engine, constrained(regex="[ab]{3}"))
        assert re.fullmatch("[ab]{3}", text)
    assert len(made) == 1


def test_a_tokenizer_that_grammars_cannot_read_is_told_to_those_who_ask_and_not_before() -> None:
    compiler = GrammarCompiler(None, 100, (EOS,), {}, lambda token: b"")
    compiler.warm_up()
    with pytest.raises(InvalidRequest, match="not one that grammars can be made for"):
        compiler.compile("regex", "a")


# ---- every kind ----

TAGGED = {
    "structures": [{"begin": "<f=a>", "schema": {"enum": [1, 2]}, "end": "</f>"}],
    "triggers": ["<f="],
}
KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "json_schema": ({"json_schema": PERSON}, person_is_well_formed),
    "json_schema_text": ({"json_schema": json.dumps(PERSON)}, person_is_well_formed),
    "regex": ({"regex": r"(19|20)\d{2}-[01]\d"}, re.compile(r"(19|20)\d{2}-[01]\d").fullmatch),
    "gbnf": ({"ebnf": 'root ::= ("yes" | "no ") [0-9]{2,3}'}, re.compile(r"(yes|no )\d{2,3}").fullmatch),
    "lark": ({"ebnf": 'start: "a" b{2,3}\nb: /[xy]/'}, re.compile(r"a[xy]{2,3}").fullmatch),
    "choice": ({"choice": ["yes", 'say "no"\n', "Grüße"]}, {"yes", 'say "no"\n', "Grüße"}.__contains__),
    "structural_tag": (
        {
            "structural_tag": {
                "type": "structural_tag",
                "format": {
                    "type": "sequence",
                    "elements": [
                        {"type": "const_string", "value": "<|im_start|>Answer: "},
                        {
                            "type": "tag",
                            "begin": "<a>",
                            "content": {"type": "json_schema", "json_schema": {"enum": [1, 2]}},
                            "end": "</a>",
                        },
                        {"type": "or", "elements": [{"type": "regex", "pattern": "[a-c]/"}]},
                    ],
                },
            },
            "skip_special_tokens": False,
        },
        re.compile(r"<\|im_start\|>Answer: <a>[12]</a>[a-c]/").fullmatch,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_has_the_form_that_was_asked_for(tiny_llama: Path, kind: str, backend: str) -> None:
    if (backend, kind) == ("xgrammar", "lark"):
        pytest.skip("xgrammar takes GBNF only")
    fields, is_right = KINDS[kind]
    async with running_engine(tiny_llama, grammar_backend=backend) as engine:
        states = [
            constrained([5, 6, 7 + i], temperature=float(i % 2), sampling_seed=i, stream=i > 3, **fields)
            for i in range(8)
        ]
        for text, reason in await asyncio.gather(*(answer(engine, state) for state in states)):
            assert is_right(text), text
            assert reason.type == "stop"


def test_free_text_may_hold_tagged_parts(tokenizer: Tokenizer, backend: str) -> None:
    compiler = compiler_for(tokenizer, EOS, backend)

    def accepts(tag: dict[str, Any], text: str) -> bool:
        matcher = compiler.compile("structural_tag", json.dumps(tag)).start.deep_copy()
        return all(matcher.consume_token(token) for token in [*tokenizer.encode(text, False), EOS])

    assert accepts(TAGGED, "free text") and accepts(TAGGED, "a <f=a>1</f> b\n<f=a>2</f>")
    assert not accepts(TAGGED, "a <f=a>3</f>") and not accepts(TAGGED, "a <f=b>")
    once = {"type": "triggered_tags", "triggers": ["<|im_start|>"], "at_least_one": True, "stop_after_first": True}
    once["tags"] = [{"begin": "<|im_start|>x", "content": {"type": "any_text"}, "end": "</x>"}]
    special = {"type": "structural_tag", "format": once}
    before = "a " if backend == "llguidance" else ""  # to xgrammar, "at least one" means that one comes first
    assert accepts(special, f"{before}<|im_start|>x\nanything</x>")
    assert not accepts(special, "a") and not accepts(special, "a <|im_start|>x</x> b")
    tags = [{"begin": f"<{name}>", "content": {"type": "regex", "pattern": "[0-9]"}, "end": ";"} for name in "ab"]
    listed: dict[str, Any] = {"type": "tags_with_separator", "tags": tags, "separator": ", "}
    several, one = ({**listed, "at_least_one": True, "stop_after_first": single} for single in (False, True))
    right = [(listed, ""), (listed, "<a>1;, <b>2;"), (several, "<b>1;"), (several, "<a>1;, <a>2;"), (one, "<a>1;")]
    wrong = [(listed, "<a>1; "), (several, ""), (several, "<a>1;<b>2;"), (several, "x"), (one, "<a>1;, <a>2;")]
    assert all(accepts({"type": "structural_tag", "format": format_}, text) for format_, text in right)
    assert not any(accepts({"type": "structural_tag", "format": format_}, text) for format_, text in wrong)


async def test_log_probabilities_stops_penalties_and_company_leave_the_form_alone(
    tiny_llama: Path, backend: str
) -> None:
    async with running_engine(tiny_llama, grammar_backend=backend) as engine:
        plain = constrained(json_schema=PERSON)
        with_logprobs = constrained(json_schema=PERSON, return_logprob=True, top_logprobs_num=2)
        penalized = constrained(json_schema=PERSON, frequency_penalty=2.0, repetition_penalty=1.5)
        stopped = constrained(json_schema=PERSON, stop=['","house'], stream=True)
        cut = constrained(json_schema=PERSON, max_new_tokens=6)
        states = [plain, with_logprobs, penalized, stopped, cut, make_state([9, 9])]
        texts = await asyncio.gather(*(answer(engine, state) for state in states))
        assert texts[1] == texts[0] and person_is_well_formed(texts[0][0])
        assert with_logprobs.output_ids == plain.output_ids and not with_logprobs.num_forced_tokens
        assert person_is_well_formed(texts[2][0])
        assert texts[3] == (texts[0][0].split('","house')[0], FinishReason("stop", matched='","house'))
        assert len(stopped.output_ids) < len(plain.output_ids)
        assert plain.output_ids[: len(stopped.output_ids)] == stopped.output_ids
        assert texts[4][1].type == "length" and cut.output_ids == plain.output_ids[:6]


async def test_each_sampled_token_has_its_log_probability(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine:
        state = constrained(json_schema=PERSON, return_logprob=True)
        (delta,), tokens = await collect(engine, state)
        assert delta.logprobs is not None and [token for _, token in delta.logprobs.token] == tokens


@pytest.mark.parametrize("fields", [{"stop": ["never"]}, {"ignore_eos": True}, {"min_new_tokens": 50}])
async def test_a_grammar_ends_an_answer_that_nothing_else_may_end(
    tiny_llama: Path, fields: dict[str, Any], backend: str
) -> None:
    async with running_engine(tiny_llama, grammar_backend=backend) as engine:
        text, reason = await answer(engine, constrained(regex="abc[de]", **fields))
        assert re.fullmatch("abc[de]", text) and reason.type == "stop"


@pytest.mark.parametrize(
    "fields", [{}, {"stream": True}, {"stop": ["never"]}, {"max_new_tokens": 2}, {"max_new_tokens": 1}]
)
async def test_an_answer_without_any_choice_is_whole(tiny_llama: Path, fields: dict[str, Any]) -> None:
    async with running_engine(tiny_llama) as engine:
        state = constrained(regex="The quick brown fox", **fields)
        text, reason = await answer(engine, state)
        ids = engine.tokenizer.encode("The quick brown fox", False)
        limit = fields.get("max_new_tokens", len(ids))
        assert state.output_ids == ids[:limit] and text == engine.tokenizer.decode(ids[:limit])
        assert reason.type == ("stop" if limit == len(ids) else "length")


# ---- tokenizers ----


def sentence_piece(decoder: Any) -> Tokenizer:
    """Build a tokenizer with marks for spaces and byte tokens for what the vocabulary lacks; token 0 ends an answer."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [MARK, "a", "t", "h", "e", "日", "th", "the", f"{MARK}t", f"{MARK}th", f"{MARK}the", "\n"]
    vocab = {token: i for i, token in enumerate(["</s>", *byte_tokens, *words])}
    merges = [("t", "h"), ("th", "e"), (MARK, "t"), (f"{MARK}t", "h"), (f"{MARK}th", "e")]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="</s>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoder
    backend.add_special_tokens(["</s>"])
    return Tokenizer(FastBackend(backend))


def random_answer(compiler: GrammarCompiler, grammar: Grammar, seed: int) -> list[int]:
    """Draw an answer's tokens from the masks.

    Forced tokens are jumped over, or come through masks, depending on whether the seed is odd or even.
    """
    rng = random.Random(seed)
    matcher, filler, answer = Matcher(grammar), MaskFiller(compiler.vocab_size, False), list[int]()
    while not matcher.is_finished:
        if seed % 2 and (forced := matcher.jump(99)):
            answer += forced
            continue
        (mask,), errors = filler.fill([matcher])
        assert not errors
        token = rng.choice([i for i in range(compiler.vocab_size) if mask[i // 32].item() >> i % 32 & 1])
        matcher.advance(token)
        answer.append(token)
    matcher.close()
    return answer


def test_answers_are_the_same_before_and_after_the_first(compiler: GrammarCompiler) -> None:
    text = json.dumps(PERSON | {"title": "unseen"})
    seeds = range(20)
    anew = [random_answer(compiler, compiler.compile("json_schema", text), seed) for seed in seeds]
    grammar = compiler.compile("json_schema", text)
    assert [random_answer(compiler, grammar, seed) for seed in seeds] == anew
    assert 0 < grammar.num_lessons < len(seeds)


def test_sentence_piece_vocabularies_are_read_right_or_refused() -> None:
    to_space, fallback = decoders.Replace(MARK, " "), decoders.ByteFallback()
    tokenizer = sentence_piece(decoders.Sequence([to_space, fallback, decoders.Fuse(), decoders.Strip(" ", 1, 0)]))
    compiler = compiler_for(tokenizer, 0)
    for kind, text in (("regex", "( the|the| a|日|é\n){3}!"), ("choice", '["the the a", "日 the", " the"]')):
        for seed in range(10):
            stream = tokenizer.text_stream(SamplingParams(), [1])
            answer = stream.push(random_answer(compiler, compiler.compile(kind, text), seed)) + stream.finish()
            assert answer in json.loads(text) if kind == "choice" else re.fullmatch(text, answer), answer
    for decoder in (decoders.Metaspace(), decoders.Sequence([decoders.Metaspace(), fallback]), decoders.WordPiece()):
        with pytest.raises(InvalidRequest, match=r"tokenizer|decoder"):
            compiler_for(sentence_piece(decoder), 0).compile("regex", "the the")


# ---- jump-forward ----


async def num_steps(folder: Path, state: RequestState, **options: Any) -> int:
    async with running_engine(folder, **options) as engine:
        await collect(engine, state)
        return engine.stats().loop.num_steps


@pytest.mark.parametrize("overlap", [False, True])
async def test_forced_tokens_cost_no_steps_of_their_own(tiny_llama: Path, overlap: bool) -> None:
    jumping, plodding = constrained(json_schema=PERSON), constrained(json_schema=PERSON)
    options = {"disable_overlap_schedule": not overlap}
    few = await num_steps(tiny_llama, jumping, **options)
    many = await num_steps(tiny_llama, plodding, disable_jump_forward=True, **options)
    assert jumping.output_ids == plodding.output_ids
    assert jumping.num_forced_tokens > len(jumping.output_ids) / 2 and plodding.num_forced_tokens == 0
    num_runs = 4  # of forced tokens; with overlap, each costs the step that was under way
    assert few <= len(jumping.output_ids) - jumping.num_forced_tokens + (num_runs if overlap else 0)
    assert many >= len(plodding.output_ids)


async def test_forced_tokens_that_do_not_fit_wait_for_others_to_end(tiny_llama: Path) -> None:
    """Force runs of 30 tokens in a pool of 160: requests free their slots in the middle of their answers."""
    pattern = "[ab]" + "the quick brown fox [cd]" * 3
    prompts = [[5, 6, 7, i] for i in range(8)]
    async with running_engine(tiny_llama) as engine:
        expected = [await collect(engine, constrained(prompt, regex=pattern)) for prompt in prompts]
    for options in ({}, {"page_size": 4}, {"disable_overlap_schedule": True}, {"chunked_prefill_size": 8}):
        crowded = {"max_total_tokens": 160, "schedule_conservativeness": 0.0, **options}
        async with running_engine(tiny_llama, **crowded) as engine:
            states = [constrained(prompt, regex=pattern, max_new_tokens=90) for prompt in prompts]
            answers = await asyncio.gather(*(collect(engine, state) for state in states))
            assert [tokens for _, tokens in answers] == [tokens for _, tokens in expected]
            assert engine.stats().scheduler.num_retractions > 0
            assert all(state.num_forced_tokens > 30 for state in states)


@pytest.mark.parametrize("prompt_len", [4, 512])  # the second fills the context
async def test_an_answer_of_no_tokens_has_no_forced_ones(tiny_llama: Path, prompt_len: int) -> None:
    async with running_engine(tiny_llama) as engine:
        other = asyncio.create_task(collect(engine, make_state([8])))
        await asyncio.sleep(0)
        state = constrained([5] * prompt_len, regex="the quick brown fox", max_new_tokens=0)
        assert await answer(engine, state) == ("", FinishReason("length"))
        assert state.output_ids == []
        assert len((await other)[1]) == NUM_NEW_TOKENS


async def test_an_abort_between_forced_tokens_frees_everything(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine:
        for num_deltas in range(1, 6):
            state = constrained(json_schema=PERSON, stream=True)
            deltas = engine.generate(state)
            for _ in range(num_deltas):
                await anext(deltas)
            await deltas.aclose()
            assert engine.stats().scheduler.num_held_tokens == 0


async def test_a_grammar_that_fails_at_the_first_token_is_the_requests_own_fault(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> list[int]:
        raise GrammarError("lexer error: too many expressions constructed")

    async with running_engine(tiny_llama) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(Matcher, "jump", fail)
            with pytest.raises(InvalidRequest, match="the grammar failed: lexer error"):
                await answer(engine, constrained(regex="the quick brown fox"))
        assert engine.stats().scheduler.num_held_tokens == 0
        assert (await answer(engine, constrained(regex="the quick brown fox")))[0] == "the quick brown fox"


# ---- thinking ----


@pytest.mark.parametrize("options", [{}, {"disable_jump_forward": True}, {"disable_overlap_schedule": True}])
@pytest.mark.parametrize("budget", [0, 1, 7])
async def test_thinking_ends_with_its_budget_and_the_grammar_holds_from_there(
    tiny_llama: Path, options: dict[str, Any], budget: int
) -> None:
    async with running_engine(tiny_llama, **options) as engine:
        _, free = await collect(engine, make_state([5, 6, 7]))
        bounded: dict[str, Any] = {"max_thinking_tokens": budget, "reasoning_end_ids": THINK_END}
        state = constrained(regex="[0-9]{3}", **bounded)
        await collect(engine, state)
        thought = [*free[:budget], *THINK_END]
        assert state.output_ids[: len(thought)] == thought
        assert re.fullmatch("[0-9]{3}", engine.tokenizer.decode(state.output_ids[len(thought) :]))

        free_after = make_state([5, 6, 7], return_logprob=budget == 7, **bounded)
        _, tokens = await collect(engine, free_after)
        _, expected = await collect(engine, make_state([5, 6, 7, *thought], max_new_tokens=24 - len(thought)))
        assert tokens == [*thought, *expected]


@pytest.mark.parametrize("fields", [{"stop": ["no such text"]}, {"stop_token_ids": [3]}, {"max_new_tokens": 1}])
async def test_thinking_that_may_take_no_token_takes_none(tiny_llama: Path, fields: dict[str, Any]) -> None:
    async with running_engine(tiny_llama) as engine:
        state = make_state([5, 6, 7], max_thinking_tokens=0, reasoning_end_ids=THINK_END, **fields)
        _, tokens = await collect(engine, state)
        assert tokens[: len(THINK_END)] == THINK_END[: state.max_new_tokens]


async def test_thinking_is_bounded_without_a_grammar_backend(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama, grammar_backend="none") as engine:
        for return_logprob in (False, True):  # with, masks let the end through one token at a time
            bounded: dict[str, Any] = {"max_thinking_tokens": 3, "reasoning_end_ids": THINK_END}
            state = make_state([5, 6, 7], return_logprob=return_logprob, **bounded)
            _, tokens = await collect(engine, state)
            assert tokens[3 : 3 + len(THINK_END)] == THINK_END


def test_an_end_of_thinking_that_has_begun_is_completed() -> None:
    matcher = Matcher(None, [1, 2, 3], max_thinking_tokens=3)
    for token in (9, 1, 2):
        matcher.advance(token)
    assert matcher.jump(10) == [3] and matcher.jump(10) == []
    early = Matcher(None, [1, 2], max_thinking_tokens=9)
    for token in (1, 1, 2, 9, 9, 9, 9, 9, 9, 9, 9):
        early.advance(token)
    assert early.forced_tokens() == []


# ---- what cannot be ----

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema", "uniqueItems"),
    ({"json_schema": {"not": {"type": "string"}}}, "json_schema", "not"),
    ({"json_schema": {"type": "string", "pattern": "(?=a)b"}}, "json_schema", "look-around"),
    ({"json_schema": {"type": "string", "minLength": 3, "maxLength": 2}}, "json_schema", "minLength"),
    ({"json_schema": {"$ref": "https://example.com/schema"}}, "json_schema", "example.com"),
    ({"json_schema": {"$ref": "#/$defs/missing"}}, "json_schema", "missing"),
    ({"json_schema": {"enum": []}}, "json_schema", "anyOf"),
    ({"json_schema": "{"}, "json_schema", "column 2"),
    ({"json_schema": "[1]"}, "json_schema", "object"),
    ({"json_schema": '{"properties":' * 2000 + "{}" + "}" * 2000}, "json_schema", "recursion"),
    ({"json_schema": json.dumps({"enum": ["x" * 70_000]})}, "json_schema", "65536"),
    ({"regex": "(a"}, "regex", "unclosed"),
    ({"regex": r"(a)\1"}, "regex", "backreferences"),
    ({"ebnf": "root ::= other"}, "ebnf", "other"),
    ({"ebnf": "nonsense"}, "ebnf", "::="),
    ({"structural_tag": {"format": {"type": "nonsense"}}}, "structural_tag", "nonsense"),
    ({"structural_tag": {"structures": [{"begin": "a", "end": ""}], "triggers": ["b"]}}, "structural_tag", "triggers"),
    ({"structural_tag": "[]"}, "structural_tag", "object"),
    ({"choice": []}, "choice", "non-empty"),
    ({"choice": "yes"}, "choice", "list"),
    ({"json_schema": 5}, "json_schema", "object"),
    ({"regex": "a", "json_schema": {}}, "regex", "at most one"),
]


@asynccontextmanager
async def served(engine: LocalEngine) -> AsyncIterator[TestClient[Any, Any]]:
    app = build_app(engine, ServerConfig(model_path="tiny", enable_metrics=True))
    async with TestClient(TestServer(app)) as client:
        yield client


async def test_a_grammar_that_cannot_be_used_is_refused_by_field_and_reason(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine, served(engine) as client:
        for fields, field, reason in REFUSED:
            for stream in (False, True):
                body = {"text": "a", "sampling_params": fields, "stream": stream}
                async with client.post("/generate", json=body) as response:
                    told = (await response.json())["error"]
                    assert (response.status, told["field"]) == (400, field), told
                    assert reason in told["message"] and len(told["message"]) < 600, told
        for path in ("/v1/messages", "/v1/responses", "/v1/chat/completions"):
            for field in ("json_schema", "guided_json"):
                given: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5}
                if path == "/v1/responses":
                    given = {"input": "a", "max_output_tokens": 5}
                async with client.post(path, json={**given, field: {"type": "nope"}}) as response:
                    assert response.status == 400
                    told = (await response.json())["error"]["message"]
                    assert told == f"{field} cannot be used: Invalid type: nope", path


NOT_HELD: list[tuple[dict[str, Any], str, str]] = [
    ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema", "uniqueItems"),
    ({"json_schema": {"properties": {"a": {"not": {"type": "string"}}}}}, "json_schema", "not"),
    ({"json_schema": {"type": "object", "required": ["a"]}}, "json_schema", "required"),
    ({"json_schema": {"anyOf": [{"type": "object"}], "type": "object"}}, "json_schema", "type beside anyOf"),
    ({"json_schema": {"type": "integer", "minimum": 0, "multipleOf": 7}}, "json_schema", "multipleOf"),
    ({"json_schema": {"type": "string", "pattern": "(?=a)b"}}, "json_schema", "look-around"),
    ({"json_schema": {"type": "string", "pattern": '^"$'}}, "json_schema", '"'),
    ({"json_schema": {"type": "string", "format": "email"}}, "json_schema", "format"),
    ({"json_schema": {"type": "string", "minLength": 3, "maxLength": 2}}, "json_schema", "minLength"),
    ({"json_schema": {"$ref": "https://example.com/schema"}}, "json_schema", "example.com"),
    ({"json_schema": '{"properties":' * 2000 + "{}" + "}" * 2000}, "json_schema", "recursion"),
    ({"json_schema": {"type": "string", "maxLength": "5"}}, "json_schema", "json_schema"),
    ({"regex": "(a"}, "regex", "parenthesis"),
    ({"regex": "a^b"}, "regex", "^"),
    ({"regex": "a{1,100000}"}, "regex", "100000"),
    ({"ebnf": "root ::= other"}, "ebnf", "other"),
    ({"ebnf": 'root ::= root "a"'}, "ebnf", "no answer"),
    ({"structural_tag": {"format": {"type": "nonsense"}}}, "structural_tag", "nonsense"),
    ({"structural_tag": {"structures": [{"begin": "a"}], "triggers": ["b"]}}, "structural_tag", "end"),
]


async def test_what_xgrammar_would_ignore_is_refused(tiny_llama: Path) -> None:
    pytest.importorskip("xgrammar")
    async with running_engine(tiny_llama, grammar_backend="xgrammar") as engine:
        for fields, field, reason in NOT_HELD:
            with pytest.raises(InvalidRequest, match=re.escape(reason)) as caught:
                await answer(engine, constrained(**fields))
            assert caught.value.field == field


def test_xgrammar_leaves_out_what_it_cannot_hold_of_a_schema_that_is_not_strict(tokenizer: Tokenizer) -> None:
    compiler = compiler_for(tokenizer, EOS, "xgrammar")
    items = {"type": "integer", "format": "int32", "not": {"const": 5}}
    schema = {"type": "array", "items": items, "uniqueItems": True, "x-strict": False}
    for kind, definition, begin, end in (
        ("json_schema", schema, "", ""),
        ("structural_tag", {"format": tag_of_schema(schema)}, "<f>", ";"),
    ):
        matcher = compiler.compile(kind, json.dumps(definition)).start
        for text, is_right in (("[5,5]", True), ('["a"]', False)):
            following = matcher.deep_copy()
            consumed = all(map(following.consume_token, tokenizer.encode(begin + text + end, False)))
            assert (consumed and following.is_accepting()) == is_right, text
    with pytest.raises(InvalidRequest, match=r"^tools\[0\] cannot be used: .*not"):
        compiler.compile("structural_tag", json.dumps({"format": tag_of_schema({**schema, "x-strict": True})}))


def test_keywords_that_are_null_are_not_there(tokenizer: Tokenizer, backend: str) -> None:
    """Go's, .NET's and others' libraries write every field that they have."""
    unset = dict.fromkeys(
        ("enum", "items", "required", "additionalProperties", "pattern", "minimum", "$ref", "default")
    )
    properties = {"a": {**unset, "type": "string"}, "b": {**unset, "type": "array", "properties": None}, "c": None}
    schema = {**unset, "type": "object", "properties": properties, "anyOf": None}
    matcher = compiler_for(tokenizer, EOS, backend).compile("json_schema", json.dumps(schema)).start
    for text, is_right in (('{"a":"x","b":[1],"c":2}', True), ('{"a":1}', False), ('{"b":{}}', False)):
        following = matcher.deep_copy()
        assert all(map(following.consume_token, tokenizer.encode(text, False))) == is_right, text
    nothing = {"type": "object", "properties": None, "required": None, "additionalProperties": False}
    matcher = compiler_for(tokenizer, EOS, backend).compile("json_schema", json.dumps(nothing)).start
    assert all(map(matcher.consume_token, tokenizer.encode("{}", False)))
    matcher = compiler_for(tokenizer, EOS, backend).compile("json_schema", '{"const": null}').start
    assert all(map(matcher.consume_token, tokenizer.encode("null", False)))


def tag_of_schema(schema: dict[str, Any]) -> dict[str, Any]:
    content = {"type": "json_schema", "json_schema": schema, "field": "tools[0]"}
    return {"type": "tag", "begin": "<f>", "content": content, "end": ";"}


async def test_a_server_without_grammars_says_so(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama, grammar_backend="none") as engine:
        with pytest.raises(InvalidRequest, match="--grammar-backend"):
            await answer(engine, constrained(regex="a"))


async def test_a_matcher_that_fails_ends_its_own_request_only(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_engine(tiny_llama) as engine:
        _, expected = await collect(engine, make_state([5, 6, 7]))
        advance = Matcher.advance
        victim = constrained(json_schema=PERSON, stream=True)

        def broken(matcher: Matcher, token: int) -> None:
            if matcher is victim.matcher and victim.row > 0:
                raise GrammarError("injected")
            advance(matcher, token)

        monkeypatch.setattr(Matcher, "advance", broken)
        (_, reason), (beside, _), (_, free) = await asyncio.gather(
            answer(engine, victim),
            answer(engine, constrained([5, 6, 9], json_schema=PERSON)),
            collect(engine, make_state([5, 6, 7])),
        )
        assert reason.type == "abort" and "injected" in (reason.message or "")
        assert reason.status_code == 400, "the grammar's fault: no other worker would do better"
        assert person_is_well_formed(beside) and free == expected


async def test_a_mask_that_cannot_be_made_ends_its_own_request_only(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = MaskFiller.fill
    async with running_engine(tiny_llama) as engine:
        victim = constrained(json_schema=PERSON)

        def broken(filler: MaskFiller, matchers: Sequence[Matcher]) -> tuple[torch.Tensor, dict[int, str]]:
            masks, errors = fill(filler, matchers)
            errors |= {i: "injected" for i, matcher in enumerate(matchers) if matcher is victim.matcher}
            return masks, errors

        monkeypatch.setattr(MaskFiller, "fill", broken)
        (_, reason), (beside, _) = await asyncio.gather(
            answer(engine, victim), answer(engine, constrained([5, 6, 9], json_schema=PERSON))
        )
        assert reason.type == "abort" and "injected" in (reason.message or "")
        assert reason.status_code == 400, "the grammar's fault: no other worker would do better"
        assert person_is_well_formed(beside)


@pytest.mark.parametrize("place", ["forward", "sample"])
@pytest.mark.parametrize("overlap", [False, True])
async def test_a_step_that_raises_leaves_no_step_waiting_for_its_masks(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool, place: str
) -> None:
    async with running_engine(tiny_llama, disable_overlap_schedule=not overlap) as engine:
        runner = engine.parts.runner
        owner: Any = runner if place == "forward" else runner.sampler
        original = getattr(owner, place)
        calls = []

        def broken(*args: Any) -> Any:
            calls.append(args)
            if len(calls) == 4:
                raise RuntimeError("injected")
            return original(*args)

        monkeypatch.setattr(owner, place, broken)
        async with asyncio.timeout(60):
            _, reason = await answer(engine, constrained(json_schema=PERSON))
            assert reason.type == "abort" and "injected" in (reason.message or "")
            text, _ = await answer(engine, constrained(json_schema=PERSON))
        assert person_is_well_formed(text)


# ---- schemas of all sorts ----

NASTY: dict[str, dict[str, Any]] = {
    "recursion": {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}},
                "required": ["next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    "refs": {"$defs": {"a/b": {"enum": [1, 2]}}, "type": "array", "items": {"$ref": "#/$defs/a~1b"}, "maxItems": 3},
    "any_of": {"anyOf": [{"const": None}, {"type": "boolean"}, {"type": "integer", "minimum": 5, "maximum": 7}]},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"},
    "unicode": {"enum": ["Grüße", "日本", "🙂", 'quote " and \\ back', "line\nbreak", "\u2028"]},
    "unicode_keys": {"type": "object", "properties": {'k "é\n🙂': {"const": 1}}, "required": ['k "é\n🙂'],
                     "additionalProperties": False},
    "huge_enum": {"enum": [f"value {i}" for i in range(2000)]},
    "bounds": {"type": "array", "items": {"type": "number", "exclusiveMinimum": -1.5, "maximum": 2.25}, "minItems": 2,
               "maxItems": 2},
    "multiple": {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": 7},
    "tuple": {"type": "array", "prefixItems": [{"const": 1}, {"enum": ["a"]}], "items": False, "minItems": 2},
    "date": {"type": "string", "format": "date"},
    "nested": {"type": "object", "properties": {"a": {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2}},
               "required": ["a"], "additionalProperties": False},
    "empty": {"type": "object", "additionalProperties": False},
    "no_choice": {"const": {"fixed": [1, "two", None]}},
}  # fmt: skip


async def test_nasty_schemas_are_followed(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine:
        states = [
            constrained([5, 6, i + 3], json_schema=schema, temperature=1.0, sampling_seed=i, max_new_tokens=200)
            for i, schema in enumerate(NASTY.values())
        ]
        answers = await asyncio.gather(*(answer(engine, state) for state in states))
        num_finished = 0
        for schema, (text, reason) in zip(NASTY.values(), answers, strict=True):
            if reason.type == "stop":
                num_finished += 1
                jsonschema.Draft202012Validator(schema).validate(json.loads(text))
            else:
                assert reason.type == "length"  # random tokens need not end a recursion or a number
        assert num_finished >= len(NASTY) - 3


def schemas_of(kind: str, always: dict[str, Any] | None = None, **keywords: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"type": st.just(kind), **(always or {})}, optional=keywords)


SMALL, NUMBERS = st.integers(0, 6), st.integers(-99, 99) | st.floats(-99, 99).map(lambda number: round(number, 2))
NAMES = st.sampled_from(["a", "b", "é c", 'd"'])
# Some of these nobody supports, and some nothing satisfies.
LEAVES = st.one_of(
    st.sampled_from(
        [{"type": "boolean"}, {"type": "null"}, {"type": "string", "format": "uuid"}, {"const": {"k": [1]}}]
    ),
    schemas_of("string", format=st.sampled_from(["date", "ipv4", "time", "hostname", "nonsense"])),
    schemas_of(
        "string", minLength=SMALL, maxLength=SMALL, pattern=st.sampled_from(["^[ab]+$", "x|y", r"^\\w{2}", "(?=a)"])
    ),
    st.lists(st.text(max_size=5) | st.integers(-5, 5), min_size=1, max_size=4).map(lambda values: {"enum": values}),
    schemas_of(
        "integer", minimum=NUMBERS, maximum=NUMBERS, exclusiveMinimum=NUMBERS, multipleOf=st.sampled_from([1, 2, 5])
    ),
    schemas_of("number", minimum=NUMBERS, maximum=NUMBERS, exclusiveMaximum=NUMBERS),
)


def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        schemas_of("array", {"items": inner}, minItems=SMALL, maxItems=SMALL, uniqueItems=st.booleans()),
        schemas_of(
            "object", {"properties": st.dictionaries(NAMES, inner, max_size=4)},
            required=st.lists(NAMES, unique=True, max_size=3), additionalProperties=st.just(False) | inner,
            minProperties=SMALL,
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda schemas: {"anyOf": schemas}),
    )  # fmt: skip


@dataclass
class LoopedEngine:
    """Run an engine on an event loop of its own, for tests that are not coroutines."""

    runner: asyncio.Runner
    engine: LocalEngine

    def ask(self, schemas: list[dict[str, Any]]) -> list[tuple[str, FinishReason] | BaseException]:
        states = [
            constrained([5, i + 3], json_schema=schema, temperature=1.0, sampling_seed=i, max_new_tokens=80)
            for i, schema in enumerate(schemas)
        ]

        async def ask_all() -> list[tuple[str, FinishReason] | BaseException]:
            return await asyncio.gather(*(answer(self.engine, state) for state in states), return_exceptions=True)

        return self.runner.run(ask_all())


@pytest.fixture(scope="module")
def looped_engine(tiny_llama: Path) -> Iterator[LoopedEngine]:
    with asyncio.Runner() as runner:
        context = running_engine(tiny_llama)
        yield LoopedEngine(runner, runner.run(context.__aenter__()))
        runner.run(context.__aexit__(None, None, None))


@settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)  # fmt: skip
@given(schemas=st.lists(st.recursive(LEAVES, nested, max_leaves=5), min_size=8, max_size=8))
def test_an_answer_that_ended_by_itself_is_valid_and_the_rest_is_refused(
    looped_engine: LoopedEngine, schemas: list[dict[str, Any]]
) -> None:
    for schema, result in zip(schemas, looped_engine.ask(schemas), strict=True):
        if isinstance(result, BaseException):
            assert isinstance(result, InvalidRequest) and result.field == "json_schema", (schema, result)
            continue
        text, reason = result
        assert reason.type in ("stop", "length"), (schema, reason)
        if reason.type == "stop":
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))


# ---- over HTTP ----

RESPONSE_FORMATS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": PERSON}}},
    {"json_schema": json.dumps(PERSON)},
    {"guided_json": PERSON},
    {"structured_outputs": {"json": PERSON}},
]
OTHER_FORMS: list[tuple[dict[str, Any], str]] = [
    ({"regex": "a[bc]d"}, "a[bc]d"),
    ({"ebnf": 'root ::= "x" [0-9]'}, "x[0-9]"),
    ({"guided_choice": ["yes", "no"]}, "yes|no"),
    ({"guided_grammar": 'root ::= "x" [0-9]'}, "x[0-9]"),
    ({"structured_outputs": {"regex": "a{3}"}}, "a{3}"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    ({"response_format": {"type": "structural_tag", "format": {"type": "const_string", "value": "hi"}}}, "hi"),
    ({"structured_outputs": {"json_object": True}, "max_tokens": 40}, r"\{.*"),
    ({"response_format": {"type": "json_object"}, "max_tokens": 40}, r"\{.*"),
]


async def test_each_api_says_it_in_its_own_fields(tiny_llama: Path) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": 0, "max_tokens": 90}
    async with running_engine(tiny_llama) as engine, served(engine) as client:

        async def content(fields: dict[str, Any], path: str = "/v1/chat/completions") -> list[str]:
            async with client.post(path, json=chat | fields) as response:
                body = await response.json()
                assert response.status == 200, body
                return [choice.get("text") or choice["message"]["content"] for choice in body["choices"]]

        texts = [text for fields in RESPONSE_FORMATS for text in await content({"n": 2} | fields)]
        assert len(set(texts)) == 1 and len(texts) == 2 * len(RESPONSE_FORMATS) and person_is_well_formed(texts[0])
        for fields, pattern in OTHER_FORMS:
            (text,) = await content(fields)
            assert re.fullmatch(pattern, text, re.DOTALL), fields
        (text,) = await content({"prompt": "a", "regex": "[0-9]{3}"}, "/v1/completions")
        assert re.fullmatch("[0-9]{3}", text)
        assert engine.stats().grammars.num_compiled < engine.stats().grammars.num_cache_hits + len(OTHER_FORMS) + 2
        async with client.get("/metrics") as response:
            assert "sglang:num_grammar_cache_hit_total" in await response.text()


async def test_generate_tells_how_many_tokens_were_forced(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine, served(engine) as client:
        body: dict[str, Any] = {"text": "a", "sampling_params": {"json_schema": PERSON, "max_new_tokens": 90}}
        async with client.post("/generate", json=body) as response:
            whole = await response.json()
        assert person_is_well_formed(whole["text"])
        meta = whole["meta_info"]
        assert 0 < meta["completion_tokens_wo_jump_forward"] < meta["completion_tokens"] == len(whole["output_ids"])
        body = {"text": "a", "sampling_params": {"regex": "abc[0-9]{3}", "temperature": 0}, "stream": True}
        async with client.post("/generate", json=body) as response:
            *events, _ = map(json.loads, events_of(await response.read())[:-1])
        assert [event["text"][:3] for event in events] == ["abc"] * len(events)


async def test_generate_ends_the_thinking_of_a_request_that_says_how_long(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine, served(engine) as client:
        params = {"regex": "[0-9]{3}", "max_new_tokens": 90, "temperature": 0}
        body: dict[str, Any] = {"text": "a", "sampling_params": params, "max_thinking_tokens": 3}
        async with client.post("/generate", json=body) as response:
            text = (await response.json())["text"]
        assert re.fullmatch("[0-9]{3}", text.partition("</think>")[2])
        async with client.post("/generate", json=body | {"max_thinking_tokens": -1}) as response:
            assert response.status == 400 and (await response.json())["error"]["field"] == "max_thinking_tokens"


def test_grammars_that_are_compiled_at_once_read_the_vocabulary_once(tokenizer: Tokenizer) -> None:
    read: list[int] = []

    def token_bytes(token: int) -> bytes:
        read.append(token)
        return tokenizer.token_bytes(token)

    special_tokens = tokenizer.backend.special_tokens
    compiler = GrammarCompiler(tokenizer.to_json(), tokenizer.vocab_size, (EOS,), special_tokens, token_bytes)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: compiler.compile("regex", f"[a-z]{{{i + 1}}}"), range(8)))
    assert len(read) == len(set(read))
