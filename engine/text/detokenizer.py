"""Decode token ids to text as they are generated: no half characters, no half stop strings.

A `TextStream` is a decoder (ids to text), followed by a `StopScanner` (text to released text) if there are stops.
Most tokenizers decode token by token, so a dict of pieces suffices: `ByteLevelDecoder` (GPT-2's alphabet: Llama 3,
Qwen, SmolLM, DeepSeek) and `ByteFallbackDecoder` (SentencePiece's: Llama 2, Mistral, Gemma). For any other tokenizer,
`WindowDecoder` decodes the last few tokens again. All return the same text as decoding all ids at once.
"""

import re
from abc import ABC, abstractmethod
from codecs import utf_8_decode
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

from engine.request import SamplingParams
from engine.text.stops import StopScanner

REPLACEMENT = "\ufffd"
WINDOW_CONTEXT = 5  # prompt tokens that `WindowDecoder` decodes as context
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's printable character for each byte: itself where visible in Latin-1, else from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in visible}
    hidden = (byte for byte in range(256) if byte not in visible)
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


BYTE_OF_CHAR = byte_alphabet()
# A table for str.translate, the fastest way to a token's bytes. A character outside the alphabet becomes one outside
# Latin-1.
LATIN_1_OF_CHAR = dict.fromkeys(range(0x100), REPLACEMENT) | {ord(char): byte for char, byte in BYTE_OF_CHAR.items()}

# The text of a token, or its bytes where only neighbouring tokens complete them to UTF-8; b"" for a token left out.
Piece = str | bytes


class Pieces(dict[int, Piece]):
    """Map a token id to its piece, computed at first use: a large vocabulary costs nothing at start."""

    def __init__(self, piece_of: Callable[[int], Piece]) -> None:
        self._piece_of = piece_of

    def __missing__(self, token_id: int) -> Piece:
        piece = self[token_id] = self._piece_of(token_id)
        return piece


class TextStream(ABC):
    """Turn the tokens of one answer into text, as they are generated."""

    __slots__ = ()
    has_stops = False  # whether the text can end at a stop string or regex

    @property
    def matched_stop(self) -> str | None:
        """Return the stop string, or the stop regex's pattern, that ended the text; nothing is released after it."""
        return None

    @abstractmethod
    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that `token_ids` release: whole characters, and nothing that may become a stop.

        Raises `InvalidRequest` if a stop regex takes too long.
        """

    @abstractmethod
    def finish(self) -> str:
        """Return the text still held back; incomplete UTF-8 becomes U+FFFD. Call once, after the last push."""


class ByteLevelDecoder(TextStream):
    """Decode tokens that are bytes.

    A character is released with its last byte, U+FFFD as soon as bytes cannot become a character.
    """

    __slots__ = ("_pending", "_pieces")

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._pending = b""  # the first bytes of an incomplete character

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        text = ""  # appending to a local string is in place in CPython, and cheaper than a list for the usual one token
        for token_id in token_ids:
            piece = pieces[token_id]
            if isinstance(piece, str):
                if self._pending:
                    text += self.finish()
                text += piece
            else:
                self._pending += piece
                whole, num_used = utf_8_decode(self._pending, "replace", False)
                self._pending = self._pending[num_used:]
                text += whole
        return text

    def finish(self) -> str:
        pending, self._pending = self._pending, b""
        return pending.decode("utf-8", "replace")


def replace(text: str, is_first: bool, old: str, new: str, first_new: str) -> str:
    """Replace `old` by `new`, or by `first_new` in the first piece of a text."""
    return text.replace(old, first_new if is_first else new)


class TokenSteps:
    """Apply the steps of a SentencePiece-like decoder to tokens, in the order of the tokenizers library.

    The steps before `ByteFallback` apply to each token, those after it to each token or run of byte tokens, and `Strip`
    after `Fuse` to the start of the whole text.
    """

    def __init__(self, steps: list[dict[str, Any]]) -> None:
        """Read `steps`. Raises ValueError if one depends on several tokens, so that no table can hold its results."""
        self.has_byte_fallback = False
        self.strip_char, self.num_strip = "", 0
        self._before: list[Callable[[str, bool], str]] = []
        self._after: list[Callable[[str, bool], str]] = []
        is_fused = False
        for step in steps:
            match step:
                case {"type": "Fuse"}:
                    is_fused = True
                case {"type": "Strip", "content": str(char), "start": int(num), "stop": 0} if (
                    is_fused and not self.num_strip
                ):
                    self.strip_char, self.num_strip = char, num
                case {"type": "ByteFallback"} if not is_fused and not self.has_byte_fallback:
                    self.has_byte_fallback = True
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not is_fused:
                    self._add(partial(replace, old=old, new=new, first_new=new))
                case {"type": "Metaspace", "replacement": str(mark), "prepend_scheme": str(scheme)} if not is_fused:
                    self._add(partial(replace, old=mark, new=" ", first_new=" " if scheme == "never" else ""))
                case _:
                    raise ValueError(f"decoder step {step} is not token by token")

    def _add(self, step: Callable[[str, bool], str]) -> None:
        (self._after if self.has_byte_fallback else self._before).append(step)

    def piece(self, token: str, is_first: bool = False) -> Piece:
        """Return the text of `token`, or the byte that it stands for. is_first: it begins the text."""
        token = reduce(lambda text, step: step(text, is_first), self._before, token)
        if self.has_byte_fallback and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        return self._finish(token, is_first)

    def run(self, data: bytes, is_first: bool) -> str:
        """Return the text of consecutive byte tokens: U+FFFD for each byte if not UTF-8, as the library does."""
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = REPLACEMENT * len(data)
        return self._finish(text, is_first)

    def _finish(self, text: str, is_first: bool) -> str:
        return reduce(lambda text, step: step(text, is_first), self._after, text)


class ByteFallbackDecoder(TextStream):
    """Decode tokens that are text, or single bytes of characters that the vocabulary lacks.

    One invalid byte changes the text of its whole run of byte tokens (see `TokenSteps.run`), so a run is held back
    until it ends.
    """

    __slots__ = ("_first_piece", "_is_first", "_num_strip", "_pending", "_pieces", "_steps")

    def __init__(
        self, pieces: Pieces, steps: TokenSteps, first_piece: Callable[[int], Piece], is_at_start: bool
    ) -> None:
        self._pieces = pieces
        self._steps = steps
        self._first_piece = first_piece
        self._is_first = is_at_start
        self._num_strip = steps.num_strip if is_at_start else 0  # most characters still to strip from the text's start
        self._pending = b""

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        text = ""
        for token_id in token_ids:
            piece = pieces[token_id]
            if self._is_first and not self._pending and piece != b"":
                piece = self._first_piece(token_id)
                self._is_first = isinstance(piece, bytes)  # a run of bytes is the first piece as a whole
            if isinstance(piece, str):
                if self._pending:
                    text += self._flush()
                text += piece
            else:
                self._pending += piece
        return self._strip(text) if self._num_strip and text else text

    def finish(self) -> str:
        text = self._flush() if self._pending else ""
        return self._strip(text) if self._num_strip and text else text

    def _flush(self) -> str:
        text = self._steps.run(self._pending, self._is_first)
        self._pending, self._is_first = b"", False
        return text

    def _strip(self, text: str) -> str:
        while self._num_strip and text.startswith(self._steps.strip_char):
            text = text[1:]
            self._num_strip -= 1
        if text:
            self._num_strip = 0
        return text


class WindowDecoder(TextStream):
    """Decode the tokens of any tokenizer: return the text that new tokens add to the few before them.

    Exact where a token's text depends on no token but the one before it (WordPiece, BPE with an end-of-word suffix).
    Costs two decode calls per push. The algorithm is that of text-generation-inference.
    """

    __slots__ = ("_decode", "_ids", "_is_shown", "_num_read")

    def __init__(self, decode: Callable[[list[int]], str], is_shown: Callable[[int], bool], context: list[int]) -> None:
        self._decode = decode
        self._is_shown = is_shown
        self._ids = context  # the window
        self._num_read = len(context)  # tokens of the window whose text is released

    def push(self, token_ids: Sequence[int]) -> str:
        self._ids += filter(self._is_shown, token_ids)
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._ids = self._ids[self._num_read :]
        self._num_read = len(self._ids)
        return text

    def finish(self) -> str:
        text = self._new_text()
        self._num_read = len(self._ids)
        return text

    def _new_text(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._num_read])) :]


class StoppedText(TextStream):
    """Release the text of a decoder, up to a stop."""

    __slots__ = ("_decoder", "_scanner", "_stop_tokens")
    has_stops = True

    def __init__(self, decoder: TextStream, scanner: StopScanner, stop_tokens: Mapping[int, str]) -> None:
        """Join the two.

        stop_tokens: id -> stop string that is one special token, whose text is left out of the answer.
        """
        self._decoder = decoder
        self._scanner = scanner
        self._stop_tokens = stop_tokens

    @property
    def matched_stop(self) -> str | None:
        return self._scanner.matched_stop

    def push(self, token_ids: Sequence[int]) -> str:
        scanner = self._scanner
        if scanner.matched_stop is not None:
            return ""
        for index, token_id in enumerate(token_ids):
            if token_id in self._stop_tokens:
                text = scanner.push(self._decoder.push(token_ids[:index]) + self._decoder.finish())
                if scanner.matched_stop is None:
                    text += scanner.finish()
                    scanner.matched_stop = self._stop_tokens[token_id]
                return text
        return scanner.push(self._decoder.push(token_ids))

    def finish(self) -> str:
        scanner, text = self._scanner, self._decoder.finish()
        return "" if scanner.matched_stop is not None else scanner.push(text) + scanner.finish()


class LaterStoppedText(StoppedText):
    """Release the text of a decoder, up to a stop that does not end within the first tokens."""

    __slots__ = ("_num_unstoppable",)

    def __init__(self, stopped: StoppedText, num_unstoppable: int) -> None:
        """`num_unstoppable`: number of these tokens."""
        super().__init__(stopped._decoder, stopped._scanner, stopped._stop_tokens)
        self._num_unstoppable = num_unstoppable

    def push(self, token_ids: Sequence[int]) -> str:
        num_first = self._num_unstoppable
        if num_first <= 0:
            return super().push(token_ids)
        self._num_unstoppable -= len(token_ids)
        text = self._scanner.pass_over(self._decoder.push(token_ids[:num_first]))
        return text + super().push(token_ids[num_first:]) if len(token_ids) > num_first else text

    def finish(self) -> str:
        if self._num_unstoppable <= 0:
            return super().finish()
        return self._scanner.pass_over(self._decoder.finish()) + self._scanner.finish()


class Detokenizer:
    """Make the text streams of one tokenizer, and look up the text and bytes of single tokens.

    decoder: the tokenizers library's description of its decoder; None: there is none, or the tokenizer is another
    library's.
    """

    def __init__(
        self,
        decoder: dict[str, Any] | None,
        id_to_token: Callable[[int], str | None],
        decode: Callable[[list[int]], str],
        special_tokens: Mapping[str, int],
    ) -> None:
        self._id_to_token = id_to_token
        self._decode = decode
        self._special_tokens = special_tokens
        self._special_ids = frozenset(special_tokens.values())
        self._is_byte_level = False
        self._steps: TokenSteps | None = None
        if decoder is not None:
            steps = flatten(decoder)
            self._is_byte_level = [step["type"] for step in steps if step["type"] != "Fuse"] == ["ByteLevel"]
            if not self._is_byte_level:
                try:
                    self._steps = TokenSteps(steps)
                except ValueError:
                    self._steps = None
        self._all_pieces = Pieces(self._piece)
        self._shown_pieces = Pieces(
            lambda token_id: b"" if token_id in self._special_ids else self._all_pieces[token_id]
        )

    def stream(self, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> TextStream:
        """Return a stream for the tokens that follow `prompt_ids`.

        After a prompt, a first token keeps the space that SentencePiece drops from the start of a text.
        """
        is_skipping = params.skip_special_tokens
        decoder = self._decoder(is_skipping, prompt_ids)
        if not (params.stop or params.stop_regex):
            return decoder
        stop_tokens: dict[int, str] = {}
        if is_skipping:
            stop_tokens = {self._special_tokens[stop]: stop for stop in params.stop if stop in self._special_tokens}
        scanner = StopScanner(params.stop, params.stop_regex, params.no_stop_trim)
        stopped = StoppedText(decoder, scanner, stop_tokens)
        return LaterStoppedText(stopped, params.min_new_tokens) if params.min_new_tokens else stopped

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, spaces kept."""
        piece = self._all_pieces[token_id]
        return piece.encode() if isinstance(piece, str) else piece

    def token_text(self, token_id: int) -> str:
        """Return the text of one token, spaces kept; bytes that are incomplete UTF-8 by themselves show as U+FFFD."""
        piece = self._all_pieces[token_id]
        return piece if isinstance(piece, str) else piece.decode("utf-8", "replace")

    def _decoder(self, is_skipping: bool, prompt_ids: Sequence[int]) -> TextStream:
        pieces = self._shown_pieces if is_skipping else self._all_pieces
        if self._is_byte_level:
            return ByteLevelDecoder(pieces)

        def is_shown(token_id: int) -> bool:
            return not (is_skipping and token_id in self._special_ids) and self._id_to_token(token_id) is not None

        if self._steps is None:
            context = list(filter(is_shown, prompt_ids[-WINDOW_CONTEXT:]))
            return WindowDecoder(self._decode, is_shown, context)
        is_at_start = not any(map(is_shown, prompt_ids))
        return ByteFallbackDecoder(pieces, self._steps, self._first_piece, is_at_start)

    def _piece(self, token_id: int) -> Piece:
        token = self._id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return byte_level_piece(token)
        return self._decode([token_id]) if self._steps is None else self._steps.piece(token)

    def _first_piece(self, token_id: int) -> Piece:
        token = self._id_to_token(token_id)
        assert token is not None and self._steps is not None, "an unknown id has no piece to be first"
        return self._steps.piece(token, is_first=True)


def flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the steps of a decoder, nested sequences dissolved."""
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in flatten(inner)]


def byte_level_piece(token: str) -> Piece:
    """Return the piece of a byte-level token.

    A token with a character outside the alphabet (mostly an added token) stands for itself.
    """
    try:
        data = token.translate(LATIN_1_OF_CHAR).encode("latin-1")
    except UnicodeEncodeError:
        return token
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data
