"""The APIs that `bench.serve` speaks: what is sent, and what each line of a streamed answer says."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import orjson

from bench.work import Work

JSON = dict[str, Any]
DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Event:
    """Say what a line of a stream brings. `usage`: tokens of prompt and answer, where the line has them."""

    has_token: bool = False
    is_last: bool = False
    usage: tuple[int, int] | None = None
    error: str = ""


class Wire(ABC):
    """One API. Answers are greedy."""

    path: ClassVar[str]
    takes_ids: ClassVar[bool] = True
    models_path: ClassVar[str] = "/v1/models"
    ends_with_done: ClassVar[bool] = True

    @abstractmethod
    def body(self, model: str, work: Work, *, stream: bool, ignore_eos: bool) -> JSON: ...

    @abstractmethod
    def event(self, content: JSON) -> Event:
        """Read one event of a stream."""

    @abstractmethod
    def usage(self, answer: JSON) -> tuple[int, int]:
        """Return the tokens of prompt and answer, of an answer that is not streamed."""

    def line(self, line: bytes) -> Event | None:
        """Read a line of a stream; None if it says nothing."""
        if not line.startswith(b"data:"):
            return None
        payload = line[5:].strip()
        if payload == DONE:
            return Event(is_last=True)
        content = orjson.loads(payload)
        if "error" in content:
            return Event(error=str(content["error"])[:200])
        return self.event(content)

    def model_of(self, models: JSON) -> str:
        """Return the first model of the answer from `models_path`."""
        return str(models["data"][0]["id"])


class Completions(Wire):
    path = "/v1/completions"

    def body(self, model: str, work: Work, *, stream: bool, ignore_eos: bool) -> JSON:
        body = {"model": model, "max_tokens": work.output_len, "temperature": 0, "stream": stream, **self.prompt(work)}
        if stream:
            body["stream_options"] = {"include_usage": True}
        if ignore_eos:
            body["ignore_eos"] = True
        return body

    def prompt(self, work: Work) -> JSON:
        return {"prompt": work.prompt}

    def event(self, content: JSON) -> Event:
        usage = _openai_usage(content["usage"]) if content.get("usage") else None
        choices = content["choices"]
        return Event(has_token=bool(choices) and self.has_token(choices[0]), usage=usage)

    def usage(self, answer: JSON) -> tuple[int, int]:
        return _openai_usage(answer["usage"])

    def has_token(self, choice: JSON) -> bool:
        return bool(choice.get("text")) or not choice.get("finish_reason")


class Chat(Completions):
    path = "/v1/chat/completions"
    takes_ids = False

    def prompt(self, work: Work) -> JSON:
        return {"messages": work.messages or [{"role": "user", "content": work.prompt}]}

    def has_token(self, choice: JSON) -> bool:
        """Return False for the pieces that frame an answer: its role, its bare end."""
        delta = choice.get("delta") or {}
        return any(delta.get(name) for name in ("content", "reasoning_content", "tool_calls"))


def _openai_usage(usage: JSON) -> tuple[int, int]:
    return usage["prompt_tokens"], usage["completion_tokens"]


class Generate(Wire):
    """SGLang's own API."""

    path = "/generate"

    def body(self, model: str, work: Work, *, stream: bool, ignore_eos: bool) -> JSON:
        params: JSON = {"max_new_tokens": work.output_len, "temperature": 0}
        if ignore_eos:
            params["ignore_eos"] = True
        name = "text" if isinstance(work.prompt, str) else "input_ids"
        return {name: work.prompt, "sampling_params": params, "stream": stream}

    def event(self, content: JSON) -> Event:
        return Event(has_token=True, usage=self.usage(content))

    def usage(self, answer: JSON) -> tuple[int, int]:
        meta = answer["meta_info"]
        return meta["prompt_tokens"], meta["completion_tokens"]


class Ollama(Wire):
    """Ollama's API, whose answers end where the model says: it has no way to go on."""

    path = "/api/generate"
    takes_ids = False
    models_path = "/api/tags"
    ends_with_done = False

    def body(self, model: str, work: Work, *, stream: bool, ignore_eos: bool) -> JSON:
        options = {"num_predict": work.output_len, "temperature": 0}
        return {"model": model, "prompt": work.prompt, "raw": True, "stream": stream, "options": options}

    def line(self, line: bytes) -> Event | None:
        if not line.strip():
            return None
        content = orjson.loads(line)
        return Event(error=str(content["error"])[:200]) if "error" in content else self.event(content)

    def event(self, content: JSON) -> Event:
        is_last = bool(content.get("done"))
        usage = self.usage(content) if is_last else None
        return Event(has_token=bool(content.get("response")), is_last=is_last, usage=usage)

    def usage(self, answer: JSON) -> tuple[int, int]:
        return answer.get("prompt_eval_count", 0), answer.get("eval_count", 0)  # a cached prompt is not counted there

    def model_of(self, models: JSON) -> str:
        return str(models["models"][0]["name"])


WIRES: dict[str, type[Wire]] = {"completions": Completions, "chat": Chat, "generate": Generate, "ollama": Ollama}
# Names of these in SGLang's and vLLM's benches.
BACKENDS = {
    "sglang": "completions", "sglang-native": "generate", "sglang-oai": "completions", "sglang-oai-chat": "chat",
    "vllm": "completions", "vllm-chat": "chat", "openai": "completions", "openai-chat": "chat",
    "lmdeploy": "completions", "lmdeploy-chat": "chat", "llama.cpp": "completions", "tgi": "chat", "ollama": "ollama",
    "radixloop": "completions", "/v1/completions": "completions", "/v1/chat/completions": "chat",
}  # fmt: skip
