"""Kernels' configurations by shape: those that are shipped, and those that this machine found at a warm-up.

The first of these that knows a shape decides: the cache file of this machine, the table in `kernels/tuned` that is
shipped for the card, the H200's table, the kernel's default function. A configuration decides how work is cut and in
which order it is summed, so another one changes a result by rounding at most.
"""

import functools
import json
import logging
import os
import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from kernels.card import card_of
from kernels.folders import cache_folder

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "tuned"
FALLBACK = "NVIDIA_H200.json"  # serves cards that no table is shipped for

Key = tuple[int, ...]
Fields = dict[str, int]
Entries = dict[str, dict[Key, Fields]]  # by kind of kernel
C = TypeVar("C", bound=tuple[Any, ...])


def parse_table(text: str) -> Entries:
    """Return a table's configurations. Raises ValueError for a text that is no table."""
    try:
        return {
            kind: {
                tuple(int(number) for number in key.split(",")): {
                    name: _number(value) for name, value in fields.items()
                }
                for key, fields in entries.items()
            }
            for kind, entries in json.loads(text)["configs"].items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"it is no table of configurations ({error!r})") from error


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise ValueError(f"{value!r} is no integer")
    return value


def format_table(cards: list[str], entries: Entries) -> str:
    """Return the text of a table, a configuration a line. `cards`: the names of its cards begin so."""
    kinds = []
    for kind, configs in sorted(entries.items()):
        lines = [f'      "{",".join(map(str, key))}": {json.dumps(configs[key])}' for key in sorted(configs)]
        kinds.append(f'    "{kind}": {{\n' + ",\n".join(lines) + "\n    }")
    return f'{{\n  "cards": {json.dumps(cards)},\n  "configs": {{\n' + ",\n".join(kinds) + "\n  }\n}\n"


def merged(entries: Entries, newer: Entries) -> Entries:
    """Return the configurations of both; where both have one, `newer`'s."""
    return {kind: entries.get(kind, {}) | newer.get(kind, {}) for kind in entries | newer}


def write_table(path: Path, cards: list[str], entries: Entries) -> None:
    """Write a table of `entries` and of what `path` held before. Readers see the old file or the new one, whole.

    cards: those that the table is for, beside any that `path` names.
    """
    if path.exists():
        text = path.read_text()
        entries = merged(parse_table(text), entries)
        cards = list(dict.fromkeys([*json.loads(text)["cards"], *cards]))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(format_table(cards, entries))
    unfinished.replace(path)


def shipped_file(card: str) -> Path | None:
    """Return the table that is shipped for a card: the one that names it most exactly."""
    fits = [
        (len(name), path)
        for path in SHIPPED.glob("*.json")
        for name in json.loads(path.read_text())["cards"]
        if card.startswith(name)
    ]
    return max(fits)[1] if fits else None


class Tables:
    """All configurations that are known for a card, by kind of kernel and shape."""

    def __init__(self, card: str, cache_path: Path | None) -> None:
        """Read the tables. `cache_path`: the file of what this machine finds; None: nothing is kept."""
        self.card, self.cache_path = card, cache_path
        path = shipped_file(card)
        self._is_shipped_for_card = path is not None
        self._shipped = parse_table((path or SHIPPED / FALLBACK).read_text())
        self._found = self._read_cache()

    def _read_cache(self) -> Entries:
        if self.cache_path is None:
            return {}
        try:
            return parse_table(self.cache_path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning("tuned configurations in %s are not used: %s", self.cache_path, error)
            return {}

    def fields(self, kind: str, key: Key) -> Fields | None:
        """Return the configuration for a shape, by field, or None if no table has one."""
        found = self._found.get(kind, {}).get(key)
        return found if found is not None else self._shipped.get(kind, {}).get(key)

    def shapes(self, kind: str) -> list[Key]:
        """Return the shapes that have a configuration."""
        return sorted(merged(self._shipped, self._found).get(kind, {}))

    def is_tuned(self, kind: str, key: Key) -> bool:
        """Return whether the shape's configuration was found on a card like this one."""
        return key in self._found.get(kind, {}) or (self._is_shipped_for_card and key in self._shipped.get(kind, {}))

    def add(self, kind: str, key: Key, fields: Fields) -> None:
        """Note what was found for a shape. Only `save` keeps it for later starts."""
        self._found.setdefault(kind, {})[key] = fields

    def save(self) -> None:
        """Write what was found to the cache file.

        A file that cannot be written is a warning, one that is no table is replaced.
        """
        if self.cache_path is None:
            return
        try:
            try:
                write_table(self.cache_path, [self.card], self._found)
            except ValueError:
                self.cache_path.unlink(missing_ok=True)
                write_table(self.cache_path, [self.card], self._found)
        except OSError as error:
            logger.warning("tuned configurations cannot be kept in %s: %s", self.cache_path, error)


def card_name(device: torch.device) -> str:
    """Return the name that tables know the device by."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def file_name(card: str) -> str:
    """Return a card's name as a file may have it."""
    return re.sub(r"\W+", "_", card)


@functools.cache
def tables(device: torch.device) -> Tables:
    """Return the tables of a device, read at the first call."""
    card = card_name(device)
    if device.type != "cuda":
        return Tables(card, None)
    from triton import __version__  # here: a machine without a GPU need not have triton

    return Tables(card, cache_folder() / "tuned" / f"{file_name(card)}-{__version__}.json")


class Configs(Generic[C]):
    """The configurations of one kernel.

    `get(device, *key)` returns a shape's one, and costs a dict's look-up after the first call for the shape. Results
    do not depend on which configuration it is, but for rounding.
    """

    def __init__(
        self,
        kind: str,
        config: Callable[..., C],
        default: Callable[..., C],
        fit: Callable[..., C] = lambda config, _card, *_key: config,
    ) -> None:
        """Name the kernel. `config`: the named tuple of its fields; `default`: makes one of a key that no table has.

        `fit`: makes one that a card has room for of (one that was not found on a card like it, the card, *key).
        """
        self.kind = kind
        self._config, self._default, self._fit = config, default, fit
        self.get = functools.cache(self._find)

    def _find(self, device: torch.device, *key: int) -> C:
        found = self._from_tables(device, key)
        if found is not None and self.is_tuned(device, key):
            return found
        return self._fit(self._default(*key) if found is None else found, card_of(device), *key)

    def _from_tables(self, device: torch.device, key: Key) -> C | None:
        fields = tables(device).fields(self.kind, key)
        if fields is not None:
            try:
                return self._config(**fields)
            except TypeError as error:  # a cache file of another version
                logger.warning("the tuned configuration of %s for %s is not used: %s", self.kind, key, error)
        return None

    def is_tuned(self, device: torch.device, key: Key) -> bool:
        """Return whether a shape's configuration was found on a card like this one."""
        return tables(device).is_tuned(self.kind, key)

    def record(self, device: torch.device, key: Key, config: C) -> None:
        """Use `config` for a shape from now on, in this process."""
        fields = dict(zip(config._fields, config, strict=True))  # type: ignore[attr-defined]
        tables(device).add(self.kind, key, fields)
        self.get.cache_clear()


class WeightShape(NamedTuple):
    """A weight as its products use it."""

    num_rows: int  # of gate and up together, if there is an activation
    k: int
    act: str | None = None  # of gate and up
    has_norm: bool = False  # one token's product takes the RMS norm ahead of it in
    has_residual: bool = False  # the product is added to its result
    max_tokens: int = 32  # 1: for more than one token other kernels are used
    kind: Hashable | None = None  # of a weight of few bits, its `quantized_kernel.Kind`


class AttentionShape(NamedTuple):
    """The heads of a model's attention on one rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_dtype: torch.dtype = torch.bfloat16


class LatentShape(NamedTuple):
    """The heads of a model's latent attention on one rank: see `kernels.mla`."""

    num_heads: int
    key_dim: int
    rope_dim: int
    value_dim: int
    rank: int
    kv_dtype: torch.dtype = torch.bfloat16


class Task(NamedTuple):
    """A shape of a kernel whose fastest configuration is to be found."""

    configs: Configs[Any]
    key: Key
    candidates: list[Any]
    prepare: Callable[[], list[Callable[[Any], object]]]
    """Makes inputs; returns launches of a configuration that each read other data, together more than the L2 cache."""
    source_of: Callable[[Any], tuple[str, str, str]] | None = None
    """Returns what `nvrtc.compile_source` takes for a configuration; None: a launch compiles, where it must."""
