"""The load generator: what it sends, what it counts, and that it takes nothing for a success that is none."""

import io
import math
import random
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console

from bench.roofline import Roofline
from bench.serve import Client, Metrics, Result, Work, argument_parser, main, make_work, run, run_load
from engine.state import FinishReason
from tests.fake_engine import FakeEngine, serving

ANSWER = "Hello, world"  # of the fake engine: a token a letter


async def load(engine: FakeEngine, *flags: str) -> tuple[int, str]:
    """(exit status, what is shown) of the command line against a server around `engine`."""
    console = Console(file=io.StringIO(), width=120)
    async with serving(engine) as client:
        url = str(client.make_url("/"))
        args = argument_parser().parse_args(["--base-url", url, "--vocab-size", "200", "--disable-progress", *flags])
        status = await run(args, console)
    assert isinstance(console.file, io.StringIO)
    return status, console.file.getvalue()


MODES = [
    [], ["--disable-stream"], ["--api", "chat"], ["--dataset-name", "shared-prefix"],
    # as SGLang's and vLLM's benches spell them
    ["--backend", "sglang", "--tokenizer", "any"], ["--backend", "sglang-oai-chat"],
    ["--backend", "vllm", "--dataset-name", "generated-shared-prefix"], ["--endpoint", "/v1/chat/completions"],
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
async def test_every_request_is_sent_and_its_tokens_are_counted(mode: list[str], tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    flags = "--num-prompts 6 --random-input 20 --random-output 12 --random-range-ratio 1 --prefix-len 30"
    status, shown = await load(FakeEngine(ANSWER), *flags.split(), "--output-file", str(file), *mode)
    assert status == 0, shown
    line = orjson.loads(file.read_bytes())
    assert (line["completed"], line["failed"], line["total_output_tokens"]) == (6, 0, 6 * len(ANSWER))
    assert line["total_input_tokens"] >= 6 * 20
    assert line["ttft"]["median_ms"] <= line["e2e"]["median_ms"]


async def test_requests_that_fail_are_told_and_end_the_run_with_1() -> None:
    engine = FakeEngine(ANSWER)
    engine.failure = FinishReason("abort", message="out of order", status_code=500)
    status, shown = await load(engine, "--num-prompts", "3", "--random-input", "20", "--warmup-requests", "0")
    assert status == 1 and "out of order" in shown


async def test_a_stream_that_breaks_off_is_no_success() -> None:
    async def broken(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n')
        return response

    app = web.Application()
    app.router.add_post("/v1/completions", broken)
    async with TestServer(app) as server, Client(str(server.make_url("/"))) as client:
        result = await client.send(Work([5, 6], 4))
    assert "without [DONE]" in result.error


async def test_no_more_requests_are_in_flight_than_asked() -> None:
    class Counting(Client):
        num_now = most = 0

        async def send(self, work: Work) -> Result:
            self.num_now += 1
            self.most = max(self.most, self.num_now)
            result = await super().send(work)
            self.num_now -= 1
            return result

    async with serving(FakeEngine(ANSWER)) as server, Counting(str(server.make_url("/"))) as client:
        results, _ = await run_load(client, [Work([100 + i], 12) for i in range(12)], max_concurrency=3)
    assert client.most == 3 and all(not result.error for result in results)


def test_the_same_seed_gives_every_server_the_same_work() -> None:
    def work(**changes: Any) -> list[Work]:
        args = argument_parser().parse_args(["--random-range-ratio", "0.5"])
        for name, value in changes.items():
            setattr(args, name, value)
        return make_work(args, random.Random(args.seed))

    assert work() == work() != work(seed=2)
    lens = [(len(item.prompt), item.output_len) for item in work()]
    assert all(512 <= input_len <= 1024 and 64 <= output_len <= 128 for input_len, output_len in lens)
    grouped = work(dataset_name="shared-prefix", num_groups=4, prefix_len=50)
    assert len({tuple(item.prompt[:50]) for item in grouped}) == 4


def test_figures_are_what_their_names_say() -> None:
    good = [Result(10, 5, ttft_s=0.1, e2e_s=0.5, itl_s=[0.1] * 4), Result(20, 1, ttft_s=0.2, e2e_s=0.2)]
    metrics = Metrics.of([*good, Result(error="gone")], duration_s=2.0)
    assert (metrics.completed, metrics.failed, metrics.first_error) == (2, 1, "gone")
    assert (metrics.request_throughput, metrics.output_throughput, metrics.total_throughput) == (1.0, 3.0, 18.0)
    assert metrics.tpot["median_ms"] == pytest.approx(100), "an answer of one token has none"
    assert metrics.ttft["mean_ms"] == pytest.approx(150) and metrics.concurrency == pytest.approx(0.35)
    assert math.isnan(Metrics.of([], 1.0).e2e["p99_ms"])


def test_a_kernels_share_is_of_what_bounds_it() -> None:
    roofline = Roofline(bytes_per_s=2e12, flops_per_s=5e14)
    assert roofline.share(us=10, num_bytes=1e7) == pytest.approx(0.5)
    assert roofline.share(us=10, num_bytes=1e7, num_flops=4e9) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("flag", "value"), [("--request-rate", "0"), ("--max-concurrency", "-1"), ("--num-prompts", "0")]
)
def test_a_load_that_cannot_be_is_refused_by_its_flag(
    flag: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench.serve", flag, value])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"{flag} must be" in capsys.readouterr().err
