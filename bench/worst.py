"""The worst bodies known: each has held the event loop, the memory or the engine of some server once.

`worst_bodies()` yields them for every API that takes them. `bench.soak --hostile` sends them to a server beside honest
streams, and `tests/test_worst.py` sends smaller ones, one after the other.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import orjson

FULL = 32 << 20  # bytes, the longest body that a server takes by default
MULTIPART = "multipart/form-data; boundary=b"
# The beginning of each API's body, up to the prompt's JSON, and what follows that; then other fields may come.
AROUND_PROMPT = {
    "/generate": (b'{"sampling_params":{"max_new_tokens":4},"text":', b""),
    "/v1/completions": (b'{"max_tokens":4,"prompt":', b""),
    "/v1/chat/completions": (b'{"max_tokens":4,"messages":[{"role":"user","content":', b"}]"),
    "/v1/messages": (b'{"model":"demo","max_tokens":4,"messages":[{"role":"user","content":', b"}]"),
    "/v1/responses": (b'{"max_output_tokens":4,"input":', b""),
    "/api/chat": (b'{"model":"demo","options":{"num_predict":4},"messages":[{"role":"user","content":', b"}]"),
    "/api/generate": (b'{"model":"demo","options":{"num_predict":4},"prompt":', b""),
    "/v1/embeddings": (b'{"input":', b""),
    "/tokenize": (b'{"prompt":', b""),
}
MESSAGES = {
    "/v1/chat/completions": "messages", "/v1/messages": "messages", "/v1/responses": "input", "/api/chat": "messages",
    "/tokenize": "messages",
}  # fmt: skip
LISTS = (  # (path, field, one entry) of what may be many
    ("/generate", "text", '"a"'), ("/v1/completions", "prompt", '"a"'), ("/v1/embeddings", "input", '"a"'),
    ("/tokenize", "prompt", '"a"'), ("/v1/completions", "prompt", "[7]"), ("/detokenize", "tokens", "[7]"),
    ("/v1/rerank", "documents", '"a"'), ("/v1/score", "items", '"a"'),
)  # fmt: skip
IDS = (
    ("/generate", "input_ids"),
    ("/v1/completions", "prompt"),
    ("/v1/embeddings", "input"),
    ("/detokenize", "tokens"),
)
MARKS = ("<tool_call>", '<tool_call>{"id": [', "<function=", "[TOOL_CALLS] [{", "<|python_tag|>{", "<arg_key>", "[f(")
TOOL_PARSERS = ("qwen25", "glm45", "qwen3_coder", "mistral", "llama3", "pythonic", "deepseekv3", "kimi_k2")
SLOW_REGEXES = [f"([a-z ]*)*{chr(0x4E00 + i)}" for i in range(64)]


@dataclass(frozen=True, slots=True)
class Worst:
    """A request, its body written as `head`, `num` times `unit`, and `tail`: all of them whole would take gigabytes."""

    kind: str
    path: str
    head: bytes
    unit: bytes = b""
    num: int = 0
    tail: bytes = b""
    content_type: str = "application/json"
    is_compressed: bool = False

    @property
    def body(self) -> bytes:
        body = self.head + self.unit * self.num + self.tail
        return gzip.compress(body, 1) if self.is_compressed else body

    @property
    def headers(self) -> dict[str, str]:
        return {"Content-Type": self.content_type, **({"Content-Encoding": "gzip"} if self.is_compressed else {})}


def worst_bodies(share: float = 1.0) -> list[Worst]:
    """Return every bad body. share: of the size of each, so that a test need not wait for 32 MB hundreds of times."""

    def count(full: int) -> int:
        return max(1, int(full * share))

    return [*_texts(count), *_values(count), *_lists(count), *_constraints(count), *_forms(count)]


Count = Callable[[int], int]


def _texts(count: Count) -> Iterator[Worst]:
    """Yield texts that are long, and those that parsers look through again and again."""
    for parser in TOOL_PARSERS:
        for mark in MARKS:
            head = b'{"tools":[{"type":"function","function":{"name":"f"}}],"tool_call_parser":"%b","text":"'
            unit = orjson.dumps(mark)[1:-1]
            num = count(900_000) // len(mark)
            yield Worst("tool-call marks", "/parse_function_call", head % parser.encode(), unit, num, b'"}')
    for parser, mark in (("qwen3", "<think>"), ("qwen3-thinking", "</think>"), ("kimi", "◁think▷"), ("mistral", "[TH")):
        head = b'{"reasoning_parser":"%b","text":"' % parser.encode()
        num = count(900_000) // len(mark)
        yield Worst("reasoning marks", "/separate_reasoning", head, mark.encode(), num, b'"}')
    for path, (head, tail) in AROUND_PROMPT.items():
        for word in ("a", "a ", "字", "\\n", "<|im_end|>"):
            num = count(FULL // 2) // len(word.encode())
            yield Worst("text of 16 MB", path, head + b'"', word.encode(), num, b'"' + tail + b"}")
        yield Worst("compressed text", path, head + b'"', b" ", count(FULL * 4), b'"' + tail + b"}", is_compressed=True)


def _values(count: Count) -> Iterator[Worst]:
    """Yield bodies whose values take far more memory than their text, in a field that nobody reads."""
    for path, (head, tail) in AROUND_PROMPT.items():
        head += b'"Hi"' + tail + b',"unknown":['
        for unit in (b"{},", b"[],", b"1,", b'"",', b'{"a":{}},'):
            for num_bytes in (FULL - 1000, FULL // 64):  # beyond what is allowed, and within
                yield Worst("tiny objects", path, head, unit, count(num_bytes) // len(unit), b"1]}")
        yield Worst("depth", path, head + b"[" * 150 + b"]" * 150 + b"]}")
        yield Worst("depth", path, head, b"[", count(1 << 20))


def _lists(count: Count) -> Iterator[Worst]:
    """Yield lists of more messages, prompts, ids and tools than can be."""
    for path, name in MESSAGES.items():
        limit = b"max_output_tokens" if path == "/v1/responses" else b"max_tokens"
        head = b'{"model":"demo","%b":4,"%b":[{"role":"user","content":"a"}' % (limit, name.encode())
        for num in (400_000, 16_000):
            yield Worst("messages", path, head, b',{"role":"user","content":"a"}', count(num), b"]}")
    for path, name, one in LISTS:
        for num in (65_536, 16_383):
            head = b'{"query":"a","%b":[%b' % (name.encode(), one.encode())
            yield Worst("prompts", path, head, b"," + one.encode(), count(num), b"]}")
    for path, name in IDS:
        for num in (FULL // 2 - 1000, 2_000_000):
            yield Worst("input_ids", path, b'{"%b":[7' % name.encode(), b",7", count(num), b"]}")
    for path, tool in (
        ("/v1/chat/completions", b'{"type":"function","function":{"name":"f"}}'),
        ("/v1/chat/completions", b'{"type":"function"}'), ("/api/chat", b'{"type":"function","function":{"name":"f"}}'),
        ("/v1/messages", b'{"name":"f","input_schema":{"type":"object"}}'), ("/v1/responses", b'{"type":"web_search"}'),
    ):  # fmt: skip
        head, tail = AROUND_PROMPT[path]
        head += b'"Hi"' + tail + b',"tools":[' + tool
        for num in (200_000, 10_000):
            yield Worst("tools", path, head, b"," + tool, count(num), b"]}")


def _forms(count: Count) -> Iterator[Worst]:
    part = b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\nbatch\r\n'
    for name in (b"purpose", b"file", b"other"):
        yield Worst("form", "/v1/files", b"", part % name, count(100_000), b"--b--\r\n", MULTIPART)
    yield Worst("form", "/v1/files", b"", b"x\r\n", count(1 << 20), b"", MULTIPART)
    headers = b"--b\r\n" + b"X-Header: 1\r\n" * 100
    yield Worst("form", "/v1/files", headers, b"X-Header: 1\r\n", count(1 << 20), b"\r\n\r\nbatch\r\n--b--", MULTIPART)


def _constraints(count: Count) -> Iterator[Worst]:
    """Yield sampling parameters whose cost is in each token, or in the grammar that they ask for."""
    parameters: list[tuple[str, str, object]] = [
        ("64 slow stop regexes", "stop_regex", SLOW_REGEXES),
        ("stops", "stop", ["ab"] * count(100_000)),
        ("biases", "logit_bias", {str(i): 1.0 for i in range(count(49_000))}),
        ("n", "n", 128),
    ]
    for kind, field, value in parameters:
        params = {field: value, "max_new_tokens": 32, "ignore_eos": True}
        yield Worst(kind, "/generate", orjson.dumps({"text": "Tell me", "sampling_params": params}))
        for path in ("/v1/completions", "/v1/chat/completions"):
            yield Worst(kind, path, with_fields(path, {"max_tokens": 32, "ignore_eos": True, field: value}))
    for kind, field, value in grammars(count):
        for path, fields in spellings(field, value):
            yield Worst(kind, path, with_fields(path, fields))


def with_fields(path: str, fields: dict[str, object]) -> bytes:
    """Return a body of the API at `path` with a prompt and further fields."""
    head, tail = AROUND_PROMPT[path]
    return head + b'"Hi"' + tail + b"," + json.dumps(fields).encode()[1:]


def grammars(count: Count = int) -> Iterator[tuple[str, str, object]]:
    """Yield (kind, sampling field, value): grammars that are large or slow to make, or that fail late."""
    yield "choice of 7,000 words", "choice", [f"word{i}x{i * 7919 % 10_007}" for i in range(count(7000))]
    yield "regex of 7,000 words", "regex", "|".join(f"word{i}x{i * 7919 % 10_007}" for i in range(count(7000)))
    yield "regex with many states", "regex", f"(a|b)*a(a|b){{{count(2000)}}}"
    yield "regex of repetitions", "regex", "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"
    yield "regex of a class", "regex", rf"[\p{{L}}\p{{N}}]{{1,{count(100_000)}}}"
    yield "grammar without an end", "ebnf", "root ::= root | root root"
    rules = [f'r{i} ::= r{i + 1} r{i + 1} | "b" r{i + 1}' for i in range(count(3000))]
    yield "grammar of many rules", "ebnf", "\n".join(["root ::= r0", *rules, f'r{len(rules)} ::= "a"'])
    yield "ambiguous grammar", "ebnf", 'root ::= root root | "a"? "a"? | ""'
    yield "schema whose patterns only name what is there", "json_schema", {
        "type": "object", "properties": {"ab": {"type": "string"}, "ac": {"type": "integer"}}, "required": ["ab"],
        "patternProperties": {"^ab$": {"minLength": 3}, "^a": {"minimum": 3}}, "additionalProperties": False,
    }  # fmt: skip
    yield "schema of 5,000 properties", "json_schema", {
        "type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": i + 1} for i in range(count(5000))},
    }  # fmt: skip
    yield "schema that is itself", "json_schema", {"$ref": "#"}
    levels: dict[str, object] = {
        f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}, "minItems": 9} for i in range(40)
    }
    yield "schema of 9^40 items", "json_schema", {"$ref": "#/$defs/d0", "$defs": {**levels, "d40": {"type": "null"}}}
    pattern = f"^(a|a)*(b|b){{{count(4000)}}}$"
    yield "schema with a slow pattern", "json_schema", {
        "type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}, "required": ["a"],
    }  # fmt: skip
    yield "schema of exact digits", "json_schema", {"type": "integer", "minimum": 10**300, "maximum": 10**301 + 7}


def spellings(field: str, value: object) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield (path, fields) of every API that takes the grammar, in its own spelling, and as a tool's arguments."""
    yield "/generate", {"sampling_params": {field: value, "max_new_tokens": 32}}
    for path in ("/v1/completions", "/v1/chat/completions"):
        yield path, {"guided_choice" if field == "choice" else field: value}
    schemas: dict[str, object] = {"json_schema": value, "choice": {"enum": value}, "regex": {"pattern": value}}
    if field == "regex":
        syntax = {"type": "grammar", "syntax": "regex", "definition": value}
        yield "/v1/responses", {
            "tools": [{"type": "custom", "name": "f", "format": syntax}], "tool_choice": "required",
        }  # fmt: skip
    if field not in schemas:
        return
    schema = schemas[field]
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    function = {"name": "f", "parameters": parameters, "strict": True}
    yield "/v1/chat/completions", {
        "response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": schema}},
    }  # fmt: skip
    yield "/v1/chat/completions", {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    yield "/v1/messages", {
        "tools": [{"name": "f", "input_schema": parameters, "strict": True}], "tool_choice": {"type": "any"},
    }  # fmt: skip
    yield "/v1/messages", {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    yield "/v1/responses", {"text": {"format": {"type": "json_schema", "name": "f", "schema": schema}}}
    yield "/v1/responses", {"tools": [{"type": "function", **function}], "tool_choice": "required"}
    yield "/api/chat", {"format": schema}
    yield "/api/generate", {"format": schema}
