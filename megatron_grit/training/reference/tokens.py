"""Log-probabilities of single tokens of a run's records under the model that it starts from.

They are computed before the first step, by the model of the run on its mesh, for all records of its sources, and kept
on disk: a folder for each source, named by a digest of all that they follow from, with ``tokens.npy``, float32 in the
order of the ``.bin``, 0 for tokens that are no labels, and ``identity.json``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_grit import compat
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.packing import fill_rows
from megatron_grit.data.rows.segments import Segment
from megatron_grit.data.rows.stream import PlannedRow, RowStream, cache_folder
from megatron_grit.errors import CheckpointError, DataError
from megatron_grit.models.decoder import GritDecoder, Output
from megatron_grit.parallel.collectives import any_rank, from_last_stage, gather_in_order
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.store.digest import digest_of_settings, sha256_of_file
from megatron_grit.store.files import replacing, write_json
from megatron_grit.store.logs import get_logger
from megatron_grit.store.progress import Progress
from megatron_grit.store.rows import read_rows
from megatron_grit.training.reference.cache import identity_of_model
from megatron_grit.training.teacher.model import forward_rows, frozen

log = get_logger(__name__)

_ROWS_AT_ONCE = 8
"""Rows of a data parallel rank between two exchanges."""


class TokenLogProbs:
    """Reads log-probabilities by source and record.

    Args:
        config: the run.
        context: this process's place in the mesh.
        stream: makes rows of records.
        weights: fingerprint of the weights.
        with_adapters: leave adapters on.

    Raises:
        DataError: a damaged file.
    """

    def __init__(
        self, config: RunConfig, context: ParallelContext, stream: RowStream, weights: str, *, with_adapters: bool
    ) -> None:
        self._with_adapters = with_adapters
        self._config, self._context, self._stream = config, context, stream
        sources = stream.sources
        identities = [
            {
                "what": "log-probabilities of labels 1",
                "data": sources.identity([number])[0],
                **identity_of_model(config, weights),
                "longest": [sources.longest_segment, sources.rules.policy],
            }
            for number in range(len(sources))
        ]
        root = Path(cache_folder(config)) / "log_probs"
        self._folders = [root / digest_of_settings(identity)[:24] for identity in identities]
        self._identities = identities
        self._values = [self._read(number) for number in range(len(sources))]
        self._starts = [np.concatenate(([0], np.cumsum(sources[number].lengths()))) for number in range(len(sources))]

    def _read(self, source: int) -> np.ndarray | None:
        folder = self._folders[source]
        described, array = folder / "identity.json", folder / "tokens.npy"
        if not described.is_file():
            return None
        try:
            found = json.loads(described.read_bytes())
            if found.pop("sha256") != sha256_of_file(array) or found != self._identities[source]:
                raise ValueError("does not match its checksum")
            return read_rows(array, np.float32, mapped=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            remedy = "remove its folder, so that it is computed again"
            raise DataError(f"cannot be read ({error}); {remedy}", path=array) from None

    def of(self, source: int, record: int, start: int, stop: int) -> np.ndarray:
        """Of tokens ``start`` to ``stop - 1`` of a record: float32."""
        values, first = self._values[source], self._starts[source][record]
        assert values is not None
        return np.array(values[first + start : first + stop])

    def complete(self, chunks: Sequence[GritDecoder], pad_id: int, *, resumed: bool) -> None:
        """Compute what is missing under the weights that there are, and write it. Collective.

        Args:
            chunks: of this process.
            pad_id: token of the padding.
            resumed: the weights are those of a later step, so that nothing may be missing.

        Raises:
            CheckpointError: something is.
        """
        for source, values in enumerate(self._values):
            if not any_rank(values is None, self._context):
                continue
            if resumed:
                raise CheckpointError(
                    f"{self._folders[source]}: the log-probabilities of {self._stream.sources.names[source]} under the "
                    "model that the run started from are gone; start again with checkpoint.load in another output_dir"
                )
            self._compute(source, chunks, pad_id)

    def _compute(self, source: int, chunks: Sequence[GritDecoder], pad_id: int) -> None:
        sources = self._stream.sources
        records = range(len(sources[source]))
        values = np.zeros(int(self._starts[source][-1]), dtype=np.float32)
        log.info(f"computing log-probabilities of {len(records):,} records of {sources.names[source]}")
        budget = self._config.data.tokens_per_row * _ROWS_AT_ONCE * self._context.data_size
        with Progress(len(records), "log-probabilities", "record", enabled=self._context.rank == 0) as bar:
            segments: list[Segment] = []
            for record in records:
                segments += self._stream.segments_of(source, record)
                if sum(segment.length for segment in segments) >= budget or record == records[-1]:
                    self._forward(segments, values, chunks, pad_id)
                    segments = []
                bar.update(1)
        self._values[source] = values
        if self._context.rank == 0:
            folder = self._folders[source]
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / "tokens.npy", "wb") as file:
                np.save(file, values, allow_pickle=False)
            digest = sha256_of_file(folder / "tokens.npy")
            write_json(folder / "identity.json", self._identities[source] | {"sha256": digest})
        any_rank(False, self._context)  # the file is there for all that look for it from now on

    def _forward(self, segments: list[Segment], values: np.ndarray, chunks: Sequence[GritDecoder], pad_id: int) -> None:
        """Run segments of a source through the mesh, and put what was found into its place on all ranks."""
        if not segments:
            return
        context, multiple = self._context, self._context.row_multiple
        lengths = np.array([segment.length for segment in segments], dtype=np.int64)
        rows = fill_rows(lengths, self._config.data.tokens_per_row, np.zeros(len(segments), dtype=bool))
        row_length = -(-max(int(lengths[row].sum()) for row in rows) // multiple) * multiple
        shares = [list(range(rank, len(rows), context.data_size)) for rank in range(context.data_size)]
        mine = (shares[context.data_rank] + [0] * len(shares[0]))[: len(shares[0])]  # all have as many as the first
        made = [self._row(segments, rows[number], row_length, pad_id) for number in mine]
        with torch.no_grad(), frozen(chunks, with_adapters=self._with_adapters):
            outputs = forward_rows(chunks, context, made, Output.TOKEN_LOSSES, row_length, "log-probabilities")
        compat.take_balancing_loss()
        found = torch.zeros(len(rows), row_length, device=context.device)
        if context.is_last_stage:
            local = torch.stack([-output for output in outputs])[: len(shares[context.data_rank])]
            if context.context_size > 1:
                torch.distributed.all_reduce(local, group=context.context_group)
            found = gather_in_order(local.contiguous(), [torch.tensor(share) for share in shares], context.data_group)
        on_host = from_last_stage(found, context).cpu().numpy()
        for number, row in enumerate(rows):
            end = 0
            for segment in (segments[place] for place in row.tolist()):
                begin, end = end, end + segment.length
                first = int(self._starts[segment.source][segment.record]) + segment.start
                values[first + 1 : first + segment.length] = on_host[number, begin : end - 1]

    def _row(self, segments: list[Segment], row: np.ndarray, row_length: int, pad_id: int) -> PackedRow:
        chosen = [segments[place] for place in row.tolist()]
        planned = PlannedRow(segments=chosen, slots=np.arange(len(chosen)))
        return self._stream.make_row(planned, row_length, pad_id).to(self._context.device)
