"""The pages for people, as they are sent: whole, open, and with nothing else allowed to run."""

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.pages.page import FOLDER, Page
from server.watch.meanings import ANSWERS, MEANINGS
from server.watch.openapi import BODIES
from server.watch.schemas import COMPONENTS
from tests.client import Client
from tests.fake_engine import FakeEngine, serving

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
PAGES = ["/", "/docs", "/dashboard"]


async def test_a_browser_gets_the_chat_page_and_a_program_a_line(client: Client) -> None:
    page, line = await client.get("/", headers=HTML), await client.get("/", headers={"Accept": "*/*"})
    assert (page.status, page.content_type, page.headers["Vary"]) == (200, "text/html", "Accept")
    assert "<textarea" in await page.text()
    assert (line.status, line.content_type, await line.text()) == (200, "text/plain", "radixloop is running\n")
    assert (await client.head("/")).status == 200


async def test_without_the_web_ui_everybody_gets_the_line(engine: FakeEngine) -> None:
    async with serving(engine, disable_web_ui=True) as client:
        assert await (await client.get("/", headers=HTML)).text() == "radixloop is running\n"
        assert (await client.get("/docs", headers=HTML)).status == 404


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_is_whole_and_nothing_but_its_own_scripts_may_run(path: str, client: Client) -> None:
    response = await client.get(path, headers=HTML)
    text, policy = await response.text(), response.headers["Content-Security-Policy"]
    assert not re.search(
        r"""\b(src|action)=["']|<link rel="stylesheet"|@import|\burl\(|https?://(?!www\.w3\.org/)""", text
    )
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        digests = [
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
            for part in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        ]
        assert digests and f"{rule} {' '.join(digests)};" in policy
    assert "unsafe" not in policy and "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "require-trusted-types-for 'script'; trusted-types 'none'" in policy  # text never becomes markup
    assert not re.search(r""" style=["']| on\w+=["']""", text)


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_is_open_where_a_key_is_needed_and_holds_none_of_what_the_key_opens(
    path: str, engine: FakeEngine
) -> None:
    async with serving(engine, api_key="sesame") as client:
        text = await (await client.get(path, headers=HTML)).text()
    assert "fake-model" not in text and "sesame" not in text


def test_no_script_makes_markup_or_code_of_text() -> None:
    """Trusted Types say so to Chromium; this says it of all browsers."""
    scripts = {path.name: path.read_text() for path in FOLDER.glob("*.js")}
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|setTimeout\([\"']"
    assert {name: re.findall(sinks, text) for name, text in scripts.items() if re.search(sinks, text)} == {}


async def test_a_page_that_the_browser_has_is_not_sent_again(client: Client) -> None:
    first = await client.get("/", headers=HTML)
    again = await client.get("/", headers={**HTML, "If-None-Match": first.headers["ETag"]})
    assert (again.status, await again.read()) == (304, b"")
    assert again.headers["Content-Security-Policy"] == first.headers["Content-Security-Policy"]


def test_every_style_and_script_is_part_of_a_page() -> None:
    parts = {path.name for path in FOLDER.iterdir() if path.suffix in (".css", ".js")}
    texts = [page.read_text() for page in FOLDER.glob("*.html")]
    assert parts == {name for text in texts for name in re.findall(r'(?:href|src)="([\w.-]+\.(?:css|js))"', text)}


def test_a_link_to_a_missing_part_fails_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<script src="missing.js"></script>')
    with pytest.raises(FileNotFoundError):
        Page("a.html", tmp_path)


def test_every_field_of_every_body_has_a_meaning() -> None:
    missing = [
        f"{kind}.{name}"
        for kind, schema in BODIES.items()
        for name, field in schema["properties"].items()
        if not field.get("description")
    ]
    assert missing == [], "server/watch/meanings.py says what fields mean"


def fields_of(schema: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield each field of a schema, at any depth, under its path."""
    for field, inner in schema.get("properties", {}).items():
        yield f"{name}.{field}", inner
        yield from fields_of(inner, f"{name}.{field}")
    for part in [*filter(None, [schema.get("items")]), *schema.get("anyOf", ())]:
        yield from fields_of(part, name)


async def test_every_field_of_every_answer_has_a_meaning(client: Client) -> None:
    document = await (await client.get("/openapi.json")).json()
    answers = {
        f"{method} {path}": content["schema"]
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        for content in operation["responses"]["200"]["content"].values()
    }
    schemas = {name: schema for name, schema in document["components"]["schemas"].items() if name in COMPONENTS}
    found = [field for name, schema in (answers | schemas).items() for field in fields_of(schema, name)]
    assert [path for path, schema in found if not schema.get("description")] == []
    assert {path.rpartition(".")[2] for path, _ in found} >= ANSWERS.keys()


def test_no_meaning_is_left_of_a_field_that_has_gone() -> None:
    fields = {name for schema in BODIES.values() for name in schema["properties"]}
    kinds = {kind.rpartition(".")[2] for kind in BODIES}
    assert {key.rpartition(".")[2] for key in MEANINGS} <= fields
    assert {key.rpartition(".")[0] for key in MEANINGS} - {""} <= kinds
