"""/openapi.json: an OpenAPI 3.1 document of every route, made from the one table here.

A route that the table does not know fails a test, and the fuzzer in the tests sends what the table allows.
"""

import dataclasses
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from aiohttp import web

from engine.declared import Object
from engine.request import SamplingFields
from server.apis.batches import BatchRequest
from server.apis.clouds import VertexRequest
from server.apis.embeddings import ClassifyRequest, EmbeddingsRequest, EncodeRequest
from server.apis.generate import GenerateRequest
from server.apis.maintenance import (
    MemoryRequest,
    PauseRequest,
    UpdateVersionRequest,
    UpdateWeightsRequest,
    WeightRequest,
)
from server.apis.native import AbortRequest
from server.apis.ollama import OllamaChatRequest, OllamaGenerateRequest, OllamaModel, PullRequest
from server.apis.ollama_embeddings import EmbedPromptRequest, EmbedRequest
from server.apis.request_logging import LoggingRequest
from server.apis.scores import RerankRequest, ScoreRequest
from server.apis.sessions import CloseSession, OpenSession
from server.apis.text import ParseFunctionCallRequest, SeparateReasoningRequest
from server.reading import responses_body
from server.reading.error_shapes import (
    ErrorShape,
    anthropic_error,
    error_shape,
    native_error,
    ollama_error,
    openai_error,
)
from server.reading.messages_body import CountTokensRequest, MessagesRequest
from server.reading.openai_body import (
    ChatRequest,
    ChatTool,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    ResponseFormat,
    TokenizeRequest,
)
from server.reading.protocol import JSON, json_response
from server.reading.responses_body import ResponsesRequest
from server.watch.monitor import STEPS_S
from server.watch.schemas import (
    ANY_OBJECT,
    BOOLEAN,
    COMPONENTS,
    STRING,
    TOKEN_IDS,
    array,
    integer,
    obj,
    one_of,
    or_list,
    path_parameter,
    ref,
    schemas_of,
    with_meanings,
)


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one route. `body` and `answer` are schemas; an answer of None is no JSON."""

    summary: str
    tag: str
    body: type[Object] | JSON | None = None
    answer: JSON | None = None
    media_type: str = "application/json"  # of the answer
    is_streaming: bool = False  # with `stream`
    stream_type: str = "text/event-stream"  # of a streamed answer
    statuses: tuple[int, ...] = ()  # of errors, besides those any request can meet
    is_open: bool = False  # needs no key
    parameters: tuple[JSON, ...] = ()
    error: JSON | None = None  # if not the API's own shape
    form: JSON | None = None  # schema of a multipart body


GENERATE = Operation(
    "Answer one prompt or many", "SGLang", GenerateRequest,
    one_of(ref("GenerateAnswer"), array(ref("GenerateAnswer"))), is_streaming=True, statuses=(429,),
)  # fmt: skip
FLUSH = Operation(
    "Forget every cached prefix, unless something runs", "server", media_type="text/plain", statuses=(400,),
    parameters=({"name": "timeout", "in": "query", "schema": {"type": "number", "minimum": 0, "maximum": 3600}},),
)  # fmt: skip
ABORT = Operation("End a request, or all", "server", AbortRequest, media_type="text/plain")
START_PROFILE = Operation("Begin to record what host and device do", "server", media_type="text/plain", statuses=(400,))
STOP_PROFILE = Operation("Write what was recorded to a file", "server", answer=obj({"path": STRING}), statuses=(400,))
MODEL_INFO = Operation("About the model", "server", answer=ANY_OBJECT)
SERVER_INFO = Operation("Every option, and what it was resolved to", "server", answer=ANY_OBJECT)
HEALTH_ERROR = one_of(ref("Health"), ref("NativeError"))
HEALTH = Operation(
    "Judged by the age of the last step and of the oldest queued request", "server", answer=ref("Health"),
    statuses=(503,), is_open=True, error=HEALTH_ERROR,
)  # fmt: skip
TOKENIZE = Operation("Token ids of texts, or of a conversation", "tokens", TokenizeRequest, ANY_OBJECT)
DETOKENIZE = Operation(
    "Text of token ids",
    "tokens",
    DetokenizeRequest,
    obj({"text": or_list(STRING), "prompt": {**or_list(STRING), "description": "the same, vLLM's name"}}, ["text"]),
)
COMPLETIONS = Operation(
    "Complete prompts", "OpenAI", CompletionRequest, ref("OpenAIAnswer"), is_streaming=True, statuses=(404, 429)
)
CHAT_COMPLETIONS = Operation(
    "Answer a conversation", "OpenAI", ChatRequest, ref("OpenAIAnswer"), is_streaming=True, statuses=(404, 429)
)
RENDER = Operation(
    "The prompt that a conversation makes", "OpenAI", ChatRequest,
    obj({"prompt": STRING, "prompt_token_ids": TOKEN_IDS}, ["prompt", "prompt_token_ids"]), statuses=(404,),
)  # fmt: skip
PARSE_FUNCTION_CALL = Operation(
    "Tool calls in a text", "tokens", ParseFunctionCallRequest,
    obj({"normal_text": STRING, "calls": array(ANY_OBJECT)}, ["normal_text", "calls"]),
)  # fmt: skip
SEPARATE_REASONING = Operation(
    "Reasoning in a text", "tokens", SeparateReasoningRequest,
    obj({"reasoning_text": STRING, "text": STRING}, ["reasoning_text", "text"]),
)  # fmt: skip
MODELS = Operation("The models there are", "OpenAI", answer=obj({"data": array(ref("ModelCard"))}, ["data"]))
MODEL = Operation(
    "One model", "OpenAI", answer=ref("ModelCard"), statuses=(404,),
    parameters=path_parameter("model"),
)  # fmt: skip


def page(name: str) -> JSON:
    return obj({"object": {"const": "list"}, "data": array(ref(name)), "has_more": BOOLEAN}, ["data", "has_more"])


PAGE_PARAMETERS = (
    {"name": "limit", "in": "query", "schema": integer(1)},
    {"name": "after", "in": "query", "schema": STRING},
)
UPLOAD = Operation(
    "Store the lines of a batch, or a picture", "OpenAI", answer=ref("File"), statuses=(400, 403, 413, 503),
    form=obj(
        {"file": {"type": "string", "format": "binary"}, "purpose": {"enum": ["batch", "vision", "user_data"]}},
        ["file", "purpose"],
    ),
)  # fmt: skip
GENERATE_FROM_FILE = Operation(
    "Answer the text of a file, greedily", "SGLang", answer=ref("GenerateAnswer"), statuses=(400, 413, 429),
    form=obj({"file": {"type": "string", "format": "binary"}}, ["file"]),
)  # fmt: skip
CREATE_BATCH = Operation(
    "Answer the lines of a file when nothing more urgent is to be done", "OpenAI", BatchRequest, ref("Batch"),
    statuses=(404, 503),
)  # fmt: skip

MESSAGE_ANSWER = Operation(
    "Anthropic's messages", "Anthropic", MessagesRequest, ref("AnthropicMessage"), is_streaming=True,
    statuses=(404, 429),
)  # fmt: skip
COUNT_TOKENS = Operation(
    "Tokens of a conversation's prompt", "Anthropic", CountTokensRequest,
    obj({"input_tokens": integer(1)}, ["input_tokens"]), statuses=(404,),
)  # fmt: skip
COUNT_RESPONSE = Operation(
    "Tokens of a response's prompt", "OpenAI", ResponsesRequest,
    obj({"object": {"const": "response.input_tokens"}, "input_tokens": integer(1)}, ["object", "input_tokens"]),
    statuses=(404,),
)  # fmt: skip
CREATE_RESPONSE = Operation(
    "OpenAI's responses", "OpenAI", ResponsesRequest, ref("Response"), is_streaming=True, statuses=(404, 429)
)
RESPONSE_ID = ({"name": "response_id", "in": "path", "required": True, "schema": STRING},)
RESPONSE = Operation(
    "A stored response, or the events of one made with background and stream", "OpenAI", answer=ref("Response"),
    is_streaming=True, statuses=(400, 404),
    parameters=(
        *RESPONSE_ID,
        {"name": "stream", "in": "query", "schema": BOOLEAN},
        {"name": "starting_after", "in": "query", "schema": integer(0)},
    ),
)  # fmt: skip
RESPONSE_INPUT = Operation(
    "The items that a response answered", "OpenAI",
    answer=obj({"object": {"const": "list"}, "data": array(ANY_OBJECT), "has_more": BOOLEAN}, ["data", "has_more"]),
    statuses=(400, 404),
    parameters=(
        *RESPONSE_ID, *PAGE_PARAMETERS, {"name": "order", "in": "query", "schema": {"enum": ["asc", "desc"]}},
    ),
)  # fmt: skip
CANCEL_RESPONSE = Operation(
    "End a background response", "OpenAI", answer=ref("Response"), statuses=(400, 404), parameters=RESPONSE_ID
)
DELETE_RESPONSE = Operation(
    "Forget a response", "OpenAI", answer=obj({"deleted": BOOLEAN}), statuses=(404,), parameters=RESPONSE_ID
)
NDJSON = "application/x-ndjson"
OLLAMA_CHAT = Operation(
    "Ollama's chat", "Ollama", OllamaChatRequest, ref("OllamaAnswer"), is_streaming=True, stream_type=NDJSON,
    statuses=(404, 429),
)  # fmt: skip
OLLAMA_GENERATE = Operation(
    "Ollama's completion", "Ollama", OllamaGenerateRequest, ref("OllamaAnswer"), is_streaming=True,
    stream_type=NDJSON, statuses=(404, 429),
)  # fmt: skip
CONFIGURE_LOGGING = Operation(
    "Switch the lines about requests on or off", "server",
    LoggingRequest,
    obj({"log_requests": BOOLEAN, "log_requests_level": integer(0, 3)}),
)  # fmt: skip
OLLAMA_EMBED = Operation(
    "Vectors of texts", "Ollama", EmbedRequest,
    obj({"model": STRING, "embeddings": array(array({"type": "number"})), "prompt_eval_count": integer(0)}),
    statuses=(404, 429),
)  # fmt: skip
OLLAMA_EMBED_PROMPT = Operation(
    "The vector of a text", "Ollama", EmbedPromptRequest,
    obj({"embedding": array({"type": "number"})}, ["embedding"]), statuses=(404, 429),
)  # fmt: skip
OLLAMA_PULL = Operation(
    "Fetch the model, which is there", "Ollama", PullRequest, obj({"status": STRING}),
    is_streaming=True, stream_type=NDJSON, statuses=(404,),
)  # fmt: skip
OLLAMA_SHOW = Operation("About the model", "Ollama", OllamaModel, obj({"capabilities": array(STRING)}), statuses=(404,))
OLLAMA_MODELS = obj({"models": array(ANY_OBJECT)}, ["models"])
EMBEDDINGS = Operation("Vectors of length 1", "OpenAI", EmbeddingsRequest, ref("Embeddings"), statuses=(404, 429))
ENCODE = Operation(
    "Vectors of length 1", "SGLang", EncodeRequest, one_of(ref("Encoded"), array(ref("Encoded"))),
    statuses=(429,),
)  # fmt: skip
CLASSIFY = dataclasses.replace(ENCODE, summary="Scores of a model with a classification head")
CLASSIFY_WITH_LABELS = Operation(
    "Probabilities of a classifier's labels", "OpenAI", ClassifyRequest, ANY_OBJECT, statuses=(404, 429)
)
RERANK = Operation("Documents, best first", "OpenAI", RerankRequest, ANY_OBJECT, statuses=(404, 429))
RERANK_FOR_SGLANG = dataclasses.replace(RERANK, answer=array(ANY_OBJECT))
SCORE = Operation(
    "How well texts fit, or how likely tokens follow", "OpenAI", ScoreRequest, ANY_OBJECT, statuses=(404, 429)
)

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/generate"): GENERATE,
    ("PUT", "/generate"): GENERATE,
    ("POST", "/generate_from_file"): GENERATE_FROM_FILE,
    ("POST", "/v1/chat/completions"): CHAT_COMPLETIONS,
    ("POST", "/v1/chat/completions/render"): RENDER,
    ("POST", "/v1/completions"): COMPLETIONS,
    ("GET", "/v1/models"): MODELS,
    ("GET", "/v1/models/{model}"): MODEL,
    ("POST", "/v1/messages"): MESSAGE_ANSWER,
    ("POST", "/v1/messages/count_tokens"): COUNT_TOKENS,
    ("POST", "/v1/responses"): CREATE_RESPONSE,
    ("POST", "/v1/responses/input_tokens"): COUNT_RESPONSE,
    ("GET", "/v1/responses/{response_id}"): RESPONSE,
    ("GET", "/v1/responses/{response_id}/input_items"): RESPONSE_INPUT,
    ("DELETE", "/v1/responses/{response_id}"): DELETE_RESPONSE,
    ("POST", "/v1/responses/{response_id}/cancel"): CANCEL_RESPONSE,
    ("POST", "/api/chat"): OLLAMA_CHAT,
    ("POST", "/api/generate"): OLLAMA_GENERATE,
    ("POST", "/configure_logging"): CONFIGURE_LOGGING,
    ("POST", "/api/show"): OLLAMA_SHOW,
    ("POST", "/api/embed"): OLLAMA_EMBED,
    ("POST", "/api/embeddings"): OLLAMA_EMBED_PROMPT,
    ("POST", "/api/pull"): OLLAMA_PULL,
    ("GET", "/api/tags"): Operation("The models there are", "Ollama", answer=OLLAMA_MODELS),
    ("GET", "/api/ps"): Operation("The models in memory", "Ollama", answer=OLLAMA_MODELS),
    ("GET", "/api/version"): Operation("Of Ollama's API", "Ollama", answer=obj({"version": STRING})),
    ("POST", "/open_session"): Operation("Begin a session", "SGLang", OpenSession, STRING),
    ("POST", "/close_session"): Operation("Forget a session", "SGLang", CloseSession, media_type="text/plain"),
    ("POST", "/pause_generation"): Operation(
        "Hold still; what runs ends, is computed anew or goes on later", "server", PauseRequest, ref("Done")
    ),
    ("POST", "/continue_generation"): Operation("End a pause", "server", ANY_OBJECT, ref("Done")),
    ("POST", "/update_weights_from_disk"): Operation(
        "Serve the weights of another checkpoint of the same shape", "server", UpdateWeightsRequest, ref("Done")
    ),
    ("POST", "/update_weight_version"): Operation(
        "Name the weights", "server", UpdateVersionRequest, ref("Done")
    ),
    ("POST", "/get_weights_by_name"): Operation(
        "The first rows of a weight", "server", WeightRequest, array({})
    ),
    ("POST", "/release_memory_occupation"): Operation(
        "Give device memory back; requests wait", "server", MemoryRequest, media_type="text/plain"
    ),
    ("POST", "/resume_memory_occupation"): Operation(
        "Take device memory again", "server", MemoryRequest, media_type="text/plain"
    ),
    ("POST", "/v1/embeddings"): EMBEDDINGS,
    ("POST", "/encode"): ENCODE,
    ("PUT", "/encode"): ENCODE,
    ("POST", "/classify"): CLASSIFY,
    ("PUT", "/classify"): CLASSIFY,
    ("POST", "/v1/classify"): CLASSIFY_WITH_LABELS,
    ("POST", "/v1/score"): SCORE,
    ("POST", "/score"): SCORE,
    ("POST", "/v1/rerank"): RERANK_FOR_SGLANG,
    ("POST", "/rerank"): RERANK,
    ("POST", "/v2/rerank"): RERANK,
    ("POST", "/v1/files"): UPLOAD,
    ("GET", "/v1/files"): Operation(
        "The files there are", "OpenAI", answer=page("File"), statuses=(400, 503), parameters=PAGE_PARAMETERS
    ),
    ("GET", "/v1/files/{file_id}"): Operation(
        "One file", "OpenAI", answer=ref("File"), statuses=(404, 503), parameters=path_parameter("file_id")
    ),
    ("DELETE", "/v1/files/{file_id}"): Operation(
        "Delete a file", "OpenAI", answer=ANY_OBJECT, statuses=(400, 404, 503), parameters=path_parameter("file_id")
    ),
    ("GET", "/v1/files/{file_id}/content"): Operation(
        "What a file holds", "OpenAI", media_type="application/octet-stream", statuses=(404, 503),
        parameters=path_parameter("file_id"),
    ),
    ("POST", "/v1/batches"): CREATE_BATCH,
    ("GET", "/v1/batches"): Operation(
        "The batches there are", "OpenAI", answer=page("Batch"), statuses=(400, 503), parameters=PAGE_PARAMETERS
    ),
    ("GET", "/v1/batches/{batch_id}"): Operation(
        "One batch", "OpenAI", answer=ref("Batch"), statuses=(404, 503), parameters=path_parameter("batch_id")
    ),
    ("POST", "/v1/batches/{batch_id}/cancel"): Operation(
        "End a batch now; the answers there are stay", "OpenAI", answer=ref("Batch"), statuses=(400, 404, 503),
        parameters=path_parameter("batch_id"),
    ),
    ("POST", "/tokenize"): TOKENIZE,
    ("POST", "/v1/tokenize"): TOKENIZE,
    ("GET", "/tokenizer_info"): Operation("Named special tokens and the chat template", "tokens", answer=ANY_OBJECT),
    ("POST", "/detokenize"): DETOKENIZE,
    ("POST", "/v1/detokenize"): DETOKENIZE,
    ("POST", "/parse_function_call"): PARSE_FUNCTION_CALL,
    ("POST", "/separate_reasoning"): SEPARATE_REASONING,
    ("GET", "/"): Operation(
        "The chat page, for who accepts HTML; else a line that a server is there", "server", media_type="text/plain",
        is_open=True,
    ),
    ("GET", "/docs"): Operation("These documents, as a page", "server", media_type="text/html", is_open=True),
    ("GET", "/health"): HEALTH,
    ("GET", "/ping"): HEALTH,
    ("POST", "/invocations"): CHAT_COMPLETIONS,
    ("POST", "/vertex_generate"): Operation(
        "/generate for Vertex AI: a prompt an instance, all other fields as parameters", "SGLang",
        VertexRequest,
        obj({"predictions": array(ref("GenerateAnswer"))}), statuses=(429,),
    ),
    ("GET", "/health_generate"): Operation(
        "As /health, and an idle engine is asked for one token", "server", answer=ref("Health"), statuses=(503,),
        error=HEALTH_ERROR,
    ),
    ("GET", "/get_model_info"): MODEL_INFO,
    ("GET", "/model_info"): MODEL_INFO,
    ("GET", "/get_server_info"): SERVER_INFO,
    ("GET", "/server_info"): SERVER_INFO,
    ("GET", "/get_load"): Operation("Requests and tokens of each replica", "server", answer=array(ANY_OBJECT)),
    ("GET", "/v1/loads"): Operation(
        "Load of each replica against what it can take", "server", answer=ANY_OBJECT, statuses=(400,),
        parameters=(
            {"name": "dp_rank", "in": "query", "schema": integer(0)},
            {"name": "include", "in": "query", "schema": STRING},
        ),
    ),
    ("GET", "/load"): Operation(
        "The number of requests that run or wait, as vLLM has it", "server", answer=obj({"server_load": integer(0)})
    ),
    ("GET", "/version"): Operation("The server's version", "server", answer=obj({"version": STRING})),
    ("POST", "/abort_request"): ABORT,
    ("GET", "/flush_cache"): FLUSH,
    ("POST", "/flush_cache"): FLUSH,
    ("GET", "/start_profile"): START_PROFILE,
    ("POST", "/start_profile"): START_PROFILE,
    ("GET", "/stop_profile"): STOP_PROFILE,
    ("POST", "/stop_profile"): STOP_PROFILE,
    ("GET", "/metrics"): Operation("Prometheus metrics", "server", media_type="text/plain"),
    ("GET", "/dashboard"): Operation("The live page", "server", media_type="text/html", is_open=True),
    ("GET", "/dashboard/data"): Operation(
        "What the live page shows", "server", answer=ANY_OBJECT, statuses=(400,),
        parameters=({"name": "span", "in": "query", "schema": {"enum": [str(span) for span in STEPS_S]}},),
    ),
    ("GET", "/openapi.json"): Operation("This document", "server", answer=ANY_OBJECT),
}  # fmt: skip

# Parts of bodies that have a schema all the same.
KEPT_AS_WRITTEN = (SamplingFields, Message, ChatTool, ResponseFormat, *responses_body.KEPT_AS_WRITTEN)
BODIES = schemas_of(
    dict.fromkeys([*KEPT_AS_WRITTEN, *(one.body for one in OPERATIONS.values() if isinstance(one.body, type))])
)
ERROR_NAMES: dict[ErrorShape, str] = {
    native_error: "NativeError",
    openai_error: "OpenAIError",
    anthropic_error: "AnthropicError",
    ollama_error: "OllamaError",
}
STATUS_TEXTS = {
    400: "the request is wrong; the message says which field and why",
    401: "a key is missing or wrong",
    403: "a web page of another site may not do this",
    404: "there is no such thing",
    413: "the body is longer than --max-body-bytes, or a file than --max-file-bytes",
    429: "the queue is full; Retry-After says when to come back",
    503: "not now: starting, stuck or stopping",
}


class OpenApi:
    def routes(self) -> list[web.RouteDef]:
        return [web.get("/openapi.json", self.document)]

    async def document(self, http_request: web.Request) -> web.Response:
        return json_response(document_of(http_request.app))


def routes_of(app: web.Application) -> list[tuple[str, str]]:
    """Return (method, path) of each route, without the HEAD that comes with every GET."""
    return [
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    ]


def document_of(app: web.Application) -> JSON:
    paths: dict[str, JSON] = {}
    for method, path in routes_of(app):
        paths.setdefault(path, {})[method.lower()] = _described(method, path, OPERATIONS[method, path])
    try:
        number = version("radixloop")
    except PackageNotFoundError:  # run from a checkout
        number = "0"
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "radixloop",
            "version": number,
            "description": "The APIs of SGLang, OpenAI, Anthropic and Ollama, of one model.",
        },
        "paths": paths,
        "components": {
            "schemas": COMPONENTS | BODIES,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"key": []}, {"x-api-key": []}, {}],
    }


def _described(method: str, path: str, operation: Operation) -> JSON:
    content: JSON = {operation.media_type: {"schema": with_meanings(operation.answer or STRING)}}
    if operation.is_streaming:
        content[operation.stream_type] = {"schema": {"type": "string", "description": "with `stream`"}}
    error_schema = operation.error or ref(ERROR_NAMES[error_shape(path)])
    error = {"application/json": {"schema": error_schema}}
    statuses = {*operation.statuses}
    if not operation.is_open:
        statuses.add(401)
    if operation.body is not None:
        statuses |= {400, 413}
    described: JSON = {
        "operationId": f"{method.lower()}{path.translate(str.maketrans('/.{}', '____'))}",
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": {
            "200": {"description": "the answer", "content": content},
            **{str(status): {"description": STATUS_TEXTS[status], "content": error} for status in sorted(statuses)},
        },
    }
    if operation.parameters:
        described["parameters"] = list(operation.parameters)
    if operation.body is not None:
        schema = ref(operation.body.__name__) if isinstance(operation.body, type) else operation.body
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if operation.form is not None:
        described["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": operation.form}}}
    if operation.is_open:
        described["security"] = [{}]
    return described
