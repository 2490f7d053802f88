"""Writing indexed files: byte for byte what the engine's builder writes, in any blocks, after any kill, joined."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_grit.data.indexed.merge import merge_indexed
from megatron_grit.data.indexed.reader import IndexedFile, file_paths
from megatron_grit.data.indexed.records import IndexedRecords
from megatron_grit.data.indexed.roles import Role, RowKind
from megatron_grit.data.indexed.writer import IndexedFacts, IndexedStream, IndexedWriter, TokenBlock
from megatron_grit.errors import DataError, OutputError
from megatron_grit.store.lock import locked
from tests.unit.data import indexed_files

FACTS = IndexedFacts(kind="documents", tokenizer_fingerprint="f" * 64, vocab_size=100)
Document = list[tuple[list[int], int]]
"""Sequences of a document, each with its mode."""
DOCUMENTS = st.lists(
    st.lists(st.tuples(st.lists(st.integers(0, 65_499), max_size=6), st.integers(-128, 127)), max_size=4),
    min_size=1,
    max_size=6,
)
FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def block_of(documents: list[Document], dtype: type, with_modes: bool) -> TokenBlock:
    sequences = [sequence for document in documents for sequence in document]
    return TokenBlock(
        tokens=np.array([token for tokens, _ in sequences for token in tokens], dtype=dtype),
        lengths=np.array([len(tokens) for tokens, _ in sequences], dtype=np.int32),
        documents=np.array([len(document) for document in documents], dtype=np.int32),
        modes=np.array([mode for _, mode in sequences], dtype=np.int8) if with_modes else None,
    )


def write_theirs(prefix: Path, documents: list[Document], dtype: type, with_modes: bool) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=with_modes)
    for document in documents:
        for tokens, mode in document:
            builder.add_item(torch.tensor(tokens, dtype=torch.int64), mode)
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def same_files(ours: Path, theirs: Path) -> None:
    for mine, other in zip(file_paths(ours)[:2], file_paths(theirs)[:2], strict=True):
        assert mine.read_bytes() == other.read_bytes(), mine


@given(documents=DOCUMENTS, wide=st.booleans(), with_modes=st.booleans(), cuts=st.lists(st.integers(0, 6), max_size=3))
@FIXTURE
def test_bytes_are_the_engines(
    tmp_path: Path, documents: list[Document], wide: bool, with_modes: bool, cuts: list[int]
) -> None:
    """However the documents come in blocks; ours read by the engine, theirs read by us."""
    dtype = np.int32 if wide else np.uint16
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    write_theirs(tmp_path / "theirs", documents, dtype, with_modes)
    stream = IndexedStream(tmp_path / "work", "s", dtype, with_modes=with_modes)
    bounds = [0, *sorted(min(cut, len(documents)) for cut in cuts), len(documents)]
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        stream.append(block_of(documents[start:stop], dtype, with_modes))
    stream.finalize(tmp_path / "ours", None)
    same_files(tmp_path / "ours", tmp_path / "theirs")

    sequences = [sequence for document in documents for sequence in document]
    file = IndexedFile(tmp_path / "theirs")
    assert [file.read(i, i + 1).tolist() for i in range(file.num_sequences)] == [tokens for tokens, _ in sequences]
    assert [file.read(*file.sequences(i)).tolist() for i in range(file.num_documents)] == [
        [token for tokens, _ in document for token in tokens] for document in documents
    ]
    file.check_index()
    if sequences and any(tokens for tokens, _ in sequences):  # the engine cannot map an empty file
        theirs = IndexedDataset(str(tmp_path / "ours"), multimodal=with_modes)
        read = [theirs[index] for index in range(len(sequences))]
        if with_modes:
            assert [(tokens.tolist(), int(mode)) for tokens, mode in read] == sequences
        else:
            assert [tokens.tolist() for tokens in read] == [tokens for tokens, _ in sequences]


@given(documents=DOCUMENTS, with_modes=st.booleans(), cut=st.integers(0, 6), lost=DOCUMENTS)
@FIXTURE
def test_rewound_streams_go_on(
    tmp_path: Path, documents: list[Document], with_modes: bool, cut: int, lost: list[Document]
) -> None:
    """What was appended after the position that was noted leaves no trace, whether or not it reached the disk."""
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    whole = IndexedStream(tmp_path / "work", "whole", np.uint16, with_modes=with_modes)
    whole.append(block_of(documents, np.uint16, with_modes))
    whole.finalize(tmp_path / "whole", None)

    stream = IndexedStream(tmp_path / "work", "s", np.uint16, with_modes=with_modes)
    stream.append(block_of(documents[:cut], np.uint16, with_modes))
    noted = stream.position()
    stream.append(block_of(lost, np.uint16, with_modes))
    stream.position()
    stream = IndexedStream(tmp_path / "work", "s", np.uint16, with_modes=with_modes)
    stream.rewind(noted)
    stream.append(block_of(documents[cut:], np.uint16, with_modes))
    stream.finalize(tmp_path / "ours", None)
    same_files(tmp_path / "ours", tmp_path / "whole")
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("killed_at", range(5))
def test_a_kill_while_files_get_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int) -> None:
    """Whichever rename was the last, the same call afterwards completes the files."""
    block = block_of([[([1, 2], 0), ([3], 0)], [([4], 0)]], np.uint16, False)
    whole = IndexedStream(tmp_path / "work", "whole", np.uint16, with_modes=False)
    whole.append(block)
    whole.finalize(tmp_path / "whole", lambda: FACTS)

    stream = IndexedStream(tmp_path / "work", "s", np.uint16, with_modes=False)
    stream.append(block)
    noted, calls, replace = stream.position(), [], os.replace

    def kill(source: Path, target: Path) -> None:
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        calls.append(target)
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", kill)
        with pytest.raises(KeyboardInterrupt):
            stream.finalize(tmp_path / "ours", lambda: FACTS)
    again = IndexedStream(tmp_path / "work", "s", np.uint16, with_modes=False)
    again.rewind(noted)
    again.finalize(tmp_path / "ours", lambda: FACTS, overwrite=True)
    same_files(tmp_path / "ours", tmp_path / "whole")
    assert file_paths(tmp_path / "ours")[2].read_bytes() == file_paths(tmp_path / "whole")[2].read_bytes()
    IndexedRecords(tmp_path / "ours").verify()


@given(documents=DOCUMENTS, kept=st.integers(0, 63))
def test_selected_documents(documents: list[Document], kept: int) -> None:
    mask = [bool(kept >> index & 1) for index in range(len(documents))]
    selected = block_of(documents, np.int32, True).select(np.array(mask))
    expected = block_of([d for d, keep in zip(documents, mask, strict=True) if keep], np.int32, True)
    for name in ("tokens", "lengths", "documents", "modes"):
        assert np.array_equal(getattr(selected, name), getattr(expected, name)), name


@given(parts=st.lists(DOCUMENTS, min_size=1, max_size=4), with_modes=st.booleans())
@FIXTURE
def test_joined_files(tmp_path: Path, parts: list[list[Document]], with_modes: bool) -> None:
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    parts = [[*part, [([7], 0)]] for part in parts]  # the engine's builder writes no modes into an empty file
    for number, part in enumerate(parts):
        write_theirs(tmp_path / f"part{number}", part, np.uint16, with_modes)
    write_theirs(tmp_path / "whole", [d for part in parts for d in part], np.uint16, with_modes)
    merge_indexed([tmp_path / f"part{number}" for number in range(len(parts))], tmp_path / "joined")
    same_files(tmp_path / "joined", tmp_path / "whole")


def write_records(prefix: Path, records: list, vocab_size: int = 100) -> None:
    with IndexedWriter(prefix, RowKind.GENERATIVE, vocab_size) as writer:
        for record in records:
            writer.add(record)
        writer.finalize(tokenizer_fingerprint="f" * 64, template="t", limits={})


def test_joined_records_keep_their_description(tmp_path: Path) -> None:
    chat, text = [(Role.TEMPLATE, [1]), (Role.ANSWER, [2, 3])], [(Role.TEXT, [4, 5, 6, 7])]
    write_records(tmp_path / "a", [chat])
    write_records(tmp_path / "b", [text, chat])
    write_records(tmp_path / "whole", [chat, text, chat])
    merge_indexed([tmp_path / "a", tmp_path / "b"], tmp_path / "joined")
    for joined, whole in zip(file_paths(tmp_path / "joined"), file_paths(tmp_path / "whole"), strict=True):
        assert joined.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: write_records(folder / "b", [[(Role.TEXT, [1, 2])]], 70_000),
            "b: has vocab_size 70000, not 100 as .*a; only",
        ),
        (lambda folder: (folder / "b.json").unlink(), "b: has no .json"),
        (lambda folder: os.truncate(folder / "b.bin", 2), r"b.bin \(byte 2\)"),
    ],
)
def test_what_cannot_be_joined(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    write_records(tmp_path / "a", [[(Role.TEXT, [1, 2])]])
    if "vocab_size" not in message:
        write_records(tmp_path / "b", [[(Role.TEXT, [1, 2])]])
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        merge_indexed([tmp_path / "a", tmp_path / "b"], tmp_path / "joined")
    assert not list(tmp_path.glob("joined*")) and not list(tmp_path.glob(".*"))


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """A file of more than 2^32 bytes and 2^31 tokens: a hole on disk, so that it costs nothing."""
    lengths = [2**31 - 1, 3, 2**31 - 1, 2]
    stream = IndexedStream(tmp_path / "work", "s", np.uint16, with_modes=False)
    stream.append(
        TokenBlock(
            tokens=np.empty(0, dtype=np.uint16),
            lengths=np.array(lengths, dtype=np.int32),
            documents=np.ones(4, dtype=np.int32),
        )
    )
    stream.position()
    with (tmp_path / "work" / "s.bin").open("r+b") as file:
        file.truncate(2 * sum(lengths))
        for value, start in ((7, 2**31 - 1), (9, sum(lengths) - 2)):
            file.seek(2 * start)
            file.write(np.array([value, value + 1], dtype=np.uint16).tobytes())
    stream.finalize(tmp_path / "large", None)
    file = IndexedFile(tmp_path / "large")
    assert file.pointers.tolist() == [0, 2 * (2**31 - 1), 2 * (2**31 + 2), 2 * (2**32 + 1)]
    assert file.read(1, 2).tolist() == [7, 8, 0] and file.read(3, 4).tolist() == [9, 10]
    theirs = IndexedDataset(str(tmp_path / "large"))
    assert theirs[3].tolist() == [9, 10]


def test_a_merge_is_alone_clears_leftovers_and_needs_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        indexed_files.write_chats(tmp_path / name, [(3, 4), (2, 5)])
    parts, output, work = [tmp_path / "a", tmp_path / "b"], tmp_path / "joined", tmp_path / ".joined.merge"
    merge_indexed(parts, tmp_path / "expected")
    with (
        locked(work / "lock", output),
        pytest.raises(OutputError, match="joined: another process is writing it"),
    ):
        merge_indexed(parts, output)
    for name in ("merged.ready.json", "merged.bin", "merged.staged.idx"):  # of a run that was killed
        (work / name).write_bytes(b"{}")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
        with pytest.raises(OutputError, match="joined: needs [0-9,]+ more bytes and 10 are free"):
            merge_indexed(parts, output)
    merge_indexed(parts, output)
    for suffix in (".bin", ".idx", ".json"):
        assert output.with_suffix(suffix).read_bytes() == (tmp_path / "expected").with_suffix(suffix).read_bytes()
    assert not work.exists()
