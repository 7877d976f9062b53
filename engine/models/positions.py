"""Decoders that add a learned vector of each token's position to the token's, and rotate nothing (GPT-2, OPT)."""

from typing import ClassVar

import torch

from engine.errors import ModelError
from engine.layers.block import Block
from engine.layers.embedding import PositionEmbedding
from engine.layers.forward_batch import ForwardBatch
from engine.layers.layer import LayerConfig
from engine.model_config import ModelConfig
from engine.models.base import Decoder


class PositionedDecoder(Decoder):
    position_offset: ClassVar = 0
    """Rows of the checkpoint's table before that of the first position."""

    def __init__(self, config: ModelConfig, block_class: type[Block], layers: LayerConfig) -> None:
        super().__init__(config, block_class, layers)
        num_positions = config.rope.max_position_embeddings
        if config.context_length > num_positions:
            raise ModelError(
                f"context_length is {config.context_length}, and the model has learned {num_positions} positions"
            )
        self.embed_positions = PositionEmbedding(num_positions, config.hidden_size, layers, offset=self.position_offset)

    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        return super().embed(batch) + self.embed_positions(batch.positions)
