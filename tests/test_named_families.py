"""Families that transformers has no class for: a native model's tiny checkpoint under their names is the same model."""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.checkpoint.weights import load_weights
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.layers.attention import Attention
from engine.layers.communicator import Communicator
from engine.layers.layer import LayerConfig, unique_layers
from engine.models.registry import build_model, load_config
from tests.conftest import save_tokenizer
from tests.test_engine import prompts, running_engine
from tests.test_families import CRAMPED, Reference, assert_greedy
from tests.test_models import CPU, TinyEngine, assert_equals_reference, random_ids

__all__ = ["prompts"]  # a fixture

MakeTinyModel = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, LAYERS, VOCAB, CONTEXT = 4, 2, 16, 64, 96, 2, 384, 512


@dataclass(frozen=True)
class Family:
    """A family by its native twin."""

    twin: str  # transformers' config class
    config: dict[str, Any]  # the family's config.json, but for what `COMMON` has
    names: dict[str, str] = field(default_factory=dict)  # part of a native name -> the family's, in order
    fused: Callable[[Tensors], Tensors] = lambda tensors: tensors  # after renaming
    of_twin: dict[str, Any] = field(default_factory=dict)  # settings of the twin


COMMON = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "torch_dtype": "float32",
    "eos_token_id": 2,
}
LLAMA_SIZES = COMMON | {
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
}
FULL_HEADS = {"num_key_value_heads": HEADS}


def fuse(name: str, parts: tuple[str, ...], join: Callable[[list[torch.Tensor]], torch.Tensor]) -> Any:
    """Return a function that replaces tensors `parts`, of weights and biases, by the one that `join` makes of them."""

    def fused(tensors: Tensors) -> Tensors:
        rest = {key: tensor for key, tensor in tensors.items() if not any(part in key for part in parts)}
        for key in tensors:
            if parts[0] in key:
                rest[key.replace(parts[0], name)] = join([tensors[key.replace(parts[0], part)] for part in parts])
        return rest

    return fused


def by_kv_head(parts: list[torch.Tensor]) -> torch.Tensor:
    """Return q, k and v of one KV head after the other, as InternLM 2 has them."""
    grouped = [part.unflatten(0, (KV_HEADS, -1)) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def with_long_head_rows(tensors: Tensors) -> Tensors:
    """Return a head whose rows have length 1 with each row multiplied by some number: normalizing undoes that."""
    factors = torch.linspace(0.5, 3.0, VOCAB)[:, None]
    return tensors | {"lm_head.weight": tensors["lm_head.weight"] * factors}


def baichuan(tensors: Tensors) -> Tensors:
    return fuse("W_pack", ("q_proj", "k_proj", "v_proj"), torch.cat)(tensors)


def chatglm(tensors: Tensors) -> Tensors:
    return fuse("query_key_value", ("q_proj", "k_proj", "v_proj"), torch.cat)(tensors)


GLM = {"attention_bias": True, "pad_token_id": 0, "rms_norm_eps": 1e-6}
GPT_2_NAMES = {
    "model.layers.": "transformer.h.",
    "model.embed_tokens.": "transformer.wte.",
    "model.norm.": "transformer.ln_f.",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
}
CHATGLM = COMMON | {
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": INNER,
    "kv_channels": HEAD_DIM,
    "layernorm_epsilon": 1e-6,
    "multi_query_attention": True,
    "multi_query_group_num": KV_HEADS,
    "num_layers": LAYERS,
    "original_rope": True,
    "padded_vocab_size": VOCAB,
    "rmsnorm": True,
    "seq_length": CONTEXT,
}
CHATGLM_NAMES = {
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.norm": "transformer.encoder.final_layernorm",
    "model.layers": "transformer.encoder.layers",
    "lm_head": "transformer.output_layer",
    "self_attn.o_proj": "self_attention.dense",
    "self_attn": "self_attention",
    "gate_up_proj": "dense_h_to_4h",
    "down_proj": "dense_4h_to_h",
}
INTERNLM_2_NAMES = {
    "self_attn.o_proj": "attention.wo",
    "self_attn": "attention",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}
INTERNLM_2 = {"names": INTERNLM_2_NAMES, "fused": fuse("wqkv", ("q_proj", "k_proj", "v_proj"), by_kv_head)}
FAMILIES = {
    "yi, first names": Family(
        "LlamaConfig",
        LLAMA_SIZES | {"architectures": ["YiForCausalLM"], "rope_theta": 5e6},
        {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"},
        of_twin={"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    ),
    "xverse": Family("LlamaConfig", LLAMA_SIZES | {"architectures": ["XverseForCausalLM"]}),
    "aquila": Family("LlamaConfig", LLAMA_SIZES | {"architectures": ["AquilaForCausalLM"]}),
    "internlm": Family(
        "LlamaConfig",
        LLAMA_SIZES | FULL_HEADS | {
            "architectures": ["InternLMForCausalLM"],
            "bias": True,
            "rotary": {"type": "dynamic", "base": 1e4},
        },
        of_twin=FULL_HEADS | {"attention_bias": True},
    ),
    "internlm 2": Family(
        "LlamaConfig",
        LLAMA_SIZES | {
            "architectures": ["InternLM2ForCausalLM"],
            "bias": False,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
        **INTERNLM_2,
        of_twin={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "internlm 2 with biases": Family(
        "LlamaConfig",
        LLAMA_SIZES | {"architectures": ["InternLM2ForCausalLM"], "bias": True, "rope_theta": 1e4},
        **INTERNLM_2,
        of_twin={"attention_bias": True},
    ),
    "internlm 3": Family(
        "LlamaConfig",
        LLAMA_SIZES | {"architectures": ["InternLM3ForCausalLM"], "bias": False, "qkv_bias": False},
    ),
    "internlm 3 with biases": Family(
        "LlamaConfig",
        LLAMA_SIZES | {"architectures": ["InternLM3ForCausalLM"], "bias": True, "qkv_bias": True},
        of_twin={"attention_bias": True, "mlp_bias": True},
    ),
    "baichuan 7B": Family(
        "LlamaConfig",
        COMMON | {
            "architectures": ["BaiChuanForCausalLM"],
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "max_position_embeddings": CONTEXT,
            "vocab_size": 64000,
        },
        fused=baichuan,
        of_twin=FULL_HEADS | {"vocab_size": 64000},
    ),
    "baichuan 2 7B": Family(
        "LlamaConfig",
        COMMON | {
            "architectures": ["BaichuanForCausalLM"],
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "max_position_embeddings": CONTEXT,
            "model_max_length": CONTEXT,
        },
        fused=lambda tensors: with_long_head_rows(baichuan(tensors)),
        of_twin=FULL_HEADS,
    ),
    "qwen 1": Family(
        "Qwen2Config",
        COMMON | {
            "architectures": ["QWenLMHeadModel"],
            "intermediate_size": 2 * INNER,
            "num_hidden_layers": LAYERS,
            "kv_channels": HEAD_DIM,
            "layer_norm_epsilon": 1e-6,
            "max_position_embeddings": 2 * CONTEXT,
            "seq_length": CONTEXT,
            "no_bias": True,
            "rotary_emb_base": 1e4,
            "rotary_pct": 1.0,
            "use_dynamic_ntk": True,
            "use_logn_attn": True,
        },
        GPT_2_NAMES | {
            "self_attn.o_proj": "attn.c_proj",
            "self_attn": "attn",
            "mlp.gate_proj": "mlp.w2",
            "mlp.up_proj": "mlp.w1",
            "mlp.down_proj": "mlp.c_proj",
        },
        fuse("c_attn", ("q_proj", "k_proj", "v_proj"), torch.cat),
        of_twin=FULL_HEADS,
    ),
    "chatglm 3": Family(
        "GlmConfig",
        CHATGLM,
        CHATGLM_NAMES,
        lambda tensors: chatglm(tensors) | {"transformer.rotary_pos_emb.inv_freq": torch.ones(4)},
        of_twin=GLM | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "glm-4-9b, as first published": Family(
        "GlmConfig",
        CHATGLM | {"architectures": ["ChatGLMForConditionalGeneration"], "rope_ratio": 500},
        CHATGLM_NAMES,
        lambda tensors: chatglm(tensors),
        of_twin=GLM | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}},
    ),
    "minicpm": Family(
        "GraniteConfig",
        LLAMA_SIZES | {
            "architectures": ["MiniCPMForCausalLM"],
            "rms_norm_eps": 1e-5,
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 16,
        },
        fused=lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"},
        of_twin={
            "attention_multiplier": HEAD_DIM**-0.5,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 1.4 / LAYERS**0.5,
            "logits_scaling": HIDDEN / 16,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
    ),
    "mimo": Family(
        "Qwen2Config",
        LLAMA_SIZES | {"architectures": ["MiMoForCausalLM"], "attention_bias": True},
        fused=lambda tensors: tensors | {"model.mtp_layers.0.input_proj.weight": torch.ones(1)},
    ),
    "stablelm epoch": Family(
        "StableLmConfig",
        {name: value for name, value in LLAMA_SIZES.items() if name != "rms_norm_eps"} | {
            "architectures": ["StableLMEpochForCausalLM"],
            "norm_eps": 1e-3,
            "rope_pct": 0.5,
            "use_qkv_bias": True,
        },
        of_twin={"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-3, "use_qkv_bias": True},
    ),
    "orion": Family(
        "StableLmConfig",
        LLAMA_SIZES | {"architectures": ["OrionForCausalLM"], "rms_norm_eps": 1e-5},
        of_twin={"partial_rotary_factor": 1.0, "layer_norm_eps": 1e-5, "use_parallel_residual": False},
    ),
    "exaone 3": Family(
        "LlamaConfig",
        COMMON | {
            "architectures": ["ExaoneForCausalLM"],
            "activation_function": "silu",
            "intermediate_size": INNER,
            "num_layers": LAYERS,
            "num_key_value_heads": KV_HEADS,
            "layer_norm_epsilon": 1e-6,
            "max_position_embeddings": CONTEXT,
            "rope_theta": 5e5,
        },
        GPT_2_NAMES | {
            "self_attn.o_proj": "attn.attention.out_proj",
            "self_attn": "attn.attention",
            "mlp.gate_proj": "mlp.c_fc_0",
            "mlp.up_proj": "mlp.c_fc_1",
            "mlp.down_proj": "mlp.c_proj",
        },
        of_twin={"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(
    make_tiny_model: MakeTinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """Return `made(name)`: (the family's folder, its native twin's), biases and norms at random."""

    @functools.cache
    def make(name: str) -> tuple[Path, Path]:
        family = FAMILIES[name]
        options = {"tie_word_embeddings": False} | family.of_twin
        twin = make_tiny_model(getattr(transformers, family.twin), "twin", **options)
        tensors = randomize(load_file(twin / "model.safetensors"), name)
        save_file(tensors, twin / "model.safetensors", {"format": "pt"})
        return write_family(family, tensors, tmp_path_factory.mktemp("named")), twin

    return make


def randomize(tensors: Tensors, name: str) -> Tensors:
    """Return `tensors` with norms and biases, which start at one and zero, at random; unit rows for Baichuan 2."""
    torch.manual_seed(0)
    made = {
        key: torch.empty_like(tensor).uniform_(0.5, 1.5) if "norm" in key or "bias" in key else tensor
        for key, tensor in tensors.items()
    }
    if name == "baichuan 2 7B":
        made["lm_head.weight"] = torch.nn.functional.normalize(made["lm_head.weight"])
    return made


def write_family(family: Family, tensors: Tensors, folder: Path) -> Path:
    renamed = {}
    for key, tensor in tensors.items():
        for native, own in family.names.items():
            key = key.replace(native, own)
        renamed[key] = tensor
    fused = {key: tensor.contiguous() for key, tensor in family.fused(renamed).items()}
    save_file(fused, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(family.config))
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_a_renamed_checkpoint_equal_its_twins(name: str, made: Callable[[str], tuple[Path, Path]]) -> None:
    folder, twin = made(name)
    engine = TinyEngine(folder)
    assert engine.config.is_generation and engine.config.context_length == CONTEXT
    assert_equals_reference(engine, twin, random_ids(29, seed=1), random_ids(23, seed=2))


@pytest.mark.parametrize("name", FAMILIES)
def test_each_rank_holds_what_it_holds_of_the_twin(name: str, made: Callable[[str], tuple[Path, Path]]) -> None:
    def load(folder: Path, rank: int) -> list[torch.Tensor]:
        config = load_config(folder, EngineConfig(dtype="float32"))
        model = build_model(config, LayerConfig(torch.float32, comm=Communicator(rank, 2)))
        load_weights(model, folder, "auto", CPU)
        return [weight for layer in unique_layers(model) for _, weight in layer.weights()]

    for rank in range(2):
        ours, wanted = (load(folder, rank) for folder in made(name))
        for weight, expected in zip(ours, wanted, strict=True):
            torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)


@pytest.fixture
def reference(request: pytest.FixtureRequest, made: Callable[[str], tuple[Path, Path]]) -> tuple[Path, Reference]:
    """Return the folder of the family that is the test's parameter, and transformers' model of its twin."""
    folder, twin = made(request.param)
    return folder, Reference(twin)


@pytest.mark.parametrize("reference", FAMILIES, indirect=True)
async def test_greedy_answers_equal_the_twins_where_room_is_short(
    reference: tuple[Path, Reference], prompts: list[list[int]]
) -> None:
    folder, twin = reference
    async with running_engine(folder, **CRAMPED) as engine:
        await assert_greedy(engine, twin, prompts[1:8:3], num_constrained=1)


@pytest.mark.parametrize("reference", ["chatglm 3", "minicpm"], indirect=True)
async def test_greedy_answers_on_two_ranks_equal_the_twins(
    reference: tuple[Path, Reference], prompts: list[list[int]]
) -> None:
    folder, twin = reference
    async with running_engine(folder, tp_size=2) as engine:
        await assert_greedy(engine, twin, prompts[-10:], num_constrained=1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"position_encoding_2d": True}, "ChatGLM-6B, the first of its name, is not supported"),
        ({"rmsnorm": False}, "rmsnorm False is not supported for ChatGLM, only True"),
        ({"kv_channels": "16"}, "kv_channels must be a positive integer, got '16'"),
        ({"num_layers": None}, "has no 'num_layers'"),
    ],
)
def test_what_no_published_chatglm_has_is_named(
    override: dict[str, Any], message: str, made: Callable[[str], tuple[Path, Path]]
) -> None:
    folder, _ = made("chatglm 3")
    with pytest.raises(ModelError, match=message):
        load_config(folder, EngineConfig(json_model_override_args=json.dumps(override)))


@torch.inference_mode()
def test_qwen_1_beyond_its_length_is_stretched_in_steps_and_its_queries_grow(
    made: Callable[[str], tuple[Path, Path]],
) -> None:
    folder, twin = made("qwen 1")
    short, longest, ids = 8, 40, random_ids(40, seed=1)
    alpha = 2**4 - 1  # 40 tokens are within 2³ times 8
    model = transformers.AutoModelForCausalLM.from_pretrained(
        twin,
        dtype=torch.float32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4 * alpha ** (HEAD_DIM / (HEAD_DIM - 2))},
    )
    scale = torch.tensor([max(1.0, math.log(position + 1, short)) for position in range(longest)])[:, None]
    for block in model.model.layers:
        block.self_attn.q_proj.register_forward_hook(lambda _module, _inputs, queries: queries * scale)
    wanted = model(torch.tensor([ids]), use_cache=False).logits[0]
    engine = TinyEngine(folder, context_length=longest, json_model_override_args=f'{{"seq_length": {short}}}')
    got = torch.cat([engine.forward({0: part}) for part in (ids[:5], ids[5:30], ids[30:])])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    within = TinyEngine(folder, json_model_override_args=f'{{"seq_length": {short}}}').model.model.layers[0].self_attn
    assert isinstance(within, Attention)
    assert within.after_rope is None  # today's kernels, and no more
