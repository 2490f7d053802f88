"""Autoregressive decoding with a KV cache, several prompts at once and no padding."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megatron_grit.config.options import SamplingOptions
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.errors import DataError
from megatron_grit.inference.continuations import text_row
from megatron_grit.inference.kv_cache import SequenceCache
from megatron_grit.inference.mesh_rows import common_length
from megatron_grit.inference.reading import Reader
from megatron_grit.models.decoder import GritDecoder, Output
from megatron_grit.parallel.collectives import from_last_stage
from megatron_grit.parallel.context import ParallelContext
from megatron_grit.training.step import run_schedule


class Continuation(NamedTuple):
    """What follows a prompt."""

    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    """stop: at a token or text that ends it. length: at the limit, or at the model's last position."""
    end: list[int] = []
    """The token that ended it, where one did."""
    log_probs: Sequence[float] = ()
    """Of ``tokens`` and ``end``, before temperature, top_p and top_k."""


@torch.no_grad()
def generate_tokens(  # many: what generation consists of
    model: GritDecoder,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    *,
    stop_ids: Collection[int],
    max_positions: int,
    ends: Callable[[list[int]], bool] | None = None,
    before_pass: Callable[[], object] | None = None,
    reader: Reader | None = None,
) -> list[Continuation]:
    """Continue each prompt. All processes of a model-parallel group call it with the same prompts, and each gets all
    continuations.

    Under context and sequence parallelism, which share out the tokens of a row, each token takes a pass over all before
    it; elsewhere a cache holds keys and values, on each stage those of its layers.

    Args:
        model: this process's pipeline stage of the model, or all of it.
        prompts: token ids, none empty.
        options: how tokens are drawn, and how many at most. Stop texts are for the caller, by ``ends``.
        stop_ids: a sequence ends with such a token, which is not returned.
        max_positions: tokens that the model takes, prompt and answer together.
        ends: whether a sequence ends with these new tokens, which are returned.
        before_pass: called before each forward pass; what it raises ends all of them.
        reader: what neighbors the model reads. None: none.

    Raises:
        DataError: a prompt leaves no room for an answer.
    """
    for prompt in prompts:
        if len(prompt) >= max_positions:
            raise DataError(f"the prompt has {len(prompt)} tokens, and the model takes {max_positions}; shorten it")
    generator = torch.Generator(device="cpu").manual_seed(options.seed)
    model.eval()
    cached = model.context.context_size == 1 and not model.context.sequence_parallel
    cache = SequenceCache(len(prompts))
    outputs: list[list[int]] = [[] for _ in prompts]
    ended_by: list[list[int]] = [[] for _ in prompts]
    log_probs: list[list[float]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    limits = [min(options.max_new_tokens, max_positions - len(prompt)) for prompt in prompts]
    pending = [list(prompt) for prompt in prompts]
    lengths = [0] * len(prompts)
    while cache.active:
        if before_pass is not None:
            before_pass()
        if cached:
            row = continuation_row([pending[i] for i in cache.active], [lengths[i] for i in cache.active])
        else:
            row = _whole_row(model.context, [[*prompts[i], *outputs[i]] for i in cache.active])
        if reader is not None:
            known = [[*prompts[i], *outputs[i]] for i in cache.active]
            row.neighbors = reader.read(cache.active, known, [lengths[i] for i in cache.active])
        chosen, log_probs_B = _choose(model, row, cache if cached else None, options, generator)
        for sequence, token, log_prob in zip(cache.active, chosen, log_probs_B, strict=True):
            lengths[sequence] += len(pending[sequence])
            pending[sequence] = [token]
            log_probs[sequence].append(log_prob)
            (ended_by if token in stop_ids else outputs)[sequence].append(token)
            stopped[sequence] = token in stop_ids or (ends is not None and ends(outputs[sequence]))
        running = [i for i in cache.active if not stopped[i] and len(outputs[i]) < limits[i]]
        if len(running) < len(cache.active):
            cache.keep(running)
    return [
        Continuation(tokens, "stop" if ended else "length", end, found)
        for tokens, ended, end, found in zip(outputs, stopped, ended_by, log_probs, strict=True)
    ]


def _choose(
    model: GritDecoder,
    row: PackedRow,
    cache: SequenceCache | None,
    options: SamplingOptions,
    generator: torch.Generator,
) -> tuple[list[int], list[float]]:
    """The next token of each sequence of a row and its log-probability, the same on all processes of a model-parallel
    group."""
    context = model.context
    ends = row.cu_seqlens[1:].long()
    last = ends[~row.padding_mask_1T[0, ends - 1]] - 1

    def forward_step(iterator: Iterator[PackedRow], stage: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        states = stage(next(iterator), Output.HIDDEN, cache)
        return states, lambda states: (states.new_zeros(()), {"logits": model.logits_at(states, row, last)})

    items, length = [row.to(context.device)], row.tokens_1T.shape[1]
    reported = run_schedule([model], context, forward_step, items, length, forward_only=True)
    found_2B = torch.zeros(2, len(last), dtype=torch.float64, device=context.device)
    if context.is_last_stage:
        logits_BV = reported[0]["logits"].float().cpu()
        chosen = choose_tokens(logits_BV, options.temperature, options.top_p, generator, options.top_k)
        log_probs_B = logits_BV.log_softmax(-1).gather(1, torch.tensor(chosen)[:, None]).squeeze(1)
        found_2B = torch.stack((torch.tensor(chosen, dtype=torch.float64), log_probs_B.double())).to(context.device)
    tokens, log_probs = from_last_stage(found_2B, context).tolist()
    return [int(token) for token in tokens], log_probs


def _whole_row(context: ParallelContext, texts: Sequence[Sequence[int]]) -> PackedRow:
    return text_row(texts, common_length(context, [sum(map(len, texts))]))


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


def choose_tokens(
    logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator, top_k: int | None = None
) -> list[int]:
    """One token a row: the most likely one, or a sample.

    Args:
        logits_BV: fp32 on the CPU.
        temperature: 0 for the most likely token.
        top_p: nucleus of the sample (arXiv 1904.09751), of the probabilities that ``top_k`` leaves.
        generator: source of randomness.
        top_k: how many of the most likely tokens are sampled from. None: all.
    """
    if temperature == 0:
        return logits_BV.argmax(-1).tolist()
    # Below 0: no quotient overflows, however small the temperature.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    probabilities, order = logits_BV.softmax(-1).sort(-1, descending=True)
    if top_k is not None:
        probabilities[:, top_k:] = 0.0
        probabilities /= probabilities.sum(-1, keepdim=True)
    outside = probabilities.cumsum(-1) - probabilities > top_p  # the first token is always inside
    picked = torch.multinomial(probabilities.masked_fill(outside, 0.0), 1, generator=generator)
    return order.gather(1, picked).squeeze(1).tolist()
