"""The direction of dependencies: server -> engine -> cache -> kernels, and who may know which library."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.structure import circles, imported_names

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": {"kernels"},
    "cache": {"cache", "kernels"},
    "engine": {"engine", "cache", "kernels"},
    "server": {"server", "engine", "cache", "kernels"},
}
OURS = frozenset(MAY_IMPORT)
ONLY_IN = {"triton": "kernels", "flashinfer": "kernels", "aiohttp": "server"}
# What everybody in a package may import: its words.
WORDS = {
    "engine": {
        "engine.config",
        "engine.errors",
        "engine.request",
        "engine.media",
        "engine.state",
        "engine.views",
        "engine.model_config",
        "engine.config_file",
        "engine.rope_config",
    },
    "server": {
        "server.config",
        "server.command_line",
        "server.foreign_flags",
        "server.foreign_tables",
        "server.commands",
        "server.parser_names",
    },
}
# Wing -> what else of its package it may import. The rest of the engine drives these: loop, engine, build, ...
WINGS = {
    "engine.text": set(),
    "engine.schedule": {"engine.text"},
    "engine.quantization": set(),
    "engine.layers": {"engine.quantization"},
    "engine.models": {"engine.layers", "engine.quantization"},
    "engine.checkpoint": {"engine.models", "engine.layers", "engine.quantization", "engine.text"},
    "engine.vision": {"engine.checkpoint", "engine.models", "engine.text"},
    "engine.step": {"engine.schedule", "engine.models", "engine.layers", "engine.text"},
    "engine.ranks": {"engine.step", "engine.checkpoint", "engine.rank_maintenance"},
    "server.parsers": {"server.reading"},
    "server.reading": {"server.http", "server.media", "server.parsers"},
    "server.media": {"server.http"},
    "server.http": {"server.reading"},
    "server.apis": {"server.http", "server.media", "server.reading", "server.parsers"},
    "server.pages": set(),
    "server.watch": {"server.apis", "server.http", "server.pages", "server.reading", "server.parsers"},
    "server.fleet": {"server.__main__", "server.app", "server.http", "server.reading"},
    "server.lang": {"server.apis", "server.http", "server.media", "server.reading"},
    "server.terminal": set(),
    "server.installed": {"server.console", "server.lang"},
}


def imported_modules(source: str, package: str = "") -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import and every `torch.cuda` in `source`, wherever in the file it stands.

    `from a import b` gives `a.b`: b may be a module. `package` is what a relative import starts from.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((name, node.lineno) for name in imported_names(node, package))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda":
            yield "torch.cuda", node.lineno


def is_in(module: str, packages: tuple[str, ...] | set[str] | frozenset[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def files_of(*folders: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def imports_of(file: str) -> list[tuple[str, int]]:
    return list(imported_modules((ROOT / file).read_text(), ".".join(Path(file).parent.parts)))


def import_graph(*folders: str) -> dict[str, set[str]]:
    """Return the modules that each module of `folders` imports at any place, inside functions too."""
    modules = {
        file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in files_of(*folders)
    }
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for module, file in modules.items():
        for name, _ in imports_of(file):
            while name and name not in modules:  # `a.b` of `from a import b` may be a name in module `a`
                name = name.rpartition(".")[0]
            if name and name != module:
                graph[module].add(name)
    return graph


def test_no_modules_import_each_other() -> None:
    assert circles(import_graph(*OURS, "bench", "tests")) == []


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


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_imports_what_stands_below_it_and_never_who_drives_it(wing: str) -> None:
    package = wing.partition(".")[0]
    allowed = {wing, *WORDS[package], *WINGS[wing]}
    wrong = [
        f"{file}:{line} {name}"
        for file in files_of(wing.replace(".", "/"))
        for name, line in imports_of(file)
        if is_in(name, {package}) and not is_in(name, allowed)
    ]
    assert not wrong


def test_every_wing_has_its_line() -> None:
    folders = {f"{package}.{path.name}" for package in WORDS for path in (ROOT / package).iterdir() if path.is_dir()}
    assert {wing for wing in folders if not wing.endswith("__pycache__")} == {*WINGS, "engine.replicas"}


def test_the_scheduler_has_no_device_no_loop_and_no_clock() -> None:
    for file in files_of("engine/schedule"):
        names = {name for name, _ in imports_of(file)}
        assert not {n for n in names if is_in(n, {"torch", "asyncio", "time", "datetime", "threading"})}, file


def test_nobody_in_the_engine_knows_both_asyncio_and_cuda() -> None:
    for file in files_of("engine"):
        names = {name for name, _ in imports_of(file)}
        assert not all(any(is_in(n, {library}) for n in names) for library in ("asyncio", "torch.cuda")), file


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


def test_server_has_no_import_circle_not_even_a_lazy_one() -> None:
    """Imports inside functions and under TYPE_CHECKING count."""
    names = {file: file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in files_of("server")}
    known = set(names.values())

    def home(name: str) -> str | None:
        while name and name not in known:
            name = name.rpartition(".")[0]
        return name or None

    arrows = {name: {home(target) for target, _ in imports_of(file)} - {None, name} for file, name in names.items()}
    while leaves := {name for name, targets in arrows.items() if not targets & arrows.keys()}:
        arrows = {name: targets for name, targets in arrows.items() if name not in leaves}
    assert not arrows
