"""The start-up audit: every seeded leak is found and named, and a run is the same with it and without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_grit.config.parse import parse_train_arguments
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.kinds import embedding, generative
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.errors import AuditError
from megatron_grit.models import decoder, embedding_head, pooling
from megatron_grit.models.attention import AttentionMode, PackedAttention, PackedSegments
from megatron_grit.models.rope import RotaryAngles
from megatron_grit.models.vocabulary import OutputLayer
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.parallel.launch import parallel_job
from megatron_grit.parallel.random import RandomState
from megatron_grit.training.audit.run import audit_model, audit_weights
from megatron_grit.training.audit.weights import digest
from megatron_grit.training.optimizer import wrap_chunks
from megatron_grit.training.trainer import Trainer
from tests.corpus import tiny_run
from tests.rows import VOCAB, tiny_config

WINDOW = {"sliding_window": 64}  # beyond every segment of an audit


def run_audit(config: RunConfig, context: ParallelContext, damage: Callable[[list[Any]], None] | None = None) -> int:
    wrapped = wrap_chunks(decoder.build_chunks(config, VOCAB, context))
    if damage is not None:
        damage(wrapped)
    audit_weights([chunk.module for chunk in wrapped], context)
    return audit_model(config, context, wrapped, pad_id=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("model", "embedding", "num_passes"),
    [
        ({}, {}, 2),
        ({"experts": 4, "moe_top_k": 1}, {"pooling": "weightedmean", "projection_dim": 12}, 2),
        (WINDOW | {"tie_embeddings": True}, {"pooling": "lasttoken", "normalize": False}, 3),
        (WINDOW, {"pooling": "cls", "causal": True}, 4),
        ({"sliding_window": 2, "position_embedding": "learned_absolute", "max_position_embeddings": 12}, {}, 2),
        ({"normalization": "layernorm", "activation": "gelu", "add_bias_linear": True}, {}, 2),
        ({"parallel_residual": "two_norms", "rotary_percent": 0.5, "window_layers": [1]} | WINDOW, {}, 3),
        ({"parallel_residual": "one_norm", "rotary_interleaved": True, "add_output_bias": True}, {}, 2),
        ({"qk_norm": True, "rope_type": "yarn", "rope_factor": 4.0, "rope_original_length": 64}, {}, 2),
        ({"experts": 4, "moe_dense_layers": [2], "moe_shared_ffn_hidden_size": 48, "add_qkv_bias": True}, {}, 2),
    ],
)
def test_no_false_alarm(
    context: ParallelContext, model: dict[str, Any], embedding: dict[str, Any], num_passes: int, precision: Any
) -> None:
    config = tiny_config(**model)
    config.training.precision = precision
    for name, value in embedding.items():
        setattr(config.embedding, name, value)
    assert run_audit(config, context) == num_passes


@pytest.mark.parametrize("objective", ["embedding", "generative"])
def test_only_what_is_trained_is_audited(context: ParallelContext, objective: Any) -> None:
    config = tiny_config()
    config.training.objective = objective
    assert run_audit(config, context) == 1


def segments_changed(change: Callable[[PackedSegments], None]) -> Any:
    original = PackedSegments.of_row

    def of_row(*row: Any) -> PackedSegments:
        segments = original(*row)
        change(segments)
        return segments

    return mock.patch.object(PackedSegments, "of_row", of_row)


def lose_boundaries(segments: PackedSegments) -> None:
    segments.lengths = [sum(segments.lengths)]


def join_padding(segments: PackedSegments) -> None:
    *lengths, last, padding = segments.lengths
    segments.lengths = [*lengths, last + padding]


def shift_boundaries(segments: PackedSegments) -> None:
    first, second, *others = segments.lengths
    segments.lengths = [first + 1, second - 1, *others]


def set_mode(mode: AttentionMode) -> Callable[[PackedSegments], None]:
    return lambda segments: setattr(segments, "mode", mode)


def attention_changed(change: Callable[..., tuple[bool, int | None]], layer: int | None = None) -> Any:
    """``change(self, causal, window)`` gives what SDPA does instead."""
    original = PackedAttention._sdpa

    def sdpa(self: Any, query: Any, key: Any, value: Any, segments: Any, causal: bool, window: int | None) -> Any:
        if layer in (None, self.layer_number):
            causal, window = change(self, causal, window)
        return original(self, query, key, value, segments, causal, window)

    return mock.patch.object(PackedAttention, "_sdpa", sdpa)


def output_changed(owner: Any, name: str, change: Callable[[Any], Any]) -> Any:
    original = getattr(owner, name)
    return mock.patch.object(owner, name, lambda *args, **kwargs: change(original(*args, **kwargs)))


def row_changed(owner: Any, name: str, change: Callable[[PackedRow], None]) -> Any:
    def changed(row: PackedRow) -> PackedRow:
        change(row)
        return row

    return output_changed(owner, name, changed)


def pool_changed(change: Callable[[Any, Any, int], tuple[Any, Any]]) -> Any:
    original = pooling.pool

    def pool(states: Any, mask: Any, segment_ids: Any, num_segments: int, *rest: Any) -> Any:
        return original(states, *change(mask, segment_ids, num_segments), num_segments, *rest)

    return mock.patch.object(embedding_head, "pool", pool)


def mix_tokens(states: Any) -> Any:
    output, bias = states
    return output + 1e-3 * output.mean(0, keepdim=True), bias


def scale_later_tokens(context_T1D: torch.Tensor) -> torch.Tensor:
    return context_T1D * (1 + (torch.arange(len(context_T1D)) > 30))[:, None, None]


def rotated_by_row(original: Any = RotaryAngles.__call__) -> Any:
    def angles(self: Any, positions_T: torch.Tensor) -> Any:
        return original(self, torch.arange(len(positions_T)))

    return angles


def shifted_labels(original: Any = OutputLayer.token_losses) -> Any:
    def token_losses(self: Any, states: Any, weight: Any, row: PackedRow) -> Any:
        row = copy.copy(row)
        row.labels_1T = row.labels_1T.roll(-1, 1)  # type: ignore[union-attr]
        return original(self, states, weight, row)

    return token_losses


def positions_of_row(row: PackedRow) -> None:
    row.positions_1T = torch.arange(row.tokens_1T.shape[1])[None]
    row.max_seqlen = row.tokens_1T.shape[1]


def label_last_tokens(row: PackedRow) -> None:
    assert row.loss_mask_1T is not None
    row.loss_mask_1T[0, row.cu_seqlens[1 : len(row.record_ids) + 1].long() - 1] = 1


def mlp() -> type:
    from megatron.core.transformer.mlp import MLP

    return MLP


LEAKS: dict[str, tuple[dict[str, Any], Callable[[], Any], str]] = {
    "boundaries lost": (
        {},
        lambda: segments_changed(lose_boundaries),
        "causal pass: layer 1, attention of segment 2 sees token 1 of segment 1, .*without the boundaries of segments",
    ),
    "boundaries shifted": (
        {},
        lambda: segments_changed(shift_boundaries),
        "causal pass: layer 1, attention of segment 2 sees token 1 of segment 1, which it must not",
    ),
    "padding attended": (
        {},
        lambda: segments_changed(join_padding),
        "bidirectional pass: layer 1, attention of segment 3 sees padding, which it must not",
    ),
    "causal fallback": (
        {},
        lambda: segments_changed(set_mode(AttentionMode.CAUSAL)),
        "bidirectional pass: layer 1, attention of the first token of each segment does not see token 11 of segment 3, "
        r"which it must \(as in a causal pass\)",
    ),
    "causal fallback of one layer": (
        {},
        lambda: attention_changed(lambda self, causal, window: (True, None), layer=3),
        r"bidirectional pass: layer 3, .*\(as in a causal pass\)",
    ),
    "future seen": (
        {},
        lambda: segments_changed(set_mode(AttentionMode.BIDIRECTIONAL)),
        "causal pass: layer 1, attention of the first token of each segment sees token 2 of segment 1, which it must "
        r"not \(as in a bidirectional pass\)",
    ),
    "window in the bidirectional pass": (
        WINDOW,
        lambda: attention_changed(lambda self, causal, window: (True, self.sliding_window)),
        r"bidirectional pass: .*\(as in a causal pass with a sliding window\)",
    ),
    "window forgotten": (
        WINDOW,
        lambda: attention_changed(lambda self, causal, window: (causal, None)),
        r"causal pass with a sliding window: layer 1, attention of the last token of each .* sees token 1 .*causal",
    ),
    "window too wide by one": (
        WINDOW,
        lambda: attention_changed(lambda self, causal, window: (causal, window + 1 if causal else None)),
        "causal pass with a sliding window: .* of the last token of each segment sees token 8 of segment 1, which",
    ),
    "window not built": (
        WINDOW,
        lambda: mock.patch.dict("megatron_grit.models.layer_specs.__dict__", PackedAttention=without_window()),
        "layer 1 has the sliding window None, the configuration 64",
    ),
    "experts or MLP mix tokens": (
        {},
        lambda: output_changed(mlp(), "forward", mix_tokens),
        "layer 1, the first half of segment 2 sees token 1 of segment 1",
    ),
    "attention depends on the place in the row": (
        {},
        lambda: output_changed(PackedAttention, "forward", scale_later_tokens),
        "layer 1, attention of equal segments differs",
    ),
    "positions do not restart": (
        {},
        lambda: mock.patch.object(RotaryAngles, "__call__", rotated_by_row()),
        "the rotary angle of token 1 of segment 1 .*positions do not restart",
    ),
    "positions stand still": (
        {},
        lambda: output_changed(RotaryAngles, "__call__", lambda angles: angles[:1].expand_as(angles)),
        "two tokens of a segment have the same rotary angle",
    ),
    "learned positions do not restart": (
        {"position_embedding": "learned_absolute"},
        lambda: row_changed(generative, "make_row", positions_of_row),
        "the embedding of token 1 of segment 1 .*positions do not restart",
    ),
    "padding pooled": (
        {},
        lambda: pool_changed(lambda mask, ids, count: (torch.ones_like(mask), ids.clamp(max=count - 1))),
        "the embedding of segment 1 is made of the instruction's token 1",
    ),
    "only padding pooled": (
        {},
        lambda: pool_changed(lambda mask, ids, count: (torch.where(ids == count, 1, mask), ids.clamp(max=count - 1))),
        "the embedding of segment 3 is made of padding",
    ),
    "instruction pooled": (
        {},
        lambda: mock.patch.object(embedding, "_POOLED", np.ones_like(embedding._POOLED)),
        "the embedding of segment 1 is made of the instruction's token 1 of segment 1",
    ),
    "text left out": (
        {},
        lambda: pool_changed(lambda mask, ids, count: (mask * (mask.cumsum(0) > 1), ids)),
        "the embedding of segment 1 leaves out token 5 of segment 1",
    ),
    "another segment pooled": (
        {},
        lambda: pool_changed(lambda mask, ids, count: (mask, (ids + 1) % count)),
        "the embedding of segment 1 leaves out|the embedding of segment 1 is made of",
    ),
    "wrong mean": (
        {},
        lambda: pool_changed(lambda mask, ids, count: (mask * (1 + torch.arange(len(mask)) % 2), ids)),
        "embeddings are not the mean of their texts' states",
    ),
    "not normalised": (
        {},
        lambda: mock.patch.object(embedding_head, "normalize", lambda embeddings: embeddings * 2),
        "embedding.normalize is set, and an embedding has the norm",
    ),
    "labels shifted": (
        {},
        lambda: mock.patch.object(OutputLayer, "token_losses", shifted_labels()),
        "generative output: the loss of token .*, its label being the next token, it should be|the loss of token .* is",
    ),
    "labels cross segments": (
        {},
        lambda: row_changed(generative, "make_row", label_last_tokens),
        "generative output: token 11 of segment 1 has a loss",
    ),
    "losses of other tokens": (
        {},
        lambda: output_changed(OutputLayer, "token_losses", lambda losses: losses + 0.1 * losses.mean()),
        "has a loss|has a part in the losses of others",
    ),
}


def without_window() -> type:
    class Forgetful(PackedAttention):
        def __init__(self, *args: Any, sliding_window: Any = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    return Forgetful


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_is_found(context: ParallelContext, leak: str) -> None:
    model, damage, message = LEAKS[leak]
    with damage(), pytest.raises(AuditError, match=message) as caught:
        run_audit(tiny_config(**({"num_layers": 3} | model)), context)
    text = str(caught.value)
    assert text.startswith("start-up audit, rank 0 (tensor 0, pipeline 0, data 0): pipeline stage 0, ")
    assert text.endswith("--training.audit off") and "\n" not in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_found(context: ParallelContext, value: float) -> None:
    def spoil(wrapped: list[Any]) -> None:
        with torch.no_grad():
            wrapped[0].module.decoder.layers[1].mlp.linear_fc2.weight[3, 5] = value

    with pytest.raises(AuditError, match=r"the weight decoder.layers.1.mlp.linear_fc2.weight is not finite"):
        run_audit(tiny_config(), context, spoil)


def test_digest_tells_every_bit() -> None:
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    assert digest(values) == digest(values.clone()) == digest(torch.cat([values[:1], values])[1:])
    for place in (0, 1500, 2999):
        changed = values.clone()
        changed.view(torch.int32)[place] ^= 1
        assert digest(changed) != digest(values)
    assert digest(values.roll(2048)) != digest(values)
    assert digest(values[:7].bfloat16()) != digest(values[1:8].bfloat16())


# The run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    tiny_run(directory)
    return directory


def trained(config: RunConfig) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], str]:
    """Weights and random states after the run, and its metrics."""
    with parallel_job(config.parallel, config.training.seed) as context:
        trainer = Trainer(config, context)
        trainer.run()
        weights = {name: p.detach().clone() for name, p in trainer.chunks[0].named_parameters()}
        return weights, RandomState.capture().as_tensors(), (Path(config.output_dir) / "metrics.jsonl").read_text()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_is_the_same_with_it_and_without(corpus: Path, tmp_path: Path, overlap: bool) -> None:
    results = []
    for audit in ("on", "off"):
        config = tiny_run(corpus, experts=4)
        config.model.hidden_dropout = config.model.attention_dropout = 0.1
        config.parallel.overlap = overlap
        config.training.steps, config.training.audit = 2, audit  # type: ignore[assignment]
        config.output_dir = str(tmp_path / audit)
        results.append(trained(config))
    (weights, random, metrics), (other_weights, other_random, other_metrics) = results
    for ours, theirs in ((weights, other_weights), (random, other_random)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def numbers(text: str) -> list[str]:
        return [part for part in text.replace("{", ", ").split(", ") if "second" not in part]

    assert numbers(metrics) == numbers(other_metrics)


def test_a_run_with_a_leak_does_not_start(corpus: Path, tmp_path: Path) -> None:
    config = tiny_run(corpus)
    config.output_dir, config.training.steps = str(tmp_path / "run"), 1
    with segments_changed(lose_boundaries):
        with pytest.raises(AuditError):
            trained(config)
        assert not (tmp_path / "run" / "checkpoints").exists()
        config.training.audit = "off"
        trained(config)


def test_off_is_off_in_yaml_and_on_the_command_line(tmp_path: Path) -> None:
    assert parse_train_arguments([]).config.training.audit == "on"
    assert parse_train_arguments(["--training.audit", "off"]).config.training.audit == "off"
    for word in ("off", "'off'"):
        (tmp_path / "run.yaml").write_text(f"training:\n  audit: {word}\n")
        arguments = parse_train_arguments(["--config", str(tmp_path / "run.yaml")])
        assert arguments.config.training.audit == "off"
