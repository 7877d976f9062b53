"""The fields of SGLang's native bodies that hold pictures and videos."""

from typing import Annotated, Literal

from msgspec import Meta

from engine.errors import InvalidRequest
from server.media.reader import NUM_FRAMES, MediaPart
from server.reading.contents import settings_of
from server.reading.openai_body import MediaUrl
from server.reading.shared_fields import PrefixFields


class SourceData(MediaUrl, unsupported=("format", "feature", "image_grid_thw")):
    """SGLang's `ImageData`: a source, and how it is read. Features that a client computed are not taken."""


Source = str | SourceData
# A source, or several, of the one prompt; or a list with an entry of either kind for each prompt.
Sources = Annotated[
    Source | list[Source | list[Source] | None],
    Meta(extra={"rule": 'a path, a URL, a data URI, base64 text, {"url": ...}, or a list of these'}),
]
Modality = Literal["text", "image", "multi-images", "video"]
MODALITIES_RULE = "a list of text, image, multi-images and video"


class MediaData(PrefixFields):
    image_data: Annotated[Sources, Meta(description="pictures, for the placeholders in the text")] | None = None
    video_data: Annotated[Sources, Meta(description="videos, likewise")] | None = None
    modalities: (
        Annotated[
            list[Modality | list[Modality]],
            Meta(description="video: image_data holds a video, or its frames", extra={"rule": MODALITIES_RULE}),
        ]
        | None
    ) = None

    @property
    def given_media(self) -> list[str]:
        """Names of the fields that hold something."""
        return [name for name in ("image_data", "video_data") if getattr(self, name)]

    def media_of(self, i: int | None, count: int = 1) -> list[MediaPart]:
        """Return what prompt `i` of `count` shows; None: the only prompt, whose sources may be a list."""
        parts: list[MediaPart] = []
        for name in self.given_media:
            sources, path = self._sources(name, i, count)
            is_video = name == "video_data" or self._modality(i) == "video"
            if name == "image_data" and is_video and len(sources) > 1:
                frames = [_read(source, f"{path}[{k}]")[0] for k, source in enumerate(sources)]
                parts.append(MediaPart("video", frames, path))
                continue
            for k, source in enumerate(sources):
                field = path if len(sources) == 1 else f"{path}[{k}]"
                text, settings = _read(source, field)
                kind: Literal["image", "video"] = "video" if is_video or text.startswith(NUM_FRAMES) else "image"
                parts.append(MediaPart(kind, text, field, settings))
        return parts

    def _sources(self, name: str, i: int | None, count: int) -> tuple[list[Source], str]:
        """Return the sources of prompt `i` in a field, and their place in the body."""
        given, path = getattr(self, name), name
        if isinstance(given, list) and (i is not None or (len(given) == 1 and isinstance(given[0], list))):
            if len(given) != count:
                raise InvalidRequest(f"{name} has {len(given)} entries for {count} prompts", name)
            given, path = given[i or 0] or [], f"{name}[{i or 0}]"
        sources = [given] if isinstance(given, Source) else given
        if not all(isinstance(source, Source) for source in sources):
            raise self.wrong(name, "a list of sources, beside a single prompt")
        return sources, path

    def _modality(self, i: int | None) -> str:
        """Return the modality of prompt `i`: its own entry, or the one for all."""
        given = self.modalities or ["image"]
        own = given[i] if i is not None and i < len(given) else given[0]
        return own if isinstance(own, str) else next(iter(own), "image")


def _read(source: Source, field: str) -> tuple[str, dict[str, int]]:
    """Return a source as a text, and how it is to be read."""
    if isinstance(source, str):
        return source, {}
    if not source.url:
        raise source.wrong("url", "a path, a URL, a data URI or base64 text", field)
    return source.url, settings_of(source)
