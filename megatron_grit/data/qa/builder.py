"""Questions with answers and contexts to indexed files for supervised fine-tuning, and blends of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_grit.data.indexed.reader import file_paths
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.indexed.writer import IndexedWriter
from megatron_grit.data.qa.context_file import NUM_CONTEXTS, ContextWriter, context_prefix
from megatron_grit.data.qa.options import PROMPTS_FILE, QaTraining
from megatron_grit.data.qa.prompts import encode_example, encoder_contexts
from megatron_grit.data.qa.records import read_records
from megatron_grit.data.qa.shell_blend import read_shell_blend
from megatron_grit.data.text.lines import read_json
from megatron_grit.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_grit.errors import ConfigError, DataError
from megatron_grit.store.digest import digest_of_settings, sha256_of_file
from megatron_grit.store.files import check_output, check_prefix, json_text, replacing, write_json
from megatron_grit.store.logs import get_logger

log = get_logger(__name__)

SPLITS = {"train": "train", "valid": "dev"}
"""Name of the blend that is written, and of the split in the names of a data set's files."""


def build_qa(path: str | Path, prefix: str | Path, options: QaTraining) -> Counter[str]:
    """Write the records of one file of questions: ``<prefix>.bin``, ``.idx``, ``.json``, the contexts for the encoder
    (:mod:`~megatron_grit.data.qa.context_file`), and ``.rejected.jsonl`` where some were not fit.

    Returns:
        ``records``, ``contexts`` of the encoder and ``dropped``.

    Raises:
        DataError: a file that cannot be read, a question that is not of the form or not fit, or nothing kept.
    """
    check_prefix(prefix)
    for written in (*file_paths(prefix), *file_paths(context_prefix(prefix))):
        check_output(written, [path, options.tokenizer])
    tokenizer, counts, rejected = load_tokenizer(options.tokenizer), Counter[str](), list[dict[str, Any]]()
    limits = {"generative": options.max_len, "ft_neighbours": options.ft_neighbours}
    with IndexedWriter(prefix, RowKind.GENERATIVE, tokenizer.vocab_size, overwrite=options.overwrite) as writer:
        contexts = ContextWriter(prefix, writer.folder, tokenizer)
        for record in read_records(path, retrieved=options.retrieved, longform=options.longform):
            counts["read"] += 1
            if options.no_answer is not None and not any(answer.strip() for answer in record.answers):
                record = replace(record, answers=[options.no_answer])
            try:
                spans = encode_example(tokenizer, record, options, options.max_len)
            except DataError as error:
                if options.on_filtered == "stop":
                    raise
                rejected.append({"item": record.item.number, "message": str(error)})
                continue
            writer.add(spans)
            contexts.add(_encoder_tokens(tokenizer, encoder_contexts(record, options, options), options.neighbour_len))
        counts.update(records=counts["read"] - len(rejected), contexts=contexts.num_contexts, dropped=len(rejected))
        if not counts["records"]:
            first = f"; of {len(rejected)} the first: {rejected[0]['message']}" if rejected else ""
            raise DataError(f"holds no question to train on{first}", path=path)
        contexts.finalize()
        limits[NUM_CONTEXTS] = contexts.num_contexts
        writer.finalize(tokenizer_fingerprint=tokenizer.fingerprint, template="qa", limits=limits)
    _write_rejected(Path(f"{prefix}.rejected.jsonl"), rejected)
    return counts


def _encoder_tokens(tokenizer: Tokenizer, contexts: Sequence[str], max_tokens: int) -> list[list[int]]:
    return [ids[:max_tokens] for text in contexts if (ids := tokenizer.encode(text))]


def build_blend(blend: str | Path, data: str | Path, output: str | Path, options: QaTraining) -> None:
    """Build the data sets of a blend: for each ``DATA/NAME/NAME_QA_train.json`` and, where it is, ``_QA_dev.json``,
    the indexed file ``OUTPUT/NAME_train`` or ``_dev``, and ``train.yaml`` and ``valid.yaml``, blends for
    ``data.generative`` and ``data.valid``. What an earlier run built of the same questions, with the same options,
    stays.

    Args:
        blend: see :mod:`~megatron_grit.data.qa.shell_blend`.
        data: folder of the data sets.
        output: folder of the indexed files.
        options: how questions become records; the task of each is the data set's name.

    Raises:
        ConfigError: no blend, or a data set that is not there; names its entry.
        DataError: see :func:`build_qa`.
    """
    entries = read_shell_blend(blend)
    for number, (_, name) in enumerate(entries, 1):
        if _questions(Path(data), name, "train") is None:
            raise ConfigError(
                f"{blend}: entry {number}: there is no {Path(data) / name / name}_QA_train.json; put the data set "
                "there, or take it out of the blend"
            )
    for split, word in SPLITS.items():
        sources = []
        for weight, name in entries:
            if (path := _questions(Path(data), name, word)) is None:
                continue
            prefix = Path(output) / f"{name}_{word}"
            _build_once(path, prefix, replace(options, task=name, overwrite=True))
            sources.append({"path": str(prefix)} | ({"weight": weight} if split == "train" else {}))
        _write_sources(Path(output) / f"{split}.yaml", sources)


def _questions(data: Path, name: str, word: str) -> Path | None:
    paths = (data / name / f"{name}_QA_{word}{end}" for end in (".json", ".jsonl"))
    return next((path for path in paths if path.is_file()), None)


def _build_once(path: Path, prefix: Path, options: QaTraining) -> None:
    settings = asdict(options) | {"questions": sha256_of_file(path), "prompts": sha256_of_file(PROMPTS_FILE)}
    settings["tokenizer"] = load_tokenizer(options.tokenizer).fingerprint
    digest, note = digest_of_settings(settings), Path(f"{prefix}.questions.json")
    if note.is_file() and read_json(note) == {"digest": digest} and all(each.is_file() for each in file_paths(prefix)):
        log.info(f"{prefix}: is there already")
        return
    note.unlink(missing_ok=True)  # of the files that are there, which go
    counts = build_qa(path, prefix, options)
    write_json(note, {"digest": digest})
    log.info(describe_counts(prefix, counts))


def describe_counts(prefix: str | Path, counts: Counter[str]) -> str:
    """What a build made, in a line."""
    dropped = f"; {counts['dropped']} not fit, see {prefix}.rejected.jsonl" if counts["dropped"] else ""
    return f"{prefix}: {counts['records']} records, {counts['contexts']} contexts for the encoder{dropped}"


def _write_sources(path: Path, sources: Sequence[Mapping[str, object]]) -> None:
    """A blend file of :func:`~megatron_grit.config.blend.read_blend`, which reads JSON as the YAML that it is."""
    if not sources:
        return path.unlink(missing_ok=True)
    with replacing(path) as file:
        file.write("".join(f"- {json_text(source)}\n" for source in sources))


def _write_rejected(path: Path, rejected: Sequence[Mapping[str, Any]]) -> None:
    if not rejected:
        return path.unlink(missing_ok=True)
    with replacing(path) as file:
        file.write("".join(f"{json_text(each)}\n" for each in rejected))
