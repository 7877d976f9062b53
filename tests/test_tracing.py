"""Traces: which spans a request leaves, whose they are, and that none cost anything unless they are asked for."""

import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from server.command_line import parse_args
from server.config import ServerConfig
from server.http.tracing import MAX_TRACED, TracingUnavailable, check_tracing, protocol_of
from tests.client import Client
from tests.fake_engine import FakeEngine, serving
from tests.server_processes import ROOT

TRACE_ID, CALLER_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Return where the spans of the next server are."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("server.app.new_provider", lambda endpoint: provider)
    return exporter


@pytest.fixture
async def client(exporter: InMemorySpanExporter) -> AsyncIterator[Client]:
    async with serving(FakeEngine("Hello"), otlp_traces_endpoint="localhost:4317") as client:
        yield client


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_leaves_its_stages_one_after_another(
    client: Client, exporter: InMemorySpanExporter, stream: bool
) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream, "max_tokens": 3}
    response = await client.post("/v1/chat/completions", json=body)
    await response.read()
    spans = by_name(exporter)
    root = spans.pop("POST /v1/chat/completions")
    assert [*spans] == ["queue", "prefill", "decode", "deliver"]
    assert root.context is not None and root.attributes is not None
    assert all(span.parent is not None and span.parent.span_id == root.context.span_id for span in spans.values())
    ends = [span.end_time for span in spans.values()]
    assert [span.start_time for span in spans.values()][1:] == ends[:-1]
    prompt = len("[user]Hi[assistant]")
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["gen_ai.response.finish_reasons"] == ("length",)
    for counts in (root.attributes, {**(spans["prefill"].attributes or {}), **(spans["decode"].attributes or {})}):
        assert (counts["gen_ai.usage.input_tokens"], counts["gen_ai.usage.output_tokens"]) == (prompt, 3)
    assert (spans["prefill"].attributes or {})["radixloop.cached_tokens"] == 2


async def test_the_callers_trace_goes_on_and_the_answer_names_its_span(
    client: Client, exporter: InMemorySpanExporter
) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{CALLER_ID}-01"}
    response = await client.post("/generate", json={"text": "a"}, headers=headers)
    root = by_name(exporter)["POST /generate"]
    assert root.context is not None and root.parent is not None
    assert f"{root.context.trace_id:032x}" == TRACE_ID and f"{root.parent.span_id:016x}" == CALLER_ID
    assert response.headers["traceresponse"] == f"00-{TRACE_ID}-{root.context.span_id:016x}-01"


async def test_a_caller_that_does_not_sample_leaves_no_spans(client: Client, exporter: InMemorySpanExporter) -> None:
    await client.post("/generate", json={"text": "a"}, headers={"traceparent": f"00-{TRACE_ID}-{CALLER_ID}-00"})
    assert not exporter.get_finished_spans()


async def test_a_refused_request_is_a_span_without_stages_and_a_look_is_none(
    client: Client, exporter: InMemorySpanExporter
) -> None:
    assert (await client.post("/generate", json={"text": "a", "sampling_params": {"top_p": 7}})).status == 400
    assert (await client.get("/health")).status == 200
    (span,) = exporter.get_finished_spans()
    assert span.attributes is not None and span.attributes["http.response.status_code"] == 400


async def test_a_client_that_goes_is_an_error_of_its_span(exporter: InMemorySpanExporter) -> None:
    engine = FakeEngine(is_manual=True)
    async with serving(engine, enable_trace=True) as client:
        response = await client.post("/generate", json={"text": "a", "stream": True})
        await engine.until(lambda: bool(engine.states))
        response.close()
        await engine.until(lambda: bool(engine.aborted))
    spans = by_name(exporter)
    assert not spans["POST /generate"].status.is_ok
    assert "queue" in spans


async def test_a_list_of_prompts_leaves_the_stages_of_the_first_ones(
    client: Client, exporter: InMemorySpanExporter
) -> None:
    count = 3 * MAX_TRACED
    await client.post("/generate", json={"text": ["a"] * count, "sampling_params": {"max_new_tokens": 1}})
    spans = exporter.get_finished_spans()
    assert len(spans) == 1 + 4 * MAX_TRACED
    attributes = by_name(exporter)["POST /generate"].attributes
    assert attributes is not None and attributes["radixloop.num_requests"] == count


def test_a_server_without_traces_never_imports_them() -> None:
    code = (
        "import sys\nfrom server.app import build_app\nfrom server.config import ServerConfig\n"
        "from tests.fake_engine import FakeEngine\nimport asyncio\n"
        "async def main():\n    build_app(FakeEngine(), ServerConfig(file_storage_path='/tmp'))\n"
        "asyncio.run(main())\nsys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_traces_without_their_packages_end_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http.tracing.importlib.util.find_spec", lambda name: None)
    with pytest.raises(TracingUnavailable, match=r"pip install 'radixloop\[otlp\]'"):
        check_tracing("localhost:4317")
    check_tracing(None)


@pytest.mark.parametrize(
    ("endpoint", "protocol"),
    [
        ("localhost:4317", "grpc"),
        ("grpc://collector:4317", "grpc"),
        ("https://collector", "grpc"),
        ("localhost:4318", "http"),
        ("https://collector/v1/traces", "http"),
    ],
)
def test_the_protocol_is_the_endpoints(endpoint: str, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", raising=False)
    assert protocol_of(endpoint) == protocol
    other = {"grpc": "http/protobuf", "http": "grpc"}[protocol]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", other)
    assert protocol_of(endpoint) == other.partition("/")[0]


def test_sglangs_and_vllms_flags_say_where_spans_go() -> None:
    assert ServerConfig().traces_endpoint is None
    assert parse_args(["--enable-trace"]).traces_endpoint == "localhost:4317"
    argv = ["--otlp-traces-endpoint", "c:4318", "--enable-trace", "--collect-detailed-traces", "all"]
    assert parse_args(argv).traces_endpoint == "c:4318"
