"""Token ids and positions to vectors, and vectors to logits.

Weights of tokens are [vocabulary, hidden], split by vocabulary; every rank holds those of all positions.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from engine.layers.layer import Layer, LayerConfig, meta_weight
from engine.layers.linear import Linear
from engine.quantization import OF_INPUTS, Scheme
from kernels.elementwise import embed, softcap_
from kernels.quantized import QuantizedWeight
from kernels.weights import WHOLE, Part, ShapeError, Weight


class VocabularySlice:
    """The ids that a rank has: `width` of them from `first_token` on, the last rank maybe fewer."""

    def __init__(self, vocab_size: int, layers: LayerConfig) -> None:
        self.vocab_size = vocab_size
        self.width = -(-vocab_size // layers.comm.size)
        self.first_token = layers.comm.rank * self.width
        self.num_tokens = min(self.width, vocab_size - self.first_token)

    def rows_of(self, loaded: torch.Tensor, *row_shape: int) -> torch.Tensor:
        """Return this rank's rows of a checkpoint's tensor [vocabulary, *row_shape]."""
        if loaded.shape != (self.vocab_size, *row_shape):
            raise ShapeError(f"has shape {list(loaded.shape)}, the model wants {[self.vocab_size, *row_shape]}")
        return loaded.narrow(0, self.first_token, self.num_tokens)

    def place(self, weight: Weight, name: str, loaded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where this rank's rows of a vocabulary's weight go, and these rows (see `Weight.place`)."""
        tensor = dict(weight.tensors())[name]
        if loaded.numel() == 1 or f".{name}".endswith(OF_INPUTS):  # of all rows
            return weight.place(name, loaded, 0)
        return weight.place(name, self.rows_of(loaded, *tensor.shape[1:]), 0)


class VocabParallelEmbedding(Layer):
    """The vectors of token ids, times `scale`, which is rounded to the model's dtype."""

    serves_head = False  # a tied head multiplies with the same weight

    def __init__(self, vocab_size: int, hidden_size: int, layers: LayerConfig, scale: float = 1.0) -> None:
        self.comm, self.slice = layers.comm, VocabularySlice(vocab_size, layers)
        self.scale = float(torch.tensor(scale).to(layers.dtype))
        self.dtype, self.schemes = layers.dtype, [layers.quantization.scheme_of_embedding(layers.path)]
        self.weight = self.schemes[0].weight([Part(self.slice.num_tokens)], hidden_size, WHOLE, layers.dtype)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return [T, hidden] of ids [T]."""
        if self.comm.size == 1:
            h = self.weight.lookup(input_ids)
        else:
            local = input_ids - self.slice.first_token
            is_here = (local >= 0) & (local < self.weight.n)
            h = self.comm.all_reduce(self.weight.lookup(torch.where(is_here, local, 0)) * is_here[:, None])
        return h if self.scale == 1.0 else h.mul_(self.scale)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.weight.tensors()

    def materialize(self, device: torch.device) -> None:
        self.weight.materialize(device)

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG002
        return self.slice.place(self.weight, name, loaded)

    def expect(self, schemes: Sequence[Scheme]) -> None:
        """Change the format, before anything is loaded. `ShapeError` if it has no such shape."""
        weight, self.schemes = self.weight, list(schemes)
        self.weight = self.schemes[0].weight(weight.parts, weight.k, weight.input_shard, self.dtype)

    def weight_part(self, name: str, part: int) -> torch.Tensor:  # noqa: ARG002 - there is one
        return self.weight.rows_of(part)

    def move_to(self, device: torch.device) -> None:
        self.weight.transform(lambda tensor: tensor.to(device))

    def pack(self) -> None:
        """Lay codes out for the head that is tied to them, if rows can be looked up in that layout as well.

        On a GPU for lookups alone, too: they are one kernel there, those of plain codes a dozen.
        """
        weight = self.weight
        if isinstance(weight, QuantizedWeight) and (self.serves_head or weight.codes.is_cuda):
            packed = weight.pack(for_logits=True)
            if packed.has_lookup:
                self.weight = packed

    def fill_dummy(self, generator: torch.Generator) -> None:
        self.weight.fill_random(generator)


class PositionEmbedding(Layer):
    """A learned vector for each position."""

    weight_names: ClassVar = ("weight",)

    def __init__(self, num_positions: int, hidden_size: int, layers: LayerConfig, *, offset: int = 0) -> None:
        """offset: rows of the checkpoint's tensor before that of the first position."""
        self.offset = offset
        self.weight = meta_weight(num_positions, hidden_size, dtype=layers.dtype)

    def __call__(self, positions: torch.Tensor) -> torch.Tensor:
        """Return [T, hidden] of positions [T]."""
        return embed(positions, self.weight)

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        return super().place_weight(name, loaded[self.offset :], part)


class ParallelLMHead(Linear):
    """Logits of hidden states, times `scale`. softcap c > 0: logits become c tanh(logit / c)."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        layers: LayerConfig,
        *,
        tied_to: VocabParallelEmbedding | None = None,
        scale: float = 1.0,
        bias: bool = False,
        softcap: float = 0.0,
    ) -> None:
        """tied_to: the embedding whose weight serves here too; it owns, loads and moves it. bias: never if tied."""
        self.comm, self.slice = layers.comm, VocabularySlice(vocab_size, layers)
        self.scale, self.softcap = scale, softcap
        self.is_tied = tied_to is not None
        self.weight: Weight
        if tied_to is None:
            super().__init__((), [Part(self.slice.num_tokens)], hidden_size, layers, bias=bias)
        else:
            self.weight, self.bias = tied_to.weight, None
            tied_to.serves_head = True
        self._tied_to = (tied_to,)  # a tuple: not a child

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return this rank's logits [S, tokens], float32, of hidden states [S, hidden]."""
        logits = self.weight.logits(hidden, self.bias)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return softcap_(logits, self.softcap) if self.softcap else logits

    def gather(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Return all ranks' logits [S, vocabulary] on rank 0, None on others."""
        return self.comm.gather(logits, self.slice.width)

    def most_likely(self, logits: torch.Tensor) -> torch.Tensor:
        """Return int32 [S], on every rank, as `kernels.sampling.argmax` of all ranks' logits would."""
        return self.comm.most_likely(logits, self.slice.first_token)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        if not self.is_tied:
            yield from super().weights()

    def names_of(self, part: int) -> list[str]:
        return [] if self.is_tied else super().names_of(part)

    def materialize(self, device: torch.device) -> None:
        if not self.is_tied:
            super().materialize(device)

    def place_weight(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:
        if name == "bias":
            return self.weight_part(name, part), self.slice.rows_of(loaded)
        return self.slice.place(self.weight, name, loaded)

    def pack(self) -> None:
        (embedding,) = self._tied_to
        if embedding is not None and embedding.weight is not self.weight:
            self.weight = embedding.weight  # it has packed what both read
        else:
            self.weight = self.weight.pack(for_logits=True)

    def move_to(self, device: torch.device) -> None:
        if not self.is_tied:
            super().move_to(device)

    def fill_dummy(self, generator: torch.Generator) -> None:
        if not self.is_tied:
            super().fill_dummy(generator)
