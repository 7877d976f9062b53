"""Test streams against decoding all ids at once, for every kind of decoder, and stops against a whole-text search."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, cast

import pytest
import regex  # type: ignore[import-untyped]
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from engine.errors import InvalidRequest
from engine.request import SamplingParams
from engine.text import stops
from engine.text.detokenizer import BYTE_OF_CHAR, WindowDecoder
from engine.text.stops import REGEX_WINDOW, StopScanner
from engine.text.tokenizer import FastBackend, Tokenizer

CORPUS = ("the cat sat on the mat", "Grüße, 日本語のテキスト 日本 你好世界 🙂🚀🙂", "  x = 1\n\n  y = 22", "naïve café")
MARK = "▁"
NUM_UNKNOWN = 3  # ids past the vocabulary, as padded embeddings can sample them


def with_added(tokenizer: tokenizers.Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False), AddedToken("ünï", normalized=False)])
    return Tokenizer(FastBackend(tokenizer))


def byte_level() -> Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return with_added(tokenizer)


def byte_fallback(decoder: decoders.Decoder | None) -> Tokenizer:
    """Make a tokenizer like SentencePiece's: marks for spaces, byte tokens for characters that the vocabulary lacks."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [
        MARK,
        MARK * 2,
        "a",
        "t",
        "h",
        "e",
        "日",
        "�",
        "th",
        "the",
        "▁t",
        "▁th",
        "▁the",
        "▁▁a",
        "\n",
        "<0xZZ>",
        "<0xe4>",
    ]
    vocab = {token: i for i, token in enumerate(["<unk>", *byte_tokens, *words])}
    merges = [("t", "h"), ("th", "e"), (MARK, "t"), ("▁t", "h"), ("▁th", "e")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if decoder is not None:
        tokenizer.decoder = decoder
    return with_added(tokenizer)


def word_piece() -> Tokenizer:
    words = ["[UNK]", "the", "cat", "##s", "##ing", ".", ",", "'", "##'", "do", "not", "n't", "日"]
    model = models.WordPiece(vocab={token: i for i, token in enumerate(words)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = decoders.WordPiece()
    return with_added(tokenizer)


def bpe_suffix() -> Tokenizer:
    """Build a tokenizer in the first GPT's way: words end with a mark."""
    vocab = {token: i for i, token in enumerate(["<unk>", "t", "h", "e", "t</w>", "e</w>", "日</w>", "th", "the</w>"])}
    merges = [("t", "h"), ("th", "e</w>")]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", end_of_word_suffix="</w>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder()
    return with_added(tokenizer)


TO_SPACE = decoders.Replace(MARK, " ")
MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "llama": lambda: byte_fallback(
        decoders.Sequence([TO_SPACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    ),
    "gemma": lambda: byte_fallback(decoders.Sequence([TO_SPACE, decoders.ByteFallback(), decoders.Fuse()])),
    "metaspace": lambda: byte_fallback(decoders.Metaspace()),
    "metaspace never": lambda: byte_fallback(decoders.Metaspace(prepend_scheme="never")),
    "metaspace, bytes": lambda: byte_fallback(decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])),
    "bytes, metaspace": lambda: byte_fallback(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "word piece": word_piece,
    "bpe suffix": bpe_suffix,
    "no decoder": lambda: byte_fallback(None),
}
make = cache(lambda kind: MAKERS[kind]())
a_few = settings(max_examples=30, deadline=None)
kinds = pytest.mark.parametrize("kind", MAKERS)
TABLE_KINDS = [kind for kind in MAKERS if kind not in ("word piece", "bpe suffix", "no decoder")]


@st.composite
def token_ids(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    """Generate any ids, with stretches of real text between them so that whole characters occur."""
    texts = st.sampled_from((*CORPUS, "🙂", "日本", " the", MARK)).map(lambda text: tokenizer.encode(text))
    ids = st.lists(st.integers(0, tokenizer.vocab_size + NUM_UNKNOWN - 1), max_size=6)
    return [token_id for part in draw(st.lists(texts | ids, max_size=5)) for token_id in part]


@st.composite
def cut_up(draw: st.DrawFn, items: list[Any] | str) -> list[Any]:
    """Cut `items` into parts, some of them empty."""
    cuts = sorted(draw(st.lists(st.integers(0, len(items)), max_size=len(items) + 2)))
    return [items[start:end] for start, end in zip([0, *cuts], [*cuts, len(items)], strict=True)]


def id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the byte-level tokens of one byte each."""
    char_of_byte = {byte: char for char, byte in BYTE_OF_CHAR.items()}
    return [id_of(tokenizer, char_of_byte[byte]) for byte in text.encode()]


def streamed(tokenizer: Tokenizer, parts: Iterable[list[int]], prompt_ids: Iterable[int] = (), **params: Any) -> str:
    stream = tokenizer.text_stream(SamplingParams(**params), list(prompt_ids))
    return "".join([stream.push(part) for part in parts]) + stream.finish()


@kinds
@a_few
@given(data=st.data())
def test_pushes_add_up_to_decoding_all_ids_at_once(kind: str, data: st.DataObject) -> None:
    tokenizer = make(kind)
    ids = data.draw(token_ids(tokenizer))
    is_skipping = data.draw(st.booleans())
    parts = data.draw(cut_up(ids) | st.just([[token_id] for token_id in ids]))
    assert streamed(tokenizer, parts, skip_special_tokens=is_skipping) == tokenizer.decode(ids, is_skipping)


@kinds
@a_few
@given(data=st.data())
def test_a_stream_goes_on_where_its_prompt_ends(kind: str, data: st.DataObject) -> None:
    tokenizer = make(kind)
    ids = data.draw(token_ids(tokenizer))
    prompt_ids = data.draw(st.sampled_from(["", "the", "the ", "<s>", "<s>the"]).map(tokenizer.encode))
    is_skipping = data.draw(st.booleans())
    text = streamed(tokenizer, [[token_id] for token_id in ids], prompt_ids, skip_special_tokens=is_skipping)
    whole, prompt = tokenizer.decode(prompt_ids + ids, is_skipping), tokenizer.decode(prompt_ids, is_skipping)
    assert prompt + text == whole


def test_the_space_before_the_first_word_is_kept_after_a_prompt_only() -> None:
    tokenizer = make("llama")
    word = [[id_of(tokenizer, "▁the")]]
    assert streamed(tokenizer, word) == "the"
    assert streamed(tokenizer, word, tokenizer.encode("<s>")) == "the"
    assert streamed(tokenizer, word, tokenizer.encode("<s>the")) == " the"


def test_common_decoders_read_a_table_and_only_the_others_decode_again() -> None:
    def is_table(kind: str) -> bool:
        return not isinstance(make(kind).text_stream(SamplingParams()), WindowDecoder)

    assert [kind for kind in MAKERS if is_table(kind)] == TABLE_KINDS


def test_a_character_is_released_with_its_last_byte() -> None:
    tokenizer = make("byte level")
    stream = tokenizer.text_stream(SamplingParams())
    assert [stream.push((token_id,)) for token_id in byte_ids(tokenizer, "🚀")] == ["", "", "", "🚀"]


def test_bytes_that_cannot_become_a_character_are_replaced_at_once() -> None:
    tokenizer = make("byte level")
    start, letter = byte_ids(tokenizer, "🚀")[0], id_of(tokenizer, "a")
    stream = tokenizer.text_stream(SamplingParams())
    assert [stream.push([start]), stream.push([start]), stream.push([letter])] == ["", "\ufffd", "\ufffda"]


def test_half_a_character_at_the_end_becomes_one_replacement() -> None:
    tokenizer = make("byte level")
    assert streamed(tokenizer, [tokenizer.encode("ok"), byte_ids(tokenizer, "🚀")[:3]]) == "ok\ufffd"


def test_a_skipped_special_token_does_not_split_a_character() -> None:
    tokenizer = make("byte level")
    first, *rest = byte_ids(tokenizer, "🚀")
    end = id_of(tokenizer, "</s>")
    assert streamed(tokenizer, [[first], [end], rest]) == "🚀"
    assert streamed(tokenizer, [[first], [end], rest], skip_special_tokens=False).startswith("\ufffd</s>")


# ---- token texts ----


@pytest.mark.parametrize("kind", TABLE_KINDS)
def test_a_tokens_bytes_are_those_it_adds_to_a_text(kind: str) -> None:
    tokenizer = make(kind)
    ids = tokenizer.encode("a the 日 🚀")
    data = b"".join(tokenizer.token_bytes(token_id) for token_id in ids)
    assert data.decode().strip() == tokenizer.decode(ids).strip()


def test_a_tokens_text_keeps_its_space_and_shows_half_characters_as_replacements() -> None:
    llama, gpt = make("llama"), make("byte level")
    assert llama.token_text(id_of(llama, "▁the")) == " the"
    assert llama.token_text(id_of(llama, "<0xE4>")) == "\ufffd"
    start = byte_ids(gpt, "🚀")[0]
    assert (gpt.token_text(start), gpt.token_bytes(start)) == ("\ufffd", b"\xf0")
    assert gpt.token_text(id_of(gpt, "<|im_end|>")) == "<|im_end|>"
    assert gpt.token_text(10**6) == ""


# ---- stop strings ----


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Return (end, stop) of the stop that ends first, the longest of several, by looking everywhere."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


def num_may_become(text: str, stops: list[str]) -> int:
    tails = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(tails, default=0)


letters = st.text("abc", min_size=1, max_size=5)


@a_few
@given(data=st.data(), text=st.text("abc ", max_size=40), stops=st.lists(letters, min_size=1, max_size=4), is_kept=...)
def test_the_first_stop_ends_the_text_wherever_it_is_cut_up(
    data: st.DataObject, text: str, stops: list[str], is_kept: bool
) -> None:
    scanner = StopScanner(stops, [], is_kept)
    released = read = ""
    for part in data.draw(cut_up(text)):
        released += scanner.push(part)
        read += part
        if scanner.matched_stop is not None:
            break
        assert released == read[: len(read) - num_may_become(read, stops)], "all that cannot become a stop is out"
    released += scanner.finish()
    found = first_stop(text, stops)
    assert scanner.matched_stop == (found and found[1])
    end, stop = found or (len(text), "")
    assert released == text[: end if is_kept else end - len(stop)]


@kinds
@a_few
@given(data=st.data())
def test_a_stop_string_never_leaks_whatever_the_tokens(kind: str, data: st.DataObject) -> None:
    tokenizer = make(kind)
    ids = data.draw(token_ids(tokenizer))
    whole = tokenizer.decode(ids)
    places = st.tuples(st.integers(0, max(len(whole) - 1, 0)), st.integers(1, 8))
    stops = [whole[start : start + size] for start, size in data.draw(st.lists(places, min_size=1, max_size=3))]
    stops = [stop for stop in stops if stop] or ["the"]
    stream = tokenizer.text_stream(SamplingParams(stop=stops))
    text = "".join([stream.push(part) for part in data.draw(cut_up(ids))]) + stream.finish()
    found = first_stop(whole, stops)
    assert stream.matched_stop == (found and found[1])
    assert text == (whole[: found[0] - len(found[1])] if found else whole)


def test_nothing_comes_after_a_stop() -> None:
    tokenizer = make("byte level")
    stream = tokenizer.text_stream(SamplingParams(stop=["cat"]))
    texts = [stream.push(tokenizer.encode(text)) for text in ("the c", "at sat", "on the mat")]
    assert [*texts, stream.finish()] == ["the ", "", "", ""]
    assert stream.matched_stop == "cat"


def test_no_stop_trim_keeps_the_stop_and_cuts_behind_it() -> None:
    tokenizer = make("byte level")
    stream = tokenizer.text_stream(SamplingParams(stop=["cat"], no_stop_trim=True))
    assert stream.push(tokenizer.encode("the cat sat")) + stream.finish() == "the cat"


def test_a_stop_string_that_a_long_run_of_near_matches_precedes_is_found() -> None:
    scanner = StopScanner(["a" * 50 + "b"], [], False)
    assert "".join([*map(scanner.push, "a" * 999), scanner.push("b"), scanner.finish()]) == "a" * 949


@pytest.mark.parametrize("is_skipping", [True, False])
def test_a_stop_string_that_is_a_special_token_stops_though_its_text_is_skipped(is_skipping: bool) -> None:
    tokenizer = make("byte level")
    stream = tokenizer.text_stream(SamplingParams(stop=["!", "<|im_end|>"], skip_special_tokens=is_skipping))
    ids = [*tokenizer.encode("the cat"), id_of(tokenizer, "<|im_end|>"), *tokenizer.encode("sat")]
    assert stream.push(ids) + stream.finish() == "the cat"
    assert stream.matched_stop == "<|im_end|>"


def test_what_is_held_back_comes_out_at_the_end() -> None:
    scanner = StopScanner(["Observation:"], [], False)
    assert [scanner.push("see Obs"), scanner.finish()] == ["see ", "Obs"]
    assert scanner.matched_stop is None


# ---- stop regexes ----


@a_few
@given(data=st.data(), text=st.text("ab1- ", max_size=30))
def test_a_regex_stop_of_fixed_length_is_cut_wherever_the_text_is_cut_up(data: st.DataObject, text: str) -> None:
    scanner = StopScanner([], [r"\d-[ab]"], False)
    released = "".join([scanner.push(part) for part in data.draw(cut_up(text)) if scanner.matched_stop is None])
    released += scanner.finish()
    starts = [
        i for i in range(len(text)) if text[i] == "1" and text[i + 1 : i + 2] == "-" and text[i + 2 : i + 3] in "ab"
    ]
    starts = [start for start in starts if start + 3 <= len(text)]
    assert released == (text[: starts[0]] if starts else text)
    assert scanner.matched_stop == (r"\d-[ab]" if starts else None)


def test_a_regex_match_is_kept_with_no_stop_trim() -> None:
    scanner = StopScanner([], [r"\d{3}"], True)
    assert scanner.push("no 12") + scanner.push("34") == "no 123"


def test_a_regex_looks_behind_at_what_is_already_out() -> None:
    scanner = StopScanner([], [r"(?<=Q: )\w"], False)
    assert [scanner.push("x Q: "), scanner.push("y")] == ["x Q: ", ""]
    assert scanner.matched_stop == r"(?<=Q: )\w"


def test_of_a_string_and_a_regex_the_one_that_ends_first_wins() -> None:
    assert StopScanner(["cat"], [r"t\b"], False).push("a hat, a cat") == "a ha"
    assert StopScanner(["ha"], [r"t\b"], False).push("a hat, a cat") == "a "


def test_a_regex_holds_back_and_searches_a_bounded_tail_however_long_the_text() -> None:
    scanner = StopScanner([], [r".*END"], False)  # any line may become a match
    num_released = sum(len(scanner.push("ab")) for _ in range(2 * REGEX_WINDOW))
    assert num_released == 3 * REGEX_WINDOW
    assert scanner.push("END") + scanner.finish() == ""
    assert scanner.matched_stop == ".*END"


def test_a_regex_that_backtracks_without_end_fails_its_own_request() -> None:
    scanner = StopScanner([], ["(a|a)*b"], False)
    with pytest.raises(InvalidRequest, match="took more than"):
        scanner.push("a" * 500 + "c")


SLOW, SLOW_TEXT = "(a|a)*b", "a" * 12 + "c"  # 2 ms


class BusyProcess:
    """Stand in for a pattern of 8 ms in a process in which `num_threads` threads spend CPU time at once.

    Its timeouts are of the process's time, as those of `regex` are; its clock is the searching thread's.
    """

    pattern = "slow"

    def __init__(self, num_threads: int) -> None:
        self.num_threads, self.now = num_threads, 0.0

    def thread_time(self) -> float:
        return self.now

    def search(self, *_: object, timeout: float, **__: object) -> None:
        self.now += min(0.008, timeout / self.num_threads)
        if timeout < 0.008 * self.num_threads:
            raise TimeoutError


@pytest.mark.parametrize("num_threads", [1, 4, 16])
def test_other_threads_time_is_not_a_regexs(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that ended early since a forward's threads spent CPU time meanwhile is repeated."""
    busy, scanner = BusyProcess(num_threads), StopScanner([], ["slow"], False)
    monkeypatch.setattr(stops, "time", busy)
    scanner._patterns = [cast("regex.Pattern[str]", busy)]
    assert scanner.push("aaa") == "aaa"
    assert busy.now <= stops.REGEX_BUDGET_S


def test_all_regexes_of_a_request_share_one_budget_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of 8 ms each have more than 25 together, though each has less."""
    busy, scanner = BusyProcess(1), StopScanner([], ["slow"] * 4, False)
    monkeypatch.setattr(stops, "time", busy)
    scanner._patterns = [cast("regex.Pattern[str]", busy)] * 4
    with pytest.raises(InvalidRequest, match="took more than 25 ms"):
        scanner.push("aaa")
    assert busy.now == pytest.approx(stops.REGEX_BUDGET_S)


def test_an_invalid_regex_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match="not a regular expression"):
        make("byte level").text_stream(SamplingParams(stop_regex=["("]))


def test_answers_with_the_same_stops_share_what_searches_for_them() -> None:
    params = SamplingParams(stop=["END", "\n\n"], stop_regex=["[0-9]{3}"])
    first, second = (StopScanner(params.stop, params.stop_regex, False) for _ in range(2))
    assert first._strings is second._strings
    assert first.push("12") == "" and second.push("ab") == "ab"
    assert first.push("3") == "" and first.matched_stop == "[0-9]{3}"
    assert second.push("EN") == "" and second.push("x") == "ENx" and second.matched_stop is None
