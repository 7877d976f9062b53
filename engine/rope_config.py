"""Rotary settings of config.json: their spellings, what they mean, and the context length that follows from them."""

import logging
from dataclasses import dataclass, field, replace
from typing import Any

logger = logging.getLogger(__name__)

# Rotary scalings whose `max_position_embeddings` is the length before scaling.
STRETCHED_BY_FACTOR = ("linear", "yarn")
STRETCHED_BY_LENGTH = ("dynamic", "stepped_ntk")  # to whatever is asked for
NO_ROTATION = "none"  # the `rope_type` of layers without rotary embedding
# Rotary settings, by where files have them: see `with_rope_parameters`.
ORIGINAL_LENGTH = "original_max_position_embeddings"
ROPE_OBJECTS, ROPE_NUMBERS = ("rope_scaling", "rope_parameters"), ("rope_theta", "partial_rotary_factor")
FACTORS = ("attention_factor", "short_mscale", "long_mscale")  # on cosines and sines, in place of one that follows
ROPE_ENTRIES = (*ROPE_OBJECTS, *ROPE_NUMBERS, ORIGINAL_LENGTH)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: config.json's `rope_parameters`, or `rope_theta` and `rope_scaling` of older files."""

    theta: float
    rotary_dim: int  # of head_dim, the first this many are rotated
    max_position_embeddings: int
    rope_type: str = "default"
    scaling: dict[str, Any] = field(default_factory=dict, hash=False)  # the type's own parameters: factor, ...
    sections: tuple[int, ...] = ()  # of pairs, that turn by each of a position's three axes; (): it has one
    is_interleaved: bool = False  # sections are, and do not follow each other

    @property
    def without_rotation(self) -> "RopeConfig":
        """Return what a layer without rotary embedding has in a model whose other layers have this one.

        A pair of dimensions is rotated by an angle of 0, so that no kernel needs a case of its own.
        """
        return replace(self, rotary_dim=2, rope_type=NO_ROTATION)

    @property
    def without_sharpening(self) -> "RopeConfig":
        """Return what heads that are normalized behind the rotation have: no factor on cosines and sines stays."""
        return replace(self, scaling={k: v for k, v in self.scaling.items() if k not in FACTORS} | {FACTORS[0]: 1.0})


def with_rope_parameters(entries: dict[str, Any]) -> dict[str, Any]:
    """Return `entries` with all rotary settings in `rope_parameters`, where transformers 5 keeps them.

    Older files have `rope_theta` and `partial_rotary_factor` beside a `rope_scaling`, whose null means none, and Phi-3
    has the length before scaling beside it. Without this, an override in one spelling would not meet a file in another.
    Of a file that has both objects, `rope_scaling` says how positions are stretched: models' authors let users add it.
    """
    rest = {name: value for name, value in entries.items() if name not in ROPE_ENTRIES}
    added, own = (entries.get(name) or {} for name in ROPE_OBJECTS)
    if not isinstance(added, dict) or not isinstance(own, dict):
        return entries  # `checked` says what is wrong
    is_by_layer = any(isinstance(value, dict) for value in own.values())
    scaling = own if is_by_layer else added or own
    if not scaling and any(name in entries for name in ROPE_OBJECTS):
        scaling = {"rope_type": "default"}
    numbers = [{name: each[name] for name in ROPE_NUMBERS if each.get(name) is not None} for each in (entries, own)]
    parameters = numbers[0] | numbers[1] | scaling
    if (rope_type := parameters.pop("type", None)) is not None:
        parameters.setdefault("rope_type", rope_type)
    if (original := entries.get(ORIGINAL_LENGTH)) is not None:
        parameters[ORIGINAL_LENGTH] = original
    return rest | ({"rope_parameters": parameters} if parameters else {})


def parse_rope(raw: dict[str, Any], head_dim: int, layer_type: str = "", **defaults: Any) -> RopeConfig:
    """Read `rope_parameters`, as `with_rope_parameters` makes them.

    layer_type: whose parameters to take where each type of layer has its own. defaults: of parameters not there.
    """
    parameters = dict(raw.get("rope_parameters") or {})
    own = parameters.get(layer_type)
    parameters = {name: value for name, value in parameters.items() if not isinstance(value, dict)} | (own or {})
    parameters = defaults | parameters
    rope_type = parameters.pop("rope_type", None) or "default"
    theta = parameters.pop("rope_theta", None) or 10000.0
    partial = parameters.pop("partial_rotary_factor", None) or 1.0
    sections = tuple(parameters.pop("mrope_section", None) or ())
    is_interleaved = parameters.pop("mrope_interleaved", False)
    if rope_type == "mrope":
        rope_type = "default"
    if rope_type == "proportional":  # the other dimensions belong to pairs that turn by an angle of 0
        parameters["rotated"], partial = partial, 1.0
    max_positions = raw["max_position_embeddings"]
    parameters.setdefault(ORIGINAL_LENGTH, max_positions)
    rotary_dim = int(head_dim * partial)
    return RopeConfig(theta, rotary_dim, max_positions, rope_type, parameters, sections, is_interleaved)


def parse_local_rope(raw: dict[str, Any], head_dim: int, theta: float | None = None) -> RopeConfig:
    """Read the rotation of layers with a window, in a model whose other layers may have their positions stretched.

    theta: its base where the file has no parameters for these layers; None: that of the other layers.
    """
    parameters = raw.get("rope_parameters") or {}
    if isinstance(parameters.get("sliding_attention"), dict):
        return parse_rope(raw, head_dim, "sliding_attention")
    theta = parameters.get("rope_theta") if theta is None else theta
    return parse_rope(raw | {"rope_parameters": {"rope_theta": theta}}, head_dim)


def resolve_context_length(asked: int | None, rope: RopeConfig) -> int:
    """`asked`, or what the model was made for.

    Dynamic NTK and LongRoPE are functions of the context length (see layers/rotary.py), so theirs is
    `max_position_embeddings` unless more is asked for.
    """
    longest = rope.max_position_embeddings
    if rope.rope_type in STRETCHED_BY_FACTOR:
        stretched = rope.scaling[ORIGINAL_LENGTH] * (rope.scaling.get("factor") or 1.0)
        longest = max(longest, int(stretched))
    if asked is None:
        return longest
    if asked > longest and rope.rope_type not in STRETCHED_BY_LENGTH:
        logger.warning("context_length %d is longer than the model's %d: expect poor answers there", asked, longest)
    return asked
