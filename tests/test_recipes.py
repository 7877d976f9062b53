"""The programs of `server/README.md` run as they stand there, and what it says of settings and errors is the code's."""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import server.lang as sgl
from engine.state import RequestState
from server.app import build_app
from server.command_line import make_parser, parse_args, read_options
from server.config import SECRET_VARIABLES, ServerConfig
from server.dispatch import dispatch
from server.fleet.router import RouterConfig
from server.foreign_flags import MODELSCOPE_VARIABLES
from server.foreign_tables import ROUTER_FLAGS
from server.lang.loop import LoopThread
from tests import migration
from tests.fake_engine import PARSERS, FakeEngine
from tests.lang_servers import listening, tiny_engine

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "server" / "README.md").read_text()
MIGRATION = (ROOT / "server" / "MIGRATION.md").read_text()
PROGRAMS = re.findall(r"((?:^<!-- [^\n]* -->\n)+)```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
# What each program prints; a program without a line here prints something.
SHOWN = {
    "Invent a wizard": "name='Merlin' age=700",
    "Is water wet": "yes",
    "How warm is it in Oslo": "It is 18 °C in Oslo.",
    "custom_id": "France Paris\nItaly Paris",
    "invent.run_batch": "name='Merlin' age=700 good",
}
LIBRARIES = ("HF_", "CUDA_", "OMP_")  # their own variables, which nothing here reads


class Scripted(FakeEngine):
    """Gives each of `answers` in turn, and the last one from then on."""

    def __init__(self, answers: list[str]) -> None:
        super().__init__(answers[0], context_length=4096)
        self.answers = answers

    def submit(self, state: RequestState) -> None:
        if len(self.answers) > 1 and self.requests:
            self.answers.pop(0)
            self.answer = self.answers[0]
        super().submit(state)


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    loop = LoopThread("server")
    yield loop
    loop.close()


def run(program: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(program, "server/README.md", "exec"), {"__name__": "__main__"})
    return shown.getvalue()


def test_every_program_of_the_page_is_run() -> None:
    assert len(PROGRAMS) == PAGE.count("```python") == 7


@pytest.mark.parametrize(("notes", "program"), PROGRAMS)
def test_a_program_runs_as_it_stands_there(
    notes: str, program: str, loop: LoopThread, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if "tiny" in notes:
        engine = tiny_engine(tiny_llama)
        monkeypatch.setattr(sgl, "Engine", lambda model_path: engine)
        assert len(run(program).splitlines()) >= 2
        return
    answers = re.findall(r"<!-- the model answers: (.*) -->", notes)
    options: dict[str, Any] = {"file_storage_path": str(tmp_path), **PARSERS}
    config = ServerConfig(model_path="demo", **options)
    with listening(loop, build_app(Scripted(answers), config)) as url:
        shown = run(program.replace("http://127.0.0.1:30000", url))
    expected = next((text for words, text in SHOWN.items() if words in program), "")
    assert shown.startswith(expected) and shown.strip()


def test_the_file_of_options_is_one_that_the_server_reads(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    file = tmp_path / "server.yaml"
    file.write_text(block)
    config = parse_args(["--config", str(file)])
    assert {name.replace("-", "_") for name in yaml.safe_load(block)} <= vars(config).keys()
    assert (config.host, config.max_queued_requests) == ("0.0.0.0", 200)


def test_every_variable_that_the_page_names_is_read_somewhere() -> None:
    rows = re.findall(r"^\| (`[A-Z_]+`[^|]*) \|", PAGE.split("## Settings")[1], re.MULTILINE)
    named = {name for cell in rows for name in re.findall(r"`([A-Z_]+)`", cell)}
    assert {*SECRET_VARIABLES.values(), *MODELSCOPE_VARIABLES} <= named
    sources = "".join(path.read_text() for folder in ("server", "engine", "kernels") for path in code_of(folder))
    assert [name for name in named if not name.startswith(LIBRARIES) and name not in sources] == []


def code_of(folder: str) -> Iterator[Path]:
    return (ROOT / folder).rglob("*.py")


def commands(name: str) -> list[str]:
    """Return the command lines of the page, also those behind an image's name, of one command."""
    cells = re.findall(r"`[^`]*\b(radixloop \w+[^`]*)`", PAGE)
    return [cell for cell in cells if cell.split()[1] == name]


@pytest.mark.parametrize("command", commands("serve"))
def test_every_command_of_the_page_is_one_that_the_server_takes(command: str) -> None:
    words = dispatch(command.split()[1:])
    assert not isinstance(words, int)
    parse_args(words)


def test_the_routers_command_is_one_that_it_takes() -> None:
    (command,) = commands("router")
    options = read_options(make_parser(RouterConfig, "router", "", "", ROUTER_FLAGS), command.split()[2:])
    assert len(options["worker_urls"]) == 2


def test_every_message_of_the_page_is_one_of_the_codes() -> None:
    """What stands for a value is an ellipsis; what remains is text of the sources."""
    section = PAGE.split("## When something goes wrong")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)
    assert len(messages) == 5
    sources = [
        re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for folder in ("server", "engine") for path in code_of(folder)
    ]
    for message in messages:
        parts = [part.strip() for part in message.split("…") if part.strip()]
        parts = [part for part in parts if part not in (": " + os.strerror(98), f": {os.strerror(98)}")]
        assert any(all(part in source for part in parts) for source in sources), message


@pytest.mark.parametrize("title", [title for title, _ in migration.TABLES])
def test_the_tables_of_other_servers_flags_are_made_from_the_parsers(title: str) -> None:
    flags = dict(migration.TABLES)[title]
    section = MIGRATION.split(f"## {title}\n")[1].split("\n## ")[0]
    assert section.strip() == migration.table(flags).strip(), "python -m tests.migration writes them"
