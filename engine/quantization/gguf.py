"""GGUF files kept packed: what `engine.checkpoint.gguf_convert` writes, each module in the format of its tensor."""

from collections.abc import Mapping
from typing import Any

import torch

from engine.errors import ModelError
from engine.quantization import DENSE, Quantization, Scheme
from engine.quantization.packed import Packed
from kernels.quantized import Format

ENTRIES = ("code", "group_size", "has_minimum", "table", "scale_dtype")  # of `Format`, that a GGUF type may set
SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32}


def config_of(forms: Mapping[str, Format]) -> dict[str, Any]:
    """Return config.json's `quantization_config` for the formats of modules, by the model's names for them."""
    modules: dict[Format, list[str]] = {}
    for module, form in forms.items():
        modules.setdefault(form, []).append(module)
    return {
        "quant_method": "gguf",
        "formats": [
            {entry: plain(getattr(form, entry)) for entry in ENTRIES} | {"modules": names}
            for form, names in modules.items()
        ],
    }


def names_of(form: Format) -> tuple[tuple[str, str], ...]:
    """Return what a converted file calls fields that do not have their own name there.

    Codes of a table have another: else a running model could be given them as new weights, in place of integers.
    """
    return () if form.table is None else (("codes", f"{form.table}_codes"),)


def plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


class GGUF(Quantization):
    """The formats of a converted file; what it does not list is dense."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        """Read config.json's `quantization_config`. `ModelError` if it is not what `config_of` writes."""
        self.schemes: dict[str, Scheme] = {}
        try:
            for entry in raw["formats"]:
                named = {name: entry[name] for name in ENTRIES} | {"scale_dtype": SCALE_DTYPES[entry["scale_dtype"]]}
                form = Format(**named)
                self.schemes |= dict.fromkeys(entry["modules"], Packed(form, names_of(form)))
        except (LookupError, TypeError) as error:
            raise ModelError(f"quantization_config of a GGUF file is broken: {type(error).__name__}: {error}") from None

    def scheme_of(self, module: str) -> Scheme:
        return self.schemes.get(module, DENSE)

    def scheme_of_embedding(self, module: str) -> Scheme:
        return self.scheme_of(module)
