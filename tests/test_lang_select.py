"""Test `select` against log-probabilities computed by transformers."""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import server.lang as sgl
from server.lang.choices import ChoiceLogprobs
from tests.lang_servers import serving_engine, tiny_engine

WORDS = re.findall(
    r"\w+", "the quick brown fox jumps over a lazy dog once upon a time in Spain there was a small server"
)
METHODS: dict[str, Any] = {
    "token_length_normalized": sgl.token_length_normalized,
    "greedy_token_selection": sgl.greedy_token_selection,
    "unconditional_likelihood_normalized": sgl.unconditional_likelihood_normalized,
}


class Reference:
    """Score each choice's tokens by definition: one forward per choice, no cache, no server."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def logprobs(self, ids: Sequence[int]) -> list[float]:
        """Return the log-probability of each token but the first, given those before it."""
        logits = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return [float(logits[i, ids[i + 1]]) for i in range(len(ids) - 1)]

    def choice(self, prompt: str, choice: str) -> tuple[list[int], list[float]]:
        """Return the choice's token ids and their log-probabilities after the prompt.

        The prompt's last token
        is among them if the choice changed it.
        """
        prompt_ids, ids = self.tokenizer.encode(prompt), self.tokenizer.encode(prompt + choice)
        last = len(prompt_ids) - 1
        first = last + 1 if ids[: last + 1] == prompt_ids else last
        return ids[first:], self.logprobs(ids)[first - 1 :]

    def scores(self, method: str, prompt: str, choices: Sequence[str]) -> list[Any]:
        """Return scores, larger is better, compared as Python compares."""
        measured = [self.choice(prompt, choice) for choice in choices]
        if method == "token_length_normalized":
            return [sum(row) / len(row) for _, row in measured]
        if method == "unconditional_likelihood_normalized":
            alone = [[0.0, *self.logprobs(ids)] for ids, _ in measured]
            return [
                sum(a - b for a, b in zip(row, without, strict=True)) / len(row)
                for (_, row), without in zip(measured, alone, strict=True)
            ]
        length = max(len(row) for _, row in measured)
        return [row + [sum(row) / len(row)] * (length - len(row)) for _, row in measured]


def cases() -> list[tuple[str, list[str]]]:
    """Return 30 prompts.

    They end after a word, after a space that the choice's first token may swallow, or in the middle of a word.
    """
    rng = random.Random(4)
    result = []
    for i in range(30):
        prompt = " ".join(rng.choices(WORDS, k=rng.randrange(3, 12))) + ("", " ", " th", "\n")[i % 4]
        choices = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 4))) for _ in range(rng.randrange(2, 5))]
        result.append((prompt, list(dict.fromkeys(choices))))
    return result


@pytest.mark.parametrize("method", METHODS)
def test_select_picks_what_transformers_says(tiny_llama: Path, method: str) -> None:
    reference = Reference(tiny_llama)

    @sgl.function
    def pick(s: Any, prompt: str, choices: list[str]) -> None:
        s += prompt + sgl.select("x", choices=choices, choices_method=METHODS[method])

    num_healed = 0
    with tiny_engine(tiny_llama) as engine, serving_engine(engine) as url:
        endpoint = sgl.RuntimeEndpoint(url)
        batch = [{"prompt": prompt, "choices": choices} for prompt, choices in cases()]
        over_http = pick.run_batch(batch, backend=endpoint)
        in_process = pick.run_batch(batch, backend=engine)
        for (prompt, choices), state, other in zip(cases(), over_http, in_process, strict=True):
            scores = reference.scores(method, prompt, choices)
            best = choices[max(range(len(choices)), key=scores.__getitem__)]
            assert (state["x"], other["x"]) == (best, best), prompt
            assert state.text() == prompt + best
            meta = state.get_meta_info("x")
            measured = [reference.choice(prompt, choice) for choice in choices]
            assert [[token for _, token, _ in row] for row in meta["input_token_logprobs"]] == [i for i, _ in measured]
            means = [sum(row) / len(row) for _, row in measured]
            assert meta["normalized_prompt_logprobs"] == pytest.approx(means, abs=1e-4)
            if method == "unconditional_likelihood_normalized":
                assert meta["normalized_unconditional_prompt_logprobs"] == pytest.approx(scores, abs=1e-4)
            num_healed += any(
                len(ids) != len(reference.tokenizer.encode(choice))
                for choice, (ids, _) in zip(choices, measured, strict=True)
            )
        endpoint.shutdown()
    assert num_healed >= 5, "the prompts must make tokens heal"


def test_select_refuses_a_temperature(tiny_llama: Path) -> None:
    @sgl.function
    def pick(s: Any) -> None:
        s += "a" + sgl.select("x", choices=["b", "c"], temperature=0.7)

    with tiny_engine(tiny_llama) as engine, pytest.raises(ValueError, match=r"temperature must be 0, got 0\.7"):
        pick.run(backend=engine)["x"]


def decide(method: Any, rows: list[list[float]], without: list[list[float]] | None = None) -> str:
    names = [chr(ord("a") + i) for i in range(len(rows))]
    return method(ChoiceLogprobs(names, rows, unconditional_token_logprobs=without)).decision


def test_each_method_measures_differently() -> None:
    rows = [[-1.0, -9.0], [-2.0], [-3.0, -0.1, -0.1]]
    assert decide(sgl.token_length_normalized, rows) == "c"
    assert decide(sgl.greedy_token_selection, rows) == "a"
    without = [[0.0, -1.0], [0.0], [0.0, -0.1, -0.1]]
    assert decide(sgl.unconditional_likelihood_normalized, rows, without) == "c"
    assert decide(sgl.token_length_normalized, [[-1.0], [-1.0]]) == "a", "the first wins ties"
    # Column 0 ties, the shorter goes on with its mean, -1.0, which beats -1.5.
    assert decide(sgl.greedy_token_selection, [[-1.0, -1.5], [-1.0]]) == "b"
