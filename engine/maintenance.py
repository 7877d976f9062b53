"""Maintenance of a local engine while it is still: a pause, other weights, memory released and resumed.

Still means: every launched step has come back and no other is launched. Requests continue to arrive, and wait.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch

from engine.build import EngineParts
from engine.checkpoint.folder import resolve_model
from engine.checkpoint.weights import checkpoint_targets
from engine.engine import Maintenance
from engine.errors import EngineError, InvalidRequest
from engine.loop import StepLoop
from engine.rank_maintenance import KV_CACHE, TAGS, WEIGHTS, reason_of
from engine.vision.encoder import Encoder
from engine.vision.tower import Tower, load_tower

ABORT, RETRACT, IN_PLACE = "abort", "retract", "in_place"


T = TypeVar("T")
P = ParamSpec("P")


def uninterrupted(
    method: "Callable[Concatenate[LocalMaintenance, P], Coroutine[Any, Any, T]]",
) -> "Callable[Concatenate[LocalMaintenance, P], Coroutine[Any, Any, T]]":
    """Run `method` to its end even if its caller is cancelled: half of it would leave the engine still for ever."""

    @functools.wraps(method)
    async def run(self: "LocalMaintenance", *args: P.args, **kwargs: P.kwargs) -> T:
        task = asyncio.create_task(method(self, *args, **kwargs))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return await asyncio.shield(task)

    return cast("Callable[Concatenate[LocalMaintenance, P], Coroutine[Any, Any, T]]", run)


class LocalMaintenance(Maintenance):
    """Holds the step loop still and has every rank do the work."""

    def __init__(
        self, parts: EngineParts, loop: StepLoop, abort_all: Callable[[], int], encoder: Encoder | None
    ) -> None:
        self.parts, self.loop, self.abort_all, self.encoder = parts, loop, abort_all, encoder
        self.is_paused = False  # by `pause`; released memory holds the engine still too
        self.released: set[str] = set()
        self.model_path = parts.config.model_path
        self.weight_version = "default"
        self.num_updates = 0  # of the weights
        self.tasks: set[asyncio.Task[Any]] = set()
        self._lock = asyncio.Lock()  # one operation at a time

    @asynccontextmanager
    async def _still(self) -> AsyncIterator[None]:
        await self.loop.pause()
        try:
            yield
        finally:
            self._resume_if_free()

    def _resume_if_free(self) -> None:
        if not self.is_paused and not self.released:
            self.loop.resume()

    # ---- pause ----

    @uninterrupted
    async def pause(self, mode: str = ABORT) -> int:
        async with self._lock:
            self.is_paused = True
            await self.loop.pause()
            num_running = self.parts.scheduler.num_running
            if mode == ABORT:
                return self.abort_all()
            if mode == RETRACT:
                self.parts.scheduler.retract_all()
            return num_running

    async def resume(self) -> None:
        async with self._lock:
            self.is_paused = False
            self._resume_if_free()

    # ---- weights ----

    @uninterrupted
    async def update_weights(
        self,
        model_path: str,
        load_format: str = "auto",
        *,
        abort_all_requests: bool = False,
        flush_cache: bool = True,
        weight_version: str | None = None,
    ) -> int:
        async with self._lock:
            self._check_weights_present()
            if reason := await self._read_everywhere(model_path, load_format):
                raise InvalidRequest(f"the weights of {model_path} cannot be served: {reason}", "model_path")
            tower = await self._read_tower(model_path, load_format)
            async with self._still():
                scheduler = self.parts.scheduler
                num_running = scheduler.num_running
                if abort_all_requests:
                    num_running = self.abort_all()
                if flush_cache:
                    scheduler.retract_all()
                    scheduler.held.drop_cache()
                await self._do_everywhere("adopt")
                if self.encoder is not None and tower is not None:
                    await self.encoder.adopt(tower)
                    scheduler.forget_features()
                self.num_updates += 1
                self.model_path = model_path
                self.weight_version = weight_version or self.weight_version
            return num_running

    async def _read_everywhere(self, model_path: str, load_format: str) -> str:
        """Have every rank read the weights, and return why one cannot, or "": then all drop what they have read."""
        arguments = {"model_path": model_path, "load_format": load_format}
        parts, reason = self.parts, ""
        order = None if parts.ranks is None else parts.ranks.order("read", **arguments)
        try:
            await asyncio.to_thread(parts.rank_maintenance.do, "read", **arguments)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must drop what they have read
            reason = reason_of(error)
        if parts.ranks is not None and order is not None:
            others = await asyncio.to_thread(parts.ranks.wait_done, order)
            reason = reason or "; ".join(f"rank {rank}: {what}" for rank, what in others.items())
        if reason:
            await self._do_everywhere("drop")
        return reason

    async def _read_tower(self, model_path: str, load_format: str) -> Tower | None:
        """Read the tower that belongs to other weights, into host memory. None if this model reads text only."""
        parts = self.parts
        if parts.tower is None:
            return None
        folder = resolve_model(parts.config.replace(model_path=model_path, load_format=load_format))
        host, family = torch.device("cpu"), parts.tower.family
        try:
            return await asyncio.to_thread(load_tower, family, folder, parts.model_config, load_format, host)
        except Exception as error:  # whatever it is, the ranks must drop what they have read
            await self._do_everywhere("drop")
            message = f"the tower of {model_path} cannot be served: {reason_of(error)}"
            raise InvalidRequest(message, "model_path") from error

    async def _do_everywhere(self, name: str, **arguments: Any) -> None:
        """Have all ranks do an operation at once, as they may have to meet.

        A rank that fails ends the server: its state is then unlike the others'.
        """
        parts = self.parts
        order = None if parts.ranks is None else parts.ranks.order(name, **arguments)
        try:
            await asyncio.to_thread(parts.rank_maintenance.do, name, **arguments)
        except BaseException as error:
            if parts.ranks is not None:
                parts.ranks.fail(error, name)
            raise
        if parts.ranks is not None and order is not None:
            await asyncio.to_thread(parts.ranks.wait_done, order)

    async def weight(self, name: str, num_rows: int) -> list[Any]:
        async with self._lock:
            self._check_weights_present()
            if (num_ranks := self.parts.runner.comm.size) > 1:
                raise InvalidRequest(f"weights are read on one rank only, and this server has {num_ranks}", "name")
            target = checkpoint_targets(self.parts.runner.model).get((name, None))
            if target is None:
                raise InvalidRequest(f"the model has no weight {name[:200]!r}", "name")
            layer, weight_name, part = target
            rows = layer.weight_part(weight_name, part)[:num_rows]
            return await asyncio.to_thread(lambda: rows.float().tolist())

    def _check_weights_present(self) -> None:
        if WEIGHTS in self.released:
            raise InvalidRequest("the weights are released: resume them first", "tags")

    # ---- memory ----

    @uninterrupted
    async def release_memory(self, tags: Collection[str] = TAGS) -> None:
        async with self._lock, self._still():
            new_tags = set(tags) - self.released
            self.released |= new_tags
            if KV_CACHE in new_tags:
                self.parts.scheduler.retract_all()
                self.parts.scheduler.held.drop_cache()
            await self._do_everywhere("release", tags=sorted(new_tags))
            if WEIGHTS in new_tags and self.encoder is not None:
                await self.encoder.release()

    @uninterrupted
    async def resume_memory(self, tags: Collection[str] = TAGS) -> None:
        async with self._lock, self._still():
            for tag in sorted(self.released & set(tags)):  # one by one: a second try must not resume a tag twice
                try:
                    if tag == WEIGHTS and self.encoder is not None:
                        await self.encoder.resume()  # may be done twice, too
                    await self._do_everywhere("resume", tags=[tag], is_complete=self.released == {tag})
                except torch.OutOfMemoryError as error:
                    reason = str(error).partition("\n")[0]
                    raise EngineError(f"there is no room for {tag}, which stays released: {reason}") from error
                self.released.remove(tag)
