"""Latent attention: its two forms are one, and families that have it compute transformers' logits."""

import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bench.mla
from bench.attention import Batch, make_batch
from cache.layout import Latent, bytes_per_token
from engine.checkpoint.weights import pack_weights
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.layers.communicator import Communicator
from engine.layers.layer import LayerConfig, named_layers
from engine.layers.linear import Linear
from engine.layers.mla import LatentAttention
from engine.layers.moe import StackedLinear
from engine.model_config import LatentConfig
from engine.models.names import pieces_of
from engine.models.registry import build_model, load_config
from kernels import hopper_prefill, triton_mla, triton_softmax, tuning
from kernels.attention import SameBatch, prompt_torch
from kernels.card import card_of
from kernels.dense import DenseWeight
from kernels.elementwise import rope_and_store_latent_torch
from kernels.latents import Expansion, LatentSizes
from kernels.launch import next_power_of_2
from kernels.mla import latent_attention_torch
from kernels.quantize import OnlineWeight
from kernels.quantized_cpu import CpuQuantizedWeight
from kernels.tile_sizes import MIN_BLOCK, MIN_ROWS, tile_bytes
from kernels.triton_elementwise import rope_and_store_latent_triton
from kernels.triton_mla import (
    ABSORBED_CONFIGS,
    DECODE_CONFIGS,
    MAX_ROPE,
    _prefer_absorbed,
    latent_attention_triton,
    latent_configs,
    num_groups,
)
from kernels.triton_softmax import float32_prefill_config
from kernels.tuning import LatentShape
from tests.cards import CARDS
from tests.quantized_files import CASES, write_quantized
from tests.test_models import MAX_DIFFERENCE, TinyEngine, assert_equals_reference, random_ids, reference_logits
from tests.test_native_families import logits_of_ranks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MakeTinyModel = Callable[..., Path]
LATENT = {
    "kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}  # fmt: skip
GROUPS = {"n_group": 4, "topk_group": 2}
INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 512}
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 0.707, "mscale_all_dim": 0.9,
    "original_max_position_embeddings": 128,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek v2": ("DeepseekV2Config", LATENT | EXPERTS | GROUPS | {"topk_method": "group_limited_greedy"}),
    "deepseek v2 lite": ("DeepseekV2Config", LATENT | EXPERTS | {"q_lora_rank": None, "rope_parameters": YARN}),
    "deepseek v3": ("DeepseekV3Config", LATENT | EXPERTS | GROUPS | {"rope_parameters": YARN}),
    "deepseek v3, biases": (
        "DeepseekV3Config", LATENT | EXPERTS | GROUPS | {"attention_bias": True, "rope_interleave": False},
    ),
    "deepseek v3.2": (
        "DeepseekV32Config",
        LATENT | EXPERTS | GROUPS | INDEXER,
    ),
    "glm 4.7 flash": ("Glm4MoeLiteConfig", LATENT | EXPERTS | {"v_head_dim": 24, "routed_scaling_factor": 1.8}),
    "glm 5": (
        "GlmMoeDsaConfig",
        LATENT | EXPERTS | INDEXER | {"indexer_types": ["full", "shared"]},
    ),
    "minicpm 3": ("MiniCPM3Config", LATENT | {"scale_emb": 2.0, "scale_depth": 1.4, "dim_model_base": 32}),
    "youtu": ("YoutuConfig", LATENT | {"embedding_initializer_range": 0.2}),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(make_tiny_model: MakeTinyModel) -> Callable[[str], Path]:
    """Return `made(family)`: its folder."""
    import transformers

    @functools.cache
    def make(family: str) -> Path:
        name, options = FAMILIES[family]
        return make_tiny_model(getattr(transformers, name), "latent", random_norms=True, **options)

    return make


def packed(folder: Path) -> TinyEngine:
    engine = TinyEngine(folder)
    pack_weights(engine.model)
    return engine


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, made: Callable[[str], Path]) -> None:
    folder = made(family)
    assert_equals_reference(packed(folder), folder, random_ids(29, seed=1), random_ids(23, seed=2))


YARN_40 = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
PUBLISHED: dict[str, dict[str, Any]] = {  # what differs from `COMMON`
    "DeepseekV2ForCausalLM": {
        "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "scoring_func": "softmax",
        "norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_shared_experts": 2, "first_k_dense_replace": 1,
        "num_hidden_layers": 4, "rope_scaling": YARN_40 | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "DeepseekV3ForCausalLM": {
        "q_lora_rank": 1536, "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4, "scoring_func": "sigmoid",
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_shared_experts": 1, "first_k_dense_replace": 3,
        "num_hidden_layers": 4, "num_nextn_predict_layers": 1,
        "rope_scaling": YARN_40 | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
}  # fmt: skip
COMMON: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 10944, "num_attention_heads": 16, "num_key_value_heads": 16,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
    "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "moe_layer_freq": 1, "max_position_embeddings": 163840,
    "rope_theta": 10000, "vocab_size": 102400, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
    "attention_bias": False, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(("architecture", "weight"), [("DeepseekV2ForCausalLM", 0.707), ("DeepseekV3ForCausalLM", 1.0)])
def test_files_as_published_say_how_sharp_attention_is_and_which_experts_are_chosen(
    architecture: str, weight: float, tmp_path: Path
) -> None:
    entries: dict[str, Any] = COMMON | PUBLISHED[architecture] | {"architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    config = load_config(tmp_path)
    layer, experts = config.attention[0], config.experts[-1]
    assert isinstance(layer, LatentConfig) and experts is not None
    assert layer.scale == pytest.approx(192**-0.5 * (0.1 * weight * math.log(40) + 1) ** 2)
    assert (layer.head_dim, layer.qk_nope_head_dim, layer.q_lora_rank) == (192, 128, entries["q_lora_rank"] or 0)
    assert config.context_length == 163840
    first = entries["first_k_dense_replace"]
    assert [experts is None for experts in config.experts] == [i < first for i in range(4)]
    groups = experts.routing.num_groups, experts.routing.topk_groups
    assert (
        groups == (entries["n_group"], entries["topk_group"])
        and experts.routing.factor == entries["routed_scaling_factor"]
    )
    assert experts.routing.is_sigmoid == experts.has_correction == (architecture == "DeepseekV3ForCausalLM")
    assert experts.shared_size == 1408 * entries["n_shared_experts"]


@pytest.mark.parametrize("family", ["minicpm 3", "youtu"])
def test_two_ranks_compute_the_logits_together(family: str, made: Callable[[str], Path]) -> None:
    folder, ids = made(family), random_ids(23, seed=2)
    torch.testing.assert_close(
        logits_of_ranks(folder, 2, ids), reference_logits(folder, ids), rtol=0, atol=MAX_DIFFERENCE
    )


def test_every_rank_keeps_all_latents_and_no_more(made: Callable[[str], Path]) -> None:
    config = load_config(made("deepseek v3"), EngineConfig(dtype="float32"))
    for comm in (Communicator(), Communicator(0, 4), Communicator(3, 4)):
        layout = build_model(config, LayerConfig(torch.float32, comm=comm)).cache_layout()
        assert layout == (Latent(32, 8),) * 2
        assert bytes_per_token(layout, torch.bfloat16) == 2 * (32 + 8) * 2


HEADS, RANK, KEY_DIM, ROPE_DIM, VALUE_DIM = 4, 32, 16, 8, 12
SIZES = LatentSizes(KEY_DIM, VALUE_DIM, RANK)
MIXED = [(1, 9), (1, 1), (1, 64), (7, 7), (5, 30), (24, 24), (2, 90), (48, 50)]


def make_inputs(batch: Batch, cache_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, Expansion]:
    random, num_tokens = torch.Generator().manual_seed(1), int(batch.q_lens_host.sum())
    q = torch.randn(num_tokens, HEADS, KEY_DIM + ROPE_DIM, generator=random)
    cache = torch.randn(batch.slot_table.numel(), 1, RANK + ROPE_DIM, generator=random).to(cache_dtype)
    weight = torch.randn(HEADS * (KEY_DIM + VALUE_DIM), RANK, generator=random) * RANK**-0.5
    return q.to(DEVICE), cache.to(DEVICE), Expansion(weight.to(DEVICE), HEADS, SIZES)


def naive(q: torch.Tensor, cache: torch.Tensor, expansion: Expansion, batch: Batch, scale: float) -> torch.Tensor:
    """Compute one token and one head at a time, in float64."""
    q, cache, weight = (x.double().cpu() for x in (q, cache, expansion.by_head))
    rows, table = batch.rows.cpu(), batch.slot_table.cpu()
    out = torch.empty(*q.shape[:2], VALUE_DIM, dtype=torch.float64)
    token = 0
    for row, q_len, seq_len in zip(rows, batch.q_lens_host.tolist(), batch.seq_lens_host.tolist(), strict=True):
        for position in range(seq_len - q_len, seq_len):
            seen = cache[table[row, : position + 1].long(), 0]
            for head in range(HEADS):
                made = seen[:, :RANK] @ weight[head].T
                keys = torch.cat((made[:, :KEY_DIM], seen[:, RANK:]), dim=1)
                out[token, head] = (keys @ q[token, head] * scale).softmax(0) @ made[:, KEY_DIM:]
            token += 1
    return out


KERNELS = pytest.mark.parametrize("kernel", [latent_attention_torch, latent_attention_triton])


def check(result: torch.Tensor, q: torch.Tensor, cache: torch.Tensor, expansion: Expansion, batch: Batch) -> None:
    torch.testing.assert_close(result.double().cpu(), naive(q, cache, expansion, batch, 0.3), rtol=0, atol=2e-5)


@KERNELS
@pytest.mark.parametrize(
    ("cache_dtype", "lens"), [(torch.float32, MIXED), (torch.float8_e4m3fn, [(1, 9), (7, 7), (9, 20)])]
)
def test_latents_stand_for_the_keys_and_values_that_are_made_of_them(
    kernel: Any, cache_dtype: torch.dtype, lens: list[tuple[int, int]]
) -> None:
    batch = make_batch(lens, seed=0, device=DEVICE)
    q, cache, expansion = make_inputs(batch, cache_dtype)
    check(kernel(q, cache, expansion, batch, scale=0.3), q, cache, expansion, batch)


@pytest.mark.parametrize("num_tokens", [1, 19])
def test_a_few_tokens_are_multiplied_by_each_heads_matrix(num_tokens: int) -> None:
    from kernels.triton_latents import head_products

    random = torch.Generator().manual_seed(0)
    x, by_head = torch.randn(num_tokens, 3, 40, generator=random), torch.randn(3, 50, 24, generator=random)
    queries, found = x[..., :20], torch.empty(num_tokens, 3, 24)  # a part of each, as of queries
    head_products(queries, by_head[:, :20], found)
    torch.testing.assert_close(found, torch.einsum("thi,hio->tho", queries, by_head[:, :20]))
    values = torch.empty(num_tokens, 3, 30)
    head_products(found, by_head[:, 20:].transpose(1, 2), values)
    torch.testing.assert_close(values, torch.einsum("thi,hoi->tho", found, by_head[:, 20:]))


def test_a_prompt_goes_the_way_of_less_work() -> None:
    assert {SIZES.saved_by_absorbing(q_len, seq_len) > 0 for q_len, seq_len in MIXED if q_len > 1} == {True, False}
    batch = make_batch([(2, 90)], seed=0, device=DEVICE)
    assert _prefer_absorbed(SameBatch(batch), SIZES)
    assert not _prefer_absorbed(SameBatch(make_batch([(2, 90), (48, 50)], seed=0, device=DEVICE)), SIZES)


@pytest.mark.parametrize("lens", [[(1, 9), (1, 40)], [(1, 9), (2, 90), (5, 70)], [(40, 45), (24, 24)]])
def test_a_captured_graph_serves_any_lengths_by_absorbing(lens: list[tuple[int, int]]) -> None:
    batch = make_batch(lens, seed=0, device=DEVICE)
    q, cache, expansion = make_inputs(batch, torch.float32)
    lens_of_capture = np.ones(len(lens), np.int64)
    captured = replace(batch, is_for_graph=True, q_lens_host=lens_of_capture, seq_lens_host=lens_of_capture)
    check(latent_attention_triton(q, cache, expansion, captured, scale=0.3), q, cache, expansion, batch)


@pytest.mark.parametrize("lens", [[(30, 34), (24, 24)], [(1, 9), (40, 60), (7, 7), (5, 9)], [(1, 40), (54, 54)]])
def test_a_graph_of_many_prompt_tokens_makes_keys_of_contexts_that_fit(
    lens: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.latents.MAX_ABSORBED_TOKENS", 50)
    monkeypatch.setattr("kernels.latents.GRAPH_CONTEXT", 24)
    monkeypatch.setattr("kernels.triton_mla.prefill", lambda q, keys, *args, **options: calls.append(len(keys)))
    calls: list[int] = []
    batch = make_batch(lens, seed=0, device=DEVICE)
    q, cache, expansion = make_inputs(batch, torch.float32)
    num_tokens, padding = len(q) - batch.num_decodes, torch.zeros(2, dtype=torch.int32)
    captured = replace(
        batch,
        is_for_graph=True,
        rows=torch.cat((batch.rows, padding)),
        seq_lens=torch.cat((batch.seq_lens, padding)),
        cu_q_lens=torch.cat((batch.cu_q_lens, batch.cu_q_lens[-1:].expand(2))),
        q_lens_host=np.ones(len(lens) + 2, np.int64),
        seq_lens_host=np.ones(len(lens) + 2, np.int64),
    )
    latent_attention_triton(q, cache, expansion, captured, scale=0.3)
    assert calls == [num_tokens + 24]
    monkeypatch.undo()
    monkeypatch.setattr("kernels.latents.MAX_ABSORBED_TOKENS", 50)
    monkeypatch.setattr("kernels.latents.GRAPH_CONTEXT", 24)
    check(latent_attention_triton(q, cache, expansion, captured, scale=0.3), q, cache, expansion, batch)


def test_past_the_contexts_stands_their_last_token_and_no_padding() -> None:
    batch = make_batch([(1, 9), (3, 7), (5, 5)], seed=0, device=DEVICE)
    padding = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    padded = replace(
        batch, rows=torch.cat((batch.rows, padding)), seq_lens=torch.cat((batch.seq_lens, padding)),
        cu_q_lens=torch.cat((batch.cu_q_lens, batch.cu_q_lens[-1:].expand(2))),
        q_lens_host=np.ones(5, np.int64), seq_lens_host=np.ones(5, np.int64),
    )  # fmt: skip
    piece = triton_mla._piece(padded, batch.num_decodes, 5, 20)
    contexts = [batch.slot_table[row, :length] for row, length in zip(batch.rows[1:], (7, 5), strict=True)]
    assert piece.slots.tolist() == [*torch.cat(contexts).tolist(), *[int(contexts[-1][-1])] * 8]
    assert piece.rows.tolist() == [0, 7, 12, 12]


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [LatentSizes(128, 128, 512), LatentSizes(192, 256, 512)])
def test_one_graph_serves_prompts_of_other_lengths_by_keys(sizes: LatentSizes) -> None:
    random, num_heads, num_tokens = torch.Generator("cuda").manual_seed(1), 5, 700
    new = functools.partial(torch.randn, generator=random, device="cuda", dtype=torch.bfloat16)
    weight = new(num_heads * (sizes.key_dim + sizes.value_dim), 512) / 512**0.5
    q = new(3 + num_tokens, num_heads, sizes.key_dim + 64)
    expansion = Expansion(weight, num_heads, sizes)
    batches = [
        make_batch([(1, 900), (1, 7), (1, 40), *prompts], seed=0)
        for prompts in (
            [(700, 700), (0, 0), (0, 0)],
            [(100, 1000), (300, 300), (290, 350)],
            [(2, 2), (500, 1500), (0, 0)],
        )
    ]
    cache = new(max(batch.slot_table.numel() for batch in batches) + 1, 1, 576)
    cache[-1] = float("nan")
    table = torch.zeros(len(batches[0].slot_table), 2048, dtype=torch.int32, device="cuda")
    captured = replace(batches[0], is_for_graph=True, slot_table=table)
    graph = torch.cuda.CUDAGraph()
    latent_attention_triton(q, cache, expansion, replace(captured), scale=0.05)  # compiles
    with torch.cuda.graph(graph):
        out = latent_attention_triton(q, cache, expansion, captured, scale=0.05)
    for batch in batches:
        for name in ("rows", "seq_lens", "cu_q_lens"):
            getattr(captured, name).copy_(getattr(batch, name))
        table[:, : batch.slot_table.shape[1]] = batch.slot_table
        table[batch.rows[batch.seq_lens == 0].long()] = len(cache) - 1  # of no request: nobody sees it
        graph.replay()
        num_tokens, n = int(batch.q_lens_host.sum()), np.count_nonzero(batch.q_lens_host)
        real = replace(
            batch, rows=batch.rows[:n], seq_lens=batch.seq_lens[:n], cu_q_lens=batch.cu_q_lens[: n + 1],
            q_lens_host=batch.q_lens_host[:n], seq_lens_host=batch.seq_lens_host[:n],
        )  # fmt: skip
        floats = expansion._replace(weight=weight.float())
        wanted = latent_attention_torch(q[:num_tokens].float(), cache.float(), floats, real, scale=0.05)
        torch.testing.assert_close(out[:num_tokens].float(), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("most_bytes", [1, 6000])
def test_contexts_may_be_expanded_piece_by_piece(most_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.triton_mla.EXPANDED_BYTES", most_bytes)
    batch = make_batch([(1, 9), (7, 7), (20, 22)], seed=0, device=DEVICE)
    q, cache, expansion = make_inputs(batch, torch.float32)
    check(latent_attention_triton(q, cache, expansion, batch, scale=0.3), q, cache, expansion, batch)


def test_expanded_prompts_go_to_the_hopper_kernel_some_heads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    def prefill(q: Any, keys: Any, values: Any, batch: Any, out: torch.Tensor, **options: Any) -> None:
        """Read what the kernel does: contexts from `rows` on, with the shared parts of keys behind a head's own."""
        calls.append((q.shape[1], len(batch.rows)))
        shared = options["shared_keys"][:, None].expand(-1, q.shape[1], -1)
        lens = zip(batch.cu_q_lens.tolist(), batch.rows.tolist(), batch.q_lens_host, batch.seq_lens_host, strict=False)
        for first, row, q_len, seq_len in lens:
            all_keys = torch.cat((keys, shared), dim=2)[row : row + seq_len]
            of_prompt = prompt_torch(
                q[first : first + q_len], all_keys, values[row : row + seq_len], int(seq_len), scale=options["scale"]
            )
            out[first : first + q_len] = of_prompt

    monkeypatch.setattr(hopper_prefill, "can_prefill_shared", lambda q, value_dim, shared_dim: True)
    monkeypatch.setattr(hopper_prefill, "MAX_SHARED_REQUESTS", 2)
    monkeypatch.setattr(hopper_prefill, "prefill", prefill)
    batch = make_batch([(1, 9), (7, 7), (20, 22), (6, 6)], seed=0, device=DEVICE)
    q, cache, expansion = make_inputs(batch, torch.float32)
    for most_bytes, expected in ((1 << 20, [(4, 2), (4, 1)]), (4 * 22 * 4 * 28 // 2, [(4, 1), (2, 1), (2, 1), (4, 1)])):
        calls.clear()
        monkeypatch.setattr("kernels.triton_mla.EXPANDED_BYTES", most_bytes)
        check(latent_attention_triton(q, cache, expansion, batch, scale=0.3), q, cache, expansion, batch)
        assert calls == expected


def test_many_heads_are_cut_into_groups_that_each_read_the_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = 1, 16, 20, 64, 96, 128
    halves = {90: [1, 1, 1, 1, 2, 2], 80: [1, 1, 1, 1, 2, 2], 86: [1, 1, 1, 1, 2, 2], 75: [1, 2, 4, 8, 12, 16]}
    floats = {90: [1, 1, 1, 1, 2, 2], 80: [1, 1, 1, 2, 3, 4], 86: [1, 1, 2, 4, 6, 8], 75: [1, 2, 4, 8, 12, 16]}
    for itemsize, expected in ((2, halves), (4, floats)):
        for number, numbers in expected.items():
            monkeypatch.setattr(triton_mla, "card_of", lambda device, number=number: CARDS[number])
            num_groups.cache_clear()
            assert [num_groups(count, torch.device(DEVICE), itemsize) for count in counts] == numbers
    monkeypatch.setattr(triton_mla, "card_of", card_of)
    monkeypatch.setattr(triton_mla, "MAX_GROUP", 2)
    num_groups.cache_clear()
    batch = make_batch([(1, 9), (1, 50), (2, 90)], seed=0, device=DEVICE)
    q, cache, expansion = make_inputs(batch, torch.float32)
    check(latent_attention_triton(q, cache, expansion, batch, scale=0.3), q, cache, expansion, batch)
    num_groups.cache_clear()


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Choose sizes for a card without bfloat16, of 64 KiB of shared memory."""
    caches = num_groups, float32_prefill_config, DECODE_CONFIGS.get, ABSORBED_CONFIGS.get
    for module in (triton_mla, triton_softmax, tuning):
        monkeypatch.setattr(module, "card_of", lambda device: CARDS[75])
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("num_heads", "rank"), [(16, 512), (128, 512), (40, 256)])
def test_latents_have_room_in_the_smallest_shared_memory(
    dtype: torch.dtype, num_heads: int, rank: int, turing: None
) -> None:
    configs = latent_configs(torch.empty(1, num_heads, 192, dtype=dtype, device=DEVICE), LatentSizes(128, 128, rank), 1)
    group = next_power_of_2(num_heads // num_groups(num_heads, torch.device(DEVICE), dtype.itemsize))
    for config in (configs.decode, configs.absorbed):
        assert config.block_n >= MIN_BLOCK and config.block_m >= MIN_ROWS
        sizes = max(config.block_m, group), config.block_n, config.num_stages, rank + MAX_ROPE, 0
        assert tile_bytes(CARDS[75], *sizes, dtype.itemsize) <= CARDS[75].shared_bytes


def test_tiles_of_eight_rows_equal_the_definition(turing: None) -> None:
    batch = make_batch([(1, 50), (1, 3), (1, 45), (7, 41)], groups=[(40, [0, 2])], seed=0, device=DEVICE)
    q, cache, expansion = make_inputs(batch, torch.float32)
    configs = latent_configs(q, SIZES, 3)
    configs = configs._replace(absorbed=configs.absorbed._replace(block_m=MIN_ROWS))
    assert configs.decode.block_m == MIN_ROWS
    out = latent_attention_triton(q, cache, expansion, replace(batch, is_for_graph=True), scale=0.3, configs=configs)
    check(out, q, cache, expansion, batch)


@pytest.mark.parametrize("most_merged_later", [0, 4])
@pytest.mark.parametrize("num_programs", [1, 2, 7])
def test_results_of_few_requests_are_merged_by_whoever_is_last_or_by_a_kernel(
    most_merged_later: int, num_programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.triton_decode.MOST_MERGED_LATER", most_merged_later)
    monkeypatch.setattr("kernels.triton_decode.num_sms", lambda device: num_programs)
    lens, groups = [(1, 5), (1, 49), (1, 61), (1, 35)], [(24, [1, 2, 3])]
    for batch in (make_batch(lens, seed=0, device=DEVICE), make_batch(lens, groups=groups, seed=0, device=DEVICE)):
        q, cache, expansion = make_inputs(batch, torch.float32)
        check(latent_attention_triton(q, cache, expansion, batch, scale=0.3), q, cache, expansion, batch)


def test_latents_that_requests_share_are_read_once() -> None:
    batch = make_batch([(1, 50), (1, 3), (1, 45), (1, 41)], groups=[(40, [0, 2, 3])], seed=0, device=DEVICE)
    q, cache, expansion = make_inputs(batch, torch.float32)
    check(latent_attention_triton(q, cache, expansion, batch, scale=0.3), q, cache, expansion, batch)


def test_the_bench_compares_and_counts_what_either_way_takes() -> None:
    shape = LatentShape(HEADS, KEY_DIM, ROPE_DIM, VALUE_DIM, RANK)
    problem = bench.mla.Problem(shape, [(1, 20), (9, 20)], dtype=torch.float32, device=DEVICE)
    assert problem.difference() < 1e-4 and problem.difference(replace(problem.batch, is_for_graph=True)) < 1e-4
    matrix = HEADS * (KEY_DIM + VALUE_DIM) * RANK
    decode, prompt = bench.mla.work_of(shape, [(1, 20)]), bench.mla.work_of(shape, [(8, 8)])
    assert decode == (2 * (20 * (RANK + ROPE_DIM) + matrix), 2 * (HEADS * 20 * (2 * RANK + ROPE_DIM) + matrix))
    assert prompt.num_flops == 2 * (HEADS * 36 * (KEY_DIM + ROPE_DIM + VALUE_DIM) + 8 * matrix)


def rotated_and_stored(run: Any, cache_dtype: torch.dtype, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what queries, rotated, are a part of, and the cache. factor: of the norm's largest weights."""
    random, num_tokens = torch.Generator().manual_seed(0), 5
    made = torch.randn(num_tokens, 300 + RANK + ROPE_DIM, generator=random).to(DEVICE)
    angles = torch.rand(64, ROPE_DIM // 2, generator=random)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).to(DEVICE)
    positions, slots = torch.tensor([[3, 60, 0, 7, 7], [4, 2, 9, 0, 1]], dtype=torch.int32).to(DEVICE)
    cache = torch.zeros(20, 1, RANK + ROPE_DIM).to(DEVICE, cache_dtype)
    norm = (torch.rand(RANK, generator=random) * factor).to(DEVICE)
    q = made[:, : HEADS * (KEY_DIM + ROPE_DIM)].unflatten(1, (HEADS, -1))
    run(q, made[:, 300:], positions, cos_sin, cache, slots, norm, 1e-6)
    return made, cache.float()


@pytest.mark.parametrize(("cache_dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_the_kernel_that_rotates_and_stores_latents_equals_its_definition(
    cache_dtype: torch.dtype, tolerance: float
) -> None:
    made, cache = rotated_and_stored(rope_and_store_latent_triton, cache_dtype, 2.0)
    wanted, wanted_cache = rotated_and_stored(rope_and_store_latent_torch, cache_dtype, 2.0)
    torch.testing.assert_close(made, wanted)
    torch.testing.assert_close(cache, wanted_cache, rtol=tolerance, atol=tolerance)
    assert wanted_cache[[4, 2, 9, 0, 1]].all() and not wanted_cache[10:].any()


@pytest.mark.parametrize("run", [rope_and_store_latent_torch, rope_and_store_latent_triton])
def test_latents_that_do_not_fit_a_float8_cache_saturate(run: Any) -> None:
    _, cache = rotated_and_stored(run, torch.float8_e4m3fn, 1e6)
    assert (cache[[4, 2, 9, 0, 1], :, :RANK].abs() == 448).float().mean() > 0.9


def test_a_long_prompt_is_expanded_and_a_short_one_behind_a_long_context_is_not() -> None:
    saved = LatentSizes(128, 128, 512).saved_by_absorbing  # DeepSeek's sizes
    assert saved(64, 32768) > 0 and saved(1, 2) > 0
    assert saved(2048, 2048) < 0 and saved(2048, 32768) < 0


def test_a_checkpoint_in_blocks_of_float8_is_read_and_what_expands_latents_is_plain(
    tmp_path: Path, make_tiny_model: MakeTinyModel
) -> None:
    import transformers

    plain = make_tiny_model(transformers.DeepseekV3Config, "blocks", **FAMILIES["deepseek v3"][1])
    case = replace(CASES["fp8 in blocks"], modules=r"_proj(_with_mqa)?$")
    write_quantized(plain, case, tmp_path / "packed")
    quantized, wanted = packed(tmp_path / "packed"), packed(plain)
    of_plain = dict(named_layers(wanted.model))
    for path, layer in named_layers(quantized.model):
        if isinstance(layer, Linear) and not isinstance(layer, StackedLinear) and not path.endswith("embed_tokens"):
            for part in range(len(layer.weight.parts)):
                torch.testing.assert_close(layer.weight.rows_of(part), of_plain[path].weight_part("weight", part))
    for block in quantized.model.model.layers:
        assert isinstance(block.self_attn, LatentAttention)
        assert isinstance(block.self_attn.kv_b_proj.weight, DenseWeight)
        assert isinstance(block.self_attn.qkv_a_proj.weight, CpuQuantizedWeight)
    ids = random_ids(23, seed=2)
    got, logits = quantized.forward({0: ids}), wanted.forward({0: ids})
    assert (got - logits).abs().mean() < 0.2 * logits.abs().mean()  # inputs are rounded: some go to other experts


@pytest.mark.parametrize("case", ["compressed-tensors, W8A16", "gptq, desc_act"])
def test_latent_attention_of_few_bits_has_the_logits_of_what_it_stands_for(
    case: str, tmp_path: Path, make_tiny_model: MakeTinyModel
) -> None:
    import transformers

    options = LATENT | {"kv_lora_rank": 64, "q_lora_rank": 32, "v_head_dim": 16, "intermediate_size": 128}
    plain = make_tiny_model(transformers.YoutuConfig, "bits", embedding_initializer_range=0.2, **options)
    write_quantized(plain, CASES[case], tmp_path / "packed")
    assert_equals_reference(packed(tmp_path / "packed"), plain, random_ids(20, seed=0), random_ids(13, seed=1))


def test_what_expands_latents_is_not_rounded_while_it_is_loaded(made: Callable[[str], Path]) -> None:
    config = load_config(made("deepseek v3"), EngineConfig(dtype="float32"))
    for block in build_model(config, LayerConfig(torch.float32), "fp8").model.layers:
        assert isinstance(block.self_attn, LatentAttention)
        assert isinstance(block.self_attn.kv_b_proj.weight, DenseWeight)
        assert isinstance(block.self_attn.qkv_a_proj.weight, OnlineWeight)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.self_attn.q_a_proj.weight",
        "model.layers.3.shared_head.head.weight",
        "model.layers.2.mlp.experts.7.down_proj.weight_scale_inv",
        "model.layers.0.self_attn.indexer.wq_b.weight",
    ],
)
def test_what_predicts_several_tokens_or_picks_tokens_may_be_in_the_file(
    name: str, made: Callable[[str], Path]
) -> None:
    config = EngineConfig(dtype="float32", json_model_override_args=json.dumps({"num_nextn_predict_layers": 2}))
    model = build_model(load_config(made("deepseek v3.2"), config), LayerConfig(torch.float32))
    assert pieces_of(name, model.names) == []
    assert len(pieces_of("model.layers.1.self_attn.q_a_proj.weight", model.names)) == 1


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("deepseek v2 lite", {"attention_bias": True}, "attention_bias without a q_lora_rank is not supported"),
        ("deepseek v3", {"partial_rotary_factor": 0.5}, "of qk_rope_head_dim 8 only 4 are rotated"),
        ("deepseek v3", {"kv_lora_rank": "32"}, "kv_lora_rank must be a positive integer, got '32'"),
        ("glm 4.7 flash", {"mlp_layer_types": ["dense"]}, "mlp_layer_types names 1 layers, num_hidden_layers is 2"),
    ],
)
def test_what_cannot_be_run_is_named(
    family: str, overrides: dict[str, Any], message: str, made: Callable[[str], Path]
) -> None:
    with pytest.raises(ModelError, match=message):
        config = load_config(made(family), EngineConfig(json_model_override_args=json.dumps(overrides)))
        build_model(config, LayerConfig(torch.float32))
