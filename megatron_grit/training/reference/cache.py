"""Numbers of each record of an indexed file, computed once and kept on disk.

A cache is a folder named by a digest of all that the numbers follow from, which ``identity.json`` in it spells out.
Each ``part_*.npz`` holds some records and their numbers; a part is whole or not there, parts are never changed, and any
number of runs may add some. What a record has twice is the same.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import computing_settings
from megatron_grit.errors import DataError
from megatron_grit.store.digest import digest_of_arrays, digest_of_settings
from megatron_grit.store.files import replacing, write_json


def identity_of_model(config: RunConfig, weights: str) -> dict[str, object]:
    """Of a cache of log-probabilities: all that they follow from but the data and how it is cut.

    Args:
        config: the run.
        weights: fingerprint of the weights.
    """
    return {
        "weights": weights,
        "model": digest_of_settings(list(computing_settings(config))),
        "precision": config.training.precision,
    }


class RecordNumbers:
    """The numbers of the records of one file, in memory, and the folder that they are in.

    Args:
        folder: of caches.
        identity: all that the numbers follow from, for JSON.
        num_records: of the file.
        width: numbers of a record.

    Raises:
        DataError: a part that is damaged, or of something else.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], num_records: int, width: int) -> None:
        self.identity = dict(identity)
        self.folder = Path(folder) / digest_of_settings(self.identity)[:24]
        self.values = np.full((num_records, width), np.nan)
        """float64 [num_records, width]; NaN where there is none."""
        self._read()

    def has(self, records: np.ndarray) -> np.ndarray:
        """Whether each of some records is there: bool."""
        return ~np.isnan(self.values[records, 0])

    def put(self, records: np.ndarray, values: np.ndarray) -> None:
        """Take numbers into memory."""
        self.values[records] = values

    def write(self, records: np.ndarray) -> None:
        """Add a part with some records, which are in memory. One process of a job does it.

        Raises:
            OutputError: it cannot be written.
        """
        described = self.folder / "identity.json"
        if not described.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(described, self.identity)
        records = np.sort(records).astype(np.int64)
        values = self.values[records]
        digest = digest_of_arrays({"records": records, "values": values})
        with replacing(self.folder / f"part_{digest[:24]}.npz", "wb") as file:
            np.savez(file, records=records, values=values)

    def _read(self) -> None:
        described = self.folder / "identity.json"
        if not described.exists():
            return
        try:
            found = json.loads(described.read_bytes())
        except (OSError, ValueError):
            raise DataError("cannot be read; remove its folder, so that it is computed again", path=described) from None
        if found != self.identity:
            name = next((key for key in self.identity if found.get(key) != self.identity[key]), "format")
            raise DataError(
                f"is of another run: {name} is {found.get(name)} there and {self.identity.get(name)} here; remove its "
                "folder, so that it is computed again",
                path=described,
            )
        for path in sorted(self.folder.glob("part_*.npz")):
            self._read_part(path)

    def _read_part(self, path: Path) -> None:
        num_records, width = self.values.shape
        try:
            with np.load(path, allow_pickle=False) as arrays:
                records, values = arrays["records"], arrays["values"]
            if values.shape != (len(records), width) or records.min() < 0 or records.max() >= num_records:
                raise ValueError("holds other records")
            if path.stem.partition("_")[2] != digest_of_arrays({"records": records, "values": values})[:24]:
                raise ValueError("does not match its checksum")
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"cannot be read ({error}); remove it, so that it is computed again", path=path) from None
        self.values[records] = values
