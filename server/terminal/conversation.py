"""A conversation as the terminal keeps it: messages, a system prompt and settings, in a file if asked for."""

import base64
import json
import mimetypes
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

JSON = dict[str, Any]
SYSTEM_ROLES = ("system", "developer")
Content = str | list[JSON]
"""Of a question: its text, or parts with pictures."""


def with_images(text: str, images: list[Path]) -> Content:
    """Return a question about pictures, which are read now."""
    if not images:
        return text
    parts: list[JSON] = [{"type": "image_url", "image_url": {"url": data_uri(path)}} for path in images]
    return [*parts, {"type": "text", "text": text}]


def data_uri(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def text_of(content: Content) -> str:
    """Return the text of a question without its pictures."""
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if "text" in part)


@dataclass(slots=True)
class Conversation:
    model: str
    system: str = ""
    settings: JSON = field(default_factory=dict)
    """Fields of the request's body, such as temperature."""
    messages: list[JSON] = field(default_factory=list)
    """The turns of user and assistant, oldest first."""

    def body(self) -> JSON:
        """Return the request whose answer is the next turn."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return {**self.settings, "model": self.model, "messages": [*first, *self.messages]}

    def ask(self, question: Content) -> None:
        self.messages.append({"role": "user", "content": question})

    def answer(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})

    def take_back(self) -> Content | None:
        """Forget the last question and its answer, and return the question; None if there is none."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                content: Content = message["content"]
                return content
        return None

    def set(self, name: str, text: str) -> None:
        """Set a field of the body to a JSON value, or a bare string; without a text, unset it."""
        if not text:
            self.settings.pop(name, None)
            return
        try:
            self.settings[name] = json.loads(text)
        except ValueError:
            self.settings[name] = text

    def save(self, path: Path) -> None:
        content = {"model": self.model, "settings": self.settings, "messages": self.body()["messages"]}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def load(self, path: Path) -> None:
        """Read what `save` wrote, a chat page's export, or a list of messages. Raises `ValueError` if it is neither."""
        try:
            content = json.loads(path.read_text())
        except ValueError:
            raise ValueError(f"{path} is no JSON") from None
        messages = content.get("messages") if isinstance(content, dict) else content
        if not isinstance(messages, list) or not all(
            isinstance(one, dict) and {"role", "content"} <= one.keys() for one in messages
        ):
            raise ValueError("it holds no list of messages")
        settings = content.get("settings") if isinstance(content, dict) else None
        settings = dict(settings) if isinstance(settings, dict) else {}
        system = [str(one["content"]) for one in messages if one["role"] in SYSTEM_ROLES]
        if "kind" in content:  # the page's, whose settings are not all fields of a request
            system.append(str(settings.get("system", "")))
            settings = {name: value for name, value in settings.items() if isinstance(value, int | float)}
        self.system = "\n\n".join(filter(None, system))
        self.messages = [one for one in messages if one["role"] not in SYSTEM_ROLES]
        if isinstance(content, dict):
            self.settings = settings
