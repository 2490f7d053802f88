"""The audit of a run, in the order in which a problem would show in the next check as well."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from megatron.core.distributed import DistributedDataParallel

from megatron_grit.config.kinds import load_kind, trained_kinds
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.indexed.label_weights import LabelWeights
from megatron_grit.data.rows.batch import StepBatch
from megatron_grit.data.rows.loader import KINDS
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.models.decoder import GritDecoder
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.store.logs import get_logger
from megatron_grit.training.audit.agreement import raise_if_any
from megatron_grit.training.audit.batches import BatchAudit
from megatron_grit.training.audit.layers import attention_passes, audit_layers
from megatron_grit.training.audit.outputs import audit_outputs
from megatron_grit.training.audit.rows import AuditRow, audit_row
from megatron_grit.training.audit.undisturbed import undisturbed
from megatron_grit.training.audit.weights import find_nonfinite, find_unequal_replicas

log = get_logger(__name__)


def audit(
    config: RunConfig,
    context: ParallelContext,
    wrapped: Sequence[DistributedDataParallel],
    tokenizer: Tokenizer,
    batches: Iterable[StepBatch],
) -> None:
    """Audit the data, the weights and every chunk of layers of this process. Collective over the job.

    Nothing of the run is changed: weights, gradients, random states and experts' counts are as before.

    Args:
        config: the run.
        context: this process's place in the mesh.
        wrapped: this process's chunks.
        tokenizer: of the run.
        batches: the first steps.

    Raises:
        AuditError: a problem; the same on every rank.
        GritError: as the loader.
    """
    began = time.perf_counter()
    data = BatchAudit(tokenizer, _labels(config, tokenizer))
    raise_if_any(data.check(batches), context)
    audit_weights([chunk.module for chunk in wrapped], context)
    num_passes = audit_model(config, context, wrapped, tokenizer.pad_id)
    num_layers = sum(len(chunk.module.decoder.layers) for chunk in wrapped)
    log.info(
        f"start-up audit passed in {time.perf_counter() - began:.1f} s: {num_layers} layers of this rank in "
        f"{num_passes} passes; {data.summary()}"
    )


def _labels(config: RunConfig, tokenizer: Tokenizer) -> dict[str, LabelWeights]:
    """Weights of the labels of each kind that the run trains."""
    return {kind: load_kind(KINDS, kind).STREAM.labels(config, tokenizer) for kind in trained_kinds(config)}


def audit_weights(chunks: Sequence[GritDecoder], context: ParallelContext) -> None:
    """Every weight is finite, and the same on all ranks that should hold it.

    Raises:
        AuditError: one is not.
    """
    raise_if_any(find_nonfinite(chunks), context)
    raise_if_any(find_unequal_replicas(chunks, context), context)


def audit_model(
    config: RunConfig, context: ParallelContext, wrapped: Sequence[DistributedDataParallel], pad_id: int
) -> int:
    """Each layer in each pass that the run trains, and the outputs of the last stage.

    Returns:
        Number of passes.

    Raises:
        AuditError: a token sees what it must not or does not see what it must, or an output is not what it should be.
    """
    problem = None
    with undisturbed(wrapped) as chunks:
        rows = _rows(config, context, chunks[0].num_tokens_in_vocab, pad_id)
        passes = attention_passes(config, rows)
        for chunk in chunks:
            for attention_pass in passes:
                found = audit_layers(chunk, attention_pass, config, context)
                problem = problem or found  # never skip one: other ranks take part
            if chunk.post_process:
                for row in rows:
                    found = audit_outputs(chunk, row, config, context)
                    problem = problem or found
    raise_if_any(problem, context)
    return len(passes)


def _rows(config: RunConfig, context: ParallelContext, vocab_size: int, pad_id: int) -> list[AuditRow]:
    """A row of each kind that the run trains, on the device; the causal pass, which tells most, first."""
    rows = []
    for kind in trained_kinds(config):
        made = audit_row(kind, vocab_size, pad_id, context.row_multiple, config.model.max_position_embeddings)
        rows.append(AuditRow(made.row.to(context.device), made.bounds))
    return sorted(rows, key=lambda row: row.row.embeds)
