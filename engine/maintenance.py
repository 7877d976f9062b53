"""What is done to a running engine while it holds still: a pause, other weights, memory given back and taken again.

Still means: every launched step has come back and no other is launched. Requests go on arriving, and wait.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from engine.build import Parts
from engine.checkpoint.weights import checkpoint_targets
from engine.errors import EngineError, InvalidRequest
from engine.loop import StepLoop
from engine.upkeep import KV_CACHE, TAGS, WEIGHTS, reason_of

ABORT, RETRACT, IN_PLACE = "abort", "retract", "in_place"


T = TypeVar("T")
P = ParamSpec("P")


def whole(
    method: "Callable[Concatenate[Maintenance, P], Coroutine[Any, Any, T]]",
) -> "Callable[Concatenate[Maintenance, P], Coroutine[Any, Any, T]]":
    """To its end, even if the caller gives up: half of it would leave an engine that may not go on."""

    @functools.wraps(method)
    async def run(self: "Maintenance", *args: P.args, **kwargs: P.kwargs) -> T:
        task = asyncio.create_task(method(self, *args, **kwargs))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return await asyncio.shield(task)

    return run


class Maintenance:
    """One thing at a time; callers that come meanwhile wait for their turn."""

    def __init__(self, parts: Parts, loop: StepLoop, abort_all: Callable[[], int]) -> None:
        self.parts, self.loop, self.abort_all = parts, loop, abort_all
        self.is_paused = False  # by `pause`; a release holds the engine still too
        self.released: set[str] = set()
        self.model_path = parts.config.model_path
        self.weight_version = "default"
        self.tasks: set[asyncio.Task[Any]] = set()
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def _still(self) -> AsyncIterator[None]:
        await self.loop.pause()
        try:
            yield
        finally:
            self._go_on()

    def _go_on(self) -> None:
        if not self.is_paused and not self.released:
            self.loop.resume()

    # ---- pause ----

    @whole
    async def pause(self, mode: str = ABORT) -> int:
        """Hold still until `resume`. What runs is ended, or computed anew later, or goes on where it was. How many."""
        async with self._turn:
            self.is_paused = True
            await self.loop.pause()
            num_running = self.parts.scheduler.num_running
            if mode == ABORT:
                return self.abort_all()
            if mode == RETRACT:
                self.parts.scheduler.retract_all()
            return num_running

    async def resume(self) -> None:
        async with self._turn:
            self.is_paused = False
            self._go_on()

    # ---- weights ----

    @whole
    async def update_weights(
        self,
        model_path: str,
        load_format: str = "auto",
        *,
        abort_all_requests: bool = False,
        flush_cache: bool = True,
        weight_version: str | None = None,
    ) -> int:
        """Serve the weights of another checkpoint of the same shape. Returns how many requests were interrupted.

        They are read into host memory while the old ones serve; the pause is the copy alone. With `flush_cache`,
        requests that run are computed anew, since their keys and values are the old weights'. `InvalidRequest` names
        the first tensor that does not fit, on any rank; the old weights then stay on all of them.
        """
        async with self._turn:
            self._check_weights_here()
            if reason := await self._read_everywhere(model_path, load_format):
                raise InvalidRequest(f"the weights of {model_path} cannot be served: {reason}", "model_path")
            async with self._still():
                scheduler = self.parts.scheduler
                num_running = scheduler.num_running
                if abort_all_requests:
                    num_running = self.abort_all()
                if flush_cache:
                    scheduler.retract_all()
                    scheduler.held.drop_cache()
                await self._do_everywhere("adopt")
                self.model_path = model_path
                self.weight_version = weight_version or self.weight_version
            return num_running

    async def _read_everywhere(self, model_path: str, load_format: str) -> str:
        """Why one of the ranks cannot, if so: then all are as before."""
        arguments = {"model_path": model_path, "load_format": load_format}
        parts, reason = self.parts, ""
        order = None if parts.ranks is None else parts.ranks.order("read", **arguments)
        try:
            await asyncio.to_thread(parts.upkeep.do, "read", **arguments)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must drop what they have read
            reason = reason_of(error)
        if parts.ranks is not None and order is not None:
            others = await asyncio.to_thread(parts.ranks.wait_done, order)
            reason = reason or "; ".join(f"rank {rank}: {what}" for rank, what in others.items())
        if reason:
            await self._do_everywhere("drop")
        return reason

    async def _do_everywhere(self, name: str, **arguments: Any) -> None:
        """All ranks at once, as they may have to meet. One that fails ends the server: it is unlike the others then."""
        parts = self.parts
        order = None if parts.ranks is None else parts.ranks.order(name, **arguments)
        try:
            await asyncio.to_thread(parts.upkeep.do, name, **arguments)
        except BaseException as error:
            if parts.ranks is not None:
                parts.ranks.fail(error, name)
            raise
        if parts.ranks is not None and order is not None:
            await asyncio.to_thread(parts.ranks.wait_done, order)

    async def weight(self, name: str, num_rows: int) -> list[Any]:
        """The first rows of the weight that a checkpoint calls `name`, as nested lists of floats."""
        async with self._turn:
            self._check_weights_here()
            if (num_ranks := self.parts.runner.comm.size) > 1:
                raise InvalidRequest(f"weights are read on one rank only, and this server has {num_ranks}", "name")
            target = checkpoint_targets(self.parts.runner.model).get(name)
            if target is None:
                raise InvalidRequest(f"the model has no weight {name[:200]!r}", "name")
            layer, weight_name, part = target
            rows = layer.weight_part(weight_name, part)[:num_rows]
            return await asyncio.to_thread(lambda: rows.float().tolist())

    def _check_weights_here(self) -> None:
        if WEIGHTS in self.released:
            raise InvalidRequest("the weights are released: resume them first", "tags")

    # ---- memory ----

    @whole
    async def release_memory(self, tags: Collection[str] = TAGS) -> None:
        """Give device memory back. Requests, also those that run, wait until all of it is there again.

        kv_cache: with every cached prefix; requests that run are computed anew. weights: kept in host memory.
        """
        async with self._turn, self._still():
            new_tags = set(tags) - self.released
            self.released |= new_tags
            if KV_CACHE in new_tags:
                self.parts.scheduler.retract_all()
                self.parts.scheduler.held.drop_cache()
            await self._do_everywhere("release", tags=sorted(new_tags))

    @whole
    async def resume_memory(self, tags: Collection[str] = TAGS) -> None:
        """Take memory back; requests go on when all of it is there. `EngineError` if the device has no room now."""
        async with self._turn, self._still():
            for tag in sorted(self.released & set(tags)):  # one by one: what is back is not taken twice by a second try
                try:
                    await self._do_everywhere("resume", tags=[tag], is_complete=self.released == {tag})
                except torch.OutOfMemoryError as error:
                    reason = str(error).partition("\n")[0]
                    raise EngineError(f"there is no room for {tag}, which stays released: {reason}") from error
                self.released.remove(tag)
