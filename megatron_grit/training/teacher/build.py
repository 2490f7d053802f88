"""The teacher that a run asks for, on its mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_grit.config.checks.run import find_problems
from megatron_grit.config.schema import AdapterConfig, RunConfig
from megatron_grit.config.schema.teacher import TeacherConfig
from megatron_grit.data.order.sources import longest_segment
from megatron_grit.data.text.tokenizer import Tokenizer, are_same_tokenizers, load_tokenizer
from megatron_grit.errors import CheckpointError, ConfigError
from megatron_grit.models.decoder import GritDecoder, build_chunks
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.random import RandomState
from megatron_grit.store.logs import get_logger
from megatron_grit.training.base_weights import base_fingerprint
from megatron_grit.training.checkpoint import read_state
from megatron_grit.training.objectives.base import Teaches
from megatron_grit.training.teacher.model import TeacherCache, TeacherModel
from megatron_grit.training.teacher.source import TeacherSource, checkpoint_source

log = get_logger(__name__)

_INSTEAD = "write what it says with megatron-grit teacher-logits and set loss.teacher.kind to topk, for any mesh"


def build_teacher(
    config: RunConfig,
    context: ParallelContext,
    tokenizer: Tokenizer,
    chunks: Sequence[GritDecoder],
    source: TeacherSource | None = None,
) -> Teaches | None:
    """What ``loss.teacher`` describes, its weights loaded and frozen; None without. Collective over all ranks.

    Random states are as before, so that the run draws what it would draw without a teacher.

    Args:
        config: the run.
        context: this process's place in the mesh.
        tokenizer: of the run.
        chunks: of the model that is trained; their weights may be loaded later.
        source: of ``loss.teacher.model``, if it is no checkpoint of ours.

    Raises:
        ConfigError, CheckpointError: the teacher cannot be read, has other tokens, or does not fit the mesh.
    """
    knobs = config.loss.teacher
    if knobs.kind == "none":
        return None
    if knobs.kind == "gold":
        log.warning(
            "loss.teacher.kind gold is the KL baseline of Instruction Modelling as published: it compares the labels' "
            f"log-probabilities alone, so its gradient is that of the next-token loss times -{knobs.weight:g}, "
            f"and the run trains with {knobs.label_weight - knobs.weight:g} of that loss; for a divergence use full or "
            "topk"
        )
    if knobs.kind == "topk":
        return TeacherCache(knobs, context)
    if knobs.model is None:
        return TeacherModel(knobs, context, chunks)
    if source is None:
        source = checkpoint_source(knobs.model)
    wanted = _run_of(config, source)
    vocab_size = _check(config, wanted, source, tokenizer, context.world_size)
    before = RandomState.capture()
    teacher = build_chunks(wanted, vocab_size, context)
    for chunk in teacher:
        chunk.requires_grad_(False)
    source.fill(teacher, context)
    before.restore()
    fingerprint = base_fingerprint(teacher, context)
    log.info(f"the teacher is {source.name}, fingerprint {fingerprint}")
    return TeacherModel(knobs, context, teacher, fingerprint)


def check_same_teacher(path: Path, name: str | None, fingerprint: str | None) -> None:
    """Refuse to resume beside another teacher than before.

    Args:
        path: the checkpoint.
        name: ``loss.teacher.model``.
        fingerprint: of its weights.

    Raises:
        CheckpointError: it was trained beside other weights.
    """
    before = read_state(path).get("teacher")
    if before is not None and fingerprint is not None and before != fingerprint:
        raise CheckpointError(
            f"{path}: was trained beside a teacher with the weights {before}, and {name} has {fingerprint} now; give "
            "loss.teacher.model the checkpoint of then, or start with checkpoint.load in another output_dir"
        )


def _run_of(config: RunConfig, source: TeacherSource) -> RunConfig:
    """The run, if its model were the teacher, whole and without adapters."""
    own = config.model  # padding decides which rank has which tokens
    model = replace(source.model, vocab_multiple=own.vocab_multiple, attention_backend=own.attention_backend)
    return replace(
        config,
        model=model,
        embedding=source.embedding,
        adapter=AdapterConfig(),
        training=replace(config.training, trainable=[], frozen=[], neftune_alpha=0.0, recompute="none"),
        loss=replace(config.loss, teacher=TeacherConfig()),
    )


def _check(config: RunConfig, wanted: RunConfig, source: TeacherSource, tokenizer: Tokenizer, world_size: int) -> int:
    """The size of the vocabulary of both."""
    key = f"loss.teacher.model {source.name}"
    for problem in find_problems(wanted, world_size, files=False):
        raise ConfigError(f"{key} does not go with this run: {problem.message}; or {_INSTEAD}")
    if wanted.model.retro.num_neighbors:
        raise ConfigError(f"{key} reads neighbors; give a model that reads none, or train its adapters: their base may")
    theirs = load_tokenizer(source.tokenizer)
    if theirs.fingerprint != tokenizer.fingerprint and not are_same_tokenizers(theirs, tokenizer):
        raise ConfigError(
            f"{key} has another tokenizer, {theirs.path}, than data.tokenizer, {tokenizer.path}; a teacher needs the "
            "same tokens"
        )
    own, other = config.model.vocab_size or tokenizer.vocab_size, wanted.model.vocab_size or theirs.vocab_size
    if own != other:
        remedy = f"set model.vocab_size to {other}" if other > own else "give a teacher with as many"
        raise ConfigError(f"{key} has {other} rows of tokens, and the trained model {own}; {remedy}")
    longest = longest_segment(config)
    if wanted.model.max_position_embeddings < longest:
        raise ConfigError(
            f"{key} takes {wanted.model.max_position_embeddings} tokens, and segments may have {longest}; lower "
            "data.tokens_per_row"
        )
    return own
