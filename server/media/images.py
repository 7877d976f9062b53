"""Decode picture files: first what the header says, then pixels. All of it blocks: call it in a thread."""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import PIL
from PIL import BmpImagePlugin, ExifTags, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from server.media.broken import BrokenMedia
from server.media.limits import MAX_PIXELS

# Each plugin registers itself when it is imported; Pillow's own search would import, and try, some seventy.
PLUGINS = (BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin)
MAGIC = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF", b"BM": "BMP"}
# What Pillow's readers raise for files that are not as they should be.
BROKEN = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, NotImplementedError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
NO_PICTURE = "is no picture in JPEG, PNG, WEBP, GIF or BMP"
BYTES_A_PIXEL = 8  # while a picture is decoded, at most: Pillow's pixels, and turned or as an array
MAX_SCANNED_PIXELS = 1 << 30  # of a JPEG: its pixels times its scans, each of which goes over all of them
BAND = 1 << 18  # pixels that are converted at once: the interpreter is held for less than a millisecond
# How the camera was held, by EXIF's number.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)
WIDE_MODES = ("I", "I;16", "I;16B")  # Pillow's, of gray in 16 bits
MAX_READS = 1 << 16  # of a file: Pillow's own loops go piece by piece, and hold the interpreter meanwhile


@dataclass(frozen=True, slots=True)
class Header:
    """Say how large a picture is once it stands upright."""

    format: str
    width: int
    height: int
    orientation: int = 1

    @property
    def num_pixels(self) -> int:
        return self.width * self.height


def read_header(data: bytes) -> Header:
    """Read what a file says of its picture. `BrokenMedia` if it is none, or has too many pixels to be decoded."""
    format_ = _format_of(data)
    if format_ == "WEBP":
        _check_size(*_webp_size(data))  # before Pillow opens it, which makes room for all its pixels
    try:
        with _opened(data, format_) as image:
            width, height = image.size
            _check_size(width, height)
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Image.DecompressionBombError:  # Pillow's own limit, which is beyond ours
        raise BrokenMedia(f"has more than {MAX_PIXELS} pixels, the limit") from None
    except BROKEN as error:
        raise BrokenMedia(f"is a broken {format_}: {_reason(error)}") from None
    if format_ == "JPEG":
        num_scans = data.count(b"\xff\xda")
        if num_scans * width * height > MAX_SCANNED_PIXELS:
            raise BrokenMedia(f"is a JPEG of {width} x {height} pixels in {num_scans} scans, too many to be decoded")
    if orientation in SIDEWAYS:
        width, height = height, width
    return Header(format_, width, height, orientation if orientation in TURNS else 1)


def decode(data: bytes, header: Header) -> np.ndarray:
    """Return the pixels, uint8 [height, width, 3]: upright, the first frame, on white where they are transparent."""
    try:
        with _opened(data, header.format) as image:
            image.load()
            upright = image.transpose(TURNS[header.orientation]) if header.orientation != 1 else image
            if upright.size != (header.width, header.height):
                raise BrokenMedia(
                    f"is a broken {header.format}: its header says {header.width} x {header.height} pixels, "
                    f"it has {upright.width} x {upright.height}"
                )
            return _as_array(upright)
    except BROKEN as error:
        raise BrokenMedia(f"is a broken {header.format}: {_reason(error)}") from None


def _format_of(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    for magic, format_ in MAGIC.items():
        if data.startswith(magic):
            return format_
    raise BrokenMedia(NO_PICTURE if data else "is empty")


class _Pieces(io.BytesIO):
    """A file that can be read in so many pieces: a PNG of a million empty chunks costs no more than others."""

    num_reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.num_reads += 1
        if self.num_reads > MAX_READS:
            raise OSError(f"it is in more than {MAX_READS} pieces")
        return super().read(size)


def _opened(data: bytes, format_: str) -> Image.Image:
    return Image.open(_Pieces(data), formats=(format_,))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BrokenMedia(f"has {width} x {height} pixels, the limit is {MAX_PIXELS} in all")
    if not width * height:
        raise BrokenMedia(f"has {width} x {height} pixels")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return width and height as the first chunk of a WEBP has them."""
    kind, body = data[12:16], data[20:30]
    if len(body) == 10 and kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if len(body) == 10 and kind == b"VP8 ":
        width, height = struct.unpack("<HH", body[6:10])
        return width & 0x3FFF, height & 0x3FFF
    if len(body) == 10 and kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise BrokenMedia("is a broken WEBP: its first chunk is no picture")


def _as_array(image: Image.Image) -> np.ndarray:
    """Return the pixels as RGB in an array that owns them, made band by band."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    is_transparent = image.has_transparency_data
    band = max(1, BAND // width)
    for top in range(0, height, band):
        part = image.crop((0, top, width, min(top + band, height)))
        if part.mode in WIDE_MODES:  # Pillow would take all above 255 for white
            part = Image.fromarray((np.asarray(part) >> 8).astype(np.uint8))
        if is_transparent:
            part = part.convert("RGBA")
            part = Image.alpha_composite(Image.new("RGBA", part.size, "white"), part)
        pixels[top : top + band] = np.asarray(part.convert("RGB"))
    return pixels


def _reason(error: BaseException) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):  # its text shows our object
        return "its header makes no sense"
    text = str(error)
    return text[:100] if text and text.isprintable() else type(error).__name__
