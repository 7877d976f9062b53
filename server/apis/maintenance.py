"""SGLang's routes that hold the engine still: a pause, other weights, device memory released and resumed."""

from aiohttp import web

from engine.engine import Engine
from engine.errors import InvalidRequest
from server.reading.protocol import Fields, json_response, native_error, read_json

LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
PAUSE_MODES = ("abort", "retract", "in_place")
MEMORY_TAGS = ("kv_cache", "weights")
MAX_ROWS = 4096


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
        body = await _read_optional(http_request)
        mode = body.one_of("mode", PAUSE_MODES, "abort")
        num_requests = await self.engine.maintenance.pause(mode)
        return json_response({"message": f"paused; {num_requests} requests: {mode}", "status": "ok"})

    async def resume(self, http_request: web.Request) -> web.Response:
        await _read_optional(http_request)
        await self.engine.maintenance.resume()
        return json_response({"message": "generation goes on", "status": "ok"})

    async def update_weights(self, http_request: web.Request) -> web.Response:
        """Load other weights. One that does not fit is a 400 whose `message` names the tensor; the old weights stay."""
        body = await read_json(http_request)
        model_path = body.text("model_path")
        if not model_path:
            body.fail("model_path", "a folder, a hub id or a .gguf file")
        try:
            num_requests = await self.engine.maintenance.update_weights(
                model_path,
                body.one_of("load_format", LOAD_FORMATS, "auto"),
                abort_all_requests=body.flag("abort_all_requests"),
                flush_cache=body.flag("flush_cache", True),
                weight_version=body.text("weight_version") or None,
            )
        except InvalidRequest as error:
            shown = native_error(400, str(error), error.field)
            return json_response({"success": False, "message": str(error), "num_paused_requests": 0, **shown}, 400)
        return json_response({"success": True, "message": f"serving {model_path}", "num_paused_requests": num_requests})

    async def update_weight_version(self, http_request: web.Request) -> web.Response:
        body = await read_json(http_request)
        version = body.text("new_version")
        if not version:
            body.fail("new_version", "a non-empty string")
        if body.flag("abort_all_requests"):
            self.engine.abort_all()
        self.engine.maintenance.weight_version = version
        return json_response({"success": True, "message": "weight version updated", "new_version": version})

    async def weight(self, http_request: web.Request) -> web.Response:
        """Return the first `truncate_size` rows, as SGLang shows them."""
        body = await read_json(http_request)
        num_rows = body.integer("truncate_size", 100, low=1, high=MAX_ROWS)
        return json_response(await self.engine.maintenance.weight(body.text("name"), num_rows))

    async def release_memory(self, http_request: web.Request) -> web.Response:
        await self.engine.maintenance.release_memory(await _read_tags(http_request))
        return web.Response()

    async def resume_memory(self, http_request: web.Request) -> web.Response:
        await self.engine.maintenance.resume_memory(await _read_tags(http_request))
        return web.Response()


async def _read_tags(http_request: web.Request) -> list[str]:
    body = await _read_optional(http_request)
    tags = body.array("tags") or list(MEMORY_TAGS)
    if not all(tag in MEMORY_TAGS for tag in tags):
        body.fail("tags", f"a list of {' and '.join(MEMORY_TAGS)}")
    return tags


async def _read_optional(http_request: web.Request) -> Fields:
    """Read the body, which may be left out."""
    return await read_json(http_request) if http_request.body_exists else Fields({})
