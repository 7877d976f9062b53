"""What is decided at start from the flags and the machine, and said."""

import logging
from typing import Any

import pytest
import torch

from engine.build import describe_backends, resolve_config
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.sizes import CUDA_MAX_STEP_MS
from kernels import flashinfer_attention, gated_gemm
from kernels.attention import choose_backend

CUDA = torch.device("cuda", 0)


def resolve(**options: Any) -> EngineConfig:
    return resolve_config(EngineConfig(**({"device": "cpu"} | options)))


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look like a machine with a large GPU and without FlashInfer to the choices at start."""

    class Properties:
        total_memory = 80 << 30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(gated_gemm, "is_available", lambda device: False)
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
    ],
)
def test_what_serves_each_operation_is_said_with_the_reason(
    one_gpu: None, options: dict[str, Any], operation: str, said: str
) -> None:
    assert said in describe_backends(resolve(device="cuda", **options), CUDA)[operation]


def test_steps_that_may_be_split_are_said(one_gpu: None) -> None:
    said = describe_backends(resolve(device="cuda"), CUDA, has_corun=True)["steps"]
    assert "beside gate and up" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 0}, "--page-size must be at least 1, got 0"),
        ({"max_running_requests": -3}, "--max-running-requests must be at least 1, got -3"),
        ({"max_running_requests": 0}, "--max-running-requests must be at least 1, got 0"),
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


def test_what_is_decided_stays_decided(one_gpu: None) -> None:
    config = resolve(device="cuda", max_step_ms=0.0, cuda_graph_bs=[1, 2000], chunked_prefill_size=-1, random_seed=1)
    assert resolve_config(config) == config
