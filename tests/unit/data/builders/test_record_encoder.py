"""Blocks of records to tokens: limits, splitting, filters, and that blocks, workers and restarts change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_grit.data.builders.block_encoder import EncodedBlock
from megatron_grit.data.builders.grit_builder import BuildReport, Limits, build_grit
from megatron_grit.data.builders.record_encoder import OUTPUT, EncoderOptions, RecordEncoder
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role, RowKind
from megatron_grit.data.indexed.writer import TokenBlock
from megatron_grit.data.text.line_blocks import LineBlock
from megatron_grit.data.text.records import Message
from megatron_grit.data.text.templates import encode_chat
from megatron_grit.data.text.tokenizer import Tokenizer
from megatron_grit.errors import ConfigError, DataError
from tests.unit.data.samples import byte_level_json, chat_record, embedding_record, generative_record, sentence

Build = Callable[..., BuildReport]


@pytest.fixture
def build(tmp_path: Path, tokenizer_path: Path, write_jsonl: Callable[..., Path]) -> Build:
    def run(records: list, *, name: str = "out", limit: int = 2048, **options: object) -> BuildReport:
        path = write_jsonl(records, f"{name}.jsonl")
        return build_grit([path], tmp_path / name, tokenizer_path, Limits(generative=limit), overwrite=True, **options)

    return run


def read(prefix: Path) -> list[list[tuple[Role, list[int]]]]:
    records = IndexedRecords(prefix)
    return [[(role, ids.tolist()) for role, ids in records.get(index)] for index in range(len(records))]


def reasons(prefix: Path) -> list[tuple[int, str]]:
    path = Path(f"{prefix}.rejected.jsonl")
    return [(entry["line"], entry["reason"]) for entry in map(json.loads, path.read_text().splitlines())]


def mixed_records() -> list[object]:
    records: list[object] = [generative_record(number) for number in range(30)]
    records += [{"prompt": sentence(number, 3), "completion": sentence(number, 5)} for number in range(5)]
    records += [{"text": ["u", " "]}, {"text": sentence(3, 70)}, chat_record(1, 12), {"text": ["u", "a"]}]
    return records


def preference_records() -> list[object]:
    records: list[object] = [
        {"prompt": sentence(number, 3), "chosen": sentence(number, 5), "rejected": sentence(number + 1, 70)}
        for number in range(30)
    ]
    return records + [{"prompt": "u", "completion": sentence(number, 5), "label": True} for number in range(5)]


RECORDS = {
    RowKind.EMBEDDING: lambda: [embedding_record(number) for number in range(40)],
    RowKind.GENERATIVE: mixed_records,
    RowKind.PREFERENCE: preference_records,
}


def encode(options: EncoderOptions, lines: list[bytes]) -> EncodedBlock:
    return RecordEncoder(options).encode(LineBlock(Path("x"), b"".join(line + b"\n" for line in lines)))


def concatenate(blocks: list[TokenBlock]) -> list[list]:
    return [
        np.concatenate([getattr(block, name) for block in blocks]).tolist()
        for name in ("tokens", "lengths", "documents", "modes")
    ]


@pytest.mark.parametrize("over_long", ["truncate", "drop", "split"])
@pytest.mark.parametrize("kind", list(RowKind))
def test_records_do_not_depend_on_their_block(tokenizer_path: Path, kind: RowKind, over_long: str) -> None:
    records = RECORDS[kind]()
    lines = [json.dumps(record).encode() for record in records] + [b"", b"{", b" "]
    options = EncoderOptions(
        kind=kind,
        tokenizer=str(tokenizer_path),
        limits=Limits(query=60, passage=60, generative=64),
        over_long=over_long,
        deduplicate=True,
    )
    whole = encode(options, lines)
    alone = [encode(options, [line]) for line in lines]
    assert concatenate([whole.outputs[OUTPUT]]) == concatenate([block.outputs[OUTPUT] for block in alone])
    assert whole.fingerprints == b"".join(block.fingerprints for block in alone)
    assert (whole.num_lines, whole.num_records) == (len(lines), len(lines) - 2)
    found = [(number, item.reason, item.message) for number, block in enumerate(alone) for item in block.rejections]
    assert [(item.line, item.reason, item.message) for item in whole.rejections] == found
    assert whole.lines.tolist() == [number for number, block in enumerate(alone) for _ in block.lines]
    assert whole.counters == {
        name: sum(block.counters.get(name, 0) for block in alone)
        for name in {name for block in alone for name in block.counters}
    }
    assert len(whole.outputs[OUTPUT].documents) == len(whole.lines) == len(whole.fingerprints) // 16 > 0


def test_workers_and_partitions_change_nothing(build: Build, tmp_path: Path) -> None:
    records = mixed_records() * 3
    reports = [
        build(records, name="one", limit=100, deduplicate=True),
        build(records, name="two", limit=100, deduplicate=True, workers=2, partitions=3),
    ]
    one, two = (json.loads((tmp_path / f"{name}.report.json").read_text()) for name in ("one", "two"))
    assert {**one, "prefix": ""} == {**two, "prefix": ""}
    assert one == vars(reports[0])
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    assert reasons(tmp_path / "one") == reasons(tmp_path / "two")
    assert reports[0].dropped["duplicate"] >= 70


def test_report_after_an_interruption(
    build: Build, tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that stops in the middle and goes on gives the report of one that did not."""
    from megatron_grit.data.builders import block_build

    monkeypatch.setitem(block_build.BuildRun.__init__.__kwdefaults__, "block_bytes", 400)
    monkeypatch.setitem(block_build.BuildRun.__init__.__kwdefaults__, "journal_seconds", 0.0)
    records = mixed_records()
    expected = build(records, name="whole", limit=64)
    encoded: list[int] = []
    original = RecordEncoder.encode

    def counted(self: RecordEncoder, block: LineBlock) -> EncodedBlock:
        encoded.append(len(block.lines()))
        if len(encoded) == 8:
            raise KeyboardInterrupt
        return original(self, block)

    monkeypatch.setattr(RecordEncoder, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        build(records, name="halves", limit=64)
    path = tmp_path / "halves.jsonl"
    prefix = tmp_path / "halves"
    assert not prefix.with_suffix(".idx").exists()
    report = build_grit([path], prefix, tokenizer_path, Limits(generative=64), overwrite=True)
    assert {**vars(report), "prefix": ""} == {**vars(expected), "prefix": ""}
    assert sum(encoded[8:]) < len(records)  # it did not begin again
    assert prefix.with_suffix(".bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_long_texts_are_split(build: Build, tmp_path: Path, tokenizer: Tokenizer) -> None:
    long, short = sentence(4, 60), sentence(5, 3)
    ids = tokenizer.encode(long)
    limit = (len(ids) - 1) // 3  # the fourth piece has one token or a few
    report = build([{"text": long}, {"text": short}], limit=limit, over_long="split")
    expected = [ids[at : at + limit] for at in range(0, len(ids), limit)]
    expected = [piece for piece in expected if len(piece) > 1]
    assert read(tmp_path / "out") == [[(Role.TEXT, piece)] for piece in [*expected, tokenizer.encode(short)]]
    assert (report.num_split, report.num_split_pieces, report.num_kept) == (1, len(expected), len(expected) + 1)
    assert report.truncated == {}
    assert "split, records" in "\n".join(report.lines())


def test_long_conversations_are_split_between_turns(build: Build, tmp_path: Path, tokenizer: Tokenizer) -> None:
    system = Message("system", "be brief")
    turns = [[Message("user", sentence(k, 2 + k)), Message("assistant", sentence(k, 3))] for k in range(6)]
    messages = [system, *(message for turn in turns for message in turn)]
    value = {"messages": [message._asdict() for message in messages]}
    limit = 150
    report = build([value, {"text": ["u", "a"]}], limit=limit, over_long="split", template="tulu")
    *parts, last = read(tmp_path / "out")
    assert last == encode_chat(tokenizer, ["u", "a"], template="tulu")
    place = 0
    for part in parts:
        count = sum(role is Role.ANSWER for role, _ in part)
        expected = [system, *(message for turn in turns[place : place + count] for message in turn)]
        assert part == encode_chat(tokenizer, expected, template="tulu")
        place += count
        assert sum(len(ids) for _, ids in part) <= limit
        if place < len(turns):  # another turn would not have fitted
            longer = encode_chat(tokenizer, [*expected, *turns[place]], template="tulu")
            assert sum(len(ids) for _, ids in longer) > limit
    assert place == len(turns)
    assert (report.num_split, report.num_split_pieces, report.truncated) == (1, len(parts), {})
    assert len(parts) > 1


def test_turn_that_does_not_fit_is_cut(build: Build, tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = ["u", "a", "v", sentence(1, 60), "w", "c", sentence(2, 60), "lost", "x", "d"]
    report = build([{"text": turns}], limit=80, over_long="split")
    parts = read(tmp_path / "out")
    cut = encode_chat(tokenizer, turns[2:4], 80)
    wanted = [turns[:2], None, turns[4:6], turns[8:10]]
    assert parts == [cut if part is None else encode_chat(tokenizer, part) for part in wanted]
    assert report.truncated == {"conversation": 2}


def test_long_records_are_dropped(build: Build, tmp_path: Path) -> None:
    records = [{"text": sentence(1, 60)}, {"text": "short"}, {"text": ["u", sentence(1, 60)]}]
    report = build(records, limit=50, over_long="drop")
    assert report.dropped == {"over_long": 2} and report.num_kept == 1
    assert reasons(tmp_path / "out") == [(1, "over_long"), (3, "over_long")]


def test_lengths_that_are_asked_for(build: Build, tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [sentence(number, number) for number in range(1, 15)]
    sizes = [len(tokenizer.encode(text)) for text in texts]
    low, high = sorted(sizes)[3], sorted(sizes)[-4]
    report = build([{"text": text} for text in texts], min_tokens=low, max_tokens=high, on_filtered="stop")
    assert len(read(tmp_path / "out")) == sum(low <= size <= high for size in sizes)
    assert report.dropped == {
        "too_short": sum(size < low for size in sizes),
        "too_long": sum(size > high for size in sizes),
    }
    pair = {"query": "one", "pos": ["two three", sentence(1, 9)]}
    with pytest.raises(DataError, match="dropped as too_short; the first: .*:1: the query has . tokens; the least"):
        build([pair], min_tokens=30)
    with pytest.raises(ConfigError, match="at least 5 and at most 4 tokens"):
        build([pair], min_tokens=5, max_tokens=4)


def test_duplicates(build: Build, tmp_path: Path) -> None:
    records = [{"text": ["u", "a"]}, {"text": ["u", "a "]}, {"text": ["u", "b"]}, {"text": ["u", "a"], "id": 3}]
    assert build(records).dropped == {}
    report = build(records, deduplicate=True)
    assert (report.num_kept, report.dropped) == (2, {"duplicate": 2})
    assert reasons(tmp_path / "out") == [(2, "duplicate"), (4, "duplicate")]


def test_held_out_records(build: Build, tmp_path: Path) -> None:
    held_out = tmp_path / "test.jsonl"
    held_out.write_text(json.dumps({"query": ["i", sentence(3, 20)], "pos": ["p"]}) + "\n")
    records = [{"text": "good text"}, {"text": ["u", "So: " + sentence(3, 20).upper()]}]
    report = build(records, held_out=(held_out,))
    assert report.dropped == {"contaminated": 1}
    (entry,) = map(json.loads, (tmp_path / "out.rejected.jsonl").read_text().splitlines())
    words = " ".join(sentence(3, 20).split()[:13])
    assert entry["line"] == 2 and entry["message"].endswith(f"shares these words with a held-out file: {words}")
    assert build(records, held_out=(held_out,), ngram=22).dropped == {}  # the held-out text has 21 words


def test_prompts_and_completions(build: Build, tmp_path: Path, tokenizer: Tokenizer) -> None:
    report = build([{"prompt": "2 + 2 =", "completion": "4"}, {"prompt": "p", "completion": " \n"}])
    ((bos, prompt, answer),) = read(tmp_path / "out")
    assert bos == (Role.TEMPLATE, [tokenizer.bos_id]) and prompt == (Role.USER, tokenizer.encode("2 + 2 ="))
    whole = tokenizer.encode("2 + 2 = 4")
    assert answer == (Role.ANSWER, [*whole[len(prompt[1]) :], tokenizer.eos_id])
    assert report.dropped == {"empty_text": 1}


def test_answers_that_cannot_be_kept_apart_are_dropped(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    merging = byte_level_json(tmp_path)
    path = write_jsonl([{"text": ["Is it?", "Yes sir"]}, {"text": ["Is it?", "No sir"]}])
    report = build_grit([path], tmp_path / "out", merging)
    assert report.dropped == {"merged_answer": 1} and reasons(tmp_path / "out") == [(1, "merged_answer")]
    with pytest.raises(DataError, match=rf"^{path}:1: the tokenizer merges the template's end"):
        build_grit([path], tmp_path / "out", merging, on_filtered="stop", overwrite=True)


def test_the_template_is_recorded(build: Build, tmp_path: Path) -> None:
    build([{"text": ["u", "a"]}], template="zephyr")
    assert IndexedRecords(tmp_path / "out").meta.template == "zephyr"
    build([{"query": "q", "pos": ["p"]}], template="zephyr")
    assert IndexedRecords(tmp_path / "out").meta.template == "gritlm"
    with pytest.raises(ConfigError, match="no chat template vicuna"):
        build([{"text": ["u", "a"]}], template="vicuna")


def test_one_partition_alone(build: Build, tmp_path: Path) -> None:
    records = mixed_records()
    part = build(records, partitions=2, partition=1)
    assert 0 < part.num_read < len(records) and not (tmp_path / "out.idx").exists()
    assert build(records, partitions=2).num_read == len(records)


@pytest.mark.parametrize("template", ["tulu", "llama2"])
def test_an_answer_that_is_cut_can_end_all_the_same(tokenizer: Tokenizer, template: str) -> None:
    """At every length: as cut, with the end token in place of the last one; where the cut leaves one token of an answer
    the conversation ends with the answer before."""
    turns = [sentence(1, 3), sentence(2, 6), sentence(3, 3), sentence(4, 6)]
    whole = encode_chat(tokenizer, turns, template=template)
    ends = np.cumsum([len(ids) for _, ids in whole]).tolist()
    answers = [(end - len(ids), end) for end, (role, ids) in zip(ends, whole, strict=True) if role is Role.ANSWER]
    flat = [index for _, ids in whole for index in ids]
    assert len(answers) == 2 and all(flat[end - 1] == tokenizer.eos_id for _, end in answers)
    lines = [json.dumps({"text": turns}).encode(), b'{"text": ["u", "a"]}']
    for limit in range(answers[0][0], len(flat) + 1):
        options = EncoderOptions(
            kind=RowKind.GENERATIVE,
            tokenizer=str(tokenizer.path),
            template=template,
            limits=Limits(generative=limit),
            over_long="terminate",
        )
        block = encode(options, lines)
        tokens = block.outputs[OUTPUT]
        if limit < answers[0][0] + 2:
            (rejection,) = block.rejections
            assert (rejection.line, rejection.reason) == (0, "instruction_too_long")
            assert f"leaves {'none' if limit == answers[0][0] else 'one'} for the answer" in rejection.message
            continue
        second = answers[1][0] + 2 <= limit or limit < answers[0][1]
        stop = limit if second else answers[0][1]
        length = int(tokens.lengths[: tokens.documents[0]].sum())
        assert tokens.tokens[:length].tolist() == [*flat[: stop - 1], tokenizer.eos_id]
        last = tokens.documents[0] - 1
        assert tokens.modes[last] == Role.ANSWER and tokens.lengths[last] > 1
        assert block.counters == ({} if limit == len(flat) else {"truncated.conversation": 1})
