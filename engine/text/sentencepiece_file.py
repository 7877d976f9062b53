"""Build a tokenizer of the tokenizers library from a sentencepiece model (Kudo and Richardson 2018).

The file is a protobuf message, of which these fields are read (sentencepiece_model.proto):

ModelProto      1 pieces, repeated: 1 text, 2 score (float), 3 kind; 2 trainer; 3 normalizer
trainer         3 model type, 24 whitespace is a suffix, 35 byte fallback, 40 to 42 ids of unknown, bos and eos
normalizer      2 table of replacements, 3 a space is put first, 4 spaces are squeezed
"""

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

SPACE = "▁"
UNIGRAM, BPE = 1, 2  # model types; words and characters are the others
DEFAULT_IDS = {40: 0, 41: 1, 42: 2}  # unknown, bos, eos
MANY_SPACES = 1 << 10
VARINT, BYTES = 0, 2  # wire types
FIXED_SIZES = {1: 8, 5: 4}  # other wire types -> bytes


class Kind(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class SentencePieceModel:
    """Hold a file's pieces, and how text is normalized before it is cut into them."""

    pieces: tuple[str, ...]  # by id
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    model_type: int
    has_byte_fallback: bool
    unknown_id: int
    bos_id: int  # -1: none
    eos_id: int
    replacements: bytes
    adds_space: bool
    squeezes_spaces: bool

    def piece(self, token_id: int) -> str | None:
        return self.pieces[token_id] if 0 <= token_id < len(self.pieces) else None


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of each field of a protobuf message. ValueError or IndexError if it is none."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value - (1 << 64) if value >> 63 else value  # negative ones take ten bytes
            shift += 7

    while at < len(message):
        key = varint()
        wire = key & 7
        if wire == VARINT:
            yield key >> 3, varint()
            continue
        if wire != BYTES and wire not in FIXED_SIZES:
            raise ValueError(f"wire type {wire} at byte {at}")
        size = varint() if wire == BYTES else FIXED_SIZES[wire]
        if not 0 <= size <= len(message) - at:
            raise ValueError(f"a field of {size} bytes at byte {at}")
        yield key >> 3, message[at : at + size]
        at += size


def read_model(data: bytes) -> SentencePieceModel:
    """Read a .model file. ValueError saying why, if it is none or of a kind that cannot be built."""
    texts, scores, kinds = [], [], []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in fields(data):
            if number == 1:
                piece = dict(fields(value))
                texts.append(piece[1].decode())
                scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                kinds.append(piece.get(3, Kind.NORMAL))
            elif number == 2:
                trainer = dict(fields(value))
            elif number == 3:
                normalizer = dict(fields(value))
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"is no sentencepiece model: {type(error).__name__}: {error}") from None
    if not texts:
        raise ValueError("is no sentencepiece model: it has no pieces")
    model_type = trainer.get(3, UNIGRAM)
    if model_type not in (UNIGRAM, BPE):
        raise ValueError(f"is a sentencepiece model of type {model_type}; only unigram (1) and BPE (2) can be read")
    if trainer.get(24):
        raise ValueError("is a sentencepiece model whose spaces end a word; that cannot be read")
    unknown_id, bos_id, eos_id = (trainer.get(field, default) for field, default in DEFAULT_IDS.items())
    return SentencePieceModel(
        tuple(texts),
        tuple(scores),
        tuple(kinds),
        model_type,
        bool(trainer.get(35, False)),
        unknown_id,
        bos_id,
        eos_id,
        normalizer.get(2, b""),
        bool(normalizer.get(3, True)),
        bool(normalizer.get(4, True)),
    )


def build_tokenizer(
    model: SentencePieceModel, names: Mapping[int, str], *, only_first_space: bool = False
) -> tokenizers.Tokenizer:
    """Return the tokenizer of `model`.

    names: texts of pieces that a model's other files rename. only_first_space: text after a special token gets no
    space put before it (transformers' `legacy: false`).
    """
    texts = [names.get(token_id, piece) for token_id, piece in enumerate(model.pieces)]
    symbols: list[str] = []  # which no merge makes: text is cut around them
    if model.model_type == BPE:
        symbols = [text for text, kind in zip(model.pieces, model.kinds, strict=True) if kind == Kind.USER_DEFINED]
        tokenizer = tokenizers.Tokenizer(bpe_model(model, texts, has_symbols=bool(symbols)))
    else:
        vocab = list(zip(texts, model.scores, strict=True))  # a user-defined symbol's score is the best of all: 0
        tokenizer = tokenizers.Tokenizer(
            models.Unigram(vocab, unk_id=model.unknown_id, byte_fallback=model.has_byte_fallback)
        )
    has_prefix = model.adds_space and not only_first_space
    tokenizer.normalizer = normalizers.Sequence(list(normalizing_steps(model, has_prefix=has_prefix)))
    cuts: list[Any] = []
    if model.adds_space and only_first_space:
        cuts.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
    if symbols:  # the longest first: whichever matches is taken as it is
        pattern = "|".join(map(re.escape, sorted(symbols, key=len, reverse=True)))
        cuts.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    if cuts:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.adds_space or model.squeezes_spaces:
        steps.append(decoders.Strip(" ", MANY_SPACES if model.squeezes_spaces else 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    special = [text for text, kind in zip(texts, model.kinds, strict=True) if kind in (Kind.CONTROL, Kind.UNKNOWN)]
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def bpe_model(model: SentencePieceModel, texts: list[str], *, has_symbols: bool) -> models.BPE:
    """Return the BPE model.

    has_symbols: text is cut around user-defined symbols, so that a piece of it that is in the vocabulary is taken as it
    is.
    """
    kinds = model.kinds
    merged = {text: token_id for token_id, text in enumerate(texts) if kinds[token_id] == Kind.NORMAL}
    return models.BPE(
        {text: token_id for token_id, text in enumerate(texts)},
        merges_by_score(merged, model.scores),
        unk_token=texts[model.unknown_id],
        fuse_unk=True,
        byte_fallback=model.has_byte_fallback,
        ignore_merges=has_symbols,
    )


def merges_by_score(vocab: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return merges for a vocabulary that has none: any two tokens that join to a third, the best-scored third first.

    scores: by id.
    """
    ranked = sorted(
        (-scores[token_id], vocab[token[:cut]], vocab[token[cut:]], token[:cut], token[cut:])
        for token, token_id in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    )
    return [pair[3:] for pair in ranked]


def normalizing_steps(model: SentencePieceModel, *, has_prefix: bool) -> Iterator[normalizers.Normalizer]:
    """Yield what is done to a text before it is cut. has_prefix: a space is put before it."""
    if model.replacements:
        yield normalizers.Precompiled(model.replacements)
    if model.squeezes_spaces:
        yield normalizers.Replace(Regex(r"\A +| +(?= )"), "")
    if has_prefix:
        yield normalizers.Prepend(SPACE)
    yield normalizers.Replace(" ", SPACE)
    if model.squeezes_spaces:
        yield normalizers.Replace(Regex(rf"{SPACE}+\z"), "")
