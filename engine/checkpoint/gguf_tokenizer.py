"""Convert the tokenizer of a GGUF file to tokenizer.json and tokenizer_config.json.

There are three kinds: byte-level BPE, whose ways of cutting text are `engine.checkpoint.gguf_words`; SentencePiece's
BPE, with scores in place of merges; and the latter with merges, which Gemma 4 has. Metadata is taken as
`engine.checkpoint.gguf` reads it.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.gguf_words import WORDS, Words
from engine.errors import ModelError
from engine.model_config import turn_ends
from engine.text.sentencepiece_file import merges_by_score

logger = logging.getLogger(__name__)

Metadata = Mapping[str, Any]

CONTROL, USER_DEFINED = 3, 4  # token types
TEMPLATE = "tokenizer.chat_template"


BYTE_LEVEL, SENTENCEPIECE, MERGED = "gpt2", "llama", "gemma4"
KINDS = (SENTENCEPIECE, BYTE_LEVEL, MERGED)  # of tokenizer.ggml.model
OTHER_KINDS = {"bert": "WordPiece", "t5": "Unigram", "rwkv": "RWKV", "plamo2": "PLaMo-2"}
# Ids of special tokens that old SentencePiece files leave out.
USUAL_IDS = {"bos": 1, "eos": 2, "unknown": 0}


def has_known_tokenizer(metadata: Metadata) -> bool:
    """Return whether the tokenizer is of a kind that `write_tokenizer` can write."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == BYTE_LEVEL:
        return str(metadata.get("tokenizer.ggml.pre", "default")) in WORDS
    return kind in KINDS


def check_tokenizer(metadata: Metadata) -> None:
    """Raise `ModelError` with what is known, unless the tokenizer is."""
    kind, words = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if has_known_tokenizer(metadata):
        if kind == BYTE_LEVEL and words == "default":
            logger.warning("the GGUF file does not say how text is cut into words (tokenizer.ggml.pre): as GPT-2 does")
        return
    if kind not in KINDS:
        named = f"{kind!r} ({OTHER_KINDS[kind]})" if kind in OTHER_KINDS else f"{kind!r}"
        what = f"is of a kind that is not supported: {named}, only {', '.join(KINDS)} are"
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
    is_byte_level = metadata["tokenizer.ggml.model"] == BYTE_LEVEL
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
    ids = {role: token_id(metadata, name) for role, name in roles.items()}
    templates = chat_templates(metadata)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context_length,
            "clean_up_tokenization_spaces": False,
            **{role: tokens[number] for role, number in ids.items() if number is not None},
            **({"chat_template": templates} if templates else {}),
        },
    )


def token_id(metadata: Metadata, name: str) -> int | None:
    """Return the id of the special token `name`, such as bos; None if there is none."""
    usual = USUAL_IDS.get(name) if metadata.get("tokenizer.ggml.model") == SENTENCEPIECE else None
    number: int | None = metadata.get(f"tokenizer.ggml.{name}_token_id", usual)
    return number


def chat_templates(metadata: Metadata) -> str | list[dict[str, str]]:
    """Return the file's chat template, or all that it has, by name, as tokenizer_config.json has them."""
    named = {
        key.removeprefix(TEMPLATE).removeprefix(".") or "default": source
        for key, source in metadata.items()
        if key == TEMPLATE or key.startswith(f"{TEMPLATE}.")
    }
    if named.keys() <= {"default"}:
        return str(named.get("default", ""))
    return [{"name": name, "template": source} for name, source in named.items()]


def add_ends(tokenizer: Any, metadata: Metadata, *, adds_bos: bool) -> None:
    """Have `tokenizer` put bos before every text and eos after it, where the file, or else `adds_bos`, says so."""
    from tokenizers.processors import TemplateProcessing

    tokens = metadata["tokenizer.ggml.tokens"]
    ends: list[tuple[str, int] | None] = []
    for name, default in (("bos", adds_bos), ("eos", False)):
        number = token_id(metadata, name)
        is_added = metadata.get(f"tokenizer.ggml.add_{name}_token", default)
        ends.append(None if number is None or not is_added else (tokens[number], number))
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
    model = models.BPE(vocabulary(metadata), merges_of(metadata), ignore_merges=words.has_whole_words)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.ByteLevel()
    cuts: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in words.patterns]
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words.is_gpt2))
    cuts += [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in words.of_bytes]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    if words.is_composed:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def sentencepiece_tokenizer(metadata: Metadata) -> Any:
    """Return a SentencePiece-like BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    has_merges = metadata["tokenizer.ggml.model"] == MERGED
    vocab = vocabulary(metadata)
    merges = merges_of(metadata) if has_merges else merges_by_score(vocab, metadata["tokenizer.ggml.scores"])
    unknown = metadata["tokenizer.ggml.tokens"][token_id(metadata, "unknown") or 0]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if metadata.get("tokenizer.ggml.add_space_prefix", not has_merges) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def merges_of(metadata: Metadata) -> list[tuple[str, str]]:
    """Return the merges that the file lists: the first space after the first letter parts the two sides."""
    merges = []
    for merge in metadata["tokenizer.ggml.merges"]:
        cut = merge.index(" ", 1)
        merges.append((merge[:cut], merge[cut + 1 :]))
    return merges


def vocabulary(metadata: Metadata) -> dict[str, int]:
    """Return the ids of all tokens."""
    return {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
