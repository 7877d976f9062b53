"""What the README and the pages beside it promise exists."""

import ast
import dataclasses
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.models import architectures
from engine.quantization.methods import METHODS
from engine.sizes import resolve_sizes
from server.config import ServerConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted(
    str(page.relative_to(ROOT))
    for folder in (".", "engine", "server", "bench", ".github")
    for page in (ROOT / folder).glob("*.md")
)


def help_of(module: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def links_of(page: Path) -> set[Path]:
    """Return the files and folders that a page links to."""
    return {page.parent / target for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page: str) -> None:
    assert [link for link in links_of(ROOT / page) if not link.exists()] == []


def test_the_table_of_models_is_what_the_command_prints() -> None:
    section = (ROOT / "engine" / "README.md").read_text().split("### Models")[1].split("\n### ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE))
    assert rows == architectures.notes()
    assert {re.split(r"\s{2,}", line)[0] for line in architectures.describe().splitlines()[:-1]} == rows.keys()


def test_the_table_of_quantized_checkpoints_names_every_method() -> None:
    section = (ROOT / "engine" / "README.md").read_text().split("### Quantized checkpoints")[1].split("\n### ")[0]
    cells = re.findall(r"^\| (`[^|]+`) \|", section, re.MULTILINE)
    assert {method for cell in cells for method in re.findall(r"`([\w-]+)`", cell)} == {"quant_method", *METHODS}


def test_the_hot_path_runs_through_functions_that_exist() -> None:
    steps = re.findall(r"^\| \d+ \| \[`(\w+)\.(\w+)`\]\((\S+)\)", README, re.MULTILINE)
    assert len(steps) == 10
    for class_name, function, file in steps:
        classes = [node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.ClassDef)]
        (of_class,) = (node for node in classes if node.name == class_name)
        assert function in [getattr(node, "name", None) for node in of_class.body], f"{class_name}.{function}"


def test_every_flag_of_the_table_is_known_to_the_server() -> None:
    section = README.split("### Flags")[1].split("\n## ")[0]
    flags = set(re.findall(r"`(--[a-z-]+)`", section))
    assert len(flags) > 10
    assert flags <= set(re.findall(r"--[a-z-]+", help_of("server")))


def flag_rows() -> list[tuple[list[str], str]]:
    """Return (flags, the cell of their default) of each row of the table."""
    section = README.split("### Flags")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`--[^|]+) \| ([^|]*) \|", section, re.MULTILINE)
    return [(re.findall(r"`--([a-z0-9-]+)`", flags), default.strip()) for flags, default in rows]


@pytest.mark.parametrize(("flags", "stated"), [pytest.param(*row, id=row[0][0]) for row in flag_rows()])
def test_the_default_that_the_table_states_is_the_configurations(flags: list[str], stated: str) -> None:
    """`literals` and numbers are defaults, one for each flag or one for all; other words describe a None."""
    fields = {field.name.replace("_", "-"): field.default for field in dataclasses.fields(ServerConfig)}
    literals = [part.strip() for part in stated.split(",")]
    if len(literals) != len(flags):
        literals = [stated] * len(flags)
    for flag, literal in zip(flags, literals, strict=True):
        default = fields[flag]
        if literal == "off":
            assert default is False, flag
        elif literal.startswith("`") or re.fullmatch(r"[\d.]+( [a-zA-Z]+)?", literal):
            assert str(default) in (literal.strip("`"), f"{literal.split()[0]}.0", literal.split()[0]), flag
        else:
            assert default is None, f"--{flag} is {default!r}, not {literal!r}"


@pytest.mark.parametrize(("device", "cuda_bytes"), [("CPU", None), ("GPU", 141 << 30)])
def test_the_sizes_that_the_table_states_for_a_device_are_those_decided(device: str, cuda_bytes: int | None) -> None:
    decided = resolve_sizes(EngineConfig(), cuda_bytes)
    sizes = {
        flags[0]: size[1]
        for flags, stated in flag_rows()
        if (size := re.search(rf"(\w+) on a (?:large )?{device}", stated))
    }
    assert sizes
    for flag, stated in sizes.items():
        value = getattr(decided, flag.replace("-", "_"))
        assert value == (None if stated == "none" else float(stated)), flag


def test_the_commands_install_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for group in re.findall(r"'\.\[([a-z,]+)\]'", README) for name in group.split(",")}
    assert named == {"demo", "test", "cuda"}
    assert named <= extras.keys()


def test_the_benches_explain_themselves() -> None:
    assert "--random-input-len" in help_of("bench.serve")
    assert "--concurrency" in help_of("bench.cpu")


@pytest.mark.parametrize("page", PAGES)
def test_every_module_that_a_page_runs_exists(page: str) -> None:
    modules = re.findall(r"python -m ((?:bench|server|tests)(?:\.\w+)*)", (ROOT / page).read_text())
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


def test_the_readme_is_read_in_minutes() -> None:
    assert 9_000 <= len(README.encode()) <= 11_000


def test_the_changelog_begins_with_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    first = re.search(r"^## (\S+)", (ROOT / ".github" / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None and first[1] == version
