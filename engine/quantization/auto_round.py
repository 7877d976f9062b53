"""Checkpoints of auto-round (Cheng et al. 2023), which are packed as GPTQ's or AWQ's are."""

from collections.abc import Collection, Mapping
from typing import Any

from engine.errors import ModelError
from engine.quantization.awq import stored_awq
from engine.quantization.gptq import Options, stored_gptq
from engine.quantization.modules import own_names, regular_expression
from engine.quantization.packed import ByModule, Stored, is_head, objects

PLAIN_BITS = 16  # as many or more: the module is not quantized
OWN_PACKING = "auto_round"


class AutoRound(ByModule):
    """`packing_format` auto_round, auto_round:auto_gptq or auto_round:auto_awq."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Read config.json's `quantization_config`. `ModelError` for what is not supported."""
        super().__init__()
        packing = str(raw.get("packing_format") or raw.get("backend") or "auto_round:auto_gptq").lower()
        is_known = packing == OWN_PACKING or "gptq" in packing or "awq" in packing
        if raw.get("data_type", "int") != "int" or not is_known:
            raise ModelError(
                f"auto-round's data_type {raw.get('data_type', 'int')!r}, packing_format {packing!r}, is not "
                "supported: only int, packed as auto_round, auto_gptq or auto_awq"
            )
        self.is_awq = "awq" in packing
        self.zero_offset = 1 if "gptq" in packing else 0  # its own packing is that of GPTQ's second version
        self.raw = raw
        self.extra = [
            (name, regular_expression(name, "extra_config"), overrides)
            for name, overrides in objects(raw, "extra_config").items()
        ]
        self.find({"model.layers.0.mlp.up_proj"})  # what is not supported is said at once

    def find(self, names: Collection[str]) -> Stored | None:
        extra = next(
            (
                overrides
                for name, pattern, overrides in self.extra
                if name in names or any(pattern.fullmatch(spelling) for spelling in own_names(names))
            ),
            None,
        )
        raw = {**self.raw, **(extra or {})}
        if extra is None and is_head(names):
            return None
        if isinstance(bits := raw.get("bits"), int) and bits >= PLAIN_BITS:
            return None
        options = Options(zero_offset=self.zero_offset).overridden(
            {name: raw.get(name) for name in ("bits", "group_size", "sym")}
        )
        if not self.is_awq:
            return stored_gptq(options)
        if options.bits != 4:
            raise ModelError(f"auto-round packed as AWQ's has 4 bits, not {options.bits}")
        return stored_awq(options.group_size)
