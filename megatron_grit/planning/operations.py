"""Floating-point operations of a step and the time that they should take, from a stated peak and stated bandwidths.

A multiplication and its addition count as two operations. Only matrix products and attention are counted. Nothing here
imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from megatron_grit.config.checks.run import data_parallel_size
from megatron_grit.config.schema import RunConfig
from megatron_grit.config.shape import attention_widths, dense_layers, expert_width, mixture_layers, padded_vocabulary
from megatron_grit.planning.memory import FP32, Workload, caches_gradients
from megatron_grit.planning.parameters import count_parameters, expert_tensor_size

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

    peak_tflops: float = PEAK_TFLOPS["H100"]
    """Peak of a device at the run's precision, in 10^12 operations a second."""
    efficiency: float = 0.4
    """Share of the peak that matrix products and attention reach."""
    link_gbs: float = 450.0
    """GB a second that a device sends to others of its node."""
    network_gbs: float = 50.0
    """GB a second that a device sends to other nodes."""
    devices_per_node: int = 8
    """Devices of a node."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of a step on all processes together."""

    embedding: float
    """Both passes of GradCache where there are two."""
    first_pass: float
    """Of ``embedding``: the pass without a graph, where gradients are cached."""
    generative: float
    """Forward and backward, the head included."""
    head: float
    """The language-model head, which only the last stage computes."""
    contrastive: float
    """The loss, which every data parallel rank computes for the whole batch."""
    recompute: float
    """Of activations, for the backward pass."""

    @property
    def model(self) -> float:
        """What the losses and their gradients take, nothing computed twice to save memory: what a share of the peak is
        stated of (model FLOPs utilisation; PaLM, arXiv 2204.02311, appendix B)."""
        return self.embedding - self.first_pass + self.generative + self.contrastive

    @property
    def total(self) -> float:
        """All that is executed."""
        return self.embedding + self.generative + self.contrastive + self.recompute


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, nothing overlapped."""

    compute: float
    """Operations of a process, if all had as many."""
    bubble: float
    """Waiting for other pipeline stages: until the first row arrives, and for the last stage with its head."""
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
        config: the run.
        world_size: number of processes.
        vocab_size: of the model before padding.
        workload: rows of a step.
    """
    model = config.model
    causal_texts = config.embedding.causal
    embedding = workload.embedding_tokens * _forward(config, workload.text_tokens, causal_texts)
    generative = workload.generative_tokens * _forward(config, workload.sequence_tokens, True)
    rows = padded_vocabulary(vocab_size, model.vocab_multiple, config.parallel.tensor)
    labels = workload.generative_tokens if config.parallel.sequence_parallel else workload.supervised_tokens
    head = 2 * labels * model.hidden_size * rows
    passes = 4 if caches_gradients(config, world_size, workload) else 3
    width = config.embedding.projection_dim or model.hidden_size
    passages = workload.num_texts - workload.num_queries
    # Similarities, and two products for the gradient.
    similarities = 2.0 * workload.num_queries * passages * width * (3 if config.loss.negatives == "batch" else 1)
    again = {"none": 0.0, "full": embedding + generative, "selective": _core_attention(config, workload)}
    return Flops(
        embedding=float(passes * embedding),
        first_pass=float((passes - 3) * embedding),
        generative=float(3 * (generative + head)),
        head=float(3 * head),
        contrastive=similarities * config.parallel.tensor,  # replicas share it, tensor parallel ranks repeat it
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


def _attention(config: RunConfig, segment_tokens: float, causal: bool) -> float:
    """Scores and their product with the values, for a token through all layers."""
    model = config.model
    seen = segment_tokens / 2 if causal else segment_tokens
    windowed = 0
    if causal and model.sliding_window is not None:
        windowed = model.num_layers if model.window_layers is None else len(model.window_layers)
    tokens = windowed * min(seen, model.sliding_window or 0) + (model.num_layers - windowed) * seen
    return 4 * attention_widths(model)[0] * tokens


def _core_attention(config: RunConfig, workload: Workload) -> float:
    texts = workload.embedding_tokens * _attention(config, workload.text_tokens, config.embedding.causal)
    sequences = workload.generative_tokens * _attention(config, workload.sequence_tokens, True)
    return texts + sequences


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
    compute, last_alone = flops.total / rate, (flops.head + flops.contrastive) / rate
    cached = caches_gradients(config, world_size, workload)
    embedding_rows = ceil(workload.embedding_rows / data_size)
    rows = embedding_rows + ceil(workload.generative_rows / data_size)
    slowest = compute + last_alone * (parallel.pipeline - 1)
    bubble = slowest * (1 + (parallel.pipeline - 1) / (max(rows, 1) * (parallel.virtual_pipeline or 1))) - compute
    size = 2 if config.training.precision == "bf16" else FP32
    layers = model.num_layers // parallel.pipeline
    # Bytes of hidden states that pass a point of a rank in one direction, in all forward passes of a step.
    texts = workload.embedding_tokens / data_size / parallel.context * model.hidden_size * size
    sequences = workload.generative_tokens / data_size / parallel.context * model.hidden_size * size
    forward = texts * (2 if cached else 1) + sequences
    if config.training.recompute == "full":
        forward += texts + sequences
    both = forward + texts + sequences

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
        pipeline=(both / speed(world_size, 1)) if parallel.pipeline > 1 else 0.0,
        expert=2 * layers * both / tensor * expert_share / speed(parallel.expert, expert_tensor_size(config)),
        # fp32 gradients are reduce-scattered, weights all-gathered, once a step.
        data=parameters * (FP32 + size) * (replicas - 1) / replicas / speed(replicas, tensor),
    )
