"""JSONL records to an indexed file, with the reference's filters and an account of what they dropped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatron_grit.data.builders.block_build import BuildRun, BuildSpec, BuildTotals, OutputSpec, build_blocks
from megatron_grit.data.builders.build_report import BuildReport, make_report, write_report
from megatron_grit.data.builders.filters import HeldOut
from megatron_grit.data.builders.options import GritOptions, PreferenceOptions, RecordOptions
from megatron_grit.data.builders.record_encoder import BAD_LINE, OUTPUT, UNFIT, EncoderOptions, Limits, RecordEncoder
from megatron_grit.data.chat.chat import bind_template, source_of
from megatron_grit.data.chat.chat_format import RULES
from megatron_grit.data.chat.chat_templates import TEMPLATES
from megatron_grit.data.indexed.reader import token_dtype
from megatron_grit.data.indexed.roles import RowKind
from megatron_grit.data.indexed.writer import IndexedFacts
from megatron_grit.data.text.line_blocks import find_inputs
from megatron_grit.data.text.records import BadLine, read_records
from megatron_grit.data.text.templates import EMBEDDING_TEMPLATE, render
from megatron_grit.data.text.tokenizer import load_tokenizer
from megatron_grit.store.digest import sha256_of_file
from megatron_grit.store.files import check_prefix
from megatron_grit.store.hub import local_folder

__all__ = ["BuildReport", "Limits", "build_grit", "build_records", "read_texts"]


def read_texts(inputs: Sequence[str | Path]) -> Iterator[str]:
    """Every text of JSONL files in its template, to train a tokenizer on.

    Raises:
        DataError: a file or line that cannot be read.
    """
    for path in inputs:
        for item in read_records(path):
            if isinstance(item, BadLine):
                raise item.error
            yield from render(item)


def build_records(options: RecordOptions | PreferenceOptions) -> BuildReport:
    """Build as a command line says.

    Raises:
        GritError: see :func:`build_grit`.
    """
    limits = Limits(generative=options.generative_max_len)
    name = "build_sft"
    own: dict[str, Any] = {"kind": RowKind.GENERATIVE}
    if isinstance(options, PreferenceOptions):
        name, own = "build_preference", {"kind": RowKind.PREFERENCE, "turns": "last"}
    else:
        own |= {"turns": options.turns}
    if isinstance(options, GritOptions):
        limits = replace(limits, query=options.query_max_len, passage=options.passage_max_len)
        name, own = "build_grit", own | {"kind": None}
    return build_grit(
        options.input,
        options.output_prefix,
        options.tokenizer,
        limits,
        on_filtered=options.on_filtered,
        description=name,
        template=options.template,
        over_long=options.over_long,
        min_tokens=options.min_len,
        max_tokens=options.max_len,
        held_out=tuple(options.decontaminate),
        ngram=options.ngram,
        deduplicate=options.deduplicate,
        **own,
        **options.engine(),
    )


def build_grit(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer_path: str | Path,
    limits: Limits | None = None,
    *,
    on_error: Literal["stop", "skip"] = "stop",
    on_filtered: Literal["drop", "stop"] = "drop",
    **options: Any,
) -> BuildReport:
    """Write ``<output_prefix>.bin``, ``.idx``, ``.json``, ``.report.json``, ``.report.png`` and, if any line was
    dropped, ``.rejected.jsonl`` with the file, line and reason of each.

    Args:
        inputs: JSONL files or glob patterns, plain, ``.gz`` or ``.zst``, read in this order; all of one kind.
        output_prefix: path without extension.
        tokenizer_path: see :func:`~megatron_grit.data.text.tokenizer.load_tokenizer`.
        limits: token limits.
        on_error: what to do with a line that is not a record.
        on_filtered: what to do with a record that turns out unfit (empty text, instruction too long ...).
        options: fields of :class:`~megatron_grit.data.builders.block_build.BuildRun`, such as workers, and of
            :class:`~megatron_grit.data.builders.record_encoder.EncoderOptions`, such as template. By default ``kind``
            is that of the first record.

    Returns:
        The report; of a single partition its counts only, and nothing is written about it.

    Raises:
        DataError: an input that cannot be read, a bad line, records of both kinds, or nothing kept. No file of the
            prefix has been written then.
        ConfigError: options that make no sense.
    """
    check_prefix(output_prefix)
    names = {field.name for field in fields(BuildRun)} & options.keys()
    run = BuildRun(**{"description": "build_grit"} | {name: options.pop(name) for name in names})
    kind: RowKind | None = options.pop("kind", None)
    files = [file.path for file in find_inputs(inputs)]
    encoder = EncoderOptions(
        kind=RowKind.GENERATIVE, tokenizer=os.fspath(tokenizer_path), limits=limits or Limits(), **options
    )
    encoder = replace(encoder, held_out=tuple(str(path) for path in encoder.held_out))
    encoder = replace(encoder, tokenizer=str(local_folder(encoder.tokenizer, weights=False)))  # once, for all workers
    facts, dtype = _facts(encoder)  # before the input is read: a wrong option is found at once
    encoder = replace(encoder, kind=kind or _find_kind(files, skip_bad=on_error == "skip"))
    facts = replace(facts, kind=encoder.kind.value)
    if encoder.kind is RowKind.EMBEDDING:
        facts = replace(
            facts, template=EMBEDDING_TEMPLATE, template_source=None, template_turns=None, template_date=None
        )
    spec = BuildSpec(
        outputs={OUTPUT: OutputSpec(prefix=Path(output_prefix), dtype=dtype, with_modes=True, facts=facts)},
        factory=partial(RecordEncoder, encoder),
        signature=_signature(encoder, facts),
        work_prefix=Path(output_prefix),
        deduplicate=encoder.deduplicate,
        reads=[encoder.tokenizer, f"{encoder.tokenizer}/tokenizer.*", *encoder.held_out, encoder.template],
        reports=[".report.json", ".report.png"],
        stop_on=[BAD_LINE] * (on_error == "stop") + [*UNFIT] * (on_filtered == "stop"),
    )
    totals = build_blocks(list(inputs), spec, run)
    return _account(os.fspath(output_prefix), facts, totals)


def _account(prefix: str, facts: IndexedFacts, totals: BuildTotals) -> BuildReport:
    """The report, written beside the file where that is whole."""
    if OUTPUT not in totals.metas:
        report = BuildReport(prefix=prefix, kind=facts.kind, template=facts.template)
        return replace(
            report, num_read=totals.num_records, num_kept=totals.num_documents[OUTPUT], dropped=totals.rejected
        )
    report, lengths = make_report(prefix, totals.metas[OUTPUT], totals.num_records, totals.rejected, totals.counters)
    write_report(report, lengths)
    return report


def _facts(options: EncoderOptions) -> tuple[IndexedFacts, Any]:
    """What the ``.json`` says, and the type of the tokens. Loads all that the workers will, to find errors here."""
    tokenizer = load_tokenizer(options.tokenizer)
    template, source = source_of(options.template, tokenizer)
    chat_format = bind_template(template, source, tokenizer)
    if options.held_out:
        HeldOut(options.held_out, options.ngram)
    facts = IndexedFacts(
        kind=options.kind.value,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        template=template,
        limits=asdict(options.limits),
        template_source=None if template in TEMPLATES else source,
        template_rules=RULES,
        template_turns=options.turns if chat_format.rewrites else None,
        template_date=chat_format.date_in_data,
    )
    return facts, token_dtype(tokenizer.vocab_size)


def _find_kind(files: Sequence[Path], *, skip_bad: bool) -> RowKind:
    """Kind of the first record."""
    for path in files:
        for item in read_records(path):
            if not isinstance(item, BadLine):
                return item.kind
            if not skip_bad:
                return RowKind.GENERATIVE  # the build stops there
    return RowKind.GENERATIVE


def _signature(options: EncoderOptions, facts: IndexedFacts) -> dict[str, Any]:
    """What the output depends on beside the input."""
    values = asdict(options) | {"kind": options.kind.value, "format": 1, **asdict(facts)}
    values["held_out"] = [sha256_of_file(path) for path in options.held_out]
    del values["tokenizer"]  # its fingerprint is there
    return values
