"""Turn base64 text and local paths into the bytes of a file. All of it blocks: call it in a thread."""

import binascii
import os
import stat
from urllib.parse import unquote, urlsplit

from engine.media import Kind
from server.media.broken import BrokenMedia
from server.media.limits import MAX_FILE_BYTES

PIECE = 1 << 18  # characters, a multiple of 4: the interpreter is not held for longer than 0.2 ms
MAX_PATH_CHARS = 4096
URL_ALPHABET = str.maketrans("-_", "+/")
MAX_HEAD_CHARS = 256  # of a data URI, before its text


def base64_len(text: str, start: int = 0) -> int:
    """Return the bytes that base64 text from `start` on stands for, or a few more."""
    return (len(text) - start) // 4 * 3 + 3


def decode_base64(text: str, kind: Kind, start: int = 0) -> bytes:
    """Return the bytes that base64 text from `start` on stands for, in any spelling of it: see `_plain`."""
    limit = MAX_FILE_BYTES[kind]
    if base64_len(text, start) > limit + 3:
        raise BrokenMedia(f"has about {base64_len(text, start)} bytes, the limit is {limit}")
    try:
        return _decoded(text, start)
    except ValueError:
        pass  # perhaps because it is written otherwise
    try:
        return _decoded(_plain(text[start:]), 0)
    except ValueError as error:
        raise BrokenMedia(f"is no base64 text: {error}") from None


def _plain(text: str) -> str:
    """Return base64 text as it is mostly written: not in lines, quoted for URLs, in their alphabet or unpadded."""
    text = "".join((unquote(text) if "%" in text else text).split()).translate(URL_ALPHABET)
    return text if text.endswith("=") else text + "=" * (-len(text) % 4)


def _decoded(text: str, start: int) -> bytes:
    pieces = []
    for first in range(start, len(text), PIECE):
        piece = text[first : first + PIECE]
        if piece[-1] == "=" and first + PIECE < len(text):
            raise ValueError("Excess data after padding")
        pieces.append(binascii.a2b_base64(piece, strict_mode=True))
    return b"".join(pieces)


def data_of_uri(uri: str) -> tuple[str, int]:
    """Return the media type of a data URI, and where its base64 text starts."""
    comma = uri.find(",", 0, MAX_HEAD_CHARS)
    media_type, *parameters = uri[5 : max(comma, 5)].split(";")
    if comma < 0 or "base64" not in (parameter.strip().lower() for parameter in parameters):
        raise BrokenMedia("is no data URI of the form data:image/png;base64,...")
    return media_type.strip().lower(), comma + 1


def read_local(path: str, root: str, kind: Kind) -> bytes | None:
    """Return the bytes of a file under `root`; None if there is none of that name. Links may not lead out of it."""
    if len(path) > MAX_PATH_CHARS or "\0" in path:
        return None
    root, real = os.path.realpath(root), os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([root, real]) != root:
        return None
    try:
        # A pipe would block, and what became a link since is not followed.
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            return None
        if facts.st_size > MAX_FILE_BYTES[kind]:
            raise BrokenMedia(f"has {facts.st_size} bytes, the limit is {MAX_FILE_BYTES[kind]}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(MAX_FILE_BYTES[kind])
    finally:
        os.close(descriptor)


def path_of_uri(uri: str) -> str:
    """Return the path of a file URI of this machine."""
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise BrokenMedia("is a file URI of another host")
    return unquote(parts.path)
