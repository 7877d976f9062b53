"""The front-end language: programs that write prompts, let a model fill them in, and branch.

    import server.lang as sgl

    @sgl.function
    def qa(s, question):
        s += sgl.user(question)
        s += sgl.assistant(sgl.gen("answer", max_tokens=64))

    sgl.set_default_backend(sgl.RuntimeEndpoint("http://localhost:30000"))
    print(qa.run(question="What is the capital of France?")["answer"])

SGLang's language (Zheng et al., 2024) in its names and meanings, on asyncio.

Where the wheel is installed, `import radixloop as sgl` is the same. Modules of this package import each other
relatively, and nothing else of ours before it is used: under that name they need no package `server`, which may be the
program's own, and neither torch nor the engine.
"""

from importlib import import_module
from typing import Any

from .backends.base import BackendError, BaseBackend
from .backends.runtime_endpoint import RuntimeEndpoint
from .choices import (
    greedy_token_selection,
    token_length_normalized,
    unconditional_likelihood_normalized,
)
from .executor import ProgramAborted
from .expressions import (
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
from .function import DEFAULT_BACKEND, SglFunction, function
from .runtime import Engine, Runtime
from .state import ProgramState, ProgramStateGroup
from .templates import (
    get_chat_template,
    register_chat_template,
    register_chat_template_matching_function,
)
from .trace import TraceStopped

set_default_backend = DEFAULT_BACKEND.set

# Their packages are optional: imported when asked for.
_OPTIONAL = {
    "OpenAI": ".backends.openai",
    "Anthropic": ".backends.anthropic",
    "VertexAI": ".backends.gemini",
    "Gemini": ".backends.gemini",
    "LiteLLM": ".backends.litellm",
}


def __getattr__(name: str) -> Any:
    if name in _OPTIONAL:
        return getattr(import_module(_OPTIONAL[name], __name__), name)
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
