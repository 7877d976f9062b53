"""Checkpoint names: each rule does its part, and a list of them leads from any layout to the model's."""

import pytest
import torch

from engine.layers.rotary import inverse_frequencies
from engine.models.names import Copy, Ignore, Interleave, Rename, Rule, Split, Stack, Transpose, pieces_of
from kernels.elementwise import rope_and_store_torch
from kernels.weights import ShapeError


def test_a_name_is_changed_where_its_pattern_is_found() -> None:
    rules = [Rename(r"^transformer\.h\.", "model.layers."), Rename(r"\.attn\.", ".self_attn.")]
    (piece,) = pieces_of("transformer.h.3.attn.o_proj.weight", rules)
    assert piece.name == "model.layers.3.self_attn.o_proj.weight" and not piece.transforms
    (other,) = pieces_of("lm_head.weight", rules)
    assert other.name == "lm_head.weight"


def test_what_is_ignored_becomes_nothing_and_what_is_not_stays() -> None:
    rules = [Ignore(r"^mtp\.")]
    assert pieces_of("mtp.layers.0.weight", rules) == []
    assert [piece.name for piece in pieces_of("model.mtp.weight", rules)] == ["model.mtp.weight"]


def test_a_fused_tensor_is_cut_into_its_parts() -> None:
    rules = [Split("qkv_proj", ("q_proj", "k_proj", "v_proj"), (4, 2, 2))]
    loaded = torch.arange(16.0)[:, None]
    pieces = pieces_of("layers.0.qkv_proj.weight", rules)
    parts = {piece.name: piece.of(loaded).flatten().tolist() for piece in pieces}
    assert parts == {
        "layers.0.q_proj.weight": [0, 1, 2, 3, 4, 5, 6, 7],
        "layers.0.k_proj.weight": [8, 9, 10, 11],
        "layers.0.v_proj.weight": [12, 13, 14, 15],
    }
    assert [piece.name for piece in pieces_of("my_qkv_proj.weight", rules)] == ["my_qkv_proj.weight"]


def test_a_tensor_of_groups_is_cut_within_each() -> None:
    rules = [Split("wqkv", ("q_proj", "k_proj", "v_proj"), (2, 1, 1), num_groups=2)]
    loaded = torch.arange(16.0)[:, None]
    parts = {piece.name: piece.of(loaded).flatten().tolist() for piece in pieces_of("wqkv.weight", rules)}
    assert parts == {
        "q_proj.weight": [0, 1, 2, 3, 8, 9, 10, 11],
        "k_proj.weight": [4, 5, 12, 13],
        "v_proj.weight": [6, 7, 14, 15],
    }
    with pytest.raises(ShapeError, match="12 rows, which are no multiple of 8"):
        pieces_of("wqkv.weight", rules)[0].of(loaded[:12])


def test_interleaved_rotary_pairs_become_halves_and_scores_stay_the_same() -> None:
    torch.manual_seed(0)
    num_tokens, heads, head_dim, rotary_dim, hidden = 3, 2, 8, 4, 5
    rule = Interleave(r"[qk]_proj", head_dim, rotary_dim)
    x, weights = torch.randn(num_tokens, hidden), torch.randn(2, heads * head_dim, hidden)
    angles = torch.outer(torch.arange(num_tokens), inverse_frequencies(100.0, rotary_dim))
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)

    def interleaved(weight: torch.Tensor) -> torch.Tensor:
        rows = (x @ weight.t()).view(num_tokens, heads, head_dim)
        pairs = torch.view_as_complex(rows[..., :rotary_dim].unflatten(-1, (-1, 2)).contiguous())
        rotated = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)
        return torch.cat((rotated, rows[..., rotary_dim:]), dim=-1)

    q, k = (interleaved(weight) for weight in weights)
    (q_piece,), (k_piece,) = pieces_of("q_proj.weight", [rule]), pieces_of("k_proj.weight", [rule])
    reordered = [piece.of(weight) for piece, weight in zip((q_piece, k_piece), weights, strict=True)]
    qkv = torch.cat([*(x @ weight.t() for weight in reordered), x @ reordered[1].t()], dim=-1)
    cache = torch.zeros(2, num_tokens, heads, head_dim)
    slots = torch.arange(num_tokens, dtype=torch.int32)
    ours = rope_and_store_torch(qkv, slots, cos_sin, cache[0], cache[1], slots, heads, heads, head_dim)
    scores = torch.einsum("thd,shd->hts", ours, cache[0])
    torch.testing.assert_close(scores, torch.einsum("thd,shd->hts", q, k))
    assert pieces_of("v_proj.weight", [rule])[0].transforms == ()


def test_a_tensor_may_be_loaded_under_two_names() -> None:
    rules = [Copy(r"(^layers\.1\.)k_proj\.", r"\1v_proj.")]
    assert [piece.name for piece in pieces_of("layers.1.k_proj.weight", rules)] == [
        "layers.1.k_proj.weight",
        "layers.1.v_proj.weight",
    ]
    assert [piece.name for piece in pieces_of("layers.11.k_proj.weight", rules)] == ["layers.11.k_proj.weight"]


def test_numbered_tensors_become_one_stack() -> None:
    rules = [Stack(r"experts\.(\d+)\.", "experts.")]
    (piece,) = pieces_of("layers.0.mlp.experts.12.up_proj.weight", rules)
    assert (piece.name, piece.index) == ("layers.0.mlp.experts.up_proj.weight", 12)


def test_a_matrix_stored_by_inputs_is_transposed_before_it_is_cut() -> None:
    rules: list[Rule] = [Transpose(r"\.c_attn\.weight$"), Split("c_attn", ("q_proj", "k_proj"), (1, 1))]
    loaded = torch.arange(8.0).view(2, 4)  # two inputs, four outputs
    _, k = pieces_of("h.0.c_attn.weight", rules)
    assert k.name == "h.0.k_proj.weight" and k.of(loaded).tolist() == [[2, 6], [3, 7]]
    assert pieces_of("h.0.c_attn.bias", rules)[1].of(torch.arange(4.0)).tolist() == [2, 3]
