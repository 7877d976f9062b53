"""Load the tokenizer of a folder that has no tokenizer.json, but a sentencepiece model or a rank file of tiktoken.

Models that run code of their own to read such a file (ChatGLM, Qwen 1, Baichuan, InternLM) have tokens and prompts
that only that code knows. They are written down here; no such code is run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from engine.config_file import read_json
from engine.errors import ModelError
from engine.text import rank_file, sentencepiece_file
from engine.text.rank_file import KIMI, LLAMA_3, QWEN_2
from engine.text.sentencepiece_file import SentencePieceModel

FILES = ("qwen.tiktoken", "tiktoken.model", "tokenizer.model")  # the last may be of sentencepiece or a rank file

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_1 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + CHATML
)
CHATGLM_2 = (
    "[gMASK]<sop>{% set round = namespace(number=0) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set round.number = round.number + 1 %}[Round {{ round.number }}]\n\n问：{{ message.content }}\n\n答："
    "{% elif message.role == 'assistant' %}{{ message.content }}\n\n"
    "{% else %}{{ raise_exception('ChatGLM 2 has no ' + message.role + ' messages') }}{% endif %}{% endfor %}"
)
CHATGLM_3 = (
    "[gMASK]<sop>{% for message in messages %}<|{{ 'observation' if message.role == 'tool' else message.role }}|>"
    "{{ message.metadata }}\n {{ message.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GLM_4 = CHATGLM_3.replace("\n ", "\n")
BAICHUAN = (
    "{% for message in messages %}{% if message.role == 'user' %}USER{% elif message.role == 'assistant' %}ASSISTANT"
    "{% elif not loop.first %}{{ raise_exception('a system message must be the first') }}{% endif %}"
    "{{ message.content }}{% endfor %}{% if add_generation_prompt %}ASSISTANT{% endif %}"
)
GLM_MASKS = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


@dataclass(frozen=True)
class Family:
    """Hold what the code of a family adds to the file."""

    added: tuple[str, ...] = ()  # special tokens after those of the file, in order
    prefix: tuple[str, ...] = ()  # tokens before every text
    named_tokens: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    pattern: str | None = None  # finds the words of a rank file
    is_composed: bool = False


CHATGLM = Family((*GLM_MASKS, *GLM_ROLES), ("[gMASK]", "<sop>"), template=CHATGLM_3)
FAMILIES = {  # tokenizer_config.json's tokenizer_class -> family
    "ChatGLMTokenizer": CHATGLM,
    "ChatGLM4Tokenizer": Family(
        ("<|endoftext|>", *GLM_MASKS, *GLM_ROLES),
        ("[gMASK]", "<sop>"),
        {"eos_token": "<|endoftext|>"},
        GLM_4,
        LLAMA_3,
    ),
    "QWenTokenizer": Family(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))),
        (),
        {"eos_token": "<|endoftext|>"},
        QWEN_1,
        QWEN_2,
        is_composed=True,
    ),
    "TikTokenTokenizer": Family(pattern=KIMI),
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer from a vocabulary file, and what goes with it."""

    tokenizer: tokenizers.Tokenizer
    named_tokens: dict[str, str]
    chat_template: str | None  # for a folder that has none
    origin: str  # for people


def find_vocabulary_file(folder: Path) -> Path | None:
    """Return the file that `load_vocabulary` reads, None if there is none."""
    return next((file for name in FILES if (file := folder / name).is_file()), None)


def load_vocabulary(file: Path, config: Mapping[str, Any], named_tokens: Mapping[str, str]) -> Vocabulary:
    """Load a vocabulary file. `ModelError` naming it, and what would do instead, if that cannot be.

    config: tokenizer_config.json; named_tokens: bos_token, ... of the folder.
    """
    data, folder = file.read_bytes(), file.parent
    tokenizer_class = config.get("tokenizer_class") or ""
    family = FAMILIES.get(tokenizer_class, Family())
    try:
        if not rank_file.is_rank_file(data):
            model = sentencepiece_file.read_model(data)
            added = added_tokens(folder, config, len(model.pieces), family)
            return from_sentencepiece(model, family, added, folder, config, named_tokens)
        if family.pattern is None:
            raise ValueError(
                f"is a rank file of tiktoken, and how {tokenizer_class or 'its model'} cuts text is not known"
            )
        ranks = rank_file.read_ranks(data)
        return from_ranks(ranks, family, added_tokens(folder, config, len(ranks), family), folder)
    except ValueError as error:
        raise ModelError(
            f"{file} {error}. A tokenizer.json beside it would do, or --tokenizer-path naming a folder with one, or, "
            "where the folder brings code of its own, --trust-remote-code"
        ) from None


def added_tokens(folder: Path, config: Mapping[str, Any], size: int, family: Family) -> dict[int, AddedToken]:
    """Return the tokens that the folder's other files, or else the family's code, add or rename, by id.

    size: tokens of the vocabulary file. Ids between it and the last that nobody names get names that no text has.
    Of added_tokens.json those are special that a special token's name stands for.
    """
    names = {size + index: text for index, text in enumerate(family.added)}
    beside = {token_id: text for text, token_id in read_json(folder / "added_tokens.json").items()}
    special = special_texts(config) | special_texts(read_json(folder / "special_tokens_map.json"))
    flags = {token_id: {"special": False} for token_id, text in beside.items() if text not in special}
    names |= beside
    entries = {int(token_id): entry for token_id, entry in (config.get("added_tokens_decoder") or {}).items()}
    names |= {token_id: entry["content"] for token_id, entry in entries.items()}
    if "<sop>" in family.prefix:  # some files write these without brackets, and then they would be found within words
        names = {token_id: {"sop": "<sop>", "eop": "<eop>"}.get(text, text) for token_id, text in names.items()}
    names = {token_id: f"<|unnamed {token_id}|>" for token_id in range(size, max(names, default=0))} | names
    flags |= {token_id: {flag: entry[flag] for flag in FLAGS if flag in entry} for token_id, entry in entries.items()}
    return {
        token_id: AddedToken(text, **{"special": True, "normalized": False} | flags.get(token_id, {}))
        for token_id, text in sorted(names.items())
    }


def special_texts(config: Mapping[str, Any]) -> set[str]:
    """Return the texts of bos_token, ..., and of additional_special_tokens, each a text or an object with content."""
    listed = config.get("additional_special_tokens")
    tokens = [token for name, token in config.items() if name.endswith("_token")]
    tokens += listed if isinstance(listed, list) else []
    texts = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    return {text for text in texts if isinstance(text, str)}


def from_ranks(ranks: dict[bytes, int], family: Family, added: dict[int, AddedToken], folder: Path) -> Vocabulary:
    assert family.pattern is not None
    tokenizer = rank_file.build_tokenizer(ranks, family.pattern, is_composed=family.is_composed)
    add_tokens(tokenizer, added)
    put_before(tokenizer, family.prefix)
    return Vocabulary(tokenizer, family.named_tokens, template_of(family, tokenizer, folder), "a rank file of tiktoken")


def from_sentencepiece(
    model: SentencePieceModel,
    family: Family,
    added: dict[int, AddedToken],
    folder: Path,
    config: Mapping[str, Any],
    named_tokens: Mapping[str, str],
) -> Vocabulary:
    names = {token_id: token.content for token_id, token in added.items()}
    tokenizer = sentencepiece_file.build_tokenizer(model, names, only_first_space=config.get("legacy") is False)
    add_tokens(tokenizer, added)
    ids = {"unk_token": model.unknown_id, "bos_token": model.bos_id, "eos_token": model.eos_id}
    named = {name: text for name, token_id in ids.items() if (text := names.get(token_id, model.piece(token_id)))}
    bos = {**named, **named_tokens}.get("bos_token")
    if family.prefix:
        put_before(tokenizer, family.prefix)
    elif bos is not None and tokenizer.token_to_id(bos) is not None:
        put_before(tokenizer, (bos,))  # unless tokenizer_config.json says otherwise
    kind = "BPE" if model.model_type == sentencepiece_file.BPE else "unigram"
    return Vocabulary(tokenizer, named, template_of(family, tokenizer, folder), f"a sentencepiece model ({kind})")


def add_tokens(tokenizer: tokenizers.Tokenizer, added: Mapping[int, AddedToken]) -> None:
    """Add tokens by id, in order. ValueError if one gets another id."""
    tokenizer.add_tokens(list(added.values()))
    for token_id, token in added.items():
        if (found := tokenizer.token_to_id(token.content)) != token_id:
            raise ValueError(f"leaves no place for {token.content!r} at {token_id}: it is at {found}")


def put_before(tokenizer: tokenizers.Tokenizer, prefix: tuple[str, ...]) -> None:
    """Have `tokenizer` put the tokens `prefix` before every text."""
    if prefix:
        ids = [(text, tokenizer.token_to_id(text)) for text in prefix]
        tokenizer.post_processor = TemplateProcessing(single=[*prefix, "$A"], special_tokens=ids)


def template_of(family: Family, tokenizer: tokenizers.Tokenizer, folder: Path) -> str | None:
    """Return the chat template of a model whose folder has none, as far as its files tell which it is.

    Baichuan's tokens before a message are named in generation_config.json; they become special.
    """
    generation = read_json(folder / "generation_config.json")
    if generation.get("chat_format") == "raw":  # a base model of Qwen 1
        return None
    if family is CHATGLM:
        name = str(read_json(folder / "config.json").get("_name_or_path") or folder.name)
        return CHATGLM_2 if "chatglm2" in name.lower() else CHATGLM_3
    ids = [generation.get(f"{role}_token_id") for role in ("user", "assistant")]
    found = [tokenizer.id_to_token(token_id) for token_id in ids if type(token_id) is int and token_id >= 0]
    roles = [text for text in found if text is not None]
    if len(roles) == 2:
        tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in roles])
        return BAICHUAN.replace("USER", roles[0]).replace("ASSISTANT", roles[1])
    if family.template is None and tokenizer.token_to_id("<|im_start|>") is not None:  # InternLM 2
        return "{{ bos_token }}" + CHATML
    return family.template
