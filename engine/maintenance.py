"""What is done to a running engine while it holds still: a pause, other weights, memory given back and taken again.

Still means: every launched step has come back and no other is launched. Requests go on arriving, and wait.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

import torch

from engine.build import Parts, new_model
from engine.errors import InvalidRequest, ModelError
from engine.loop import StepLoop
from engine.models import CausalLM
from engine.weights import checkpoint_targets, load_weights, resolve_model

KV_CACHE, WEIGHTS = "kv_cache", "weights"
TAGS = (KV_CACHE, WEIGHTS)
ABORT, RETRACT, IN_PLACE = "abort", "retract", "in_place"


class Maintenance:
    """One thing at a time; callers that come meanwhile wait for their turn."""

    def __init__(self, parts: Parts, loop: StepLoop, abort_all: Callable[[], int]) -> None:
        self.parts, self.loop, self.abort_all = parts, loop, abort_all
        self.is_paused = False  # by `pause`; a release holds the engine still too
        self.released: set[str] = set()
        self.model_path = parts.config.model_path
        self.weight_version = "default"
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

    async def pause(self, mode: str = ABORT) -> int:
        """Hold still until `resume`. What runs is ended, or computed anew later, or goes on where it was. How many."""
        async with self._turn:
            self.is_paused = True
            await self.loop.pause()
            num_running = len(self.parts.scheduler.nodes)
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
        the first tensor that does not fit; the old weights then stay.
        """
        async with self._turn:
            self._check_weights_here()
            new = await asyncio.to_thread(self._read, model_path, load_format)
            async with self._still():
                scheduler = self.parts.scheduler
                num_running = len(scheduler.nodes)
                if abort_all_requests:
                    num_running = self.abort_all()
                if flush_cache:
                    scheduler.retract_all()
                    scheduler.drop_cache()
                await asyncio.to_thread(self.parts.runner.adopt_weights, new)
                self.model_path = model_path
                self.weight_version = weight_version or self.weight_version
            return num_running

    def _read(self, model_path: str, load_format: str) -> CausalLM:
        config = self.parts.config.replace(model_path=model_path, load_format=load_format)
        try:
            model = new_model(config, self.parts.model_config, self.parts.runner.comm)
            load_weights(model, resolve_model(config), load_format, torch.device("cpu"))
        except ModelError as error:
            raise InvalidRequest(f"the weights of {model_path} cannot be served: {error}", "model_path") from None
        return model

    async def weight(self, name: str, num_rows: int) -> list[Any]:
        """The first rows of the weight that a checkpoint calls `name`, as nested lists of floats."""
        async with self._turn:
            self._check_weights_here()
            target = checkpoint_targets(self.parts.runner.model).get(name)
            if target is None:
                raise InvalidRequest(f"the model has no weight {name[:200]!r}", "name")
            layer, weight_name, part = target
            rows = layer.weight_part(weight_name, part)[:num_rows]
            return await asyncio.to_thread(lambda: rows.float().tolist())

    def _check_one_rank(self) -> None:
        if (num_ranks := self.parts.runner.comm.size) > 1:
            raise InvalidRequest(f"weights and memory are changed on one rank only, and this server has {num_ranks}")

    def _check_weights_here(self) -> None:
        self._check_one_rank()
        if WEIGHTS in self.released:
            raise InvalidRequest("the weights are released: resume them first", "tags")

    # ---- memory ----

    async def release_memory(self, tags: Collection[str] = TAGS) -> None:
        """Give device memory back. Requests, also those that run, wait until all of it is there again.

        kv_cache: with every cached prefix; requests that run are computed anew. weights: kept in host memory.
        """
        self._check_one_rank()
        async with self._turn, self._still():
            runner, scheduler = self.parts.runner, self.parts.scheduler
            new_tags = set(tags) - self.released
            self.released |= new_tags
            if KV_CACHE in new_tags:
                scheduler.retract_all()
                scheduler.drop_cache()
                runner.kv.release()
            if WEIGHTS in new_tags:
                await asyncio.to_thread(runner.move_weights, torch.device("cpu"))
            runner.release_graphs()

    async def resume_memory(self, tags: Collection[str] = TAGS) -> None:
        """Take memory back. CUDA graphs hold addresses, so they are captured anew when all is there."""
        async with self._turn, self._still():
            runner = self.parts.runner
            due = self.released & set(tags)
            if KV_CACHE in due:
                runner.kv.allocate()
            if WEIGHTS in due:
                await asyncio.to_thread(runner.move_weights, runner.device)
            if self.released and due == self.released:
                await asyncio.to_thread(runner.recapture_graphs)
            self.released -= due
