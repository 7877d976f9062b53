"""Schemas as classes, and the helpers that scripts of SGLang import."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration

import server.lang as sgl
from server.lang.expressions import Gen
from server.lang.utils import dump_state_text, print_highlight, read_jsonl, terminate_process, wait_for_server
from tests.server_processes import ROOT


class Wizard(BaseModel):
    name: str
    house: Literal["Gryffindor", "Slytherin"]


def test_a_pydantic_class_is_a_json_schema() -> None:
    found = [sgl.gen("a", json_schema=schema) for schema in (Wizard, Wizard.model_json_schema())]
    schemas = [json.loads(expr.overrides["json_schema"]) for expr in found if isinstance(expr, Gen)]
    assert schemas == [Wizard.model_json_schema()] * 2
    with pytest.raises(ValueError, match="Pydantic"):
        sgl.gen("a", json_schema=int)


def test_lines_are_read_and_texts_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"a": 1}\n\n# not this\n[2]\n')
    assert list(read_jsonl(str(file))) == [{"a": 1}, [2]]
    dump_state_text(str(file), ["one", "two"])
    assert file.read_text().index("one") < file.read_text().index("two")
    print_highlight("bold")
    assert "bold" in capsys.readouterr().out


def test_a_server_is_waited_for_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.lang.utils.POLL_S", 0.02)
    script = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
    wait_for_server(url, timeout=60)
    terminate_process(process)
    assert process.poll() is not None
    process.stdout.close()
    with pytest.raises(TimeoutError):
        wait_for_server(url, timeout=0.05)


# ---- the package of the wheel ----

INSTALLED = ROOT / "server" / "installed"


def run_beside_a_server_of_its_own(code: str, folder: Path, *hidden: str) -> str:
    """Run a program in a folder that has a package `server`, without modules of `hidden` and an editable install."""
    (folder / "server").mkdir()
    (folder / "server" / "__init__.py").write_text("name = 'mine'\n")
    start = "import sys\nsys.meta_path[:] = [one for one in sys.meta_path if 'ditable' not in repr(one)]\n"
    start += "".join(f"sys.modules[{name!r}] = None\n" for name in hidden)
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{INSTALLED}"}
    ended = subprocess.run(
        [sys.executable, "-c", start + code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


PROGRAM = """
import radixloop as sgl, server, sys
@sgl.function
def qa(s):
    s += sgl.user("a") + sgl.assistant(sgl.gen("b"))
import radixloop.utils
assert isinstance(sgl.gen("x"), radixloop.expressions.Gen)
assert not [name for name in sys.modules if name.partition(".")[0] in ("engine", "torch", "numpy", "cache")]
print(server.name, sgl.RuntimeEndpoint.__module__)
try:
    sgl.Engine()
except ImportError as error:
    print(error)
"""


def test_the_language_is_imported_beside_a_programs_own_server_and_without_torch(tmp_path: Path) -> None:
    shown = run_beside_a_server_of_its_own(PROGRAM, tmp_path, "msgspec")
    first, second = shown.splitlines()
    assert first == "mine radixloop.backends.runtime_endpoint"
    assert "pip install 'radixloop[server]'" in second or "hidden by this program's own" in second


def test_an_engine_says_which_package_of_the_program_hides_its_own(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("")
    shown = run_beside_a_server_of_its_own("import engine\n" + PROGRAM.replace('("engine", ', "("), tmp_path)
    assert f"the engine's package engine is hidden by this program's own, {tmp_path / 'engine'}" in shown


def test_the_wheel_has_the_package_and_installs_no_torch_by_itself() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = apply_configuration(Distribution(), str(ROOT / "pyproject.toml"))
    assert {"radixloop", "server.lang.backends", "server.terminal"} <= set(wheel.packages)
    assert wheel.package_dir["radixloop"] == "server/installed/radixloop"
    names = {re.split(r"[><=]", one)[0] for one in project["project"]["dependencies"]}
    assert names == {"aiohttp", "orjson", "pyyaml", "rich", "uvloop"}
    extras = project["project"]["optional-dependencies"]
    assert all("radixloop[server]" in extras[name] for name in ("demo", "cuda", "test", "otlp"))
    assert any(one.startswith("torch") for one in extras["server"])
