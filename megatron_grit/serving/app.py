"""The endpoints over HTTP, as an ASGI application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_grit.errors import ConfigError, DataError
from megatron_grit.serving.access import Access
from megatron_grit.serving.bodies import before_the_rest, failure, read_content
from megatron_grit.serving.fields import Json, error_body, read_body
from megatron_grit.serving.metrics import CONTENT_TYPE, Metrics
from megatron_grit.serving.page import page
from megatron_grit.serving.request_log import RequestLog
from megatron_grit.serving.scheduler import Abandoned, Kind, Run, Scheduler
from megatron_grit.serving.service import Job, Service, Stream
from megatron_grit.store.logs import get_logger

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

LOGGER = get_logger(__name__)

_RETRY = {429: {"Retry-After": "1"}, 503: {"Connection": "close"}}
_BROKEN = "internal error; the server's log says more"


class _Events:
    """A response of server-sent events, as OpenAI's API streams answers.

    Args:
        first: chunk, which is computed: what fails before it has a status of its own.
        run: where the others come from.
        gone: done when the client has left.
        end: called at the end, however it comes.
        request: which is told of the tokens.
    """

    def __init__(
        self, first: Json, run: Run, gone: asyncio.Future[None], end: Callable[[], None], request: Request
    ) -> None:
        self._first, self._run, self._gone, self._end, self._request = first, run, gone, end, request

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            more, value = True, self._first
            while more:
                await send(_event(json.dumps(value, ensure_ascii=False)))
                more, value = await self._next()
            self._request.state.usage = value
            await send(_event("[DONE]") | {"more_body": False})
        except Abandoned:
            pass
        except Exception as error:
            known = isinstance(error, (DataError, ConfigError))
            if not known:
                LOGGER.exception("a stream has failed")
            told = error_body(
                error if known else RuntimeError(_BROKEN), getattr(error, "status", 400 if known else 500)
            )
            await send(_event(json.dumps(told)))
            await send(_event("[DONE]") | {"more_body": False})
        finally:
            self._end()

    async def _next(self) -> tuple[bool, Any]:
        return await self._run.next(self._gone)


def _event(data: str) -> Json:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}


def _endpoint(
    prepare: Callable[[Json], Job | Stream], kind: Kind, scheduler: Scheduler, most_bytes: int
) -> Callable[[Request], Awaitable[Any]]:
    """A service's function as an endpoint."""
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response

    async def endpoint(request: Request) -> Any:
        try:
            job = prepare(read_body(await read_content(request, most_bytes)))
            return await _answer(request, scheduler, kind, job)
        except (DataError, ConfigError) as error:
            status = getattr(error, "status", 400)
            return failure(error, status, _RETRY.get(status))
        except (ClientDisconnect, Abandoned):
            return Response(status_code=499)

    return endpoint


async def _answer(request: Request, scheduler: Scheduler, kind: Kind, job: Job | Stream) -> Any:
    """Compute a response, or the first chunk of one. The work ends before its next forward pass when the client leaves,
    the time is over or the server is stopped."""
    from starlette.responses import Response

    gone = asyncio.ensure_future(_left(request))
    run: Run | None = None
    streams = False

    def end() -> None:
        gone.cancel()
        if run is not None:
            scheduler.abandon(kind, run)

    try:
        await asyncio.sleep(0)
        if gone.done():  # nothing is computed for a client that left already
            raise Abandoned
        run = scheduler.start(kind, job.chunks if isinstance(job, Stream) else _as_one(job))
        _, value = await run.next(gone)
        if isinstance(job, Stream):
            streams = True
            return _Events(value, run, gone, end, request)
        request.state.usage, content = value
        return Response(content, media_type="application/json")
    finally:
        if not streams:
            end()


def _as_one(job: Job) -> Any:
    """A job as work that yields its response, already as bytes: a large one takes its time."""

    def work(before_pass: Callable[[], None]) -> Any:
        answer = job(before_pass)
        yield answer["usage"], json.dumps(answer, ensure_ascii=False, allow_nan=False).encode()

    return work


async def _left(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(
    service: Service, *, log_json: bool = False, keys: Sequence[bytes] = (), scheduler: Scheduler | None = None
) -> RequestLog:
    """The service as an ASGI application that logs a line for each request.

    Args:
        service: the endpoints.
        log_json: write the lines as JSON objects.
        keys: of the API. None: no key is needed.
        scheduler: of the service's limits. None: one of its own.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse
    from starlette.routing import Route

    scheduler = scheduler or Scheduler(service.limits)
    html, headers = page(service.name, bool(keys))

    async def start(request: Request) -> Response:
        return HTMLResponse(html, headers=headers)

    async def models(request: Request) -> Response:
        return JSONResponse(service.models())

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "stopping"}, 503) if scheduler.stopping else JSONResponse({"status": "ok"})

    async def numbers(request: Request) -> Response:
        return PlainTextResponse(metrics.text(scheduler), media_type=CONTENT_TYPE)

    async def refused(request: Request, error: Any) -> Any:
        response = failure(RuntimeError(error.detail), error.status_code, error.headers)
        return before_the_rest(response) if error.status_code == 413 else response

    async def broken(request: Request, error: Exception) -> Response:
        return failure(RuntimeError(_BROKEN), 500)

    works: dict[str, tuple[Callable[[Json], Any], Kind]] = {
        "/v1/embeddings": (service.embeddings, "embed"),
        "/v1/rerank": (service.rerank, "embed"),
        "/v1/chat/completions": (service.chat, "generate"),
        "/v1/completions": (service.completions, "generate"),
    }
    most_bytes = service.limits.max_body_bytes
    routes = [
        Route(path, _endpoint(prepare, kind, scheduler, most_bytes), methods=["POST"])
        for path, (prepare, kind) in works.items()
    ]
    looks = {"/": start, "/v1/models": models, "/health": health, "/metrics": numbers}
    metrics = Metrics({*works, *looks})
    app = Starlette(
        routes=[*routes, *(Route(path, look) for path, look in looks.items())],
        exception_handlers={HTTPException: refused, Exception: broken},
    )
    return RequestLog(Access(app, keys), log_json, metrics)
