"""Test pauses, weight updates and released memory of a running engine: answers stay equal to transformers'."""

import asyncio
import dataclasses
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import destroy_process_group

from engine.errors import EngineError, EngineStopped, InvalidRequest
from engine.local import LocalEngine
from engine.request import Request, SamplingParams
from engine.state import Delta, RequestState
from tests.fake_engine import FakeEngine, serving
from tests.server_processes import descendants, is_rank
from tests.test_engine import DEVICES, running_engine

PROMPT = [7, 11, 300, 42, 5, 5, 99, 120, 33, 250] * 4
NUM_NEW_TOKENS = 40


def state_of(rid: str, sink: Callable[[Delta], None] = print, **params: Any) -> RequestState:
    given: dict[str, Any] = {"max_new_tokens": NUM_NEW_TOKENS, "temperature": 0.0, "ignore_eos": True, **params}
    return RequestState(Request(rid, PROMPT, SamplingParams(**given), stream=True), sink)


async def answer(engine: LocalEngine, rid: str = "r") -> list[int]:
    return [token async for delta in engine.generate(state_of(rid)) for token in delta.token_ids]


class Running:
    """Hold a running request, and wait for its tokens."""

    def __init__(self, engine: LocalEngine, rid: str) -> None:
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._news = asyncio.Event()
        self.state = state_of(rid, self._sink)
        engine.submit(self.state)

    def _sink(self, delta: Delta) -> None:
        self.tokens += delta.token_ids
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason.type
        self._news.set()

    async def until(self, num_tokens: int) -> None:
        async with asyncio.timeout(60):
            while len(self.tokens) < num_tokens and self.finish_reason is None:
                self._news.clear()
                await self._news.wait()


@pytest.fixture(scope="module")
def other_llama(make_tiny_model: Callable[..., Path], tiny_llama: Path) -> Path:
    """Make `tiny_llama` with other weights."""
    from transformers import LlamaConfig

    folder = make_tiny_model(LlamaConfig, "other_llama", tie_word_embeddings=False)
    file = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(7)
    noise = {
        name: weight if weight.dim() == 1 else weight + 0.2 * torch.randn(weight.shape, generator=generator)
        for name, weight in load_file(file).items()
    }
    save_file(noise, file, metadata={"format": "pt"})
    return folder


async def answer_of_transformers(folder: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """Return transformers' greedy answer, computed off the event loop."""
    from transformers import AutoModelForCausalLM

    def generate() -> list[int]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return output[0, len(prompt) :].tolist()

    return await asyncio.to_thread(generate)


@asynccontextmanager
async def checked_engine(folder: Path, **options: Any) -> AsyncIterator[LocalEngine]:
    """No slot may be lost by the end of a test."""
    async with running_engine(folder, **options) as engine:
        yield engine
        stats = engine.stats().scheduler
        assert stats.num_held_tokens == 0
        assert stats.num_free_tokens + stats.num_cached_tokens == stats.num_total_tokens


# ---- weights ----


@pytest.mark.parametrize("device", DEVICES)
async def test_new_weights_serve_at_once_and_nothing_cached_outlives_the_old(
    tiny_llama: Path, other_llama: Path, device: str
) -> None:
    async with checked_engine(tiny_llama, device=device) as engine:
        old = await answer(engine)
        assert old == await answer_of_transformers(tiny_llama, PROMPT, NUM_NEW_TOKENS)
        await engine.maintenance.update_weights(str(other_llama), weight_version="2")
        new = await answer(engine)
        assert new == await answer_of_transformers(other_llama, PROMPT, NUM_NEW_TOKENS) != old
        assert (engine.maintenance.weight_version, engine.maintenance.model_path) == ("2", str(other_llama))
        await engine.maintenance.update_weights(str(tiny_llama))
        assert await answer(engine) == old


@pytest.mark.parametrize("device", DEVICES)
async def test_an_answer_goes_on_with_the_new_weights(tiny_llama: Path, other_llama: Path, device: str) -> None:
    async with checked_engine(tiny_llama, device=device) as engine:
        running = Running(engine, "a")
        await running.until(5)
        assert await engine.maintenance.update_weights(str(other_llama)) == 1
        num_old = len(running.state.output_ids)  # more than were sent, maybe: tokens go out together
        await running.until(NUM_NEW_TOKENS)
        assert 5 <= num_old < NUM_NEW_TOKENS
        rest = await answer_of_transformers(other_llama, PROMPT + running.tokens[:num_old], NUM_NEW_TOKENS - num_old)
        assert running.tokens[num_old:] == rest


async def test_requests_can_be_ended_with_the_old_weights(tiny_llama: Path, other_llama: Path) -> None:
    async with checked_engine(tiny_llama) as engine:
        running = Running(engine, "a")
        await running.until(2)
        await engine.maintenance.update_weights(str(other_llama), abort_all_requests=True)
        assert running.finish_reason == "abort"


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda w: {**w, "model.norm.weight": w["model.norm.weight"][:8]}, "model.norm.weight has shape"),
        (lambda w: {k: v for k, v in w.items() if k != "model.layers.1.mlp.up_proj.weight"}, "layers.1.mlp.up_proj"),
        (lambda w: {**w, "extra.weight": torch.zeros(1)}, "extra.weight"),
    ],
)
async def test_a_checkpoint_that_does_not_fit_changes_nothing(
    tiny_llama: Path, tmp_path: Path, spoil: Callable[[Any], Any], named: str
) -> None:
    save_file(spoil(load_file(tiny_llama / "model.safetensors")), tmp_path / "model.safetensors")
    async with checked_engine(tiny_llama) as engine:
        old = await answer(engine)
        running = Running(engine, "a")
        with pytest.raises(InvalidRequest, match=named):
            await engine.maintenance.update_weights(str(tmp_path))
        await running.until(NUM_NEW_TOKENS)
        assert running.tokens == old == await answer(engine)
        with pytest.raises(InvalidRequest, match="no such folder"):
            await engine.maintenance.update_weights("/no/such/folder")


async def test_weights_with_a_head_of_their_own_do_not_fit_a_tied_model(tiny_qwen3: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_qwen3 / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
    save_file(tensors, tmp_path / "model.safetensors")
    async with checked_engine(tiny_qwen3) as engine:
        with pytest.raises(InvalidRequest, match="only one of these weights and those in use has a head of its own"):
            await engine.maintenance.update_weights(str(tmp_path))


async def test_an_update_goes_on_when_whoever_asked_for_it_has_left(tiny_llama: Path, other_llama: Path) -> None:
    async with checked_engine(tiny_llama) as engine:
        updating = asyncio.create_task(engine.maintenance.update_weights(str(other_llama)))
        await asyncio.sleep(0)
        updating.cancel()
        await asyncio.wait([updating])
        await asyncio.gather(*engine.maintenance.tasks)
        assert await answer(engine) == await answer_of_transformers(other_llama, PROMPT, NUM_NEW_TOKENS)


async def test_a_pause_ends_what_runs_also_when_whoever_asked_for_it_has_left(tiny_llama: Path) -> None:
    async with checked_engine(tiny_llama) as engine:
        running = Running(engine, "a")
        await running.until(1)
        pausing = asyncio.create_task(engine.maintenance.pause("abort"))
        await asyncio.sleep(0)
        pausing.cancel()
        await asyncio.wait([pausing])
        await asyncio.gather(*engine.maintenance.tasks)
        assert running.finish_reason == "abort"
        await engine.maintenance.resume()


# ---- on several ranks ----


async def test_every_rank_takes_other_weights_or_none_does(tiny_llama: Path, other_llama: Path, tmp_path: Path) -> None:
    bad = {**load_file(tiny_llama / "model.safetensors"), "extra.weight": torch.zeros(1)}
    save_file(bad, tmp_path / "model.safetensors")
    async with checked_engine(tiny_llama, tp_size=2) as engine:
        old = await answer(engine)
        with pytest.raises(InvalidRequest, match=r"extra\.weight"):
            await engine.maintenance.update_weights(str(tmp_path))
        assert await answer(engine) == old
        running = Running(engine, "a")
        await running.until(5)
        await engine.maintenance.update_weights(str(other_llama), abort_all_requests=True)
        assert running.finish_reason == "abort"
        assert await answer(engine) == await answer_of_transformers(other_llama, PROMPT, NUM_NEW_TOKENS) != old
        with pytest.raises(InvalidRequest, match="one rank only, and this server has 2"):
            await engine.maintenance.weight("lm_head.weight", 1)


async def test_every_rank_gives_its_memory_back_and_holds_still(tiny_llama: Path) -> None:
    async with checked_engine(tiny_llama, tp_size=2) as engine:
        wanted = await answer(engine)
        assert engine.flush_cache()
        running = Running(engine, "a")
        await running.until(3)
        await engine.maintenance.release_memory()
        late = Running(engine, "b")
        await asyncio.sleep(0.05)
        assert not late.tokens
        await engine.maintenance.resume_memory()
        await running.until(NUM_NEW_TOKENS)
        await late.until(NUM_NEW_TOKENS)
        assert running.tokens == late.tokens == wanted

        running = Running(engine, "c")
        await running.until(3)
        await engine.maintenance.pause("retract")
        await engine.maintenance.resume()
        await running.until(NUM_NEW_TOKENS)
        assert running.tokens == wanted
        running = Running(engine, "d")
        await running.until(1)
        assert engine.abort("d") and running.finish_reason == "abort"
        assert await answer(engine) == wanted


class FakeRanks:
    """Stand for ranks of which rank 1 cannot read the weights."""

    def __init__(self) -> None:
        self.orders: list[str] = []

    def order(self, name: str, **arguments: Any) -> int:
        self.orders.append(name)
        return len(self.orders)

    def wait_done(self, order: int) -> dict[int, str]:
        return {1: "no such folder"} if self.orders[order - 1] == "read" else {}


async def test_one_rank_that_cannot_read_the_weights_leaves_the_old_ones_to_all(
    tiny_llama: Path, other_llama: Path
) -> None:
    async with checked_engine(tiny_llama) as engine:
        old = await answer(engine)
        ranks = FakeRanks()
        engine.maintenance.parts = dataclasses.replace(engine.parts, ranks=ranks)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="rank 1: no such folder"):
            await engine.maintenance.update_weights(str(other_llama))
        assert ranks.orders == ["read", "drop"]
        assert await answer(engine) == old


async def test_whatever_keeps_rank_0_from_reading_the_weights_no_rank_keeps_them(
    tiny_llama: Path, other_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(**_: Any) -> None:
        raise RuntimeError("can't allocate memory")

    async with checked_engine(tiny_llama) as engine:
        ranks = FakeRanks()
        engine.maintenance.parts = dataclasses.replace(engine.parts, ranks=ranks)  # type: ignore[arg-type]
        monkeypatch.setattr(engine.parts.rank_maintenance, "read", read)
        with pytest.raises(InvalidRequest, match="can't allocate memory"):
            await engine.maintenance.update_weights(str(other_llama))
        assert ranks.orders == ["read", "drop"]


async def test_a_rank_that_ends_in_an_update_ends_the_engine_by_name(tiny_llama: Path, other_llama: Path) -> None:
    async with running_engine(tiny_llama, tp_size=2) as engine:
        (rank,) = filter(is_rank, descendants(os.getpid()))
        os.kill(rank, signal.SIGSTOP)
        updating = asyncio.create_task(engine.maintenance.update_weights(str(other_llama)))
        await asyncio.sleep(0.1)
        os.kill(rank, signal.SIGKILL)
        with pytest.raises(EngineStopped, match=rf"pid {rank}\) was ended by SIGKILL"):
            await asyncio.wait_for(updating, 60)
        assert f"pid {rank}" in await asyncio.wait_for(engine.failed(), 60)
    destroy_process_group()  # a process whose engine has failed ends; this one goes on


async def test_every_weight_can_be_read_by_its_checkpoints_name(tiny_llama: Path) -> None:
    weights = load_file(tiny_llama / "model.safetensors")
    async with checked_engine(tiny_llama) as engine:
        for name, weight in weights.items():
            assert torch.equal(torch.tensor(await engine.maintenance.weight(name, 1000)), weight), name
        assert len(await engine.maintenance.weight("lm_head.weight", 3)) == 3
        with pytest.raises(InvalidRequest, match="no weight 'nope'"):
            await engine.maintenance.weight("nope", 1)


async def test_packed_weights_can_be_replaced_and_read(tiny_llama: Path, other_llama: Path) -> None:
    """Replace and read weights whose layout a CPU has changed, as it does for bfloat16."""
    async with checked_engine(tiny_llama, dtype="bfloat16") as engine:
        await engine.maintenance.update_weights(str(other_llama))
        wanted = load_file(other_llama / "model.safetensors")
        for name in ("model.layers.0.self_attn.k_proj.weight", "lm_head.weight"):
            got = torch.tensor(await engine.maintenance.weight(name, 1000))
            assert torch.equal(got, wanted[name].bfloat16().float())


# ---- pauses ----


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_a_pause_changes_no_answer(tiny_llama: Path, mode: str) -> None:
    async with checked_engine(tiny_llama) as engine:
        wanted = await answer(engine)
        running = Running(engine, "a")
        await running.until(3)
        await engine.maintenance.pause(mode)
        seen = list(running.tokens)
        late = Running(engine, "b")
        await asyncio.sleep(0.05)
        assert running.tokens == seen and not late.tokens
        assert engine.progress() is None, "the watchdog must not take it for a hang"
        assert engine.stats().scheduler.num_running == (mode == "in_place")
        await engine.maintenance.resume()
        await running.until(NUM_NEW_TOKENS)
        await late.until(NUM_NEW_TOKENS)
        assert running.tokens == late.tokens == wanted


async def test_a_pause_may_end_what_runs(tiny_llama: Path) -> None:
    async with checked_engine(tiny_llama) as engine:
        running = Running(engine, "a")
        await running.until(1)
        assert await engine.maintenance.pause("abort") == 1
        assert running.finish_reason == "abort"
        await engine.maintenance.resume()
        assert len(await answer(engine)) == NUM_NEW_TOKENS


async def test_a_paused_engine_stays_paused_through_an_update(tiny_llama: Path, other_llama: Path) -> None:
    async with checked_engine(tiny_llama) as engine:
        await engine.maintenance.pause("in_place")
        waiting = Running(engine, "a")
        await engine.maintenance.update_weights(str(other_llama))
        await asyncio.sleep(0.05)
        assert not waiting.tokens
        await engine.maintenance.resume()
        await waiting.until(NUM_NEW_TOKENS)
        assert waiting.tokens == await answer_of_transformers(other_llama, PROMPT, NUM_NEW_TOKENS)


# ---- memory ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tags", [["kv_cache"], ["weights"], ["kv_cache", "weights"]])
async def test_released_memory_comes_back_and_answers_go_on(tiny_llama: Path, tags: list[str], device: str) -> None:
    async with checked_engine(tiny_llama, device=device) as engine:
        wanted = await answer(engine)
        running = Running(engine, "a")
        await running.until(3)
        await engine.maintenance.release_memory(tags)
        assert (engine.parts.runner.kv.nbytes == 0) == ("kv_cache" in tags)
        late = Running(engine, "b")
        await engine.maintenance.resume()  # of a pause that there is not: the memory is still away
        await asyncio.sleep(0.05)
        assert not late.tokens
        for tag in tags:  # one by one
            await engine.maintenance.resume_memory([tag])
        await running.until(NUM_NEW_TOKENS)
        await late.until(NUM_NEW_TOKENS)
        assert running.tokens == late.tokens == wanted


async def test_memory_that_has_no_room_yet_stays_released_and_what_is_back_is_not_taken_twice(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory\nand so on")

    async with checked_engine(tiny_llama) as engine:
        wanted, runner = await answer(engine), engine.parts.runner
        await engine.maintenance.release_memory()
        running = Running(engine, "a")
        with monkeypatch.context() as patch:
            patch.setattr(runner, "move_weights", fail)
            with pytest.raises(EngineError, match=r"no room for weights, which stays released: CUDA out of memory$"):
                await engine.maintenance.resume_memory()
        pool = runner.kv.buffers
        assert runner.kv.nbytes and not running.tokens
        await engine.maintenance.resume_memory()
        assert runner.kv.buffers is pool
        await running.until(NUM_NEW_TOKENS)
        assert running.tokens == wanted


async def test_released_weights_cannot_be_read_or_replaced(tiny_llama: Path) -> None:
    async with checked_engine(tiny_llama) as engine:
        await engine.maintenance.release_memory(["weights"])
        with pytest.raises(InvalidRequest, match="released"):
            await engine.maintenance.update_weights(str(tiny_llama))
        with pytest.raises(InvalidRequest, match="released"):
            await engine.maintenance.weight("lm_head.weight", 1)
        await engine.maintenance.resume_memory()


# ---- routes ----


async def test_the_routes_speak_sglangs_shapes() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:

        async def post(path: str, **body: Any) -> tuple[int, Any]:
            response = await client.post(path, json=body) if body else await client.post(path)
            text = await response.text()
            return response.status, await response.json() if text else None

        assert await post("/update_weights_from_disk", model_path="other", flush_cache=False) == (
            200,
            {"success": True, "message": "serving other", "num_paused_requests": 3},
        )
        assert engine.maintenance.calls.pop()[2]["flush_cache"] is False
        status, shown = await post("/update_weights_from_disk", model_path="wrong")
        assert (status, shown["success"]) == (400, False)
        assert "0.weight has shape" in shown["message"]
        assert (await post("/pause_generation"))[1]["status"] == "ok"
        assert (await post("/pause_generation", mode="in_place"))[0] == 200
        assert (await post("/pause_generation", mode="x"))[0] == 400
        assert (await post("/continue_generation"))[0] == 200
        assert (await post("/get_weights_by_name", name="0.weight"))[1] == [[0.5, 1.0]]
        assert (await post("/release_memory_occupation"))[0] == 200
        assert (await post("/resume_memory_occupation", tags=["weights"]))[0] == 200
        assert (await post("/resume_memory_occupation", tags=["all"]))[0] == 400
        assert engine.maintenance.calls == [
            "abort", "in_place", "resume", ("release", ["kv_cache", "weights"]), ("resume", ["weights"])
        ]  # fmt: skip
        assert (await post("/update_weight_version", new_version="7"))[1]["new_version"] == "7"
        assert (await (await client.get("/model_info")).json())["weight_version"] == "7"


async def test_the_routes_want_the_admins_key() -> None:
    async with serving(FakeEngine(), api_key="user", admin_api_key="admin") as client:
        for key, status in (("user", 401), ("admin", 200)):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await client.post("/pause_generation", headers=headers)).status == status
