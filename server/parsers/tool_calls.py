"""The formats in which models write calls of tools, and a parser that reads them as they come.

A `ToolFormat` says three things: which marks begin calls, how to read what follows, and how a grammar can hold the
model to it. What turns out not to be a call is text: nothing is lost.
"""

import ast
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson

from engine.text.schemas import NOT_STRICT
from engine.text.structural_tag import LARK, LARK_STRING
from server.parsers.delta import ToolCallDelta
from server.parsers.harmony import CALL, END, FINAL, FUNCTIONS, MESSAGE, NEXT, TO_TOOL
from server.parsers.reader import PYTHON_SYNTAX, Malformed, Reader, Reading
from server.reading.protocol import JSON

MAX_NAME_LEN = 256  # longer names, and keys, are not waited for
MAX_REREAD_CHARS = 1 << 20  # of an answer, in what began like calls and was none; text after that has no calls
MAX_PYTHON_CHARS = 1 << 18  # of a call's arguments in Python: half a second of parsing
JSON_CALL_KEYS = ("name", "arguments", "parameters", "type", "id")
PYTHON_CONSTANTS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    parameters: JSON  # JSON schema of its arguments, an object's
    is_strict: bool = False
    field: str = ""  # what the client calls its parameters, or its grammar, for errors of that
    lark: str = ""  # grammar of the one text that it takes, a custom tool's

    def takes_text(self, key: str) -> bool:
        """Return whether the argument is a string, so that its text must not be read as JSON."""
        return self._schema(key).get("type") == "string" or bool(self.allowed_texts(key))

    def allowed_texts(self, key: str) -> list[str]:
        """Return all that the argument may be; empty if that is not a list of strings."""
        schema = self._schema(key)
        values = schema.get("enum", [schema["const"]] if "const" in schema else [])
        return values if isinstance(values, list) and all(isinstance(value, str) for value in values) else []

    def _schema(self, key: str) -> JSON:
        properties = self.parameters.get("properties")
        schema = properties.get(key) if isinstance(properties, dict) else None
        return schema if isinstance(schema, dict) else {}


class ToolCallParser:
    """Splits an answer into text and calls. White space around calls is no text."""

    def __init__(
        self,
        format_: "ToolFormat",
        tools: Sequence[Tool],
        max_calls: int | None = None,
        *,
        is_forced: bool = False,
    ) -> None:
        """Find calls of `tools`; those of other functions are text, those after the first `max_calls` are left out.

        is_forced: the answer is held to calls. What is left at its end is one that was cut, and no text.
        """
        self.tools: Mapping[str, Tool] = {tool.name: tool for tool in tools}
        self.reader = Reader()
        self.num_tool_calls = 0
        self._format, self._max_calls, self._is_forced = format_, max_calls, is_forced
        self._text: list[str] = []
        self._space: list[str] = []  # the text's last, until more of it comes
        self._deltas: list[ToolCallDelta] = []
        self._arguments: list[str] = []  # of the last delta
        self._num_reread_chars = 0
        self._num_begun = 0
        self._is_left_out = False  # the call being read
        self._program = self._read()

    def push(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        self.reader.feed(text)
        return self._run()

    def finish(self) -> tuple[str, list[ToolCallDelta]]:
        self.reader.close()
        text, deltas = self._run()
        return "" if self._is_forced else text, deltas

    # ---- what formats call ----

    def tool(self, name: Any) -> Tool:
        """Return the function of that name. `Malformed` if there is none."""
        tool = self.tools.get(name) if isinstance(name, str) else None
        if tool is None:
            raise Malformed
        return tool

    def begin_call(self, tool: Tool) -> None:
        """Begin a call that is certain: the text read up to here stays a part of it."""
        self.reader.mark()
        self._space = []
        self._num_begun += 1
        self._is_left_out = self._max_calls is not None and self._num_begun > self._max_calls
        if self._is_left_out:
            return
        call_id = self._format.new_id(tool.name, self.num_tool_calls)
        self._join_arguments()
        self._deltas.append(ToolCallDelta(self.num_tool_calls, call_id, tool.name, ""))
        self.num_tool_calls += 1

    def add_arguments(self, text: str) -> None:
        """Add to the JSON text of the last call's arguments."""
        self.reader.mark()
        if self._is_left_out:
            return
        index = self.num_tool_calls - 1
        if not self._deltas:
            self._deltas.append(ToolCallDelta(index, None, None, ""))
        self._arguments.append(text)

    def _join_arguments(self) -> None:
        if self._arguments:
            self._deltas[-1].arguments = "".join(self._arguments)
            self._arguments.clear()

    # ---- the program ----

    def _run(self) -> tuple[str, list[ToolCallDelta]]:
        next(self._program, None)
        self._join_arguments()
        parts = "".join(self._text), self._deltas
        self._text, self._deltas = [], []
        return parts

    def _read(self) -> Reading[None]:
        reader, format_ = self.reader, self._format
        if format_.bare:
            self._add_text((yield from reader.skip_space()))
            if (yield from reader.peek()) == format_.bare:
                yield from self._read_calls("")
        while not (yield from reader.is_at_end()):
            if format_.begins and self._num_reread_chars <= MAX_REREAD_CHARS:
                mark = yield from reader.pass_until(format_.begins, self._add_text)
                if mark:
                    yield from self._read_calls(mark)
            else:
                self._add_text(reader.take_rest())
        if not self.num_tool_calls:
            self._text += self._space

    def _read_calls(self, mark: str) -> Reading[None]:
        """Read calls that begin with `mark`. Without a call, the mark is text and what follows is read again."""
        num_begun = self._num_begun
        self.reader.mark()
        self.reader.take(len(mark))
        try:
            yield from self._format.read_calls(self, mark)
            self.reader.unmark()
        except Malformed:
            self._num_reread_chars += self.reader.rewind()
            if self._num_begun == num_begun:
                self._add_text(self.reader.take(max(len(mark), 1)))

    def _add_text(self, text: str) -> None:
        shown = text.rstrip()
        if shown:
            self._text += (*self._space, shown)
            self._space = []
        self._space.append(text[len(shown) :])


def json_tag(begin: str, tool: Tool, end: str) -> JSON:
    """Return the tag of a call whose arguments are written as JSON."""
    return {"type": "tag", "begin": begin, "content": arguments_format(tool, tool.parameters), "end": end}


def schema_format(schema: JSON) -> JSON:
    return {"type": "json_schema", "json_schema": schema}


def arguments_format(tool: Tool, schema: JSON) -> JSON:
    """Return the grammar of arguments. What it cannot hold of a tool that is not strict is left out."""
    if tool.lark:
        [key] = tool.parameters["properties"]
        elements = [
            {"type": "const_string", "value": f'{{{json_of(key)}: "'},
            {"type": LARK_STRING, "definition": tool.lark, "field": tool.field},
            {"type": "const_string", "value": '"}'},
        ]
        return {"type": "sequence", "elements": elements}
    format_ = schema_format(schema if tool.is_strict else {**schema, NOT_STRICT: False})
    return {**format_, "field": tool.field} if tool.field else format_


class ToolFormat:
    """A model's way of writing calls."""

    begins: tuple[str, ...] = ()  # marks anywhere in the text
    bare = ""  # the character that begins calls without a mark, at the answer's head
    trigger = ""  # the head of every call's tag, after which the model is held to it
    between = "\n"  # stands between two calls
    opening = ""  # what the model writes ahead of an answer that is no call

    def read_calls(self, calls: ToolCallParser, mark: str) -> Reading[None]:
        """Read one call, or a list of them. The reader stands after `mark`. `Malformed`: the rest is no call."""
        raise NotImplementedError

    def tag(self, _tool: Tool) -> JSON | None:
        """Return one call as a tag of a structural tag. None: the format cannot be enforced."""
        return None

    def tags(self, tools: Sequence[Tool]) -> list[JSON]:
        return [tag for tool in tools if (tag := self.tag(tool)) is not None]

    def written(self, name: str, arguments: JSON) -> str:
        """Return a call as the model is to write it."""
        tag = self.tag(Tool(name, {}))
        assert tag is not None
        return f"{tag['begin']}{json_of(arguments)}{tag['end']}"

    def new_id(self, _name: str, _index: int) -> str:
        return f"call_{uuid.uuid4().hex[:24]}"


def read_json_call(calls: ToolCallParser) -> Reading[None]:
    """{"name": ..., "arguments": {...}}, with the keys in any order, and "parameters" for "arguments"."""
    reader = calls.reader
    yield from reader.expect("{")
    tool: Tool | None = None
    early = ""  # arguments that came before the name
    has_begun = False
    while True:
        yield from reader.skip_space()
        key = decoded((yield from reader.read_value()))
        if tool is None and key not in JSON_CALL_KEYS:
            raise Malformed  # an answer in JSON must not be held back whole
        yield from reader.skip_space()
        yield from reader.expect(":")
        yield from reader.skip_space()
        if key == "name" and tool is None:
            tool = calls.tool(decoded((yield from reader.read_value())))
        elif key in ("arguments", "parameters") and not has_begun and not early:
            if tool is None:
                early = yield from read_arguments(reader)
            else:
                yield from pass_arguments(calls, tool)
                has_begun = True
        else:
            yield from reader.read_value()
        yield from reader.skip_space()
        if not (yield from reader.accept(",")):
            break
    is_closed = yield from reader.accept("}")
    if has_begun:
        return  # a brace forgotten at the very end spoils nothing
    if tool is None or not is_closed:
        raise Malformed
    calls.begin_call(tool)
    calls.add_arguments(early or "{}")


def read_json_calls(calls: ToolCallParser) -> Reading[None]:
    """Read a list of JSON calls, in brackets."""
    reader = calls.reader
    yield from reader.expect("[")
    while True:
        yield from reader.skip_space()
        yield from read_json_call(calls)
        yield from reader.skip_space()
        if not (yield from reader.accept(",")):
            break
    yield from reader.accept("]")


def decoded(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise Malformed from None


def read_arguments(reader: Reader) -> Reading[str]:
    """Read arguments as JSON text; some models write that text as a string, or null for none."""
    text = yield from reader.read_value()
    value = decoded(text)
    if isinstance(value, str):
        text = value or "{}"
        value = decoded(text)
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise Malformed
    return text


def pass_arguments(calls: ToolCallParser, tool: Tool) -> Reading[None]:
    """Pass on arguments in JSON, as they come."""
    if (yield from calls.reader.peek()) == "{":
        calls.begin_call(tool)
        yield from calls.reader.pass_value(calls.add_arguments)
    else:
        arguments = yield from read_arguments(calls.reader)
        calls.begin_call(tool)
        calls.add_arguments(arguments)


class Arguments:
    """Writes arguments that are not JSON in the answer, as JSON, key by key."""

    def __init__(self, calls: ToolCallParser, tool: Tool) -> None:
        self._calls, self._tool = calls, tool
        self._opening = "{"
        calls.begin_call(tool)

    def read_value(self, key: str, marks: tuple[str, ...]) -> Reading[str]:
        """Read a value up to one of `marks`, returned but not read: text as it comes, anything else when whole."""
        calls = self._calls
        if self._tool.takes_text(key):
            self._add(key, '"')
            mark = yield from calls.reader.pass_until(marks, lambda text: calls.add_arguments(json_of(text)[1:-1]))
            if mark:
                calls.add_arguments('"')
            return mark
        parts: list[str] = []
        mark = yield from calls.reader.pass_until(marks, parts.append)
        if mark:
            self._add(key, json_value("".join(parts)))
        return mark

    def close(self) -> None:
        self._calls.add_arguments("{}" if self._opening == "{" else "}")

    def _add(self, key: str, value: str) -> None:
        self._calls.add_arguments(f"{self._opening}{json_of(key)}: {value}")
        self._opening = ", "


def json_of(value: Any) -> str:
    return msgspec.json.encode(value).decode()  # a client's integers may have more than 64 bits


def text_of(value: Any) -> str:
    """Return an argument as formats write it whose strings have no quotes."""
    return value if isinstance(value, str) else json_of(value)


def object_of(arguments: str) -> JSON:
    """Return a call's arguments.

    Text that is no JSON object, because the answer was cut or the model erred, goes under the key INVALID_JSON, as
    Anthropic advises.
    """
    try:
        value: Any = orjson.loads(arguments or "{}")
    except orjson.JSONDecodeError:
        value = arguments
    if value is None:
        return {}
    return value if isinstance(value, dict) else {"INVALID_JSON": arguments}


def json_value(text: str) -> str:
    """Return `text` where it is JSON, else the JSON of what it means."""
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return json_of(PYTHON_CONSTANTS.get(text.strip(), text))
    return text.strip()


# ---- the formats ----


class Hermes(ToolFormat):
    """<tool_call>{"name": ..., "arguments": ...}</tool_call>, of Hermes 2 Pro, Qwen 2.5 and Qwen 3.

    Some answers have several calls between the two marks: one behind the other, or in a list.
    """

    begins = ("<tool_call>",)
    trigger = "<tool_call>"

    def read_calls(self, calls: ToolCallParser, _mark: str) -> Reading[None]:
        reader = calls.reader
        yield from reader.skip_space()
        if (yield from reader.peek()) == "[":
            yield from read_json_calls(calls)
        else:
            yield from self._read_objects(calls)
        yield from reader.skip_space()
        yield from reader.accept("</tool_call>")

    @staticmethod
    def _read_objects(calls: ToolCallParser) -> Reading[None]:
        reader = calls.reader
        while True:
            yield from read_json_call(calls)
            yield from reader.skip_space()
            yield from reader.accept("}")  # models that lose count of their braces write one too many
            reader.mark()
            yield from reader.skip_space()
            yield from reader.accept(",", ";")
            yield from reader.skip_space()
            if (yield from reader.peek()) != "{":
                reader.rewind()
                return

    def tag(self, tool: Tool) -> JSON:
        return json_tag(f'<tool_call>\n{{"name": {json_of(tool.name)}, "arguments": ', tool, "}\n</tool_call>")


class Llama3(ToolFormat):
    """{"name": ..., "parameters": ...} as the whole answer, or after <|python_tag|>; several with ; between them."""

    begins = ("<|python_tag|>",)
    bare = "{"
    trigger = '{"name": '
    between = "; "

    def read_calls(self, calls: ToolCallParser, _mark: str) -> Reading[None]:
        reader = calls.reader
        while True:
            yield from reader.skip_space()
            yield from read_json_call(calls)
            yield from reader.skip_space()
            yield from reader.accept(";")
            yield from reader.skip_space()
            if (yield from reader.peek()) != "{":
                return

    def tag(self, tool: Tool) -> JSON:
        return json_tag(f'{{"name": {json_of(tool.name)}, "parameters": ', tool, "}")


class Mistral(ToolFormat):
    """[TOOL_CALLS] [{"name": ..., "arguments": ...}, ...], and since 2025 [TOOL_CALLS]name[ARGS]{...}."""

    begins = ("[TOOL_CALLS]",)
    trigger = "[TOOL_CALLS]"
    between = ""

    def read_calls(self, calls: ToolCallParser, _mark: str) -> Reading[None]:
        reader = calls.reader
        yield from reader.skip_space()
        head = yield from reader.peek()
        if head == "[":
            yield from read_json_calls(calls)
        elif head == "{":
            yield from read_json_call(calls)
        else:
            name = yield from reader.read_until(("[ARGS]", "[CALL_ID]", "{"), MAX_NAME_LEN)
            tool = calls.tool(name.strip())
            if (yield from reader.accept("[CALL_ID]")):
                yield from reader.read_until(("[ARGS]",), MAX_NAME_LEN)
            yield from reader.accept("[ARGS]")
            yield from reader.skip_space()
            yield from pass_arguments(calls, tool)

    def tag(self, tool: Tool) -> JSON:
        return json_tag(f'[TOOL_CALLS] [{{"name": {json_of(tool.name)}, "arguments": ', tool, "}]")

    def new_id(self, _name: str, _index: int) -> str:
        return uuid.uuid4().hex[:9]  # their templates refuse any other length


class MistralV11(Mistral):
    """Calls as written by tokenizers from version 11 on."""

    def tag(self, tool: Tool) -> JSON:
        return json_tag(f"[TOOL_CALLS]{tool.name}[ARGS]", tool, "")


class Granite(ToolFormat):
    """<|tool_call|> and a list of calls in JSON, of Granite 3; Phi-4-mini ends it with a mark."""

    trigger, end = "<|tool_call|>", "<|/tool_call|>"
    begins: tuple[str, ...] = (trigger,)
    written_end = ""

    def read_calls(self, calls: ToolCallParser, _mark: str) -> Reading[None]:
        reader = calls.reader
        yield from reader.skip_space()
        yield from read_json_calls(calls)
        yield from reader.skip_space()
        yield from reader.accept(self.end)

    def tag(self, tool: Tool) -> JSON:
        begin = f'{self.trigger}[{{"name": {json_of(tool.name)}, "arguments": '
        return json_tag(begin, tool, f"}}]{self.written_end}")


class Hunyuan(Granite):
    """A list of calls in JSON between two marks."""

    trigger, end = "<tool_calls>", "</tool_calls>"
    begins = (trigger,)
    written_end = end


class SectionFormat(ToolFormat):
    """A section of calls, each between marks of its own: its name, a separator, and its arguments in JSON."""

    call_begin: str
    separator: str
    call_end: str
    end: str
    between = ""

    def read_calls(self, calls: ToolCallParser, _mark: str) -> Reading[None]:
        reader = calls.reader
        yield from reader.skip_space()
        yield from reader.expect(self.call_begin)
        while True:
            head = yield from reader.read_until((self.separator,), MAX_NAME_LEN)
            reader.take(len(self.separator))
            tool = calls.tool((yield from self.read_name(reader, head.strip())))
            yield from reader.skip_space()
            yield from pass_arguments(calls, tool)
            yield from self.read_call_end(reader)
            yield from reader.skip_space()
            if (yield from reader.accept(self.call_begin, self.end)) != self.call_begin:
                return

    def read_name(self, reader: Reader, head: str) -> Reading[str]:
        """Read the tool's name, from the text before the separator or behind it."""
        raise NotImplementedError

    def read_call_end(self, reader: Reader) -> Reading[None]:
        yield from reader.skip_space()
        yield from reader.accept(self.call_end)


class DeepSeekV3(SectionFormat):
    """Calls as sections, "function", the name and a fenced block of JSON; since V3.1 the name and the JSON alone."""

    trigger = "<｜tool▁calls▁begin｜>"
    begins = (trigger,)
    call_begin, separator, call_end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    end = "<｜tool▁calls▁end｜>"

    def read_name(self, reader: Reader, head: str) -> Reading[str]:
        if head == "function" and (yield from reader.peek()) != "{":
            head = yield from reader.read_until(("\n",), MAX_NAME_LEN)
            yield from reader.skip_space()
            yield from reader.expect("```json")
        return head.strip()

    def read_call_end(self, reader: Reader) -> Reading[None]:
        yield from reader.skip_space()
        yield from reader.accept("```")
        yield from super().read_call_end(reader)

    def tag(self, tool: Tool) -> JSON:
        begin = f"{self.trigger}{self.call_begin}function{self.separator}{tool.name}\n```json\n"
        return json_tag(begin, tool, f"\n```{self.call_end}{self.end}")


class DeepSeekV31(DeepSeekV3):
    def tag(self, tool: Tool) -> JSON:
        begin = f"{self.trigger}{self.call_begin}{tool.name}{self.separator}"
        return json_tag(begin, tool, f"{self.call_end}{self.end}")


class KimiK2(SectionFormat):
    """A section of calls named functions.NAME:INDEX, with their arguments in JSON."""

    trigger = "<|tool_calls_section_begin|>"
    begins = (trigger,)
    call_begin, separator, call_end = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
    end = "<|tool_calls_section_end|>"

    def read_name(self, _reader: Reader, head: str) -> Reading[str]:
        yield from ()  # it is all in the head
        return head.removeprefix("functions.").rpartition(":")[0]

    def tag(self, tool: Tool) -> JSON:
        parts: list[JSON] = [
            {"type": "regex", "pattern": "[0-9]{1,3}"},
            {"type": "const_string", "value": self.separator},
            arguments_format(tool, tool.parameters),
        ]
        begin = f"{self.trigger}{self.call_begin}functions.{tool.name}:"
        content = {"type": "sequence", "elements": parts}
        return {"type": "tag", "begin": begin, "content": content, "end": self.call_end + self.end}

    def written(self, name: str, arguments: JSON) -> str:
        begin = f"{self.trigger}{self.call_begin}functions.{name}:0{self.separator}"
        return f"{begin}{json_of(arguments)}{self.call_end}{self.end}"

    def new_id(self, name: str, index: int) -> str:
        return f"functions.{name}:{index}"  # as the model counts them, in what it is shown later


class GptOss(ToolFormat):
    """A message to functions.NAME in the channel for commentary, its content the arguments in JSON."""

    begins = (f"{NEXT} to=", f"{NEXT}{TO_TOOL}", TO_TOOL)
    trigger = f"{TO_TOOL}{FUNCTIONS}"
    between = f"{END}{NEXT}"
    opening = FINAL

    def read_calls(self, calls: ToolCallParser, _mark: str) -> Reading[None]:
        reader = calls.reader
        recipient = yield from reader.read_until((" ", "<"), MAX_NAME_LEN)
        tool = calls.tool(recipient.removeprefix(FUNCTIONS))
        yield from reader.read_until((MESSAGE,), MAX_NAME_LEN)
        reader.take(len(MESSAGE))
        yield from reader.skip_space()
        yield from pass_arguments(calls, tool)
        yield from reader.skip_space()
        yield from reader.accept(CALL, END)

    def tag(self, tool: Tool) -> JSON:
        return json_tag(f"{self.trigger}{tool.name} <|constrain|>json{MESSAGE}", tool, "")  # the end is a stop token


class Pythonic(ToolFormat):
    """[name(key=value, ...), ...] as the whole answer, of Llama 3.2 and 4; these may put it between two marks."""

    begins = ("<|python_start|>",)
    bare = "["

    def read_calls(self, calls: ToolCallParser, _mark: str) -> Reading[None]:
        reader = calls.reader
        yield from reader.skip_space()
        yield from reader.expect("[")
        while True:
            yield from reader.skip_space()
            tool = calls.tool((yield from reader.read_until(("(",), MAX_NAME_LEN)).strip())
            arguments = yield from self._read_arguments(reader)
            calls.begin_call(tool)
            calls.add_arguments(arguments)
            yield from reader.skip_space()
            if not (yield from reader.accept(",")):
                break
        yield from reader.accept("]")
        yield from reader.skip_space()
        yield from reader.accept("<|python_end|>")

    def written(self, name: str, arguments: JSON) -> str:
        return f"[{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})]"

    @staticmethod
    def _read_arguments(reader: Reader) -> Reading[str]:
        """Read (key=value, ...) of Python literals as a JSON object."""
        text = yield from reader.read_value(PYTHON_SYNTAX)
        if len(text) > MAX_PYTHON_CHARS:
            raise Malformed
        try:
            call = ast.parse("f" + text, mode="eval").body
            if not isinstance(call, ast.Call) or call.args:
                raise Malformed
            return json_of({keyword.arg: literal(keyword.value) for keyword in call.keywords})
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            raise Malformed from None


class JsonNames(ast.NodeTransformer):
    """Models that mean Python write JSON's names too."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(PYTHON_CONSTANTS[node.id]) if node.id in PYTHON_CONSTANTS else node


def literal(node: ast.expr) -> Any:
    return ast.literal_eval(JsonNames().visit(node))


def argument_formats(tool: Tool, around: Callable[[str], tuple[str, str]]) -> JSON:
    """Return the grammar of arguments that are not JSON together, each between the marks `around` gives its key."""
    elements: list[JSON] = []
    shared: JSON = {name: tool.parameters[name] for name in ("$defs", "definitions") if name in tool.parameters}
    for key, schema in (tool.parameters.get("properties") or {}).items():
        begin, end = around(key)
        content: JSON
        if tool.lark:
            content = {"type": LARK, "definition": tool.lark, "field": tool.field}
        elif tool.takes_text(key):
            texts = tool.allowed_texts(key)
            constants: list[JSON] = [{"type": "const_string", "value": text} for text in texts]
            content = {"type": "or", "elements": constants} if texts else {"type": "any_text"}
        else:
            content = arguments_format(tool, {**shared, **schema} if isinstance(schema, dict) else {})
        element: JSON = {"type": "tag", "begin": begin, "content": content, "end": end}
        if key not in (tool.parameters.get("required") or ()):
            element = {"type": "or", "elements": [element, {"type": "const_string", "value": ""}]}
        elements.append(element)
    return {"type": "sequence", "elements": elements} if elements else {"type": "const_string", "value": ""}


class Glm45(ToolFormat):
    """<tool_call>name, then <arg_key>key</arg_key><arg_value>value</arg_value> for each argument, </tool_call>."""

    begins = ("<tool_call>",)
    trigger = "<tool_call>"

    def read_calls(self, calls: ToolCallParser, _mark: str) -> Reading[None]:
        reader = calls.reader
        name = yield from reader.read_until(("<arg_key>", "</tool_call>"), MAX_NAME_LEN)
        arguments = Arguments(calls, calls.tool(name.strip()))
        while (yield from reader.accept("<arg_key>")):
            key = yield from reader.read_until(("</arg_key>",), MAX_NAME_LEN)
            reader.take(len("</arg_key>"))
            yield from reader.skip_space()
            yield from reader.expect("<arg_value>")
            if not (yield from arguments.read_value(key.strip(), ("</arg_value>",))):
                return
            reader.take(len("</arg_value>"))
            yield from reader.skip_space()
        yield from reader.expect("</tool_call>")
        arguments.close()

    def tag(self, tool: Tool) -> JSON:
        content = argument_formats(tool, lambda key: (f"<arg_key>{key}</arg_key>\n<arg_value>", "</arg_value>\n"))
        return {"type": "tag", "begin": f"<tool_call>{tool.name}\n", "content": content, "end": "</tool_call>"}

    def written(self, name: str, arguments: JSON) -> str:
        pairs = [
            f"<arg_key>{key}</arg_key>\n<arg_value>{text_of(value)}</arg_value>" for key, value in arguments.items()
        ]
        return "\n".join([f"<tool_call>{name}", *pairs, "</tool_call>"])


class Qwen3Coder(ToolFormat):
    """<tool_call><function=name><parameter=key>value</parameter>...</function></tool_call>, a line each."""

    trigger, end = "<tool_call>", "</tool_call>"
    begins: tuple[str, ...] = (trigger, "<function=")
    value_ends = ("\n</parameter>", "</parameter>", "\n<parameter=", "\n</function>")

    def read_calls(self, calls: ToolCallParser, mark: str) -> Reading[None]:
        reader = calls.reader
        if mark == self.trigger:
            yield from reader.skip_space()
            yield from reader.expect("<function=")
        name = yield from reader.read_until((">",), MAX_NAME_LEN)
        reader.take(1)
        arguments = Arguments(calls, calls.tool(name.strip()))
        yield from reader.skip_space()
        while (yield from reader.accept("<parameter=")):
            key = yield from reader.read_until((">",), MAX_NAME_LEN)
            reader.take(1)
            yield from reader.accept("\n")
            if not (yield from arguments.read_value(key.strip(), self.value_ends)):
                return
            yield from reader.skip_space()
            yield from reader.accept("</parameter>")
            yield from reader.skip_space()
        yield from reader.expect("</function>")
        arguments.close()
        yield from reader.skip_space()
        yield from reader.accept(self.end)

    def tag(self, tool: Tool) -> JSON:
        begin = f"{self.trigger}\n<function={tool.name}>\n"
        content = argument_formats(tool, lambda key: (f"<parameter={key}>\n", "\n</parameter>\n"))
        return {"type": "tag", "begin": begin, "content": content, "end": f"</function>\n{self.end}"}

    def written(self, name: str, arguments: JSON) -> str:
        pairs = [f"<parameter={key}>\n{text_of(value)}\n</parameter>" for key, value in arguments.items()]
        return "\n".join([self.trigger, f"<function={name}>", *pairs, "</function>", self.end])


class SeedOss(Qwen3Coder):
    """Qwen 3 Coder's calls between marks of Seed's own."""

    trigger, end = "<seed:tool_call>", "</seed:tool_call>"
    begins = (trigger, "<function=")


class MiniMaxM2(ToolFormat):
    """<invoke name="..."> with a <parameter name="..."> for each argument; one call or several between two marks."""

    trigger, end = "<minimax:tool_call>", "</minimax:tool_call>"
    begins = (trigger,)

    def read_calls(self, calls: ToolCallParser, _mark: str) -> Reading[None]:
        reader = calls.reader
        yield from reader.skip_space()
        yield from reader.expect("<invoke name=")
        while True:
            arguments = Arguments(calls, calls.tool((yield from self._read_quoted(reader))))
            yield from reader.skip_space()
            while (yield from reader.accept("<parameter name=")):
                key = yield from self._read_quoted(reader)
                if not (yield from arguments.read_value(key, ("</parameter>",))):
                    return
                reader.take(len("</parameter>"))
                yield from reader.skip_space()
            yield from reader.expect("</invoke>")
            arguments.close()
            yield from reader.skip_space()
            if (yield from reader.accept("<invoke name=", self.end)) != "<invoke name=":
                return

    @staticmethod
    def _read_quoted(reader: Reader) -> Reading[str]:
        """Read a name, and what ends the mark that it stands in."""
        name = yield from reader.read_until((">",), MAX_NAME_LEN)
        reader.take(1)
        return name.strip().strip("\"'")

    def tag(self, tool: Tool) -> JSON:
        content = argument_formats(tool, lambda key: (f'<parameter name="{key}">', "</parameter>\n"))
        begin = f'{self.trigger}\n<invoke name="{tool.name}">\n'
        return {"type": "tag", "begin": begin, "content": content, "end": f"</invoke>\n{self.end}"}

    def written(self, name: str, arguments: JSON) -> str:
        pairs = [f'<parameter name="{key}">{text_of(value)}</parameter>' for key, value in arguments.items()]
        return "\n".join([self.trigger, f'<invoke name="{name}">', *pairs, "</invoke>", self.end])


TOOL_FORMATS: dict[str, Callable[[], ToolFormat]] = {
    "deepseekv3": DeepSeekV3,
    "deepseekv31": DeepSeekV31,
    "glm45": Glm45,
    "gpt-oss": GptOss,
    "granite": Granite,
    "hunyuan": Hunyuan,
    "kimi_k2": KimiK2,
    "llama3": Llama3,
    "minimax-m2": MiniMaxM2,
    "mistral": Mistral,
    "mistral_v11": MistralV11,
    "pythonic": Pythonic,
    "qwen25": Hermes,
    "qwen3_coder": Qwen3Coder,
    "seed_oss": SeedOss,
}
# The first of these whose marks a chat template holds names its format.
TEMPLATE_MARKS = (
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<tool_call>", "<arg_key>"), "glm45"),
    (("<tool_call>",), "qwen25"),
    (("[TOOL_CALLS]", "[ARGS]"), "mistral_v11"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseekv3"),
    (("<｜tool▁calls▁begin｜>",), "deepseekv31"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("<|channel|>", FUNCTIONS), "gpt-oss"),
    (("<|python_start|>",), "pythonic"),
    (("[func_name1(params_name1=",), "pythonic"),
    (("<|python_tag|>",), "llama3"),
    (("<minimax:tool_call>",), "minimax-m2"),
    (("<seed:tool_call>",), "seed_oss"),
    (("<tool_calls>",), "hunyuan"),
    (("<|tool_call|>",), "granite"),
    (("<|tool|>",), "granite"),  # of Phi-4-mini, which shows where tools stand alone
    (('"parameters": dictionary of argument name',), "llama3"),
)


def find_tool_format(template: str) -> str | None:
    """Return the name of the format in which a chat template writes calls."""
    return next((name for marks, name in TEMPLATE_MARKS if all(mark in template for mark in marks)), None)
