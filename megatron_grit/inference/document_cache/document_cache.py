"""Keys and values of one text's tokens, without padding.

Shape suffix legend: Z = layers, T = tokens, G = key-value heads, H = channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_grit.inference.document_cache.identity import CacheIdentity
from megatron_grit.inference.document_cache.quantization import quantized, restored
from megatron_grit.inference.document_cache.rotation import moved
from megatron_grit.models.rope import RotaryAngles

Storage = Literal["fp32", "bf16", "int8", "int4"]
"""How keys and values are kept."""

_BITS = {"int8": 8, "int4": 4}
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_KEY_DIM, _VALUE_DIM = 0, 2


@dataclass(frozen=True, kw_only=True)
class DocumentCache:
    """What a model computed of a text."""

    identity: CacheIdentity
    """Of the model and the pass."""
    tokens: tuple[int, ...]
    """Ids of all tokens, template included."""
    start: int | None
    """Position of the first token by which keys are rotated; each next one is one more. None: they are not rotated."""
    storage: Storage
    shape: tuple[int, int, int, int]
    """(Z, T, G, H) of the keys, and of the values."""
    arrays: dict[str, Tensor]
    """On the host: "key" and "value", or for each the parts of
    :func:`~megatron_grit.inference.document_cache.quantization.quantized`; the first dimension of each is Z."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the text with its template; there is no padding."""
        return len(self.tokens)

    @property
    def num_bytes(self) -> int:
        """Of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @staticmethod
    def of(
        identity: CacheIdentity,
        tokens: Sequence[int],
        layers: Sequence[Tensor],
        storage: Storage,
        angles: RotaryAngles | None,
    ) -> DocumentCache:
        """A cache of what a pass computed.

        Args:
            identity: of the model and the pass.
            tokens: of the text.
            layers: keys, rotated from position 0 on, and values of each layer, [2, T, G, H].
            storage: how to keep them.
            angles: of the model. None: it has no RoPE.
        """
        arrays: dict[str, list[Tensor]] = {}
        start = None if storage in _BITS else 0
        for key_value in layers:
            key, value = key_value
            if storage in _BITS:
                key = key if angles is None else moved(angles, key.float(), 0, None)
                for name, values, dim in (("key", key, _KEY_DIM), ("value", value, _VALUE_DIM)):
                    for part, array in quantized(values, dim, _BITS[storage]).items():
                        arrays.setdefault(f"{name}_{part}", []).append(array.cpu())
            else:
                for name, values in (("key", key), ("value", value)):
                    arrays.setdefault(name, []).append(values.to("cpu", _TYPES[storage], copy=True))
        return DocumentCache(
            identity=identity,
            tokens=tuple(tokens),
            start=start,
            storage=storage,
            shape=(len(layers), *layers[0].shape[1:]),  # type: ignore[arg-type]
            arrays={name: torch.stack(several) for name, several in arrays.items()},
        )

    def layer(
        self, number: int, target: int, angles: RotaryAngles | None, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [T, G, H] each.

        Args:
            number: of the layer, from 1.
            target: position that the first token has.
            angles: of the model. None: it has no RoPE.
            dtype: of the result.
            device: of the result.
        """
        key, value = (self._restored(name, number - 1, device) for name in ("key", "value"))
        if angles is not None:
            key = moved(angles, key, self.start, target)
        return key.to(dtype), value.to(dtype)

    def _restored(self, name: str, layer: int, device: torch.device) -> Tensor:
        if self.storage not in _BITS:
            return self.arrays[name][layer].to(device)
        packed = {part: self.arrays[f"{name}_{part}"][layer].to(device) for part in ("codes", "scale", "least")}
        return restored(packed, torch.Size(self.shape[1:]), _KEY_DIM if name == "key" else _VALUE_DIM)
