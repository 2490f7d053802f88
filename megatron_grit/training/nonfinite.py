"""Losses and gradients that are not finite: found by all ranks together before anything is updated, and explained.

A step is judged once its gradients are reduced and before the optimizer moves, so a step that is refused leaves
weights, Adam's moments and Adam's step counter as they were. The learning rate and the data are functions of the step's
number: they continue as if the step had been taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_grit.config.kinds import loss_name
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.rows.batch import PackedRow, StepBatch
from megatron_grit.errors import NumericsError
from megatron_grit.parallel.collectives import any_rank, gather_json
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.store.files import json_text, replacing
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

_SHOWN_RECORDS, _SHOWN_NAMES, _SHOWN_RANKS = 32, 4, 4


@dataclass
class RowOutcomes:
    """Whether the model's output for each row of a step was finite. Tensors stay on the device until they are asked."""

    entries: list[tuple[PackedRow, int, Tensor]] = field(default_factory=list)

    def add(self, row: PackedRow, index: int, output: Tensor) -> None:
        """Note a row's output on the last pipeline stage.

        Args:
            row: the micro-batch.
            index: counts the rows of its kind on this rank.
            output: embeddings [S, D], or token losses [T], or those and what a teacher adds, [2, T].
        """
        is_finite = torch.isfinite(output.detach())
        if is_finite.dim() > 1:
            is_finite = is_finite.all(1 if row.embeds else 0)
        self.entries.append((row, index, is_finite))

    def at_fault(self) -> list[dict[str, Any]]:
        """The rows whose output was not finite, with their records, and those records that it was not finite for."""
        found = []
        for row, index, is_finite in self.entries:
            places = (~is_finite).nonzero().squeeze(1)
            if not len(places):
                continue
            if not row.embeds:  # tokens to segments; no loss falls on padding
                places = torch.searchsorted(row.cu_seqlens.to(places.device, places.dtype), places, right=True) - 1
            bad = [row.record_ids[place] for place in places.unique().tolist()]
            loss = loss_name(row.kind)
            found.append({"loss": loss, "row": index, "records": row.record_ids, "not_finite": bad})
        return found


def parameters_at_fault(chunks: Sequence[DistributedDataParallel]) -> tuple[list[str], list[str]]:
    """Names of parameters whose gradient buffer is not finite on this rank, after the reduction.

    A rank's buffer holds the reduced gradient in the part that the rank's optimizer owns, and this rank's own gradient
    in the rest: that is how the rank at fault is told from those that it was reduced with.

    Returns:
        Names with a fault outside of the reduced part, and names with one inside only.
    """
    own: list[str] = []
    reduced: list[str] = []
    for chunk in chunks:
        names = {parameter: name for name, parameter in chunk.module.named_parameters()}
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            size, rank = buffer.data_parallel_group.size(), buffer.data_parallel_group.rank()
            for bucket in buffer.buckets:
                shard = bucket.grad_data.numel() // size
                for parameter in bucket.params_list:
                    places = (~torch.isfinite(parameter.main_grad.reshape(-1))).nonzero().squeeze(1)
                    if not len(places):
                        continue
                    places = places + parameter.main_grad.storage_offset() - bucket.grad_data.storage_offset()
                    inside = (places >= rank * shard) & (places < (rank + 1) * shard)
                    is_own = size == 1 or not bool(inside.all())
                    (own if is_own else reduced).append(names[parameter])
    return sorted(own), sorted(reduced)


class NonFiniteGuard:
    """Decides with all ranks whether a step is taken, and keeps count of those that were not.

    Args:
        config: the run; ``training.on_nan`` and ``training.max_skipped_steps``.
        context: this process's place in the mesh.
    """

    def __init__(self, config: RunConfig, context: ParallelContext) -> None:
        self.config, self.context = config, context
        self.path = Path(config.output_dir) / "skipped.jsonl"
        self.num_skipped, self._in_a_row = 0, 0

    def resume(self, start_step: int) -> None:
        """Go on counting where the run stood after ``start_step`` steps; later lines are dropped. Collective."""
        counts = [0.0, 0.0]
        if self.context.rank == 0 and self.path.exists():
            kept = list(_records_up_to(self.path, start_step))
            with replacing(self.path) as file:
                file.writelines(json_text(record) + "\n" for record in kept)
            steps = {record["step"] for record in kept}
            in_a_row = next(n for n in range(len(steps) + 1) if start_step - n not in steps)
            counts = [float(len(steps)), float(in_a_row)]
        shared = gather_json(counts, self.context)[0]
        self.num_skipped, self._in_a_row = int(shared[0]), int(shared[1])

    def takes_step(
        self,
        batch: StepBatch,
        metrics: dict[str, float],
        outcomes: RowOutcomes,
        chunks: Sequence[DistributedDataParallel],
    ) -> bool:
        """Whether the optimizer may move. Collective over all ranks.

        Args:
            batch: the step.
            metrics: its losses and ``grad_norm``.
            outcomes: of its rows.
            chunks: with reduced gradients.

        Raises:
            NumericsError: the step is not finite and ``training.on_nan`` is stop, or too many in a row were not.
        """
        names = [name for name, value in metrics.items() if not math.isfinite(value)]
        if not any_rank(bool(names), self.context):
            self._in_a_row = 0
            return True
        own, reduced = ([], []) if _losses(names) else parameters_at_fault(chunks)
        local = {
            "rank": self.context.rank,
            "place": self.context.describe(),
            "data": self.context.data_rank,
            "not_finite": {name: str(metrics[name]) for name in names},
            "rows": outcomes.at_fault(),
            "own": own,
            "reduced": reduced,
            "records": [] if _losses(names) or not own + reduced else _record_ids(batch),
        }
        reports = gather_json(local, self.context)
        reason, record = explain(reports)
        step = batch.step + 1
        if self.config.training.on_nan == "stop":
            raise NumericsError(
                f"step {step}: {reason}; weights and optimizer are those of before the step. Check these records, "
                "lower optimizer.lr, or set training.on_nan to skip"
            )
        self._skip(step, reason, record)
        return False

    def _skip(self, step: int, reason: str, record: dict[str, Any]) -> None:
        self.num_skipped += 1
        self._in_a_row += 1
        if self.context.rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_text({"step": step} | record) + "\n")
            log.warning(f"step {step} is skipped, {self.num_skipped} so far: {reason}")
        limit = self.config.training.max_skipped_steps
        if self._in_a_row >= limit:
            raise NumericsError(
                f"step {step}: {reason}; {self._in_a_row} steps in a row were not finite, and "
                f"training.max_skipped_steps is {limit}. See {self.path}; lower optimizer.lr or go back to an older "
                "checkpoint"
            )


def explain(reports: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """What all ranks' reports amount to.

    Returns:
        One line for a person; a record for skipped.jsonl, with every record id and parameter.
    """
    values = {name: value for report in reports for name, value in report["not_finite"].items()}
    # The sum of the losses and the gradient follow the loss that is at fault.
    named = [name for name in values if name.startswith("loss_")] or list(values)
    heading = ", ".join(f"{name} is {values[name]}" for name in named)
    faults = _row_faults(reports)
    if faults:
        lines = [
            f"{fault['loss']} of row {fault['row']} on {fault['rank']}: {_listed(fault['not_finite'], _SHOWN_RECORDS)}"
            for fault in faults
        ]
        return f"{heading}; {_shorten(lines, _SHOWN_RANKS, '; ', 'rows')}", {"reason": heading, "rows": faults}
    if _losses(values):
        reason = f"{heading}; the model's output is finite for every row, so it is the loss that overflows"
        return reason, {"reason": heading, "rows": []}
    culprits = _gradient_culprits(reports)
    record = {"reason": heading, "gradients": culprits}
    if not culprits:
        return f"{heading}; losses and gradients are finite, the sum of squares is not", record
    lines = [
        f"gradients of {_listed(c['parameters'], _SHOWN_NAMES)} on {c['rank']}, records {_listed(c['records'], 8)}"
        for c in culprits
    ]
    return f"{heading}, the losses are finite; " + _shorten(lines, _SHOWN_RANKS, "; ", "ranks"), record


def _row_faults(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row once, with the first of the ranks that share it."""
    rows: dict[tuple[int, str, int], dict[str, Any]] = {}
    for report in reports:
        for row in report["rows"]:
            known = rows.setdefault((report["data"], row["loss"], row["row"]), {"rank": report["place"]} | row)
            bad = {*known["not_finite"], *row["not_finite"]}  # a context parallel rank knows of its own tokens only
            known["not_finite"] = [record for record in row["records"] if record in bad]
    return list(rows.values())


def _gradient_culprits(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ranks whose own gradients are not finite. A reduced one counts where no rank has it among its own."""
    told = {name for report in reports for name in report["own"]}
    culprits = []
    for report in reports:
        names = report["own"] + [name for name in report["reduced"] if name not in told]
        if names:
            culprits.append({"rank": report["place"], "parameters": names, "records": report["records"]})
    return culprits


def _losses(names: Any) -> bool:
    return any(name != "grad_norm" for name in names)


def _record_ids(batch: StepBatch) -> list[str]:
    return [record for row in batch.rows for record in row.record_ids]


def _listed(items: list[str], limit: int) -> str:
    return _shorten(items, limit, ", ", "")


def _shorten(items: list[str], limit: int, separator: str, noun: str) -> str:
    more = f"{separator.rstrip()} and {len(items) - limit} more {noun}".rstrip() if len(items) > limit else ""
    return separator.join(items[:limit]) + more


def _records_up_to(path: Path, step: int) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a line cut short by a kill
            return
        if record["step"] <= step:
            yield record
