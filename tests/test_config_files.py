"""What config.json says and leaves out: entries are read as transformers reads them, or refused with their numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from engine.errors import ModelError
from engine.layers.layer import LayerConfig
from engine.model_config import ModelConfig
from engine.models.defaults import DEFAULTS
from engine.models.names import pieces_of
from engine.models.registry import build_model, load_config

SIZES: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "dtype": "float32",
}  # fmt: skip
LATENT: dict[str, Any] = {
    "kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 4,
    "topk_group": 2, "first_k_dense_replace": 1,
}  # fmt: skip
DEEPSEEK = SIZES | LATENT | EXPERTS | {"architectures": ["DeepseekV3ForCausalLM"]}
LINEAR = {"rope_type": "linear", "factor": 2.0}


def read(folder: Path, entries: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(entries))
    return load_config(folder)


@pytest.mark.parametrize("family", ["Llama", "Olmo2", "Granite", "GPTNeoX", "Glm", "DeepseekV3"])
def test_a_window_left_in_the_file_of_a_family_without_windows_is_none(family: str, tmp_path: Path) -> None:
    entries = DEEPSEEK | {"architectures": [f"{family}ForCausalLM"], "sliding_window": 8, "use_sliding_window": True}
    assert read(tmp_path, entries).windows == (-1,) * 4


@pytest.mark.parametrize(
    ("family", "entries", "windows"),
    [
        ("Mistral", {}, (8,) * 4),
        ("Mistral", {"use_sliding_window": False}, (-1,) * 4),
        ("Qwen2", {}, (-1,) * 4),
        ("Qwen2", {"use_sliding_window": True}, (-1,) * 4),  # from layer 28 on
        ("Qwen3", {"use_sliding_window": True, "max_window_layers": 3}, (-1, -1, -1, 8)),
        ("Starcoder2", {}, (8,) * 4),
    ],
)
def test_windows_are_of_the_layers_that_the_family_gives_them(
    family: str, entries: dict[str, Any], windows: tuple[int, ...], tmp_path: Path
) -> None:
    common = SIZES | {"architectures": [f"{family}ForCausalLM"], "sliding_window": 8}
    assert read(tmp_path, common | entries).windows == windows


@pytest.mark.parametrize("own", [{"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}])
def test_a_rope_scaling_added_to_a_file_with_rope_parameters_counts(own: dict[str, Any], tmp_path: Path) -> None:
    entries = SIZES | {"architectures": ["LlamaForCausalLM"], "rope_parameters": own, "rope_scaling": LINEAR}
    rope = read(tmp_path, entries).rope
    assert (rope.theta, rope.rope_type, rope.scaling["factor"]) == (5e5, "linear", 2.0)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="its defaults may be others")
@pytest.mark.parametrize("model_type", DEFAULTS)
def test_what_a_file_leaves_out_is_what_transformers_takes_for_it(model_type: str, tmp_path: Path) -> None:
    config_class = transformers.CONFIG_MAPPING[model_type]
    whole = json.loads(config_class(num_hidden_layers=2).to_json_string(use_diff=False))
    architecture = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[config_class].__name__
    whole |= {"architectures": [architecture], "dtype": "float32"}
    wanted = read(tmp_path, whole)
    for name, default in DEFAULTS[model_type].items():
        less = {key: value for key, value in whole.items() if key != name}
        if name == "rope_parameters":  # what positions are stretched by is not left out
            kept = {key: value for key, value in whole[name].items() if key not in default}
            less[name] = {key: value for key, value in kept.items() if not isinstance(value, dict)}
        found = read(tmp_path, less)
        assert replace(found, raw={}) == replace(wanted, raw={}), name


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_experts_per_tok": 9}, "each token has 9 of 8 experts"),
        ({"num_experts_per_tok": 0}, "each token has 0 of 8 experts"),
        ({"num_experts_per_tok": 2.0}, "num_experts_per_tok must be an integer, got 2.0"),
        ({"n_routed_experts": "8"}, "n_routed_experts must be an integer, got '8'"),
        ({"n_group": 3}, "8 experts cannot be chosen from the best 2 of 3 groups, 3 for each token"),
        ({"n_group": 0}, "best 2 of 0 groups"),
        ({"n_group": 8}, "best 2 of 8 groups"),  # a group counts as much as its best two
        ({"topk_group": 5}, "best 5 of 4 groups"),
        ({"topk_group": 1}, "best 1 of 4 groups, 3 for each token"),
        ({"n_shared_experts": -1}, "experts of size 32, -32 if shared"),
        ({"moe_intermediate_size": 0}, "experts of size 0"),
        ({"routed_scaling_factor": "1"}, "routed_scaling_factor must be a number"),
        ({"moe_layer_freq": [0, 1]}, "moe_layer_freq names 2 layers, num_hidden_layers is 4"),
        ({"moe_layer_freq": 0}, "moe_layer_freq must be positive, got 0"),
    ],
)
def test_experts_that_no_token_could_be_given_are_told_at_the_start(
    entries: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path, DEEPSEEK | entries)


@pytest.mark.parametrize(
    ("entries", "has_experts"),
    [
        ({}, [False, True, True, True]),
        ({"moe_layer_freq": 2}, [False, False, True, False]),
        ({"moe_layer_freq": [0, 1, 0, 1]}, [False, True, False, True]),
        ({"mlp_layer_types": ["sparse", "dense", "dense", "sparse"]}, [True, False, False, True]),
        ({"first_k_dense_replace": 9}, [False] * 4),
    ],
)
def test_layers_have_experts_where_the_file_says(
    entries: dict[str, Any], has_experts: list[bool], tmp_path: Path
) -> None:
    assert [experts is not None for experts in read(tmp_path, DEEPSEEK | entries).experts] == has_experts


def test_a_deepseek_v2_with_the_router_of_v3_has_it(tmp_path: Path) -> None:
    v2 = {"architectures": ["DeepseekV2ForCausalLM"], "topk_method": "noaux_tc", "norm_topk_prob": True}
    assert read(tmp_path, DEEPSEEK | v2).experts == read(tmp_path, DEEPSEEK).experts


@pytest.mark.parametrize(
    ("entries", "prefix", "dropped"),
    [
        (DEEPSEEK, "model.", [4]),
        (DEEPSEEK | {"num_nextn_predict_layers": 2}, "model.", [4, 5]),
        (DEEPSEEK | {"architectures": ["KimiVLForConditionalGeneration"]}, "language_model.model.", [4]),
        (SIZES | EXPERTS | {"architectures": ["Glm4MoeForCausalLM"], "num_nextn_predict_layers": 2}, "model.", [4, 5]),
        (
            SIZES | EXPERTS | {"architectures": ["Glm4vMoeForConditionalGeneration"], "model_type": "glm4v_moe_text"},
            "model.language_model.",
            [4],
        ),
        (
            SIZES | {"architectures": ["MiniMaxM2ForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
            | {"num_mtp_modules": 3, "head_dim": 16},
            "model.",
            [4, 5, 6],
        ),
    ],
)  # fmt: skip
def test_layers_behind_the_last_one_are_dropped_and_no_others(
    entries: dict[str, Any], prefix: str, dropped: list[int], tmp_path: Path
) -> None:
    rules = build_model(read(tmp_path, entries), LayerConfig(torch.float32)).rules
    found = [i for i in range(9) if not pieces_of(f"{prefix}layers.{i}.input_layernorm.weight", rules)]
    assert found == dropped


HUNYUAN: dict[str, Any] = {  # what is odd in the file of Hunyuan-A13B
    "architectures": ["HunYuanMoEV1ForCausalLM"], "model_type": "hunyuan_v1_moe", "num_experts": 8,
    "moe_topk": [2, 2, 2, 2], "num_shared_expert": [2, 2, 2, 2], "moe_intermediate_size": [48, 48, 48, 48],
    "n_group": False, "topk_group": False, "routed_scaling_factor": False, "q_lora_rank": None, "use_mla": False,
    "rope_theta": 1e4, "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "mscale": 1.0, "type": "dynamic"},
}  # fmt: skip


def test_lists_of_equal_numbers_and_false_for_none_are_read(tmp_path: Path) -> None:
    config = read(tmp_path, SIZES | HUNYUAN)
    experts = config.experts[0]
    assert experts is not None
    assert (experts.routing.num_experts, experts.routing.top_k, experts.routing.num_groups) == (8, 2, 1)
    assert (experts.intermediate_size, experts.shared_size) == (48, 2 * 96)
    assert config.context_length == 512
    with pytest.raises(ModelError, match=r"moe_topk must be the same for all layers, got \[2, 2, 1, 2\]"):
        read(tmp_path, SIZES | HUNYUAN | {"moe_topk": [2, 2, 1, 2]})
    with pytest.raises(ModelError, match="topk_group must be an integer, got True"):
        read(tmp_path, SIZES | HUNYUAN | {"topk_group": True})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"moe_layer_interval": 0}, "moe_layer_interval must be positive, got 0"),
        ({"moe_norm_min": 0.5}, "moe_norm_min must be at most 1e-06, got 0.5"),
    ],
)
def test_what_ernies_experts_cannot_have_is_told(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    ernie = {"architectures": ["Ernie4_5_MoeForCausalLM"], "moe_num_experts": 8, "moe_k": 2}
    with pytest.raises(ModelError, match=message):
        read(tmp_path, SIZES | ernie | {"moe_intermediate_size": 32, "moe_norm_min": 1e-12} | entries)
