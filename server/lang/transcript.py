"""Everything a state has written: its text, its messages and its variables. Backends see it as their prompt."""

from dataclasses import dataclass, field
from typing import Any

from .backends.base import JSON
from .media import Media, content_of


@dataclass(eq=False, slots=True)
class Transcript:
    """Belongs to one state, and to the event loop that works for it."""

    text: str = ""
    messages: list[JSON] = field(default_factory=list)
    roles: tuple[str, ...] = ()  # of messages
    role: str | None = None  # of the message that is open
    loose_text: str = ""  # of no message, where a backend is sent messages
    images: list[Media] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)
    num_committed: int = 0  # characters that were sent to the server, or came from it: its cache has them
    fork_position: int = 0  # where the text parted from the parent's
    fork_variables: frozenset[str] = frozenset()  # that the parent had
    _role_start: int = 0
    _role_images: list[Media] = field(default_factory=list)
    _scopes: dict[str, int] = field(default_factory=dict)  # name -> where its text begins

    def branch(self) -> "Transcript":
        """Return a copy for a child of the state, which goes on from here."""
        return Transcript(
            self.text,
            [*self.messages],
            self.roles,
            self.role,
            self.loose_text,
            [*self.images],
            {**self.variables},
            {**self.meta_info},
            self.num_committed,
            len(self.text),
            frozenset(self.variables),
            self._role_start,
            [*self._role_images],
            {**self._scopes},
        )

    @property
    def role_text(self) -> str:
        """Text of the message that is open."""
        return self.text[self._role_start :]

    def check_no_role(self, role: str) -> None:
        if self.role is not None:
            raise ValueError(f"a {role} message cannot begin inside the {self.role} message")

    def begin_role(self, role: str) -> None:
        self.role, self._role_start, self._role_images = role, len(self.text), []

    def check_role(self, role: str) -> None:
        if self.role != role:
            raise ValueError(f"a {role} message ends, but {self.role or 'none'} has begun")

    def end_role(self, role: str) -> None:
        """Make a message of the text and the images since the role began."""
        content = content_of(self.role_text.lstrip(), self._role_images)
        self.messages.append({"role": role, "content": content})
        self.role, self.roles = None, (*self.roles, role)

    def add_media(self, media: Media) -> None:
        self.images.append(media)
        self._role_images.append(media)

    def move_role_start(self) -> None:
        """Let the open message's text begin here: a message holds its images beside the text."""
        self._role_start = len(self.text)

    def begin_scope(self, name: str) -> None:
        self._scopes[name] = len(self.text)

    def end_scope(self, name: str) -> str:
        """Return the text since the scope began."""
        return self.text[self._scopes.pop(name) :]
