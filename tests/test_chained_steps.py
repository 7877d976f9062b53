"""Steps of one token whose products are chained have the numbers of the blocks that they stand for.

The kernel itself needs a GPU of Hopper's: without one, products are computed one after another in its place.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.step import chained
from engine.step.chained import ChainedSteps
from kernels import quantized_chain
from kernels.card import HOPPER_SHARED_BYTES
from kernels.hopper import is_available
from kernels.quantized import QuantizedWeight
from kernels.quantized_chain import (
    ChainConfig,
    ChainedProduct,
    can_chain,
    chain_config,
    kinds_of,
    multiply_chain,
    shared_bytes,
)
from tests.cards import CARDS
from tests.test_dense import Norm
from tests.test_kernels import DEVICE, randn
from tests.test_models import MakeTinyModel, ShorterSteps, TinyEngine, random_ids
from tests.test_quantized_cuda import BF16, F16, FORMS, assert_near, make_weight, packed

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {},  # norms of heads
    "Qwen2": {},  # biases
    "Mistral": {"sliding_window": 8},
}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
CHAINED = ["int4 g128", "int4 zero", "fp8 x fp8", "fp8 x fp8 static", "int8 x int8", "int4 minimum", "int4 g32"]
CHAINED += ["int8 row", "int8 g16", "int8 zero", "iq4", "nvfp4"]
CHAINED += ["int4 minimum, int4 minimum, int8 g16, int8 minimum"]


@pytest.fixture(scope="module")
def folders(make_tiny_model: MakeTinyModel) -> dict[str, Path]:
    """Return a checkpoint of each family, and of one with other blocks."""
    import transformers

    made = FAMILIES | {"Gemma2": {}}
    return {
        name: make_tiny_model(getattr(transformers, f"{name}Config"), f"chained_{name}", **SIZES, **more)
        for name, more in made.items()
    }


def one_after_another(products: Sequence[ChainedProduct], _arrivals: torch.Tensor, **_options: Any) -> None:
    for weight, x, out, bias, norm, act, is_sum in products:
        residual = out.clone() if is_sum else None
        out.copy_(weight.product(x, bias=bias, norm=norm, act=act, residual=residual))


@pytest.fixture
def on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chain weights as they are defined, on whatever device they are."""
    monkeypatch.setattr(chained, "CudaQuantizedWeight", QuantizedWeight)
    monkeypatch.setattr(chained, "can_chain", lambda *_: True)
    monkeypatch.setattr(chained, "multiply_chain", one_after_another)
    monkeypatch.setattr(chained, "kinds_of", lambda _: ())


def engine_of(folder: Path, quantization: str | None = "int4") -> Any:
    return TinyEngine(folder, dtype=BF16, quantization=quantization)


@pytest.mark.usefixtures("on_any_device")
@pytest.mark.parametrize("name", FAMILIES)
def test_single_tokens_are_what_the_blocks_make_of_them(name: str, folders: dict[str, Path]) -> None:
    prompts = {0: random_ids(12, 0), 1: random_ids(2, 1)}
    plain, fast = engine_of(folders[name]), engine_of(folders[name])
    fast.model = ShorterSteps(fast, ChainedSteps.of(fast.model, torch.device("cpu")))
    assert torch.equal(fast.forward(prompts), plain.forward(prompts))
    for token, rows in enumerate(([0], [0, 1], [1], [0])):
        step = {row: [token + row] for row in rows}
        assert torch.equal(fast.forward(step), plain.forward(step)), f"rows {rows}"
    assert fast.model.sizes == [1, 1, 1]


@pytest.mark.usefixtures("on_any_device")
def test_other_blocks_and_weights_are_not_chained(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    engine = engine_of(folders["Llama"])
    assert ChainedSteps.of(engine.model, device) is not None
    dense = engine_of(folders["Llama"], None).model.model.layers[1].self_attn.o_proj.weight
    monkeypatch.setattr(engine.model.model.layers[1].self_attn.o_proj, "weight", dense)
    assert ChainedSteps.of(engine.model, device) is None
    assert ChainedSteps.of(engine_of(folders["Gemma2"]).model, device) is None
    monkeypatch.setattr(chained, "can_chain", can_chain)
    assert ChainedSteps.of(engine_of(folders["Llama"]).model, device) is None


def test_weights_of_kinds_in_tiles_are_chained_where_a_block_has_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = torch.device(DEVICE)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(quantized_chain, "can_multiply_few", lambda _: True)
    monkeypatch.setattr(quantized_chain, "card_of", lambda _: CARDS[90])
    monkeypatch.setattr(quantized_chain, "LEAST_BYTES", 64 * 256 // 2)
    chain_config.cache_clear()
    pair = [packed(make_weight(FORMS["int4 zero"], 64, k, BF16)) for k in (256, 512)]
    assert can_chain(pair, device)
    other = packed(make_weight(FORMS["int4 g128"], 64, 256, BF16))
    assert can_chain([*pair, other], device)
    assert not can_chain([*pair, packed(make_weight(FORMS["nf4"], 64, 256, BF16))], device), "no integers"
    assert not can_chain([*pair, packed(make_weight(FORMS["int4 order"], 64, 256, BF16))], device)
    assert not can_chain([pair[0], packed(make_weight(FORMS["int4 zero"], 64, 128, BF16))], device), "they are small"
    assert not can_chain([packed(make_weight(FORMS["fp8 x fp8 blocks"], 64, 256, BF16))], device)
    rounded = [packed(make_weight(FORMS["fp8 x fp8"], 64, k, BF16)) for k in (256, 512, 320)]
    assert can_chain(rounded[:2], device)
    assert not can_chain([pair[0], rounded[0]], device), "a ring has tiles or rows"
    assert not can_chain(rounded, device), "a warpgroup multiplies 128 columns"
    assert not can_chain([packed(make_weight(FORMS["int4 zero"], 64, k, torch.float32)) for k in (256, 512)], device)
    (tmp_path / "control").touch()
    assert not can_chain(pair, device), "another process may have a chain, too"
    (tmp_path / "control").unlink()
    finest = packed(make_weight(FORMS["int8 g16"], 64, 256, BF16))
    for weights in ([pair[0]], [rounded[0]], [finest], [pair[0], finest]):
        kinds = kinds_of(weights)
        for k in (4096, 14336, 28672):
            config = chain_config(kinds, k, device)
            assert config is not None
            assert shared_bytes(kinds, config, k) <= HOPPER_SHARED_BYTES
    assert chain_config((pair[0].kind,), 1 << 17, device) is None
    for capability in (80, 100):
        monkeypatch.setattr(quantized_chain, "card_of", lambda _, card=CARDS[capability]: card)
        assert not can_chain(pair, device)
    chain_config.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not is_available(torch.device(DEVICE)), reason="needs a GPU of Hopper's")
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", CHAINED)
def test_a_chain_is_its_products_one_after_another(name: str, dtype: torch.dtype) -> None:
    hidden, inner = 1024, 1408
    shapes = (hidden, 512), (2 * inner, hidden), (hidden, inner), (1536, hidden)
    forms = [FORMS[form] for form in name.split(", ")]
    forms = forms if len(forms) > 1 else 4 * forms
    plain = [make_weight(form, n, k, dtype) for form, (n, k) in zip(forms, shapes, strict=True)]
    chained_weights = [packed(weight) for weight in plain]
    norms = [Norm(randn(hidden, dtype=dtype)), Norm(randn(hidden))]
    x, h, bias = randn(1, 512, dtype=dtype), randn(1, hidden, dtype=dtype), randn(1536, dtype=dtype)
    arrivals = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def computed(run: Any, weights: Sequence[Any], *config: ChainConfig) -> list[torch.Tensor]:
        sums, middle, last = h.clone(), h.new_empty(1, inner), h.new_empty(1, 1536)
        run([
            ChainedProduct(weights[0], x, sums, is_sum=True),
            ChainedProduct(weights[1], sums, middle, norm=norms[0], act="silu"),
            ChainedProduct(weights[2], middle, sums, is_sum=True),
            ChainedProduct(weights[3], sums, last, bias, norm=norms[1]),
        ], arrivals, *config)  # fmt: skip
        return [middle, sums, last]

    wanted = computed(one_after_another, plain)
    first = computed(multiply_chain, chained_weights)
    for found, expected in zip(first, wanted, strict=True):
        assert_near(found, expected, 3e-2)
    for _ in range(20):  # blocks come in another order each time
        assert all(map(torch.equal, computed(multiply_chain, chained_weights), first))
    for config in (ChainConfig(2, 4, 1, 3), ChainConfig(4 if chained_weights[0].kind.is_tiled else 2, 8, 2, 2)):
        for found, expected in zip(computed(multiply_chain, chained_weights, config), wanted, strict=True):
            assert_near(found, expected, 3e-2)
