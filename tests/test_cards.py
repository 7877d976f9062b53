"""`tests.cards` compiles every kernel for the cards that take it: one that it forgets would be seen on a GPU first."""

import importlib
import pkgutil
from types import ModuleType

import pytest
import torch

import kernels
from kernels import (
    few_gemm,
    fp4_experts,
    gated_gemm,
    hopper,
    hopper_latents,
    hopper_prefill,
    one_token,
    quantized_chain,
    quantized_few,
    quantized_many,
    quantized_some,
)
from kernels.attention_batch import HeadRotation
from kernels.launch import Kernel
from kernels.quantized_format import Format
from kernels.quantized_kernel import Kind
from kernels.triton_experts import Codes
from kernels.triton_softmax import Rotated
from tests.card_launches import batch_of, cuda_sources, empty
from tests.cards import CARDS, wanted_on

BF16, CUDA = torch.bfloat16, torch.device("cuda")
hopper_is_available = hopper.is_available.__wrapped__  # without what it remembers


def modules_of(prefix: str = "") -> list[ModuleType]:
    names = [one.name for one in pkgutil.iter_modules(kernels.__path__) if one.name.startswith(prefix)]
    return [importlib.import_module(f"kernels.{name}") for name in names if not name.startswith("flashinfer")]


def all_kernels() -> dict[str, str]:
    """Return the module of each kernel that the host launches."""
    return {
        value.function.__name__: module.__name__
        for module in modules_of("triton_")
        for value in vars(module).values()
        if isinstance(value, Kernel)
    }


def test_every_kernel_is_among_those_that_are_compiled_for_a_card() -> None:
    wanted = {one.function.__name__ for one in wanted_on(CARDS[89])}
    forgotten = {name: module for name, module in all_kernels().items() if name not in wanted}
    assert not forgotten, "tests/card_launches.py launches none of these"


def taken_on_hopper() -> list[tuple[ModuleType, bool]]:
    """Return whether modules that compile Hopper's instructions take what they are made for."""
    qkv, scales = empty(1, 48 * 128, dtype=BF16), empty(64, 4, dtype=BF16)
    q, (k, v) = empty(300, 32, 128, dtype=BF16), empty(2, 1024, 8, 128, dtype=BF16)
    latents = empty(300, 16, 576, dtype=BF16)
    rotated = Rotated(latents[:9, :, 512:], latents[:, 0, 512:])
    rotation = HeadRotation(empty(1, dtype=torch.int32), empty(4096, 128), None, None, 1e-5)
    codes = Codes(empty(64, 16, dtype=torch.int32), 128, "fp4", scales, group_size=32)
    kind = Kind(Format("int4", 128, scale_dtype=BF16), BF16, True, 128, BF16)
    return [
        (few_gemm, few_gemm.can_few_gemm(empty(9, 128, dtype=BF16), empty(1024, 128, dtype=BF16))),
        (fp4_experts, fp4_experts.can_multiply(codes, BF16)),
        (gated_gemm, gated_gemm.can_gated_gemm(empty(9, 128, dtype=BF16), empty(1024, 128, dtype=BF16), "silu")),
        (hopper_latents, hopper_latents.can_decode(latents[:9, :, :512], rotated, latents[:, :1], batch_of(9))),
        (hopper_prefill, hopper_prefill.can_prefill(q, k, v, batch_of(0, (300,)))),
        (hopper_prefill, hopper_prefill.can_prefill_shared(empty(9, 16, 192, dtype=BF16), 128, 64)),
        (one_token, one_token.can_attend_one_token(qkv, rotation, k, v, batch_of(1), 32)),
        (quantized_many, quantized_many.fits_many(kind, 64, None, CUDA)),
        (quantized_some, quantized_some.fits_some(kind, 64, None, 2, CUDA)),
    ]


@pytest.mark.parametrize("number", CARDS)
def test_no_other_card_is_given_hoppers_instructions(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "card_of", lambda device: CARDS[number])
    monkeypatch.setattr(hopper, "has_nvrtc", lambda: True)
    asking = [module for module in modules_of() if vars(module).get("is_available") is hopper.is_available]
    for module in asking:
        monkeypatch.setattr(module, "is_available", lambda device: hopper_is_available(CUDA))
    taken = taken_on_hopper()
    assert {module for module, _ in taken} | {hopper} == set(asking), "what a new kernel takes belongs there, too"
    assert {is_taken for _, is_taken in taken} == {number == 90}
    compiled = {architecture for _, _, architecture, _ in cuda_sources(CARDS[number])}
    assert compiled == {75: set(), 90: {"sm_90", "sm_90a"}}.get(number, {f"sm_{number}"})


@pytest.mark.parametrize("number", CARDS)
def test_weights_of_few_bits_have_kernels_from_ampere_on_and_chains_on_hopper_alone(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (quantized_few, quantized_chain):
        monkeypatch.setattr(module, "card_of", lambda device: CARDS[number])
    monkeypatch.setattr(quantized_few, "has_nvrtc", lambda: True)
    assert quantized_few.can_multiply_few(CUDA) == (number >= 80)
    if number != 90:
        assert not quantized_chain.can_chain([], CUDA)
