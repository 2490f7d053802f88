"""Messages: each once, from rank 0, without the engine's noise."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from megatron_grit.store.environment import job_rank

_NOISY = ("megatron", "torch.distributed", "torch.utils.cpp_extension", "nv_one_logger")


class LineHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes a message on a line of its own, above a progress bar that is drawn."""

    above_bars: Callable[[], AbstractContextManager[None]] = nullcontext
    """Holds bars back while a line is written; set by what draws them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        with type(self).above_bars():
            super().emit(record)


def get_logger(name: str) -> logging.Logger:
    """Logger of a module; ranks other than 0 log warnings and worse."""
    return logging.getLogger(name)


def say_loading() -> None:
    """Say that torch is imported, which takes seconds to minutes, unless it is there already."""
    if "torch" not in sys.modules:
        get_logger(__name__).info("loading torch and megatron-core")


def configure_logging(level: int = logging.INFO) -> None:
    """One line a message on standard error. ``MEGATRON_GRIT_DEBUG=1`` keeps the engine's own messages and warnings."""
    rank = job_rank()
    handler = LineHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger("megatron_grit")
    root.handlers[:] = [handler]
    root.setLevel(level if rank == 0 else logging.WARNING)
    root.propagate = False
    if os.environ.get("MEGATRON_GRIT_DEBUG") == "1":
        return
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("megatron", "torch", "transformer_engine"):
        warnings.filterwarnings("ignore", module=rf"{module}.*")
