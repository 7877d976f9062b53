"""Ask a server under test, over HTTP or with OpenAI's own client."""

import json
from typing import TYPE_CHECKING, Any

from aiohttp.test_utils import TestClient

if TYPE_CHECKING:
    import openai

Client = TestClient[Any, Any]


async def post(client: Client, path: str, **body: Any) -> Any:
    """Return the JSON of an answer, which must not be an error."""
    response = await client.post(path, json=body)
    assert response.status == 200, await response.text()
    return await response.json()


async def events(client: Client, path: str, **body: Any) -> list[Any]:
    """Return the events of a streamed answer, which must end with [DONE]."""
    response = await client.post(path, json={**body, "stream": True})
    assert response.status == 200, await response.text()
    *found, done = events_of(await response.read())
    assert done == "[DONE]"
    return [json.loads(event) for event in found]


def events_of(body: bytes) -> list[str]:
    """Return the data of each server-sent event."""
    events = body.decode().split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") for event in events)
    return [event.removeprefix("data: ") for event in events]


def official(client: Client, key: str = "none") -> "openai.AsyncOpenAI":
    """Return OpenAI's own client of the same server."""
    import openai

    return openai.AsyncOpenAI(base_url=str(client.make_url("/v1")), api_key=key, max_retries=0, timeout=60)
