"""The language halves of Qwen's models that read pictures, and PaddleOCR's: positions of their tokens have three axes.

Qwen2-VL, Qwen2.5-VL    Qwen 2; the pairs of a head turn by frame, row or column, one section behind the other
PaddleOCR-VL            Llama, with positions as Qwen2-VL's
Qwen3-VL                Qwen 3, dense or with experts; the sections are interleaved. What the tower's own layers saw is
                        added behind the first layers
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.model_config import ModelConfig, read_decoder
from engine.models.llama import Llama, Qwen2, Qwen3
from engine.models.moe import Qwen3Moe, read_routing
from engine.models.names import Piece, Rule, Split, Unstack


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
    def names(self) -> Sequence[Rule]:
        """Experts are stacked, each [inputs, outputs], or the other way round as transformers keeps them in memory."""
        raw = self.config.raw
        return (
            *super().names,
            Unstack(r"(\.experts\.\w+_proj)$", r"\1.weight", read_routing(raw).num_experts),
            OutputsFirst(r"\.experts\.gate_up_proj\.weight$", raw["hidden_size"]),
            OutputsFirst(r"\.experts\.down_proj\.weight$", raw["moe_intermediate_size"]),
            Split("gate_up_proj", ("gate_proj", "up_proj"), (1, 1)),
        )


@dataclass(frozen=True)
class OutputsFirst:
    """Transpose matrices whose name `pattern` finds and whose first dimension is that of their inputs."""

    pattern: str
    num_inputs: int

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        if re.search(self.pattern, piece.name):
            piece = Piece(piece.name, (*piece.transforms, self._turn), piece.index)
        yield piece

    def _turn(self, loaded: torch.Tensor) -> torch.Tensor:
        return loaded.t() if loaded.shape[0] == self.num_inputs else loaded


def with_sections(raw: dict[str, Any], sections: Sequence[int], *, is_interleaved: bool = False) -> dict[str, Any]:
    """Return `raw` with what files leave out of `rope_parameters`."""
    given = raw.get("rope_parameters") or {}
    return raw | {"rope_parameters": {"mrope_section": sections} | given | {"mrope_interleaved": is_interleaved}}
