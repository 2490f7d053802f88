"""The KV cache of generation: keys and values of past tokens, and of the neighbors that are read.

Shape suffix legend: L = new tokens, K = tokens so far, or of neighbors, G, J = key-value heads, H = channels of a head,
D = width.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ENCODINGS = 256
"""Encodings of neighbors that are kept, where these follow from their tokens alone."""
_AHEAD = 1024
"""Tokens that room is made for at once."""
_STATES = 0
"""In place of a layer's number, which count from 1: states that neighbors are conditioned on."""


class SequenceCache:
    """One cache for several sequences of different lengths, without padding.

    A forward pass holds one segment for each active sequence; ``active[segment]`` says which sequence it continues.
    """

    def __init__(self, num_sequences: int = 0) -> None:
        self.active = list(range(num_sequences))
        self._limits: dict[int, int] = {}
        self._places: dict[int, Tensor] = {}
        self._num_added = num_sequences
        self._buffers: dict[tuple[int, int], tuple[Tensor, int]] = {}
        self._neighbors: dict[tuple[int, int], Tensor | None] = {}
        self._encodings: dict[bytes, Tensor] = {}

    def add(self, limit: int) -> int:
        """One more sequence, active from now on.

        Args:
            limit: tokens that it will hold at most; no room is made beyond it.

        Returns:
            Its number.
        """
        number = self._num_added
        self._num_added += 1
        self._limits[number] = limit
        self.active = [*self.active, number]
        return number

    def preload(self, sequence: int, layer_number: int, key_KGH: Tensor, value_KGH: Tensor) -> None:
        """Give a sequence that holds nothing yet keys and values of a layer, for its first K tokens."""
        self._append((layer_number, sequence), torch.stack((key_KGH, value_KGH)))

    def layer(self, sequence: int, layer_number: int) -> Tensor:
        """Keys and values of all tokens of a sequence so far, [2, K, G, H]; a view that the next pass may overwrite."""
        buffer, length = self._buffers[layer_number, sequence]
        return buffer[:, :length]

    def put(self, sequence: int, places_L: Tensor | None) -> None:
        """Where the tokens of the next passes stand in a sequence; at a place that is held already they take the place
        of what is there. None: behind what is held."""
        self._places.pop(sequence, None)
        if places_L is not None:
            self._places[sequence] = places_L

    def places(self, segment: int) -> Tensor | None:
        """Where the tokens of a segment stand, of :meth:`put`: int64 [L]. None: they are the last ones."""
        return self._places.get(self.active[segment])

    def extend(self, layer_number: int, segment: int, key_LGH: Tensor, value_LGH: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's keys and values of a segment.

        Returns:
            Keys and values of all its tokens so far, [K, G, H] each; views that the next call may overwrite.
        """
        keys, values = self._extend(layer_number, segment, torch.stack((key_LGH, value_LGH)))
        return keys, values

    def extend_states(self, segment: int, states_LD: Tensor) -> Tensor:
        """Append the states that neighbors of a segment are conditioned on.

        Returns:
            Those of all its tokens so far, [K, D]; a view that the next call may overwrite.
        """
        return self._extend(_STATES, segment, states_LD[None])[0]

    def _extend(self, layer_number: int, segment: int, new: Tensor) -> Tensor:
        sequence = self.active[segment]
        return self._append((layer_number, sequence), new, self._places.get(sequence))

    def _append(self, place: tuple[int, int], new: Tensor, places_L: Tensor | None = None) -> Tensor:
        buffer, length = self._buffers.get(place, (new[:, :0], 0))
        total = length + new.shape[1] if places_L is None else max(length, int(places_L.max()) + 1)
        if total > buffer.shape[1]:
            grown = new.new_empty(len(new), self._room(total, place[1]), *new.shape[2:])
            grown[:, :length] = buffer[:, :length]
            buffer = grown
        if places_L is None:
            buffer[:, length:total] = new
        else:
            buffer[:, places_L] = new
        self._buffers[place] = (buffer, total)
        return buffer[:, :total]

    def _room(self, total: int, sequence: int) -> int:
        """Tokens to make room for: all that the sequence may hold, so that nothing is copied, unless that is far more
        than it holds; then twice as many each time, so that n tokens are copied O(n) in all, not O(n^2)."""
        return max(total, min(self._limits.get(sequence, 2 * total), 2 * total + _AHEAD))

    def keep_neighbors(self, layer_number: int, segment: int, key_value_KJH: Tensor | None) -> None:
        """Keep keys and values, side by side in the last dimension, of what a segment reads from now on.

        Args:
            layer_number: of a layer that reads.
            segment: of the pass.
            key_value_KJH: None: it reads nothing.
        """
        self._neighbors[layer_number, self.active[segment]] = key_value_KJH

    def kept_neighbors(self, layer_number: int, segment: int) -> Tensor | None:
        """What a segment reads. None: nothing."""
        return self._neighbors.get((layer_number, self.active[segment]))

    def has_encoding(self, text: bytes) -> bool:
        """Whether a text's encoding is kept."""
        return text in self._encodings

    def join_encodings(self, texts: list[bytes], encoded: dict[bytes, Tensor]) -> Tensor:
        """Keep encodings, of which those that were used last stay.

        Args:
            texts: tokens of texts, each kept or in ``encoded``.
            encoded: of texts, [K, 1, D] each.

        Returns:
            The encodings of ``texts``, one after another.
        """
        self._encodings |= encoded
        for text in texts:
            self._encodings[text] = self._encodings.pop(text)
        joined = torch.cat([self._encodings[text] for text in texts])
        for text in list(self._encodings)[:-_ENCODINGS]:
            del self._encodings[text]
        return joined

    def keep(self, sequences: list[int]) -> None:
        """Continue only these sequences, in this order, and free the others."""
        self.active = sequences
        self._buffers = {place: entry for place, entry in self._buffers.items() if place[1] in sequences}
        self._neighbors = {place: entry for place, entry in self._neighbors.items() if place[1] in sequences}
        self._places = {sequence: places for sequence, places in self._places.items() if sequence in sequences}
        self._limits = {sequence: limit for sequence, limit in self._limits.items() if sequence in sequences}
