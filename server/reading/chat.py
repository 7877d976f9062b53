"""From an OpenAI chat body to requests of the engine, and to a parser of its answer."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from aiohttp import web

from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.media import CUT, PromptMedia, with_marks_cut
from engine.request import SamplingParams
from server.config import ServerConfig
from server.http.live import Options
from server.media.reader import MediaPart, MediaReader
from server.parser_names import REASONING_ALIASES, TOOL_ALIASES
from server.parsers import AnswerParser
from server.parsers.reasoning import (
    REASONING_FORMATS,
    ReasoningFormat,
    ReasoningParser,
    find_reasoning_format,
)
from server.parsers.tool_calls import (
    TOOL_FORMATS,
    Hermes,
    ToolFormat,
    find_tool_format,
)
from server.reading.built_in_templates import TURN_STOPS
from server.reading.chat_messages import parse_messages
from server.reading.contents import as_text, settings_of
from server.reading.grammars import IN_FORMAT, names_of_constraint
from server.reading.named_template import load_chat_template
from server.reading.openai_body import ChatFields, ChatRequest
from server.reading.prompts import check_n, check_prompt_ids
from server.reading.protocol import JSON, Owner, spelled
from server.reading.sampling import num_alternatives, read_options, read_sampling_params
from server.reading.template_variables import template_variables
from server.reading.templates import find_media_roles, find_media_texts, find_traits, shaped
from server.reading.tool_choice import (
    ToolChoice,
    behind,
    json_or_calls,
    read_tool_choice,
    structural_tag,
    tool_constraint,
)
from server.reading.tool_prompt import with_calls_as_text, with_tools

MANY_MESSAGES = 256  # about 5 ms of rendering
PLAINEST_TOOL_FORMAT = "qwen25"  # JSON between two marks: most instruct models can write it when they are told how


# Caller, id of an uploaded file, the client's field -> where it is. `EngineError` if the caller has no such file.
FindFile = Callable[[Owner, str, str], Path]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as its model reads it: a text, with placeholders of pictures and videos in it."""

    text: str
    media: Sequence[MediaPart] = ()  # in the order of the messages

    @property
    def shown(self) -> str:
        """Return the text as people read it."""
        return self.text.replace(CUT, "")


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """A conversation's next answer: what to generate it from and how, and how to read it."""

    prompt: str
    input_ids: list[int]
    params: SamplingParams
    options: Options
    new_parser: Callable[[], AnswerParser] | None  # one for each answer; None: all of an answer is its text
    reasoning_end_ids: list[int] = field(default_factory=list)  # of the mark after reasoning; empty if there is none

    names: Mapping[str, str] = field(default_factory=dict)
    """Sampling fields that the client did not write: what they were made of, for errors to name (see `spelled`)."""

    custom_tools: frozenset[str] = frozenset()
    """Names of the custom tools, whose calls have a text in place of arguments."""

    def count_reasoning(self, output_ids: Sequence[int], parser: AnswerParser | None) -> int:
        """Count the tokens of reasoning in an answer that `parser` has read, marks included.

        All of them if the end mark was merged with its neighbours: it is not found then.
        """
        if parser is None or parser.reasoning is None or not parser.reasoning.is_inside:
            return 0
        ids = self.reasoning_end_ids
        for start, token_id in enumerate(output_ids):
            if token_id == ids[0] and output_ids[start : start + len(ids)] == ids:
                return start + len(ids)
        return len(output_ids)


class Chats:
    """Reads chat requests: the prompt by the model's template, or the one given on the command line.

    That template also tells how the model writes reasoning and tool calls, unless the command line does.
    """

    def __init__(self, engine: Engine, config: ServerConfig, media: MediaReader, find_file: FindFile) -> None:
        """Load the template. `OSError` or `ValueError` if there is no such template."""
        self.engine, self.config, self.media, self._find_file = engine, config, media, find_file
        self.template = load_chat_template(config.chat_template, engine.tokenizer)
        text = self.template or engine.tokenizer.chat_template or ""
        if isinstance(text, dict):
            text = "\n".join(text.values())
        self.tool_call_parser = _parser_name(config.tool_call_parser, find_tool_format(text))
        self.reasoning_parser = _parser_name(config.reasoning_parser, find_reasoning_format(text))
        self.template_defaults = config.template_defaults
        self._try = partial(engine.tokenizer.render_chat, chat_template=self.template, **self.template_defaults)
        self.traits = find_traits(self._try)
        self._marks = engine.media_marks
        self.media_roles = find_media_roles(self._try, engine.media_kinds, self.traits)
        if config.tool_call_parser is None and self.tool_call_parser is None and not self.traits.shows_tools:
            self.tool_call_parser = PLAINEST_TOOL_FORMAT
        has_prompt = self.tool_call_parser is not None and not config.disable_tool_prompt
        self.describes_tools = has_prompt and not self.traits.shows_tools
        self.model_name = config.model_name
        self._hidden: dict[str, bool] = {}  # mark -> does the tokenizer leave it out of texts?

    def media_texts(self) -> dict[str, str]:
        """Return what prompts have for a picture or video before a user's text, by kind."""
        return find_media_texts(self._try, self.engine.media_kinds)

    @property
    def supports_tools(self) -> bool:
        """Return whether the model is shown tools, and its calls are found."""
        return self.describes_tools or (self.traits.shows_tools and self.tool_call_parser is not None)

    async def turn(self, body: ChatRequest, caller: Owner) -> ChatTurn:
        """Read an OpenAI chat body. `InvalidRequest` names the field that is wrong. caller: owns the files it names."""
        if (budget := body.thinking_token_budget) is not None:  # vLLM's name
            body.max_thinking_tokens, body.thinking_token_budget = budget, None
            with spelled({"max_thinking_tokens": "thinking_token_budget"}):
                return await self.turn(body, caller)
        choice = read_tool_choice(body)
        prompt = await self.rendered(body, caller, choice)
        reasoning = self._reasoning(body, prompt.text)
        if reasoning is not None and not reasoning.is_inside and body.max_thinking_tokens is not None:
            if body.input_ids is not None:
                raise InvalidRequest("max_thinking_tokens may not change a prompt of input_ids", "max_thinking_tokens")
            # A budget can be kept only where the reasoning is sure to come.
            prompt = replace(prompt, text=f"{prompt.text}{reasoning.format.start}\n")
            reasoning = replace(reasoning, is_inside=True)
        tool_format = self._tool_format(choice)
        params, names = self._sampling_params(body, choice, tool_format, reasoning)
        options = await self._options(body, reasoning)
        input_ids, options.media = await self._input_ids(body, prompt)

        is_separate = body.separate_reasoning
        streams_reasoning = body.stream_reasoning
        includes_reasoning = body.include_reasoning
        is_separate = is_separate or not includes_reasoning  # what is left out has to be found
        # Where the text has marks of its own, they are taken off even if reasoning stays in it.
        if tool_format is None and (reasoning is None or not (is_separate or reasoning.format.opening)):
            return ChatTurn(prompt.shown, input_ids, params, options, None, names=names)

        def new_parser() -> AnswerParser:
            return AnswerParser(
                None if reasoning is None else reasoning.new_parser(is_separate),
                None if tool_format is None else choice.new_parser(tool_format),
                streams_reasoning=streams_reasoning,
                includes_reasoning=includes_reasoning,
            )

        marks = [*tool_format.begins] if tool_format else []
        marks += [reasoning.format.start, reasoning.format.end] if reasoning else []
        if any([await self._is_hidden(mark) for mark in marks]):
            params = replace(params, skip_special_tokens=False)
        end_ids = await self._ids(reasoning.format.end) if reasoning else []
        return ChatTurn(prompt.shown, input_ids, params, options, new_parser, end_ids, names, choice.custom)

    async def _input_ids(self, body: ChatRequest, prompt: ChatPrompt) -> tuple[list[int], PromptMedia | None]:
        """Return the body's token ids (SGLang's field), else those of `prompt`, and what it shows.

        Beside ids of the body, `prompt` only decides how the answer is read.
        """
        if body.input_ids is not None:
            if prompt.media:
                raise InvalidRequest(f"input_ids may not be given beside {prompt.media[0].path}", "input_ids")
            return check_prompt_ids(self.engine, body.input_ids, "input_ids"), None
        # Unless vLLM's field says otherwise: templates write special tokens themselves.
        input_ids, media = await self.encode(prompt, bool(body.add_special_tokens))
        if not input_ids:
            raise InvalidRequest("messages make an empty prompt", "messages")
        return input_ids, media

    async def encode(
        self, prompt: ChatPrompt, add_special_tokens: bool = False, *, is_prompt: bool = True
    ) -> tuple[list[int], PromptMedia | None]:
        """Return the token ids of a prompt, and its pictures and videos, which are read for it."""
        if not prompt.media and CUT not in prompt.text:
            return await self.engine.encode(prompt.text, add_special_tokens, is_prompt=is_prompt), None
        return await self.media.encode(prompt.text, prompt.media, "messages", add_special_tokens)

    async def rendered(self, body: ChatFields, caller: Owner, choice: ToolChoice | None = None) -> ChatPrompt:
        """Return what `render` does, with the caller's files; off the event loop if there are many messages."""
        is_long = len(body.messages) > MANY_MESSAGES
        prompt = await asyncio.to_thread(self.render, body, choice) if is_long else self.render(body, choice)
        return replace(prompt, media=[self._with_file(part, caller) for part in prompt.media])

    def _with_file(self, part: MediaPart, caller: Owner) -> MediaPart:
        return part if part.file_id is None else replace(part, source=self._find_file(caller, part.file_id, part.path))

    def render(self, body: ChatFields, choice: ToolChoice | None = None) -> ChatPrompt:
        """Render the prompt of a chat request. `InvalidRequest` names the message, or says why the template refused."""
        media: list[MediaPart] = []
        messages = parse_messages(body.messages, media if self.engine.media_kinds else None)
        self.media.check(media)
        if body.mm_processor_kwargs is not None:
            shared = settings_of(body.mm_processor_kwargs)
            media = [replace(part, settings={**shared, **part.settings}) for part in media]
        return ChatPrompt(self._render(messages, body, choice), media)

    def _render(self, messages: list[JSON], body: ChatFields, choice: ToolChoice | None) -> str:
        continues = body.continue_final_message
        if continues and messages[-1]["role"] != "assistant":
            raise InvalidRequest("continue_final_message needs an assistant message at the end", "messages")
        tools = (choice or read_tool_choice(body)).shown
        variables = template_variables(body, self.template_defaults)
        if self._marks:  # those that stand for the request's pictures are the template's
            messages, tools, variables = with_marks_cut([messages, tools, variables], self._marks)
        adds_prompt = not continues if body.add_generation_prompt is None else body.add_generation_prompt

        def render(messages: list[JSON]) -> str:
            shown, template_tools = (messages, tools) if self.traits.shows_tools else self._described(messages, tools)
            return self.engine.tokenizer.render_chat(
                shaped(shown, self.traits, self.media_roles, self.engine.media_kinds),
                tools=template_tools,
                add_generation_prompt=adds_prompt,
                continue_final_message=continues,
                chat_template=self.template,
                **variables,
            )

        if not any(message.get("tool_calls") or message["role"] in ("tool", "function") for message in messages):
            return render(messages)
        return self._render_calls(render, messages, has_tools=bool(tools))

    def _render_calls(self, render: Callable[[list[JSON]], str], messages: list[JSON], *, has_tools: bool) -> str:
        """Render messages with calls, as texts if the template does not show them as calls, or refuses them.

        Some allow one call in a message, or ids of one form: what this server said has to be taken back all the same.
        """
        refused: InvalidRequest | None = None
        if self.traits.shows_calls if has_tools else self.traits.shows_calls_alone:
            try:
                return render(messages)
            except InvalidRequest as error:
                refused = error
        try:
            return render(with_calls_as_text(messages, self._written_format()))
        except InvalidRequest as error:
            raise refused or error from None

    def _described(self, messages: list[JSON], tools: list[JSON] | None) -> tuple[list[JSON], None]:
        """Return messages that describe the tools, which are not for the template. `InvalidRequest` if they may not."""
        if not tools:
            return messages, None
        if not self.describes_tools:
            raise InvalidRequest(
                f"tools cannot be used: {self.model_name} does not support tools (its chat template shows none, and "
                "--disable-tool-prompt or --tool-call-parser none keeps the server from describing them)",
                "tools",
            )
        return with_tools(messages, tools, self._written_format(), has_system=self.traits.shows_system), None

    def _written_format(self) -> ToolFormat:
        """Return the format of calls that are written into texts."""
        return TOOL_FORMATS[self.tool_call_parser or PLAINEST_TOOL_FORMAT]()

    def _reasoning(self, body: ChatFields, prompt: str) -> "Reasoning | None":
        """Return the reasoning that this answer may begin with; None: without reasoning."""
        if self.reasoning_parser is None:
            if body.max_thinking_tokens is not None:
                raise InvalidRequest(
                    "max_thinking_tokens needs a model whose marks of reasoning are known, see --reasoning-parser",
                    "max_thinking_tokens",
                )
            return None
        format_ = REASONING_FORMATS[self.reasoning_parser]
        if body.continue_final_message:
            content = parse_messages(body.messages[-1:], [])[-1]["content"]
            begun = as_text(content, self.engine.media_kinds).rpartition(format_.start)
            is_inside = bool(begun[1]) and format_.end not in begun[2]
            return Reasoning(format_, True) if is_inside else None
        variables = template_variables(body, self.template_defaults)
        if format_.is_always and False in (variables.get("enable_thinking"), variables.get("thinking")):
            return None
        begins_inside = format_.begins_inside(prompt)
        return None if begins_inside is None else Reasoning(format_, begins_inside)

    def _tool_format(self, choice: ToolChoice) -> ToolFormat | None:
        """Return the format of this answer's calls. Forced ones have one even if the model's own is not known."""
        if not choice.callable:
            return None
        format_ = TOOL_FORMATS[self.tool_call_parser]() if self.tool_call_parser else None
        if choice.is_forced and (format_ is None or format_.tag(choice.callable[0]) is None):
            return Hermes()
        return format_

    def _sampling_params(
        self, body: ChatFields, choice: ToolChoice, tool_format: ToolFormat | None, reasoning: "Reasoning | None"
    ) -> tuple[SamplingParams, dict[str, str]]:
        """Return the parameters, and what the client calls the constraint among them."""
        params = read_sampling_params(body, self.engine, ("max_completion_tokens", "max_tokens"), None)
        if stops := TURN_STOPS.get(self.config.chat_template or ""):
            params = replace(params, stop=[*params.stop, *stops])
        check_n(self.engine, params.n, 1)
        thinks = reasoning.marks if reasoning and not reasoning.is_inside else None
        opening = reasoning.format.opening if reasoning else ""
        held: JSON | None = None
        names = names_of_constraint(body)
        if choice.is_forced and params.constraint_name is not None:
            params = _without_format(params, names)
        if params.constraint_name is None:
            held = tool_constraint(choice, tool_format) if tool_format else None
            names = {"structural_tag": "tools"}
        elif isinstance(params.json_schema, dict) and (thinks or tool_format or opening):
            held = json_or_calls(params.json_schema, choice, tool_format, opening)
            params = replace(params, json_schema=None)
            names = {"structural_tag": names["json_schema"]}
        if held is not None:
            if reasoning and reasoning.is_inside:
                held = behind(reasoning.format.after, held)
            params = replace(params, structural_tag=structural_tag(held, thinks))
        return params, names

    async def _options(self, body: ChatRequest, reasoning: "Reasoning | None") -> Options:
        options = read_options(body, num_alternatives(body.logprobs, body.top_logprobs))
        options.may_shorten = not self.config.strict_max_tokens
        if reasoning is not None and reasoning.is_inside:
            options.max_thinking_tokens = body.max_thinking_tokens
            options.reasoning_end_ids = await self._ids(reasoning.format.end)
        return options

    async def _ids(self, mark: str) -> list[int]:
        return await self.engine.encode(mark, add_special_tokens=False)

    async def _is_hidden(self, mark: str) -> bool:
        """Return whether the mark is a special token, which texts usually lack."""
        if mark not in self._hidden:
            text = self.engine.tokenizer.decode(await self._ids(mark), skip_special_tokens=True)
            self._hidden[mark] = mark not in text
        return self._hidden[mark]


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The reasoning that an answer may begin with."""

    format: ReasoningFormat
    is_inside: bool  # it does: the prompt, or the model's habit, says so

    @property
    def marks(self) -> tuple[str, str]:
        """The marks before it, and between it and the rest."""
        return self.format.start, self.format.end + self.format.after

    def new_parser(self, is_separate: bool) -> ReasoningParser:
        return self.format.new_parser(is_inside=self.is_inside, is_separate=is_separate)


CHATS: web.AppKey[Chats] = web.AppKey("chats", Chats)  # for the start table


def _parser_name(given: str | None, found: str | None) -> str | None:
    """Return the parser to use: as the command line says ("none": no parser), else as found."""
    if given is None:
        return found
    return None if given == "none" else TOOL_ALIASES.get(given) or REASONING_ALIASES.get(given) or given


def _without_format(params: SamplingParams, names: dict[str, str]) -> SamplingParams:
    """Return `params` of an answer that must be a call. A `response_format` is for texts, of which there will be none.

    `InvalidRequest` if the answer must have a form for another reason. names: of the constraint, as the client has it.
    """
    if names.get("json_schema") not in IN_FORMAT:
        [name] = names.values()
        raise InvalidRequest(f"tool_choice forces a call, while {name} wants another form of the answer", "tool_choice")
    return replace(params, json_schema=None)
