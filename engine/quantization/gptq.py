"""GPTQ checkpoints (Frantar et al. 2022): 2, 3, 4 or 8 bits, words along the inputs."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.errors import ModelError
from engine.quantization import CHECKED, Transform
from engine.quantization.bits import codes_of, turned, turned_scales, zeros_of
from engine.quantization.marlin import stored_marlin
from engine.quantization.modules import Modules, own_names, regular_expression
from engine.quantization.packed import ByModule, Stored, entry, is_head, objects
from kernels.quantized import Format
from kernels.weights import ShapeError

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Options:
    """Settings that may differ from module to module."""

    bits: int = 4
    group_size: int = 128  # 0: all of a row
    sym: bool = False  # zeros are all 2^(bits - 1), and those of the file are not read
    desc_act: bool = False  # groups are of inputs that g_idx puts together
    zero_offset: int = 1  # what a zero is more than what is stored: 0 in GPTQ's second version

    def overridden(self, raw: Mapping[str, Any]) -> "Options":
        """Return the options with those of a configuration, or of a part of one, in their place."""
        bits = entry(raw, "bits", int, self.bits)
        if bits not in BITS:
            raise ModelError(f"GPTQ of {bits} bits is not supported, only {', '.join(map(str, BITS))}")
        return replace(
            self,
            bits=bits,
            group_size=max(entry(raw, "group_size", int, self.group_size), 0),
            sym=entry(raw, "sym", bool, self.sym),
            desc_act=entry(raw, "desc_act", bool, self.desc_act),
        )


def stored_gptq(options: Options) -> Stored:
    """Return how GPTQ stores a module."""
    bits, has_zero = options.bits, not options.sym
    has_order = options.desc_act and options.group_size > 0
    zeros = ("zero", lambda words: zeros_of(words, bits, added=options.zero_offset).t())
    form = Format(
        "int4" if bits <= 4 else "int8",
        options.group_size,
        has_zero=has_zero,
        scale_dtype=torch.float16,
        has_order=has_order,
    )
    return Stored(
        form,
        {
            "qweight": ("codes", lambda words: codes_of(turned(words), bits, has_zero=has_zero)),
            "qzeros": zeros if has_zero else None,
            "scales": ("scale", turned_scales),
            "g_idx": ("order",) if has_order else (CHECKED, in_order(options.group_size)),
        },
    )


def in_order(group_size: int) -> Transform:
    """Return the check that groups are of consecutive inputs, where they are said to be."""

    def check(g_idx: torch.Tensor) -> torch.Tensor:
        size = group_size or max(g_idx.numel(), 1)
        if not torch.equal(g_idx.long(), torch.arange(g_idx.numel(), device=g_idx.device) // size):
            raise ShapeError(f"does not number groups of {size} inputs one after another, which desc_act false says: "
                             "correct desc_act in quantization_config")  # fmt: skip
        return g_idx

    return check


class GPTQ(ByModule):
    """Versions 1 and 2, and what was repacked for Marlin's kernels."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Read config.json's `quantization_config`. `ModelError` for what is not supported."""
        super().__init__()
        version = str(raw.get("checkpoint_format") or raw.get("format") or "gptq").lower()
        if raw.get("is_marlin_format") or raw.get("quant_method") == "marlin":
            version = "marlin"
        if version not in ("gptq", "gptq_v2", "marlin"):
            raise ModelError(f"GPTQ's checkpoint_format {version!r} is not supported, only gptq, gptq_v2 and marlin")
        self.is_marlin = version == "marlin"
        self.options = Options(zero_offset=0 if version == "gptq_v2" else 1).overridden(raw)
        self.has_head = entry(raw, "lm_head", bool, False)
        self.excluded = Modules(raw.get("modules_to_not_convert"), "modules_to_not_convert")
        self.included = Modules(_flat(raw.get("modules_in_block_to_quantize")), "modules_in_block_to_quantize")
        self.dynamic = [
            (regular_expression(pattern.removeprefix("+:").removeprefix("-:"), "dynamic"), pattern[:2] == "-:", over)
            for pattern, over in objects(raw, "dynamic").items()
        ]

    def find(self, names: Collection[str]) -> Stored | None:
        is_included = not self.included.names or names in self.included
        if names in self.excluded or not (self.has_head if is_head(names) else is_included):
            return None
        options = self.options
        for pattern, is_skipped, overrides in self.dynamic:
            if any(pattern.match(name) for name in own_names(names)):
                if is_skipped:
                    return None
                options = options.overridden(overrides)
                break
        return stored_marlin(options.group_size) if self.is_marlin else stored_gptq(options)


def _flat(lists: Any) -> Any:
    """Return a list of lists of names as one list."""
    if not isinstance(lists, list):
        return lists
    return [name for names in lists for name in (names if isinstance(names, list) else [names])]
