"""Autoregressive decoding with a KV cache, several prompts at once and no padding."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.inference.kv_cache import SequenceCache
from megatron_grit.models.decoder import GritDecoder, Output


@torch.no_grad()
def generate_tokens(
    model: GritDecoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        model: one process's whole model (no pipeline parallelism).
        prompts: token ids, none empty.
        max_new_tokens: at most this many are added to each.
        stop_ids: a sequence ends with such a token, which is not returned.
        temperature: divides the logits before sampling. 0: the most likely token.
        top_p: sample from the smallest set of tokens that holds this probability.

    Returns:
        The new tokens of each prompt.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    model.eval()
    cache = SequenceCache(len(prompts))
    outputs: list[list[int]] = [[] for _ in prompts]
    pending = [list(prompt) for prompt in prompts]
    lengths = [0] * len(prompts)
    for _ in range(max_new_tokens):
        row = continuation_row([pending[i] for i in cache.active], [lengths[i] for i in cache.active])
        logits_TV = model(row.to(model.context.device), Output.LOGITS, cache)
        last = row.cu_seqlens[1:].long() - 1
        chosen = choose_tokens(logits_TV[last.to(logits_TV.device)].float().cpu(), temperature, top_p, generator)
        for sequence, token in zip(cache.active, chosen, strict=True):
            lengths[sequence] += len(pending[sequence])
            pending[sequence] = [token]
            if token not in stop_ids:
                outputs[sequence].append(token)
        running = [sequence for sequence in cache.active if pending[sequence][0] not in stop_ids]
        if not running:
            break
        if len(running) < len(cache.active):
            cache.keep(running)
    return outputs


def continuation_row(tokens: Sequence[Sequence[int]], lengths: Sequence[int]) -> PackedRow:
    """A row with new tokens of several sequences.

    Args:
        tokens: new tokens of each sequence.
        lengths: tokens of each that the cache holds already.
    """
    positions = [range(start, start + len(new)) for new, start in zip(tokens, lengths, strict=True)]
    flat = torch.tensor([token for new in tokens for token in new])
    sizes = torch.tensor([0, *(len(new) for new in tokens)])
    return PackedRow(
        embeds=False,
        tokens_1T=flat[None],
        positions_1T=torch.tensor([position for span in positions for position in span])[None],
        cu_seqlens=sizes.cumsum(0).to(torch.int32),
        max_seqlen=max(span.stop for span in positions),
        padding_mask_1T=torch.zeros(1, len(flat), dtype=torch.bool),
    )


def choose_tokens(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> list[int]:
    """One token a row: the most likely one, or a sample.

    Args:
        logits_BV: fp32 on the CPU.
        temperature: 0 for the most likely token.
        top_p: nucleus of the sample (arXiv 1904.09751).
        generator: source of randomness.
    """
    if temperature == 0:
        return logits_BV.argmax(-1).tolist()
    probabilities, order = (logits_BV / temperature).softmax(-1).sort(-1, descending=True)
    outside = probabilities.cumsum(-1) - probabilities > top_p  # the first token is always inside
    picked = torch.multinomial(probabilities.masked_fill(outside, 0.0), 1, generator=generator)
    return order.gather(1, picked).squeeze(1).tolist()
