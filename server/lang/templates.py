"""Chat templates: what stands before and after a message's text.

The served model's own template is asked for by rendering marks in place of texts (`ServedTemplate`). The templates
below are for servers that cannot say, and are used only when asked for by name.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The texts of server/reading/built_in_templates.py: a program's own `server` may be what that name imports here.
HELPFUL = "You are a helpful assistant."
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
YI_VL_SYSTEM = (
    "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI assistant. "
    "Read all the images carefully, and respond to the human's questions with informative, helpful, detailed and "
    "polite answers. 这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。"
    "仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。"
)

Message = dict[str, Any]
Roles = tuple[str, ...]


class ChatTemplate(ABC):
    stop_str: tuple[str, ...] = ()  # joins the stops of each gen inside a role
    image_token: str = "<image>"
    video_token: str = "<video>"

    @abstractmethod
    async def begin(self, roles: Roles, role: str) -> str:
        """Return the text between the messages of `roles`, all of them ended, and the text of a `role` message."""

    @abstractmethod
    async def end(self, roles: Roles) -> str:
        """Return the text behind the last message of `roles`."""


class TemplateRefused(Exception):
    """The template cannot render such a conversation."""


Render = Callable[[Sequence[Message], bool], Awaitable[str]]


class ServedTemplate(ChatTemplate):
    """The served model's Jinja template, by difference.

    `render(messages, add_generation_prompt)` raises `TemplateRefused` when the template does. `bos_text` is what the
    server's tokenizer puts before any text by itself, so that it must not stand in the prompt as well.
    """

    def __init__(
        self, render: Render, bos_text: Callable[[], Awaitable[str]], media_texts: Mapping[str, str] | None = None
    ) -> None:
        """Ask `render`. media_texts: what stands for a picture or video before a user's text, by kind."""
        self._render, self._bos_text = render, bos_text
        texts = media_texts or {}
        self.image_token, self.video_token = texts.get("image", "<image>"), texts.get("video", "<video>")
        self._known: dict[tuple[Roles, bool], asyncio.Task[list[str]]] = {}

    async def begin(self, roles: Roles, role: str) -> str:
        if role == "assistant" and roles:
            before = (await self._around(roles, True))[-1]
        else:
            try:
                before = (await self._around((*roles, role)))[-2]
            except TemplateRefused:
                if role != "system":
                    raise
                before = (await self._around((*roles, role, "user")))[-3]  # some want a question to go with it
        return before.removeprefix(await self.end(roles)) if roles else before

    async def end(self, roles: Roles) -> str:
        try:
            return (await self._around(roles))[-1]
        except TemplateRefused:
            return ""  # it comes with the beginning of the next message

    async def _around(self, roles: Roles, add_generation_prompt: bool = False) -> list[str]:
        """Return the text before, between and after the messages' texts: one more than there are messages."""
        key = roles, add_generation_prompt
        task = self._known.get(key)
        if task is None or (task.done() and (task.cancelled() or not _is_final(task))):
            task = self._known[key] = asyncio.create_task(self._split(roles, add_generation_prompt))
        return await asyncio.shield(task)  # others wait for it as well

    async def _split(self, roles: Roles, add_generation_prompt: bool) -> list[str]:
        messages = [{"role": role, "content": f"<text {i} of the conversation>"} for i, role in enumerate(roles)]
        rest = await self._render(messages, add_generation_prompt)
        rest = rest.removeprefix(await self._bos_text())
        around = []
        for message in messages:
            before, mark, rest = rest.partition(message["content"])
            if not mark:
                raise TemplateRefused(f"the model's chat template leaves out a {message['role']} message of {roles}")
            around.append(before)
        return [*around, rest]


def _is_final(task: "asyncio.Task[list[str]]") -> bool:
    """Return whether the same question would be answered the same way."""
    error = task.exception()
    return error is None or isinstance(error, TemplateRefused)


@dataclass(frozen=True)
class NamedTemplate(ChatTemplate):
    """Fixed texts around each role's messages."""

    name: str
    role_prefix_and_suffix: dict[str, tuple[str, str]]
    default_system_prompt: str | None = None
    stop_str: tuple[str, ...] = ()
    image_token: str = "<image>"
    video_token: str = "<video>"
    is_system_in_user: bool = False  # Llama 2: the system message stands inside the first user message

    async def begin(self, roles: Roles, role: str) -> str:
        prefix = self.role_prefix_and_suffix[role][0]
        if not roles and role != "system" and self.default_system_prompt is not None:
            return "".join(self._around("system", self.default_system_prompt, ())) + self._prefix(("system",), role)
        return self._prefix(roles, role) if self.is_system_in_user else prefix

    async def end(self, roles: Roles) -> str:
        return self.role_prefix_and_suffix[roles[-1]][1]

    def get_prompt(self, messages: Sequence[Message]) -> str:
        """Return the whole prompt of a conversation."""
        if messages and messages[0]["role"] != "system" and self.default_system_prompt is not None:
            messages = [{"role": "system", "content": self.default_system_prompt}, *messages]
        roles = tuple(message["role"] for message in messages)
        return "".join(
            part
            for i, message in enumerate(messages)
            for part in self._around(message["role"], message["content"], roles[:i])
        )

    def _around(self, role: str, content: str, roles: Roles) -> tuple[str, str, str]:
        return self._prefix(roles, role), content, self.role_prefix_and_suffix[role][1]

    def _prefix(self, roles: Roles, role: str) -> str:
        prefix = self.role_prefix_and_suffix[role][0]
        if not self.is_system_in_user:
            return prefix
        user_prefix = self.role_prefix_and_suffix["user"][0]
        if role == "system":
            return user_prefix + prefix
        return "" if role == "user" and roles == ("system",) else prefix


def _headers(before: str, after: str, end: str, assistant: str = "assistant") -> dict[str, tuple[str, str]]:
    """Return each role's name between two markers."""
    names = {"system": "system", "user": "user", "assistant": assistant}
    return {role: (f"{before}{name}{after}", end) for role, name in names.items()}


CHATML = _headers("<|im_start|>", "\n", "<|im_end|>\n")
LLAMA_3 = _headers("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>")
TEMPLATES = (
    NamedTemplate("default", {"system": ("SYSTEM:", "\n"), "user": ("USER:", "\n"), "assistant": ("ASSISTANT:", "\n")}),
    NamedTemplate("claude", {"system": ("", ""), "user": ("\n\nHuman: ", ""), "assistant": ("\n\nAssistant:", "")}),
    NamedTemplate("chatml", CHATML, stop_str=("<|im_end|>",)),
    NamedTemplate("chatml-llava", CHATML, HELPFUL, ("<|im_end|>",), "<image>\n", "<video>\n"),
    NamedTemplate("qwen", CHATML, HELPFUL, ("<|im_end|>",)),
    NamedTemplate(
        "qwen2-vl",
        CHATML,
        HELPFUL,
        ("<|im_end|>",),
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<|vision_start|><|video_pad|><|vision_end|>",
    ),
    NamedTemplate("yi-1.5", CHATML, stop_str=("<|im_end|>",)),
    NamedTemplate("dbrx-instruct", CHATML, stop_str=("<|im_end|>",)),
    NamedTemplate(
        "vicuna_v1.1",
        {"system": ("", " "), "user": ("USER:", " "), "assistant": ("ASSISTANT:", "</s>")},
        VICUNA_SYSTEM,
        image_token=" <image>\n",
    ),
    NamedTemplate(
        "yi-vl",
        {"system": ("", "\n\n"), "user": ("### Human:", "\n"), "assistant": ("### Assistant:", "\n")},
        YI_VL_SYSTEM,
        image_token=" <image>\n",
    ),
    NamedTemplate(
        "llama-2-chat",
        {"system": ("<<SYS>>\n", "\n<</SYS>>\n\n"), "user": ("[INST] ", " [/INST]"), "assistant": ("", " </s><s>")},
        is_system_in_user=True,
    ),
    NamedTemplate("llama-3-instruct", LLAMA_3, stop_str=("<|eot_id|>",)),
    NamedTemplate("llama-3-instruct-llava", LLAMA_3, stop_str=("<|eot_id|>",), image_token="<image>\n"),
    NamedTemplate("llama-4", _headers("<|header_start|>", "<|header_end|>\n\n", "<|eot|>"), stop_str=("<|eot|>",)),
    NamedTemplate("gemma-it", {**_headers("<start_of_turn>", "\n", "<end_of_turn>\n", "model"), "system": ("", "")}),
    NamedTemplate(
        "c4ai-command-r",
        {
            role: (f"<|START_OF_TURN_TOKEN|><|{name}_TOKEN|>", "<|END_OF_TURN_TOKEN|>")
            for role, name in (("system", "SYSTEM"), ("user", "USER"), ("assistant", "CHATBOT"))
        },
    ),
    NamedTemplate(
        "granite-3-instruct",
        _headers("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        stop_str=("<|end_of_text|>",),
    ),
    NamedTemplate(
        "deepseek-v3",
        {"system": ("", ""), "user": ("<｜User｜>", ""), "assistant": ("<｜Assistant｜>", "<｜end▁of▁sentence｜>")},
        stop_str=("<｜end▁of▁sentence｜>",),
    ),
)


class TemplateRegistry:
    """Templates by name, and rules that name one for a model's path."""

    def __init__(self, templates: Sequence[NamedTemplate]) -> None:
        self._templates = {template.name: template for template in templates}
        self._rules: list[Callable[[str], str | None]] = []

    def register(self, template: NamedTemplate) -> NamedTemplate:
        self._templates[template.name] = template
        return template

    def register_rule(self, rule: Callable[[str], str | None]) -> Callable[[str], str | None]:
        """Register `rule(model_path)`, which returns the name of a template, or None."""
        self._rules.append(rule)
        return rule

    def get(self, name: str) -> NamedTemplate:
        if name not in self._templates:
            raise ValueError(f"there is no chat template {name!r}; known are {', '.join(self._templates)}")
        return self._templates[name]

    def get_by_model_path(self, model_path: str) -> NamedTemplate | None:
        """Return the template of the first rule that knows the model; None where no rule does: nothing is guessed."""
        name = next((name for rule in self._rules if (name := rule(model_path)) is not None), None)
        return None if name is None else self.get(name)


_REGISTRY = TemplateRegistry(TEMPLATES)
register_chat_template = _REGISTRY.register
register_chat_template_matching_function = _REGISTRY.register_rule
get_chat_template = _REGISTRY.get
get_chat_template_by_model_path = _REGISTRY.get_by_model_path
