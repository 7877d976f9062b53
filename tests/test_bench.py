"""The load generator: what it sends, what it counts, and that it takes nothing for a success that is none."""

import io
import math
import random
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console

from bench import plot, vision
from bench.load_plot import draw, rate_of
from bench.result import Result
from bench.roofline import Roofline
from bench.serve import Client, Metrics, argument_parser, main, make_work, run, run_load
from bench.work import Work, custom_work, sharegpt_work, token_counter
from engine.state import FinishReason
from engine.text.tokenizer import Tokenizer
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
    ["--backend", "sglang-native"], ["--backend", "sglang-native", "--disable-stream"],
    ["--backend", "ollama"], ["--backend", "ollama", "--disable-stream"],
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


# ---- files of requests ----

SHAREGPT: list[dict[str, Any]] = [
    {"conversations": [{"from": "human", "value": "What is a radix tree?"}, {"from": "gpt", "value": "A tree. " * 5}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello to you, too. " * 3}]},
    {"conversations": [{"from": "human", "value": "Only a question, and no answer to it"}]},
    {"conversations": [{"from": "human", "value": "words " * 3000}, {"from": "gpt", "value": "Too long to be used."}]},
]
CUSTOM: list[dict[str, Any]] = [
    {"prompt": "One prompt", "output_tokens": 3},
    {"prompt": [101, 102, 103]},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "max_tokens": 5},
    {"conversations": [{"content": "A question"}, {"content": "An answer"}]},
]


def test_conversations_become_requests_with_the_length_of_their_answers() -> None:
    rng, count = random.Random(1), token_counter(None)
    (work,) = sharegpt_work_of(SHAREGPT, rng, None)
    assert work == Work("What is a radix tree?", count("A tree. " * 5)) and work.output_len == 10
    assert [one.output_len for one in sharegpt_work_of(SHAREGPT, rng, 7)] == [7]


def sharegpt_work_of(content: Any, rng: random.Random, output_len: int | None) -> list[Work]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "sharegpt.json"
        file.write_bytes(orjson.dumps(content))
        return sharegpt_work(file, rng, 100, output_len, token_counter(None))


def test_a_tokenizer_counts_where_one_is_given(tiny_llama: Path) -> None:
    text = "the quick brown fox"
    assert token_counter(str(tiny_llama))(text) == token_counter(str(tiny_llama / "tokenizer.json"))(text) != 5


def test_lines_of_ones_own_are_read_in_every_shape() -> None:
    lines = [*(orjson.dumps(line).decode() for line in CUSTOM), ""]
    work = list(custom_work(lines, 9))
    assert [one.output_len for one in work] == [3, 9, 5, 9]
    assert [one.prompt for one in work] == ["One prompt", [101, 102, 103], "Be brief.\n\nHi", "A question"]
    assert work[2].messages == tuple(CUSTOM[2]["messages"])
    with pytest.raises(ValueError, match="line 2 has neither"):
        list(custom_work([lines[0], "{}"], 9))


async def test_a_file_is_sent_as_often_as_asked(tmp_path: Path) -> None:
    file = tmp_path / "custom.jsonl"
    file.write_bytes(b"\n".join(orjson.dumps(line) for line in (CUSTOM[0], CUSTOM[2], CUSTOM[3])))
    engine = FakeEngine(ANSWER)
    flags = ["--dataset-name", "custom", "--dataset-path", str(file), "--num-prompts", "7", "--api", "chat"]
    status, shown = await load(engine, *flags, "--warmup-requests", "0", "--random-output", "12")
    assert status == 0, shown
    prompts = [bytes(request.input_ids) for request in engine.requests]
    assert len(prompts) == 7 and b"[system]Be brief.[user]Hi[assistant]" in prompts


@pytest.mark.parametrize(("content", "message"), [("[]", "no request"), ("{", "Expecting"), (None, "No such file")])
async def test_a_file_that_is_none_ends_the_run_with_2(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    flags = ["--dataset-name", "sharegpt", "--dataset-path", str(file)]
    status, shown = await load(FakeEngine(ANSWER), *flags)
    assert status == 2 and message in shown


# ---- what else a run can be asked for ----


async def test_a_run_can_be_traced_by_its_server() -> None:
    engine = FakeEngine(ANSWER)
    calls: list[str] = []

    def start(output_dir: str) -> None:
        calls.append(f"start {len(engine.requests)}")

    async def stop() -> str:
        calls.append(f"stop {len(engine.requests)}")
        return "trace.json"

    vars(engine).update(start_profile=start, stop_profile=stop)
    status, _ = await load(engine, "--num-prompts", "3", "--random-input", "20", "--profile")
    assert status == 0 and calls == ["start 1", "stop 4"]


async def test_the_percentiles_that_are_asked_for_are_shown(tmp_path: Path) -> None:
    flags = ["--num-prompts", "4", "--random-input", "20", "--percentiles", "50,90,99.9"]
    _, shown = await load(FakeEngine(ANSWER), *flags, "--output-file", str(tmp_path / "x.jsonl"))
    assert "p90" in shown and "p99.9" in shown
    itl = orjson.loads((tmp_path / "x.jsonl").read_bytes())["itl"]
    assert itl["p50_ms"] == itl["median_ms"] <= itl["p90_ms"] <= itl["p99.9_ms"]


def test_tokens_are_counted_in_the_interval_they_came_in() -> None:
    results = [Result(5, 6, ttft_s=1.0, e2e_s=3.0, itl_s=[1.0, 1.0], sent_s=0.5), Result(5, 2, ttft_s=9.5, sent_s=0.0)]
    edges, tokens_s = rate_of(results, 10.0)
    assert len(edges) == len(tokens_s) + 1 and sum(tokens_s) * (edges[1] - edges[0]) == pytest.approx(8)
    (came,) = np.nonzero(tokens_s)
    assert [float(edges[i]) for i in came] == pytest.approx([1.5, 2.5, 3.5, 9.5])


def test_a_plot_without_its_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.serve.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["bench.serve", "--plot", "x.svg"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "pip install 'radixloop[plot]'" in capsys.readouterr().err


def test_a_run_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = [Result(5, 6, ttft_s=0.1, e2e_s=0.3, itl_s=[0.1, 0.1], sent_s=0.5), Result(error="gone")]
    draw(results, 1.0, "a run", tmp_path / "x.svg")
    assert "<svg" in (tmp_path / "x.svg").read_text()


# ---- the drawings of bench/README.md ----


@pytest.mark.parametrize("figure", plot.FIGURES, ids=[figure.file for figure in plot.FIGURES])
def test_a_drawing_shows_what_the_page_says(figure: plot.Figure) -> None:
    groups = plot.groups_of(figure, plot.PAGE.read_text())
    assert (plot.FOLDER / figure.file).read_text() == plot.draw(figure.title, groups), "python -m bench.plot"
    assert f"(figures/{figure.file})" in plot.PAGE.read_text()
    for group in groups:
        assert group.bars[-1][0] == plot.OURS and len(group.bars) > 1


def test_a_bar_is_as_long_as_its_share_of_the_longest() -> None:
    page = "## One\n\n| M | A | radixloop |\n|---|---|---|\n| `x`: ms; s | 1,000; 4 | 250; 2 |\n| y | | 7 |\n"
    figure = plot.Figure(
        "f.svg", "T & U", "One", "M", (plot.Row("`x`", "x"), plot.Row("`x`", "s", 1), plot.Row("y", "y"))
    )
    groups = plot.groups_of(figure, page)
    assert [group.bars for group in groups] == [
        (("A", 1000.0, "1,000"), ("radixloop", 250.0, "250")), (("A", 4.0, "4"), ("radixloop", 2.0, "2")),
        (("radixloop", 7.0, "7"),),
    ]  # fmt: skip
    drawn = plot.draw(figure.title, groups)
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height', drawn)]
    assert widths == [plot.BAR_WIDTH, plot.BAR_WIDTH / 4, plot.BAR_WIDTH, plot.BAR_WIDTH / 2, plot.BAR_WIDTH]
    assert "T &amp; U" in drawn


# ---- pictures ----


def test_each_token_of_an_answer_about_pictures_has_a_text(tmp_path: Path) -> None:
    """A token without one is not handed out before others: gaps between tokens would be gaps between texts."""
    vision.write_model(tmp_path, "tiny")
    vocab_size = vision.SHAPES["tiny"][0]["text_config"]["vocab_size"]
    tokenizer = Tokenizer.load(tmp_path)
    specials = range(len(vision.SPECIAL_TOKENS))
    assert [i for i in range(vocab_size) if tokenizer.decode([i]).strip("\ufffd") == ""] == list(specials)
