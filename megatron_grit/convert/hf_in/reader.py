"""Reads a Hugging Face model's config.json and, one part at a time, its weights.

Weights are safetensors. Pickle (``pytorch_model.bin``) can run code when it is read: it is refused unless asked for,
and then only tensors are read (:mod:`~megatron_grit.convert.torch_file`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from megatron_grit.convert.param_map import Conversion, Index
from megatron_grit.convert.torch_file import read_torch_file
from megatron_grit.errors import CheckpointError

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", torch.uint8),  # since torch 2.7
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types by their names in safetensors files. Those that pack several numbers into a byte count as bytes."""
_PLAIN = (torch.float32, torch.float16, torch.bfloat16)


def read_config_json(path: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        CheckpointError: there is none, or it is not JSON.
    """
    file = path / "config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: no config.json; give the directory of a Hugging Face model") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return settings


class StoredTensor:
    """A tensor in a file: its shape is known, indexing reads only the requested part."""

    def __init__(self, folder: WeightFolder, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._folder, self.name = folder, name
        self.shape, self.dtype = torch.Size(shape), dtype

    def __getitem__(self, index: Index) -> Tensor:
        """Index with slices of leading dimensions, of step 1. The result owns its memory."""
        slices = tuple(slice(*each.indices(size)) for each, size in zip(index, self.shape, strict=False))
        shape = [each.stop - each.start for each in slices] + list(self.shape[len(slices) :])
        if not math.prod(shape):
            return torch.empty(shape, dtype=self.dtype)
        part = self._folder.read(self.name, slices)
        self._folder.bytes_read += part.numel() * part.element_size()
        return part


class WeightFolder(Mapping[str, Tensor]):
    """The tensors of a folder of weights, as a mapping that reads a tensor on access.

    Attributes:
        files: weight files in the order of their names.
        stored: each tensor's shape and dtype, and access to its parts.
        bytes_read: bytes of the parts that were read.

    Raises:
        CheckpointError: no weights; a file of the index is missing or truncated; index and files disagree; a tensor is
            in two files.
    """

    def __init__(self, path: Path, files: list[Path], index: Path | None) -> None:
        self.path, self.files, self.bytes_read = path, files, 0
        self.stored: dict[str, StoredTensor] = {}
        self._file_of: dict[str, Path] = {}
        for file in files:
            for name, shape, dtype in self.contents(file):
                if name in self._file_of:
                    raise CheckpointError(f"tensor {name} is in two files, {self._file_of[name]} and {file}")
                self._file_of[name] = file
                self.stored[name] = StoredTensor(self, name, shape, dtype)
        if index is not None:
            self._check_index(index)

    def _check_index(self, index: Path) -> None:
        for name, file in _weight_map(index).items():
            found = self._file_of.get(name)
            if found != self.path / file:
                elsewhere = "" if found is None else f"; it is in {found.name}"
                raise CheckpointError(
                    f"{self.path / file}: has no tensor {name}, though {index.name} says so{elsewhere}"
                )

    def contents(self, file: Path) -> list[tuple[str, Sequence[int], torch.dtype]]:
        """Name, shape and type of each tensor of a file."""
        raise NotImplementedError

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """A part of a tensor, by its name in the file, as a tensor that owns its memory."""
        raise NotImplementedError

    def file_of(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self._file_of[self.stored[name].name]

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors other names. A :class:`StoredTensor` keeps the one in its file."""
        self.stored = {names.get(name, name): tensor for name, tensor in self.stored.items()}

    def drop(self, name: str) -> None:
        """Leave a tensor out, if it is there."""
        self.stored.pop(name, None)

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name][()]

    def __contains__(self, name: object) -> bool:
        return name in self.stored  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class SafetensorsFolder(WeightFolder):
    """A folder of safetensors files.

    A file is mmapped only while a tensor is read: pages that were read count as memory of the process as long as the
    file stays mapped.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        super().__init__(path, _safetensors_files(path), _index_of(path, "model.safetensors"))

    def contents(self, file: Path) -> list[tuple[str, Sequence[int], torch.dtype]]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as reader:
                slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 (not a mapping)
                return [
                    (name, each.get_shape(), DTYPES.get(each.get_dtype(), torch.uint8)) for name, each in slices.items()
                ]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a whole safetensors file ({error}); copy it again") from None

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        from safetensors import SafetensorError, safe_open

        file = self._file_of[name]
        try:
            with safe_open(file, framework="pt") as reader:
                part: Tensor = reader.get_slice(name)[slices] if slices else reader.get_tensor(name)
                return part.clone(memory_format=torch.contiguous_format)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: tensor {name} cannot be read ({error}); copy the file again") from None


class PickleFolder(WeightFolder):
    """A folder of ``pytorch_model*.bin``; only tensors are read.

    Files of torch 1.6 and newer are mmapped; an older file is kept in memory while its tensors are read.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self._open: tuple[Path, dict[str, Tensor]] | None = None
        super().__init__(path, _pickle_files(path), _index_of(path, "pytorch_model.bin"))
        self._open = None

    def contents(self, file: Path) -> list[tuple[str, Sequence[int], torch.dtype]]:
        return [(name, tensor.shape, tensor.dtype) for name, tensor in self._tensors(file).items()]

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        return self._tensors(self._file_of[name])[name][slices].clone(memory_format=torch.contiguous_format)

    def _tensors(self, file: Path) -> dict[str, Tensor]:
        if self._open is None or self._open[0] != file:
            self._open = None  # before the next one is read
            self._open = (file, _load_pickle(file))
        return self._open[1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = None


def has_weights(path: Path) -> bool:
    """Whether a directory holds safetensors."""
    return next(path.glob("*.safetensors"), None) is not None or (path / "model.safetensors.index.json").exists()


def open_weights(path: Path, *, allow_pickle: bool = False) -> WeightFolder:
    """The weights of a model's directory: safetensors, or, if there are none and it is allowed, pickles.

    Raises:
        CheckpointError: as :class:`WeightFolder`.
    """
    return PickleFolder(path) if allow_pickle and not has_weights(path) else SafetensorsFolder(path)


def check_weights(plan: Iterable[Conversion], weights: WeightFolder) -> Literal["fp32", "bf16"]:
    """Check dtypes and shapes of all tensors of a plan before any is read.

    Returns:
        The precision that loses nothing: bf16 if all tensors are bf16, else fp32.

    Raises:
        CheckpointError: a tensor has another shape than config.json says, or is quantised.
    """
    types = set()
    for conversion in plan:
        for name in conversion.sources:
            stored = weights.stored[name]
            types.add(stored.dtype)
            if stored.dtype not in _PLAIN:
                dtype = str(stored.dtype).removeprefix("torch.")
                raise CheckpointError(
                    f"{weights.file_of(name)}: tensor {stored.name} has the type {dtype}; only float32, float16 and "
                    "bfloat16 are read: give the weights before they were quantised"
                )
            try:
                conversion.check(name, stored.shape)
            except CheckpointError as error:
                raise CheckpointError(f"{weights.file_of(name)}: {error}") from None
    return "bf16" if types == {torch.bfloat16} else "fp32"


def _load_pickle(file: Path) -> dict[str, Tensor]:
    found = read_torch_file(file, "tensors", "Give weights as safetensors")
    if not all(isinstance(each, Tensor) for each in found.values()):
        raise CheckpointError(f"{file}: not a state dict, names to tensors")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, OSError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(file, str) and "/" not in file for file in found.values()):
        raise CheckpointError(f"{index}: not an index of weights")
    return found


def _safetensors_files(path: Path) -> list[Path]:
    """model.safetensors, as in transformers; else those that its index lists; without one all that there are."""
    files = _files(path, "model.safetensors", "*.safetensors")
    if not files:
        pickled = sorted(path.glob("*.bin"))
        why = (
            f"; {pickled[0].name} is pickle, which can run code: save the model as safetensors, "
            "or convert it with megatron-grit convert --allow-pickle"
            if pickled
            else "; copy the model's weights into it"
        )
        raise CheckpointError(f"{path}: no *.safetensors{why}")
    return files


def _pickle_files(path: Path) -> list[Path]:
    files = _files(path, "pytorch_model.bin", "pytorch_model*.bin")
    if not files:
        raise CheckpointError(f"{path}: no *.safetensors and no pytorch_model*.bin; copy the model's weights into it")
    return files


def _index_of(path: Path, single: str) -> Path | None:
    """The index of several files. None: there is none, or it does not count beside the single file."""
    index = path / f"{single}.index.json"
    return index if index.exists() and not (path / single).is_file() else None


def _files(path: Path, single: str, pattern: str) -> list[Path]:
    if (path / single).is_file():
        return [path / single]
    index = _index_of(path, single)
    if index is None:
        return sorted(path.glob(pattern))
    files = sorted({path / name for name in _weight_map(index).values()})
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, though {index.name} names it")
    return files
