"""Log-probabilities of continuations on any mesh, packed into rows that data parallel ranks share.

Shape suffix legend: T = tokens of a row, D = width, V = vocabulary, P = tokens that are asked for, C = some of them,
N = continuations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.inference.mesh_rows import common_length, share_out
from megatron_grit.losses.divergence import CHUNK_ELEMENTS
from megatron_grit.models.decoder import GritDecoder, Output
from megatron_grit.parallel.collectives import gather_json
from megatron_grit.training.step import run_schedule


class Asked(NamedTuple):
    """A text, and continuations that are scored at its end."""

    inputs: Sequence[int]
    """Tokens that are read: context and continuation without its last token."""
    targets: Sequence[Sequence[int]]
    """Tokens of each continuation. The last one of each follows the last of ``inputs``, so that continuations which
    differ in their last token alone are scored in one pass."""


class Scored(NamedTuple):
    """What a model says of a continuation."""

    log_probability: float
    """Sum over its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the most likely one."""


@torch.no_grad()
def score_continuations(
    model: GritDecoder, texts: Sequence[Asked], *, batch_tokens: int, before_pass: Callable[[], object] | None = None
) -> list[list[Scored]]:
    """Score continuations. All processes of the job call it with the same texts; data parallel ranks take rows in turn.

    Args:
        model: this process's pipeline stage of the model, or all of it.
        texts: none without tokens.
        batch_tokens: token budget of one forward pass, on each data parallel rank; raised to the longest text.
        before_pass: called before each forward pass; what it raises ends the call.

    Returns:
        The scores of each text's continuations, on every process.
    """
    if not texts:
        return []
    model.eval()
    context = model.context
    lengths = np.array([len(text.inputs) for text in texts], dtype=np.int64)
    rows = share_out(lengths, max(batch_tokens, int(lengths.max())), context.data_size)
    row_length = common_length(context, [int(lengths[row].sum()) for row in rows])
    rounds = [rows[first : first + context.data_size] for first in range(0, len(rows), context.data_size)]

    def forward_step(iterator: Iterator[list[np.ndarray]], stage: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        if before_pass is not None:
            before_pass()
        several = next(iterator)
        # In the last round there may be fewer rows than ranks. All compute: experts wait for all of them.
        asked = [texts[number] for number in several[min(context.data_rank, len(several) - 1)].tolist()]
        row = text_row([text.inputs for text in asked], row_length).to(context.device)
        states = stage(row, Output.HIDDEN)
        return states, lambda states: (states.new_zeros(()), {"found": _scores(model, states, row, asked)})

    longest = row_length or max(int(lengths[row].sum()) for row in rows)
    reported = run_schedule([model], context, forward_step, rounds, longest, forward_only=True)
    own: dict[int, list[Scored]] = {}
    if context.is_last_stage and not context.tensor_rank and not context.context_rank:
        for several, entry in zip(rounds, reported, strict=True):
            if context.data_rank < len(several):
                own |= zip(several[context.data_rank].tolist(), entry["found"], strict=True)
    found: dict[int, list[Scored]] = {}
    for part in gather_json(list(own.items()), context):
        found |= {number: [Scored(*score) for score in scores] for number, scores in part}
    return [found[number] for number in range(len(texts))]


def _scores(model: GritDecoder, states_T1D: Tensor, row: PackedRow, asked: Sequence[Asked]) -> list[list[Scored]]:
    """Scores of the continuations of a row's texts, on the last stage."""
    ends = row.cu_seqlens[1 : len(asked) + 1].tolist()
    spans = [(end, target) for end, text in zip(ends, asked, strict=True) for target in text.targets]
    positions_P = torch.tensor([position for end, target in spans for position in range(end - len(target), end)])
    targets_P = torch.tensor([token for _, target in spans for token in target], device=states_T1D.device)
    owners_P = np.repeat(np.arange(len(spans)), [len(target) for _, target in spans])
    sums_N, hits_N = np.zeros(len(spans)), np.zeros(len(spans), dtype=np.int64)
    for chunk in torch.arange(len(positions_P)).split(max(1, CHUNK_ELEMENTS // model.num_tokens_in_vocab)):
        logits_CV = model.logits_at(states_T1D, row, positions_P[chunk]).float()
        targets_C = targets_P[chunk.to(targets_P.device)]
        taken_C = logits_CV.log_softmax(-1).gather(1, targets_C[:, None]).squeeze(1)
        owners_C = owners_P[chunk.numpy()]
        np.add.at(sums_N, owners_C, taken_C.double().cpu().numpy())
        np.add.at(hits_N, owners_C, (logits_CV.argmax(-1) == targets_C).cpu().numpy())
    scores = iter(
        Scored(float(total), bool(hits == len(target)))
        for total, hits, (_, target) in zip(sums_N, hits_N, spans, strict=True)
    )
    return [[next(scores) for _ in text.targets] for text in asked]


def text_row(texts: Sequence[Sequence[int]], row_length: int | None = None) -> PackedRow:
    """A row of texts to be predicted, each a segment, then padding.

    Args:
        texts: tokens of each.
        row_length: length to pad the row to. None: no padding.
    """
    sizes = [len(text) for text in texts]
    used = sum(sizes)
    padding = 0 if row_length is None else row_length - used
    bounds = torch.tensor([0, *sizes, padding] if padding else [0, *sizes]).cumsum(0)
    flat = torch.tensor([token for text in texts for token in text])
    positions = torch.cat([torch.arange(size) for size in sizes])
    return PackedRow(
        embeds=False,
        tokens_1T=F.pad(flat, (0, padding))[None],
        positions_1T=F.pad(positions, (0, padding))[None],
        cu_seqlens=bounds.to(torch.int32),
        max_seqlen=max(*sizes, padding),
        padding_mask_1T=(torch.arange(used + padding) >= used)[None],
    )
