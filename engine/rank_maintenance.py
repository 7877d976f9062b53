"""Operations on one rank's model and memory while no step runs. All ranks of a model do them together."""

from collections.abc import Callable, Collection
from typing import Any

import torch

from engine.checkpoint.folder import resolve_model
from engine.checkpoint.weights import load_weights, pack_weights
from engine.config import EngineConfig
from engine.config_file import read_raw
from engine.errors import ModelError
from engine.layers.layer import named_layers
from engine.layers.linear import Linear
from engine.models.base import CausalLM
from engine.step.model_runner import ModelRunner

KV_CACHE, WEIGHTS = "kv_cache", "weights"
TAGS = (KV_CACHE, WEIGHTS)


class RankMaintenance:
    """Replaces, releases and resumes what one rank holds.

    All methods but `read` and `drop` need a runner that is still, on every rank.
    """

    def __init__(self, config: EngineConfig, runner: ModelRunner, new_model: Callable[[], CausalLM]) -> None:
        """new_model: returns this rank's share of the model, without weights."""
        self._config, self._runner, self._new_model = config, runner, new_model
        self._new: CausalLM | None = None

    def do(self, name: str, **arguments: Any) -> None:
        """Call the method `name`: orders to ranks travel as names."""
        getattr(self, name)(**arguments)

    def read(self, model_path: str, load_format: str) -> None:
        """Read other weights into host memory, to be adopted or dropped. `ModelError` if they do not fit the model."""
        config = self._config.replace(model_path=model_path, load_format=load_format)
        model, folder = self._new_model(), resolve_model(config)
        stored = read_raw(folder, config).get("quantization_config") if (folder / "config.json").is_file() else None
        if stored and stored != model.config.raw.get("quantization_config"):
            raise ModelError(f"{model_path}: quantization_config is not that of the weights in use")
        load_weights(model, folder, load_format, torch.device("cpu"))
        if model.lm_head.is_tied != self._runner.model.lm_head.is_tied:
            raise ModelError(f"{model_path}: only one of these weights and those in use has a head of its own")
        if self._runner.device.type == "cuda":
            self._check_formats(model)
        else:
            pack_weights(model)
        self._new = model

    def _check_formats(self, model: CausalLM) -> None:
        """Raise `ModelError` unless weights are stored as those in use are, in whose place they are written."""
        for (path, old), (_, new) in zip(named_layers(self._runner.model), named_layers(model), strict=True):
            if isinstance(old, Linear) and isinstance(new, Linear) and old.schemes != new.schemes:
                raise ModelError(f"{path} is in another format than in the weights in use")

    def drop(self) -> None:
        """Forget the weights that were read."""
        self._new = None

    def adopt(self) -> None:
        """Copy the weights that were read into those that the steps use."""
        assert self._new is not None
        new, self._new = self._new, None
        self._synchronize()
        self._runner.adopt_weights(new)

    def release(self, tags: Collection[str]) -> None:
        """Give device memory back: the KV pool's, or the weights', which move to host memory."""
        self._synchronize()
        if KV_CACHE in tags:
            self._runner.kv.release()
        if WEIGHTS in tags:
            self._runner.move_weights(torch.device("cpu"))
        self._runner.release_graphs()

    def resume(self, tags: Collection[str], is_complete: bool) -> None:
        """Take memory back. is_complete: nothing stays released.

        CUDA graphs hold addresses, so they are captured anew when all memory is back.
        """
        self._synchronize()
        if KV_CACHE in tags:
            self._runner.kv.allocate()
        if WEIGHTS in tags:
            self._runner.move_weights(self._runner.device)
        if is_complete:
            self._runner.recapture_graphs()

    def _synchronize(self) -> None:
        """Make the runner's device current in this thread, and wait until all enqueued work is computed."""
        if self._runner.device.type == "cuda":
            torch.cuda.set_device(self._runner.device)
            torch.cuda.synchronize()


def reason_of(error: Exception) -> str:
    """Return `error` as a rank reports it: with its class, unless the message is written for users."""
    return str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
