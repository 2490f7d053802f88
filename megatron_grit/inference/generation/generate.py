"""Autoregressive decoding with a KV cache, several prompts at once and no padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_grit.config.options import SamplingOptions
from megatron_grit.data.rows.batch import PackedRow
from megatron_grit.errors import DataError
from megatron_grit.inference.continuations import text_row
from megatron_grit.inference.generation.kv_cache import SequenceCache
from megatron_grit.inference.generation.sampling import TokenSampler
from megatron_grit.inference.mesh_rows import common_length
from megatron_grit.inference.reading import Reader
from megatron_grit.models.decoder import GritDecoder, Output
from megatron_grit.parallel.collectives import from_last_stage
from megatron_grit.training.step import run_schedule

FinishReason = Literal["stop", "length"]
"""stop: at a token or text that ends it. length: at the limit, or at the model's last position."""


class NewToken(NamedTuple):
    """A token that a sequence is continued with."""

    sequence: int
    token: int
    log_prob: float
    """Before repetition_penalty, temperature, top_p and top_k."""
    finish_reason: FinishReason | None = None
    """Why the sequence ends here. None: it goes on."""
    ends: bool = False
    """Whether the token itself ends it, and is no part of the answer."""


class Continuation(NamedTuple):
    """What follows a prompt."""

    tokens: list[int]
    finish_reason: FinishReason
    end: list[int] = []
    """The token that ended it, where one did."""
    log_probs: Sequence[float] = ()
    """Of ``tokens`` and ``end``, before repetition_penalty, temperature, top_p and top_k."""


class Past(Protocol):
    """Keys and values of the first tokens of a prompt, of an earlier computation."""

    num_tokens: int
    """As many tokens begin the prompt; it is longer."""
    recomputed: Sequence[int]
    """Which of them are computed anew, in ascending order."""

    def layer(self, layer_number: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys, rotated to their places in the prompt, and values of a layer, which counts from 1: [num_tokens, G, H]
        each."""
        ...


class _Sequence:
    """A prompt and its answer so far."""

    def __init__(self, prompt: Sequence[int], sampler: TokenSampler, limit: int, past: Past | None) -> None:
        self.prompt, self.sampler, self.limit = list(prompt), sampler, limit
        self.answer: list[int] = []
        self.pending, self.num_cached = self.prompt, 0
        """Tokens of the next pass, and how many come before them."""
        self.places: list[int] | None = None
        """Of the pending tokens in the prompt. None: they follow what is cached."""
        if past is not None:
            self.places = [*past.recomputed, *range(past.num_tokens, len(prompt))]
            self.pending = [self.prompt[place] for place in self.places]


class Generation:
    """Continues sequences, a token of each in a step. Sequences may be added and stopped between steps.

    All processes of a model-parallel group make the same calls, and each gets all tokens.

    Under context and sequence parallelism, which share out the tokens of a row, each token takes a pass over all before
    it; elsewhere a cache holds keys and values, on each stage those of its layers.

    Args:
        model: this process's pipeline stage of the model, or all of it.
        stop_ids: a sequence ends with such a token.
        max_positions: tokens that the model takes, prompt and answer together.
        before_pass: called before each forward pass; what it raises ends the step.
        reader: what neighbors the model reads; knows all sequences by their numbers. None: none.
    """

    def __init__(
        self,
        model: GritDecoder,
        *,
        stop_ids: Collection[int],
        max_positions: int,
        before_pass: Callable[[], object] | None = None,
        reader: Reader | None = None,
    ) -> None:
        self._model, self._stop_ids, self._max_positions = model.eval(), stop_ids, max_positions
        self._before_pass, self._reader = before_pass, reader
        self._is_cached = model.context.context_size == 1 and not model.context.sequence_parallel
        self._cache = SequenceCache()
        self._sequences: dict[int, _Sequence] = {}

    @property
    def active(self) -> list[int]:
        """Numbers of the sequences that the next step continues."""
        return self._cache.active

    def add(self, prompt: Sequence[int], options: SamplingOptions, number: int = 0, past: Past | None = None) -> int:
        """Continue a prompt from the next step on.

        Args:
            prompt: token ids, not empty.
            options: how tokens are drawn, and how many at most. Stop texts are for the caller, by :meth:`stop`.
            number: of the sequence among those of the same prompt; see :class:`TokenSampler`.
            past: what is known of its first tokens, for a model that this process holds whole.

        Returns:
            The number of the sequence: 0 for the first one, then counting.

        Raises:
            DataError: the prompt leaves no room for an answer.
        """
        check_room(len(prompt), self._max_positions)
        limit = min(options.max_new_tokens, self._max_positions - len(prompt))
        # The last token is not read.
        added = self._cache.add(len(prompt) + limit - 1)
        sequence = self._sequences[added] = _Sequence(prompt, TokenSampler(options, prompt, number), limit, past)
        if past is not None:
            device = self._model.context.device
            for layer_number in range(1, self._model.config.num_layers + 1):
                self._cache.preload(added, layer_number, *past.layer(layer_number, device))
            self._cache.put(added, torch.tensor(sequence.places, device=device))
        return added

    def stop(self, sequence: int) -> None:
        """Do not continue a sequence any more."""
        if sequence in self._sequences:
            del self._sequences[sequence]
            self._cache.keep(list(self._sequences))

    @torch.no_grad()
    def step(self) -> list[NewToken]:
        """The next token of each active sequence; those that end with it are not active any more."""
        if self._before_pass is not None:
            self._before_pass()
        sequences = [self._sequences[number] for number in self.active]
        row = self._row(sequences)
        if self._reader is not None:
            known = [[*one.prompt, *one.answer] for one in sequences]
            row.neighbors = self._reader.read(self.active, known, [one.num_cached for one in sequences])
        samplers = [one.sampler for one in sequences]
        tokens, log_probs = _choose(self._model, row, self._cache if self._is_cached else None, samplers)
        found = [
            self._taken(number, one, token, log_prob)
            for number, one, token, log_prob in zip(self.active, sequences, tokens, log_probs, strict=True)
        ]
        ended = {new.sequence for new in found if new.finish_reason is not None}
        if ended:
            self._sequences = {number: one for number, one in self._sequences.items() if number not in ended}
            self._cache.keep(list(self._sequences))
        return found

    def _row(self, sequences: Sequence[_Sequence]) -> PackedRow:
        if not self._is_cached:
            texts = [[*one.prompt, *one.answer] for one in sequences]
            return text_row(texts, common_length(self._model.context, [sum(map(len, texts))]))
        return _row_at(
            [one.pending for one in sequences],
            [one.places or range(one.num_cached, one.num_cached + len(one.pending)) for one in sequences],
        )

    def _taken(self, number: int, sequence: _Sequence, token: int, log_prob: float) -> NewToken:
        sequence.num_cached = len(sequence.prompt) + len(sequence.answer)
        sequence.pending = [token]
        if sequence.places is not None:
            sequence.places = None
            self._cache.put(number, None)
        if token in self._stop_ids:
            return NewToken(number, token, log_prob, "stop", ends=True)
        sequence.answer.append(token)
        return NewToken(number, token, log_prob, "length" if len(sequence.answer) == sequence.limit else None)


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
    """Continue each prompt to its end. All processes of a model-parallel group call it with the same prompts, and each
    gets all continuations.

    Args:
        model: this process's pipeline stage of the model, or all of it.
        prompts: token ids, none empty. What is drawn for one does not depend on the others: equal prompts, and they
            alone, are numbered in their order, and each draws by the seed and its number.
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
        check_room(len(prompt), max_positions)
    generation = Generation(
        model, stop_ids=stop_ids, max_positions=max_positions, before_pass=before_pass, reader=reader
    )
    for prompt, number in zip(prompts, numbers_of_equals(prompts), strict=True):
        generation.add(prompt, options, number)
    found: list[list[NewToken]] = [[] for _ in prompts]
    texts: list[list[int]] = [[] for _ in prompts]
    stopped: set[int] = set()
    while generation.active:
        for new in generation.step():
            found[new.sequence].append(new)
            if new.ends:
                continue
            texts[new.sequence].append(new.token)
            if ends is not None and ends(texts[new.sequence]):
                stopped.add(new.sequence)
                generation.stop(new.sequence)
    return [
        Continuation(
            texts[sequence],
            "stop" if sequence in stopped or tokens[-1].ends else "length",
            [new.token for new in tokens if new.ends],
            [new.log_prob for new in tokens],
        )
        for sequence, tokens in enumerate(found)
    ]


def check_room(num_tokens: int, max_positions: int) -> None:
    """
    Raises:
        DataError: a prompt of so many tokens leaves no room for an answer.
    """
    if num_tokens >= max_positions:
        raise DataError(f"the prompt has {num_tokens} tokens, and the model takes {max_positions}; shorten it")


def numbers_of_equals(prompts: Sequence[Sequence[int]]) -> list[int]:
    """For each prompt how many equal ones stand before it."""
    seen: Counter[tuple[int, ...]] = Counter()
    numbers = []
    for prompt in map(tuple, prompts):
        numbers.append(seen[prompt])
        seen[prompt] += 1
    return numbers


def _choose(
    model: GritDecoder, row: PackedRow, cache: SequenceCache | None, samplers: Sequence[TokenSampler]
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
        chosen = [sampler.choose(logits_V) for sampler, logits_V in zip(samplers, logits_BV, strict=True)]
        log_probs_B = logits_BV.log_softmax(-1).gather(1, torch.tensor(chosen)[:, None]).squeeze(1)
        found_2B = torch.stack((torch.tensor(chosen, dtype=torch.float64), log_probs_B.double())).to(context.device)
    tokens, log_probs = from_last_stage(found_2B, context).tolist()
    return [int(token) for token in tokens], log_probs


def continuation_row(tokens: Sequence[Sequence[int]], lengths: Sequence[int]) -> PackedRow:
    """A row with new tokens of several sequences.

    Args:
        tokens: new tokens of each sequence.
        lengths: tokens of each that the cache holds already.
    """
    return _row_at(tokens, [range(start, start + len(new)) for new, start in zip(tokens, lengths, strict=True)])


def _row_at(tokens: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> PackedRow:
    """A row with tokens of several sequences at given positions, which ascend."""
    flat = torch.tensor([token for new in tokens for token in new])
    sizes = torch.tensor([0, *(len(new) for new in tokens)])
    return PackedRow(
        embeds=False,
        tokens_1T=flat[None],
        positions_1T=torch.tensor([position for span in positions for position in span])[None],
        cu_seqlens=sizes.cumsum(0).to(torch.int32),
        max_seqlen=max(span[-1] + 1 for span in positions),
        padding_mask_1T=torch.zeros(1, len(flat), dtype=torch.bool),
    )
