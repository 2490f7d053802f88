"""Safetensors files as bytes: where each tensor lies, whatever its type. No tensor library is asked what a NaN is.

The format: 8 bytes little-endian length of the header, the header in JSON (name to dtype, shape, data_offsets, and
``__metadata__`` of strings), then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_grit.errors import CheckpointError

WIDTHS = {
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
"""Bytes of an element. Types that pack several elements in a byte are not among them."""
MAX_HEADER = 100_000_000
"""What the safetensors library reads at most."""


class Sink(Protocol):
    """What bytes are written to."""

    def write(self, block: bytes, /) -> int:
        """Take bytes."""
        ...


@dataclass(frozen=True)
class RawTensor:
    """A tensor's bytes in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    """Offset in the file."""
    num_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension; all of them for a scalar."""
        return math.prod(self.shape[1:]) * WIDTHS[self.dtype]

    def blocks(self, size: int, limit: int | None = None) -> Iterator[bytes]:
        """The bytes in order, ``size`` at a time, the first ``limit`` of them.

        Raises:
            CheckpointError: the file became shorter.
        """
        left = self.num_bytes if limit is None else limit
        with self.file.open("rb") as source:
            source.seek(self.start)
            while left:
                block = source.read(min(size, left))
                if len(block) < min(size, left):
                    raise CheckpointError(f"{self.file}: ends within tensor {self.name}; copy the file again")
                left -= len(block)
                yield block


def read_header(path: Path) -> tuple[bytes, dict[str, str], list[RawTensor]]:
    """The header of a safetensors file.

    Returns:
        (all bytes before the first tensor's, metadata, tensors in the order of their bytes).

    Raises:
        CheckpointError: not a safetensors file, cut short, or with tensors that overlap or leave gaps.
    """
    size = os.path.getsize(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
            raise _damaged(path, "its header is longer than the file")
        header = file.read(length)
    try:
        entries = json.loads(header)
        metadata = {str(key): str(value) for key, value in entries.pop("__metadata__", {}).items()}
        tensors = [_tensor(path, name, entry, 8 + length) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(path, "its header is not a list of tensors") from None
    tensors.sort(key=lambda tensor: (tensor.start, tensor.num_bytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            raise _damaged(path, f"tensor {tensor.name} starts at byte {tensor.start}, the one before ends at {end}")
        end += tensor.num_bytes
    if end != size:
        raise _damaged(path, f"its header says {end} bytes, it has {size}")
    return prefix + header, metadata, tensors


def _tensor(path: Path, name: str, entry: dict[str, Any], data_start: int) -> RawTensor:
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    start, end = (int(offset) for offset in entry["data_offsets"])
    if dtype not in WIDTHS:
        raise CheckpointError(f"{path}: tensor {name} is of type {dtype}, which is not known here")
    if end - start != math.prod(shape) * WIDTHS[dtype] or start < 0 or min(shape, default=1) < 0:
        raise _damaged(path, f"tensor {name} has {end - start} bytes for {dtype} {list(shape)}")
    return RawTensor(name, dtype, shape, path, data_start + start, end - start)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a whole safetensors file ({why}); copy it again")


def write_header(file: Sink, tensors: list[RawTensor], dtypes: list[str], metadata: dict[str, str]) -> None:
    """Begin a file that holds tensors of the same names, shapes and sizes under other types.

    Args:
        file: where to write; the tensors' bytes are to follow in the order given.
        tensors: what the file will hold, in the order of their bytes.
        dtypes: the type of each.
        metadata: strings by name.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for tensor, dtype in zip(tensors, dtypes, strict=True):
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map tensors, which wants them aligned
    file.write(len(text).to_bytes(8, "little") + text)
