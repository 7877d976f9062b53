"""Test every family that transformers has a class for: a tiny random checkpoint, float32, against its logits.

Weights of norms, biases and scales are random, prompts are longer than any window, in chunks and token by token.
"""

import functools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.layers.communicator import Communicator
from engine.models.registry import load_config
from tests.test_models import (
    MAX_DIFFERENCE,
    TinyEngine,
    assert_equals_bare_reference,
    assert_equals_reference,
    random_ids,
    reference_logits,
)  # fmt: skip

MakeTinyModel = Callable[..., Path]

YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0] * 6,
    "long_factor": [1.0, 1.2, 1.5, 3.0, 5.0, 12.0],
}
LOCAL_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention"]
LOCAL_ROPE = {"rope_type": "default", "rope_theta": 1e4}
GEMMA_4 = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 384,
    "final_logit_softcapping": 3.0,
}
# (transformers' config class, what differs from conftest's sizes)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi 3": ("Phi3Config", {"sliding_window": 8, "pad_token_id": 0}),
    "phi 4 mini": (
        "Phi3Config",
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 16,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
        },
    ),
    "gemma 1": ("GemmaConfig", {"head_dim": 32}),
    "gemma 3": (
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 4,
            "layer_types": [*LOCAL_GLOBAL, "full_attention"],
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "sliding_attention": LOCAL_ROPE,
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
    ),
    "gemma 4": ("Gemma4TextConfig", GEMMA_4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "gemma 4, all layers with values": ("Gemma4TextConfig", GEMMA_4 | {"attention_bias": True}),
    "gemma 4, heads of one size": ("Gemma4TextConfig", GEMMA_4 | {"global_head_dim": 16}),
    "gemma 4 E2B": (
        "Gemma4TextConfig",
        GEMMA_4 | {
            "num_hidden_layers": 6,
            "layer_types": ["full_attention", *LOCAL_GLOBAL[:2] * 2, "full_attention"],
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "granite 3": (
        "GraniteConfig",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "attention_bias": True,
        },
    ),
    "smollm 3": ("SmolLM3Config", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "pad_token_id": 0}),
    "smollm 3 with windows": (
        "SmolLM3Config",
        {
            "num_hidden_layers": 3,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 8,
            "pad_token_id": 0,
        },
    ),
    "olmo 2": ("Olmo2Config", {"num_key_value_heads": 2}),
    "olmo 3": (
        "Olmo3Config",
        {
            "num_hidden_layers": 3,
            "layer_types": LOCAL_GLOBAL,
            "sliding_window": 8,
            "rope_parameters": {"sliding_attention": LOCAL_ROPE, "full_attention": YARN},
        },
    ),
    "seed oss": ("SeedOssConfig", {"attention_bias": True, "attention_out_bias": False}),
    "seed oss, other biases": ("SeedOssConfig", {"attention_out_bias": True, "mlp_bias": True}),
    "mistral nemo": ("MistralConfig", {"head_dim": 32, "sliding_window": None}),
    "ministral": (
        "MinistralConfig",
        {"num_hidden_layers": 3, "layer_types": LOCAL_GLOBAL, "sliding_window": 8},
    ),
    "ministral 3": (
        "Ministral3Config",
        {
            "rope_parameters": YARN | {
                "original_max_position_embeddings": 8, "factor": 16.0, "llama_4_scaling_beta": 0.3, "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "glm 4": ("GlmConfig", {"pad_token_id": 0}),
    "glm 4 0414": ("Glm4Config", {"pad_token_id": 0}),
    "exaone 4": ("Exaone4Config", {"num_hidden_layers": 4, "sliding_window": 8, "sliding_window_pattern": 2}),
    "exaone 4 without windows": ("Exaone4Config", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "hunyuan": (
        "HunYuanDenseV1Config",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}},
    ),
    "hunyuan, stretched": ("HunYuanDenseV1Config", {"rope_parameters": YARN}),
    "ernie 4.5": ("Ernie4_5Config", {"use_bias": True}),
    "arcee": ("ArceeConfig", {"mlp_bias": True}),
    "helium": ("HeliumConfig", {}),
    "apertus": ("ApertusConfig", {"pad_token_id": 0}),
    "command-r": ("CohereConfig", {"logit_scale": 0.3, "pad_token_id": 0}),
    "command-r+": ("CohereConfig", {"use_qk_norm": True, "attention_bias": True, "pad_token_id": 0}),
    "command-r7b": ("Cohere2Config", {"sliding_window": 8, "num_hidden_layers": 5, "pad_token_id": 0}),
    "olmo 1": ("OlmoConfig", {"clip_qkv": 1.5, "pad_token_id": 0}),
    "stablelm with norms of heads": ("StableLmConfig", {"qk_layernorm": True}),
    "gpt-2": ("GPT2Config", {"n_inner": 96}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "init_std": 0.2, "pad_token_id": 0}),
    "opt 350m": (
        "OPTConfig",
        {
            "ffn_dim": 96,
            "init_std": 0.2,
            "do_layer_norm_before": False,
            "word_embed_proj_dim": 32,
            "pad_token_id": 0,
        },
    ),
    "galactica": (
        "OPTConfig",
        {
            "ffn_dim": 96,
            "init_std": 0.2,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
            "pad_token_id": 0,
        },
    ),
    "starcoder 2": ("Starcoder2Config", {"sliding_window": 8}),
    "starcoder 2 without biases": ("Starcoder2Config", {"use_bias": False}),
    "phi 2": ("PhiConfig", {}),
    "stablelm": ("StableLmConfig", {"use_qkv_bias": True}),
    "stablelm, parallel": ("StableLmConfig", {"use_parallel_residual": True}),
    "nemotron": ("NemotronConfig", {}),
    "bloom": ("BloomConfig", {}),
    "bloom, no power of two of heads": ("BloomConfig", {"num_attention_heads": 6, "hidden_size": 96}),
    "mpt": ("MptConfig", {"num_attention_heads": 6, "hidden_size": 96, "max_seq_len": 512}),
    "mpt, clamped": (
        "MptConfig",
        {
            "max_seq_len": 512,
            "attn_config": {"clip_qkv": 1.5, "softmax_scale": 0.3},
        },
    ),
    "falcon": ("FalconConfig", {}),
    "falcon 2": (
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 96},
    ),
    "falcon 40b": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gpt-neox, not parallel": ("GPTNeoXConfig", {"use_parallel_residual": False}),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(make_tiny_model: MakeTinyModel) -> Callable[[str], Path]:
    """Return `made(family)`: its folder."""
    import transformers

    @functools.cache
    def make(family: str) -> Path:
        config_class, overrides = FAMILIES[family]
        return make_tiny_model(getattr(transformers, config_class), "native", random_norms=True, **overrides)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, made: Callable[[str], Path]) -> None:
    folder = made(family)
    assert_equals_reference(TinyEngine(folder), folder, random_ids(29, seed=1), random_ids(23, seed=2))


class ThreadRanks(Communicator):
    """Sums between ranks that are threads of this process."""

    def __init__(self, rank: int, shared: list[torch.Tensor | None], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(shared))
        self.shared, self.barrier = shared, barrier

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.shared[self.rank] = x
        self.barrier.wait()
        total = sum(part for part in self.shared if part is not None)
        self.barrier.wait()
        assert isinstance(total, torch.Tensor)
        return total


def logits_of_ranks(folder: Path, num_ranks: int, ids: list[int]) -> torch.Tensor:
    """Return the logits of `ids`, in two chunks, by ranks that share the model's weights."""
    shared: list[torch.Tensor | None] = [None] * num_ranks
    barrier = threading.Barrier(num_ranks, timeout=120)
    logits: list[torch.Tensor] = [torch.empty(0)] * num_ranks

    def run(rank: int) -> None:
        try:
            engine = TinyEngine(folder, ThreadRanks(rank, shared, barrier))
            logits[rank] = torch.cat((engine.forward({0: ids[:17]}), engine.forward({0: ids[17:]})))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("family", ["gemma 3", "gemma 4 E2B", "phi 2", "falcon", "mpt", "gpt-neox"])
def test_a_decoder_without_a_head_has_the_states_of_the_reference(
    family: str, make_tiny_model: MakeTinyModel, tmp_path: Path
) -> None:
    name, options = FAMILIES[family]
    assert_equals_bare_reference(name, options, make_tiny_model, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_compute_the_logits_together(family: str, made: Callable[[str], Path]) -> None:
    folder, ids = made(family), random_ids(23, seed=2)
    torch.testing.assert_close(
        logits_of_ranks(folder, 2, ids), reference_logits(folder, ids), rtol=0, atol=MAX_DIFFERENCE
    )


@pytest.mark.parametrize("family", ["olmo 2", "glm 4", "command-r+"])
def test_four_ranks_of_which_two_share_a_kv_head_compute_them_as_well(family: str, made: Callable[[str], Path]) -> None:
    folder, ids = made(family), random_ids(23, seed=2)
    torch.testing.assert_close(
        logits_of_ranks(folder, 4, ids), reference_logits(folder, ids), rtol=0, atol=MAX_DIFFERENCE
    )


TEXT = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def save_image_model(name: str, folder: Path, **text: Any) -> None:
    """Write a tiny random model that also reads images, whose language model has the settings `text`."""
    import transformers as hf

    configs = {
        "gemma 3": lambda: hf.Gemma3Config(
            text_config=hf.Gemma3TextConfig(**TEXT | text), vision_config=hf.SiglipVisionConfig(**VISION)
        ),
        "gemma 4": lambda: hf.Gemma4Config(
            text_config=hf.Gemma4TextConfig(**TEXT | text),
            vision_config=hf.Gemma4VisionConfig(
                **VISION, num_key_value_heads=2, head_dim=16, position_embedding_size=16
            ),
            audio_config=hf.Gemma4AudioConfig(
                hidden_size=32, num_hidden_layers=1, num_attention_heads=2, output_proj_dims=32
            ),
        ),
        "mistral small 3": lambda: hf.Mistral3Config(
            text_config=hf.MistralConfig(**TEXT | text),
            vision_config=hf.PixtralVisionConfig(**VISION, head_dim=16),
            tie_word_embeddings=False,
        ),
        "ministral 3": lambda: hf.Mistral3Config(
            text_config=hf.Ministral3Config(**TEXT | text),
            vision_config=hf.PixtralVisionConfig(**VISION, head_dim=16),
            tie_word_embeddings=True,
        ),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForImageTextToText.from_config(configs[name](), dtype=torch.float32)
    model.save_pretrained(folder)


@torch.inference_mode()
def image_model_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForImageTextToText

    load = AutoModelForImageTextToText.from_pretrained
    model = load(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gemma 3", {"layer_types": LOCAL_GLOBAL, "sliding_window": 8}),
        ("gemma 4", FAMILIES["gemma 4 E2B"][1]),
        ("mistral small 3", {"sliding_window": None}),
        ("ministral 3", FAMILIES["ministral 3"][1]),
    ],
)
def test_of_a_model_that_reads_images_the_language_half_runs_alone(
    name: str, text: dict[str, Any], tmp_path: Path
) -> None:
    save_image_model(name, tmp_path, **text)
    ids = random_ids(23, seed=2)
    engine = TinyEngine(tmp_path)
    got = torch.cat((engine.forward({0: ids[:17]}), engine.forward({0: ids[17:]})))
    torch.testing.assert_close(got, image_model_logits(tmp_path, ids), rtol=0, atol=MAX_DIFFERENCE)


def test_both_ways_of_naming_the_language_half_are_read_and_an_override_reaches_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_image_model("gemma 3", tmp_path, layer_types=LOCAL_GLOBAL, sliding_window=8)
    ids, file = random_ids(12, seed=3), tmp_path / "model.safetensors"
    wanted = TinyEngine(tmp_path).forward({0: ids})
    tensors = {
        name.replace("language_model.model.", "model.language_model.").replace("vision", "model.vision", 1): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    torch.testing.assert_close(TinyEngine(tmp_path).forward({0: ids}), wanted, rtol=0, atol=0)
    for override in ('{"num_hidden_layers": 2}', '{"text_config": {"num_hidden_layers": 2}}'):
        assert load_config(tmp_path, EngineConfig(json_model_override_args=override)).num_hidden_layers == 2


def test_a_context_no_longer_than_the_window_changes_nothing_but_the_windows(made: Callable[[str], Path]) -> None:
    folder, ids = made("gemma 4"), random_ids(8, seed=3)
    engine = TinyEngine(folder, context_length=8)
    assert engine.config.windows == (-1,) * 4
    torch.testing.assert_close(engine.forward({0: ids}), reference_logits(folder, ids), rtol=0, atol=MAX_DIFFERENCE)


def test_keys_that_layers_do_not_read_may_be_in_the_file(made: Callable[[str], Path]) -> None:
    from engine.models.names import pieces_of

    names = TinyEngine(made("gemma 4 E2B")).model.names
    for name in ("k_proj", "v_proj", "k_norm"):
        assert pieces_of(f"model.layers.3.self_attn.{name}.weight", names) == []
        assert len(pieces_of(f"model.layers.2.self_attn.{name}.weight", names)) == 1


def test_files_of_before_name_windows_and_local_rotation_in_their_own_way(
    make_tiny_model: MakeTinyModel, tmp_path: Path
) -> None:
    from transformers import Gemma3TextConfig

    made = make_tiny_model(Gemma3TextConfig, "gemma3", **FAMILIES["gemma 3"][1] | {"layer_types": None})
    raw = json.loads((made / "config.json").read_text())
    for name in ("layer_types", "rope_parameters", "_sliding_window_pattern"):
        del raw[name]
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    for pattern in ({"sliding_window_pattern": 2}, {"sliding_window_pattern": "LG"}):
        (tmp_path / "config.json").write_text(json.dumps(raw | old | pattern))
        config = load_config(tmp_path)
        assert config.windows == (8, -1, 8, -1)
        assert [(a.rope.theta, a.rope.rope_type) for a in config.attention] == [(1e4, "default"), (1e6, "linear")] * 2
        assert config.context_length == 512


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("gemma 4", {"num_kv_shared_layers": 4}, "num_kv_shared_layers 4 leaves no layer"),
        ("gemma 3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ("smollm 3", {"no_rope_layers": [1, 0]}, "no_rope_layers names 2 layers, num_hidden_layers is 4"),
        ("granite 3", {"residual_multiplier": "2"}, "residual_multiplier must be a positive number, got '2'"),
        ("exaone 4", {"sliding_window_pattern": [4]}, "sliding_window_pattern must be a number, or letters"),
        ("phi 2", {"qk_layernorm": True}, "qk_layernorm is not supported for Phi"),
        ("gpt-2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is not supported"),
        ("opt", {"_remove_final_layer_norm": True}, "an OPT without its final norm"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is"),
        ("mpt", {"attn_config": {"alibi": False}}, "attn_config: alibi False is not supported for MPT, only True"),
        ("mpt", {"logit_scale": 2.0}, "biases and logit_scale are not supported for MPT"),
    ],
)
def test_what_a_family_cannot_run_is_named(
    family: str, overrides: dict[str, Any], message: str, made: Callable[[str], Path]
) -> None:
    with pytest.raises(ModelError, match=message):
        load_config(made(family), EngineConfig(json_model_override_args=json.dumps(overrides)))


@pytest.mark.parametrize(("family", "context_length", "is_too_long"), [("gpt-2", 513, True), ("opt", 512, False)])
def test_a_context_may_not_be_longer_than_the_positions_that_a_model_has_learned(
    family: str, context_length: int, is_too_long: bool, made: Callable[[str], Path]
) -> None:
    if is_too_long:
        with pytest.raises(ModelError, match=f"context_length is {context_length}, .* has learned 512 positions"):
            TinyEngine(made(family), context_length=context_length)
    else:
        engine = TinyEngine(made(family), context_length=context_length)
        assert engine.model.model.embed_positions.weight.shape[0] == 512  # type: ignore[attr-defined]


def test_gpt_2_as_first_published_names_weights_without_a_prefix_and_holds_masks(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder, ids = made("gpt-2"), random_ids(12, seed=3)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    wanted = TinyEngine(folder).forward({0: ids})
    torch.testing.assert_close(TinyEngine(tmp_path).forward({0: ids}), wanted, rtol=0, atol=0)


def test_command_r_is_as_long_as_its_files_say_it_was_trained(made: Callable[[str], Path]) -> None:
    options = EngineConfig(json_model_override_args='{"model_max_length": 4096}')
    assert load_config(made("command-r"), options).context_length == 4096
