"""Writers of quantized checkpoints, by the formulas of their formats, and what the codes they write stand for."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]
Write = Callable[[str, torch.Tensor, torch.Generator], tuple[Weights, torch.Tensor | None]]
"""(module, its weight [n, k], randomness) -> the checkpoint's tensors, by what follows the module's name, and what they
stand for [n, k]; None: the module is not quantized."""
Round = Callable[[torch.Tensor], torch.Tensor]

GROUP = 32


@dataclass(frozen=True)
class Case:
    """A kind of quantized checkpoint."""

    config: dict[str, Any]  # config.json's quantization_config
    write: Write
    rounds: Round | None = None  # what products do to their inputs
    num_kv_heads: int = 2
    splits: bool = True  # over ranks


def group_wise(of_groups: torch.Tensor, dim: int = 0, group: int = GROUP) -> torch.Tensor:
    return of_groups.repeat_interleave(group, dim)


def int32_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack values [..., count] into int32 [..., count * bits / 32], one string of bits, the lowest ones first."""
    string = (values.long()[..., None] >> torch.arange(bits) & 1).flatten(-2)
    words = (string.unflatten(-1, (-1, 32)) << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def random_codes(bits: int, rows: int, columns: int, random: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (rows, columns), generator=random)


def random_scales(bits: int, rows: int, columns: int, random: torch.Generator) -> torch.Tensor:
    return (torch.rand(rows, columns, generator=random) * 0.16 / (1 << bits)).half()


def write_awq(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
    n, k = weight.shape
    codes, zeros = random_codes(4, k, n, random), random_codes(4, k // GROUP, n, random)
    scales = random_scales(4, k // GROUP, n, random)

    def packed(values: torch.Tensor) -> torch.Tensor:
        return int32_words(values.unflatten(1, (-1, 8))[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)

    stands_for = (codes - group_wise(zeros)) * group_wise(scales.float())
    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}, stands_for.t()


def gptq(
    bits: int = 4, *, sym: bool = False, zero_offset: int = 1, desc_act: bool = False, group: int | None = GROUP
) -> Write:
    """group: None: all inputs."""

    def write(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
        n, k = weight.shape
        g_idx = torch.arange(k) // (group or k)
        if desc_act:  # parts that are multiplied as one see the same inputs, and are quantized in the same order
            g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(k))]
        num_groups = int(g_idx.max()) + 1
        codes, scales = random_codes(bits, k, n, random), random_scales(bits, num_groups, n, random)
        zeros = random_codes(bits, num_groups, n, random)
        if sym:
            zeros.fill_(1 << (bits - 1))
        tensors = {
            "qweight": int32_words(codes.t(), bits).t(),
            "qzeros": int32_words((zeros - zero_offset) % (1 << bits), bits),
            "scales": scales,
            "g_idx": g_idx.to(torch.int32),
        }
        return tensors, ((codes - zeros[g_idx]) * scales.float()[g_idx]).t()

    return write


def gptq_config(bits: int = 4, **entries: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, "sym": False} | entries


def write_gptq_by_layer(
    module: str, weight: torch.Tensor, random: torch.Generator
) -> tuple[Weights, torch.Tensor | None]:
    """Write o_proj as it is, down_proj with 8 bits and symmetric, others as the configuration says."""
    if module.endswith("o_proj"):
        return {"weight": weight}, None
    write = gptq(8, sym=True, group=None) if module.endswith("down_proj") else gptq()
    return write(module, weight, random)


def marlin(group: int | None) -> Write:
    """Write what Marlin's own packer makes of codes, step by step as it goes over threads and tiles."""

    def write(module: str, weight: torch.Tensor, random: torch.Generator) -> tuple[Weights, torch.Tensor]:
        n, k = weight.shape
        num_groups = k // (group or k)
        codes, scales = random_codes(4, k, n, random), random_scales(4, num_groups, n, random)
        order = []
        for thread in range(32):
            of_tile = [
                16 * row + thread // 4 + 8 * half
                for half in (0, 1)
                for row in (2 * (thread % 4), 2 * (thread % 4) + 1, 2 * (thread % 4) + 8, 2 * (thread % 4) + 9)
            ]
            order += [[256 * tile + of_tile[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)] for tile in range(4)]
        tiles = codes.view(k // 16, 16, n // 16, 16).permute(0, 2, 1, 3).reshape(-1, 1024)
        stored = tiles[:, torch.tensor(order).flatten()].reshape(k // 16, n * 16)
        if group is None:
            scale_order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
        else:
            scale_order = [i + 8 * j for i in range(8) for j in range(8)]
        ordered = scales.reshape(-1, len(scale_order))[:, scale_order].reshape(scales.shape)
        tensors = {"B": int32_words(stored, 4), "s": ordered, "workspace": torch.zeros(n // 128 * 16).int()}
        return tensors, ((codes - 8) * group_wise(scales.float(), group=k // num_groups)).t()

    return write


CASES: dict[str, Case] = {
    "awq": Case(
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, write_awq
    ),
    "gptq": Case(gptq_config(sym=True), gptq(sym=True)),
    "gptq, zeros": Case(gptq_config(), gptq()),
    "gptq, zeros, version 2": Case(gptq_config(checkpoint_format="gptq_v2"), gptq(zero_offset=0)),
    "gptq, all inputs in one group": Case(gptq_config(group_size=-1, desc_act=True), gptq(group=None)),
    "gptq, desc_act": Case(gptq_config(sym=True, desc_act=True), gptq(sym=True, desc_act=True), splits=False),
    "gptq, 8 bits": Case(gptq_config(8, sym=True), gptq(8, sym=True)),
    "gptq, 8 bits, zeros": Case(gptq_config(8), gptq(8)),
    "gptq, 8 bits, desc_act": Case(gptq_config(8, desc_act=True), gptq(8, desc_act=True), splits=False),
    "gptq, 3 bits": Case(gptq_config(3, sym=True), gptq(3, sym=True)),
    "gptq, 3 bits, zeros": Case(gptq_config(3), gptq(3)),
    "gptq, 2 bits": Case(gptq_config(2, sym=True), gptq(2, sym=True)),
    "gptq, by layer": Case(
        gptq_config(dynamic={r"-:.*o_proj": {}, r"+:.*\.down_proj": {"bits": 8, "sym": True, "group_size": -1}}),
        write_gptq_by_layer,
    ),
    "gptq for marlin": Case(
        gptq_config(checkpoint_format="marlin", sym=True), marlin(GROUP), num_kv_heads=4
    ),
    "gptq for marlin, all inputs in one group": Case(
        gptq_config(is_marlin_format=True, group_size=-1), marlin(None), num_kv_heads=4
    ),
    "auto-round": Case(
        {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": False, "data_type": "int",
         "packing_format": "auto_round:auto_gptq",
         "extra_config": {
             ".*o_proj": {"bits": 16}, "model.layers.0.mlp.down_proj": {"bits": 8, "sym": True, "group_size": -1},
             "model.layers.1.mlp.down_proj": {"bits": 8, "sym": True, "group_size": -1},
         }},
        write_gptq_by_layer,
    ),
    "auto-round as awq": Case(
        {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "packing_format": "auto_round:auto_awq"},
        write_awq,
    ),
}  # fmt: skip


def write_quantized(folder: Path, case: Case, target: Path) -> None:
    """Write the checkpoint of `folder` quantized to `target`, and overwrite it with what that stands for."""
    random = torch.Generator().manual_seed(0)
    plain, packed = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj.weight" in name:
            module = name.removesuffix(".weight")
            tensors, stands_for = case.write(module, weight, random)
            plain[name] = weight if stands_for is None else stands_for
            packed.update({f"{module}.{leaf}": tensor for leaf, tensor in tensors.items()})
        else:
            plain[name] = packed[name] = weight
    target.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in packed.items()}, target / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(raw | {"quantization_config": case.config}))
