"""Models that turn a prompt into scores or a vector: the decoder of any family, with another head or none."""

from collections.abc import Sequence

import torch

from engine.layers.layer import LayerConfig
from engine.layers.linear import Linear
from engine.model_config import ModelConfig
from engine.models.base import CausalLM
from engine.models.names import TIED_HEAD, Ignore, Rename, Rule
from kernels.weights import Part

PREFIXED = Rename(r"^(?=layers\.|embed_tokens|norm\.|per_layer_)", "model.")


class PooledModel(CausalLM):
    """A decoder alone (LlamaModel, ...). Its checkpoint may name the weights with or without `model.` before them."""

    def __init__(self, decoder: CausalLM, config: ModelConfig, layers: LayerConfig) -> None:  # noqa: ARG002
        """Take over the decoder of a model.

        decoder: a generating model with tied embeddings, so that it has no head of its own.
        """
        self.config, self.model, self.lm_head = decoder.config, decoder.model, decoder.lm_head
        # Nobody reads the head's weight, where the file has one: it is not the embedding's.
        self._decoder_names = [Ignore(rule.pattern) if rule is TIED_HEAD else rule for rule in decoder.names]
        self._decoder_stacks = decoder.stacks

    @property
    def names(self) -> Sequence[Rule]:
        # Rules of some families read whole names, and those of others make them.
        return (PREFIXED, *self._decoder_names, PREFIXED)

    @property
    def stacks(self) -> Sequence[Rule]:
        return self._decoder_stacks


class SequenceClassifier(PooledModel):
    """...ForSequenceClassification: a linear head on the last token's state, whole on every rank."""

    def __init__(self, decoder: CausalLM, config: ModelConfig, layers: LayerConfig) -> None:
        super().__init__(decoder, config, layers)
        self.score = Linear((), [Part(config.num_labels)], config.hidden_size, layers.within("score"))
        self._dtype = layers.dtype

    def pool(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.score(hidden.to(self._dtype)).float()  # [N, num_labels]
