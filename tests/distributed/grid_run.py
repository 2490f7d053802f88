"""Run cases of the layout grid on gloo ranks, and compare what each rank holds with its part of the reference.

Weights go into a rank's model, and gradients come out of it, as the sharded state dict says which part of which
parameter the rank holds. A wrong offset there gives a rank weights that the reference has elsewhere, and so another
loss. No gradient leaves its rank: it says how far each of its parts is from the reference's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from torch import Tensor

from megatron_grit.config.schema import RunConfig
from tests.distributed.grid_cases import Case, batch_of, config_of, make_rows
from tests.distributed.plain_model import Reference, draw_weights, first_update, reference_step, teacher_of
from tests.rows import VOCAB

MAX_LOSS_ERROR = 1e-6
MAX_GRADIENT_ERROR = 1e-5
MAX_COSINE_LOSS = 1e-6
MAX_SECOND_ERROR = 1e-5
"""Of the metrics of the second step, whose weights Adam's division has made less exact."""
# fp32 may decide otherwise than fp64 where two experts, or a similarity and its limit, are closer than this.
CLOSE = 1e-5

Damage = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A case to run on every rank."""

    name: str
    case: Case
    reference: str
    """File of the weights and gradients."""
    damage: Damage | None = None
    """Breaks something while the case runs."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How far a layout is from the reference, relative to it."""

    loss: float
    """Largest of any reported loss, on any rank."""
    gradient: float
    """Largest of any parameter."""
    parameter: str
    """Which that is."""
    text_gradient: float | None
    """Of the gradient with respect to the embeddings, all texts together. None without texts."""
    text_cosine: float | None
    second: float
    """Largest of any metric of the second step, on any rank."""
    problems: list[str] = field(default_factory=list)
    """What is beyond the bounds, in words."""


class References:
    """Weights and what a step gives from them, computed once for all layouts that share them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.known: dict[str, tuple[Reference, Reference]] = {}

    def of(self, case: Case) -> tuple[Reference, Reference]:
        """The references of both steps."""
        return self.known[self._computed(case)[0]]

    def _computed(self, case: Case) -> tuple[str, Path]:
        """The key of the reference, and the file for the ranks."""
        key = hashlib.sha256(case.reference_key().encode()).hexdigest()[:16]
        path = self.directory / f"{key}.safetensors"
        if key not in self.known:
            config, rows, second = config_of(case), make_rows(case), case.second()
            for seed in range(case.seed, case.seed + 50):
                weights = draw_weights(config, VOCAB, seed)
                reference = reference_step(config, weights, rows, case.num_queries, case.group_size)
                # All negatives may be too similar to count: then there is nothing to compare.
                trains = reference.text_gradients is None or reference.text_gradients.norm() > 1e-3
                if not (reference.narrowest > CLOSE and trains):
                    continue
                updated = first_update(config, weights, reference)
                after = reference_step(config, updated, make_rows(second), second.num_queries, case.group_size)
                if after.narrowest > CLOSE:
                    break
            else:
                raise ValueError(f"no set of weights gives gradients without decisions closer than {CLOSE}: {case}")
            tensors = {f"weight {name}": weight for name, weight in weights.items()}
            tensors |= {f"gradient {name}": gradient for name, gradient in reference.gradients.items()}
            safetensors.torch.save_file(tensors, path)
            self.known[key] = reference, after
        return key, path

    def job(self, name: str, case: Case, damage: Damage | None = None) -> Job:
        """A case with its reference on disk."""
        return Job(name=name, case=case, reference=str(self._computed(case)[1]), damage=damage)


def run_jobs(jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """Every job, one after another. Runs on each rank."""
    results = {}
    for job in jobs:
        try:
            with nullcontext() if job.damage is None else job.damage():
                results[job.name] = _run(job)
        except BaseException as error:
            error.add_note(f"while running {job.name}: {job.case}")
            raise
    return results


def _run(job: Job) -> dict[str, Any]:
    from megatron_grit.models.decoder import build_chunks
    from megatron_grit.parallel.launch import parallel_job
    from megatron_grit.training.optimizer import build_optimizer, build_schedule, set_learning_rate, wrap_chunks
    from megatron_grit.training.step import TrainStep

    config = config_of(job.case)
    tensors = safetensors.torch.load_file(job.reference)
    with parallel_job(config.parallel, seed=1) as context:
        chunks = build_chunks(config, VOCAB, context)
        with torch.no_grad():
            for part in parts_of(chunks, context):
                part.fill(tensors)
        wrapped = wrap_chunks(chunks, config.parallel.overlap)
        optimizer = build_optimizer(config, wrapped)
        schedule = build_schedule(config, optimizer)
        step = TrainStep(config, context, wrapped, optimizer, _teacher(config, context))
        update, parts = optimizer.step, []

        def compare_and_update() -> Any:
            if not parts:
                parts.extend(_compare_gradients(chunks, wrapped, context, tensors))
            return update()

        metrics, texts = [], []
        with mock.patch.object(optimizer, "step", compare_and_update):
            for number, case in enumerate((job.case, job.case.second())):
                batch = batch_of(case, make_rows(case), context.data_rank, context.data_size)
                set_learning_rate(schedule, number)
                with _noting_text_gradients(context.data_size * context.context_size) as found:
                    metrics.append(step(batch))
                texts.append(found)
        return {"metrics": metrics, "parts": parts, "texts": texts[0]}


def _teacher(config: RunConfig, context: Any) -> Any:
    """The teacher of the plain model, on the mesh; the cache that rows have; None."""
    from megatron_grit.models.decoder import build_chunks
    from megatron_grit.training.teacher.model import TeacherCache, TeacherModel

    knobs = config.loss.teacher
    if knobs.kind in ("none", "topk"):
        return TeacherCache(knobs, context) if knobs.kind == "topk" else None
    wanted, weights = teacher_of(config, VOCAB)
    chunks = build_chunks(wanted, VOCAB, context)
    with torch.no_grad():
        for part in parts_of(chunks, context):
            part.fill({f"weight {name}": weight for name, weight in weights.items()})
    return TeacherModel(knobs, context, chunks)


def _compare_gradients(
    chunks: list[Any], wrapped: list[Any], context: Any, tensors: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """Each part's gradient against the reference. The weights, whose place it takes meanwhile, are as before."""
    _gather_gradients(wrapped)
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    weights = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.main_grad)
        parts = [part.compare(tensors) for part in parts_of(chunks, context)]
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    return parts


@dataclass
class _Part:
    """What a rank holds of a parameter."""

    key: str
    tensor: Tensor
    place: tuple[int, ...]
    """Layer and expert, where parameters of several are stacked."""
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the whole parameter."""

    def _of(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """The part of a tensor over the whole model, and where in this rank's it is: the rest pads the vocabulary."""
        ends = [min(start + size, limit) for start, size, limit in zip(*self._bounds(whole), strict=True)]
        inside = tuple(slice(start, max(start, end)) for start, end in zip(self.offset, ends, strict=True))
        part = whole[self.place][inside]
        return part, self.tensor[tuple(slice(0, size) for size in part.shape)]

    def _bounds(self, whole: Tensor) -> tuple[Any, ...]:
        return self.offset, self.tensor.shape, whole.shape[len(self.place) :]

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Copy the weights into the model."""
        part, held = self._of(tensors[f"weight {self.key}"])
        held.copy_(part)

    def compare(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Squared error of what the tensor holds against the gradient; what pads the vocabulary must be zero."""
        expected = torch.zeros(self.tensor.shape, dtype=torch.float64)
        part, _ = self._of(tensors[f"gradient {self.key}"])
        expected[tuple(slice(0, size) for size in part.shape)] = part
        return {
            "name": self.key + "".join(f"[{number}]" for number in self.place),
            "offset": list(self.offset),
            "error": float((self.tensor.detach().double() - expected).square().sum()),
            "norm": float(expected.square().sum()),
            "size": self.tensor.numel(),
            "whole": math.prod(self.shape),
        }


def parts_of(chunks: list[Any], context: Any) -> Iterator[_Part]:
    """Every part of a parameter that this process holds; both halves of a gated layer's first matrix are parts."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from megatron_grit.training.checkpoint import model_state

    state = model_state(chunks, context)
    for chunk in [state] if len(chunks) == 1 else state.values():
        for entry in chunk.values():
            built = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
            for part in built:
                if isinstance(part, ShardedTensor):
                    stacked = part.prepend_axis_num
                    place, offset = part.global_offset[:stacked], part.global_offset[stacked:]
                    yield _Part(part.key, part.data, place, offset, part.global_shape[stacked:])


def _gather_gradients(wrapped: list[Any]) -> None:
    """Each data parallel rank has reduced the gradients that its part of the optimizer needs: put them together."""
    for chunk in wrapped:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                own = bucket.grad_data.view(ranks.size(), -1)[ranks.rank()].clone()
                parts = [torch.empty_like(own) for _ in range(ranks.size())]
                torch.distributed.all_gather(parts, own, group=ranks)
                bucket.grad_data.copy_(torch.cat(parts))


@contextmanager
def _noting_text_gradients(replicas: int) -> Iterator[dict[int, list[float]]]:
    """Collect the gradient with respect to each embedding that this rank computes, by its place in the global list.

    A rank's is ``replicas`` times that of the loss: the engine takes the mean over ranks, and the losses are shares of
    a sum.
    """
    from megatron_grit.training.objectives.embedding import EmbeddingObjective

    found: dict[int, list[float]] = {}
    original = EmbeddingObjective.row_loss

    def row_loss(self: EmbeddingObjective, index: int, row: Any, output: Tensor) -> Any:
        def note(gradient: Tensor) -> None:
            found.update(zip(row.slots_S.tolist(), (gradient / replicas).tolist(), strict=True))

        output.register_hook(note)
        return original(self, index, row, output)

    with mock.patch.object(EmbeddingObjective, "row_loss", row_loss):
        yield found


def judge(references: tuple[Reference, Reference], ranks: Sequence[dict[str, Any]]) -> Verdict:
    """Put the ranks' reports of one case together."""
    reference, after = references
    loss, problems = _metric_errors(reference, [rank["metrics"][0] for rank in ranks], MAX_LOSS_ERROR)
    second, later = _metric_errors(after, [rank["metrics"][1] for rank in ranks], MAX_SECOND_ERROR)
    problems += [f"second step: {problem}" for problem in later]
    errors, missing = _parameter_errors(reference, ranks)
    problems += missing
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= MAX_GRADIENT_ERROR:
        problems.append(f"gradient of {worst}: relative error {errors[worst]:.2e}")
    text_error = text_cosine = None
    if reference.text_gradients is not None:
        text_error, text_cosine = _text_errors(reference.text_gradients, ranks)
        if not (text_error <= MAX_GRADIENT_ERROR and text_cosine >= 1 - MAX_COSINE_LOSS):
            problems.append(f"gradient of the embeddings: relative error {text_error:.2e}, cosine {text_cosine:.8f}")
    return Verdict(
        loss=loss,
        gradient=errors[worst],
        parameter=worst,
        text_gradient=text_error,
        text_cosine=text_cosine,
        second=second,
        problems=problems,
    )


def _metric_errors(reference: Reference, ranks: Sequence[dict[str, float]], largest: float) -> tuple[float, list[str]]:
    """Largest relative error of what the ranks report, and what is beyond the bound or not the same on all of them."""
    problems, worst = [], 0.0
    if any(metrics != ranks[0] for metrics in ranks):
        problems.append(f"ranks report different metrics: {list(ranks)}")
    missing = ranks[0].keys() ^ reference.metrics.keys()
    if not missing <= {"accuracy_emb"}:
        problems.append(f"metrics that one has and the other has not: {sorted(missing)}")
    for name in reference.metrics.keys() & ranks[0].keys():
        expected = reference.metrics[name]
        # A loss below 1 is a small difference of large logarithms, in which fp32 has no more digits than that.
        is_norm = name == "grad_norm"
        scale = abs(expected) if is_norm else max(abs(expected), 1.0)
        error = max(abs(metrics[name] - expected) / scale for metrics in ranks)
        worst = max(worst, error)
        bound = max(largest, MAX_GRADIENT_ERROR) if is_norm else largest
        if not error <= bound:
            problems.append(f"{name}: relative error {error:.2e}")
    return worst, problems


def _parameter_errors(reference: Reference, ranks: Sequence[dict[str, Any]]) -> tuple[dict[str, float], list[str]]:
    """Relative error of each parameter, from the rank that is furthest off for each of its parts."""
    worst: dict[str, dict[tuple[int, ...], dict[str, Any]]] = {}
    for rank in ranks:
        for part in rank["parts"]:
            place = worst.setdefault(part["name"], {})
            offset = tuple(part["offset"])
            # Written so that not-a-number counts as further.
            if offset not in place or not part["error"] <= place[offset]["error"]:
                place[offset] = part
    errors, missing = {}, []
    for name, parts in worst.items():
        covered, whole = sum(part["size"] for part in parts.values()), next(iter(parts.values()))["whole"]
        if covered != whole:
            missing.append(f"{name}: ranks hold {covered} of its {whole} elements")
        error, norm = (math.sqrt(sum(part[kind] for part in parts.values())) for kind in ("error", "norm"))
        errors[name] = error / norm if norm else error
    stacked = {name.split("[")[0] for name in worst}
    missing += [f"{name}: no rank has it" for name in reference.gradients if name not in stacked]
    return errors, missing


def _text_errors(expected: Tensor, ranks: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Relative error and cosine over all texts; of several ranks that have a text, the one furthest off."""
    ours = torch.full_like(expected, torch.nan)
    for rank in ranks:
        for slot, gradient in rank["texts"].items():
            row = torch.tensor(gradient, dtype=torch.float64)
            before = ours[int(slot)]
            if before.isnan().any() or (row - expected[int(slot)]).norm() > (before - expected[int(slot)]).norm():
                ours[int(slot)] = row
    cosine = torch.nn.functional.cosine_similarity(ours.flatten(), expected.flatten(), 0)
    return float((ours - expected).norm() / expected.norm()), float(cosine)


def layout_of(config: RunConfig) -> str:
    """A case's mesh in a few characters, for tables: "tp2 sp pp2 vpp2 cp2 ep2"."""
    parallel = config.parallel
    named = {"tp": parallel.tensor, "pp": parallel.pipeline, "vpp": parallel.virtual_pipeline or 1}
    named |= {"cp": parallel.context, "ep": parallel.expert}
    words = [f"{name}{size}" for name, size in named.items() if size > 1]
    flags = {"sp": parallel.sequence_parallel, "overlap": parallel.overlap}
    return " ".join(words + [name for name, is_on in flags.items() if is_on]) or "data"
