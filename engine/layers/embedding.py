"""Token ids to vectors, and vectors to logits. Both weights are [vocabulary, hidden], split by vocabulary."""

from typing import ClassVar

import torch

from engine.errors import ModelError
from engine.layers.layer import Layer, LayerConfig, meta_weight
from kernels.elementwise import embed
from kernels.gemm import linear, pack


class VocabParallelEmbedding(Layer):
    """This rank has the ids from `first_token` on: `width` of them, the last rank maybe fewer."""

    weight_names: ClassVar = ("weight",)

    def __init__(self, vocab_size: int, hidden_size: int, layers: LayerConfig) -> None:
        self.comm, self.vocab_size = layers.comm, vocab_size
        self.width = -(-vocab_size // self.comm.size)
        self.first_token = self.comm.rank * self.width
        num_tokens = min(self.width, vocab_size - self.first_token)
        self.weight = meta_weight(num_tokens, hidden_size, dtype=layers.dtype)
        self.packed: torch.Tensor | None = None  # `logits`' own copy, where that is faster

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.comm.size == 1:
            return embed(input_ids, self.weight)  # [T, hidden]
        local = input_ids - self.first_token
        is_here = (local >= 0) & (local < len(self.weight))
        return self.comm.all_reduce(embed(torch.where(is_here, local, 0), self.weight) * is_here[:, None])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden, self.weight if self.packed is None else self.packed)  # [S, this rank's tokens]

    def gather(self, logits: torch.Tensor) -> torch.Tensor | None:
        """All ranks' logits, on rank 0: [S, vocabulary]; None on others."""
        return self.comm.gather(logits, self.width)

    def most_likely(self, logits: torch.Tensor) -> torch.Tensor:
        """int32 [S], as `kernels.sampling.argmax` of all ranks' logits would have it; on every rank."""
        return self.comm.most_likely(logits, self.first_token)

    def pack_for_logits(self) -> None:
        self.packed = pack(self.weight)

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        if loaded.shape != (self.vocab_size, self.weight.shape[1]):
            raise ModelError(
                f"has shape {list(loaded.shape)}, the model wants {[self.vocab_size, self.weight.shape[1]]}"
            )
        return self.weight, loaded.narrow(0, self.first_token, len(self.weight))


class ParallelLMHead(VocabParallelEmbedding):
    """The output side's own weight. Models that tie their embeddings use the embedding in its place."""

    def pack_for_logits(self) -> None:
        self.weight = pack(self.weight)  # no row of it is ever looked up
