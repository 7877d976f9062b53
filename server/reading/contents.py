"""Contents of messages: a text, or a list of texts with places of pictures and videos between them.

Such a list has {"type": "text", "text": ...} and {"type": "image"} or {"type": "video"}, as chat templates read it.
"""

from collections.abc import Mapping
from typing import Any

from engine.errors import InvalidRequest
from engine.media import Kind
from server.media.limits import LOW_DETAIL_PIXELS, SETTINGS
from server.media.reader import MediaPart
from server.reading.openai_body import FilePart, MediaFields, MediaUrl, Part
from server.reading.protocol import JSON

Content = str | list[JSON]
IMAGE_PARTS = {"image_url": "image_url", "input_image": "image_url", "image": "image"}  # type -> field
VIDEO_PARTS = {"video_url": "video_url", "video": "video"}
SOURCES = ("image_url", "video_url", "image", "video")
FILE = "file"  # a picture: no other files are shown
SOUND_PARTS = ("input_audio", "audio_url", "audio")


class SourcedPart(dict[str, Any]):
    """A part of chat.completions made of another API's: an error names the field that the client wrote."""

    def __init__(self, part: JSON, path: str) -> None:
        super().__init__(part)
        self.path = path


def sourced(url: str, path: str, detail: str | None = None, kind: Kind = "image") -> SourcedPart:
    """Return the part that shows what is at a URL, or in base64 text."""
    source = {"url": url} if detail is None else {"url": url, "detail": detail}
    return SourcedPart({"type": f"{kind}_url", f"{kind}_url": source}, path)


def uploaded(file_id: str, path: str, detail: str | None = None) -> SourcedPart:
    """Return the part that shows a picture which was uploaded to /v1/files."""
    return SourcedPart({"type": FILE, "file": {"file_id": file_id}, "detail": detail}, path)


def kind_of(part: Part) -> str:
    """Return the type of a part. One without is what it has a field for (vLLM's)."""
    if part.type is not None:
        return part.type
    return next((name for name in SOURCES if getattr(part, name) is not None), "")


def is_media(part: Part) -> bool:
    """Return whether the part is a picture, video or sound."""
    kind = kind_of(part)
    return kind in IMAGE_PARTS or kind in VIDEO_PARTS or kind in SOUND_PARTS or kind == FILE


def media_part(written: JSON, part: Part, path: str) -> MediaPart:
    """Return the picture or video that a part of a message at `path` names."""
    kind = kind_of(part)
    if kind in SOUND_PARTS:
        raise InvalidRequest(f"{path} is {kind}, but this model reads no sounds", f"{path}.type")
    if kind == FILE:
        return _file_part(written, part, path)
    name = IMAGE_PARTS.get(kind) or VIDEO_PARTS[kind]
    given, settings, field = getattr(part, name), settings_of(part), f"{path}.{name}"
    if given is None and part.url is not None:
        given, field = part.url, f"{path}.url"
    if isinstance(given, MediaUrl):
        settings |= settings_of(given)
        given, field = given.url, f"{field}.url"
    if not given:
        raise InvalidRequest(f"{field} must be a data URI or a URL", field)
    return MediaPart("image" if kind in IMAGE_PARTS else "video", given, getattr(written, "path", field), settings)


def _file_part(written: JSON, part: Part, path: str) -> MediaPart:
    """Return the picture that a part of the type `file` at `path` names or holds."""
    file, settings = part.file or FilePart(), settings_of(part)
    if file.file_id is not None:
        name = getattr(written, "path", f"{path}.file.file_id")
        return MediaPart("image", "", name, settings, file.file_id)
    if file.file_data is None:
        raise InvalidRequest(f"{path}.file must have a file_id, or file_data", f"{path}.file")
    return MediaPart("image", file.file_data, f"{path}.file.file_data", settings)


def refused(written: JSON, part: Part, path: str) -> InvalidRequest:
    """Return the error that says that a text model is shown the part at `path`."""
    if isinstance(written, SourcedPart):
        return InvalidRequest(f"{written.path} is an image, but this model reads text only", written.path)
    return InvalidRequest(f"{path} is {kind_of(part)}, but this model reads text only", f"{path}.type")


def settings_of(fields: MediaFields) -> dict[str, int]:
    """Return how a picture is to be read, as numbers."""
    settings: dict[str, int] = fields.given(SETTINGS)
    if fields.detail == "low":
        settings["max_pixels"] = min(settings.get("max_pixels", LOW_DETAIL_PIXELS), LOW_DETAIL_PIXELS)
    return settings


def together(*contents: Content, separator: str = "\n") -> Content:
    """Return contents as one, a text if all of them are texts."""
    if all(isinstance(content, str) for content in contents):
        return separator.join(content for content in contents if isinstance(content, str))
    parts: list[JSON] = []
    for content in contents:
        if parts:
            parts.append({"type": "text", "text": separator})
        parts += as_parts(content)
    return parts


def as_parts(content: Content) -> list[JSON]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def as_text(content: Content, placeholders: Mapping[str, str]) -> str:
    """Return a content as a text: the model's placeholders stand for pictures and videos."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] if part["type"] == "text" else placeholders[part["type"]] for part in content)
