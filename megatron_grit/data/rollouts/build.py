"""Sampled and rewarded completions to an indexed file, with what is known of each beside it.

Each completion is a record: its prompt, a span that is attended and not trained, and the sampled tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from megatron_grit.config.checkpoint_folder import holds_checkpoint, resolve_checkpoint
from megatron_grit.config.values import shortened
from megatron_grit.data.chat.chat import Chat, chat_beside, named_chat
from megatron_grit.data.chat.chat_format import TOKENIZER
from megatron_grit.data.indexed.roles import Role, RowKind
from megatron_grit.data.indexed.rollouts import equal_groups, write_rollouts
from megatron_grit.data.indexed.writer import IndexedWriter, refuse_existing
from megatron_grit.data.rollouts.counts import CompletionCounts
from megatron_grit.data.rollouts.options import RolloutBuild
from megatron_grit.data.rollouts.records import PromptGroup, SampledCompletion, read_groups
from megatron_grit.data.text.records import Message
from megatron_grit.data.text.spans import encode_units
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import DataError
from megatron_grit.store.files import check_prefix
from megatron_grit.store.hub import local_folder

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass(kw_only=True)
class RolloutReport(CompletionCounts):
    """What was built."""

    num_tokens: int
    """Of completions."""
    num_too_long: int
    num_empty: int
    """Completions without a token."""
    has_log_probs: bool
    """Of the sampling policy."""

    def size(self) -> str:
        """As in the base class."""
        return f"{super().size()}, {self.num_tokens:,} tokens"

    def remarks(self) -> list[tuple[int, str]]:
        """As in the base class."""
        return [
            *super().remarks(),
            (self.num_too_long, "completions are longer than max_length and left out"),
            (self.num_empty, "completions without a token are left out"),
        ]

    def lines(self, name: str) -> list[str]:
        """As in the base class."""
        remark = (
            "  without log-probabilities of the sampling policy: a run takes those of the model that it starts from"
        )
        return super().lines(name) + ([] if self.has_log_probs else [remark])


@dataclass(kw_only=True)
class _Kept:
    """What becomes of the lines."""

    records: list[tuple[list[int], list[int]]] = field(default_factory=list)
    """Tokens of the prompt, and those that were sampled."""
    groups: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    log_probs: list[list[float] | None] = field(default_factory=list)
    tempered: list[bool] = field(default_factory=list)
    num_too_long: int = 0
    num_empty: int = 0


def build_rollouts(inputs: Sequence[str | Path], output_prefix: str | Path, options: RolloutBuild) -> RolloutReport:
    """Write the indexed file of some completions, and ``PREFIX.completions.npy``, ``.behavior.npy``, ``.rollouts.json``
    beside it. All of them are in memory at once.

    Args:
        inputs: files of :mod:`~megatron_grit.data.rollouts.records`, with rewards; a prompt's group is its line.
        output_prefix: path without extension.
        options: how.

    Raises:
        GritError: a file that cannot be read or written, a line that is none, a completion without reward, ids of
            another tokenizer, or nothing left.
    """
    check_prefix(output_prefix)
    refuse_existing(output_prefix, options.overwrite)
    source = options.tokenizer
    folder = resolve_checkpoint(source) if holds_checkpoint(source) else local_folder(source, weights=False)
    tokenizer = load_tokenizer(folder)
    encoder = _Encoder(tokenizer, options)
    kept = _Kept()
    groups = chain.from_iterable(read_groups(path, answered=True) for path in inputs)
    for number, group in enumerate(groups):
        for completion in group.completions:
            encoder.add(kept, group, completion, number)
    groups_R, rewards_R = np.array(kept.groups, dtype=np.int64), np.array(kept.rewards)
    equal_R = equal_groups(groups_R, rewards_R)
    chosen = np.flatnonzero(~equal_R) if options.drop_equal else np.arange(len(groups_R))
    if not len(chosen):
        raise DataError(
            f"nothing is left to train on: of {len(groups_R)} completions {int(equal_R.sum())} are of prompts with one "
            f"reward, {kept.num_too_long} are too long, {kept.num_empty} empty; sample more, or harder prompts",
            path=inputs[0],
        )
    report = RolloutReport(
        num_prompts=len(np.unique(groups_R[chosen])),
        num_completions=len(chosen),
        num_tokens=sum(len(kept.records[place][1]) for place in chosen),
        reward_mean=float(rewards_R[chosen].mean()),
        reward_std=float(rewards_R[chosen].std()),
        num_equal_prompts=len(np.unique(groups_R[equal_R])),
        num_tempered=int(np.array(kept.tempered)[chosen].sum()),
        num_too_long=kept.num_too_long,
        num_empty=kept.num_empty,
        has_log_probs=all(kept.log_probs[place] is not None for place in chosen),
    )
    _write(output_prefix, kept, chosen, report, encoder)
    return report


def _write(prefix: str | Path, kept: _Kept, chosen: np.ndarray, report: RolloutReport, encoder: _Encoder) -> None:
    tokenizer, options = encoder.tokenizer, encoder.options
    with IndexedWriter(prefix, RowKind.GENERATIVE, tokenizer.vocab_size, overwrite=options.overwrite) as writer:
        for place in chosen.tolist():
            prompt, sampled = kept.records[place]
            writer.add([(Role.TEMPLATE, prompt), (Role.ANSWER, sampled)])
        limits = {} if options.max_length is None else {"generative": options.max_length}
        meta = writer.finalize(tokenizer_fingerprint=tokenizer.fingerprint, template="none", limits=limits)
    behavior = None
    if report.has_log_probs:
        behavior = np.concatenate(list(_log_probs(kept, chosen)))
    rows = chosen.astype(np.int64)
    groups, rewards = np.array(kept.groups)[rows], np.array(kept.rewards)[rows]
    write_rollouts(prefix, meta, groups, rewards, behavior, {"report": vars(report)})


def _log_probs(kept: _Kept, chosen: np.ndarray) -> Iterator[np.ndarray]:
    for place in chosen.tolist():
        (prompt, _), log_probs = kept.records[place], kept.log_probs[place]
        assert log_probs is not None
        yield np.full(len(prompt), np.nan, dtype=np.float32)
        yield np.array(log_probs, dtype=np.float32)


class _Encoder:
    """Turns completions into tokens."""

    def __init__(self, tokenizer: Tokenizer, options: RolloutBuild) -> None:
        self.tokenizer, self.options = tokenizer, options
        self._chat: Chat | None = None

    def add(self, kept: _Kept, group: PromptGroup, completion: SampledCompletion, number: int) -> None:
        """Take one completion of a line, or count why not."""
        if completion.reward is None:
            raise group.line.error(
                "a completion has no reward; megatron-grit rollouts --completions FILE --reward ... adds them"
            )
        ids = completion.token_ids
        if ids is not None and group.prompt_token_ids is not None:
            prompt, sampled, log_probs = group.prompt_token_ids, ids, completion.log_probs
            self._compare(group, completion, ids)
        else:
            prompt, sampled = self._encode(group, completion)
            log_probs = None
        if not sampled or not prompt:
            kept.num_empty += 1
            return
        if self.options.max_length is not None and len(prompt) + len(sampled) > self.options.max_length:
            kept.num_too_long += 1
            return
        kept.records.append((prompt, sampled))
        kept.groups.append(number)
        kept.rewards.append(completion.reward)
        kept.tempered.append(group.is_tempered)
        kept.log_probs.append(log_probs)

    def _compare(self, group: PromptGroup, completion: SampledCompletion, ids: list[int]) -> None:
        """Refuse ids of another tokenizer: those beyond its vocabulary, and those that say another text."""
        largest = max((*ids, *(group.prompt_token_ids or ())), default=0)
        vocab_size = self.tokenizer.vocab_size
        if largest >= vocab_size:
            told = f"it has {vocab_size} tokens, here is {largest}"
        elif not self._says(ids, completion.text):
            decoded, text = shortened(self.tokenizer.decode(ids)), shortened(completion.text)
            told = f"they say {decoded}, and the text is {text}"
        else:
            return
        raise group.line.error(f"token_ids are of another tokenizer than {self.tokenizer.path}: {told}")

    def _says(self, ids: list[int], text: str) -> bool:
        """Whether a text stands in what ids decode to. They may say more: a sampler leaves out of the text what it
        stopped at, or what it takes for reasoning or a call."""
        decoded = self.tokenizer.decode(ids)
        if _stands_in(text, decoded):
            return True
        for name in [name for name, index in self.tokenizer.special_tokens.items() if index in ids]:
            text = text.replace(name, "")  # some samplers write the names of special tokens
        return _stands_in(text, decoded)

    def _encode(self, group: PromptGroup, completion: SampledCompletion) -> tuple[list[int], list[int]]:
        """Tokens of a text."""
        if self._chat is None:
            own = chat_beside(self.tokenizer) if self.options.template == TOKENIZER else None
            self._chat = own or named_chat(self.options.template, self.tokenizer, "template")
        chat_format = self._chat.bind(self.tokenizer)
        try:
            if group.prompt is not None:
                pieces = chat_format.completion(group.prompt, completion.text)
            else:
                messages = [*group.messages, Message("assistant", completion.text)]
                pieces = chat_format.of(messages).pieces(messages)
            table = encode_units(self.tokenizer, [pieces])
        except DataError as error:
            raise group.line.error(str(error)) from None
        if table.problems:
            raise group.line.error(table.problems[0])
        spans = table.spans(0)
        while spans and spans[-1][0] is not Role.ANSWER:
            spans.pop()
        if not spans:
            return [], []
        sampled = list(spans[-1][1])
        if completion.finish_reason == "length":  # it was cut off before its end
            while sampled and sampled[-1] in self._chat.end_ids:
                sampled.pop()
        return [index for _, ids in spans[:-1] for index in ids], sampled


def _stands_in(text: str, decoded: str) -> bool:
    """Whether one text is part of another, but for what programs decode differently: white space, and characters of
    which some bytes are missing, with those beside them."""
    both = [text, decoded]
    if any(_INCOMPLETE in each for each in both):
        both = [each.encode("ascii", "ignore").decode() for each in both]
    text, decoded = ("".join(each.split()) for each in both)
    return text in decoded
