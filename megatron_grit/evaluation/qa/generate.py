"""Answers of a model to a file of questions, a line each, asked as they are in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_grit.config.checkpoint_folder import resolve_checkpoint
from megatron_grit.data.qa.prompts import encode_question, encoder_contexts
from megatron_grit.data.qa.records import QaRecord, read_records
from megatron_grit.errors import DataError
from megatron_grit.evaluation.qa.options import QaGeneration
from megatron_grit.store.digest import sha256_of_file
from megatron_grit.store.files import check_output, json_text
from megatron_grit.store.logs import say_loading
from megatron_grit.store.rows import LineFile

END = "<|endoftext|>"
"""Where an answer ends that a model writes as text."""


def generate_answers(options: QaGeneration) -> int:
    """Answer and write. Returns the number of answers. A killed run resumes.

    Raises:
        GritError: a file that cannot be read or written, a question that is not of the form or too long, no question
            in the range, a checkpoint that cannot be used, or what is to be read by a model that reads nothing.
    """
    check_output(options.output, [options.input])
    records = _questions(options)  # before the model: what cannot be asked is found at once
    path = resolve_checkpoint(options.checkpoint)
    say_loading()
    from megatron_grit.inference.model import GritModel
    from megatron_grit.inference.text_files import model_identity

    retriever = None
    if options.retro_project is not None:
        from megatron_grit.retrieval.reading import open_retriever

        retriever = open_retriever(options.retro_project, path, options.retrieve_every)
    model = GritModel.load(path, device=options.device, precision=options.precision)
    if retriever is not None:
        model.read_from(retriever, options.retrieve_every)
    room = model.config.model.max_position_embeddings - options.max_new_tokens
    version = None if retriever is None else retriever.version
    follows_from = [sha256_of_file(options.input), _settings(options), model_identity(path, model), version]

    def answered(first: int) -> Iterator[list[str]]:
        for place in range(first, len(records), options.batch_size):
            batch = records[place : place + options.batch_size]
            prompts = [encode_question(model.tokenizer, record, options, room) for record in batch]
            source = None if retriever is not None else _given(model, batch, options)
            answers = model.continue_prompts(prompts, options, source=source)
            yield [answer_line(answer.text, jsonl=options.output.endswith(".jsonl")) for answer in answers]

    with LineFile(Path(options.output)) as file:
        file.fill(follows_from, len(records), answered, "answering", "question")
        file.publish()
    return len(records)


def _settings(options: QaGeneration) -> dict[str, Any]:
    """Options that answers follow from beside the content of what they name."""
    return {name: value for name, value in vars(options).items() if name not in ("input", "checkpoint", "device")}


def answer_line(text: str, *, jsonl: bool) -> str:
    """An answer as a line: of a JSON Lines file as it is, else with white space as single spaces."""
    text = text.split(END)[0].strip()
    return json_text({"pred": text}) if jsonl else " ".join(text.split())


def _questions(options: QaGeneration) -> list[QaRecord]:
    stop = None if options.num is None else options.start + options.num
    every = read_records(options.input, retrieved=options.retrieved)
    records = list(islice(every, options.start, stop))
    if not records:
        raise DataError(f"holds no question from number {options.start} on; lower start", path=options.input)
    return records


def _given(model: Any, records: Sequence[QaRecord], options: QaGeneration) -> Any:
    """The contexts for the encoder. None: the model has none, or is not to read."""
    if not options.encoder_neighbours or not model.config.model.retro.num_neighbors:
        return None
    from megatron_grit.inference.reading import given_neighbors

    texts = [encoder_contexts(record, options, options) for record in records]
    return given_neighbors(model.config.model, model.tokenizer, texts)
