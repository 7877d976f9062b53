"""Config entries under the names that most families have."""

from typing import Any


def respelled(raw: dict[str, Any], **own_names: str) -> dict[str, Any]:
    """Return `raw` with the usual names as well: usual name = the family's own. KeyError naming an own one.

    An entry that has the usual name already stays: an override may use either.
    """
    return raw | {usual: raw[own] for usual, own in own_names.items() if usual not in raw}


def with_rope(raw: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    """Return `raw` with `parameters` in its `rope_parameters`, where it has none of that name."""
    return raw | {"rope_parameters": parameters | (raw.get("rope_parameters") or {})}
