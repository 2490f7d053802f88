"""Working folder of a build: streams that are appended to, and a journal of their sizes.

The journal is replaced atomically after the streams were flushed to disk. After a kill the streams are truncated to the
sizes in the journal and the build resumes from there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_grit.data.indexed.reader import IndexedFile, IndexedMeta, file_paths, read_meta
from megatron_grit.data.indexed.writer import IndexedFacts, IndexedStream, TokenBlock
from megatron_grit.errors import DataError
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.files import write_json
from megatron_grit.store.logs import get_logger

LOG = get_logger(__name__)

PLACE_DTYPE = np.dtype([("fingerprint", "V16"), ("file", "<i4"), ("line", "<i8")])
"""Of each document of a build that removes duplicates: hash, number of the input file, line in the piece's part."""

_BUILDING, _BUILT, _FINISHED = "building", "built", "finished"
JOURNAL_NAME, _JOURNAL_VERSION = "journal.json", 1


@dataclass(frozen=True)
class StreamSpec:
    """Type of one stream of a build."""

    dtype: Any
    with_modes: bool


class BuildFolder:
    """Streams of token blocks, rejected lines and document places, with their journal.

    Args:
        folder: created if missing.
        streams: by name.
        signature: what the content depends on. A journal with another one is discarded with all it stands for.

    Attributes:
        state: the caller's part of the journal; JSON values. Empty in a new build.
    """

    def __init__(self, folder: Path, streams: Mapping[str, StreamSpec], signature: Mapping[str, Any]) -> None:
        self.folder = folder
        self._signature = json.loads(json.dumps(signature))
        self._journal: dict[str, Any] = {"stage": _BUILDING, "sizes": {}, "num_documents": {}}
        self.state: dict[str, Any] = {}
        self._streams: dict[str, IndexedStream] = {}
        self._sides: dict[str, BinaryIO] = {}
        resumed = self._load()
        folder.mkdir(parents=True, exist_ok=True)
        if self._journal["stage"] == _FINISHED:
            LOG.info("%s is finished: not built again", folder)
            return
        self._streams = {
            name: IndexedStream(folder, name, spec.dtype, with_modes=spec.with_modes) for name, spec in streams.items()
        }
        self._sides = {name: (folder / name).open("ab") for name in ("rejected.jsonl", "places.bin")}
        if self._journal["stage"] == _BUILDING and not self._rewind():
            # The journal promises more than the files hold, as after a crash of the machine without working fsync.
            LOG.warning("%s is damaged: starting afresh", folder)
            self._journal.update(sizes={}, num_documents={})
            self.state = {}
            self._rewind()
        elif resumed:
            LOG.info("resuming the build in %s", folder)

    def _load(self) -> bool:
        path = self.folder / JOURNAL_NAME
        try:
            journal = json.loads(path.read_bytes())
            intact = journal["version"] == _JOURNAL_VERSION and journal.pop("sha256") == digest_of_settings(journal)
        except FileNotFoundError:
            journal, intact = None, False
        except (ValueError, TypeError, KeyError):
            journal, intact = {}, False
        if intact and journal["signature"] == self._signature:
            self.state = journal.pop("state")
            self._journal = journal
            return True
        if journal is not None:
            found = journal.get("signature", {}) if intact else {}
            changed = [key for key in self._signature if found.get(key) != self._signature[key]]
            LOG.warning("an earlier build in %s differs in %s: starting afresh", self.folder, ", ".join(changed))
        remove_folder(self.folder)
        return False

    def _rewind(self) -> bool:
        sizes = self._journal["sizes"]
        try:
            for name, stream in self._streams.items():
                stream.rewind(sizes.get(name, {}))
        except DataError:
            return False
        for name, file in self._sides.items():
            wanted = sizes.get(name, 0)
            if os.fstat(file.fileno()).st_size < wanted:
                return False
            os.truncate(file.fileno(), wanted)
        return True

    @property
    def building(self) -> bool:
        """Whether blocks can still be appended."""
        return self._journal["stage"] == _BUILDING

    @property
    def num_documents(self) -> dict[str, int]:
        """Documents of each stream, as of the last commit."""
        return self._journal["num_documents"]

    def num_bytes(self, name: str) -> int:
        """Bytes of a stream's tokens, as of the last commit."""
        return self._journal["sizes"][name]["bin"]

    def append(self, outputs: Mapping[str, TokenBlock], rejected: Sequence[str], places: np.ndarray | None) -> None:
        """Append a block to every stream.

        Args:
            outputs: documents by stream name.
            rejected: JSON of each rejected line.
            places: PLACE_DTYPE [num_documents], or None.
        """
        for name, block in outputs.items():
            self._streams[name].append(block)
        self._sides["rejected.jsonl"].write("".join(f"{line}\n" for line in rejected).encode())
        if places is not None:
            self._sides["places.bin"].write(places.tobytes())

    def extend(self, name: str, source: IndexedFile) -> None:
        """Append all of an indexed file to a stream."""
        self._streams[name].extend(source)

    def commit(self, stage: str = _BUILDING) -> None:
        """Make everything so far survive a kill."""
        if self._journal["stage"] == _BUILDING:
            sizes: dict[str, Any] = {name: stream.position() for name, stream in self._streams.items()}
            for name, file in self._sides.items():
                file.flush()
                os.fsync(file.fileno())
                sizes[name] = os.fstat(file.fileno()).st_size
            self._journal["sizes"] = sizes
            self._journal["num_documents"] = {name: stream.num_documents() for name, stream in self._streams.items()}
        self._journal["stage"] = stage
        # With a digest: damaged sizes would cut streams at wrong positions.
        journal = {"version": _JOURNAL_VERSION, "signature": self._signature, **self._journal, "state": self.state}
        write_json(self.folder / JOURNAL_NAME, {**journal, "sha256": digest_of_settings(journal)})

    def complete(self) -> None:
        """Nothing is appended any more. A kill from here on repeats only the writing of the index."""
        if self.building:
            self.commit(_BUILT)

    def finish(
        self,
        targets: Mapping[str, Path],
        facts: Mapping[str, Callable[[], IndexedFacts]],
        *,
        overwrite: bool,
        checksum: bool,
    ) -> dict[str, IndexedMeta | None]:
        """Rename the streams that hold documents to indexed files. After a kill, call it again for the rest.

        Args:
            targets: prefix of each stream.
            facts: of each stream that gets a ``.json``.
            overwrite: replace files that are there.
            checksum: write checksums into the ``.json``.

        Returns:
            What the ``.json`` of each stream says.
        """
        self.complete()
        metas: dict[str, IndexedMeta | None] = {}
        for name, count in self.num_documents.items():
            if not count:
                continue
            if self._is_gone(name):  # an earlier call, killed before the end, finished this stream
                self._check_in_place(name, targets[name])
                metas[name] = read_meta(targets[name]) if name in facts else None
                continue
            metas[name] = self._streams[name].finalize(
                targets[name], facts.get(name), overwrite=overwrite, checksum=checksum
            )
        self.commit(_FINISHED)
        return metas

    def _is_gone(self, name: str) -> bool:
        """Whether the stream's files have left the folder."""
        if name not in self._streams:
            return True
        return not (self.folder / f"{name}.ready.json").exists() and not self._streams[name].num_documents()

    def _check_in_place(self, name: str, target: Path) -> None:
        bin_path, idx_path, _ = file_paths(target)
        size = self._journal["sizes"][name]["bin"]
        if not (idx_path.exists() and bin_path.exists() and bin_path.stat().st_size == size):
            raise DataError(
                f"was removed or replaced while the build in {self.folder} was not finished; "
                "remove that folder and start again",
                path=bin_path,
            )

    def rejected(self) -> Iterator[dict[str, Any]]:
        """The rejected lines."""
        with (self.folder / "rejected.jsonl").open("rb") as file:
            for line in file:
                yield json.loads(line)

    def places(self) -> np.ndarray:
        """PLACE_DTYPE [num_documents], mapped."""
        path = self.folder / "places.bin"
        if not path.stat().st_size:
            return np.empty(0, dtype=PLACE_DTYPE)
        return np.memmap(path, dtype=PLACE_DTYPE, mode="r")

    def close(self) -> None:
        """Close the files. What was not committed is lost."""
        for stream in self._streams.values():
            stream.close()
        for file in self._sides.values():
            file.close()


def remove_folder(folder: Path) -> None:
    """Remove a folder of a build, or what is left of it; first the journal, which promises the rest."""
    (folder / JOURNAL_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
