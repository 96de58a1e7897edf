"""`GET /`: the page, one file with its style and its script. It loads no other file, and sends requests to this server
only."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from .endpoints import Endpoint
from .service import Service

_FILE = Path(__file__).with_name("page") / "index.html"


async def page(_service: Service, request: Request, _body: None) -> Response:
    """Gives the page, or 304 if the browser already has it."""
    content, headers = _page()
    if headers["ETag"] in request.headers.get("If-None-Match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type="text/html", headers=headers)


@functools.cache
def _page() -> tuple[bytes, dict[str, str]]:
    content = _FILE.read_bytes()
    return (
        content,
        {
            "Cache-Control": "no-cache",  # a browser must check each time whether its copy is current
            "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
            "Content-Security-Policy": "; ".join(
                [
                    "default-src 'none'",
                    f"script-src {_hash(content, 'script')}",
                    f"style-src {_hash(content, 'style')}",
                    "connect-src 'self'",
                    "img-src data:",  # the icon
                    "base-uri 'none'",
                    "form-action 'none'",
                    "frame-ancestors 'none'",
                    "require-trusted-types-for 'script'",  # this and the next make assigning to innerHTML an error
                    "trusted-types 'none'",
                ]
            ),
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        },
    )


def _hash(content: bytes, tag: str) -> str:
    """The CSP source expression that allows the page's own script or style element, and no other."""
    [inside] = re.findall(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), content, re.S)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"


# It needs no key: a browser sends none when it opens an address. The page asks for the key, and has no data of a model.
ENDPOINTS = [Endpoint("/", "GET", page, None, "A page to talk to the models", answer="text/html", is_open=True)]
