"""Bodies of requests, which may be too large or never end, and responses to what failed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from megatron_grit.serving.fields import error_body

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

BODY_SECONDS = 60.0
"""Time for a client to send a body."""
_UNREAD_SECONDS, _MOST_UNREAD_BYTES = 1.0, 64 * 2**20
"""How much of a body that is too large is read and dropped after the refusal."""


async def read_content(request: Request, most_bytes: int) -> bytes:
    """A request's body.

    Raises:
        HTTPException: it is larger than ``most_bytes``, or does not come in time.
    """
    from starlette.exceptions import HTTPException

    message = f"the body is larger than {most_bytes} bytes; send less at a time"
    too_large = HTTPException(413, message, headers={"Connection": "close"})
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > most_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most_bytes:
                    raise too_large
    except TimeoutError:
        message = f"the body did not come within {BODY_SECONDS:g} s"
        raise HTTPException(408, message, headers={"Connection": "close"}) from None
    return bytes(body)


def before_the_rest(response: Response) -> Any:
    """An ASGI application that answers a request whose body has not come whole, and then reads on for a moment: a
    connection that is closed with bytes unread is reset, and a client that is still sending never sees the answer."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        async def send_open(message: Any) -> None:
            await send(message | {"more_body": True} if message["type"] == "http.response.body" else message)

        await response(scope, receive, send_open)
        # A client that waits for "100 Continue" sends nothing more, and reading on would send it that.
        left = 0 if any(name == b"expect" for name, _ in scope["headers"]) else _MOST_UNREAD_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(_UNREAD_SECONDS):
                while left > 0:
                    message = await receive()
                    left = left - len(message.get("body", b"")) if message.get("more_body") else 0
        await send({"type": "http.response.body", "body": b""})

    return answer


def failure(error: Exception, status: int, headers: Mapping[str, str] | None = None) -> Response:
    """The response to what failed, in the form of OpenAI's API."""
    from starlette.responses import JSONResponse

    return JSONResponse(error_body(error, status), status, headers)
