"""Turn the names and shapes of a checkpoint's tensors into those of a model: a list of rules, applied in order.

A tensor becomes one piece or several; each rule looks at the piece's name as the rules before it have left it.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.quantization import CHECKED, OF_INPUTS, Quantization, Transform, With
from kernels.weights import ShapeError

Read = Callable[[str], torch.Tensor | None]


def _read_nothing(name: str) -> torch.Tensor | None:  # noqa: ARG001
    return None


@dataclass(frozen=True)
class Piece:
    """A tensor for the model, made from a checkpoint's."""

    name: str  # `CHECKED`: it has no place in the model
    transforms: tuple[Transform | With, ...] = ()  # of the checkpoint's tensor, in order
    index: int | None = None  # which one of a stack it is

    @property
    def has_rows(self) -> bool:
        """Return whether the tensor's first dimension is that of a layer's outputs."""
        return not self.name.endswith(OF_INPUTS)

    @property
    def is_of_stack(self) -> bool:
        """Return whether it is a small part of the tensor, from the first step on."""
        return bool(self.transforms) and isinstance(self.transforms[0], Nth)

    def of(self, loaded: torch.Tensor, read: Read = _read_nothing, device: torch.device | None = None) -> torch.Tensor:
        """Return the piece of a checkpoint's tensor. `ShapeError` if that cannot be made.

        read: returns another one of the checkpoint's, None if there is no such. device: where one of a stack is moved
        to, if not None, before all else is done: of the stack no more than that is read.
        """
        for step in self.transforms:
            if not isinstance(step, With):
                loaded = step(loaded)
                if device is not None and isinstance(step, Nth):
                    loaded = loaded.to(device)
                continue
            others = [read(name) for name in step.names]
            if not step.optional and any(other is None for other in others):
                absent = ", ".join(name for name, other in zip(step.names, others, strict=True) if other is None)
                raise ShapeError(f"needs {absent}, which the checkpoint does not have")
            loaded = step.function(loaded, *others)
        return loaded


@dataclass(frozen=True)
class Nth:
    """Take one of a stack of `count`, or a number that is of all of them.

    is_flat: the stack's rows follow each other in the first dimension.
    """

    index: int
    count: int
    is_flat: bool = False

    def __call__(self, loaded: torch.Tensor) -> torch.Tensor:
        if loaded.numel() == 1:
            return loaded
        if self.is_flat and len(loaded) % self.count == 0:
            loaded = loaded.unflatten(0, (self.count, -1))
        if len(loaded) != self.count:
            raise ShapeError(f"is a stack of {len(loaded)}, the model has {self.count} experts")
        return loaded[self.index]


class Rule(Protocol):
    """One step of the way."""

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        """Yield what becomes of `piece`: itself where the rule does not apply, nothing where it is to be ignored."""


@dataclass(frozen=True)
class Convert:
    """Bring a quantized checkpoint's tensors into the layout of `kernels.quantized`."""

    quantization: Quantization

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        for name, transforms in self.quantization.converted(piece.name):
            yield Piece(name, (*piece.transforms, *transforms), piece.index)


@dataclass(frozen=True)
class Beside:
    """Read what a format needs beside one of a stack out of the stacks that the file has of it.

    file_name: turns the names that the format gives them into the file's. turned: returns one of a stack, of such a
    name, outputs first.
    """

    file_name: Callable[[str], str]
    turned: Callable[[str, torch.Tensor], torch.Tensor]

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        if piece.is_of_stack:
            steps = [self._of_stack(step, piece.transforms[0]) for step in piece.transforms]
            piece = Piece(piece.name, tuple(steps), piece.index)
        yield piece

    def _of_stack(self, step: Transform | With, nth: Transform | With) -> Transform | With:
        names = tuple(map(self.file_name, step.names)) if isinstance(step, With) else ()
        if not isinstance(step, With) or isinstance(nth, With) or names == step.names:
            return step  # it needs nothing, or names a stack itself

        def function(loaded: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
            pairs = zip(names, others, strict=True)
            return step.function(
                loaded, *(other if other is None else self.turned(n, nth(other)) for n, other in pairs)
            )

        return With(names, function, step.optional)


@dataclass(frozen=True)
class Rename:
    """Replace what the regular expression `pattern` finds in a name, once, by `to`."""

    pattern: str
    to: str

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        yield Piece(re.sub(self.pattern, self.to, piece.name, count=1), piece.transforms, piece.index)


@dataclass(frozen=True)
class Ignore:
    """Drop tensors whose name `pattern` finds: what nobody reads must be named, nothing is dropped silently."""

    pattern: str

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        if not re.search(self.pattern, piece.name):
            yield piece


@dataclass(frozen=True)
class Split:
    """Cut the rows of a tensor that holds several: `into` are their names, in order, in place of `name`.

    sizes: the share of the rows that each has, such as (heads, kv_heads, kv_heads). num_groups: so many groups of rows
    follow each other, and each is cut so, such as one group a KV head.
    """

    name: str
    into: tuple[str, ...]
    sizes: tuple[int, ...]
    num_groups: int = 1

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        if not re.search(rf"\b{re.escape(self.name)}\b", piece.name):
            yield piece
            return
        start, total = 0, sum(self.sizes)
        for part, size in zip(self.into, self.sizes, strict=True):
            cut = (_cut(start, size, total, self.num_groups),) if piece.has_rows else ()
            name = re.sub(rf"\b{re.escape(self.name)}\b", part, piece.name)
            yield Piece(name, (*piece.transforms, *cut), piece.index)
            start += size


@dataclass(frozen=True)
class Transpose:
    """Transpose matrices whose name `pattern` finds: they are stored [inputs, outputs]."""

    pattern: str

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        if re.search(self.pattern, piece.name):
            piece = Piece(piece.name, (*piece.transforms, torch.t), piece.index)
        yield piece


@dataclass(frozen=True)
class Interleave:
    """Reorder the rows of heads whose rotary pairs lie side by side, so that pairs are halves of a head.

    Scores do not change if the rows of queries and keys are reordered alike. head_dim, rotary_dim: rows of a head, and
    those of them, the first ones from `start` on, that are rotated. dim: of the tensor, that has the rows.
    """

    pattern: str
    head_dim: int
    rotary_dim: int
    dim: int = 0
    start: int = 0

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        if piece.has_rows and re.search(self.pattern, piece.name):
            piece = Piece(piece.name, (*piece.transforms, self._reorder), piece.index)
        yield piece

    def _reorder(self, loaded: torch.Tensor) -> torch.Tensor:
        if loaded.numel() == 1:  # a scale of all rows
            return loaded
        rows = loaded.movedim(self.dim, 0)
        heads = rows.reshape(-1, self.head_dim, *rows.shape[1:])
        before, pairs, after = heads.split(
            (self.start, self.rotary_dim, self.head_dim - self.start - self.rotary_dim), 1
        )
        reordered = torch.cat((before, pairs[:, ::2], pairs[:, 1::2], after), dim=1)
        return reordered.reshape(rows.shape).movedim(0, self.dim)


@dataclass(frozen=True)
class Copy:
    """Load a tensor twice, the second time under the name in which `to` replaces what `pattern` finds."""

    pattern: str
    to: str

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        yield piece
        if re.search(self.pattern, piece.name):
            yield Piece(re.sub(self.pattern, self.to, piece.name, count=1), piece.transforms, piece.index)


@dataclass(frozen=True)
class Stack:
    """Put tensors that are numbered into one stack: the first group of `pattern` is the number, `to` the new name."""

    pattern: str
    to: str

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        match = re.search(self.pattern, piece.name)
        if match is None:
            yield piece
        else:
            name = piece.name[: match.start()] + self.to + piece.name[match.end() :]
            yield Piece(name, piece.transforms, int(match[1]))


@dataclass(frozen=True)
class Unstack:
    """Take a tensor whose first dimension is a stack of `count` apart; its name becomes `to`, `pattern`'s place.

    is_flat: see `Nth`.
    """

    pattern: str
    to: str
    count: int
    is_flat: bool = False

    def __call__(self, piece: Piece) -> Iterable[Piece]:
        if re.search(self.pattern, piece.name) is None:
            yield piece
            return
        name = re.sub(self.pattern, self.to, piece.name, count=1)
        for i in range(self.count):
            yield Piece(name, (*piece.transforms, Nth(i, self.count, self.is_flat)), i)


def _cut(start: int, size: int, total: int, num_groups: int) -> Transform:
    def cut(loaded: torch.Tensor) -> torch.Tensor:
        if loaded.numel() == 1:  # a scale of all rows
            return loaded
        if len(loaded) % (total * num_groups):
            raise ShapeError(f"has {len(loaded)} rows, which are no multiple of {total * num_groups}")
        groups = loaded.unflatten(0, (num_groups, -1))
        unit = groups.shape[1] // total
        part: torch.Tensor = groups.narrow(1, start * unit, size * unit).flatten(0, 1)
        return part

    return cut


def pieces_of(name: str, rules: Sequence[Rule]) -> list[Piece]:
    """Return what the rules make of a checkpoint's tensor; [] if it is to be ignored."""
    pieces = [Piece(name)]
    for rule in rules:
        pieces = [new for piece in pieces for new in (rule(piece) if piece.name != CHECKED else (piece,))]
    return pieces


# A tied checkpoint may name the one weight as the embedding's or as the head's.
TIED_HEAD = Rename(r"^lm_head\.", "model.embed_tokens.")
# Buffers that old checkpoints hold and nobody reads.
COMMON_NAMES: tuple[Rule, ...] = (Ignore(r"(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias)$"),)
# Megatron's names of attention, and of an MLP without a gate.
MEGATRON_NAMES: tuple[Rule, ...] = (
    Rename(r"\.self_attention\.dense\.", ".self_attn.o_proj."),
    Rename(r"\.self_attention\.", ".self_attn."),
    Rename(r"\.dense_h_to_4h\.", ".up_proj."),
    Rename(r"\.dense_4h_to_h\.", ".down_proj."),
)
# Of a model that also reads images or sounds: towers and what leads from them to the decoder are not loaded.
TOWERS = (
    "vision_tower", "audio_tower", "multi_modal_projector", "embed_vision", "embed_audio", "visual", "vision_model",
    "connector", "image_newline", "vision_resampler", "mm_projector",
    "vision_encoder", "vision_projection", "mlp1", "mlp_AR", "projector",
    "sam_model", "qwen2_model", "view_seperator",
)  # fmt: skip
TOWER_NAMES = rf"^(model\.)?({'|'.join(TOWERS)})(\.|$)"
LANGUAGE_HALF: tuple[Rule, ...] = (
    Ignore(TOWER_NAMES),
    Rename(r"^(model\.language_model|language_model\.model|model\.text_model)\.", "model."),
    Rename(r"^language_model\.lm_head\.", "lm_head."),
)


def ignored_behind(raw: dict[str, Any]) -> Ignore:
    """Return the rule that drops the layers behind the last one, which predict several tokens at once.

    raw: config.json, which says how many they are, or nothing where there is one.
    """
    first = raw["num_hidden_layers"]
    count = max(raw.get("num_nextn_predict_layers", raw.get("num_mtp_modules", 1)), 1)
    return Ignore(rf"^model\.layers\.({'|'.join(str(first + i) for i in range(count))})\.")


def stacked_names(num_experts: int) -> tuple[Rule, ...]:
    """Return the rules for experts in one tensor each, outputs first, as transformers 5 has them in memory.

    What it saves has them one by one; what trainers save or send of a model that runs may not.
    """
    return (
        Unstack(r"(\.experts\.(?:gate_up|down)_proj)$", r"\1.weight", num_experts),
        Split("experts.gate_up_proj", ("experts.gate_proj", "experts.up_proj"), (1, 1)),
    )


def fused_names(num_heads: int, num_kv_heads: int) -> tuple[Rule, ...]:
    """Return the rules of a checkpoint whose queries, keys and values are one tensor, and gate and up another."""
    return (
        Split("qkv_proj", ("q_proj", "k_proj", "v_proj"), (num_heads, num_kv_heads, num_kv_heads)),
        Split("gate_up_proj", ("gate_proj", "up_proj"), (1, 1)),
    )
