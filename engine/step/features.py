"""The features of pictures that tokens of a step get: as they come, or where a graph reads them."""

import torch

from engine.layers.communicator import Communicator
from engine.layers.forward_batch import FeatureRows, Features
from engine.models.base import CausalLM
from engine.schedule.plan import Plan
from engine.step.cuda_graph import GraphSizes


class StepFeatures:
    def __init__(
        self, model: CausalLM, comm: Communicator, device: torch.device, stream: torch.cuda.Stream | None
    ) -> None:
        """stream: of the steps; None on a CPU."""
        self._config, self._num_layers = model.config, 1 + model.num_deep_layers
        self._comm, self._device, self._stream = comm, device, stream
        self._rows: torch.Tensor | None = None  # [1 + L, N, hidden], of the step whose graph is replayed

    def of_step(self, plan: Plan, tokens: torch.Tensor) -> Features:
        """Return what `tokens` get. Rank 0 has it, and sends it to the others."""
        if self._comm.rank == 0:
            rows = self._of_plan(plan)
        else:
            config, size = self._config, (self._num_layers, len(tokens), self._config.hidden_size)
            rows = torch.empty(size, dtype=config.dtype, device=self._device)
        self._comm.broadcast(rows)
        return Features(tokens.long(), rows[0], rows[1:])

    def reserve(self, sizes: GraphSizes) -> bool:
        """Make room for the features of a graph's step; False for a model that reads no pictures.

        Other ranks do not know how many features a step has before it is staged: their steps have no graph.
        """
        config = self._config
        if not config.vision or self._comm.size > 1:
            return False
        if self._rows is None:
            num_rows = min(sizes.max_prompt_tokens + sizes.max_requests, sizes.max_tokens)
            size = (self._num_layers, num_rows, config.hidden_size)
            self._rows = torch.zeros(size, dtype=config.dtype, device=self._device)
        return True

    def in_graph(self, rows: torch.Tensor) -> FeatureRows:
        """Return what a graph's tokens get, wherever it is replayed. rows: int32 [T], see `FeatureRows`."""
        assert self._rows is not None
        return FeatureRows(rows, self._rows[0], self._rows[1:])

    def write_for_graph(self, plan: Plan) -> None:
        """Put the features of `plan` where its graph reads them."""
        assert self._rows is not None
        rows = self._of_plan(plan)
        self._rows[:, : rows.shape[1]] = rows

    def _of_plan(self, plan: Plan) -> torch.Tensor:
        """Return the features that tokens of `plan` get, [1 + L, F, hidden]."""
        for part in plan.features:
            if self._stream is not None:  # it was allocated for another
                part.features.record_stream(self._stream)
        return torch.cat([part.features[:, part.first : part.last] for part in plan.features], dim=1)
