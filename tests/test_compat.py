"""Bodies that clients written for SGLang's and vLLM's servers send, and shapes they read.

SGLang's front end, the evaluation harness of EleutherAI, openai's client with a data model.
"""

import io
import json
import threading
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest
import torch
from aiohttp import FormData

from server.command_line import parse_args
from server.config import ServerConfig
from server.fleet.router import RouterConfig
from server.foreign_flags import ANY, ForeignFlag
from server.foreign_tables import ROUTER_FLAGS, SERVER_FLAGS
from server.http.live import MANY_LOGPROBS
from tests.client import Client, events, post
from tests.fake_engine import PARSERS, FakeEngine, serving
from tests.test_engine import running_engine

USER: list[Any] = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


# ---- SGLang's front end: what sglang.RuntimeEndpoint asks ----


async def test_a_front_end_learns_the_models_path(client: Client) -> None:
    response = await client.get("/get_model_info", headers={"Content-Type": "application/json; charset=utf-8"})
    info = await response.json()
    assert info["model_path"] == "fake-model" and info["is_generation"] is True


async def test_a_select_scores_its_choices_in_one_batch_from_before_the_prompts_end(client: Client) -> None:
    prompt, choices = "Is it? ", ["yes", "perhaps"]
    seed = await post(client, "/generate", text=prompt, sampling_params={"max_new_tokens": 0})
    start = seed["meta_info"]["prompt_tokens"] - 2
    answers = await post(
        client,
        "/generate",
        text=[prompt + choice for choice in choices],
        sampling_params={"max_new_tokens": 0, "temperature": 0},
        return_logprob=True,
        return_text_in_logprobs=True,
        logprob_start_len=start,
    )
    for choice, answer in zip(choices, answers, strict=True):
        meta = answer["meta_info"]
        values, _, texts = zip(*meta["input_token_logprobs"], strict=True)
        assert "".join(texts) == prompt[start:] + choice
        assert values[0] is None and all(value == -0.5 for value in values[1:])
        assert meta["output_token_logprobs"] == []


async def test_every_sampling_field_of_the_front_end_is_known(client: Client, engine: FakeEngine) -> None:
    sampling = {
        "max_new_tokens": 8, "min_new_tokens": 2, "n": 1, "stop": ["x"], "stop_token_ids": [5], "stop_regex": "y+",
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "frequency_penalty": 0.1, "presence_penalty": 0.1,
        "ignore_eos": True, "regex": None, "json_schema": None, "skip_special_tokens": True,
        "spaces_between_special_tokens": False,
    }  # fmt: skip
    *_, last = await events(client, "/generate", text="Hi", sampling_params=sampling)
    assert last["text"] == "Hello, w"
    assert engine.requests[0].sampling_params.stop_regex == ["y+"]


# ---- the evaluation harness: local-completions, local-chat-completions, remote tokenizers ----


async def harness_score(client: Client, prompts: list[list[int]], **more: Any) -> list[Any]:
    fields = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True, **more}
    answer = await post(client, "/v1/completions", model="default", prompt=prompts, **fields)
    return [choice["logprobs"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]


async def test_the_harness_reads_the_log_probabilities_that_transformers_gives(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    prompts = [[9, 20, 31, 42, 53], [7, 7, 300]]
    with torch.no_grad():
        greedy = model(torch.tensor([prompts[0]])).logits[0, -1].argmax().item()
    prompts.append([*prompts[0], greedy])
    async with running_engine(tiny_llama) as engine, serving(engine) as client:
        # Ends the answer with its one token, which must be reported all the same: clients drop the last.
        scores = await harness_score(client, prompts, logit_bias={"2": 100})
        for prompt, score in zip(prompts, scores, strict=True):
            with torch.no_grad():
                rows = model(torch.tensor([prompt])).logits[0].log_softmax(dim=-1)
            expected = [row[token].item() for row, token in zip(rows, prompt[1:], strict=False)]
            first, *values, _ = score["token_logprobs"]
            assert first is None and score["top_logprobs"][0] is None
            assert values == pytest.approx(expected, abs=1e-4)
            assert len(score["tokens"]) == len(score["top_logprobs"]) == len(score["text_offset"]) == len(prompt) + 1
            is_greedy = [
                value == max(top.values()) for value, top in zip(values, score["top_logprobs"][1:-1], strict=True)
            ]
            assert is_greedy == [token == row.argmax().item() for row, token in zip(rows, prompt[1:], strict=False)]
        assert is_greedy[-1]


async def test_of_alternatives_with_one_text_the_likelier_is_told(client: Client, engine: FakeEngine) -> None:
    engine.tokenizer.token_text = lambda token_id: "?"  # type: ignore[method-assign]
    (score,) = await harness_score(client, [[72, 73]], logprobs=3)
    assert score["top_logprobs"] == [None, {"?": -0.5}, {"?": -0.5}]


@pytest.mark.parametrize(("num_tokens", "is_off"), [(8, False), (2 * MANY_LOGPROBS, True)])
async def test_many_log_probabilities_are_written_off_the_event_loop(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, num_tokens: int, is_off: bool
) -> None:
    writers: set[threading.Thread] = set()

    def token_text(token_id: int) -> str:
        writers.add(threading.current_thread())
        return chr(token_id)

    monkeypatch.setattr(engine.tokenizer, "token_text", token_text)
    engine.context_length = 1 << 16
    prompt = [65] * num_tokens
    async with serving(engine) as client:
        (score,) = await harness_score(client, [prompt], max_tokens=0, logprobs=0)
        body = {"input_ids": prompt, "return_logprob": True, "logprob_start_len": 0, "return_text_in_logprobs": True}
        answer = await post(client, "/generate", **body, sampling_params={"max_new_tokens": 0})
    assert len(score["token_logprobs"]) == len(answer["meta_info"]["input_token_logprobs"]) == num_tokens
    assert score["text_offset"][-1] == num_tokens - 1
    assert (threading.main_thread() not in writers) == is_off


async def test_a_harness_may_send_text_and_stop_at_nothing(client: Client) -> None:
    body = {"prompt": ["a", "b"], "max_tokens": 5, "temperature": 0, "stop": [], "seed": 1234}
    assert [choice["text"] for choice in (await post(client, "/v1/completions", **body))["choices"]] == ["Hello"] * 2
    body = {"messages": [{**USER[0], "type": "text"}], "max_tokens": 5, "temperature": 0, "stop": ["\n"], "seed": 1234}
    (choice,) = (await post(client, "/v1/chat/completions", **body))["choices"]
    assert choice["message"]["content"] == "Hello"


async def test_a_client_may_use_the_servers_tokenizer(client: Client) -> None:
    info = await (await client.get("/tokenizer_info")).json()
    assert info == {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "fake"}
    assert (await post(client, "/tokenize", prompt="Hi", add_special_tokens=False))["tokens"] == [72, 105]
    assert (await post(client, "/detokenize", tokens=[72, 105]))["prompt"] == "Hi"


# ---- vLLM's fields ----


async def test_token_ids_come_with_the_text_if_asked_for(client: Client) -> None:
    answer = await post(client, "/v1/completions", prompt="Hi", max_tokens=2, return_token_ids=True)
    choice = answer["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([72, 105], [72, 101])
    answer = await post(client, "/v1/chat/completions", messages=USER, max_tokens=2, return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == [72, 101]


async def test_tokens_can_be_named_by_their_ids(client: Client) -> None:
    body = {"max_tokens": 1, "return_tokens_as_token_ids": True}
    answer = await post(client, "/v1/completions", prompt="Hi", logprobs=1, **body)
    logprobs = answer["choices"][0]["logprobs"]
    assert (logprobs["tokens"], logprobs["top_logprobs"]) == (["token_id:72"], [{"token_id:72": -0.5}])
    answer = await post(client, "/v1/chat/completions", messages=USER, logprobs=True, **body)
    assert answer["choices"][0]["logprobs"]["content"][0]["token"] == "token_id:72"


@pytest.mark.parametrize("parsers", [{}, PARSERS])
async def test_usage_can_come_with_each_chunk(engine: FakeEngine, parsers: dict[str, Any]) -> None:
    async with serving(engine, **parsers) as client:
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {"messages": USER, "max_tokens": 3, "stream_options": options}
        _, *middle, _, total = await events(client, "/v1/chat/completions", **body)
    assert [chunk["usage"]["completion_tokens"] for chunk in middle] == [1, 2, 3]
    assert all(chunk["usage"]["prompt_tokens"] == 19 for chunk in middle)
    assert total["choices"] == [] and total["usage"]["total_tokens"] == 22


async def test_a_stop_string_can_stay_in_the_answer(client: Client, engine: FakeEngine) -> None:
    await post(client, "/v1/completions", prompt="Hi", stop="w", include_stop_str_in_output=True)
    assert engine.requests[0].sampling_params.no_stop_trim


async def test_special_tokens_are_added_or_not_as_the_client_says(client: Client, engine: FakeEngine) -> None:
    asked: list[bool] = []

    async def encode(text: str, add_special_tokens: bool = True, *, is_prompt: bool = True) -> list[int]:
        assert is_prompt
        asked.append(add_special_tokens)
        return list(text.encode())

    engine.encode = encode  # type: ignore[method-assign]
    for path, body in (("/v1/completions", {"prompt": "Hi"}), ("/v1/chat/completions", {"messages": USER})):
        for more in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
            await post(client, path, **body, **more)
    assert asked == [True, True, False, False, True, False]


async def test_a_chat_can_be_given_its_token_ids(engine: FakeEngine) -> None:
    body = {"messages": USER, "input_ids": [1, 2, 3]}
    async with serving(engine, **PARSERS) as client:
        await post(client, "/v1/chat/completions", **body)
        response = await client.post("/v1/chat/completions", json={**body, "max_thinking_tokens": 5})
        assert (response.status, (await response.json())["error"]["param"]) == (400, "max_thinking_tokens")
    assert engine.requests[0].input_ids == [1, 2, 3]


REFUSED = {
    "functions": [WEATHER], "modalities": ["text", "audio"], "verbosity": "huge", "web_search_options": {"x": 1},
    "lora_path": "a", "session_params": {"id": "s"}, "custom_logit_processor": "x",
    "allowed_token_ids": [1], "bad_words": ["x"], "use_beam_search": True, "truncate_prompt_tokens": 5,
    "prompt_logprobs": 0, "guided_whitespace_pattern": " ", "documents": [{"text": "x"}], "chat_template": "x",
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
async def test_what_would_change_the_answer_is_refused_and_not_ignored(client: Client, field: str) -> None:
    for path, body in (("/v1/completions", {"prompt": "Hi"}), ("/v1/chat/completions", {"messages": USER})):
        response = await client.post(path, json={**body, field: REFUSED[field]})
        error = (await response.json())["error"]
        assert (response.status, error["param"]) == (400, field)
        assert (await client.post(path, json={**body, field: None})).status == 200


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/chat/completions", {"messages": USER, "echo": True}, "echo"),
        ("/v1/chat/completions", {"messages": USER, "include_reasoning": 1}, "include_reasoning"),
        ("/v1/chat/completions", {"messages": USER, "thinking": {"type": "loud"}}, "thinking.type"),
        ("/v1/chat/completions", {"messages": USER, "input_ids": [1 << 20]}, "input_ids"),
        ("/v1/completions", {"prompt": "Hi", "stream": True, "return_token_ids": True}, "return_token_ids"),
        (
            "/v1/completions",
            {"prompt": "Hi", "structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        ("/v1/completions", {"prompt": "Hi", "include_stop_str_in_output": 1}, "include_stop_str_in_output"),
    ],
)
async def test_a_refusal_names_the_field(client: Client, path: str, body: dict[str, Any], field: str) -> None:
    response = await client.post(path, json=body)
    assert (response.status, (await response.json())["error"]["param"]) == (400, field)


async def test_thinking_can_be_turned_off_by_the_field_of_several_vendors(
    client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def render(messages: Any, **variables: Any) -> str:
        seen.append(variables)
        return "x"

    monkeypatch.setattr(engine.tokenizer, "render_chat", render)
    for kind in ("disabled", "enabled"):
        await post(client, "/v1/chat/completions", messages=USER, thinking={"type": kind})
    assert [variables["enable_thinking"] for variables in seen] == [False, True]


# ---- openai's client ----


class City(pydantic.BaseModel):
    name: str
    population: int


async def test_an_answer_is_parsed_into_a_data_model(engine: FakeEngine) -> None:
    engine.answer = '{"name":"Oslo","population":700000}'
    async with serving(engine) as client:
        api = openai.AsyncOpenAI(base_url=str(client.make_url("/v1")), api_key="none", max_retries=0)
        answer = await api.chat.completions.parse(model="default", messages=USER, response_format=City)
        assert answer.choices[0].message.parsed == City(name="Oslo", population=700_000)
        async with api.chat.completions.stream(model="default", messages=USER, response_format=City) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.parsed == City(name="Oslo", population=700_000)
    schema = engine.requests[0].sampling_params.json_schema
    assert isinstance(schema, dict) and schema["required"] == ["name", "population"]


async def test_streamed_calls_are_put_together_by_the_client(engine: FakeEngine) -> None:
    engine.answer = 'So:<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    async with serving(engine, **PARSERS) as client:
        api = openai.AsyncOpenAI(base_url=str(client.make_url("/v1")), api_key="none", max_retries=0)
        tools: Any = [WEATHER]
        async with api.chat.completions.stream(model="default", messages=USER, tools=tools) as stream:
            final = await stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    assert final.choices[0].finish_reason == "tool_calls"


# ---- flags of SGLang's and vLLM's servers ----


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("--max-model-len 4096 --max-num-seqs=8", {"context_length": 4096, "max_running_requests": 8}),
        ("--max_model_len 4096", {"context_length": 4096}),
        ("--enforce-eager --enable-chunked-prefill", {"disable_cuda_graph": True}),
        ("--max-num-reqs 7 --disable-flashinfer --disable-flashinfer-sampling", {"max_running_requests": 7}),
        ("--enable-torch-compile --port 1", {"port": 1}),
        ("--tp 4 --ep-size 2", {"tp_size": 4, "ep_size": 2}),
        ("--tp 4 --enable-ep-moe", {"tp_size": 4, "ep_size": 0}),
        ("--tp 4 --enable-expert-parallel", {"tp_size": 4, "ep_size": 0}),
        ("--tp 8 --expert-parallel-size=8 --moe-a2a-backend none", {"tp_size": 8, "ep_size": 8}),
        ("--moe-a2a-backend deepep", None),
        ("--no-enable-prefix-caching --tensor-parallel-size 2", {"disable_radix_cache": True, "tp_size": 2}),
        ("--no-enable-chunked-prefill", {"chunked_prefill_size": -1}),
        ("--task embed --quantization none", {"is_embedding": True, "quantization": "none"}),
        ("--speculative-algorithm", None),
        ("--gpu-memory-utilization 0.9", None),
        ("--quantization awq_marlin", {"quantization": "awq_marlin"}),
        ("--quantization fp8 --fp8-gemm-backend cutlass --quantization-param-path x.json", {"quantization": "fp8"}),
        ("--torchao-config int8wo", {"quantization": "int8wo"}),
        ("--lora-paths a=b c=d --port 1", None),
        ("--pp-size 2", None),
        ("--task transcription", None),
        ("-tp 2 -O3 -dp 4 -cc {}", {"tp_size": 2, "dp_size": 4}),
        ("--max-model-len 8k --max-num-batched-tokens 8K", {"context_length": 8000, "chunked_prefill_size": 8192}),
        ("--max-model-len -1 --max-num-seqs 8", {"max_running_requests": 8}),
        ("--max-model-len auto --kv-cache-dtype fp8", {"kv_cache_dtype": "fp8_e4m3"}),
        ("--kv-cache-dtype=bf16 --attention-backend FA3", {"kv_cache_dtype": "bfloat16"}),
        ("--attention-backend torch_native --load-format layered", {"attention_backend": "torch"}),
        ("--attention-backend triton --schedule-policy priority", {"attention_backend": "triton"}),
        ("--load-balance-method auto --grammar-backend=outlines", {}),
        ("--no-enforce-eager --no-enable-eplb --no-trust-remote-code --port 1", {"port": 1}),
        ("--no-async-scheduling --compilation-config.mode 3", {"disable_overlap_schedule": True}),
        ("--cudagraph-capture-sizes 1 2 --port 1", {"cuda_graph_bs": [1, 2], "port": 1}),
        ("--enable-eplb --eplb-config.window_size 5 --numa-node 0 1 --port 1", {"port": 1}),
        ("--served-model-name a b --port 1", {"served_model_name": ["a", "b"], "port": 1}),
        ('--allowed-origins ["http://a","*"]', {"allowed_origins": ["http://a", "*"]}),
        (
            '--override-generation-config {"temperature":0.6}',
            {"preferred_sampling_params": '{"temperature":0.6}'},
        ),
        (
            "--default-chat-template-kwargs.enable_thinking false --default_chat_template_kwargs.effort=high",
            {"default_chat_template_kwargs": '{"enable_thinking": false, "effort": "high"}'},
        ),
        (
            "--hf-overrides.rope_scaling.factor 2 --port 1 --hf-overrides.rope_scaling.rope_type linear",
            {"port": 1, "json_model_override_args": '{"rope_scaling": {"factor": 2, "rope_type": "linear"}}'},
        ),
        (
            '--hf-overrides.rope.factor 2 --hf-overrides {"rope":{"theta":1},"top":3} --port 1',
            {"port": 1, "json_model_override_args": '{"rope": {"theta": 1, "factor": 2}, "top": 3}'},
        ),
        (
            '--default-chat-template-kwargs={"a":1,"b":2} --default_chat_template_kwargs.b=3',
            {"default_chat_template_kwargs": '{"a": 1, "b": 3}'},
        ),
        ("--attention-backend FLASHINFER --numa-bind --renderer-num-workers 4", {"attention_backend": "flashinfer"}),
        (
            "--cuda-graph-backend-decode disabled --cuda-graph-backend-prefill breakable --cuda-graph-max-bs-decode 8",
            {"disable_cuda_graph": True, "cuda_graph_max_bs": 8},
        ),
        ("--enable-prefill-cp", None),
        ("--speculative-config.method ngram", None),
        ("--max-lora-rank 8", None),
        ("--enable-lora-bias", None),
        ("--root-path /llm", None),
        ("--uds /tmp/socket", None),
        ("--model-impl transformers", None),
    ],
)  # fmt: skip
def test_another_servers_flag_means_the_same_here_or_is_refused_with_a_reason(
    flags: str, changed: dict[str, Any] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if changed is not None:
        assert parse_args(flags.split()) == ServerConfig(**changed)
    else:
        with pytest.raises(SystemExit):
            parse_args(flags.split())
        shown = capsys.readouterr().err
        assert f"{flags.partition(' ')[0]} is refused: " in shown and "did you mean" not in shown


def test_keys_of_a_value_that_is_no_object_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--hf-overrides.rope", "2", "--hf-overrides.rope.factor", "2"])
    assert "--hf-overrides.rope.factor: rope is no object, it was said to be 2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_args(["--hf-overrides.rope", "2", "--hf-overrides", "[1]"])
    assert "--hf-overrides.rope: hf-overrides is no object, it was said to be [1]" in capsys.readouterr().err


def test_a_flag_without_effect_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    parse_args(["--enable-torch-compile"])
    assert "--enable-torch-compile has no effect: nothing is compiled" in capsys.readouterr().err


def test_another_servers_options_may_stand_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("max-model-len: 4096\nenforce_eager: true\nenable-mixed-chunk: false\n")
    assert parse_args(["--config", str(file)]) == ServerConfig(context_length=4096, disable_cuda_graph=True)


def test_what_is_structured_in_the_file_is_json_and_digits_stay_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(
        "json-model-override-args: {rope_scaling: {factor: 2.0}}\nlimit-mm-per-prompt: {image: 2}\n"
        "api-key: 0123\nrevision: 2024-01-02\nmax_model_len: 8k\nserved-model-name: [demo, other]\n"
    )
    assert parse_args(["--config", str(file)]) == ServerConfig(
        json_model_override_args='{"rope_scaling":{"factor":2.0}}',
        limit_mm_per_prompt='{"image":2}',
        api_key="0123",
        revision="2024-01-02",
        context_length=8000,
        served_model_name=["demo", "other"],
    )


@pytest.mark.parametrize("table", [SERVER_FLAGS, ROUTER_FLAGS])
def test_the_table_of_foreign_flags_agrees_with_the_servers_own(table: tuple[ForeignFlag, ...]) -> None:
    config = ServerConfig if table is SERVER_FLAGS else RouterConfig
    fields = config.__dataclass_fields__
    own = {"--" + name.replace("_", "-") for name in fields}
    own |= {alias for field in fields.values() for alias in field.metadata["aliases"]}
    flags = [one.flag for one in table]
    assert len(flags) == len(set(flags))
    assert own & set(flags) == {one.flag for one in table if one.is_shared}
    assert not [flag for flag in own for one in flags if one[-1] == ANY and flag.startswith(one[:-1])]
    for one in table:
        assert one.describe() and len(one.reason) < 200
        for words in one.words.values():
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= own
        assert one.words or one.reason


@pytest.mark.parametrize(
    "flag", ["--eq-size", "--max-num-sequences", "--disable-flash", "--enable-torch", "--kv-cache"]
)
def test_no_hint_is_given_across_meanings(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args([flag, "1"])
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--modle-path", "--model-path"),
        ("--model-pth", "--model-path"),
        ("--api_key", "--api-key"),
        ("--apikey", "--api-key"),
    ],
)
def test_a_slip_of_the_keys_is_hinted_at(flag: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args([flag, "x"])
    assert f"did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "is_used"), [("true", True), ("1", True), ("false", False), ("", False)])
def test_sglangs_variable_takes_hub_ids_from_modelscope(value: str, is_used: bool) -> None:
    assert parse_args([], {"SGLANG_USE_MODELSCOPE": value}).use_modelscope == is_used


def test_a_switch_of_anothers_takes_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--enforce-eager=false"])
    assert "--enforce-eager takes no value, got 'false'" in capsys.readouterr().err


async def test_a_model_may_have_several_names_and_answers_by_the_one_it_was_asked_for(engine: FakeEngine) -> None:
    async with serving(engine, served_model_name=["fake-model", "claude-haiku"]) as client:
        listed = (await (await client.get("/v1/models")).json())["data"]
        assert [card["id"] for card in listed] == ["fake-model", "claude-haiku"]
        for name, said in (("claude-haiku", "claude-haiku"), ("fake-model", "fake-model"), ("", "fake-model")):
            body = {"model": name, "prompt": "Hi", "max_tokens": 1}
            assert (await (await client.post("/v1/completions", json=body)).json())["model"] == said
        tags = (await (await client.get("/api/tags")).json())["models"]
        assert [card["name"] for card in tags] == ["fake-model", "claude-haiku"]
        response = await client.get("/v1/models/other")
        assert response.status == 404 and "this server has 'fake-model', 'claude-haiku'" in await response.text()


def test_help_shows_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(one.flag in text and one.describe() in text for one in SERVER_FLAGS)
    assert "SGLANG_USE_MODELSCOPE" in text


# ---- /generate_from_file ----


async def test_the_text_of_a_file_is_a_prompt() -> None:
    engine = FakeEngine("Yes", context_length=100)
    async with serving(engine) as client:
        form = FormData({"file": io.BytesIO("Ça va?".encode())}, default_to_multipart=True)
        response = await client.post("/generate_from_file", data=form)
        assert response.status == 200, await response.text()
        assert (await response.json())["text"] == "Yes"
    [request] = engine.requests
    assert bytes(request.input_ids).decode() == "Ça va?"
    assert request.sampling_params.is_greedy and request.sampling_params.max_new_tokens == 512 and request.may_shorten


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"file": b"[[0.5, 1.0]]"}, "input_embeds"),
        ({"file": b"\xff"}, "UTF-8"),
        ({"file": b""}, "empty prompt"),
        ({"other": b"x"}, "'other'"),
        ({}, "no file"),
    ],
)
async def test_a_file_that_is_no_prompt_is_a_400_that_says_why(fields: dict[str, bytes], said: str) -> None:
    async with serving(FakeEngine()) as client:
        form = FormData({name: io.BytesIO(value) for name, value in fields.items()}, default_to_multipart=True)
        response = await client.post("/generate_from_file", data=form)
        error = (await response.json())["error"]["message"]
        assert response.status == 400 and said in error, error
        assert (await client.post("/generate_from_file", json={"text": "x"})).status == 400


async def test_a_file_is_as_long_as_a_body_may_be() -> None:
    async with serving(FakeEngine(), max_body_bytes=1000) as client:
        form = FormData({"file": io.BytesIO(b"x" * 2000)}, default_to_multipart=True)
        response = await client.post("/generate_from_file", data=form)
        assert response.status == 413 and "--max-body-bytes" in await response.text()
