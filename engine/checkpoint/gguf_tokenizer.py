"""Convert the tokenizer of a GGUF file to tokenizer.json and tokenizer_config.json.

A file names the way in which text is cut into pieces before merging (`tokenizer.ggml.pre`); the patterns are those of
the models' own tokenizer.json. Metadata is taken as `engine.checkpoint.gguf` reads it.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.model_config import turn_ends

logger = logging.getLogger(__name__)

Metadata = Mapping[str, Any]

CONTROL, USER_DEFINED = 3, 4  # token types


@dataclass(frozen=True)
class Words:
    """Describe how a byte-level tokenizer cuts text into the pieces that it merges within."""

    patterns: tuple[str, ...] = ()  # each cuts what those before it left; what lies between matches is a piece, too
    is_gpt2: bool = False  # GPT-2's pattern comes last
    has_whole_words: bool = False  # a piece that is in the vocabulary is a token, even if merges cannot reach it
    is_composed: bool = False  # text is normalized to NFC first
    adds_bos: bool = False  # unless the file says otherwise


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CJK = r"[\x{4e00}-\x{9fa5}\x{0800}-\x{4e00}\x{ac00}-\x{d7ff}]+"
# DeepSeek's own file lists the letters that have a case one by one.
DEEPSEEK_LLM = (r"[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", CJK, r"\p{N}")
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}")

GPT_2 = Words(is_gpt2=True)
DIGITS = Words((r"\p{N}",), is_gpt2=True)
# tokenizer.ggml.pre -> the way of cutting
WORDS = {
    **dict.fromkeys(("default", "gpt-2", "mpt", "olmo", "jais"), GPT_2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), DIGITS),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3"), Words((LLAMA_3,), has_whole_words=True, adds_bos=True)
    ),
    **dict.fromkeys(("smaug-bpe", "dbrx"), Words((LLAMA_3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), Words((QWEN_2,), is_composed=True)),
    "stablelm2": Words((QWEN_2,)),
    "tekken": Words((TEKKEN,), has_whole_words=True, adds_bos=True),
    "deepseek-llm": Words(DEEPSEEK_LLM),
    "deepseek-coder": Words(DEEPSEEK_CODER),
}
KINDS = ("llama", "gpt2")  # tokenizer.ggml.model


def has_known_tokenizer(metadata: Metadata) -> bool:
    """Return whether the tokenizer is of a kind that `write_tokenizer` can write."""
    kind = metadata.get("tokenizer.ggml.model")
    return kind == "llama" or (kind == "gpt2" and str(metadata.get("tokenizer.ggml.pre", "default")) in WORDS)


def check_tokenizer(metadata: Metadata) -> None:
    """Raise `ModelError` with what is known, unless the tokenizer is."""
    kind, words = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if has_known_tokenizer(metadata):
        if kind == "gpt2" and words == "default":
            logger.warning("the GGUF file does not say how text is cut into words (tokenizer.ggml.pre): as GPT-2 does")
        return
    if kind not in KINDS:
        what = f"is of a kind that is not known: {kind!r}, only {' and '.join(KINDS)} are"
    else:
        what = f"cuts text in a way that is not known: {words!r} (tokenizer.ggml.pre), only {', '.join(WORDS)} are"
    raise ModelError(f"the GGUF file's tokenizer {what}; --tokenizer-path may name the original model's")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(metadata: Metadata, context_length: int, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json. Raises `ModelError` if the tokenizer is of unknown kind."""
    from tokenizers import AddedToken

    check_tokenizer(metadata)
    is_byte_level = metadata["tokenizer.ggml.model"] == "gpt2"
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    tokenizer = (byte_level_tokenizer if is_byte_level else sentencepiece_tokenizer)(metadata)
    # Some files have the end of a turn as a usual token; nobody wants to read it.
    special = dict.fromkeys(token for token, kind in zip(tokens, types, strict=False) if kind == CONTROL)
    special |= dict.fromkeys(turn_ends(set(tokens)))
    defined = [token for token, kind in zip(tokens, types, strict=False) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in defined if token not in special])
    add_ends(tokenizer, metadata, adds_bos=not is_byte_level or words_of(metadata).adds_bos)
    # Not by `save`, which raises no OSError when the disk is full.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: metadata.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    template = metadata.get("tokenizer.chat_template")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context_length,
            "clean_up_tokenization_spaces": False,
            **{role: tokens[token_id] for role, token_id in ids.items() if token_id is not None},
            **({"chat_template": template} if template else {}),
        },
    )


def add_ends(tokenizer: Any, metadata: Metadata, *, adds_bos: bool) -> None:
    """Have `tokenizer` put bos before every text and eos after it, where the file, or else `adds_bos`, says so."""
    from tokenizers.processors import TemplateProcessing

    tokens = metadata["tokenizer.ggml.tokens"]
    ends: list[tuple[str, int] | None] = []
    for name, default in (("bos", adds_bos), ("eos", False)):
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        is_added = metadata.get(f"tokenizer.ggml.add_{name}_token", default)
        ends.append(None if token_id is None or not is_added else (tokens[token_id], token_id))
    if not any(ends):
        return
    bos, eos = ([end[0]] if end else [] for end in ends)
    tokenizer.post_processor = TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, *bos, "$B", *eos],
        special_tokens=list(dict.fromkeys(end for end in ends if end)),
    )


def words_of(metadata: Metadata) -> Words:
    """Return how a byte-level tokenizer cuts text."""
    return WORDS[metadata.get("tokenizer.ggml.pre", "default")]


def byte_level_tokenizer(metadata: Metadata) -> Any:
    """Return a byte-level BPE tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = words_of(metadata)
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary(metadata), merges, ignore_merges=words.has_whole_words))
    tokenizer.decoder = decoders.ByteLevel()
    cuts: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in words.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words.is_gpt2)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    if words.is_composed:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def sentencepiece_tokenizer(metadata: Metadata) -> Any:
    """Return a SentencePiece-like BPE tokenizer.

    The file has no merges: any two tokens that join to a third are a merge, the best-scored third first.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = vocabulary(metadata)
    scores = metadata["tokenizer.ggml.scores"]
    ranked = sorted(
        (-scores[token_id], vocab[token[:cut]], vocab[token[cut:]], token[:cut], token[cut:])
        for token, token_id in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    )
    unknown = metadata["tokenizer.ggml.tokens"][metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(vocab, [pair[3:] for pair in ranked], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend("▁")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def vocabulary(metadata: Metadata) -> dict[str, int]:
    """Return the ids of all tokens."""
    return {token: token_id for token_id, token in enumerate(metadata["tokenizer.ggml.tokens"])}
