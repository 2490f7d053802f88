"""Answers to prompts, as text while it comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_grit.config.options import SamplingOptions
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.inference.generation.generate import Generation, NewToken, Past, numbers_of_equals
from megatron_grit.inference.generation.text_stream import TextStream
from megatron_grit.inference.results import Answer


class AnswerPart(NamedTuple):
    """A piece of an answer's text; the last one of each prompt comes with the answer."""

    prompt: int
    """Number of the prompt."""
    text: str
    """Whole characters; may be empty in the last part."""
    answer: Answer | None = None


def stream_answers(
    generation: Generation,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    tokenizer: Tokenizer,
    pasts: Sequence[Past | None] | None = None,
) -> Iterator[AnswerPart]:
    """Continue prompts to their ends. The texts of a prompt's parts, joined, are its answer's.

    Args:
        generation: continues nothing yet.
        prompts: token ids, none empty. Equal ones are numbered in their order, and each draws by the seed and its
            number.
        options: how.
        tokenizer: the model's.
        pasts: what is known of the first tokens of each prompt. None: nothing.

    Raises:
        DataError: a prompt leaves no room for an answer.
    """
    streams, found = [TextStream(tokenizer, options.stop) for _ in prompts], list[list[NewToken]]()
    numbers, pasts = numbers_of_equals(prompts), pasts or [None] * len(prompts)
    for prompt, number, past in zip(prompts, numbers, pasts, strict=True):
        generation.add(prompt, options, number, past)
        found.append([])
    while generation.active:
        for new in generation.step():
            stream, tokens = streams[new.sequence], found[new.sequence]
            tokens.append(new)
            piece = "" if new.ends else stream.push(new.token)
            if stream.ended:
                generation.stop(new.sequence)
            if not stream.ended and new.finish_reason is None:
                if piece:
                    yield AnswerPart(new.sequence, piece)
                continue
            text, rest = stream.close()
            answer = _answer(text, "stop" if stream.ended else new.finish_reason or "", prompts[new.sequence], tokens)
            yield AnswerPart(new.sequence, piece + rest, answer)


def _answer(text: str, finish_reason: str, prompt: Sequence[int], tokens: Sequence[NewToken]) -> Answer:
    return Answer(
        text,
        finish_reason,
        len(prompt),
        sum(not new.ends for new in tokens),
        prompt_token_ids=list(prompt),
        token_ids=[new.token for new in tokens],
        log_probs=[new.log_prob for new in tokens],
    )
