"""Build a tokenizer of the tokenizers library from a rank file of tiktoken: a line is a token, in base64, and its id.

tiktoken merges the two neighbours whose join has the lowest id, until none has one. A word that is a token as a whole
is taken without merging.
"""

import base64
import re

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from engine.text.detokenizer import BYTE_OF_CHAR

# How models cut text into the words that they merge within.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
# Words of Kimi: Chinese characters apart; of others as many capitals as come first, and the small letters behind them.
CASELESS = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
UPPER, LOWER = r"[\p{Lu}\p{Lt}" + CASELESS, r"[\p{Ll}" + CASELESS
KIMI = "|".join(
    (
        r"[\p{Han}]+",
        *(
            rf"[^\r\n\p{{L}}\p{{N}}]?{letters}(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            for letters in (f"{UPPER}*{LOWER}+", f"{UPPER}+{LOWER}*")
        ),
        LLAMA_3.partition(r"\p{L}+|")[2],
    )
)
CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}
LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")


def is_rank_file(data: bytes) -> bool:
    return LINE.match(data) is not None


def read_ranks(data: bytes) -> dict[bytes, int]:
    """Return the id of each token. ValueError with the line that is none, or if ids are not 0, 1, 2, ..."""
    ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:  # binascii's among them
            raise ValueError(f"line {number} is no token with its rank: {error}") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"the ranks of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{len(missing)} of the 256 bytes are no tokens, the first is {missing[0]}")
    return ranks


def build_tokenizer(ranks: dict[bytes, int], pattern: str, *, is_composed: bool) -> tokenizers.Tokenizer:
    """Return the tokenizer that merges within the words that `pattern` finds. is_composed: text becomes NFC first."""
    names = {token: "".join(map(CHAR_OF_BYTE.__getitem__, token)) for token in ranks}
    merges = [
        (names[token[:cut]], names[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocab = {names[token]: rank for token, rank in ranks.items()}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if is_composed:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer
