# ruff: noqa: ARG002 - the arguments are those of a tokenizer that reads them
"""Stand in a tokenizer's place where there is none: requests bring token ids and get token ids."""

from collections.abc import Sequence
from typing import Any, NoReturn

from engine.errors import InvalidRequest
from engine.text.tokenizer import Message, Tokenizer

REASON = "the server runs with --skip-tokenizer-init; send token ids to /generate, as input_ids"


class NoVocabulary:
    """A backend that knows no token."""

    vocab_size = 0
    decoder: dict[str, Any] | None = None

    def __init__(self) -> None:
        self.special_tokens: dict[str, int] = {}

    def encode(self, text: str, add_special_tokens: bool, context_length: int | None = None) -> NoReturn:
        raise InvalidRequest(f"text cannot be read: {REASON}", "text")

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return ""

    def id_to_token(self, token_id: int) -> None:
        return None

    def token_to_id(self, token: str) -> None:
        return None

    def to_json(self) -> None:
        return None


class NoTokenizer(Tokenizer):
    """Refuses texts and chats. Tokens have no text."""

    def __init__(self) -> None:
        super().__init__(NoVocabulary())

    def token_text(self, token_id: int) -> str:
        return ""

    def token_bytes(self, token_id: int) -> bytes:
        return b""

    def render_chat(self, messages: Sequence[Message], *_: Any, **__: Any) -> NoReturn:
        raise InvalidRequest(f"chats cannot be read: {REASON}", "messages")
