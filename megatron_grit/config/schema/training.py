"""The loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_grit.config.knob import knob


@dataclass(kw_only=True)
class TrainingConfig:
    """The loop."""

    objective: list[str] | str = "unified"
    """What is trained: a kind of row (embedding, generative), a list of kinds, or unified, which is short for both of
    these."""
    steps: int = knob(1253, at_least=0)
    """Optimizer steps."""
    embedding_batch_size: int = knob(2048, at_least=1)
    """Queries of a global batch; every passage of it is a candidate for each of them."""
    generative_batch_size: int = knob(256, at_least=1)
    """Sequences of a global batch, with data.packing step."""
    generative_rows: int | None = knob(None, at_least=1)
    """Generative rows of a global batch, with data.packing window."""
    grad_cache: Literal["auto", "on", "off"] = "auto"
    """Embed the batch twice so that the contrastive loss sees all of it in the memory of one row. auto: on when a rank
    has more than one embedding row. off needs a row that holds a rank's share of the batch."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute precision. bf16 keeps fp32 main weights, fp32 gradients and fp32 pooling."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recompute: none, core attention, or whole layers."""
    seed: int = knob(42, at_least=0, at_most=2**32 - 1)
    """Seed of the initial weights, the data order and dropout."""
    neftune_alpha: float = knob(0.0, at_least=0)
    """NEFTune (arXiv 2310.05914): uniform noise of at most alpha / root(tokens of the sequence x width) on the token
    embeddings of rows whose next tokens are predicted, in training only. The same at every layout, on devices of one
    kind. 5 to 15 are common. 0: none."""
    trainable: list[str] = knob([], may_change=False)
    """Train these parameters, adapters and the embedding head, and freeze all others: patterns of names such as
    decoder.layers.0.* with layers and experts by their number in the whole model, or biases (BitFit), norms,
    embeddings, head. Empty: all parameters, and with adapters these alone."""
    frozen: list[str] = knob([], may_change=False)
    """Freeze these parameters, in the same notation, also where trainable names them."""
    on_nan: Literal["stop", "skip"] = "stop"
    """When a loss or gradient is not finite: stop the run, or skip the step, record it in output_dir/skipped.jsonl and
    continue with the next batch. Either way weights and optimizer stay as they were before the step."""
    max_skipped_steps: int = knob(5, at_least=1)
    """With on_nan skip, stop the run after this number of skipped steps in a row."""
    audit: Literal["on", "off"] = "on"
    """Before the first step, prove on this run's model and data that no token sees another segment, padding, or the
    future in a causal pass, that the bidirectional pass sees all of a text, that pooling and labels follow the roles,
    that ranks with the same weights hold the same, and that weights are finite (docs/audit.md)."""
    valid_interval: int | None = knob(None, at_least=1)
    """Steps between measurements of the loss on data.valid. null: only after the last step."""
    skip_train: bool = False
    """Train and save nothing: measure the newest checkpoint of output_dir, or else checkpoint.load or
    model.pretrained, on data.valid and evaluation.tasks."""
    max_minutes: float | None = knob(None, above=0)
    """Save and stop after the first step that ends this number of minutes after the start; the same command resumes.
    null: no limit."""
