"""SGLang's routes that hold the engine still: a pause, other weights, device memory released and resumed."""

from typing import Annotated, Literal, get_args

from aiohttp import web
from msgspec import Meta

from engine.declared import Object
from engine.engine import Engine
from engine.errors import InvalidRequest
from server.reading.error_shapes import native_error
from server.reading.protocol import json_response, read_body, read_optional_body

MAX_ROWS = 4096
MemoryTag = Literal["kv_cache", "weights"]


class PauseRequest(Object):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class UpdateWeightsRequest(Object):
    model_path: Annotated[str, Meta(min_length=1, description="a folder, a hub id or a .gguf file")]
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = "auto"
    abort_all_requests: bool = False
    flush_cache: bool = True
    weight_version: str = ""


class UpdateVersionRequest(Object):
    new_version: Annotated[str, Meta(min_length=1)]
    abort_all_requests: bool = False


class WeightRequest(Object):
    name: str = ""
    truncate_size: Annotated[int, Meta(ge=1, le=MAX_ROWS)] = 100


class MemoryRequest(Object):
    tags: list[MemoryTag] = []


class MaintenanceApi:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/pause_generation", self.pause),
            web.post("/continue_generation", self.resume),
            web.post("/update_weights_from_disk", self.update_weights),
            web.post("/update_weight_version", self.update_weight_version),
            web.post("/get_weights_by_name", self.weight),
            web.post("/release_memory_occupation", self.release_memory),
            web.post("/resume_memory_occupation", self.resume_memory),
        ]

    async def pause(self, http_request: web.Request) -> web.Response:
        body = await read_optional_body(http_request, PauseRequest)
        num_requests = await self.engine.maintenance.pause(body.mode)
        return json_response({"message": f"paused; {num_requests} requests: {body.mode}", "status": "ok"})

    async def resume(self, http_request: web.Request) -> web.Response:
        await read_optional_body(http_request, Object)
        await self.engine.maintenance.resume()
        return json_response({"message": "generation goes on", "status": "ok"})

    async def update_weights(self, http_request: web.Request) -> web.Response:
        """Load other weights. One that does not fit is a 400 whose `message` names the tensor; the old weights stay."""
        body = await read_body(http_request, UpdateWeightsRequest)
        try:
            num_requests = await self.engine.maintenance.update_weights(
                body.model_path,
                body.load_format,
                abort_all_requests=body.abort_all_requests,
                flush_cache=body.flush_cache,
                weight_version=body.weight_version or None,
            )
        except InvalidRequest as error:
            shown = native_error(400, str(error), error.field)
            return json_response({"success": False, "message": str(error), "num_paused_requests": 0, **shown}, 400)
        message = f"serving {body.model_path}"
        return json_response({"success": True, "message": message, "num_paused_requests": num_requests})

    async def update_weight_version(self, http_request: web.Request) -> web.Response:
        body = await read_body(http_request, UpdateVersionRequest)
        if body.abort_all_requests:
            self.engine.abort_all()
        self.engine.maintenance.weight_version = body.new_version
        return json_response({"success": True, "message": "weight version updated", "new_version": body.new_version})

    async def weight(self, http_request: web.Request) -> web.Response:
        """Return the first `truncate_size` rows, as SGLang shows them."""
        body = await read_body(http_request, WeightRequest)
        return json_response(await self.engine.maintenance.weight(body.name, body.truncate_size))

    async def release_memory(self, http_request: web.Request) -> web.Response:
        await self.engine.maintenance.release_memory(await _read_tags(http_request))
        return web.Response()

    async def resume_memory(self, http_request: web.Request) -> web.Response:
        await self.engine.maintenance.resume_memory(await _read_tags(http_request))
        return web.Response()


async def _read_tags(http_request: web.Request) -> list[str]:
    body = await read_optional_body(http_request, MemoryRequest)
    return [*(body.tags or get_args(MemoryTag))]
