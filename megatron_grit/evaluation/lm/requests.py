"""Requests of tokens that a model answers on any mesh: continuations to score, and prompts to continue.

All processes of the job answer them together. Where every process runs the harness, each has all requests. Where one
process runs it, that one leads: it tells the others what to do, step by step, and they follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import groupby
from typing import Any

from megatron_grit.config.options import SamplingOptions
from megatron_grit.inference.continuations import Asked, score_continuations
from megatron_grit.inference.generation.generate import generate_tokens
from megatron_grit.inference.model import GritModel
from megatron_grit.parallel.collectives import gather_json, json_from_rank_0
from megatron_grit.store.progress import Progress

_ROUNDS = 8
"""Forward passes of a data parallel rank, and of each stage, between two times that answers are written."""


@dataclass(frozen=True)
class Score:
    """A continuation to score."""

    inputs: tuple[int, ...]
    """Context and continuation."""
    num_scored: int
    """Tokens of the continuation, which come last."""


@dataclass(frozen=True)
class Prompt:
    """A prompt to continue."""

    inputs: tuple[int, ...]
    stop: tuple[str, ...]
    """Texts that end the answer."""
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0


class RequestRunner:
    """Answers requests.

    Args:
        model: on this job's mesh.
        batch_tokens: token budget of a forward pass that scores.
        at_once: prompts that are continued together.
        leads: the first process calls :meth:`score`, :meth:`generate` and at the end :meth:`finish`, all others
            :meth:`follow`. False: all processes call the first two with the same requests.
    """

    def __init__(self, model: GritModel, *, batch_tokens: int, at_once: int, leads: bool = False) -> None:
        self.model, self._batch_tokens, self._at_once = model, batch_tokens, at_once
        self._context = model.model.context
        self._tells = leads and self._context.world_size > 1
        self._busy = False

    def follow(self) -> None:
        """Take part in what the first process does, until it has finished."""
        while (step := json_from_rank_0(None, self._context)) is not None:
            self._take(*step)

    def finish(self) -> None:
        """Let the others go. Where a step has failed they wait for the rest of it, and the launcher ends them."""
        if self._tells and not self._busy:
            json_from_rank_0(None, self._context)

    def _together(self, what: str, items: list[Any]) -> Any:
        """Take a step, with all processes."""
        self._busy = True
        if self._tells:
            json_from_rank_0([what, items], self._context)
        found = self._take(what, items)
        self._busy = False
        return found

    def _take(self, what: str, items: list[Any]) -> Any:
        if what == "score":
            asked = [Asked(*item) for item in items]
            return score_continuations(self.model.model, asked, batch_tokens=self._batch_tokens)
        return self._continue_all([[Prompt(*prompt) for prompt in batch] for batch in items])

    @property
    def _shows(self) -> bool:
        return self._context.rank == 0

    def score(self, requests: Sequence[Score]) -> Iterator[tuple[list[int], list[list[Any]]]]:
        """Yields numbers of requests with ``[sum of log-probabilities, whether all tokens are the likeliest]``, longest
        texts first."""
        texts: dict[tuple[int, ...], list[int]] = {}
        for number, request in enumerate(requests):
            texts.setdefault(request.inputs[:-1], []).append(number)
        ordered = sorted(texts, key=lambda text: (-len(text), text))
        budget = self._batch_tokens * self._context.data_size * _ROUNDS * self._context.pipeline_size
        with Progress(len(requests), "scoring", "request", enabled=self._shows) as bar:
            for window in _windows(ordered, budget):
                asked = [
                    Asked(text, [requests[n].inputs[-requests[n].num_scored :] for n in texts[text]]) for text in window
                ]
                scored = self._together("score", asked)
                numbers = [number for text in window for number in texts[text]]
                yield numbers, [list(score) for scores in scored for score in scores]
                bar.update(len(numbers))

    def generate(self, requests: Sequence[Prompt]) -> Iterator[tuple[list[int], list[str]]]:
        """Yields numbers of requests with the texts that follow, up to the first stop text."""
        group = self.model.model_group

        def key(number: int) -> tuple[Any, ...]:
            request = replace(requests[number], inputs=())
            return (str(request), -len(requests[number].inputs), requests[number].inputs)

        ordered = sorted(range(len(requests)), key=key)
        batches = [
            list(same)[first : first + self._at_once]
            for _, numbers in groupby(ordered, lambda number: key(number)[0])
            for same in [list(numbers)]
            for first in range(0, len(same), self._at_once)
        ]
        with Progress(len(requests), "generating", "request", enabled=self._shows) as bar:
            for first in range(0, len(batches), group.num_groups):
                several = batches[first : first + group.num_groups]
                numbers = [number for batch in several for number in batch]
                yield (
                    numbers,
                    self._together("generate", [[astuple(requests[number]) for number in batch] for batch in several]),
                )
                bar.update(len(numbers))

    def _continue_all(self, batches: Sequence[Sequence[Prompt]]) -> list[str]:
        """Texts that follow the prompts of all batches, at most one for each model-parallel group."""
        group = self.model.model_group
        own = self._continue(batches[group.number]) if group.number < len(batches) else []
        parts = gather_json([group.number, own] if group.leads else None, self._context)
        return [text for _, texts in sorted(part for part in parts if part is not None) for text in texts]

    def _continue(self, prompts: Sequence[Prompt]) -> list[str]:
        how, tokenizer = prompts[0], self.model.tokenizer
        tail = max((len(stop.encode()) for stop in how.stop), default=0) + 8

        def ends(tokens: list[int]) -> bool:
            text = tokenizer.decode(tokens[-tail:])
            return any(stop in text for stop in how.stop)

        found = generate_tokens(
            self.model.model,
            [prompt.inputs for prompt in prompts],
            SamplingOptions(
                max_new_tokens=how.max_new_tokens,
                temperature=how.temperature,
                top_p=how.top_p,
                top_k=how.top_k,
                seed=how.seed,
            ),
            stop_ids=self.model.chat.end_ids,
            max_positions=self.model.config.model.max_position_embeddings,
            ends=ends if how.stop else None,
        )
        return [_cut(tokenizer.decode(each.tokens), how.stop) for each in found]


def _windows(texts: Sequence[tuple[int, ...]], budget: int) -> Iterator[list[tuple[int, ...]]]:
    """Consecutive texts of at most so many tokens, or one."""
    window: list[tuple[int, ...]] = []
    used = 0
    for text in texts:
        if window and used + len(text) > budget:
            yield window
            window, used = [], 0
        window.append(text)
        used += len(text)
    if window:
        yield window


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
