"""The playground: one page, and the headers that keep it to itself."""

import base64
import hashlib
import re
from pathlib import Path

FILE = Path(__file__).with_name("playground.html")


def playground() -> tuple[bytes, dict[str, str]]:
    """The page and its headers: it runs its own script and style only, and talks to nobody but this server."""
    body = FILE.read_bytes()
    policy = (
        f"default-src 'none'; script-src {_hash(body, b'script')}; style-src {_hash(body, b'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return body, {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        # With no-referrer a browser may send `Origin: null`, by which the gate would refuse the page's own requests.
        "Referrer-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }


def _hash(body: bytes, tag: bytes) -> str:
    """The source expression that allows the one element of this name, and no other."""
    (text,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), body, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
