"""Triton's interpreter without what it does over and over for nothing: tests of kernels take a third of the time."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter


def hasten_interpreter() -> None:
    """Change Triton's language once for every function, not at every call of one, and let sums overflow unseen.

    What it computes of overflows, it would only assert in its debug mode.
    """
    patch_lang, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor

    def patch_tensor_with_index(tensor: Any, scope: Any) -> None:
        """Add to Triton 3.6, whose scalars are arrays of one element, which numpy 2.4 no longer takes for an int."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    @functools.cache
    def patch_once(function: Callable[..., Any]) -> Any:
        patch_lang(function)
        return interpreter._LangPatchScope()  # restores nothing: whatever uses the language here is interpreted

    interpreter._patch_lang_tensor = patch_tensor_with_index
    interpreter._patch_lang = patch_once
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
