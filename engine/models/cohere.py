"""Command-R, R+ (cohere), R7B and A (cohere2): attention and MLP side by side.

block           parallel, with one layer norm, which has no bias
rotation        pairs lie side by side; the rows of q and k are reordered when loaded
logits          times `logit_scale`; the head is tied to the embedding
q, k            R+: a layer norm of each head, with a weight of its own
windows         cohere2: in three of four layers; the fourth sees all and rotates nothing
"""

from collections.abc import Sequence
from typing import Any

from engine.layers.block import Parallel
from engine.layers.norm import BiaslessLayerNorm
from engine.model_config import ModelConfig, QKNorm, head_dim_of, local_and_global, read_decoder
from engine.models.base import CausalLM
from engine.models.names import Interleave, Rule, Split
from engine.models.spelling import with_rope
from engine.rope_config import parse_rope


class CohereBlock(Parallel):
    norm_class = BiaslessLayerNorm


class Cohere(CausalLM):
    block = CohereBlock

    @property
    def names(self) -> Sequence[Rule]:
        attention = self.config.attention[0]
        head_dim, heads = attention.head_dim, {"q_norm": attention.num_heads, "k_norm": attention.num_kv_heads}
        return (
            *super().names,
            Interleave(r"\.[qk]_proj\.", head_dim, head_dim),
            Interleave(r"\.[qk]_norm\.", head_dim, head_dim, dim=1),
            *(Split(name, tuple(f"{name}.{i}" for i in range(num)), (1,) * num) for name, num in heads.items()),
        )

    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        # Command-R's `max_position_embeddings` is shorter than what it was trained for.
        longest = max(raw["max_position_embeddings"], raw.get("model_max_length", 0))
        return read_cohere(
            with_rope(raw | {"max_position_embeddings": longest}, rope_theta=500000.0),
            qk_norm=QKNorm.EACH_HEAD if raw.get("use_qk_norm") else QKNorm.NONE,
        )


class Cohere2(Cohere):
    @staticmethod
    def read_config(raw: dict[str, Any]) -> ModelConfig:
        raw = {"sliding_window": 4096} | raw
        rope = parse_rope(raw, head_dim_of(raw))
        return read_cohere(raw, **local_and_global(raw, 4, rope, rope.without_rotation))


def read_cohere(raw: dict[str, Any], **differs: Any) -> ModelConfig:
    """Read what both generations have."""
    return read_decoder(
        raw,
        norm_eps=raw.get("layer_norm_eps", 1e-5),
        logit_scale=raw.get("logit_scale", 0.0625),
        tie_word_embeddings=raw.get("tie_word_embeddings", True),
        **differs,
    )
