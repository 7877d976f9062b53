"""The language halves of GLM-4.1V and GLM-4.5V: GLM-4-0414 and GLM-4.5 whose tokens' positions have three axes."""

from collections.abc import Sequence
from typing import Any

from engine.model_config import ModelConfig
from engine.models.glm import Glm4
from engine.models.moe import Glm4Moe
from engine.models.names import Rule, ignored_behind
from engine.models.qwen_vl import with_sections

SECTIONS = (8, 12, 12)  # pairs of a head that turn by frame, row and column


class Glm4v(Glm4):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return Glm4.read_config(with_sections(raw, SECTIONS))


class GlmOcr(Glm4v):
    """GLM-OCR: no biases, heads that turn whole; its layer for several tokens at once is left out."""

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return Glm4v.read_config({"partial_rotary_factor": 1.0, **raw, "attention_bias": False})

    @property
    def names(self) -> Sequence[Rule]:
        return (*super().names, ignored_behind(self.config.raw))


class Glm4vMoe(Glm4Moe):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return Glm4Moe.read_config(with_sections(raw, SECTIONS))
