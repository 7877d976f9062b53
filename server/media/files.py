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


def base64_len(text: str) -> int:
    """Return the bytes that base64 text stands for, or a few more."""
    return len(text) // 4 * 3 + 3


def decode_base64(text: str, kind: Kind) -> bytes:
    """Return the bytes that base64 text stands for. Whitespace in it is passed over, as in MIME."""
    limit = MAX_FILE_BYTES[kind]
    if base64_len(text) > limit + 3:
        raise BrokenMedia(f"has about {base64_len(text)} bytes, the limit is {limit}")
    if len(text.split(None, 1)) > 1 or text[:1].isspace() or text[-1:].isspace():
        text = "".join(text.split())
    padding = text.find("=")
    if not text or (padding >= 0 and padding < len(text) - 2):
        raise BrokenMedia("is no base64 text" if text else "is empty")
    pieces = []
    try:
        for start in range(0, len(text), PIECE):
            pieces.append(binascii.a2b_base64(text[start : start + PIECE], strict_mode=True))
    except ValueError as error:
        raise BrokenMedia(f"is no base64 text: {error}") from None
    return b"".join(pieces)


def data_of_uri(uri: str) -> tuple[str, str]:
    """Return the media type and the base64 text of a data URI."""
    head, comma, text = uri[5:].partition(",") if "," in uri[:256] else ("", "", "")
    media_type, *parameters = head.split(";")
    if not comma or "base64" not in (parameter.strip().lower() for parameter in parameters):
        raise BrokenMedia("is no data URI of the form data:image/png;base64,...")
    return media_type.strip().lower(), text


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
