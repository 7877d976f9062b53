"""A server of ours (or SGLang's) over HTTP."""

import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import orjson

from .base import JSON, BackendError
from .native import NativeBackend

MAX_CONNECTIONS = 512


class RuntimeEndpoint(NativeBackend):
    """`RuntimeEndpoint("http://localhost:30000")`. `BackendError` if no server answers there.

    `verify`: False trusts any certificate, a path is a file of certificates to trust. `chat_template_name`: instead of
    the served model's template. `max_connections`: requests at once; more wait here.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: bool | str | None = None,
        chat_template_name: str | None = None,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"a server's URL begins with http:// or https://, got {base_url!r}")
        super().__init__()
        self.base_url = base_url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.loop.run(self._open(headers, _ssl(verify), max_connections))
        self.model_info: JSON = self.loop.run(self.call("GET", "/get_model_info"))
        tokens = {kind: self.model_info.get(f"{kind}_token") for kind in ("image", "video")}
        texts = {kind: str(token) for kind, token in tokens.items() if token}
        self.use_template(chat_template_name, self.model_info["model_path"], texts)

    async def _open(self, headers: dict[str, str], trust: "ssl.SSLContext | bool", max_connections: int) -> None:
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=max_connections, ssl=trust),
            timeout=aiohttp.ClientTimeout(total=None),  # an answer may take its time
            json_serialize_bytes=orjson.dumps,
            cookie_jar=aiohttp.DummyCookieJar(),  # looked into for each request
        )
        self.loop.on_close.append(self._session.close)

    async def call(self, method: str, path: str, body: JSON | None = None) -> Any:
        """Return the server's answer: JSON, or text. `BackendError` with its status if it is not 200."""
        try:
            async with self._session.request(method, self.base_url + path, json=body) as response:
                data = await response.read()
        except aiohttp.ClientError as error:
            raise BackendError(f"{self.base_url}{path}: {error}") from error
        _check(response.status, data)
        return orjson.loads(data) if response.content_type == "application/json" else data.decode()

    async def post(self, body: JSON) -> Any:
        return await self.call("POST", "/generate", body)

    async def post_stream(self, body: JSON) -> AsyncIterator[JSON]:
        try:
            async with self._session.post(self.base_url + "/generate", json={**body, "stream": True}) as response:
                if response.status != 200:
                    _check(response.status, await response.read())
                async for event in _events(response.content):
                    if "error" in event:
                        raise BackendError(event["error"]["message"], event["error"].get("code", 500))
                    yield event
        except aiohttp.ClientError as error:
            raise BackendError(f"{self.base_url}/generate: {error}") from error

    async def render(self, messages: Sequence[JSON], add_generation_prompt: bool) -> str:
        body = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        return str((await self.call("POST", "/tokenize", body))["prompt"])

    async def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        body = {"prompt": text, "add_special_tokens": add_special_tokens}
        return list((await self.call("POST", "/tokenize", body))["tokens"])

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        body = {"tokens": list(token_ids), "skip_special_tokens": False}
        return str((await self.call("POST", "/detokenize", body))["text"])

    def get_model_name(self) -> str:
        return str(self.model_info["model_path"])

    def get_server_info(self) -> JSON:
        return self.loop.run(self.call("GET", "/get_server_info"))

    def flush_cache(self) -> bool:
        try:
            self.loop.run(self.call("POST", "/flush_cache"))
        except BackendError as error:
            if error.status != 400:
                raise
            return False  # requests are running
        return True

    def start_profile(self) -> None:
        self.loop.run(self.call("POST", "/start_profile"))

    def stop_profile(self) -> None:
        self.loop.run(self.call("POST", "/stop_profile"))


def _ssl(verify: bool | str | None) -> "ssl.SSLContext | bool":
    return ssl.create_default_context(cafile=verify) if isinstance(verify, str) else verify is not False


def _check(status: int, data: bytes) -> None:
    if status == 200:
        return
    text = data.decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):  # not an answer of ours: its text says what it says
        text = json.loads(text)["error"]["message"]
    raise BackendError(text, status)


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[JSON]:
    """Yield server-sent events up to [DONE]. A line may be long: the text so far is in each."""
    rest = b""
    async for chunk in content.iter_any():
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data: ")
            if data == b"[DONE]":
                return
            yield orjson.loads(data)
    raise BackendError("the server ended the stream before its end")
