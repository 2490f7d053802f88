"""The header of a safetensors file that is written one tensor after another; the library writes all of them at once.

The format: 8 bytes little-endian length of the header, the header in JSON (name to dtype, shape, data_offsets, and
``__metadata__`` of strings), then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_grit.store.digest import HashingFile


@dataclass(frozen=True)
class RawTensor:
    """What the header says of a tensor."""

    name: str
    dtype: str
    """As safetensors names it, such as BF16."""
    shape: tuple[int, ...]
    num_bytes: int


def write_header(file: HashingFile, tensors: Sequence[RawTensor], metadata: Mapping[str, str]) -> None:
    """Begin a file.

    Args:
        file: where to write; the tensors' bytes are to follow.
        tensors: what the file will hold, in the order of their bytes.
        metadata: strings by name.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map tensors, which wants them aligned
    file.write(len(text).to_bytes(8, "little") + text)
