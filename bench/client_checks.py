"""Ask client libraries for what `bench.clients` wants to see: a class for each, with a method for each check.

A method is named as its check, and raises whatever is wrong. Libraries are imported where their client is made.
"""

import asyncio
import functools
import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

TIMEOUT_S = 180.0  # of one check, on a slow CPU
MAX_TOKENS = 96
QUESTION = "What is the capital of France?"
WEATHER_QUESTION = "What is the weather in Paris? Use the tool."
WEATHER = "Sunny, 21 degrees."  # what the tool answers
DESCRIPTION = "Look up the weather in a city."
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": DESCRIPTION, "parameters": PARAMETERS}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
FORCED: Any = {"type": "function", "function": {"name": "weather"}}
PLACE_QUESTION = "Describe Paris, as JSON."
TEXTS = ["The cat sat on the mat.", "Stocks fell sharply today."]


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    model: str
    key: str

    @property
    def v1(self) -> str:
        return self.url + "/v1"


def expect(is_so: object, what: str) -> None:
    """Raise `AssertionError` unless `is_so`, in optimized runs too."""
    if not is_so:
        raise AssertionError(what)


def expect_text(text: str | None) -> None:
    expect(text and text.strip(), f"no text came: {text!r}")


def expect_call(name: str, arguments: Any) -> None:
    """Check a call of the tool. `arguments` are an object, or the JSON of one."""
    found = json.loads(arguments) if isinstance(arguments, str) else arguments
    expect(name == "weather" and found.get("city") in ("Paris", "Rome"), f"called {name} with {arguments!r}")


def expect_vectors(vectors: Sequence[Sequence[float]]) -> None:
    expect(len(vectors) == len(TEXTS), f"{len(vectors)} vectors for {len(TEXTS)} texts")
    expect(len(vectors[0]) == len(vectors[1]) > 1, f"vectors of {[*map(len, vectors)]} numbers")
    expect(list(vectors[0]) != list(vectors[1]), "two texts have the same vector")


def place_type() -> Any:
    """Return the class of structured answers. Clients that take one bring pydantic with them."""
    from pydantic import BaseModel, ConfigDict

    class Place(BaseModel):
        model_config = ConfigDict(extra="forbid")
        name: Literal["Paris", "Rome"]
        continent: Literal["Africa", "Europe"]
        is_capital: bool

    return Place


class Client(Protocol):
    def __init__(self, server: Server) -> None: ...


# ---- the clients ----


class OpenAIChat:
    def __init__(self, server: Server) -> None:
        import openai

        self.model = server.model
        self.client = openai.OpenAI(base_url=server.v1, api_key=server.key, timeout=TIMEOUT_S, max_retries=0)

    def chat(self) -> None:
        chunks = list(
            self.client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": QUESTION}], max_completion_tokens=MAX_TOKENS,
                temperature=0, stream=True, stream_options={"include_usage": True},
            )
        )  # fmt: skip
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
        expect_text("".join(choice.delta.content or "" for choice in choices))
        expect(choices[-1].finish_reason in ("stop", "length"), f"finish_reason is {choices[-1].finish_reason!r}")
        expect(chunks[-1].usage, "the last chunk has no usage")

    def tools(self) -> None:
        messages: Any = [{"role": "user", "content": WEATHER_QUESTION}]
        asked: Any = {"model": self.model, "tools": [TOOL], "max_completion_tokens": MAX_TOKENS, "temperature": 0}
        with self.client.chat.completions.stream(messages=messages, tool_choice=FORCED, **asked) as stream:
            choice = stream.get_final_completion().choices[0]
        call: Any = next(iter(choice.message.tool_calls or ()), None)
        expect(call, f"no call came: {choice.message}")
        expect_call(call.function.name, call.function.arguments)
        result = {"role": "tool", "tool_call_id": call.id, "content": WEATHER}
        messages += [choice.message.model_dump(exclude_none=True, exclude={"parsed"}), result]
        answer = self.client.chat.completions.create(messages=messages, tool_choice="none", **asked)
        expect_text(answer.choices[0].message.content)

    def structured(self) -> None:
        asked: Any = {"model": self.model, "messages": [{"role": "user", "content": PLACE_QUESTION}]}
        place = place_type()
        parsed = self.client.chat.completions.parse(response_format=place, **asked).choices[0].message.parsed
        expect(isinstance(parsed, place), f"parsed is {parsed!r}")
        with self.client.chat.completions.stream(response_format=place, **asked) as stream:
            parsed = stream.get_final_completion().choices[0].message.parsed
        expect(isinstance(parsed, place), f"parsed is {parsed!r} of a stream")

    def embeddings(self) -> None:
        expect_vectors([item.embedding for item in self.client.embeddings.create(model=self.model, input=TEXTS).data])


class OpenAIResponses:
    def __init__(self, server: Server) -> None:
        import openai

        self.model = server.model
        self.client = openai.OpenAI(base_url=server.v1, api_key=server.key, timeout=TIMEOUT_S, max_retries=0)

    def chat(self) -> None:
        asked: Any = {"model": self.model, "max_output_tokens": MAX_TOKENS, "temperature": 0}
        with self.client.responses.stream(input=QUESTION, **asked) as stream:
            events = list(stream)
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        final: Any = getattr(events[-1], "response", None)
        expect_text(text)
        expect(final, f"the stream ends with {events[-1]}")
        expect(final.output_text == text, f"{final.output_text!r} in the end, {text!r} in pieces")
        expect(final.usage, "no usage")

    def tools(self) -> None:
        tool: Any = {"type": "function", **TOOL["function"], "strict": True}  # type: ignore[dict-item]
        asked: Any = {"model": self.model, "tools": [tool], "max_output_tokens": MAX_TOKENS, "temperature": 0}
        choice: Any = {"type": "function", "name": "weather"}
        first = self.client.responses.create(input=WEATHER_QUESTION, tool_choice=choice, **asked)
        calls = [item for item in first.output if item.type == "function_call"]
        expect(calls, f"no call came: {first.output}")
        expect_call(calls[0].name, calls[0].arguments)
        result: Any = {"type": "function_call_output", "call_id": calls[0].call_id, "output": WEATHER}
        asked |= {"previous_response_id": first.id, "tool_choice": "none"}
        then = self.client.responses.create(input=[result], **asked)
        expect_text(then.output_text)

    def structured(self) -> None:
        place = place_type()
        parsed = self.client.responses.parse(model=self.model, input=PLACE_QUESTION, text_format=place).output_parsed
        expect(isinstance(parsed, place), f"parsed is {parsed!r}")


class Anthropic:
    def __init__(self, server: Server) -> None:
        import anthropic

        self.model = server.model
        self.client = anthropic.Anthropic(base_url=server.url, api_key=server.key, timeout=TIMEOUT_S, max_retries=0)

    def chat(self) -> None:
        messages: Any = [{"role": "user", "content": QUESTION}]
        asked: Any = {"model": self.model, "max_tokens": MAX_TOKENS, "extra_body": {"temperature": 0}}
        with self.client.messages.stream(messages=messages, **asked) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        expect_text(text)
        expect(final.stop_reason in ("end_turn", "max_tokens"), f"stop_reason is {final.stop_reason!r}")
        expect(final.usage.output_tokens > 0, "no usage")

    def tools(self) -> None:
        messages: Any = [{"role": "user", "content": WEATHER_QUESTION}]
        tool: Any = {"name": "weather", "description": DESCRIPTION, "input_schema": PARAMETERS}
        asked: Any = {"model": self.model, "tools": [tool], "max_tokens": MAX_TOKENS, "extra_body": {"temperature": 0}}
        choice: Any = {"type": "tool", "name": "weather"}
        with self.client.messages.stream(messages=messages, tool_choice=choice, **asked) as stream:
            first = stream.get_final_message()
        calls = [block for block in first.content if block.type == "tool_use"]
        expect(calls and first.stop_reason == "tool_use", f"no call came: {first}")
        expect_call(calls[0].name, calls[0].input)
        result = {"type": "tool_result", "tool_use_id": calls[0].id, "content": WEATHER}
        messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        then = self.client.messages.create(messages=messages, tool_choice={"type": "none"}, **asked)
        expect_text("".join(block.text for block in then.content if block.type == "text"))

    def structured(self) -> None:
        place = place_type()
        messages: Any = [{"role": "user", "content": PLACE_QUESTION}]
        asked: Any = {"model": self.model, "messages": messages, "max_tokens": MAX_TOKENS}
        answer = self.client.messages.parse(output_format=place, **asked)
        expect(isinstance(answer.parsed_output, place), f"parsed_output is {answer.parsed_output!r}")


class Ollama:
    def __init__(self, server: Server) -> None:
        import ollama

        self.model = server.model
        headers = {"Authorization": f"Bearer {server.key}"}
        self.client = ollama.Client(host=server.url, timeout=TIMEOUT_S, headers=headers)
        self.options = {"num_predict": MAX_TOKENS, "temperature": 0}

    def chat(self) -> None:
        messages = [{"role": "user", "content": QUESTION}]
        parts = list(self.client.chat(self.model, messages, stream=True, options=self.options))
        expect_text("".join(part.message.content or "" for part in parts))
        expect(parts[-1].done and parts[-1].eval_count, f"the stream ends with {parts[-1]!r}")

    def tools(self) -> None:
        """Send back a call that the model has made, or may have: Ollama's API cannot force one."""

        def weather(city: str) -> str:
            """Look up the weather in a city."""
            return WEATHER + city

        messages: list[Any] = [{"role": "user", "content": WEATHER_QUESTION}]
        first = self.client.chat(self.model, messages, tools=[weather], options=self.options).message
        call = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
        messages.append(first if first.tool_calls else {"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "tool_name": "weather", "content": WEATHER})
        expect_text(self.client.chat(self.model, messages, options=self.options).message.content)

    def structured(self) -> None:
        messages = [{"role": "user", "content": PLACE_QUESTION}]
        place = place_type()
        answer = self.client.chat(self.model, messages, format=place.model_json_schema())
        place.model_validate_json(answer.message.content or "")

    def embeddings(self) -> None:
        expect_vectors(self.client.embed(self.model, TEXTS).embeddings)


class LiteLLM:
    PROVIDER = "openai"
    FORCES_CALLS = True

    def __init__(self, server: Server) -> None:
        import litellm

        litellm.suppress_debug_info = True
        self.litellm = litellm
        self.asked: Any = {
            "model": f"{self.PROVIDER}/{server.model}",
            "api_base": self.base_of(server),
            "api_key": server.key,
            "timeout": TIMEOUT_S,
            "max_retries": 0,
        }
        self.sampling: Any = {"max_tokens": MAX_TOKENS, "temperature": 0}  # fmt: skip

    def base_of(self, server: Server) -> str:
        return server.v1

    def chat(self) -> None:
        messages = [{"role": "user", "content": QUESTION}]
        chunks = list(self.litellm.completion(messages=messages, stream=True, **self.asked, **self.sampling))
        expect_text("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
        expect(chunks[-1].choices[0].finish_reason in ("stop", "length"), f"the stream ends with {chunks[-1]}")

    def tools(self) -> None:
        messages: list[Any] = [{"role": "user", "content": WEATHER_QUESTION}]
        asked = {**self.asked, **self.sampling, "tools": [TOOL]}
        message = self.litellm.completion(messages=messages, tool_choice=FORCED, **asked).choices[0].message
        if not self.FORCES_CALLS and not message.tool_calls:
            message = self.litellm.Message(tool_calls=[CALL])
        expect(message.tool_calls, f"no call came: {message}")
        call = message.tool_calls[0]
        expect_call(call.function.name, call.function.arguments)
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": WEATHER}]
        answer = self.litellm.completion(messages=messages, tool_choice="none", **asked)
        expect_text(answer.choices[0].message.content)

    def structured(self) -> None:
        place = place_type()
        messages = [{"role": "user", "content": PLACE_QUESTION}]
        answer = self.litellm.completion(messages=messages, response_format=place, **self.asked)
        place.model_validate_json(answer.choices[0].message.content)

    def embeddings(self) -> None:
        data = self.litellm.embedding(input=TEXTS, **self.asked).data
        expect_vectors([item["embedding"] for item in data])


class LiteLLMvLLM(LiteLLM):
    PROVIDER = "hosted_vllm"


class LiteLLMAnthropic(LiteLLM):
    PROVIDER = "anthropic"
    embeddings: Any = None

    def base_of(self, server: Server) -> str:
        return server.url


class LiteLLMOllama(LiteLLM):
    PROVIDER = "ollama_chat"
    FORCES_CALLS = False
    embeddings: Any = None

    def base_of(self, server: Server) -> str:
        return server.url


class LangChain:
    USES_RESPONSES = False

    def __init__(self, server: Server) -> None:
        from langchain_openai import ChatOpenAI, OpenAIEmbeddings

        asked: Any = {"base_url": server.v1, "api_key": server.key, "model": server.model, "max_retries": 0}
        sampling: Any = {"max_completion_tokens": MAX_TOKENS, "temperature": 0}
        self.llm: Any = ChatOpenAI(
            timeout=TIMEOUT_S, stream_usage=True, **asked, **sampling, use_responses_api=self.USES_RESPONSES
        )
        # Otherwise it sends the tokens of a vocabulary that it fetches.
        self.embedder: Any = OpenAIEmbeddings(check_embedding_ctx_length=False, **asked)

    def chat(self) -> None:
        chunks = list(self.llm.stream(QUESTION))
        expect_text("".join(chunk.text for chunk in chunks))
        expect(any(chunk.usage_metadata for chunk in chunks), "no usage")

    def tools(self) -> None:
        from langchain_core.messages import HumanMessage, ToolMessage

        llm = self.llm.bind_tools([TOOL], tool_choice="weather")
        message: Any = functools.reduce(operator.add, llm.stream(WEATHER_QUESTION))
        expect(message.tool_calls, f"no call came: {message}")
        call = message.tool_calls[0]
        expect_call(call["name"], call["args"])
        history = [HumanMessage(WEATHER_QUESTION), message, ToolMessage(WEATHER, tool_call_id=call["id"])]
        expect_text(self.llm.bind_tools([TOOL], tool_choice="none").invoke(history).text)

    def structured(self) -> None:
        place = place_type()
        for method in ("json_schema", "function_calling"):
            answer = self.llm.with_structured_output(place, method=method).invoke(PLACE_QUESTION)
            expect(isinstance(answer, place), f"{method} gives {answer!r}")

    def embeddings(self) -> None:
        expect_vectors(self.embedder.embed_documents(TEXTS))


class LangChainResponses(LangChain):
    USES_RESPONSES = True
    embeddings: Any = None


class PydanticAI:
    MODEL = "OpenAIChatModel"

    def __init__(self, server: Server) -> None:
        from pydantic_ai.models import openai
        from pydantic_ai.providers.openai import OpenAIProvider

        self.name, self.provider = server.model, OpenAIProvider(base_url=server.v1, api_key=server.key)
        self.model: Any = getattr(openai, self.MODEL)(server.model, provider=self.provider)
        self.settings: Any = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "timeout": TIMEOUT_S}
        self.run = asyncio.Runner().run  # its connections are those of one loop

    def chat(self) -> None:
        from pydantic_ai import Agent

        async def run() -> str:
            async with Agent(self.model, model_settings=self.settings).run_stream(QUESTION) as result:
                return "".join([piece async for piece in result.stream_text(delta=True)])

        expect_text(self.run(run()))

    def tools(self) -> None:
        from pydantic_ai.direct import model_request
        from pydantic_ai.messages import ModelRequest, ToolCallPart, ToolReturnPart
        from pydantic_ai.models import ModelRequestParameters
        from pydantic_ai.tools import ToolDefinition

        tool = ToolDefinition(name="weather", description=DESCRIPTION, parameters_json_schema=PARAMETERS)
        parameters = ModelRequestParameters(function_tools=[tool])

        async def run() -> Any:
            history: list[Any] = [ModelRequest.user_text_prompt(WEATHER_QUESTION)]
            for choice in ("required", "none"):
                settings = {**self.settings, "tool_choice": choice}
                answer: Any = await model_request(
                    self.model, history, model_settings=settings, model_request_parameters=parameters
                )  # fmt: skip
                calls = [part for part in answer.parts if isinstance(part, ToolCallPart)]
                if choice == "required":
                    expect(calls, f"no call came: {answer}")
                    expect_call(calls[0].tool_name, calls[0].args)
                    result = ToolReturnPart("weather", WEATHER, calls[0].tool_call_id)
                    history += [answer, ModelRequest(parts=[result])]
            return answer

        expect_text(self.run(run()).text)

    def structured(self) -> None:
        from pydantic_ai import Agent, NativeOutput, ToolOutput

        place = place_type()
        for kind in (NativeOutput, ToolOutput):
            agent: Any = Agent(self.model, output_type=kind(place), model_settings=self.settings)
            answer = self.run(agent.run(PLACE_QUESTION)).output
            expect(isinstance(answer, place), f"{kind.__name__} gives {answer!r}")

    def embeddings(self) -> None:
        from pydantic_ai import Embedder
        from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel

        embedder = Embedder(OpenAIEmbeddingModel(self.name, provider=self.provider))
        expect_vectors(self.run(embedder.embed_documents(TEXTS)).embeddings)


class PydanticAIResponses(PydanticAI):
    MODEL = "OpenAIResponsesModel"
    embeddings: Any = None


# (what the table calls it, the package that it needs, its class)
CLIENTS: list[tuple[str, str, type[Client]]] = [
    ("openai", "openai", OpenAIChat),
    ("openai, responses", "openai", OpenAIResponses),
    ("anthropic", "anthropic", Anthropic),
    ("ollama", "ollama", Ollama),
    ("LiteLLM, openai/", "litellm", LiteLLM),
    ("LiteLLM, hosted_vllm/", "litellm", LiteLLMvLLM),
    ("LiteLLM, anthropic/", "litellm", LiteLLMAnthropic),
    ("LiteLLM, ollama_chat/", "litellm", LiteLLMOllama),
    ("LangChain", "langchain-openai", LangChain),
    ("LangChain, responses", "langchain-openai", LangChainResponses),
    ("pydantic-ai", "pydantic-ai-slim", PydanticAI),
    ("pydantic-ai, responses", "pydantic-ai-slim", PydanticAIResponses),
]
