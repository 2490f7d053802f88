"""What the last stage makes of its final states: embeddings of the text alone, losses of each token's own label.

The stage is run without its layers, from random states before the final norm, which costs next to nothing.

Shape suffix legend: T = tokens of the row, L = tokens that this rank holds, S = segments, D = width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_grit.config.schema import RunConfig
from megatron_grit.models.decoder import GritDecoder, Output
from megatron_grit.models.embedding_head import apply_head
from megatron_grit.models.row_share import RowShare
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.audit.rows import AuditRow, random_states
from megatron_grit.training.audit.undisturbed import gather_tokens, held_tokens

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Relative, between a result of the stage and the same worked out here."""


def audit_outputs(chunk: GritDecoder, row: AuditRow, config: RunConfig, context: ParallelContext) -> str | None:
    """Audit what the last chunk of layers gives for a row. Collective over the ranks of the stage.

    Returns:
        What is wrong, in words; None where nothing is.
    """
    share = RowShare.of_row(row.row, context)
    index_L = None if share is None else share.index_L
    held_L = held_tokens(row.length, index_L, context)
    full_T1D = random_states(row, chunk.config.hidden_size, seed=3)
    states_L1D = full_T1D[held_L.cpu()].to(context.device, chunk.config.params_dtype).requires_grad_()
    with _without_layers(chunk, states_L1D):
        if row.row.embeds:
            problem = _check_embeddings(chunk, row, states_L1D, held_L, config, context)
        else:
            tokens_L = torch.arange(row.length, device=context.device) if index_L is None else index_L
            problem = _check_losses(chunk, row, states_L1D, held_L, tokens_L, context)
    return f"pipeline stage {context.pipeline_rank}, {row.row.kind} output: {problem}" if problem else None


@contextmanager
def _without_layers(chunk: GritDecoder, states_L1D: Tensor) -> Iterator[None]:
    """The chunk as final norm, head and loss, which are given these states."""
    layers = chunk.decoder.layers

    def feed(module: Any, args: Any, kwargs: Any) -> tuple[tuple[Tensor], dict[str, Any]]:
        return (states_L1D,), {}

    handle = chunk.decoder.final_layernorm.register_forward_pre_hook(feed, with_kwargs=True)
    if not chunk.pre_process:
        chunk.set_input_tensor(states_L1D.detach())
    chunk.decoder.layers = torch.nn.ModuleList()
    try:
        yield
    finally:
        chunk.decoder.layers = layers
        handle.remove()


def _sources(output: Tensor, states_L1D: Tensor, held_L: Tensor, row: AuditRow, context: ParallelContext) -> Tensor:
    """Tokens whose states this sum depends on: bool [T]."""
    (gradient,) = torch.autograd.grad(output, states_L1D, retain_graph=True)
    reach_L = gradient.float().abs().amax((1, 2)).nan_to_num(nan=torch.inf)
    return (gather_tokens(reach_L, held_L, row.length, context) > 0).cpu()


def _check_embeddings(
    chunk: GritDecoder,
    row: AuditRow,
    states_L1D: Tensor,
    held_L: Tensor,
    config: RunConfig,
    context: ParallelContext,
) -> str | None:
    embeddings_SD = chunk(row.row, Output.EMBEDDINGS)
    generator = torch.Generator().manual_seed(4)
    weights_D = torch.randn(embeddings_SD.shape[1], generator=generator).to(embeddings_SD)
    method, learned = config.embedding.pooling, chunk.embedding_pooling
    weights_ST = _pooling_weights(row, method, None if learned is None else learned.weight.detach().cpu())
    problem = None
    for number, embedding_D in enumerate(embeddings_SD):
        pooled_T = _sources(embedding_D @ weights_D, states_L1D, held_L, row, context)
        wanted_T = weights_ST[number] != 0
        # A maximum has some of the text's states, a channel each.
        wrong_T = pooled_T & ~wanted_T if method == "max" else pooled_T != wanted_T
        wrong = wrong_T.nonzero().flatten()
        if len(wrong) and problem is None:
            place = int(wrong[0])
            lead = row.span(0, None) & ~row.texts()
            what = "the instruction's " if lead[place] else ""
            verb = "is made of" if pooled_T[place] else "leaves out"
            where = row.describe(place)
            problem = f"the embedding of segment {number + 1} {verb} {what}{where} (pooling {method})"
    # Every rank goes through the collectives below, whatever it found.
    with torch.no_grad():
        hidden_LD = chunk(row.row, Output.HIDDEN)[:, 0]
        hidden_TD = gather_tokens(hidden_LD, held_L, row.length, context)
        expected_SD = _expected(chunk, hidden_TD, weights_ST.to(hidden_TD.device), row, config)
        norms_S = embeddings_SD.norm(dim=1)
        if config.embedding.normalize:
            expected_SD = expected_SD / expected_SD.norm(dim=1, keepdim=True)
            worst = float(norms_S[(norms_S - 1).abs().argmax()])
            if not abs(worst - 1) <= 1e-3 and problem is None:
                problem = f"embedding.normalize is set, and an embedding has the norm {worst:.4f}"
        apart = float((embeddings_SD - expected_SD).norm() / expected_SD.norm())
    if problem is None and not apart <= _TOLERANCE[states_L1D.dtype]:
        problem = f"embeddings are not the {method} of their texts' states: {apart:.1%} off"
    return problem


def _expected(chunk: GritDecoder, hidden_TD: Tensor, weights_ST: Tensor, row: AuditRow, config: RunConfig) -> Tensor:
    """Embeddings before normalisation, pooled by a matrix product, or a segment at a time for max."""
    head, is_query_S = chunk.embedding_head, row.row.is_query_S
    before = config.embedding.linear_place == "before_pooling"
    if head is not None and before:
        segment_ids_T = row.row.segment_ids_T
        assert segment_ids_T is not None
        is_query_T = None if is_query_S is None else torch.cat([is_query_S, is_query_S[:1]])[segment_ids_T]
        hidden_TD = apply_head(head, hidden_TD, is_query_T)
    if config.embedding.pooling == "max":
        pooled_SD = torch.stack([hidden_TD[weights_T != 0].float().amax(0) for weights_T in weights_ST])
    else:
        pooled_SD = weights_ST @ hidden_TD.float()
    return pooled_SD if head is None or before else apply_head(head, pooled_SD, is_query_S)


def _pooling_weights(row: AuditRow, method: str, learned: Tensor | None) -> Tensor:
    """Weight of each token's state in each segment's embedding by the definition of the method: [S, T].

    For max those of the mean, whose tokens it chooses from.
    """
    weights_ST = torch.zeros(len(row.bounds), row.length)
    texts_T = row.texts()
    for number, (first, last) in enumerate(row.bounds):
        text = torch.arange(first, last)[texts_T[first:last]]
        if method in ("cls", "lasttoken"):
            weights_ST[number, first if method == "cls" else text[-1]] = 1.0
            continue
        if learned is not None:
            weights = learned[text - first].float()
        elif method == "weightedmean":
            weights = torch.arange(1, len(text) + 1, dtype=torch.float32)
        elif method == "weightedmean_sgpt":
            weights = (text - first + 1).float()
        else:
            weights = torch.ones(len(text))
        weights_ST[number, text] = weights / weights.sum()
    return weights_ST


def _check_losses(
    chunk: GritDecoder,
    row: AuditRow,
    states_L1D: Tensor,
    held_L: Tensor,
    tokens_L: Tensor,
    context: ParallelContext,
) -> str | None:
    losses_T = chunk(row.row, Output.TOKEN_LOSSES)
    # The token before each supervised one predicts it.
    predicts_T = row.texts().roll(-1)
    every_other_T = predicts_T & (torch.arange(row.length) % 2 == 0)
    chosen = losses_T[every_other_T.to(losses_T.device)].sum()
    seen_T = _sources(chosen, states_L1D, held_L, row, context)
    with torch.no_grad():
        full_T = losses_T.detach().clone()
        if context.context_size > 1:
            dist.all_reduce(full_T, group=context.context_group)
        logits_LV = chunk(row.row, Output.LOGITS).float()
    supervised_T = full_T.cpu() != 0
    for what, found_T, wanted_T in (
        ("has a loss", supervised_T, predicts_T),
        ("has a part in the losses of others", seen_T, every_other_T),
    ):
        wrong = (found_T != wanted_T).nonzero().flatten()
        if len(wrong):
            place = int(wrong[0])
            verb = what if found_T[place] else what.replace("has", "has not", 1)
            return f"{row.describe(place)} {verb}"
    next_L = row.row.tokens_1T[0].roll(-1)[tokens_L]
    expected_L = -logits_LV.log_softmax(-1).gather(1, next_L[:, None])[:, 0]
    apart_L = (full_T[tokens_L] - expected_L).abs() * predicts_T.to(expected_L.device)[tokens_L]
    worst = int(apart_L.argmax())
    scale = 1 + float(logits_LV[:, : chunk.num_tokens_in_vocab].abs().max())
    if float(apart_L[worst]) <= _TOLERANCE[states_L1D.dtype] * scale:
        return None
    found, wanted = float(full_T[tokens_L[worst]]), float(expected_L[worst])
    where = row.describe(int(tokens_L[worst]))
    return f"the loss of {where} is {found:.4f}; its label being the next token, it should be {wanted:.4f}"
