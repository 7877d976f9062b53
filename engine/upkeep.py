"""What is done to one rank's model and memory while no step runs; all ranks of a model do it together."""

from collections.abc import Callable, Collection
from typing import Any

import torch

from engine.checkpoint.weights import load_weights, resolve_model
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.models.base import CausalLM
from engine.step.model_runner import ModelRunner

KV_CACHE, WEIGHTS = "kv_cache", "weights"
TAGS = (KV_CACHE, WEIGHTS)


class Upkeep:
    """Everything but `read` and `drop` needs a runner that is still, on every rank."""

    def __init__(self, config: EngineConfig, runner: ModelRunner, new_model: Callable[[], CausalLM]) -> None:
        """new_model: makes this rank's share of the model, without weights."""
        self._config, self._runner, self._new_model = config, runner, new_model
        self._new: CausalLM | None = None

    def do(self, name: str, **arguments: Any) -> None:
        """The method of that name."""
        getattr(self, name)(**arguments)

    def read(self, model_path: str, load_format: str) -> None:
        """Other weights into host memory, to be adopted or dropped. `ModelError` if they do not fit."""
        config = self._config.replace(model_path=model_path, load_format=load_format)
        model = self._new_model()
        load_weights(model, resolve_model(config), load_format, torch.device("cpu"))
        self._new = model

    def drop(self) -> None:
        self._new = None

    def adopt(self) -> None:
        """Compute with the weights that were read."""
        assert self._new is not None
        new, self._new = self._new, None
        self._settle()
        self._runner.adopt_weights(new)

    def release(self, tags: Collection[str]) -> None:
        """Give device memory back: the KV pool's, or the weights', which are kept in host memory."""
        self._settle()
        if KV_CACHE in tags:
            self._runner.kv.release()
        if WEIGHTS in tags:
            self._runner.move_weights(torch.device("cpu"))
        self._runner.release_graphs()

    def resume(self, tags: Collection[str], is_complete: bool) -> None:
        """Take memory back. CUDA graphs hold addresses, so they are captured anew when all is there."""
        self._settle()
        if KV_CACHE in tags:
            self._runner.kv.allocate()
        if WEIGHTS in tags:
            self._runner.move_weights(self._runner.device)
        if is_complete:
            self._runner.recapture_graphs()

    def _settle(self) -> None:
        """What was enqueued is computed; and this may be a thread that has never seen the device."""
        if self._runner.device.type == "cuda":
            torch.cuda.set_device(self._runner.device)
            torch.cuda.synchronize()


def reason_of(error: Exception) -> str:
    return str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
