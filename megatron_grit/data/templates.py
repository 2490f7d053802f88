r"""GritLM's templates, as token ids with roles.

==================================  ==========================================================================
embedding, with an instruction      ``<s><|user|>\n{instruction}\n<|embed|>\n{text}``
embedding, empty instruction        ``<s><|embed|>\n{text}``
embedding, plain string             ``{text}``, no BOS
generation, each turn               ``<|user|>\n{user}\n<|assistant|>\n{assistant}</s>``: BOS before the first, a
                                    newline before every other one
generation, plain string            ``{text}``, no BOS, no EOS
==================================  ==========================================================================

``<|user|>``, ``<|embed|>`` and ``<|assistant|>`` are ordinary text. BOS and EOS are ids. The text between two special
tokens is tokenised in one go, as a Hugging Face tokenizer does, so that ids equal those of the whole prompt tokenised
at once; the reference measured each fragment's length alone, and so lost the EOS of all but the last turn.

A token belongs to the span that its first character lies in.

Source: Muennighoff et al., Generative Representational Instruction Tuning (arXiv 2402.09906), and its repository.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_grit.data.batch import RowKind
from megatron_grit.data.records import Record
from megatron_grit.data.roles import Role
from megatron_grit.data.tokenizer import Tokenizer
from megatron_grit.errors import DataError

TEMPLATE_NAME = "gritlm"
"""Written into the indexed files' metadata."""

USER_PREFIX = "<|user|>\n"
EMBED_PREFIX = "\n<|embed|>\n"
ASSISTANT_PREFIX = "\n<|assistant|>\n"
TURN_SEPARATOR = "\n"
_INSTRUCTION_STRIP = "\t\n :"

Span = tuple[Role, list[int]]


def embedding_prefix(instruction: str) -> str:
    """What stands between BOS and the text of a query or passage."""
    instruction = instruction.strip(_INSTRUCTION_STRIP)
    if not instruction:
        return EMBED_PREFIX.lstrip()
    return f"{USER_PREFIX}{instruction}{EMBED_PREFIX}"


def render(record: Record) -> list[str]:
    """Texts of a record as the templates write them, without BOS and EOS: what a tokenizer is trained on."""
    if record.kind is RowKind.GENERATIVE:
        plain = [] if record.text is None else [record.text]
        turns = zip(record.turns[::2], record.turns[1::2], strict=True)
        return plain + [_user_turn(user, is_first=True) + answer.strip() for user, answer in turns]
    queries = [] if record.query is None else [record.query]
    return [
        pair.text if pair.instruction is None else embedding_prefix(pair.instruction) + pair.text
        for pair in [*queries, *record.positives, *record.negatives]
    ]


def encode_embedding(
    tokenizer: Tokenizer, text: str, instruction: str | None = None, max_length: int | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of a text to embed.

    Args:
        tokenizer: the tokenizer.
        text: what is pooled.
        instruction: None for a plain text without template; "" for the template without instruction.
        max_length: tokens beyond it are cut off the end.

    Returns:
        Ids of the instruction (BOS and template; empty where ``instruction`` is None) and ids of the text (empty
        where the instruction alone fills ``max_length``).
    """
    if instruction is None:
        return [], tokenizer.encode(text)[:max_length]
    head, tail = encode_split(tokenizer, embedding_prefix(instruction), text)
    head = [tokenizer.bos_id, *head]
    if max_length is not None:
        head, tail = head[:max_length], tail[: max(0, max_length - len(head))]
    return head, tail


def encode_chat(tokenizer: Tokenizer, turns: Sequence[str], max_length: int | None = None) -> list[Span]:
    """Spans of a conversation.

    Args:
        tokenizer: the tokenizer.
        turns: user, assistant, user, assistant ...; user turns are left as they are, assistant turns are stripped.
        max_length: tokens beyond it are cut off the end.

    Returns:
        CONTEXT and ANSWER spans in turn. A CONTEXT that the cut leaves without answer is left out: in causal
        attention nothing depends on it.

    Raises:
        DataError: the tokenizer merges the end of the template with the start of an answer.
    """
    spans: list[Span] = []
    for index in range(0, len(turns) - 1, 2):
        prompt = _user_turn(turns[index], is_first=index == 0)
        answer = turns[index + 1].strip()
        context, content = encode_split(tokenizer, prompt, answer, exact=True)
        spans.append((Role.CONTEXT, [tokenizer.bos_id, *context] if index == 0 else context))
        spans.append((Role.ANSWER, [*content, tokenizer.eos_id]))
    return spans if max_length is None else truncate_chat(spans, max_length)


def truncate_chat(spans: Sequence[Span], max_length: int) -> list[Span]:
    """The first ``max_length`` tokens of a conversation, without a CONTEXT at the end that has lost its answer."""
    kept: list[Span] = []
    room = max_length
    for role, ids in spans:
        if room > 0:
            kept.append((role, ids[:room]))
        room -= len(ids)
    if kept and kept[-1][0] is Role.CONTEXT:
        kept.pop()
    return kept


def encode_prompt(tokenizer: Tokenizer, turns: Sequence[str]) -> list[int]:
    """Ids that a model continues with its answer.

    Args:
        tokenizer: the tokenizer.
        turns: user, assistant, ..., user.

    Raises:
        DataError: the last turn is not the user's.
    """
    if len(turns) % 2 == 0:
        raise DataError("a prompt is user, assistant, ..., user: its last turn has to be the user's")
    ids = [index for _, span in encode_chat(tokenizer, turns[:-1]) for index in span]
    prompt = tokenizer.encode(_user_turn(turns[-1], is_first=len(turns) == 1))
    return [*ids, *prompt] if ids else [tokenizer.bos_id, *prompt]


def encode_text(tokenizer: Tokenizer, text: str, max_length: int | None = None) -> list[Span]:
    """Span of a plain text: all of it supervised, without BOS or EOS."""
    return [(Role.TEXT, tokenizer.encode(text)[:max_length])]


def encode_split(tokenizer: Tokenizer, head: str, tail: str, *, exact: bool = False) -> tuple[list[int], list[int]]:
    """Ids of ``head + tail`` tokenised in one go, split where ``tail`` begins.

    Args:
        tokenizer: the tokenizer.
        head: text before the boundary.
        tail: text after it.
        exact: raise rather than give to ``head`` a token that holds characters of both.

    Raises:
        DataError: ``exact``, and a token reaches across the boundary.
    """
    ids = tokenizer.encode(head + tail)
    alone = tokenizer.encode(head)
    if ids[: len(alone)] == alone:  # nothing merges across: always so where a newline is a token of its own
        return alone, ids[len(alone) :]
    ids, offsets = tokenizer.encode_with_offsets(head + tail)
    boundary = len(head)
    split = next((index for index, (begin, _) in enumerate(offsets) if begin >= boundary), len(ids))
    if exact and split > 0 and offsets[split - 1][1] > boundary:
        token = tokenizer.id_to_token(ids[split - 1])
        raise DataError(
            f"the tokenizer merges the template's end with the start of the answer {tail[:20]!r} into {token!r}, so "
            "that part of the answer would not be trained; use a tokenizer that keeps newlines apart from text",
            path=tokenizer.path,
        )
    return ids[:split], ids[split:]


def _user_turn(user: str, *, is_first: bool) -> str:
    return f"{'' if is_first else TURN_SEPARATOR}{USER_PREFIX}{user}{ASSISTANT_PREFIX}"
