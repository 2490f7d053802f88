"""Lines of text in, an array on disk out: whole or not there, the same after a kill, in memory for one block."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_grit.errors import DataError, OutputError
from megatron_grit.inference import text_files
from megatron_grit.inference.model import GritModel
from megatron_grit.inference.text_files import TextFile, encode_file
from megatron_grit.store.lock import locked

SIZE = 8


def vectors(texts: list[str]) -> np.ndarray:
    return np.array([list(hashlib.sha256(text.encode()).digest()[:SIZE]) for text in texts], dtype=np.float32)


@pytest.fixture
def blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """A model that notes what it is given. Its checkpoint is the folder model."""
    given: list[list[str]] = []

    def encode(texts: list[str], **options: Any) -> np.ndarray:
        given.append(texts)
        return vectors(texts) + options.get("max_length", 0)

    decoder = SimpleNamespace(
        embedding_config=SimpleNamespace(projection_dim=SIZE),
        context=SimpleNamespace(device=SimpleNamespace(type="cpu")),
    )
    config = SimpleNamespace(training=SimpleNamespace(precision="fp32"))
    model = SimpleNamespace(encode=encode, model=decoder, config=config, num_cut=3)
    monkeypatch.setattr(GritModel, "load", lambda path, device: model)
    monkeypatch.setattr(text_files, "resolve_checkpoint", Path)
    monkeypatch.setattr(text_files, "BLOCK", 3)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "manifest.json").write_text("{}")
    yield given


def write(folder: Path, count: int) -> tuple[Path, str, Path]:
    (folder / "in.txt").write_text("".join(f"text {number}\n" for number in range(count)))
    return folder / "model", str(folder / "in.txt"), folder / "out.npy"


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def killed_after(num_blocks: int, run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a child that is killed as soon as it has written so many blocks."""
    pid = os.fork()
    if pid == 0:
        append, written = text_files.RowFile.append, []

        def then_killed(self: Any, rows: np.ndarray) -> None:
            if len(written) == num_blocks:
                assert self._file is not None
                self._file.write(b"half a bl")
                self._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            append(self, rows)
            written.append(len(rows))

        text_files.RowFile.append = then_killed  # type: ignore[method-assign]
        run()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_the_file_is_what_numpy_writes(
    tmp_path: Path, blocks: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = write(tmp_path, 7)
    with caplog.at_level("INFO"):
        found = encode_file(*arguments, max_length=9)
    assert "3 texts are longer than max_length, or than the model's positions: cut" in caplog.text
    assert arguments[2].read_bytes() == saved(vectors([f"text {number}" for number in range(7)]) + 9)
    assert [len(texts) for texts in blocks] == [3, 3, 1] and found.shape == (7, SIZE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "model", "out.npy"]


@pytest.mark.parametrize("num_blocks", [0, 1, 2])
def test_a_killed_run_resumes_with_the_same_bytes(
    tmp_path: Path, blocks: list[list[str]], monkeypatch: pytest.MonkeyPatch, num_blocks: int
) -> None:
    arguments = write(tmp_path, 8)
    arguments[2].write_bytes(b"of an earlier run")
    killed_after(num_blocks, lambda: encode_file(*arguments), monkeypatch)
    assert arguments[2].read_bytes() == b"of an earlier run"
    encode_file(*arguments)
    assert arguments[2].read_bytes() == saved(vectors([f"text {number}" for number in range(8)]))
    assert [len(texts) for texts in blocks] == [3, 3, 2][num_blocks:]
    assert not (tmp_path / ".out.npy.partial").exists()


def test_another_model_text_or_option_starts_afresh(
    tmp_path: Path, blocks: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = write(tmp_path, 8)

    def other_model() -> None:
        (tmp_path / "model" / "manifest.json").write_text('{"another": 1}')

    def other_text() -> None:
        (tmp_path / "in.txt").write_text((tmp_path / "in.txt").read_text().replace("text 7", "text 8"))

    def damaged() -> None:
        rows = tmp_path / ".out.npy.partial" / "rows.npy"
        content = bytearray(rows.read_bytes())
        content[-10] ^= 1
        rows.write_bytes(content)

    for change, options in ((other_model, {}), (other_text, {}), (damaged, {}), (lambda: None, {"max_length": 4})):
        killed_after(2, lambda: encode_file(*arguments), monkeypatch)
        change()
        blocks.clear()
        encode_file(*arguments, **options)
        assert [len(texts) for texts in blocks] == [3, 3, 2]
        assert arguments[2].read_bytes() == saved(
            vectors((tmp_path / "in.txt").read_text().split("\n")[:-1]) + options.get("max_length", 0)
        )


def test_two_at_a_time_and_a_full_disk_are_told_before_the_first_text(
    tmp_path: Path, blocks: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = write(tmp_path, 8)
    with (
        locked(tmp_path / ".out.npy.partial" / "lock", arguments[2]),
        pytest.raises(OutputError, match="out.npy: another process is writing it"),
    ):
        encode_file(*arguments)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(OutputError, match="out.npy: needs 256 more bytes and 100 are free, so 156 are missing"):
        encode_file(*arguments)
    assert not blocks and not (tmp_path / ".out.npy.partial" / "journal.json").exists()


def test_memory_does_not_grow_with_the_lines(
    tmp_path: Path, blocks: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "BLOCK", 500)
    monkeypatch.setattr(text_files, "check_room", lambda *_: blocks.clear())
    model = GritModel.load("", device="cpu")
    model.encode = lambda texts, **options: np.zeros((len(texts), SIZE), dtype=np.float32)  # type: ignore
    monkeypatch.setattr("os.fsync", lambda _: None)
    peaks = []
    for count in (20_000, 100_000):
        arguments = write(tmp_path, count)
        tracemalloc.start()
        encode_file(*arguments)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0], peaks


def test_texts_that_change_meanwhile(tmp_path: Path, blocks: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = write(tmp_path, 8)
    monkeypatch.setattr(text_files, "check_room", lambda *_: write(tmp_path, 9))
    with pytest.raises(DataError, match="in.txt: changed while it was being read"):
        encode_file(*arguments)
    assert not arguments[2].exists()


def test_standard_input(tmp_path: Path, blocks: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    for content, message in (("ä\n\nb\n", "<stdin>:2: is empty"), ("", "<stdin>: holds no text")):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content.encode())))
        with pytest.raises(DataError, match=message):
            encode_file(tmp_path / "model", "-", tmp_path / "out.npy")
        assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left behind"
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO("ä\nb".encode())))
    encode_file(tmp_path / "model", "-", tmp_path / "new" / "out.npy")
    assert blocks == [["ä", "b"]] and (tmp_path / "new" / "out.npy").read_bytes() == saved(vectors(["ä", "b"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "texts.txt: holds no text"),
        (b"a\n \nb\n", "texts.txt:2: is empty"),
        (b"ab\xff", "texts.txt:1: not"),
    ],
)
def test_unusable_input(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        TextFile(path, path).survey()


def test_missing_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing.txt: no such input file"):
        encode_file("model", str(tmp_path / "missing.txt"), tmp_path / "out.npy")
    assert not list(tmp_path.iterdir())
