"""Token ids to vectors, and vectors to logits. Both weights are [vocabulary, hidden], split by vocabulary."""

from typing import ClassVar

import torch

from engine.layers.layer import Layer, LayerConfig, match_shard, meta_weight
from kernels.elementwise import embed
from kernels.gemm import linear, pack


class VocabParallelEmbedding(Layer):
    weight_names: ClassVar = ("weight",)

    def __init__(self, vocab_size: int, hidden_size: int, layers: LayerConfig) -> None:
        self.shard = layers.shard
        self.weight = meta_weight(layers.split(vocab_size, "vocab_size"), hidden_size, dtype=layers.dtype)
        self.packed: torch.Tensor | None = None  # `logits`' own copy, where that is faster

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        return embed(input_ids, self.weight)  # [T, hidden]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden, self.weight if self.packed is None else self.packed)  # [S, vocabulary]

    def pack_for_logits(self) -> None:
        self.packed = pack(self.weight)

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        return match_shard(self.weight, loaded, 0, self.shard)


class ParallelLMHead(VocabParallelEmbedding):
    """The output side's own weight. Models that tie their embeddings use the embedding in its place."""

    def pack_for_logits(self) -> None:
        self.weight = pack(self.weight)  # no row of it is ever looked up
