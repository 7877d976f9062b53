"""The front-end language: programs that write prompts, let a model fill them in, and branch.

    import server.lang as sgl

    @sgl.function
    def qa(s, question):
        s += sgl.user(question)
        s += sgl.assistant(sgl.gen("answer", max_tokens=64))

    sgl.set_default_backend(sgl.RuntimeEndpoint("http://localhost:30000"))
    print(qa.run(question="What is the capital of France?")["answer"])

SGLang's language (Zheng et al., 2024) in its names and meanings, on asyncio.
"""

from importlib import import_module
from typing import Any

from server.lang.backends.base import BackendError, BaseBackend
from server.lang.backends.runtime_endpoint import RuntimeEndpoint
from server.lang.choices import (
    greedy_token_selection,
    token_length_normalized,
    unconditional_likelihood_normalized,
)
from server.lang.executor import ProgramAborted
from server.lang.expressions import (
    assistant,
    assistant_begin,
    assistant_end,
    gen,
    gen_int,
    gen_string,
    image,
    select,
    separate_reasoning,
    system,
    system_begin,
    system_end,
    user,
    user_begin,
    user_end,
    video,
)
from server.lang.function import DEFAULT_BACKEND, SglFunction, function
from server.lang.runtime import Engine, Runtime
from server.lang.state import ProgramState, ProgramStateGroup
from server.lang.templates import (
    get_chat_template,
    register_chat_template,
    register_chat_template_matching_function,
)
from server.lang.trace import TraceStopped

set_default_backend = DEFAULT_BACKEND.set

# Their packages are optional: imported when asked for.
_OPTIONAL = {
    "OpenAI": "server.lang.backends.openai",
    "Anthropic": "server.lang.backends.anthropic",
    "VertexAI": "server.lang.backends.gemini",
    "Gemini": "server.lang.backends.gemini",
    "LiteLLM": "server.lang.backends.litellm",
}


def __getattr__(name: str) -> Any:
    if name in _OPTIONAL:
        return getattr(import_module(_OPTIONAL[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def flush_cache(backend: Any = None, empty_cache: bool = True) -> bool:
    """Forget cached prefixes. False if requests are running. `empty_cache`: accepted for SGLang's sake."""
    del empty_cache
    return DEFAULT_BACKEND.resolve(backend).flush_cache()


def get_server_info(backend: Any = None) -> dict[str, Any]:
    """Return the server's settings and state."""
    return DEFAULT_BACKEND.resolve(backend).get_server_info()


__all__ = [
    "Anthropic",
    "BackendError",
    "BaseBackend",
    "Engine",
    "Gemini",
    "LiteLLM",
    "OpenAI",
    "ProgramAborted",
    "ProgramState",
    "ProgramStateGroup",
    "Runtime",
    "RuntimeEndpoint",
    "SglFunction",
    "TraceStopped",
    "VertexAI",
    "assistant",
    "assistant_begin",
    "assistant_end",
    "flush_cache",
    "function",
    "gen",
    "gen_int",
    "gen_string",
    "get_chat_template",
    "get_server_info",
    "greedy_token_selection",
    "image",
    "register_chat_template",
    "register_chat_template_matching_function",
    "select",
    "separate_reasoning",
    "set_default_backend",
    "system",
    "system_begin",
    "system_end",
    "token_length_normalized",
    "unconditional_likelihood_normalized",
    "user",
    "user_begin",
    "user_end",
    "video",
]
