"""Floating-point operations of a step and the time that they should take, from a stated peak and stated bandwidths.

A multiplication and its addition count as two operations. Only matrix products and attention are counted. Nothing here
imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from megatron_grit.config.checks.run import data_parallel_size
from megatron_grit.config.kinds import kind_options, loss_words
from megatron_grit.config.knob import knob
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import (
    attention_widths,
    dense_layers,
    expert_width,
    mixture_layers,
    neighbor_tokens,
    padded_vocabulary,
    read_tokens,
    reading_layers,
    stage_layers,
)
from megatron_grit.planning.memory import FP32, Workload, caches_gradients
from megatron_grit.planning.parameters import count_parameters, expert_tensor_size
from megatron_grit.planning.teacher import teacher_run

PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "GH200": 989.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "B200": 2250.0,
}
"""Peak of a card in bf16, without sparsity, in 10^12 operations a second, by a part of its name; the first that fits
counts. From NVIDIA's data sheets of the A100, H100, H200 and GH200 and of HGX B200, which give twice as much for sparse
matrices."""


def peak_tflops(card: str) -> float | None:
    """Peak of a card in bf16 by its name, such as "NVIDIA H100 80GB HBM3". None: not in the table."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in card), None)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What step times are computed from. The defaults are those of one H100 node on its data sheet."""

    peak_tflops: float = knob(PEAK_TFLOPS["H100"], above=0)
    """Peak of a device at the run's precision, in 10^12 operations a second."""
    efficiency: float = knob(0.4, above=0, at_most=1)
    """Share of the peak that matrix products and attention reach."""
    link_gbs: float = knob(450.0, above=0)
    """GB a second that a device sends to others of its node."""
    network_gbs: float = knob(50.0, above=0)
    """GB a second that a device sends to other nodes."""
    devices_per_node: int = knob(8, at_least=1)
    """Devices of a node."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of a step on all processes together."""

    passes: dict[str, float]
    """By kind of row: forward and backward, the head included, both passes of GradCache where there are two, and what a
    loss measures forward alone."""
    first_passes: dict[str, float]
    """Of ``passes``: those without a graph, where gradients are cached."""
    head: float
    """The language-model head, which only the last stage computes."""
    losses: dict[str, float]
    """By name: those that every data parallel rank computes for the whole batch."""
    recompute: float
    """Of activations, for the backward pass."""

    @property
    def model(self) -> float:
        """What the losses and their gradients take, nothing computed twice to save memory: what a share of the peak is
        stated of (model FLOPs utilisation; PaLM, arXiv 2204.02311, appendix B)."""
        once = (count - self.first_passes[kind] for kind, count in self.passes.items())
        return sum(once) + sum(self.losses.values())

    @property
    def total(self) -> float:
        """All that is executed."""
        return sum(self.passes.values()) + sum(self.losses.values()) + self.recompute


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, nothing overlapped."""

    compute: float
    """Operations of a process, if all had as many."""
    bubble: float
    """Waiting for other pipeline stages: until the first row arrives, and for the slowest one, which has the head or
    the encoder of neighbors."""
    tensor: float
    context: float
    pipeline: float
    expert: float
    data: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        sent = self.tensor + self.context + self.pipeline + self.expert + self.data
        return self.compute + self.bubble + sent


def count_flops(config: RunConfig, world_size: int, vocab_size: int, workload: Workload) -> Flops:
    """Operations of a step.

    Args:
        vocab_size: of the model before padding.
    """
    data_size = data_parallel_size(config, world_size)
    padded = padded_vocabulary(vocab_size, config.model.vocab_multiple, config.parallel.tensor)
    passes, first_passes, losses = {}, {}, {}
    forward_all = core_attention = all_heads = 0.0
    for rows in workload.kinds:
        forward = rows.tokens * _forward(config, rows.segment_tokens, rows.causal)
        forward += 0 if rows.embeds else rows.tokens * (encoding_flops(config) + reading_flops(config))
        labels = rows.tokens if config.parallel.sequence_parallel else rows.labels
        head = 0 if rows.embeds else 2 * labels * config.model.hidden_size * padded
        first = forward if caches_gradients(config, data_size, rows) else 0.0
        first_passes[rows.kind] = float(first)
        passes[rows.kind] = float((3 + rows.measured) * (forward + head) + first)
        operations = kind_options(rows.kind).loss_cost(config, rows, data_size).operations
        if operations:
            losses[loss_words(rows.kind)] = operations
        forward_all += forward
        core_attention += rows.tokens * _attention(config, rows.segment_tokens, rows.causal)
        all_heads += (3 + rows.measured) * head
    if (taught := teacher_run(config)) is not None:
        passes["teacher"] = float(
            sum(
                rows.tokens * _forward(taught, rows.segment_tokens, rows.causal)
                + 2 * rows.labels * taught.model.hidden_size * padded
                for rows in workload.predicted
            )
        )
    again = {"none": 0.0, "full": forward_all, "selective": core_attention}
    return Flops(
        passes=passes,
        first_passes=first_passes,
        head=all_heads,
        losses=losses,
        recompute=float(again[config.training.recompute]),
    )


def _forward(config: RunConfig, segment_tokens: float, causal: bool) -> float:
    """Operations of a token through all layers."""
    model = config.model
    queries, keys = attention_widths(model)
    width = model.hidden_size
    matrices = width * (queries + 2 * keys) + queries * width
    matrix = (3 if model.activation == "swiglu" else 2) * width
    visited = model.moe_top_k * expert_width(model) + (model.moe_shared_ffn_hidden_size or 0)
    mixture = matrix * visited + width * ((model.num_experts or 0) + model.moe_shared_expert_gate)
    feed_forward = len(dense_layers(model)) * matrix * model.ffn_hidden_size + len(mixture_layers(model)) * mixture
    operations = 2 * (model.num_layers * matrices + feed_forward)
    return operations + _attention(config, segment_tokens, causal)


def encoding_flops(config: RunConfig) -> float:
    """Operations of the neighbor encoder for a token of a row that is predicted, forward."""
    model, retro = config.model, config.model.retro
    queries, keys = attention_widths(model)
    width = model.hidden_size
    matrices = 2 * width * (queries + keys) + (3 if model.activation == "swiglu" else 2) * width * model.ffn_hidden_size
    of_neighbor = retro.encoder_layers * (2 * matrices + 4 * queries * neighbor_tokens(model))
    of_token = 0
    if retro.encoder_conditioning == "chunk":
        of_neighbor += 4 * width * queries + 4 * queries * retro.chunk_length
        of_token = 4 * width * keys
    return read_tokens(model) * of_neighbor + (of_token if read_tokens(model) else 0)


def reading_flops(config: RunConfig) -> float:
    """Operations of cross-attention in all layers that read, for a token of a row that is predicted, forward."""
    model = config.model
    queries, keys = attention_widths(model)
    width, read = model.hidden_size, read_tokens(model)
    seen = model.retro.num_neighbors * neighbor_tokens(model)
    return len(reading_layers(model)) * (4 * width * queries + read * 4 * width * keys + 4 * queries * seen)


def _attention(config: RunConfig, segment_tokens: float, causal: bool) -> float:
    """Scores and their product with the values, for a token through all layers."""
    model = config.model
    seen = segment_tokens / 2 if causal else segment_tokens
    windowed = 0
    if causal and model.sliding_window is not None:
        windowed = model.num_layers if model.window_layers is None else len(model.window_layers)
    tokens = windowed * min(seen, model.sliding_window or 0) + (model.num_layers - windowed) * seen
    return 4 * attention_widths(model)[0] * tokens


def expected_step_time(
    config: RunConfig, world_size: int, vocab_size: int, workload: Workload, machine: Machine
) -> StepTime:
    """Seconds of a step: operations at the stated efficiency, pipeline bubbles, and what is sent, nothing overlapped.

    Ranks are laid out as the engine does: tensor, context, expert and data parallel neighbours next to each other,
    pipeline stages furthest apart.
    """
    parallel, model = config.parallel, config.model
    data_size = data_parallel_size(config, world_size)
    flops = count_flops(config, world_size, vocab_size, workload)
    rate = world_size * machine.peak_tflops * 1e12 * machine.efficiency
    compute = flops.total / rate
    alone = [0.0] * parallel.pipeline  # what a stage has beside its share of all layers, on all processes together
    alone[-1] = (flops.head + sum(flops.losses.values())) / rate
    if reading := reading_layers(model):
        stage = next(stage for stage in range(parallel.pipeline) if reading[0] in stage_layers(config, stage))
        passes = 4 if config.training.recompute == "full" else 3
        alone[stage] += passes * encoding_flops(config) * sum(rows.tokens for rows in workload.predicted) / rate
    num_rows = sum(ceil(rows.rows / data_size) for rows in workload.kinds)
    slowest = compute - sum(alone) + parallel.pipeline * max(alone)
    bubble = slowest * (1 + (parallel.pipeline - 1) / (max(num_rows, 1) * (parallel.virtual_pipeline or 1))) - compute
    size = 2 if config.training.precision == "bf16" else FP32
    layers = model.num_layers // parallel.pipeline
    # Bytes of hidden states that pass a point of a rank in one direction, in all forward passes of a step.
    once = [rows.tokens / data_size / parallel.context * model.hidden_size * size for rows in workload.kinds]
    cached = [caches_gradients(config, data_size, rows) for rows in workload.kinds]
    measured = [rows.measured for rows in workload.kinds]
    forward = sum(count * (1 + twice + more) for count, twice, more in zip(once, cached, measured, strict=True))
    if config.training.recompute == "full":
        forward += sum(once)
    both = forward + sum(once)
    # Neighbors go through all stages behind their row.
    pairs = zip(workload.kinds, once, strict=True)
    behind = 2 * sum(0.0 if rows.embeds else count * read_tokens(model) for rows, count in pairs)

    def speed(group: int, stride: int) -> float:
        inside = group * stride <= machine.devices_per_node
        return (machine.link_gbs if inside else machine.network_gbs) * 1e9

    tensor, context = parallel.tensor, parallel.context
    ring = 2 * (tensor - 1) / tensor  # an all-reduce, or a reduce-scatter and an all-gather
    # Every rank gathers the keys and values of the whole row, and sums their gradients.
    keys_and_values = 2 * attention_widths(model)[1] / tensor / model.hidden_size
    expert_share = (parallel.expert - 1) / parallel.expert * (model.moe_top_k if model.num_experts else 0)
    parameters = count_parameters(config, vocab_size).rank
    replicas = data_size * parallel.context
    return StepTime(
        compute=compute,
        bubble=bubble,
        tensor=2 * layers * both * ring / speed(tensor, 1),
        context=layers * both * keys_and_values * (context - 1) / speed(context, tensor),
        pipeline=((both + behind) / speed(world_size, 1)) if parallel.pipeline > 1 else 0.0,
        expert=2 * layers * both / tensor * expert_share / speed(parallel.expert, expert_tensor_size(config)),
        # fp32 gradients are reduce-scattered, weights all-gathered, once a step.
        data=parameters * (FP32 + size) * (replicas - 1) / replicas / speed(replicas, tensor),
    )
