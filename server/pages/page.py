"""Serve a page of HTML with its styles and scripts inside, and let the browser run nothing else."""

import base64
import hashlib
import re
from pathlib import Path

from aiohttp import hdrs, web

FOLDER = Path(__file__).parent
STYLE = re.compile(r'<link rel="stylesheet" href="([\w.-]+)">')
SCRIPT = re.compile(r'<script src="([\w.-]+)"></script>')
# What a page shows may come from a model: no text of it may become markup (Trusted Types), and no script of it runs.
POLICY = (
    "default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)


class Page:
    """Hold one page as it is sent."""

    def __init__(self, name: str, folder: Path = FOLDER) -> None:
        """Read `name`, and the styles and scripts of its folder that it links to."""
        styles: list[str] = []
        scripts: list[str] = []

        def inlined(tag: str, digests: list[str], found: re.Match[str]) -> str:
            text = (folder / found[1]).read_text()
            digests.append(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
            return f"<{tag}>{text}</{tag}>"

        text = (folder / name).read_text()
        text = STYLE.sub(lambda found: inlined("style", styles, found), text)
        text = SCRIPT.sub(lambda found: inlined("script", scripts, found), text)
        self._body = text.encode()
        self._etag = hashlib.sha256(self._body).hexdigest()[:16]
        self._headers = {
            "Content-Security-Policy": POLICY.format(
                scripts=" ".join(scripts) or "'none'", styles=" ".join(styles) or "'none'"
            ),
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    def response(self, request: web.Request, vary: str = "") -> web.Response:
        """Return the page, or that the browser has it. vary: request headers that decided for it."""
        headers = self._headers | ({hdrs.VARY: vary} if vary else {})
        if any(tag.value == self._etag for tag in request.if_none_match or ()):
            response = web.Response(status=304, headers=headers)
        else:
            response = web.Response(body=self._body, content_type="text/html", charset="utf-8", headers=headers)
            response.enable_compression()
        response.etag = self._etag
        return response
