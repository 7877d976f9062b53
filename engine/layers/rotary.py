"""Compute rotary position embeddings (Su et al. 2021), and stretch them over a longer context.

Dynamic NTK, stepped or not, and LongRoPE choose their frequencies by the length of the sequence. Cached keys are
rotated already, so here the choice is made once, for the context length that the server runs with: at
`max_position_embeddings`, dynamic NTK gives a sequence of any allowed length the same frequencies as transformers does.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from engine.errors import ModelError
from engine.layers.layer import Layer
from engine.rope_config import NO_ROTATION, ORIGINAL_LENGTH, RopeConfig

LOG_LENGTH = "log_length"  # the entry, made by a family, that holds N: see `query_scale`
FIRST_POSITION = "first_position"  # the entry, made by a family, with the number of a sequence's first token there
QUERY_SCALING = "llama_4_scaling_beta"  # the entry of rope_parameters that holds β, Hugging Face's name for it


class RotaryEmbedding(Layer):
    """Hold `cos_sin` [context_length, rotary_dim] float32: cosines in the first half, sines in the second.

    Shared by all layers of the same settings. Ready after `materialize`.
    """

    def __init__(self, rope: RopeConfig, context_length: int) -> None:
        if rope.rope_type not in FREQUENCIES:
            raise ModelError(f"rope_type {rope.rope_type!r} is not supported, only {', '.join(FREQUENCIES)}")
        self.rope = rope
        self.context_length = context_length
        self.cos_sin = torch.empty(context_length, rope.rotary_dim, dtype=torch.float32, device="meta")
        self.rope_axes = torch.empty(0, dtype=torch.int64, device="meta")  # [rotary_dim] where positions have three
        self.query_scale = torch.empty(0, device="meta")  # [context_length] where queries grow with their positions

    def materialize(self, device: torch.device) -> None:
        """Compute `cos_sin` on `device`. Raises `ModelError` if the config lacks a parameter."""
        try:
            inv_freq, scale = FREQUENCIES[self.rope.rope_type](self.rope, self.context_length)
        except KeyError as error:
            raise ModelError(f"rope parameters of type {self.rope.rope_type!r} lack {error.args[0]!r}") from None
        positions = torch.arange(self.context_length, dtype=torch.float32, device=device)
        angles = torch.outer(positions, inv_freq.to(device))
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1) * scale
        if self.rope.sections:
            axes = axes_of(self.rope.sections, self.rope.is_interleaved)
            self.rope_axes = torch.tensor(axes + axes, device=device)  # of cosines, and of sines
        if self.scales_queries:
            self.query_scale = query_scale(positions, self.rope.scaling)

    def rotation_of(self, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (positions int32 [T], cos_sin [T, rotary_dim]) for tokens whose positions have three axes.

        rope: int32 [3, T]. Each pair of dimensions turns by the position on one of the axes.
        """
        of_dims = rope[self.rope_axes].T.long()  # [T, rotary_dim]
        positions = torch.arange(of_dims.shape[0], dtype=torch.int32, device=rope.device)
        return positions, self.cos_sin.gather(0, of_dims)

    @property
    def scales_queries(self) -> bool:
        """Return whether queries are to be multiplied by `scale_queries` after the rotation."""
        scaling = self.rope.scaling
        return bool(scaling.get(QUERY_SCALING)) or self.context_length > scaling.get(LOG_LENGTH, math.inf)

    def scale_queries(self, q: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Multiply queries [T, H, D] by the factor of their positions, in place."""
        return q.mul_(self.query_scale.index_select(0, positions).to(q.dtype)[:, None, None])


def axes_of(sections: Sequence[int], is_interleaved: bool) -> list[int]:
    """Return the axis, 0 to 2, whose positions turn each pair of dimensions (Qwen2-VL, interleaved in Qwen3-VL).

    sections: how many pairs belong to each axis. Interleaved: axes 1 and 2 have every third of the first pairs.
    """
    if not is_interleaved:
        return [axis for axis, count in enumerate(sections) for _ in range(count)]
    axes = [0] * sum(sections)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = [axis] * len(axes[axis : 3 * sections[axis] : 3])
    return axes


def query_scale(positions: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Return by what queries [positions] are multiplied, so that attention stays sharp over long contexts.

    It is 1 + β ln(1 + ⌊position / original length⌋), or from a length N on the logarithm to the base N of the number
    of tokens that a query sees.
    """
    if LOG_LENGTH in scaling:
        return torch.log(positions + 1).div_(math.log(scaling[LOG_LENGTH])).clamp_(min=1)
    beta: float = scaling[QUERY_SCALING]
    positions = positions + scaling.get(FIRST_POSITION, 0)
    return 1 + beta * torch.log(1 + torch.floor(positions / scaling[ORIGINAL_LENGTH]))


def default(rope: RopeConfig, _context_length: int) -> tuple[torch.Tensor, float]:
    """Return (inverse frequencies [rotary_dim / 2], factor on cosines and sines), as do the functions below."""
    return inverse_frequencies(rope.theta, rope.rotary_dim), 1.0


def none(_rope: RopeConfig, _context_length: int) -> tuple[torch.Tensor, float]:
    """Rotate nothing."""
    return torch.zeros(1), 1.0


def proportional(rope: RopeConfig, _context_length: int) -> tuple[torch.Tensor, float]:
    """Rotate the share `rotated` of a head's pairs, those of the shortest wavelengths, and no others (Gemma 4)."""
    num_pairs = rope.rotary_dim // 2
    inv_freq = inverse_frequencies(rope.theta, rope.rotary_dim) / rope.scaling.get("factor", 1.0)
    return inv_freq.masked_fill(torch.arange(num_pairs) >= int(rope.scaling["rotated"] * num_pairs), 0.0), 1.0


def linear(rope: RopeConfig, _context_length: int) -> tuple[torch.Tensor, float]:
    """Interpolate positions (Chen et al. 2023)."""
    return inverse_frequencies(rope.theta, rope.rotary_dim) / rope.scaling["factor"], 1.0


def dynamic_ntk(rope: RopeConfig, context_length: int) -> tuple[torch.Tensor, float]:
    """Raise the base with the length beyond `max_position_embeddings`, or by a fixed `alpha` (HunYuan)."""
    dim = rope.rotary_dim
    if alpha := rope.scaling.get("alpha"):
        return inverse_frequencies(rope.theta * alpha ** (dim / (dim - 2)), dim), 1.0
    factor = rope.scaling["factor"]
    excess = max(context_length / rope.max_position_embeddings, 1.0)
    return inverse_frequencies(rope.theta * (factor * excess - (factor - 1)) ** (dim / (dim - 2)), dim), 1.0


def stepped_ntk(rope: RopeConfig, context_length: int) -> tuple[torch.Tensor, float]:
    """Raise the base with each doubling of the length beyond `max_position_embeddings` (Qwen 1)."""
    num_doublings = max(math.ceil(math.log2(context_length / rope.max_position_embeddings)), 0)
    alpha, dim = 2 ** (num_doublings + 1) - 1, rope.rotary_dim
    return inverse_frequencies(rope.theta * alpha ** (dim / (dim - 2)), dim), 1.0


def llama3(rope: RopeConfig, _context_length: int) -> tuple[torch.Tensor, float]:
    """Interpolate long wavelengths, keep short ones, blend those between (Llama 3.1)."""
    factor, low, high = (rope.scaling[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    inv_freq = inverse_frequencies(rope.theta, rope.rotary_dim)
    rotations = rope.scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return inv_freq * (kept + (1 - kept) / factor), 1.0


def yarn(rope: RopeConfig, _context_length: int) -> tuple[torch.Tensor, float]:
    """Interpolate as `llama3`, with a ramp over dimensions and sharper attention (YaRN, Peng et al. 2023)."""
    scaling, dim = rope.scaling, rope.rotary_dim
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or rope.max_position_embeddings / original

    def dim_of(num_rotations: float) -> float:
        """Return the (fractional) dimension pair that rotates this often within the original context."""
        return dim * math.log(original / (num_rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(scaling.get("beta_fast") or 32), dim_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    interpolated = ((torch.arange(dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    inv_freq = inverse_frequencies(rope.theta, dim)
    return inv_freq * (1 - interpolated + interpolated / factor), yarn_scale(scaling, factor)


def yarn_scale(scaling: dict[str, Any], factor: float) -> float:
    """Return YaRN's factor on cosines and sines."""
    attention_factor: float | None = scaling.get("attention_factor")
    if attention_factor is not None:
        return attention_factor
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(factor, scaling["mscale"]) / mscale(factor, scaling["mscale_all_dim"])
    return mscale(factor)


def mscale(factor: float, weight: float = 1.0) -> float:
    """Return how much sharper attention is to be over positions stretched by `factor`, as YaRN found it."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope(rope: RopeConfig, context_length: int) -> tuple[torch.Tensor, float]:
    """Divide each frequency by a factor found by search (LongRoPE, Ding et al. 2024)."""
    scaling = rope.scaling
    original = scaling["original_max_position_embeddings"]
    factors = scaling["long_factor" if context_length > original else "short_factor"]
    if len(factors) != rope.rotary_dim // 2:
        raise ModelError(f"rope parameters of type 'longrope' have {len(factors)} factors, not {rope.rotary_dim // 2}")
    scale = scaling.get("long_mscale" if context_length > original else "short_mscale", scaling.get("attention_factor"))
    if scale is None:
        factor = scaling.get("factor") or rope.max_position_embeddings / original
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return inverse_frequencies(rope.theta, rope.rotary_dim) / torch.tensor(factors, dtype=torch.float32), scale


def inverse_frequencies(theta: float, rotary_dim: int) -> torch.Tensor:
    """Return the angles that each pair of dimensions rotates per position, float32 [rotary_dim / 2]."""
    return 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


FREQUENCIES: dict[str, Callable[[RopeConfig, int], tuple[torch.Tensor, float]]] = {
    "default": default,
    "stepped_ntk": stepped_ntk,
    NO_ROTATION: none,
    "proportional": proportional,
    "linear": linear,
    "dynamic": dynamic_ntk,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
}
