"""The chat template that --chat-template names."""

from pathlib import Path

import orjson

from engine.engine import TokenizerFacade
from server.reading.built_in_templates import BUILT_IN_TEMPLATES


def load_chat_template(name: str | None, tokenizer: TokenizerFacade) -> str | None:
    """Load the template that --chat-template names; None means the model's own.

    It is one of the model's, a built-in one, or a file (Jinja, or JSON that holds a `chat_template`). `OSError` or
    `ValueError` if there is no such template, or if what will be used does not parse.
    """
    if name is not None:
        text = _read_template(name, tokenizer)
        _check(text, f"--chat-template {name}", tokenizer)
        return text
    of_model = tokenizer.chat_template or {}
    for source in of_model.values() if isinstance(of_model, dict) else [of_model]:
        _check(source, "the model's chat template (use another with --chat-template)", tokenizer)
    return None


def _check(source: str, whose: str, tokenizer: TokenizerFacade) -> None:
    try:
        tokenizer.check_chat_template(source)
    except ValueError as error:
        raise ValueError(f"{whose} does not parse: {error}") from None


def names_missing_file(name: str) -> bool:
    """Return whether `name`, of a template, can only be a file's, and there is none: known before a model is."""
    return Path(name).suffix in (".jinja", ".jinja2", ".j2", ".json") and not Path(name).is_file()


def _read_template(name: str, tokenizer: TokenizerFacade) -> str:
    of_model = tokenizer.chat_template
    if isinstance(of_model, dict) and name in of_model:
        return of_model[name]
    if name in BUILT_IN_TEMPLATES:
        return BUILT_IN_TEMPLATES[name]
    file = Path(name)
    if not file.is_file():
        known = [*BUILT_IN_TEMPLATES, *(of_model if isinstance(of_model, dict) else ())]
        raise ValueError(f"--chat-template {name}: no such file, nor one of {', '.join(known)}")
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        values = orjson.loads(text)
        if not isinstance(values, dict) or not isinstance(values.get("chat_template"), str):
            raise ValueError(f"--chat-template {name}: no text under the key chat_template")
        return str(values["chat_template"])
    return text
