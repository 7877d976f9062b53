"""Weights that a checkpoint holds in few bits."""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from engine.errors import ModelError, shown
from engine.quantization import DENSE, Quantization, Scheme, Transform, With
from engine.quantization.modules import spellings
from kernels.quantized import Format, QuantizedWeight
from kernels.weights import Part, ShapeError, Shard

T = TypeVar("T")

# Of keys and values, or of scores and queries, which nothing here rounds.
CACHE_SCALES = frozenset((
    "k_scale", "v_scale", "kv_scale", "q_scale", "prob_scale", "prob_output_scale", "k_zero_point", "v_zero_point",
    "output_scale", "k_cache_scale", "v_cache_scale",
))  # fmt: skip
OF_CACHE = (".k_scale", ".v_scale")


@dataclass(frozen=True)
class Packed:
    """Codes and scales. names: (field of `QuantizedWeight`, what the checkpoint calls it)."""

    form: Format
    names: tuple[tuple[str, str], ...] = ()

    def weight(self, parts: Sequence[Part], k: int, input_shard: Shard, dtype: torch.dtype) -> QuantizedWeight:
        return QuantizedWeight(parts, k, dtype, self.form, input_shard, dict(self.names))

    def input_unit(self, num_inputs: int) -> int:
        return self.form.input_unit(num_inputs)


@dataclass(frozen=True)
class Stored:
    """The form in which a checkpoint stores a module's weight.

    tensors: what follows the module's name -> (field of `QuantizedWeight`, what is done to it ...), or None if it is
    not needed. A tensor `weight` keeps that name: it may turn out not to be quantized.
    """

    form: Format
    tensors: Mapping[str, tuple[Any, ...] | None]

    @property
    def scheme(self) -> Packed:
        return Packed(self.form, (("codes", "weight"),) if "weight" in self.tensors else ())


class ByModule(Quantization):
    """A checkpoint whose configuration says for each module how it is stored."""

    def __init__(self) -> None:
        self._known: dict[str, Stored | None] = {}

    @abstractmethod
    def find(self, names: Collection[str]) -> Stored | None:
        """Return how a module is stored, given by all its spellings; None if as plain numbers."""

    def stored(self, module: str) -> Stored | None:
        if module not in self._known:
            self._known[module] = self.find(spellings(module))
        return self._known[module]

    def scheme_of(self, module: str) -> Scheme:
        stored = self.stored(module)
        return DENSE if stored is None else stored.scheme

    def converted(self, name: str) -> Iterable[tuple[str, Sequence[Transform | With]]]:
        module, leaf = self.split(name)
        if leaf in CACHE_SCALES:
            yield from ((scale, ()) for scale in cache_scales(module, leaf))
            return
        stored = self.stored(module)
        if stored is None or leaf not in stored.tensors:
            yield name, ()
        elif (found := stored.tensors[leaf]) is not None:
            field, *transforms = found
            whole = [
                replace(step, names=tuple(f"{module}.{other}" for other in step.names))
                if isinstance(step, With)
                else step
                for step in transforms
            ]
            yield f"{module}.{field}" if field else field, whole

    def split(self, name: str) -> tuple[str, str]:
        """Return the module that a tensor is of, and what follows its name."""
        module, _, leaf = name.rpartition(".")
        return module, leaf

    def scheme_found(self, tensor: str) -> Scheme | None:
        return self.scheme_of(self.split(tensor)[0])

    def spare(self, name: str) -> Transform | None:
        if name.endswith(OF_CACHE):  # for a cache that rounds nothing
            return lambda scale: scale
        return check_zero if name.endswith(".bias") else None

    def in_file(self, name: str) -> str:
        module, _, field = name.rpartition(".")
        stored = self.stored(module)
        for leaf, found in stored.tensors.items() if stored else ():
            if found is not None and found[0] == field:
                return f"{module}.{leaf}"
        return name


def cache_scales(module: str, leaf: str) -> list[str]:
    """Return the names, as compressed-tensors has them, of a scale of cached keys or values; [] for other scales.

    ModelOpt and Quark name it after the product that makes them, and one may be for both.
    """
    attention, _, product = module.rpartition(".")
    if leaf == "kv_scale":
        return [f"{module}.k_scale", f"{module}.v_scale"]
    if product in ("k_proj", "v_proj"):
        wanted = f"{product[0]}_scale"
        return [f"{attention}.{wanted}"] if leaf in (wanted, "output_scale") else []
    return [f"{module}.{leaf}"] if leaf in ("k_scale", "v_scale") else []


def check_zero(bias: torch.Tensor) -> torch.Tensor:
    """Raise `ShapeError` unless a bias that libraries gave a layer without one adds nothing."""
    if bias.any():
        raise ShapeError("is not zero, and the model has no such bias")
    return bias


def is_head(names: Collection[str]) -> bool:
    """Return whether a module, given by its spellings, is the head for tokens or labels."""
    return any(name.rpartition(".")[2] in ("lm_head", "score") for name in names)


def entry(raw: Mapping[str, Any], name: str, kind: type[T], default: T) -> T:
    """Return an entry of a quantization's configuration, `default` if it is null. `ModelError` if it is no `kind`."""
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ModelError(f"quantization_config: {name} must be of type {kind.__name__}, got {shown(value)}")
    return value


def objects(raw: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Return an entry whose own entries are objects, or null for {}. `ModelError` if one is anything else."""
    found = entry(raw, name, dict, {})
    return {key: entry({f"{name}, {key}": value}, f"{name}, {key}", dict, {}) for key, value in found.items()}
