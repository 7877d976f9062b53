"""Constrain answers to a grammar, compiled once and followed token by token.

llguidance does the work: it compiles JSON schemas, regular expressions and grammars, and computes which tokens may come
next (a mask) and which must (forced tokens, as the tokenizer would have written them). engine.text.xgrammar puts
another library in its place.
"""

import hashlib
import json
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from engine.errors import InvalidRequest
from engine.text.schemas import MAX_TEXT_BYTES, Schema, check_length, forms_of, is_strict, with_options
from engine.text.structural_tag import structural_tag_to_lark

logger = logging.getLogger(__name__)

MAX_ANNOTATED_BYTES = 1 << 20  # of a schema, or of a structural tag with schemas, as it was sent
MAX_KEY_LEN = 1024  # characters; a longer grammar is cached by its digest
MAX_CACHED_GRAMMARS = 256
MAX_REASON_LEN = 400  # characters
MAX_LESSONS = 16  # answers that a grammar learns from: more would only add to its memory
WORD_BITS = 32
SOURCE = re.compile(r"^at \d+\(\d+\): failed to compile JSON schema: |<non-verbose/>")
UNKNOWN = re.compile("Unimplemented keys|supported|not disjoint|does not fetch")  # what the library cannot do
ADVICE = '; leave that out of the schema, or add "x-strict": false to it: what cannot be enforced is then left out'
SPECIAL_MARK = b"\xff"  # the byte that llguidance puts before special tokens, and drops when it decodes


class GrammarError(Exception):
    """Report that a grammar does not allow the answer to go on."""


@dataclass(slots=True)
class GrammarStats:
    """Count compiled grammars and the seconds they took."""

    num_compiled: int = 0
    """Grammars compiled, refused ones included."""
    num_cache_hits: int = 0
    compile_s: float = 0.0
    """Seconds spent compiling."""


class TokenMatcher(Protocol):
    """Follow an answer token by token: an `LLMatcher`, or an object with these methods of it."""

    def deep_copy(self) -> Self: ...
    def consume_token(self, token: int, /) -> bool: ...
    def compute_ff_tokens(self) -> list[int]: ...
    def is_accepting(self) -> bool: ...
    def is_stopped(self) -> bool: ...
    def is_error(self) -> bool: ...
    def get_error(self) -> str: ...
    def rollback(self, num_tokens: int, /) -> bool: ...
    def reset(self) -> bool: ...


@dataclass(slots=True)
class Grammar:
    """Hold a compiled constraint, for any number of answers."""

    start: TokenMatcher  # copied for each answer
    num_lessons: int = 0  # answers that `start` has learnt from


class GrammarCompiler:
    """Compile constraints for one tokenizer.

    Thread-safe. To be called off the event loop: compiling takes milliseconds, in bad cases seconds.
    """

    def __init__(
        self,
        tokenizer_json: str | None,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        special_tokens: dict[str, int],
        token_bytes: Callable[[int], bytes],
    ) -> None:
        """Make a compiler; the tokenizer is only read at first use.

        tokenizer_json: the tokenizers library's description; None: the tokenizer is not that library's. vocab_size:
        bits of a mask; may be more than the tokenizer's tokens, to which eos_token_ids must belong.
        """
        self.stats = GrammarStats()
        self.vocab_size = vocab_size
        self._tokenizer_json, self._eos_token_ids = tokenizer_json, list(eos_token_ids)
        self._special_tokens, self._token_bytes = special_tokens, token_bytes
        self._cache: OrderedDict[tuple[str, str | bytes], Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._tokenizer_lock = threading.Lock()
        self._made_tokenizer: LLTokenizer | None = None

    def find(self, kind: str, text: str) -> Grammar | None:
        """Return the grammar if it is cached, else None. Takes microseconds."""
        key = _key(kind, text)
        with self._lock:
            grammar = self._cache.get(key)
            if grammar is not None:
                self._cache.move_to_end(key)
                self.stats.num_cache_hits += 1
            return grammar

    def compile(self, kind: str, text: str) -> Grammar:
        """Compile and cache the grammar in field `kind`, one of engine.request.CONSTRAINTS.

        Raises `InvalidRequest` with the library's reason if it refuses the grammar.
        """
        limit = MAX_ANNOTATED_BYTES if kind in ("json_schema", "structural_tag") else MAX_TEXT_BYTES
        if len(text) > limit:
            raise InvalidRequest(f"{kind} has {len(text)} characters, the limit is {limit}", kind)
        start = time.perf_counter()
        try:
            matcher = self._new_matcher(kind, text)
        except InvalidRequest:
            raise
        except BaseException as error:  # noqa: BLE001 - a panic of the library is no Exception, and concerns one grammar
            raise _refused(kind, str(error)) from None
        finally:
            with self._lock:
                self.stats.num_compiled += 1
                self.stats.compile_s += time.perf_counter() - start
        grammar = Grammar(matcher)
        with self._lock:
            self._cache[_key(kind, text)] = grammar
            if len(self._cache) > MAX_CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        return grammar

    def warm_up(self) -> None:
        """Make the tokenizer that the first grammar would wait for, which takes up to seconds.

        The library holds the interpreter lock all the while, and so would hold up all streams.
        """
        try:
            self._new_matcher("regex", "a")
        except BaseException as error:  # noqa: BLE001 - as in `compile`; a request with a grammar will get it
            logger.debug("grammars cannot be warmed up: %s", error)

    def new_mask_filler(self, is_pinned: bool) -> "MaskFiller":
        """Return a filler whose masks are in pinned memory if `is_pinned`."""
        return MaskFiller(self.vocab_size, is_pinned)

    def _new_matcher(self, kind: str, text: str) -> TokenMatcher:
        """Return a matcher of the grammar in field `kind`. Raises `ValueError` with the library's reason."""
        if kind == "json_schema":
            return self._first_held(json.loads(text))[1]
        if kind == "structural_tag":
            return self._matcher_of_tag(json.loads(text))
        if kind == "choice":
            # One terminal: as many alternatives of a rule would be followed one by one.
            words = " | ".join(map(json.dumps, dict.fromkeys(json.loads(text))))
            return self._matcher(grammar_from("lark", f"start: CHOICE\nCHOICE: {words}"))
        return self._matcher(grammar_from("regex" if kind == "regex" else "ebnf", text))

    def _matcher(self, definition: str) -> LLMatcher:
        """Return a matcher of a grammar in the library's own terms. Raises `ValueError` if it fails at once."""
        matcher = LLMatcher(self._tokenizer(), definition, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if not matcher.is_error():
            mask = matcher.compute_bitmask()  # the first mask is the slowest, and shows grammars that are too complex
            # So does the second, of those that have too many alternatives.
            token = next((8 * i + (byte & -byte).bit_length() - 1 for i, byte in enumerate(mask) if byte), None)
            if token is not None and not matcher.is_error():
                probe = matcher.deep_copy()
                probe.consume_token(token)
                if probe.is_error():
                    raise ValueError(probe.get_error())
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def _first_held(self, schema: Any) -> tuple[Schema, LLMatcher]:
        """Return the most exact form of `schema` that the library takes, and a matcher of it.

        Raises `ValueError` with the library's reason against the last form that says all of it.
        """
        reason = ""
        for form in forms_of(schema, self._is_covered):
            try:
                matcher = self._matcher(LLMatcher.grammar_from_json_schema(json.dumps(form.schema)))
            except ValueError as error:
                reason = reason if form.is_loose else str(error)
                continue
            if form.note:
                logger.info("a JSON schema is not enforced whole: %s", form.note)
            return form.schema, matcher
        raise ValueError(reason)

    def _matcher_of_tag(self, tag: Any) -> LLMatcher:
        """Return a matcher of a structural tag. Raises `InvalidRequest` that names the schema to blame."""
        try:
            return self._matcher_of_lark(tag, lambda schema, _: next(forms_of(schema, self._is_covered)).schema)
        except ValueError as error:
            reason = error
        refused: list[InvalidRequest] = []
        num_held = 0

        def held(schema: Any, field: str) -> Schema:
            """Look at one schema alone: one that cannot be held spoils the others only if it is strict."""
            nonlocal num_held
            try:
                form, _ = self._first_held(schema)
            except ValueError as error:
                refused.append(_refused("structural_tag", str(error), field))
                if is_strict(schema):
                    raise refused[-1] from None
                return with_options({"type": "object"} if schema.get("type") == "object" else {})
            num_held += 1
            return form

        matcher = self._matcher_of_lark(tag, held)
        if refused and not num_held:
            raise refused[0] from reason
        return matcher

    def _matcher_of_lark(self, tag: Any, form_of: Callable[[Any, str], Schema]) -> LLMatcher:
        lark = structural_tag_to_lark(tag, self._special_tokens, form_of, self._check_lark)
        check_length(len(lark))
        return self._matcher(LLMatcher.grammar_from_lark(lark))

    def _check_lark(self, grammar: str, field: str) -> None:
        """Raise `InvalidRequest` that names `field` if the library does not take a client's grammar."""
        try:
            check_length(len(grammar))
            self._matcher(LLMatcher.grammar_from_lark(grammar))
        except ValueError as error:
            raise _refused("ebnf", str(error), field) from None

    def _is_covered(self, pattern: str, names: list[str]) -> bool:
        """Return whether `pattern` matches none but `names`: the library fails once an answer has had them all."""
        schema = {
            "type": "object",
            "properties": {name: {"const": 0} for name in names},
            "required": names,
            "patternProperties": {pattern: {}},
            "additionalProperties": False,
        }
        matcher = LLMatcher(
            self._byte_tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(with_options(schema))), log_level=0
        )
        if matcher.is_error():
            return False
        begun = "".join(f"{json.dumps(name, ensure_ascii=False)}:0," for name in names)
        matcher.try_consume_tokens(list(("{" + begun).encode()))
        matcher.compute_bitmask()
        return matcher.is_error()

    @cached_property
    def _byte_tokenizer(self) -> LLTokenizer:
        return LLTokenizer("byte")

    def _tokenizer(self) -> LLTokenizer:
        """Return the tokenizer, made once however many threads compile at once; that takes up to seconds."""
        with self._tokenizer_lock:
            if self._made_tokenizer is None:
                self._made_tokenizer = self._make_tokenizer()
            return self._made_tokenizer

    def _make_tokenizer(self) -> LLTokenizer:
        if self._tokenizer_json is None:
            raise ValueError("this model's tokenizer is not one that grammars can be made for")
        tokenizer = LLTokenizer(self._tokenizer_json, n_vocab=self.vocab_size, eos_token=self._eos_token_ids)
        # The library reads the common kinds of tokenizer. It may misread others' tokens: masks would admit wrong text.
        specials = {*self._special_tokens.values(), *self._eos_token_ids}
        pieces = {token: self._token_bytes(token) for token in range(self.vocab_size) if token not in specials}
        pieces = {token: piece for token, piece in pieces.items() if piece not in (b"", SPECIAL_MARK)}
        if tokenizer.decode_bytes(list(pieces)) != b"".join(pieces.values()):
            raise ValueError("this model's tokenizer writes its tokens in a way that grammars cannot be made for")
        return tokenizer


def _key(kind: str, text: str) -> tuple[str, str | bytes]:
    """Return the key of a grammar in the cache, which must not hold long texts."""
    return kind, text if len(text) <= MAX_KEY_LEN else hashlib.blake2b(text.encode("utf-8", "replace")).digest()


def _refused(kind: str, message: str, field: str = "") -> InvalidRequest:
    """Return the error for a grammar in `kind`. field: what the client calls the part that is to blame."""
    reason, *_ = re.split(r"\n *\d+ \| ", message)  # the rest is the grammar itself, as the library sees it
    reason = " ".join(SOURCE.sub("", reason).split())
    if len(reason) > MAX_REASON_LEN:  # the library quotes a long text between the error and its cause
        reason = f"{reason[: MAX_REASON_LEN // 2]} ... {reason[-MAX_REASON_LEN // 2 :]}"
    if kind in ("json_schema", "structural_tag") and UNKNOWN.search(reason):
        reason += ADVICE
    return InvalidRequest(f"{field or kind} cannot be used: {reason}", field or kind)


class Matcher:
    """Follow one answer: decide which tokens may come next, which must, and when none can.

    While the model thinks, that is until `reasoning_end_ids` were generated, the grammar is not consulted and any token
    may come; after `max_thinking_tokens` of thinking, `reasoning_end_ids` must. `may_jump`: forced tokens join the
    answer at once (`jump`); if not, masks let them through one at a time.
    """

    def __init__(
        self,
        grammar: Grammar | None,
        reasoning_end_ids: Sequence[int] = (),
        max_thinking_tokens: int | None = None,
        *,
        may_jump: bool = True,
    ) -> None:
        self.may_jump = may_jump
        self._source = grammar
        self._grammar = None if grammar is None else grammar.start.deep_copy()
        self._end_ids, self._max_thinking_tokens = list(reasoning_end_ids), max_thinking_tokens
        self._is_thinking = bool(self._end_ids)
        self._num_thought = 0
        self._last: list[int] = []  # the last tokens of the thinking, as many as `reasoning_end_ids` has

    @property
    def masks(self) -> bool:
        """Return whether there may be a mask from now on. If not, sampling need not wait for the matcher."""
        # Tokens forced now were not jumped over: they begin the answer, or might be a stop.
        return self._grammar is not None or not self.may_jump or bool(self.forced_tokens())

    @property
    def is_finished(self) -> bool:
        """Return whether only the answer's end can come."""
        return not self._is_thinking and self._grammar is not None and self._grammar.is_stopped()

    def advance(self, token: int) -> None:
        """Follow the answer's next token. Raises `GrammarError` if it may not come."""
        if self._is_thinking:
            self._num_thought += 1
            self._last = [*self._last, token][-len(self._end_ids) :]
            self._is_thinking = self._last != self._end_ids
        elif self._grammar is not None and not self._grammar.consume_token(token):
            raise GrammarError(" ".join(self._grammar.get_error().split()))

    def forced_tokens(self) -> list[int]:
        """Return the tokens that must come next, as far as known."""
        if not self._is_thinking:
            return [] if self._grammar is None else self._grammar.compute_ff_tokens()
        if self._max_thinking_tokens is None or self._num_thought < self._max_thinking_tokens:
            return []
        num_last = len(self._last)
        begun = max(n for n in range(len(self._end_ids)) if self._last[num_last - n :] == self._end_ids[:n])
        return self._end_ids[begun:]

    def jump(self, max_tokens: int) -> list[int]:
        """Advance over the tokens that must come next, at most `max_tokens`, and return them."""
        jumped: list[int] = []
        while forced := self.forced_tokens()[: max_tokens - len(jumped)]:
            for token in forced:
                self.advance(token)
            jumped += forced
        return jumped

    def step_back(self) -> None:
        """Undo the last `advance` over a token of the grammar."""
        assert self._grammar is not None
        self._grammar.rollback(1)

    def close(self) -> None:
        """End the answer: later answers start with what the library has learnt from this one.

        Each copy of an `LLMatcher` caches the states of the grammar that it has visited: computing which tokens may
        come in a string with a pattern takes a millisecond, looking it up takes microseconds.
        """
        source, grammar = self._source, self._grammar
        if source is None or grammar is None or source.num_lessons == MAX_LESSONS or grammar.is_error():
            return
        if grammar.reset():
            source.start = grammar
            source.num_lessons += 1

    @property
    def masking_grammar(self) -> TokenMatcher | None:
        """Return the grammar that masks the next token; None while the model thinks, or without a grammar."""
        return None if self._is_thinking else self._grammar


class MaskFiller:
    """Compute the token masks of a step, in parallel."""

    def __init__(self, vocab_size: int, is_pinned: bool) -> None:
        self._num_words = (vocab_size + WORD_BITS - 1) // WORD_BITS
        self._is_pinned = is_pinned

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()  # made when first needed: it keeps threads

    def fill(self, matchers: Sequence[Matcher]) -> tuple[torch.Tensor, dict[int, str]]:
        """Return (masks, index -> error message of that matcher).

        masks: host int32 [M, vocab_size / 32 rounded up]. A set bit is a token that may come, see
        kernels.sampling.apply_token_bitmask.
        """
        masks = torch.full((len(matchers), self._num_words), -1, dtype=torch.int32, pin_memory=self._is_pinned)
        grammars = []
        for i, matcher in enumerate(matchers):
            if (grammar := matcher.masking_grammar) is not None:
                grammars.append((grammar, i))
            elif forced := matcher.forced_tokens():
                word, bit = divmod(forced[0], WORD_BITS)
                masks[i] = 0
                masks[i, word] = 1 << bit if bit < WORD_BITS - 1 else -(1 << bit)
        if grammars:
            self._fill(grammars, masks)
        return masks, {i: " ".join(grammar.get_error().split()) for grammar, i in grammars if grammar.is_error()}

    def _fill(self, grammars: list[tuple[Any, int]], masks: torch.Tensor) -> None:
        """Write the mask of each grammar into its row of `masks`. grammars: (grammar, row)."""
        self._executor.unsafe_compute_mask_ptr(grammars, masks.data_ptr(), self._num_words * masks.itemsize, len(masks))
