"""Tiles of the Triton attention kernels, cut until a card's shared memory holds them."""

from typing import Any, TypeVar

from kernels.card import HOPPER_SHARED_BYTES, OLDEST_BFLOAT16, Card

C = TypeVar("C", bound=Any)  # a `DecodeConfig` or `PrefillConfig`

MIN_BLOCK = 16  # of each side of a product of tiles
MIN_ROWS = 8  # of queries, where products are computed without tensor cores


def least_rows(card: Card) -> int:
    """Return how few rows of queries a product may have."""
    return MIN_BLOCK if card.capability >= OLDEST_BFLOAT16 else MIN_ROWS


def tile_bytes(
    card: Card, rows: int, tokens: int, num_stages: int, key_width: int, value_width: int, itemsize: int = 2
) -> int:
    """Return the shared memory that Triton takes at most for a program's tiles (3.6; `tests.cards` compiles them all).

    There lie queries [rows, key_width], keys and values of `tokens`, and what they count for the queries. value_width:
    0 where values are keys.
    """
    queries, keys = itemsize * rows * key_width, itemsize * tokens * key_width
    values, weights = itemsize * tokens * value_width, itemsize * rows * tokens
    if card.capability < OLDEST_BFLOAT16:  # Triton multiplies in float32 there, and copies nothing ahead
        return (queries + max(keys, values)) * 4 // itemsize + weights
    tiles = max(keys, values) if num_stages == 1 else (num_stages - 1) * (keys + values)
    return queries + tiles + weights


def fitting(config: C, card: Card, key_width: int, value_width: int, *, rows: int = 0, itemsize: int = 2) -> C:
    """Return `config`, or the largest one below it that `card` has the shared memory for.

    rows: of queries, if the configuration does not say. What is made for Hopper fits later cards with as much memory.
    """
    if card.shared_bytes >= HOPPER_SHARED_BYTES:
        return config
    smaller: C | None = config
    while smaller is not None:
        config = smaller
        num_rows = rows or config.block_m
        needed = tile_bytes(card, num_rows, config.block_n, config.num_stages, key_width, value_width, itemsize)
        if needed <= card.shared_bytes:
            break
        smaller = _smaller(config, None if rows else least_rows(card))
    return config


def _smaller(config: C, fewest_rows: int | None) -> C | None:
    """Return the next smaller configuration, those first whose loss costs least; None if there is none.

    fewest_rows: that it may be left, or None if it does not say how many rows there are.
    """
    if config.num_stages > 2:
        return config._replace(num_stages=config.num_stages - 1)
    if config.block_n > 2 * MIN_BLOCK:
        return config._replace(block_n=config.block_n // 2)
    if fewest_rows and config.block_m > 64:
        return config._replace(block_m=config.block_m // 2, num_warps=max(config.num_warps // 2, 4))
    if config.block_n > MIN_BLOCK:
        return config._replace(block_n=config.block_n // 2)
    if fewest_rows and config.block_m > fewest_rows:
        return config._replace(block_m=config.block_m // 2)
    if config.num_stages > 1:
        return config._replace(num_stages=1)
    return None
