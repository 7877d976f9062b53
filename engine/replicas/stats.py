"""Statistics and health of several engines, as those of one."""

import dataclasses
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, TypeVar, cast

from engine.engine import Health

S = TypeVar("S")

COMBINED: dict[str, Callable[[Sequence[Any]], Any]] = {
    "last_step_at": max,
    "new_token_ratio": fmean,
    "drift": max,
}  # others add up


def combined(stats: Sequence[S]) -> S:
    """Return dataclasses of numbers, all of one type, as one of that type: sums, except for COMBINED."""
    values = {}
    for one in dataclasses.fields(cast(Any, stats[0])):
        items = [getattr(each, one.name) for each in stats]
        nested = dataclasses.is_dataclass(items[0])
        values[one.name] = combined(items) if nested else COMBINED.get(one.name, sum)(items)
    return type(stats[0])(**values)


def combined_health(each: Sequence[Health]) -> Health:
    """Return the health of several engines: the first trouble, the oldest ages, the sums of requests."""
    return Health(
        next((one.status for one in each if one.status != "ok"), "ok"),
        max(one.last_step_age_s for one in each),
        max(one.oldest_queued_s for one in each),
        sum(one.num_running for one in each),
        sum(one.num_queued for one in each),
        sum(one.num_violations for one in each),
        sum(one.num_canary_alarms for one in each),
        max(one.canary_drift for one in each),
    )
