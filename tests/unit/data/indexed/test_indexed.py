"""Indexed files: round trip, the bytes on disk, damage, and that nothing is half-written."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_grit.data.indexed.reader import IndexedFile, file_paths, read_meta
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role, RowKind, num_labels, split_segments
from megatron_grit.data.indexed.writer import IndexedFacts, IndexedStream, IndexedWriter, TokenBlock
from megatron_grit.errors import DataError

C, A, Q, P, N = Role.TEMPLATE, Role.ANSWER, Role.QUERY, Role.POSITIVE, Role.NEGATIVE
CHATS = [[(C, [1, 5]), (A, [6, 2])], [(C, [1]), (A, [7, 2]), (C, [8, 9, 10]), (A, [2])]]


def write(prefix: Path, records: list, kind: RowKind = RowKind.GENERATIVE, vocab_size: int = 100, **options: bool):
    with IndexedWriter(prefix, kind, vocab_size, **options) as writer:
        for record in records:
            writer.add(record)
        return writer.finalize(tokenizer_fingerprint="f" * 64, template="gritlm", limits={"query": 8})


def texts(role: Role, instruction: Role) -> st.SearchStrategy:
    ids = st.lists(st.integers(0, 69_999), min_size=1, max_size=5)
    return st.tuples(st.lists(st.integers(0, 69_999), max_size=3), ids).map(
        lambda pair: [(instruction, pair[0]), (role, pair[1])]
    )


EMBEDDING_RECORD = st.tuples(
    texts(Q, Role.QUERY_INSTRUCTION),
    st.lists(texts(P, Role.POSITIVE_INSTRUCTION), min_size=1, max_size=3),
    st.lists(texts(N, Role.NEGATIVE_INSTRUCTION), max_size=3),
).map(lambda parts: [span for text in [parts[0], *parts[1], *parts[2]] for span in text])


@given(records=st.lists(EMBEDDING_RECORD, min_size=1, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(tmp_path: Path, records: list) -> None:
    meta = write(tmp_path / "emb", records, RowKind.EMBEDDING, vocab_size=70_000, overwrite=True)
    read = IndexedRecords(tmp_path / "emb")
    written = [[(role, ids) for role, ids in record if ids] for record in records]
    assert [[(role, ids.tolist()) for role, ids in read.get(index)] for index in range(len(read))] == written
    assert read.lengths().tolist() == [sum(len(ids) for _, ids in record) for record in records]
    for index, record in enumerate(written):
        roles, lengths = read.spans(index)
        assert list(zip(roles, lengths, strict=True)) == [(role, len(ids)) for role, ids in record]
    negatives = [[role for role, _ in record].count(N) for record in records]
    assert (meta.min_negatives, meta.max_negatives) == (min(negatives), max(negatives))
    segments = []
    for roles, lengths in map(read.spans, range(len(read))):
        segments.append([sum(lengths[start:stop]) for start, stop in split_segments(roles)])
    assert meta.longest_segment_tokens == max(map(max, segments))
    assert max(segments[meta.longest_segment_record]) == meta.longest_segment_tokens
    read.verify()


def test_bytes_on_disk(tmp_path: Path) -> None:
    """The layout that docs/data_formats.md gives, read without the engine."""
    write(tmp_path / "gen", CHATS)
    content = (tmp_path / "gen.idx").read_bytes()
    magic, version, code, num_sequences, num_documents = struct.unpack_from("<9sQBQQ", content)
    assert (magic, version, code, num_sequences, num_documents) == (b"MMIDIDX\x00\x00", 1, 8, 6, 3)
    lengths = np.frombuffer(content, np.int32, 6, 34)
    pointers = np.frombuffer(content, np.int64, 6, 34 + 24)
    documents = np.frombuffer(content, np.int64, 3, 34 + 24 + 48)
    modes = np.frombuffer(content, np.int8, 6, 34 + 24 + 48 + 24)
    assert len(content) == 34 + 24 + 48 + 24 + 6
    assert lengths.tolist() == [2, 2, 1, 2, 3, 1]
    assert pointers.tolist() == [0, 4, 8, 10, 14, 20]
    assert documents.tolist() == [0, 2, 6]
    assert modes.tolist() == [1, 2, 1, 2, 1, 2]
    assert np.fromfile(tmp_path / "gen.bin", np.uint16).tolist() == [1, 5, 6, 2, 1, 7, 2, 8, 9, 10, 2]


def test_metadata(tmp_path: Path) -> None:
    meta = write(tmp_path / "gen", CHATS)
    assert read_meta(tmp_path / "gen") == meta
    assert (meta.num_records, meta.num_tokens, meta.num_supervised_tokens) == (2, 11, 5)
    assert (meta.longest_segment_tokens, meta.longest_segment_record) == (7, 1)
    assert (meta.bin_bytes, meta.idx_bytes) == tuple((tmp_path / f"gen.{x}").stat().st_size for x in ("bin", "idx"))


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(65_499, 2), (65_500, 4)])
def test_token_type_follows_the_vocabulary(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    write(tmp_path / "gen", [[(Role.TEXT, [vocab_size - 1, 0, 3])]], vocab_size=vocab_size)
    assert (tmp_path / "gen.bin").stat().st_size == 3 * itemsize
    (span,) = IndexedRecords(tmp_path / "gen").get(0)
    assert span[1].tolist() == [vocab_size - 1, 0, 3]


def test_labels_of_a_record() -> None:
    assert num_labels([Role.TEXT], [5]) == 4
    assert num_labels([C, A, C, A], [3, 2, 4, 1]) == 3
    assert num_labels([Q, P], [3, 2]) == 0


def test_nothing_is_written_before_the_end(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "gen", RowKind.GENERATIVE, 100) as writer:
        writer.add(CHATS[0])
        assert not any(path.exists() for path in file_paths(tmp_path / "gen"))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="no records"):
        write(tmp_path / "gen", [])
    with pytest.raises(DataError, match="gen#1 is not a record of kind generative"):
        write(tmp_path / "gen", [CHATS[0], [(Q, [1]), (P, [2])]])
    assert not list(tmp_path.iterdir())


def test_existing_files_are_kept_unless_told(tmp_path: Path) -> None:
    write(tmp_path / "gen", CHATS)
    with pytest.raises(DataError, match="gen.bin: exists already"):
        write(tmp_path / "gen", CHATS[:1])
    assert len(IndexedRecords(tmp_path / "gen")) == 2
    write(tmp_path / "gen", CHATS[:1], overwrite=True)
    assert len(IndexedRecords(tmp_path / "gen")) == 1


@pytest.mark.parametrize("completed", [0, 1, 2])
def test_a_crash_between_the_files_leaves_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, completed: int
) -> None:
    write(tmp_path / "gen", CHATS)
    replace, calls = os.replace, []

    def crash(source: Path, target: Path) -> None:
        if Path(target).parent == tmp_path:
            if len(calls) == completed:
                raise OSError("power failure")
            calls.append(target)
        replace(source, target)

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="power failure"):
        write(tmp_path / "gen", CHATS[:1], overwrite=True)
    with pytest.raises(DataError, match="gen.idx: is missing"):
        IndexedRecords(tmp_path / "gen")
    assert not list(tmp_path.glob(".*"))


def test_no_such_record(tmp_path: Path) -> None:
    write(tmp_path / "gen", CHATS)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            IndexedRecords(tmp_path / "gen").get(index)


def damage(tmp_path: Path, extension: str, change) -> None:
    write(tmp_path / "gen", CHATS)
    path = tmp_path / f"gen.{extension}"
    path.write_bytes(change(path.read_bytes()))


def rewrite_json(content: bytes, **changes: object) -> bytes:
    """The metadata with other values and a checksum that fits them."""
    values = {**json.loads(content), **changes}
    values.pop("sha256")
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return json.dumps({**values, "sha256": digest}).encode()


@pytest.mark.parametrize(
    ("extension", "change", "message"),
    [
        ("bin", lambda b: b[:-3], r"gen.bin \(byte 19\): is 19 bytes long, its .json says 22"),
        ("bin", lambda b: b + b"..", r"gen.bin \(byte 22\): is 24 bytes long"),
        ("bin", lambda b: b"", r"gen.bin \(byte 0\): is 0 bytes long"),
        ("idx", lambda b: b[:20], r"gen.idx \(byte 20\): is 20 bytes long, its .json says 136"),
        ("idx", lambda b: b[:-1], r"gen.idx \(byte 135\): is 135 bytes long"),
        ("idx", lambda b: b"PK" + b[2:], r"gen.idx \(byte 0\): not a Megatron index"),
        ("idx", lambda b: b[:9] + b"\x02" + b[10:], r"gen.idx \(byte 9\): index version 2"),
        ("idx", lambda b: b[:17] + b"\x07" + b[18:], r"gen.idx \(byte 17\): token type 7"),
        ("idx", lambda b: b[:17] + b"\x04" + b[18:], r"gen.bin \(byte 22\): is 22 bytes long, its index says"),
        ("idx", lambda b: b[:18] + b"\x05" + b[19:], r"gen.idx .*: is 136 bytes long, its header says 118, or 123"),
        ("json", lambda b: rewrite_json(b, num_records=3), r"gen.idx \(byte 26\): holds 2 records, its .json says 3"),
        ("json", lambda b: rewrite_json(b, num_tokens=12), r"gen.idx \(byte 17\): holds 22 bytes of tokens"),
        ("json", lambda b: rewrite_json(b, kind="documents"), r"gen.idx \(byte 18\): holds True mode bytes"),
        ("json", lambda b: b[:-9], r"gen.json( \(byte \d+\))?: not JSON"),
        ("json", lambda b: b.replace(b'"num_records": 2', b'"num_records": 3'), "gen.json: was changed or damaged"),
        ("json", lambda b: b.replace(b'"version": 2', b'"version": 1'), "format version 1, this is 2"),
        ("json", lambda b: b.replace(b"megatron_grit.indexed", b"other"), "not the metadata of an indexed file"),
        ("json", lambda b: rewrite_json(b, sort="x"), "incomplete metadata"),
        ("json", lambda b: rewrite_json(b, kind="images"), "incomplete metadata"),
    ],
)
def test_damage_is_found_on_opening(tmp_path: Path, extension: str, change, message: str) -> None:
    damage(tmp_path, extension, change)
    with pytest.raises(DataError, match=message):
        IndexedRecords(tmp_path / "gen").get(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-1], r"gen.idx \(byte 130\): is 135 bytes long, its header says 130, or 136 with modes"),
        (lambda b: b[:33], r"gen.idx \(byte 33\): ends after 33 bytes, within its header"),
        (lambda b: b[:106] + b"\x01" + b[107:], r"gen.idx \(byte 106\): the first document does not start at 0"),
        (lambda b: b[:122] + b"\x05" + b[123:], r"gen.idx \(byte 122\): the last document does not end at sequence 6"),
    ],
)
def test_damage_without_metadata(tmp_path: Path, change, message: str) -> None:
    """What Megatron wrote has no .json: its header and sizes are all there is to compare."""
    damage(tmp_path, "idx", change)
    with pytest.raises(DataError, match=message):
        IndexedFile(tmp_path / "gen")


@pytest.mark.parametrize("extension", ["bin", "idx", "json"])
def test_missing_file_is_named(tmp_path: Path, extension: str) -> None:
    write(tmp_path / "gen", CHATS)
    (tmp_path / f"gen.{extension}").unlink()
    with pytest.raises(DataError, match=f"gen.{extension}: (is missing|no such file)"):
        IndexedRecords(tmp_path / "gen")


def test_damage_that_only_reading_finds(tmp_path: Path) -> None:
    damage(tmp_path, "bin", lambda b: b[:4] + b"\x63\x00" + b[6:])
    with pytest.raises(DataError, match=r"gen.bin \(byte 0\): its SHA-256 is"):
        IndexedRecords(tmp_path / "gen").verify()
    (tmp_path / "gen.bin").write_bytes(b"\xff" * 22)
    with pytest.raises(
        DataError, match=r"gen.bin \(byte 8\): record 1 holds the id 65535, outside the vocabulary of 100"
    ):
        IndexedRecords(tmp_path / "gen").get(1)

    write(tmp_path / "gen", CHATS, overwrite=True)
    index = (tmp_path / "gen.idx").read_bytes()
    (tmp_path / "gen.idx").write_bytes(index[:-6] + bytes([1, 2, 1, 2, 1, 1]))
    records = IndexedRecords(tmp_path / "gen")
    assert len(records.get(0)) == 2
    for read in (partial(records.get, 1), records.verify):
        with pytest.raises(DataError, match="gen#1 is not a record of kind generative"):
            read()
    for byte, message in (
        (34 + 4, r"gen.idx \(byte 66\): sequence 1 is said to be 3 tokens from byte 4"),
        (34 + 24 + 8, r"gen.idx \(byte 58\): sequence 0 is said to be 2 tokens from byte 0 of the .bin, the next"),
    ):
        (tmp_path / "gen.idx").write_bytes(index[:byte] + bytes([index[byte] + 1]) + index[byte + 1 :])
        records = IndexedRecords(tmp_path / "gen")
        assert len(records.get(1)) == 4
        for read in (partial(records.get, 0), records.verify):
            with pytest.raises(DataError, match=message):
                read()
    (tmp_path / "gen.idx").write_bytes(index[:114] + b"\x07" + index[115:])
    with pytest.raises(DataError, match=r"gen.idx \(byte 106\): document 0 holds sequences 0 to 7"):
        IndexedRecords(tmp_path / "gen").get(0)
    # Boundaries that make other records out of the same spans: only the checksum knows.
    (tmp_path / "gen.idx").write_bytes(index[:114] + b"\x04" + index[115:])
    records = IndexedRecords(tmp_path / "gen")
    assert len(records.get(0)) == 4
    with pytest.raises(DataError, match=r"gen.idx \(byte 0\): its SHA-256 is"):
        records.verify()


def test_where_a_large_file_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_grit.data.indexed.records.CHECKED_BLOCK_BYTES", 8)
    damage(tmp_path, "bin", lambda b: b[:17] + b"\x01" + b[18:])
    with pytest.raises(DataError, match=r"gen.bin \(byte 16\): its SHA-256"):
        IndexedRecords(tmp_path / "gen").verify()


def test_a_file_cut_short_while_it_is_open(tmp_path: Path) -> None:
    write(tmp_path / "gen", CHATS)
    records = IndexedRecords(tmp_path / "gen")
    records.get(0)
    os.truncate(tmp_path / "gen.bin", 9)
    assert records.get(0)[1][1].tolist() == [6, 2]
    with pytest.raises(DataError, match=r"gen.bin \(byte 9\): ends here"):
        records.get(1)


def test_parts_of_a_record(tmp_path: Path) -> None:
    write(tmp_path / "gen", CHATS)
    records = IndexedRecords(tmp_path / "gen")
    whole = [1, 7, 2, 8, 9, 10, 2]
    for skip in range(8):
        for count in range(8 - skip):
            assert records.tokens(1, skip, count).tolist() == whole[skip : skip + count]
    for skip, count in ((0, 8), (7, 1), (-1, 2), (0, -1)):
        with pytest.raises(IndexError):
            records.tokens(1, skip, count)


def test_closed_files_are_opened_again(tmp_path: Path) -> None:
    write(tmp_path / "gen", CHATS)
    records = IndexedRecords(tmp_path / "gen")
    descriptors = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(3):
        assert len(records.get(1)) == 4
        records.close()
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) == descriptors


def test_documents_are_plain_text_to_train_on(tmp_path: Path) -> None:
    stream = IndexedStream(tmp_path / "work", "text", np.uint16, with_modes=False)
    stream.append(
        TokenBlock(
            tokens=np.arange(9, dtype=np.uint16),
            lengths=np.array([2, 3, 4], dtype=np.int32),
            documents=np.array([2, 1], dtype=np.int32),
        )
    )
    facts = IndexedFacts(kind="documents", tokenizer_fingerprint="f" * 64, vocab_size=100)
    meta = stream.finalize(tmp_path / "text", lambda: facts)
    assert meta is not None and (meta.num_records, meta.num_supervised_tokens, meta.longest_segment_tokens) == (2, 7, 5)
    records = IndexedRecords(tmp_path / "text")
    assert records.kind is RowKind.GENERATIVE
    assert [(role, ids.tolist()) for role, ids in records.get(0)] == [(Role.TEXT, [0, 1, 2, 3, 4])]
    records.verify()


def test_metadata_is_plain_json(tmp_path: Path) -> None:
    write(tmp_path / "gen", CHATS)
    values = json.loads((tmp_path / "gen.json").read_text())
    assert (values["format"], values["version"], values["kind"]) == ("megatron_grit.indexed", 2, "generative")
    assert values["bin_sha256"] == hashlib.sha256((tmp_path / "gen.bin").read_bytes()).hexdigest()


def test_files_of_another_program_are_named_as_such(tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"foreign{suffix}").write_bytes(b"")
    with pytest.raises(DataError, match="another program wrote them"):
        read_meta(tmp_path / "foreign")
    with pytest.raises(DataError, match="give the prefix"):
        read_meta(tmp_path / "nothing")
