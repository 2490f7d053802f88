"""Who may use the server: keys of an API, compared in constant time; without keys, no pages of other sites."""

from __future__ import annotations

import hmac
import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from megatron_grit.errors import ConfigError
from megatron_grit.serving.bodies import before_the_rest, failure
from megatron_grit.serving.fields import RequestError
from megatron_grit.store.environment import is_loopback

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import ASGIApp, Receive, Scope, Send

VARIABLE = "MEGATRON_GRIT_API_KEY"
"""Environment variable of a key."""
OPEN = {"/", "/health"}
"""Paths that need no key: the page, which asks for one, and what a load balancer looks at."""
_LEAST = 8
_ELSEWHERE = (
    "a server without API keys answers no page of another site, and at a loopback address only where Host is localhost "
    "or an address; give it keys, or let the proxy in front set Host"
)


def read_keys(path: str | Path | None) -> list[bytes]:
    """The keys of a file, one a line, or of the environment. None at all: everyone may use the server.

    Raises:
        ConfigError: the file cannot be read or holds no key, or a key is short or not printable ASCII. It tells no key.
    """
    if path is None:
        given, where = ([os.environ[VARIABLE]] if VARIABLE in os.environ else []), VARIABLE
    else:
        where = str(path)
        try:
            given = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigError(f"the API keys of {where} cannot be read: {why}") from None
    keys = [line.strip() for line in given if line.strip()]
    if given and not keys or path is not None and not keys:
        raise ConfigError(f"{where} holds no API key; put one into it, or leave it out")
    for number, key in enumerate(keys, 1):
        if len(key) < _LEAST or not (key.isascii() and key.isprintable()) or " " in key:
            raise ConfigError(f"API key {number} of {where} must be {_LEAST} printable ASCII characters or more")
    return [key.encode() for key in keys]


class Access:
    """An ASGI application in front of another one, for which a request needs a key: ``Authorization: Bearer KEY``.

    Where no key is needed, a page that somebody visits could use a server on that machine through the browser. Requests
    of such pages are refused: those that browsers say come from another origin, and at a loopback address those for a
    name that is not this machine's, which a page can have led here (DNS rebinding).

    Args:
        app: the application.
        keys: each of them is good. None: no key is needed.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[bytes]) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it before its body is read."""
        response: Any = None
        if scope["type"] == "http" and self._keys and scope["path"] not in OPEN and not self._knows(scope["headers"]):
            error = RequestError("the API key is missing or wrong", None, status=401, code="invalid_api_key")
            response = failure(error, 401, {"WWW-Authenticate": "Bearer", "Connection": "close"})
        elif scope["type"] == "http" and not self._keys and _of_another_site(scope):
            error = RequestError(_ELSEWHERE, None, status=403)
            response = failure(error, 403, {"Connection": "close"})
        if response is not None:
            return await before_the_rest(response)(scope, receive, send)
        await self._app(scope, receive, send)

    def _knows(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        # All are compared, so that the time tells nothing of which one was close.
        matches = [hmac.compare_digest(key.strip(), each) for each in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


def _of_another_site(scope: Scope) -> bool:
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    host = headers.get(b"host", "")
    if b"origin" in headers and urlsplit(headers[b"origin"]).netloc != host:
        return True
    name = urlsplit(f"//{host}").hostname or ""
    return is_loopback((scope.get("server") or [""])[0]) and not (
        name == "localhost" or name.endswith(".localhost") or _is_address(name)
    )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
