"""A tuned model as its difference from a public one, for weights that may not be handed on themselves.

Differences are of bit patterns, taken as unsigned integers modulo 2^n: exact for any type, NaN and -0 included, and
without rounding. A diff folder holds one file of differences for each weight file of the tuned model, all its other
files as they are, and manifest.json: names, types, shapes and SHA-256 of the tensors of both models and of every file.

Tensors that the base lacks, or has in another type or width, are stored as they are; of a tensor with more rows than
the base's (a vocabulary that grew), the rows beyond.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from megatron_grit.convert.hf_in.reader import DTYPES, SafetensorsFolder, WeightFolder
from megatron_grit.convert.raw_safetensors import RawTensor, write_header
from megatron_grit.errors import CheckpointError
from megatron_grit.store.digest import HashingFile, digest_of_rows, sha256_of_file
from megatron_grit.store.files import check_room, write_json
from megatron_grit.store.folder import OutputFolder
from megatron_grit.store.progress import Progress

MANIFEST, FORMAT = "manifest.json", "weight_diff_2"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_BLOCK_BYTES = 1 << 24
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Entries = dict[str, dict[str, Any]]
"""Of each tensor "dtype", "shape" and "sha256", and "file" where it is one of the tuned model."""


def make_diff(base: str | Path, tuned: str | Path, diff: str | Path) -> Path:
    """Write what a tuned model adds to its base.

    Memory: twice the largest tensor. A killed run resumes when it is called again.

    Args:
        base: Hugging Face directory of the public model, safetensors.
        tuned: Hugging Face directory of the model that was trained from it.
        diff: directory to write; does not exist yet, or is empty.

    Returns:
        ``diff``.

    Raises:
        CheckpointError: a directory that cannot be used, and which file of it; nothing in common.
        OutputError: ``diff`` has content or cannot be written.
    """
    base, tuned, diff = Path(base), Path(tuned), Path(diff)
    _refuse_within(diff, (base, tuned))
    theirs, ours = SafetensorsFolder(base), SafetensorsFolder(tuned)
    others = _other_files(ours)
    # Only tensors that a difference is taken from: the others of the base need not be there at recovery.
    used = [name for name in sorted(ours) if _is_related(name, ours, theirs)]
    if not used:
        raise CheckpointError(f"{tuned}: no tensor has the name and type of one in {base}; is that its base?")
    with Progress(_num_bytes(theirs, used), "reading the base", "B") as progress:
        tensors = {name: _describe(name, theirs, progress) for name in used}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "base": {"name": base.name, "tokenizer_sha256": tokenizer_hash(base), "tensors": tensors},
        "tuned": {"tokenizer_sha256": tokenizer_hash(tuned)} | _describe_model(ours, others),
    }
    entries: Entries = manifest["tuned"]["tensors"]
    types = {name: f"U{8 * DTYPES[entry['dtype']].itemsize}" for name, entry in entries.items()}
    with OutputFolder(diff, manifest) as folder:
        _fill(folder, ours, others, manifest, types, partial(_combine, np.subtract, ours, theirs, manifest))
        manifest["files"] = {name: entry["sha256"] for name, entry in sorted(folder.files.items())}
        write_json(folder.path / MANIFEST, manifest)
        folder.publish()
    return diff


def recover(base: str | Path, diff: str | Path, tuned: str | Path) -> Path:
    """Write the tuned model again from its base and the diff: its tensors bit for bit, other files byte for byte.

    Args:
        base: the directory that the diff was made from, or one with the same tensors in other files.
        diff: what :func:`make_diff` wrote.
        tuned: directory to write; does not exist yet, or is empty.

    Returns:
        ``tuned``.

    Raises:
        CheckpointError: the base differs from the one of the diff (which tensor, in which file) or the diff is damaged
            (which file), both before anything is written.
        OutputError: ``tuned`` has content or cannot be written.
    """
    base, diff, tuned = Path(base), Path(diff), Path(tuned)
    _refuse_within(tuned, (base, diff))
    manifest = read_manifest(diff)
    theirs, stored = _checked_inputs(base, diff, manifest)
    entries: Entries = manifest["tuned"]["tensors"]
    types = {name: entry["dtype"] for name, entry in entries.items()}
    others = {name: diff / name for name in manifest["tuned"]["files"]}
    with OutputFolder(tuned, manifest) as folder:
        _fill(folder, stored, others, manifest, types, partial(_recovered, stored, theirs, manifest))
        folder.publish()
    return tuned


def verify(base: str | Path, diff: str | Path, tuned: str | Path | None = None) -> None:
    """Check that a base and a diff give the tuned model, without writing anything.

    Args:
        base: the base model.
        diff: the diff.
        tuned: the tuned model, where it is there: its tensors and other files are compared as well.

    Raises:
        CheckpointError: they do not, and which file or tensor is the reason.
    """
    base, diff = Path(base), Path(diff)
    manifest = read_manifest(diff)
    theirs, stored = _checked_inputs(base, diff, manifest)
    with Progress(_num_bytes(stored, stored), "recovering", "B") as progress:
        for name in stored:
            progress.update(_recovered(stored, theirs, manifest, name).nbytes)
    if tuned is None:
        return
    present = SafetensorsFolder(tuned)
    for kind, found in _describe_model(present, _other_files(present)).items():
        expected = manifest["tuned"][kind]
        for name in sorted(expected.keys() | found.keys()):
            if name not in found or name not in expected:
                where = "in the diff" if name in expected else f"in {tuned}"
                raise CheckpointError(f"{tuned}: {kind[:-1]} {name} is {where} only")
            if found[name] != expected[name]:
                raise CheckpointError(f"{tuned}: {kind[:-1]} {name} is not that of the diff's tuned model")


def read_manifest(diff: Path) -> dict[str, Any]:
    """manifest.json of a diff.

    Raises:
        CheckpointError: there is none, it is not one, or it names files outside the diff.
    """
    file = diff / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT
        tensors: Entries = manifest["tuned"]["tensors"]
        complete = {"dtype", "shape", "sha256"} <= set.intersection(
            *(set(entry) for entry in [*manifest["base"]["tensors"].values(), *tensors.values()])
        )
        complete &= {entry["dtype"] for entry in tensors.values()} <= DTYPES.keys()
        weights = {entry["file"] for entry in tensors.values()}
        complete &= weights | set(manifest["tuned"]["files"]) <= set(manifest["files"])
        names = [*manifest["files"], *manifest["tuned"]["files"], *weights]
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
    found = [f"{name} {sha256_of_file(path / name)}\n" for name in TOKENIZER_FILES if (path / name).is_file()]
    return hashlib.sha256("".join(found).encode()).hexdigest() if found else None


def _checked_inputs(base: Path, diff: Path, manifest: dict[str, Any]) -> tuple[WeightFolder, WeightFolder]:
    """The tensors of the base and of the diff, when they and the diff's files are what the manifest says."""
    for name in manifest["files"]:
        if not (diff / name).is_file():
            raise CheckpointError(f"{diff / name}: missing, though {MANIFEST} names it; get the diff again")
    expected: Entries = manifest["base"]["tensors"]
    theirs = SafetensorsFolder(base)
    for name, entry in expected.items():
        if name not in theirs:
            raise CheckpointError(f"{base}: tensor {name} is missing; the diff is of another base")
        dtype, shape = _NAMES[theirs.stored[name].dtype], list(theirs.stored[name].shape)
        if (dtype, shape) != (entry["dtype"], entry["shape"]):
            raise CheckpointError(
                f"{theirs.file_of(name)}: tensor {name} is {dtype} {shape}, the diff's base has "
                f"{entry['dtype']} {entry['shape']}; give the base that the diff was made from"
            )
    total = _total_bytes(diff / name for name in manifest["files"]) + _num_bytes(theirs, expected)
    with Progress(total, "checking", "B") as progress:
        for name, sha in manifest["files"].items():
            if sha256_of_file(diff / name, report=progress.update) != sha:
                raise CheckpointError(f"{diff / name}: damaged, its SHA-256 is not the manifest's; get the diff again")
        for name, entry in expected.items():
            if _describe(name, theirs, progress)["sha256"] != entry["sha256"]:
                raise CheckpointError(
                    f"{theirs.file_of(name)}: tensor {name} has other values than the diff's base; give the base that "
                    "the diff was made from"
                )
    stored = SafetensorsFolder(diff)
    if {name: list(each.shape) for name, each in stored.stored.items()} != {
        name: entry["shape"] for name, entry in manifest["tuned"]["tensors"].items()
    }:
        raise CheckpointError(f"{diff / MANIFEST}: names other tensors than the files hold; get the diff again")
    return theirs, stored


def _bits(name: str, folder: WeightFolder, index: tuple[slice, ...] = ()) -> np.ndarray:
    """A tensor's bit patterns as unsigned integers, flat."""
    stored = folder.stored[name]
    tensor = stored[index]
    if tensor.dtype != stored.dtype:
        raise CheckpointError(f"{folder.file_of(name)}: tensor {name} is of a type that is not known here")
    return np.asarray(tensor.flatten().view(torch.uint8).numpy().view(f"<u{tensor.element_size()}"))


def _describe(name: str, folder: WeightFolder, progress: Progress) -> dict[str, Any]:
    bits, stored = _bits(name, folder), folder.stored[name]
    progress.update(bits.nbytes)
    return {"dtype": _NAMES[stored.dtype], "shape": list(stored.shape), "sha256": digest_of_rows(bits)}


def _describe_model(model: WeightFolder, others: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    with Progress(_num_bytes(model, model) + _total_bytes(others.values()), "reading the tuned model", "B") as progress:
        tensors = {
            name: _describe(name, model, progress) | {"file": model.file_of(name).name} for name in sorted(model)
        }
        return {
            "tensors": tensors,
            "files": {name: sha256_of_file(path, report=progress.update) for name, path in others.items()},
        }


def _is_related(name: str, ours: WeightFolder, theirs: WeightFolder) -> bool:
    """Whether tensors of this name have numbers that a difference is taken of."""
    if name not in theirs:
        return False
    mine, other = ours.stored[name], theirs.stored[name]
    alike = mine.dtype == other.dtype and len(mine.shape) == len(other.shape) and mine.shape[1:] == other.shape[1:]
    return alike and 0 not in (*mine.shape, *other.shape)


def _combine(
    operation: np.ufunc, folder: WeightFolder, base: WeightFolder, manifest: dict[str, Any], name: str
) -> np.ndarray:
    """A tensor's bits with those of the rows that the base has subtracted or added, integer by integer."""
    bits = _bits(name, folder)
    known = manifest["base"]["tensors"].get(name)
    if known is not None:
        num_rows = [shape[0] for shape in (known["shape"], manifest["tuned"]["tensors"][name]["shape"]) if shape]
        other = _bits(name, base, (slice(0, min(num_rows)),) if num_rows else ())
        operation(bits[: len(other)], other, out=bits[: len(other)])
    return bits


def _recovered(diff: WeightFolder, base: WeightFolder, manifest: dict[str, Any], name: str) -> np.ndarray:
    bits = _combine(np.add, diff, base, manifest, name)
    if digest_of_rows(bits) != manifest["tuned"]["tensors"][name]["sha256"]:
        raise CheckpointError(f"{diff.path / MANIFEST}: tensor {name} comes out other than it says; get the diff again")
    return bits


def _write_weights(
    out: HashingFile, file: Path, entries: Entries, types: Mapping[str, str], bits: Callable[[str], np.ndarray]
) -> None:
    """A safetensors file with the tensors and the metadata of another."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as reader:
        metadata = reader.metadata() or {}
    names = [name for name, entry in entries.items() if entry["file"] == file.name]
    tensors = []
    for name in sorted(names, key=lambda name: (-DTYPES[types[name]].itemsize, name)):  # keeps all of them aligned
        shape = tuple(entries[name]["shape"])
        tensors.append(RawTensor(name, types[name], shape, math.prod(shape) * DTYPES[types[name]].itemsize))
    write_header(out, tensors, metadata)
    for tensor in tensors:
        out.write(bits(tensor.name).data)


def _fill(
    folder: OutputFolder,
    weights: WeightFolder,
    others: Mapping[str, Path],
    manifest: dict[str, Any],
    types: Mapping[str, str],
    bits: Callable[[str], np.ndarray],
) -> None:
    """Write a file of bits for each weight file and copy the others; what an earlier run finished is kept."""
    files = {file.name: file for file in weights.files} | dict(others)
    there = _total_bytes(path for path in folder.path.rglob("*") if path.is_file())
    check_room(folder.target, _total_bytes(files.values()) - there)
    with Progress(_total_bytes(files.values()), "writing", "B") as progress:
        for name, path in files.items():
            if folder.find(name) is not None:
                progress.skip(os.path.getsize(path))
                continue
            with folder.writing(name) as out:
                if name in others:
                    with path.open("rb") as source:
                        shutil.copyfileobj(source, out, _BLOCK_BYTES)
                else:
                    _write_weights(out, path, manifest["tuned"]["tensors"], types, bits)
            progress.update(os.path.getsize(path))


def _other_files(model: WeightFolder) -> dict[str, Path]:
    """A model's files by relative name, but its weights. Hidden folders (.git, .cache) are none of it.

    Raises:
        CheckpointError: weights that would be handed on as they are; a name that the diff needs.
    """
    files = {}
    for folder, folders, names in os.walk(model.path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            files[(Path(folder) / name).relative_to(model.path).as_posix()] = Path(folder) / name
    files = {name: file for name, file in sorted(files.items()) if file not in model.files}
    for name, file in files.items():
        if file.suffix in PICKLED:
            raise CheckpointError(f"{file}: pickled weights would go into the diff as they are; move the file away")
        if file.suffix == ".safetensors" and "/" not in name:
            raise CheckpointError(f"{file}: is none of the model's weight files; move it away")
        if name == MANIFEST:
            raise CheckpointError(f"{file}: a diff has a file of its own by this name; move it away")
    return files


def _num_bytes(folder: WeightFolder, names: Iterable[str]) -> int:
    return sum(folder.stored[name].shape.numel() * folder.stored[name].dtype.itemsize for name in names)


def _total_bytes(paths: Iterable[Path]) -> int:
    return sum(os.path.getsize(path) for path in paths)


def _refuse_within(target: Path, sources: tuple[Path, ...]) -> None:
    for source in sources:
        if source.resolve() in target.resolve().parents:
            raise CheckpointError(f"{target}: lies within {source}; give a directory outside of it")
