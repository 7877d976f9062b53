"""Quantized experts under the names that libraries publish them with stand for what their plain files hold."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.checkpoint.weights import pack_weights
from engine.layers.layer import unique_layers
from engine.layers.moe import StackedLinear
from kernels.quantized import QuantizedWeight
from tests.quantized_files import (
    BITSANDBYTES,
    BLOCK,
    FLOAT8,
    Weights,
    compressed,
    ct_config,
    ct_words,
    fp4,
    nf4,
    of_blocks,
    spread,
    to_fp8,
)
from tests.test_experts import FAMILIES as EXPERT_FAMILIES
from tests.test_models import MakeTinyModel, TinyEngine, assert_equals_reference, random_ids
from tests.vision_models import FAMILIES, make_vision_model

STACKED = re.compile(
    r"(.*\.mlp\.experts|.*\.feed_forward\.experts|.*\.layers\.\d+\.experts)\.(gate_up|down)_proj(_bias)?"
)
ONE_BY_ONE = {  # where the names of a family's stacks end -> what experts that are quantized one by one are called
    "gemma 4": {
        ".experts.gate_up_proj": ".experts.{}.gate_proj .up_proj",
        ".experts.down_proj": ".experts.{}.down_proj",
    },
    "gemma 4, below moe": {
        ".experts.gate_up_proj": ".moe.experts.{}.gate_proj .up_proj",
        ".experts.down_proj": ".moe.experts.{}.down_proj",
    },
    "granite-moe": {
        ".input_linear.weight": ".experts.{}.gate_proj .up_proj", ".output_linear.weight": ".experts.{}.down_proj",
    },
    "dbrx": {f".mlp.{name}": f".mlp.{{}}.{name}" for name in ("w1", "v1", "w2")},
}  # fmt: skip
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


def stacks_of(engine: TinyEngine) -> list[Any]:
    return [layer.weight for layer in unique_layers(engine.model) if isinstance(layer, StackedLinear)]


def assert_stands_for(packed: Path, plain: Path) -> None:
    engine = TinyEngine(packed)
    assert stacks_of(engine) and all(isinstance(stack, QuantizedWeight) for stack in stacks_of(engine))
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


@pytest.mark.parametrize("algorithm", ["NVFP4", "FP8"])
def test_modelopts_stacks_of_llama_4_are_packed_along_their_inputs(
    algorithm: str, make_tiny_model: MakeTinyModel, tmp_path: Path
) -> None:
    plain = make_tiny_model(
        transformers.Llama4TextConfig, "llama 4", num_local_experts=4, num_experts_per_tok=1, intermediate_size=64,
        intermediate_size_mlp=96, interleave_moe_layer_step=1, pad_token_id=0,
    )  # fmt: skip
    random, write = torch.Generator().manual_seed(0), fp4("weight", 16, "weight_scale_2")

    def rewrite(path: str, product: str, bias: str, stack: torch.Tensor) -> tuple[Weights, torch.Tensor]:
        module = f"{path}.{product}_proj"
        if algorithm == "FP8":
            scale = stack.abs().max() / 448
            codes = to_fp8(stack / scale)
            tensors = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor([0.05])}
            stands_for = codes.float() * scale
        else:
            written = [write(module, one.t(), random) for one in stack]
            tensors = {
                leaf: torch.stack([tensors[leaf] for tensors, _ in written]).transpose(1, 2)
                for leaf in ("weight", "weight_scale")
            } | {"weight_scale_2": written[0][0]["weight_scale_2"], "input_scale": torch.tensor(0.05)}
            stands_for = torch.stack([one.t() for _, one in written if one is not None])
        return {f"{module}_{leaf}".removesuffix("_weight"): one for leaf, one in tensors.items()}, stands_for

    config = {"quant_method": "modelopt", "quant_algo": algorithm, "exclude_modules": ["*self_attn*", "*router*"]}
    rewritten(plain, tmp_path / "packed", rewrite, config)
    if algorithm == "NVFP4":
        assert_stands_for(tmp_path / "packed", plain)
        return
    for packed, wanted in zip(*(stacks_of(TinyEngine(folder)) for folder in (tmp_path / "packed", plain)), strict=True):
        assert packed.form.inputs == "fp8" and bool((packed.fields["input_scale"] == 0.05).all())
        for part in range(len(packed.parts)):
            torch.testing.assert_close(packed.rows_of(part), wanted.rows_of(part))


@pytest.mark.parametrize("are_inputs_first", [True, False])
def test_stacks_of_qwen_3_vl_have_their_blocks_scales_beside_them_either_way_round(
    are_inputs_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES["qwen 3 vl with experts"]
    text = family.settings["text_config"] | {"moe_intermediate_size": 96}
    monkeypatch.setitem(
        FAMILIES, "qwen 3 vl with experts", replace(family, settings=family.settings | {"text_config": text})
    )
    (plain := tmp_path / "plain").mkdir()
    make_vision_model(plain, "qwen 3 vl with experts")

    def rewrite(path: str, product: str, bias: str, stack: torch.Tensor) -> tuple[Weights, torch.Tensor]:
        module = f"{path}.{product}_proj"
        is_turned = stack.shape[1] == {"gate_up": 64, "down": 96}[product]
        rows = stack.transpose(1, 2) if is_turned else stack
        scale = torch.stack([of_blocks(one) for one in rows]) / 448
        whole = torch.stack([spread(some, one) for some, one in zip(scale, rows, strict=True)])
        codes = to_fp8(rows / whole)
        stands_for = codes.float() * whole
        if are_inputs_first:
            codes, scale = codes.transpose(1, 2), scale.transpose(1, 2)
        return {module: codes, f"{module}_scale_inv": scale}, stands_for.transpose(1, 2) if is_turned else stands_for

    config = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": ["visual"]}
    rewritten(plain, tmp_path / "packed", rewrite, config)
    found = [stacks_of(TinyEngine(folder)) for folder in (tmp_path / "packed", plain)]
    assert found[0]
    for packed, wanted in zip(*found, strict=True):
        assert packed.form.code == "fp8"
        for part in range(len(packed.parts)):
            torch.testing.assert_close(packed.rows_of(part), wanted.rows_of(part))


@pytest.mark.parametrize("case", ONE_BY_ONE)
def test_experts_of_a_stack_may_be_quantized_one_by_one(
    case: str, make_tiny_model: MakeTinyModel, tmp_path: Path
) -> None:
    name, options = EXPERT_FAMILIES[case.partition(",")[0]]
    sizes = {"moe_intermediate_size": 64} if "moe_intermediate_size" in options else {}
    if "ffn_config" in options:
        sizes = {"ffn_config": options["ffn_config"] | {"ffn_hidden_size": 64}}
    plain = make_tiny_model(getattr(transformers, name), "one_by_one", random_norms=True, **(options | sizes))
    random, write = torch.Generator().manual_seed(0), compressed()
    tensors, packed = load_file(plain / "model.safetensors"), Weights()
    for name, tensor in tensors.items():
        end = next((end for end in ONE_BY_ONE[case] if name.endswith(end)), None)
        if end is None:
            packed[name] = tensor
            continue
        first, *others = ONE_BY_ONE[case][end].split()
        stack = tensor if tensor.dim() == 3 else tensor.unflatten(0, (options["ffn_config"]["moe_num_experts"], -1))
        is_turned, values = end == ".mlp.w2", []
        for i, one in enumerate(stack):
            module = name.removesuffix(end) + first.format(i)
            names = [module, *(module.rpartition(".")[0] + other for other in others)]
            rows = (one.t() if is_turned else one).chunk(len(names))
            written = [write(module, part, random) for module, part in zip(names, rows, strict=True)]
            for module, (codes, _) in zip(names, written, strict=True):
                packed |= {f"{module}.{leaf}": of_module for leaf, of_module in codes.items()}
            whole = torch.cat([stands_for for _, stands_for in written if stands_for is not None])
            values.append(whole.t() if is_turned else whole)
        tensors[name] = torch.stack(values).reshape(tensor.shape)
    shutil.copytree(plain, tmp_path / "packed")
    for folder, of_folder in ((plain, tensors), (tmp_path / "packed", packed)):
        save_file({name: one.contiguous() for name, one in of_folder.items()}, folder / "model.safetensors")
    raw = json.loads((plain / "config.json").read_text()) | {"quantization_config": ct_words(4)}
    (tmp_path / "packed" / "config.json").write_text(json.dumps(raw))
    assert_stands_for(tmp_path / "packed", plain)


@pytest.mark.parametrize("name", ["weight_scale", "scale_inv"])
def test_stacks_of_gemma_4_have_their_scales_beside_them(
    name: str, make_tiny_model: MakeTinyModel, tmp_path: Path
) -> None:
    config_class, options = EXPERT_FAMILIES["gemma 4"]
    plain = make_tiny_model(getattr(transformers, config_class), "gemma", random_norms=True, **options)

    def rewrite(path: str, product: str, bias: str, stack: torch.Tensor) -> tuple[Weights, torch.Tensor]:
        scale, module = stack.abs().amax(-1, keepdim=True) / 448, f"{path}.{product}_proj"
        if name == "scale_inv":  # of blocks
            scale = torch.stack([of_blocks(one) for one in stack]) / 448
        whole = torch.stack([spread(some, one) for some, one in zip(scale, stack, strict=True)])
        codes = to_fp8(stack / whole)
        return {module: codes, f"{module}_{name}": scale}, codes.float() * whole

    config: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    if name == "weight_scale":
        config = ct_config("float-quantized", FLOAT8 | {"strategy": "channel"})
    rewritten(plain, tmp_path / "packed", rewrite, config)
    if name == "weight_scale":
        assert_stands_for(tmp_path / "packed", plain)
        return
    for packed, wanted in zip(*(stacks_of(TinyEngine(folder)) for folder in (tmp_path / "packed", plain)), strict=True):
        assert packed.form.code == "fp8"
        for part in range(len(packed.parts)):
            torch.testing.assert_close(packed.rows_of(part), wanted.rows_of(part))
