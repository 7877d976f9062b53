"""The picture of the imports that `tests.structure` draws is right."""

from pathlib import Path

import pytest

from tests.structure import circles, import_graph, report, room_floors


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder of two packages: `server.a` and `server.b` import each other, one of them inside a function."""
    files = {
        "server/__init__.py": "",
        "server/a.py": "from server import b\nimport engine.deep.c\n",
        "server/b.py": "def f():\n    from .a import x\n",
        "engine/__init__.py": "",
        "engine/deep/__init__.py": "",
        "engine/deep/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import server.a\nimport os\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_an_import_counts_wherever_it_stands_and_not_for_a_type_checker_only(root: Path) -> None:
    graph = import_graph(root)
    assert graph["server.a"] == {"server.b", "engine.deep.c"}
    assert graph["server.b"] == {"server.a"}
    assert graph["engine.deep.c"] == set()


def test_a_circle_is_found_and_named_once(root: Path) -> None:
    assert circles(import_graph(root)) == [["server.a", "server.b"]]
    assert circles({1: [2], 2: [3], 3: [1, 4], 4: [5], 5: [4], 6: [6, 1]}) == [[4, 5], [1, 2, 3]]


def test_a_room_stands_above_all_it_imports(root: Path) -> None:
    assert room_floors({"a": ["b", "c"], "b": ["c", "d"], "c": [], "d": ["b"]}) == {"a": 2, "b": 1, "c": 0, "d": 1}
    assert "floor 1  server (3 modules, 4 lines) -> engine/deep 1" in report(root)
