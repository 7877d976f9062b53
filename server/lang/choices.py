"""Ways for `select` to pick one of several choices by their tokens' log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class ChoiceLogprobs:
    """Log-probabilities of each choice, given the prompt. Lists are [choices][tokens of the choice]."""

    choices: Sequence[str]
    token_logprobs: Sequence[Sequence[float]]
    input_token_logprobs: Sequence[Any] = ()  # as the server gave them: [log-probability, token id, text] triples
    output_token_logprobs: Sequence[Any] = ()
    unconditional_token_logprobs: Sequence[Sequence[float]] | None = None  # without the prompt, the first taken as 0

    @property
    def normalized(self) -> list[float]:
        """Return the mean of each choice."""
        return [_mean(row) for row in self.token_logprobs]


@dataclass
class ChoicesDecision:
    decision: str
    meta_info: dict[str, Any] = field(default_factory=dict)


class ChoicesSamplingMethod(Protocol):
    requires_unconditional_logprobs: bool

    def __call__(self, logprobs: ChoiceLogprobs) -> ChoicesDecision: ...


def check_select_temperature(temperature: float) -> None:
    """Raise `ValueError` unless the temperature is 0, or next to it."""
    if temperature > 1e-5:
        raise ValueError(f"select takes the likeliest choice: temperature must be 0, got {temperature}")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _best(scores: Sequence[float]) -> int:
    """Return the first of the largest."""
    return max(range(len(scores)), key=scores.__getitem__)


def _meta(logprobs: ChoiceLogprobs) -> dict[str, Any]:
    return {
        "normalized_prompt_logprobs": logprobs.normalized,
        "input_token_logprobs": logprobs.input_token_logprobs,
        "output_token_logprobs": logprobs.output_token_logprobs,
    }


class TokenLengthNormalized:
    """The choice whose tokens are likeliest on average."""

    requires_unconditional_logprobs = False

    def __call__(self, logprobs: ChoiceLogprobs) -> ChoicesDecision:
        return ChoicesDecision(logprobs.choices[_best(logprobs.normalized)], _meta(logprobs))


class GreedyTokenSelection:
    """The choice that picking the likeliest token, one after the other, leads to.

    A choice that is shorter than others is continued with its own mean.
    """

    requires_unconditional_logprobs = False

    def __call__(self, logprobs: ChoiceLogprobs) -> ChoicesDecision:
        num_columns = max(map(len, logprobs.token_logprobs))
        matrix = [
            [*row, *[mean] * (num_columns - len(row))]
            for row, mean in zip(logprobs.token_logprobs, logprobs.normalized, strict=True)
        ]
        left = list(range(len(matrix)))
        for column in range(num_columns):
            best = max(matrix[i][column] for i in left)
            left = [i for i in left if matrix[i][column] == best]
            if len(left) == 1:
                break
        return ChoicesDecision(logprobs.choices[left[0]], {**_meta(logprobs), "greedy_logprob_matrix": matrix})


class UnconditionalLikelihoodNormalized:
    """The choice that the prompt makes likelier by the most, token by token on average.

    Brown et al., "Language Models are Few-Shot Learners", 2020, section 2.4, and EleutherAI's "Multiple Choice
    Normalization in LM Evaluation".
    """

    requires_unconditional_logprobs = True

    def __call__(self, logprobs: ChoiceLogprobs) -> ChoicesDecision:
        without = logprobs.unconditional_token_logprobs
        if without is None:
            raise ValueError("unconditional_likelihood_normalized needs log-probabilities without the prompt")
        gains = [
            _mean([given - alone for given, alone in zip(row, alone_row, strict=True)])
            for row, alone_row in zip(logprobs.token_logprobs, without, strict=True)
        ]
        meta = {
            **_meta(logprobs),
            "unconditional_token_logprobs": without,
            "normalized_unconditional_prompt_logprobs": gains,
        }
        return ChoicesDecision(logprobs.choices[_best(gains)], meta)


token_length_normalized = TokenLengthNormalized()
greedy_token_selection = GreedyTokenSelection()
unconditional_likelihood_normalized = UnconditionalLikelihoodNormalized()
