"""Read the pictures and videos of a request: sources, headers, their tokens, and only then pixels.

Files are opened, and pixels decoded, in a few threads. What they take of memory is taken from the budget of bodies:
encoded bytes for as long as they are read, pixels for as long as anybody holds them.
"""

import asyncio
import hashlib
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from engine.engine import Engine
from engine.errors import InvalidRequest, PromptTooLong, QueueFull
from engine.media import Image, Kind, Media, MediaSize, PromptMedia, Video
from server.http.bodies import BodyBudget
from server.media import images, videos
from server.media.broken import BrokenMedia
from server.media.decoding import Decoder, Opened, Workers, all_of
from server.media.fetch import Fetcher
from server.media.files import base64_len, data_of_uri, decode_base64, path_of_uri, read_local
from server.media.limits import MAX_TOTAL_PIXELS, READ_S, MediaLimits

T = TypeVar("T")
NUM_FRAMES = "video:"  # SGLang's language sends video:8:<base64>, a video of which eight frames are wanted


@dataclass(frozen=True, slots=True)
class MediaPart:
    """Name a picture or video of a request, as its client did."""

    kind: Kind
    source: str | Sequence[str] | Path  # a data URI, a URL, a path, or base64 text; of a video also its frames, so each
    path: str  # of the field in the request, for errors
    settings: Mapping[str, int] = field(default_factory=dict)  # those asked for
    file_id: str | None = None  # of an uploaded file, whose place becomes the source


class Share:
    """The part of a `budget` that one request's encoded files take."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget, self._num_bytes = budget, 0

    def __enter__(self) -> "Share":
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.give_back(self._num_bytes)

    def take(self, num_bytes: int) -> None:
        self._budget.take(num_bytes)
        self._num_bytes += num_bytes


class MediaReader:
    """Reads what the model behind `engine` can see, within `limits`."""

    def __init__(self, engine: Engine, limits: MediaLimits, budget: BodyBudget, fetcher: Fetcher | None = None) -> None:
        self.engine, self.limits, self._budget = engine, limits, budget
        self._fetcher = fetcher or Fetcher(limits.domains)
        self._workers = Workers()
        self._decoder = Decoder(budget, self._workers)

    async def encode(
        self, prompt: str | list[int], parts: Sequence[MediaPart], field: str, add_special_tokens: bool = False
    ) -> tuple[list[int], PromptMedia]:
        """Return the token ids of a prompt, and what it shows: `parts`, each of which has a placeholder in `prompt`.

        prompt: a text, or token ids, in which pictures may be written out already. field: the client's, of the prompt.
        `InvalidRequest` if there are more or fewer placeholders.
        """
        self.check(parts)
        if isinstance(prompt, str):
            text, may_be_written = prompt, False
        else:
            text, may_be_written = self.engine.media_text(prompt), True
        media = await self.read(in_order(text, parts, self.engine.media_kinds, field, may_be_written=may_be_written))
        try:
            return await self.engine.encode_media(prompt, media, add_special_tokens=add_special_tokens)
        except PromptTooLong:
            raise
        except InvalidRequest as error:
            raise InvalidRequest(f"{field}: {error}", field) from None

    async def read(self, parts: Sequence[MediaPart]) -> list[Media]:
        """Return the decoded pictures and videos. `InvalidRequest` names the client's field of one that is wrong."""
        self.check(parts)
        with Share(self._budget) as share:
            try:
                async with asyncio.timeout(READ_S):
                    opened = await all_of(self._open(part, share) for part in parts)
                    self._admit([one.size for one in opened], parts)
                    return await all_of(map(self._decoded, opened, parts))
            except TimeoutError:
                raise QueueFull(
                    f"the request's pictures were not read within {READ_S:.0f} s: try again later"
                ) from None

    def check(self, parts: Sequence[MediaPart]) -> None:
        """Raise `InvalidRequest` for a kind that the model cannot see, or more of one than a request may have."""
        known = self.engine.media_kinds
        counts = dict.fromkeys(self.limits.counts, 0)
        for part in parts:
            if part.kind not in known:
                reads = " and ".join(["text", *(f"{kind}s" for kind in known)]) if known else "text only"
                article = "an" if part.kind[0] in "aeiou" else "a"
                raise InvalidRequest(f"{part.path} is {article} {part.kind}, but this model reads {reads}", part.path)
            counts[part.kind] += 1
            if counts[part.kind] > self.limits.counts[part.kind]:
                total = sum(one.kind == part.kind for one in parts)
                raise InvalidRequest(
                    f"{part.path} is one of {total} {part.kind}s, the limit is {self.limits.counts[part.kind]} a "
                    "request (--limit-mm-per-prompt)",
                    part.path,
                )

    def _admit(self, sizes: Sequence[MediaSize], parts: Sequence[MediaPart]) -> None:
        """Refuse what is too large for the server or the context, before a pixel is decoded."""
        pixels = [size.width * size.height * size.num_frames for size in sizes]
        if sum(pixels) > MAX_TOTAL_PIXELS:
            path = parts[pixels.index(max(pixels))].path
            raise InvalidRequest(
                f"the request's pictures have {sum(pixels)} pixels, the limit is {MAX_TOTAL_PIXELS}; most has {path}",
                path,
            )
        counts = self._counts(sizes, parts)
        num_tokens, limit = sum(counts), self.engine.context_length
        if num_tokens >= limit:
            path = parts[counts.index(max(counts))].path
            raise PromptTooLong(
                f"the request's pictures take {num_tokens} tokens, the context is {limit}; most takes {path}",
                path,
                prompt_len=num_tokens,
                limit=limit,
            )

    def _counts(self, sizes: Sequence[MediaSize], parts: Sequence[MediaPart]) -> list[int]:
        """Return the tokens of each. `InvalidRequest` names the field of one in a shape that the model cannot see."""
        try:
            return self.engine.count_media_tokens(sizes)
        except InvalidRequest:
            for size, part in zip(sizes, parts, strict=True):
                try:
                    self.engine.count_media_tokens([size])
                except InvalidRequest as error:
                    raise InvalidRequest(f"{part.path}: {error}", part.path) from None
            raise

    async def _decoded(self, one: Opened, part: MediaPart) -> Media:
        with _named(part):
            media = await self._decoder.decoded(one)
        return replace(media, settings=one.size.settings)

    # ---- opening ----

    async def _open(self, part: MediaPart, share: Share) -> Opened:
        with _named(part):
            return await (self._open_image(part, share) if part.kind == "image" else self._open_video(part, share))

    async def _open_image(self, part: MediaPart, share: Share) -> Opened:
        assert isinstance(part.source, str | Path)
        data = await self._bytes(part.source, "image", share)
        header, digest = await self._workers.run(_image_header, data)
        settings = self.limits.settings_of("image", part.settings)
        return Opened(
            digest,
            MediaSize("image", header.width, header.height, settings=settings),
            lambda: _image_of(images.decode(data, header)),
            header.num_pixels * (images.BYTES_A_PIXEL - 3),
        )

    async def _open_video(self, part: MediaPart, share: Share) -> Opened:
        source, settings = part.source, self.limits.settings_of("video", part.settings)
        assert not isinstance(source, Path)
        if isinstance(source, str) and source.startswith(NUM_FRAMES):
            number, _, source = source.removeprefix(NUM_FRAMES).partition(":")
            if not (number.isdecimal() and int(number[:6]) > 0):
                raise BrokenMedia("is no video of the form video:8:<base64 text>")
            settings["num_frames"] = int(number[:6])
        if isinstance(source, str) and source[:15].lower() == "data:video/jpeg" and source.count(",") > 1:
            source = source[data_of_uri(source)[1] :].split(",")  # vLLM's: frames in one URI
        if not isinstance(source, str):
            return await self._open_frames(source, settings, share)
        if "num_frames" not in settings:
            settings = {**self.engine.video_frames, **settings}
        data = await self._bytes(source, "video", share)
        header, digest = await self._workers.run(_video_header, data, settings)
        return Opened(
            (digest, header),
            MediaSize("video", header.width, header.height, len(header.indices), settings),
            lambda: _video_of(videos.decode(data, header, time.monotonic() + READ_S), header.times_s),
            header.working_bytes,
        )

    async def _open_frames(self, sources: Sequence[str], settings: Mapping[str, int], share: Share) -> Opened:
        if not sources:
            raise BrokenMedia("is a video without frames")
        sources = videos.sampled(sources, settings)
        files, headers, digests = [], [], []
        for i, source in enumerate(sources):
            try:
                files.append(await self._bytes(source, "image", share))
                header, digest = await self._workers.run(_image_header, files[-1])
            except BrokenMedia as error:
                raise BrokenMedia(f"has a frame {i} that {error}") from None
            headers.append(header)
            digests.append(digest)
            if (header.width, header.height) != (headers[0].width, headers[0].height):
                raise BrokenMedia(
                    f"has a frame {i} of {header.width} x {header.height} pixels, "
                    f"the first has {headers[0].width} x {headers[0].height}"
                )
        times = videos.frame_times(len(files), settings)

        def decode() -> Media:
            return _video_of(np.stack([images.decode(*frame) for frame in zip(files, headers, strict=True)]), times)

        first = headers[0]
        return Opened(
            (*digests, times),
            MediaSize("video", first.width, first.height, len(files), settings),
            decode,
            first.num_pixels * (3 * len(files) + images.BYTES_A_PIXEL),
        )

    async def _bytes(self, source: str | Path, kind: Kind, share: Share) -> bytes:
        """Return the file that `source` names or holds."""
        start = 0
        if isinstance(source, Path):
            return await self._uploaded(source, kind, share)
        if source[:5].lower() == "data:":
            media_type, start = data_of_uri(source)
            if not media_type.startswith((f"{kind}/", "application/octet-stream")) and media_type:
                raise BrokenMedia(f"is {media_type[:64]!r} by its data URI, and no {kind}")
        elif source[:8].lower().startswith(("http://", "https://")):
            return await self._fetcher.fetch(source, kind, share.take)
        elif (data := await self._local(source, kind)) is not None:
            share.take(len(data))
            return data
        elif "://" in source[:64]:
            raise BrokenMedia("is neither a data URI nor an http(s) URL")
        share.take(base64_len(source, start))
        return await self._workers.run(decode_base64, source, kind, start)

    async def _uploaded(self, path: Path, kind: Kind, share: Share) -> bytes:
        """Return the bytes of a file that a client has uploaded."""
        data = await self._workers.run(read_local, path.name, str(path.parent), kind)
        if data is None:
            raise BrokenMedia("is a file that has been deleted")
        share.take(len(data))
        return data

    async def _local(self, source: str, kind: Kind) -> bytes | None:
        """Return the file of this machine that `source` names; None if it names none."""
        is_uri, root = source.startswith("file:"), self.limits.local_path
        # A dot, as before a file's suffix, is nowhere in base64 text.
        is_path = is_uri or ("." in source[-6:] and "://" not in source[:64])
        if not root:
            if is_path:
                raise BrokenMedia("is a path, and this server reads no files (--allowed-local-media-path is not set)")
            return None
        path = path_of_uri(source) if is_uri else source
        data = await self._workers.run(read_local, path, root, kind)
        if data is None and is_path:
            raise BrokenMedia("is no file under --allowed-local-media-path")
        return data


@contextmanager
def _named(part: MediaPart) -> Iterator[None]:
    """Turn a `BrokenMedia` of a `with` block into the `InvalidRequest` that names the client's field."""
    try:
        yield
    except BrokenMedia as error:
        raise InvalidRequest(f"{part.path} {error}", part.path) from None


def in_order(
    text: str, parts: Sequence[MediaPart], placeholders: Mapping[str, str], field: str, *, may_be_written: bool = False
) -> list[MediaPart]:
    """Return `parts` in the order of their placeholders in a prompt: a template may put videos behind pictures.

    may_be_written: `text` may have a placeholder for each token of a picture; then `parts` are returned as they are.
    """
    queues: dict[str, deque[MediaPart]] = {kind: deque() for kind in placeholders}
    for part in parts:
        queues[part.kind].append(part)
    kind_of = {placeholder: kind for kind, placeholder in placeholders.items()}
    longest_first = sorted(kind_of, key=len, reverse=True)
    found = [kind_of[match] for match in re.findall("|".join(map(re.escape, longest_first)), text)]
    if may_be_written and any(found.count(kind) > len(queue) for kind, queue in queues.items() if queue):
        return list(parts)
    for kind, queue in queues.items():
        if found.count(kind) != len(queue):
            raise InvalidRequest(
                f"{field} has {placeholders[kind]!r} {found.count(kind)} times, where {len(queue)} {kind}s are given: "
                "it stands for one each",
                field,
            )
    return [queues[kind].popleft() for kind in found]


def _image_header(data: bytes) -> tuple[images.Header, bytes]:
    return images.read_header(data), hashlib.sha256(data).digest()


def _video_header(data: bytes, settings: Mapping[str, int]) -> tuple[videos.Header, bytes]:
    return videos.read_header(data, settings), hashlib.sha256(data).digest()


def _image_of(pixels: np.ndarray) -> Image:
    return Image(pixels, _digest("image", pixels, ()))


def _video_of(frames: np.ndarray, times_s: tuple[float, ...]) -> Video:
    return Video(frames, times_s, _digest("video", frames, times_s))


def _digest(kind: Kind, pixels: np.ndarray, times_s: tuple[float, ...]) -> bytes:
    digest = hashlib.sha256(repr((kind, pixels.shape, times_s)).encode())
    digest.update(pixels.data)
    return digest.digest()
