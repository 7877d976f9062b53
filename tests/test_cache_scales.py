"""Scales of cached keys and values: those of a checkpoint are divided by before an FP8 cache rounds."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.weights import pack_weights
from engine.errors import ModelError
from engine.step.model_runner import ModelRunner
from tests.test_models import TinyEngine, random_ids

E4M3, LARGE = torch.float8_e4m3fn, 4096.0
Tensors = dict[str, torch.Tensor]
# How libraries name them, {} for k or v.
NAMES = {
    "compressed-tensors": "self_attn.{}_scale",
    "modelopt": "self_attn.{0}_proj.{0}_scale",
    "quark": "self_attn.{}_proj.output_scale",
    "autofp8": "self_attn.kv_scale",
}
CONFIG = {
    "quant_method": "compressed-tensors",
    "config_groups": {},
    "kv_cache_scheme": {"num_bits": 8, "type": "float"},
}
K_SCALE, V_SCALE = 300.0, 410.0


@pytest.fixture(scope="module", params=["LlamaConfig", "Qwen3Config"])
def large(request: pytest.FixtureRequest, make_tiny_model: Callable[..., Path]) -> tuple[dict[str, Any], Tensors, Path]:
    """Return a model, without and with norms of heads, whose keys and values are more than FP8 can hold."""
    import transformers

    folder = make_tiny_model(
        getattr(transformers, request.param), "scales", random_norms=True, tie_word_embeddings=False
    )
    tensors = load_file(folder / "model.safetensors")
    has_norm = request.param == "Qwen3Config"
    larger = ("v_proj.weight", "k_norm.weight" if has_norm else "k_proj.weight")
    smaller = ("o_proj.weight", "q_norm.weight" if has_norm else "q_proj.weight")
    for name, tensor in tensors.items():
        if name.endswith(larger):
            tensor.mul_(LARGE)
        elif name.endswith(smaller):
            tensor.div_(LARGE)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return json.loads((folder / "config.json").read_text()), tensors, folder


def write(
    folder: Path, model: tuple[dict[str, Any], Tensors, Path], name: str | None, k_scale: Any = K_SCALE,
    v_scale: Any = V_SCALE,
) -> Path:  # fmt: skip
    config, tensors, original = model
    scales = {}
    for layer in range(config["num_hidden_layers"]) if name else ():
        for part, scale in (("k", k_scale), ("v", v_scale)):
            scales[f"model.layers.{layer}.{NAMES[name].format(part)}"] = torch.tensor(scale)  # type: ignore[index]
    save_file(tensors | scales, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    (folder / "tokenizer.json").write_bytes((original / "tokenizer.json").read_bytes())
    return folder


def packed(folder: Path, kv_dtype: torch.dtype) -> TinyEngine:
    engine = TinyEngine(folder, kv_dtype=kv_dtype)
    pack_weights(engine.model)
    return engine


def logits(engine: TinyEngine, ids: list[int]) -> torch.Tensor:
    return torch.cat([engine.forward({0: part}) for part in (ids[:15], ids[15:19], ids[19:20], ids[20:])])


@pytest.mark.parametrize("name", NAMES)
def test_an_fp8_cache_holds_what_is_divided_by_the_checkpoints_scales(
    name: str, large: tuple[dict[str, Any], Tensors, Path], tmp_path: Path
) -> None:
    scales = (K_SCALE, K_SCALE if name == "autofp8" else V_SCALE)
    ids, exact = random_ids(24, seed=1), packed(large[2], torch.float32)
    wanted, scaled = logits(exact, ids), packed(write(tmp_path, large, name, *scales), E4M3)
    got = logits(scaled, ids)
    for i, scale in enumerate(scales):  # of the first layer: the next one's inputs are rounded
        full, codes = exact.pool[0][i], scaled.pool[0][i]
        rounded = (full / scale).to(E4M3).float()
        assert rounded.abs().max() > 10
        assert (codes.float() != rounded).float().mean() < 0.002, "but for ties"
    assert (got - wanted).abs().mean() < 0.1 * wanted.std()
    plain = packed(write(tmp_path, large, None), E4M3)
    assert (logits(plain, ids) - wanted).abs().mean() > 0.3 * wanted.std(), "the test can fail"


def test_other_weights_bring_their_own_scales_to_a_gpu(
    large: tuple[dict[str, Any], Tensors, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls: list[str] = []
    for name in ("running", "new"):
        (tmp_path / name).mkdir()
    names = ("release_graphs", "recapture_graphs")
    running = packed(write(tmp_path / "running", large, "compressed-tensors", 2 * K_SCALE, V_SCALE / 4), E4M3)
    runner = SimpleNamespace(
        model=running.model, device=torch.device("cpu"), _is_cuda=True,
        **{name: functools.partial(calls.append, name) for name in names},
    )  # fmt: skip
    folder = write(tmp_path / "new", large, "compressed-tensors")
    ModelRunner.adopt_weights(cast(Any, runner), TinyEngine(folder, kv_dtype=E4M3).model)
    ids = random_ids(30, seed=1)
    assert torch.equal(logits(running, ids), logits(packed(folder, E4M3), ids))
    assert calls == list(names), "graphs hold the scale of scores"


def test_a_cache_that_rounds_nothing_needs_no_scales(
    large: tuple[dict[str, Any], Tensors, Path], tmp_path: Path
) -> None:
    ids = random_ids(24, seed=1)
    wanted = logits(packed(large[2], torch.float32), ids)
    engine = packed(write(tmp_path, large, "modelopt"), torch.float32)
    assert torch.equal(logits(engine, ids), wanted)
    assert engine.model.model.layers[0].self_attn.cache_scales is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kv_dtype", "scales", "message"),
    [
        (torch.float8_e5m2, (1.0, 1.0), "--kv-cache-dtype fp8_e5m2, but the checkpoint has scales of keys and values"),
        (E4M3, (0.0, 1.0), "model.layers.0.self_attn has a k_scale of 0.0, by which nothing can be divided"),
        (E4M3, (1.0, [1.0, 2.0]), r"v_scale.* has 2 numbers; one for all heads is supported"),
    ],
)
def test_scales_that_contradict_the_flag_or_cannot_be_used_are_named(
    kv_dtype: torch.dtype, scales: tuple[Any, Any], message: str, large: tuple[dict[str, Any], Tensors, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(ModelError, match=message):
        packed(write(tmp_path, large, "compressed-tensors", *scales), kv_dtype)


def test_a_scale_of_keys_alone_is_not_enough(large: tuple[dict[str, Any], Tensors, Path], tmp_path: Path) -> None:
    folder = write(tmp_path, large, "compressed-tensors")
    tensors = {
        name: t for name, t in load_file(folder / "model.safetensors").items() if "0.self_attn.v_scale" not in name
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"missing: model\.layers\.0\.self_attn\.v_scale"):
        packed(folder, E4M3)
