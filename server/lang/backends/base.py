"""The interface between programs and backends."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from ..choices import ChoicesDecision, ChoicesSamplingMethod
from ..expressions import GenParams
from ..loop import LoopThread
from ..media import Media
from ..templates import ChatTemplate

JSON = dict[str, Any]


class BackendError(Exception):
    """A backend refused or failed a request. `status` is HTTP's, 0 where there was no answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Prompt(Protocol):
    """A state as a backend sees it."""

    @property
    def text(self) -> str: ...
    @property
    def images(self) -> Sequence[Media]: ...
    @property
    def messages(self) -> Sequence[JSON]: ...
    @property
    def role(self) -> str | None: ...  # that is open now
    @property
    def role_text(self) -> str: ...  # written since it began
    @property
    def loose_text(self) -> str: ...  # of no message, where messages are sent


class BaseBackend(ABC):
    """Lives on an event loop of its own. Coroutines run there; the other methods may be called from any thread."""

    chat_template: ChatTemplate
    caches_prefixes = False  # is a prompt cheaper after `commit`?
    is_chat = False  # are prompts messages, not text?

    def __init__(self) -> None:
        self.loop = LoopThread(type(self).__name__)
        # Also at the end of the process, or when the backend is forgotten.
        self._close = weakref.finalize(self, self.loop.close)

    @abstractmethod
    def get_model_name(self) -> str: ...

    @abstractmethod
    async def generate(self, prompt: Prompt, params: GenParams) -> tuple[list[str], list[JSON]]:
        """Return `params.n` answers and the meta_info of each. `BackendError` if there are none."""

    @abstractmethod
    def generate_stream(self, prompt: Prompt, params: GenParams) -> AsyncIterator[tuple[str, JSON]]:
        """Yield pieces of one answer, each with the meta_info so far."""

    async def select(
        self, prompt: Prompt, choices: Sequence[str], temperature: float, method: ChoicesSamplingMethod
    ) -> ChoicesDecision:
        raise NotImplementedError(f"{type(self).__name__} cannot select: its API does not measure prompts")

    async def commit(self, text: str, images: Sequence[Media] = ()) -> None:
        """Have the server cache a prompt that others will start with."""
        raise NotImplementedError(f"{type(self).__name__} has no prefix cache")

    def get_chat_template(self) -> ChatTemplate:
        return self.chat_template

    def cache_prefix(self, prefix: str) -> None:
        self.loop.run(self.commit(prefix))

    def flush_cache(self) -> bool:
        """Forget cached prefixes. False if the backend has none, or is busy."""
        return False

    def get_server_info(self) -> JSON:
        return {}

    def shutdown(self) -> None:
        """Abort what runs and let go of everything. May be called twice."""
        self._close()
