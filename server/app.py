"""The aiohttp application: routes, the engine's life, keys, and errors in each API's shape."""

import asyncio
import logging
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from engine.engine import Engine
from engine.errors import EngineError
from server.apis.anthropic import AnthropicApi
from server.apis.batch import LineHandler
from server.apis.batches import Batches
from server.apis.clouds import CloudApi
from server.apis.embeddings import EmbeddingsApi, EmbeddingsRequest
from server.apis.file_prompts import FilePromptApi
from server.apis.file_store import FILE_STORE, FileStore
from server.apis.files import FilesApi
from server.apis.generate import GenerateApi
from server.apis.maintenance import MaintenanceApi
from server.apis.native import NativeApi
from server.apis.ollama import OllamaApi
from server.apis.ollama_embeddings import OllamaEmbeddings
from server.apis.openai import OpenAIApi
from server.apis.request_logging import LoggingApi
from server.apis.responses import ResponsesApi
from server.apis.scores import ScoresApi
from server.apis.text import TextApi
from server.config import ServerConfig
from server.http.bodies import BODY, BODY_BUDGET, BodyBudget
from server.http.intake import GATE, LONG_WORK, Gate, LongWork
from server.http.keys import KeyRing, require_key
from server.http.live import LiveRequests
from server.http.origins import guard_origins, origins_of
from server.http.request_ids import name_answer
from server.http.tracing import Tracing, new_provider
from server.media.reader import MediaReader
from server.pages.routes import Pages
from server.reading.chat import CHATS, Chats
from server.reading.error_shapes import INTERNAL_ERROR, error_response, error_shape
from server.reading.left_out import LeftOutBook, name_left_out
from server.reading.openai_body import ChatRequest, CompletionRequest
from server.reading.protocol import json_response
from server.reading.responses_body import ResponsesRequest
from server.watch.dashboard import Dashboard
from server.watch.heap import Heap
from server.watch.loads import Loads
from server.watch.metrics import Metrics
from server.watch.monitor import Monitor
from server.watch.openapi import OpenApi
from server.watch.recorder import RECORDER, RequestRecorder

logger = logging.getLogger(__name__)


def build_app(engine: Engine, config: ServerConfig) -> web.Application:
    """Serve a started `engine`. `OSError` or `ValueError` if the configuration names a file that is missing or wrong.

    Run it with aiohttp's `handler_cancellation`: a disconnect then cancels the handler, which aborts its requests.
    """
    live = LiveRequests(engine)
    logging_api = LoggingApi(engine.tokenizer, config, live)
    budget = BodyBudget(config.max_held_bytes)
    media = MediaReader(engine, config.media_limits, budget)
    store = FileStore(config.files_folder)
    chats = Chats(engine, config, media, store.find_path)
    origins = origins_of(config)
    tracing = Tracing(new_provider(config.traces_endpoint), config.model_name) if config.traces_endpoint else None
    app = web.Application(
        middlewares=[
            *([tracing.middleware()] if tracing else []),
            answer_errors,
            guard_origins(origins),
            require_key(KeyRing(config)),
        ],
        client_max_size=config.max_body_bytes,
    )
    if tracing:
        app.on_response_prepare.append(tracing.name_span)
        app.cleanup_ctx.append(tracing.running)
    app.on_response_prepare.append(origins.add_cors)
    app.on_response_prepare.append(name_answer)
    app[GATE], app[LONG_WORK] = Gate(), LongWork()
    app[BODY_BUDGET] = budget
    app[CHATS] = chats
    app.on_response_prepare.append(name_left_out)
    left_out = LeftOutBook()
    native = NativeApi(engine, config, live, chats)
    generate = GenerateApi(engine, config, live, media)
    app.add_routes(Pages(config).routes())
    app.add_routes(native.routes())
    app.add_routes(generate.routes())
    app.add_routes(FilePromptApi(engine, live).routes())
    app.add_routes(logging_api.routes())
    app.add_routes(TextApi(engine, chats).routes())
    app.add_routes(AnthropicApi(config, live, chats, left_out).routes())
    app.add_routes(OllamaApi(engine, config, live, chats).routes())
    responses = ResponsesApi(config, live, chats, left_out)
    app.cleanup_ctx.append(responses.running)
    app.add_routes(responses.routes())
    app.add_routes(MaintenanceApi(engine).routes())
    openai = OpenAIApi(engine, config, live, chats)
    app.add_routes(openai.routes())
    app.add_routes(CloudApi(native, generate, openai).routes())
    embeddings = EmbeddingsApi(engine, config, live, chats)
    app.add_routes(embeddings.routes())
    app.add_routes(ScoresApi(engine, config, live).routes())
    app.add_routes(OllamaEmbeddings(engine, config, live).routes())
    app[FILE_STORE] = store
    handlers = {
        "/v1/chat/completions": LineHandler(ChatRequest, openai.chat),
        "/v1/completions": LineHandler(CompletionRequest, openai.complete),
        "/v1/embeddings": LineHandler(EmbeddingsRequest, embeddings.embed),
        "/v1/responses": LineHandler(ResponsesRequest, responses.respond),
    }
    batches = Batches(
        store,
        handlers,
        engine.max_running_requests,
        config.max_body_bytes,
        max_held_bytes=max(1, config.max_held_bytes // 4),
        shares_cache=config.share_prefix_cache,
    )
    app.cleanup_ctx.append(batches.running)
    app.on_shutdown.append(batches.stop)
    app.add_routes(batches.routes())
    app.add_routes(FilesApi(store, config.max_file_bytes, batches.reader_of).routes())
    if config.crash_dump_folder:
        recorder = RequestRecorder(Path(config.crash_dump_folder), config.public_values())
        live.arrival_observers.append(recorder.remember)
        live.observers.append(recorder.observe)
        app[RECORDER] = recorder
    app.add_routes(OpenApi().routes())
    monitor = Monitor(engine)
    live.observers.append(monitor.observe)
    app.cleanup_ctx.append(monitor.running)
    app.cleanup_ctx.append(Heap(engine).running)
    app.add_routes(Loads(engine, monitor).routes())
    app.add_routes(Dashboard(engine, monitor, config, live).routes())
    if config.enable_metrics:
        metrics = Metrics(engine, monitor, config.model_name, left_out.counts, config.page_size)
        live.observers.append(metrics.observe)
        app.add_routes(metrics.routes())
    return app


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error into an answer in the shape of the API that was called."""
    headers: dict[str, str] = {}
    try:
        return await handler(request)
    except EngineError as error:
        return error_response(request.path, error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        status, message = error.status, _http_message(request, error)
        headers = {name: value for name, value in error.headers.items() if name in ("Allow", "WWW-Authenticate")}
    except web.RequestPayloadError:
        status, message = 400, "the body is not what its Content-Encoding or Transfer-Encoding says"
    except ConnectionError:  # the client has gone: ends as any disconnect does, while aiohttp would log this one
        raise asyncio.CancelledError from None
    except Exception:
        # The outermost frame of our code: whatever went wrong fails this request alone, and its trace is in the log.
        logger.exception("%s %s failed", request.method, request.path)
        if request.writer.output_size:  # an answer has begun: all that can be said is that it ends too early
            raise ConnectionResetError("failed in the middle of an answer") from None
        status, message = 500, INTERNAL_ERROR
    finally:
        if (body := request.get(BODY)) is not None:
            body.drop()
    return json_response(error_shape(request.path)(status, message, None, None), status, headers)


def _http_message(request: web.Request, error: web.HTTPException) -> str:
    if isinstance(error, web.HTTPNotFound):
        return f"there is no route {request.path}"
    if isinstance(error, web.HTTPMethodNotAllowed):
        return f"{request.path} takes {' or '.join(sorted(error.allowed_methods))}, not {request.method}"
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return f"the body is longer than {request.client_max_size} bytes, the limit set by --max-body-bytes"
    return error.text or error.reason
