"""A tuned model as its difference from a public one, for weights that may not be handed on themselves.

Differences are of bit patterns, taken as unsigned integers modulo 2^n: exact for any type, NaN and -0 included, and
without rounding. A diff folder holds one file of differences for each weight file of the tuned model, all its other
files as they are, and manifest.json: names, types, shapes and SHA-256 of the base's tensors and of every file.
Layout of files and tensors is the tuned model's, so recovery writes its files again byte for byte.

Tensors that the base lacks, or has in another type or width, are stored as they are; of a tensor with more rows than
the base's (a vocabulary that grew), the rows beyond.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from megatron_grit.convert.raw_safetensors import WIDTHS, RawTensor, Sink, read_header, write_header
from megatron_grit.errors import CheckpointError
from megatron_grit.store.digest import digest_of_settings
from megatron_grit.store.files import replacing, write_json

MANIFEST, JOURNAL, FORMAT = "manifest.json", "journal.json", "weight_diff_1"
BLOCK_BYTES = 1 << 24
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
Writer = Callable[[Sink], None]


def make_diff(base: str | Path, tuned: str | Path, diff: str | Path) -> Path:
    """Write what a tuned model adds to its base.

    Memory: a few blocks of 16 MiB, whatever the model's size. Killed, it goes on where it was when called again.

    Args:
        base: Hugging Face directory of the public model, safetensors.
        tuned: Hugging Face directory of the model that was trained from it.
        diff: directory to write; must not be there.

    Returns:
        ``diff``.

    Raises:
        CheckpointError: a directory that cannot be used, and which file of it; nothing in common; ``diff`` is there.
    """
    base, tuned, diff = Path(base), Path(tuned), Path(diff)
    _refuse_target(diff, (base, tuned))
    base_tensors = read_base(base)
    files = _list_files(tuned)
    weights = _top_level_weights(tuned)
    plans = {path.name: read_header(path) for path in weights}
    mine = [tensor for _, _, tensors in plans.values() for tensor in tensors]
    # Only tensors that a difference is taken from: the others of the base need not be there at recovery.
    used = sorted(tensor.name for tensor in mine if _shared_bytes(tensor, base_tensors))
    if not used:
        raise CheckpointError(f"{tuned}: no tensor has the name and type of one in {base}; is that its base?")
    total = _total_bytes(files.values()) + sum(base_tensors[name].num_bytes for name in used)
    with _Progress(total, "reading") as progress:
        tuned_hashes = {name: hash_file(path, progress) for name, path in files.items()}
        base_entries = {name: _describe(base_tensors[name], progress) for name in used}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "base": {"name": base.name, "tokenizer_sha256": tokenizer_hash(base), "tensors": base_entries},
        "tuned": {"tokenizer_sha256": tokenizer_hash(tuned), "files": tuned_hashes},
    }
    with (
        _Folder(diff, digest_of_settings(manifest)) as folder,
        _Progress(_total_bytes(files.values()), "writing") as progress,
    ):
        for name, path in files.items():
            if name in plans:
                folder.write(name, _difference_writer(path, base_tensors, progress), progress)
            else:
                folder.write(name, _copier(path, progress), progress)
        manifest["tensors"] = {
            tensor.name: {"dtype": tensor.dtype, "shape": tensor.shape, "file": file}
            for file, (_, _, tensors) in plans.items()
            for tensor in tensors
        }
        manifest["files"] = folder.hashes
        folder.finish(manifest)
    return diff


def recover(base: str | Path, diff: str | Path, tuned: str | Path) -> Path:
    """Write the tuned model again from its base and the diff, byte for byte.

    Args:
        base: the directory that the diff was made from, or one with the same tensors in other files.
        diff: what :func:`make_diff` wrote.
        tuned: directory to write; must not be there.

    Returns:
        ``tuned``.

    Raises:
        CheckpointError: the base differs from the one of the diff (which tensor, in which file) or the diff is damaged
            (which file), both before anything is written; ``tuned`` is there.
    """
    base, diff, tuned = Path(base), Path(diff), Path(tuned)
    _refuse_target(tuned, (base, diff))
    manifest = read_manifest(diff)
    base_tensors = _checked_inputs(base, diff, manifest)
    names = list(manifest["tuned"]["files"])
    with (
        _Folder(tuned, digest_of_settings(manifest)) as folder,
        _Progress(_total_bytes(diff / name for name in names), "recovering") as progress,
    ):
        for name in names:
            writer = _recovery(diff / name, base_tensors, progress, weights=is_weights(name))
            folder.write(name, writer, progress)
            if folder.hashes[name] != manifest["tuned"]["files"][name]:
                raise CheckpointError(f"{diff / MANIFEST}: {name} comes out other than it says; get the diff again")
        folder.finish(None)
    return tuned


def verify(base: str | Path, diff: str | Path, tuned: str | Path | None = None) -> None:
    """Check that a base and a diff give the tuned model, without writing anything.

    Args:
        base: the base model.
        diff: the diff.
        tuned: the tuned model, where it is there: its files are compared as well.

    Raises:
        CheckpointError: they do not, and which file or tensor is the reason.
    """
    base, diff = Path(base), Path(diff)
    manifest = read_manifest(diff)
    base_tensors = _checked_inputs(base, diff, manifest)
    expected = manifest["tuned"]["files"]
    with _Progress(_total_bytes(diff / name for name in expected), "recovering") as progress:
        for name, sha in expected.items():
            sink = _HashingFile(None)
            _recovery(diff / name, base_tensors, progress, weights=is_weights(name))(sink)
            if sink.hexdigest() != sha:
                raise CheckpointError(f"{diff / MANIFEST}: {name} comes out other than it says; get the diff again")
    if tuned is None:
        return
    present = _list_files(Path(tuned))
    with _Progress(_total_bytes(present.values()), "comparing") as progress:
        for name in sorted(set(expected) | set(present)):
            if name not in present or name not in expected:
                where = "in the diff" if name in expected else f"in {tuned}"
                raise CheckpointError(f"{Path(tuned) / name}: is {where} only")
            if hash_file(present[name], progress) != expected[name]:
                raise CheckpointError(f"{Path(tuned) / name}: is not the file that the diff was made of")


def read_base(path: Path) -> dict[str, RawTensor]:
    """Where each tensor of a model lies: in the files of its index, or in all safetensors files without one.

    Raises:
        CheckpointError: no weights, a file that is damaged or missing, or a tensor in two files.
    """
    tensors: dict[str, RawTensor] = {}
    for file in _indexed_weights(path):
        for tensor in read_header(file)[2]:
            if tensor.name in tensors:
                raise CheckpointError(f"{file}: tensor {tensor.name} is in {tensors[tensor.name].file.name} as well")
            tensors[tensor.name] = tensor
    return tensors


def read_manifest(diff: Path) -> dict[str, Any]:
    """manifest.json of a diff.

    Raises:
        CheckpointError: there is none, it is not one, or it names files outside the diff.
    """
    file = diff / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT
        names = [*manifest["files"], *manifest["tuned"]["files"]]
        complete = set(manifest["files"]) == set(manifest["tuned"]["files"])
        complete &= all({"dtype", "shape", "sha256"} <= set(entry) for entry in manifest["base"]["tensors"].values())
    except FileNotFoundError:
        raise CheckpointError(f"{diff}: no {MANIFEST}; give the directory that `make` wrote") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{file}: not the manifest of a weight diff; get the diff again") from None
    if not known or not complete:
        raise CheckpointError(f"{file}: not a manifest of format {FORMAT}; get the diff again")
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\\" in name or "\0" in name:
            raise CheckpointError(f"{file}: names {name!r}, which is outside the diff; do not use it")
    return manifest


def tokenizer_hash(path: Path) -> str | None:
    """SHA-256 over a model's tokenizer files, names and contents; None where it has none."""
    digest, found = hashlib.sha256(), False
    for name in TOKENIZER_FILES:
        if (path / name).is_file():
            digest.update(f"{name} {hash_file(path / name)}\n".encode())
            found = True
    return digest.hexdigest() if found else None


def is_weights(name: str) -> bool:
    """Whether a file of a model, by its relative name, is one that differences are taken of."""
    return "/" not in name and name.endswith(".safetensors")


def hash_file(path: Path, progress: _Progress | None = None) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            if progress is not None:
                progress.add(len(block))
    return digest.hexdigest()


def _checked_inputs(base: Path, diff: Path, manifest: dict[str, Any]) -> dict[str, RawTensor]:
    """The base's tensors, when they and the diff's files are what the manifest says."""
    for name in manifest["files"]:
        if not (diff / name).is_file():
            raise CheckpointError(f"{diff / name}: missing, though {MANIFEST} names it; get the diff again")
    expected: dict[str, dict[str, Any]] = manifest["base"]["tensors"]
    tensors = read_base(base)
    for name, entry in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{base}: tensor {name} is missing; the diff is of another base")
        found = {"dtype": tensors[name].dtype, "shape": list(tensors[name].shape)}
        if found != {"dtype": entry["dtype"], "shape": entry["shape"]}:
            raise CheckpointError(
                f"{tensors[name].file}: tensor {name} is {found['dtype']} {found['shape']}, the diff's base has "
                f"{entry['dtype']} {entry['shape']}; give the base that the diff was made from"
            )
    total = _total_bytes(diff / name for name in manifest["files"]) + sum(tensors[name].num_bytes for name in expected)
    with _Progress(total, "checking") as progress:
        for name, sha in manifest["files"].items():
            if hash_file(diff / name, progress) != sha:
                raise CheckpointError(f"{diff / name}: damaged, its SHA-256 is not the manifest's; get the diff again")
        for name, entry in expected.items():
            if _describe(tensors[name], progress)["sha256"] != entry["sha256"]:
                raise CheckpointError(
                    f"{tensors[name].file}: tensor {name} has other values than the diff's base; give the base that "
                    "the diff was made from"
                )
    return {name: tensors[name] for name in expected}


def _describe(tensor: RawTensor, progress: _Progress) -> dict[str, Any]:
    digest = hashlib.sha256()
    for block in tensor.blocks(BLOCK_BYTES):
        digest.update(block)
        progress.add(len(block))
    return {"dtype": tensor.dtype, "shape": list(tensor.shape), "sha256": digest.hexdigest()}


def _shared_bytes(tensor: RawTensor, base: dict[str, RawTensor]) -> int:
    """How many bytes of a tensor, from its first on, have a counterpart in the base."""
    other = base.get(tensor.name)
    if other is None or other.dtype != tensor.dtype or len(other.shape) != len(tensor.shape):
        return 0
    if other.shape[1:] != tensor.shape[1:]:
        return 0
    return min(other.num_bytes, tensor.num_bytes)


def _combined(
    tensor: RawTensor, base: dict[str, RawTensor], dtype: str, combine: Callable[..., np.ndarray], progress: _Progress
) -> Iterator[bytes]:
    """A tensor's bytes with the base's subtracted or added, integer by integer."""
    # The tensor of a diff has the integer type of its own width; what it is compared with keeps its type.
    shared = _shared_bytes(RawTensor(tensor.name, dtype, tensor.shape, tensor.file, 0, tensor.num_bytes), base)
    integer = np.dtype(f"<u{WIDTHS[tensor.dtype]}")
    others = base[tensor.name].blocks(BLOCK_BYTES, shared) if shared else iter(())
    done = 0
    for block in tensor.blocks(BLOCK_BYTES):
        progress.add(len(block))
        count = max(0, min(len(block), shared - done))
        if count:
            ours = np.frombuffer(block, integer, count // integer.itemsize)
            yield combine(ours, np.frombuffer(next(others), integer, len(ours))).tobytes()
        yield block[count:]
        done += len(block)


def _difference_writer(path: Path, base: dict[str, RawTensor], progress: _Progress) -> Writer:
    def write(file: Sink) -> None:
        header, _, tensors = read_header(path)
        # The header is kept as text: recovery is to give the same file, not merely the same tensors.
        metadata = {"format": FORMAT, "header": header[8:].decode("utf-8")}
        write_header(file, tensors, [f"U{8 * WIDTHS[tensor.dtype]}" for tensor in tensors], metadata)
        for tensor in tensors:
            for block in _combined(tensor, base, tensor.dtype, np.subtract, progress):
                file.write(block)

    return write


def _recovery(path: Path, base: dict[str, RawTensor], progress: _Progress, *, weights: bool) -> Writer:
    """A file of differences gives weights; any other file is copied."""
    if not weights:
        return _copier(path, progress)

    def write(file: Sink) -> None:
        _, metadata, tensors = read_header(path)
        try:
            header = metadata["header"].encode("utf-8")
            entries = json.loads(header)
            dtypes = [entries[tensor.name]["dtype"] for tensor in tensors]
        except (KeyError, ValueError, TypeError):
            raise CheckpointError(f"{path}: not a file of differences; get the diff again") from None
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            for block in _combined(tensor, base, dtype, np.add, progress):
                file.write(block)

    return write


def _copier(path: Path, progress: _Progress) -> Writer:
    def write(file: Sink) -> None:
        with path.open("rb") as source:
            while block := source.read(BLOCK_BYTES):
                progress.add(len(block))
                file.write(block)

    return write


def _indexed_weights(path: Path) -> list[Path]:
    index = path / INDEX
    if not index.is_file():
        return _top_level_weights(path)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{index}: not an index of weights") from None
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise CheckpointError(f"{path / missing[0]}: missing, though {INDEX} names it")
    return [path / name for name in names]


def _top_level_weights(path: Path) -> list[Path]:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path}: no *.safetensors; give the directory of a Hugging Face model")
    return files


def _list_files(path: Path) -> dict[str, Path]:
    """All files of a model by relative name, weights and others. Hidden folders (.git, .cache) are none of it.

    Raises:
        CheckpointError: weights in pickle, which would be handed on as they are; a name that the diff needs.
    """
    files = {}
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            files[(Path(folder) / name).relative_to(path).as_posix()] = Path(folder) / name
    for name, file in files.items():
        if file.suffix in PICKLED:
            raise CheckpointError(f"{file}: pickled weights would go into the diff as they are; move the file away")
        if name in (MANIFEST, JOURNAL):
            raise CheckpointError(f"{file}: a diff has a file of its own by this name; move it away")
    return dict(sorted(files.items()))


def _total_bytes(paths: Iterable[Path]) -> int:
    return sum(os.path.getsize(path) for path in paths)


def _refuse_target(target: Path, sources: tuple[Path, ...]) -> None:
    if target.exists():
        raise CheckpointError(f"{target}: is there already; give another directory or remove it")
    for source in sources:
        if source.resolve() in target.resolve().parents:
            raise CheckpointError(f"{target}: lies within {source}; give a directory outside of it")


class _Progress:
    """A bar of bytes."""

    def __init__(self, total: int, what: str) -> None:
        self._bar = tqdm(total=total, desc=what, unit="B", unit_scale=True)

    def add(self, count: int) -> None:
        self._bar.update(count)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


class _HashingFile:
    """A file to write, or none, and the SHA-256 of what was written."""

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def write(self, block: bytes) -> int:
        self._digest.update(block)
        return len(block) if self._file is None else self._file.write(block)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class _Folder:
    """A directory that appears whole: its files are written beside it, and kept when the process dies.

    Args:
        target: the directory.
        job: what is written, as a hash of all inputs. Files of another job are thrown away.
    """

    def __init__(self, target: Path, job: str) -> None:
        self._target, self._partial = target, target.with_name(f".{target.name}.partial")
        self._job = job
        self.hashes: dict[str, str] = {}

    def __enter__(self) -> _Folder:
        try:
            journal = json.loads((self._partial / JOURNAL).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            journal = {}
        if journal.get("job") == self._job:
            self._finished = dict(journal["files"])
        else:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._finished = {}
        self._partial.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        """What is finished stays for the next call."""

    def write(self, name: str, writer: Writer, progress: _Progress) -> None:
        """One file, unless an earlier call wrote it and it is as it was."""
        path = self._partial / name
        if name in self._finished and path.is_file() and hash_file(path, progress) == self._finished[name]:
            self.hashes[name] = self._finished[name]
            return
        with replacing(path, "wb") as file:
            sink = _HashingFile(file)
            writer(sink)
        self.hashes[name] = self._finished[name] = sink.hexdigest()
        write_json(self._partial / JOURNAL, {"job": self._job, "files": self._finished})

    def finish(self, manifest: dict[str, Any] | None) -> None:
        """The manifest, if there is one, and the directory gets its name."""
        if manifest is not None:
            write_json(self._partial / MANIFEST, manifest)
        (self._partial / JOURNAL).unlink(missing_ok=True)
        self._partial.rename(self._target)
