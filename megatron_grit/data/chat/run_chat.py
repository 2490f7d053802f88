"""How a run's model converses: learned at its start, kept in its checkpoints, found in those of earlier versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from megatron_grit.config.blend import read_blend
from megatron_grit.config.checkpoint_folder import started_from
from megatron_grit.config.checks.run import TOKENIZER_FILES
from megatron_grit.config.kinds import kind_options, kind_sources, trained_kinds
from megatron_grit.config.schema import RunConfig
from megatron_grit.data.chat.chat import Chat, chat_beside, chat_of_file, default_chat, is_known, named_chat, read_chat
from megatron_grit.data.indexed.label_weights import LabelWeights, weighs_ends
from megatron_grit.data.indexed.reader import IndexedFile, IndexedMeta, read_meta
from megatron_grit.data.indexed.roles import Role
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import CheckpointError, ConfigError, GritError
from megatron_grit.store.hub import local_folder
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)


def run_chat(
    config: RunConfig,
    tokenizer: Tokenizer,
    checkpoints: Sequence[Path] = (),
    metas: Mapping[str, IndexedMeta] | None = None,
) -> Chat:
    """The facts of a run's model: of ``data.chat_template``, else of the conversations that it is trained on, else of
    the run's own or its base's checkpoint, else of the Hugging Face folder that the tokenizer lies in, else GritLM's.

    Args:
        config: the run.
        tokenizer: its tokenizer.
        checkpoints: from which it goes on or starts; the first that holds the facts counts.
        metas: what is known of the run's indexed files, by prefix; those of others are read.

    Raises:
        ConfigError: conversations of several templates, and no ``data.chat_template``; or one that there is not.
        DataError: a file that cannot be read.
    """
    if config.data.chat_template is not None:
        return named_chat(config.data.chat_template, tokenizer, "data.chat_template")
    of_checkpoint = (read_chat(path) for path in checkpoints)
    return (
        _of_data(config, tokenizer, metas or {})
        or next(filter(None, of_checkpoint), None)
        or chat_beside(tokenizer)
        or default_chat(tokenizer)
    )


def checkpoint_chat(path: Path, config: RunConfig, tokenizer: Tokenizer) -> Chat:
    """The facts that a checkpoint holds. For one of an earlier version, which holds none, they are learned as a run
    learns them, and a warning says what was found.

    Args:
        path: the checkpoint.
        config: with which it was trained.
        tokenizer: its tokenizer.

    Raises:
        DataError: a file that cannot be read.
    """
    found = read_chat(path)
    if found is not None:
        return found
    try:
        found = run_chat(config, tokenizer)
    except GritError as error:
        log.warning(f"{path}: {error}")
        found = default_chat(tokenizer)
    log.warning(
        f"{path} is of a version that did not keep its chat template; {found.template} is taken, from "
        f"{found.origin}; say otherwise with --chat-template"
    )
    return found


def label_weights(config: RunConfig, tokenizer: Tokenizer) -> LabelWeights:
    """How a run weighs the labels of its next-token loss.

    Args:
        config: the run.
        tokenizer: its tokenizer.

    Raises:
        ConfigError, DataError: as :func:`run_chat`, where the run weighs the tokens that end a turn.
    """
    ends = run_chat(config, tokenizer, started_from(config)).end_ids if weighs_ends(config.loss) else ()
    return LabelWeights.of(config.loss, ends)


def unlike_base(config: RunConfig, tokenizer: Tokenizer, chat: Chat) -> Iterator[str]:
    """Warnings of a run whose tokenizer or template is not that of the model that it goes on from: its own checkpoint,
    that of ``checkpoint.load``, or the directory or hub name of ``model.pretrained``.

    Args:
        config: the run.
        tokenizer: its tokenizer.
        chat: its template.

    Raises:
        DataError: a file that cannot be read.
    """
    folders = started_from(config)
    if not folders and config.model.pretrained is not None:
        with suppress(CheckpointError):  # gone, which a run that resumes does not mind
            folders = [local_folder(config.model.pretrained, weights=False)]
    folder = next((path for path in folders if any((path / name).is_file() for name in TOKENIZER_FILES)), None)
    if folder is None:
        return
    base = load_tokenizer(folder)
    if base.fingerprint != tokenizer.fingerprint:
        shared = range(min(base.vocab_size, tokenizer.vocab_size))
        other = next((index for index in shared if base.id_to_token(index) != tokenizer.id_to_token(index)), None)
        if other is not None:
            names = (
                f"{base.id_to_token(other)!r} in {base.path} and {tokenizer.id_to_token(other)!r} in {tokenizer.path}"
            )
            yield f"warning: data.tokenizer is another than the base's, which knows other words: id {other} is {names}"
    before = chat_beside(base)
    if before is not None and before.origin != "default" and before.source != chat.source:
        here = f"{chat.template}, from {chat.origin}"
        yield f"warning: the base converses in {before.template} ({folder}), this run in {here}"


def _of_data(config: RunConfig, tokenizer: Tokenizer, metas: Mapping[str, IndexedMeta]) -> Chat | None:
    found: dict[str, tuple[str, Chat]] = {}
    for kind in [kind for kind in trained_kinds(config) if not kind_options(kind).EMBEDS]:
        for entry in read_blend(kind_sources(config, kind), kind_options(kind).DATA):
            try:
                meta = metas.get(entry.path) or read_meta(entry.path)
            except GritError:
                continue  # the loader says what is wrong with it, where it is needed
            if meta.template not in found and is_known(meta.template, meta.template_source, tokenizer):
                found[meta.template] = entry.path, chat_of_file(meta.template, meta.template_source, tokenizer)
    if len(found) > 1:  # every file of build-grit names a template, whether it holds conversations or not
        found = {name: pair for name, pair in found.items() if _holds_conversations(pair[0])} or found
    if len(found) > 1:
        told = ", ".join(f"{path} with {name}" for name, (path, _) in found.items())
        raise ConfigError(
            f"the model is trained on conversations of several templates ({told}), and can answer in one; give "
            "data.chat_template"
        )
    return next((chat for _, chat in found.values()), None)


def _holds_conversations(prefix: str) -> bool:
    modes = IndexedFile(prefix).modes
    return modes is not None and bool(np.isin(modes, (Role.USER, Role.SYSTEM)).any())
