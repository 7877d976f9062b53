"""Find in a request's body what decides which worker has its prompt in the cache."""

import re

import orjson

# Fields of all APIs that a prompt is made of, those that come first in it first.
PROMPT_FIELDS = (
    "model", "extra_key", "cache_salt", "system", "instructions", "tools", "messages", "text", "input_ids", "prompt",
    "image_data", "video_data", "input",
)  # fmt: skip
LONG_BODY = 1 << 16  # bytes; a shorter one has no picture that would be worth a search
BASE64 = re.compile(rb"[A-Za-z0-9+/]{1024,}")
SAMPLE = 64  # characters, at three places


def prompt_of(body: bytes) -> bytes:
    """Return bytes that share a prefix with another request's as their prompts do. Empty if there is no prompt."""
    if len(body) > LONG_BODY:
        body = BASE64.sub(_sample, body)
    try:
        values = orjson.loads(body)
        if not isinstance(values, dict):
            return b""
        return b"".join(orjson.dumps(values[name]) for name in PROMPT_FIELDS if values.get(name) is not None)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):  # the second: deeper than can be written
        return b""  # its worker says what is wrong with it


def _sample(run: re.Match[bytes]) -> bytes:
    """Return a short text that stands for a picture's base64: megabytes of it would say no more.

    Two pictures of one length that differ elsewhere only go to one worker, which knows better.
    """
    text = run[0]
    middle = len(text) // 2
    return b"%d %b %b %b" % (len(text), text[:SAMPLE], text[middle : middle + SAMPLE], text[-SAMPLE:])
