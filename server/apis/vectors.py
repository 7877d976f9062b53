"""Vectors of prompts: the requests that make them, and what becomes of their numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

from engine.engine import Engine
from engine.errors import InvalidRequest, OutputNotFinite
from engine.media import PromptMedia
from engine.request import Request, SamplingParams
from engine.state import RequestState
from server.http.intake import paced
from server.http.live import LiveRequests, new_rid
from server.reading.protocol import JSON, Owner
from server.reading.shared_fields import RequestFields


class PooledFields(RequestFields):
    model: str = ""
    add_special_tokens: bool = True


class Vectors:
    """Runs prompts for their vectors."""

    def __init__(self, engine: Engine, live: LiveRequests) -> None:
        self.engine, self.live = engine, live

    async def run(
        self,
        owner: Owner,
        body: PooledFields,
        prompts: Sequence[list[int]],
        media: Sequence[PromptMedia | None] | None = None,
    ) -> list[RequestState]:
        """Run one request a prompt; their vectors are there then. `body` gives `rid`, `priority` and cache keys.

        media: what each prompt shows.
        """
        rid = body.rid or new_rid()
        priority, extra_key = body.priority, body.cache_namespace
        params, pooling = SamplingParams(max_new_tokens=0), self.engine.model_config.pooling
        states = [
            RequestState(
                Request(
                    rid=rid if len(prompts) == 1 else f"{rid}-{i}",
                    input_ids=input_ids,
                    sampling_params=params,
                    priority=priority,
                    extra_key=extra_key,
                    pooling=pooling,
                    media=media[i] if media else None,
                )
            )
            async for i, input_ids in paced(enumerate(prompts))
        ]
        await self.live.answers(owner, rid, states)
        return states


def dimensions_of(asked: int | None, size: int) -> int:
    """Return how many numbers of a vector of `size` are wanted. `InvalidRequest` if it has fewer."""
    if asked is not None and asked > size:
        raise InvalidRequest(f"dimensions must be between 1 and {size}, got {asked}", "dimensions")
    return asked or size


def vector_of(state: RequestState) -> np.ndarray:
    """Return a request's vector, float32 [size]."""
    vector = state.embedding
    if vector is None or not np.isfinite(vector).all():
        raise OutputNotFinite("the model's output is not finite (NaN or inf)")
    return vector


def normalized(vector: np.ndarray) -> np.ndarray:
    """Scale a vector to length 1."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def probabilities_of(scores: np.ndarray) -> np.ndarray:
    """Return the probability of each label; of a single score its own (sigmoid)."""
    if len(scores) == 1:
        return np.asarray(1 / (1 + np.exp(-scores)))
    likely = np.exp(scores - scores.max())
    return np.asarray(likely / likely.sum())


def json_vector(vector: np.ndarray) -> Any:
    """Write JSON at once, and without a Python object for each number."""
    return orjson.Fragment(orjson.dumps(np.ascontiguousarray(vector, np.float32), option=orjson.OPT_SERIALIZE_NUMPY))


def usage_of(states: Sequence[RequestState]) -> JSON:
    """Return the costs: prompts alone, also where a token was sampled for its log-probabilities."""
    num_tokens = sum(state.prompt_len for state in states)
    return {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens}
