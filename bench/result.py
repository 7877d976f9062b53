"""Record what the client of `bench.serve` saw of one request."""

import math
from dataclasses import dataclass, field


@dataclass(slots=True)
class Result:
    """Times are seconds since the request was sent; `error` is empty on success."""

    prompt_len: int = 0
    output_len: int = 0
    ttft_s: float = math.nan
    e2e_s: float = math.nan
    itl_s: list[float] = field(default_factory=list)
    error: str = ""
    sent_s: float = 0.0
    """Since the run began."""

    @property
    def tpot_s(self) -> float:
        return (self.e2e_s - self.ttft_s) / (self.output_len - 1) if self.output_len > 1 else math.nan
