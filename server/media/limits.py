"""The limits of a request's pictures and videos, and the flags that set them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from engine.media import Kind  # which imports numpy: `--help` should not wait for that

KINDS: "tuple[Kind, ...]" = ("image", "video")
MAX_FILE_BYTES = {"image": 20 << 20, "video": 128 << 20}  # as encoded
MAX_PIXELS = 64_000_000  # of one picture
MAX_FRAME_PIXELS = 9_000_000  # of one frame of a video file: decoders keep many at once
MAX_TOTAL_PIXELS = 128_000_000  # of one request
DEFAULT_COUNTS = {"image": 64, "video": 4}  # of one request
MAX_COUNT = 1 << 10
MAX_FRAMES = 768  # taken of one video
READ_S = 30.0  # for all of one request
# How a picture is read, in SGLang's words; 512²: OpenAI's `detail: low`.
SETTINGS = ("min_pixels", "max_pixels", "min_dynamic_patch", "max_dynamic_patch", "fps", "max_frames", "num_frames")
MAX_SETTING = 1 << 30
LOW_DETAIL_PIXELS = 512 * 512
OLD_COUNT = re.compile(r"(\w+)=(\d{1,6})")  # vLLM's spelling before JSON: image=4,video=1
OLD_COUNTS = re.compile(rf"{OLD_COUNT.pattern}(,{OLD_COUNT.pattern})*")


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """Say what the command line allows."""

    counts: Mapping[str, int] = field(default_factory=lambda: DEFAULT_COUNTS)
    """Pictures and videos of one request, by kind."""
    settings: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Settings of requests that give none, by kind. `max_pixels` is also the most that a request may ask for."""
    domains: frozenset[str] = frozenset()
    """Hosts that files are fetched from; "*": all that are public."""
    local_path: str = ""
    """Folder of files that requests may name; empty: none."""

    def settings_of(self, kind: "Kind", asked: Mapping[str, int]) -> dict[str, int]:
        """Return the settings of one picture or video: those its request asks for, else the server's."""
        own = self.settings.get(kind, {})
        settings = {**own, **asked}
        if "max_pixels" in own:
            settings["max_pixels"] = min(settings["max_pixels"], own["max_pixels"])
        return settings


def read_limits(
    limit_mm_per_prompt: str | None, mm_process_config: str | None, domains: list[str] | None, local_path: str | None
) -> MediaLimits:
    """Read the values of the flags of those names. `ValueError` names the flag that is wrong."""
    return MediaLimits(
        DEFAULT_COUNTS | _counts("--limit-mm-per-prompt", limit_mm_per_prompt),
        _settings("--mm-process-config", mm_process_config),
        frozenset(domain.lower().rstrip(".") for domain in domains or ()),
        local_path or "",
    )


def _by_kind(flag: str, text: str | None, rule: str) -> dict[str, Any]:
    try:
        values = orjson.loads(text or "{}")
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{flag} must be {rule}: {error}") from None
    if not isinstance(values, dict) or values.keys() - {*KINDS, "audio"}:
        raise ValueError(f"{flag} must be {rule}, got {text}")
    return values


def _counts(flag: str, text: str | None) -> dict[str, int]:
    rule = 'a JSON object such as {"image": 4, "video": 1}'
    if text is not None and OLD_COUNTS.fullmatch(text):
        text = orjson.dumps({kind: int(count) for kind, count in OLD_COUNT.findall(text)}).decode()
    counts = {}
    for kind, value in _by_kind(flag, text, rule).items():
        count = value.get("count") if isinstance(value, dict) else value  # vLLM's longer form
        if type(count) is not int or not 0 <= count <= MAX_COUNT:
            raise ValueError(f"{flag} must be {rule} of numbers from 0 to {MAX_COUNT}, got {text}")
        counts[kind] = count
    return counts


def _settings(flag: str, text: str | None) -> dict[str, dict[str, int]]:
    rule = 'a JSON object such as {"image": {"max_pixels": 1048576}}'
    read = {}
    for kind, values in _by_kind(flag, text, rule).items():
        if not isinstance(values, dict) or values.keys() - {*SETTINGS}:
            raise ValueError(f"{flag} must be {rule}, of {', '.join(SETTINGS)}, got {text}")
        for name, value in values.items():
            if type(value) is not int or not 1 <= value <= MAX_SETTING:
                raise ValueError(f"{flag}: {kind}.{name} must be a whole number from 1 to {MAX_SETTING}, got {value}")
        read[kind] = values
    return read
