"""A headless Chromium, driven by its DevTools protocol over one websocket."""

import asyncio
import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--mute-audio",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--remote-debugging-port=0", "--window-size=1280,860",
)  # fmt: skip
START_S, LIMIT_S = 120.0, 60.0
KEYS = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "Tab": 9}


def find_browser() -> str | None:
    """Return the path of a Chromium, if this machine has one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def running_browser(folder: Path) -> Iterator[str]:
    """Yield the address of a new browser's websocket. `folder`: of its profile, empty."""
    command = [find_browser() or "", *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        port_file, deadline = folder / "DevToolsActivePort", time.monotonic() + START_S
        while not (port_file.exists() and port_file.read_text().count("\n") >= 1):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        port, path = port_file.read_text().split("\n")[:2]
        yield f"ws://127.0.0.1:{port}{path}"
    finally:
        os.killpg(process.pid, 9)
        process.wait()


class Tab:
    """One page. `errors` has what its console shows as such."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._ids = socket, itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._session: dict[str, str] = {}
        self.context = ""
        self.errors: list[str] = []

    async def open(self, context: str = "") -> None:
        """Open it, in the storage `context` of another tab or in a new one."""
        self.context = context or (await self.call("Target.createBrowserContext"))["browserContextId"]
        made = await self.call("Target.createTarget", url="about:blank", browserContextId=self.context)
        found = await self.call("Target.attachToTarget", targetId=made["targetId"], flatten=True)
        self._session = {"sessionId": found["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")

    async def listen(self) -> None:
        async for message in self._socket:
            value = json.loads(message.data)
            params = value.get("params", {})
            if (answer := self._answers.pop(value.get("id", 0), None)) and not answer.done():
                answer.set_result(value)
            elif value.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(params["exceptionDetails"]))
            elif value.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
                self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    async def call(self, method: str, **params: Any) -> Any:
        value = await self._answer_to(method, **params)
        assert "error" not in value, value
        return value["result"]

    async def _answer_to(self, method: str, **params: Any) -> Any:
        number = next(self._ids)
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params, **self._session})
        async with asyncio.timeout(LIMIT_S):
            return await answer

    async def go(self, url: str) -> None:
        answer = await self.call("Page.navigate", url=url)
        assert "errorText" not in answer, answer
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def reload(self) -> None:
        """Load the page anew; what is waited for next is not in the old one, which stays for a moment."""
        await self.evaluate("(window.isOld = true)")
        await self.call("Page.reload")
        await self.until("!window.isOld && document.readyState === 'complete'")

    async def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, awaited if it is a promise."""
        found = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait for an expression to be true. One that fails, as while a page makes way for another, is not true yet."""
        deadline = time.monotonic() + LIMIT_S
        while not await self._is_true(expression):
            seen = "(document.body?.innerText ?? '').slice(0, 2000)"
            assert time.monotonic() < deadline, (expression, await self.evaluate(seen), self.errors)
            await asyncio.sleep(0.02)

    async def _is_true(self, expression: str) -> bool:
        found = await self._answer_to("Runtime.evaluate", expression=f"Boolean({expression})")
        return found.get("result", {}).get("result", {}).get("value") is True

    async def text(self, selector: str) -> str:
        found: str = await self.evaluate(f"document.querySelector({selector!r})?.textContent ?? ''")
        return found

    async def texts(self, selector: str) -> list[str]:
        found: list[str] = await self.evaluate(
            f"[...document.querySelectorAll({selector!r})].map(node => node.textContent)"
        )
        return found

    async def click(self, selector: str, text: str = "") -> None:
        """Click on the first element of `selector` that can be seen and has that text, as a mouse does.

        It must be on top of all others, and hold still.
        """
        find = (
            f"[...document.querySelectorAll({selector!r})].find(node => node.checkVisibility()"
            f" && node.textContent.includes({text!r}))"
        )
        middle = (
            f"(() => {{ const node = {find}; node?.scrollIntoView({{block: 'nearest'}});"
            " const box = node?.getBoundingClientRect(), x = box?.x + box?.width / 2, y = box?.y + box?.height / 2;"
            " return node?.contains(document.elementFromPoint(x, y)) ? [x, y] : null; })()"
        )
        seen, deadline = None, time.monotonic() + LIMIT_S
        while (now := await self.evaluate(middle)) is None or now != seen:
            assert time.monotonic() < deadline, (selector, text, now)
            seen = now
            await asyncio.sleep(0.02)
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=now[0], y=now[1], button="left", clickCount=1)

    async def type(self, text: str) -> None:
        """Press a key for each character, into what has the focus."""
        for char in text:
            await self.call("Input.dispatchKeyEvent", type="keyDown", text=char, key=char)
            await self.call("Input.dispatchKeyEvent", type="keyUp", key=char)

    async def press(self, key: str, shift: bool = False) -> None:
        params = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 * shift}
        text = {"text": "\r"} if key == "Enter" else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **params, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **params)

    async def screenshot(self, *, width: int = 1280, height: int = 860, dark: bool = False) -> bytes:
        """Return a picture (PNG) of the page at that size, in the light or the dark theme."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=scheme)
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        await asyncio.sleep(0.2)
        return base64.b64decode((await self.call("Page.captureScreenshot"))["data"])


@asynccontextmanager
async def new_tab(address: str, beside: Tab | None = None) -> AsyncIterator[Tab]:
    """Open a page of a browser that runs, with a storage of its own or that of the tab `beside` it."""
    async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
        tab = Tab(socket)
        listening = asyncio.create_task(tab.listen())
        await tab.open(beside.context if beside else "")
        yield tab
        listening.cancel()
