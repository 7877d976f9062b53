"""Fetch one wheel from a package index, without pip: a virtual environment need not have it.

The index is the one that pip or uv would ask (their environment variables, pip's configuration files), PyPI by default.
Its answer is the simple API's, in JSON or HTML (PEP 503 and 691), and the file's SHA-256 must be the one it states.
"""

import base64
import configparser
import hashlib
import json
import os
import ssl
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit

PYPI = "https://pypi.org/simple"
INDEX_VARIABLES = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
EXTRA_VARIABLES = ("PIP_EXTRA_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL")
CONFIG_SECTIONS = ("download", "install", "global")
ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
TIMEOUT_S = 30.0  # without a byte
MAX_PAGE_BYTES = 16 << 20
CHUNK_BYTES = 1 << 20


class WheelNotFound(Exception):
    """No index has the wheel; says what each has answered."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """A file that an index lists."""

    name: str
    url: str
    sha256: str


def fetch_wheel(
    package: str, version: str, folder: Path, environ: Mapping[str, str], advance: Callable[[int], None]
) -> Path:
    """Download the wheel of `package` into `folder`, check it, and return its path. Calls advance(bytes) as it goes.

    Raises `WheelNotFound`, or `OSError` if it cannot be written.
    """
    options = read_options(environ)
    reasons = []
    for index in index_urls(environ, options):
        page = f"{index.rstrip('/')}/{package}/"
        try:
            wheel = find_wheel(page, package, version, options.get("cert"))
            return _download(wheel, folder, options.get("cert"), advance)
        except (WheelNotFound, HTTPException, ValueError) as error:
            reasons.append(f"{without_login(page)}: {error or type(error).__name__}")
        except OSError as error:  # urllib's are, too
            if error.filename is not None and str(error.filename).startswith(str(folder)):
                raise
            reasons.append(f"{without_login(page)}: {getattr(error, 'reason', None) or error}")
    raise WheelNotFound("; ".join(reasons))


def index_urls(environ: Mapping[str, str], options: Mapping[str, str]) -> list[str]:
    """Return the indexes to ask, in order."""
    first = next((environ[name] for name in INDEX_VARIABLES if environ.get(name)), options.get("index-url", PYPI))
    extra = [url for name in EXTRA_VARIABLES for url in environ.get(name, "").split()]
    return [first, *(extra or options.get("extra-index-url", "").split())]


def read_options(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what pip's configuration files and variables say of the index: `index-url`, `extra-index-url`, `cert`."""
    home = Path(environ.get("HOME", "~")).expanduser()
    files = [
        Path("/etc/pip.conf"), Path("/etc/xdg/pip/pip.conf"), home / ".pip" / "pip.conf",
        Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf", Path(sys.prefix) / "pip.conf",
    ]  # fmt: skip
    if environ.get("PIP_CONFIG_FILE"):
        files.append(Path(environ["PIP_CONFIG_FILE"]))
    options: dict[str, str] = {}
    for file in files:
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue  # pip's to complain about
        for section in reversed(CONFIG_SECTIONS):
            if parser.has_section(section):
                options |= parser.items(section)
    if environ.get("PIP_CERT"):
        options["cert"] = environ["PIP_CERT"]
    return options


def find_wheel(page: str, package: str, version: str, cert: str | None) -> Wheel:
    """Return the wheel that an index's page of a package lists. Raises `WheelNotFound`."""
    with _opened(page, cert) as answer:
        text, kind, base = answer.read(MAX_PAGE_BYTES), answer.headers.get_content_type(), answer.geturl()
    listed = _in_json(text, base) if kind.endswith("json") else _in_html(text, base)
    prefix = f"{package.replace('-', '_')}-{version}-"
    for wheel in listed:
        if wheel.name.startswith(prefix) and wheel.name.endswith(".whl"):
            if not wheel.sha256:
                raise WheelNotFound(f"{wheel.name} is listed without a SHA-256")
            return wheel
    raise WheelNotFound(f"{prefix}*.whl is not listed")


def without_login(url: str) -> str:
    """Return the URL without the name and password that it may have."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _in_json(text: bytes, base: str) -> list[Wheel]:
    files: list[dict[str, Any]] = json.loads(text).get("files", [])
    return [
        Wheel(str(one["filename"]), urljoin(base, one["url"]), str(one.get("hashes", {}).get("sha256", "")))
        for one in files
    ]


def _in_html(text: bytes, base: str) -> list[Wheel]:
    links = _Links()
    links.feed(text.decode(errors="replace"))
    wheels = []
    for href in links.found:
        url, fragment = urldefrag(urljoin(base, href))
        name = unquote(urlsplit(url).path.rpartition("/")[2])
        wheels.append(Wheel(name, url, fragment.partition("sha256=")[2].partition("&")[0]))
    return wheels


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def _download(wheel: Wheel, folder: Path, cert: str | None, advance: Callable[[int], None]) -> Path:
    path, digest = folder / "download.whl", hashlib.sha256()
    with _opened(wheel.url, cert) as answer, open(path, "wb") as file:
        while chunk := answer.read(CHUNK_BYTES):
            digest.update(chunk)
            try:
                file.write(chunk)
            except OSError as error:  # a full disk: told apart from the network's failures by the name
                raise OSError(error.errno, error.strerror, str(path)) from error
            advance(len(chunk))
    if digest.hexdigest() != wheel.sha256.lower():
        raise WheelNotFound(f"{wheel.name} has SHA-256 {digest.hexdigest()}, the index says {wheel.sha256}")
    return path


@contextmanager
def _opened(url: str, cert: str | None) -> Iterator[Any]:
    """Open a URL, with the name and password that it may have; they are not sent on where it redirects to."""
    request = urllib.request.Request(without_login(url), headers={"Accept": ACCEPT, "User-Agent": "radixloop"})
    login = urlsplit(url).netloc.rpartition("@")[0]
    if login:
        token = base64.b64encode(unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    context = None
    if cert and os.path.exists(cert):
        context = ssl.create_default_context(cafile=cert)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context) as answer:
        yield answer
