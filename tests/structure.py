"""Print how the code hangs together: rooms, floors, arrows and circles of imports, the largest class and function.

    python -m tests.structure [FOLDER]

A room is a folder with modules in it. Every import counts, wherever it stands in a file; imports that only a type
checker reads are left out. A room's floor is 0 if it imports no other room, else one more than the highest floor it
imports; rooms of one circle share a floor.
"""

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

PACKAGES = ("server", "engine", "cache", "kernels")
Node = TypeVar("Node", bound=Hashable)
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.comprehension, ast.match_case)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_files(root: Path, packages: Iterable[str] = PACKAGES) -> dict[str, Path]:
    """Return every module under `root`, by its dotted name; a package's `__init__` has the package's name."""
    files = {}
    for path in sorted(path for package in packages for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def import_statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that run, at the top of a file or inside a function; not those under `TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            yield from import_statements(node)


def imported_names(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    """Return the dotted names that an import may mean: `from a import b` gives `a.b`, relative ones made absolute."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    base = ".".join([*parts, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def import_graph(root: Path, packages: Iterable[str] = PACKAGES) -> dict[str, set[str]]:
    """Return, for each module of `packages` under `root`, the modules of these packages that it imports."""
    files = module_files(root, packages)
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = {
            name
            for node in import_statements(ast.parse(path.read_text()))
            for name in imported_names(node, package)
        }  # fmt: skip
        targets = {name if name in files else name.rpartition(".")[0] for name in names}
        graph[module] = (targets & files.keys()) - {module}
    return graph


def circles(graph: Mapping[Node, Iterable[Node]]) -> list[list[Node]]:
    """Return the sets of two or more nodes each of which reaches all others (Tarjan 1972), in the graph's order."""
    index: dict[Node, int] = {}
    lowest: dict[Node, int] = {}
    stack: list[Node] = []
    found: list[list[Node]] = []

    def visit(node: Node) -> None:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], index[target])
        if lowest[node] == index[node]:
            members = set(stack[stack.index(node) :])
            del stack[stack.index(node) :]
            if len(members) > 1:
                found.append([member for member in graph if member in members])

    for node in graph:
        if node not in index:
            visit(node)
    return found


def room_arrows(root: Path) -> dict[str, Counter[str]]:
    """Return for each room the rooms it imports, with the number of module pairs between them."""
    files = module_files(root)
    room_of = {module: str(path.parent.relative_to(root)) for module, path in files.items()}
    arrows: dict[str, Counter[str]] = {room: Counter() for room in sorted(set(room_of.values()))}
    for module, targets in import_graph(root).items():
        arrows[room_of[module]].update(room_of[target] for target in targets if room_of[target] != room_of[module])
    return arrows


def room_floors(arrows: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """Return each room's floor."""
    circle_of = {room: frozenset(circle) for circle in circles(arrows) for room in circle}
    floors: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in floors:
            together = circle_of.get(room, frozenset({room}))
            below = {target for member in together for target in arrows[member]} - together
            floors.update(dict.fromkeys(together, 1 + max(map(floor, below), default=-1)))
        return floors[room]

    return {room: floor(room) for room in arrows}


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """Yield the nodes of a function without those of the functions and classes inside it."""
    todo: list[ast.AST] = list(function.body)
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, Function | ast.ClassDef | ast.Lambda):
            todo.extend(ast.iter_child_nodes(node))


def num_lines(node: ast.ClassDef | Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def classes_of(root: Path) -> list[tuple[int, int, str]]:
    """Return (lines, methods, place) of every class, longest first."""
    return sorted(
        (
            (num_lines(node), sum(isinstance(child, Function) for child in node.body), f"{module}.{node.name}")
            for module, path in module_files(root).items()
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ClassDef)
        ),
        reverse=True,
    )


def functions_of(root: Path) -> list[tuple[int, int, str]]:
    """Return (lines, branches, place) of every function, longest first."""
    return sorted(
        (
            (
                num_lines(node),
                sum(isinstance(child, BRANCHES) for child in own_nodes(node)),
                f"{module}.{node.name}:{node.lineno}",
            )
            for module, path in module_files(root).items()
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, Function)
        ),
        reverse=True,
    )


def report(root: Path, top: int = 5) -> str:
    """Return the whole picture as text."""
    files, graph, arrows = module_files(root), import_graph(root), room_arrows(root)
    floors = room_floors(arrows)
    sizes = {module: len(path.read_text().splitlines()) for module, path in files.items()}
    rooms = Counter(str(path.parent.relative_to(root)) for path in files.values())
    room_lines: Counter[str] = Counter()
    for module, path in files.items():
        room_lines[str(path.parent.relative_to(root))] += sizes[module]
    num_arrows, num_pairs = sum(map(len, arrows.values())), sum(map(len, graph.values()))
    lines = [
        f"{len(rooms)} rooms, {len(files)} modules, {sum(sizes.values()):,} lines; "
        f"{max(floors.values()) + 1} floors; {num_arrows} arrows between rooms, {num_pairs} between modules",
        "",
    ]
    for room in sorted(rooms, key=lambda room: (-floors[room], room)):
        to = ", ".join(f"{target} {count}" for target, count in arrows[room].most_common())
        lines.append(f"floor {floors[room]}  {room} ({rooms[room]} modules, {room_lines[room]:,} lines) -> {to or '-'}")
    for kind, found in (("modules", circles(graph)), ("rooms", circles(arrows))):
        lines += ["", f"circles of {kind}: {len(found) or 'none'}", *(f"  {', '.join(circle)}" for circle in found)]
    longest, widest = classes_of(root)[:top], sorted(classes_of(root), key=lambda c: c[1], reverse=True)[:top]
    functions = functions_of(root)
    branchy = sorted(functions, key=lambda function: function[1], reverse=True)
    lines += ["", "largest classes, lines:", *(f"  {n:4} {place} ({m} methods)" for n, m, place in longest)]
    lines += ["largest classes, methods:", *(f"  {m:4} {place} ({n} lines)" for n, m, place in widest)]
    lines += ["largest functions, lines:", *(f"  {n:4} {place} ({b} branches)" for n, b, place in functions[:top])]
    lines += ["largest functions, branches:", *(f"  {b:4} {place} ({n} lines)" for n, b, place in branchy[:top])]
    lines += [f"functions of more than 12 branches: {sum(b > 12 for _, b, _ in functions)}"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parent.parent)
    print(report(parser.parse_args().root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
