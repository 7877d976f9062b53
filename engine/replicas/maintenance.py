"""Maintenance of several replicas: none, yet."""

from typing import Any, NoReturn

from engine.engine import Maintenance
from engine.errors import InvalidRequest


class NoMaintenance(Maintenance):
    """Refuses every operation."""

    def __init__(self, model_path: str, num_replicas: int) -> None:
        self.model_path, self.weight_version, self._num_replicas = model_path, "default", num_replicas

    async def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise InvalidRequest(f"this works on one engine only, and the server has {self._num_replicas} (--dp-size)")

    pause = resume = update_weights = weight = release_memory = resume_memory = _refuse
