"""Routes that managed clouds expect of a container: SageMaker's /ping and /invocations, Vertex AI's predictions."""

from aiohttp import web

from engine.declared import Object, convert
from server.apis.generate import GenerateApi, GenerateRequest
from server.apis.native import NativeApi
from server.apis.openai import OpenAIApi
from server.reading.protocol import JSON, read_body


class VertexRequest(Object):
    instances: list[JSON]
    parameters: JSON = {}


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
        body = generate_request(await read_body(http_request, VertexRequest))
        return await self.generate.generate_from(http_request, body, envelope="predictions")


def generate_request(body: VertexRequest) -> GenerateRequest:
    """Return the body of /generate that says the same as Vertex AI's `instances` and `parameters`."""
    kinds = {tuple(instance) for instance in body.instances}
    if kinds not in ({("text",)}, {("input_ids",)}):
        raise body.wrong("instances", "a list of objects with text each, or with input_ids each")
    ((name,),) = kinds
    return convert({**body.parameters, name: [instance[name] for instance in body.instances]}, GenerateRequest)
