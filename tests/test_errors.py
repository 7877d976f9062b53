"""The tree that engine/errors.py draws is the tree that exists."""

import ast
import builtins
import functools
import re
from pathlib import Path

import engine.errors

ROOT = Path(__file__).parent.parent
OWN = "engine.errors"
ENTRY = re.compile(r"^(?P<branches>(?:│   |    )*[├└]── )?(?P<name>[A-Z]\w+) +(?P<status>\d{3}|---)?(?P<rest>.*)$")


def drawn_classes() -> dict[str, tuple[str, str, str]]:
    """Name -> (parent, module, status) as the docstring of engine/errors.py draws them."""
    tree, path = {}, list[str]()
    for line in (engine.errors.__doc__ or "").split("\n\n", 2)[2].splitlines():
        if (entry := ENTRY.match(line)) is None:
            assert not line.strip(), f"no entry of the tree: {line}"
            continue
        depth = len(entry["branches"] or "") // 4
        path[depth:] = [entry["name"]]
        module = re.match(r"\s*(server|engine|cache|kernels)\.[\w.]+", entry["rest"])
        parent = path[depth - 1] if depth else "Exception"
        tree[entry["name"]] = parent, module[0].strip() if module else OWN, entry["status"] or ""
    tree.pop("Exception")
    return tree


def is_builtin_exception(name: str) -> bool:
    found = getattr(builtins, name, None)
    return isinstance(found, type) and issubclass(found, BaseException)


@functools.cache
def modules() -> list[tuple[Path, ast.Module]]:
    """Return the four packages' files, parsed."""
    files = [file for folder in ("server", "engine", "cache", "kernels") for file in (ROOT / folder).rglob("*.py")]
    return [(file, ast.parse(file.read_text())) for file in files]


def existing_classes() -> dict[str, tuple[str, str]]:
    """Name -> (parent, module) of every exception class in the four packages."""
    classes = {
        node.name: ([base.id for base in node.bases if isinstance(base, ast.Name)], file)
        for file, module in modules()
        for node in ast.walk(module)
        if isinstance(node, ast.ClassDef)
    }

    def is_exception(name: str) -> bool:
        return is_builtin_exception(name) or any(is_exception(base) for base in classes.get(name, ([],))[0])

    return {
        name: (bases[0], ".".join(file.relative_to(ROOT).with_suffix("").parts))
        for name, (bases, file) in classes.items()
        if is_exception(name)
    }


def test_the_drawn_tree_has_every_exception_class_under_its_parent_and_where_it_is_defined() -> None:
    drawn = {name: (parent, module) for name, (parent, module, _) in drawn_classes().items()}
    assert drawn == existing_classes()


def test_every_drawn_status_is_the_one_that_clients_get() -> None:
    for name, (_, module, status) in drawn_classes().items():
        if status.isdecimal():
            error_class = getattr(__import__(module, fromlist=[name]), name)
            assert error_class.status_code == int(status), name


def test_every_exception_class_is_made_somewhere() -> None:
    used = {
        node.id
        for _, module in modules()
        for made in ast.walk(module)
        if isinstance(made, (ast.Raise, ast.Call))
        for node in [getattr(made, "exc", None) or getattr(made, "func", None)]
        if isinstance(node, ast.Name)
    }
    assert existing_classes().keys() <= used
