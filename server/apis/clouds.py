"""Routes that managed clouds expect of a container: SageMaker's /ping and /invocations, Vertex AI's predictions."""

from aiohttp import web

from server.apis.generate import GenerateApi
from server.apis.native import NativeApi
from server.apis.openai import OpenAIApi
from server.reading.protocol import JSON, Fields, read_json


class CloudApi:
    def __init__(self, native: NativeApi, generate: GenerateApi, openai: OpenAIApi) -> None:
        self.native, self.generate, self.openai = native, generate, openai

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/ping", self.native.health),
            web.post("/invocations", self.openai.chat_completions),
            web.post("/vertex_generate", self.predict),
        ]

    async def predict(self, http_request: web.Request) -> web.StreamResponse:
        """Answer /generate in Vertex AI's envelope: a prompt an instance, its other fields as parameters."""
        body = generate_body(await read_json(http_request))
        return await self.generate.generate_from(http_request, body, envelope="predictions")


def generate_body(body: Fields) -> Fields:
    """Return the body of /generate that says the same as Vertex AI's `instances` and `parameters`."""
    instances = body.array("instances")
    kinds = {tuple(instance) if isinstance(instance, dict) else () for instance in instances}
    if kinds not in ({("text",)}, {("input_ids",)}):
        body.fail("instances", "a list of objects with text each, or with input_ids each")
    ((name,),) = kinds
    parameters: JSON = (body.object("parameters") or Fields({})).values
    return Fields({**parameters, name: [instance[name] for instance in instances]})
