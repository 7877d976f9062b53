"""StableLM: a Llama with layer norms and a part of each head rotated. Orion: a Llama with layer norms.

norms           layer norms with bias
block           Llama's, or parallel with one norm where `use_parallel_residual`
biases          on q, k and v where `use_qkv_bias`
q, k            a layer norm of each head where `qk_layernorm`, whose weights the checkpoint numbers
rotation        of the first quarter of a head, by default
spellings       `rope_pct` and `norm_eps` in the files of its first release, StableLM Epoch
"""

from typing import Any

from engine.layers.block import Block, Parallel, PreNorm
from engine.layers.norm import LayerNorm
from engine.model_config import ModelConfig, QKNorm, read_decoder
from engine.models.base import CausalLM
from engine.models.names import COMMON_NAMES, Rename
from engine.models.spelling import with_rope


class StableLMBlock(PreNorm):
    norm_class = LayerNorm


class StableLMParallelBlock(Parallel):
    norm_class = LayerNorm


class StableLM(CausalLM):
    checkpoint = (*COMMON_NAMES, Rename(r"\.([qk])_layernorm\.norms\.", r".\1_norm."))

    @classmethod
    def block_of(cls, config: ModelConfig) -> type[Block]:
        return StableLMParallelBlock if config.block_kind == "parallel" else StableLMBlock

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        return read_decoder(
            with_rope(raw, partial_rotary_factor=raw.get("rope_pct", 0.25)),
            norm_eps=raw.get("layer_norm_eps") or raw.get("norm_eps", 1e-5),
            qkv_bias=raw.get("use_qkv_bias", False),
            o_bias=False,
            qk_norm=QKNorm.EACH_HEAD if raw.get("qk_layernorm") else QKNorm.NONE,
            block_kind="parallel" if raw.get("use_parallel_residual", False) else "serial",
        )


class Orion(CausalLM):
    block = StableLMBlock
