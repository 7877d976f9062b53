"""The rule that chooses experts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Routing:
    """The rule that chooses experts from a router's logits."""

    num_experts: int
    top_k: int
    is_sigmoid: bool = False  # scores are sigmoids of their logits, else a softmax over all experts
    renormalize: bool = True  # weights are the chosen scores' shares of their sum
    factor: float = 1.0  # of all weights
    num_groups: int = 1  # consecutive experts form groups, and only those of the best groups are chosen
    topk_groups: int = 1
    group_score: int = 1  # a group counts as much as so many of its best experts together
    softcap: float = 0.0  # logits become softcap tanh(logit / softcap); 0: they do not
    margin: float = 0.0  # scores are softmaxes over experts whose logits are nearly the best; 0: they are not
