"""SGLang's routes that ask the server about itself, or give it an order."""

import asyncio
import dataclasses
import os
import time
from importlib.metadata import PackageNotFoundError, version

from aiohttp import web

from engine.declared import Object
from engine.engine import Engine
from engine.errors import EngineStopped, InvalidRequest
from engine.request import Request, SamplingParams
from engine.state import RequestState
from server.config import ServerConfig
from server.http.live import LiveRequests, is_failure, new_rid
from server.reading.chat import Chats
from server.reading.error_shapes import native_error
from server.reading.protocol import json_response, read_body

HEALTH_GENERATE_TIMEOUT_S = 20.0
FLUSH_POLL_S = 0.02
MAX_FLUSH_S = 3600.0


class AbortRequest(Object):
    rid: str = ""
    abort_all: bool = False


class NativeApi:
    def __init__(self, engine: Engine, config: ServerConfig, live: LiveRequests, chats: Chats) -> None:
        self.engine, self.config, self.live = engine, config, live
        self._media_tokens = {f"{kind}_token": text for kind, text in chats.media_texts().items()}
        self._probe: asyncio.Task[bool] | None = None  # /health_generate's, one at a time

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/health", self.health),
            web.get("/health_generate", self.health_generate),
            web.get("/get_model_info", self.model_info),
            web.get("/model_info", self.model_info),
            web.get("/get_server_info", self.server_info),
            web.get("/server_info", self.server_info),
            web.get("/get_load", self.load),
            web.get("/version", self.version),
            web.get("/flush_cache", self.flush_cache),
            web.post("/flush_cache", self.flush_cache),
            web.post("/abort_request", self.abort_request),
            web.get("/start_profile", self.start_profile),
            web.post("/start_profile", self.start_profile),
            web.get("/stop_profile", self.stop_profile),
            web.post("/stop_profile", self.stop_profile),
        ]

    async def health(self, _: web.Request) -> web.Response:
        """Report health by the step loop's heartbeat: nothing is generated, so a busy server is not thought dead."""
        health = self.engine.health()
        return json_response(health, 200 if health.status == "ok" else 503)

    async def health_generate(self, http_request: web.Request) -> web.Response:
        """Report health, and ask an idle engine for one token. Probes that arrive together share the one."""
        health = self.engine.health()
        if health.status == "ok" and not health.num_running:
            if self._probe is None or self._probe.done():
                self._probe = asyncio.create_task(self._generates())
            if not await asyncio.shield(self._probe):
                raise EngineStopped(f"no token within {HEALTH_GENERATE_TIMEOUT_S:.0f} s")
        return await self.health(http_request)

    async def _generates(self) -> bool:
        is_generation = self.engine.is_generation
        params = SamplingParams(max_new_tokens=int(is_generation), temperature=0.0)
        pooling = None if is_generation else "last"
        probe = Request(rid=f"HEALTH_CHECK_{new_rid()}", input_ids=[0], sampling_params=params, pooling=pooling)
        try:
            async with asyncio.timeout(HEALTH_GENERATE_TIMEOUT_S):
                async for delta in self.engine.generate(RequestState(probe)):
                    if delta.finish_reason is not None:
                        return not is_failure(delta.finish_reason)
        except TimeoutError:
            pass
        return False

    async def model_info(self, _: web.Request) -> web.Response:
        model = self.engine.model_config
        return json_response(
            {
                "model_path": self.engine.maintenance.model_path,
                "tokenizer_path": self.config.tokenizer_path or self.config.model_path,
                "served_model_name": self.config.model_name,
                "is_generation": self.engine.is_generation,
                "preferred_sampling_params": self.engine.model_config.sampling_defaults or None,
                "weight_version": self.engine.maintenance.weight_version,
                "has_image_understanding": "image" in self.engine.media_kinds,
                "has_audio_understanding": False,
                **self._media_tokens,  # what stands for a picture in a prompt, for clients that write it themselves
                "model_type": model.whole_model_type,
                "text_model_type": model.model_type,
                "architectures": list(model.architectures),
                "context_length": self.engine.context_length,
            }
        )

    async def server_info(self, _: web.Request) -> web.Response:
        return json_response(
            {
                **self.config.public_values(),
                "max_total_num_tokens": self.engine.max_total_num_tokens,
                "max_req_input_len": self.engine.context_length - 1,
                "internal_states": [dataclasses.asdict(stats) for stats in self.engine.replica_stats()],
                "version": _version(),
                "pid": os.getpid(),
            }
        )

    async def version(self, _: web.Request) -> web.Response:
        """Report the version, where vLLM does."""
        return json_response({"version": _version()})

    async def load(self, _: web.Request) -> web.Response:
        """Report each replica's load. `num_tokens`: tokens in KV slots and in the prompts that wait."""
        schedulers = [stats.scheduler for stats in self.engine.replica_stats()]
        return json_response(
            [
                {
                    "dp_rank": i,
                    "num_reqs": scheduler.num_running + scheduler.num_waiting,
                    "num_waiting_reqs": scheduler.num_waiting,
                    "num_tokens": scheduler.num_held_tokens + scheduler.num_waiting_tokens,
                    "num_pending_tokens": scheduler.num_waiting_tokens,
                }
                for i, scheduler in enumerate(schedulers)
            ]
        )

    async def flush_cache(self, http_request: web.Request) -> web.Response:
        """Forget the cached prefixes, once nothing runs within the `timeout` of the query, in seconds."""
        deadline = time.monotonic() + _seconds(http_request.query.get("timeout", "0"))
        while not (is_flushed := self.engine.flush_cache()) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(FLUSH_POLL_S)
        if is_flushed:
            return web.Response(text="Cache flushed.\n")
        health = self.engine.health()
        message = f"cache not flushed: {health.num_running} requests are running and {health.num_queued} are waiting"
        return json_response(native_error(400, message), 400)

    async def abort_request(self, http_request: web.Request) -> web.Response:
        """Abort; status 200 also when there is no such request: it may have ended while the abort was on its way."""
        body = await read_body(http_request, AbortRequest)
        if body.abort_all:
            self.engine.abort_all()
        elif body.rid:
            self.live.abort(body.rid)
        else:
            raise InvalidRequest("give a rid, or abort_all: true", "rid")
        return web.Response()

    async def start_profile(self, _: web.Request) -> web.Response:
        self.engine.start_profile(self.config.profile_dir)
        return web.Response(text="Profiling started.\n")

    async def stop_profile(self, _: web.Request) -> web.Response:
        """Stop profiling, and answer when the trace is written."""
        return json_response({"path": await self.engine.stop_profile()})


def _version() -> str:
    try:
        return version("radixloop")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_FLUSH_S:
        rule = f"a number of seconds from 0 to {MAX_FLUSH_S:.0f}"
        raise InvalidRequest(f"timeout must be {rule}, got {text[:20]!r}", "timeout")
    return seconds
