"""Next-token losses of texts at any layout (:mod:`mesh_rows`), packed into rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_grit.data.indexed.records import IndexedRecords, check_texts
from megatron_grit.data.indexed.roles import supervised
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.data.rows.packing import pack
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import DataError
from megatron_grit.inference.mesh_rows import WINDOW, common_length, forward_batches, share_out
from megatron_grit.inference.model_group import ModelGroup
from megatron_grit.models.decoder import GritDecoder, Output
from megatron_grit.parallel.collectives import from_last_stage
from megatron_grit.store.progress import Progress

_PROGRESS_FROM = 1024


@torch.no_grad()
def score_tokens(
    chunks: Sequence[GritDecoder],
    texts: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    group: ModelGroup,
    batch_tokens: int,
    progress: bool = True,
    before_pass: Callable[[], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Loss of each text. All processes of a model-parallel group call it with the same texts; groups are independent
    of each other.

    Args:
        chunks: of this process's pipeline stage of the model; one, but for an interleaved pipeline.
        texts: for each text its tokens (int [L]) and which of them are supervised (bool [L]); the first token has no
            context and is never counted.
        group: this process's model-parallel group.
        batch_tokens: token budget of one forward pass, on each replica; raised to the longest text.
        progress: show a bar from 1,024 texts on, in the process that leads the group.
        before_pass: called before each forward pass; what it raises ends the call.

    Returns:
        For each text the sum of its supervised tokens' losses in nats (float64) and their number (int64), on every
        process.
    """
    for chunk in chunks:
        chunk.eval()
    context = chunks[0].context
    lengths = np.array([len(tokens) for tokens, _ in texts], dtype=np.int64)
    counts = np.array([int(np.count_nonzero(supervised[1:])) for _, supervised in texts], dtype=np.int64)
    sums = torch.zeros(len(texts), dtype=torch.float64, device=context.device)
    scored = np.flatnonzero(lengths > 1)
    budget = max(batch_tokens, int(lengths.max(initial=0)))
    shows = progress and group.leads and len(scored) >= _PROGRESS_FROM

    def row_of(members: np.ndarray, row_length: int | None) -> PackedRow:
        if before_pass is not None:
            before_pass()
        return scoring_row([texts[member] for member in members.tolist()], row_length)

    with Progress(len(scored), "scoring", "text", enabled=shows) as bar:
        for start in range(0, len(scored), WINDOW):
            window = scored[start : start + WINDOW]
            batches = [window[batch] for batch in share_out(lengths[window], budget, group.num_replicas)]
            row_length = common_length(context, [int(lengths[batch].sum()) for batch in batches])
            losses = forward_batches(chunks, group, batches, row_of, row_length, Output.TOKEN_LOSSES, bar.update)
            for members, losses_T in zip(batches[group.replica :: group.num_replicas], losses, strict=False):
                texts_L = torch.from_numpy(np.repeat(members, lengths[members])).to(context.device)
                sums.index_add_(0, texts_L, losses_T[: len(texts_L)].double())  # padding comes last
    if context.context_size > 1:  # each rank has the losses of its own tokens
        dist.all_reduce(sums, group=context.context_group)
    if group.replica_group is not None:
        dist.all_reduce(sums, group=group.replica_group)
    return from_last_stage(sums, context).cpu().numpy(), counts


@torch.no_grad()
def next_token_logits(
    model: GritDecoder,
    prompts: Sequence[Sequence[int] | np.ndarray],
    tokens: Sequence[int],
    *,
    batch_tokens: int,
    before_pass: Callable[[], object] | None = None,
) -> np.ndarray:
    """Logits of some tokens as the next one of each prompt.

    Args:
        model: one process's whole model.
        prompts: token ids, at least one each.
        tokens: whose logits.
        batch_tokens: token budget of one forward pass; raised to the longest prompt.
        before_pass: called before each forward pass; what it raises ends the call.

    Returns:
        float32 [len(prompts), len(tokens)].
    """
    model.eval()
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    logits = np.empty((len(prompts), len(tokens)), dtype=np.float32)
    for members in pack(lengths, max(batch_tokens, int(lengths.max(initial=0)))):
        if before_pass is not None:
            before_pass()
        texts = [np.asarray(prompts[i]) for i in members]
        row = scoring_row([(text, np.zeros(len(text), dtype=bool)) for text in texts]).to(model.context.device)
        last = row.cu_seqlens[1:].long() - 1
        states_L1D = model(row, Output.HIDDEN)[last]
        logits[members] = model.shard_logits(states_L1D)[:, list(tokens)].float().cpu().numpy()
    return logits


def read_supervised(
    prefix: str | Path, tokenizer: Tokenizer, max_positions: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each record of an indexed file its tokens, and which of them are supervised.

    Args:
        prefix: of the file.
        tokenizer: of the model.
        max_positions: tokens that it takes.

    Raises:
        DataError: the file is damaged, of another kind or of another tokenizer, or a record is too long.
    """
    check_texts(prefix)
    records = IndexedRecords(prefix)
    problem = records.meta.other_tokenizer(tokenizer.path, tokenizer.fingerprint)
    if problem is not None:
        raise DataError(f"{problem}; build it again with this model's", path=prefix)
    texts = []
    for index in range(len(records)):
        spans = records.get(index)
        tokens = np.concatenate([ids for _, ids in spans])
        if len(tokens) > max_positions:
            raise DataError(
                f"record {index} has {len(tokens)} tokens, and the model takes {max_positions}; build the file again "
                "with --max-length",
                path=prefix,
            )
        texts.append((tokens, np.repeat([supervised(role) for role, _ in spans], [len(ids) for _, ids in spans])))
    return texts


def scoring_row(texts: Sequence[tuple[np.ndarray, np.ndarray]], row_length: int | None = None) -> PackedRow:
    """A row of texts, each a segment.

    Args:
        texts: of each its tokens and which of them are supervised.
        row_length: length to pad the row to. None: no padding.
    """
    sizes = [len(tokens) for tokens, _ in texts]
    used = sum(sizes)
    padding = 0 if row_length is None else row_length - used
    bounds = torch.tensor([0, *sizes, padding] if padding else [0, *sizes]).cumsum(0)
    tokens = torch.from_numpy(np.concatenate([tokens for tokens, _ in texts]).astype(np.int64))
    supervised = torch.from_numpy(np.concatenate([mask for _, mask in texts]))
    segment_ids = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    # Padding may be longer than the model has positions.
    positions = torch.arange(used) - bounds[segment_ids[:used]]
    # Position t predicts token t + 1 where that is of the same segment.
    predicts = torch.zeros(used)
    predicts[:-1] = (supervised[1:] & (positions[1:] > 0)).float()
    return PackedRow(
        embeds=False,
        tokens_1T=F.pad(tokens, (0, padding))[None],
        positions_1T=F.pad(positions, (0, padding))[None],
        cu_seqlens=bounds.to(torch.int32),
        max_seqlen=max(*sizes, padding),
        padding_mask_1T=(torch.arange(used + padding) >= used)[None],
        labels_1T=F.pad(tokens.roll(-1), (0, padding))[None],
        loss_mask_1T=F.pad(predicts, (0, padding))[None],
        segment_ids_T=segment_ids,
    )
