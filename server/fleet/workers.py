"""The servers behind a router: which of them are in the rotation, and who is next."""

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from yarl import URL

from engine.errors import InvalidRequest
from engine.replicas.balance import Balancer

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Worker:
    url: str
    index: int  # as the balancer counts
    failure: str = "not asked yet"  # why it is out of the rotation; empty: it is in
    load: int = 0  # requests there
    num_requests: int = 0  # since the router started
    waiting: set[asyncio.Timeout] = field(default_factory=set)  # limits of requests whose answers have not begun

    @asynccontextmanager
    async def unless_it_hangs(self) -> AsyncIterator[None]:
        """Run a block that waits for this worker; `TimeoutError` in it once `Workers.judge` finds that it hangs."""
        async with asyncio.timeout(None) as limit:
            self.waiting.add(limit)
            try:
                yield
            finally:
                self.waiting.discard(limit)


class Workers:
    """The workers, in the order in which they were added, and who is next."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self._balancer = Balancer(policy, 0)
        self._slots: list[Worker | None] = []  # by index; None: removed, its place may be taken

    def __iter__(self) -> Iterator[Worker]:
        return (worker for worker in self._slots if worker is not None)

    def add(self, url: str) -> Worker:
        """Add a worker. `InvalidRequest` if `url` is no URL, or a worker's already."""
        url = url.rstrip("/")
        if not _is_base_url(url):
            raise InvalidRequest(f"url must be one like http://host:30000, got {url[:200]!r}", "url")
        if any(worker.url == url for worker in self):
            raise InvalidRequest(f"{url} is a worker already", "url")
        if None not in self._slots:
            self._slots.append(None)
            self._balancer.loads.append(0)
        worker = Worker(url, self._slots.index(None))
        self._slots[worker.index] = worker
        return worker

    def remove(self, url: str) -> None:
        """Remove a worker; its running requests go on. `InvalidRequest` if there is no such worker."""
        worker = next((worker for worker in self if worker.url == url.rstrip("/")), None)
        if worker is None:
            raise InvalidRequest(f"no worker is {url[:200]!r}", "url")
        self._slots[worker.index] = None
        self._balancer.forget(worker.index)

    def in_rotation(self, without: Collection[Worker] = ()) -> list[Worker]:
        return [worker for worker in self if not worker.failure and worker not in without]

    @contextmanager
    def serving(self, prompt: bytes, candidates: Sequence[Worker]) -> Iterator[Worker]:
        """Pick the one of `candidates` to serve `prompt`. It counts as that much busier while the block runs."""
        placement = self._balancer.pick(prompt, [worker.index for worker in candidates])
        worker = next(worker for worker in candidates if worker.index == placement.engine)
        worker.load += 1
        worker.num_requests += 1
        try:
            yield worker
        finally:
            worker.load -= 1
            self._balancer.end(placement)

    def judge(self, worker: Worker, failure: str, *, is_hanging: bool = False) -> None:
        """Take it out of the rotation because of `failure`, or back into it if that is empty.

        is_hanging: it does not answer at all, unlike one that is being shut down and lets its answers end. What waits
        for it is given up if another worker can do it.
        """
        if failure and not worker.failure:
            logger.warning("%s leaves the rotation: %s", worker.url, failure)
            self._balancer.forget(worker.index)  # it may come back as another process
        elif worker.failure and not failure:
            logger.info("%s joins the rotation", worker.url)
        worker.failure = failure
        if is_hanging and self.in_rotation():
            for limit in worker.waiting:
                limit.reschedule(0.0)


def _is_base_url(text: str) -> bool:
    try:
        url = URL(text)
        (url.host or "").encode("idna")  # as a connection will: a part of a name may be too long
    except ValueError:
        return False
    return url.scheme in ("http", "https") and bool(url.host) and not (url.raw_query_string or url.raw_fragment)
