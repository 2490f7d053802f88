"""What a run needs, computed from its configuration: parameters, and memory of a process by kind.

Plain arithmetic: nothing here imports torch, so a login node without a GPU can plan a run. Each kind of row says in
config/schema/kinds which rows a step has and what its loss takes. Activations are counted tensor by tensor, as autograd
keeps them for the backward pass of the layers of models/layer_specs.py; docs/planning.md says how far the result was
from what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil
from typing import Literal

from megatron_grit.config.checks.run import data_parallel_size
from megatron_grit.config.kinds import compares_rows, kind_options, loss_words, measured_passes, trained_kinds
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import (
    attention_widths,
    dense_layers,
    expert_width,
    head_channels,
    padded_vocabulary,
    read_tokens,
    reading_layers,
    stage_layers,
)
from megatron_grit.config.workload import RowWorkload, TextLengths
from megatron_grit.models.gathered_keys import gathered_keys
from megatron_grit.planning.parameters import count_adapters, count_parameters, count_trained, expert_tensor_size
from megatron_grit.planning.teacher import teacher_memory

FP32 = 4

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The rows of a step."""

    kinds: tuple[RowWorkload, ...]
    """Those of each kind that the run trains."""

    @staticmethod
    def of_config(config: RunConfig, data_size: int, lengths: TextLengths) -> Workload:
        """The rows that a configuration leads to, for texts of a stated mean length.

        Args:
            data_size: data parallel size.
            lengths: of the data.
        """
        kinds = trained_kinds(config)
        planned = {kind: kind_options(kind).plan_rows(config, data_size, lengths) for kind in kinds}
        measured = {kind: measured_passes(config, kind) for kind in kinds}
        return Workload(kinds=tuple(replace(rows, measured=measured[kind]) for kind, rows in planned.items()))

    @property
    def embedded(self) -> list[RowWorkload]:
        """Those that are embedded."""
        return [rows for rows in self.kinds if rows.embeds and rows.rows]

    @property
    def predicted(self) -> list[RowWorkload]:
        """Those whose next tokens are predicted."""
        return [rows for rows in self.kinds if not rows.embeds and rows.rows]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process."""

    stage: int
    """Its pipeline stage."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Largest size of each kind; not all are there at the same time."""
    moments: dict[str, int] = field(default_factory=dict)
    """All that is there at each moment of a step that may be the peak."""

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        return max(self.moments.values())

    @property
    def worst_moment(self) -> str:
        """When that is."""
        return max(self.moments, key=lambda name: self.moments[name])


def caches_gradients(config: RunConfig, data_size: int, rows: RowWorkload) -> bool:
    """Whether rows go through the model twice."""
    if not compares_rows(rows.kind):
        return False
    return config.training.grad_cache == "on" or ceil(rows.rows / data_size) > 1


def estimate_memory(
    config: RunConfig,
    world_size: int,
    vocab_size: int,
    workload: Workload,
    device: Device = "cuda",
    stage: int | None = None,
) -> Memory:
    """Memory of the process that needs most, or of one pipeline stage.

    Args:
        config: the run; its mesh must be possible.
        vocab_size: of the model before padding.
        device: the plain torch norm of the CPU keeps one tensor more than a GPU's.
        stage: the pipeline stage. None: the one that needs most.
    """
    stages = range(config.parallel.pipeline) if stage is None else [stage]
    every = [_StageMemory(config, world_size, vocab_size, workload, device, each).estimate() for each in stages]
    return max(every, key=lambda memory: memory.peak)


class _StageMemory:
    """The memory of one process."""

    def __init__(
        self, config: RunConfig, world_size: int, vocab_size: int, workload: Workload, device: Device, stage: int
    ) -> None:
        self.config, self.model, self.parallel = config, config.model, config.parallel
        self.workload, self.device, self.stage = workload, device, stage
        self.data_size = data_parallel_size(config, world_size)
        self.size = 2 if config.training.precision == "bf16" else FP32
        self.tensor, self.vocab_size = self.parallel.tensor, vocab_size
        self.last = stage == self.parallel.pipeline - 1
        layers = stage_layers(config, stage)
        self.num_layers = len(layers)
        reading = reading_layers(self.model)
        self.num_reading = len(set(layers).intersection(reading))
        self.encodes = bool(reading) and reading[0] in layers
        self.num_mixtures = len(set(layers).difference(dense_layers(self.model)))
        self.parameters = count_parameters(config, vocab_size, stage)
        self.adapters = count_adapters(config, stage)
        self.trained = count_trained(config, self.parameters, vocab_size, stage)
        padded = padded_vocabulary(vocab_size, self.model.vocab_multiple, self.tensor)
        self.vocabulary, self.pads_vocabulary = padded // self.tensor, padded != vocab_size
        self.expert_tensor = expert_tensor_size(config)
        expert_mesh = self.expert_tensor * self.parallel.pipeline * self.parallel.expert
        self.expert_data_size = max(1, world_size // expert_mesh)
        self.shard_size = self.parallel.context * self.data_size
        self.projected = config.embedding.projection_dim or self.model.hidden_size

    def estimate(self) -> Memory:
        """All kinds and moments."""
        workload = self.workload
        dense, experts = self.trained
        shard = dense // self.shard_size + experts // self.expert_data_size
        weights = (self.parameters.rank + sum(self.adapters)) * self.size
        gradients = (dense + experts) * FP32
        # Adam's two moments, and fp32 main weights where the model's own are bf16.
        optimizer = shard * (2 * FP32 + (FP32 if self.size == 2 else 0))
        teacher = teacher_memory(self.config, workload.predicted, self.data_size, self.vocab_size, self.stage)
        base = weights + gradients + optimizer + self._row_bytes() + teacher.weights
        kept = {rows.kind: self._activations(rows) for rows in workload.kinds}
        held = max(kept.values(), default=0)
        layer = max((self._layer_backward(rows) for rows in workload.kinds), default=0)
        embedded, predicted = (workload.embedded, workload.predicted) if self.last else ([], [])
        cached = {rows.kind for rows in embedded if caches_gradients(self.config, self.data_size, rows)}
        grad_cache = sum(
            ceil(rows.segments / self.data_size) * self.projected * FP32 for rows in embedded if rows.kind in cached
        )
        logits = {rows.kind: self._logits(rows) + teacher.logits for rows in predicted}
        pooling = {rows.kind: self._pooling(rows) for rows in embedded}
        moments = {
            "building the model": 2 * weights + gradients,
            "backward pass of a layer": base + teacher.states + grad_cache + held + layer,
            "optimizer step": base + self._optimizer_step(shard),
        }
        for kind, size in logits.items():
            moments[f"logits of {_a(kind)} row"] = base + teacher.states + grad_cache + kept[kind] + size
        for kind, size in pooling.items():
            moments[f"pooling of {_a(kind)} row"] = base + grad_cache + kept[kind] + size
        losses: dict[str, int] = {}
        for rows in embedded + predicted:
            size = kind_options(rows.kind).loss_cost(self.config, rows, self.data_size).memory
            if size:
                losses[loss_words(rows.kind)] = size
                moments[f"{loss_words(rows.kind)} loss"] = base + size + (0 if rows.kind in cached else kept[rows.kind])
        if self.stage == 0:
            # The gradient of the embedding matrix is dense; all other activations are gone by then.
            table = self.vocabulary * self.model.hidden_size * self.size
            moments["gradient of the embedding"] = base + grad_cache + table
        kinds = {
            "weights": weights,
            "gradients": gradients,
            "optimizer": optimizer,
            "activations": held + max([layer, *pooling.values()]),
            "logits": max(logits.values(), default=0),
            **losses,
            "grad cache": grad_cache,
            "teacher": teacher.weights + teacher.states,
            "rows": self._row_bytes(),
        }
        return Memory(stage=self.stage, kinds=kinds, moments=moments)

    def _row_bytes(self) -> int:
        """Tokens, positions, labels and masks of every row of the step on this rank."""
        numbers = sum((rows.rows + rows.rows_beside) * rows.row_tokens for rows in self.workload.kinds)
        every = numbers * (8 + 8 + 1 + 8 + 4)
        neighbors = sum(rows.rows * rows.row_tokens * read_tokens(self.model) * 8 for rows in self.workload.predicted)
        return (every + int(neighbors)) // self.data_size

    def _activations(self, row: RowWorkload) -> int:
        """Kept for the backward pass of the rows in flight, logits left out."""
        if not row.row_tokens:
            return 0
        tokens = ceil(row.row_tokens / self.parallel.context)
        shared = tokens // self.tensor if self.parallel.sequence_parallel else tokens
        width = self.model.hidden_size
        if self.config.training.recompute == "full":
            kept = self.num_layers * shared * width * self.size
        else:
            kept = (self.num_layers - self.num_mixtures) * self._layer_kept(row, False)
            kept += self.num_mixtures * self._layer_kept(row, True)
            kept += self.num_reading * self._cross_kept(row) + self.encodes * self._encoder_kept(row)
        kept += self._neighbors_kept(row)
        if self.stage == 0 and self.model.hidden_dropout:
            kept += shared * width * (self.size if self.device == "cpu" else 1)
        if self.model.position_embedding == "rope":
            kept += 2 * tokens * head_channels(self.model) * FP32  # angles, which all layers share
        kept += 8 * self._gathered_keys(row)  # which keys were picked, likewise
        kept = int(kept * self._rows_in_flight())
        if self.last:
            kept += self._norm_kept(shared)
        return kept

    def _rows_in_flight(self) -> float:
        """Rows whose backward pass this stage still waits for, in whole rows of all its layers."""
        rows = ceil(sum(rows.rows for rows in self.workload.kinds) / self.data_size)
        behind, chunks = self.parallel.pipeline - self.stage, self.parallel.virtual_pipeline or 1
        if chunks == 1:
            return max(1, min(rows, behind))
        # Interleaved: a warm-up of 2 (stages behind - 1) + (chunks - 1) stages chunks, and the one at work.
        return max(1.0, min(rows * chunks, 2 * (behind - 1) + (chunks - 1) * self.parallel.pipeline + 1) / chunks)

    def _layer_kept(self, row: RowWorkload, is_mixture: bool) -> int:
        """What one layer keeps without full recompute."""
        model, size = self.model, self.size
        tokens = ceil(row.row_tokens / self.parallel.context)
        shared = self._shared(tokens)
        kept = self._norm_kept(shared) * (1 if model.parallel_residual == "one_norm" else 2)
        if model.parallel_residual == "two_norms":
            kept -= shared * model.hidden_size * size  # both have the same input
        kept += 2 * self._dropout_kept(shared, model.hidden_dropout)
        gathered = self._gathered_keys(row) if self.parallel.context > 1 else None
        kept += self._attention_kept(tokens, gathered, self.config.training.recompute == "none")
        copies = self._feed_forward_copies()
        if not is_mixture:
            return kept + tokens * model.ffn_hidden_size // self.tensor * copies * size
        routed = tokens * model.moe_top_k
        # The same and once more, times the router's weight; the tokens as they were sent out.
        kept += routed * expert_width(model) // self.expert_tensor * (copies + 1) * size
        kept += routed * model.hidden_size * size
        if self.expert_tensor > 1 or self.parallel.expert > 1:
            kept += routed * model.hidden_size * size  # sorted anew on arrival
        if model.moe_shared_ffn_hidden_size:
            kept += tokens * model.moe_shared_ffn_hidden_size // self.tensor * copies * size
            kept += shared * (model.hidden_size + 2) * size * model.moe_shared_expert_gate  # its output, and the gate
        return kept + shared * ((model.num_experts or 0) * 3 * FP32 + model.moe_top_k * 24)

    def _shared(self, tokens: int) -> int:
        """Of tokens those that a tensor parallel rank has between layers."""
        return tokens // self.tensor if self.parallel.sequence_parallel else tokens

    def _dropout_kept(self, tokens: int, dropout: float) -> int:
        """The mask of what is dropped of states."""
        return tokens * self.model.hidden_size * (self.size if self.device == "cpu" else 1) if dropout else 0

    def _feed_forward_copies(self) -> int:
        """Both halves, silu of one, the other plus its offset, their product; or before and after gelu."""
        return 5 if self.model.activation == "swiglu" else 2

    def _read(self, row: RowWorkload) -> tuple[int, int]:
        """Tokens of a row and of its neighbors that a context parallel rank has, where the row reads any; at most."""
        tokens = ceil(row.row_tokens / self.parallel.context)
        return tokens, 0 if row.embeds else ceil(tokens * read_tokens(self.model))

    def _neighbors_kept(self, row: RowWorkload) -> int:
        """States of neighbors beside what the layers keep, and where they are, which layers share."""
        tokens, read = self._read(row)
        if not read:
            return 0
        states = self._shared(read) * self.model.hidden_size * self.size
        kept = 8 * (2 * tokens + read) if self.num_reading else 0
        if self.encodes:
            kept += states  # encoded
            if self.model.retro.encoder_conditioning == "chunk":
                kept += 8 * (2 * read + tokens)
            if self.config.training.recompute == "full":
                kept += states  # what the layer that encodes is given
        if self.stage:
            kept += states  # as they came, in one tensor with the row
        if not self.last:
            kept += states + self._shared(tokens) * self.model.hidden_size * self.size  # as they are sent
        return kept

    def _cross_kept(self, row: RowWorkload) -> int:
        """What cross-attention of a layer keeps beside the states of neighbors."""
        tokens, read = self._read(row)
        if not read:
            return 0
        kept = self._attended_kept(tokens, read) + self._dropout_kept(self._shared(tokens), self.model.hidden_dropout)
        if self.model.retro.gate is None:
            kept += self._shared(tokens) * self.model.hidden_size * self.size  # what the gate is multiplied with
        return kept

    def _attended_kept(self, asking: int, asked: int) -> int:
        """What attention between two sequences keeps: the norm before it; queries and keys and values as they are
        gathered into groups; the output, as it is computed and as each token's."""
        queries, keys = (width // self.tensor for width in attention_widths(self.model))
        heads = self.model.num_attention_heads // self.tensor
        return (
            self._norm_kept(self._shared(asking))
            + (3 * asking * queries + 2 * asked * keys + asked) * self.size
            + asking * heads * FP32
        )

    def _encoder_kept(self, row: RowWorkload) -> int:
        """What the encoder keeps of the neighbors of a row."""
        tokens, read = self._read(row)
        if not read:
            return 0
        model, retro = self.model, self.model.retro
        shared = self._shared(read)
        layer = 2 * self._norm_kept(shared) + 2 * self._dropout_kept(shared, retro.encoder_hidden_dropout)
        layer += self._attention_kept(read, None, True, rope=self._encoder_rotates())
        layer += read * model.ffn_hidden_size // self.tensor * self._feed_forward_copies() * self.size
        kept = retro.encoder_layers * layer
        if retro.encoder_conditioning == "chunk":
            kept += self._attended_kept(read, tokens) + self._dropout_kept(shared, retro.encoder_hidden_dropout)
        if self._encoder_rotates():
            kept += 2 * read * head_channels(model) * FP32
        return kept

    def _encoder_rotates(self) -> bool:
        return self.model.position_embedding == "rope" and self.model.retro.encoder_rope

    def _norm_kept(self, tokens: int) -> int:
        """Input and output of a norm."""
        elements = tokens * self.model.hidden_size
        if self.device == "cpu" and self.model.normalization == "rmsnorm":
            # Not fused on the CPU: input and normalised input in fp32, and the output.
            return elements * (2 * FP32 + self.size)
        return elements * 2 * self.size

    def _attention_kept(self, tokens: int, gathered: int | None, has_output: bool, rope: bool | None = None) -> int:
        """Bytes from the query-key-value projection to the output projection.

        Args:
            tokens: of the queries.
            gathered: keys that come from all context parallel ranks. None: those of the queries' tokens.
            has_output: the output of attention is kept, not computed again.
            rope: queries and keys are turned. None: as in the decoder.
        """
        queries, keys = (width // self.tensor for width in attention_widths(self.model))
        rope = self.model.position_embedding == "rope" if rope is None else rope
        kept = tokens * 2 * queries  # queries, turned where they are; the context
        if rope:
            kept += tokens * 4 * head_channels(self.model)  # sines and cosines of queries and of keys
        if gathered is not None:
            kept += gathered * 2 * keys  # in place of this rank's own
        else:
            # The projection, whose values attention keeps, and turned keys.
            kept += tokens * (queries + 2 * keys + (keys if rope else 0))
        if has_output:
            kept += tokens * self._attention_output()
        normed = 0
        if self.model.qk_norm:  # queries are copied out of the projection; not fused, both are kept once more
            fused = self.device == "cuda" or self.model.normalization == "layernorm"
            normed = tokens * (queries * self.size if fused else (2 * queries + keys) * FP32)
        return kept * self.size + normed

    def _gathered_keys(self, row: RowWorkload) -> int:
        return gathered_keys(row.row_tokens, row.segment_tokens, self.parallel.context, row.causal)

    def _attention_output(self) -> int:
        """SDPA goes segment by segment and its outputs are joined to one tensor, so both are kept."""
        backend = self.model.attention_backend
        segmentwise = backend == "sdpa" or (backend == "auto" and self.device == "cpu")
        return attention_widths(self.model)[0] // self.tensor if segmentwise else 0

    def _layer_backward(self, row: RowWorkload) -> int:
        """Most that the backward pass of a layer adds to what the forward pass kept."""
        if not row.row_tokens:
            return 0
        kinds = {False} if self.num_mixtures == 0 else {True} if self.num_mixtures == self.num_layers else {False, True}
        adds = max(self._layer_adds(row, is_mixture) for is_mixture in kinds)
        tokens, read = self._read(row)
        if not read or not self.num_reading:
            return adds
        # The gradient of the neighbors' states is there from the last layer that reads to the encoder.
        states = self._shared(read) * self.model.hidden_size * self.size
        again = self.config.training.recompute == "full"
        adds += again * self._cross_kept(row)
        if self.encodes:
            of_encoder = self._feed_forward_adds(read, self.model.ffn_hidden_size // self.tensor)
            of_encoder += read * self.model.hidden_size * self.size
            adds = max(adds, of_encoder) + again * self._encoder_kept(row)
        return states + adds

    def _layer_adds(self, row: RowWorkload, is_mixture: bool) -> int:
        model, tokens = self.model, ceil(row.row_tokens / self.parallel.context)
        width, routed, visits = model.hidden_size, tokens, tokens
        inner = model.ffn_hidden_size // self.tensor
        if is_mixture:
            inner = expert_width(model) // self.expert_tensor
            routed = tokens * model.moe_top_k
            visits = ceil(routed * self.parallel.expert / (model.num_experts or 1))
        adds = self._feed_forward_adds(visits, inner) + routed * width * (2 if is_mixture else 1) * self.size
        return adds + self._recomputed(row, is_mixture)

    def _feed_forward_adds(self, visits: int, inner: int) -> int:
        """Gradients of a feed-forward layer, or of an expert, at their worst, those of its input left out."""
        gated, width = 2 if self.model.activation == "swiglu" else 1, self.model.hidden_size
        hidden = visits * inner
        adds = max(
            hidden + width * inner,  # of the second matrix: gradients of its input and of itself
            gated * hidden,  # of the activation
            gated * width * inner - hidden * (gated - 1),  # of the first matrix, when most of the layer is gone
        )
        return adds * self.size

    def _recomputed(self, row: RowWorkload, is_mixture: bool) -> int:
        """What is computed again for the backward pass of a layer."""
        recompute = self.config.training.recompute
        if recompute == "full":
            return self._layer_kept(row, is_mixture)
        tokens = ceil(row.row_tokens / self.parallel.context)
        return tokens * self._attention_output() * self.size if recompute == "selective" else 0

    def _logits(self, row: RowWorkload) -> int:
        """The language-model head of a row, at its worst."""
        tokens, size = row.row_labels, self.size
        if self.parallel.sequence_parallel:  # then logits are taken of every token
            tokens = ceil(row.row_tokens / self.parallel.context)
        tokens = min(tokens, row.row_tokens)
        logits = tokens * self.vocabulary
        states = tokens * self.model.hidden_size * size
        copies = FP32 if size == FP32 and not self.pads_vocabulary else FP32 + size
        weight_gradient = self.vocabulary * self.model.hidden_size * size
        return states + max(logits * copies, logits * size + weight_gradient + states)

    def _pooling(self, row: RowWorkload) -> int:
        """Weighted token states in fp32, forward and backward."""
        tokens = ceil(row.row_tokens / self.parallel.context)
        copies = 2 if self.size == FP32 else 3
        return tokens * self.projected * FP32 * copies

    def _optimizer_step(self, shard: int) -> int:
        """Temporaries of Adam: one tensor at a time on the CPU, all of them at once on a GPU."""
        if self.device == "cuda":
            return shard * FP32
        model = self.model
        inner = model.ffn_hidden_size * (2 if model.activation == "swiglu" else 1) // self.tensor
        largest = model.hidden_size * max(self.vocabulary, inner)
        return 2 * min(largest, shard) * FP32


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
