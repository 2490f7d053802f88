"""The page on which search and answers are tried: one file without anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path

_FILE = Path(__file__).with_name("page.html")


def page(name: str, needs_key: bool) -> tuple[str, dict[str, str]]:
    """The page and the headers of its response.

    The browser runs the page's own script and style, known by their digests, and lets it talk to this server alone.

    Args:
        name: of the model.
        needs_key: whether it asks for a key of the API.
    """
    text = _FILE.read_text(encoding="utf-8").replace("{{name}}", html.escape(name))
    text = text.replace("{{key}}", "" if needs_key else "hidden")
    policy = [
        "default-src 'none'",
        f"script-src '{_digest(text, 'script')}'",
        f"style-src '{_digest(text, 'style')}'",
        *("connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    ]
    return text, {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }


def _digest(text: str, element: str) -> str:
    """Of the element's content, as a content security policy names it."""
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
