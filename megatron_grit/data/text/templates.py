r"""GRIT's templates: token ids with roles for texts to embed, and for conversations.

==================================  ==========================================================================
embedding, with an instruction      ``<s><|user|>\n{instruction}\n<|embed|>\n{text}``
embedding, empty instruction        ``<s><|embed|>\n{text}``
embedding, plain string             ``{text}``, no BOS
generation, conversation            one of :mod:`megatron_grit.data.chat.chat_templates`, GritLM's own by default
generation, plain string            ``{text}``, no BOS, no EOS
==================================  ==========================================================================

``<|user|>``, ``<|embed|>`` and ``<|assistant|>`` are text, or ids where the tokenizer has them as special tokens. BOS
and EOS are ids. The reference measured each fragment's length alone, and so lost the EOS of all but the last turn; see
:mod:`megatron_grit.data.text.spans`.

Source: Muennighoff et al., Generative Representational Instruction Tuning (arXiv 2402.09906), and its repository.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np

from megatron_grit.data.chat.chat_format import ChatFormat, Piece
from megatron_grit.data.chat.chat_templates import load_chat_format
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.text.markers import NO_MARKERS, TextMarkers
from megatron_grit.data.text.records import RESULT_ROLES, Message, Record, TextPair, alternate
from megatron_grit.data.text.spans import Span, encode_units
from megatron_grit.data.text.special import SpecialTokens
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import DataError

EMBEDDING_TEMPLATE = "gritlm"
"""Name of the template of texts to embed."""

USER_PREFIX = "<|user|>\n"
EMBED_PREFIX = "\n<|embed|>\n"
ASSISTANT_PREFIX = "\n<|assistant|>\n"
_INSTRUCTION_STRIP = "\t\n :"
_INSTRUCTION = "{instruction}"


def embedding_prefix(instruction: str) -> str:
    """What stands between BOS and the text of a query or passage."""
    instruction = instruction.strip(_INSTRUCTION_STRIP)
    if not instruction:
        return EMBED_PREFIX.lstrip()
    return f"{USER_PREFIX}{instruction}{EMBED_PREFIX}"


def render(record: Record) -> list[str]:
    """Texts of a record as GritLM's templates write them, without BOS and EOS: what a tokenizer is trained on."""
    texts = [
        pair.text if pair.instruction is None else embedding_prefix(pair.instruction) + pair.text
        for pair in record.pairs
    ]
    texts += [text for text in (record.text, record.prompt, record.completion) if text is not None]
    prompt = ""
    for message in record.messages:
        if message.role == "system":
            prompt += message.content + "\n"
        elif message.role == "user":
            prompt += message.content
        else:
            texts.append(f"{USER_PREFIX}{prompt}{ASSISTANT_PREFIX}{message.content.strip()}")
            prompt = ""
    return texts


def embedding_pieces(tokenizer: Tokenizer, pair: TextPair, instruction_role: Role, role: Role) -> list[Piece]:
    """Pieces of a query or passage."""
    if pair.instruction is None:
        return [(role, pair.text)]
    # What the instruction says is text, hence it is put in after the template is split.
    instruction = pair.instruction.strip(_INSTRUCTION_STRIP)
    head: list[str | int] = [tokenizer.bos_id]
    head += [instruction if part == _INSTRUCTION else part for part in _prefix_parts(tokenizer, bool(instruction))]
    return [*((instruction_role, value) for value in head), (role, pair.text)]


@functools.lru_cache(maxsize=8)
def _prefix_parts(tokenizer: Tokenizer, with_instruction: bool) -> list[str | int]:
    special = SpecialTokens(tokenizer)
    prefix = embedding_prefix(_INSTRUCTION if with_instruction else "")
    before, slot, after = prefix.partition(_INSTRUCTION)
    return [*special.split(before), *([slot] if slot else []), *special.split(after)]


def encode_embedding(
    tokenizer: Tokenizer,
    text: str | Sequence[int],
    instruction: str | None = None,
    max_length: int | None = None,
    markers: TextMarkers = NO_MARKERS,
) -> tuple[list[int], list[int]]:
    """Token ids of a text to embed.

    Args:
        tokenizer: the tokenizer.
        text: what is pooled, or the ids of its tokens.
        instruction: None for a plain text without template; "" for the template without instruction.
        max_length: tokens of the text beyond it, markers counted, are cut off the end.
        markers: what stands around the text.

    Returns:
        Ids of the instruction (BOS and template; empty where ``instruction`` is None) and ids of the text with its
        markers (empty where the instruction alone, or with the markers, fills ``max_length``).
    """
    head, tail = instruction_and_text(tokenizer, text, instruction)
    return cut_embedding(head, tail, max_length, markers)


def cut_embedding(
    head: list[int], tail: list[int], max_length: int | None, markers: TextMarkers
) -> tuple[list[int], list[int]]:
    """What :func:`encode_embedding` makes of ids of an instruction and of a text."""
    if max_length is not None:
        head = head[:max_length]
        tail = tail[: max(0, max_length - len(head) - markers.num_tokens)]
    return head, [*markers.opening, *tail, *markers.closing] if tail else []


def instruction_and_text(
    tokenizer: Tokenizer, text: str | Sequence[int], instruction: str | None
) -> tuple[list[int], list[int]]:
    """Ids of an instruction and of a text, whole and without markers; arguments as of :func:`encode_embedding`."""
    if not isinstance(text, str):
        head = [] if instruction is None else [tokenizer.bos_id, *tokenizer.encode(embedding_prefix(instruction))]
        return head, list(text)
    if instruction is None:
        return [], tokenizer.encode(text)
    pieces = embedding_pieces(tokenizer, TextPair(instruction, text), Role.QUERY_INSTRUCTION, Role.QUERY)
    spans = dict(encode_units(tokenizer, [pieces]).spans(0))
    return spans[Role.QUERY_INSTRUCTION], spans.get(Role.QUERY, [])


def encode_chat(
    tokenizer: Tokenizer,
    turns: Sequence[str] | Sequence[Message],
    max_length: int | None = None,
    template: str | ChatFormat = "gritlm",
) -> list[Span]:
    """Spans of a conversation.

    Args:
        tokenizer: the tokenizer.
        turns: messages, or the contents of user, assistant, user, assistant ...
        max_length: tokens beyond it are cut off the end.
        template: name of a chat template, or one that is loaded.

    Returns:
        TEMPLATE, SYSTEM, USER and ANSWER spans. What the cut leaves after the last answer is left out: in causal
        attention nothing depends on it.

    Raises:
        DataError: the tokenizer does not keep answers apart from the template.
    """
    chat_format = load_chat_format(template, tokenizer) if isinstance(template, str) else template
    messages = _messages(turns)
    pieces = chat_format.of(messages).pieces(messages)
    table = encode_units(tokenizer, [pieces])
    if table.problems:
        raise DataError(table.problems[0], path=tokenizer.path)
    return table.cut(np.array([len(table.tokens) if max_length is None else max_length])).spans(0)


def encode_prompt(
    tokenizer: Tokenizer,
    turns: Sequence[str] | Sequence[Message],
    template: str | ChatFormat,
    *,
    tools: Sequence[Any] | None = None,
    date: datetime | None = None,
) -> list[int]:
    """Ids that a model continues with its answer.

    Args:
        tokenizer: the tokenizer.
        turns: messages that end with the user's or a tool's, or the contents of user, assistant, ..., user.
        template: name of a chat template, or one that is loaded.
        tools: what the assistant may call.
        date: what a template that asks for the date is told. None: now.

    Raises:
        DataError: the last turn is not the user's or a tool's, or the template has no place for what they hold.
    """
    messages = _messages(turns)
    if not messages or messages[-1].role not in {"user"} | RESULT_ROLES:
        raise DataError("a prompt is user, assistant, ..., user: its last turn has to be the user's")
    chat_format = load_chat_format(template, tokenizer) if isinstance(template, str) else template
    pieces = chat_format.of(messages, tools).prompt(messages, date)
    return encode_units(tokenizer, [pieces]).tokens.tolist()


def encode_text_prompt(tokenizer: Tokenizer, text: str, chat_format: ChatFormat) -> list[int]:
    """Ids of a text that a model continues without a template: as a prompt with a completion is trained, up to the
    completion.

    Args:
        tokenizer: the tokenizer.
        text: not empty.
        chat_format: says whether a token begins it.
    """
    pieces = [piece for piece in chat_format.completion(text, "") if piece[0] is not Role.ANSWER]
    return encode_units(tokenizer, [pieces]).tokens.tolist()


def _messages(turns: Sequence[str] | Sequence[Message]) -> list[Message]:
    contents = [turn for turn in turns if isinstance(turn, str)]
    return alternate(contents) if contents else [turn for turn in turns if isinstance(turn, Message)]
