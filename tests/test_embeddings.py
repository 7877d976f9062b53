"""Prompts become the vectors and scores that transformers computes, and the routes show them as each API does."""

import asyncio
import base64
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer

from engine.errors import InvalidRequest
from engine.request import Request, SamplingParams
from engine.schedule.plan import PrefillBudget
from engine.schedule.scheduler import Scheduler
from engine.state import RequestState
from server.app import build_app
from server.config import ServerConfig
from tests.client import post
from tests.fake_engine import FakeEngine, FakeModel, serving
from tests.test_engine import running_engine

Engine = Any
MAX_DIFFERENCE = 1e-4
RNG = random.Random(3)
HEAD = [RNG.randrange(3, 384) for _ in range(40)]
PROMPTS = [HEAD + [RNG.randrange(3, 384) for _ in range(n)] for n in (1, 7, 60)] + [[9]]


async def embed(engine: Engine, input_ids: list[int], pooling: str = "last", rid: str = "r") -> np.ndarray:
    state = RequestState(Request(rid, input_ids, SamplingParams(max_new_tokens=0), pooling=pooling))
    async for _ in engine.generate(state):
        pass
    assert state.embedding is not None
    return state.embedding


@pytest.fixture(scope="module")
def hidden_states(tiny_qwen3: Path) -> list[torch.Tensor]:
    """Return transformers' last hidden states of each prompt, [T, hidden]."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_qwen3, dtype=torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([ids])).last_hidden_state[0] for ids in PROMPTS]


MIXES: dict[str, dict[str, Any]] = {
    "plain": {"disable_radix_cache": True},
    "cached": {},
    "chunked": {"chunked_prefill_size": 16},
    "paged and chunked": {"chunked_prefill_size": 16, "page_size": 8},
    "vectors only": {"is_embedding": True},
    "gpu": {"device": "cuda"},
}


@pytest.mark.parametrize("mix", [pytest.param(mix, marks=[pytest.mark.gpu] * (mix == "gpu")) for mix in MIXES])
@pytest.mark.parametrize("pooling", ["last", "mean"])
async def test_a_vector_is_transformers_own(
    tiny_qwen3: Path, hidden_states: list[torch.Tensor], mix: str, pooling: str
) -> None:
    async with running_engine(tiny_qwen3, **MIXES[mix]) as engine:
        for _ in range(2):  # the second time the prompt is cached
            for input_ids, states in zip(PROMPTS, hidden_states, strict=True):
                wanted = states[-1] if pooling == "last" else states.mean(0)
                got = await embed(engine, input_ids, pooling)
                assert np.abs(got - wanted.numpy()).max() < MAX_DIFFERENCE


async def test_prompts_of_vectors_and_of_answers_share_steps_and_cache(
    tiny_qwen3: Path, hidden_states: list[torch.Tensor]
) -> None:
    async with running_engine(tiny_qwen3, chunked_prefill_size=16) as engine:
        answer = RequestState(Request("answer", HEAD, SamplingParams(max_new_tokens=8, temperature=0.0)))
        async for delta in engine.generate(answer):
            tokens = delta.token_ids
        got = await embed(engine, PROMPTS[1])
        assert len(tokens) == 8
        assert np.abs(got - hidden_states[1][-1].numpy()).max() < MAX_DIFFERENCE


async def test_a_retracted_prompt_has_the_same_mean(
    tiny_qwen3: Path, hidden_states: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, num_calls = Scheduler.schedule, 0

    def retract_once(self: Scheduler, budget: PrefillBudget | None = None) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            self._retract(self.prefilling[0])
        return schedule(self, budget)

    monkeypatch.setattr(Scheduler, "schedule", retract_once)
    async with running_engine(tiny_qwen3, chunked_prefill_size=16) as engine:
        got = await embed(engine, PROMPTS[2], "mean")
        assert engine.stats().scheduler.num_retractions == 1
        assert np.abs(got - hidden_states[2].mean(0).numpy()).max() < MAX_DIFFERENCE


@pytest.mark.parametrize("num_labels", [1, 5])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral"])
async def test_a_classifiers_scores_are_transformers_own(
    make_tiny_model: Callable[..., Path], family: str, num_labels: int, tmp_path: Path
) -> None:
    import transformers

    def save_classifier() -> tuple[Path, list[np.ndarray]]:
        """Return a random classifier's folder and its logits for each of PROMPTS."""
        folder = make_tiny_model(getattr(transformers, f"{family}Config"), f"tiny_{family}")
        config = transformers.AutoConfig.from_pretrained(folder, num_labels=num_labels)
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(1)
            model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
            model.save_pretrained(folder)
            return folder, [model(torch.tensor([input_ids])).logits[0].numpy() for input_ids in PROMPTS]

    folder, logits = await asyncio.to_thread(save_classifier)
    async with running_engine(folder, chunked_prefill_size=16) as engine:
        assert not engine.is_generation
        for input_ids, wanted in zip(PROMPTS, logits, strict=True):
            got = await embed(engine, input_ids)
            assert got.shape == (num_labels,)
            assert np.abs(got - wanted).max() < MAX_DIFFERENCE
        with pytest.raises(InvalidRequest, match="does not generate"):
            engine.submit(RequestState(Request("a", [5], SamplingParams())))


async def test_a_decoder_without_a_head_embeds(
    make_tiny_model: Callable[..., Path], tiny_qwen3: Path, hidden_states: list[torch.Tensor]
) -> None:
    """Its checkpoint names the weights without `model.` before them."""
    from transformers import AutoModel, Qwen3Config

    def save_bare_decoder() -> Path:
        folder = make_tiny_model(Qwen3Config, "bare")
        AutoModel.from_pretrained(tiny_qwen3, dtype=torch.float32).save_pretrained(folder)
        return folder

    folder = await asyncio.to_thread(save_bare_decoder)
    async with running_engine(folder) as engine:
        got = await embed(engine, PROMPTS[2])
        assert np.abs(got - hidden_states[2][-1].numpy()).max() < MAX_DIFFERENCE


async def test_sentence_transformers_files_say_how_to_pool(make_tiny_model: Callable[..., Path]) -> None:
    from transformers import Qwen3Config

    folder = make_tiny_model(Qwen3Config, "pooled")
    write(folder / "1_Pooling" / "config.json", '{"pooling_mode_mean_tokens": true}')
    async with running_engine(folder) as engine:
        assert engine.model_config.pooling == "mean"
    async with running_engine(folder, pooling="last") as engine:
        assert engine.model_config.pooling == "last"


def write(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)


# ---- routes ----


@asynccontextmanager
async def client_of(folder: Path, tmp_path: Path, **options: Any) -> AsyncIterator[TestClient[Any, Any]]:
    async with running_engine(folder, **options) as engine:
        config = ServerConfig(model_path=str(folder), served_model_name=["m"], file_storage_path=str(tmp_path))
        async with TestClient(TestServer(build_app(engine, config))) as client:
            yield client


def unit(vector: Any) -> np.ndarray:
    return np.asarray(vector) / np.linalg.norm(vector)


async def test_openais_client_gets_unit_vectors(
    tiny_qwen3: Path, hidden_states: list[torch.Tensor], tmp_path: Path
) -> None:
    wanted = [unit(states[-1].numpy()) for states in hidden_states]
    async with client_of(tiny_qwen3, tmp_path) as client:
        api = openai.AsyncOpenAI(base_url=str(client.make_url("/v1")), api_key="none", max_retries=0, timeout=60)
        answer = await api.embeddings.create(model="m", input=PROMPTS)  # it asks for base64
        assert [one.index for one in answer.data] == [0, 1, 2, 3]
        for one, vector in zip(answer.data, wanted, strict=True):
            assert np.abs(np.array(one.embedding) - vector).max() < MAX_DIFFERENCE
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, PROMPTS))
        short = await api.embeddings.create(model="m", input=PROMPTS[0], dimensions=8, encoding_format="float")
        assert np.abs(np.array(short.data[0].embedding) - unit(wanted[0][:8])).max() < MAX_DIFFERENCE
        texts = await api.embeddings.create(model="m", input=["the fox", "the dog"])
        alone = await api.embeddings.create(model="m", input="the dog")
        assert texts.data[1].embedding == pytest.approx(alone.data[0].embedding, abs=MAX_DIFFERENCE)
        with pytest.raises(openai.BadRequestError, match="dimensions must be between 1 and 64"):
            await api.embeddings.create(model="m", input="x", dimensions=65)
        with pytest.raises(openai.NotFoundError):
            await api.embeddings.create(model="other", input="x")
        await api.close()


async def test_base64_is_the_same_float32s() -> None:
    async with serving(FakeEngine()) as client:
        as_floats = await post(client, "/v1/embeddings", input="ab", encoding_format="float")
        as_text = await post(client, "/v1/embeddings", input="ab", encoding_format="base64")
        raw = base64.b64decode(as_text["data"][0]["embedding"])
        assert np.frombuffer(raw, "<f4").tolist() == pytest.approx(as_floats["data"][0]["embedding"])


async def test_encode_answers_in_sglangs_shape() -> None:
    async with serving(FakeEngine()) as client:
        one = await post(client, "/encode", text="ab", rid="mine")
        assert one["embedding"] == pytest.approx(unit([2, 195, 3, 4]).tolist(), abs=1e-6)
        assert (one["meta_info"]["id"], one["meta_info"]["prompt_tokens"]) == ("mine", 2)
        several = await post(client, "/encode", input_ids=[[97, 98], [1]])
        assert several[0]["embedding"] == one["embedding"]
        response = await client.post("/classify", json={"text": "ab"})
        assert response.status == 400
        assert "classification head" in (await response.json())["error"]["message"]


def fake_classifier() -> FakeEngine:
    engine = FakeEngine()
    engine.model_config = FakeModel(architectures=("FakeForSequenceClassification",))
    return engine


async def test_a_classifier_shows_raw_scores_to_sglang_and_labels_to_vllm() -> None:
    async with serving(fake_classifier()) as client:
        raw = await post(client, "/classify", text=["a", "\x00"])
        assert [one["embedding"] for one in raw] == [[0.0, 97 / 128], [0.0, 0.0]]
        labelled = await post(client, "/v1/classify", input=["a", "b"])
        first = labelled["data"][0]
        assert (first["label"], first["num_classes"], first["index"]) == ("good", 2, 0)
        assert first["probs"] == pytest.approx((np.exp([0, 97 / 128]) / np.exp([0, 97 / 128]).sum()).tolist())


async def test_reranking_puts_the_best_first_in_each_shape() -> None:
    body: dict[str, Any] = {"query": "q", "documents": ["a", "z", "m"], "top_n": 2}
    async with serving(fake_classifier()) as client:
        for path in ("/rerank", "/v2/rerank"):
            results = (await post(client, path, **body))["results"]
            assert [(one["index"], one["document"]["text"]) for one in results] == [(1, "z"), (2, "m")]
            assert results[0]["relevance_score"] > results[1]["relevance_score"] > 0.5
        theirs = await post(client, "/v1/rerank", **body)
        assert [(one["index"], one["document"]) for one in theirs] == [(1, "z"), (2, "m")]
        bare = (await post(client, "/rerank", **body, return_documents=False))["results"]
        assert "document" not in bare[0]


async def test_without_a_head_the_cosine_scores() -> None:
    async with serving(FakeEngine()) as client:
        answer = await post(client, "/v1/score", text_1="ab", text_2=["ab", "zzzz"])
        scores = [one["score"] for one in answer["data"]]
        assert scores[0] == pytest.approx(1.0, abs=1e-6)
        assert scores[1] == pytest.approx(float(unit([2, 195, 3, 4]) @ unit([4, 488, 3, 4])), abs=1e-6)
        response = await client.post("/v1/score", json={"text_1": ["a", "b"], "text_2": ["a", "b", "c"]})
        assert response.status == 400


async def test_label_tokens_are_scored_after_each_item(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    labels = [5, 17, 300]
    async with client_of(tiny_llama, tmp_path) as client:
        for is_softmax in (False, True):
            answer = await post(
                client, "/v1/score", query="Is it?", items=[" Yes", " No"], label_token_ids=labels,
                apply_softmax=is_softmax,
            )  # fmt: skip
            for item, scores in zip((" Yes", " No"), answer["scores"], strict=True):
                ids = tokenizer("Is it?" + item, return_tensors="pt").input_ids
                with torch.inference_mode():
                    wanted = model(ids).logits[0, -1].softmax(-1)[labels]
                wanted = wanted / wanted.sum() if is_softmax else wanted
                assert scores == pytest.approx(wanted.tolist(), abs=MAX_DIFFERENCE)


async def test_an_empty_input_is_refused_by_name() -> None:
    async with serving(FakeEngine()) as client:
        values: list[Any] = ["", [], [""], [[]], [97, "a"], 5, None]
        for value in values:
            response = await client.post("/v1/embeddings", json={"input": value})
            assert response.status == 400, value
            assert (await response.json())["error"]["param"].startswith("input")
