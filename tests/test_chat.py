"""`radixloop chat`: what is typed, what is sent, and what is shown."""

import asyncio
import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from server.terminal import chat as terminal
from server.terminal.chat import Chat, figures, read_text
from server.terminal.client import ChatClient, ChatError, Piece, Timing
from server.terminal.conversation import Conversation
from server.terminal.display import MarkdownDisplay, PlainDisplay, finished_len
from tests.fake_engine import PARSERS, FakeEngine, serving
from tests.server_processes import ROOT, state_of, wait_until


def new_chat(url: str, **given: Any) -> tuple[Chat, io.StringIO]:
    """Return a chat, and where its answers are written."""
    shown = io.StringIO()
    return Chat(ChatClient(url), Conversation("fake-model", **given), lambda: PlainDisplay(shown)), shown


async def in_thread(engine: FakeEngine, use: Callable[[str], Any], **options: Any) -> Any:
    """Run `use` on a thread with the address of a server."""
    async with serving(engine, **options) as client:
        return await asyncio.to_thread(use, str(client.make_url("")))


# ---- with a server ----


async def test_an_answer_is_streamed_and_the_next_question_brings_what_was_said() -> None:
    def use(url: str) -> str:
        chat, shown = new_chat(url, system="Be brief.")
        chat.take("Hi")
        chat.take("And?")
        return shown.getvalue()

    engine = FakeEngine("Hello")
    assert await in_thread(engine, use) == "Hello\nHello\n"
    prompts = [bytes(request.input_ids).decode() for request in engine.requests]
    assert prompts[1] == "[system]Be brief.[user]Hi[assistant]Hello[user]And?[assistant]"


async def test_reasoning_is_kept_apart_and_shown_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    def use(url: str) -> str:
        chat, shown = new_chat(url)
        chat.take("Hi")
        chat.take("/thought")
        return shown.getvalue()

    assert await in_thread(FakeEngine("<think>Where?</think>There."), use, **PARSERS) == "There.\n"
    assert capsys.readouterr().out == "Where?\n"


async def test_fields_that_are_set_are_sent_and_what_the_server_refuses_is_said() -> None:
    def use(url: str) -> None:
        chat, _ = new_chat(url)
        chat.take("/set max_tokens 3")
        chat.take("/set stop x")
        chat.take("Hi")
        chat.take("/set stop")
        chat.take("/set top_p 7")
        with pytest.raises(ChatError, match=r"^400: top_p must be .* got 7"):
            chat.take("Again")
        assert [message["content"] for message in chat.conversation.messages] == ["Hi", "Hel"]

    engine = FakeEngine("Hello")
    await in_thread(engine, use)
    (request,) = engine.requests
    assert (request.sampling_params.max_new_tokens, request.sampling_params.stop) == (3, ["x"])


async def test_the_last_question_can_be_asked_again_or_taken_back() -> None:
    def use(url: str) -> None:
        chat, _ = new_chat(url)
        chat.take("One")
        chat.take("Two")
        chat.take("/retry")
        assert [message["content"] for message in chat.conversation.messages] == ["One", "A", "Two", "A"]
        chat.take("/undo")
        assert [message["content"] for message in chat.conversation.messages] == ["One", "A"]
        chat.take("/clear")
        assert chat.conversation.messages == []

    engine = FakeEngine("A")
    await in_thread(engine, use)
    assert len(engine.requests) == 3


async def test_a_file_goes_with_the_next_question_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("buy milk")

    def use(url: str) -> None:
        chat, _ = new_chat(url)
        chat.take(f"/file {file}")
        chat.take("What?")
        chat.take("More?")
        first, _, second, _ = (message["content"] for message in chat.conversation.messages)
        assert "buy milk" in first and first.endswith("What?") and second == "More?"

    await in_thread(FakeEngine("A", context_length=1000), use)


def test_a_picture_goes_with_the_next_question_and_with_its_repetition(tmp_path: Path) -> None:
    file = tmp_path / "dot.png"
    file.write_bytes(b"\x89PNG")
    sent: list[Any] = []

    class Listening(ChatClient):
        def stream(self, body: dict[str, Any], timing: Timing) -> Any:
            sent.append(body["messages"][-1]["content"])
            yield Piece(text="A dot")

    chat = Chat(Listening("http://x"), Conversation("m"), lambda: PlainDisplay(io.StringIO()))
    for line in (f"/image {file}", "What is it?", "/retry", "/undo", "And now?"):
        chat.take(line)
    parts = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}},
        {"type": "text", "text": "What is it?"},
    ]
    assert sent == [parts, parts, "And now?"]


async def test_to_stop_is_to_end_the_request_and_to_keep_what_has_come() -> None:
    class Impatient(PlainDisplay):
        def write(self, text: str) -> None:
            raise KeyboardInterrupt

    def use(url: str) -> list[dict[str, Any]]:
        chat = Chat(ChatClient(url), Conversation("fake-model"), Impatient)
        chat.take("Hi")
        return chat.conversation.messages

    engine = FakeEngine(is_manual=True)

    async def speak() -> None:
        await engine.until(lambda: bool(engine.states))
        engine.emit(engine.states[0], "Well, ")

    async with serving(engine) as client:
        speaking = asyncio.create_task(speak())
        messages = await asyncio.to_thread(use, str(client.make_url("")))
        await speaking
        await engine.until(lambda: bool(engine.aborted))
    assert messages[-1] == {"role": "assistant", "content": "Well, "}


async def test_an_answer_that_breaks_off_is_said_to_and_its_question_can_be_asked_again() -> None:
    """A process that is killed closes its connections between two events, as this server does."""

    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}}")  # the end of a request
        event = b'data: {"choices": [{"delta": {"content": "Half"}}]}\n\n'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + event)
        writer.close()

    def use(broken: str, well: str) -> None:
        chat, shown = new_chat(broken)
        with pytest.raises(ChatError, match="broke off"):
            chat.take("One")
        assert shown.getvalue() == "Half\n"
        assert [message["content"] for message in chat.conversation.messages] == ["One", "Half"]
        chat.client = ChatClient("http://127.0.0.1:1")
        with pytest.raises(ChatError, match="no server answers"):
            chat.take("/retry")
        chat.client = ChatClient(well)
        chat.take("/retry")
        assert [message["content"] for message in chat.conversation.messages] == ["One", "Whole"]

    server = await asyncio.start_server(break_off, "127.0.0.1", 0)
    async with server, serving(FakeEngine("Whole")) as client:
        port = server.sockets[0].getsockname()[1]
        await asyncio.to_thread(use, f"http://127.0.0.1:{port}", str(client.make_url("")))


async def test_a_server_that_wants_a_key_gets_it_or_says_so() -> None:
    def use(url: str) -> list[str]:
        with pytest.raises(ChatError, match=r"^401: "):
            ChatClient(url).models()
        return ChatClient(f"{url}/v1/", "abc").models()

    assert await in_thread(FakeEngine(), use, api_key="abc") == ["fake-model"]


@pytest.mark.parametrize(("url", "message"), [("ftp://x", "no address"), ("http://127.0.0.1:1", "no server answers")])
def test_an_address_without_a_server_is_one_line(url: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert terminal.main([url]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


async def test_what_is_piped_in_is_answered_once_behind_the_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a diff\n"))
    monkeypatch.setattr("signal.signal", lambda *_: None)  # for the main thread only
    engine = FakeEngine("Fine")
    assert await in_thread(engine, lambda url: terminal.main([url, "-m", "Review:"])) == 0
    assert capsys.readouterr().out == "Fine\n"
    assert bytes(engine.requests[0].input_ids) == b"[user]Review:\n\na diff[assistant]"


# ---- Ctrl-C ----


@pytest.fixture
def of_sigint() -> Iterator[None]:
    """Put back what handles SIGINT: a conversation sets its own."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def press_ctrl_c(*_: object) -> None:
    signal.raise_signal(signal.SIGINT)


class Scripted(ChatClient):
    """Answers every question with the same two pieces."""

    def stream(self, body: dict[str, Any], timing: Timing) -> Any:
        yield Piece(text="Well, ")
        yield Piece(text="no.")


def converse(monkeypatch: pytest.MonkeyPatch, *typed: Any, display: type = PlainDisplay) -> Chat:
    """Return the chat in which these lines were typed, or these functions called at the prompt."""
    lines = iter(typed)

    def read(_prompt: str) -> str:
        line = next(lines)
        return line() if callable(line) else line

    monkeypatch.setattr("builtins.input", read)
    chat = Chat(Scripted("http://x"), Conversation("m"), display)
    terminal.talk(chat, None)
    assert next(lines, None) is None
    return chat


def test_each_further_ctrl_c_takes_nothing_of_an_answer_that_is_stopped(
    monkeypatch: pytest.MonkeyPatch, of_sigint: None, capsys: pytest.CaptureFixture[str]
) -> None:
    class Impatient(PlainDisplay):
        def write(self, text: str) -> None:
            super().write(text)
            press_ctrl_c()

        def __exit__(self, *exc_info: object) -> None:
            press_ctrl_c()

    chat = converse(monkeypatch, "Hi", "/quit", display=Impatient)
    assert [message["content"] for message in chat.conversation.messages] == ["Hi", "Well, "]
    assert "stopped" not in capsys.readouterr().out  # which is said where no answer has begun


def test_a_ctrl_c_before_a_question_is_sent_takes_it_back(
    monkeypatch: pytest.MonkeyPatch, of_sigint: None, capsys: pytest.CaptureFixture[str]
) -> None:
    class Hasty(PlainDisplay):
        __enter__ = press_ctrl_c  # type: ignore[assignment]

    assert converse(monkeypatch, "Hi", "/quit", display=Hasty).conversation.messages == []
    assert "stopped" in capsys.readouterr().out


def test_a_ctrl_c_between_a_command_and_the_prompt_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, of_sigint: None, capsys: pytest.CaptureFixture[str]
) -> None:
    class Blank(str):
        def strip(self, *_: Any) -> str:  # is called between the two
            press_ctrl_c()
            return ""

    converse(monkeypatch, "/undo", Blank(), press_ctrl_c, "/quit")
    assert capsys.readouterr().out.count("Ctrl-D ends") == 2  # the greeting, and what is answered at the prompt


# ---- the conversation ----


def test_a_saved_conversation_is_read_again(tmp_path: Path) -> None:
    first = Conversation("m", "Be brief.", {"top_p": 0.5})
    first.ask("Hi")
    first.answer("Hello")
    first.save(tmp_path / "chat.json")
    second = Conversation("m")
    second.load(tmp_path / "chat.json")
    assert second == first
    (tmp_path / "list.json").write_text(json.dumps(first.messages))
    second.load(tmp_path / "list.json")
    assert second.messages == first.messages
    for text, reason in (("[1]", "no list of messages"), ('[{"role": "system"}]', "no list of"), ("x", "is no JSON")):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=reason):
            second.load(tmp_path / "other.json")


def test_what_the_chat_page_exports_is_read(tmp_path: Path) -> None:
    exported = {
        "kind": "radixloop conversation",
        "settings": {"system": "Be brief.", "top_p": 0.5, "thinking": "enabled"},
        "messages": [{"role": "user", "content": "Hi"}],
    }
    (tmp_path / "page.json").write_text(json.dumps(exported))
    conversation = Conversation("m")
    conversation.load(tmp_path / "page.json")
    assert conversation == Conversation("m", "Be brief.", {"top_p": 0.5}, [{"role": "user", "content": "Hi"}])


# ---- the keyboard and the screen ----


@pytest.mark.parametrize(
    ("typed", "text"),
    [(["a"], "a"), (["a\\", "b\\", "c"], "a\nb\nc"), (['"""', "a", '  b"""'], "a\n  b"), (['"""a"""'], "a")],
)
def test_a_question_may_have_several_lines(typed: list[str], text: str) -> None:
    lines: Iterator[str] = iter(typed)
    assert read_text(lambda prompt: next(lines)) == text
    assert next(lines, None) is None


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("One\n\nTwo", "One\n\n"),
        ("One\n\n", ""),  # an indented line may follow
        ("- a\n\n  more of a\n\n- b", "- a\n\n  more of a\n\n"),
        ("```\na\n\nb\n", ""),
        ("```\na\n\nb\n```\n\nafter", "```\na\n\nb\n```\n\n"),
        ("~~~\n```\n\nb\n", ""),
    ],
)
def test_a_block_is_finished_when_no_later_text_can_change_it(text: str, finished: str) -> None:
    assert text[: finished_len(text)] == finished


def test_markdown_is_rendered_and_nothing_of_it_is_lost_or_shown_twice() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=False, width=60)
    text = "# Head\n\nSome **bold** words.\n\n1. one\n2. two\n\n```python\nprint(1)\n\nprint(2)\n```\n\nThe \x1b[2Jend."
    with MarkdownDisplay(console) as display:
        for c in text:
            display.write(c)
    shown = [line.strip() for line in screen.getvalue().splitlines() if line.strip()]
    words = " ".join(shown)
    assert "**" not in words and "\x1b" not in words
    for part in ("Head", "Some bold words.", "1 one", "2 two", "print(1)", "print(2)", "The [2Jend."):
        assert words.count(part) == 1, screen.getvalue()


def test_an_answers_figures_are_those_of_its_usage() -> None:
    usage: dict[str, object] = {
        "completion_tokens": 11,
        "prompt_tokens": 30,
        "prompt_tokens_details": {"cached_tokens": 20},
    }
    line = figures(usage, Timing(1.0, 1.5, 3.5), has_thought=False, how="stopped")
    assert line == "stopped · 11 tokens · 5.0 tokens/s · first after 0.50 s · prompt 30, 20 cached"
    assert figures({}, Timing(), has_thought=False) == ""


# ---- in a terminal ----


# A process takes the terminal at its input as its own, whose Ctrl-C is then its signal, and becomes another program.
ON_A_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """A process on a terminal of its own: what it shows, and what is typed."""

    def __init__(self, argv: list[str], state: Path) -> None:
        self.fd, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, *argv],
            stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, start_new_session=True,
            env={**os.environ, "XDG_STATE_HOME": str(state), "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""

    def until(self, text: str) -> None:
        """Read until `text` is shown, after what was waited for before."""
        deadline = time.monotonic() + 60
        while text not in self.shown:
            ready, _, _ = select.select([self.fd], [], [], max(deadline - time.monotonic(), 0))
            assert ready, self.shown
            self.shown += os.read(self.fd, 1 << 16).decode(errors="replace")
        self.shown = self.shown.partition(text)[2]

    def until_it_waits(self) -> None:
        """Wait until the process sleeps: after a prompt, for a key.

        Python's input() sees a Ctrl-C that comes in that moment; one that comes just before, with the next line only.
        """
        wait_until(lambda: state_of(self.process.pid) == "S")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait(self) -> int:
        with contextlib.suppress(OSError):  # its end of the terminal is closed
            while os.read(self.fd, 1 << 16):
                pass
        os.close(self.fd)
        return self.process.wait(60)


async def test_a_conversation_in_a_terminal(tmp_path: Path) -> None:
    def use(url: str) -> int:
        terminal = Terminal([sys.executable, "-m", "server", "chat", url], tmp_path)
        terminal.until(">>> ")
        terminal.type("Say\\\rit\r")
        terminal.until("Hello")
        terminal.until("13 tokens")
        terminal.until(">>> ")
        terminal.type("/unk\t\x15/und\t\r")  # completed, after a slip that is erased
        terminal.until("forgotten: Say")
        terminal.until(">>> ")
        terminal.until_it_waits()
        terminal.type("\x03")
        terminal.until("Ctrl-D ends")
        terminal.until(">>> ")
        terminal.type("/quit\r")
        return terminal.wait()

    engine = FakeEngine("Hello **you**")
    assert await in_thread(engine, use) == 0
    assert bytes(engine.requests[0].input_ids) == b"[user]Say\nit[assistant]"
    history = tmp_path / "radixloop" / "chat_history"
    assert history.read_text().splitlines()[-2:] == ["/undo", "/quit"]
    assert history.stat().st_mode & 0o077 == 0
