"""Names of modules: which ones the configuration of a quantized checkpoint means."""

import re
from collections.abc import Collection
from fnmatch import translate
from typing import Any

from engine.errors import ModelError, shown

# What stands before the decoder's own names; not "model." where the checkpoint also holds a tower for images.
PREFIXES = ("model.", "model.language_model.", "language_model.model.", "language_model.")
# A module of ours -> what holds its rows where a checkpoint has several in one.
FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("qkv_proj", "query_key_value", "W_pack", "wqkv", "c_attn")),
    **dict.fromkeys(("gate_proj", "up_proj"), ("gate_up_proj", "dense_h_to_4h")),
}
PATTERN = "re:"  # before a regular expression


def spellings(module: str) -> tuple[str, ...]:
    """Return the names that a checkpoint or its configuration may have for `module`, itself first."""
    prefix = max((prefix for prefix in PREFIXES if module.startswith(prefix)), key=len, default="")
    stem = module.removeprefix(prefix)
    parent, _, leaf = stem.rpartition(".")
    stems = [stem, *(f"{parent}.{fused}" if parent else fused for fused in FUSED.get(leaf, ()))]
    prefixes = PREFIXES if prefix else ("", "language_model.")  # the latter before lm_head alone
    return tuple(dict.fromkeys((module, *(before + stem for before in prefixes for stem in stems))))


def own_names(names: Collection[str]) -> list[str]:
    """Return the spellings of a module that patterns are asked about: not of what may hold others beside it.

    A pattern may find a part of a name: `.*v_proj` would mean all of `qkv_proj`, and so queries and keys.
    """
    last = next(iter(names)).rpartition(".")[2]
    return [name for name in names if name.rpartition(".")[2] == last]


class Modules:
    """A list of modules as configurations have it.

    An entry is the name of a module or of what it stands in, or a part of one: `mlp.gate` means
    model.layers.0.mlp.gate, and not mlp.gate_proj. Or a pattern: a regular expression after `re:`, or a name with `*`.
    """

    def __init__(self, entries: Any, what: str) -> None:
        """`ModelError`, which names `what`, unless `entries` is None or a list of names."""
        entries = [] if entries is None else [entries] if isinstance(entries, str) else entries
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise ModelError(f"quantization_config: {what} must be a list of names, got {shown(entries)}")
        patterns = [
            entry.removeprefix(PATTERN) if entry.startswith(PATTERN) else translate(entry)
            for entry in entries
            if entry.startswith(PATTERN) or "*" in entry
        ]
        self.names = {entry for entry in entries if not entry.startswith(PATTERN) and "*" not in entry}
        self._num_words: dict[str, set[int]] = {}  # by its first word, how many words an entry has
        for entry in self.names:
            words = entry.split(".")
            self._num_words.setdefault(words[0], set()).add(len(words))
        self.patterns = [regular_expression(pattern, what) for pattern in patterns]

    def __contains__(self, names: Collection[str]) -> bool:
        """Return whether an entry means a module, given by all its spellings."""
        found_by_pattern = any(pattern.match(name) for pattern in self.patterns for name in own_names(names))
        return found_by_pattern or any(self._has_part_of(name) for name in names)

    def _has_part_of(self, name: str) -> bool:
        """Return whether a run of a dotted name's words is an entry. Asked of each of some ten thousand experts."""
        words = name.split(".")
        for start, word in enumerate(words):
            for length in self._num_words.get(word, ()):
                if ".".join(words[start : start + length]) in self.names:
                    return True
        return False


def regular_expression(pattern: str, what: str) -> re.Pattern[str]:
    """Compile `pattern`. `ModelError`, which names `what`, if it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        message = f"quantization_config: {what} has the pattern {pattern!r}, which cannot be read: {error}"
        raise ModelError(message) from None
