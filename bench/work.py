"""The requests that `bench.serve` sends: drawn from a seed, or read from a file."""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIRST_ORDINARY_ID = 100  # ids below are often special tokens
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
CHARS_PER_TOKEN = 4.0  # of English, where no tokenizer counts
# ShareGPT, as SGLang's and vLLM's benches cut it: tokens.
LEAST_LEN, MOST_PROMPT_LEN, MOST_LEN = 4, 1024, 2048

Count = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Work:
    """One request to send. `prompt` is token ids, or text for an API that takes none."""

    prompt: list[int] | str
    output_len: int
    messages: tuple[dict[str, Any], ...] = ()
    """Of a chat that is more than its prompt."""


class Prompts:
    """Draws prompts of `length` tokens: ids below `vocab_size`, or as many words."""

    def __init__(self, rng: random.Random, vocab_size: int, as_text: bool) -> None:
        self.rng, self.vocab_size, self.as_text = rng, vocab_size, as_text

    def tokens(self, length: int) -> list[Any]:
        if self.as_text:
            return self.rng.choices(WORDS, k=length)
        return self.rng.choices(range(FIRST_ORDINARY_ID, self.vocab_size), k=length)

    def join(self, tokens: list[Any]) -> list[int] | str:
        return " ".join(tokens) if self.as_text else tokens


def drawn_len(rng: random.Random, length: int, range_ratio: float) -> int:
    """Return a length between `length * range_ratio` and `length`, each as likely."""
    return rng.randint(min(max(1, int(length * range_ratio)), length), length)


def random_work(prompts: Prompts, num_prompts: int, input_len: int, output_len: int, range_ratio: float) -> list[Work]:
    rng = prompts.rng
    return [
        Work(
            prompts.join(prompts.tokens(drawn_len(rng, input_len, range_ratio))),
            drawn_len(rng, output_len, range_ratio),
        )
        for _ in range(num_prompts)
    ]


def shared_prefix_work(
    prompts: Prompts, num_prompts: int, num_groups: int, prefix_len: int, question_len: int, output_len: int
) -> list[Work]:
    """`num_groups` prefixes, equally often and in random order, each time with a question of its own."""
    prefixes = [prompts.tokens(prefix_len) for _ in range(num_groups)]
    work = [
        Work(prompts.join(prefixes[i % num_groups] + prompts.tokens(question_len)), output_len)
        for i in range(num_prompts)
    ]
    prompts.rng.shuffle(work)
    return work


def sharegpt_work(path: Path, rng: random.Random, num_prompts: int, output_len: int | None, count: Count) -> list[Work]:
    """Return the first questions of conversations in ShareGPT's shape, drawn in random order.

    An answer gets the length of the one in the file, or `output_len`. Pairs that are very short or long are left out.
    """
    conversations = json.loads(path.read_text())
    rng.shuffle(conversations)
    work: list[Work] = []
    for turns in map(_turns_of, conversations):
        if len(work) == num_prompts:
            break
        if len(turns) < 2:
            continue
        question, answer = turns[0], turns[1]
        prompt_len = count(question)
        answer_len = output_len or count(answer)
        is_usual = min(prompt_len, answer_len) >= LEAST_LEN and prompt_len <= MOST_PROMPT_LEN
        if is_usual and prompt_len + answer_len <= MOST_LEN:
            work.append(Work(question, answer_len))
    return work


def _turns_of(conversation: dict[str, Any]) -> list[str]:
    turns = conversation.get("conversations") or conversation.get("conversation") or []
    return [str(turn.get("value", turn.get("content", ""))) for turn in turns]


def custom_work(lines: Iterable[str], output_len: int) -> Iterator[Work]:
    """Yield the requests of JSON lines: `prompt` (text or token ids), or `messages` of a chat, or ShareGPT's shape.

    An answer's length is the line's `output_tokens`, `output_len` or `max_tokens`; else `output_len`.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        item = json.loads(line)
        wanted = next((item[name] for name in ("output_tokens", "output_len", "max_tokens") if item.get(name)), None)
        messages = tuple(item.get("messages") or ())
        prompt = item.get("prompt", item.get("text"))
        if prompt is None and messages:
            prompt = "\n\n".join(str(message["content"]) for message in messages)
        elif prompt is None:
            prompt = next(iter(_turns_of(item)), None)
        if prompt is None:
            raise ValueError(f"line {number} has neither prompt, text, messages nor conversations")
        yield Work(prompt, wanted or output_len, messages)


def drawn(work: Sequence[Work], rng: random.Random, num_prompts: int) -> list[Work]:
    """Return `num_prompts` requests of a file, each once as long as there are new ones."""
    order = list(work)
    rng.shuffle(order)
    return [order[i % len(order)] for i in range(num_prompts)] if order else []


def token_counter(tokenizer: str | None) -> Count:
    """Return what counts the tokens of a text: a tokenizer by its folder, file or hub id, or an estimate."""
    if tokenizer is None:
        return lambda text: round(len(text) / CHARS_PER_TOKEN)
    from tokenizers import Tokenizer

    path = Path(tokenizer)
    file = path / "tokenizer.json" if path.is_dir() else path
    known = Tokenizer.from_file(str(file)) if file.is_file() else Tokenizer.from_pretrained(tokenizer)
    return lambda text: len(known.encode(text, add_special_tokens=False).ids)
