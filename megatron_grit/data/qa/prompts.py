"""Prompts of questions: the templates of prompts.yaml filled, and their tokens.

Contexts are cut where a prompt is too long, the question never. What is trained is the first answer with a space before
it, and the end of the sequence.

Source: Wang et al., InstructRetro (arXiv 2310.07713), section 4, whose prompts have this structure in other words.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter

from megatron_grit.data.chat.chat_format import Piece
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.qa.options import EncoderContexts, PromptOptions, load_prompts
from megatron_grit.data.qa.records import QaRecord
from megatron_grit.data.text.spans import Span, encode_units
from megatron_grit.data.text.tokenizer import Tokenizer

_ROLES = {"system": Role.SYSTEM, "contexts": Role.USER, "question": Role.USER, "dialogue": Role.USER}


def encoder_contexts(record: QaRecord, prompt: PromptOptions, encoder: EncoderContexts) -> list[str]:
    """The contexts that the neighbor encoder reads."""
    first = 0 if encoder.reuse_top else prompt.ft_neighbours
    return [text for text in record.contexts[first : first + encoder.encoder_neighbours] if text.strip()]


def prompt_pieces(record: QaRecord, options: PromptOptions, contexts: str) -> list[Piece]:
    """A prompt, up to where its answer begins.

    Args:
        record: the question.
        options: how it is asked.
        contexts: of :func:`prompt_contexts`, or the beginning of them.
    """
    prompts = load_prompts()
    template = prompts["templates"][options.prompt_template]["dialogue" if record.is_dialogue else "question"]
    wanted = prompts["answers"][_kind_of_answer(record, options.task)]
    values = {
        "system": prompts["system"],
        "contexts": contexts and f"{contexts}\n\n",
        "question": record.question,
        "dialogue": record.question,
        **{name: f" {wanted[name]}" if name in wanted else "" for name in ("instruction", "opening")},
    }
    pieces: list[Piece] = []
    for text, name, _, _ in Formatter().parse(template):
        value = "" if name is None else values[name]
        # A token that begins with a space belongs where the space does: to the question, not to the template.
        label = text.removesuffix(" ") if value else text
        pieces += [(Role.TEMPLATE, label)] if label else []
        if name is not None and value:
            pieces.append((_ROLES.get(name, Role.TEMPLATE), text[len(label) :] + value))
    return pieces


def prompt_contexts(record: QaRecord, options: PromptOptions) -> str:
    """The contexts in the prompt, a blank line between two."""
    texts = (text.strip() for text in record.contexts[: options.ft_neighbours])
    return "\n\n".join(text for text in texts if text)


def encode_question(tokenizer: Tokenizer, record: QaRecord, options: PromptOptions, max_tokens: int) -> list[int]:
    """Ids of a prompt of at most ``max_tokens``.

    Raises:
        DataError: it is longer without any context; names the record.
    """
    return _fit(tokenizer, record, options, max_tokens)[1]


def encode_example(tokenizer: Tokenizer, record: QaRecord, options: PromptOptions, max_tokens: int) -> list[Span]:
    """Spans of a prompt and the first answer, of at most ``max_tokens``. The prompt's ids are those of
    :func:`encode_question` with the tokens that the answer leaves.

    Raises:
        DataError: there is no answer, the question and the answer are longer without any context, or the tokenizer does
            not keep the answer apart; names the record.
    """
    answer = record.answers[0].strip() if record.answers else ""
    if not answer:
        raise record.item.error('has no answer; give "answers", or leave the item out')
    end: list[Piece] = [(Role.ANSWER, f" {answer}"), (Role.ANSWER, tokenizer.eos_id)]
    size = len(_spans(tokenizer, record, [*prompt_pieces(record, options, ""), *end])[-1][1])
    contexts, prompt = _fit(tokenizer, record, options, max_tokens - size)
    spans = _spans(tokenizer, record, [*prompt_pieces(record, options, contexts), *end])
    if [token for _, ids in spans[:-1] for token in ids] != prompt or spans[-1][0] is not Role.ANSWER:
        raise record.item.error("the tokenizer merges the prompt's end with the answer; use another prompt_template")
    return spans


def _fit(tokenizer: Tokenizer, record: QaRecord, options: PromptOptions, max_tokens: int) -> tuple[str, list[int]]:
    """The contexts that there is room for, and the ids of the prompt."""
    contexts = prompt_contexts(record, options)
    while True:
        ids = encode_units(tokenizer, [prompt_pieces(record, options, contexts)]).tokens.tolist()
        if len(ids) <= max_tokens:
            return contexts, ids
        if not contexts:
            raise record.item.error(
                f"its question takes {len(ids)} tokens, and there is room for {max_tokens}; raise the limit, or leave "
                "the item out"
            )
        _, offsets = tokenizer.encode_with_offsets(contexts)
        kept = max(0, len(offsets) - (len(ids) - max_tokens))
        contexts = contexts[: offsets[kept][0] if kept < len(offsets) else 0].rstrip()


def _spans(tokenizer: Tokenizer, record: QaRecord, pieces: Sequence[Piece]) -> list[Span]:
    table = encode_units(tokenizer, [pieces])
    if table.problems:
        raise record.item.error(table.problems[0])
    return table.spans(0)


def _kind_of_answer(record: QaRecord, task: str) -> str:
    if record.item.fields().get("multichoice_options"):
        return "choice"
    kinds = load_prompts()["tasks"]
    return next((kind for kind, names in kinds.items() if task.lower() in map(str.lower, names)), "full")
