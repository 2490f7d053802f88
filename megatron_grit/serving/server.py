"""One process that serves a model over HTTP: embeddings and chat answers from the same weights.

Requests and responses have the form of OpenAI's API, so that its clients work: ``POST /v1/embeddings``,
``POST /v1/chat/completions``, ``POST /v1/completions``, ``GET /v1/models``, and ``GET /health``.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_grit.config.options import ServingLimits
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.model import GritModel
from megatron_grit.retrieval.reading import open_retriever
from megatron_grit.serving.fields import Json, error_body, read_body
from megatron_grit.serving.request_log import RequestLog
from megatron_grit.serving.service import Job, Service
from megatron_grit.store.logs import get_logger
from megatron_grit.training.checkpoint import resolve_checkpoint

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

LOGGER = get_logger(__name__)

MAX_BODY_BYTES = 4 * 2**20
BODY_SECONDS = 60.0
"""Time for a client to send a body."""
STOP_SECONDS = 30
"""Time for a request in progress when the server is asked to stop."""
_POLL_SECONDS = 0.2
_UNREAD_SECONDS, _MOST_UNREAD_BYTES = 1.0, 64 * 2**20
"""How much of a body that is too large is read and dropped after the refusal."""


class _Abandoned(Exception):
    """Nobody waits for the answer."""


def _endpoint(prepare: Callable[[Json], Job], turn: asyncio.Lock) -> Callable[[Request], Awaitable[Response]]:
    """A service's function as an endpoint. Requests are computed one at a time, first come, first served."""
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response

    async def endpoint(request: Request) -> Response:
        try:
            job = prepare(read_body(await _read(request)))
            async with turn:
                if await request.is_disconnected():  # gave up while it waited: nobody reads the answer
                    return Response(status_code=499)
                return await _compute(request, job)
        except (DataError, ConfigError) as error:
            return _failure(error, getattr(error, "status", 400))
        except (ClientDisconnect, _Abandoned):
            return Response(status_code=499)

    return endpoint


async def _compute(request: Request, job: Job) -> Response:
    """Do the work in a thread. It ends before its next forward pass when the client leaves or the server is stopped."""
    from starlette.responses import JSONResponse

    abandoned = threading.Event()

    def before_pass() -> None:
        if abandoned.is_set():
            raise _Abandoned

    work = asyncio.ensure_future(asyncio.to_thread(lambda: JSONResponse(_counted(request, job(before_pass)))))
    try:
        while not (await asyncio.wait({work}, timeout=_POLL_SECONDS))[0]:
            if not abandoned.is_set() and await request.is_disconnected():
                abandoned.set()
    except asyncio.CancelledError:
        abandoned.set()
        raise
    return work.result()


def _counted(request: Request, answer: Json) -> Json:
    """The answer; the request's log line gets its tokens."""
    request.state.num_tokens = answer["usage"]["total_tokens"]
    return answer


async def _read(request: Request) -> bytes:
    from starlette.exceptions import HTTPException

    message = f"the body is larger than {MAX_BODY_BYTES} bytes; send less at a time"
    too_large = HTTPException(413, message, headers={"Connection": "close"})
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        message = f"the body did not come within {BODY_SECONDS:g} s"
        raise HTTPException(408, message, headers={"Connection": "close"}) from None
    return bytes(body)


def _before_the_rest(response: Response) -> Any:
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


def _failure(error: Exception, status: int, headers: Any = None) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(error_body(error, status), status, headers)


def create_app(service: Service, *, log_json: bool = False) -> RequestLog:
    """The service as an ASGI application that logs a line for each request.

    Args:
        service: the endpoints.
        log_json: write the lines as JSON objects.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    turn = asyncio.Lock()

    async def models(request: Request) -> Response:
        return JSONResponse(service.models())

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def refused(request: Request, error: Any) -> Response:
        response = _failure(RuntimeError(error.detail), error.status_code, error.headers)
        return _before_the_rest(response) if error.status_code == 413 else response

    async def broken(request: Request, error: Exception) -> Response:
        return _failure(RuntimeError("internal error; the server's log says more"), 500)

    app = Starlette(
        routes=[
            Route("/v1/embeddings", _endpoint(service.embeddings, turn), methods=["POST"]),
            Route("/v1/chat/completions", _endpoint(service.chat, turn), methods=["POST"]),
            Route("/v1/completions", _endpoint(service.completions, turn), methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ],
        exception_handlers={HTTPException: refused, Exception: broken},
    )
    return RequestLog(app, log_json)


def serve(  # many: the options of a verb
    checkpoint: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    name: str | None = None,
    max_length: int = ServingLimits.max_length,
    max_new_tokens: int = ServingLimits.max_new_tokens,
    log_json: bool = False,
    chat_template: str | None = None,
    chat_date: str | None = None,
    retro_project: str | Path | None = None,
    retrieve_every: int | None = None,
) -> None:
    """Load a model and answer requests until SIGINT or SIGTERM.

    Args:
        checkpoint: checkpoint directory, or a run's output directory for its newest one.
        host: address or name to listen on. There is no authentication.
        port: 0 for a free one; the log says which.
        name: of the model in responses. None: the name of the checkpoint's directory.
        max_length: longest text to embed in tokens, template included; the rest is cut.
        max_new_tokens: longest answer in tokens.
        log_json: write a JSON object for each request, in place of a line of text.
        chat_template: as of :meth:`GritModel.load`.
        chat_date: as there.
        retro_project: retrieval database that chat answers read, by a model that was trained to.
        retrieve_every: as of :meth:`GritModel.read_from`.

    Raises:
        ConfigError: starlette or uvicorn is missing, the address cannot be used, or the model cannot read the database.
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'megatron-grit[serve]'") from error
    ServingLimits(max_length=max_length, max_new_tokens=max_new_tokens)  # before the model is loaded
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        try:  # before the model: an address in use is found at once. Until it listens, clients are refused.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from error
        retriever = None
        if retro_project is not None:
            retriever = open_retriever(retro_project, resolve_checkpoint(checkpoint), retrieve_every)
        model = GritModel.load(checkpoint, device=device, chat_template=chat_template, chat_date=chat_date)
        if retriever is not None:
            model.read_from(retriever, retrieve_every)
        name = name or Path(checkpoint).resolve().name
        service = Service(model, name, max_length=max_length, max_new_tokens=max_new_tokens)
        config = uvicorn.Config(
            create_app(service, log_json=log_json),
            lifespan="off",
            log_config=None,  # uvicorn's warnings and errors still reach standard error
            access_log=False,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        listener.listen()
        address, port = listener.getsockname()[:2]
        if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            LOGGER.warning("warning: everyone who can reach %s can use the model: there is no authentication", address)
        LOGGER.info("serving %s on http://%s:%d", name, f"[{address}]" if ":" in address else address, port)
        uvicorn.Server(config).run(sockets=[listener])
