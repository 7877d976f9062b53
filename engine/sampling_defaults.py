"""The sampling fields of requests that do not say them: the model's generation_config.json, and the command line's."""

from pathlib import Path
from typing import Any

import orjson

from engine.errors import InvalidRequest, ModelError
from engine.request import SamplingParams

OF_MODELS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
PREFERRED = (*OF_MODELS, "frequency_penalty", "presence_penalty")
FLAG = "--preferred-sampling-params"


def read_generation_defaults(generation: dict[str, Any], vocab_size: int, file: Path) -> dict[str, Any]:
    """Return the sampling fields of a generation_config.json. `ModelError` if no request could use them."""
    defaults = {name: generation[name] for name in OF_MODELS if generation.get(name) is not None}
    try:
        return _verified(defaults, vocab_size)
    except InvalidRequest as error:
        raise ModelError(f"{file}: {error} (--sampling-defaults openai does without)") from None


def read_preferred(text: str | None, vocab_size: int) -> dict[str, Any]:
    """Return the sampling fields of --preferred-sampling-params. `ModelError` if no request could use them."""
    try:
        preferred = orjson.loads(text or "{}")
    except orjson.JSONDecodeError as error:
        raise ModelError(f"{FLAG} is not JSON: {error}") from None
    if not isinstance(preferred, dict) or preferred.keys() - set(PREFERRED):
        raise ModelError(f"{FLAG} must be a JSON object of {', '.join(PREFERRED)}, got {text}")
    try:
        return _verified({name: value for name, value in preferred.items() if value is not None}, vocab_size)
    except InvalidRequest as error:
        raise ModelError(f"{FLAG}: {error}") from None


def _verified(defaults: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    if defaults.get("top_k") == 0:  # Hugging Face's "off"
        defaults["top_k"] = -1
    SamplingParams.from_dict({}, defaults).verify(vocab_size)
    return defaults
