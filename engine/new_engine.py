"""The engine that a configuration asks for."""

from engine.config import EngineConfig
from engine.engine import Engine
from engine.local import LocalEngine
from engine.replicas.replica_set import ReplicaSet


def new_engine(config: EngineConfig) -> Engine:
    """Return one engine, or a set of `dp_size` of them, not yet started."""
    return LocalEngine(config) if config.dp_size == 1 else ReplicaSet(config)
