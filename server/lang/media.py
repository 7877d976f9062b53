"""Images and videos as requests carry them: base64 text, and the parts of OpenAI's messages."""

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIME_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}


@dataclass(frozen=True)
class Media:
    """`source`: a URL or base64 text."""

    source: str
    kind: str = "image"

    @property
    def url(self) -> str:
        """URL in the form of OpenAI's API."""
        if _is_url(self.source):
            return self.source
        head = base64.b64decode(self.source[:16])
        mime = next((mime for magic, mime in MIME_TYPES.items() if head.startswith(magic)), "image/png")
        return f"data:{mime};base64,{self.source}"


def _is_url(source: str) -> bool:
    return "://" in source or source.startswith("data:")


def load_image(source: Any) -> Media:
    """Load from a URL, a path, bytes, base64 text, or an image of PIL. `OSError` if a file cannot be read."""
    if isinstance(source, bytes):
        return Media(base64.b64encode(source).decode())
    if isinstance(source, Path) or (isinstance(source, str) and os.path.isfile(source)):
        return Media(base64.b64encode(Path(source).read_bytes()).decode())
    if isinstance(source, str):
        if not _is_url(source):
            try:
                base64.b64decode(source, validate=True)
            except ValueError:
                raise FileNotFoundError(f"no such image: {source[:200]}") from None
        return Media(source)
    if hasattr(source, "save"):
        buffer = io.BytesIO()
        source.save(buffer, format="PNG")
        return Media(base64.b64encode(buffer.getvalue()).decode())
    raise TypeError(f"an image is a path, a URL, bytes or an image of PIL, not {type(source).__name__}")


def load_video(path: str, num_frames: int) -> Media:
    """Load under the name that SGLang's servers know: `video:<frames>:<base64 of the file>`."""
    return Media(f"video:{num_frames}:{base64.b64encode(Path(path).read_bytes()).decode()}", "video")


def media_data(media: Sequence[Media]) -> dict[str, list[str]]:
    """Return the fields of /generate that hold `media`."""
    sources = {kind: [one.source for one in media if one.kind == kind] for kind in ("image", "video")}
    return {f"{kind}_data": of_kind for kind, of_kind in sources.items() if of_kind}


def content_of(text: str, media: list[Media]) -> "str | list[dict[str, Any]]":
    """Return a message's content: its text, after its images if it has any."""
    if not media:
        return text
    parts: list[dict[str, Any]] = [
        {"type": f"{one.kind}_url", f"{one.kind}_url": {"url": one.url if one.kind == "image" else one.source}}
        for one in media
    ]
    return [*parts, {"type": "text", "text": text}]
