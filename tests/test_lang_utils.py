"""Schemas as classes, and the helpers that scripts of SGLang import."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel

import server.lang as sgl
from server.lang.expressions import Gen
from server.lang.utils import dump_state_text, print_highlight, read_jsonl, terminate_process, wait_for_server


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
    wait_for_server(url, timeout=20)
    terminate_process(process)
    assert process.poll() is not None
    process.stdout.close()
    with pytest.raises(TimeoutError):
        wait_for_server(url, timeout=0.05)
