"""What a run needs, computed from its configuration: parameters, and memory of a process by kind.

Plain arithmetic: nothing here imports torch, so a login node without a GPU can plan a run. Activations are counted
tensor by tensor, as autograd keeps them for the backward pass of the layers of models/layer_specs.py; docs/planning.md
says how far the result was from what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import Literal, NamedTuple

from megatron_grit.config.checks.run import data_parallel_size
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import (
    attention_widths,
    dense_layers,
    expert_width,
    head_channels,
    padded_vocabulary,
    stage_layers,
)
from megatron_grit.models.gathered_keys import gathered_keys
from megatron_grit.planning.adapters import count_adapters, count_trained
from megatron_grit.planning.parameters import count_parameters, expert_tensor_size

FP32 = 4
SIMILARITIES_AT_ONCE = 1 << 24
"""losses/contrastive.py's CHUNK_ELEMENTS, which this layer may not import; a test compares them."""

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The rows of a step."""

    embedding_tokens: int = 0
    """Tokens of the texts of the global batch."""
    generative_tokens: int = 0
    """Tokens of the sequences of the global batch."""
    supervised_tokens: int = 0
    """Labels of the global batch."""
    embedding_rows: int = 0
    """Rows of the global batch."""
    generative_rows: int = 0
    """Rows of the global batch."""
    num_texts: int = 0
    """Queries and passages of the global batch."""
    num_queries: int = 0
    """Queries of the global batch."""
    text_tokens: float = 1.0
    """Mean length of a text; attention pays for it."""
    sequence_tokens: float = 1.0
    """Mean length of a sequence."""
    embedding_row_tokens: int = 0
    """Longest embedding row."""
    generative_row_tokens: int = 0
    """Longest generative row."""
    row_labels: int = 0
    """Most labels of a generative row."""

    @staticmethod
    def of_config(
        config: RunConfig,
        data_size: int,
        *,
        text_tokens: int = 256,
        sequence_tokens: int = 1024,
        supervised_share: float = 1.0,
    ) -> Workload:
        """The rows that a configuration leads to, for texts of a stated mean length.

        Args:
            config: the run.
            data_size: data parallel size.
            text_tokens: mean tokens of a query or passage; no more than a row holds.
            sequence_tokens: mean tokens of a generative sequence.
            supervised_share: share of the generative tokens that are labels.
        """
        training, data = config.training, config.data
        row, multiple = data.tokens_per_row, data.num_rows_multiple or data_size
        text_tokens, sequence_tokens = min(text_tokens, row), min(sequence_tokens, row)
        num_queries = 0 if training.objective == "generative" else training.embedding_batch_size
        num_texts = num_queries * (1 + data.train_group_size)
        embedding_tokens = num_texts * text_tokens
        embedding_rows = _round_up(ceil(embedding_tokens / row), multiple)
        generative_tokens = 0 if training.objective == "embedding" else training.generative_batch_size * sequence_tokens
        generative_rows = _round_up(ceil(generative_tokens / row), multiple)
        if generative_tokens and data.packing == "window":
            generative_rows = training.generative_rows or multiple
            generative_tokens = generative_rows * row
        # Rows of a step are nearly equal, but a row of what fills the fewest rows may be full.
        longest = min(row, max(generative_tokens // max(generative_rows, 1), sequence_tokens))
        generative_row = row if generative_rows > multiple else longest
        return Workload(
            embedding_tokens=embedding_tokens,
            generative_tokens=generative_tokens,
            supervised_tokens=int(generative_tokens * supervised_share),
            embedding_rows=embedding_rows,
            generative_rows=generative_rows,
            num_texts=num_texts,
            num_queries=num_queries,
            text_tokens=text_tokens,
            sequence_tokens=sequence_tokens,
            embedding_row_tokens=row
            if embedding_rows > multiple
            else min(row, max(text_tokens, embedding_tokens // max(embedding_rows, 1))),
            generative_row_tokens=generative_row,
            row_labels=ceil(generative_row * supervised_share),
        )


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


def caches_gradients(config: RunConfig, world_size: int, workload: Workload) -> bool:
    """Whether texts are embedded twice."""
    rows_of_a_rank = ceil(workload.embedding_rows / data_parallel_size(config, world_size))
    return config.training.grad_cache == "on" or rows_of_a_rank > 1


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
        world_size: number of processes.
        vocab_size: of the model before padding.
        workload: rows of a step.
        device: the plain torch norm of the CPU keeps one tensor more than a GPU's.
        stage: the pipeline stage. None: the one that needs most.
    """
    stages = range(config.parallel.pipeline) if stage is None else [stage]
    every = [_StageMemory(config, world_size, vocab_size, workload, device, each).estimate() for each in stages]
    return max(every, key=lambda memory: memory.peak)


class _Row(NamedTuple):
    """A row of one kind, all segments of the mean length."""

    tokens: int
    segment_tokens: float
    causal: bool


class _StageMemory:
    """The memory of one process."""

    def __init__(
        self, config: RunConfig, world_size: int, vocab_size: int, workload: Workload, device: Device, stage: int
    ) -> None:
        self.config, self.model, self.parallel = config, config.model, config.parallel
        self.workload, self.device, self.stage = workload, device, stage
        self.data_size = data_parallel_size(config, world_size)
        self.size = 2 if config.training.precision == "bf16" else FP32
        self.tensor = self.parallel.tensor
        self.last = stage == self.parallel.pipeline - 1
        layers = stage_layers(config, stage)
        self.num_layers = len(layers)
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
        static = weights + gradients + optimizer
        cached = caches_gradients(self.config, self.data_size * self._model_size(), workload)
        local_texts = ceil(workload.num_texts / self.data_size)
        grad_cache = local_texts * self.projected * FP32 if cached and self.last else 0
        rows = self._row_bytes()
        contrastive = self._contrastive(local_texts) if workload.num_texts and self.last else 0
        texts = _Row(workload.embedding_row_tokens, workload.text_tokens, self.config.embedding.causal)
        sequences = _Row(workload.generative_row_tokens, workload.sequence_tokens, True)
        embedding, generative = self._activations(texts), self._activations(sequences)
        logits = self._logits() if workload.generative_rows and self.last else 0
        pooling = self._pooling() if workload.embedding_rows and self.last else 0
        layer = max(self._layer_backward(texts), self._layer_backward(sequences))
        base = static + rows
        held = max(embedding, generative)
        moments = {
            "building the model": 2 * weights + gradients,
            "backward pass of a layer": base + grad_cache + held + layer,
            "optimizer step": base + self._optimizer_step(shard),
        }
        if self.last and workload.generative_rows:
            moments["logits of a generative row"] = base + grad_cache + generative + logits
        if self.last and workload.embedding_rows:
            moments["pooling of an embedding row"] = base + grad_cache + embedding + pooling
            moments["contrastive loss"] = base + contrastive + (0 if cached else embedding)
        if self.stage == 0:
            # The gradient of the embedding matrix is dense; all other activations are gone by then.
            table = self.vocabulary * self.model.hidden_size * self.size
            moments["gradient of the embedding"] = base + grad_cache + table
        kinds = {
            "weights": weights,
            "gradients": gradients,
            "optimizer": optimizer,
            "activations": held + max(layer, pooling),
            "logits": logits,
            "contrastive": contrastive,
            "grad cache": grad_cache,
            "rows": rows,
        }
        return Memory(stage=self.stage, kinds=kinds, moments=moments)

    def _model_size(self) -> int:
        return self.tensor * self.parallel.pipeline * self.parallel.context

    def _row_bytes(self) -> int:
        """Tokens, positions, labels and masks of every row of the step on this rank."""
        workload = self.workload
        per_rank = workload.embedding_rows * workload.embedding_row_tokens * (8 + 8 + 1 + 8 + 4)
        per_rank += workload.generative_rows * workload.generative_row_tokens * (8 + 8 + 1 + 8 + 4)
        return per_rank // self.data_size

    def _activations(self, row: _Row) -> int:
        """Kept for the backward pass of the rows in flight, logits left out."""
        if not row.tokens:
            return 0
        tokens = ceil(row.tokens / self.parallel.context)
        shared = tokens // self.tensor if self.parallel.sequence_parallel else tokens
        width = self.model.hidden_size
        if self.config.training.recompute == "full":
            kept = self.num_layers * shared * width * self.size
        else:
            kept = (self.num_layers - self.num_mixtures) * self._layer_kept(row, False)
            kept += self.num_mixtures * self._layer_kept(row, True)
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
        rows = ceil((self.workload.embedding_rows + self.workload.generative_rows) / self.data_size)
        behind, chunks = self.parallel.pipeline - self.stage, self.parallel.virtual_pipeline or 1
        if chunks == 1:
            return max(1, min(rows, behind))
        # Interleaved: a warm-up of 2 (stages behind - 1) + (chunks - 1) stages chunks, and the one at work.
        return max(1.0, min(rows * chunks, 2 * (behind - 1) + (chunks - 1) * self.parallel.pipeline + 1) / chunks)

    def _layer_kept(self, row: _Row, is_mixture: bool) -> int:
        """What one layer keeps without full recompute."""
        model, size = self.model, self.size
        tokens = ceil(row.tokens / self.parallel.context)
        shared = tokens // self.tensor if self.parallel.sequence_parallel else tokens
        kept = self._norm_kept(shared) * (1 if model.parallel_residual == "one_norm" else 2)
        if model.parallel_residual == "two_norms":
            kept -= shared * model.hidden_size * size  # both have the same input
        if model.hidden_dropout:
            kept += 2 * shared * model.hidden_size * (size if self.device == "cpu" else 1)
        kept += self._attention_kept(tokens, self._gathered_keys(row))
        # Both halves, silu of one, the other plus its offset, their product; or before and after gelu.
        copies = 5 if model.activation == "swiglu" else 2
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

    def _norm_kept(self, tokens: int) -> int:
        """Input and output of a norm."""
        elements = tokens * self.model.hidden_size
        if self.device == "cpu" and self.model.normalization == "rmsnorm":
            # Not fused on the CPU: input and normalised input in fp32, and the output.
            return elements * (2 * FP32 + self.size)
        return elements * 2 * self.size

    def _attention_kept(self, tokens: int, gathered: int) -> int:
        """Bytes from the query-key-value projection to the output projection."""
        queries, keys = (width // self.tensor for width in attention_widths(self.model))
        rope = self.model.position_embedding == "rope"
        kept = tokens * 2 * queries  # queries, turned where they are; the context
        if rope:
            kept += tokens * 4 * head_channels(self.model)  # sines and cosines of queries and of keys
        if self.parallel.context > 1:
            kept += gathered * 2 * keys  # in place of this rank's own
        else:
            # The projection, whose values attention keeps, and turned keys.
            kept += tokens * (queries + 2 * keys + (keys if rope else 0))
        if self.config.training.recompute == "none":
            kept += tokens * self._attention_output()
        normed = 0
        if self.model.qk_norm:  # queries are copied out of the projection; not fused, both are kept once more
            fused = self.device == "cuda" or self.model.normalization == "layernorm"
            normed = tokens * (queries * self.size if fused else (2 * queries + keys) * FP32)
        return kept * self.size + normed

    def _gathered_keys(self, row: _Row) -> int:
        return gathered_keys(row.tokens, row.segment_tokens, self.parallel.context, row.causal)

    def _attention_output(self) -> int:
        """SDPA goes segment by segment and its outputs are joined to one tensor, so both are kept."""
        backend = self.model.attention_backend
        segmentwise = backend == "sdpa" or (backend == "auto" and self.device == "cpu")
        return attention_widths(self.model)[0] // self.tensor if segmentwise else 0

    def _layer_backward(self, row: _Row) -> int:
        """Most that the backward pass of a layer adds to what the forward pass kept."""
        if not row.tokens:
            return 0
        kinds = {False} if self.num_mixtures == 0 else {True} if self.num_mixtures == self.num_layers else {False, True}
        return max(self._layer_adds(row, is_mixture) for is_mixture in kinds)

    def _layer_adds(self, row: _Row, is_mixture: bool) -> int:
        model, tokens = self.model, ceil(row.tokens / self.parallel.context)
        width, routed, visits = model.hidden_size, tokens, tokens
        inner = model.ffn_hidden_size // self.tensor
        if is_mixture:
            inner = expert_width(model) // self.expert_tensor
            routed = tokens * model.moe_top_k
            visits = ceil(routed * self.parallel.expert / (model.num_experts or 1))
        gated = 2 if model.activation == "swiglu" else 1
        hidden, states = visits * inner, routed * width
        adds = max(
            hidden + width * inner,  # of the second matrix: gradients of its input and of itself
            gated * hidden,  # of the activation
            gated * width * inner - hidden * (gated - 1),  # of the first matrix, when most of the layer is gone
        )
        adds += states * (2 if is_mixture else 1)
        return adds * self.size + self._recomputed(row, is_mixture)

    def _recomputed(self, row: _Row, is_mixture: bool) -> int:
        """What is computed again for the backward pass of a layer."""
        recompute = self.config.training.recompute
        if recompute == "full":
            return self._layer_kept(row, is_mixture)
        tokens = ceil(row.tokens / self.parallel.context)
        return tokens * self._attention_output() * self.size if recompute == "selective" else 0

    def _logits(self) -> int:
        """The language-model head of a row, at its worst."""
        tokens, size = self.workload.row_labels, self.size
        if self.parallel.sequence_parallel:  # then logits are taken of every token
            tokens = ceil(self.workload.generative_row_tokens / self.parallel.context)
        tokens = min(tokens, self.workload.generative_row_tokens)
        logits = tokens * self.vocabulary
        states = tokens * self.model.hidden_size * size
        copies = FP32 if size == FP32 and not self.pads_vocabulary else FP32 + size
        weight_gradient = self.vocabulary * self.model.hidden_size * size
        return states + max(logits * copies, logits * size + weight_gradient + states)

    def _pooling(self) -> int:
        """Weighted token states in fp32, forward and backward."""
        tokens = ceil(self.workload.embedding_row_tokens / self.parallel.context)
        copies = 2 if self.size == FP32 else 3
        return tokens * self.projected * FP32 * copies

    def _contrastive(self, local_texts: int) -> int:
        """Embeddings of the global batch, their gradients, and one chunk of similarities."""
        workload, loss = self.workload, self.config.loss
        passages = workload.num_texts - workload.num_queries
        candidates = passages + (workload.num_queries if loss.same_side_negatives else 0)
        if loss.negatives == "hard":
            chunk = workload.num_queries * self.config.data.train_group_size
        else:
            anchors = ceil(workload.num_queries / (self.data_size * self.parallel.context))
            chunk = min(max(SIMILARITIES_AT_ONCE, candidates), anchors * candidates)
        masked = loss.mask_equal_texts or loss.same_side_negatives or loss.false_negative_margin is not None
        # Similarities, which become their gradient where they are, and which of them are left out.
        similarities = chunk * (FP32 + (2 if masked else 0))
        # Gathered, in order, gradient of the loss, that times the incoming gradient; this rank's, joined, and gradient.
        everyone = 4 * workload.num_texts * (1 + len(loss.matryoshka_dims) / 2)
        return similarities + int(everyone + 3 * local_texts) * self.projected * FP32

    def _optimizer_step(self, shard: int) -> int:
        """Temporaries of Adam: one tensor at a time on the CPU, all of them at once on a GPU."""
        if self.device == "cuda":
            return shard * FP32
        model = self.model
        inner = model.ffn_hidden_size * (2 if model.activation == "swiglu" else 1) // self.tensor
        largest = model.hidden_size * max(self.vocabulary, inner)
        return 2 * min(largest, shard) * FP32


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
