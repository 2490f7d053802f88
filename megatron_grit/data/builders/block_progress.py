"""How far a build is: bytes of input read and documents written."""

from __future__ import annotations

import time

from megatron_grit.store import progress


class Progress(progress.Progress):
    """Bytes of input read and documents written, per second.

    Args:
        num_bytes: of the whole input, on disk.
        description: name on the bar.
        enabled: show anything.
        log_interval: where stderr is not a terminal, a line every so many documents; None: none.
    """

    def __init__(self, num_bytes: int, description: str, *, enabled: bool, log_interval: int | None = None) -> None:
        super().__init__(num_bytes, description, "B", enabled=enabled, log_every=None)
        self._log_interval = log_interval
        self._num_documents = self._num_logged = 0
        self._first_document = time.monotonic()

    def count(self, num_bytes: int, num_documents: int) -> None:
        """Count a block."""
        self._num_documents += num_documents
        seconds = max(time.monotonic() - self._first_document, 1e-9)
        self.update(num_bytes, f"{self._num_documents:,} documents, {self._num_documents / seconds:,.0f} documents/s")
        if self._log_interval is not None and self._num_documents - self._num_logged >= self._log_interval:
            self._num_logged = self._num_documents
            self.log()
