"""The name by which clients ask for the model."""

from engine.errors import EngineError
from server.config import ServerConfig


class ModelNotFound(EngineError):
    status_code = 404
    code = "model_not_found"
    field = "model"


def served_model(config: ServerConfig, name: str) -> str:
    """Return the name to answer with. Absent and "default" (SGLang's clients) mean the one model there is."""
    known = (*config.model_names, config.model_path)
    if name and name != "default" and name not in known:
        served = ", ".join(map(repr, config.model_names))
        raise ModelNotFound(f"The model {name!r} does not exist; this server has {served}.")
    return name if name in known else config.model_name


def ollama_model(config: ServerConfig, name: str) -> str:
    """Return the name to answer with, as an Ollama client gives it: with its tag."""
    served_model(config, name.removesuffix(":latest"))
    return name or config.model_name
