"""Families whose scores fall with distance: Baichuan 13B, which transformers has no class for, and Falcon RW."""

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

from engine.checkpoint import gguf_architectures
from engine.checkpoint.gguf_convert import convert
from engine.model_config import alibi_slopes
from tests.conftest import save_tokenizer
from tests.test_engine import prompts, running_engine
from tests.test_families import CRAMPED, Reference, assert_greedy
from tests.test_gguf_families import RMS, Case, interleaved, write_file
from tests.test_models import MAX_DIFFERENCE, TinyEngine, random_ids
from tests.test_native_families import logits_of_ranks

__all__ = ["prompts"]  # a fixture

HEADS, HEAD_DIM, HIDDEN, INNER, LAYERS, VOCAB, CONTEXT = 6, 16, 96, 64, 2, 384, 512
SLOPES = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]  # of six heads: of four, then every other one of eight
CONFIG = {
    "architectures": ["BaichuanForCausalLM"],
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "model_max_length": CONTEXT,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "float32",
    "vocab_size": VOCAB,
}


class Baichuan13B(Reference):
    """Its definition, in plain torch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tensors = folder, load_file(folder / "model.safetensors")

    @torch.inference_mode()
    def _logits(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
        return self.logits(prompt + answer)[len(prompt) - 1 : -1]

    def logits(self, ids: list[int]) -> torch.Tensor:
        t = self.tensors
        h = t["model.embed_tokens.weight"][ids]
        for i in range(LAYERS):
            layer = f"model.layers.{i}"
            packed = self.norm(h, f"{layer}.input_layernorm") @ t[f"{layer}.self_attn.W_pack.weight"].T
            h = h + self.attention(*packed.chunk(3, dim=-1)) @ t[f"{layer}.self_attn.o_proj.weight"].T
            x = self.norm(h, f"{layer}.post_attention_layernorm")
            gated = F.silu(x @ t[f"{layer}.mlp.gate_proj.weight"].T) * (x @ t[f"{layer}.mlp.up_proj.weight"].T)
            h = h + gated @ t[f"{layer}.mlp.down_proj.weight"].T
        return self.norm(h, "model.norm") @ F.normalize(t["lm_head.weight"]).T

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.tensors[f"{name}.weight"]

    @staticmethod
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(len(q))
        distance = positions[:, None] - positions
        found = []
        for head, slope in enumerate(SLOPES):
            part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            scores = q[:, part] @ k[:, part].T / math.sqrt(HEAD_DIM) - slope * distance
            found.append(scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v[:, part])
        return torch.cat(found, dim=-1)


@pytest.fixture(scope="module")
def baichuan(tmp_path_factory: pytest.TempPathFactory) -> Baichuan13B:
    folder, generator = tmp_path_factory.mktemp("baichuan_13b"), torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    for i in range(LAYERS):
        of_layer = {
            "self_attn.W_pack": (3 * HIDDEN, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in of_layer.items()}
    tensors = {f"{name}.weight": 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {name: 1 + tensor for name, tensor in tensors.items() if "norm" in name}
    tensors["lm_head.weight"] *= torch.linspace(0.5, 3.0, VOCAB)[:, None]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_tokenizer(folder)
    return Baichuan13B(folder)


@torch.inference_mode()
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_logits_of_baichuan_13b_are_its_definitions(baichuan: Baichuan13B, num_ranks: int) -> None:
    ids = random_ids(60, seed=1)
    got = logits_of_ranks(baichuan.folder, num_ranks, ids)
    torch.testing.assert_close(got, baichuan.logits(ids), rtol=0, atol=MAX_DIFFERENCE)
    assert TinyEngine(baichuan.folder).config.context_length == CONTEXT


def test_a_gguf_file_of_baichuan_13b_has_its_logits(
    baichuan: Baichuan13B, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.PretrainedConfig(**CONFIG, num_key_value_heads=HEADS)
    keys = {"embedding_length": HIDDEN, "feed_forward_length": INNER, "attention.head_count": HEADS, RMS: 1e-6}
    tensors = {name: rows for tensor in baichuan.tensors.items() for name, rows in apart(*tensor).items()}
    # Known by its number of blocks.
    monkeypatch.setattr(gguf_architectures, "LAYERS_OF_BAICHUAN_13B", LAYERS)
    case = Case("baichuan", "", metadata=keys | {"context_length": CONTEXT}, changes=(interleaved,), layers=LAYERS)
    write_file(case, config, tensors, tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path, torch.float32, lambda n: None, needs_tokenizer=False)
    ids = random_ids(60, seed=1)
    torch.testing.assert_close(
        TinyEngine(tmp_path).forward({0: ids}), baichuan.logits(ids), rtol=0, atol=MAX_DIFFERENCE
    )


def apart(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the rows of queries, keys and values under their own names, as files have them."""
    if "W_pack" not in name:
        return {name: tensor}
    parts = tensor.chunk(3)
    return {name.replace("W_pack", f"{kind}_proj"): rows for kind, rows in zip("qkv", parts, strict=True)}


@pytest.mark.parametrize("options", [CRAMPED, {"tp_size": 2}], ids=["cramped", "two_ranks"])
async def test_greedy_answers_of_baichuan_13b_are_its_definitions(
    baichuan: Baichuan13B, options: dict[str, Any], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.schedule.grouping.MIN_SHARED_TOKENS", 1)
    async with running_engine(baichuan.folder, **options) as engine:
        await assert_greedy(engine, baichuan, [*prompts[1:8:3], prompts[3], prompts[-1]], num_constrained=1)


@torch.inference_mode()
def test_falcon_rw_equals_transformers_whose_eager_way_adds_its_biases_twice(
    make_tiny_model: Callable[..., Path],
) -> None:
    from transformers import AutoModelForCausalLM, FalconConfig

    options = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
    folder, ids = make_tiny_model(FalconConfig, "falcon_rw", random_norms=True, **options), random_ids(23, seed=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    wanted = model(torch.tensor([ids]), use_cache=False).logits[0]
    torch.testing.assert_close(logits_of_ranks(folder, 2, ids), wanted, rtol=0, atol=MAX_DIFFERENCE)


@pytest.mark.parametrize(
    ("num_heads", "bias_max", "exponents"),
    [
        (8, 8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (8, 16, [2, 4, 6, 8, 10, 12, 14, 16]),
        (6, 8, [2, 4, 6, 8, 1, 3]),
        (40, 8, [*((i + 1) / 4 for i in range(32)), *(i / 4 + 0.125 for i in range(8))]),
    ],
)
def test_slopes_are_those_of_the_paper(num_heads: int, bias_max: float, exponents: list[float]) -> None:
    assert alibi_slopes(num_heads, bias_max) == pytest.approx([2**-x for x in exponents])
