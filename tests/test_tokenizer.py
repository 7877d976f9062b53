"""Test loading a tokenizer from a model folder, and chat templates against transformers' rendering."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.checkpoint import gguf_words
from engine.errors import InvalidRequest, ModelError, PromptTooLong
from engine.request import SamplingParams
from engine.text import chat_template as templates
from engine.text import long_text, probe
from engine.text.rank_file import LLAMA_3, QWEN_2
from engine.text.tokenizer import FastBackend, PythonBackend, Tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "Grüße, 日本?"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"b": 1, "a": "<é>"}}]},
    {"role": "assistant", "content": " The answer is "},
]
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "parameters": {"z": {"type": "string"}, "a": {}}}}
]


def small_tokenizer() -> tokenizers.Tokenizer:
    """Make a tokenizer of bytes, <s> (1), </s> (2) and <unk> (0)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *alphabet]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder with `small_tokenizer` and the given entries of tokenizer_config.json."""

    def make(tokenizer: tokenizers.Tokenizer | None = None, **config: Any) -> Path:
        (tokenizer or small_tokenizer()).save(str(tmp_path / "tokenizer.json"))
        config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, **config}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


# ---- encode and decode ----


def test_text_survives_encoding_and_decoding(make_folder: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.load(make_folder())
    text = "Grüße, 日本 🚀\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (259, 1, 2)
    assert tokenizer.special_ids == {0, 1, 2}


def test_truncation_and_padding_of_the_file_are_ignored(make_folder: Callable[..., Path]) -> None:
    trained = small_tokenizer()
    trained.enable_truncation(4)
    trained.enable_padding(length=8)
    tokenizer = Tokenizer.load(make_folder(trained))
    assert [len(tokenizer.encode(text)) for text in ("abc", "abcdefgh" * 4)] == [3, 32]


@pytest.mark.parametrize(
    ("config", "ids"),
    [
        ({}, []),
        ({"add_bos_token": True}, [1]),
        ({"add_bos_token": True, "add_eos_token": True}, [1, 2]),
        ({"add_bos_token": True, "bos_token": None}, []),
    ],
)
def test_the_config_says_which_special_tokens_go_around_a_text(
    make_folder: Callable[..., Path], config: dict[str, Any], ids: list[int]
) -> None:
    tokenizer = Tokenizer.load(make_folder(**config))
    assert tokenizer.encode("") == ids
    assert tokenizer.encode("", add_special_tokens=False) == []


def test_without_a_word_in_the_config_the_files_own_special_tokens_stay(make_folder: Callable[..., Path]) -> None:
    trained = small_tokenizer()
    trained.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert Tokenizer.load(make_folder(trained)).encode("") == [1]


def test_tokens_that_only_the_config_knows_are_added(make_folder: Callable[..., Path]) -> None:
    added = {"259": {"content": "<|end|>", "special": True}, "260": {"content": "<think>", "special": False}}
    tokenizer = Tokenizer.load(make_folder(added_tokens_decoder=added, pad_token="<pad>"))
    assert tokenizer.encode("<|end|><think><pad>") == [259, 260, 261]
    assert tokenizer.decode([259, 260, 261]) == "<think>"


def test_the_config_can_make_a_token_special(make_folder: Callable[..., Path]) -> None:
    trained = small_tokenizer()
    trained.add_tokens([AddedToken("<|end|>", special=False)])
    tokenizer = Tokenizer.load(
        make_folder(trained, added_tokens_decoder={"259": {"content": "<|end|>", "special": True}})
    )
    assert 259 in tokenizer.special_ids
    assert tokenizer.decode([259]) == ""


def test_half_a_surrogate_pair_is_an_invalid_request(make_folder: Callable[..., Path]) -> None:
    with pytest.raises(InvalidRequest, match="surrogate pair at character 2"):
        Tokenizer.load(make_folder()).encode("ab\ud83d")


def test_unknown_ids_have_no_text_and_impossible_ones_are_refused(make_folder: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.load(make_folder())
    assert tokenizer.decode([10**6, *tokenizer.encode("ok")]) == "ok"
    for token_id in (-1, 1 << 40):
        with pytest.raises(InvalidRequest, match="between 0 and"):
            tokenizer.decode([token_id])


# ---- folders that cannot be used, or only through transformers ----


def test_a_broken_tokenizer_file_is_a_model_error(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a tokenizer"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"added_tokens_decoder": [1]}, r"tokenizer_config\.json is malformed: AttributeError"),
        ({"added_tokens_decoder": {"x": {}}}, r"tokenizer_config\.json is malformed: ValueError"),
        ({"added_tokens_decoder": {"1": {"content": 5}}}, r"tokenizer_config\.json is malformed: TypeError"),
        ({"chat_template": [{"name": "default"}]}, r"chat templates of .* malformed: KeyError: 'template'"),
    ],
)
def test_an_entry_of_the_tokenizers_config_that_makes_no_sense_is_told(
    entry: dict[str, Any], named: str, make_folder: Callable[..., Path]
) -> None:
    folder = make_folder(**entry)
    with pytest.raises(ModelError, match=named):
        Tokenizer.load(folder)


def test_a_null_in_the_tokenizers_config_is_no_entry(make_folder: Callable[..., Path]) -> None:
    assert Tokenizer.load(make_folder(added_tokens_decoder=None, chat_template=None)).chat_template is None


def test_a_chat_template_that_is_no_text_is_told(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"chat templates of .* malformed: UnicodeDecodeError"):
        Tokenizer.load(folder)


def test_a_folder_without_a_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_folder_without_tokenizer_json_goes_through_transformers(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "##s"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    tokenizer = Tokenizer.load(tmp_path)
    assert isinstance(tokenizer.backend, FastBackend)
    assert tokenizer.decode(tokenizer.encode("cats")) == "cats"


def test_a_tokenizer_written_in_python_streams_what_it_decodes() -> None:
    from transformers import PreTrainedTokenizer

    class Letters(PreTrainedTokenizer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)

        @property
        def vocab_size(self) -> int:
            return 128

        def get_vocab(self) -> dict[str, int]:
            return {chr(i): i for i in range(128)} | self.added_tokens_encoder

        def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int | None:
            return ord(token) if len(token) == 1 else None

        def _convert_id_to_token(self, index: int) -> str:
            return chr(index)

        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return "".join(tokens)

    tokenizer = Tokenizer(PythonBackend(Letters(eos_token="<end>")))
    ids = [*tokenizer.encode("good morning"), 128, 4000]
    assert tokenizer.decode(ids) == "good morning"
    for stop, text in ([], "good morning"), (["morn"], "good "):
        stream = tokenizer.text_stream(SamplingParams(stop=stop))
        assert "".join([stream.push([token_id]) for token_id in ids]) + stream.finish() == text
    assert tokenizer.special_ids == {128}
    assert (tokenizer.token_to_id("<end>"), tokenizer.token_to_id("nothing")) == (128, None)


# ---- chat templates ----


@pytest.fixture
def chat_tokenizer() -> Tokenizer:
    return Tokenizer(FastBackend(small_tokenizer()), {"bos_token": "<s>", "eos_token": "</s>"}, {"default": CHATML})


FOR = "{% for m in messages %}"
END = "{% endfor %}"
TEMPLATES = {
    "chatml": CHATML,
    "spaces": "{{ bos_token }}\n"
    + FOR
    + "\n  {% if m.content %}\n{{ m.content | trim }}\n  {% endif %}\n{%- endfor %}",
    "tojson": "{{ tools | tojson }}|{{ tools | tojson(indent=2) }}|{{ messages | tojson(ensure_ascii=True) }}",
    "generation": FOR + "{% generation %}{{ m.role }}{{ loop.index }}{% endgeneration %}" + END,
    "loop controls": FOR + "{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}{% break %}" + END,
    "missing keys": FOR + "{{ 'content' in m }}{{ m.name }}" + END + "{{ unk_token }}{{ documents is none }}",
    "namespace": "{% set ns = namespace(n=0) %}" + FOR + "{% set ns.n = ns.n + 1 %}" + END + "{{ ns.n }}",
    "year": "{{ strftime_now('%Y') }}",
    "variables": "{{ enable_thinking }}{{ bos_token }}{{ tools is none }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [TOOLS, None])
def test_a_chat_renders_as_transformers_renders_it(
    chat_tokenizer: Tokenizer, name: str, tools: list[dict[str, Any]] | None
) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer(), bos_token="<s>", eos_token="</s>")
    options: dict[str, Any] = {"chat_template": TEMPLATES[name], "tools": tools, "enable_thinking": False}
    expected = theirs.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True, **options)
    assert chat_tokenizer.render_chat(CONVERSATION, **options) == expected


@pytest.mark.parametrize("template", [CHATML, CHATML.replace("message.content", "message.content | trim")])
def test_a_continued_message_ends_the_prompt_as_in_transformers(chat_tokenizer: Tokenizer, template: str) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer())
    expected = theirs.apply_chat_template(
        CONVERSATION, tokenize=False, chat_template=template, continue_final_message=True
    )
    prompt = chat_tokenizer.render_chat(CONVERSATION, chat_template=template, continue_final_message=True)
    assert prompt == expected
    assert prompt.rstrip().endswith("The answer is")


def test_a_continued_message_may_be_in_parts(chat_tokenizer: Tokenizer) -> None:
    template = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"
    messages = [{"role": "assistant", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    prompt = chat_tokenizer.render_chat(messages, chat_template=template, continue_final_message=True)
    assert prompt == "[one][two"
    assert messages[0]["content"][1] == {"type": "text", "text": "two"}, "the caller's message is untouched"


@pytest.mark.parametrize("last", [{"role": "assistant"}, {"role": "assistant", "content": [{"type": "image"}]}])
def test_a_message_without_text_cannot_be_continued(chat_tokenizer: Tokenizer, last: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="no text to continue"):
        chat_tokenizer.render_chat([last], continue_final_message=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected"),
        ("{{ 1 + messages[0].content }}", "unsupported operand"),
        ("{{ messages[0].tool.name }}", "has no attribute"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_what_a_template_raises_is_an_invalid_request(chat_tokenizer: Tokenizer, template: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        chat_tokenizer.render_chat(CONVERSATION, chat_template=template)


@pytest.mark.parametrize("messages", [[], ["hello"]])
def test_messages_must_be_objects(chat_tokenizer: Tokenizer, messages: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match="messages must be objects"):
        chat_tokenizer.render_chat(messages)


def test_a_model_without_a_template_says_what_to_do(make_folder: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.load(make_folder())
    assert tokenizer.chat_template is None
    with pytest.raises(InvalidRequest, match=r"model has no chat template.*/v1/completions, or .*--chat-template"):
        tokenizer.render_chat(CONVERSATION)


# ---- where templates are found ----


def test_a_jinja_file_goes_before_the_config(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(chat_template="config")
    assert Tokenizer.load(folder).chat_template == "config"
    (folder / "chat_template.json").write_text('{"chat_template": "processor"}')
    assert Tokenizer.load(folder).chat_template == "processor"
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(folder).chat_template == "file"
    assert Tokenizer.load(folder, chat_template="given").chat_template == "given"


NAMED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]


def test_named_templates_are_chosen_by_name_or_by_the_presence_of_tools(make_folder: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.load(make_folder(chat_template=NAMED))
    assert tokenizer.chat_template == {"default": "plain", "tool_use": "with tools"}
    assert tokenizer.render_chat(CONVERSATION) == "plain"
    assert tokenizer.render_chat(CONVERSATION, tools=TOOLS) == "with tools"
    assert tokenizer.render_chat(CONVERSATION, chat_template="tool_use") == "with tools"


def test_additional_template_files_have_their_files_names(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("found")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.render_chat(CONVERSATION, chat_template="rag") == "found"
    with pytest.raises(InvalidRequest, match="no default chat template; choose one of: rag"):
        tokenizer.render_chat(CONVERSATION)


# ---- hostile templates and tokenizers ----

LONG = "range(100000)"


@pytest.mark.parametrize(
    "template",
    [
        "{%% for a in %(r)s %%}{%% for b in %(r)s %%}{%% endfor %%}{%% endfor %%}",
        "{%% for a in %(r)s %%}{%% for b in %(r)s if false %%}x{%% endfor %%}{%% endfor %%}",
        "{%% macro f(n) %%}{%% if n %%}{{ f(n - 1) }}{{ f(n - 1) }}{%% endif %%}{%% endmacro %%}{{ f(60) }}",
        "{%% for a in [1, 1] recursive %%}{{ loop([1, 1]) if loop.depth < 60 }}{%% endfor %%}",
    ],
)
def test_a_template_that_never_ends_is_ended(
    template: str, chat_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "MAX_RENDER_S", 0.05)
    with pytest.raises(InvalidRequest, match=r"does not come to an end within 0\.05 s"):
        chat_tokenizer.render_chat(CONVERSATION, chat_template=template % {"r": LONG})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'ab' * 1000000000 }}", "2000000000 characters"),
        ("{{ 1000000000 * ['ab'] }}", "1000000000 characters"),
        ("{{ 9 ** 99999999 }}", "exponent"),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "134217728 characters",
        ),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "134217728 characters",
        ),
        ("{% set x = 'ab' * 1000000 %}{% for i in range(99999) %}{{ x }}{% endfor %}", "68000000 characters"),
    ],
)
def test_a_template_that_fills_the_memory_is_ended(template: str, message: str, chat_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=message):
        chat_tokenizer.render_chat(CONVERSATION, chat_template=template)


def test_limits_change_nothing_of_what_a_template_makes(chat_tokenizer: Tokenizer) -> None:
    template = (
        "{% macro shown(m) %}{{ m.role ~ ':' ~ 1 ~ none }}{% endmacro %}"
        "{% for m in messages if m.role != 'system' %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}"
        "{{ shown(m) }}{{ [1] + [2] }}{{ 'ab' * 2 + 'c' }}{{ 2 ** 3 * 2 }} {% endfor %}"
    )
    made = chat_tokenizer.render_chat(
        [{"role": role, "content": ""} for role in ("system", "user")], chat_template=template
    )
    assert made == "1/1Trueuser:1None[1, 2]ababc16 "


@pytest.mark.parametrize(
    ("template", "message"),
    [("a\n{% if x %}", "line 2"), ("{{ x }", "line 1"), ("{% for i in x %}" * 30 + "{% endfor %}" * 30, "nested")],
)
def test_what_does_not_parse_is_told_by_its_line(template: str, message: str, chat_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=message):
        chat_tokenizer.check_chat_template(template)


def replacing(replaced: str, times: int) -> tokenizers.Tokenizer:
    """Make a tokenizer that doubles a text `times` times before it reads it."""
    tokenizer = small_tokenizer()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(replaced, replaced * 2)] * times)
    return tokenizer


def backtracking() -> tokenizers.Tokenizer:
    """Make a tokenizer whose pattern has exponentially many ways to match."""
    tokenizer = small_tokenizer()
    cut = pre_tokenizers.Split(Regex("(a|aa)+b"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


def test_a_tokenizer_that_makes_a_flood_of_a_text_is_a_model_error(make_folder: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="makes 96000 tokens of 1500 characters"):
        Tokenizer.load(make_folder(replacing("a", 6)))


def test_a_tokenizer_whose_pattern_backtracks_for_ever_is_a_model_error(make_folder: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="cannot be used"):
        Tokenizer.load(make_folder(backtracking()))


def test_a_tokenizer_that_does_not_come_back_is_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MAX_PROBE_S", 0.05)
    never = threading.Event()
    with pytest.raises(ModelError, match=r"takes more than 0\.05 s"):
        probe.check_tokenizer(lambda text: [never.wait()], "it")
    never.set()


def test_a_text_on_which_the_library_panics_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="cannot read this text"):
        FastBackend(backtracking()).encode("a" * 100, False)


@pytest.mark.parametrize("name", ["config", "tokenizer"])
def test_json_nested_without_end_is_a_model_error(name: str, make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    (folder / {"config": "tokenizer_config.json", "tokenizer": "tokenizer.json"}[name]).write_text("[" * 100_000)
    with pytest.raises(ModelError):
        Tokenizer.load(folder)


# ---- long texts ----


def trained_tokenizer(pattern: str | None = None, missing: str = "") -> tokenizers.Tokenizer:
    """Make a byte-level BPE tokenizer that has merged words and the spaces and line ends around them.

    missing: characters of its alphabet that have no token, as SmolLM lacks bytes that no text has.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    cuts: list[Any] = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", "<|x|>"],
        initial_alphabet=sorted({*pre_tokenizers.ByteLevel.alphabet()} - {*missing}),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS_OF_ALL_KINDS * 3], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return tokenizer


WORDS_OF_ALL_KINDS = (
    "The quick fox isn't  here.\nIt'll be\n\n back  soon (or\tnot)! 1234 567\r\n日本語 テキスト。\n한국어 한 글자 "
    "Grüße an alle e\u0301t e\u0301 x=1;\n    if y:\n\treturn <|x|> z\n<|x|>\nQ "
)
LOST = "\u00f0\u00f1\u00c0\u0104"  # the bytes F0, F1, C0 and 04 in the alphabet: emojis have the first
TEKKEN = gguf_words.TEKKEN


@pytest.mark.parametrize("pattern", [None, LLAMA_3, QWEN_2, TEKKEN])
@pytest.mark.parametrize("piece_chars", [1, 7, 50])
@pytest.mark.parametrize("missing", ["", LOST])
def test_a_long_text_has_the_tokens_that_it_has_in_one_piece(
    pattern: str | None, piece_chars: int, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_text, "PIECE_CHARS", piece_chars)
    monkeypatch.setattr(long_text, "LOOK_BACK_CHARS", piece_chars)
    tokenizer = trained_tokenizer(pattern, missing)
    texts = long_text.LongTexts(tokenizer)
    text = WORDS_OF_ALL_KINDS * 4
    assert len(list(long_text.pieces(text))) > 10
    assert texts._is_cuttable
    for adds in (True, False):
        assert texts.encode(text, adds, None) == tokenizer.encode(text, add_special_tokens=adds).ids


def test_a_tokenizer_that_reads_across_words_gets_a_long_text_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "PIECE_CHARS", 20)
    for tokenizer in (trained_tokenizer(r"(?:\s?\p{L}+){2}"), trained_tokenizer("the end")):
        text = WORDS_OF_ALL_KINDS * 4
        assert long_text.LongTexts(tokenizer).encode(text, True, None) == tokenizer.encode(text).ids


@pytest.mark.parametrize("missing", ["", LOST])
def test_a_text_that_can_never_fit_is_refused_by_its_characters_before_it_is_tokenized(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(FastBackend(trained_tokenizer(missing=missing)))
    longest = max(map(len, tokenizer.backend._tokenizer.get_vocab()))  # type: ignore[attr-defined]
    monkeypatch.setattr(long_text.LongTexts, "_encode", lambda *args: pytest.fail("tokenized"))
    text = "a" * (long_text.PIECE_CHARS + 1)
    with pytest.raises(PromptTooLong, match=f"{len(text)} characters.* 100 tokens of at most {longest}"):
        tokenizer.encode(text, context_length=100)


def test_characters_that_leave_no_token_do_not_count_against_the_context() -> None:
    tokenizer = Tokenizer(FastBackend(trained_tokenizer(missing=LOST)))
    text = "\x04" * (long_text.PIECE_CHARS * 9) + " one two"
    assert tokenizer.encode(text, False, context_length=100) == tokenizer.encode(" one two", False)


@pytest.mark.parametrize("context_length", [None, 10, 1 << 15])
def test_a_text_of_millions_of_characters_without_a_place_to_cut_is_refused(
    context_length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be tokenized in one go, which takes gigabytes. With places to cut it is read."""
    monkeypatch.setattr(long_text, "MAX_UNCUT_CHARS", 1 << 17)
    limit = max(1 << 17, long_text.UNCUT_CHARS_A_TOKEN * (context_length or 0))
    tokenizer = Tokenizer(FastBackend(trained_tokenizer()))
    with pytest.raises((InvalidRequest, PromptTooLong), match=f"{limit + 1} characters"):
        tokenizer.encode("x" * (limit + 1), False, context_length=context_length)
    assert len(tokenizer.encode("one two " * (limit // 7), False)) > limit // 7


def test_counting_the_tokens_of_a_text_ends_where_it_cannot_fit_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = 0

    def encode(texts: long_text.LongTexts, text: str, add_special_tokens: bool) -> list[int]:
        nonlocal counted
        counted += len(text)
        return [0] * (len(text) // 2)

    tokenizer = Tokenizer(FastBackend(trained_tokenizer()))
    context_length = 2 * long_text.PIECE_CHARS
    text = "word " * (1 << 18)
    monkeypatch.setattr(long_text.LongTexts, "_encode", encode)
    with pytest.raises(PromptTooLong, match=f"more than {4 * context_length} tokens, the context is {context_length}"):
        tokenizer.encode(text, False, context_length=context_length)
    assert counted < len(text) * 0.9
    assert len(tokenizer.encode(text, False)) == len(text) // 2


def test_a_text_that_need_not_fit_a_context_has_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 MB of words were tokenized for 13 s, and their ids written in one go."""
    counted = 0

    def encode(texts: long_text.LongTexts, text: str, add_special_tokens: bool) -> list[int]:
        nonlocal counted
        counted += len(text)
        return [0] * (len(text) // 2)

    tokenizer = Tokenizer(FastBackend(trained_tokenizer()))
    monkeypatch.setattr(long_text, "MAX_TOKENS", long_text.PIECE_CHARS)
    monkeypatch.setattr(long_text.LongTexts, "_encode", encode)
    text = "word " * long_text.PIECE_CHARS
    with pytest.raises(InvalidRequest, match=f"more than {long_text.PIECE_CHARS} tokens"):
        tokenizer.encode(text, False)
    assert counted < len(text) * 0.7
    assert len(tokenizer.encode("word " * (long_text.PIECE_CHARS // 5), False)) <= long_text.PIECE_CHARS


def test_a_prompt_somewhat_too_long_is_counted_to_its_end() -> None:
    tokenizer = Tokenizer(FastBackend(trained_tokenizer()))
    text = WORDS_OF_ALL_KINDS * (long_text.PIECE_CHARS // len(WORDS_OF_ALL_KINDS) + 1)
    num_tokens = len(tokenizer.encode(text))
    assert len(tokenizer.encode(text, context_length=num_tokens // 3)) == num_tokens
