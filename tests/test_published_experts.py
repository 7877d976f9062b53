"""Quantized experts under the names that libraries publish them with stand for what their plain files hold."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.checkpoint.weights import pack_weights
from engine.layers.layer import unique_layers
from engine.layers.moe import StackedLinear
from kernels.quantized import QuantizedWeight
from tests.quantized_files import BITSANDBYTES, Weights, nf4
from tests.test_models import MakeTinyModel, TinyEngine, assert_equals_reference, random_ids

STACKED = re.compile(r"(.*\.mlp\.experts|.*\.feed_forward\.experts)\.(gate_up|down)_proj(_bias)?")
Rewrite = Callable[[str, str, str, torch.Tensor], tuple[Weights, torch.Tensor]]
"""(experts' path, "gate_up" or "down", "_bias" or "", a stack) -> the file's tensors, and the stack they stand for."""


def rewritten(folder: Path, target: Path, rewrite: Rewrite, config: dict[str, Any]) -> None:
    """Write `folder`'s checkpoint to `target` with its stacks of experts changed; overwrite it with their values."""
    plain, packed = load_file(folder / "model.safetensors"), Weights()
    for name, tensor in plain.items():
        if match := STACKED.fullmatch(name):
            written, plain[name] = rewrite(match[1], match[2], match[3] or "", tensor)
            packed |= written
        else:
            packed[name] = tensor
    shutil.copytree(folder, target)
    for file, tensors in ((folder, plain), (target, packed)):
        save_file({name: one.contiguous() for name, one in tensors.items()}, file / "model.safetensors")
    raw = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))


def assert_stands_for(packed: Path, plain: Path) -> None:
    engine = TinyEngine(packed)
    stacks = [layer for layer in unique_layers(engine.model) if isinstance(layer, StackedLinear)]
    assert stacks and all(isinstance(stack.weight, QuantizedWeight) for stack in stacks)
    pack_weights(engine.model)
    assert_equals_reference(engine, plain, random_ids(20, seed=0), random_ids(13, seed=1))


def test_unsloths_layers_of_gpt_oss_are_its_experts(make_tiny_model: MakeTinyModel, tmp_path: Path) -> None:
    plain = make_tiny_model(
        transformers.GptOssConfig, "gpt-oss", random_norms=True, num_local_experts=4, num_experts_per_tok=2,
        intermediate_size=64, sliding_window=64,
    )  # fmt: skip
    random, write = torch.Generator().manual_seed(0), nf4(double=True)

    def rewrite(path: str, product: str, bias: str, stack: torch.Tensor) -> tuple[Weights, torch.Tensor]:
        written, values = Weights(), []
        for i, one in enumerate(stack):
            module = f"{path}.{product}_projs.{i}"
            tensors, stands_for = ({"bias": one}, one) if bias else write(module, one.t(), random)
            assert stands_for is not None
            written |= {f"{module}.{leaf}": tensor for leaf, tensor in tensors.items()}
            values.append(stands_for if bias else stands_for.t())
        return written, torch.stack(values)

    rewritten(plain, tmp_path / "packed", rewrite, BITSANDBYTES | {"llm_int8_skip_modules": ["router", "self_attn"]})
    file = tmp_path / "packed" / "model.safetensors"
    renamed = {re.sub(r"\.router\.", ".router.linear.", name): one for name, one in load_file(file).items()}
    save_file(renamed, file)
    assert_stands_for(tmp_path / "packed", plain)
