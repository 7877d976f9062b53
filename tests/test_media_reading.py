"""Pictures and videos of requests: what is read, what is refused before it costs anything, and from where."""

import asyncio
import base64
import binascii
import functools
import gc
import importlib.util
import io
import math
import os
import re
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from PIL import Image as Pillow

from engine.errors import InvalidRequest, PromptTooLong, QueueFull
from engine.media import Image, Kind, Media, MediaSize, Video
from server.command_line import parse_args
from server.http.bodies import BodyBudget, BodyTooLarge
from server.media import decoding, fetch, files, images, limits, reader, videos
from server.media.addresses import is_public
from server.media.broken import BrokenMedia
from server.media.fetch import Fetcher, Lookup
from server.media.limits import MediaLimits, read_limits
from server.media.reader import MediaPart, MediaReader
from tests.fake_engine import FakeEngine

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
PATH = "messages[0].content[1].image_url.url"


def encoded(picture: Pillow.Image, format_: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format_, **options)
    return buffer.getvalue()


def picture(width: int = 4, height: int = 3, color: Any = (200, 30, 90)) -> Pillow.Image:
    return Pillow.new("RGB", (width, height), color)


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png_of_size(width: int, height: int) -> bytes:
    """Return a PNG whose header promises so much, and that has next to nothing behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def webp_of_size(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunk = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


class Seeing(FakeEngine):
    """A picture or frame takes a token for each 100 pixels."""

    media_kinds: Mapping[str, str] = {"image": "<image>", "video": "<video>"}

    def count_media_tokens(self, sizes: Sequence[MediaSize]) -> list[int]:
        return [size.num_frames * (size.width * size.height // 100 + 1) for size in sizes]


def reader_of(
    engine: FakeEngine | None = None, max_bytes: int = 1 << 30, fetcher: Fetcher | None = None, **flags: Any
) -> MediaReader:
    values = dict.fromkeys(("limit_mm_per_prompt", "mm_process_config", "domains", "local_path")) | flags
    return MediaReader(engine or Seeing(context_length=1 << 20), read_limits(**values), BodyBudget(max_bytes), fetcher)


async def read(
    source: str | list[str], reading: MediaReader | None = None, kind: Kind = "image", **asked: int
) -> Media:
    (media,) = await (reading or reader_of()).read([MediaPart(kind, source, PATH, asked)])
    return media


async def pixels_of(source: str, reading: MediaReader | None = None) -> np.ndarray:
    media = await read(source, reading)
    assert isinstance(media, Image)
    return media.pixels


async def refusal(source: str | list[str], reading: MediaReader | None = None, kind: Kind = "image") -> str:
    """Return why a source is refused: an error that names the client's field."""
    with pytest.raises(InvalidRequest) as caught:
        await read(source, reading, kind)
    assert caught.value.field == PATH
    assert str(caught.value).startswith(PATH)
    return str(caught.value).removeprefix(PATH).strip()


# ---- pictures ----


@pytest.mark.parametrize("format_", FORMATS)
async def test_a_picture_of_each_format_is_read_as_its_library_reads_it(format_: str) -> None:
    rows = np.random.default_rng(0).integers(0, 255, (37, 53, 3), np.uint8)
    data = encoded(Pillow.fromarray(rows), format_)
    expected = np.asarray(Pillow.open(io.BytesIO(data)).convert("RGB"))
    for source in (uri(data), base64.b64encode(data).decode()):
        pixels = await pixels_of(source)
        assert pixels.dtype == np.uint8
        assert pixels.flags.owndata
        np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
async def test_a_picture_in_any_colors_becomes_rgb(mode: str) -> None:
    format_ = "JPEG" if mode == "CMYK" else "PNG"
    pixels = await pixels_of(uri(encoded(Pillow.new(mode, (7, 5)), format_)))
    assert pixels.shape == (5, 7, 3)


async def test_what_is_transparent_is_white() -> None:
    drawn = Pillow.new("RGBA", (2, 1), (0, 0, 0, 0))
    drawn.putpixel((1, 0), (10, 20, 30, 255))
    assert (await pixels_of(uri(encoded(drawn)))).tolist() == [[[255, 255, 255], [10, 20, 30]]]
    palette = Pillow.new("P", (1, 1), 0)
    palette.putpalette([1, 2, 3])
    assert (await pixels_of(uri(encoded(palette, transparency=0)))).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("orientation", range(1, 9))
async def test_a_picture_stands_as_its_camera_was_held_and_is_counted_so(orientation: int) -> None:
    counted: list[MediaSize] = []

    class Counting(Seeing):
        def count_media_tokens(self, sizes: Sequence[MediaSize]) -> list[int]:
            counted.extend(sizes)
            return super().count_media_tokens(sizes)

    from PIL import ImageOps

    rows = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    data = encoded(Pillow.fromarray(rows), exif=exif)
    pixels = await pixels_of(uri(data), reader_of(Counting(context_length=100)))
    upright = ImageOps.exif_transpose(Pillow.open(io.BytesIO(data)))
    assert upright is not None
    np.testing.assert_array_equal(pixels, np.asarray(upright))
    assert (counted[0].height, counted[0].width) == pixels.shape[:2]


async def test_gray_in_16_bits_is_as_dark_as_in_8() -> None:
    gray = np.array([[0, 1, 128, 255]], np.uint16)
    data = encoded(Pillow.fromarray(gray * 257))
    assert (await pixels_of(uri(data)))[..., 0].tolist() == gray.tolist()


async def test_a_gif_is_its_first_frame() -> None:
    frames = [picture(color=(0, 0, 255)), picture(color=(255, 0, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (await pixels_of(uri(data, "image/gif")))[0, 0].tolist() == [0, 0, 255]


async def test_the_digest_is_of_shape_and_pixels_and_of_nothing_else() -> None:
    rows = np.arange(60, dtype=np.uint8)
    wide, tall = (encoded(Pillow.fromarray(rows.reshape(*shape, 3))) for shape in ((4, 5), (5, 4)))
    bmp = encoded(Pillow.fromarray(rows.reshape(4, 5, 3)), "BMP")
    first, other, again = [await read(uri(data)) for data in (wide, tall, bmp)]
    assert first.digest == again.digest != other.digest
    assert len(first.digest) == 32


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[images.Header]:
    """Return the headers of what is decoded from now on."""
    headers: list[images.Header] = []
    decode = images.decode

    def counted(data: bytes, header: images.Header) -> np.ndarray:
        headers.append(header)
        return decode(data, header)

    monkeypatch.setattr(images, "decode", counted)
    return headers


async def test_the_same_file_is_decoded_once(decoded: list[images.Header]) -> None:
    reading = reader_of()
    first = await read(uri(encoded(picture())), reading)
    second = await read(uri(encoded(picture())), reading, max_pixels=77)
    assert len(decoded) == 1
    assert first.digest == second.digest
    assert (first.settings, second.settings) == ({}, {"max_pixels": 77})


# ---- what is refused ----


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png_of_size(60_000, 60_000), "has more than 64000000 pixels"),
        (png_of_size(8_001, 8_000), "has 8001 x 8000 pixels, the limit is 64000000"),
        (webp_of_size(16_000, 16_000), "has 16000 x 16000 pixels"),
        (b"BM" + struct.pack("<IIIIiiHHIIiiII", 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0), "pixels"),
        (png_of_size(5000, 5000), "is a broken PNG"),
        (b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0), "broken GIF|pixels"),
        (b"%PDF-1.7", "is no picture in JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no picture"),
        (b"II*\0" + bytes(100), "is no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is no picture"),
        (b"", "is empty"),
    ],
    ids=range(11),
)  # fmt: skip
async def test_a_bomb_or_another_kind_of_file_is_refused_by_its_header(data: bytes, reason: str) -> None:
    assert re.search(reason, await refusal(uri(data)))


@pytest.mark.parametrize("format_", FORMATS)
async def test_a_file_cut_or_changed_anywhere_is_read_or_refused_and_nothing_else(format_: str) -> None:
    rows = np.random.default_rng(1).integers(0, 255, (16, 16, 3), np.uint8)
    data = encoded(Pillow.fromarray(rows), format_)
    random = np.random.default_rng(2)
    reading = reader_of()
    refused = 0
    for turn in range(40):
        hostile = bytearray(data[: random.integers(3, len(data))] if turn % 2 else data)
        for place in random.integers(0, len(hostile), 6 if turn % 2 == 0 else 0):
            hostile[place] = random.integers(0, 256)
        try:
            await read(uri(bytes(hostile)), reading)
        except InvalidRequest as error:
            assert error.field == PATH
            refused += 1
    assert refused >= 10


LARGE = {"JPEG": encoded(picture(3000, 3000), "JPEG"), "PNG": encoded(picture(2000, 2000))}


def png_of_chunks(count: int) -> bytes:
    """Return a PNG with so many empty chunks of text."""
    before, end = encoded(picture()).split(b"IDAT", 1)
    chunk = struct.pack(">I", 3) + b"tEXta\0b" + struct.pack(">I", zlib.crc32(b"tEXta\0b"))
    return before[:-4] + chunk * count + before[-4:] + b"IDAT" + end


async def test_a_file_in_very_many_pieces_is_refused() -> None:
    assert (await pixels_of(uri(png_of_chunks(1000)))).shape == (3, 4, 3)
    assert "is a broken PNG: it is in more than 65536 pieces" in await refusal(uri(png_of_chunks(70_000)))


async def test_a_jpeg_of_hundreds_of_scans_is_refused() -> None:
    data = LARGE["JPEG"]
    assert "in 201 scans" in await refusal(uri(data[:-2] + b"\xff\xda" * 200 + data[-2:]))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("data:image/png;base64,AAAA!", "is no base64 text"),
        ("data:image/png;base64,AA==AAAA", "is no base64 text"),
        ("data:image/png,AAAA", "is no data URI of the form"),
        ("data:", "is no data URI of the form"),
        ("data:text/html;base64,AAAA", "is 'text/html' by its data URI"),
        ("file:///etc/passwd", "is a path, and this server reads no files"),
        ("/etc/passwd", "is no picture|is no base64"),
        ("images/cat.jpeg", "is a path, and this server reads no files"),
        ("http://example.org/a.png", "fetches none .--allowed-media-domains"),
        ("ftp://example.org/a.png", "is neither a data URI nor an http"),
        ("gopher://127.0.0.1:11211/_stats", "is neither"),
        ("€", "is no base64 text"),
    ],
)
async def test_a_source_of_no_known_form_is_refused(source: str, reason: str) -> None:
    assert re.search(reason, await refusal(source))


async def test_base64_text_is_measured_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(limits.MAX_FILE_BYTES, "image", 3000)
    monkeypatch.setattr(binascii, "a2b_base64", None)
    assert "the limit is 3000" in await refusal("A" * 4008)


async def test_base64_text_in_lines_is_read() -> None:
    data = encoded(picture())
    assert files.decode_base64(base64.encodebytes(data).decode(), "image") == data
    assert files.decode_base64("-_8", "image") == files.decode_base64("%2B%2F8%3D", "image") == b"\xfb\xff"
    long = os.urandom(files.PIECE * 2 + 1)
    text = base64.b64encode(long).decode()
    assert files.decode_base64(text, "image") == long
    assert files.decode_base64("head," + text, "image", 5) == long
    with pytest.raises(BrokenMedia, match="after padding"):
        files.decode_base64("A" * (files.PIECE - 2) + "==" + "AAAA", "image")


async def test_a_request_has_so_many_pictures_and_pixels_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(count: int) -> list[MediaPart]:
        return [MediaPart("image", uri(encoded(picture(10, 10))), f"images[{i}]") for i in range(count)]

    assert len(await reader_of().read(parts(64))) == 64
    for reading, count, field in (
        (reader_of(), 100, "images[64]"), (reader_of(limit_mm_per_prompt='{"image": 2}'), 3, "images[2]"),
        (reader_of(limit_mm_per_prompt='{"image": 0}'), 1, "images[0]"),
    ):  # fmt: skip
        with pytest.raises(InvalidRequest, match=rf"one of {count} images, the limit is \d+ a request") as caught:
            await reading.read(parts(count))
        assert caught.value.field == field
    monkeypatch.setattr(reader, "MAX_TOTAL_PIXELS", 500)
    with pytest.raises(InvalidRequest, match="have 600 pixels, the limit is 500"):
        await reader_of().read(parts(6))


async def test_a_picture_in_a_shape_that_no_tower_takes_is_named() -> None:
    class Narrow(Seeing):
        def count_media_tokens(self, sizes: Sequence[MediaSize]) -> list[int]:
            if any(size.width > 200 for size in sizes):
                raise InvalidRequest("a picture of 300x1 pixels is too narrow")
            return super().count_media_tokens(sizes)

    parts = [MediaPart("image", uri(encoded(picture(width, 1))), f"images[{width}]") for width in (5, 300, 7)]
    with pytest.raises(InvalidRequest, match=r"images\[300\]: a picture of 300x1 pixels is too narrow") as caught:
        await reader_of(Narrow(context_length=1000)).read(parts)
    assert caught.value.field == "images[300]"


async def test_tokens_are_counted_against_the_context_before_pixels_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(images, "decode", None)
    with pytest.raises(PromptTooLong, match="take 101 tokens, the context is 50") as caught:
        await read(uri(encoded(picture(100, 100))), reader_of(Seeing(context_length=50)))
    assert (caught.value.prompt_len, caught.value.limit, caught.value.field) == (101, 50, PATH)


@pytest.mark.parametrize(("kinds", "reads"), [({}, "text only"), ({"image": "<image>"}, "text and images")])
async def test_a_model_that_cannot_see_it_says_so(kinds: Mapping[str, str], reads: str) -> None:
    engine = Seeing(context_length=100)
    engine.media_kinds = kinds
    assert await refusal(uri(b"x"), reader_of(engine), "video") == f"is a video, but this model reads {reads}"


async def test_an_image_is_named_with_its_article_where_it_is_refused() -> None:
    engine = Seeing(context_length=100)
    engine.media_kinds = {}
    assert await refusal(uri(b"x"), reader_of(engine), "image") == "is an image, but this model reads text only"


# ---- memory ----


async def until_let_go(reading: MediaReader) -> None:
    """Wait until no thread holds what it made last, which may be a moment after that is given: meet each of them."""
    threads = reading._workers._threads
    meeting = threading.Barrier(threads._max_workers)
    await asyncio.gather(*(asyncio.wrap_future(threads.submit(meeting.wait, 60)) for _ in range(threads._max_workers)))


async def test_pixels_are_accounted_for_as_long_as_anybody_holds_them() -> None:
    reading = reader_of()
    reading._decoder.cache.max_bytes = 0
    budget = reading._budget
    media = await read(uri(encoded(picture(100, 50))), reading)
    assert isinstance(media, Image)
    view = media.pixels[::2]
    assert budget.num_bytes == 100 * 50 * 3
    del media
    await until_let_go(reading)
    gc.collect()
    assert budget.num_bytes == 100 * 50 * 3
    del view
    gc.collect()
    assert budget.num_bytes == 0


async def test_what_was_taken_of_memory_is_given_back_whatever_is_refused() -> None:
    reading = reader_of(max_bytes=1 << 20)
    for data in (png_of_size(60, 60), png_of_size(9000, 9000), b"", encoded(picture(1000, 1000))):
        with pytest.raises((InvalidRequest, BodyTooLarge)):
            await read(uri(data), reading)
        assert reading._budget.num_bytes == 0
    assert reading._workers._slots._value > 0


@pytest.mark.parametrize("data", [b"x" * 1000, encoded(picture(), "JPEG")[:-30], png_of_size(9000, 9000)], ids=range(3))
@pytest.mark.max_callback_ms(5000)  # of looking at all objects there are
async def test_of_what_was_refused_nothing_waits_for_the_garbage_collector(data: bytes) -> None:
    """An error that is part of a circle keeps the frames it came through, and these the file."""
    reading, source = reader_of(), uri(data)

    async def attempt() -> None:
        try:
            await read(source, reading)
        except InvalidRequest:
            return
        raise AssertionError("it was read")

    gc.collect()
    gc.disable()
    try:
        await attempt()
        async with asyncio.timeout(60):  # its thread has yet to let go of it
            while any(type(one) in (BrokenMedia, InvalidRequest) for one in gc.get_objects()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        gc.enable()


async def test_where_others_leave_no_room_a_request_is_told_to_come_again_and_the_cache_goes_first() -> None:
    reading = reader_of(max_bytes=200_000)
    await read(uri(encoded(picture(100, 100))), reading)  # 30,000 bytes, in the cache
    assert reading._budget.num_bytes == 30_000
    await until_let_go(reading)
    held = await read(uri(encoded(picture(145, 150))), reading)
    assert reading._budget.num_bytes == 145 * 150 * 3
    with pytest.raises(QueueFull, match="try again later"):
        await read(uri(encoded(picture(140, 150))), reading)
    del held
    await until_let_go(reading)
    assert (await read(uri(encoded(picture(140, 150))), reading)).size.width == 140


async def test_requests_that_show_the_same_file_hold_the_same_pixels(decoded: list[images.Header]) -> None:
    reading = reader_of()
    reading._decoder.cache.max_bytes = 0  # by their weights alone
    source = uri(encoded(picture(100, 50)))
    at_once = await asyncio.gather(*(pixels_of(source, reading) for _ in range(8)))
    later = await pixels_of(source, reading)
    assert len(decoded) == 1
    assert {id(pixels) for pixels in (*at_once, later)} == {id(later)}
    assert reading._budget.num_bytes == later.nbytes


async def test_an_error_reaches_each_request_that_shows_the_file() -> None:
    reading, source = reader_of(), uri(encoded(picture(50, 50), "JPEG")[:-300])
    parts = [MediaPart("image", source, f"images[{i}]") for i in range(3)]
    errors = await asyncio.gather(*(reading.read([part]) for part in parts), return_exceptions=True)
    assert [error.field for error in errors if isinstance(error, InvalidRequest)] == [part.path for part in parts]


async def test_the_cache_holds_the_pictures_used_last() -> None:
    cache = decoding.PixelCache(1000)
    media = [Image(np.zeros((10, 10, 3), np.uint8), bytes([i])) for i in range(4)]
    for i in range(3):
        cache.put(i, media[i])
    cache.get(0)
    cache.put(3, media[3])
    cache.put(4, Image(np.zeros((20, 20, 3), np.uint8), b"large"))
    assert cache.num_bytes == 900
    assert cache.get(1) is not None  # somebody holds it
    media.clear()
    assert [cache.get(i) is not None for i in range(5)] == [True, False, True, True, False]


async def test_a_request_whose_client_has_gone_leaves_nothing_taken() -> None:
    reading = reader_of()
    slots = reading._workers._slots._value
    reading_task = asyncio.create_task(read(uri(LARGE["PNG"]), reading))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    reading_task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading_task
    async with asyncio.timeout(60):
        while reading._workers._slots._value < slots or reading._budget.num_bytes:  # noqa: ASYNC110 - threads end
            await asyncio.sleep(0.01)


# ---- over the network ----


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.215.14", True), ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True), ("8.8.8.8", True),
        ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False), ("0.0.0.0", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("224.0.0.1", False), ("255.255.255.255", False),
        ("198.18.0.1", False), ("192.0.2.1", False), ("240.0.0.1", False), ("::1", False), ("::", False),
        ("::ffff:127.0.0.1", False), ("::ffff:8.8.8.8", False), ("::127.0.0.1", False), ("fe80::1%eth0", False),
        ("fc00::1", False), ("64:ff9b::7f00:1", False), ("64:ff9b::808:808", False), ("2002:7f00:1::", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False), ("ff02::1", False), ("2001:db8::1", False), ("name", False),
    ],
)  # fmt: skip
def test_an_address_is_public_if_anybody_on_the_internet_has_it(address: str, expected: bool) -> None:
    assert is_public(address) is expected


Handler = Callable[[web.Request], Any]


class Site:
    """A server of files on loopback, and fetchers that may reach it alone."""

    def __init__(self, handler: Handler) -> None:
        app = web.Application()
        app.router.add_get("/{name:.*}", handler)
        self.server = TestServer(app)

    async def __aenter__(self) -> "Site":
        await self.server.start_server()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.close()

    def reader(self, lookup: Lookup | None = None, domains: Sequence[str] = ("files.example",)) -> MediaReader:
        async def own(_host: str, _port: int) -> list[str]:
            return ["127.0.0.1"]

        port = self.server.port
        assert port is not None
        fetcher = Fetcher(domains, lookup or own, lambda address: address == "127.0.0.1" or is_public(address), [port])
        return reader_of(fetcher=fetcher)

    def url(self, path: str = "a.png", host: str = "files.example") -> str:
        return f"http://{host}:{self.server.port}/{path}"


async def a_png(_: web.Request) -> web.Response:
    return web.Response(body=encoded(picture()), content_type="image/png")


async def test_a_picture_is_fetched_from_a_host_that_is_allowed() -> None:
    async with Site(a_png) as site:
        for domains in (["files.example"], ["*"]):
            assert (await read(site.url(), site.reader(domains=domains))).size.width == 4
            assert (await read(site.url(host="FILES.example."), site.reader(domains=domains))).size.width == 4
        assert "'files.example', which is not among" in await refusal(site.url(), site.reader(domains=["example"]))


async def test_no_private_address_is_connected_to_however_it_is_written() -> None:
    reading = reader_of(fetcher=Fetcher(["*"]))
    for host in ("127.0.0.1", "[::1]", "2130706433", "0x7f.1", "127.1", "[::ffff:127.0.0.1]", "0.0.0.0",
                 "169.254.169.254", "localhost", "10.0.0.1", "[64:ff9b::a00:1]"):  # fmt: skip
        assert "which has no public address" in await refusal(f"http://{host}/a.png", reading), host


async def test_of_a_name_with_a_private_address_among_public_ones_nothing_is_fetched() -> None:
    async def lookup(_host: str, _port: int) -> list[str]:
        return ["127.0.0.1", "10.0.0.1"]

    async with Site(a_png) as site:
        assert "no public address" in await refusal(site.url(), site.reader(lookup))


async def test_a_name_that_changes_its_address_is_connected_to_where_it_was_looked_up() -> None:
    """DNS rebinding: whoever resolves twice is led inside by the second answer."""
    lookups = []

    async def lookup(host: str, _port: int) -> list[str]:
        lookups.append(host)
        return ["127.0.0.1"] if len(lookups) == 1 else ["169.254.169.254"]

    async with Site(a_png) as site:
        reading = site.reader(lookup)
        assert (await read(site.url(), reading)).size.width == 4
        assert lookups == ["files.example"]
        assert "no public address" in await refusal(site.url(), reading)


REFUSED_REDIRECTS = {
    "http://127.0.0.1:22/": "with port 22",
    "//elsewhere.example:{port}/a.png": "'elsewhere.example', which is not among",
    "//inside.example:{port}/a.png": "no public address",
    "file:///etc/passwd": "no URL of the form",
    "//user:secret@files.example:{port}/": "no URL of the form",
    "/again": "redirected more than 3 times",
}


@pytest.mark.parametrize("location", REFUSED_REDIRECTS)
async def test_a_redirect_leads_nowhere_that_a_client_may_not_ask_for(location: str) -> None:
    asked = []

    async def redirect(request: web.Request) -> web.Response:
        asked.append((request.host.partition(":")[0], request.path))
        raise web.HTTPFound(location.format(port=site.server.port))

    async def lookup(host: str, _port: int) -> list[str]:
        return ["10.0.0.1" if host == "inside.example" else "127.0.0.1"]

    async with Site(redirect) as site:
        reading = site.reader(lookup, ["files.example", "inside.example", "127.0.0.1"])
        text = await refusal(site.url(), reading)
        assert "is redirected" in text and REFUSED_REDIRECTS[location] in text
        assert reading._budget.num_bytes == 0
    again = [("files.example", "/again")] * 3 if location == "/again" else []
    assert asked == [("files.example", "/a.png"), *again]


@pytest.mark.parametrize("content_type", ["image/png", "application/octet-stream", "binary/octet-stream"])
async def test_a_redirect_within_what_is_allowed_is_followed_to_a_file_of_any_name(content_type: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        if request.path != "/files/b?c":
            raise web.HTTPMovedPermanently(
                {"/a.png": "d", "/d": f"//b.example:{site.server.port}/files/b%3Fc"}[request.path]
            )
        assert request.host.startswith("b.example")
        return web.Response(body=encoded(picture()), content_type=content_type)

    async with Site(handler) as site:
        assert (await read(site.url(), site.reader(domains=["files.example", "b.example"]))).size.width == 4


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"status": 404}, "answered 404"),
        ({"text": "<html>", "content_type": "text/html"}, "is 'text/html' by its Content-Type"),
        ({"body": b"x", "content_type": "image/png", "headers": {"Content-Encoding": "gzip"}}, "Content-Encoding"),
        ({"body": bytes(5001), "content_type": "image/png"}, "has 5001 bytes, the limit is 5000"),
        ({"body": b"GET", "content_type": "image/png"}, "is no picture"),
    ],
    ids=range(5),
)
async def test_an_answer_that_is_no_picture_or_too_long_is_refused(
    answer: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(limits.MAX_FILE_BYTES, "image", 5000)

    async def handler(_: web.Request) -> web.Response:
        return web.Response(**answer)

    async with Site(handler) as site:
        assert reason in await refusal(site.url(), site.reader())


async def test_a_server_that_sends_no_end_is_cut_off_by_size_and_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(limits.MAX_FILE_BYTES, "image", 100_000)
    sent = []

    async def endless(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "image/png"})
        await answer.prepare(request)
        while request.path == "/fast":
            await answer.write(bytes(10_000))
            sent.append(1)
        await asyncio.sleep(60)
        return answer

    async with Site(endless) as site:
        reading = site.reader()
        assert "has more than 100000 bytes" in await refusal(site.url("fast"), reading)
        monkeypatch.setattr(fetch, "FETCH_S", 0.05)
        assert "did not come from files.example" in await refusal(site.url("slow"), reading)
        assert reading._budget.num_bytes == 0


@pytest.mark.parametrize(
    "url", ["http://", "http://a:b@files.example/", "https://files.example:22/", "http://[", "http://" + "a" * 9000]
)
async def test_a_url_of_another_form_or_port_is_refused(url: str) -> None:
    assert await refusal(url, reader_of(fetcher=Fetcher(["*"])))


# ---- from this machine ----


async def test_a_file_is_read_by_its_path_from_the_folder_that_is_allowed_and_no_other(tmp_path: Path) -> None:
    folder, outside = tmp_path / "allowed", tmp_path / "allowed-not"
    for one in (folder, outside):
        one.mkdir()
        (one / "a.png").write_bytes(encoded(picture()))
    (folder / "link.png").symlink_to(outside / "a.png")
    (folder / "inner.png").symlink_to(folder / "a.png")
    os.mkfifo(folder / "pipe")
    reading = reader_of(local_path=str(folder))
    for path in (
        folder / "a.png",
        f"file://{folder}/a.png",
        "a.png",
        folder / "inner.png",
        f"file://localhost{folder}/a.png",
    ):
        assert (await read(str(path), reading)).size.width == 4
    for path in (f"file://{outside}/a.png", f"file://{folder}/../allowed-not/a.png", f"file://{folder}/link.png",
                 f"file://{folder}/%2e%2e/allowed-not/a.png", f"file://{folder}/pipe", f"file://{folder}",
                 "file:///dev/zero", f"file://elsewhere{folder}/a.png", f"file://{folder}/a.png%00"):  # fmt: skip
        assert "is no file under" in await refusal(path, reading) or "another host" in await refusal(path, reading)
    assert await refusal(str(outside / "a.png"), reading)


# ---- videos ----


@pytest.fixture(autouse=True, scope="module")
def _encoder() -> None:
    """Encode videos before there is a loop that would wait for it."""
    if importlib.util.find_spec("av") is not None:
        video_file()
        video_file(8)


@functools.cache
def video_file(
    num_frames: int = 30,
    fps: int = 10,
    size: tuple[int, int] = (64, 48),
    format_: str = "mp4",
    *,
    is_even: bool = True,
    is_live: bool = False,
) -> bytes:
    """Return a video. is_even: each frame is of one color. is_live: it was sent off before its length was known."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format_, options={"live": "1"} if is_live else {}) as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(num_frames):
            pixels = np.full((size[1], size[0], 3), i * 8, np.uint8)
            if not is_even:
                pixels[: size[1] // 2, : size[0] // 4] = 200
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


# What a matrix beside a video has its frames shown as: where a step to the right goes, and one down.
TURNS: dict[tuple[int, int, int, int], Callable[[np.ndarray], np.ndarray]] = {
    (1, 0, 0, 1): lambda frame: frame,
    (0, 1, -1, 0): lambda frame: np.rot90(frame, -1),  # a telephone held upright
    (-1, 0, 0, -1): lambda frame: np.rot90(frame, 2),
    (0, -1, 1, 0): lambda frame: np.rot90(frame),
    (-1, 0, 0, 1): lambda frame: frame[:, ::-1],
    (1, 0, 0, -1): lambda frame: frame[::-1],
    (0, 1, 1, 0): lambda frame: frame.swapaxes(0, 1),
}


@pytest.mark.parametrize("matrix", TURNS)
def test_a_video_is_upright_however_its_camera_was_held(matrix: tuple[int, int, int, int]) -> None:
    plain = bytearray(video_file(4, format_="mp4", is_even=False))
    start = plain.index(b"tkhd") + 44
    before = struct.unpack(">9i", plain[start : start + 36])
    assert before == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), "the matrix of a video that is shown as it is"
    a, b, c, d = (value << 16 for value in matrix)
    turned = bytes(plain[:start]) + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + bytes(plain[start + 36 :])
    wanted, found = (videos.decode(data, videos.read_header(data, {}), math.inf) for data in (bytes(plain), turned))
    assert len(found) == len(wanted)
    for frame, upright in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(upright, TURNS[matrix](frame))
    assert not np.array_equal(wanted[0], wanted[0][:, ::-1]) and not np.array_equal(wanted[0], wanted[0][::-1])


def test_a_recording_without_a_length_is_as_long_as_what_is_in_it() -> None:
    data, wanted = video_file(format_="matroska", is_live=True), video_file(format_="matroska")
    assert videos.read_header(data, {}) == videos.read_header(wanted, {})
    assert len(data) < len(wanted), "without an index"


async def test_two_frames_a_second_are_taken_of_a_video_from_its_first_to_its_last() -> None:
    media = await read(uri(video_file(), "video/mp4"), kind="video")
    assert isinstance(media, Video)
    assert media.frames.shape == (6, 48, 64, 3)
    assert media.times_s == (0.0, 0.6, 1.2, 1.7, 2.3, 2.9)
    levels = media.frames.mean((1, 2, 3))
    np.testing.assert_allclose(levels, [time * 80 for time in media.times_s], atol=4)


async def test_a_request_or_the_command_line_says_how_many_frames_are_taken() -> None:
    data = uri(video_file(), "video/mp4")
    assert (await read(data, kind="video", fps=5)).size.num_frames == 15
    assert (await read(data, kind="video", max_frames=4)).size.num_frames == 4
    assert (await read(f"video:3:{data.partition(',')[2]}", kind="video")).size.num_frames == 3
    reading = reader_of(mm_process_config='{"video": {"fps": 1}}')
    assert (await read(data, reading, "video")).size.num_frames == 3
    assert (await read(data, reading, "video", fps=4)).size.num_frames == 12


async def test_a_model_says_how_many_frames_it_was_made_for_unless_anybody_else_does() -> None:
    class Few(Seeing):
        video_frames: Mapping[str, int] = {"fps": 1, "max_frames": 2}

    few, data = reader_of(Few(context_length=1 << 20)), uri(video_file(), "video/mp4")
    assert (await read(data, few, "video")).size.num_frames == 2
    assert (await read(data, few, "video", max_frames=9)).size.num_frames == 3
    assert (await read(data, few, "video", num_frames=7)).size.num_frames == 7
    shown = [uri(encoded(picture(color=(i, i, i)))) for i in range(5)]
    assert (await read(shown, few, "video")).size.num_frames == 5


async def test_frames_are_made_smaller_where_there_would_be_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "MAX_PIXELS", 64 * 48)
    size = (await read(uri(video_file(), "video/mp4"), kind="video")).size
    assert 0.5 < size.num_frames * size.width * size.height / (64 * 48) <= 1


async def test_frames_may_come_one_by_one_without_a_library_for_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    frames = [encoded(picture(color=(i, i, i)), "JPEG") for i in (10, 20, 30)]
    in_one = "data:video/jpeg;base64," + ",".join(base64.b64encode(frame).decode() for frame in frames)
    for source in ([uri(frame, "image/jpeg") for frame in frames], in_one):
        media = await read(source, kind="video")
        assert isinstance(media, Video)
        assert media.frames[:, 0, 0, 0].tolist() == [10, 20, 30]
        assert media.times_s == (0.0, 0.5, 1.0)
    assert (await read([uri(frames[0])] * 999, kind="video")).size.num_frames == 768
    assert "frame 1 of 5 x 3 pixels" in await refusal([uri(frames[0]), uri(encoded(picture(5, 3)))], kind="video")
    assert "frame 1 that is no picture" in await refusal([uri(frames[0]), uri(b"x")], kind="video")
    assert "without frames" in await refusal([], kind="video")
    assert "pip install 'radixloop[video]'" in await refusal(uri(b"\0\0\0\x18ftyp", "video/mp4"), kind="video")


async def test_a_video_cut_or_changed_anywhere_is_read_or_refused_and_nothing_else() -> None:
    data, random = video_file(8), np.random.default_rng(0)
    refused = 0
    for turn in range(30):
        hostile = bytearray(data[: random.integers(12, len(data))] if turn % 2 else data)
        for place in random.integers(12, len(hostile), 20 if turn % 2 == 0 else 0):
            hostile[place] = random.integers(0, 256)
        try:
            await read(uri(bytes(hostile), "video/mp4"), kind="video")
        except InvalidRequest as error:
            assert error.field == PATH
            refused += 1
    assert refused >= 5


async def test_a_playlist_that_names_other_files_is_no_video() -> None:
    pytest.importorskip("av")
    for text in (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile /etc/passwd\n"):
        assert "is no video in MP4" in await refusal(uri(text, "video/mp4"), kind="video")


async def test_a_video_that_takes_too_long_is_refused() -> None:
    header = videos.read_header(video_file(), {})
    with pytest.raises(BrokenMedia, match="takes too long"):
        videos.decode(video_file(), header, deadline=0.0)


# ---- flags ----


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("limit_mm_per_prompt", '{"image": -1}'), ("limit_mm_per_prompt", '{"image": true}'),
        ("limit_mm_per_prompt", '{"picture": 1}'), ("limit_mm_per_prompt", "4"), ("limit_mm_per_prompt", "{"),
        ("mm_process_config", '{"image": 4}'), ("mm_process_config", '{"image": {"size": 4}}'),
        ("mm_process_config", '{"image": {"max_pixels": 0}}'),
        ("default_chat_template_kwargs", "{"), ("default_chat_template_kwargs", "true"),
        ("default_chat_template_kwargs", '{"messages": []}'),
    ],
)  # fmt: skip
def test_a_flag_that_is_wrong_is_named(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"--{flag.replace('_', '-')}"
    with pytest.raises(SystemExit):
        parse_args(["--model-path", "m", name, value])
    assert name in capsys.readouterr().err


def test_settings_are_the_requests_and_else_the_servers_which_bounds_pixels() -> None:
    assert MediaLimits().settings_of("image", {"max_pixels": 5}) == {"max_pixels": 5}
    limited = read_limits('{"image": {"count": 3}}', '{"image": {"max_pixels": 100, "min_pixels": 7}}', None, None)
    assert limited.counts == {"image": 3, "video": 4}
    assert read_limits("image=2,video=0", None, None, None).counts == {"image": 2, "video": 0}
    assert limited.settings_of("image", {}) == {"max_pixels": 100, "min_pixels": 7}
    assert limited.settings_of("image", {"max_pixels": 500, "min_pixels": 9}) == {"max_pixels": 100, "min_pixels": 9}
    assert limited.settings_of("image", {"max_pixels": 50})["max_pixels"] == 50
    assert limited.settings_of("video", {}) == {}
