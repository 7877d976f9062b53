"""The script that runs client libraries: what it reports of those that are there, and of those that are not."""

import asyncio
import io
from typing import Any

import pytest
from rich.console import Console

from bench.client_checks import CLIENTS, Anthropic, OpenAIChat, Server
from bench.clients import CHECKS, Result, run_client, run_vercel, show
from tests.fake_engine import FakeEngine, serving

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
PLACE = '{"name": "Paris", "continent": "Europe", "is_capital": true}'


async def ran(answer: str, package: str, kind: type[Any]) -> Result:
    """Run a client against a server whose answers are all `answer`."""
    async with serving(FakeEngine(answer, context_length=4096), tool_call_parser="hermes") as client:
        server = Server(str(client.make_url("")).rstrip("/"), "fake-model", "none")
        return await asyncio.to_thread(run_client, package, package, kind, server)


def shown(*results: Result) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=120)
    status = show(results, console)
    assert isinstance(console.file, io.StringIO)
    return status, console.file.getvalue()


@pytest.mark.parametrize(("package", "kind"), [("openai", OpenAIChat), ("anthropic", Anthropic)])
async def test_the_official_clients_read_chats_and_structured_answers(package: str, kind: type[Any]) -> None:
    result = await ran(PLACE, package, kind)
    assert {"chat", "structured"} <= {*result.passed}, result
    assert "no call came" in result.failures["tools"]


async def test_a_check_that_fails_spoils_no_other_and_its_reason_is_shown() -> None:
    result = await ran("Hello, world", "openai", OpenAIChat)
    assert "chat" in result.passed and "structured" in result.failures
    status, text = shown(result)
    assert status == 1 and f"openai: structured: {result.failures['structured'][:30]}" in text
    assert text.count("failed") == len(result.failures)


def test_what_is_not_installed_is_reported_and_is_no_failure() -> None:
    server = Server("http://127.0.0.1:1", "x", "none")
    status, text = shown(run_client("odd", "no-such-package", OpenAIChat, server), run_vercel("", server))
    assert status == 0 and text.count("not installed") == 2


def test_each_client_is_asked_for_a_chat_tools_and_a_structured_answer() -> None:
    assert len(CLIENTS) >= 6
    for _, _, kind in CLIENTS:
        assert all(callable(getattr(kind, check)) for check in CHECKS[:3])
