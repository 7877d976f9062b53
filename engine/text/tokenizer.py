"""Convert text to token ids and back, and chat messages to a prompt.

Works on the tokenizers library directly, because importing transformers takes seconds; only a folder that has neither
a tokenizer.json nor a vocabulary file that can be read here goes through transformers.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jinja2
import tokenizers
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from engine.config_file import read_json
from engine.errors import InvalidRequest, ModelError
from engine.request import SamplingParams
from engine.text.chat_template import TEMPLATE_ERRORS, compile_template, render
from engine.text.detokenizer import Detokenizer, TextStream
from engine.text.long_text import PIECE_CHARS, LongTexts
from engine.text.probe import check_tokenizer
from engine.text.vocabulary_file import FLAGS, Vocabulary, find_vocabulary_file, load_vocabulary

MALFORMED = (AttributeError, LookupError, TypeError, ValueError)  # errors raised by an entry of the wrong kind
# Named tokens that are added to a vocabulary that lacks them.
STANDARD_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_FILE_BYTES = 1 << 29  # of a tokenizer.json; those of 256,000 tokens have some 35 million
NO_CHAT_TEMPLATE = "model has no chat template (a base model?): use /v1/completions, or serve it with --chat-template"
CONTINUE_MARK = "<~continue from here~> "
Message = Mapping[str, Any]


class Backend(Protocol):
    """Declare what is called of the library that holds the vocabulary."""

    vocab_size: int
    special_tokens: dict[str, int]  # text -> id
    decoder: dict[str, Any] | None  # the tokenizers library's description of its decoder; None: there is none

    def encode(self, text: str, add_special_tokens: bool, context_length: int | None = None) -> list[int]: ...

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str: ...

    def id_to_token(self, token_id: int) -> str | None: ...

    def token_to_id(self, token: str) -> int | None: ...

    def to_json(self) -> str | None: ...


class FastBackend:
    """Encode and decode with the tokenizers library."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()  # some files set truncation and padding, for training
        tokenizer.no_padding()
        self._tokenizer, self._long_texts = tokenizer, LongTexts(tokenizer)
        self.id_to_token = tokenizer.id_to_token
        self.token_to_id = tokenizer.token_to_id
        self.to_json = tokenizer.to_str
        self.vocab_size = tokenizer.get_vocab_size()
        added = tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: token_id for token_id, token in added.items() if token.special}
        decoder = tokenizer.decoder
        self.decoder = json.loads(decoder.__getstate__()) if decoder is not None else None

    def encode(self, text: str, add_special_tokens: bool, context_length: int | None = None) -> list[int]:
        try:
            if len(text) > PIECE_CHARS:
                return self._long_texts.encode(text, add_special_tokens, context_length)
            # The library lets other threads run only while it encodes a batch; "fast" leaves out offsets nobody reads.
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # the library's, which is no Exception and cannot be imported
                raise
            raise InvalidRequest(f"the tokenizer cannot read this text: {error}", "text") from None

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


class PythonBackend:
    """Encode and decode with a transformers tokenizer that has no counterpart in the tokenizers library."""

    decoder: dict[str, Any] | None = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.special_tokens = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))

    def encode(self, text: str, add_special_tokens: bool, context_length: int | None = None) -> list[int]:
        del context_length  # nothing is known of where such a tokenizer cuts
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return token_ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        known = [token_id for token_id in token_ids if token_id < self.vocab_size]
        text: str = self._tokenizer.decode(
            known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def id_to_token(self, token_id: int) -> str | None:
        return self._tokenizer.convert_ids_to_tokens(token_id) if token_id < self.vocab_size else None

    def token_to_id(self, token: str) -> int | None:
        token_id = self._tokenizer.convert_tokens_to_ids(token)
        return token_id if token_id is not None and self.id_to_token(token_id) == token else None  # not <unk>'s

    def to_json(self) -> None:
        return None


@dataclass(frozen=True)
class Tokenizer:
    """Convert text to token ids and back, and render chats, for one model."""

    backend: Backend
    named_tokens: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token, ...: templates see them
    chat_templates: dict[str, str] = field(default_factory=dict)  # by name; "default" is the usual one
    origin: str = ""  # what it was made from, for people, if not a tokenizer.json
    detokenizer: Detokenizer = field(init=False, repr=False)

    def __post_init__(self) -> None:
        backend = self.backend
        detokenizer = Detokenizer(
            backend.decoder,
            backend.id_to_token,
            lambda token_ids: backend.decode(token_ids, False),
            backend.special_tokens,
        )
        object.__setattr__(self, "detokenizer", detokenizer)

    @classmethod
    def load(cls, folder: Path, trust_remote_code: bool = False, chat_template: str | None = None) -> "Tokenizer":
        """Load the tokenizer of a Hugging Face model folder.

        chat_template: Jinja text in place of the folder's templates. Raises `ModelError` if there is no usable
        tokenizer.
        """
        config = read_json(folder / "tokenizer_config.json")
        legacy_names = read_json(folder / "special_tokens_map.json")
        extra_names = config.get("extra_special_tokens")
        named_tokens = find_named_tokens(legacy_names) | find_named_tokens(config)
        if isinstance(extra_names, dict):
            named_tokens |= find_named_tokens(extra_names)
        try:
            chat_templates = (
                {"default": chat_template} if chat_template is not None else find_chat_templates(folder, config)
            )
        except (OSError, *MALFORMED) as error:
            raise ModelError(f"the chat templates of {folder} are malformed: {described(error)}") from error
        file, vocabulary_file = folder / "tokenizer.json", find_vocabulary_file(folder)
        origin = ""
        if file.exists():
            backend = load_fast(file, config, named_tokens)
        elif vocabulary_file is not None and not (trust_remote_code and config.get("auto_map")):
            vocabulary = load_vocabulary_file(vocabulary_file, config, named_tokens)
            backend, named_tokens = FastBackend(vocabulary.tokenizer), vocabulary.named_tokens | named_tokens
            origin = f"{vocabulary_file.name}, {vocabulary.origin}"
            if not chat_templates and vocabulary.chat_template is not None:
                chat_templates = {"default": vocabulary.chat_template}
                origin += "; the chat template is ours, the folder has none"
        else:
            backend = load_with_transformers(folder, trust_remote_code)
            origin = "transformers"
        check_tokenizer(lambda text: backend.encode(text, True), f"the tokenizer of {folder}")
        return cls(backend, named_tokens, chat_templates, origin)

    def to_json(self) -> str | None:
        """Return the tokenizers library's description, added tokens included; None: it is another library's."""
        return self.backend.to_json()

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens, added tokens included; a model's embedding may have more rows."""
        return self.backend.vocab_size

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.backend.special_tokens.values())

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """Return the model's template, or its templates by name if it has several."""
        return self.chat_templates.get("default") if self.chat_templates.keys() <= {"default"} else self.chat_templates

    def encode(self, text: str, add_special_tokens: bool = True, *, context_length: int | None = None) -> list[int]:
        """Return the token ids of `text`. Raises `InvalidRequest` if it has half a surrogate pair.

        add_special_tokens: add the tokens that the model expects around any text, such as a first <s>. Chat templates
        write them out, so a rendered chat is encoded without. context_length: raise `PromptTooLong`, as soon as that is
        sure, for a long text with many more tokens.
        """
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequest(f"text has half a surrogate pair at character {error.start}", "text") from None
        return self.backend.encode(text, add_special_tokens, context_length)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; ids that the tokenizer does not know have none.

        Raises `InvalidRequest` for numbers that cannot be an id.
        """
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < 1 << 31:
            raise InvalidRequest("token ids must be between 0 and 2147483647", "input_ids")
        return self.backend.decode(list(token_ids), skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def check_chat_template(self, source: str) -> None:
        """Raise ValueError, with the line, if the Jinja text `source` cannot be compiled."""
        try:
            compile_template(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"line {error.lineno}: {error.message}") from None
        except (SyntaxError, RecursionError, MemoryError) as error:  # Python's own limits, of nested loops for example
            raise ValueError(str(error) or type(error).__name__) from None

    def token_text(self, token_id: int) -> str:
        """Return one token's text for log-probabilities, spaces kept; incomplete UTF-8 shows as U+FFFD."""
        return self.detokenizer.token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return self.detokenizer.token_bytes(token_id)

    def text_stream(self, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> TextStream:
        """Return a stream for the text of the tokens that follow `prompt_ids`, with the stops of `params`."""
        return self.detokenizer.stream(params, prompt_ids)

    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Render `messages` to a prompt with the model's chat template, as transformers' apply_chat_template does.

        chat_template: a template's name, or Jinja text. kwargs: the template's own variables. continue_final_message:
        end the prompt inside the last message (and leave out the generation prompt).
        Raises `InvalidRequest` if there is no template, or the template refuses the messages.
        """
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise InvalidRequest("messages must be objects, and at least one", "messages")
        source = self._template_source(chat_template, bool(tools))
        # OpenAI clients send "content": null; templates test whether a key is there.
        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        final_text = mark_end(chat) if continue_final_message else ""
        variables = {
            **self.named_tokens,
            "messages": chat,
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            **kwargs,
        }
        try:
            prompt = render(source, variables)
        except TEMPLATE_ERRORS as error:
            raise InvalidRequest(f"chat template: {error or type(error).__name__}", "messages") from error
        return cut_at_mark(prompt, final_text) if continue_final_message else prompt

    def _named_id(self, name: str) -> int | None:
        token = self.named_tokens.get(name)
        return self.backend.token_to_id(token) if token is not None else None

    def _template_source(self, chat_template: str | None, has_tools: bool) -> str:
        templates = self.chat_templates
        if chat_template is not None:
            return templates.get(chat_template, chat_template)
        if has_tools and "tool_use" in templates:
            return templates["tool_use"]
        if "default" in templates:
            return templates["default"]
        if templates:
            names = ", ".join(sorted(templates))
            raise InvalidRequest(f"model has no default chat template; choose one of: {names}", "chat_template")
        raise InvalidRequest(NO_CHAT_TEMPLATE, "messages")


def described(error: Exception) -> str:
    """Return the error's type and message."""
    return f"{type(error).__name__}: {error}"


def load_fast(file: Path, config: Mapping[str, Any], named_tokens: Mapping[str, str]) -> Backend:
    """Load a tokenizer.json, with what tokenizer_config.json, `config`, changes. `ModelError` if either is broken."""
    if (size := file.stat().st_size) > MAX_FILE_BYTES:
        raise ModelError(f"{file} has {size} bytes, more than any tokenizer: {MAX_FILE_BYTES}")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{file} is not a tokenizer: {error}") from error
    try:
        apply_config(tokenizer, config, named_tokens)
    except MALFORMED as error:
        raise ModelError(f"{file.with_name('tokenizer_config.json')} is malformed: {described(error)}") from error
    return FastBackend(tokenizer)


def load_vocabulary_file(file: Path, config: Mapping[str, Any], named_tokens: Mapping[str, str]) -> Vocabulary:
    """Load a vocabulary file, with what tokenizer_config.json, `config`, says. `ModelError` if either is broken."""
    try:
        vocabulary = load_vocabulary(file, config, named_tokens)
        rest = {name: value for name, value in config.items() if name != "added_tokens_decoder"}  # are added already
        apply_config(vocabulary.tokenizer, rest, vocabulary.named_tokens | dict(named_tokens))
    except MALFORMED as error:
        raise ModelError(f"{file.with_name('tokenizer_config.json')} is malformed: {described(error)}") from error
    return vocabulary


def load_with_transformers(folder: Path, trust_remote_code: bool) -> Backend:
    """Load a tokenizer without a tokenizer.json. Raises `ModelError` if transformers cannot."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # may run a repository's own code
        raise ModelError(f"cannot load the tokenizer of {folder}: {error}") from error
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return PythonBackend(tokenizer)
    return FastBackend(fast)


def find_named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of bos_token, eos_token, ..., which are strings, or objects with content and flags."""
    contents = {name: token.get("content") if isinstance(token, dict) else token for name, token in config.items()}
    return {name: token for name, token in contents.items() if name.endswith("_token") and isinstance(token, str)}


def find_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return templates by name: .jinja files, else a processor's chat_template.json, else tokenizer_config.json's."""
    files = {file.stem: file for file in (folder / "additional_chat_templates").glob("*.jinja")}
    if (file := folder / "chat_template.jinja").exists():
        files["default"] = file
    if files:
        return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    found = read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(found, list):
        return {template["name"]: template["template"] for template in found}
    if isinstance(found, dict):
        return dict(found)
    return {"default": found} if found else {}


def apply_config(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], named_tokens: Mapping[str, str]) -> None:
    """Apply the changes that tokenizer_config.json makes to tokenizer.json, as transformers does.

    The file may add tokens, make them special, and set whether texts start with bos and end with eos.
    """
    known = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    listed = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    tokens = [AddedToken(e["content"], **{flag: e[flag] for flag in FLAGS if flag in e}) for _, e in listed]
    names = known.keys() | {token.content for token in tokens}
    standard = dict.fromkeys(named_tokens[name] for name in STANDARD_TOKENS if name in named_tokens)
    tokens += [AddedToken(name, special=True) for name in standard if name not in names]
    tokenizer.add_tokens([token for token in tokens if known.get(token.content) != token.special])
    if "add_bos_token" in config or "add_eos_token" in config:
        around = (
            named_tokens.get(f"{name}_token") if config.get(f"add_{name}_token") else None for name in ("bos", "eos")
        )
        tokenizer.post_processor = template_processing(tokenizer, *around)


def template_processing(tokenizer: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> TemplateProcessing:
    """Return a post-processor that puts `bos` before every text and `eos` after it, where not None."""
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    used: Iterable[str] = dict.fromkeys(token for token in (bos, eos) if token)
    return TemplateProcessing(single=single, special_tokens=[(token, tokenizer.token_to_id(token)) for token in used])


def mark_end(chat: list[dict[str, Any]]) -> str:
    """Append `CONTINUE_MARK` to the last message's last text (in copies), and return that text."""
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + CONTINUE_MARK
        return content
    parts = list(content) if isinstance(content, (list, tuple)) else []
    for index in reversed(range(len(parts))):
        part = parts[index]
        if isinstance(part, Mapping) and isinstance(text := part.get("text"), str):
            parts[index] = {**part, "text": text + CONTINUE_MARK}
            chat[-1]["content"] = parts
            return text
    raise InvalidRequest("continue_final_message: the last message has no text to continue", "messages")


def cut_at_mark(prompt: str, final_text: str) -> str:
    """Return `prompt` up to `CONTINUE_MARK`. Raises `InvalidRequest` if the template changed the last message.

    Templates may trim a message, and with it the mark's last space; then the text's end was meant to be trimmed, too.
    """
    mark = CONTINUE_MARK.strip()
    end = prompt.rfind(mark)
    if end < 0 or final_text.strip() not in prompt:
        raise InvalidRequest("continue_final_message: the chat template changes the last message", "messages")
    is_trimmed = not prompt.startswith(CONTINUE_MARK, end)
    return prompt[:end].rstrip() if is_trimmed else prompt[:end]
