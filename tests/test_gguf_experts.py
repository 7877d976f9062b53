"""GGUF files of models with experts: they become the checkpoints they were made of, and their experts stay packed."""

import asyncio
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file

from engine.checkpoint.folder import resolve_model
from engine.checkpoint.gguf_architectures import ARCHITECTURES, FILES
from engine.checkpoint.gguf_convert import convert
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.layers.communicator import Communicator
from engine.layers.layer import unique_layers
from engine.layers.moe import StackedLinear
from kernels.quantized import QuantizedWeight
from tests.test_engine import MIXES, collect, make_state, prompts, running_engine
from tests.test_gguf_families import (
    GEMMA_4,
    GEMMA_4_KEYS,
    HALVES_KEYS,
    IDS,
    LATENT,
    LATENT_KEYS,
    LAYER_NORM,
    WINDOW,
    YARN,
    YARN_KEYS,
    Case,
    Tensors,
    assert_becomes_its_checkpoint,
    in_halves,
    interleaved,
    logits_of,
    make_checkpoint,
    named_scalars,
    quiet,
    write_file,
)
from tests.test_gguf_packed import assert_same_logits, assert_same_weights, assert_stays_packed, random_blocks
from tests.test_models import TinyEngine
from tests.test_quantization import engine_of

__all__ = ["prompts", "quiet"]  # fixtures

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


def stacked(tensors: Tensors, config: Any) -> Tensors:
    """Stack each layer's experts, and name what corrects their choice as the `gguf` package does."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if match := EXPERT.fullmatch(name):
            if match[2] == "0":
                stack = f"{match[1]}.{match[3]}.weight"
                count = sum(other.startswith(f"{match[1]}.") and match[3] in other for other in tensors)
                each = [tensors[f"{match[1]}.{i}.{match[3]}.weight"] for i in range(count)]
                result[stack] = torch.stack(each)
        elif name.endswith(".e_score_correction_bias"):
            result[name.replace("_bias", ".bias")] = tensor.reshape(-1)
        else:
            result[name] = tensor[0] if name.endswith("shared_expert_gate.weight") else tensor
    return result


def gate_apart_from_up(tensors: Tensors, config: Any) -> Tensors:
    """Cut Granite's tensors as llama.cpp does."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.*)\.(block_sparse_moe|shared_mlp)\.(in|out)put_linear\.weight", name):
            module = f"{match[1]}.mlp.{'experts' if tensor.ndim == 3 else 'shared_experts'}"
            parts = tensor.chunk(2, dim=-2) if match[3] == "in" else (tensor,)
            for part, values in zip(("gate", "up") if len(parts) == 2 else ("down",), parts, strict=True):
                result[f"{module}.{part}_proj.weight"] = values
        else:
            result[name] = tensor
    return result


def rows_of_gpt_oss(tensors: Tensors, config: Any) -> Tensors:
    """Turn experts, and cut gate and up, which alternate, as llama.cpp does."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        block = re.sub(r"model\.layers\.(\d+)\..*", r"blk.\1", name)
        if name.endswith("self_attn.sinks"):
            result[f"{block}.attn_sinks.weight"] = tensor
        elif match := re.search(r"experts\.(\w+)_proj(_bias)?$", name):
            kind, rows = ("bias", tensor) if match[2] else ("weight", tensor.transpose(1, 2))
            parts = {"down": rows} if match[1] == "down" else {"gate": rows[:, ::2], "up": rows[:, 1::2]}
            result |= {f"{block}.ffn_{part}_exps.{kind}": values for part, values in parts.items()}
        else:
            result[name] = tensor
    return result


def as_stacks(tensors: Tensors, config: Any) -> Tensors:
    """Take the rows of DBRX's experts apart, and turn those of the second product."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if match := re.search(r"experts\.mlp\.(\w+)$", name):
            stack = tensor.unflatten(0, (8, -1))
            result[f"{name}.weight"] = stack.transpose(1, 2) if match[1] == "w2" else stack
        else:
            result[name] = tensor
    return result


def parts_of_gemma_4(tensors: Tensors, config: Any) -> Tensors:
    """Name scales of routers and of experts as llama.cpp does; stacks have the package's names."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        block = re.sub(r"model\.layers\.(\d+)\..*", r"blk.\1", name)
        if name.endswith(".router.scale"):
            result[f"{block}.ffn_gate_inp.scale"] = tensor
        elif name.endswith(".router.per_expert_scale"):
            result[f"{block}.ffn_down_exps.scale"] = tensor
        elif match := re.search(r"\.experts\.(gate_up|down)_proj$", name):
            result[f"{block}.ffn_{match[1]}_exps.weight"] = tensor
        else:
            result[name] = tensor
    return result


def rows_of_llama_4(tensors: Tensors, config: Any) -> Tensors:
    """Turn experts, and cut gate from up."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            stem, (gate, up) = name.removesuffix("gate_up_proj"), tensor.transpose(1, 2).chunk(2, dim=1)
            result |= {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            result[f"{name}.weight"] = tensor.transpose(1, 2)
        else:
            result[name] = tensor
    return result


USED = {"expert_count": 8, "expert_used_count": 3}
SMALL = {"expert_feed_forward_length": 32}
GLM = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_shared_experts": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True,
    "routed_scaling_factor": 2.5,
}  # fmt: skip
GLM_KEYS = USED | SMALL | {
    "rope.dimension_count": 8, "expert_gating_func": 2, "expert_weights_scale": 2.5, "expert_weights_norm": True,
    "expert_shared_count": 2, "leading_dense_block_count": 1,
}  # fmt: skip
GRANITE = {
    "num_local_experts": 8, "num_experts_per_tok": 3, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
    "logits_scaling": 8.0, "attention_multiplier": 0.1,
}  # fmt: skip
GRANITE_KEYS = USED | {"embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0, "attention.scale": 0.1}
DEEPSEEK = LATENT | {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": False, "n_group": 1, "topk_group": 1,
}  # fmt: skip
DEEPSEEK_KEYS = USED | SMALL | {"expert_weights_scale": 2.5, "expert_shared_count": 2, "leading_dense_block_count": 1}
GROUPS = {"expert_group_count": 4, "expert_group_used_count": 2}
PHI_ROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "short_mscale": 1.25,
    "long_mscale": 1.25,
    # transformers' class takes the short ones whatever the length
    **{key: [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5] for key in ("short_factor", "long_factor")},
}  # fmt: skip
SHARP = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
CASES = {
    "Mixtral": Case(
        "llama",
        "MixtralConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": None},
        USED,
        (interleaved, stacked),
    ),
    "Qwen2-MoE": Case(
        "qwen2moe",
        "Qwen2MoeConfig",
        {
            "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "decoder_sparse_step": 1,
            "shared_expert_intermediate_size": 64,
        },
        USED | SMALL | {"expert_shared_feed_forward_length": 64},
        (stacked,),
    ),
    "Qwen3-MoE": Case(
        "qwen3moe",
        "Qwen3MoeConfig",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True},
        USED | SMALL,
        (stacked,),
    ),
    "Qwen3-VL-MoE": Case(
        "qwen3vlmoe",
        "Qwen3MoeConfig",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True},
        USED | SMALL | {"n_deepstack_layers": 3},
        (stacked,),
    ),
    "OLMoE": Case(
        "olmoe",
        "OlmoeConfig",
        {"num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 0.5, "num_key_value_heads": 4},
        USED | {"attention.clamp_kqv": 0.5},
        (stacked,),
    ),
    "GLM-4.5": Case("glm4moe", "Glm4MoeConfig", GLM, GLM_KEYS, (stacked,)),
    "GLM of groups": Case(
        "glm4moe",
        "Glm4MoeConfig",
        GLM | {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 2},
        GLM_KEYS | {"expert_group_count": 4, "expert_group_used_count": 2},
        (stacked,),
        layers=3,
    ),
    "ERNIE 4.5": Case(
        "ernie4_5-moe",
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 32, "moe_num_shared_experts": 2,
            "tie_word_embeddings": True,
        },
        USED | SMALL | {"expert_shared_count": 2},
        (stacked,),
    ),
    "Hunyuan": Case("hunyuan-moe", "HunYuanMoEV1Config", {"num_experts": 8, "moe_topk": 3}, USED, (stacked,)),
    "MiniMax-M2": Case(
        "minimax-m2",
        "MiniMaxM2Config",
        {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32},
        USED | SMALL | {"feed_forward_length": 32, "expert_gating_func": 2, "rope.dimension_count": 8},
        (stacked,),
    ),
    "Phi-3.5-MoE": Case(
        "phimoe",
        "PhimoeConfig",
        {
            "num_local_experts": 8, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True,
            "sliding_window": None, "rope_parameters": PHI_ROPE,
        },
        USED | {
            "expert_used_count": 2, "rope.scaling.attn_factor": 1.25, "rope.scaling.original_context_length": 16,
        },
        (stacked,),
        {"rope_factors_short": PHI_ROPE["short_factor"], "rope_factors_long": PHI_ROPE["long_factor"]},
    ),
    "DeepSeek V2-Lite": Case(
        "deepseek2",
        "DeepseekV2Config",
        DEEPSEEK | {"q_lora_rank": None, "topk_method": "greedy", "rope_parameters": SHARP},
        DEEPSEEK_KEYS | LATENT_KEYS | YARN_KEYS | {"rope.scaling.yarn_log_multiplier": 0.0707},
        (stacked,),
    ),
    "DeepSeek V2, in halves": Case(
        "deepseek2",
        "DeepseekV2Config",
        DEEPSEEK | {"q_lora_rank": 64, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
        DEEPSEEK_KEYS | HALVES_KEYS | GROUPS | {"attention.q_lora_rank": 64, "expert_gating_func": 1},
        (stacked, in_halves),
    ),
    "DeepSeek V3": Case(
        "deepseek2",
        "DeepseekV3Config",
        DEEPSEEK | {"q_lora_rank": 64, "n_group": 4, "topk_group": 2, "norm_topk_prob": True},
        DEEPSEEK_KEYS | HALVES_KEYS | GROUPS | {"attention.q_lora_rank": 64, "expert_weights_norm": True},
        (stacked, in_halves),
    ),
}  # fmt: skip
# What Hugging Face has in one tensor is two here: files do not become checkpoints of theirs.
OF_OUR_OWN = {
    "Granite": Case(
        "granitemoe", "GraniteMoeConfig", GRANITE, GRANITE_KEYS, (interleaved, gate_apart_from_up)
    ),
    "Granite with a shared expert": Case(
        "granitemoe",
        "GraniteMoeSharedConfig",
        GRANITE | {"shared_intermediate_size": 64},
        GRANITE_KEYS | {"expert_shared_feed_forward_length": 64},
        (interleaved, gate_apart_from_up),
    ),
    "gpt-oss": Case(
        "gpt-oss",
        "GptOssConfig",
        {
            "num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 8,
            "rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 1.0, "truncate": False},
        },
        USED | YARN_KEYS | WINDOW | {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 1.0},
        (rows_of_gpt_oss,),
    ),
    "GLM-5": Case(
        "glm-dsa",
        "GlmMoeDsaConfig",
        DEEPSEEK
        | {"q_lora_rank": 64, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64, "norm_topk_prob": True},
        DEEPSEEK_KEYS | HALVES_KEYS | {"attention.q_lora_rank": 64, "expert_weights_norm": True},
        (stacked, in_halves),
    ),
    "DBRX": Case(
        "dbrx",
        "DbrxConfig",
        {
            "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "head_dim": None, "hidden_size": None,
            "num_attention_heads": None, "num_hidden_layers": None, "num_key_value_heads": None,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 3, "ffn_act_fn": {"name": "silu"}},
        },
        USED | LAYER_NORM | {"attention.clamp_kqv": 0.5, "attention.key_length": None, "attention.head_count_kv": 2},
        (as_stacks,),
    ),
    "Gemma 4": Case(
        "gemma4",
        "Gemma4TextConfig",
        GEMMA_4
        | {
            "attention_k_eq_v": True, "num_global_key_value_heads": 1, "enable_moe_block": True, "num_experts": 8,
            "top_k_experts": 3, "moe_intermediate_size": 32,
        },
        GEMMA_4_KEYS | USED | SMALL | {"attention.head_count_kv": [2, 2, 1, 2, 1]},
        (named_scalars, parts_of_gemma_4),
        layers=5,
    ),
    "Llama 4": Case(
        "llama4",
        "Llama4TextConfig",
        {
            "num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size": 32, "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 2, "moe_layers": [1, 3],
        },
        USED | SMALL | {"expert_used_count": 1, "interleave_moe_layer_step": 2, "expert_gating_func": 2},
        (rows_of_llama_4,),
        layers=4,
    ),
}  # fmt: skip


def test_every_architecture_with_experts_has_a_case() -> None:
    with_experts = {name for name in FILES if ARCHITECTURES[name].has_experts}
    elsewhere = {"deepseek", "grok"}  # tests/test_expert_families.py
    assert {case.arch for case in (CASES | OF_OUR_OWN).values()} == with_experts - elsewhere | {"llama"}


@pytest.mark.parametrize("name", CASES)
def test_a_file_with_experts_becomes_the_checkpoint_it_was_made_of(name: str, tmp_path: Path) -> None:
    assert_becomes_its_checkpoint(CASES[name], tmp_path)


def converted(case: Case, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of a converted file, and transformers' of what it was made of."""
    model = make_checkpoint(case, folder / "original")
    write_file(case, model.config, load_file(folder / "original" / "model.safetensors"), folder / "model.gguf")
    (folder / "converted").mkdir()
    convert(folder / "model.gguf", folder / "converted", torch.float32, lambda n: None, needs_tokenizer=False)
    return engine_of(folder / "converted").forward({0: IDS.tolist()}), logits_of(model)


@pytest.mark.parametrize("name", OF_OUR_OWN)
def test_a_file_that_becomes_no_checkpoint_of_theirs_has_its_logits(name: str, tmp_path: Path) -> None:
    got, wanted = converted(OF_OUR_OWN[name], tmp_path)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", [*CASES, *OF_OUR_OWN])
def test_experts_of_every_family_stay_packed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = assert_stays_packed((CASES | OF_OUR_OWN)[name], tmp_path, monkeypatch)
    assert {path.rpartition(".")[2] for path in dense} <= {"gate", "shared_expert_gate", "kv_b_proj"}


def on_its_own(tensors: Tensors, config: Any) -> Tensors:
    """Name experts as files of 2023 do."""
    names = {"w1": "gate", "w2": "down", "w3": "up"}
    pattern = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w\d)\.")
    return {
        pattern.sub(lambda match: f"blk.{match[1]}.ffn_{names[match[3]]}.{match[2]}.", name): tensor
        for name, tensor in tensors.items()
    }


def gate_with_up(tensors: Tensors, config: Any) -> Tensors:
    """Put gate and up of each expert in one tensor."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.gate_proj\.weight", name):
            both = torch.cat((tensor, tensors[name.replace("gate_proj", "up_proj")]), dim=1)
            result[f"blk.{match[1]}.ffn_gate_up_exps.weight"] = both
        elif not name.endswith("experts.up_proj.weight"):
            result[name] = tensor
    return result


def with_a_block_behind(tensors: Tensors, config: Any) -> Tensors:
    """Add a block that predicts several tokens at once."""
    last = {name: tensor for name, tensor in tensors.items() if ".layers.1." in name}
    behind = {name.replace(".layers.1.", ".layers.2."): torch.zeros_like(tensor) for name, tensor in last.items()}
    return tensors | behind | {"blk.2.nextn.eh_proj.weight": torch.zeros(64, 128)}


OTHER_FILES = {
    "experts one by one": replace(CASES["Mixtral"], changes=(interleaved, on_its_own)),
    "gate and up in one": replace(CASES["Qwen3-MoE"], changes=(stacked, gate_with_up)),
    "a block behind the layers": replace(
        CASES["GLM-4.5"],
        metadata=GLM_KEYS | {"block_count": 3, "nextn_predict_layers": 1},
        changes=(stacked, with_a_block_behind),
    ),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_ways_to_store_experts_make_the_same_checkpoint(name: str, tmp_path: Path) -> None:
    assert_becomes_its_checkpoint(OTHER_FILES[name], tmp_path)


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_ways_to_store_experts_stay_packed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = assert_stays_packed(OTHER_FILES[name], tmp_path, monkeypatch)
    assert {path.rpartition(".")[2] for path in dense} <= {"gate"}


# As files of usual sizes have them: down of more bits, or layers that differ.
K_QUANTS = {
    "Q4_K_M": {"ffn_gate_exps": "Q4_K", "ffn_up_exps": "Q4_K", "ffn_down_exps": "Q6_K", "attn_q": "Q4_K"},
    "gate unlike up": {"ffn_gate_exps": "Q4_K", "ffn_up_exps": "Q5_K", "ffn_down_exps": "Q3_K", "output": "Q6_K"},
    "one layer alone": {"blk.1.ffn_gate_exps": "IQ4_XS", "blk.1.ffn_up_exps": "Q4_K", "blk.1.ffn_down_exps": "MXFP4"},
}
WIDE = {"hidden_size": 256, "moe_intermediate_size": 256, "vocab_size": 384, "max_position_embeddings": 512}
WIDE_CASE = Case(
    "qwen3moe",
    "Qwen3MoeConfig",
    CASES["Qwen3-MoE"].options | WIDE | {"initializer_range": 0.05},
    USED | {"expert_feed_forward_length": 256, "embedding_length": 256, "context_length": 512},
    (stacked,),
)


def write_kinds(kinds: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    """Write a file whose tensors of these names are random ones of these types."""
    model, rng = make_checkpoint(WIDE_CASE, folder / "original"), np.random.default_rng(0)
    add_tensor = gguf.GGUFWriter.add_tensor

    def add(self: gguf.GGUFWriter, name: str, tensor: np.ndarray, **options: Any) -> None:
        stem = name.removesuffix(".weight")
        if kind := kinds.get(stem) or kinds.get(stem.rpartition(".")[2]):
            rows = random_blocks(kind, (tensor.size // tensor.shape[-1], tensor.shape[-1]), rng)
            tensor, options = rows.reshape(*tensor.shape[:-1], -1), {"raw_dtype": GGMLQuantizationType[kind]}
        add_tensor(self, name, tensor, **options)

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add)
        tensors = load_file(folder / "original" / "model.safetensors")
        write_file(WIDE_CASE, model.config, tensors, folder / "model.gguf")
    return EngineConfig(
        model_path=str(folder / "model.gguf"), dtype="float32", download_dir=str(folder), tokenizer_path=str(folder)
    )


def experts_of(engine: TinyEngine) -> list[StackedLinear]:
    return [layer for layer in unique_layers(engine.model) if isinstance(layer, StackedLinear)]


@pytest.mark.parametrize("name", K_QUANTS)
def test_experts_of_several_types_have_the_weights_of_their_dequantized_selves(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_kinds(K_QUANTS[name], tmp_path, monkeypatch)
    packed, plain = resolve_model(config), resolve_model(config.replace(quantization="none"))
    kinds = [isinstance(experts.weight, QuantizedWeight) for experts in experts_of(TinyEngine(packed))]
    assert kinds == ([False, False, True, True] if name == "one layer alone" else [True] * 4)
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        comm = Communicator(rank, size)
        assert_same_weights(TinyEngine(packed, comm), TinyEngine(plain, comm), is_rounded=True)
    assert_same_logits(engine_of(packed), engine_of(plain), is_rounded=True)


@pytest.fixture
def packed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    exact = {"ffn_gate_exps": "Q4_1", "ffn_up_exps": "Q4_1", "ffn_down_exps": "Q5_1", "attn_v": "Q8_0"}
    return Path(write_kinds(exact, tmp_path, monkeypatch).model_path)


async def test_greedy_answers_of_packed_experts_are_those_of_their_dequantized_selves(
    packed_file: Path, tiny_llama: Path, prompts: list[list[int]]
) -> None:
    options: dict[str, Any] = {"download_dir": str(packed_file.parent), "tokenizer_path": str(tiny_llama)}
    async with running_engine(packed_file, quantization="none", **options) as engine:
        wanted = [(await collect(engine, make_state(prompt)))[1] for prompt in prompts]
    for mix in ({}, MIXES["retracting"]):
        async with running_engine(packed_file, **options, **mix) as engine:
            answers = await asyncio.gather(*(collect(engine, make_state(prompt)) for prompt in prompts))
            assert [tokens for _, tokens in answers] == wanted


WRONG = {
    "a stack of another number": (
        CASES["Qwen3-MoE"].metadata | {"expert_count": 6},
        {},
        r"'blk\.0\.ffn_\w+_exps\.weight' of shape \[8, \d+, \d+\] is no stack of 6 experts",
    ),
    "a tensor nobody knows": ({}, {"blk.1.ffn_gate_chexps.weight": torch.zeros(2, 2)}, r"'blk\.1\.ffn_gate_chexps"),
    "an expert of another number": ({}, {"blk.1.ffn_gate.8.bias": torch.zeros(2)}, r"blk\.1\.ffn_gate\.8|experts\.8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_whose_experts_are_not_as_it_says_is_refused_by_name(name: str, tmp_path: Path) -> None:
    keys, extra, message = WRONG[name]
    case = CASES["Qwen3-MoE"]
    case = replace(case, metadata=case.metadata | keys, changes=(stacked, lambda tensors, _: tensors | extra))
    make_checkpoint(case, tmp_path / "original")
    with pytest.raises(ModelError, match=message):
        converted(case, tmp_path)
