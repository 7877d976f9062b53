"""Tokenize long texts in pieces whose tokens are those of the whole text: in bounded memory, no further than needed.

A text may be cut where no token can span: where the tokenizer, too, cuts text before it merges. That is tried out.
"""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any

import tokenizers
from tokenizers.models import BPE
from tokenizers.normalizers import NFC

from engine.errors import InvalidRequest, PromptTooLong
from engine.text.detokenizer import BYTE_OF_CHAR

PIECE_CHARS = 1 << 16
# Of a piece without a place to cut: the library takes about 100 bytes for each until it is done. With a long context
# more than this if it may be that the context holds it.
MAX_UNCUT_CHARS = 1 << 20
UNCUT_CHARS_A_TOKEN = 8  # more than tokens have on average, in any text but one of spaces or dashes
LOOK_BACK_CHARS = 1 << 12  # from a piece's longest end on, for a place to cut
MAX_TOKENS = 1 << 20  # of a text that need not fit a context: more would take seconds, and megabytes to write
# A prompt is counted this many contexts far, so that most who send too much learn how much it is.
COUNTED_CONTEXTS = 4
# Between letters: before a space, or after a line's end.
CUT = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=[^\W\d_]\n)(?=[^\W\d_])")
# Texts of which each is cut at `CUT`, to find out whether the tokenizer cuts there.
PROBES = (
    "one two",
    "one\ntwo",
    "A B",
    "Grüße An",
    "日本 語",
    "日本\n語",
    "it's so",
    "don't\nHe'll",
    "x y\nz",
    "Ab Cd'ef gh",
)
CUTTERS = ("ByteLevel", "Digits", "Split")  # pre-tokenizers that change nothing
NFC_SHRINKS = 4  # most characters that become one by normalization


def pieces(text: str, max_chars: int = MAX_UNCUT_CHARS) -> Iterator[str]:
    """Yield consecutive pieces of `text`, cut at `CUT`, of about `PIECE_CHARS` where there are places to cut.

    The last one is all of the rest if there is no place to cut in its first `max_chars`.
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = start + PIECE_CHARS
        cuts = [match.start() for match in CUT.finditer(text, max(start + 1, end - LOOK_BACK_CHARS), end)]
        while not cuts and end < min(len(text), start + max_chars):
            # A part at a time: a search keeps the interpreter from all other threads until it is done.
            cuts = [match.start() for match in [CUT.search(text, end, end + PIECE_CHARS + 2)] if match]
            end += PIECE_CHARS
        if not cuts:
            break
        yield text[start : cuts[-1]]
        start = cuts[-1]
    yield text[start:]


class LongTexts:
    """Tokenizes long texts with a tokenizer of the tokenizers library. Looked at when the first one comes."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool, context_length: int | None) -> list[int]:
        """Return the token ids of `text`.

        Raises `PromptTooLong` once it is sure that a context cannot hold it, and `InvalidRequest` if it has more than
        `MAX_TOKENS`, or is so long without a place to cut that reading it would take gigabytes.
        """
        max_tokens, max_chars = MAX_TOKENS, MAX_UNCUT_CHARS
        if context_length is not None:
            max_tokens = COUNTED_CONTEXTS * context_length
            max_chars = max(max_chars, UNCUT_CHARS_A_TOKEN * context_length)
            self._check_chars(text, context_length)
        if not self._is_cuttable:
            _check_uncut(text, max_chars)
            return self._encode(text, add_special_tokens)
        first, last = self._special_ids if add_special_tokens else ([], [])
        ids = list(first)
        for piece in pieces(text, max_chars):
            _check_uncut(piece, max_chars)
            ids += self._encode(piece, False)
            if len(ids) > max_tokens:
                raise too_many_tokens(max_tokens, context_length)
        return ids + last

    def _check_chars(self, text: str, context_length: int) -> None:
        """Raise `PromptTooLong` if all of a context's tokens together have fewer characters than `text`."""
        longest = self._longest_token
        if longest is None:
            return
        if self._tokenizer.normalizer is not None and not text.isascii():
            longest *= NFC_SHRINKS
        if len(text) > context_length * longest and self._leaves_more(text, context_length * longest):
            raise PromptTooLong(
                f"prompt has {len(text)} characters, and the context is {context_length} tokens "
                f"of at most {longest} characters",
                "text",
            )

    def _leaves_more(self, text: str, num_chars: int) -> bool:
        """Return whether more than `num_chars` characters of `text` become tokens. Ends as soon as that is sure."""
        num_left = 0
        for start in range(0, len(text), PIECE_CHARS):
            part = text[start : start + PIECE_CHARS]
            data = part.encode()
            num_left += len(part) - (len(data) - len(data.translate(None, self._lost_bytes)))
            if num_left > num_chars:
                return True
        return False

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    @cached_property
    def _is_byte_level(self) -> bool:
        """Return whether text is cut into words, whose bytes become tokens."""
        steps = _steps(self._tokenizer.pre_tokenizer, "pretokenizers")
        return [step["type"] for step in steps[-1:]] == ["ByteLevel"] and all(
            step["type"] in CUTTERS and step.get("behavior") != "Removed" for step in steps
        )

    @cached_property
    def _lost_bytes(self) -> bytes:
        """Return the bytes that no token has: any number of them may leave no trace. Few texts have them."""
        if not self._is_byte_level:
            return b""
        return bytes(byte for character, byte in BYTE_OF_CHAR.items() if self._tokenizer.token_to_id(character) is None)

    @cached_property
    def _longest_token(self) -> int | None:
        """Return the most characters of normalized text that become one token; None: any number."""
        model, normalizer = self._tokenizer.model, _steps(self._tokenizer.normalizer, "normalizers")
        if not isinstance(model, BPE) or not (self._is_byte_level or model.byte_fallback):
            return None  # one token stands for any unknown text
        keeps_length = all(
            step["type"] in ("NFC", "Prepend")
            or (
                step["type"] == "Replace"
                and len(step["pattern"].get("String", "")) in range(1, len(step["content"]) + 1)
            )
            for step in normalizer
        )
        return max(map(len, self._tokenizer.get_vocab())) if keeps_length else None

    @cached_property
    def _is_cuttable(self) -> bool:
        """Return whether the tokens of pieces are those of the text they were cut from."""
        normalizer = self._tokenizer.normalizer
        if not self._is_byte_level or not (normalizer is None or isinstance(normalizer, NFC)):
            return False
        added = self._tokenizer.get_added_tokens_decoder().values()
        if any(1 < cut.start() <= len(token.content) for token in added for cut in CUT.finditer(f"a{token.content}a")):
            return False
        return all(
            self._words(text) == [word for piece in _halves(text) for word in self._words(piece)] for text in PROBES
        )

    def _words(self, text: str) -> list[str]:
        return [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    @cached_property
    def _special_ids(self) -> tuple[list[int], list[int]]:
        """Return the special tokens that stand before and after any text."""
        bare, whole = self._encode("a", False), self._encode("a", True)
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]


def too_many_tokens(max_tokens: int, context_length: int | None) -> InvalidRequest:
    """Return the error for a text of more than `max_tokens`."""
    if context_length is None:
        return InvalidRequest(f"text has more than {max_tokens} tokens, the limit for one text", "text")
    return PromptTooLong(
        f"prompt has more than {max_tokens} tokens, the context is {context_length} "
        f"and at least one is left for the answer",
        "text",
    )


def _check_uncut(text: str, max_chars: int) -> None:
    if len(text) > max_chars:
        raise InvalidRequest(
            f"text has {len(text)} characters in a row without a space or a line's end between letters, "
            f"where it could be read in parts: the limit is {max_chars}",
            "text",
        )


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """Return the descriptions of a normalizer's or pre-tokenizer's steps, which a sequence has under `name`."""
    if part is None:
        return []
    description = json.loads(part.__getstate__())
    steps: list[dict[str, Any]] = description.get(name, [description])
    return steps


def _halves(text: str) -> list[str]:
    """Return `text`, cut at each place where it may be."""
    cuts = [0, *(match.start() for match in CUT.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)]
