"""8-bit floats as DeepSeek, Qwen, Mistral and Hugging Face store them, and FBGEMM's."""

from collections.abc import Collection, Mapping
from typing import Any

from engine.errors import ModelError, shown
from engine.quantization.floats import stored_fp8
from engine.quantization.modules import Modules
from engine.quantization.packed import ByModule, Stored, entry, is_head

SCALES = ("weight_scale_inv", "weight_scale")
INPUT_SCALES = ("input_scale", "activation_scale")
MAX_BLOCK_ROWS = 128


class FP8(ByModule):
    """Scales of blocks (`weight_block_size`), of rows, or one for all. They multiply, whatever they are called."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Read config.json's `quantization_config`. `ModelError` for what is not supported."""
        super().__init__()
        activations = entry(raw, "activation_scheme", str, "dynamic")
        if (kind := entry(raw, "fmt", str, "e4m3")) not in ("e4m3", "float8_e4m3fn"):
            raise ModelError(f"fp8 of kind {kind!r} is not supported, only e4m3")
        if activations not in ("dynamic", "static"):
            raise ModelError(f"fp8's activation_scheme {activations!r} is not supported, only dynamic and static")
        block = checked_block(raw.get("weight_block_size"), "weight_block_size")
        self.excluded = Modules(raw.get("modules_to_not_convert") or raw.get("ignored_layers"), "ignored_layers")
        self.everywhere = stored_fp8(
            scales=SCALES if block else SCALES[::-1],
            block=block,
            has_input_scale=activations == "static" and block is None,
            input_scales=INPUT_SCALES,
        )

    def find(self, names: Collection[str]) -> Stored | None:
        return None if is_head(names) or names in self.excluded else self.everywhere


class FBGEMM(ByModule):
    """Scales of rows, inputs rounded by token."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        super().__init__()
        self.excluded = Modules(raw.get("modules_to_not_convert"), "modules_to_not_convert")
        self.everywhere = stored_fp8()

    def find(self, names: Collection[str]) -> Stored | None:
        return None if is_head(names) or names in self.excluded else self.everywhere


def checked_block(value: Any, what: str) -> tuple[int, int] | None:
    """Return the rows and columns of a block. `ModelError`, which names `what`, if there are no such blocks."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        raise ModelError(f"quantization_config: {what} must be two sizes, rows and columns, got {shown(value)}")
    if value[0] > MAX_BLOCK_ROWS:
        raise ModelError(f"blocks of {value[0]} rows ({what}) are not supported, only of up to {MAX_BLOCK_ROWS}")
    return value[0], value[1]
