"""Test the text around messages: it comes from the served model's template, and is never guessed."""

import asyncio
from collections.abc import Sequence
from typing import Any

import jinja2
import pytest

import server.lang as sgl
from server.lang import templates
from server.lang.templates import Roles, ServedTemplate, TemplateRefused, get_chat_template
from server.reading import built_in_templates
from server.reading.built_in_templates import BUILT_IN_TEMPLATES, CHATML, LLAMA_3, VICUNA_SYSTEM, YI_VL_SYSTEM
from tests.fake_engine import FakeEngine
from tests.lang_servers import fake_backend

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # keeps an empty thought in the last answer only
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)


def template_of(source: str, bos: str = "<s>") -> ServedTemplate:
    environment = jinja2.Environment()

    def refuse(message: str) -> str:
        raise TemplateRefused(message)

    environment.globals["raise_exception"] = refuse
    compiled = environment.from_string(source)

    async def render(messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        return compiled.render(
            messages=messages, add_generation_prompt=add_generation_prompt, bos_token="<s>", eos_token="</s>"
        )

    async def bos_text() -> str:
        return bos

    return ServedTemplate(render, bos_text)


async def write(template: ServedTemplate, messages: Sequence[tuple[str, str]], is_open: bool = False) -> str:
    """Return the text that a program of these messages has; without the last one's end if it is open."""
    text = ""
    roles: Roles = ()
    for role, content in messages:
        text += await template.begin(roles, role) + content
        roles = (*roles, role)
        if not is_open or len(roles) < len(messages):
            text += await template.end(roles)
    return text


TURNS = [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"), ("assistant", "B")]


@pytest.mark.parametrize(
    ("source", "space"), [(CHATML, ""), (LLAMA_3, ""), (LLAMA_2, " ")], ids=["chatml", "llama-3", "llama-2"]
)
async def test_a_program_writes_what_the_template_renders(source: str, space: str) -> None:
    template = template_of(source)
    messages = [{"role": role, "content": content} for role, content in TURNS]
    # Where the generation prompt ends before a space, the model writes it.
    turns = [(role, space + content if role == "assistant" else content) for role, content in TURNS]
    for start in (0, 1):  # with and without a system message
        rendered = await template._render(messages[start:], False)
        assert await write(template, turns[start:]) == rendered.removeprefix("<s>"), "the tokenizer adds <s> itself"
        for end in (3, 5):  # what a gen in the assistant's message sees
            prompt = await template._render(messages[start : end - 1], True)
            seen = await write(template, [*turns[start : end - 1], ("assistant", "")], is_open=True)
            assert seen == prompt.removeprefix("<s>")


async def test_earlier_text_stays_although_the_template_would_change_it() -> None:
    text = await write(template_of(THINKING), TURNS)
    assert "<think>" not in text and text.count("<|im_start|>") == 5 == text.count("<|im_end|>\n")


async def test_a_template_that_refuses_a_role_says_so() -> None:
    template = template_of(NO_SYSTEM)
    with pytest.raises(TemplateRefused, match="System role not supported"):
        await write(template, TURNS)
    assert await write(template, TURNS[1:3]) == "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"


async def test_states_that_ask_together_ask_once() -> None:
    template = template_of(CHATML)
    render, asked = template._render, []

    async def counted(messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        asked.append(len(messages))
        await asyncio.sleep(0)
        return await render(messages, add_generation_prompt)

    template._render = counted
    await asyncio.gather(*[template.begin((), "user") for _ in range(50)])
    assert asked == [1]


def test_a_model_without_a_template_refuses_roles_and_names_the_way_out() -> None:
    engine = FakeEngine()
    engine.tokenizer.chat_template = None
    with fake_backend(engine) as backend:

        @sgl.function
        def program(s: Any) -> None:
            s += sgl.user("hi") + sgl.assistant(sgl.gen("x"))

        with pytest.raises(TemplateRefused, match=r"no chat template.*chat_template_name"):
            program.run(backend=backend)["x"]


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("default", "SYSTEM:S\nUSER:U\nASSISTANT:A\nUSER:V\nASSISTANT:B\n"),
        (
            "llama-2-chat",
            "[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST]A </s><s>[INST] V [/INST]B </s><s>",
        ),
        ("vicuna_v1.1", "S USER:U ASSISTANT:A</s>USER:V ASSISTANT:B</s>"),
        ("yi-vl", "S\n\n### Human:U\n### Assistant:A\n### Human:V\n### Assistant:B\n"),
        ("gemma-it", "S<start_of_turn>user\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
                     "<start_of_turn>user\nV<end_of_turn>\n<start_of_turn>model\nB<end_of_turn>\n"),
    ],
)  # fmt: skip
async def test_named_templates_write_the_same_piecewise_and_whole(name: str, prompt: str) -> None:
    template = get_chat_template(name)
    assert template.get_prompt([{"role": role, "content": content} for role, content in TURNS]) == prompt
    text = ""
    roles: Roles = ()
    for role, content in TURNS:
        text += await template.begin(roles, role) + content
        roles = (*roles, role)
        text += await template.end(roles)
    assert text == prompt


def test_the_language_and_the_server_have_the_same_system_messages() -> None:
    for name in ("HELPFUL", "VICUNA_SYSTEM", "YI_VL_SYSTEM"):
        assert getattr(templates, name) == getattr(built_in_templates, name)


async def test_a_template_with_a_default_system_message_puts_it_first() -> None:
    template = get_chat_template("qwen")
    first = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    assert await template.begin((), "user") == first
    assert template.get_prompt([{"role": "user", "content": "U"}]) == first + "U<|im_end|>\n"
    with pytest.raises(ValueError, match="no chat template 'nothing'"):
        get_chat_template("nothing")


@pytest.mark.parametrize(
    ("name", "own", "rest"),
    [
        ("vicuna_v1.1", f"{VICUNA_SYSTEM} ", "USER: U ASSISTANT: A</s>USER: V ASSISTANT:"),
        ("yi-vl", f"{YI_VL_SYSTEM}\n\n", "### Human: U\n### Assistant: A\n### Human: V\n### Assistant:"),
    ],
)
def test_a_built_in_template_writes_its_own_system_message_unless_there_is_one(name: str, own: str, rest: str) -> None:
    template = jinja2.Environment().from_string(BUILT_IN_TEMPLATES[name])
    messages = [{"role": role, "content": content} for role, content in TURNS[:-1]]
    given = own.replace(own.rstrip(), "S")
    assert template.render(messages=messages, add_generation_prompt=True) == given + rest
    assert template.render(messages=messages[1:], add_generation_prompt=True) == own + rest
