"""`tests.cards` compiles every Triton kernel there is: one that it forgets would be seen on a GPU first."""

import importlib
import pkgutil

import kernels
from kernels.launch import Kernel
from tests.cards import CARDS, wanted_on


def all_kernels() -> dict[str, str]:
    """Return the module of each kernel that the host launches."""
    modules = [one.name for one in pkgutil.iter_modules(kernels.__path__) if one.name.startswith("triton_")]
    return {
        value.function.__name__: module
        for module in modules
        for value in vars(importlib.import_module(f"kernels.{module}")).values()
        if isinstance(value, Kernel)
    }


def test_every_kernel_is_among_those_that_are_compiled_for_a_card() -> None:
    wanted = {one.function.__name__ for one in wanted_on(CARDS[89])}
    forgotten = {name: module for name, module in all_kernels().items() if name not in wanted}
    assert not forgotten, "tests/card_launches.py launches none of these"
