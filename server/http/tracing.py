"""Traces by OpenTelemetry: a span for each HTTP request that asks for something, and its stages below it.

    POST /v1/chat/completions
    ├── queue      from arrival to the first step
    ├── prefill    to the first token
    ├── decode     to the last one
    └── deliver    until the last byte has been written

The stages are made when the request ends, out of times that the engine keeps anyway, so that a token costs nothing.
The caller's span comes in by the header `traceparent` (W3C), and the server's own goes out in `traceresponse`.
Without --otlp-traces-endpoint nothing of this is imported.
"""

import asyncio
import importlib.util
import os
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from engine.state import RequestState
from server.http.live import STATES

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

SERVICE = "radixloop"
GRPC_SCHEMES = ("grpc", "http", "")  # without a certificate
HTTP_PORT = 4318  # where OpenTelemetry's collectors take HTTP; elsewhere they take gRPC
EXPORT_S = 5.0  # for spans to leave
MAX_TRACED = 16  # requests made by one HTTP request whose stages are spans: a list may hold thousands of prompts
SPAN: web.RequestKey[Any] = web.RequestKey("span", object)


class TracingUnavailable(Exception):
    """Traces were asked for, and what sends them is not installed."""


def check_tracing(endpoint: str | None) -> None:
    """Raise `TracingUnavailable` where spans for `endpoint` could not be sent."""
    if endpoint is None:
        return
    try:
        is_there = importlib.util.find_spec(f"opentelemetry.exporter.otlp.proto.{protocol_of(endpoint)}") is not None
    except ModuleNotFoundError:  # of a package above it
        is_there = False
    if not is_there:
        raise TracingUnavailable("--otlp-traces-endpoint needs OpenTelemetry: pip install 'radixloop[otlp]'")


def protocol_of(endpoint: str) -> str:
    """Return "grpc" or "http": as OpenTelemetry's variable says, or as the endpoint looks."""
    given = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if given:
        return "http" if given.startswith("http") else "grpc"
    parts = urlsplit(endpoint if "://" in endpoint else f"grpc://{endpoint}")
    return "http" if parts.port == HTTP_PORT or parts.path.endswith("/v1/traces") else "grpc"


def new_provider(endpoint: str) -> "TracerProvider":
    """Return a provider that sends spans to `endpoint` from a thread of its own, a batch at a time."""
    check_tracing(endpoint)
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

    exporter: SpanExporter
    if protocol_of(endpoint) == "http":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        url = endpoint if "://" in endpoint else f"http://{endpoint}"
        path = "" if urlsplit(url).path.strip("/") else "/v1/traces"
        exporter = OTLPSpanExporter(endpoint=url.rstrip("/") + path, timeout=EXPORT_S)
    else:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        scheme, has_scheme, address = endpoint.rpartition("://")
        is_open = scheme in GRPC_SCHEMES
        exporter = GrpcExporter(
            endpoint=address if is_open or not has_scheme else endpoint, insecure=is_open, timeout=5
        )
    provider = _named_provider()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _named_provider() -> "TracerProvider":
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    name = os.environ.get("OTEL_SERVICE_NAME", SERVICE)
    return TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)


class Tracing:
    """Makes spans of HTTP requests that POST, as a middleware and a signal of the application."""

    def __init__(self, provider: "TracerProvider", model_name: str) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider, self.model_name = provider, model_name
        self._tracer = provider.get_tracer(SERVICE)
        self._propagator = TraceContextTextMapPropagator()
        self._kind = trace.SpanKind.SERVER
        self._set_span = trace.set_span_in_context
        self._error = trace.StatusCode.ERROR

    async def running(self, _: web.Application) -> AsyncIterator[None]:
        """Send what is left when the application ends: a cleanup context."""
        yield
        await asyncio.to_thread(self.provider.force_flush, int(EXPORT_S * 1000))
        await asyncio.to_thread(self.provider.shutdown)

    def middleware(self) -> Middleware:
        @web.middleware
        async def trace(request: web.Request, handler: Handler) -> web.StreamResponse:
            if request.method != "POST":
                return await handler(request)
            parent = self._propagator.extract(request.headers)
            span = self._tracer.start_span(f"POST {request.path}", parent, self._kind)
            request[SPAN] = span
            status: int | None = None
            try:
                response = await handler(request)
                status = response.status
                return response
            finally:
                self._end(span, request, status)

        return trace

    async def name_span(self, request: web.Request, response: web.StreamResponse) -> None:
        """Tell the client which span its answer is: a signal of `on_response_prepare`."""
        span: Span | None = request.get(SPAN)
        if span is not None:
            carrier: dict[str, str] = {}
            self._propagator.inject(carrier, self._set_span(span))
            response.headers["traceresponse"] = carrier.get("traceparent", "")

    def _end(self, span: "Span", request: web.Request, status: int | None) -> None:
        """End a request's span, with the stages of what it made."""
        span.set_attribute("http.request.method", "POST")
        span.set_attribute("url.path", request.path)
        if status is None:  # cancelled: the client has gone
            span.set_status(self._error, "the client has gone")
        else:
            span.set_attribute("http.response.status_code", status)
            if status >= 500:
                span.set_status(self._error)
        states = request.get(STATES) or ()
        if states and span.is_recording():
            self._describe(span, states)
        span.end()

    def _describe(self, span: "Span", states: Sequence[RequestState]) -> None:
        """Give a span the sums of its requests, and the first of them their stages."""
        reasons = {state.finish_reason.type for state in states if state.finish_reason}
        sums: dict[str, str | int | list[str]] = {
            "gen_ai.request.model": self.model_name,
            "gen_ai.request.id": states[0].rid,
            "gen_ai.usage.input_tokens": sum(state.prompt_len for state in states),
            "gen_ai.usage.output_tokens": sum(len(state.output_ids) for state in states),
            "gen_ai.response.finish_reasons": sorted(reasons),
            "radixloop.num_requests": len(states),
        }
        for name, value in sums.items():
            span.set_attribute(name, value)
        now, now_ns = time.perf_counter(), time.time_ns()
        context = self._set_span(span)
        for state in states[:MAX_TRACED]:
            for name, begin, end, counts in stages_of(state, now):
                attributes: dict[str, str | int] = {"gen_ai.request.id": state.rid, **counts}
                begin_ns, end_ns = (now_ns - int((now - at) * 1e9) for at in (begin, end))
                stage = self._tracer.start_span(name, context, attributes=attributes, start_time=begin_ns)
                stage.end(end_ns)


def stages_of(state: RequestState, now: float) -> list[tuple[str, float, float, dict[str, int]]]:
    """Return (name, begin, end, counts) of each stage that a request has reached; the last ends `now` at the latest."""
    times = state.times
    stages = [
        ("queue", times.arrived, times.scheduled, {"radixloop.retractions": state.num_retractions}),
        (
            "prefill", times.scheduled, times.first_token,
            {"gen_ai.usage.input_tokens": state.prompt_len, "radixloop.cached_tokens": state.num_cached_tokens},
        ),
        ("decode", times.first_token, times.finished, {"gen_ai.usage.output_tokens": len(state.output_ids)}),
        ("deliver", times.finished, now, {}),
    ]  # fmt: skip
    return [(name, begin, end or now, counts) for name, begin, end, counts in stages if begin]
