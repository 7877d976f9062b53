"""Tokenizers without a tokenizer.json: what is built from vocabulary files is what the libraries make of them."""

import base64
import io
import json
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken

from engine.errors import InvalidRequest, ModelError
from engine.model_config import turn_ends
from engine.model_files import with_tokenizers_ends
from engine.models.registry import load_config
from engine.request import SamplingParams
from engine.text.rank_file import KIMI, LLAMA_3, QWEN_2
from engine.text.tokenizer import FastBackend, Tokenizer
from tests.conftest import CORPUS

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Grüße aus Köln, naïve café, 日本語のテキスト, 你好世界, Привет, мир! 🙂🚀",
    "def add(a, b):\n    return a + b\n\n\n\tprint(add(1, 2))  # 3",
    " leading,  two   three    spaces and trailing ",
    "\n\n\r\n\t\x00 x",
    "1234567890 3.14 ½ ² ①",
    "e\u0301 é ﬁ Å \u212b \u200b\u00a0x",
    "👩‍👩‍👧 \U0001f3f4\U000e0067 ᾳ ß ẞ İ",
    "▁already▁there ▁",
    "it's He'll WE'VE philosophy sop eop don't",
    "   ",
    "",
    "a",
)
SYMBOLS = ["<reserved_106>", "<reserved_107>", "▁▁▁", "1234"]


SETTINGS: dict[str, Any] = {  # Llama's, but for the sizes
    "vocab_size": 420,
    "model_type": "bpe",
    "byte_fallback": True,
    "character_coverage": 0.99,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "hard_vocab_limit": False,
    "minloglevel": 2,
    "num_threads": 1,
}


@pytest.fixture(scope="module")
def train() -> Callable[..., bytes]:
    """Return `train(**options)`: a tiny sentencepiece model, trained once for the same options."""
    trained: dict[str, bytes] = {}

    def make(**options: Any) -> bytes:
        key = repr(options)
        if key not in trained:
            written = io.BytesIO()
            options = SETTINGS | options | {"sentence_iterator": iter(CORPUS * 8), "model_writer": written}
            sentencepiece.SentencePieceTrainer.train(**options)
            trained[key] = written.getvalue()
        return trained[key]

    return make


def write(folder: Path, model: bytes, **config: Any) -> Path:
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.text_stream(SamplingParams())
    return "".join(stream.push([token_id]) for token_id in ids) + stream.finish()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="bpe, as llama's"),
        pytest.param({"add_dummy_prefix": False}, id="bpe without a first space"),
        pytest.param({"byte_fallback": False}, id="bpe with unknown characters"),
        pytest.param({"user_defined_symbols": SYMBOLS}, id="bpe with symbols"),
        pytest.param({"split_digits": True, "allow_whitespace_only_pieces": True}, id="bpe with digits and spaces"),
        pytest.param({"remove_extra_whitespaces": True}, id="bpe that squeezes spaces"),
        pytest.param({"model_type": "unigram"}, id="unigram"),
        pytest.param({"model_type": "unigram", "user_defined_symbols": SYMBOLS}, id="unigram with symbols"),
        pytest.param(
            {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
            id="unigram, normalized",
        ),
    ],
)
def test_a_sentencepiece_model_encodes_and_decodes_as_its_library(
    options: dict[str, Any], train: Callable[..., bytes], tmp_path: Path
) -> None:
    model = train(**options)
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer.load(write(tmp_path, model, tokenizer_class="LlamaTokenizer"))
    assert isinstance(tokenizer.backend, FastBackend)
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (library.vocab_size(), 1, 2)
    for text in TEXTS:
        ids = library.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.encode(text) == [1, *ids]
        if library.unk_id() not in ids:
            assert tokenizer.decode(ids) == streamed(tokenizer, ids) == library.decode(ids)


@pytest.mark.parametrize(
    ("pattern", "tokenizer_class"),
    [(QWEN_2, "QWenTokenizer"), (LLAMA_3, "ChatGLM4Tokenizer"), (KIMI, "TikTokenTokenizer")],
)
def test_a_rank_file_encodes_and_decodes_as_tiktoken(pattern: str, tokenizer_class: str, tmp_path: Path) -> None:
    ranks = trained_ranks()
    library = tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    tokenizer = Tokenizer.load(write_ranks(tmp_path / "m", ranks, tokenizer_class))
    for text in TEXTS:
        ids = library.encode(unicodedata.normalize("NFC", text) if tokenizer_class == "QWenTokenizer" else text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.decode(ids) == streamed(tokenizer, ids) == library.decode(ids)
    random = [(i * 7919) % len(ranks) for i in range(200)]
    assert tokenizer.decode(random) == streamed(tokenizer, random) == library.decode(random)


def trained_ranks() -> dict[bytes, int]:
    """Train tiktoken's kind of BPE on `CORPUS`: all bytes, then 150 joins of the pair that is most frequent."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [
        [bytes([byte]) for byte in word.encode()] for text in CORPUS for word in text.replace(" ", "\0 ").split("\0")
    ]
    while len(ranks) < 406:
        counts: dict[bytes, int] = {}
        for word in words:
            for left, right in pairwise(word):
                counts[left + right] = counts.get(left + right, 0) + 1
        joined = max(sorted(counts), key=lambda pair: counts[pair])
        ranks.setdefault(joined, len(ranks))
        for word in words:
            at = 0
            while at + 1 < len(word):
                if word[at] + word[at + 1] == joined:
                    word[at : at + 2] = [joined]
                at += 1
    return ranks


def write_ranks(folder: Path, ranks: dict[bytes, int], tokenizer_class: str) -> Path:
    folder.mkdir()
    lines = [b"%s %d" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    names = {"QWenTokenizer": "qwen.tiktoken", "TikTokenTokenizer": "tiktoken.model"}
    name = names.get(tokenizer_class, "tokenizer.model")
    (folder / name).write_bytes(b"\n".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    return folder


# ---- what a family's own code adds ----


def test_chatglm_3_has_its_masks_and_roles_behind_the_vocabulary(train: Callable[..., bytes], tmp_path: Path) -> None:
    model = train()
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = library.vocab_size()
    # A later revision of the hub's file names some of them, and sop without brackets.
    named = {str(size + 1): {"content": "[gMASK]"}, str(size + 3): {"content": "sop"}}
    tokenizer = Tokenizer.load(
        write(tmp_path, model, tokenizer_class="ChatGLMTokenizer", auto_map={}, added_tokens_decoder=named)
    )
    gmask, sop, user, assistant = size + 1, size + 3, size + 6, size + 7
    assert tokenizer.encode("philosophy") == [gmask, sop, *library.encode("philosophy")]
    chat = [{"role": "user", "content": "Hi there"}]
    newline, text = library.encode("\n"), library.encode("Hi there")
    rendered = tokenizer.render_chat(chat)
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    assert ids == [gmask, sop, user, *newline, *text, assistant]
    assert tokenizer.decode([user, *text]) == "Hi there"
    assert tokenizer.eos_token_id == library.eos_id()
    assert "sentencepiece model (BPE); the chat template is ours" in tokenizer.origin


def test_chatglm_2_asks_in_rounds(train: Callable[..., bytes], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "THUDM/chatglm2-6b"}))
    tokenizer = Tokenizer.load(write(tmp_path, train(), tokenizer_class="ChatGLMTokenizer"))
    chat = [{"role": role, "content": content} for role, content in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    assert tokenizer.render_chat(chat) == "[gMASK]<sop>[Round 1]\n\n问：a\n\n答：b\n\n[Round 2]\n\n问：c\n\n答："
    with pytest.raises(InvalidRequest, match="ChatGLM 2 has no system messages"):
        tokenizer.render_chat([{"role": "system", "content": "x"}])


def test_an_answer_of_glm_ends_where_the_next_role_begins() -> None:
    assert turn_ends({"<|user|>", "<|observation|>", "<|assistant|>"}) == ["<|user|>", "<|observation|>"]
    assert turn_ends({"<|user|>", "<|assistant|>", "<|end|>"}) == ["<|end|>"]


def test_glm_4_has_its_tokens_behind_the_ranks(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_ranks(tmp_path / "m", trained_ranks(), "ChatGLM4Tokenizer"))
    names = [
        "<|endoftext|>",
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "<sop>",
        "<eop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
    ]
    assert [tokenizer.token_to_id(name) for name in names] == list(range(406, 415))
    assert tokenizer.encode("")[:2] == [408, 410] and tokenizer.eos_token_id == 406
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == "[gMASK]<sop><|user|>\nHi<|assistant|>"


def test_qwen_1_speaks_chatml_unless_it_is_a_base_model(tmp_path: Path) -> None:
    folder = write_ranks(tmp_path / "m", trained_ranks(), "QWenTokenizer")
    tokenizer = Tokenizer.load(folder)
    chat = [{"role": "user", "content": "Hi"}]
    turns = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render_chat(chat) == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + turns)
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert tokenizer.render_chat([{"role": "system", "content": "Be brief."}, *chat]) == system + turns
    assert tokenizer.encode("<|im_start|>")[0] == tokenizer.token_to_id("<|im_start|>") == 407
    assert (tokenizer.eos_token_id, tokenizer.token_to_id("<|extra_204|>"), tokenizer.vocab_size) == (406, 613, 614)
    (folder / "generation_config.json").write_text('{"chat_format": "raw"}')
    assert Tokenizer.load(folder).chat_template is None


def test_internlm_2_names_pieces_of_its_vocabulary_anew(train: Callable[..., bytes], tmp_path: Path) -> None:
    model = train(user_defined_symbols=["[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_2]"])
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    start, end = (library.piece_to_id(f"[UNUSED_TOKEN_{number}]") for number in (1, 2))
    added = {str(start): {"content": "<|im_start|>"}, str(end): {"content": "<|im_end|>"}}
    tokenizer = Tokenizer.load(write(tmp_path, model, tokenizer_class="InternLM2Tokenizer", added_tokens_decoder=added))
    assert tokenizer.token_to_id("<|im_start|>") == start and tokenizer.vocab_size == library.vocab_size()
    rendered = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert rendered == "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    assert ids[:2] == [1, start] and ids[2:].count(end) == 1
    assert tokenizer.decode(ids[2:], skip_special_tokens=False).startswith("user\nHi<|im_end|>")


def test_baichuan_chats_with_the_tokens_that_its_generation_config_names(
    train: Callable[..., bytes], tmp_path: Path
) -> None:
    model = train(user_defined_symbols=["<reserved_106>", "<reserved_107>"])
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = [library.piece_to_id(f"<reserved_{number}>") for number in (106, 107)]
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"user_token_id": ids[0], "assistant_token_id": ids[1]})
    )
    tokenizer = Tokenizer.load(write(tmp_path, model, tokenizer_class="BaichuanTokenizer", add_bos_token=False))
    chat = [{"role": role, "content": text} for role, text in (("system", "S"), ("user", "a"), ("assistant", "b"))]
    rendered = tokenizer.render_chat([*chat, {"role": "user", "content": "c"}])
    assert rendered == "S<reserved_106>a<reserved_107>b<reserved_106>c<reserved_107>"
    wanted = [
        part for text, role in zip("Sabc", (0, 1, 0, 1), strict=True) for part in (*library.encode(text), ids[role])
    ]
    assert tokenizer.encode(rendered) == wanted


def test_a_llama_takes_names_from_beside_the_file(train: Callable[..., bytes], tmp_path: Path) -> None:
    model = train()
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size + 1, "<think>": size + 2}))
    (tmp_path / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<|im_end|>"]}')
    tokenizer = Tokenizer.load(write(tmp_path, model, add_bos_token=True, add_eos_token=True))
    assert tokenizer.encode("<|im_end|>") == [1, size + 1, 2]
    assert tokenizer.decode([size + 1, size + 2]) == "<think>"  # which is not special
    assert tokenizer.vocab_size == size + 3  # the id between has a name that no text has
    first_only = Tokenizer.load(write(tmp_path, model, legacy=False))
    assert first_only.decode(first_only.encode("<s>a b<s>c"), skip_special_tokens=False) == "<s><s>a b<s>c"
    assert tokenizer.decode(tokenizer.encode("<s>a b<s>c"), skip_special_tokens=False) == "<s><s> a b<s> c</s>"


def test_ends_of_a_family_reach_the_engine(train: Callable[..., bytes], tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = sizes | {"architectures": ["LlamaForCausalLM"], "vocab_size": 1000, "max_position_embeddings": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(write(tmp_path, train(), tokenizer_class="ChatGLMTokenizer"))
    ends = [tokenizer.token_to_id(text) for text in ("</s>", "<|user|>", "<|observation|>")]
    assert list(with_tokenizers_ends(load_config(tmp_path), tokenizer).eos_token_ids) == ends


# ---- what cannot be read ----


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no sentencepiece model: it has no pieces"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is no sentencepiece model: ValueError"),
        (b"\x0a\x7f", "is no sentencepiece model: ValueError: a field of 127 bytes"),
        (b"IQ== 0\nIg== x\n", "how its model cuts text is not known"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_that_names_it_and_what_would_do(
    data: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message) as error:
        Tokenizer.load(write(tmp_path, data))
    assert str(tmp_path / "tokenizer.model") in str(error.value) and "--tokenizer-path" in str(error.value)


@pytest.mark.parametrize("model_type", ["word", "char"])
def test_models_of_words_and_characters_are_refused(
    model_type: str, train: Callable[..., bytes], tmp_path: Path
) -> None:
    model = train(model_type=model_type, byte_fallback=False, use_all_vocab=True)
    with pytest.raises(ModelError, match=r"only unigram .* and BPE"):
        Tokenizer.load(write(tmp_path, model))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("IQ== 0\n?? 1\n", "line 2 is no token with its rank"),
        ("IQ== 0\nIg== 2\n", "the ranks of its 2 tokens are not 0 to 1"),
        ("IQ== 0\nIg== 1\n", "254 of the 256 bytes are no tokens, the first is 0"),
    ],
)
def test_a_broken_rank_file_is_told_by_its_line(lines: str, message: str, tmp_path: Path) -> None:
    folder = write_ranks(tmp_path / "m", trained_ranks(), "QWenTokenizer")
    (folder / "qwen.tiktoken").write_text(lines)
    with pytest.raises(ModelError, match=message):
        Tokenizer.load(folder)


def test_an_added_token_that_has_no_place_is_told(train: Callable[..., bytes], tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<s>": 500}))
    with pytest.raises(ModelError, match="leaves no place for '<s>' at 500: it is at 1"):
        Tokenizer.load(write(tmp_path, train()))
