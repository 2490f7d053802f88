"""What rows of answered questions read: the contexts of each question, at the places where generation reads them.

The windows of a record end where its last answer begins, at each chunk_length before it and after it, as in
:class:`~megatron_grit.inference.reading.Reader`; every one of them reads all contexts of the record.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import neighbor_tokens
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.order.sources import Sources
from megatron_grit.data.qa.context_file import ContextFile
from megatron_grit.data.rows.neighbors import Neighbors, chunk_row
from megatron_grit.data.rows.segments import Segment


class ContextReader:
    """Reads what the chunks of rows read, from the contexts beside the sources.

    Args:
        config: the run, with ``model.retro.num_neighbors`` above 0.
        sources: of the rows; one without contexts reads nothing.

    Raises:
        DataError: contexts that are missing, damaged, or of another file.
    """

    version = 1
    """Contexts have no versions."""

    def __init__(self, config: RunConfig, sources: Sources) -> None:
        retro = config.model.retro
        self._k, self._length, self._num_tokens = retro.num_neighbors, retro.chunk_length, neighbor_tokens(config.model)
        self._share = retro.encoder_conditioning == "none"
        self._sources = sources
        self._files = [ContextFile(sources[number]) for number in range(len(sources))]

    def identity(self) -> str:
        """Of what is read: it is the same while the contexts are."""
        return ":".join(file.sha256 for file in self._files)

    def read(self, rows: Sequence[Sequence[Segment]]) -> list[Neighbors]:
        """What rows of some segments read.

        Raises:
            DataError: a damaged file.
        """
        return [self._read(row) for row in rows]

    def _read(self, segments: Sequence[Segment]) -> Neighbors:
        answers = [self._answer_begins(segment) for segment in segments]
        bounds = np.concatenate(([0], np.cumsum([segment.length for segment in segments])))
        firsts = [(answer - segment.start) % self._length for answer, segment in zip(answers, segments, strict=True)]
        bounds_C2, ends_C = chunk_row(bounds, [first or self._length for first in firsts], self._length)
        segment_C = np.searchsorted(bounds, bounds_C2[:, 0], side="right") - 1
        text_of_Ck = np.full((len(bounds_C2), self._k), -1, dtype=np.int64)
        texts: list[np.ndarray] = []
        for number, segment in enumerate(segments):
            contexts = self._files[segment.source].get(segment.record, self._k, self._num_tokens)
            last_C = bounds_C2[:, 1] - bounds[number] + segment.start  # of the record
            answer = answers[number]
            whole_C = ((last_C - answer) % self._length == 0) & (last_C >= min(answer, self._length))
            chunks = np.flatnonzero((segment_C == number) & whole_C).tolist() if contexts else []
            for place, chunk in enumerate(chunks):
                if not place or not self._share:
                    first = len(texts)
                    texts += contexts
                text_of_Ck[chunk, : len(contexts)] = range(first, first + len(contexts))
        return Neighbors(
            chunk_bounds_C2=bounds_C2,
            segment_ends_C=ends_C,
            text_of_Ck=text_of_Ck,
            lengths_U=np.array([len(text) for text in texts], dtype=np.int64),
            tokens_1N=torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *texts]))[None],
        )

    def _answer_begins(self, segment: Segment) -> int:
        """First token of the record's last answer; of a text without roles, of the text."""
        roles, lengths = self._sources[segment.source].spans(segment.record)
        return sum(lengths[:-1]) if roles[-1] == Role.ANSWER else 0
