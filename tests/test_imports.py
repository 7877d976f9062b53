"""The direction of dependencies: server -> engine -> cache -> kernels, and who may know which library."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": {"kernels"},
    "cache": {"cache", "kernels"},
    "engine": {"engine", "cache", "kernels"},
    "server": {"server", "engine", "cache", "kernels"},
}
OURS = frozenset(MAY_IMPORT)
ONLY_IN = {"triton": "kernels", "flashinfer": "kernels", "aiohttp": "server"}
KNOWS_ASYNCIO_AND_CUDA = "engine/loop.py"
# engine -> loop -> { scheduler -> cache }, { model_runner -> models -> layers -> kernels }
NEVER_IN_ENGINE = {
    "engine/layers/": ("engine.models", "engine.step.model_runner", "engine.schedule", "engine.loop", "engine.engine"),
    "engine/models/": ("engine.step.model_runner", "engine.schedule.scheduler", "engine.loop", "engine.engine"),
    "engine/step/": ("engine.schedule.scheduler", "engine.loop", "engine.engine"),
    "engine/schedule/": ("engine.models", "engine.step", "engine.loop", "engine.engine"),
    "engine/loop.py": ("engine.engine",),
}  # fmt: skip


def imported_modules(source: str, package: str = "") -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import and every `torch.cuda` in `source`, wherever in the file it stands.

    `from a import b` gives `a.b`: b may be a module. `package` is what a relative import starts from.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda":
            yield "torch.cuda", node.lineno


def is_in(module: str, packages: tuple[str, ...] | set[str] | frozenset[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def files_of(*folders: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports_of(file: str) -> list[tuple[str, int]]:
    return list(imported_modules((ROOT / file).read_text(), ".".join(Path(file).parent.parts)))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_from_server_to_engine_to_cache_to_kernels(folder: str) -> None:
    forbidden = OURS - MAY_IMPORT[folder] | {"tests", "bench"}
    wrong = [
        f"{file}:{line} {name}"
        for file in files_of(folder)
        for name, line in imports_of(file)
        if is_in(name, forbidden)
    ]
    assert not wrong


@pytest.mark.parametrize(("library", "home"), ONLY_IN.items())
def test_a_library_is_known_in_one_package_only(library: str, home: str) -> None:
    wrong = [
        f"{file}:{line} {name}"
        for file in files_of(*(OURS - {home}))
        for name, line in imports_of(file)
        if is_in(name, {library})
    ]
    assert not wrong


@pytest.mark.parametrize("place", NEVER_IN_ENGINE)
def test_inside_the_engine_nobody_imports_who_drives_it(place: str) -> None:
    wrong = [
        f"{file}:{line} {name}"
        for file in files_of("engine")
        if file.startswith(place)
        for name, line in imports_of(file)
        if is_in(name, NEVER_IN_ENGINE[place])
    ]
    assert not wrong


def test_the_scheduler_has_no_device_no_loop_and_no_clock() -> None:
    names = {name for file in files_of("engine/schedule") for name, _ in imports_of(file)}
    assert not {name for name in names if is_in(name, {"torch", "asyncio", "time", "datetime", "threading"})}


def test_only_one_file_knows_both_asyncio_and_cuda() -> None:
    for file in files_of("engine"):
        names = {name for name, _ in imports_of(file)}
        knows_both = any(is_in(n, {"asyncio"}) for n in names) and any(is_in(n, {"torch.cuda"}) for n in names)
        assert not knows_both or file == KNOWS_ASYNCIO_AND_CUDA, file


def test_importing_kernels_imports_nothing() -> None:
    # transformers looks for a Hugging Face package of this name and may import ours.
    assert imports_of("kernels/__init__.py") == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import triton.language as tl", "triton.language"),
        ("def f():\n    from engine.schedule import scheduler", "engine.schedule.scheduler"),
        ("from ..engine.request import Request", "server.engine.request.Request"),
        ("from . import pool", "server.lang.pool"),
        ("import torch\nevent = torch.cuda.Event()", "torch.cuda"),
    ],
)
def test_the_walk_sees_an_import_in_every_form(source: str, module: str) -> None:
    assert module in {name for name, _ in imported_modules(source, "server.lang")}
