"""Writes what a teacher says of indexed files: its most probable next tokens, for training with ``loss.teacher``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_grit.config.checkpoint_folder import resolve_checkpoint
from megatron_grit.config.options import BatchSize, TeacherLogits
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.top_probabilities import FORMAT, cache_paths, check_predicted, data_facts, rows_of
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.store.digest import digest_of_settings, sha256_of_file
from megatron_grit.store.files import check_room, write_json
from megatron_grit.store.logs import get_logger, say_loading
from megatron_grit.store.progress import Progress
from megatron_grit.store.rows import RowFile

if TYPE_CHECKING:
    from megatron_grit.inference.model import GritModel

log = get_logger(__name__)


def write_teacher_logits(
    checkpoint: str | Path,
    prefixes: Sequence[str],
    folder: str | Path,
    *,
    top_k: int = TeacherLogits.top_k,
    temperature: float = TeacherLogits.temperature,
    device: str = "auto",
    batch_tokens: int = BatchSize.batch_tokens,
) -> None:
    """Write a cache of each indexed file. A killed run resumes; what is there of the same teacher, data and options
    stays.

    Args:
        checkpoint: the teacher: a checkpoint directory, or a run's output directory for its newest one.
        prefixes: generative indexed files, built with the teacher's tokenizer, of different names.
        folder: the cache; made if missing.
        top_k: tokens that are kept for each token.
        temperature: divides the logits.
        batch_tokens: token budget of one forward pass; raised to the longest record.

    Raises:
        GritError: a file or a checkpoint that cannot be used, a record that is too long for the teacher, more tokens
            than there are, or a folder that cannot be written.
    """
    if len({Path(prefix).name for prefix in prefixes}) < len(prefixes):
        raise ConfigError("two of the inputs have one name; give them folders of their own")
    every = [IndexedRecords(prefix) for prefix in prefixes]
    path = resolve_checkpoint(checkpoint)
    say_loading()
    from megatron_grit.inference.model import GritModel
    from megatron_grit.inference.text_files import model_identity

    teacher = GritModel.load(path, device=device)
    if teacher.config.model.retro.num_neighbors:
        raise ConfigError(f"{checkpoint} reads neighbors, which a cache of it would not have read; give one without")
    vocab_size = teacher.model.num_tokens_in_vocab
    if top_k > vocab_size:
        raise ConfigError(f"top_k {top_k} is more than the {vocab_size} tokens of {checkpoint}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for records in every:
        _check(records, teacher)
        facts = {
            "format": FORMAT,
            "teacher": str(path.resolve()),
            "weights": digest_of_settings(model_identity(path, teacher)),
            "vocab_size": vocab_size,
            "data": data_facts(records.meta),
            "top_k": top_k,
            "temperature": temperature,
        }
        _write(teacher, records, Path(folder), facts, batch_tokens)


def _check(records: IndexedRecords, teacher: GritModel) -> None:
    check_predicted(records)
    problem = records.meta.other_tokenizer(teacher.tokenizer.path, teacher.tokenizer.fingerprint)
    if problem is not None:
        raise DataError(f"{problem}; a teacher needs the tokens of the data", path=records.prefix)
    lengths, longest = records.lengths(), teacher.config.model.max_position_embeddings
    if len(lengths) and lengths.max() > longest:
        record = int(lengths.argmax())
        raise DataError(
            f"record {record} has {lengths[record]} tokens, and the teacher takes {longest}; build the file again with "
            "--max-length",
            path=records.prefix,
        )


def _write(
    teacher: GritModel, records: IndexedRecords, folder: Path, facts: dict[str, object], batch_tokens: int
) -> None:
    array, described = cache_paths(folder, records.prefix)
    top_k, temperature = int(str(facts["top_k"])), float(str(facts["temperature"]))
    num_tokens = records.meta.num_tokens
    if described.is_file() and array.is_file() and _is_of(described, array, facts):
        return log.info(f"{array}: is there")
    with RowFile(array) as output:
        output.resume([facts, batch_tokens], num_tokens)
        check_room(array, 4 * (2 * top_k + 1) * (num_tokens - output.num_rows))
        described.unlink(missing_ok=True)  # of the array that is there, which goes
        if output.num_rows:
            log.info(f"{array}: resumes after {output.num_rows:,} of {num_tokens:,} tokens")
        with Progress(num_tokens, "asking the teacher", "token") as bar:
            bar.skip(output.num_rows)
            done = 0
            for texts in _batches(records, batch_tokens):
                size = sum(map(len, texts))
                done += size
                if done > output.num_rows:
                    output.append(rows_of(*top_probabilities(teacher, texts, top_k, temperature)))
                    bar.update(size)
        output.publish()
    write_json(described, facts | {"sha256": sha256_of_file(array)})


def _is_of(described: Path, array: Path, facts: dict[str, object]) -> bool:
    import json

    try:
        found = json.loads(described.read_bytes())
        return bool(found.pop("sha256") == sha256_of_file(array) and found == facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _batches(records: IndexedRecords, batch_tokens: int) -> Iterator[list[np.ndarray]]:
    """Records in their order, so many that a pass takes."""
    texts: list[np.ndarray] = []
    for index in range(len(records)):
        tokens = records.tokens(index)
        if texts and sum(map(len, texts)) + len(tokens) > batch_tokens:
            yield texts
            texts = []
        if len(tokens):
            texts.append(tokens)
    if texts:
        yield texts


def top_probabilities(
    teacher: GritModel, texts: Sequence[np.ndarray], top_k: int, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """The most probable tokens after each token of some texts.

    Args:
        teacher: the model, whole in this process.
        texts: tokens of each.
        top_k: K.
        temperature: divides the logits.

    Returns:
        ids int32 [N, K] and log-probabilities float32 [N, K + 1] for the N tokens of all texts, the last column of all
        other tokens; -1 and -inf for the last token of a text.
    """
    import torch

    from megatron_grit.inference.score import scoring_row
    from megatron_grit.losses.divergence import CHUNK_ELEMENTS, Divergence, log_probabilities, log_total
    from megatron_grit.models.decoder import Output

    model = teacher.model
    row = scoring_row([(tokens, np.ones(len(tokens), dtype=bool)) for tokens in texts])
    options = Divergence(temperature=temperature)
    ids, log_probs = [], []
    with torch.no_grad():
        states_T1D = model(row.to(model.context.device), Output.HIDDEN)
        for states_C1D in states_T1D.split(max(1, CHUNK_ELEMENTS // model.num_tokens_in_vocab)):
            log_p_CV = log_probabilities(model.shard_logits(states_C1D), options)
            top_CK = log_p_CV.topk(top_k, dim=1)
            others_C1 = log_total(log_p_CV.scatter(1, top_CK.indices, -torch.inf), options)
            ids.append(top_CK.indices.int())
            log_probs.append(torch.cat((top_CK.values, others_C1), 1).float())
    last = np.cumsum([len(tokens) for tokens in texts]) - 1
    ids_NK, log_probs_NK1 = torch.cat(ids).cpu().numpy(), torch.cat(log_probs).cpu().numpy()
    ids_NK[last], log_probs_NK1[last] = -1, -np.inf
    return ids_NK, log_probs_NK1
