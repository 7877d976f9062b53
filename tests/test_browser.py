"""The pages in a real browser: typed, clicked, reloaded."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from PIL import Image as Pillow

from engine.state import FinishReason
from server.app import build_app
from server.config import ServerConfig
from server.fleet.router import Router, RouterConfig
from tests.browser import Tab, find_browser, new_tab, running_browser
from tests.fake_engine import EOS, PARSERS, THOUGHT_AND_CALL, FakeEngine, SeeingEngine

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_browser() is None, reason="needs Chromium or Chrome"),
]
STOP = FinishReason("stop", matched=EOS)
# Routes whose example needs a file, a session, a checkpoint or another kind of model.
NEED_MORE_THAN_AN_EXAMPLE = {
    *("/v1/batches", "/close_session", "/update_weights_from_disk", "/get_weights_by_name"),
    *("/classify", "/v1/classify"),
}
CONTROLS = ("button", "textbox", "searchbox", "combobox", "spinbutton", "link")
HOSTILE = ("**a ", "[", "![a](", "`` ", "$a", "# ", "> ", "- ", "| ", "\\(", "<br", "_a_b", "https://", " ", "\\left(")
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def browser() -> Iterator[str]:
    # Not pytest's folder: a profile's socket has a path that may be 107 characters long. And killed processes may write
    # a last file while it is removed.
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, running_browser(Path(folder)) as address:
        yield address


@pytest.fixture
async def tab(browser: str) -> AsyncIterator[Tab]:
    async with new_tab(browser) as tab:
        yield tab


@asynccontextmanager
async def served(engine: FakeEngine, **options: Any) -> AsyncIterator[str]:
    """Yield the URL of a server around `engine`."""
    with TemporaryDirectory() as folder:
        config = ServerConfig(model_path="fake-model", file_storage_path=folder, **options)
        runner = web.AppRunner(build_app(engine, config), handler_cancellation=True)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
        finally:
            engine.abort_all()
            await runner.cleanup()


async def open_chat(tab: Tab, url: str) -> None:
    await tab.go(url)
    await tab.until("document.querySelector('#about').textContent.includes('fake-model answers')")


async def say(tab: Tab, text: str) -> None:
    await tab.click("#prompt")
    await tab.type(text)
    await tab.press("Enter")


async def until_answered(tab: Tab) -> None:
    await tab.until("!document.querySelector('.streaming') && document.querySelector('.turn.assistant:last-child')")


def prompts_of(engine: FakeEngine) -> list[str]:
    return [engine.tokenizer.decode(request.input_ids) for request in engine.requests]


# ---- the conversation ----


async def test_a_typed_question_is_answered_as_the_tokens_come(tab: Tab) -> None:
    engine = FakeEngine(is_manual=True)
    async with served(engine) as url:
        await open_chat(tab, url)
        await say(tab, "Who are you?")
        await engine.until(lambda: bool(engine.live))
        (state,) = engine.states
        assert prompts_of(engine) == ["[user]Who are you?[assistant]"]
        engine.emit(state, "I am **ra")
        await tab.until("document.querySelector('.assistant .body').textContent === 'I am **ra'")
        assert await tab.evaluate("getComputedStyle(document.querySelector('#stop')).display !== 'none'")
        engine.emit(state, "dix**loop.")
        engine.finish(state, STOP)
        await until_answered(tab)
        assert await tab.evaluate("document.querySelector('.assistant .body').innerHTML") == (
            "<p>I am <strong>radix</strong>loop.</p>"
        )
        figures = await tab.text(".figures")
        assert figures.startswith("19 tokens · 18 tokens/s · first after ")  # decoding took a second, by the server
        assert figures.endswith(" · 2 of 29 prompt tokens cached")
        assert await tab.text("#room") == "48 of 256 tokens"
        assert await tab.evaluate("document.activeElement.id") == "prompt"
        await say(tab, "Sure?")
        await engine.until(lambda: bool(engine.live))
        assert prompts_of(engine)[1] == "[user]Who are you?[assistant]I am **radix**loop.[user]Sure?[assistant]"
        assert tab.errors == []


async def test_stop_ends_the_request_and_the_answer_can_go_on_from_there(tab: Tab) -> None:
    engine = FakeEngine(is_manual=True)
    async with served(engine) as url:
        await open_chat(tab, url)
        await say(tab, "Count")
        await engine.until(lambda: bool(engine.live))
        engine.emit(engine.states[0], "one, two")
        await tab.until("document.querySelector('.assistant .body').textContent === 'one, two'")
        await tab.press("Escape")
        await engine.until(lambda: engine.aborted == [engine.states[0].rid])
        await tab.until("document.querySelector('.note')?.textContent.includes('Stopped.')")
        engine.max_queued = 0
        await tab.click(".note button", "Continue")
        await tab.until("document.querySelector('.note.error button')")
        engine.max_queued = 1000
        await tab.click(".note.error button", "Try again")  # for the rest, not from the start
        await engine.until(lambda: bool(engine.live))
        assert prompts_of(engine)[-1] == "[user]Count[assistant]one, two"
        engine.emit(engine.states[-1], ", three")
        engine.finish(engine.states[-1], STOP)
        await tab.until("document.querySelector('.assistant .body').textContent === 'one, two, three'")
        await until_answered(tab)
        await tab.until("!document.querySelector('.note')")


async def test_a_reload_brings_the_conversation_and_the_half_of_an_answer(tab: Tab) -> None:
    engine = FakeEngine("Hello")
    async with served(engine) as url:
        await open_chat(tab, url)
        await say(tab, "Hi")
        await until_answered(tab)
        engine.is_manual = True
        await say(tab, "More")
        await engine.until(lambda: bool(engine.live))
        engine.emit(engine.states[1], "Half")
        await tab.until("document.querySelector('.turn:last-child .body').textContent === 'Half'")
        await tab.evaluate("chat.save()")
        await tab.reload()
        await engine.until(lambda: not engine.live)
        await tab.until("document.querySelector('.note')?.textContent.includes('interrupted')")
        assert await tab.texts(".turn .body") == ["Hi", "Hello", "More", "Half"]
        await tab.until("document.querySelector('#conversations a')?.textContent === 'Hi'")
        await tab.click("#new")
        await tab.until("!document.querySelector('.turn')")
        await tab.click("#conversations a", "Hi")
        await tab.until("document.querySelectorAll('.turn').length === 4")


async def test_an_edited_or_repeated_turn_stands_beside_the_old_one(tab: Tab) -> None:
    engine = FakeEngine("First")
    async with served(engine) as url:
        await open_chat(tab, url)
        await say(tab, "Hi")
        await until_answered(tab)
        engine.answer = "Second"
        await tab.click(".assistant .actions button", "Again")
        await tab.until("document.querySelector('.assistant .body')?.textContent === 'Second'")
        await until_answered(tab)  # before that, another cannot be shown
        assert await tab.text(".assistant .siblings span") == "2 / 2"
        await tab.click(".assistant .siblings button", "‹")
        await tab.until("document.querySelector('.assistant .body').textContent === 'First'")
        await until_answered(tab)
        engine.answer = "Third"
        await tab.click(".user .actions button", "Edit")
        await tab.type("!")
        await tab.press("Enter")
        await tab.until("document.querySelector('.assistant .body')?.textContent === 'Third'")
        assert prompts_of(engine)[2] == "[user]Hi![assistant]"
        assert await tab.texts(".turn .body") == ["Hi!", "Third"]
        await until_answered(tab)
        await tab.click(".user .siblings button", "‹")
        await tab.until("document.querySelector('.assistant .body').textContent === 'First'")


async def test_reasoning_is_folded_and_a_tools_result_goes_back(tab: Tab) -> None:
    engine = FakeEngine(THOUGHT_AND_CALL, context_length=2048)
    async with served(engine, **PARSERS) as url:
        await open_chat(tab, url)
        await tab.evaluate(f"(chat.changeSettings({{tools: {json.dumps(WEATHER)}}}), true)")
        await say(tab, "Oslo?")
        await until_answered(tab)
        assert (await tab.text(".reasoning summary")).startswith("Thought for")
        assert await tab.text(".reasoning .markdown") == ""
        await tab.click(".reasoning summary")
        await tab.until("document.querySelector('.reasoning .markdown').textContent === 'Where?'")
        assert await tab.text(".call b") == "weather"
        assert json.loads(await tab.text(".call pre")) == {"city": "Oslo"}
        engine.answer = "Rain."
        await tab.click(".call textarea")
        await tab.type("rain")
        await tab.click(".call button", "Send")
        await tab.until("document.querySelector('.turn:last-child .body')?.textContent === 'Rain.'")
        assert prompts_of(engine)[1].endswith("Let me look.[weather][tool]rain[assistant]")
        assert tab.errors == []


async def test_what_the_server_refuses_is_shown_and_can_be_tried_again(tab: Tab) -> None:
    engine = FakeEngine("Yes", context_length=24)
    async with served(engine) as url:
        await open_chat(tab, url)
        await say(tab, "Is this too long?")
        await tab.until("document.querySelector('.note.error')?.textContent.includes('maximum context length is 24')")
        engine.context_length = 256
        await tab.click(".note button", "Try again")
        await tab.until("document.querySelector('.assistant .body')?.textContent === 'Yes'")
        await until_answered(tab)
        assert await tab.texts(".note") == []


async def test_settings_go_into_requests_and_their_mistakes_do_not(tab: Tab) -> None:
    engine = FakeEngine("Yes")
    async with served(engine) as url:
        await open_chat(tab, url)
        await tab.click("#open-settings")
        await tab.click("#settings textarea[name=system]")
        await tab.type("Be brief")
        await tab.click("#settings input[name=temperature]")
        await tab.type("0.5")
        await tab.click("#settings input[name=top_p]")
        await tab.type("7")
        await tab.press("Escape")
        await say(tab, "Hi")
        await until_answered(tab)
    (request,) = engine.requests
    assert prompts_of(engine) == ["[system]Be brief[user]Hi[assistant]"]
    assert (request.sampling_params.temperature, request.sampling_params.top_p) == (0.5, 1.0)


async def test_a_key_is_asked_for_and_kept_nowhere(tab: Tab) -> None:
    engine = FakeEngine("Yes")
    async with served(engine, api_key="sesame") as url:
        await tab.go(url)
        for key, title in (("wrong", "asks for a key"), ("sesame", "does not open it")):
            await tab.until(f"document.querySelector('#key-title')?.textContent.includes({title!r})")
            await tab.type(key)
            await tab.press("Enter")
        await tab.until("document.querySelector('#about').textContent.includes('fake-model answers')")
        await say(tab, "Hi")
        await until_answered(tab)
        stored = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, chat.conversation.export()])"
        assert "sesame" not in await tab.evaluate(stored)
        await tab.reload()
        await tab.until("document.querySelector('#key-title')?.textContent.includes('asks for a key')")


async def test_an_image_goes_along_where_the_model_reads_images(tab: Tab, tmp_path: Path) -> None:
    engine = SeeingEngine("A cat", context_length=2048)
    Pillow.new("RGB", (30, 20), "red").save(tmp_path / "cat.png")
    async with served(FakeEngine()) as url:
        await open_chat(tab, url)
        assert await tab.evaluate("document.querySelector('#attach').hidden")
    async with served(engine) as url:
        await open_chat(tab, url)
        await tab.until("document.querySelector('#attach').checkVisibility()")
        found = await tab.call("Runtime.evaluate", expression="document.querySelector('#files')")
        handle = found["result"]["objectId"]
        await tab.call("DOM.setFileInputFiles", files=[str(tmp_path / "cat.png")], objectId=handle)
        await tab.until("document.querySelector('#images img')?.naturalWidth === 30")
        await say(tab, "What is it?")
        await tab.until("document.querySelector('.assistant .body')?.textContent === 'A cat'")
        await until_answered(tab)
        await tab.until("document.querySelector('.user img').naturalHeight === 20")
        assert tab.errors == []
    assert prompts_of(engine) == ["[user]\x01\nWhat is it?[assistant]"]  # the picture's one token, then the text


async def test_an_export_is_read_again_and_a_foreign_file_is_not(tab: Tab) -> None:
    async with served(FakeEngine("Yes")) as url:
        await open_chat(tab, url)
        await say(tab, "Hi")
        await until_answered(tab)
        exported = await tab.evaluate("chat.conversation.export()")
        assert [message["content"] for message in exported["messages"]] == ["Hi", "Yes"]
        again = await tab.evaluate(f"Conversation.from({json.dumps(exported)}).export()")
        assert again == exported
        assert await tab.evaluate("Conversation.from({id: 'x', turns: [{text: 1}]})") is None
        odd: dict[str, Any] = {
            "images": ["http://a.example/x.png", "data:image/png;base64,"],
            "calls": [None, {"name": 1}],
            "html": "<b>",
        }
        turn = {"id": "a", "role": "assistant", "text": "", "parent": 7, **odd}
        (kept,) = await tab.evaluate(f"Conversation.from({json.dumps({'id': 'x', 'turns': [turn]})}).turns")
        assert (kept["images"], kept["parent"], kept["finish"]) == (odd["images"][1:], "", "interrupted")
        assert [call["name"] for call in kept["calls"]] == ["1"] and "html" not in kept


async def test_an_import_neither_breaks_the_page_nor_takes_turns_away(tab: Tab) -> None:
    async with served(FakeEngine("Yes")) as url:
        await open_chat(tab, url)
        await say(tab, "Hi")
        await until_answered(tab)
        older = await tab.evaluate("chat.conversation.export()")
        await say(tab, "More")
        await until_answered(tab)
        figures = {"tokens": 1, "prompt_tokens": "x", "first_token_s": "y"}
        odd = {**older, "id": "a b", "updated": "x", "settings": {"stop": "x", "system": 1, "tools": 2, "top_p": "3"}}
        odd["turns"] = [{**turn, "figures": figures} for turn in older["turns"]]
        for value, num_turns in ((older, 4), (odd, 2)):
            file = f"new File([{json.dumps(json.dumps(value))}], 'x.json')"
            await tab.evaluate(f"importFiles(chat, [{file}])")
            await tab.until(f"document.querySelectorAll('.turn').length === {num_turns}")
            await tab.reload()
            await tab.until(f"document.querySelectorAll('.turn').length === {num_turns}")
        await tab.until("document.querySelectorAll('#conversations a').length === 2")
        assert tab.errors == []


async def test_two_tabs_add_to_one_conversation(tab: Tab, browser: str) -> None:
    async with served(FakeEngine("Yes")) as url, new_tab(browser, beside=tab) as other:
        await open_chat(tab, url)
        await say(tab, "Hi")
        await tab.until("!chat.answering.size && document.querySelector('#conversations a')")
        await open_chat(other, await tab.evaluate("location.href"))
        await other.until("document.querySelectorAll('.turn').length === 2")
        await say(other, "There")
        for one in (tab, other):
            await one.until("document.querySelectorAll('.turn').length === 4 && !chat.answering.size")
            await one.until("document.querySelector('.turn:last-child .body').textContent === 'Yes'")
        # What was kept without a word to this tab is there too.
        await tab.evaluate("(chat.otherTabs.close(), true)")
        await say(other, "Unseen")
        await other.until("document.querySelectorAll('.turn').length === 6 && !chat.answering.size")
        await other.evaluate("chat.save()")
        await tab.evaluate("(chat.otherTabs = {postMessage() {}}, chat.rename('Both'), chat.save())")
        stored = "chat.store.load(chat.conversation.id).then(kept => kept.turns.map(turn => turn.text))"
        assert await tab.evaluate(stored) == ["Hi", "Yes", "There", "Yes", "Unseen", "Yes"]
        assert tab.errors == other.errors == []


async def test_a_deleted_conversation_comes_back_by_undo(tab: Tab) -> None:
    async with served(FakeEngine("Yes")) as url:
        await open_chat(tab, url)
        await say(tab, "Hi")
        await until_answered(tab)
        await tab.evaluate("(window.setTimeout = () => 0, true)")  # the notice stays
        await tab.click("#delete")
        await tab.until("!document.querySelector('.turn') && !document.querySelector('#conversations a')")
        await tab.click("#notice button", "Undo")
        await tab.until("document.querySelectorAll('.turn').length === 2")
        await tab.until("document.querySelector('#conversations a')?.textContent === 'Hi'")


async def test_on_a_phone_the_list_slides_in_and_nothing_is_wider_than_the_screen(tab: Tab) -> None:
    long_word, wide = "x" * 400, "| a | b |\n|---|---|\n| " + "y" * 400 + " | 1 |"
    async with served(FakeEngine(f"{long_word}\n\n{wide}\n\n```\n{long_word}\n```", context_length=4096)) as url:
        await tab.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
        await open_chat(tab, url)
        await say(tab, "Hi")
        await until_answered(tab)
        assert await tab.evaluate("document.querySelector('#scroller').scrollWidth") <= 390
        assert await tab.evaluate("!document.querySelector('#new').checkVisibility({visibilityProperty: true})")
        await tab.click("#open-sidebar")
        await tab.until("document.querySelector('#new').getBoundingClientRect().left > 0")
        await tab.press("Escape")
        await tab.until("!document.querySelector('#new').checkVisibility({visibilityProperty: true})")


async def test_by_the_keyboard_alone_one_skips_the_list_and_keeps_the_conversation(tab: Tab) -> None:
    async with served(FakeEngine("Yes")) as url:
        await open_chat(tab, url)
        await say(tab, "Hi")
        await until_answered(tab)
        await tab.evaluate("(document.activeElement.blur(), document.querySelector('.skip').focus(), true)")
        await tab.press("Enter")
        await tab.until("document.activeElement.id === 'prompt'")
        assert await tab.texts(".turn .body") == ["Hi", "Yes"]
        await tab.press("ArrowUp")
        await tab.until("document.activeElement.closest('.user .editor')")
        await tab.press("Escape")
        await tab.until("!document.querySelector('.editor') && document.activeElement.id === 'prompt'")


async def test_every_control_has_a_name_for_a_screen_reader(tab: Tab) -> None:
    async with served(FakeEngine("Yes")) as url:
        await open_chat(tab, url)
        await say(tab, "Hi")
        await until_answered(tab)
        await tab.click("#open-settings")
        tree = (await tab.call("Accessibility.getFullAXTree"))["nodes"]
    controls = [node for node in tree if not node["ignored"] and node["role"]["value"] in CONTROLS]
    assert len(controls) > 15
    assert [node for node in controls if not node.get("name", {}).get("value")] == []


# ---- markdown ----

MARKDOWN = {
    "a *b* **c** ***d*** ~~e~~ __f__": (
        "<p>a <em>b</em> <strong>c</strong> <strong><em>d</em></strong> <del>e</del> <strong>f</strong></p>"
    ),
    "snake_case_name 2 * 3 * 4 **open": "<p>snake_case_name 2 * 3 * 4 **open</p>",
    "**a *b***": "<p><strong>a <em>b</em></strong></p>",
    "`a *b*` ``c ` d``": "<p><code>a *b*</code> <code>c ` d</code></p>",
    r"\*no\* $5 and $10": "<p>*no* $5 and $10</p>",
    "# One #\n## Two\ntext\nmore": "<h2>One</h2><h3>Two</h3><p>text<br>more</p>",
    "- a\n- b\n  - c\n\n1. d\n2. e": "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ol><li>d</li><li>e</li></ol>",
    "3. a\n\n   b\n4. c": '<ol start="3"><li>a<p>b</p></li><li>c</li></ol>',
    "> a\n> - b": "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "<b>x</b> & <script>hacked = 1</script>": (
        "<p>&lt;b&gt;x&lt;/b&gt; &amp; &lt;script&gt;hacked = 1&lt;/script&gt;</p>"
    ),
    "[x](javascript:alert(1)) [y](data:text/html,a)": (
        '<p><span class="no-link" title="javascript:alert(1)">x</span> '
        '<span class="no-link" title="data:text/html,a">y</span></p>'
    ),
    "[x](https://a.example/b_(c)) and https://d.example/e.": (
        '<p><a href="https://a.example/b_(c)" target="_blank" rel="noopener noreferrer nofollow">x</a> and '
        '<a href="https://d.example/e" target="_blank" rel="noopener noreferrer nofollow">https://d.example/e</a>.</p>'
    ),
    "![cat](https://a.example/cat.png)": (
        '<p><a href="https://a.example/cat.png" target="_blank" rel="noopener noreferrer nofollow">🖼 cat</a></p>'
    ),
}
LONG = (
    "# Title\n\nText with **bold** and `code`.\n\n- one\n- two\n  1. deep\n\n| a | b |\n|--:|---|\n| 1 | `x|y` |\n\n"
    "```python\ndef f():\n    return 1  # one\n```\n\n> quote\n\n$$\\frac{a}{b} + \\sqrt{c^2}$$\n\n---\n\n"
    "\\begin{align}\na &= b \\\\\n&= c\n\\end{align}\n\n2. two\n3. three\n\nc | d\n---|---\n1 | 2\n\nend"
)


async def test_markdown_becomes_nodes_and_markup_in_it_stays_text(tab: Tab) -> None:
    async with served(FakeEngine()) as url:
        await open_chat(tab, url)
        draw = "element('div', {}, ...draw(SOURCE.split('\\n'))).innerHTML"
        for source, nodes in MARKDOWN.items():
            assert await tab.evaluate(draw.replace("SOURCE", json.dumps(source))) == nodes, source
        assert await tab.evaluate("typeof hacked") == "undefined"
        code = await tab.evaluate(draw.replace("SOURCE", json.dumps("```c\n<i> 1 // x\n")))
        assert '<pre tabindex="0"><code>&lt;i&gt; 1 // x\n</code></pre>' in code


async def test_a_formula_becomes_mathml_and_one_that_is_not_known_stays_as_it_is(tab: Tab) -> None:
    async with served(FakeEngine()) as url:
        await open_chat(tab, url)
        math = "mathOf(SOURCE, true).outerHTML"
        formula = await tab.evaluate(math.replace("SOURCE", r'"\\frac{x^2}{y_1} \\leq 3.5"'))
        assert "<mfrac><msup><mi>x</mi><mn>2</mn></msup><msub><mi>y</mi><mn>1</mn></msub></mfrac>" in formula
        assert "≤</mo><mn>3.5</mn>" in formula
        function = await tab.evaluate(math.replace("SOURCE", r'"n\\log n + \\sin(x)"'))
        assert '<mi>n</mi><mspace width=".17em"></mspace><mi data-function="log">log</mi><mspace' in function
        assert '<mi data-function="sin">sin</mi><mo stretchy="false">(</mo>' in function
        for unknown in ("\\nothing", "{", "a^", "\\begin{x}", "\\left(" * 60):
            drawn = await tab.evaluate(math.replace("SOURCE", json.dumps(unknown)))
            assert drawn == f'<code class="tex">{unknown}</code>'


async def test_a_text_that_grows_is_drawn_as_if_it_had_come_at_once(tab: Tab) -> None:
    async with served(FakeEngine()) as url:
        await open_chat(tab, url)
        grown, whole, num_kept = await tab.evaluate(
            f"(() => {{ const text = {json.dumps(LONG)}, root = element('div'), view = new MarkdownView(root);"
            " for (let i = 1; i <= text.length; i++) view.update(text.slice(0, i)); view.update(text, true);"
            " return [root.innerHTML, element('div', {}, ...draw(text.split('\\n'))).innerHTML, view.numKept]; })()"
        )
    assert grown == whole and num_kept > 5 and '<mtable class="aligned">' in whole


async def test_hostile_texts_are_drawn_in_linear_time(tab: Tab) -> None:
    """A pattern that backtracks would take minutes for these, and `evaluate` a minute at most."""
    async with served(FakeEngine()) as url:
        await open_chat(tab, url)
        for piece in HOSTILE:
            many = f"{json.dumps(piece)}.repeat(5000)"
            for text in (many, f"{many} + '\\n|-|'", f"'# ' + {many} + 'x'"):
                await tab.evaluate(f"(draw(({text}).split('\\n')), true)")


# ---- the documents ----


async def test_the_documents_show_every_route_with_its_fields_and_try_one(tab: Tab) -> None:
    engine = FakeEngine("Paris")
    async with served(engine, api_key="sesame") as url:
        await tab.go(url + "docs#post_v1_chat_completions")
        await tab.until("document.querySelector('#key')")
        await tab.type("sesame")
        await tab.press("Enter")
        await tab.until("document.querySelectorAll('#routes a').length > 70")
        await tab.until("document.querySelector('.route')?.textContent === 'POST/v1/chat/completions'")
        row = "document.querySelector('[data-name=temperature]')"
        assert "at least 0" in await tab.evaluate(f"{row}.textContent")
        assert "likelier" in await tab.evaluate(f"{row}.textContent")
        await tab.click("[data-name=messages] summary")
        await tab.until("document.querySelector('[data-name=messages] [data-name=role]')")
        await tab.click(".try button", "Send")
        await tab.until("document.querySelector('.try pre').textContent.includes('Paris')")
        assert (await tab.text(".try [role=status]")).startswith("200")
        every = await tab.evaluate(
            "documents.operations.map(operation => element('div', {}, ...documents.draw(operation)).textContent.length)"
        )
        assert min(every) > 100
        statuses = await tab.evaluate(
            "Promise.all(Object.entries(EXAMPLES).map(async ([path, body]) => [path, (await fetch(path.slice(1), {"
            " method: 'POST', body: JSON.stringify(body), headers: headersWithKey({'Content-Type': 'application/json'})"
            "})).status]))"
        )
        assert {path for path, status in statuses if status >= 400} == NEED_MORE_THAN_AN_EXAMPLE
        await tab.click("#filter")
        await tab.type("tokenize")
        await tab.until("document.querySelectorAll('#routes a').length < 8")
        await tab.click("#routes a", "/detokenize")
        await tab.until("document.querySelector('.route').textContent === 'POST/detokenize'")


# ---- the dashboard ----


async def test_the_dashboard_shows_what_runs_and_ends_it(tab: Tab) -> None:
    engine = FakeEngine(is_manual=True)
    async with served(engine, admin_api_key="sesame") as url, aiohttp.ClientSession() as session:
        asking = asyncio.create_task(session.post(url + "generate", json={"text": "<b>Who?</b>", "rid": "mine"}))
        await engine.until(lambda: bool(engine.live))
        engine.emit(engine.states[0], "abc")
        await tab.go(url + "dashboard")
        await tab.until("document.querySelector('#key')")
        await tab.type("sesame")
        await tab.press("Enter")
        await tab.until("document.querySelector('#requests tr')")
        assert await tab.text("#requests td") == "<b>Who?</b>"
        assert (await tab.texts("#requests td.number"))[1:4] == ["11", "18 %", "3 of 128"]
        assert await tab.text("#kv") == "250 held (25 %) · 500 cached (50 %) · 250 free, of 1,000 tokens"
        assert await tab.texts(".branch") == ["<b>S", "<b>S"]
        detail = "(document.querySelector('.branch').focus(), document.querySelector('#tree-detail').textContent)"
        assert (await tab.evaluate(detail)).startswith("40 tokens · found 42 times · held by 1 · 2 more branches")
        await tab.click("#spans button", "hour")
        await tab.until("document.querySelector('#chart-tokens').textContent.includes('60 min')")
        await tab.click("#requests button", "End")
        assert engine.aborted == []
        await tab.click("#requests button", "Sure?")
        await engine.until(lambda: engine.aborted == ["mine"])
        await tab.until("!document.querySelector('#requests tr')")
        await asking
        assert [error for error in tab.errors if "401" not in error] == []


async def test_the_dashboard_draws_curves_and_their_values_under_the_pointer(tab: Tab) -> None:
    async with served(FakeEngine()) as url:
        await tab.go(url + "dashboard")
        await tab.until("!document.querySelector('#main').hidden")
        await tab.evaluate(
            "(clearTimeout(timer), poll = show = () => {}, drawCurves('chart-tokens', [200, 100, 0], 300,"
            " [{name: 'generated', colour: 'blue', values: [1, 20, 300]}]), true)"
        )
        x, y = await tab.evaluate(
            "(() => { const box = document.querySelector('#chart-tokens').getBoundingClientRect();"
            " return [box.x + drawn.get('chart-tokens').x(110), box.y + 50]; })()"
        )
        await tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        await tab.until("document.querySelector('#tip').textContent === 'generated 20\\n2 min ago'")


async def test_behind_a_router_the_dashboard_adds_up_its_workers_or_shows_one(tab: Tab) -> None:
    async with served(FakeEngine()) as first, served(FakeEngine(), served_model_name=["second"]) as second:
        config = RouterConfig(worker_urls=[first.rstrip("/"), second.rstrip("/")])
        router = web.AppRunner(Router(config).build_app(), handler_cancellation=True)
        await router.setup()
        site = web.TCPSite(router, "127.0.0.1", 0)
        await site.start()
        await tab.go(f"http://127.0.0.1:{router.addresses[0][1]}/dashboard")
        await tab.until("document.querySelector('#model').textContent === 'fake-model, second'")
        assert await tab.text("#running") == "2"
        assert (await tab.text("#kv")).startswith("500 held (25 %)")
        assert len(await tab.texts(".branch")) == 4 and len(await tab.texts("#replicas tr")) == 2
        await tab.evaluate(
            f"(document.querySelector('#workers').value = {second.rstrip('/')!r},"
            " document.querySelector('#workers').dispatchEvent(new Event('change')), true)"
        )
        await tab.until("document.querySelector('#model').textContent === 'second'")
        assert await tab.text("#running") == "1"
        assert tab.errors == []
        await router.cleanup()
