"""Try out a tokenizer when it is loaded: its file comes from whoever made the model, and may hold anything.

A pattern that looks for ever, or a normalizer that makes a flood of one character, would otherwise stop the server at a
client's first words.
"""

import threading
from collections.abc import Callable

from engine.errors import ModelError

PROBE_CHARS = 1500
PROBES = tuple((text * PROBE_CHARS)[:PROBE_CHARS] for text in ("a", " ", "a ", "1", "\n", "-", "é", "aB1, \n"))
MAX_PROBE_S = 10.0  # for all of them, which take milliseconds
MAX_TOKENS_PER_CHAR = 32  # a character has up to 4 bytes, and up to 18 characters when it is decomposed


def check_tokenizer(encode: Callable[[str], list[int]], name: str) -> None:
    """Raise `ModelError` if `encode` fails, takes too long or makes too many tokens of texts of each kind.

    name: of the tokenizer, for the message.
    """
    failures: list[str] = []
    # The library cannot be interrupted: a thread that does not come back is abandoned, and does not keep the process.
    thread = threading.Thread(target=lambda: failures.extend(_failure(encode)), name="tokenizer-probe", daemon=True)
    thread.start()
    thread.join(MAX_PROBE_S)
    if thread.is_alive():
        raise ModelError(f"{name} takes more than {MAX_PROBE_S:g} s for texts of {PROBE_CHARS} characters")
    if failures:
        raise ModelError(f"{name} cannot be used: {failures[0]}")


def _failure(encode: Callable[[str], list[int]]) -> list[str]:
    """Return what is wrong with `encode`, if anything is."""
    for text in PROBES:
        try:
            num_tokens = len(encode(text))
        except BaseException as error:  # noqa: BLE001 - the library's panics are no Exceptions; this is a thread's end
            return [f"{type(error).__name__}: {error}"]
        if num_tokens > MAX_TOKENS_PER_CHAR * len(text):
            return [f"it makes {num_tokens} tokens of {len(text)} characters"]
    return []
