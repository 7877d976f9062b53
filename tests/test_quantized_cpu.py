"""Products of weights of few bits on a CPU: those of the definition, compiled or not, whatever stands beside them."""

import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import cpp, dense, products_cpu, quantized_cpu
from kernels.dense import DenseWeight
from kernels.elementwise import act_and_mul
from kernels.products_cpu import CpuNumbersWeight, Kernels, load_kernels
from kernels.quantized import Format, QuantizedWeight
from kernels.quantized_cpu import CpuQuantizedWeight, pack_for_cpu
from kernels.weights import Part
from kernels.widened import WidenedWeight
from tests.test_dense import Norm
from tests.test_kernels import randn

HALF = torch.float16
FORMATS = {
    "Q4_0": Format("int4", 32, scale_dtype=HALF),
    "Q4_1": Format("int4", 32, has_minimum=True, scale_dtype=HALF),
    "Q8_0": Format("int8", 32, scale_dtype=HALF),
    "Q6_K": Format("int8", 16),
    "Q5_K": Format("int8", 32, has_minimum=True),
    "AWQ": Format("int4", 64, has_zero=True, scale_dtype=torch.bfloat16),
    "int4 rows": Format("int4"),
    "int8 rows": Format("int8", has_zero=True),
    "NF4": Format("int4", 64, table="nf4"),
    "bitsandbytes' FP4": Format("int4", 64, table="bnb_fp4"),
    "NVFP4": Format("int4", 16, table="fp4"),
    "IQ4": Format("int4", 32, table="iq4", scale_dtype=HALF),
    "FP8": Format("fp8", 128),
    "FP8 x FP8": Format("fp8", inputs="fp8"),
    "W8A8": Format("int8", inputs="int8", has_input_scale=True),
    "desc_act": Format("int4", 32, has_zero=True, has_order=True),
}
K, N = 288, 44  # of groups of 128 and 64 the last one is cut


MARCHES = {"native": "DEFAULT", "haswell": "AVX2", "skylake-avx512": "AVX512"}  # and what torch says of such a CPU
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")


@functools.cache
def kernels_for(march: str) -> Kernels:
    has = torch.backends.cpu.get_cpu_capability()
    if has not in CAPABILITIES or CAPABILITIES.index(has) < CAPABILITIES.index(MARCHES[march]):
        pytest.skip(f"needs {MARCHES[march]}")
    kernels = load_kernels(march)
    if kernels is None:
        pytest.skip("needs a C++ compiler")
    return kernels


def make_weight(
    form: Format, n: int = N, k: int = K, dtype: torch.dtype = torch.float32, num_parts: int = 1
) -> QuantizedWeight:
    weight = QuantizedWeight([Part(n // num_parts)] * num_parts, k, dtype, form)
    weight.materialize(torch.device("cpu"))
    weight.fill_random(torch.Generator().manual_seed(n + k))
    for field, tensor in weight.fields.items():
        noise = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(len(field)))
        if field == "scale":
            tensor.mul_(noise + 0.5)
        elif field == "minimum":
            tensor.copy_(noise * 0.05)
        elif field == "zero":
            tensor.copy_((noise * 16).floor())
    return weight


def products(weight: QuantizedWeight, x: torch.Tensor, **keywords: Any) -> torch.Tensor:
    """Return the definition's product, in float64."""
    with_inputs = weight._sums(x, None) if weight.form.inputs else None
    sums = x.double() @ weight.dequantized().double().t() if with_inputs is None else with_inputs.double()
    if (bias := keywords.get("bias")) is not None:
        sums = sums + bias
    if act := keywords.get("act"):
        sums = act_and_mul(sums, act)
    if (residual := keywords.get("residual")) is not None:
        sums = sums + residual
    return sums


def assert_close(found: torch.Tensor, wanted: torch.Tensor, detail: str, error: float = 3e-6) -> None:
    """Assert that `found` is `wanted`, but for sums in another order, of `error` of the largest, and one rounding."""
    bound = error * wanted.abs().max() + 0.51 * torch.finfo(found.dtype).eps * wanted.abs()
    assert ((found.double() - wanted).abs() <= bound).all(), f"{detail}: {(found.double() - wanted).abs().max()}"


def error_of(kernels: Kernels) -> float:
    """Return the part of the largest result by which those of 16-bit inputs are wrong: AVX2 rounds their last bits."""
    return 1e-5 if kernels.lanes == 8 else 3e-6


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("name", FORMATS)
def test_compiled_products_are_those_of_the_definition(name: str, march: str) -> None:
    weight = make_weight(FORMATS[name])
    weight.settle()
    packed, wide = CpuQuantizedWeight(weight, kernels_for(march)), randn(70, K)
    bias = randn(N)
    for num_tokens in (1, 2, 3, 4, 5, 16, 70):
        x, residual, half = wide[:num_tokens], randn(num_tokens, N), randn(num_tokens, N // 2)
        cases: list[dict[str, Any]] = [
            {}, {"bias": bias}, {"residual": residual}, {"act": "silu"}, {"act": "gelu"},
            {"act": "relu2", "bias": bias}, {"act": "gelu_tanh", "residual": half},
        ]  # fmt: skip
        for keywords in cases:
            found, wanted = packed.product(x, **keywords), products(weight, x, **keywords)
            assert_close(found, wanted, f"{num_tokens} tokens, {list(keywords)}")
        assert_close(packed.logits(x, bias), products(weight, x, bias=bias), "logits")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("march", MARCHES)
def test_sixteen_bits_are_rounded_once_and_norms_as_elsewhere(march: str, dtype: torch.dtype) -> None:
    x, h = randn(9, K, dtype=dtype), randn(9, N, dtype=dtype)
    weight, kernels = make_weight(FORMATS["Q4_1"], dtype=dtype), kernels_for(march)
    packed, bias, error = CpuQuantizedWeight(weight, kernels), randn(N, dtype=dtype), error_of(kernels)
    for keywords in ({}, {"bias": bias}, {"residual": h}, {"act": "silu"}):
        found = packed.product(x, **keywords)
        assert found.dtype == dtype
        assert_close(found, products(weight, x, **keywords), str(list(keywords)), error)
    assert packed.logits(x).dtype == torch.float32
    assert_close(packed.logits(x), products(weight, x), "logits", error)
    for norm_weight in (randn(K, dtype=dtype), randn(K), None):
        norm = Norm(randn(K, dtype=dtype) if norm_weight is None else norm_weight, is_rms=norm_weight is not None)
        wanted = packed.product(norm(x))
        assert (packed.product(x, norm=norm) - wanted).abs().max() <= 4 * torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "AWQ", "int8 rows", "NF4", "NVFP4", "FP8", "W8A8"])
def test_a_tokens_results_are_the_same_bits_alone_beside_others_and_in_chunks(name: str, march: str) -> None:
    weight = make_weight(FORMATS[name], n=320, k=1536)
    packed = CpuQuantizedWeight(weight, kernels_for(march))
    for dtype in (torch.float32, torch.bfloat16):
        x, h, norm = randn(300, 1536, dtype=dtype), randn(300, 160, dtype=dtype), Norm(randn(1536, dtype=dtype))
        whole = packed.product(x, norm=norm, act="silu", residual=h)
        for size in (1, 3, 7, 129):
            parts = [
                packed.product(x[i : i + size], norm=norm, act="silu", residual=h[i : i + size])
                for i in range(0, 300 if size > 1 else 20, size)
            ]
            assert torch.equal(torch.cat(parts), whole[: sum(map(len, parts))]), f"{dtype}, chunks of {size}"


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("name", FORMATS)
def test_bfloat16_meets_the_unrounded_weights(name: str, march: str) -> None:
    weight, wide = make_weight(FORMATS[name], dtype=torch.bfloat16), randn(70, K, dtype=torch.bfloat16)
    weight.settle()
    packed, error = CpuQuantizedWeight(weight, kernels_for(march)), error_of(kernels_for(march))
    for num_tokens in (1, 2, 3, 4, 15, 16, 17, 70):
        x = wide[:num_tokens]
        assert_close(packed.logits(x), products(weight, x), f"{num_tokens} tokens", error)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "Q6_K", "AWQ", "int4 rows"])
def test_integers_meet_inputs_as_they_are_where_these_are_alike_in_size(name: str) -> None:
    """Eight bits of an input are whole in 16 beside others of up to 128 times its size."""
    weight, kernels = make_weight(FORMATS[name], dtype=torch.bfloat16), kernels_for("haswell")
    x = randn(11, K).sign() * torch.rand(11, K, generator=torch.Generator().manual_seed(1)).clamp(min=2**-7)
    packed, x = CpuQuantizedWeight(weight, kernels), x.bfloat16()
    assert_close(packed.logits(x), products(weight, x), name, 1e-6)


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("name", ["Q4_1", "Q8_0"])
def test_inputs_of_any_size_are_multiplied_and_numbers_that_are_none_seen(name: str, march: str) -> None:
    packed = CpuQuantizedWeight(make_weight(FORMATS[name], dtype=torch.bfloat16), kernels_for(march))
    x = randn(3, K, dtype=torch.bfloat16)
    for size in (2.0**-60, 2.0**60):
        torch.testing.assert_close(packed.logits(x * size), packed.logits(x) * size, rtol=1e-5, atol=1e-5 * size)
    assert not packed.logits(torch.zeros_like(x)).any()
    x[1, 40] = torch.nan
    x[2, 41] = torch.inf
    found = packed.logits(x)
    assert found[0].isfinite().all() and found[1].isnan().all() and not found[2].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("march", MARCHES)
def test_numbers_of_16_bits_are_multiplied_in_float32(march: str, dtype: torch.dtype) -> None:
    data, wide, residual = randn(N, K, dtype=dtype), randn(70, K, dtype=dtype), randn(70, N, dtype=dtype)
    weight = CpuNumbersWeight(DenseWeight.of(data), data, kernels_for(march))
    bias, norm, sums = randn(N, dtype=dtype), Norm(randn(K, dtype=dtype)), wide.double() @ data.double().t()
    whole = weight.product(wide, norm=norm, act="silu")
    for num_tokens in (1, 2, 3, 4, 8, 19, 70):
        x, h, wanted = wide[:num_tokens], residual[:num_tokens], sums[:num_tokens]
        assert_close(weight.logits(x), wanted, f"{num_tokens} tokens")
        assert_close(weight.product(x, bias=bias, residual=h), wanted + bias + h, f"{num_tokens} tokens")
        assert_close(weight.product(x, act="relu"), act_and_mul(wanted, "relu"), f"{num_tokens} tokens")
        assert torch.equal(weight.product(x, norm=norm, act="silu"), whole[:num_tokens])
    assert_close(weight.product(wide, norm=norm), weight.product(norm(wide)).double(), "norm", 1e-2)
    assert torch.equal(weight.rows_of(0), data) and dict(weight.tensors())["weight"] is data
    weight.transform(torch.zeros_like)
    assert not weight.product(wide).any()


def test_weights_of_16_bits_without_units_for_them_are_compiled_products_where_these_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dense, "has_onednn_units", lambda _: False)
    kernels = kernels_for("native")
    monkeypatch.setattr(products_cpu, "kernels_ahead", lambda: Ready(kernels))
    weight = DenseWeight.of(randn(N, K, dtype=torch.bfloat16))
    assert isinstance(weight.pack(), CpuNumbersWeight)
    assert isinstance(DenseWeight.of(randn(N, 8, dtype=torch.bfloat16)).pack(), WidenedWeight)  # half a vector
    monkeypatch.setattr(products_cpu, "kernels_ahead", lambda: Ready(None))
    assert isinstance(weight.pack(), WidenedWeight)


def test_onednn_multiplies_as_before_beside_compiled_products() -> None:
    x, weight = randn(33, 1536, dtype=torch.bfloat16), DenseWeight.of(randn(320, 1536, dtype=torch.bfloat16)).pack()
    packed = CpuQuantizedWeight(make_weight(FORMATS["Q4_1"], n=1536), kernels_for("native"))
    before = [weight.product(x[:size]) for size in (1, 8, 33)]
    for wanted, size in zip(before, (1, 8, 33), strict=True):
        packed.product(randn(20, K, dtype=torch.bfloat16))
        assert torch.equal(weight.product(x[:size]), wanted)


def test_results_go_where_they_are_wanted() -> None:
    packed = CpuQuantizedWeight(make_weight(FORMATS["Q8_0"]), kernels_for("native"))
    x, h = randn(5, K), randn(5, N)
    before, wanted = h.clone(), packed.product(x) + h
    kept = packed.product(x, residual=h)
    assert torch.equal(h, before)
    overwritten = packed.product(x, residual=h, may_overwrite=True)
    assert overwritten.data_ptr() == h.data_ptr() and torch.equal(overwritten, kept)
    torch.testing.assert_close(kept, wanted)
    wide = torch.zeros(5, 2 * N)
    assert packed.product(x, out=wide[:, :N]).data_ptr() == wide.data_ptr()
    assert torch.equal(wide[:, :N], packed.product(x)) and not wide[:, N:].any()
    assert torch.equal(packed.product(x.t().contiguous().t()), packed.product(x))
    assert torch.equal(packed.product(randn(5, 2 * K)[:, ::2].copy_(x)), packed.product(x))


def test_codes_are_in_memory_once_and_can_be_replaced() -> None:
    weight = make_weight(FORMATS["Q8_0"], num_parts=2)
    packed = CpuQuantizedWeight(weight, kernels_for("native"))
    assert {t.data_ptr() for _, t in packed.tensors()} == {t.data_ptr() for _, t in weight.tensors()}
    ids = torch.tensor([3, 0, 3])
    assert torch.equal(packed.lookup(ids), weight.dequantized()[ids])
    assert torch.equal(packed.rows_of(1), weight.dequantized()[N // 2 :])
    other = make_weight(Format("int8", 32, scale_dtype=HALF), n=N + 1)
    packed.transform(lambda tensor: (other.codes if tensor.dtype == torch.int8 else other.scale)[1:].clone())
    assert_close(packed.product(x := randn(2, K)), products(other, x)[:, 1:], "replaced")


@pytest.mark.parametrize(("k", "form"), [(40, Format("int4", 8)), (56, Format("int8")), (48, Format("int8", 24))])
def test_odd_sizes_keep_the_definition(k: int, form: Format) -> None:
    weight = make_weight(form, k=k)
    packed = weight.pack()
    assert packed is weight
    assert_close(packed.product(x := randn(3, k)), products(weight, x), "definition")


@pytest.mark.parametrize("num_groups", [18, 20, 22, 33])
@pytest.mark.parametrize("scale_dtype", [HALF, torch.bfloat16])
def test_scales_of_groups_that_fill_no_vector_are_read(num_groups: int, scale_dtype: torch.dtype) -> None:
    for form in (
        Format("int4", 32, scale_dtype=scale_dtype),
        Format("int4", 32, has_minimum=True, scale_dtype=scale_dtype),
        Format("int8", 32, scale_dtype=scale_dtype),
    ):
        weight = make_weight(form, k=32 * num_groups, dtype=torch.bfloat16)
        packed = CpuQuantizedWeight(weight, kernels_for("native"))
        for num_tokens in (1, 2, 17):
            x = randn(num_tokens, weight.k, dtype=torch.bfloat16)
            assert_close(packed.product(x), products(weight, x), f"{form.code} {num_tokens}")


@pytest.mark.parametrize("name", FORMATS)
def test_without_a_compiler_weights_are_decoded_once(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpp, "find_compiler", lambda: None)
    with caplog.at_level(logging.WARNING):
        assert cpp.load_library.__wrapped__(products_cpu.SOURCE) is None
    assert "no C++ compiler" in caplog.text
    for dtype, error in ((torch.float32, 3e-6), (torch.bfloat16, 2e-2)):
        weight, x = make_weight(FORMATS[name], dtype=dtype), randn(6, K, dtype=dtype)
        monkeypatch.setattr(quantized_cpu, "kernels_ahead", lambda: Ready(None))
        weight.settle()
        packed, wanted = pack_for_cpu(weight, for_logits=True) or weight, products(weight, x)
        assert not isinstance(packed, CpuQuantizedWeight)
        for found in (packed.product(x), packed.logits(x)):
            assert (found.double() - wanted).abs().max() <= error * wanted.abs().max()


class Ready:
    def __init__(self, value: Any) -> None:
        self.value = value

    def result(self) -> Any:
        return self.value


def test_a_library_is_compiled_once_for_a_source_and_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpp.find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(cpp, "cache_folder", lambda: tmp_path / "cache")
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    load: Any = cpp.load_library.__wrapped__
    assert load(source).answer() == 42
    (made,) = (tmp_path / "cache" / "cpu").iterdir()
    written = made.stat().st_mtime_ns
    assert load(source).answer() == 42 and made.stat().st_mtime_ns == written
    source.write_text('extern "C" int answer() { return 43; }')
    assert load(source).answer() == 43


def test_kernels_are_held_to_the_units_that_torch_is_held_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marches = []
    monkeypatch.setattr(cpp, "find_compiler", lambda: ("g++",))
    monkeypatch.setattr(cpp, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(cpp, "_compile", lambda command, source, march, path: marches.append(march))
    source = tmp_path / "empty.cpp"
    source.touch()
    load: Any = cpp.load_library.__wrapped__
    for held_to in ("avx2", "avx512", ""):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", held_to)
        load(source)
    load(source, "x86-64")
    assert marches == ["haswell", "skylake-avx512", "native", "x86-64"]


def test_a_source_that_does_not_compile_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if cpp.find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(cpp, "cache_folder", lambda: tmp_path / "cache")
    source = tmp_path / "broken.cpp"
    source.write_text("#error needs more")
    with caplog.at_level(logging.WARNING):
        assert cpp.load_library.__wrapped__(source) is None
    assert "broken.cpp cannot be compiled" in caplog.text and "needs more" in caplog.text
