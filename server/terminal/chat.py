"""`radixloop chat [URL]`: a conversation with a server in the terminal.

Any server with OpenAI's API will do. Without a terminal at its input it answers once and ends:
`git diff | radixloop chat --message "Review this"`.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

from server.terminal.client import JSON, ChatClient, ChatError, Piece, Timing
from server.terminal.conversation import Content, Conversation, text_of, with_images
from server.terminal.display import Display, MarkdownDisplay, PlainDisplay, silent_keys
from server.terminal.interrupts import Interrupts

DEFAULT_URL = "http://127.0.0.1:30000"
KEY_VARIABLES = ("RADIXLOOP_API_KEY", "OPENAI_API_KEY")
PROMPT, MORE = ">>> ", "... "
BLOCK = '"""'
HISTORY_LINES = 1000
ONE_LINE = 79  # characters of a question that is shown again


def argument_parser(add_help: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="radixloop chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=add_help,
    )
    add = parser.add_argument
    add("url", nargs="?", default=DEFAULT_URL, help=f"address of the server (default: {DEFAULT_URL})")
    add("--model", help="default: the first one that the server lists")
    add("--api-key", help=f"the server's; default: {' or '.join(KEY_VARIABLES)} in the environment")
    add("--system", default="", help="the system prompt")
    add("--temperature", type=float)
    add("--max-tokens", type=int, help="of an answer, at most")
    add("-m", "--message", help="answer this and end; what stands at the input is put behind it")
    add("--plain", action="store_true", help="show answers as they are written, without markdown")
    add("--no-history", action="store_true", help="do not keep questions for the next time")
    return parser


def main(argv: Sequence[str]) -> int:
    """Talk until /quit or Ctrl-D, or answer once. Returns the exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args = argument_parser().parse_args(argv)
    api_key = args.api_key or next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
    given = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    settings = {name: value for name, value in given.items() if value is not None}
    try:
        client = ChatClient(args.url, api_key)
        model = args.model or next(iter(client.models()), "")
        chat = Chat(client, Conversation(model, args.system, settings), display_for(args.plain))
        question = args.message
        if not sys.stdin.isatty():
            question = "\n\n".join(part for part in (args.message, sys.stdin.read().strip()) if part)
        if question == "":
            raise ChatError("there is nothing to answer: neither --message nor anything at the input")
        if question is not None:
            chat.ask(question)
            return 0
        talk(chat, None if args.no_history else history_file())
    except ChatError as error:
        print(f"radixloop chat: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def display_for(is_plain: bool) -> Callable[[], Display]:
    """Return what makes a display for each answer: markdown on a terminal, else the bare text."""
    if is_plain or not sys.stdout.isatty():
        return PlainDisplay
    from rich.console import Console

    console = Console(highlight=False)
    return lambda: MarkdownDisplay(console)


class Chat:
    """Answers questions and commands; `has_ended` once it was told to quit."""

    def __init__(self, client: ChatClient, conversation: Conversation, new_display: Callable[[], Display]) -> None:
        self.client, self.conversation, self.new_display = client, conversation, new_display
        self.has_ended = False
        self.interrupts = Interrupts()
        self.attached: list[str] = []  # texts of files that go with the next question
        self.images: list[Path] = []  # pictures, likewise
        self.thought = ""  # reasoning of the last answer
        self.unanswered: Content | None = None  # the last question, if it failed
        self.commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "/help": (self.help, "", "show this"),
            "/clear": (self.clear, "", "begin anew, with the same settings"),
            "/retry": (self.retry, "", "answer the last question again"),
            "/undo": (self.undo, "", "forget the last question and its answer"),
            "/system": (self.system, "[TEXT]", "set the system prompt, or show it"),
            "/set": (self.set, "[NAME [VALUE]]", "set, unset or list fields: temperature, seed, ..."),
            "/model": (self.model, "[NAME]", "choose a model, or list them"),
            "/file": (self.file, "PATH", "put a text file before the next question"),
            "/image": (self.image, "PATH", "put a picture before the next question"),
            "/thought": (self.show_thought, "", "show the reasoning of the last answer"),
            "/save": (self.save, "PATH", "write the conversation, as JSON"),
            "/load": (self.load, "PATH", "read one"),
            "/quit": (self.quit, "", "end, as does Ctrl-D"),
        }

    def take(self, line: str) -> None:
        """Run a command, or answer a question."""
        word, _, rest = line.partition(" ")
        if not line.startswith("/"):
            self.ask(line)
        elif word in self.commands:
            self.commands[word][0](rest.strip())
        else:
            print(f"{word} is no command; /help lists them")

    # ---- questions ----

    def ask(self, question: str) -> None:
        """Answer a question, with the files that were put before it."""
        self.answer(with_images("\n\n".join([*self.attached, question]), self.images))
        self.attached.clear()
        self.images.clear()

    def answer(self, question: Content) -> None:
        """Stream the answer to a question. What has come before Ctrl-C or an error stays in the conversation."""
        self.unanswered = None
        self.conversation.ask(question)
        timing = Timing()
        usage: JSON = {}
        text, self.thought, finish, is_stopped = "", "", "", False
        try:
            with silent_keys(), contextlib.closing(self._pieces(timing)) as pieces, self.new_display() as display:
                try:
                    with self.interrupts:
                        for piece in pieces:
                            usage = piece.usage or usage
                            finish = piece.finish_reason or finish
                            if piece.reasoning:
                                self.thought += piece.reasoning
                                display.think(piece.reasoning)
                            if piece.text:
                                text += piece.text
                                display.write(piece.text)
                except KeyboardInterrupt:
                    is_stopped = True
        except (ChatError, KeyboardInterrupt):  # an interrupt in here came before the question was sent
            if text:
                self.conversation.answer(text)
            else:
                self.unanswered = self.conversation.take_back()
            raise
        self.conversation.answer(text)
        if sys.stdout.isatty():
            how = "stopped" if is_stopped else "cut at its longest length" if finish == "length" else ""
            print(_dim(figures(usage, timing, bool(self.thought), how)))

    def _pieces(self, timing: Timing) -> Generator[Piece, None, None]:
        return self.client.stream(self.conversation.body(), timing)

    # ---- commands ----

    def help(self, _: str) -> None:
        for name, (_command, argument, meaning) in self.commands.items():
            print(f"  {f'{name} {argument}':<22} {meaning}")
        print(
            f"Ctrl-C stops an answer. A line that ends with \\ goes on,\nand {BLOCK} begins and ends a text of lines."
        )

    def clear(self, _: str) -> None:
        self.conversation.messages.clear()
        self.unanswered = None
        self.attached.clear()
        self.images.clear()

    def retry(self, _: str) -> None:
        question = self._take_back()
        if question is None:
            print("there is no question yet")
            return
        self.answer(question)
        self.attached.clear()
        self.images.clear()

    def undo(self, _: str) -> None:
        question = self._take_back()
        print("there is no question yet" if question is None else f"forgotten: {text_of(question)[:ONE_LINE]}")

    def _take_back(self) -> Content | None:
        """Forget the last question, whether it was answered or failed, and return it."""
        failed, self.unanswered = self.unanswered, None
        return self.conversation.take_back() if failed is None else failed

    def system(self, text: str) -> None:
        if text:
            self.conversation.system = text
        print(self.conversation.system or "there is no system prompt")

    def set(self, words: str) -> None:
        name, _, value = words.partition(" ")
        if name:
            self.conversation.set(name, value.strip())
        for known, its in self.conversation.settings.items():
            print(f"  {known} = {its!r}")

    def model(self, name: str) -> None:
        if name:
            self.conversation.model = name
            return
        for one in self.client.models():
            print(f"{'*' if one == self.conversation.model else ' '} {one}")

    def file(self, name: str) -> None:
        text = _path(name).read_text()
        self.attached.append(f"{name}:\n```\n{text}\n```")
        print(f"{name} goes with the next question: {len(text):,} characters")

    def image(self, name: str) -> None:
        path = _path(name)
        print(f"{name} goes with the next question: {path.stat().st_size:,} bytes")
        self.images.append(path)

    def show_thought(self, _: str) -> None:
        print(self.thought.strip() or "the last answer came without reasoning")

    def save(self, name: str) -> None:
        self.conversation.save(_path(name))
        print(f"written to {name}")

    def load(self, name: str) -> None:
        self.conversation.load(_path(name))
        print(f"{len(self.conversation.messages)} messages read from {name}")

    def quit(self, _: str) -> None:
        self.has_ended = True


def figures(usage: JSON, timing: Timing, has_thought: bool, how: str = "") -> str:
    """Return an answer's cost in a line. how: it ended, if not by itself."""
    count, prompt = usage.get("completion_tokens"), usage.get("prompt_tokens")
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    parts = [how] if how else []
    if isinstance(count, int):
        parts.append(f"{count} tokens")
        if count > 1 and timing.last > timing.first:
            parts.append(f"{(count - 1) / (timing.last - timing.first):.1f} tokens/s")
    if timing.first:
        parts.append(f"first after {timing.first - timing.sent:.2f} s")
    if isinstance(prompt, int):
        parts.append(f"prompt {prompt}{f', {cached} cached' if isinstance(cached, int) else ''}")
    if has_thought:
        parts.append("/thought shows its reasoning")
    return " · ".join(parts)


def _dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if text and "NO_COLOR" not in os.environ else text


def _path(name: str) -> Path:
    if not name:
        raise ValueError("which file?")
    return Path(name).expanduser()


# ---- the terminal ----


def history_file() -> Path:
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "radixloop" / "chat_history"


def talk(chat: Chat, history: Path | None) -> None:
    """Read lines and answer them until the end."""
    print(f"{chat.conversation.model} at {chat.client.url}. /help lists commands, Ctrl-D ends.")
    signal.signal(signal.SIGINT, chat.interrupts.on_signal)
    with editing(list(chat.commands), history):
        while not chat.has_ended:
            try:
                with chat.interrupts:
                    text = read_text(input)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\nCtrl-D ends")
                continue
            if not text.strip():
                continue
            try:
                with chat.interrupts:
                    chat.take(text.strip())
            except (ChatError, OSError, ValueError) as error:
                print(f"error: {error}")
            except KeyboardInterrupt:  # a command, such as one that waits for the server
                print("stopped")


def read_text(read: Callable[[str], str]) -> str:
    """Return what is typed: a line, lines that end with a backslash and the next, or a block in triple quotes."""
    text = read(PROMPT)
    if text.startswith(BLOCK):
        text = text.removeprefix(BLOCK)
        while not text.endswith(BLOCK):
            text += "\n" + read(MORE)
        return text.removesuffix(BLOCK).strip("\n")
    while text.endswith("\\"):
        text = text[:-1] + "\n" + read(MORE)
    return text


@contextlib.contextmanager
def editing(words: Sequence[str], history: Path | None) -> Iterator[None]:
    """Edit lines, complete commands and remember lines for the next time, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.set_completer_delims(" \n")
    readline.set_completer(lambda text, i: [*(word for word in words if text and word.startswith(text)), None][i])
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")  # lines that are pasted are one question
    if history is not None:
        with contextlib.suppress(OSError):  # the first time, or a home that is not to be read
            readline.read_history_file(history)
    try:
        yield
    finally:
        if history is not None:
            with contextlib.suppress(OSError):
                history.parent.mkdir(parents=True, exist_ok=True)
                history.touch(mode=0o600)
                readline.set_history_length(HISTORY_LINES)
                readline.write_history_file(history)
