"""Prompts in a body, as texts or token ids, and how many of them one HTTP request may hold."""

from typing import Any

from engine.engine import Engine
from engine.errors import InvalidRequest, PromptTooLong, shown
from server.http.intake import paced
from server.reading.protocol import is_int

MAX_REQUESTS = 1 << 14  # of one HTTP request: prompts times n
LEAST_MAX_REQUESTS = 1 << 11  # OpenAI's limit for a list of texts
ROUNDS = 16  # of a full engine, that one HTTP request may take: lists are no longer
MAX_N = 128


def check_token_ids(ids: Any, vocab_size: int, field: str, *, may_be_empty: bool = False) -> list[int]:
    """Return `ids` if it is a list of ids of the vocabulary, not empty unless it may be."""
    if may_be_empty and ids == []:
        return []
    if not isinstance(ids, list) or not ids:
        raise InvalidRequest(f"{field} must be a non-empty list of token ids, got {shown(ids)}", field)
    if set(map(type, ids)) != {int}:
        wrong = next(token_id for token_id in ids if type(token_id) is not int)
        raise InvalidRequest(f"{field} must hold integers only, got {shown(wrong)}", field)
    for token_id in (min(ids), max(ids)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"{field} holds {token_id}, the vocabulary has ids 0 to {vocab_size - 1}", field)
    return ids


def check_prompt_ids(engine: Engine, ids: Any, field: str) -> list[int]:
    """Return `ids` if it is a prompt's list of token ids. `PromptTooLong`, without a look at each, if none has so many.

    Millions of ids take as long to check as a step.
    """
    if isinstance(ids, list):
        _check_length(engine, ids, field)
    return check_token_ids(ids, engine.model_config.vocab_size, field)


def _check_length(engine: Engine, ids: list[int], field: str) -> None:
    """Raise `PromptTooLong` that names the prompt, which may be one of several, if no request may have so many."""
    limit = engine.context_length
    if len(ids) > limit:
        message = f"{field} has {len(ids)} tokens, the context is {limit}"
        raise PromptTooLong(message, field, prompt_len=len(ids), limit=limit)


async def encode_prompt(
    engine: Engine, text: Any, field: str, add_special_tokens: bool = True, *, is_cut: bool = False
) -> list[int]:
    """Return the token ids of a text, which must fit the context unless it `is_cut`. Errors name `field`."""
    if not isinstance(text, str):
        raise InvalidRequest(f"{field} must be a string", field)
    try:
        ids = await engine.encode(text, add_special_tokens) if text else []
    except InvalidRequest as error:
        error.field = field
        raise
    ids = ids[: engine.context_length] if is_cut else ids
    _check_length(engine, ids, field)
    if not ids:
        raise InvalidRequest(f"{field} is an empty prompt: it needs at least one token", field)
    return ids


async def read_prompts(
    engine: Engine, given: str | list[Any] | None, name: str, add_special_tokens: bool = True
) -> list[list[int]]:
    """Return the token ids of each prompt of a field: a string, token ids, or a list of either."""
    if isinstance(given, str):
        given = [given]
    elif isinstance(given, list) and given and is_int(given[0]):
        return [check_prompt_ids(engine, given, name)]
    if not isinstance(given, list) or not given:
        raise InvalidRequest(
            f"{name} must be a string, a list of token ids, or a non-empty list of these, got {shown(given)}", name
        )
    check_batch_size(engine, len(given), name)
    prompts = []
    async for i, one in paced(enumerate(given)):
        field = name if len(given) == 1 else f"{name}[{i}]"
        if isinstance(one, list):
            prompts.append(check_prompt_ids(engine, one, field))
        else:
            prompts.append(await encode_prompt(engine, one, field, add_special_tokens))
    return prompts


def max_requests(engine: Engine) -> int:
    """Return how many requests may be made of one HTTP request: what the engine answers in a time to wait for."""
    return min(MAX_REQUESTS, max(LEAST_MAX_REQUESTS, ROUNDS * engine.max_running_requests))


def check_batch_size(engine: Engine, count: int, field: str) -> None:
    limit = max_requests(engine)
    if count > limit:
        raise InvalidRequest(f"{field} has {count} prompts, the limit is {limit}", field)


def check_n(engine: Engine, n: int, num_prompts: int) -> None:
    limit = min(MAX_N, max_requests(engine) // num_prompts)
    if n > limit:
        raise InvalidRequest(f"n must be between 1 and {limit}, got {n}", "n")
