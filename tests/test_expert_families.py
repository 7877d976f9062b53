"""Families with experts that transformers has no class for: a native model with experts of the test's own.

The native model's MLPs are replaced by modules that are written here as sums over experts, one token after another.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from engine.checkpoint.gguf_convert import convert
from tests.conftest import save_tokenizer
from tests.test_engine import prompts, running_engine
from tests.test_experts import assert_ranks_add_up, packed
from tests.test_families import CRAMPED, Reference, assert_greedy
from tests.test_gguf_experts import stacked
from tests.test_gguf_families import RMS, Case, interleaved, write_file
from tests.test_models import MAX_DIFFERENCE, TinyEngine, random_ids

__all__ = ["prompts"]  # a fixture

HIDDEN, INNER, WIDE, EXPERTS, TOP_K, CAP = 64, 32, 96, 6, 2, 3.0
SIZES: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip


class Gated(nn.Module):
    def __init__(self, inner: int, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(HIDDEN, inner, bias=False), nn.Linear(HIDDEN, inner, bias=False)
        self.down = nn.Linear(inner, HIDDEN, bias=False)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return down


class Mixture(nn.Module):
    """Experts, each token's chosen and added by itself, and what is beside them."""

    def __init__(
        self, act: Callable[[torch.Tensor], torch.Tensor], shared_size: int, weigh: Callable[..., torch.Tensor]
    ) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Gated(INNER, act) for _ in range(EXPERTS))
        self.shared = Gated(shared_size, act) if shared_size else None
        self.weigh = weigh

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.of_token(token) for token in x.reshape(-1, HIDDEN)]).view(x.shape)

    def of_token(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.weigh(self.router(x))
        total = torch.zeros(HIDDEN) if self.shared is None else self.shared(x)
        for expert in sorted(range(EXPERTS), key=lambda i: -float(scores[i]))[:TOP_K]:
            total = total + scores[expert] * self.experts[expert](x)
        return total


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Grok2Mixture(Mixture):
    """Half of the sum of the experts and the MLP, times √2."""

    def of_token(self, x: torch.Tensor) -> torch.Tensor:
        return super().of_token(x) / math.sqrt(2)


def capped_softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.softmax(CAP * torch.tanh(logits / CAP), dim=-1)


MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
GROK_NORMS = {
    "input_layernorm": "pre_attn_norm", "post_attention_layernorm": "post_attn_norm",
    "pre_feedforward_layernorm": "pre_moe_norm", "post_feedforward_layernorm": "post_moe_norm",
}  # fmt: skip
GROK = {
    "architectures": ["Grok1ForCausalLM"], "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K,
    "attn_logit_softcapping": 2.0, "router_logit_softcapping": CAP, "embedding_multiplier_scale": 8.0,
    "output_multiplier_scale": 0.5, "rms_norm_eps": 1e-6, "intermediate_size": INNER,
}  # fmt: skip


def deepseek_names(name: str) -> str:
    for part, own in MLP.items():
        name = name.replace(f".{part}.", f".{own}.")
    return name.replace(".router.", ".gate.").replace(".shared.", ".shared_experts.")


def grok_names(name: str, experts: str = "block_sparse_moe", products: str = "w1 w3 w2", attention: str = "") -> str:
    for native, own in GROK_NORMS.items():
        name = name.replace(native, own)
    for part, own in zip(MLP, products.split(), strict=True):
        if ".experts." in name:
            name = name.replace(f".{part}.", f".{own}.")
    name = deepseek_names(name).replace(".mlp.shared_experts.", ".dense.")
    name = name.replace(".mlp.", f".{experts}.").replace(".dense.", ".mlp.")
    return name.replace("self_attn", attention) if attention else name


def first_grok_names(name: str) -> str:
    return grok_names(name, "moe_block", "linear linear_v linear_1", "attn")


def deepseek() -> tuple[nn.Module, dict[str, Any], Callable[[str], str]]:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.model.layers[1].mlp = Mixture(F.silu, 2 * INNER, lambda logits: logits.softmax(dim=-1))
    config = SIZES | {
        "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K, "n_shared_experts": 2, "moe_intermediate_size": INNER,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax",
        "rms_norm_eps": 1e-6,
    }  # fmt: skip
    return model, config, deepseek_names


def gemma_like(mixture: Callable[[], Mixture]) -> nn.Module:
    """Return Gemma 2, whose order of norms Grok has, with experts."""
    config = transformers.Gemma2Config(
        **SIZES | {"attn_implementation": "eager"}, query_pre_attn_scalar=16, attn_logit_softcapping=2.0,
        final_logit_softcapping=None, layer_types=["full_attention"] * 2,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = mixture()
    return model


def grok_1() -> tuple[nn.Module, dict[str, Any], Callable[[str], str]]:
    model = gemma_like(lambda: Mixture(gelu, 0, capped_softmax))
    of_first = {"architectures": ["Grok1ModelForCausalLM"], "num_experts": EXPERTS, "max_attn_value": 2.0}
    config = SIZES | {name: value for name, value in GROK.items() if name != "attn_logit_softcapping"} | of_first
    del config["num_local_experts"]
    return model, config, first_grok_names


def grok_2() -> tuple[nn.Module, dict[str, Any], Callable[[str], str]]:
    model = gemma_like(lambda: Grok2Mixture(gelu, WIDE, capped_softmax))
    sizes = {"residual_moe": True, "intermediate_size": WIDE, "moe_intermediate_size": INNER}
    return model, SIZES | GROK | sizes | {"attn_temperature_len": 64}, grok_names


FAMILIES = {"deepseek v1": deepseek, "grok 1": grok_1, "grok 2": grok_2}


@pytest.fixture(scope="module", params=FAMILIES)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Callable[[list[int]], torch.Tensor]]:
    """Return a family's tiny random checkpoint, and what computes the logits of a prompt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, config, names = FAMILIES[request.param]()
        for name, tensor in model.state_dict().items():
            tensor.normal_(0, 0.2)
            if "norm" in name:
                tensor.add_(0.0 if request.param.startswith("grok") else 1.0)
    is_grok = request.param.startswith("grok")
    folder: Path = tmp_path_factory.mktemp("family")
    save_tokenizer(folder)
    tensors = {
        names(name): tensor.clone() + (1.0 if is_grok and "norm" in name else 0.0)  # Gemma's norms scale by 1 + weight
        for name, tensor in model.state_dict().items()
        if not (is_grok and name == "lm_head.weight")
    }
    if is_grok:
        tensors["lm_head.weight"] = model.get_parameter("lm_head.weight").detach().clone() * 2  # times 0.5
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    return folder, lambda ids: model.eval()(torch.tensor([ids]), use_cache=False).logits[0]


@torch.inference_mode()
def test_logits_equal_those_of_the_native_model_with_experts_of_the_tests_own(
    made: tuple[Path, Callable[[list[int]], torch.Tensor]],
) -> None:
    folder, logits_of = made
    engine, ids = packed(TinyEngine(folder)), random_ids(20, seed=0)
    parts = [engine.forward({0: ids[:13]}), *(engine.forward({0: [token]}) for token in ids[13:])]
    torch.testing.assert_close(torch.cat(parts), logits_of(ids), rtol=0, atol=MAX_DIFFERENCE)


@pytest.mark.parametrize("ep_size", [1, 2])
def test_two_ranks_together_make_a_familys_sums(
    ep_size: int, made: tuple[Path, Callable[[list[int]], torch.Tensor]]
) -> None:
    assert_ranks_add_up(made[0], 2, ep_size)


class Native(Reference):
    """Say whether an answer is the greedy one of the native model."""

    def __init__(self, folder: Path, logits_of: Callable[[list[int]], torch.Tensor]) -> None:
        self.folder, self.logits_of = folder, logits_of

    @torch.inference_mode()
    def _logits(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
        return self.logits_of(prompt + answer)[len(prompt) - 1 : -1]


@pytest.mark.parametrize("made", ["deepseek v1", "grok 1"], indirect=True)
async def test_greedy_answers_in_a_cramped_mix_are_the_native_models(
    made: tuple[Path, Callable[[list[int]], torch.Tensor]], prompts: list[list[int]]
) -> None:
    async with running_engine(made[0], **CRAMPED) as engine:
        await assert_greedy(engine, Native(*made), [*prompts[1:8:3], prompts[-1]], num_constrained=1)


STACKS = {
    "expert_count": EXPERTS, "expert_used_count": TOP_K, "expert_feed_forward_length": INNER, "context_length": 512,
    "rope.freq_base": 1e4, RMS: 1e-6,
}  # fmt: skip
FILES = {
    "DeepseekForCausalLM": Case("deepseek", "", metadata=STACKS, changes=(interleaved, stacked)),
    "Grok1ForCausalLM": Case(
        "grok",
        "",
        metadata=STACKS
        | {
            "attn_logit_softcapping": 2.0,
            "router_logit_softcapping": CAP,
            "embedding_scale": 8.0,
            "logit_scale": 0.5,
            "attention.temperature_length": 64,
        },
        changes=(stacked,),
    ),
}


@pytest.mark.parametrize("made", ["deepseek v1", "grok 2"], indirect=True)
def test_a_gguf_file_has_the_logits_of_its_checkpoint(
    made: tuple[Path, Callable[[list[int]], torch.Tensor]], tmp_path: Path
) -> None:
    plain = TinyEngine(made[0])
    case = FILES[plain.config.architectures[0]]
    config = transformers.PretrainedConfig(**plain.config.raw)
    write_file(case, config, load_file(made[0] / "model.safetensors"), tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path, torch.float32, lambda n: None, needs_tokenizer=False)
    engine, ids = TinyEngine(tmp_path), random_ids(20, seed=0)
    assert engine.config.context_length == plain.config.context_length
    got, wanted = (packed(each).forward({0: ids}) for each in (engine, plain))
    torch.testing.assert_close(got, wanted, rtol=0, atol=MAX_DIFFERENCE)


def test_grok_2_serves_contexts_as_long_as_its_scores_are_plain(
    made: tuple[Path, Callable[[list[int]], torch.Tensor]],
) -> None:
    config = TinyEngine(made[0]).config
    assert config.context_length == config.raw.get("attn_temperature_len", 512)
