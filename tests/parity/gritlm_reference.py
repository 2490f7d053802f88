"""The GritLM step as a user of transformers would write it: padded batches, one process, nothing of ours.

Parity tests compare losses, gradients and updates with it, and benchmarks/grit_step.py its speed. What it does
follows GRIT (arXiv 2402.09906) and its published training recipe:

- queries and passages are padded on the right, each side to the longest of the whole batch, and cut into chunks
  afterwards; the generative batch is padded to its longest;
- embedding: bidirectional attention over instruction and text, mean over the text's final states, unit length;
- contrastive loss over all passages with GradCache (arXiv 2101.06983): embed without a graph, differentiate the loss
  with respect to the embeddings, embed again chunk by chunk with the cached gradients;
- generative loss first, then the embedding loss, gradients added, clipped, one AdamW step.

Shape suffix legend: B = sequences of a batch, L = its padded length, D = hidden size, N = texts of a side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
Phase = Callable[[str], AbstractContextManager[Any]]


@dataclass
class Text:
    """A query or passage: token ids, of which the first ``num_instruction`` are attended and not pooled."""

    ids: list[int]
    num_instruction: int = 0


@dataclass
class Sequence:
    """A generative sample: token ids, and for each whether it is to be predicted."""

    ids: list[int]
    supervised: list[bool]


@dataclass
class PaddedTexts:
    """One side of the embedding batch."""

    ids_NL: Tensor
    attention_mask_NL: Tensor
    pool_mask_NL: Tensor

    def to(self, device: torch.device) -> PaddedTexts:
        """Copy on ``device``."""
        return PaddedTexts(*(tensor.to(device) for tensor in vars(self).values()))

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Arguments of :func:`embed`, ``size`` texts at a time."""
        yield from zip(
            self.ids_NL.split(size), self.attention_mask_NL.split(size), self.pool_mask_NL.split(size), strict=True
        )


@dataclass
class GritBatch:
    """A global batch, padded. Passages are laid out query by query, the positive first."""

    queries: PaddedTexts
    passages: PaddedTexts
    group_size: int
    generative_ids_BL: Tensor
    generative_mask_BL: Tensor
    labels_BL: Tensor

    def to(self, device: torch.device) -> GritBatch:
        """Copy on ``device``."""
        return replace(
            self,
            queries=self.queries.to(device),
            passages=self.passages.to(device),
            generative_ids_BL=self.generative_ids_BL.to(device),
            generative_mask_BL=self.generative_mask_BL.to(device),
            labels_BL=self.labels_BL.to(device),
        )

    @property
    def num_padded_tokens(self) -> int:
        """Tokens of all three parts, padding included."""
        return self.queries.ids_NL.numel() + self.passages.ids_NL.numel() + self.generative_ids_BL.numel()

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        masks = (self.queries.attention_mask_NL, self.passages.attention_mask_NL, self.generative_mask_BL)
        return int(sum(mask.sum() for mask in masks))


def _pad(rows: list[list[Any]], value: Any) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def _pad_texts(texts: list[Text], pad_id: int) -> PaddedTexts:
    return PaddedTexts(
        _pad([text.ids for text in texts], pad_id),
        _pad([[True] * len(text.ids) for text in texts], False),
        _pad([[i >= text.num_instruction for i in range(len(text.ids))] for text in texts], False),
    )


def collate(
    queries: list[Text], passages: list[Text], sequences: list[Sequence], group_size: int, pad_id: int = 0
) -> GritBatch:
    """Pad each of the three parts to its own longest member."""
    labels = [[i if s else IGNORED for i, s in zip(q.ids, q.supervised, strict=True)] for q in sequences]
    return GritBatch(
        queries=_pad_texts(queries, pad_id),
        passages=_pad_texts(passages, pad_id),
        group_size=group_size,
        generative_ids_BL=_pad([sequence.ids for sequence in sequences], pad_id),
        generative_mask_BL=_pad([[True] * len(sequence.ids) for sequence in sequences], False),
        labels_BL=_pad(labels, IGNORED),
    )


def embed(model: Any, ids_BL: Tensor, attention_mask_BL: Tensor, pool_mask_BL: Tensor) -> Tensor:
    """Unit-length mean of the final states of the text, bidirectional.

    A four-dimensional mask is handed to the attention kernel as it is; with a two-dimensional one, or none,
    transformers adds causality. The decoder inside the causal LM is called, so no logits are computed.

    Returns:
        fp32 [B, D].
    """
    mask = attention_mask_BL[:, None, None, :].expand(-1, -1, ids_BL.shape[1], -1)
    states_BLD = model.model(input_ids=ids_BL, attention_mask=mask, use_cache=False).last_hidden_state
    weights = pool_mask_BL[:, :, None].float()
    return F.normalize((states_BLD * weights).sum(1) / weights.sum(1), dim=-1)


def contrastive(queries_ND: Tensor, passages_ND: Tensor, temperature: float, group_size: int) -> Tensor:
    """Cross-entropy of each query's positive, passage i * group_size, among all passages."""
    scores = queries_ND @ passages_ND.T / temperature
    return F.cross_entropy(scores, torch.arange(len(queries_ND), device=scores.device) * group_size)


def generative(model: Any, ids_BL: Tensor, attention_mask_BL: Tensor, labels_BL: Tensor, kind: str) -> Tensor:
    """Next-token loss of a batch. mixed: mean over its supervised tokens. token: their sum / number of sequences."""
    logits = model(input_ids=ids_BL, attention_mask=attention_mask_BL.long(), use_cache=False).logits
    reduction = {"mixed": "mean", "token": "sum"}[kind]
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels_BL[:, 1:].flatten(), ignore_index=IGNORED, reduction=reduction
    )
    return loss if kind == "mixed" else loss / len(ids_BL)


def accumulate_gradients(
    model: Any,
    batch: GritBatch,
    *,
    temperature: float,
    chunk_size: int | None,
    parts: tuple[str, ...] = ("generative", "embedding"),
    generative_chunk_size: int | None = None,
    loss_gen_kind: str = "mixed",
    loss_gen_factor: float = 1.0,
    phase: Phase = lambda name: nullcontext(),
) -> tuple[float, float]:
    """Add the gradients of both losses to the model's.

    Args:
        model: a causal LM of transformers whose decoder is ``model.model``.
        batch: the global batch.
        temperature: of the contrastive loss.
        chunk_size: texts of a GradCache chunk. None: one graph over the whole batch.
        parts: the losses to train on; one that is left out is 0.
        generative_chunk_size: sequences of a generative micro-batch; their losses are averaged, as in the published
            code. None: one.
        loss_gen_kind: of :func:`generative`.
        loss_gen_factor: weight of the generative loss.
        phase: context manager around each named part, for profiles.

    Returns:
        loss_emb, loss_gen (without its factor).
    """
    loss_gen = 0.0
    if "generative" in parts:
        with phase("generative"):
            size = generative_chunk_size or len(batch.labels_BL)
            tensors = (batch.generative_ids_BL, batch.generative_mask_BL, batch.labels_BL)
            chunks = list(zip(*(tensor.split(size) for tensor in tensors), strict=True))
            for ids, mask, labels in chunks:
                loss = generative(model, ids, mask, labels, loss_gen_kind) / len(chunks)
                (loss * loss_gen_factor).backward()
                loss_gen += loss.item()
    if "embedding" not in parts:
        return 0.0, loss_gen
    sides = (batch.queries, batch.passages)
    if chunk_size is None:
        with phase("embedding, one graph"):
            queries, passages = (embed(model, s.ids_NL, s.attention_mask_NL, s.pool_mask_NL) for s in sides)
            loss = contrastive(queries, passages, temperature, batch.group_size)
            loss.backward()
        return loss.item(), loss_gen
    with phase("embedding, first pass"), torch.no_grad():
        embedded = [torch.cat([embed(model, *chunk) for chunk in side.chunks(chunk_size)]) for side in sides]
    leaves = [side.requires_grad_() for side in embedded]
    loss = contrastive(leaves[0], leaves[1], temperature, batch.group_size)
    gradients = torch.autograd.grad(loss, leaves)
    with phase("embedding, second pass"):
        for side, gradient in zip(sides, gradients, strict=True):
            for chunk, cached in zip(side.chunks(chunk_size), gradient.split(chunk_size), strict=True):
                (embed(model, *chunk) * cached).sum().backward()
    return loss.item(), loss_gen


def adamw(model: Any, lr: float, *, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW without weight decay, as the published recipe has it."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=0.0)


def grit_step(
    model: Any,
    batch: GritBatch,
    optimizer: torch.optim.Optimizer,
    *,
    clip_grad: float = 1.0,
    phase: Phase = lambda name: nullcontext(),
    **losses: Any,
) -> tuple[float, float, float]:
    """One training step: both losses, clipping, update.

    Args:
        model: as in :func:`accumulate_gradients`.
        batch: the global batch.
        optimizer: over the model's parameters.
        clip_grad: largest gradient norm.
        phase: context manager around each named part.
        **losses: the other arguments of :func:`accumulate_gradients`.

    Returns:
        loss_emb, loss_gen, gradient norm before clipping.
    """
    optimizer.zero_grad(set_to_none=True)
    loss_emb, loss_gen = accumulate_gradients(model, batch, phase=phase, **losses)
    with phase("optimizer"):
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
        optimizer.step()
    return loss_emb, loss_gen, float(norm)
