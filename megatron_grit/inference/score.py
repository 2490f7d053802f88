"""Next-token losses of texts, packed into rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.packing import pack
from megatron_grit.models.decoder import GritDecoder, Output
from megatron_grit.store.progress import Progress

_PROGRESS_FROM = 1024


@torch.no_grad()
def score_tokens(
    model: GritDecoder,
    texts: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    batch_tokens: int,
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Loss of each text.

    Args:
        model: one process's whole model (no pipeline parallelism).
        texts: for each text its tokens (int [L]) and which of them are supervised (bool [L]); the first token has no
            context and is never counted.
        batch_tokens: token budget of one forward pass; raised to the longest text.
        progress: show a bar from 1,024 texts on.

    Returns:
        For each text the sum of its supervised tokens' losses in nats (float64) and their number (int64).
    """
    model.eval()
    lengths = np.array([len(tokens) for tokens, _ in texts], dtype=np.int64)
    sums, counts = np.zeros(len(texts)), np.zeros(len(texts), dtype=np.int64)
    scored = np.flatnonzero(lengths > 1)
    with Progress(len(scored), "scoring", "text", enabled=progress and len(scored) >= _PROGRESS_FROM) as bar:
        for packed in pack(lengths[scored], max(batch_tokens, int(lengths.max(initial=0)))):
            members = scored[packed]
            row = scoring_row([texts[i] for i in members])
            assert row.loss_mask_1T is not None and row.segment_ids_T is not None
            losses = model(row.to(model.context.device), Output.TOKEN_LOSSES).double().cpu().numpy()
            segments = row.segment_ids_T.numpy()
            sums[members] = np.bincount(segments, losses, minlength=len(members))
            mask = row.loss_mask_1T[0].numpy() > 0
            counts[members] = np.bincount(segments[mask], minlength=len(members))
            bar.update(len(members))
    return sums, counts


def scoring_row(texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> PackedRow:
    """A row of texts, each a segment, without padding."""
    sizes = np.array([len(tokens) for tokens, _ in texts])
    bounds = np.concatenate([[0], sizes.cumsum()])
    tokens = torch.from_numpy(np.concatenate([tokens for tokens, _ in texts]).astype(np.int64))
    supervised = torch.from_numpy(np.concatenate([mask for _, mask in texts]))
    segment_ids = torch.from_numpy(np.repeat(np.arange(len(texts)), sizes))
    positions = torch.arange(len(tokens)) - torch.from_numpy(bounds)[segment_ids]
    # Position t predicts token t + 1 where that is of the same segment.
    predicts = torch.zeros(len(tokens))
    predicts[:-1] = (supervised[1:] & (positions[1:] > 0)).float()
    return PackedRow(
        embeds=False,
        tokens_1T=tokens[None],
        positions_1T=positions[None],
        cu_seqlens=torch.from_numpy(bounds).to(torch.int32),
        max_seqlen=int(sizes.max()),
        padding_mask_1T=torch.zeros(1, len(tokens), dtype=torch.bool),
        labels_1T=tokens.roll(-1)[None],
        loss_mask_1T=predicts[None],
        segment_ids_T=segment_ids,
    )
