"""The start of a server: what it says, and what ends it with one line."""

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from server.__main__ import example_request, print_ready
from server.config import ServerConfig
from server.http.malformed import shorten_malformed
from tests.fake_engine import FakeEngine, FakeModel, serving
from tests.server_processes import ROOT

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
