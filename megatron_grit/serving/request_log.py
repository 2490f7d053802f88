"""A line on standard error for each request, and its place in the metrics."""

from __future__ import annotations

import json
import logging
import sys
import time
import urllib.parse
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from megatron_grit.serving.metrics import Metrics
from megatron_grit.store.logs import get_logger

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOGGER = get_logger(__name__)


class RequestLog:
    """An ASGI application around another one: method, path, status, milliseconds, and tokens read and written.

    Args:
        app: the application. It may put ``usage`` into a request's state.
        as_json: JSON objects in place of text, without anything in front.
        metrics: count each request.
    """

    def __init__(self, app: ASGIApp, as_json: bool, metrics: Metrics) -> None:
        self._app, self._as_json, self._metrics = app, as_json, metrics
        self._lines = logging.Logger("requests")
        if as_json:
            self._lines.addHandler(logging.StreamHandler(sys.stderr))
        else:
            self._lines = LOGGER

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and log it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, status = time.monotonic(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            seconds, usage = time.monotonic() - started, scope.get("state", {}).get("usage")
            self._metrics.count(scope["path"], status, seconds, usage or {})
            facts = {
                "method": scope["method"],
                "path": urllib.parse.quote(scope["path"]),
                "status": status,
                "ms": round(1000 * seconds, 1),
                "tokens": None if usage is None else usage["total_tokens"],
            }
            self._lines.info("%s", self._line(facts))

    def _line(self, facts: dict[str, Any]) -> str:
        if self._as_json:
            return json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **facts})
        line = "{method} {path} {status} {ms} ms".format(**facts)
        return line if facts["tokens"] is None else f"{line}, {facts['tokens']} tokens"
