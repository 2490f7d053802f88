"""The whole of a training step and of an update once more, in plain torch: what layouts are compared with.

Nothing here is shared with the code under test: no engine, no packing, no kernels, no chunks. One process, one autograd
graph, fp64. Attention is a mask of [T, T], experts are a loop, a contrastive loss is a loop over anchors. What it takes
from the product is the configuration, the rows, and the noise on their embeddings.

Weights have the names, and the shapes over the whole model, that checkpoints have: layers (and experts) are stacked.

Shape suffix legend: T = tokens of a row, S = segments, D = width, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_grit.config.schema import EmbeddingConfig, LossConfig, ModelConfig, RunConfig
from megatron_grit.config.schema.retro import RetroConfig
from megatron_grit.config.shape import reading_layers
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.neighbors import Neighbors
from megatron_grit.models.vocabulary import embedding_noise
from tests.distributed.plain_losses import accuracy, contrastive, teacher_losses

LAYERS = "decoder.layers."
CROSS, CROSS_NORM, GATE = "cross_attention.", "pre_cross_attn_layernorm.", "cross_attention.gate"
INPUT_NORM = "decoder.layers.self_attention.linear_qkv.layer_norm_"
QKV = "decoder.layers.self_attention.linear_qkv."
OUTPUT = "decoder.layers.self_attention.linear_proj."
HEAD_NORMS = ("decoder.layers.self_attention.q_layernorm.", "decoder.layers.self_attention.k_layernorm.")
MLP_NORM = "decoder.layers.mlp.linear_fc1.layer_norm_"
FINAL_NORM = "decoder.final_layernorm."
ROUTER = "decoder.layers.mlp.router.weight"
WORDS, POSITIONS = "embedding.word_embeddings.weight", "embedding.position_embeddings.weight"
HEAD, PROJECTION = "output_layer.weight", "embedding_head."
MARGIN = 1e-4
"""Of similarities; fp32 may see nearer ones the other way round."""


def weight_shapes(config: RunConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the model, without padding of the vocabulary."""
    model = config.model
    layers, width = (model.num_layers,), model.hidden_size
    heads, groups, channels = _heads(model)
    stack = layers if model.num_experts is None else (*layers, model.num_experts)
    prefix = _mlp_prefix(model)
    inner, fan = model.ffn_hidden_size, 2 if model.activation == "swiglu" else 1
    shapes: dict[str, tuple[int, ...]] = {
        WORDS: (vocab_size, width),
        QKV + "weight": (*layers, (heads + 2 * groups) * channels, width),
        OUTPUT + "weight": (*layers, width, heads * channels),
        f"{prefix}linear_fc1.weight": (*stack, fan * inner, width),
        f"{prefix}linear_fc2.weight": (*stack, width, inner),
    }
    for name, leading in ((INPUT_NORM, layers), (MLP_NORM, layers), (FINAL_NORM, ())):
        shapes[name + "weight"] = (*leading, width)
        if model.normalization == "layernorm":
            shapes[name + "bias"] = (*leading, width)
    if model.add_bias_linear or model.add_qkv_bias:
        shapes[QKV + "bias"] = (*layers, (heads + 2 * groups) * channels)
    if model.add_bias_linear or model.add_attention_output_bias:
        shapes[OUTPUT + "bias"] = (*layers, width)
    if model.qk_norm:
        shapes |= {name + "weight": (*layers, channels) for name in HEAD_NORMS}
    if model.add_bias_linear or model.add_mlp_bias:
        shapes[f"{prefix}linear_fc1.bias"] = (*stack, fan * inner)
        shapes[f"{prefix}linear_fc2.bias"] = (*stack, width)
    if model.num_experts is not None:
        shapes[ROUTER] = (*layers, model.num_experts, width)
    if model.position_embedding == "learned_absolute":
        shapes[POSITIONS] = (model.max_position_embeddings, width)
    if not model.tie_embeddings:
        shapes[HEAD] = (vocab_size, width)
    reading = reading_layers(model)
    if reading:
        for name in [name for name in shapes if name.startswith(LAYERS)]:
            shape = shapes.pop(name)[1:]
            shapes |= {numbered(name, layer): shape for layer in range(model.num_layers)}
        for layer in reading:
            shapes |= _reading_shapes(model, f"{LAYERS}{layer}.")
            if model.retro.gate is None:
                shapes[f"{LAYERS}{layer}.{GATE}"] = (1,)
        for number in range(model.retro.encoder_layers):
            prefix = f"{LAYERS}{reading[0]}.encoder.layers.{number}."
            dense = replace(config, model=replace(model, num_experts=None, num_layers=1, retro=RetroConfig()))
            own = {name: shape for name, shape in weight_shapes(dense, vocab_size).items() if name.startswith(LAYERS)}
            shapes |= {name.replace(LAYERS, prefix): shape[1:] for name, shape in own.items()}
            if number == 0 and model.retro.encoder_conditioning == "chunk":
                shapes |= _reading_shapes(model, prefix)
    if config.embedding.projection_dim is not None:
        shapes[PROJECTION + "weight"] = (config.embedding.projection_dim, width)
        shapes[PROJECTION + "bias"] = (config.embedding.projection_dim,)
    return shapes


def numbered(name: str, layer: int) -> str:
    """The name of a layer's own parameter, where layers are not alike and not stacked."""
    return name.replace(LAYERS, f"{LAYERS}{layer}.", 1)


def _reading_shapes(model: ModelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    """Parameters of cross-attention in the layer with this prefix."""
    heads, groups, channels = _heads(model)
    width = model.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        CROSS_NORM + "weight": (width,),
        CROSS + "linear_q.weight": (heads * channels, width),
        CROSS + "linear_kv.weight": (2 * groups * channels, width),
        CROSS + "linear_proj.weight": (width, heads * channels),
    }
    if model.normalization == "layernorm":
        shapes[CROSS_NORM + "bias"] = (width,)
    if model.add_bias_linear or model.add_qkv_bias:
        shapes |= {CROSS + "linear_q.bias": (heads * channels,), CROSS + "linear_kv.bias": (2 * groups * channels,)}
    if model.add_bias_linear or model.add_attention_output_bias:
        shapes[CROSS + "linear_proj.bias"] = (width,)
    return {prefix + name: shape for name, shape in shapes.items()}


def draw_weights(config: RunConfig, vocab_size: int, seed: int) -> dict[str, Tensor]:
    """fp32 weights. Biases and norms are no zeros and ones, so that one that is lost is missed."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(config, vocab_size).items():
        noise = torch.randn(shape, generator=generator)
        is_norm = "norm" in name and name.endswith("weight")
        mean = 0 if config.model.layernorm_zero_centered_gamma else 1
        weights[name] = mean + 0.1 * noise if is_norm else config.model.init_std * noise
    return weights


def teacher_of(config: RunConfig, vocab_size: int) -> tuple[RunConfig, dict[str, Tensor]]:
    """A model of another width that the trained one is compared with, and its weights; sure of what it says."""
    narrow = replace(config.model, hidden_size=48, ffn_hidden_size=96, init_std=0.1)
    wanted = replace(config, model=narrow, embedding=EmbeddingConfig())
    weights = draw_weights(wanted, vocab_size, 99)
    weights[WORDS if narrow.tie_embeddings else HEAD] *= 4
    return wanted, weights


@dataclass
class Reference:
    """What a step over the global batch gives, in fp64."""

    metrics: dict[str, float]
    """As TrainStep names them. Without the accuracy where a rounding would decide it."""
    gradients: dict[str, Tensor]
    text_gradients: Tensor | None
    """[texts, width]: gradient of the loss that is trained with respect to each embedding. None without texts."""
    narrowest: float
    """Smallest distance from a decision that fp32 could take otherwise: which experts a token visits, whether a
    negative is left out."""


def reference_step(
    config: RunConfig, weights: dict[str, Tensor], rows: Sequence[PackedRow], num_queries: int, group_size: int
) -> Reference:
    """Loss and gradient of every row of the global batch in one graph.

    Args:
        config: the run; its layout is not looked at.
        weights: as :func:`draw_weights` gives them.
        rows: all rows of both kinds.
        num_queries: Q of the global batch.
        group_size: passages of a query.
    """
    model = _Decoder(config, {name: weight.double().requires_grad_() for name, weight in weights.items()})
    knobs = config.loss
    embedding = [row for row in rows if row.embeds]
    generative = [row for row in rows if not row.embeds]
    metrics: dict[str, float] = {}
    reported, trained = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    texts = None
    if embedding:
        texts, tokens = _texts(model, embedding)
        texts.retain_grad()
        loss = contrastive(texts, tokens, num_queries, group_size, knobs, model.distances)
        metrics["loss_emb"] = float(loss.detach())
        hits, margin = accuracy(texts.detach(), num_queries, group_size)
        if margin > MARGIN:
            metrics["accuracy_emb"] = hits
        reported = reported + knobs.loss_emb_factor * loss
        scale = 1 if knobs.emb_grad_scale == "exact" else knobs.grit_world_size or 1
        trained = trained + knobs.loss_emb_factor * loss / scale
    if generative:
        logits = [_logits(model, row) for row in generative]
        loss = _next_token(generative, _label_losses(logits, generative), knobs)
        metrics["loss_gen"] = float(loss.detach())
        if knobs.teacher.kind != "none":
            added = _next_token(generative, _taught(model, logits, generative), knobs)
            metrics["loss_teacher"] = float(added.detach())
            loss = knobs.teacher.label_weight * loss + knobs.teacher.weight * added
        reported, trained = reported + knobs.loss_gen_factor * loss, trained + knobs.loss_gen_factor * loss
    metrics["loss"] = float(reported.detach())
    if model.balance:
        balance = torch.stack(model.balance).sum() / len(rows)
        trained = trained + config.model.moe_aux_loss_coeff * balance
        trained = trained + config.model.moe_z_loss_coeff * torch.stack(model.router_norms).sum() / len(rows)
        if config.model.moe_aux_loss_coeff:
            metrics["loss_balance"] = float(balance.detach()) / config.model.num_layers
    trained.backward()
    gradients = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad for name, weight in model.weights.items()
    }
    metrics["grad_norm"] = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    text_gradients = None if texts is None else texts.grad
    return Reference(metrics, gradients, text_gradients, min(model.distances, default=math.inf))


def first_update(config: RunConfig, weights: dict[str, Tensor], reference: Reference) -> dict[str, Tensor]:
    """Weights after one step of AdamW (arXiv 1711.05101) at its full rate, the gradient clipped by its norm, in fp64.

    After one step both moments are those of the one gradient: it is divided by its own size.
    """
    knobs, norm = config.optimizer, reference.metrics["grad_norm"]
    share = min(1.0, knobs.clip_grad / (norm + 1e-6)) if knobs.clip_grad else 1.0
    updated = {}
    for name, weight in weights.items():
        gradient = share * reference.gradients[name]
        decay = 0.0 if name.endswith("bias") or "norm" in name else knobs.weight_decay
        updated[name] = (1 - knobs.lr * decay) * weight.double() - knobs.lr * gradient / (gradient.abs() + knobs.eps)
    return updated


def _heads(model: ModelConfig) -> tuple[int, int, int]:
    """Query heads, key heads, channels of a head."""
    heads = model.num_attention_heads
    return heads, model.num_query_groups or heads, model.kv_channels or model.hidden_size // heads


def _mlp_prefix(model: ModelConfig) -> str:
    return "decoder.layers.mlp." if model.num_experts is None else "decoder.layers.mlp.experts.experts."


@dataclass
class _Decoder:
    config: RunConfig
    weights: dict[str, Tensor]
    balance: list[Tensor] = field(default_factory=list)
    """Balancing loss of each layer and row (arXiv 2101.03961, equation 4, times top-k)."""
    router_norms: list[Tensor] = field(default_factory=list)
    """Router z-loss of each layer and row (arXiv 2202.08906, equation 5)."""
    distances: list[float] = field(default_factory=list)

    def states(self, row: PackedRow) -> Tensor:
        """[T, D] after the final norm."""
        model = self.config.model
        states = self.weights[WORDS][row.tokens_1T[0]]
        if row.noise_keys is not None:  # the noise itself is the product's: that every layout has the same is compared
            noised = row.to(states.device)
            states = states + embedding_noise(noised, self.config.training.neftune_alpha, states.shape[1])[:, 0]
        if model.position_embedding == "learned_absolute":
            states = states + self.weights[POSITIONS][row.positions_1T[0]]
        seen_TT = self._seen(row)
        reading, texts = reading_layers(model), None
        for layer in range(model.num_layers):
            states = states + self._attention(self._norm(states, INPUT_NORM, layer), row, seen_TT, layer)
            if layer in reading and row.neighbors is not None:
                normed = self._norm(states, f"{LAYERS}{layer}.{CROSS_NORM}")
                if texts is None:
                    texts = self._encode(normed, row.neighbors, f"{LAYERS}{layer}.encoder.")
                states = states + self._read(normed, texts, row.neighbors, f"{LAYERS}{layer}.")
            inputs = self._norm(states, MLP_NORM, layer)
            states = states + (self._mlp(inputs, layer) if model.num_experts is None else self._mix(inputs, row, layer))
        return self._norm(states, FINAL_NORM)

    def _encode(self, chunks_TD: Tensor, neighbors: Neighbors, prefix: str) -> list[list[Tensor]]:
        """States of every neighbor of every chunk, one by one."""
        model = replace(self.config.model, num_experts=None, num_layers=self.config.model.retro.encoder_layers)
        if model.position_embedding == "rope" and not model.retro.encoder_rope:
            model = replace(model, position_embedding="none")
        weights = {name.replace(prefix, "decoder."): weight for name, weight in self.weights.items() if prefix in name}
        encoder = _Decoder(replace(self.config, model=model), weights)
        ends = neighbors.lengths_U.cumsum()
        encoded = []
        for (start, stop), texts in zip(neighbors.chunk_bounds_C2.tolist(), neighbors.text_of_Ck, strict=True):
            encoded.append([])
            for text in texts[texts >= 0]:
                tokens = neighbors.tokens_1N[0, ends[text] - neighbors.lengths_U[text] : ends[text]]
                row: Any = SimpleNamespace(positions_1T=torch.arange(len(tokens))[None])
                states, every = self.weights[WORDS][tokens], torch.ones(len(tokens), len(tokens), dtype=torch.bool)
                if model.position_embedding == "learned_absolute":
                    states = states + self.weights[POSITIONS][: len(tokens)]
                for layer in range(model.num_layers):
                    inputs = encoder._norm(states, INPUT_NORM, layer)
                    states = states + encoder._attention(inputs, row, every, layer)
                    name = f"{LAYERS}{layer}."
                    if name + CROSS + "linear_q.weight" in weights:
                        normed = encoder._norm(states, name + CROSS_NORM)
                        states = states + encoder._cross(normed, chunks_TD[start:stop], name + CROSS)
                    states = states + encoder._mlp(encoder._norm(states, MLP_NORM, layer), layer)
                encoded[-1].append(states)
        return encoded

    def _read(self, states: Tensor, texts: list[list[Tensor]], neighbors: Neighbors, name: str) -> Tensor:
        """What each token reads, token by token: neighbors of the last chunk of its segment that ends at or before
        it."""
        gate = self.config.model.retro.gate
        factor = torch.tanh(self.weights[name + GATE]) if gate is None else torch.tensor(gate, dtype=torch.float64)
        read = list(torch.zeros_like(states))
        for chunk, (start, stop) in enumerate(neighbors.chunk_bounds_C2.tolist()):
            segment_end = int(neighbors.segment_ends_C[chunk])
            next_stop = [
                end for begin, end in neighbors.chunk_bounds_C2.tolist() if begin == stop and stop < segment_end
            ]
            for token in range(stop - 1, next_stop[0] - 1 if next_stop else segment_end):
                assert start <= token < segment_end
                if texts[chunk]:
                    read[token] = self._cross(states[token : token + 1], torch.cat(texts[chunk]), name + CROSS)[0]
        return factor * torch.stack(read)

    def _cross(self, asking: Tensor, asked: Tensor, name: str) -> Tensor:
        """Attention of each state to all that are asked."""
        heads, groups, channels = _heads(self.config.model)
        queries = self._linear(asking, name + "linear_q.").view(-1, heads, channels)
        keys, values = self._linear(asked, name + "linear_kv.").view(-1, groups, 2 * channels).chunk(2, -1)
        keys, values = (each.repeat_interleave(heads // groups, 1) for each in (keys, values))
        weights = (torch.einsum("qhc,khc->hqk", queries, keys) * self._scale()).softmax(-1)
        return self._linear(torch.einsum("hqk,khc->qhc", weights, values).flatten(1), name + "linear_proj.")

    def _scale(self) -> float:
        model = self.config.model
        return _heads(model)[2] ** -0.5 if model.attention_scale is None else model.attention_scale

    def _seen(self, row: PackedRow) -> Tensor:
        """bool [T, T]: which tokens each token attends to."""
        length = row.tokens_1T.shape[1]
        segment = torch.zeros(length, dtype=torch.long)
        segment[row.cu_seqlens[1:-1].long()] = 1
        segment = segment.cumsum(0)
        seen = segment[:, None] == segment[None, :]
        if not row.embeds or self.config.embedding.causal:
            back = torch.arange(length)[:, None] - torch.arange(length)[None, :]
            seen &= back >= 0
            if self.config.model.sliding_window is not None:
                seen &= back < self.config.model.sliding_window
        return seen

    def _at(self, name: str, *place: int) -> Tensor | None:
        if name not in self.weights and place:
            name, place = numbered(name, place[0]), place[1:]
        weight = self.weights.get(name)
        return None if weight is None else weight[place] if place else weight

    def _norm(self, states: Tensor, name: str, *layer: int) -> Tensor:
        model, scale = self.config.model, self._at(name + "weight", *layer)
        assert scale is not None
        scale = 1 + scale if model.layernorm_zero_centered_gamma else scale
        if model.normalization == "layernorm":
            return F.layer_norm(states, states.shape[-1:], scale, self._at(name + "bias", *layer), model.norm_epsilon)
        return states * (states.square().mean(-1, keepdim=True) + model.norm_epsilon).rsqrt() * scale

    def _linear(self, inputs: Tensor, name: str, *place: int) -> Tensor:
        weight = self._at(name + "weight", *place)
        assert weight is not None
        return F.linear(inputs, weight, self._at(name + "bias", *place))

    def _attention(self, inputs: Tensor, row: PackedRow, seen_TT: Tensor, layer: int) -> Tensor:
        heads, groups, channels = _heads(self.config.model)
        # Group by group: its queries, its key, its value.
        mixed = self._linear(inputs, QKV, layer).view(len(inputs), groups, heads // groups + 2, channels)
        queries, keys, values = mixed[:, :, :-2].flatten(1, 2), mixed[:, :, -2], mixed[:, :, -1]
        if self.config.model.qk_norm:
            pair = zip((queries, keys), HEAD_NORMS, strict=True)
            queries, keys = (self._norm(each, name, layer) for each, name in pair)
        if self.config.model.position_embedding == "rope":
            queries, keys = (self._rotate(each, row.positions_1T[0]) for each in (queries, keys))
        keys, values = (each.repeat_interleave(heads // groups, 1) for each in (keys, values))
        scores = torch.einsum("qhc,khc->hqk", queries, keys) * self._scale()
        weights = scores.masked_fill(~seen_TT, -torch.inf).softmax(-1)
        return self._linear(torch.einsum("hqk,khc->qhc", weights, values).flatten(1), OUTPUT, layer)

    def _rotate(self, heads: Tensor, positions: Tensor) -> Tensor:
        """RoPE (arXiv 2104.09864) on the first channels, pairs half of them apart, or neighbours."""
        model = self.config.model
        size = int(heads.shape[-1] * model.rotary_percent)
        rates = model.rotary_base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = (positions[:, None] * rates)[:, None]
        turning, rest = heads.split([size, heads.shape[-1] - size], dim=-1)
        interleaved = model.rotary_interleaved
        first, second = turning.unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(-1 if interleaved else -2)
        turned = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
        return torch.cat([torch.stack(turned, dim=-1 if interleaved else -2).flatten(-2), rest], dim=-1)

    def _mlp(self, inputs: Tensor, *place: int) -> Tensor:
        prefix = _mlp_prefix(self.config.model)
        hidden = self._linear(inputs, f"{prefix}linear_fc1.", *place)
        if self.config.model.activation == "swiglu":
            gate, linear = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * linear
        else:
            hidden = F.gelu(hidden, approximate="tanh" if self.config.model.activation == "gelu_tanh" else "none")
        return self._linear(hidden, f"{prefix}linear_fc2.", *place)

    def _mix(self, inputs: Tensor, row: PackedRow, layer: int) -> Tensor:
        num_experts, top_k = self.config.model.num_experts, self.config.model.moe_top_k
        assert num_experts is not None
        router = self._at(ROUTER, layer)
        assert router is not None
        logits = inputs @ router.T
        ranked = logits.sort(dim=-1, descending=True)
        if top_k < num_experts:
            self.distances.append(float((ranked.values[:, top_k - 1] - ranked.values[:, top_k]).detach().min()))
        chosen = ranked.indices[:, :top_k]
        # Mixtral's weights are normalised over the chosen experts, Switch's, of one expert, over all.
        among = logits if top_k == 1 else logits.gather(1, chosen)
        weights = among.softmax(-1)
        shares = torch.zeros_like(logits).scatter(1, chosen, weights.gather(1, chosen) if top_k == 1 else weights)
        outputs = sum(shares[:, [expert]] * self._mlp(inputs, layer, expert) for expert in range(num_experts))
        real = ~row.padding_mask_1T[0]
        visits = torch.zeros_like(logits).scatter(1, chosen, 1.0)[real].mean(0) / top_k
        self.balance.append(num_experts * (visits * logits.softmax(-1)[real].mean(0)).sum())
        self.router_norms.append(logits.logsumexp(-1)[real].square().mean())
        return torch.as_tensor(outputs)


def _texts(model: _Decoder, rows: list[PackedRow]) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Embeddings of all texts in their global order, and the tokens that each of them pools."""
    config = model.config.embedding
    found: dict[int, tuple[Tensor, tuple[int, ...]]] = {}
    for row in rows:
        assert row.pool_mask_T is not None and row.slots_S is not None
        states = model.states(row)
        if config.projection_dim is not None:
            states = F.linear(states, model.weights[PROJECTION + "weight"], model.weights[PROJECTION + "bias"])
        bounds = row.cu_seqlens.tolist()
        for segment, slot in enumerate(row.slots_S.tolist()):
            begin, end = bounds[segment], bounds[segment + 1]
            text = [place for place in range(begin, end) if row.pool_mask_T[place] > 0]
            pooled = _pooled(states, begin, text, config.pooling)
            embedding = pooled / pooled.norm() if config.normalize else pooled
            found[slot] = embedding, tuple(row.tokens_1T[0, text].tolist())
    return torch.stack([found[slot][0] for slot in range(len(found))]), [found[slot][1] for slot in range(len(found))]


def _pooled(states: Tensor, begin: int, text: list[int], method: str) -> Tensor:
    """One embedding of the text at these places of a segment that begins at ``begin``."""
    if method == "cls":
        return states[begin]
    if method == "lasttoken":
        return states[text[-1]]
    if method == "mean":
        return states[text].mean(0)
    weights = torch.arange(1.0, len(text) + 1, dtype=torch.float64)[:, None]
    return (states[text] * weights).sum(0) / weights.sum()


def _logits(model: _Decoder, row: PackedRow) -> Tensor:
    return model.states(row) @ model.weights[WORDS if model.config.model.tie_embeddings else HEAD].T


def _label_losses(logits: list[Tensor], rows: list[PackedRow]) -> list[Tensor]:
    labels = [row.labels_1T[0] for row in rows if row.labels_1T is not None]
    return [F.cross_entropy(each, label, reduction="none") for each, label in zip(logits, labels, strict=True)]


def _taught(model: _Decoder, logits: list[Tensor], rows: list[PackedRow]) -> list[Tensor]:
    """What a teacher adds to the loss of each token."""
    knobs, others = model.config.loss.teacher, [None] * len(rows)
    if knobs.kind != "topk":
        config, weights = teacher_of(model.config, len(model.weights[WORDS]))
        teacher = _Decoder(config, {name: weight.double() for name, weight in weights.items()})
        others = [_logits(teacher, row) for row in rows]
    return [teacher_losses(*each, knobs) for each in zip(logits, others, rows, strict=True)]


def _next_token(rows: list[PackedRow], losses_of_rows: list[Tensor], knobs: LossConfig) -> Tensor:
    sequences: list[list[Tensor]] = []  # sums of losses and of weights
    for row, losses in zip(rows, losses_of_rows, strict=True):
        assert row.loss_mask_1T is not None
        pairs = torch.stack([losses * row.loss_mask_1T[0], row.loss_mask_1T[0].double()])
        parts = pairs.split(row.cu_seqlens.diff().tolist(), dim=1)[: len(row.record_ids)]
        sequences.append([part.sum(1) for part in parts])
    kind, flat = knobs.loss_gen_type, sum(sequences, [])
    size = {"token": len(flat), "sequence": 1}.get(kind, knobs.microbatch_sequences)
    groups = sequences if kind == "mixed" else [flat[begin : begin + size] for begin in range(0, len(flat), size)]
    sums = torch.stack([torch.stack(group).sum(0) for group in groups])
    return (sums[:, 0] / (1 if kind in ("sequence", "sum") else sums[:, 1].where(sums[:, 1] > 0, 1))).mean()
