"""The end of an engine that cannot be mended."""

import asyncio


class Failure:
    """The reason why an engine can compute no further step, once there is one."""

    def __init__(self) -> None:
        self.reason = ""
        self._has_happened = asyncio.Event()

    @property
    def has_happened(self) -> bool:
        return self._has_happened.is_set()

    def record(self, reason: str) -> None:
        self.reason = reason
        self._has_happened.set()

    async def wait(self) -> str:
        """Wait for a failure and return its reason."""
        await self._has_happened.wait()
        return self.reason
