"""Decode video files: first what the header says, then some frames. All of it blocks: call it in a thread."""

import importlib
import io
import itertools
import math
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from server.media.broken import BrokenMedia
from server.media.limits import MAX_FRAME_PIXELS, MAX_FRAMES, MAX_PIXELS

FPS = 2  # frames a second that are taken, unless a request says otherwise
NO_LIBRARY = "is a video file, which this server cannot read: pip install 'radixloop[video]' (PyAV)"
NO_VIDEO = "is no video in MP4, MOV, MKV, WEBM or AVI"
FRAMES_IN_FLIGHT = 20  # that a decoder keeps, at most
BYTES_A_PIXEL = 3  # of a decoder's frame, at most
Turn = Callable[[np.ndarray], np.ndarray]  # pixels [height, width, 3] -> the same, upright
MAX_FRAMES_READ = 1 << 16  # up to the last that is taken: half an hour


@dataclass(frozen=True, slots=True)
class Header:
    """Say which frames are taken of a video, and how large."""

    format: str
    width: int  # of a frame as it is taken, before it is turned upright
    height: int
    indices: tuple[int, ...]  # among all frames
    fps: float  # of all frames
    file_pixels: int  # of a frame in the file

    @property
    def times_s(self) -> tuple[float, ...]:
        return tuple(round(index / self.fps, 3) for index in self.indices)

    @property
    def working_bytes(self) -> int:
        """Bytes that the decoder needs beside the frames that are taken."""
        return self.file_pixels * BYTES_A_PIXEL * FRAMES_IN_FLIGHT


def read_header(data: bytes, settings: Mapping[str, int]) -> Header:
    """Read what a file says of its video, and choose frames. `BrokenMedia` if it is none, or too large."""
    av = _library()
    format_ = _format_of(data)
    try:
        with av.open(io.BytesIO(data), format=format_) as container:
            stream = _stream(container)
            width, height = stream.codec_context.width, stream.codec_context.height
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            num_frames = stream.frames or _count(container, stream, fps)
            if not num_frames:
                num_frames, fps = _count_packets(container, stream)
    except (av.FFmpegError, ValueError, ArithmeticError) as error:
        raise _broken(error) from None
    if not 0 < width * height <= MAX_FRAME_PIXELS:
        raise BrokenMedia(f"has frames of {width} x {height} pixels, the limit is {MAX_FRAME_PIXELS} in all")
    if not (math.isfinite(fps) and fps > 0 and num_frames > 0):
        raise BrokenMedia("is a video whose header does not say how long it is")
    indices = choose_frames(num_frames, fps, settings)
    if indices[-1] >= MAX_FRAMES_READ:
        raise BrokenMedia(f"has {num_frames} frames, the limit is {MAX_FRAMES_READ}")
    scale = math.sqrt(min(1.0, MAX_PIXELS / (len(indices) * width * height)))
    return Header(
        format_, max(1, int(width * scale)), max(1, int(height * scale)), indices, fps, file_pixels=width * height
    )


def choose_frames(num_frames: int, fps: float, settings: Mapping[str, int]) -> tuple[int, ...]:
    """Return the indices of the frames to take, evenly spread from the first to the last."""
    wanted = settings.get("num_frames") or round(num_frames / fps * settings.get("fps", FPS))
    limit = min(num_frames, settings.get("max_frames", MAX_FRAMES), MAX_FRAMES)
    return tuple(int(i) for i in np.linspace(0, num_frames - 1, max(1, min(wanted, limit))).round())


def decode(data: bytes, header: Header, deadline: float) -> np.ndarray:
    """Return the frames that the header chose, upright, uint8 [frames, height, width, 3].

    deadline: in time.monotonic() seconds. Where frames are missing at the end, the last one stands for them.
    """
    av = _library()
    frames, taken = np.empty(0, np.uint8), 0
    turn: Turn = _as_it_is
    try:
        with av.open(io.BytesIO(data), format=header.format) as container:
            for index, frame in enumerate(container.decode(_stream(container))):
                if time.monotonic() > deadline:
                    raise BrokenMedia("is a video that takes too long to decode")
                if frame.width * frame.height > MAX_FRAME_PIXELS:
                    raise BrokenMedia(f"has a frame of {frame.width} x {frame.height} pixels")
                while taken < len(header.indices) and header.indices[taken] == index:
                    pixels = frame.to_ndarray(format="rgb24", width=header.width, height=header.height)
                    if not taken:
                        turn = _turn_of(frame)
                        frames = np.empty((len(header.indices), *turn(pixels).shape), np.uint8)
                    frames[taken] = turn(pixels)
                    taken += 1
                if taken == len(header.indices):
                    break
    except (av.FFmpegError, ValueError, ArithmeticError) as error:
        if not taken:
            raise _broken(error) from None
    if not taken:
        raise BrokenMedia("is a video without a frame that can be decoded")
    frames[taken:] = frames[taken - 1]
    return frames


def _library() -> Any:
    try:
        return importlib.import_module("av")
    except ImportError:
        raise BrokenMedia(NO_LIBRARY) from None


def _format_of(data: bytes) -> str:
    """Return FFmpeg's name of the format, found by us: its own search includes formats that open other files."""
    if data[4:8] == b"ftyp":
        return "mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    raise BrokenMedia(NO_VIDEO if data else "is empty")


def _stream(container: Any) -> Any:
    if not container.streams.video:
        raise BrokenMedia("has no video in it")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise BrokenMedia("is a video in a code that cannot be read")
    stream.codec_context.thread_count = 1
    return stream


def _count(container: Any, stream: Any, fps: float) -> int:
    """Return the number of frames as the duration tells it."""
    if stream.duration is not None and stream.time_base is not None:
        return round(float(stream.duration * stream.time_base) * fps)
    return round((container.duration or 0) / 1e6 * fps)


def _count_packets(container: Any, stream: Any) -> tuple[int, float]:
    """Return the frames of a video and how many come in a second, where no header says: as browsers record them."""
    times = [
        packet.pts
        for packet in itertools.islice(container.demux(stream), MAX_FRAMES_READ + 1)
        if packet.pts is not None
    ]
    span_s = float((max(times) - min(times)) * stream.time_base) if times else 0.0
    return len(times), (len(times) - 1) / span_s if span_s else float(FPS)


def _turn_of(frame: Any) -> Turn:
    """Return what turns frames upright, by quarters, or as in a mirror, as a telephone notes beside them."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return _as_it_is
    # Where the axes of a frame go: what is right of a pixel to (a, b), what is below it to (c, d).
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    is_sideways = abs(b) > abs(a)
    across, down = (c, b) if is_sideways else (a, d)

    def turn(pixels: np.ndarray) -> np.ndarray:
        upright = pixels.swapaxes(0, 1) if is_sideways else pixels
        return upright[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]

    return turn


def _as_it_is(pixels: np.ndarray) -> np.ndarray:
    return pixels


def _broken(error: Exception) -> BrokenMedia:
    text = str(error)
    return BrokenMedia(f"is a broken video: {text[:100] if text.isprintable() else type(error).__name__}")


def frame_times(count: int, settings: Mapping[str, int]) -> tuple[float, ...]:
    """Return the times of frames that a request sent one by one."""
    return tuple(i / settings.get("fps", FPS) for i in range(count))


def sampled(frames: Sequence[str], settings: Mapping[str, int]) -> list[str]:
    """Return the frames to take of those that a request sent one by one."""
    limit = min(len(frames), settings.get("num_frames", MAX_FRAMES), settings.get("max_frames", MAX_FRAMES), MAX_FRAMES)
    return [frames[int(i)] for i in np.linspace(0, len(frames) - 1, max(1, limit)).round()]
