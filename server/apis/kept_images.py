"""The pictures of stored responses, kept once each: a response refers to them, and so does each that continues it."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.reading.protocol import JSON

MAX_KEPT_BYTES = 128 * 1024 * 1024  # of all owners, as base64 text
SHORT = 1024  # characters of a URL that stays where it is
REFERENCE = "kept:"  # before the digest of a picture, in a response as it is stored
GONE = "[image: no longer kept by this server]"
PLACES = ("content", "output")  # of parts in a message or an item


@dataclass(slots=True)
class Album:
    """One owner's pictures."""

    texts: OrderedDict[str, str] = field(default_factory=OrderedDict)  # by digest, the least used first
    num_bytes: int = 0


class KeptImages:
    """The pictures used last, as many as fit. Where they do not fit, those go of the owner who has the most."""

    def __init__(self, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._albums: dict[str, Album] = {}  # by owner, none of them empty

    async def kept(self, owner: str, values: Sequence[JSON]) -> list[JSON]:
        """Return messages or items with references in place of the bytes of pictures, which are kept for `owner`."""
        sources = [text for value in values for part in _parts(value) if (text := _source(part)) and len(text) > SHORT]
        if not sources:
            return list(values)
        texts = {id(text): text for text in sources}  # to look one up by its characters takes milliseconds
        digests = await asyncio.to_thread(lambda: {place: _digest(text) for place, text in texts.items()})
        for place, digest in digests.items():
            self._put(owner, digest, texts[place])

        def refer(part: JSON) -> JSON:
            digest = digests.get(id(_source(part)))
            return part if digest is None else _with_source(part, REFERENCE + digest)

        return [_changed(value, refer) for value in values]

    def filled(self, owner: str, values: Sequence[JSON]) -> list[JSON]:
        """Return what was kept with its pictures. A short text stands for one that is gone."""
        album = self._albums.get(owner, Album())

        def fill(part: JSON) -> JSON:
            source = _source(part)
            if source is None or not source.startswith(REFERENCE):
                return part
            digest = source.removeprefix(REFERENCE)
            if digest not in album.texts:
                kind = "input_text" if part.get("type") == "input_image" else "text"
                return {"type": kind, "text": GONE}
            album.texts.move_to_end(digest)
            return _with_source(part, album.texts[digest])

        return [_changed(value, fill) for value in values]

    def _put(self, owner: str, digest: str, text: str) -> None:
        album = self._albums.setdefault(owner, Album())
        if digest not in album.texts:
            album.num_bytes += len(text)
            self.num_bytes += len(text)
        album.texts[digest] = text
        album.texts.move_to_end(digest)
        while self.num_bytes > self.max_bytes:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        owner, album = max(self._albums.items(), key=lambda item: item[1].num_bytes)
        _, text = album.texts.popitem(last=False)
        album.num_bytes -= len(text)
        self.num_bytes -= len(text)
        if not album.texts:
            del self._albums[owner]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _parts(value: JSON) -> list[JSON]:
    """Return the parts of a message, or of an item's content or output."""
    found: list[JSON] = []
    for place in PLACES:
        parts = value.get(place)
        found += [part for part in (parts if isinstance(parts, list) else [parts]) if isinstance(part, dict)]
    return found


def _source(part: JSON) -> str | None:
    """Return a picture's URL: as the Responses API writes it, or as chat.completions does."""
    given = part.get("image_url")
    source = given.get("url") if isinstance(given, dict) else given
    return source if isinstance(source, str) else None


def _with_source(part: JSON, source: str) -> JSON:
    given = part["image_url"]
    return {**part, "image_url": {**given, "url": source} if isinstance(given, dict) else source}


def _changed(value: JSON, change: Callable[[JSON], JSON]) -> JSON:
    """Return a message or an item with its parts as `change` returns them."""
    for place in PLACES:
        parts = value.get(place)
        if isinstance(parts, dict):
            value = {**value, place: change(parts)}
        elif isinstance(parts, list):
            value = {**value, place: [change(part) if isinstance(part, dict) else part for part in parts]}
    return value
