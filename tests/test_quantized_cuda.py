"""Weights of few bits in the GPU's layout: each kernel against `QuantizedWeight`, which defines what they stand for.

Triton's kernels run on its interpreter without a GPU; `quantized_few.cu` needs one.
"""

import copy
from typing import Any

import pytest
import torch

from kernels import (
    elementwise,
    quantized_cuda,
    quantized_few,
    quantized_many,
    quantized_some,
    scaled_mm,
    triton_quantized,
)
from kernels.card import HOPPER_SHARED_BYTES, Card
from kernels.hopper import is_available
from kernels.quantized import FP8, Format, QuantizedWeight, quantize_inputs, rounded_inputs
from kernels.quantized_cuda import CudaQuantizedWeight, can_tile
from kernels.quantized_few import MAX_TOKENS, TOKEN_TILES, FewConfig, default_config, source
from kernels.quantized_format import TABLES
from kernels.quantized_kernel import Kind, integers_of
from kernels.quantized_layout import tile_codes
from kernels.quantized_many import MOST_TOKENS, ManyConfig
from kernels.quantized_rows import fits_rows, write_rows
from kernels.quantized_some import HOPPER_SMS, SomeConfig
from kernels.triton_quantized import round_inputs, rounded_values
from kernels.weights import Part
from tests.cards import CARDS
from tests.test_dense import Norm
from tests.test_kernels import DEVICE, EPS, randn

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
WEIGHT_ONLY = {
    "int4 g32": Format("int4", 32, scale_dtype=F16),
    "int4 g128": Format("int4", 128, scale_dtype=BF16),
    "int4 row": Format("int4"),
    "int4 zero": Format("int4", 64, has_zero=True, scale_dtype=F16),
    "int4 minimum": Format("int4", 32, has_minimum=True),
    "nf4": Format("int4", 64, table="nf4"),
    "fp4": Format("int4", 32, table="fp4"),
    "nvfp4": Format("int4", 16, table="fp4"),
    "iq4": Format("int4", 32, table="iq4", scale_dtype=F16),
    "int4 order": Format("int4", 64, has_zero=True, has_order=True, scale_dtype=F16),
    "int8 row": Format("int8"),
    "int8 g16": Format("int8", 16, scale_dtype=F16),
    "int8 minimum": Format("int8", 32, has_minimum=True, scale_dtype=F16),
    "int8 zero": Format("int8", 128, has_zero=True, scale_dtype=F16),
    "fp8": Format("fp8"),
    "fp8 g128": Format("fp8", 128),
}
ROUNDED = {
    "fp8 x fp8": Format("fp8", inputs="fp8"),
    "fp8 x fp8 static": Format("fp8", inputs="fp8", has_input_scale=True),
    "fp8 x fp8 blocks": Format("fp8", 128, inputs="fp8", input_group=128),
    "int8 x int8": Format("int8", inputs="int8"),
    "int4 x fp8": Format("int4", 128, inputs="fp8", scale_dtype=F16),
}
FORMS = WEIGHT_ONLY | ROUNDED
TILED = [name for name in FORMS if FORMS[name].code == "int4" or name in WEIGHT_ONLY]


def make_weight(form: Format, n: int, k: int, dtype: torch.dtype = F32) -> QuantizedWeight:
    """Return a weight of random numbers, of two parts."""
    weight = QuantizedWeight([Part(n - 16), Part(16)], k, dtype, form)
    weight.materialize(torch.device(DEVICE))
    weight.fill_random(torch.Generator(DEVICE).manual_seed(n))
    weight.scale.copy_(weight.scale * (0.5 + torch.rand(weight.scale.shape, device=DEVICE)))
    if form.has_zero:
        weight.fields["zero"].copy_(torch.randint(4, 12, weight.scale.shape, device=DEVICE))
    if form.has_minimum:
        weight.fields["minimum"].copy_(8 * weight.scale * torch.rand(weight.scale.shape, device=DEVICE))
    if form.has_order:
        groups = torch.arange(k, device=DEVICE) // form.group_size_of(k)
        weight.fields["order"].copy_(groups[torch.randperm(k, device=DEVICE)])
    weight.settle()
    return weight


def packed(weight: QuantizedWeight) -> CudaQuantizedWeight:
    assert can_tile(weight)
    return CudaQuantizedWeight(copy.copy(weight))


def assert_near(found: torch.Tensor, wanted: torch.Tensor, eps: float) -> None:
    """Equal up to some roundings of the largest value."""
    assert found.shape == wanted.shape
    difference, largest = (found.float() - wanted.float()).abs().max().item(), wanted.float().abs().max().item()
    print(f"largest difference {difference:.2e} of {largest:.2e}")
    assert difference <= eps * largest


@pytest.mark.parametrize("name", FORMS)
def test_packed_rows_are_the_definition_s(name: str) -> None:
    form = FORMS[name]
    for n, k in ((64, 256),) if form.inputs else ((48, 320), (40, 128)):
        weight = make_weight(form, n, k)
        wanted, gpu = weight.dequantized(), packed(weight)
        eps = 1e-3 if gpu.kind.parameter_dtype == F16 != form.scale_dtype else 1e-6
        assert_near(gpu.rows_of(0), wanted[: n - 16], eps)
        assert_near(gpu.rows_of(1), wanted[n - 16 :], eps)
        ids = torch.tensor([3, 0, n - 1, 3], device=DEVICE)
        assert_near(gpu.lookup(ids), wanted[ids], eps)


@pytest.mark.parametrize("name", FORMS)
def test_products_of_many_tokens_are_the_definition_s(name: str) -> None:
    form, num_tokens = FORMS[name], 70
    n, k = (64, 256) if form.inputs else (48, 320)
    weight = make_weight(form, n, k)
    gpu = packed(weight)
    x, norm, bias, h = randn(num_tokens, k), Norm(randn(k)), randn(n), randn(num_tokens, n)
    eps = 5e-3 if form.inputs else 1e-3  # an input at the edge of two codes may become either
    for keywords in ({}, {"norm": norm}, {"bias": bias}, {"act": "silu"}, {"residual": h}):
        given: dict[str, Any] = keywords
        assert_near(gpu.product(x, **given), weight.product(x, **given), eps)
    before, out = h.clone(), randn(num_tokens, n)
    gpu.product(x, residual=h)
    assert torch.equal(h, before)
    result = gpu.product(x, bias=bias, residual=h, may_overwrite=True)
    assert result.data_ptr() == h.data_ptr()
    assert_near(h, weight.product(x, bias=bias, residual=before), eps)
    assert gpu.product(x, out=out).data_ptr() == out.data_ptr()
    assert_near(out, weight.product(x), eps)
    logits = gpu.logits(x, bias)
    assert logits.dtype == F32
    assert_near(logits, weight.logits(x, bias), eps)


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("to", ["fp8", "int8"])
def test_inputs_are_rounded_as_the_definition_says(to: str, group: int) -> None:
    x, norm = randn(5, 384, scale=3), Norm(randn(384))
    x[0] /= 1000
    x[1, 7] = 1e4  # the others come near the smallest numbers of e4m3
    form = Format("int8" if to == "int8" else "fp8", inputs=to, input_group=group)
    for known in (None, torch.tensor([0.02], device=DEVICE)):
        for normed in (False, True):
            fused: dict[str, Any] = {"norm_weight": norm.weight, "eps": EPS} if normed else {}
            codes, scale = quantize_inputs(norm(x) if normed else x, form, known)
            found, found_scale = round_inputs(x, F32, to=to, group=group, known_scale=known, **fused)
            torch.testing.assert_close(found_scale, scale, rtol=1e-6, atol=0)
            is_same = found == codes.float()
            assert is_same.float().mean() > (0.99 if normed else 0.9999)
            assert ((found - codes.float()).abs() <= (1.001 if to == "int8" else codes.float().abs() / 8 + 0.002)).all()
        found, found_scale = round_inputs(x, F32, to=to, group=group, known_scale=known)
        stands_for = (found.unflatten(1, (found_scale.shape[1], -1)) * found_scale[:, :, None]).flatten(1)
        for dtype in (F32, torch.bfloat16):
            values = rounded_values(x.to(dtype), to=to, group=group, known_scale=known)
            assert values.dtype == dtype
            if dtype == F32:
                assert torch.equal(values, stands_for)
            else:
                assert_near(values.float(), rounded_inputs(x.to(dtype), form, known), 1e-2)  # a code beside
    _, by_group = round_inputs(x, F32, to=to, group=group, is_by_group=True)
    assert torch.equal(by_group, round_inputs(x, F32, to=to, group=group)[1])
    assert by_group.stride() == (1, 8)
    stored, _ = round_inputs(x, torch.int8 if to == "int8" else FP8, to=to, group=group)
    assert torch.equal(stored.float(), round_inputs(x, F32, to=to, group=group)[0])


@pytest.mark.parametrize(("k", "group"), [(64, 128), (192, 96), (200, 96), (72, 96), (96, 128)])
def test_inputs_are_rounded_by_groups_of_any_size(k: int, group: int) -> None:
    x = randn(5, k, scale=3)
    form = Format("fp8", group, inputs="fp8", input_group=group)
    for known in (None, torch.tensor([0.02], device=DEVICE)):
        values = rounded_values(x, to="fp8", group=group, known_scale=known)
        assert values.is_contiguous()
        assert_near(values, rounded_inputs(x, form, known), 1e-2)  # a code beside


def test_weights_that_no_tile_fits_stay_as_they_are() -> None:
    for form, k in ((Format("int8", 48), 96), (Format("int4", 32), 96), (Format("fp8", 32, inputs="fp8"), 128)):
        assert not can_tile(QuantizedWeight([Part(32)], k, F32, form))


def test_codes_take_no_more_memory_in_tiles() -> None:
    weight = make_weight(Format("int4", 32), 64, 256)
    assert tile_codes(weight.form, weight.codes, 256).nbytes == weight.codes.nbytes


def pretend(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_few, "card_of", lambda device: card)
    quantized_few._fitting.cache_clear()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(6144, 4096), (28672, 4096), (4096, 14336), (960, 576), (576, 64), (128256, 4096)])
def test_every_number_of_tokens_has_a_configuration_that_fits(
    shape: tuple[int, int], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(CARDS[90], monkeypatch)
    num_rows, k = shape
    kind = Kind(Format("int4" if bits == 4 else "fp8", 128, scale_dtype=F16), BF16, bits == 4, 128, F16)
    for token_tiles in TOKEN_TILES:
        for is_gated in (0, 1):
            config = default_config(num_rows, k, bits, token_tiles, is_gated)
            assert config.tiles % 2 == 0 or not is_gated
            assert config.split * config.warps_k <= k // 64
            fitting = quantized_few.few_config(kind, num_rows, k, token_tiles, bool(is_gated), torch.device(DEVICE))
            assert fitting or token_tiles == 8
            text = source(kind, token_tiles, config)
            assert ("#define IS_ONE 1" in text) == (token_tiles == 0)
            assert ("#define HAS_DIGITS 1" in text) == (token_tiles == 0 and bits == 4)


@pytest.mark.parametrize("card", [CARDS[number] for number in (80, 86, 90, 100, 120)], ids=lambda card: card.name)
def test_one_token_always_has_a_configuration_that_fits(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(card, monkeypatch)
    for form in (Format("int8", 16), Format("int8", 32, has_minimum=True), Format("int4", 16, table="fp4")):
        kind = Kind(form, BF16, True, form.group_size, F32)
        for num_rows, k in ((4096, 14336), (8192, 28672), (64, 64)):
            config = quantized_few.few_config(kind, num_rows, k, 0, False, torch.device("cpu"))
            assert config and quantized_few.shared_bytes_of(config, kind, 1, k) <= card.shared_bytes
            assert config.split == 1 or card.capability >= (9, 0)


@pytest.mark.parametrize(("number", "codes"), [(75, []), (80, ["int8"]), (86, ["int8"]), (89, ["int8", "fp8"])])
def test_codes_are_multiplied_as_they_are_where_a_card_can(
    number: int, codes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (quantized_cuda, triton_quantized):
        monkeypatch.setattr(module, "card_of", lambda device: CARDS[number])
    device = torch.device("cuda", number)
    assert [code for code in ("int8", "fp8") if quantized_cuda._has_units(code, device)] == codes


def test_products_of_many_fp8_codes_are_the_library_s_where_it_is_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    card = CARDS[90]
    monkeypatch.setattr(scaled_mm, "card_of", lambda device: card)
    monkeypatch.setattr(scaled_mm, "num_sms", lambda device: card.num_sms)
    monkeypatch.setattr(quantized_cuda, "_has_units", lambda *_: True)

    def can(num_tokens: int, n: int = 4096, out: torch.dtype = BF16, groups: int = 1, **added: torch.Tensor) -> bool:
        x, weight = (torch.empty(rows, 256, dtype=FP8) for rows in (num_tokens, n))
        return scaled_mm.can_scaled_mm(x, weight, torch.ones(groups, n), out, **added)

    def added(num_tokens: int) -> torch.Tensor:
        return torch.empty(num_tokens, 4096, dtype=BF16)

    assert can(300) and can(5000) and can(300, bias=torch.ones(4096, dtype=BF16))
    assert can(512, residual=added(512)) and not can(1024, residual=added(1024)), "ours adds it while it writes"
    assert not can(300, out=F16) and not can(300, groups=2) and not can(300, n=4104)
    assert not can(300, bias=torch.ones(4096))
    weight = packed(make_weight(ROUNDED["fp8 x fp8"], 64, 128, BF16))
    assert weight._limits(weight.codes.device, has_many=True, is_plain=True)[1] == quantized_cuda.PLAIN_TOKENS
    assert weight._limits(weight.codes.device, has_many=True, is_plain=False)[1] == quantized_cuda.DIRECT_TOKENS
    card = CARDS[89]
    assert not can(300)
    assert weight._limits(weight.codes.device, has_many=True, is_plain=True)[1] == quantized_cuda.DIRECT_TOKENS


def test_the_library_s_product_of_fp8_codes_is_the_definition_s() -> None:
    x, weight = randn(40, 64).to(FP8), randn(32, 64).to(FP8)
    x_scale, scale = randn(40, 1).abs(), randn(1, 32).abs()
    bias, residual = randn(32, dtype=BF16), randn(40, 32, dtype=BF16)
    wanted = (x.float() * x_scale) @ (weight.float() * scale.t()).t()
    assert_near(scaled_mm.scaled_mm(x, x_scale, weight, scale), wanted, 1e-2)
    result = scaled_mm.scaled_mm(x, x_scale, weight, scale, bias=bias, residual=residual.clone())
    assert_near(result, wanted + bias.float() + residual.float(), 1e-2)


def test_no_part_of_several_tokens_is_taken_for_a_single_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Kernel:
        def launch(self, num_blocks: int, split: int, shared_bytes: int, args: Any, device: torch.device) -> None:
            sizes.append(args[0].num_tokens)

    pretend(CARDS[90], monkeypatch)
    monkeypatch.setattr(quantized_few, "_kernel", lambda *_: Kernel())
    kind, k = Kind(Format("fp8", inputs="fp8"), BF16, False, 0, F32), 14336  # so many columns of 64 tokens fit no block
    codes = torch.zeros(1)
    for num_tokens in range(2, MAX_TOKENS + 1):
        sizes.clear()
        quantized_few.multiply_few(kind, torch.zeros(num_tokens, k, dtype=F16), codes, None, codes, 4096)
        assert sum(sizes) == num_tokens
        assert min(sizes) > 1
    assert len(sizes) == 2


@pytest.mark.parametrize("name", [name for name in FORMS if "order" not in name])
@pytest.mark.parametrize("shape", [(6144, 4096), (28672, 4096), (4096, 14336), (960, 576), (576, 64)])
def test_a_stage_of_many_tokens_is_what_a_copy_may_be(name: str, shape: tuple[int, int]) -> None:
    form, (num_rows, k) = FORMS[name], shape
    is_tiled = form.code == "int4" or form.inputs is None
    kind = Kind(form, BF16, is_tiled, form.group_size, F16 if form.group_size else F32)
    for most_tokens in MOST_TOKENS:
        config = quantized_many.default_config(num_rows, k, 4 if form.code == "int4" else 8, most_tokens, 0)
        config = quantized_many.fitting(config, kind, k)
        assert config.stages >= 2 and config.tokens <= 256
        assert config.split <= -(-k // 128)
        assert quantized_many.shared_bytes(kind, config) <= HOPPER_SHARED_BYTES
        text = quantized_many.source(kind, config)
        assert f'"m64n{config.tokens}k{16 if is_tiled else 32}.' in text
        for num_bytes in quantized_many._box_bytes(kind):
            assert num_bytes % 16 == 0 and num_bytes <= 1024


def test_tables_of_integers_meet_digits_in_their_unit() -> None:
    found = {name: integers_of(name) for name in TABLES}
    assert {name for name, integers in found.items() if integers} == {"fp4", "iq4"}
    for name in ("fp4", "iq4"):
        integers, unit = found[name] or ((), 0.0)
        assert tuple(number * unit for number in integers) == TABLES[name]
    assert integers_of(None) is None


SHAPES = [
    (6144, 4096),
    (28672, 4096),
    (4096, 14336),
    (57344, 8192),
    (8192, 28672),
    (128256, 4096),
    (960, 576),
    (64, 64),
]


@pytest.mark.parametrize("name", [name for name in TILED if "order" not in name])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_stage_of_some_tokens_is_what_a_copy_may_be(name: str, shape: tuple[int, int]) -> None:
    form, (num_rows, k) = FORMS[name], shape
    kind = Kind(form, BF16, True, form.group_size, F32)
    for most_tokens in quantized_some.MOST_TOKENS:
        for is_gated in (0, 1):
            config = quantized_some.default_config(num_rows, k, kind.bits, most_tokens, is_gated)
            config = quantized_some.fitting(config, kind, most_tokens)
            assert config.stages >= 2 and config.warps_k >= 1
            assert config.tiles * config.warps_n % (1 + is_gated) == 0
            assert quantized_some.shared_bytes(kind, config, most_tokens) <= HOPPER_SHARED_BYTES
            pieces, of_stage = (
                quantized_some.pieces_of(kind, k, config),
                quantized_some._box_of_parameters(kind, config),
            )
            assert k // 64 * kind.tile_bytes % pieces.code_bytes == 0
            assert (pieces.param_words or of_stage) <= 256
            if pieces.param_words:
                assert of_stage % pieces.param_words == 0 and of_stage // pieces.param_words <= 256
                assert k // kind.group_size * 2 * kind.parameter_bytes % pieces.param_words == 0
                assert kind.group_size <= 64, "stages of longer groups may begin anywhere"


@pytest.mark.parametrize(
    ("num_rows", "is_gated"), [(6144, 0), (28672, 1), (4096, 0), (10240, 0), (57344, 1), (24576, 1)]
)
def test_every_multiprocessor_has_the_same_share_of_some_tokens_product(num_rows: int, is_gated: int) -> None:
    config = quantized_some.default_config(num_rows, 4096, 4, 16, is_gated)
    num_blocks = -(-num_rows // (16 * config.tiles * config.warps_n))
    assert num_blocks <= HOPPER_SMS
    assert num_blocks >= 0.96 * HOPPER_SMS


GPU_SIZES = [1, 2, 8, 9, 17, 33, 64]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", FORMS)
def test_products_of_few_tokens_are_the_definition_s(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = FORMS[name]
    monkeypatch.setattr(quantized_cuda, "fits_some", lambda *_: False)
    monkeypatch.setattr(CudaQuantizedWeight, "_limits", lambda *_, **__: (MAX_TOKENS, 0))
    for n, k in ((96, 1024), (4096, 2048), (576, 640)):
        weight = make_weight(form, n, k, dtype)
        gpu = packed(weight)
        for num_tokens in GPU_SIZES:
            x, norm, bias = randn(num_tokens, k, dtype=dtype), Norm(randn(k, dtype=dtype)), randn(n, dtype=dtype)
            h = randn(num_tokens, n, dtype=dtype)
            assert gpu._kernel(x, None) == gpu.few
            eps = (2e-2 if form.inputs else 2e-3) + 2 * torch.finfo(dtype).eps
            for keywords in ({}, {"norm": norm}, {"bias": bias}, {"norm": norm, "act": "silu"}, {"residual": h}):
                given: dict[str, Any] = keywords
                assert_near(gpu.product(x, **given), weight.product(x, **given), eps)
            assert_near(gpu.logits(x, bias), weight.logits(x, bias), 2e-2 if form.inputs else 2e-3)
            wanted = weight.product(x, residual=h)
            assert gpu.product(x, residual=h, may_overwrite=True).data_ptr() == h.data_ptr()
            assert_near(h, wanted, eps)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMS)
def test_products_of_more_tokens_are_the_definition_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS[name]
    monkeypatch.setattr(quantized_cuda, "fits_some", lambda *_: False)
    monkeypatch.setattr(CudaQuantizedWeight, "_limits", lambda *_, **__: (0, 1 << 30))
    for dtype, n, k in ((BF16, 96, 1024), (F16, 4096, 2048), (BF16, 576, 640)):
        weight = make_weight(form, n, k, dtype)
        gpu = packed(weight)
        if not is_available(gpu.codes.device):
            pytest.skip("not a Hopper GPU")
        for num_tokens in (2, 16, 17, 33, 100, 129, 300):
            x, norm, bias = randn(num_tokens, k, dtype=dtype), Norm(randn(k, dtype=dtype)), randn(n, dtype=dtype)
            h = randn(num_tokens, n, dtype=dtype)
            assert gpu._kernel(x, "silu") == gpu.many
            eps = (2e-2 if form.inputs else 2e-3) + 2 * torch.finfo(dtype).eps
            for keywords in ({}, {"norm": norm}, {"bias": bias}, {"norm": norm, "act": "silu"}, {"residual": h}):
                given: dict[str, Any] = keywords
                assert_near(gpu.product(x, **given), weight.product(x, **given), eps)
            assert_near(gpu.logits(x, bias), weight.logits(x, bias), 2e-2 if form.inputs else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", TILED)
def test_products_of_some_tokens_are_the_definition_s(name: str, dtype: torch.dtype) -> None:
    form = FORMS[name]
    for n, k in ((96, 1024), (4096, 2048), (576, 640), (14336, 512)):
        weight = make_weight(form, n, k, dtype)
        gpu = packed(weight)
        if not is_available(gpu.codes.device):
            pytest.skip("not a Hopper GPU")
        for num_tokens in (2, 8, 9, 16, 32):
            x, norm, bias = randn(num_tokens, k, dtype=dtype), Norm(randn(k, dtype=dtype)), randn(n, dtype=dtype)
            h = randn(num_tokens, n, dtype=dtype)
            assert gpu._kernel(x, "silu") == gpu.some
            eps = (2e-2 if form.inputs else 2e-3) + 2 * torch.finfo(dtype).eps
            for keywords in ({}, {"norm": norm}, {"bias": bias}, {"norm": norm, "act": "silu"}, {"residual": h}):
                given: dict[str, Any] = keywords
                assert_near(gpu.product(x, **given), weight.product(x, **given), eps)
            assert_near(gpu.logits(x, bias), weight.logits(x, bias), 2e-2 if form.inputs else 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config", [(1, 1, 1, 2), (7, 2, 4, 2), (3, 1, 8, 3), (1, 3, 4, 6), (2, 2, 2, 5), (13, 1, 2, 2)]
)
def test_a_configuration_of_some_tokens_changes_the_speed_only(config: tuple[int, ...]) -> None:
    for name in ("int4 zero", "int4 g128", "int4 minimum", "int4 row", "nvfp4", "int4 x fp8", "int8 g16", "int8 zero"):
        weight = make_weight(FORMS[name], 208, 1152, BF16)
        gpu = packed(weight)
        if not is_available(gpu.codes.device):
            pytest.skip("not a Hopper GPU")
        for num_tokens in (3, 16, 17):
            x, options = randn(num_tokens, 1152, dtype=BF16), dict[str, Any]()
            rounded = x
            if gpu.form.inputs:
                rounded, options["x_scale"] = gpu._rounded(x, None, gpu.kind.input_dtype)
            arguments = gpu.kind, rounded, gpu.codes, gpu.parameters, gpu.scale, 208
            found = quantized_some.multiply_some(*arguments, config=SomeConfig(*config), **options)
            assert_near(found, weight.product(x), 2e-2 + 2 * torch.finfo(BF16).eps)
            again = quantized_some.multiply_some(*arguments, config=SomeConfig(*config), **options)
            assert torch.equal(found, again)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [(16, 1, 2, 1), (16, 1, 12, 2), (16, 4, 3, 2), (32, 2, 4, 8), (64, 2, 6, 3), (128, 2, 3, 1), (256, 2, 3, 1)],
)
def test_a_configuration_of_many_tokens_changes_the_speed_only(config: tuple[int, ...]) -> None:
    for name in ("int4 zero", "int4 g128", "fp8 x fp8", "fp8 x fp8 blocks", "int8 x int8", "int8 minimum", "nvfp4"):
        weight = make_weight(FORMS[name], 208, 1152, BF16)
        gpu = packed(weight)
        if not is_available(gpu.codes.device):
            pytest.skip("not a Hopper GPU")
        for num_tokens in (3, 150):
            x, options = randn(num_tokens, 1152, dtype=BF16), dict[str, Any]()
            rounded = x
            if gpu.form.inputs:
                dtype, is_by_group = gpu.codes.dtype, quantized_many.has_blocks(gpu.kind)
                rounded, options["x_scale"] = gpu._rounded(x, None, dtype, is_by_group=is_by_group)
            found = quantized_many.multiply_many(
                gpu.kind, rounded, gpu.codes, gpu.parameters, gpu.scale, 208, config=ManyConfig(*config), **options
            )
            assert_near(found, weight.product(x), 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", [name for name in WEIGHT_ONLY if "order" not in name])
def test_rows_are_written_as_the_definition_s(name: str, dtype: torch.dtype) -> None:
    for n, k in ((96, 1024), (72, 448), (200, 64)):
        weight = make_weight(FORMS[name], n, k, dtype)
        wanted, gpu = weight.dequantized(), packed(weight)
        assert fits_rows(gpu.kind, gpu.codes.device) == (0 < gpu.kind.group_size < 64)
        for first in (0, 32):
            panel = torch.full((n - first, k), 7.0, dtype=dtype, device=DEVICE)
            assert_near(gpu._dequantized(first, panel), wanted[first:], 2 * torch.finfo(dtype).eps)
            panel.fill_(7.0)
            written = write_rows(gpu.kind, gpu.codes, gpu.parameters, gpu.scale, n, panel, first // 16)
            assert_near(written, wanted[first:], 4 * torch.finfo(dtype).eps)  # a table's numbers are rounded, too


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMS)
def test_products_of_any_number_of_tokens_are_the_definition_s(name: str) -> None:
    for n, k, sizes in ((512, 2048, [16, 17, 31, 64, 65, 200, 600]), (256, 14336, [33])):
        weight = make_weight(FORMS[name], n, k, BF16)
        gpu = packed(weight)
        for num_tokens in sizes:
            x, norm, h = randn(num_tokens, k, dtype=BF16), Norm(randn(k, dtype=BF16)), randn(num_tokens, n, dtype=BF16)
            bias = randn(n, dtype=BF16)
            for keywords in ({"norm": norm}, {"bias": bias}, {"norm": norm, "act": "silu"}, {"residual": h}):
                given: dict[str, Any] = keywords
                assert_near(gpu.product(x, **given), weight.product(x, **given), 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config", [(1, 1, 2, 1, 3), (2, 2, 2, 2, 4), (4, 1, 1, 8, 2), (1, 1, 8, 1, 8), (2, 1, 12, 1, 3, 2)]
)
def test_a_configuration_changes_the_speed_only(config: tuple[int, ...]) -> None:
    for name in ("int4 zero", "fp8", "fp8 x fp8 blocks", "int8 minimum"):
        weight = make_weight(FORMS[name], 208, 1152, BF16)
        gpu = packed(weight)
        for num_tokens in (1, 3, 21):
            x = randn(num_tokens, 1152, dtype=BF16)
            rounded, x_scale = x, gpu.input_scale
            if gpu.form.inputs and num_tokens > 1:
                rounded, x_scale = gpu._rounded(x, None, gpu.kind.input_dtype)
            found = quantized_few.multiply_few(
                gpu.kind, rounded, gpu.codes, gpu.parameters, gpu.scale, 208, x_scale=x_scale, config=FewConfig(*config)
            )
            assert_near(found, weight.product(x), 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int4 g128", "int4 zero"])
def test_a_token_s_largest_input_does_not_drown_the_others(name: str) -> None:
    weight = make_weight(FORMS[name], 208, 1152, BF16)
    x = randn(1, 1152, dtype=BF16)
    x[0, 130] = 500.0
    wanted = weight.logits(x)
    assert_near(packed(weight).logits(x), wanted, 5e-4)


@pytest.mark.gpu
def test_a_token_s_product_is_the_same_bits_in_every_replay_of_a_graph() -> None:
    weight = packed(make_weight(FORMS["int4 g128"], 512, 4096, BF16))
    x, norm = randn(20, 4096, dtype=BF16), Norm(1 + randn(4096, dtype=BF16) / 10)
    first = [weight.product(x[:size], norm=norm) for size in (1, 5, 20)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = [weight.product(x[:size], norm=norm) for size in (1, 5, 20)]
        many = weight.product(x.repeat(60, 1), norm=norm)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.testing.assert_close(many[:5], again[1], rtol=2e-2, atol=2e-2)


def test_the_kernel_s_norms_are_the_layer_s() -> None:
    x, norm = randn(2, 64), Norm(randn(64))
    assert torch.equal(norm(x), elementwise.rms_norm(x, norm.weight, EPS))
