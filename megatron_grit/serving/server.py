"""One process that serves a model over HTTP: embeddings and answers from the same weights.

Requests and responses have the form of OpenAI's API, so that its clients work.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_grit.compat import needed
from megatron_grit.config.options import ServingLimits
from megatron_grit.errors import ConfigError
from megatron_grit.inference.model import GritModel
from megatron_grit.retrieval.reading import open_retriever
from megatron_grit.serving.access import VARIABLE, read_keys
from megatron_grit.serving.app import create_app
from megatron_grit.serving.scheduler import Scheduler
from megatron_grit.serving.service import Service
from megatron_grit.store.environment import is_loopback
from megatron_grit.store.logs import get_logger
from megatron_grit.training.checkpoint import resolve_checkpoint

if TYPE_CHECKING:
    import uvicorn

LOGGER = get_logger(__name__)

STOP_SECONDS = 30.0
"""Time for requests that were accepted when the server is asked to stop."""
_SEND_SECONDS = 5
"""Time to send responses to their ends after it."""


def stopping_server(config: uvicorn.Config, scheduler: Scheduler) -> uvicorn.Server:
    """A server that, when asked to stop, refuses new requests, listens until those that it has accepted are done or
    their time is over, and then stops. Asked a second time it stops at once.

    Args:
        config: of the server.
        scheduler: has its requests.
    """
    import uvicorn

    class Stopping(uvicorn.Server):
        asked_by: int | None = None
        until = 0.0

        def handle_exit(self, sig: int, frame: Any) -> None:
            if self.asked_by is not None:
                return super().handle_exit(sig, frame)
            scheduler.stopping, self.asked_by, self.until = True, sig, time.monotonic() + STOP_SECONDS
            return None

        async def on_tick(self, counter: int) -> bool:
            done = not scheduler.busy or time.monotonic() > self.until
            if self.asked_by is not None and not self.should_exit and done:
                super().handle_exit(self.asked_by, None)
            return await super().on_tick(counter)

    return Stopping(config)


def serve(  # many: the options of a verb
    checkpoint: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    name: str | None = None,
    log_json: bool = False,
    api_key_file: str | Path | None = None,
    chat_template: str | None = None,
    chat_date: str | None = None,
    retro_project: str | Path | None = None,
    retrieve_every: int | None = None,
    **limits: Any,
) -> None:
    """Load a model and answer requests until SIGINT or SIGTERM.

    Args:
        checkpoint: checkpoint directory, or a run's output directory for its newest one.
        host: address or name to listen on.
        port: 0 for a free one; the log says which.
        name: of the model in responses. None: the name of the checkpoint's directory.
        log_json: write a JSON object for each request, in place of a line of text.
        api_key_file: keys, one a line, of which a request needs one. None: that of the environment variable
            MEGATRON_GRIT_API_KEY, if it is set.
        chat_template: as of :meth:`GritModel.load`.
        chat_date: as there.
        retro_project: retrieval database that chat answers read, by a model that was trained to.
        retrieve_every: as of :meth:`GritModel.read_from`.
        limits: as of :class:`~megatron_grit.serving.service.Service`.

    Raises:
        ConfigError: starlette or uvicorn is missing, a limit or the address cannot be used, there are no keys in their
            file, or the model cannot read the database.
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    with needed("serving needs", "starlette", "serve"):
        import starlette  # noqa: F401
    with needed("serving needs", "uvicorn", "serve"):
        import uvicorn
    ServingLimits(**limits)  # before the model is loaded
    keys = read_keys(api_key_file)
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
        service = Service(model, name, **limits)
        scheduler = Scheduler(service.limits)
        config = uvicorn.Config(
            create_app(service, log_json=log_json, keys=keys, scheduler=scheduler),
            lifespan="off",
            log_config=None,  # uvicorn's warnings and errors still reach standard error
            access_log=False,
            timeout_graceful_shutdown=_SEND_SECONDS,
        )
        listener.listen()
        address, port = listener.getsockname()[:2]
        if not keys and not is_loopback(address):
            message = "warning: everyone who can reach %s can use the model; put a key into --api-key-file or %s"
            LOGGER.warning(message, address, VARIABLE)
        LOGGER.info("serving %s on http://%s:%d", name, f"[{address}]" if ":" in address else address, port)
        stopping_server(config, scheduler).run(sockets=[listener])
