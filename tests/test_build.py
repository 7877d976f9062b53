"""What is decided at start from the flags and the machine, and said."""

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from engine.build import build
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.machine import describe_backends, resolve_config
from engine.model_files import load_model_files
from engine.sizes import CUDA_MAX_STEP_MS
from engine.step.batch import Stager
from engine.step.model_runner import _new_stream
from engine.step.warmup import _run_prompts
from engine.text.tokenizer import Tokenizer
from kernels import flashinfer_attention, hopper
from kernels.attention import choose_backend
from tests.cards import CARDS
from tests.quantized_files import CASES, write_quantized
from tests.test_engine import NUM_NEW_TOKENS, collect, make_state, running_engine
from tests.test_mla import FAMILIES as LATENT

CUDA = torch.device("cuda", 0)


def resolve(**options: Any) -> EngineConfig:
    return resolve_config(EngineConfig(**({"device": "cpu"} | options)))


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look like a machine with a large GPU and without FlashInfer to the choices at start."""

    class Properties:
        total_memory, major, minor = 80 << 30, 8, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr("engine.machine.card_of", lambda device: CARDS[80])
    monkeypatch.setattr(hopper, "is_available", lambda device: False)
    monkeypatch.setattr(flashinfer_attention, "is_available", lambda: (False, "flashinfer cannot be imported"))


def test_a_missing_flashinfer_is_a_warning_and_triton(one_gpu: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = resolve(device="cuda", attention_backend="flashinfer")
    assert config.attention_backend == "triton"
    assert describe_backends(config, CUDA)["attention"].startswith("Triton")
    assert "triton serves instead: flashinfer cannot be imported" in caplog.text


def test_a_flashinfer_that_can_run_serves_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_attention, "is_available", lambda: (True, ""))
    assert choose_backend("flashinfer", CUDA) == "flashinfer"
    assert choose_backend(None, CUDA) == "triton"


def test_sglangs_default_for_sampling_is_taken_and_what_serves_in_its_place_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert resolve(sampling_backend="flashinfer").sampling_backend == "triton"
    assert "'flashinfer' is not used: Triton" in caplog.text


@pytest.mark.parametrize(
    ("options", "operation", "said"),
    [
        ({}, "attention", "Triton"),
        ({"attention_backend": "torch"}, "attention", "as asked"),
        ({}, "sampling", "Triton"),
        ({"sampling_backend": "pytorch"}, "sampling", "torch (as asked)"),
        ({"sampling_backend": "flashinfer"}, "sampling", "Triton"),
        ({}, "steps", "CUDA graphs"),
        ({"disable_cuda_graph": True}, "steps", "as asked"),
        ({"attention_backend": "torch"}, "steps", "kernel by kernel"),
        ({}, "kernels by the limits of", "A100, compute capability 8.0, 163 KiB of shared memory"),
    ],
)
def test_what_serves_each_operation_is_said_with_the_reason(
    one_gpu: None, options: dict[str, Any], operation: str, said: str
) -> None:
    assert said in describe_backends(resolve(device="cuda", **options), CUDA)[operation]


def test_what_a_card_lacks_is_said() -> None:
    assert "bfloat16" in CARDS[75].describe()
    assert CARDS[86].describe().endswith("without FP8 in hardware, our CUDA kernels for Hopper")
    assert "without" not in CARDS[90].describe()
    assert CARDS[120].describe().endswith("99 KiB of shared memory a block; without our CUDA kernels for Hopper")


def test_steps_that_may_be_split_are_said(one_gpu: None) -> None:
    said = describe_backends(resolve(device="cuda"), CUDA, has_corun=True)["steps"]
    assert "beside gate and up" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 0}, "--page-size must be at least 1, got 0"),
        ({"max_running_requests": -3}, "--max-running-requests must be at least 1, got -3"),
        ({"max_running_requests": 0}, "--max-running-requests must be at least 1, got 0"),
        ({"max_queued_requests": -1}, "--max-queued-requests must be at least 0, got -1"),
        ({"max_queued_tokens": -1}, "--max-queued-tokens must be at least 0, got -1"),
        ({"max_total_tokens": 0}, "--max-total-tokens"),
        ({"stream_interval": 0}, "--stream-interval"),
        ({"tp_size": 0}, "--tp-size"),
        ({"cuda_graph_max_bs": 0}, "--cuda-graph-max-bs"),
        ({"cuda_graph_bs": [4, 0]}, "--cuda-graph-bs"),
        ({"max_step_ms": -1.0}, "--max-step-ms must not be negative, got -1"),
    ],
)
def test_a_number_that_cannot_be_is_refused_by_its_flag(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(**options)


def test_no_graph_is_made_for_more_requests_than_run_at_once() -> None:
    assert resolve(max_running_requests=24, cuda_graph_bs=[64, 4, 16, 32]).cuda_graph_bs == [4, 16, 24]
    assert resolve(max_running_requests=24, cuda_graph_max_bs=512).cuda_graph_max_bs == 24
    assert resolve(max_running_requests=24, cuda_graph_max_bs=8).cuda_graph_max_bs == 8


def test_steps_on_a_gpu_have_a_time_limit_unless_it_is_taken_away(one_gpu: None) -> None:
    assert resolve(device="cuda").max_step_ms == CUDA_MAX_STEP_MS
    assert resolve(device="cuda", max_step_ms=25.0).max_step_ms == 25
    assert resolve(device="cuda", max_step_ms=0.0).max_step_ms == 0
    assert resolve().max_step_ms is None


def test_a_cache_that_kernels_cannot_read_on_a_gpu_is_refused_with_one_that_they_can(one_gpu: None) -> None:
    with pytest.raises(ModelError, match=r"fp8_e4m3 needs .* 8\.9, this one has 8\.0: fp8_e5m2"):
        resolve(device="cuda", kv_cache_dtype="fp8_e4m3")
    assert resolve(device="cuda", kv_cache_dtype="fp8_e5m2").kv_cache_dtype == "fp8_e5m2"


def test_what_is_decided_stays_decided(one_gpu: None) -> None:
    config = resolve(device="cuda", max_step_ms=0.0, cuda_graph_bs=[1, 2000], chunked_prefill_size=-1, random_seed=1)
    assert resolve_config(config) == config


def model_with(folder: Path, source: Path, added: Sequence[str], eos_token: str | None, eos_token_id: Any) -> Path:
    """Write config and tokenizer of `source` with other end tokens: added tokens of these texts from number 300 on."""
    raw = json.loads((source / "config.json").read_text()) | {"vocab_size": 400, "eos_token_id": eos_token_id}
    (folder / "config.json").write_text(json.dumps(raw))
    tokenizer = (source / "tokenizer.json").read_text().replace("<|im_end|>", "<|2|>")
    (folder / "tokenizer.json").write_text(tokenizer)
    tokens = {str(300 + i): {"content": text, "special": True} for i, text in enumerate(added)}
    config = {"added_tokens_decoder": tokens} | ({"eos_token": eos_token} if eos_token else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("added", "eos_token", "ends"),
    [
        (["<turn>"], "<turn>", ["<turn>"]),
        (["<|im_start|>", "<|im_end|>"], None, ["<|im_end|>"]),
        (["<|eot_id|>", "<|eom_id|>", "<|python_tag|>"], "<|eot_id|>", ["<|eot_id|>", "<|eom_id|>"]),
        (["<|user|>", "<|end|>"], None, ["<|end|>"]),
        (["<|start|>", "<|end|>", "<|return|>", "<|call|>"], "<|return|>", ["<|return|>", "<|call|>"]),
        (["<eos>", "<end_of_turn>"], "<eos>", ["<eos>", "<end_of_turn>"]),
    ],
)
def test_an_answer_ends_where_the_tokenizer_says_or_a_turn_does_beside_where_the_config_says(
    added: list[str], eos_token: str | None, ends: list[str], tiny_llama: Path, tmp_path: Path
) -> None:
    folder = model_with(tmp_path, tiny_llama, added, eos_token, 5)
    model_config, tokenizer = load_model_files(folder, EngineConfig())
    assert set(model_config.eos_token_ids) == {5, *(tokenizer.token_to_id(text) for text in ends)}


def test_an_override_of_the_end_is_the_only_end(tiny_llama: Path, tmp_path: Path) -> None:
    folder = model_with(tmp_path, tiny_llama, ["<|im_end|>"], "<|im_end|>", 5)
    config = EngineConfig(json_model_override_args='{"eos_token_id": 7}')
    assert load_model_files(folder, config)[0].eos_token_ids == (7,)


def test_a_model_without_an_end_is_a_warning_that_says_what_to_do(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = model_with(tmp_path, tiny_llama, [], None, None)
    with caplog.at_level(logging.WARNING):
        assert load_model_files(folder, EngineConfig())[0].eos_token_ids == ()
    assert "no token is known to end an answer" in caplog.text
    assert "--json-model-override-args" in caplog.text


def test_the_tokenizer_is_seen_before_the_weights_are_loaded(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object) -> None:
        raise AssertionError("the weights come last")

    def refuse(tokenizer: Tokenizer) -> None:
        raise ModelError(f"{tokenizer.vocab_size} tokens")

    monkeypatch.setattr("engine.build.load_weights", load)
    with pytest.raises(ModelError, match=r"\d+ tokens"):
        build(EngineConfig(model_path=str(tiny_llama), device="cpu"), print, on_tokenizer=refuse)


async def test_steps_of_a_warm_up_leave_no_slots_behind_which_a_smaller_pool_lacks(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    async with running_engine(tiny_llama) as engine:
        runner = engine.parts.runner
        _run_prompts(runner, [24], num_samples=1)
        assert runner.kv[0].k[24].any(), "the step was meant to write to slot 24"
        assert not runner.stager.slot_table.any(), "a context of padding would be read from there"


def test_steps_begin_when_what_was_enqueued_before_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, priority: int) -> None:
            self.waits_for: list[str] = []

        def wait_stream(self, other: str) -> None:
            self.waits_for.append(other)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "that of the tables' zeros")
    assert cast(Any, _new_stream()).waits_for == ["that of the tables' zeros"]


@pytest.mark.gpu
async def test_a_start_waits_for_its_tables_however_late_they_are_made(
    make_tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def late(*arguments: Any) -> Stager:
        torch.cuda._sleep(1 << 30)  # half a second
        return Stager(*arguments)

    monkeypatch.setattr("engine.build.Stager", late)
    name, sizes = LATENT["deepseek v3"]  # whose prompts' steps read lengths and slots at once
    folder = make_tiny_model(getattr(transformers, name), "late", random_norms=True, **sizes)
    async with running_engine(folder, device="cuda") as engine:
        _, tokens = await collect(engine, make_state([5, 6, 7]))
        assert len(tokens) == NUM_NEW_TOKENS


@pytest.mark.gpu
async def test_layers_in_formats_of_their_own_have_their_kernels_before_a_graph_is_captured(
    make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import LlamaConfig

    folder = make_tiny_model(LlamaConfig, "formats", hidden_size=128, intermediate_size=256, head_dim=32)
    write_quantized(folder, CASES["awq but for some modules"], tmp_path / "quantized")
    async with running_engine(tmp_path / "quantized", device="cuda", dtype="bfloat16") as engine:
        _, tokens = await collect(engine, make_state([5, 6, 7]))
        assert len(tokens) == NUM_NEW_TOKENS
