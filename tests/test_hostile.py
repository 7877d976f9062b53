"""What one client sends cannot hold the event loop, the memory or the answers of the others.

Every async test also runs under the guard of `conftest`: no callback may hold the loop for more than 50 ms.
"""

import json
from typing import Any

import pytest
from aiohttp.test_utils import TestClient

Client = TestClient[Any, Any]


# ---- texts to parse ----


@pytest.mark.parametrize("mark", ["<tool_call>", '<tool_call>{"id": [', "<function="])
@pytest.mark.parametrize("parser", ["qwen25", "glm45", "qwen3_coder"])
async def test_a_long_text_of_marks_is_parsed_off_the_loop(client: Client, parser: str, mark: str) -> None:
    text = mark * (900_000 // len(mark))
    body = {"text": text, "tools": [{"type": "function", "function": {"name": "f"}}], "tool_call_parser": parser}
    answer = await client.post("/parse_function_call", data=json.dumps(body), headers=JSON)
    assert answer.status == 200
    assert (await answer.json()) == {"normal_text": text, "calls": []}


JSON = {"Content-Type": "application/json"}
