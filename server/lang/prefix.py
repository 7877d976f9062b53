"""A batch's common prefix, cached once before everyone asks for it."""

import asyncio
import logging

from .backends.base import BackendError, BaseBackend

logger = logging.getLogger(__name__)

MIN_PREFIX_CHARS = 256  # to ask for a shorter one takes longer than to read it in each prompt


def common_prefix(first: str, second: str) -> str:
    shorter = min(len(first), len(second))
    return first[: next((i for i in range(shorter) if first[i] != second[i]), shorter)]


class BatchPrefix:
    """Holds the batch's requests until what its first two programs have in common is cached.

    It is read off their first prompts rather than off a trace of the program, so that it includes what the batch's
    arguments share, and nothing is run twice.
    """

    def __init__(self, backend: BaseBackend) -> None:
        self.backend = backend
        self._scouts: list[object] = []
        self._prompts: dict[object, str] = {}
        self._is_open = asyncio.Event()
        self._commit: asyncio.Task[None] | None = None

    def add_scout(self, program: object) -> None:
        self._scouts.append(program)

    async def arrive(self, program: object, prompt: str) -> None:
        """Wait until the prefix is cached. `program` is about to send `prompt`."""
        if not self._is_open.is_set():
            self._report(program, prompt)
            await self._is_open.wait()

    def leave(self, program: object) -> None:
        """Note that `program` has ended: nobody needs to wait for it."""
        self._report(program, "")

    def _report(self, program: object, prompt: str) -> None:
        if program in self._scouts:
            self._prompts.setdefault(program, prompt)
            if len(self._prompts) == len(self._scouts) and self._commit is None:
                self._commit = asyncio.create_task(self._cache(common_prefix(*self._prompts.values())))

    async def _cache(self, prefix: str) -> None:
        try:
            if len(prefix) > MIN_PREFIX_CHARS:
                await self.backend.commit(prefix)
        except BackendError as error:  # the requests themselves will say whether anything is wrong
            logger.warning("the batch's common prefix could not be cached: %s", error)
        finally:
            self._is_open.set()
