"""Products of weights: whatever is fused or overwritten, each is its parts in a row."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels import elementwise, widened
from kernels.dense import DenseWeight, OneDNNWeight
from kernels.ties import settle_ties
from kernels.weights import Part, ShapeError, Shard
from kernels.widened import WidenedWeight
from tests.test_kernels import DEVICE, EPS, assert_near, randn

GPU_SIZES = [1, 2, 5, 33, 300] if DEVICE == "cuda" else []


class Norm:
    def __init__(self, weight: torch.Tensor, is_rms: bool = True) -> None:
        self.weight, self.eps, self.is_rms = weight, EPS, is_rms

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_rms:
            return elementwise.rms_norm(x, self.weight, self.eps)
        return F.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)


def test_a_residual_is_overwritten_where_that_is_allowed_and_nowhere_else() -> None:
    for num_tokens in (7, *GPU_SIZES):
        x, weight, h = randn(num_tokens, 64), DenseWeight.of(randn(16, 64)), randn(num_tokens, 16)
        before, expected = h.clone(), h + x @ weight.data.t()
        kept = weight.product(x, residual=h)
        assert kept.data_ptr() != h.data_ptr() and torch.equal(h, before)
        assert_near(kept, expected, "kept")
        overwritten = weight.product(x, residual=h, may_overwrite=True)
        assert overwritten.data_ptr() == h.data_ptr()
        assert_near(overwritten, expected, "overwritten")


@pytest.mark.parametrize("is_rms", [True, False])
@pytest.mark.parametrize("num_tokens", [6, *GPU_SIZES])
def test_the_fused_products_are_their_parts_in_a_row(num_tokens: int, is_rms: bool) -> None:
    h, norm, data, bias = randn(num_tokens, 64), Norm(randn(64), is_rms), randn(16, 64), randn(16)
    weight, normed = DenseWeight.of(data), norm(h)
    assert_near(weight.product(h, bias=bias), h @ data.t() + bias, "product")
    assert_near(weight.product(h, norm=norm, bias=bias), normed @ data.t() + bias, "norm")
    gate, up = (normed @ data.t() + bias).chunk(2, dim=-1)
    gated = F.silu(gate) * up
    assert_near(weight.product(h, norm=norm, bias=bias, act="silu"), gated, "norm and activation")
    residual = randn(num_tokens, 8)
    assert_near(weight.product(h, norm=norm, bias=bias, act="silu", residual=residual), residual + gated, "all")
    out = torch.empty_like(gated)
    assert weight.product(normed, bias=bias, act="silu", out=out).data_ptr() == out.data_ptr()
    assert_near(out, gated, "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 5, 70])
@pytest.mark.parametrize("is_widened", [False, True])
def test_a_packed_weight_changes_no_product(num_tokens: int, dtype: torch.dtype, is_widened: bool) -> None:
    x, h = randn(num_tokens, 48, dtype=dtype), randn(num_tokens, 80, dtype=dtype)
    weight, bias = DenseWeight.of(randn(80, 48, dtype=dtype, scale=48**-0.5)), randn(80, dtype=dtype)
    packed = WidenedWeight(weight, weight.data) if is_widened else weight.pack()
    norm, out = Norm(randn(48, dtype=dtype)), torch.empty_like(h)
    cases: list[dict[str, Any]] = [
        {}, {"norm": norm}, {"act": "silu"}, {"residual": h}, {"act": "silu", "residual": h[:, :40]}, {"out": out},
    ]  # fmt: skip
    for keywords in cases:
        for given in (None, bias):
            found = packed.product(x, bias=given, **keywords)
            assert_near(found, weight.product(x, bias=given, **keywords), str(list(keywords)))
    if isinstance(packed, OneDNNWeight | WidenedWeight):
        assert torch.equal(packed.rows_of(0), weight.data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_widened_product_is_summed_in_float32_and_rounded_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = randn(7, 48, dtype=dtype), randn(83, 48, dtype=dtype), randn(83, dtype=dtype)
    wanted = x.double() @ weight.double().t() + bias
    for rows in (1, 10, 83, 1000):  # of a panel, the last of them shorter
        monkeypatch.setattr(widened, "PANEL_BYTES", rows * 48 * 4)
        found = widened.widened_linear(x, weight, bias)
        assert found.dtype == dtype
        assert ((found.double() - wanted).abs() <= 0.51 * torch.finfo(dtype).eps * wanted.abs() + 1e-5).all()


def test_a_residual_under_a_widened_product_is_overwritten_only_where_that_is_allowed() -> None:
    dense = DenseWeight.of(randn(16, 64, dtype=torch.bfloat16))
    weight, x, h = (
        WidenedWeight(dense, dense.data),
        randn(7, 64, dtype=torch.bfloat16),
        randn(7, 16, dtype=torch.bfloat16),
    )
    before = h.clone()
    kept = weight.product(x, residual=h)
    assert torch.equal(h, before)
    overwritten = weight.product(x, residual=h, may_overwrite=True)
    assert overwritten.data_ptr() == h.data_ptr() and torch.equal(overwritten, kept)


def test_a_packed_products_row_is_the_same_bits_alone_and_beside_others() -> None:
    x, h = randn(9, 1536, dtype=torch.bfloat16), randn(9, 320, dtype=torch.bfloat16)
    weight = DenseWeight.of(randn(320, 1536, dtype=torch.bfloat16, scale=1536**-0.5)).pack()
    if not isinstance(weight, OneDNNWeight):
        pytest.skip("needs a CPU that multiplies bfloat16")
    together = weight.product(x, residual=h)
    alone = [weight.product(x[i : i + 1], residual=h[i : i + 1]) for i in range(9)]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("layout", ["plain", "packed", "widened"])
@pytest.mark.parametrize("num_tokens", [1, 5, 70])
def test_the_largest_logit_is_that_of_the_sums_before_rounding(num_tokens: int, layout: str) -> None:
    x = randn(num_tokens, 64, dtype=torch.bfloat16)
    data, bias = randn(2048, 64, dtype=torch.bfloat16).repeat(2, 1), randn(2048, dtype=torch.bfloat16).repeat(2)
    data[2048:, 0] *= 1 + 2**-7  # each row has a twin whose products often differ by less than a rounding
    weight = DenseWeight.of(data)
    sums = x.float() @ weight.data.float().t() + bias.float()
    rounded = sums.to(torch.bfloat16)
    assert num_tokens < 70 or (rounded == rounded.amax(1, keepdim=True)).sum() > num_tokens, "nothing ties here"
    made = {
        "plain": weight,
        "packed": weight.pack(for_logits=True),
        "widened": WidenedWeight(weight, weight.data),
    }
    logits = made[layout].logits(x, bias)
    assert logits.dtype == torch.float32
    chosen = sums.gather(1, logits.argmax(1, keepdim=True))
    assert (sums.amax(1, keepdim=True) - chosen < 1e-4).all()  # sums in another order
    torch.testing.assert_close(logits, sums, rtol=2**-7, atol=2**-7)


def test_settled_ties_are_above_all_others() -> None:
    x, weight = (
        torch.tensor([[1.0, 2.0**-10], [1.0, 0.0]]),
        torch.tensor([[4.0, -1.0], [4.0, 0.0], [4.0, 1.0], [3.0, 9]]),
    )
    logits = settle_ties((x @ weight.t()).to(torch.bfloat16).float(), x, weight)
    assert logits.tolist() == [[4 - 2**-10, 4.0, 4 + 2**-10, 3.015625], [4.0, 4.0, 4.0, 3.0]]


def test_a_norm_weight_in_float32_is_rounded_last() -> None:
    x, scale = randn(5, 64, dtype=torch.bfloat16), 1 + randn(64) / 100
    wanted = (F.rms_norm(x.float(), (64,), eps=EPS) * scale).to(x.dtype)
    assert torch.equal(elementwise.rms_norm_torch(x, scale, EPS), wanted)
    rounded_first = F.rms_norm(x.float(), (64,), eps=EPS).to(x.dtype) * scale.to(x.dtype)
    assert not torch.equal(wanted, rounded_first)


def test_parts_take_their_shards_of_what_a_checkpoint_holds() -> None:
    whole = torch.arange(8 * 6.0).view(8, 6)
    weight = DenseWeight([Part(4, Shard(1, 2)), Part(3)], 6, torch.float32)
    weight.materialize(torch.device("cpu"))
    for part, loaded in ((0, whole), (1, whole[:3])):
        target, source = weight.place("weight", loaded, part)
        target.copy_(source)
    assert torch.equal(weight.data, torch.cat((whole[4:], whole[:3])))
    columns = DenseWeight([Part(8)], 3, torch.float32, input_shard=Shard(1, 2))
    _, source = columns.place("weight", whole, 0)
    assert torch.equal(source, whole[:, 3:])
    with pytest.raises(ShapeError, match=r"shape \[8, 5\], the model wants \[8, 6\]"):
        weight.place("weight", whole[:, :5], 0)
