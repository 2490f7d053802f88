"""The KV cache of generation: keys and values of past tokens.

Shape suffix legend: L = new tokens, K = tokens read so far, G = key-value heads, H = channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SequenceCache:
    """One cache for several sequences of different lengths, without padding.

    A forward pass holds one segment for each active sequence; ``active[segment]`` says which sequence it continues.
    """

    def __init__(self, num_sequences: int) -> None:
        self.active = list(range(num_sequences))
        self._buffers: dict[tuple[int, int], tuple[Tensor, int]] = {}

    def extend(self, layer_number: int, segment: int, key_LGH: Tensor, value_LGH: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's keys and values of a segment.

        Returns:
            Keys and values of all its tokens so far, [K, G, H] each; views that the next call may overwrite.
        """
        place = (layer_number, self.active[segment])
        new = torch.stack((key_LGH, value_LGH))
        buffer, length = self._buffers.get(place, (new[:, :0], 0))
        total = length + new.shape[1]
        if total > buffer.shape[1]:
            # Twice the room each time: a sequence of n tokens is copied O(n) in all, not O(n^2).
            grown = new.new_empty(2, max(total, 2 * buffer.shape[1], 64), *new.shape[2:])
            grown[:, :length] = buffer[:, :length]
            buffer = grown
        buffer[:, length:total] = new
        self._buffers[place] = (buffer, total)
        return buffer[0, :total], buffer[1, :total]

    def keep(self, sequences: list[int]) -> None:
        """Continue only these sequences, in this order, and free the others."""
        self.active = sequences
        self._buffers = {place: entry for place, entry in self._buffers.items() if place[1] in sequences}
