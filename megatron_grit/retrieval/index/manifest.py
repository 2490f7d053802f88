"""What is known of an index file: the ``.json`` beside it, without which it is not opened."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_grit.errors import DataError
from megatron_grit.store.content import content_digest
from megatron_grit.store.sealed import read_sealed, write_sealed


@dataclass(kw_only=True)
class IndexManifest:
    """What is known of an index file, in the ``.json`` beside it."""

    factory: str
    metric: str
    dim: int
    embedder: str
    """Fingerprint of what made the vectors."""
    chunks: str
    """Fingerprint of the chunks that they are of."""
    num_trained: int
    num_vectors: int
    signature: str = ""
    """Of the settings that the content follows from."""
    first_id: int = 0
    """Id of the first vector, in an index that holds no ids."""
    bytes: int = 0
    sha256: str = ""


def remedy_of(path: Path) -> str:
    """What to run to get an index file of a database."""
    task = "index-train" if path.name.startswith("empty") else "index-add"
    return f"run --tasks {task}"


def read_manifest(path: Path) -> IndexManifest:
    """The manifest of an index file.

    Raises:
        DataError: it is missing or cannot be read.
    """
    file = path.with_suffix(".json")
    if not file.is_file():
        raise DataError(f"is missing; {remedy_of(path)}", path=file)
    try:
        return IndexManifest(**read_sealed(file))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"cannot be read ({error}); delete it and {remedy_of(path)}", path=file) from None


def write_manifest(path: Path, manifest: IndexManifest) -> None:
    """Write what is known of an index file that is there; its size and checksum are filled in."""
    manifest.bytes, manifest.sha256 = path.stat().st_size, content_digest(path)
    write_sealed(path.with_suffix(".json"), asdict(manifest))


def is_whole(path: Path, manifest: IndexManifest) -> bool:
    """Whether an index file is what its manifest says."""
    return path.is_file() and path.stat().st_size == manifest.bytes and content_digest(path) == manifest.sha256
