"""Test the whole engine on tiny models: its greedy answers equal transformers', whatever the mix of requests.

Some answers of the mixed test must be JSON: their reference is transformers' logits under a mask, token by token.
"""

import asyncio
import gzip
import json
import random
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from llguidance import LLMatcher, LLTokenizer

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineStopped, InvalidRequest, PromptTooLong
from engine.local import LocalEngine
from engine.new_engine import new_engine
from engine.output import READ_INTERVAL, READ_LOGPROBS
from engine.replicas.replica import REPORT_S
from engine.replicas.replica_set import ReplicaSet
from engine.request import Request, SamplingParams
from engine.schedule.plan import Plan
from engine.state import Delta, Logprobs, RequestState
from engine.step.model_runner import Step
from engine.text.tokenizer import Tokenizer
from kernels.flashinfer_attention import is_available

NUM_NEW_TOKENS = 24
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@asynccontextmanager
async def running_engine(folder: Path, **options: Any) -> AsyncIterator[LocalEngine]:
    defaults: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_total_tokens": 4096, "random_seed": 0}
    async with new_engine(EngineConfig(model_path=str(folder), **(defaults | options))) as engine:
        yield cast(LocalEngine, engine)  # tests of a set of replicas use what every engine has
        if isinstance(engine, ReplicaSet):
            await settled(engine)
        check_pages(engine)


async def settled(engine: Engine) -> None:
    """Wait for statistics that were reported after the last request ended: they come from other processes."""
    await asyncio.sleep(3 * REPORT_S)
    async with asyncio.timeout(60):
        while (scheduler := engine.stats().scheduler).num_running or scheduler.num_held_tokens:  # noqa: ASYNC110
            await asyncio.sleep(REPORT_S)


def check_pages(engine: Engine) -> None:
    """Assert that nothing runs, every page is free or cached, and nothing is locked."""
    stats = engine.stats().scheduler
    assert (stats.num_running, stats.num_waiting, stats.num_held_tokens) == (0, 0, 0)
    assert stats.num_free_tokens + stats.num_cached_tokens == stats.num_total_tokens
    assert engine.health().num_violations == 0
    if isinstance(engine, LocalEngine):
        engine.parts.scheduler.check()


def make_state(prompt: list[int], stream: bool = False, rid: str | None = None, **fields: Any) -> RequestState:
    options = {
        name: fields.pop(name)
        for name in (
            "return_logprob",
            "logprob_start_len",
            "top_logprobs_num",
            "token_ids_logprob",
            "extra_key",
            "client",
            "max_thinking_tokens",
            "reasoning_end_ids",
        )
        if name in fields
    }
    params = SamplingParams(**({"max_new_tokens": NUM_NEW_TOKENS, "temperature": 0.0, "ignore_eos": True} | fields))
    return RequestState(Request(rid or f"r{random.random()}", prompt, params, stream=stream, **options))


async def collect(engine: Engine, state: RequestState) -> tuple[list[Delta], list[int]]:
    deltas = [delta async for delta in engine.generate(state)]
    return deltas, [token for delta in deltas for token in delta.token_ids]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Return 20 prompts, several with a common head, one of a single token."""
    rng = random.Random(5)
    heads = [[], [rng.randrange(3, 384) for _ in range(30)], [rng.randrange(3, 384) for _ in range(70)]]
    tails = [[rng.randrange(3, 384) for _ in range(rng.randrange(1, 40))] for _ in range(19)]
    return [heads[i % 3] + tail for i, tail in enumerate(tails)] + [[7]]


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Return transformers' greedy answers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


FORCED_RUNS = {
    "type": "object",
    "properties": {
        "wizard": {"enum": ["Harry", "Hermione"]},
        "house": {"enum": ["Gryffindor", 7]},
        "age": {"enum": [1, 2]},
    },
    "required": ["wizard", "house", "age"],
    "additionalProperties": False,
}


CONSTRAINED: dict[str, Any] = {"json_schema": json.dumps(FORCED_RUNS), "ignore_eos": False, "max_new_tokens": 60}


def new_matcher(folder: Path) -> LLMatcher:
    """Return what follows an answer of the form `FORCED_RUNS` in the tokens of the model in `folder`."""
    tokenizer = LLTokenizer(str(folder / "tokenizer.json"), eos_token=2)
    grammar = LLMatcher.grammar_from_json_schema(FORCED_RUNS, defaults={"whitespace_flexible": False})
    return LLMatcher(tokenizer, grammar)


def most_likely_allowed(logits: torch.Tensor, matcher: LLMatcher) -> int:
    """Return the most likely of the tokens that may come next. logits: [vocabulary]."""
    mask = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
    is_allowed = ((mask.unsqueeze(1) >> torch.arange(8)) & 1).flatten()[: len(logits)]
    return int(logits[: len(is_allowed)].masked_fill(is_allowed == 0, -torch.inf).argmax())  # some lack a text


@pytest.fixture(scope="module")
def constrained_reference(tiny_llama: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Return for each prompt the most likely tokens that JSON of `FORCED_RUNS` allows, up to its end."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    answers = []
    for prompt in prompts[:10]:
        matcher, tokens = new_matcher(tiny_llama), list(prompt)
        while not matcher.is_stopped():
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0, -1]
            tokens.append(most_likely_allowed(logits, matcher))
            matcher.consume_token(tokens[-1])
        answers.append(tokens[len(prompt) :])
    return answers


# Every optimization joins this list: none may change an answer.
MIXES: dict[str, dict[str, Any]] = {
    "plain": {"disable_overlap_schedule": True, "disable_radix_cache": True, "max_running_requests": 1},
    "batched": {"disable_radix_cache": True},
    "cached": {},
    "one_token_chunks": {"chunked_prefill_size": 1},
    "seven_token_chunks": {"chunked_prefill_size": 7},
    "large_chunks": {"chunked_prefill_size": 64},
    "unchunked": {"chunked_prefill_size": -1},
    "pages_of_4": {"page_size": 4, "chunked_prefill_size": 16},
    "pages_of_16": {"page_size": 16},
    "no_overlap": {"disable_overlap_schedule": True},
    "no_jump_forward": {"disable_jump_forward": True},
    "no_jump_forward_no_overlap": {"disable_jump_forward": True, "disable_overlap_schedule": True},
    "retracting": {"max_total_tokens": 200, "schedule_conservativeness": 0.0, "chunked_prefill_size": 32},
    "first_come": {"schedule_policy": "fcfs", "max_running_requests": 3},
    "depth_first": {"schedule_policy": "dfs-weight", "max_running_requests": 3},
}
GPU_MIXES: dict[str, dict[str, Any]] = {
    "graphs": {},
    "no_graphs": {"disable_cuda_graph": True},
    "few_graphs": {"cuda_graph_bs": [4, 16]},
    "graphs_of_at_most_8": {"cuda_graph_max_bs": 8},
    "graphs_no_overlap": {"disable_overlap_schedule": True},
    "triton": {"attention_backend": "triton"},
    "flashinfer": {"attention_backend": "flashinfer"},
    "torch_attention": {"attention_backend": "torch"},
    "torch_sampling": {"sampling_backend": "pytorch"},
}
PARALLEL_MIXES: dict[str, dict[str, Any]] = {
    "two_ranks": {"tp_size": 2, "chunked_prefill_size": 32},
    "four_ranks_of_two_kv_heads": {"tp_size": 4},
    "two_replicas": {"dp_size": 2},
}
CASES = [pytest.param("cpu", options, id=f"cpu-{name}") for name, options in {**MIXES, **PARALLEL_MIXES}.items()] + [
    pytest.param("cuda", options, id=f"cuda-{name}", marks=pytest.mark.gpu)
    for name, options in {**MIXES, **GPU_MIXES, **PARALLEL_MIXES}.items()
    if max(options.get("tp_size", 1), options.get("dp_size", 1)) <= max(torch.cuda.device_count(), 1)
]


@pytest.mark.parametrize(("device", "options"), CASES)
async def test_greedy_answers_equal_transformers_whatever_the_mix(
    tiny_llama: Path,
    prompts: list[list[int]],
    reference: list[list[int]],
    constrained_reference: list[list[int]],
    device: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(1)
    is_small = options.get("max_total_tokens") == 200  # then all ask at once: a fast device would be done with most
    spread_s = 0.0 if is_small else 0.2
    monkeypatch.setattr(
        "engine.schedule.grouping.MIN_SHARED_TOKENS", 1
    )  # even short prefixes are read once for a group
    async with running_engine(tiny_llama, device=device, **options) as engine:

        async def ask(i: int) -> list[int]:
            await asyncio.sleep(rng.random() * spread_s)
            _, tokens = await collect(engine, make_state(prompts[i], stream=bool(i % 2)))
            return tokens

        async def ask_for_json(i: int) -> list[int]:
            await asyncio.sleep(rng.random() * spread_s)
            _, tokens = await collect(engine, make_state(prompts[i], stream=bool(i % 2), **CONSTRAINED))
            return tokens

        for _ in range(2):  # the second time everything is cached
            answers = asyncio.gather(*(ask(i) for i in range(len(prompts))))
            constrained = asyncio.gather(*(ask_for_json(i) for i in range(len(constrained_reference))))
            assert (await answers, await constrained) == (reference, constrained_reference)
        if is_small:
            assert engine.stats().scheduler.num_retractions > 0, "the pool was meant to run out"


@pytest.mark.parametrize("device", DEVICES)
async def test_a_seeded_sample_does_not_depend_on_its_company(tiny_llama: Path, device: str) -> None:
    async with running_engine(tiny_llama, device=device) as engine:

        def state() -> RequestState:
            return make_state([5, 6, 7], temperature=1.5, top_k=50, top_p=0.95, sampling_seed=42)

        _, alone = await collect(engine, state())
        others = [make_state([9] * (i + 1), temperature=1.0) for i in range(5)]
        (_, among), *_ = await asyncio.gather(*(collect(engine, r) for r in [state(), *others]))
        assert among == alone
        _, other_seed = await collect(engine, make_state([5, 6, 7], temperature=1.5, sampling_seed=43))
        assert other_seed != alone


@pytest.mark.gpu
async def test_a_seeded_sample_is_the_same_with_either_sampling_backend(
    tiny_llama: Path, prompts: list[list[int]]
) -> None:
    fields: list[dict[str, Any]] = [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}, {"frequency_penalty": 0.5}]
    answers = {}
    for backend in ("triton", "pytorch"):
        async with running_engine(tiny_llama, device="cuda", sampling_backend=backend) as engine:
            states = [make_state(prompts[i], temperature=0.9, sampling_seed=i, **some) for i, some in enumerate(fields)]
            answers[backend] = [tokens for _, tokens in await asyncio.gather(*(collect(engine, r) for r in states))]
    assert answers["triton"] == answers["pytorch"]


async def test_streamed_text_adds_up_to_the_unstreamed_answer(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine:
        (whole,), _ = await collect(engine, make_state([5, 6, 7]))
        deltas, tokens = await collect(engine, make_state([5, 6, 7], stream=True))
        assert len(deltas) > 5
        assert "".join(delta.text for delta in deltas) == whole.text == engine.tokenizer.decode(tokens)


async def test_whole_answers_are_read_while_they_grow(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    text_stream = Tokenizer.text_stream

    def recording_stream(self: Tokenizer, *args: Any) -> Any:
        stream = text_stream(self, *args)

        def push(token_ids: list[int]) -> str:
            read.append(len(token_ids))
            return stream.push(token_ids)

        return SimpleNamespace(push=push, finish=stream.finish, has_stops=False, matched_stop=None)

    monkeypatch.setattr(Tokenizer, "text_stream", recording_stream)
    async with running_engine(tiny_llama) as engine:
        states = [make_state([5, 6, i], max_new_tokens=4 * READ_INTERVAL) for i in range(3, 6)]
        answers = await asyncio.gather(*(collect(engine, state) for state in states))
        assert [delta.text for (delta,), _ in answers] == [engine.tokenizer.decode(tokens) for _, tokens in answers]
    assert sum(read) == 3 * 4 * READ_INTERVAL and max(read) <= 2 * READ_INTERVAL


async def test_a_streams_first_token_is_not_held_back_for_others(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama, stream_interval=8) as engine:
        state = make_state(engine.tokenizer.encode("Once upon a time"), stream=True)
        sizes = [len(delta.token_ids) async for delta in engine.generate(state)]
    assert sizes[0] == 1 and sum(sizes) == NUM_NEW_TOKENS
    assert min(sizes[1:-1]) >= 8


async def test_a_stop_string_cuts_the_text_there(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine:
        (whole,), _ = await collect(engine, make_state([5, 6, 7]))
        stop = whole.text[8:10]
        cut = whole.text[: whole.text.index(stop)]
        for stream in (False, True):
            deltas, _ = await collect(engine, make_state([5, 6, 7], stream=stream, stop=[stop]))
            assert "".join(delta.text for delta in deltas) == cut
            reason = deltas[-1].finish_reason
            assert reason is not None and (reason.type, reason.matched) == ("stop", stop)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_regex_that_backtracks_without_end_fails_its_own_request(tiny_llama: Path, stream: bool) -> None:
    async with running_engine(tiny_llama) as engine:
        _, expected = await collect(engine, make_state([5, 6, 7]))
        endless = make_state([5, 6, 7], stream=stream, max_new_tokens=400, stop_regex=[r"(?s)(?:.|.|..)+(?<=\x00)"])
        (deltas, tokens), (_, beside) = await asyncio.gather(
            collect(engine, endless), collect(engine, make_state([5, 6, 7]))
        )
        reason = deltas[-1].finish_reason
        assert reason is not None and (reason.type, reason.status_code) == ("abort", 400)
        assert "stop_regex" in (reason.message or "") and len(tokens) < 400
        assert beside == expected


async def test_a_stop_regex_that_is_none_leaves_nothing_behind(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine:
        with pytest.raises(InvalidRequest, match="stop_regex"):
            engine.submit(make_state([5, 6, 7], stop_regex=["[[:nonsense:]]"]))
        assert engine.stats().scheduler.num_waiting == 0


async def test_log_probabilities_are_transformers_own(tiny_llama: Path, prompts: list[list[int]]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    prompt = prompts[2]
    async with running_engine(tiny_llama, chunked_prefill_size=16) as engine:
        for start in (0, 5, len(prompt) - 1):
            state = make_state(
                prompt, return_logprob=True, logprob_start_len=start, top_logprobs_num=3, token_ids_logprob=[4, 9]
            )
            (delta,), tokens = await collect(engine, state)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens])).logits[0]
            expected = torch.log_softmax(logits, dim=-1)
            assert state.input_logprobs is not None and delta.logprobs is not None
            given = state.input_logprobs
            assert given.token[0] == (None, prompt[start]) and len(given.token) == len(prompt) - start
            entries = list(zip(given.token, given.top, given.token_ids, strict=True))[1:]
            entries += zip(delta.logprobs.token, delta.logprobs.top, delta.logprobs.token_ids, strict=True)
            all_tokens = prompt + tokens
            for position, ((logprob, token), top, ids) in enumerate(entries, start=start + 1):
                row = expected[position - 1]
                assert token == all_tokens[position]
                assert logprob == pytest.approx(row[token].item(), abs=1e-4)
                assert top is not None and [t for _, t in top] == row.topk(3).indices.tolist()
                assert ids is not None and [t for _, t in ids] == [4, 9]
                assert [value for value, _ in ids] == pytest.approx(row[[4, 9]].tolist(), abs=1e-4)


async def test_log_probabilities_of_a_whole_answer_may_be_read_as_they_come(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine:
        (at_end,), _ = await collect(engine, make_state([5, 6, 7], max_new_tokens=20, return_logprob=True))
        state, early = make_state([5, 6, 7], max_new_tokens=20, return_logprob=True), Logprobs()
        sizes = []

        def read(some: Logprobs) -> None:
            sizes.append(len(some.token))
            early.token += some.token

        state.read_logprobs = read
        (delta,), tokens = await collect(engine, state)
        assert at_end.logprobs is not None and delta.logprobs is not None
        assert sizes and min(sizes) >= READ_LOGPROBS
        assert [token for _, token in early.token + delta.logprobs.token] == tokens
        assert [p for p, _ in early.token + delta.logprobs.token] == pytest.approx(
            [p for p, _ in at_end.logprobs.token], abs=1e-5
        )


async def test_log_probabilities_of_a_long_prompt_are_made_of_few_logits_at_a_time(
    tiny_llama: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_engine(tiny_llama, disable_radix_cache=True) as engine:
        model, num_rows = engine.parts.runner.model, []
        compute_logits: Callable[[torch.Tensor], torch.Tensor] = model.compute_logits

        def counted(hidden: torch.Tensor) -> torch.Tensor:
            num_rows.append(len(hidden))
            return compute_logits(hidden)

        monkeypatch.setattr(model, "compute_logits", counted)
        given = []
        for most in (256, 7):
            monkeypatch.setattr("engine.step.logprobs.PROMPT_ROWS", most)
            num_rows.clear()
            state = make_state(
                prompts[2], max_new_tokens=1, return_logprob=True, logprob_start_len=0, top_logprobs_num=2
            )
            await collect(engine, state)
            assert state.input_logprobs is not None and max(num_rows) == min(most, len(prompts[2]) - 1)
            given.append(state.input_logprobs)
        whole, cut = given
        assert [token for _, token in cut.token] == prompts[2]
        assert [p for p, _ in cut.token[1:]] == pytest.approx([p for p, _ in whole.token[1:]], abs=1e-4)
        assert [[t for _, t in top or ()] for top in cut.top] == [[t for _, t in top or ()] for top in whole.top]


@pytest.mark.gpu
async def test_log_probabilities_of_a_prompt_of_32k_tokens_take_little_memory(
    make_tiny_model: Callable[..., Path],
) -> None:
    from transformers import LlamaConfig

    prompt_len, vocab_size = 32_768, 131_072
    folder = make_tiny_model(LlamaConfig, "wide", vocab_size=vocab_size, max_position_embeddings=prompt_len + 8)
    async with running_engine(folder, device="cuda", max_total_tokens=prompt_len + 64) as engine:
        state = make_state(
            random.Random(1).choices(range(vocab_size), k=prompt_len), max_new_tokens=1, return_logprob=True,
            logprob_start_len=0, top_logprobs_num=5,
        )  # fmt: skip
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        (delta,), _ = await collect(engine, state)
        assert delta.finish_reason is not None and delta.finish_reason.type == "length"
        assert state.input_logprobs is not None and len(state.input_logprobs.token) == prompt_len
        assert torch.cuda.max_memory_allocated() - before < 1 << 30, "all its logits are 16 GiB, those of a chunk 4"


FP8_MIXES: dict[str, dict[str, Any]] = {
    "batched": {"disable_radix_cache": True},
    "cached": {},
    "seven_token_chunks": {"chunked_prefill_size": 7},
    "pages_of_16": {"page_size": 16},
    "no_overlap": {"disable_overlap_schedule": True},
}
FP8_GPU_MIXES = FP8_MIXES | {name: GPU_MIXES[name] for name in ("no_graphs", "torch_attention")}


@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize(
    ("device", "mixes"), [("cpu", FP8_MIXES), pytest.param("cuda", FP8_GPU_MIXES, marks=pytest.mark.gpu)]
)
async def test_with_an_fp8_cache_too_greedy_answers_do_not_depend_on_the_mix(
    tiny_llama: Path,
    prompts: list[list[int]],
    device: str,
    mixes: dict[str, dict[str, Any]],
    kv_cache_dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.schedule.grouping.MIN_SHARED_TOKENS", 1)

    async def answers(**options: Any) -> list[list[int]]:
        async with running_engine(tiny_llama, device=device, kv_cache_dtype=kv_cache_dtype, **options) as engine:
            given = await asyncio.gather(*(collect(engine, make_state(prompt)) for prompt in prompts))
            return [tokens for _, tokens in given]

    alone = await answers(max_running_requests=1, disable_radix_cache=True, disable_overlap_schedule=True)
    for name, options in mixes.items():
        num_different = sum(a != b for a, b in zip(await answers(**options), alone, strict=True))
        print(f"{name}: {num_different} of {len(prompts)} answers differ")
        # A key on the border between two float8 values falls to either side, and a close choice of a token with it.
        assert num_different <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "flashinfer"])
async def test_in_half_precision_the_attention_backends_agree(
    make_tiny_model: Callable[..., Path], prompts: list[list[int]], backend: str
) -> None:
    from transformers import LlamaConfig

    if backend == "flashinfer":
        available, reason = is_available()
        if not available:
            pytest.skip(reason)
    folder = make_tiny_model(LlamaConfig, "heads_of_64", head_dim=64)  # FlashInfer has no kernels for heads of 16
    logprobs = {}
    for name, dtype in (("torch", "float32"), ("torch", "float16"), (backend, "float16")):
        options = {"device": "cuda", "dtype": dtype, "attention_backend": name, "chunked_prefill_size": 32}
        async with running_engine(folder, **options) as engine:
            states = [make_state(prompt, return_logprob=True, logprob_start_len=0) for prompt in prompts]
            await asyncio.gather(*(collect(engine, state) for state in states))
            given = [p or 0.0 for r in states if r.input_logprobs is not None for p, _ in r.input_logprobs.token]
            logprobs[name, dtype] = torch.tensor(given)
    exact = logprobs["torch", "float32"]
    theirs, ours = ((logprobs[name, "float16"] - exact).square().mean().sqrt() for name in ("torch", backend))
    print(f"error, rms: torch {theirs:.2e}, {backend} {ours:.2e}")
    assert 0 < ours < 1.5 * theirs


@pytest.mark.parametrize("device", DEVICES)
async def test_an_fp8_cache_costs_a_quarter_of_float32_and_changes_little(
    tiny_llama: Path, prompts: list[list[int]], device: str
) -> None:
    logprobs, bytes_per_token = {}, {}
    for dtype in ("auto", "fp8_e4m3"):
        async with running_engine(tiny_llama, device=device, kv_cache_dtype=dtype) as engine:
            state = make_state(prompts[2], max_new_tokens=1, return_logprob=True, token_ids_logprob=[*range(50)])
            (delta,), _ = await collect(engine, state)
            assert delta.logprobs is not None and delta.logprobs.token_ids[0] is not None
            logprobs[dtype] = torch.tensor([value for value, _ in delta.logprobs.token_ids[0]])
            bytes_per_token[dtype] = engine.parts.runner.kv.bytes_per_token
    assert bytes_per_token["fp8_e4m3"] * 4 == bytes_per_token["auto"]
    difference = (logprobs["fp8_e4m3"] - logprobs["auto"]).abs()
    assert 0 < difference.max() < 0.1 * logprobs["auto"].abs().max()


async def test_penalties_bias_and_minimum_length_change_what_is_drawn(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine:
        _, plain = await collect(engine, make_state([5, 6, 7]))
        _, biased = await collect(engine, make_state([5, 6, 7], logit_bias={11: 1e4}))
        assert biased == [11] * NUM_NEW_TOKENS
        _, forbidden = await collect(engine, make_state([5, 6, 7], logit_bias={plain[0]: -1e4}))
        assert forbidden[0] != plain[0]
        eos = next(iter(engine.model_config.eos_token_ids))
        _, ended = await collect(engine, make_state([5, 6, 7], logit_bias={eos: 1e4}, ignore_eos=False))
        assert ended == [eos]
        _, held = await collect(
            engine, make_state([5, 6, 7], logit_bias={eos: 1e4}, ignore_eos=False, min_new_tokens=5)
        )
        assert len(held) == 6 and held.count(eos) == 1
        _, varied = await collect(
            engine, make_state([5, 6, 7], frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=2.0)
        )
        assert len(set(varied)) > len(set(plain)) or len(set(varied)) == NUM_NEW_TOKENS


async def test_an_abort_ends_the_stream_and_frees_everything(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine:
        state = make_state([5, 6, 7], stream=True, max_new_tokens=400)
        async with aclosing(engine.generate(state)) as deltas:
            await anext(deltas)  # and leave early, which aborts
        assert state.finish_reason is not None and state.finish_reason.type == "abort"
        assert engine.stats().scheduler.num_held_tokens == 0
        assert not engine.abort(state.rid)


@pytest.mark.breaks_bookkeeping
async def test_a_page_that_is_lost_shows_in_the_health_of_an_engine_that_has_become_idle(tiny_llama: Path) -> None:
    config = EngineConfig(model_path=str(tiny_llama), dtype="float32", device="cpu", max_total_tokens=1024)
    async with LocalEngine(config) as engine:
        await collect(engine, make_state([5, 6, 7]))
        assert engine.health().num_violations == 0
        engine.parts.scheduler.held.allocator.allocate(1)
        await collect(engine, make_state([5, 6, 7]))
        while not engine.health().num_violations:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert engine.health().status == "ok", "it can go on without that page"
        assert engine.stats().loop.num_violations == 1


async def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_engine(tiny_llama) as engine:
        _, expected = await collect(engine, make_state([5, 6, 7]))
        model = engine.parts.runner.model
        compute_logits: Callable[[torch.Tensor], torch.Tensor] = model.compute_logits

        def broken(hidden: torch.Tensor) -> torch.Tensor:
            monkeypatch.setattr(model, "compute_logits", compute_logits)
            raise RuntimeError("injected")

        monkeypatch.setattr(model, "compute_logits", broken)
        (delta,), _ = await collect(engine, make_state([9, 9]))
        assert delta.finish_reason is not None and "injected" in (delta.finish_reason.message or "")
        assert delta.finish_reason.status_code == 500
        _, again = await collect(engine, make_state([5, 6, 7]))
        assert again == expected


async def test_bad_requests_are_refused_by_name(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine:
        for bad, field in [
            (make_state([]), "input_ids"),
            (make_state([1, 99999]), "input_ids"),
            (make_state([1], temperature=-1.0), "temperature"),
            (make_state([1], logit_bias={99999: 1.0}), "logit_bias"),
            (make_state([1], logprob_start_len=5), "logprob_start_len"),
        ]:
            with pytest.raises(InvalidRequest) as error:
                engine.submit(bad)
            assert error.value.field == field
        with pytest.raises(PromptTooLong, match=r"600.*512"):
            engine.submit(make_state([1] * 600))
    with pytest.raises(EngineStopped):
        engine.submit(make_state([1]))


@pytest.mark.parametrize(
    ("device", "operation"),
    [("cpu", b"scaled_dot_product"), pytest.param("cuda", b"_decode_kernel", marks=pytest.mark.gpu)],
)
async def test_a_profile_shows_the_steps_that_ran_meanwhile(
    tiny_llama: Path, tmp_path: Path, device: str, operation: bytes
) -> None:
    async with running_engine(tiny_llama, device=device) as engine:
        engine.start_profile(str(tmp_path))
        with pytest.raises(InvalidRequest, match="being recorded"):
            engine.start_profile(str(tmp_path))
        await collect(engine, make_state([5, 6, 7], max_new_tokens=2))
        path = await engine.stop_profile()
        with pytest.raises(InvalidRequest, match="no profile"):
            await engine.stop_profile()
    with gzip.open(path) as trace:
        assert operation in trace.read()


async def test_a_step_whose_last_chunk_is_a_page_longer_than_its_room_can_be_staged(tiny_llama: Path) -> None:
    options = {"page_size": 64, "chunked_prefill_size": 64, "max_running_requests": 2}
    async with running_engine(tiny_llama, **options) as engine:
        runner, num_tokens = engine.parts.runner, []
        launch = runner.launch

        def counted(plan: Plan) -> Step:
            num_tokens.append(plan.num_tokens)
            return launch(plan)

        runner.launch = counted  # type: ignore[method-assign]
        await asyncio.gather(*(collect(engine, make_state([head] * 63)) for head in (5, 6)))
        assert 63 + 63 in num_tokens
        assert runner.stager.max_tokens >= 63 + 63


async def test_an_idle_engine_runs_no_steps(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine:
        await collect(engine, make_state([5, 6, 7]))
        before = engine.stats().loop.num_steps
        await asyncio.sleep(0.2)
        assert engine.stats().loop.num_steps == before
        assert engine.health().status == "ok"


async def test_answers_that_have_just_ended_are_given_also_when_the_engine_stops(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama, max_running_requests=64) as engine:
        ended: list[Delta] = []
        has_begun = asyncio.Event()

        def sink(delta: Delta) -> None:
            ended.append(delta)
            has_begun.set()

        for i in range(40):
            state = make_state([i + 3, 5], max_new_tokens=1)
            state.sink = sink
            engine.submit(state)
        await has_begun.wait()
        assert len(ended) < 40, "they are told a few a turn"
        await engine.stop()
        assert [delta.finish_reason and delta.finish_reason.type for delta in ended] == ["length"] * 40


async def test_an_engine_that_has_stopped_leaves_room_for_another_one(tiny_llama: Path) -> None:
    async with running_engine(tiny_llama) as engine:
        memory = weakref.ref(engine.parts.runner.kv.buffers[0])
        assert memory() is not None
    assert memory() is None, "though the engine is still there"
