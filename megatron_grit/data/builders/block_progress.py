"""How far a build is: a bar on a terminal, now and then a line in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from megatron_grit.parallel.logs import get_logger

LOG = get_logger(__name__)


class Progress:
    """Bytes of input read and documents written, per second.

    Args:
        num_bytes: of the whole input, on disk.
        description: name on the bar.
        enabled: show anything.
        log_interval: where stderr is not a terminal, a line every so many documents; None: none.
    """

    def __init__(self, num_bytes: int, description: str, *, enabled: bool, log_interval: int | None = None) -> None:
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=num_bytes, unit="B", unit_scale=True, desc=description, disable=not (enabled and terminal)
        )
        self._description = description
        self._log_interval = log_interval if enabled and not terminal else None
        self._num_bytes = self._num_documents = 0  # of this run
        self._logged = 0
        self._began = time.monotonic()

    def skip(self, num_bytes: int) -> None:
        """Count input that an earlier run has read."""
        if not self._bar.disable:  # by hand, so that the bar's rate is that of this run
            self._bar.initial += num_bytes
            self._bar.last_print_n += num_bytes
            self._bar.n += num_bytes

    def update(self, num_bytes: int, num_documents: int) -> None:
        """Count a block."""
        self._num_bytes += num_bytes
        self._num_documents += num_documents
        seconds = max(time.monotonic() - self._began, 1e-9)
        self._bar.set_postfix_str(f"{self._num_documents / seconds:,.0f} documents/s", refresh=False)
        self._bar.update(num_bytes)
        if self._log_interval is not None and self._num_documents - self._logged >= self._log_interval:
            self._logged = self._num_documents
            LOG.info(
                "%s: %d documents, %.0f documents/s, %.2f MB/s",
                self._description,
                self._num_documents,
                self._num_documents / seconds,
                self._num_bytes / seconds / 1e6,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
