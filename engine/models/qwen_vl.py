"""The language halves of Qwen's models that read pictures, and PaddleOCR's: positions of their tokens have three axes.

Qwen2-VL, Qwen2.5-VL    Qwen 2; the pairs of a head turn by frame, row or column, one section behind the other
PaddleOCR-VL            Llama, with positions as Qwen2-VL's
Qwen3-VL                Qwen 3, dense or with experts; the sections are interleaved. What the tower's own layers saw is
                        added behind the first layers
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from engine.model_config import ModelConfig, read_decoder
from engine.models.llama import Llama, Qwen2, Qwen3
from engine.models.moe import Qwen3Moe, name_of_stack, read_routing, unstacked_experts
from engine.models.names import Beside, Piece, Rule
from engine.quantization import Transform, With


class Qwen2VL(Qwen2):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return Qwen2.read_config(with_sections(raw, (16, 24, 24)))


class PaddleOCR(Llama):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        has_bias = raw.get("use_bias", False)
        return read_decoder(with_sections(raw, (16, 24, 24)), qkv_bias=has_bias, o_bias=has_bias, mlp_bias=has_bias)


class Qwen3VL(Qwen3):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return Qwen3.read_config(with_sections(raw, (24, 20, 20), is_interleaved=True))


class Qwen3VLMoe(Qwen3Moe):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return Qwen3Moe.read_config(with_sections(raw, (24, 20, 20), is_interleaved=True) | {"norm_topk_prob": True})

    @property
    def outputs_first(self) -> "OutputsFirst":
        """Experts are stacked, each [inputs, outputs], or the other way round as transformers keeps them in memory."""
        raw = self.config.raw
        return OutputsFirst({"gate_up_proj": raw["hidden_size"], "down_proj": raw["moe_intermediate_size"]})

    @property
    def stacks(self) -> Sequence[Rule]:
        return *unstacked_experts(read_routing(self.config.raw).num_experts), self.outputs_first

    @property
    def names(self) -> Sequence[Rule]:
        return Beside(name_of_stack, self.outputs_first.turned), *super().names


@dataclass(frozen=True)
class OutputsFirst:
    """Transpose codes and scales of experts whose first dimension is that of their inputs.

    num_inputs: of each product. Scales lie as the stack beside them does.
    """

    num_inputs: Mapping[str, int]

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        match = re.search(r"(.*\.experts\.\w+_proj)\.weight(_scale(?:_inv)?)?$", piece.name)
        if match is not None:
            stack = match[1]
            step: Transform | With = partial(self.turned, stack)
            if match[2]:
                step = With((stack,), lambda scale, codes: scale.t() if self._is_turned(stack, codes) else scale)
            piece = Piece(piece.name, (*piece.transforms, step), piece.index)
        yield piece

    def turned(self, stack: str, one: torch.Tensor) -> torch.Tensor:
        """Return one of the stack of codes or numbers that the file calls `stack`."""
        return one.t() if self._is_turned(stack, one) else one

    def _is_turned(self, stack: str, codes: torch.Tensor) -> bool:
        """Return whether codes or numbers, one or a stack, are [inputs, outputs]. Bytes are two inputs each."""
        num_inputs = self.num_inputs.get(stack.rpartition(".")[2])
        return codes.dim() > 1 and codes.shape[-2] * (2 if codes.dtype == torch.uint8 else 1) == num_inputs


def with_sections(raw: dict[str, Any], sections: Sequence[int], *, is_interleaved: bool = False) -> dict[str, Any]:
    """Return `raw` with what files leave out of `rope_parameters`."""
    given = raw.get("rope_parameters") or {}
    return raw | {"rope_parameters": {"mrope_section": sections} | given | {"mrope_interleaved": is_interleaved}}
