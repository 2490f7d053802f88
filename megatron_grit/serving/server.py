"""One process that serves a model over HTTP: embeddings and chat answers from the same weights.

Requests and responses have the form of OpenAI's API, so that its clients work: ``POST /v1/embeddings``,
``POST /v1/chat/completions``, ``GET /v1/models``, and ``GET /health``.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_grit.data.text.records import read_messages
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.inference.generate import generate_tokens
from megatron_grit.inference.model import GritModel
from megatron_grit.store.logs import get_logger

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

LOGGER = get_logger(__name__)
Json = dict[str, Any]
Job = Callable[[], Json]

MAX_BODY_BYTES = 4 * 2**20
MAX_TEXTS = 2048
MIN_TEMPERATURE = 0.01
"""Logits divided by a smaller temperature may overflow fp32."""
STOP_SECONDS = 30
"""Time for a request in progress when the server is asked to stop."""


class Service:
    """The endpoints without HTTP: each checks the body of a request and returns the remaining work as a function.

    Args:
        name: what the model is called in responses.
        max_length: longest text to embed, in tokens, instruction included; the rest is cut off.
        max_new_tokens: largest ``max_tokens`` of an answer, and its default.
    """

    def __init__(self, model: GritModel, name: str, *, max_length: int = 512, max_new_tokens: int = 512) -> None:
        self.model, self.name, self.max_length, self.max_new_tokens = model, name, max_length, max_new_tokens
        self.created = int(time.time())

    def embeddings(self, body: Json) -> Job:
        """Embed ``input``, a text or a list of them.

        Raises:
            DataError: at once or in the job, for a body that cannot be used.
        """
        given = body.get("input")
        texts: list[Any] = given if isinstance(given, list) else [given]
        if len(texts) > MAX_TEXTS:
            raise DataError(f"input holds {len(texts)} texts; send at most {MAX_TEXTS} at a time")
        for text in texts:
            _check_text(text, "input must be a string or a list of strings")
        instruction = body.get("instruction", "")
        if instruction is not None:
            _check_text(instruction, "instruction must be a string, or null for the bare text")
        side = body.get("side")
        if side not in ("query", "passage", None):
            raise DataError("side must be query or passage")
        encoding = body.get("encoding_format") or "float"
        if encoding not in ("float", "base64"):
            raise DataError("encoding_format must be float or base64")

        def job() -> Json:
            vectors = self.model.encode(texts, instruction, side=side, max_length=self.max_length, progress=False)
            ids = self.model.embedding_tokens(texts, instruction, side=side, max_length=self.max_length)
            num_tokens = sum(len(head) + len(tail) for head, tail in ids)
            rows = vectors.tolist()
            if encoding == "base64":
                rows = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
            data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
            usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
            return {"object": "list", "data": data, "model": self.name, "usage": usage}

        return job

    def chat(self, body: Json) -> Job:
        """Answer the conversation ``messages``.

        Raises:
            DataError: at once or in the job, for a body that cannot be used.
        """
        if body.get("stream"):
            raise DataError("stream is not supported; leave it out, and the answer comes whole")
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise DataError('messages must be a list of {"role": ..., "content": ...}')
        for number, message in enumerate(messages):
            _check_text(message.get("content"), f"content of message {number} must be a string")
        turns = read_messages(messages)
        # max_completion_tokens is OpenAI's newer name and takes precedence.
        length = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
        asked = _number(body, length, None, 1, self.max_new_tokens, int)
        temperature = _number(body, "temperature", 0.0, 0.0, 2.0)
        if 0 < temperature < MIN_TEMPERATURE:
            raise DataError(f"temperature must be 0 or at least {MIN_TEMPERATURE}")
        top_p = _number(body, "top_p", 1.0, 0.0, 1.0)
        seed = _number(body, "seed", 0, 0, 2**63 - 1, int)

        def job() -> Json:
            tokenizer, context = self.model.tokenizer, self.model.config.model.max_position_embeddings
            prompt = self.model.prompt_tokens(turns)
            room = context - len(prompt)
            if room < (asked or 1):
                raise DataError(
                    f"the conversation has {len(prompt)} tokens and {length} is {asked or 1}, "
                    f"more than the {context} that the model takes; shorten it"
                )
            # Not model.generate: usage and finish_reason are counted in tokens.
            num_new = asked or min(self.max_new_tokens, room)
            (answer,) = generate_tokens(
                self.model.model,
                [prompt],
                max_new_tokens=num_new,
                stop_ids=self.model.chat.end_ids,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            )
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": tokenizer.decode(answer)},
                "finish_reason": "length" if len(answer) == num_new else "stop",
            }
            usage = {"prompt_tokens": len(prompt), "completion_tokens": len(answer)}
            usage["total_tokens"] = len(prompt) + len(answer)
            head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time())}
            return head | {"model": self.name, "choices": [choice], "usage": usage}

        return job


def create_app(service: Service) -> Starlette:
    """The service as an ASGI application."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    turn = asyncio.Lock()  # first come, first served

    def failure(status: int, message: str) -> Response:
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": message, "type": kind}}, status)

    def post(prepare: Callable[[Json], Job]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            try:
                job = prepare(_parse(await read(request)))
                async with turn:
                    if await request.is_disconnected():  # gave up while it waited: nobody reads the answer
                        return Response(status_code=499)
                    return await run_in_threadpool(lambda: JSONResponse(job()))
            except DataError as error:
                return failure(400, str(error))
            except ClientDisconnect:
                return Response(status_code=499)

        return endpoint

    async def read(request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send less at a time")
        return bytes(body)

    async def models(request: Request) -> Response:
        entry = {"id": service.name, "object": "model", "created": service.created, "owned_by": "megatron_grit"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def refused(request: Request, error: Any) -> Response:
        return failure(error.status_code, error.detail)

    async def broken(request: Request, error: Exception) -> Response:
        return failure(500, "internal error; the server's log says more")

    return Starlette(
        routes=[
            Route("/v1/embeddings", post(service.embeddings), methods=["POST"]),
            Route("/v1/chat/completions", post(service.chat), methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ],
        exception_handlers={HTTPException: refused, Exception: broken},
    )


def serve(  # many: the options of a verb
    checkpoint: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    name: str | None = None,
    max_length: int = 512,
    max_new_tokens: int = 512,
    chat_template: str | None = None,
) -> None:
    """Load a model and answer requests until SIGINT or SIGTERM.

    Args:
        checkpoint: checkpoint directory, or a run's output directory for its newest one.
        host: address or name to listen on. There is no authentication.
        port: 0 for a free one; the log says which.
        name: of the model in responses. None: the name of the checkpoint's directory.
        max_length: longest text to embed in tokens, template included; the rest is cut.
        max_new_tokens: longest answer in tokens.
        chat_template: as of :meth:`GritModel.load`.

    Raises:
        ConfigError: starlette or uvicorn is missing, or the address cannot be used.
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'megatron-grit[serve]'") from error
    if min(max_length, max_new_tokens) < 1:
        raise ConfigError("max_length and max_new_tokens must be at least 1")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        try:  # before the model: an address in use is found at once. Until it listens, clients are refused.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from error
        model = GritModel.load(checkpoint, device=device, chat_template=chat_template)
        name = name or Path(checkpoint).resolve().name
        service = Service(model, name, max_length=max_length, max_new_tokens=max_new_tokens)
        config = uvicorn.Config(
            create_app(service),
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


def _parse(body: bytes) -> Json:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError("the body must be a JSON object")
    return value


def _check_text(value: Any, message: str) -> None:
    if not isinstance(value, str):
        raise DataError(message)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; no tokenizer takes it
        raise DataError(f"{message}; it holds half of a surrogate pair") from error


def _number(body: Json, key: str, default: Any, low: float, high: float, kind: type = float) -> Any:
    """``body[key]`` if it is a number in the range, ``default`` where it is absent or null."""
    value = body.get(key)
    if value is None:
        return default
    is_number = isinstance(value, int | kind) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # NaN is in no range
        raise DataError(f"{key} must be {'an integer' if kind is int else 'a number'} from {low} to {high}")
    return value
